"""Running `tpdne` as a process of its own, in a real shell, and killing it."""

from __future__ import annotations

import atexit
import functools
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM = Path(__file__).resolve().parent / "warm.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
started: list[subprocess.Popen[bytes]] = []
COLD = [sys.executable, "-c", "from tpdne_cli.cli import main; main()"]


@functools.cache
def warm() -> list[str]:
    """The beginning of a command line that runs tpdne without waiting for imports (see warm.py)."""
    folder = tempfile.TemporaryDirectory(prefix="tpdne-")
    address = str(Path(folder.name) / "socket")
    server = subprocess.Popen(
        [sys.executable, str(WARM), "serve", address], env=ENVIRONMENT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"

    def stop() -> None:
        server.kill()
        server.wait()
        folder.cleanup()

    atexit.register(stop)
    return [sys.executable, "-I", "-S", str(WARM), "call", address]


def shell(script: str, cwd: Path, cold: bool = False, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A real shell with `tpdne` in it; cold: a new interpreter for each call of it."""
    function = f'tpdne() {{ {shlex.join(COLD if cold else warm())} "$@"; }}\n'
    env = {**ENVIRONMENT, **environment}
    return subprocess.run(["bash", "-c", function + script], cwd=cwd, capture_output=True, env=env, timeout=300)


def start(*arguments: object, cwd: Path, cold: bool = False, **environment: str) -> subprocess.Popen[bytes]:
    """A tpdne that runs while the test goes on, with pipes for its output."""
    command = [*(COLD if cold else warm()), *map(str, arguments)]
    env = {**ENVIRONMENT, **environment}
    child = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    started.append(child)
    return child


def end_all() -> None:
    """End what `start` has started, as a failed test leaves it."""
    while started:
        child = started.pop()
        if child.poll() is None:
            child.kill()
            child.wait()


def pid_of(child: subprocess.Popen[bytes], file: Path) -> int:
    """The process behind a warm child that was started with WARM_PID=file."""
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text().endswith("\n")):
        assert time.monotonic() < deadline and child.poll() is None, "tpdne did not start"
        time.sleep(0.001)
    pid = int(file.read_text())
    file.unlink()
    return pid


def children(pid: int) -> list[int]:
    """Processes that a process has forked (Linux)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
