"""Seeds: text and numbers -> latents. A seed is an address that keeps its meaning for ever.

An integer seed means what it means in NVIDIA's tools: numpy's legacy RandomState, whose stream numpy has promised
never to change. A text seed is hashed into the same generator's array seed, 256 bits wide, so that a million accounts
do not collide.
"""

from __future__ import annotations

import hashlib
import operator
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from tpdne_cli.errors import SeedError

if TYPE_CHECKING:  # numpy is imported where numbers are drawn: telling a seed from a typing error needs none
    import numpy as np

Seed = int | str
MAX_SEED = 2**32 - 1  # what RandomState accepts


def parse_seeds(seeds: Iterable[str | int]) -> Iterator[Seed]:
    """parse_seed of each. Raises SeedError for a single one: a text would give a seed for each of its letters."""
    if isinstance(seeds, (str, bytes, int)):
        raise SeedError(f"{seeds!r} is one seed, where several are asked for: write [{seeds!r}].")
    return map(parse_seed, seeds)


def parse_seed(text: str | int) -> Seed:
    """One seed: digits are an integer, anything else is text (in Unicode's NFC form, so that typing it twice agrees).

    Raises SeedError for nothing at all and for an integer outside 0..4294967295.
    """
    if isinstance(text, str):
        if not text.strip():
            raise SeedError("A seed is empty: give a number, or any text such as an e-mail address.")
        if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", text):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise SeedError(f"The seed {text!r} is not valid Unicode text.") from None
            return unicodedata.normalize("NFC", text)
        if len(text) >= 40:  # digits that Python may refuse to count
            raise SeedError(
                f"The seed {text.strip()[:12]}... is outside 0..{MAX_SEED}: for a longer number, make it text, such as "
                "by id- before it."
            )
        text = int(text)
    try:
        text = operator.index(text)
    except TypeError:
        raise SeedError(f"The seed {text!r} is neither an integer nor text.") from None
    if not 0 <= text <= MAX_SEED:
        raise SeedError(
            f"The seed {text} is outside 0..{MAX_SEED}: for a longer number, make it text, such as id-{abs(text)}."
        )
    return text


def parse_ranges(text: str) -> list[Sequence[int]]:
    """'0-99,205,300-310' -> ranges of integers, both ends included, kept short for a million seeds.

    Raises SeedError for what is not a number or a range, and for a range that runs backwards.
    """
    ranges: list[Sequence[int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, re.ASCII)
        if match is None:
            raise SeedError(f"{part.strip()!r} is not a number or a range: write seeds such as 0-99,205,300-310.")
        first = parse_seed(match[1])
        last = parse_seed(match[2]) if match[2] else first
        assert isinstance(first, int) and isinstance(last, int)
        if last < first:
            raise SeedError(f"The range {part.strip()} runs backwards: write {last}-{first}.")
        ranges.append(range(first, last + 1))
    return ranges


def parse_lines(lines: Iterable[str], name: str) -> Iterator[Seed]:
    """One seed per line, empty lines passed over. name: what to call the source in an error."""
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n").removeprefix("\ufeff")
        if line.strip():
            try:
                yield parse_seed(line)
            except SeedError as error:
                raise SeedError(f"{name}, line {number}: {error}") from None


def successors(seed: Seed, count: int) -> Sequence[Seed]:
    """The seed and the count - 1 that follow it.

    Integers count on; the k-th after a text is the text with '#k' behind it, itself a seed that can be given again.
    Raises SeedError where the integers run out.
    """
    if isinstance(seed, int):
        if seed + count - 1 > MAX_SEED:
            raise SeedError(f"There are fewer than {count} seeds from {seed} on: the last one is {MAX_SEED}.")
        return range(seed, seed + count)
    return [seed, *(f"{seed}#{k}" for k in range(1, count))]


def fresh(count: int) -> range:
    """Consecutive integer seeds from a random place on."""
    import secrets

    if not 0 < count <= MAX_SEED + 1:
        raise SeedError(f"{count} is not a number of seeds between 1 and {MAX_SEED + 1}.")
    first = secrets.randbelow(MAX_SEED + 2 - count)
    return range(first, first + count)


def random_state(seed: Seed, purpose: str = "") -> np.random.RandomState:
    """The frozen generator that a seed stands for; a purpose such as 'noise' gives an independent stream of it."""
    import numpy as np

    if isinstance(seed, int) and not purpose:
        return np.random.RandomState(seed)
    text = f"{purpose}\0{seed}" if purpose else str(seed)
    digest = hashlib.sha256(unicodedata.normalize("NFC", text).encode("utf-8")).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4").astype(np.uint32))


def latent(seed: Seed, z_dim: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """z for one seed: float64 [z_dim], standard normal; NVIDIA's RandomState(seed).randn(1, z_dim) for integers."""
    return random_state(seed).randn(z_dim)


def latents(seeds: Iterable[Seed], z_dim: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """z for several seeds: float64 [N, z_dim]."""
    import numpy as np

    return np.stack([latent(seed, z_dim) for seed in seeds])


def flatten(parts: Iterable[Sequence[Seed]]) -> Sequence[Seed]:
    """Several sequences as one; a single range stays a range."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))
