"""Telling whether a file is the finished image of a recipe, so that a broken-off run can go on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpdne_cli.errors import ImageError
from tpdne_cli.metadata import read_marks

if TYPE_CHECKING:
    from tpdne_cli.pipeline import Encoding

# What may differ between two runs of one job: a new version or another machine goes on with the same images.
INCIDENTAL = {"version", "device"}


def is_finished(path: Path, recipe: dict[str, Any], encoding: Encoding) -> bool:
    """Whether the file at path was made by this recipe and written this way.

    Files appear whole or not at all, so one that bears the recipe is complete. Without metadata there is nothing to
    compare, and any image counts.
    """
    try:
        marks = read_marks(path)
    except ImageError:
        return False
    if not encoding.metadata:
        return True
    if marks.recipe is None or marks.image is None:
        return False
    same_recipe = all(marks.recipe.get(key) == value for key, value in recipe.items() if key not in INCIDENTAL)
    written = marks.image
    same_size = encoding.size is None or encoding.size == max(written["width"], written["height"])
    same_quality = encoding.quality is None or encoding.quality == written["quality"]
    return same_recipe and same_size and same_quality and written["format"] == encoding.format
