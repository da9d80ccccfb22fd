"""Addresses -> what they ask for. Whatever is not exactly an address of ours is refused with a sentence."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from tpdne_cli.directions import Attributes
from tpdne_cli.errors import SeedError, SettingsError
from tpdne_cli.images import FORMATS
from tpdne_cli.interpolation import Path
from tpdne_cli.sampler import Sampler, Settings
from tpdne_cli.seeds import Seed, parse_seed
from tpdne_cli.styles import parse_styles
from tpdne_cli.web.looks import Look

MAX_SEED_LENGTH = 256  # characters
MAX_FRAMES = 600
MAX_STYLES = 40  # characters
TRUNCATIONS = (-2.0, 2.0)
AMOUNTS = (-10.0, 10.0)  # of a step along a direction
MAX_ATTRIBUTES = 8
PARAMETERS = ("size", "truncation", "class", "attr", "to", "frame", "frames", "mix", "styles")
OF_PAGES = ("truncation", "class", "attr")  # those that pages have, too
RANDOM = "random"  # in the place of a seed: a fresh one
NUMBER = r"-?[0-9]{1,3}(\.[0-9]{1,20})?"  # what 0.1 + 0.2 prints has 17 decimals
OTHER_FORMATS = ("avif", "bmp", "gif", "svg", "tif", "tiff")  # images that are not written here, and no pages either

_DIRECTIONS = set(range(0x202A, 0x202F)) | set(range(0x2066, 0x206A))  # text that shows in another order than it is
_FORBIDDEN = {"Cc", "Cs", "Co", "Zl", "Zp"}  # control, surrogates, private use, line and paragraph separators


class Target(NamedTuple):
    """A path below a model's name: the seed's text, and the image format or None for its page."""

    seed: str
    format: str | None


def segments(scope: Mapping[str, Any]) -> list[str]:
    """The parts of a request's path, each percent-decoded once, so that %2F is part of a seed and / is not.

    Raises SeedError for what is not percent-encoded UTF-8.
    """
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode("ascii")
    return [_decode(part) for part in raw.split(b"/")[1:]]


def _decode(part: bytes) -> str:
    if re.search(rb"%(?![0-9a-fA-F]{2})", part):
        raise SeedError("The address holds a % that is none of percent-encoding: write it as %25.")
    try:
        return unquote_to_bytes(part).decode("utf-8")
    except UnicodeDecodeError:
        raise SeedError("The address is not UTF-8 text: percent-encode it in UTF-8.") from None


def target(text: str) -> Target:
    """'bob.png' -> ('bob', 'png'); 'bob.JPEG' -> ('bob', 'jpg'); 'alice@example.com' -> (itself, None).

    Raises SeedError for an image without a name, and for one of another format: a page would be saved under its name.
    """
    seed, dot, suffix = text.rpartition(".")
    format = "jpg" if suffix.lower() == "jpeg" else suffix.lower()
    if not dot or format not in (*FORMATS, *OTHER_FORMATS):
        return Target(text, None)
    if format in OTHER_FORMATS:
        raise SeedError(f"Images are written as {', '.join(FORMATS)}, not as {format}: ask for one of these.")
    if not seed:
        raise SeedError(f"There is no seed before .{format}: put a number or a text there.")
    return Target(seed, format)


def has_page(seed: Seed) -> bool:
    """Whether /MODEL/SEED is the page of a seed: not where it reads as an image of another one, or as a fresh one's."""
    try:
        return seed != RANDOM and target(str(seed)).format is None
    except SeedError:
        return False


def seed(text: str) -> Seed:
    """A seed out of an address. Raises SeedError for what no address may hold; see the limits above."""
    if len(text) > MAX_SEED_LENGTH:
        raise SeedError(f"A seed in an address has at most {MAX_SEED_LENGTH} characters: hash a longer text.")
    if any(part in (".", "..") for part in re.split(r"[/\\]", text)):
        raise SeedError(
            "A seed in an address holds no '.' or '..' between slashes: browsers and proxies take them out."
        )
    for char in text:
        code = ord(char)
        if unicodedata.category(char) in _FORBIDDEN or code in _DIRECTIONS or _is_noncharacter(code):
            raise SeedError(f"A seed in an address holds no control characters: U+{code:04X} is one.")
    return parse_seed(text)


def _is_noncharacter(code: int) -> bool:
    return code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF


