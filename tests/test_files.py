"""Files appear whole or not at all: killed writers, full disks, races, and names that must not be touched."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tpdne_cli import files
from tpdne_cli.errors import OutputError
from tpdne_cli.streaming import spooled

ROOT = Path(files.__file__).parent.parent

WRITER = """
import sys
from pathlib import Path
from tpdne_cli.files import write_atomic
folder, size = Path(sys.argv[1]), 300_000
for number in range(int(sys.argv[2]), 100_000):
    write_atomic(folder / f"{number}.bin", bytes([number % 251]) * size, exclusive=number % 2 == 0)
"""


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_new_replaced_and_kept(tmp_path):
    path = tmp_path / "a b\nc é 面.png"
    files.write_atomic(path, b"one", exclusive=True)
    assert path.read_bytes() == b"one"
    with pytest.raises(OutputError, match="cannot be written: it exists already"):
        files.write_atomic(path, b"two", exclusive=True)
    assert path.read_bytes() == b"one"
    files.write_atomic(str(path), b"three")
    files.write_atomic(tmp_path / ("n" * 255), b"")  # the longest name a file can have
    assert path.read_bytes() == b"three"
    assert names(tmp_path) == sorted([path.name, "n" * 255])


def test_a_bare_name_goes_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_atomic("face.png", b"x")
    assert (tmp_path / "face.png").read_bytes() == b"x"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("exclusive", [False, True])
def test_the_umask_is_respected(tmp_path, mask, mode, exclusive):
    before = os.umask(mask)
    try:
        files.write_atomic(tmp_path / "file", b"x", exclusive=exclusive)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_writers_killed_at_any_moment_leave_whole_files_and_what_they_leave_is_cleared(tmp_path):
    moment = random.Random(0)
    for round_ in range(25):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(round_ * 1000)]
        with subprocess.Popen(command, cwd=ROOT) as writer:
            deadline = time.monotonic() + 20
            while not (tmp_path / f"{round_ * 1000}.bin").exists():
                assert time.monotonic() < deadline and writer.poll() is None
                time.sleep(0.001)
            time.sleep(moment.random() * 0.02)
            writer.send_signal(signal.SIGKILL)
    results = [path for path in tmp_path.iterdir() if not files.is_temporary(path)]
    assert len(results) >= 25
    for path in results:
        assert path.read_bytes() == bytes([int(path.stem) % 251]) * 300_000, f"{path.name} is not whole"
        path.unlink()
    files.remove_leftovers(tmp_path)
    assert not names(tmp_path)


def test_what_is_being_written_is_no_leftover(tmp_path):
    path, descriptor = files._open_temporary(tmp_path)
    (tmp_path / "result.png").write_bytes(b"x")
    (tmp_path / ".tpdne-notes").write_bytes(b"x")
    assert files.is_temporary(path)
    assert files.remove_leftovers(tmp_path) == 0
    os.close(descriptor)
    assert files.remove_leftovers(tmp_path) == 1
    assert names(tmp_path) == [".tpdne-notes", "result.png"]
    assert files.remove_leftovers(tmp_path / "missing") == 0


def test_of_many_writers_of_one_name_exactly_one_wins(tmp_path):
    for attempt in range(20):
        path, barrier, told = tmp_path / str(attempt), threading.Barrier(6), []

        def write(number: int, path=path, barrier=barrier, told=told) -> None:
            barrier.wait()
            try:
                files.write_atomic(path, b"%d" % number * 1000, exclusive=True)
            except OutputError as error:
                told.append(str(error))

        threads = [threading.Thread(target=write, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(told) == 5 and len(set(path.read_bytes())) == 1 and path.stat().st_size == 1000
    assert len(names(tmp_path)) == 20


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL])
def test_a_file_system_without_links(tmp_path, monkeypatch, code):
    def link(*_: object) -> None:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", link)
    files.write_atomic(tmp_path / "a", b"1", exclusive=True)
    with pytest.raises(OutputError, match="exists already"):
        files.write_atomic(tmp_path / "a", b"2", exclusive=True)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"1"


def spied(monkeypatch) -> list[str]:
    """What brings content or names to the disk, in the order in which it is called."""
    order: list[str] = []
    for owner, name in ((os, "fsync"), (os, "link"), (Path, "replace")):
        original = getattr(owner, name)

        def spy(*arguments: object, original=original, name=name) -> object:
            order.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, spy)
    return order


@pytest.mark.parametrize("exclusive", [False, True])
def test_content_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch, exclusive):
    order = spied(monkeypatch)
    files.write_atomic(tmp_path / "a", b"1", exclusive=exclusive)
    assert order == ["fsync", "link" if exclusive else "replace"]


def test_devices_and_pipes_are_written_not_replaced(tmp_path):
    null = Path(os.devnull)
    before = null.stat()
    files.write_atomic(null, b"x" * 100)
    assert stat.S_ISCHR(null.stat().st_mode) and null.stat().st_ino == before.st_ino
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    files.write_atomic(pipe, b"through")
    reader.join()
    assert got == [b"through"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_link_is_replaced_and_what_it_points_to_is_kept(tmp_path):
    (tmp_path / "original").write_bytes(b"1")
    (tmp_path / "link").symlink_to("original")
    with pytest.raises(OutputError, match="exists already"):
        files.write_atomic(tmp_path / "link", b"2", exclusive=True)
    files.write_atomic(tmp_path / "link", b"2")
    assert (tmp_path / "original").read_bytes() == b"1" and (tmp_path / "link").read_bytes() == b"2"


def test_places_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    for path, sentence in {
        tmp_path / "missing" / "a.png": "a.png' cannot be written: its directory does not exist: create it first",
        tmp_path / "file" / "a.png": "a part of the path is a file",
        tmp_path: "a directory has that name",
        tmp_path / ("n" * 256): "the name is too long",
        tmp_path / "a\0b": "null byte",
        Path("/proc/a.png"): "cannot be written",
    }.items():
        with pytest.raises(OutputError, match=sentence) as caught:
            files.write_atomic(path, b"x")
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]


def test_a_directory_that_may_not_be_written():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        if user := os.geteuid() == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            with pytest.raises(OutputError, match="permission is denied: choose another directory"):
                files.write_atomic(Path(folder, "a.png"), b"x")
        finally:
            if user:
                os.seteuid(0)
        assert not names(folder)


@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("exclusive", [False, True])
def test_a_disk_that_fails_while_it_writes(tmp_path, monkeypatch, code, exclusive):
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "b").write_bytes(b"kept")
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("a", "b"):
        with pytest.raises(OutputError, match=f"{name}' cannot be written: "):
            files.write_atomic(tmp_path / name, b"x" * 1000, exclusive=exclusive)
    assert names(tmp_path) == ["b"] and (tmp_path / "b").read_bytes() == b"kept"


def test_an_interrupt_while_it_writes_leaves_nothing(tmp_path, monkeypatch):
    def fsync(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "a", b"x")
    assert not names(tmp_path)


def test_a_disk_that_fills(tmp_path):
    mount = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system can only be mounted by root")
    try:
        files.write_atomic(tmp_path / "a", b"1" * 30_000)
        for exclusive in (False, True):
            with pytest.raises(OutputError, match="the disk is full: free some space and run again"):
                files.write_atomic(tmp_path / ("b" if exclusive else "a"), b"2" * 60_000, exclusive=exclusive)
        assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"1" * 30_000
        files.write_atomic(tmp_path / "b", b"3" * 20_000)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_limit_on_the_size_of_files(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        files.write_atomic(tmp_path / "a", b"1" * 10_000)
        with pytest.raises(OutputError, match="larger than the limit for files here"):
            files.write_atomic(tmp_path / "b", b"2" * 10_001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("unknown", [False, True])
def test_a_file_system_without_locks(tmp_path, monkeypatch, unknown):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    with (tmp_path / "a").open("wb") as file:
        monkeypatch.setattr("fcntl.flock", flock)
        assert files.lock(file.fileno(), unknown) == unknown
        monkeypatch.undo()
        with (tmp_path / "a").open("wb") as other:
            assert files.lock(other.fileno()) and not files.lock(file.fileno(), unknown), "somebody has it"


@pytest.mark.parametrize("replace", [True, False])
def test_content_that_comes_in_pieces_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch, replace):
    order = spied(monkeypatch)
    with spooled(tmp_path / "a", replace) as file:
        file.write(b"1")
    assert order == ["fsync", "replace" if replace else "link"]
