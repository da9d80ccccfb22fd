"""The one object that owns every print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click


class ReaderGone(Exception):
    """Whoever read our stdout has closed it: there is nobody left to tell, and no failure."""


def colour_allowed() -> bool:
    """Colour only on a terminal, and not where NO_COLOR or a dumb terminal forbids it."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def complain(sentence: str) -> None:
    """One error on stderr."""
    label = click.style("Error:", fg="red", bold=True) if colour_allowed() else "Error:"
    click.echo(f"{label} {sentence}", err=True, color=colour_allowed())


class Output:
    """What a command says. as_json: results as one JSON object per line; quiet: no notes and no progress bar."""

    def __init__(self, as_json: bool = False, quiet: bool = False, progress: bool = True) -> None:
        self.as_json, self.quiet, self.wants_progress = as_json, quiet, progress and not quiet
        self.bar: Any = None

    def result(self, text: str, record: Mapping[str, Any] | None = None) -> None:
        """One result: the text, or the record as a line of JSON; flushed, so that a reader has it at once."""
        line = json.dumps(record, ensure_ascii=True) if self.as_json and record is not None else text
        if self.bar is not None and sys.stdout.isatty():
            self.bar.clear()
        data = (line + "\n").encode("utf-8", "surrogateescape")  # whatever the locale: a path is bytes
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise ReaderGone from None

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
        click.echo(text, err=True)

    def start(self, total: int, unit: str = "img") -> None:
        """Show a bar with rate and time left; only where stderr is a terminal."""
        from tqdm import tqdm

        disable = None if self.wants_progress else True  # None: tqdm asks whether it writes to a terminal
        self.bar = tqdm(total=total, unit=unit, disable=disable, dynamic_ncols=True, smoothing=0.1)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
