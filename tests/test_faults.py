"""Faults, for real: kill -9, disks that fill and fail, too little memory, impatient users, a wrong clock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from running import files, pid_of, shell, start

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


def tree(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def records(path: Path) -> list[dict]:
    return [{**json.loads(line), "seconds": None} for line in path.read_text().splitlines()]


def undisturbed(model: Path, folder: Path, *options: object) -> tuple[dict[str, bytes], list[dict]]:
    """What a run without any fault leaves: files and manifest."""
    folder.mkdir()
    child = start("generate", model, *options, "-o", "d", "--manifest", "m", "-q", cwd=folder)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    return tree(folder / "d"), records(folder / "m")


@linux
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_run_again(tiny_model, tmp_path, kills):
    """The same command, killed again and again, ends with exactly the files and the manifest of a whole run.

    Two shards write into one directory at the same time, so that each clears up beside the other's half-written files.
    """
    options = ["--seeds", f"0-{kills * 60}", "--name", "{index}/{seed}" if kills < 10 else "{seed}"]
    whole, _ = undisturbed(tiny_model, tmp_path / "whole", *options)
    moment, hits, half_written = random.Random(kills), 0, 0
    folder = tmp_path / "killed"
    folder.mkdir()

    def begin(shard: int) -> subprocess.Popen[bytes]:
        call = ["generate", tiny_model, *options, "-o", "d", "--manifest", f"m{shard}", "--skip-existing", "-q"]
        return start(*call, "--shard", f"{shard}/2", cwd=folder, WARM_PID=str(tmp_path / f"pid{shard}"))

    while hits < kills:
        both = [begin(1), begin(2)]
        pids = [pid_of(child, tmp_path / f"pid{i}") for i, child in enumerate(both, 1)]
        if moment.random() < 0.8:  # mostly while it writes; sometimes while it begins, or looks at what is there
            both[0].stdout.readline()
            time.sleep(moment.random() * 0.1)
        else:
            time.sleep(moment.random() * 0.6)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # done before we were
                os.kill(pid, signal.SIGKILL)
        for child in both:
            _, err = child.communicate(timeout=60)
            assert child.returncode in (0, -9), err
            hits += child.returncode == -9
        half_written += sum(name.endswith(".tmp") for name in files(folder))
        if all(child.returncode == 0 for child in both):  # too fast for us: once more from the beginning
            shutil.rmtree(folder / "d")
    for shard in (1, 2):
        child = begin(shard)
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
    assert tree(folder / "d") == whole
    names = [record["path"] for shard in (1, 2) for record in records(folder / f"m{shard}")]
    assert sorted(names) == [f"d/{name}" for name in whole]
    print(f"{hits} killed, {half_written} left a half-written file behind")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 96 kB, for ourselves."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@linux
@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount")
def test_a_disk_that_fills_and_is_given_room(tiny_model, tmp_path, disk):
    call = f"tpdne generate {tiny_model} --seeds 0-99 -o disk/d --manifest disk/m"
    whole, manifest = undisturbed(tiny_model, tmp_path / "whole", "--seeds", "0-99")
    done = shell(call, tmp_path)
    there = files(disk / "d")
    assert done.returncode == 1 and 5 < len(there) < 100
    warning, error = done.stderr.decode().splitlines()
    assert warning == (
        f"Warning: Stopped: {len(there)} of 100 images are there; the same command with --skip-existing goes on."
    )
    assert error.startswith("Error: ") and ("disk is full" in error or "No space left" in error)
    assert done.stdout.decode().splitlines() == [f"disk/d/{name}" for name in there], "all that is there is reported"
    assert tree(disk / "d") == {name: whole[name] for name in there}, "nothing is half-written"
    done = shell(f"{call} --skip-existing", tmp_path)
    assert done.returncode == 1 and len(done.stderr.decode().splitlines()[-1]) < 200
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    done = shell(f"{call} --skip-existing", tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(disk / "d") == whole
    assert [{**r, "path": r["path"].replace("disk/", "")} for r in records(disk / "m")] == manifest


@linux
@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount")
def test_a_disk_that_is_read_only(tiny_model, tmp_path, disk):
    (disk / "d").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for out in ("disk/d", "disk/new", "disk/a.png", "disk/new/a.png"):
        done = shell(f"tpdne generate {tiny_model} --seed 1 -o {out}", tmp_path)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.count(b"\n") == 1 and b"Read-only file system" in done.stderr, done.stderr
    done = shell(f"tpdne generate {tiny_model} --seed 1 -o d --manifest disk/m", tmp_path)
    assert done.returncode == 1 and b"The manifest disk/m cannot be written" in done.stderr


@linux
def test_a_limit_for_files(tiny_model, tmp_path):
    done = shell(f"ulimit -f 1; tpdne generate {tiny_model} --seeds 0-9 -o d", tmp_path)
    assert done.returncode == 1 and b"ulimit -f" in done.stderr and done.stderr.count(b"\n") == 1
    assert files(tmp_path) == []


@pytest.fixture
def cli(cli, tiny_model):
    return partial(cli, "generate", tiny_model)


@pytest.mark.parametrize("at", [1, 2, 17, 40])
@pytest.mark.parametrize("place", ["fsync", "link"])
def test_a_disk_that_fails_in_an_encoder_thread(cli, tmp_path, monkeypatch, at, place):
    genuine, calls = getattr(os, place), []

    def failing(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return genuine(*arguments, **settings)

    monkeypatch.setattr(os, place, failing)
    code, out, err = cli("--seeds", "0-99", "-o", "d", "--manifest", "m")
    assert code == 1 and "input/output error" in err and err.count("Error: ") == 1
    assert sorted(out) == [f"d/{name}" for name in files(tmp_path / "d")], "what is there is what was reported"
    assert at - 1 <= len(out) < 100 and len(records(tmp_path / "m")) == len(out)
    monkeypatch.setattr(os, place, genuine)
    assert cli("--seeds", "0-99", "-o", "d", "--manifest", "m", "--skip-existing")[0] == 0
    assert len(files(tmp_path / "d")) == 100 == len(records(tmp_path / "m"))
    for path in (tmp_path / "d").iterdir():
        Image.open(path).load()


SLOW = ["--seeds", "0-999", "--size", "1500", "--format", "webp", "--quality", "100", "--no-metadata"]  # slow to encode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(tiny_model, tmp_path, number):
    child = start("generate", tiny_model, *SLOW, "-o", "d", cwd=tmp_path)
    child.stdout.readline()
    child.send_signal(number)
    assert child.stderr.readline().startswith(b"Finishing the images in flight")
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in err and err.count(b"\n") == 1 and b"images are there" in err
    there = files(tmp_path / "d")
    assert 1 <= len(there) <= len(out.splitlines()) + 4 < 40, "the images that waited for an encoder are not made"
    for name in there:
        Image.open(tmp_path / "d" / name).load()


def test_an_interrupted_archive_has_no_end_mark(tiny_model, tmp_path):
    child = start("generate", tiny_model, "--seeds", "0-9999", "-o", "-", cwd=tmp_path)
    head = child.stdout.read(4096)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and b"of 10000 images were written" in err
    assert len(head + out) % 512 == 0 and not out.endswith(bytes(1024))


def test_a_fresh_run_says_how_to_go_on(tiny_model, tmp_path):
    """The same command again would draw other seeds."""
    child = start("generate", tiny_model, "-n", "5000", "-o", "d", cwd=tmp_path)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    there = len(files(tmp_path / "d"))
    again = err.decode().splitlines()[-1].split("; ")[1].removesuffix(" goes on.")
    assert again.startswith("--seed ") and again.endswith(" --count 5000 --skip-existing")
    done = shell(f"tpdne generate {tiny_model} -o d {again.replace('--count 5000', f'--count {there + 3}')}", tmp_path)
    assert done.returncode == 0 and len(files(tmp_path / "d")) == there + 3


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """64 pixels, and layers that take half a megabyte for each image."""
    import torch

    from tpdne_cli import models
    from tpdne_cli.networks.stylegan2 import Config, Generator

    torch.manual_seed(0)
    config = Config(resolution=64, z_dim=8, w_dim=8, mapping_layers=1, channel_base=2048, channel_max=32)
    path = tmp_path_factory.mktemp("models") / "wide.safetensors"
    models.save(path, "stylegan2", config, Generator(config).state_dict(), {})
    return path


@linux
def test_a_limit_of_memory_makes_smaller_batches(wide_model, tmp_path):
    """At any limit: all images, the same bytes; or one sentence, and nothing half-written."""
    call = f"tpdne generate {wide_model} --seeds 0-95 --batch-size 96 -q"
    child = start(*call.split()[1:], "-o", "whole", cwd=tmp_path, WARM_PID=str(tmp_path / "pid"))
    pid = pid_of(child, tmp_path / "pid")
    base = peak = memory(pid, "VmSize")
    while child.poll() is None:
        base, peak = min(base, memory(pid, "VmSize") or base), max(peak, memory(pid, "VmPeak"))
        child.stdout.readline()
    assert peak > base + 200_000, "the run needs more than the limits below"
    codes = []
    for share in (0.1, 0.25, 0.4, 0.55, 0.7):
        limit = base + int((peak - base) * share)
        done = shell(f"ulimit -v {limit}; {call} -o at{limit}", tmp_path)
        codes.append(done.returncode)
        if done.returncode == 0:
            assert tree(tmp_path / f"at{limit}") == tree(tmp_path / "whole") and done.stderr == b""
        else:
            lines = done.stderr.decode().splitlines()
            assert done.returncode == 1 and lines[-1].startswith("Error: ") and "memory" in lines[-1], done.stderr
            assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    assert codes[0] == 1 and codes[2:] == [0, 0, 0], "with less than half of the memory there are smaller batches"


@linux
@pytest.mark.parametrize("what", ["sheet --seeds 0-31 -o", "interpolate --seeds 1,2 --frames 32 --method linear -o"])
def test_a_picture_of_many_images_is_made_of_smaller_batches(wide_model, tmp_path, little_memory, what):
    call = f"tpdne {what} {{}} --model {wide_model} --batch-size 96 -q"
    assert shell(call.format("whole.png"), tmp_path).returncode == 0
    group = f"echo $$ > {little_memory}/cgroup.procs"
    done = shell(f"{group}; {call.format('d.png')}", tmp_path, cold=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert tree(tmp_path)["d.png"] == tree(tmp_path)["whole.png"]


@linux
@pytest.mark.parametrize("limit", [60_000, 250_000, 500_000])
def test_a_limit_of_memory_that_not_even_the_libraries_fit_in(wide_model, tmp_path, limit):
    """Loaded without enough of it they do not raise, they abort; kB."""
    done = shell(f"ulimit -v {limit}; tpdne generate {wide_model} --seeds 0-95 -o d", tmp_path, cold=True)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"Error: There is not enough memory") and done.stderr.count(b"\n") == 1, done.stderr
    assert files(tmp_path) == []


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group of 300 MB, of either version: who writes his number into its cgroup.procs lives in it."""
    first = Path("/sys/fs/cgroup/memory")
    group = (first if first.is_dir() else first.parent) / f"tpdne-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(300 << 20))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip("control groups are not ours to make")
    yield group
    for _ in range(100):  # until the last process is forgotten
        with contextlib.suppress(OSError):
            group.rmdir()
            break
        time.sleep(0.05)


