"""Our own files: tensors under the published names, and everything else as JSON in the header's metadata.

The header's metadata holds one key, "tpdne", with {"version": 1, "arch": ..., "config": {...}, ...}; whatever else is
known of the file (default truncation, licence, data, metrics) stands beside the config. One file describes itself.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tpdne_cli.checkpoints import Checkpoint
from tpdne_cli.errors import AGAIN, CheckpointError
from tpdne_cli.files import write_atomic

VERSION = 1
MAX_HEADER = 2**20  # bytes; a 1024 px generator needs 30 thousand, and the library may take 20 times as much memory
DTYPES = ("F16", "F32")
CRITICS = ("stylegan2-discriminator",)  # arch of files that hold a critic alone
TYPICAL = "typical."  # begins the names of a critic's tensors that are not its network's: see Typical in critic.py

Array = np.ndarray[Any, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """What a file says of itself before any tensor is read."""

    arch: str
    config: dict[str, Any]
    meta: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def is_safetensors(head: bytes) -> bool:
    """Tell by the first bytes: a little-endian length, then a JSON object."""
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100 * 2**20


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header alone; takes memory for the header only.

    Raises CheckpointError for a damaged file and for one that does not describe a network.
    """
    from safetensors import safe_open

    name = os.fspath(path)
    _refuse_huge_header(name)
    try:
        with safe_open(name, framework="numpy") as file:
            metadata = file.metadata() or {}
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
            dtypes = {s.get_dtype() for s in slices.values()}
    except Exception as error:  # the library raises its own type; whatever it is, the file is not one
        _check_memory(error)
        raise CheckpointError(f"{name} is damaged or not a safetensors file ({error}); {AGAIN}.") from None
    if "tpdne" not in metadata:
        raise CheckpointError(f"{name} is a safetensors file, but none that tpdne wrote: its header names no network.")
    if not dtypes <= set(DTYPES):
        raise CheckpointError(
            f"{name} holds {', '.join(sorted(dtypes - set(DTYPES)))} numbers; tpdne reads F16 and F32."
        )
    meta = _parse(metadata["tpdne"], name)
    return Header(meta.pop("arch"), meta.pop("config"), meta, shapes)


def _refuse_huge_header(name: str) -> None:
    try:
        with Path(name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}.") from None
    if length > MAX_HEADER:
        raise CheckpointError(f"{name} is damaged or not a generator: its header claims {length} bytes; {AGAIN}.")


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        meta = json.loads(text)
        version, arch, config = meta["version"], meta["arch"], meta["config"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{name} is damaged: its description cannot be read; {AGAIN}.") from None
    if not isinstance(version, int) or not isinstance(arch, str) or not isinstance(config, dict):
        raise CheckpointError(f"{name} is damaged: its description cannot be read; {AGAIN}.")
    if version > VERSION:
        raise CheckpointError(f"{name} was written by a newer tpdne (format {version}): upgrade tpdne to read it.")
    del meta["version"]
    return dict(meta)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Array]:
    """All tensors in file precision; call read_header first, it holds the checks."""
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except Exception as error:
        _check_memory(error)
        raise CheckpointError(f"{os.fspath(path)} is damaged ({error}); {AGAIN}.") from None


def _check_memory(error: Exception) -> None:
    """A file is not damaged because there was no room for it."""
    if isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in str(error):
        raise MemoryError from None


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """A whole file as a Checkpoint. Raises CheckpointError."""
    header = read_header(path)
    tensors = read_tensors(path)
    if header.arch in CRITICS:
        return Checkpoint("stylegan2", {}, {}, header.config, apart(tensors)[0], header.meta)
    return Checkpoint(header.arch, header.config, tensors, meta=header.meta)


def apart(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Of a critic's tensors, or their shapes: those of its network, and those that begin with TYPICAL, without it."""
    network = {name: value for name, value in tensors.items() if not name.startswith(TYPICAL)}
    return network, {name.removeprefix(TYPICAL): value for name, value in tensors.items() if name not in network}


def amend(path: str | os.PathLike[str], meta: Mapping[str, Any], tensors: Mapping[str, Array] | None = None) -> None:
    """Give a file a further description and further tensors. Raises CheckpointError, OutputError."""
    header = read_header(path)
    write(path, header.arch, header.config, {**read_tensors(path), **(tensors or {})}, {**header.meta, **meta})


def write(
    path: str | os.PathLike[str],
    arch: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    meta: Mapping[str, Any],
) -> None:
    """Write one file, whole or not at all. Raises OutputError where it cannot be written."""
    from safetensors.numpy import save

    description = {"version": VERSION, "arch": arch, "config": dict(config), **meta}
    data = save({k: np.asarray(v, order="C") for k, v in tensors.items()}, {"tpdne": json.dumps(description)})
    write_atomic(path, data)
