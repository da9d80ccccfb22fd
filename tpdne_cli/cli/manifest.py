"""The manifest of a run: one JSON line per image, written as each is finished."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tpdne_cli.errors import OutputError
from tpdne_cli.files import lock, remove_leftovers


def check_manifest(
    path: str | None, outputs: Iterable[Path], force: bool, skip: bool = False, resumable: bool = True
) -> None:
    """Raises OutputError, before any work is done, for a manifest that is there, is none, or has no place of its own.

    outputs: where the images go; resumable: whether there is a --skip-existing to advise.
    """
    if path is None:
        return
    place, real = Path(path), os.path.realpath(path)
    names = {place.name, os.path.basename(real)}  # noqa: PTH119
    if any(out.name in names and os.path.realpath(out) == real for out in outputs):
        raise OutputError(f"The manifest {path} would be the image itself: give it another name.")
    if place.is_file() and not (force or skip):  # a pipe is there and holds nothing
        ways = "--force replaces it, and --skip-existing completes it" if resumable else "--force replaces it"
        raise OutputError(f"The manifest {path} exists: {ways}.")
    if not place.parent.is_dir():
        raise OutputError(f"The manifest {path} cannot be written: its directory does not exist.")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise OutputError(f"The manifest {path} cannot be written: choose another place.")
    if place.is_file() and skip:
        last_lines(path)


class Manifest:
    """Takes records; a line is in the file when `add` returns. Without a file it forgets them."""

    def __init__(self, path: str | None, file: BinaryIO | None) -> None:
        self.path, self.file = path, file
        self.failure: OutputError | None = None  # kept for later: images in flight are still to be finished and told

    def add(self, record: Mapping[str, Any]) -> None:
        if self.file is None or self.failure is not None:
            return
        try:
            self.file.write((json.dumps(record) + "\n").encode())
        except OSError as error:
            self.failure = OutputError(f"The manifest {self.path} cannot be written: {error.strerror}.")


@contextmanager
def open_manifest(path: str | None, skip: bool = False, force: bool = False) -> Iterator[Manifest]:
    """A manifest: empty, which only `force` makes of one that is there, or with `skip` what is there, to be completed.

    Raises OutputError, also where another run is writing it. Lines are only ever added to what is there; when all is
    done, an image that has several keeps the last of them.
    """
    if path is None:
        yield Manifest(None, None)
        return
    complete = skip and Path(path).is_file()
    if complete:
        with _opened(path, new=False) as file:
            tidy(path, file)
    with _opened(path, new=not (complete or force), empty=force) as file:
        try:
            yield Manifest(path, file)
        except BaseException:
            with suppress(OutputError):  # a line too many is no harm
                if complete:
                    tidy(path, file)
            raise
        if complete:
            tidy(path, file)


def _opened(path: str, new: bool, empty: bool = False) -> BinaryIO:
    """The file to write at its end, this run's alone until it is closed. Raises OutputError.

    new: it must not be there yet; empty: whatever it holds is dropped.
    """
    place = Path(path)
    try:
        if place.exists() and not place.is_file():  # a pipe or a device, which holds nothing
            return place.open("wb", buffering=0)
        while True:
            file = Path(os.path.realpath(place)).open("xb" if new else "ab", buffering=0)  # noqa: SIM115
            if not lock(file.fileno(), unknown=True):
                file.close()
                raise FileExistsError
            if os.fstat(file.fileno()).st_nlink:  # else another run had put a tidied one in its place before the lock
                break
            file.close()
        if empty:
            file.truncate(0)
        return file
    except FileExistsError:
        raise OutputError(
            f"Another run is writing the manifest {path}: give each run or shard one of its own, as --shard auto does."
        ) from None
    except OSError as error:
        raise OutputError(f"The manifest {path} cannot be written: {error.strerror}.") from None


def last_lines(path: str) -> set[int]:
    """Numbers of the lines that count: of each image the last one. Raises OutputError for what is no manifest."""
    last: dict[object, int] = {}
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file):
                image = _image_of(line)
                if image is not None:
                    last[image or number] = number
                elif line.endswith(b"\n") or not b'{"path": '.startswith(line[:9]):  # else a full disk cut it short
                    raise OutputError(
                        f"{path} is no manifest that could be completed (see its line {number + 1}): name another file."
                    )
    except OSError as error:
        raise OutputError(f"The manifest {path} cannot be read: {error.strerror}.") from None
    return set(last.values())


def _image_of(line: bytes) -> str | None:
    """The path that a line of a manifest names, empty for standard output; None for any other line."""
    try:
        record = json.loads(line)
        return str(record["path"] or "")
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def tidy(path: str, held: BinaryIO) -> None:
    """Rewrite a manifest at one stroke with the lines that count, each of them whole. Raises OutputError.

    held: the file itself, which keeps other runs away until then.
    """
    from tpdne_cli.streaming import spooled

    wanted = last_lines(path)
    remove_leftovers(Path(path).parent)
    with spooled(path) as tidied, Path(path).open("rb") as file:
        tidied.writelines(line.rstrip(b"\n") + b"\n" for number, line in enumerate(file) if number in wanted)
        if os.name == "nt":  # Windows renames no open file
            held.close()
