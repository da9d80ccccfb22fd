"""Sampler -> encoder threads -> disk or stream, in order and with back-pressure.

The calling thread runs the network; Pillow's encoders release the GIL and work beside it. No more images wait than
the window holds, so memory stays flat however many are made.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO, TypeVar

from tpdne_cli import images
from tpdne_cli.errors import ImageError, OutputError
from tpdne_cli.files import as_argument, write_atomic
from tpdne_cli.sampler import Sample

T = TypeVar("T")
R = TypeVar("R")

# Encoders: two keep up with a CPU's network, a GPU wants more (0.1 s for a PNG of 1024 px).
WORKERS = max(2, min(16, os.cpu_count() or 2))
OUT_OF_MEMORY = ("out of memory", "codec configuration error")  # in the words of Pillow's encoders
WINDOW = 64  # images that may wait for an encoder or for their turn


@dataclass(frozen=True)
class Encoding:
    """How pixels become a file: format png, jpg or webp; quality 1-100; size of the longest side; recipe inside.

    Raises SettingsError for a quality that the format does not have.
    """

    format: str = "png"
    quality: int | None = None
    size: int | None = None
    metadata: bool = True

    def __post_init__(self) -> None:
        images.check_quality(self.format, self.quality)

    @property
    def used_quality(self) -> int | None:
        """The quality, the format's own where none was chosen; None where it has no such thing."""
        return images.check_quality(self.format, self.quality)

    def __call__(self, sample: Sample) -> bytes:
        recipe = sample.recipe if self.metadata else None
        try:
            return images.encode(sample.pixels, self.format, self.quality, recipe, self.size)
        except ImageError as error:
            if any(sign in str(error) for sign in OUT_OF_MEMORY):
                raise MemoryError(str(error)) from None
            raise


@dataclass(frozen=True)
class Written:
    """One finished image: its recipe, where it lies (in an archive: its name there), and what was written."""

    recipe: dict[str, Any]
    path: Path | None
    format: str
    quality: int | None  # None: the format has no such thing
    width: int
    height: int
    bytes: int
    sha256: str
    seconds: float | None  # of the network, its share of the batch; None: made by an earlier run

    @property
    def name(self) -> str | None:
        """The path for other programs."""
        return None if self.path is None else as_argument(self.path)

    def record(self) -> dict[str, Any]:
        """The image as one flat object, for NDJSON and manifests."""
        return {
            "path": self.name,
            **self.recipe,
            "format": self.format,
            "quality": self.quality,
            "width": self.width,
            "height": self.height,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "seconds": None if self.seconds is None else round(self.seconds, 6),
        }


def in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int = WORKERS, window: int = WINDOW
) -> Iterator[R]:
    """map(function, items) on threads, results in order, at most `window` items ahead of the reader.

    Where the items end in an error, what came before is still delivered; so it is where the function raises one. What
    finds no memory beside the work that makes the items is tried once more by the caller's thread, between them.
    """
    pending: deque[tuple[Future[R], T]] = deque()
    failure: Exception | None = None

    def until_failure() -> Iterator[T]:
        nonlocal failure
        try:
            yield from items
        except Exception as error:
            failure = error

    def first() -> R:
        future, item = pending.popleft()
        try:
            return future.result()
        except MemoryError:
            return function(item)

    with _threads(function, workers) as submit:
        try:
            for item in until_failure():
                pending.append((submit(item), item))
                while pending and (len(pending) >= window or pending[0][0].done()):
                    yield first()
            while pending:
                yield first()
            if failure is not None:
                raise failure
        finally:  # an error, or a reader that went away: what has not begun never will
            for future, _ in pending:
                future.cancel()


@contextmanager
def _threads(function: Callable[[T], R], workers: int) -> Iterator[Callable[[T], Future[R]]]:
    """A function that gives an item to a thread; where the system grants no thread, it does the work itself.

    (ThreadPoolExecutor starts its threads late, when there may be no room for them, and forgets the item then.)
    """
    tasks: SimpleQueue[tuple[Future[R], T] | None] = SimpleQueue()
    threads: list[Thread] = []

    def work() -> None:
        while (task := tasks.get()) is not None:
            perform(*task)

    def perform(future: Future[R], item: T) -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)

    def submit(item: T) -> Future[R]:
        future: Future[R] = Future()
        if threads:
            tasks.put((future, item))
        else:
            perform(future, item)
        return future

    with suppress(RuntimeError):
        for number in range(workers):
            thread = Thread(target=work, name=f"worker-{number}", daemon=True)
            thread.start()
            threads.append(thread)
    try:
        yield submit
    finally:
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join()


def describe(sample: Sample, path: Path | None, data: bytes, encoding: Encoding) -> Written:
    height, width = sample.pixels.shape[:2]
    if encoding.size is not None:
        width, height = images.scaled(width, height, encoding.size)
    digest = hashlib.sha256(data).hexdigest()
    return Written(
        recipe=sample.recipe,
        path=path,
        format=encoding.format,
        quality=encoding.used_quality,
        width=width,
        height=height,
        bytes=len(data),
        sha256=digest,
        seconds=sample.seconds,
    )


def write_files(
    samples: Iterable[tuple[Sample, Path]],
    encoding: Encoding,
    replace: bool = False,
    workers: int = WORKERS,
    earlier: Callable[[Sample, Path], Written | None] = lambda *_: None,
) -> Iterator[Written]:
    """Write each sample to its path, whole or not at all, and yield it when it is there.

    earlier: asked first; what it describes is there already and left as it is. Raises OutputError where a file cannot
    be written, or exists and is not to be replaced; not before all files that other threads have finished by then are
    yielded.
    """
    failures: list[Exception] = []

    def write(item: tuple[Sample, Path]) -> Written | None:
        if failures:  # a disk that is full is not asked again
            return None
        try:
            return earlier(*item) or _write_file(*item, encoding, replace)
        except MemoryError:
            raise
        except Exception as error:
            failures.append(error)
            return None

    for written in in_order(write, takewhile(lambda _: not failures, samples), workers):
        if written is not None:
            yield written
    if failures:
        raise failures[0]


def _write_file(sample: Sample, path: Path, encoding: Encoding, replace: bool) -> Written:
    data = encoding(sample)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The directory {path.parent} cannot be made ({error.strerror}): choose another.") from None
    write_atomic(path, data, exclusive=not replace)
    return describe(sample, path, data, encoding)


def write_stream(
    samples: Iterable[tuple[Sample, str]], encoding: Encoding, stream: BinaryIO, tar: bool, workers: int = WORKERS
) -> Iterator[Written]:
    """Write encoded images to a binary stream: the bytes of one, or a tar archive of several.

    Members of the archive have no time, owner or other trace of the machine: same images, same bytes.
    """

    def encode(item: tuple[Sample, str]) -> tuple[Sample, str, bytes]:
        return *item, encoding(item[0])

    length = 0
    for sample, name, data in in_order(encode, samples, workers):
        block = _member(name, data) if tar else data
        stream.write(block)
        stream.flush()
        length += len(block)
        yield describe(sample, Path(name) if tar else None, data, encoding)
    if tar:  # only a finished archive gets its end mark: a reader can tell a broken one
        end = 2 * tarfile.BLOCKSIZE
        stream.write(bytes(end + -(length + end) % tarfile.RECORDSIZE))
        stream.flush()


def _member(name: str, data: bytes) -> bytes:
    """A file as it stands in a tar archive (POSIX.1-2001); tarfile's own streams write on when they are dropped."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % tarfile.BLOCKSIZE)
