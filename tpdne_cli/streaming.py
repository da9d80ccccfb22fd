"""Files too large to be held in memory: written piece by piece, published whole, marked as synthetic."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

from tpdne_cli import __version__, files, metadata
from tpdne_cli.errors import OutputError
from tpdne_cli.sampler import Sample

Destination = str | os.PathLike[str] | BinaryIO
UNKNOWN = hashlib.sha256(b"").hexdigest()  # holds the place of a digest in a packet
_EMPTY_WEBP = b"RIFF\x04\x00\x00\x00WEBP"


@contextmanager
def spooled(destination: Destination, replace: bool = True) -> Iterator[BinaryIO]:
    """A seekable file to write into. When the block ends it is there whole, under its name or in the stream.

    Nothing is left behind where the block raises. Raises OutputError where it cannot be written, or exists and is not
    to be replaced.
    """
    path = Path(destination) if isinstance(destination, (str, os.PathLike)) else None
    try:
        if path is None or (path.exists() and not path.is_file() and not path.is_dir()):  # a stream, or a device
            with tempfile.TemporaryFile() as file:
                yield cast(BinaryIO, file)
                file.seek(0)
                with nullcontext(cast(BinaryIO, destination)) if path is None else path.open("wb") as target:
                    shutil.copyfileobj(file, target)
        else:
            with _appearing(path, replace) as file:
                yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        name = "Standard output" if path is None else repr(str(path))
        reason = files._WAYS_OUT.get(error.errno or 0, error.strerror)
        raise OutputError(f"{name} cannot be written: {reason}.") from error


@contextmanager
def _appearing(path: Path, replace: bool) -> Iterator[BinaryIO]:
    """What files.write_atomic does, for content that comes piece by piece."""
    temporary, descriptor = files._open_temporary(path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":
                file.close()
            if replace:
                temporary.replace(path)
            else:
                files._publish_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def recipe_of(first: object, given: Mapping[str, Any] | None, metadata: bool) -> Mapping[str, Any] | None:
    """What a file of many images says of itself; None for nothing at all. first: the image that it begins with.

    Whoever gives no recipe has made the images in ways that the file does not know. That a model made them it tells
    from a Sample; arrays could be anything.
    """
    if not metadata or (given is None and not isinstance(first, Sample)):
        return None
    return {"version": __version__, "latent": {"kind": "collection"}} if given is None else given


def packet(recipe: Mapping[str, Any], image: Mapping[str, Any], digest: str | None) -> bytes:
    """The XMP packet that says: synthetic, made by tpdne, from `recipe`.

    image: how the file was written, with width and height; digest: what metadata.fingerprint gives for the file, or
    UNKNOWN to be replaced by it later, or None for formats that have none.
    """
    marked = metadata.embed(_EMPTY_WEBP, recipe, image)  # the shortest thing that takes a packet and gives it back
    start = marked.index(b"XMP ") + 8
    length = int.from_bytes(marked[start - 4 : start], "little")
    if digest is None:
        return marked[start : start + length].replace(f'"data":"{UNKNOWN}",'.encode(), b"")
    return marked[start : start + length].replace(UNKNOWN.encode(), digest.encode())
