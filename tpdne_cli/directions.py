"""Named directions of a model: steps in W that change one thing, such as the age of its people, and little else.

A file's header holds them as "directions": {name: {"w": [w_dim numbers], "about": a sentence}}. A step of 1 changes
what the name says by one standard deviation among the model's own images; training/directions.py finds such steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpdne_cli.errors import CheckpointError, SettingsError

LARGEST = 1000  # of an amount, and of a step's numbers: far beyond what shows anything

Step = np.ndarray[Any, np.dtype[np.float32]]
Attributes = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Direction:
    """w: [w_dim], the step of 1; about: what it changes, for people."""

    w: Step
    about: str


def read(info: Mapping[str, Any], w_dim: int, source: str) -> dict[str, Direction]:
    """The directions in a file's description, by name. Raises CheckpointError for what are none."""
    stored = info.get("directions", {})
    try:
        return {str(name): _direction(entry, w_dim) for name, entry in stored.items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{source} is damaged: its directions are not steps of {w_dim} numbers.") from None


def _direction(entry: Mapping[str, Any], w_dim: int) -> Direction:
    w = np.asarray(entry["w"], dtype=np.float64)
    if w.shape != (w_dim,) or not (abs(w) <= LARGEST).all():
        raise ValueError(w.shape)
    return Direction(w.astype(np.float32), str(entry.get("about", "")))


def parse(texts: Iterable[str]) -> Attributes:
    """'age=1.5' -> ('age', 1.5), of each. Raises SettingsError."""
    attributes = []
    for text in texts:
        name, _, amount = text.partition("=")
        try:
            attributes.append((name.strip(), float(amount)))
        except ValueError:
            raise SettingsError(f"{text!r} is not NAME=AMOUNT: write for example age=1.5.") from None
    return tuple(attributes)


def check(attributes: Iterable[tuple[str, float]], known: Iterable[str], model: str) -> Attributes:
    """In the order of their names, without those of amount 0. Raises SettingsError."""
    known, chosen = sorted(known), dict[str, float]()
    for name, amount in attributes:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "its file names none"
            raise SettingsError(f"{model} has no direction {name!r}: {has}.")
        if not abs(amount) <= LARGEST:  # nor what is not a number
            raise SettingsError(f"The amount {amount:g} of {name} is out of reach: 1 is plain to see, 3 is much.")
        if name in chosen:
            raise SettingsError(f"{name} is given twice: once is enough.")
        chosen[name] = float(amount)
    return tuple((name, amount) for name, amount in sorted(chosen.items()) if amount)


def step(directions: Mapping[str, Direction], attributes: Attributes) -> Step | None:
    """The sum of the steps, [w_dim]; None where there is nothing to add."""
    if not attributes:
        return None
    parts = [np.float64(amount) * directions[name].w for name, amount in attributes]
    total: Step = np.sum(parts, axis=0).astype(np.float32)
    return total
