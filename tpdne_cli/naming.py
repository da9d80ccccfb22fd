"""File names from seeds: a template such as '{model}-{seed}', always inside the output directory."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath, PureWindowsPath

from tpdne_cli.errors import SettingsError
from tpdne_cli.seeds import Seed

DEFAULT = "{model}-{seed}"
FIELDS = ("model", "seed", "index")
MAX_TEXT = 80  # characters of a text seed in a file name; file systems allow 255 bytes
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # no file may have these on Windows


class SeedName:
    """A seed in a template: six digits for an integer unless the template says otherwise, a safe form of a text."""

    def __init__(self, seed: Seed) -> None:
        self.seed = seed

    def __format__(self, spec: str) -> str:
        if isinstance(self.seed, int):
            return format(self.seed, spec or "06d")
        return safe_text(self.seed)

    def __repr__(self) -> str:  # what {seed!s} and {seed!r} ask for
        return format(self)


def safe_text(text: str) -> str:
    """A text seed as part of a file name. Different texts give different names, also where case does not count."""
    slug = re.sub(r"[^\w.@+#-]", "_", text, flags=re.ASCII)[:MAX_TEXT]
    if slug == text and text == text.lower() and not text.startswith(".") and not RESERVED.fullmatch(text):
        return text
    return f"{slug.lstrip('.')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Namer:
    """Names for a run's images: {model}, {seed} and {index} (0, 1, ...), with Python's format specifications.

    A slash makes subdirectories. Raises SettingsError for an unknown field and for a name outside the directory.
    """

    def __init__(self, template: str | None, model: str, suffix: str) -> None:
        self.template = DEFAULT if template is None else template
        self.model, self.suffix = re.sub(r"[^\w.-]", "_", model), suffix
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None}
        except ValueError as error:
            raise SettingsError(f"The name template {self.template!r} is broken: {error}.") from None
        if unknown := sorted(fields - set(FIELDS)):
            known = ", ".join(f"{{{name}}}" for name in FIELDS)
            raise SettingsError(f"The name template {self.template!r} asks for {{{unknown[0]}}}; it knows {known}.")
        self.distinguishes = bool(fields & {"seed", "index"})
        self(0, 0)

    def __call__(self, index: int, seed: Seed) -> str:
        """The relative path, with forward slashes, of one image."""
        values = {"model": self.model, "seed": SeedName(seed), "index": index}
        try:
            name = string.Formatter().vformat(self.template, (), values)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise SettingsError(f"The name template {self.template!r} cannot be filled in: {error}.") from None
        return check_inside(name if name.lower().endswith(self.suffix) else name + self.suffix, self.template)


def check_inside(name: str, template: str) -> str:
    """The name, if it is a plain relative path. Raises SettingsError for one that leaves the output directory."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\0" in name:
        raise SettingsError(f"The name template {template!r} leads out of the output directory: leave '..' out.")
    if name.endswith("/") or not posix.name.rsplit(".", 1)[0]:
        raise SettingsError(f"The name template {template!r} gives an empty file name.")
    return name


def plan(namer: Namer, seeds: Iterable[Seed]) -> Iterator[tuple[Seed, str]]:
    """(seed, name) for each seed. Raises SettingsError where a second image would get the name of a first."""
    seen: set[str] = set()
    for index, seed in enumerate(seeds):
        name = namer(index, seed)
        key = name.lower()  # file systems of macOS and Windows do not tell case apart
        if key in seen:
            remedy = "a seed is given twice" if namer.distinguishes else "add {seed} or {index} to the template"
            raise SettingsError(f"Two images would be called {name}: {remedy}.")
        seen.add(name if key == name else key)  # of a million names, no second copy
        yield seed, name
