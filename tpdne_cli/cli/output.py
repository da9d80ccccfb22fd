"""The one object that owns every print: results on stdout, everything else on stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import click

from tpdne_cli.errors import OutputError


class ReaderGone(Exception):
    """Whoever read our stdout has closed it: there is nobody left to tell, and no failure."""


def open_closed_streams() -> None:
    """Give the streams that the caller has closed (>&-) to nobody, before the next image becomes file 1 or 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123 (for the rest of the process)


def one_line(text: str) -> str:
    """Text from file names and files, safe for a terminal: line breaks and control characters are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@contextmanager
def writing_stdout() -> Iterator[None]:
    """Turns what can go wrong with stdout into ReaderGone and OutputError."""
    try:
        yield
    except OSError as error:
        # Windows calls a pipe without a reader an invalid argument.
        if isinstance(error, BrokenPipeError) or (sys.platform == "win32" and error.errno == errno.EINVAL):
            raise ReaderGone from None
        raise OutputError(f"Standard output cannot be written: {error.strerror}.") from None


class Stdout:
    """Standard output for bytes, with the errors of writing_stdout."""

    def write(self, data: bytes) -> int:
        with writing_stdout():
            return sys.stdout.buffer.write(data)

    def flush(self) -> None:
        with writing_stdout():
            sys.stdout.buffer.flush()


def _encoded(text: str) -> bytes:
    """Text as the file system spells it: in a locale without UTF-8 a printed path must still be the path."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")


def colour_allowed() -> bool:
    """Colour only on a terminal, and not where NO_COLOR or a dumb terminal forbids it."""
    return (
        sys.stderr is not None
        and sys.stderr.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
    )


def say(text: str) -> None:
    """Text on stderr; where a full disk behind 2>log, or a reader that went away, does not take it, work goes on."""
    with suppress(OSError):
        click.echo(text, err=True, color=colour_allowed())


def complain(sentence: str) -> None:
    """One error on stderr."""
    label = click.style("Error:", fg="red", bold=True) if colour_allowed() else "Error:"
    say(f"{label} {one_line(sentence)}")


class Output:
    """What a command says.

    as_json: results as one JSON object per line; quiet: no notes and no progress bar; end: what follows a result,
    a null byte for names that may hold line breaks.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False, progress: bool = True, end: str = "\n") -> None:
        self.as_json, self.quiet, self.wants_progress, self.end = as_json, quiet, progress and not quiet, end
        self.bar: Any = None
        open_closed_streams()

    def result(self, text: str, record: Mapping[str, Any] | None = None) -> None:
        """One result: the text, or the record as a line of JSON; flushed, so that a reader has it at once.

        Raises ReaderGone where nobody reads it any more, OutputError where it cannot be written.
        """
        line = json.dumps(record, ensure_ascii=True) if self.as_json and record is not None else text
        if self.bar is not None and sys.stdout.isatty():
            self.bar.clear()
        stdout = Stdout()
        stdout.write(_encoded(line + self.end))
        stdout.flush()

    def table(self, rows: Iterable[tuple[str, ...]]) -> None:
        """Rows of text in aligned columns."""
        rows = list(rows)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            self.result("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def note(self, sentence: str) -> None:
        """Something worth knowing, on stderr."""
        if not self.quiet:
            self._say(sentence)

    def warning(self, sentence: str) -> None:
        """Something that may not be what the user wants; said even when quiet."""
        self._say(f"Warning: {sentence}")

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        say(one_line(text))

    def start(self, total: int, unit: str = "img") -> None:
        """Show a bar with rate and time left; only where stderr is a terminal."""
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # a thread that watches bars with many steps between two looks; ours has one
        disable = None if self.wants_progress else True  # None: tqdm asks whether it writes to a terminal
        self.bar = tqdm(total=total, unit=unit, disable=disable, dynamic_ncols=True, smoothing=0.1, miniters=1)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
