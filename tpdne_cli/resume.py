"""Telling whether a file is the finished image of a recipe, so that a broken-off run can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpdne_cli import images, metadata
from tpdne_cli.errors import ImageError

if TYPE_CHECKING:
    from tpdne_cli.pipeline import Encoding, Written

# What may differ between two runs of one job: a new version or another machine goes on with the same images, which
# agree within the tolerance that is promised between devices. A precision counts unless it was chosen automatically.
INCIDENTAL = frozenset({"version", "device", "realism"})


def is_finished(
    path: Path,
    recipe: Mapping[str, Any],
    encoding: Encoding,
    resolution: int,
    ignored: Collection[str] = INCIDENTAL,
) -> bool:
    """Whether the file at path holds, undamaged, the image of this recipe, written this way."""
    return objection(path, recipe, encoding, resolution, ignored) is None


def objection(
    path: Path,
    recipe: Mapping[str, Any],
    encoding: Encoding,
    resolution: int,
    ignored: Collection[str] = INCIDENTAL,
) -> str | None:
    """Why the file at path is not the finished image of this recipe, as the end of a sentence; None where it is.

    resolution: longest side of the image before any resizing. ignored: parts of the recipe that may differ. The file's
    own fingerprint proves that nothing is missing or changed; without metadata there is no recipe to compare, and any
    whole image of the right format and size counts.
    """
    try:
        marks = metadata.read_marks(path)
        written = _claimed(marks) if encoding.metadata else _measured(path)
        if written is None:
            return "holds no recipe that can be read"
        if (written["format"], max(written["width"], written["height"])) != (
            encoding.format,
            encoding.size or resolution,
        ):
            return f"is a {written['format']} of {written['width']}x{written['height']} pixels"
        if not encoding.metadata:  # then nothing is known of its settings
            return None if marks.recipe is None else "holds a recipe, which --no-metadata leaves out"
        if written["quality"] != encoding.used_quality:
            return f"has a quality of {written['quality']}"
        if difference := _difference(marks.recipe or {}, recipe, ignored):
            return difference
        return None if written["data"] == metadata.fingerprint(path) else "was damaged or edited since"
    except ImageError:
        return "is no whole image"


def _claimed(marks: metadata.Marks) -> dict[str, Any] | None:
    """What a file says of how it was written; None where it says nothing that could be true."""
    written = marks.image or {}
    if marks.recipe is None or not all(type(written.get(key)) is int for key in ("width", "height")):
        return None
    return {"format": None, "quality": None, "data": None, **written}


def _measured(path: Path) -> dict[str, Any]:
    """Format and size of an image, read to its end."""
    height, width = images.read_pixels(path).shape[:2]
    return {"format": metadata.format_of(path), "width": width, "height": height}


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any], ignored: Collection[str]) -> str | None:
    wanted = json.loads(metadata.compact(wanted))  # as a file holds it
    for key in sorted((there.keys() | wanted.keys()) - set(ignored)):
        if there.get(key) != wanted.get(key):
            return f"was made with {key} {_short(there.get(key))}, not {_short(wanted.get(key))}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:20] + '..."'


def describe(path: Path, recipe: Mapping[str, Any], encoding: Encoding, resolution: int) -> Written:
    """A finished file as its run described it; `recipe` stands in where the file carries none."""
    from tpdne_cli.pipeline import Written

    data = path.read_bytes()
    marks = metadata.read_marks(data)
    side = encoding.size or resolution
    written = marks.image or {"width": side, "height": side}
    return Written(
        recipe=dict(recipe if marks.recipe is None else marks.recipe),
        path=path,
        format=encoding.format,
        quality=encoding.used_quality,
        width=written["width"],
        height=written["height"],
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seconds=None,
    )