def query(scope: Mapping[str, Any]) -> dict[str, str]:
    """The parameters of an address. Raises SettingsError for an unknown or repeated one: a typing error
    would otherwise give another image than meant, and caches would keep it for a year."""
    text: bytes = scope.get("query_string", b"")
    if re.search(rb"%(?![0-9a-fA-F]{2})", text):
        raise SettingsError("The query holds a % that is none of percent-encoding: write it as %25.")
    try:
        pairs = parse_qsl(text.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=len(PARAMETERS))
    except (UnicodeDecodeError, ValueError):
        raise SettingsError("The query is not percent-encoded UTF-8, or too long.") from None
    given = dict(pairs)
    if unknown := sorted(given.keys() - set(PARAMETERS)):
        raise SettingsError(f"There is no parameter {unknown[0][:40]!r}: there are {', '.join(PARAMETERS)}.")
    if len(given) < len(pairs):
        raise SettingsError("A parameter is given twice: leave one of the two out.")
    return given


def size(given: Mapping[str, str], limit: int) -> int | None:
    """The longest side in pixels, None: the model's own. Raises SettingsError."""
    return _integer(given, "size", 1, limit)


def look(model: str, first: Seed, given: Mapping[str, str], sampler: Sampler) -> Look:
    """What seed and parameters show. Raises SeedError and SettingsError."""
    classes = sampler.model.config.c_dim
    settings = Settings(
        _number(given, "truncation", *TRUNCATIONS),
        class_index=_integer(given, "class", 0, 10**6),
        attributes=_attributes(given),
    )
    if settings.class_index is not None and not classes:
        raise SettingsError(f"{model} has no classes: leave the class out.")
    settings = settings.check(sampler.model)
    if "to" in given and "mix" in given:
        raise SettingsError("An image is a frame of a walk (to) or a mix (mix), not both: leave one of the two out.")
    if "to" in given:
        return _frame(model, first, given, settings)
    for name in ("frame", "frames"):
        if name in given:
            raise SettingsError(f"The parameter {name} belongs to a walk: say with 'to' where it leads.")
    if "mix" in given:
        chosen = given.get("styles", "coarse")[:MAX_STYLES]
        parse_styles(chosen, sampler.generator.num_ws, model)
        return Look(model, first, settings, mix=seed(given["mix"]), styles=chosen)
    if "styles" in given:
        raise SettingsError("The parameter styles belongs to a mix: say with 'mix' whose.")
    return Look(model, first, settings)


def _attributes(given: Mapping[str, str]) -> Attributes:
    """'age:1.5,smile:-1', as `attr` has it."""
    if "attr" not in given:
        return ()
    parts = given["attr"].split(",")
    if len(parts) > MAX_ATTRIBUTES:
        raise SettingsError(f"An address has at most {MAX_ATTRIBUTES} directions.")
    pairs = [part.partition(":") for part in parts]
    return tuple((name[:40], _number({name[:40]: amount}, name[:40], *AMOUNTS) or 0.0) for name, _, amount in pairs)


def attributes(settings: Settings) -> str | None:
    """What an address must say of a look's attributes, as `attr`."""
    return ",".join(f"{name}:{plain(amount)}" for name, amount in settings.attributes) or None


def plain(number: float) -> str:
    """As _number reads it: all of its digits, and never an exponent."""
    text = format(Decimal(repr(number)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _frame(model: str, first: Seed, given: Mapping[str, str], settings: Settings) -> Look:
    frames = _integer(given, "frames", 2, MAX_FRAMES) or 25
    frame = _integer(given, "frame", 0, frames - 1) or 0
    walk = Path((first, seed(given["to"])), frames)
    if frame == 0:  # the key itself, which needs no name of its own in the cache
        return Look(model, first, settings)
    return Look(model, first, settings, walk=walk, frame=frame)


def _integer(given: Mapping[str, str], name: str, least: int, most: int) -> int | None:
    if name not in given:
        return None
    if not re.fullmatch(r"[0-9]{1,7}", given[name]) or not least <= int(given[name]) <= most:
        raise SettingsError(f"The {name} {given[name][:40]!r} is not a whole number from {least} to {most}.")
    return int(given[name])


def _number(given: Mapping[str, str], name: str, least: float, most: float) -> float | None:
    if name not in given:
        return None
    text = given[name]
    value = float(text) if re.fullmatch(NUMBER, text) else math.nan
    if not least <= value <= most:
        raise SettingsError(
            f"The {name} {text[:40]!r} is not a number from {least:g} to {most:g}, written with at most 20 decimals."
        )
    return value + 0.0  # -0 is 0: the same picture, the same recipe