@linux
def test_the_kernels_killer_makes_smaller_batches(wide_model, tmp_path, little_memory):
    """As in a container. A process for each core or one alone: whichever is killed, its images are made by another."""
    call = f"tpdne generate {wide_model} --seeds 0-95 --batch-size 96 -q"
    assert shell(f"{call} -o whole", tmp_path).returncode == 0
    done = shell(f"echo $$ > {little_memory}/cgroup.procs; {call} -o d", tmp_path, cold=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def memory(pid: int, what: str) -> int:
    """kB, by the kernel's account; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), 0)


@linux
@pytest.mark.slow
def test_a_hundred_thousand_images_take_no_more_memory_than_ten_thousand(tiny_model, tmp_path):
    call = ["generate", tiny_model, "--seeds", "0-99999", "-o", "d", "--manifest", "m", "-q"]
    child = start(*call, cwd=tmp_path, WARM_PID=str(tmp_path / "pid"))
    pid, seen, start_time = pid_of(child, tmp_path / "pid"), {}, time.monotonic()
    for count in range(1, 100_001):
        child.stdout.readline()
        if count in (10_000, 50_000, 99_990):
            seen[count] = memory(pid, "VmRSS")
    child.communicate(timeout=60)
    print(f"{100_000 / (time.monotonic() - start_time):.0f} images/s, kB resident: {seen}")
    assert child.returncode == 0 and len(list((tmp_path / "d").iterdir())) == 100_000
    assert seen[99_990] < seen[10_000] + 10_000


def test_a_clock_that_jumps(cli, tmp_path, monkeypatch):
    """Set back by a year, or forward, between any two looks: nothing but the bar's guess depends on it."""
    import tqdm.std

    assert cli("--seeds", "0-40", "-o", "whole")[0] == 0
    jumping = random.Random(0)
    wrong = lambda: 1.7e9 + jumping.uniform(-4e7, 4e7)  # noqa: E731
    monkeypatch.setattr(time, "time", wrong)
    monkeypatch.setattr(time, "time_ns", lambda: int(wrong() * 1e9))
    monkeypatch.setattr(tqdm.std, "time", wrong)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # the bar is shown, and must live
    code, out, _ = cli("--seeds", "0-40", "-o", "d", "--manifest", "m")
    assert code == 0 and len(out) == 41
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")
    assert all(0 <= json.loads(line)["seconds"] < 60 for line in (tmp_path / "m").read_text().splitlines())
