"""The manifest of a run: one JSON line per image, written as each is finished."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tpdne_cli.errors import OutputError


def check_manifest(path: str | None, replace: bool) -> None:
    """Raises OutputError, before any work is done, for a manifest that is there or has no place."""
    if path is None:
        return
    if Path(path).is_file() and not replace:  # a pipe is there and holds nothing
        raise OutputError(f"The manifest {path} exists: --force replaces it, and --skip-existing completes it.")
    if not Path(path).parent.is_dir():
        raise OutputError(f"The manifest {path} cannot be written: its directory does not exist.")


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
def open_manifest(path: str | None) -> Iterator[Manifest]:
    """An empty manifest. Raises OutputError."""
    if path is None:
        yield Manifest(None, None)
        return
    try:
        file = Path(path).open("wb", buffering=0)  # noqa: SIM115 (errors of opening only)
    except OSError as error:
        raise OutputError(f"The manifest {path} cannot be written: {error.strerror}.") from None
    with file:
        yield Manifest(path, file)
