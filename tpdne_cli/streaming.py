"""Files too large to be held in memory: written piece by piece, published whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

from tpdne_cli import __version__, files
from tpdne_cli.errors import OutputError
from tpdne_cli.sampler import Sample

Destination = str | os.PathLike[str] | BinaryIO


@contextmanager
def spooled(destination: Destination, replace: bool = True) -> Iterator[BinaryIO]:
    """A seekable file to write into. When the block ends it is there whole, under its name or in the stream.

    Nothing is left behind where the block raises. Raises OutputError where it cannot be written, or exists and is not
    to be replaced.
    """
    path = Path(destination) if isinstance(destination, (str, os.PathLike)) else None
    try:
        if path is None or files.is_device(path):
            with tempfile.TemporaryFile() as file:
                yield cast(BinaryIO, file)
                file.seek(0)
                with nullcontext(cast(BinaryIO, destination)) if path is None else path.open("wb") as target:
                    shutil.copyfileobj(file, target)
        else:
            with files.appearing(path, replace) as file:
                yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        name = "Standard output" if path is None else repr(str(path))
        raise OutputError(f"{name} cannot be written: {files.way_out(error)}.") from error


def recipe_of(first: object, given: Mapping[str, Any] | None, metadata: bool) -> Mapping[str, Any] | None:
    """What a file of many images says of itself; None for nothing at all. first: the image that it begins with.

    Whoever gives no recipe has made the images in ways that the file does not know. That a model made them it tells
    from a Sample; arrays could be anything.
    """
    if not metadata or (given is None and not isinstance(first, Sample)):
        return None
    return {"version": __version__, "latent": {"kind": "collection"}} if given is None else given
