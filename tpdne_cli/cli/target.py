"""Where a run writes, and what must be so before it begins."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from tpdne_cli.errors import OutputError
from tpdne_cli.files import remove_leftovers
from tpdne_cli.images import format_for

# Whoever names such a file does not want a directory of that name.
OTHERS = {".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".jp2", ".jpe", ".jfif", ".ppm", ".svg", ".pdf"}


@dataclass(frozen=True)
class Target:
    """A folder, one file, or (neither of them) standard output."""

    folder: Path | None
    file: Path | None
    format: str

    @classmethod
    def of(cls, out: str, format: str | None) -> Target:
        if out in ("-", "/dev/stdout"):
            return cls(None, None, format or "png")
        path = Path(out)
        suffix = format_for(path)
        if suffix is None and path.suffix.lower() in OTHERS and not out.endswith("/") and not path.is_dir():
            raise click.UsageError(
                f"{out} ends like an image that tpdne does not write: name a .png, .jpg or .webp file, or a directory"
            )
        if suffix is None or path.is_dir() or out.endswith("/"):
            return cls(path, None, format or "png")
        if format is not None and format != suffix:
            raise click.UsageError(f"--format {format} contradicts the name {out}: leave one of the two out")
        return cls(None, path, suffix)

    @property
    def is_stdout(self) -> bool:
        return self.folder is None and self.file is None

    def path(self, name: str) -> Path:
        """Where the image of this name goes; for standard output its name in the archive."""
        return self.file or (Path(name) if self.folder is None else self.folder / name)

    def check_stdout(self, as_json: bool, skip_existing: bool) -> None:
        """Refuse options that standard output has no room for."""
        if as_json:
            raise click.UsageError("--json and --out - both want stdout: write the lines to a file with --manifest")
        if skip_existing:
            raise click.UsageError("--skip-existing finds no files behind --out -: give a directory")
        if sys.stdout is not None and sys.stdout.isatty():
            raise click.UsageError("stdout is a terminal, which shows no image bytes: redirect it, or give --out DIR")

    def prepare(self, names: Iterable[str]) -> None:
        """Make the output directory and clear away what killed runs left half-written. Raises OutputError."""
        folder = self.folder if self.folder is not None else self.path("").parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OutputError(f"{folder} is a file, not a directory: choose another --out.") from None
        except OSError as error:
            raise OutputError(f"The directory {folder} cannot be made ({error.strerror}): choose another.") from None
        check_writable(folder)
        for inner in {name.rpartition("/")[0] for name in names} if self.folder is not None else {""}:
            remove_leftovers(folder / inner)

    def refuse_existing(self, names: Iterable[str], resumable: bool = True) -> None:
        """Raises OutputError for a file that is there. resumable: whether there is a --skip-existing to advise."""
        ways = "--skip-existing leaves it and goes on, --force replaces it" if resumable else "--force replaces it"
        for name in names:
            if (path := self.path(name)).exists():
                raise OutputError(f"{path} exists: {ways}.")


def check_writable(folder: Path) -> None:
    """Raises OutputError where no file can be made, before any work is done for it."""
    from tempfile import TemporaryFile

    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"The directory {folder} cannot be written ({error.strerror}): choose another.") from None
