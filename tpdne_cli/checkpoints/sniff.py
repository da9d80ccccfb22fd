"""Which format a file is, told by its content and never by its name, and the reader for it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tpdne_cli.checkpoints import Checkpoint, nvidia, rosinality, safetensors, tensorflow
from tpdne_cli.checkpoints.pickles import Budget, Machine, show
from tpdne_cli.checkpoints.storage import read_legacy, standard_globals
from tpdne_cli.checkpoints.zipped import read_zip
from tpdne_cli.errors import AGAIN, CheckpointError

READERS: dict[str, Any] = {"nvidia": nvidia, "tensorflow": tensorflow, "rosinality": rosinality}
SLACK = 16 << 20  # what readers may add: filters, noise images

LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # a pickle of torch.save's magic number


def sniff(path: str | os.PathLike[str]) -> str:
    """'safetensors', 'nvidia', 'tensorflow' or 'rosinality'. Raises CheckpointError for anything else."""
    with _named(path):
        view = open_view(path)
        return "safetensors" if safetensors.is_safetensors(bytes(view[:9])) else format_of(load_tree(view))


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """The generator in a file, and its critic where it has one. No code from the file is run.

    The arrays are read-only views of the file, which must stay as it is while they are in use: copy what is to last.
    Raises CheckpointError with a sentence that begins with the file's name.
    """
    with _named(path):
        view = open_view(path)
        if not safetensors.is_safetensors(bytes(view[:9])):
            return read_view(view)
    return safetensors.read(path)


def read_view(view: memoryview) -> Checkpoint:
    """The same from bytes in memory, of any format but safetensors."""
    return read_tree(load_tree(view), len(view))


def read_tree(tree: Any, size: int) -> Checkpoint:
    """The generator in what a file of that many bytes describes."""
    with np.errstate(all="ignore"):  # whether the numbers are numbers is for those to say who use them
        checkpoint: Checkpoint = READERS[format_of(tree)].read(tree)
    arrays = [*checkpoint.tensors.values(), *(checkpoint.discriminator_tensors or {}).values()]
    if any(array.dtype.kind != "f" for array in arrays):
        raise CheckpointError(f"damaged: it has weights that are no floating-point numbers; {AGAIN}.")
    if sum(array.nbytes for array in arrays) > 2 * size + SLACK:  # one stored array under many names
        raise CheckpointError(f"refused: its tensors are larger than the file; {AGAIN}.")
    return checkpoint


def open_view(path: str | os.PathLike[str]) -> memoryview:
    """The file's bytes, paged in as they are looked at."""
    if not Path(path).is_file():  # a pipe would never end
        raise CheckpointError("cannot be read: it is no file.")
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"the file is empty; {AGAIN}.")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}.") from error


def load_tree(view: memoryview) -> Any:
    """What the pickle in a file describes, as plain data and inert records."""
    budget = Budget()
    listed = standard_globals(budget)
    for reader in READERS.values():
        listed |= reader.GLOBALS
    head = bytes(view[:32])
    if head.startswith(b"PK"):
        return read_zip(view, budget, listed)
    if head.startswith(LEGACY):
        return read_legacy(view, budget, listed)
    if head[:1] == b"\x80":
        return Machine(view, listed, budget).run()
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise CheckpointError("this is a web page and no checkpoint: the download was answered with a page.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError("this is a pointer of Git LFS and no checkpoint: run `git lfs pull` where it came from.")
    raise CheckpointError("not a checkpoint: neither safetensors, nor a pickle, nor a file of torch.save.")


def format_of(tree: Any) -> str:
    for name, reader in READERS.items():
        if reader.reads(tree):
            return name
    if type(tree) is not dict:
        raise CheckpointError("not a generator: the file is a pickle of something else.")
    keys = ", ".join(show(str(key)) for key in list(tree)[:8])
    if "GAN" in tree:
        raise CheckpointError("not supported: a checkpoint of lucidrains' stylegan2-pytorch, whose network is another.")
    raise CheckpointError(f"not a generator: the file holds {keys or 'nothing'}, but no network G_ema or g_ema.")


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Every complaint begins with the file's name."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
