"""Ctrl-C and SIGTERM: the first lets what is in flight finish, the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tpdne_cli.cli.output import Output

T = TypeVar("T")


class Interrupted(Exception):
    """The user wants no more images; those that were begun are finished."""


class Interruption:
    """While this context lasts, a signal ends the items of `until`, and a second one raises KeyboardInterrupt."""

    def __init__(self, output: Output, finishing: str = "Finishing the images in flight") -> None:
        self.output, self.finishing, self.asked = output, finishing, False

    def __enter__(self) -> Interruption:
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.output.note(f"{self.finishing}; once more stops at once.")

    def stop(self) -> None:
        """End the items without a word."""
        self.asked = True

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """The items, up to a signal or `stop`: then Interrupted is raised."""
        for item in items:
            if self.asked:
                raise Interrupted
            yield item
