"""Is this image what it says it is? Read its recipe, look for changes, and make it again to be sure."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from . import containers, images, metadata
from .errors import ImageError

if TYPE_CHECKING:
    import numpy as np

    from .images import Pixels

# Levels of 255 by which a lossy file may differ from its regenerated image after the same encoder. The same pixels give
# 0. Pixels that differ by one level in 1 % of the values, more than devices and precisions make of them, leave jpg at
# most 7 apart; webp decides per block and can leave the bound (14 was seen): then it is reported, not believed.
LOSSY_BOUND = 8

# Compressing a face again at quality 50 and up moves no mean of 8x8 pixels by more than 11 levels (jpg 9.0, webp 10.9),
# and changes most pixels a little; an edit moves few pixels, or moves them far.
_BLOCK = 8
_BLOCK_BOUND = 11
_CHANGED_SHARE = 0.25

Verdict = Literal[
    "verified",  # made again from its recipe, with the same pixels (lossy: within LOSSY_BOUND)
    "claimed",  # bears a recipe in a format that keeps no fingerprint: GIF and MP4
    "intact",  # untouched since it was written, by its own fingerprint; not made again, so still a claim
    "rewritten",  # encoded again since it was written; only `verify` can tell what became of the pixels
    "resized",  # another size than it was written with: cropped, resized or turned
    "recompressed",  # the picture of its recipe, saved again with loss, or retouched too lightly to tell from that
    "changed",  # not the picture of its recipe: edited, or another picture under a borrowed recipe
    "other pixels",  # untouched, but its recipe gives other pixels here
    "unverifiable",  # bears a recipe that cannot be made again here
    "foreign",  # says that a model made it, but not that tpdne did
    "unmarked",  # says nothing
]


@dataclass(frozen=True)
class Report:
    """What is known of one image; `dataclasses.asdict` of it is JSON."""

    path: str
    verdict: Verdict
    sentence: str
    format: str
    width: int
    height: int
    synthetic: bool  # says that a model made it
    intact: bool  # its pixels' bytes are those that tpdne wrote, by a fingerprint that anybody could forge
    tool: str | None
    recipe: dict[str, Any] | None
    max_difference: int | None = None  # levels of 255 between the file and its regenerated image
    mean_difference: float | None = None

    @property
    def verified(self) -> bool:
        return self.verdict == "verified"


def inspect(path: str | os.PathLike[str]) -> Report:
    """What an image or an animation says of itself, and whether it was touched since; nothing is generated.

    Never 'verified': fingerprints find accidents and honest edits, but anybody can compute one. Raises ImageError for
    what is not an image or is damaged. A sheet of ours that is too large to be decoded is taken as it says.
    """
    return _look(path)[0]


def _look(path: str | os.PathLike[str]) -> tuple[Report, metadata.Marks, Pixels | None]:
    """The report of `inspect`, and what it was made of: no pixels where they are not read (GIF, MP4, large sheets)."""
    marks, size = metadata.read_marks(path), containers.dimensions(path)
    pixels = None
    is_image = containers.format_of(path) in images.FORMATS
    if size is None and not is_image:
        raise ImageError(f"{metadata.name_of(path)} holds no picture that can be measured: make it or copy it again.")
    if is_image and (size is None or marks.recipe is None or size[0] * size[1] <= images.MAX_PIXELS):
        pixels = images.read_pixels(path)
        size = pixels.shape[1], pixels.shape[0]
    assert size is not None
    report = _examine(path, *size, marks)
    if pixels is not None and report.recipe is not None and images.is_turned(path):
        report = _with_sentence(replace(report, verdict="resized"), marks)
    return report, marks, pixels


def verify(
    path: str | os.PathLike[str], regenerate: Callable[[Mapping[str, Any]], Pixels], tolerance: int = 0
) -> Report:
    """`inspect`, then make the image again and compare: exactly for lossless files, within LOSSY_BOUND for others.

    `regenerate` turns a recipe into uint8 [H, W, C], before any resizing. The recipe comes from the file and may hold
    anything, so it must check every value; what it raises is passed on. A lossy file is compared after the same
    encoder. `tolerance`, in levels of 255, is added to the bound: for an image that another device or precision made.
    """
    import numpy as np

    report, marks, pixels = _look(path)
    if report.recipe is None or report.verdict == "resized":
        return report
    if pixels is None and report.format in images.FORMATS:
        return unverifiable(path, "It has more pixels than are read here.")
    if pixels is None or _is_animated(path):  # one true frame would vouch for all the others
        return unverifiable(path, "It is an animation, and only single images are.")
    if images.is_recoloured(path):  # the pixels may be the same, but nobody sees them
        return _with_sentence(replace(report, verdict="changed"), marks)
    format, quality = _encoding(marks)
    again = images.resize(regenerate(report.recipe), max(pixels.shape[:2]))
    again = images.read_pixels(images.encode(again, format, quality))
    if again.shape[:2] != pixels.shape[:2]:
        return _with_sentence(replace(report, verdict="changed"), marks)
    difference = np.abs(pixels.astype(np.int16) - again)  # [H, W, C]; grey against colour broadcasts
    worst = int(difference.max())
    bound = tolerance + (0 if images.is_lossless(format, quality) else LOSSY_BOUND)
    verdict: Verdict
    if worst <= bound:
        verdict = "verified"
    elif report.intact:
        verdict = "other pixels"
    else:
        verdict = "recompressed" if _looks_recompressed(pixels, again) else "changed"
    mean = round(float(difference.mean()), 4)
    return _with_sentence(replace(report, verdict=verdict, max_difference=worst, mean_difference=mean), marks)


def unverifiable(path: str | os.PathLike[str], reason: object) -> Report:
    """`inspect`, for an image whose recipe cannot be made again for a reason, a sentence."""
    report = inspect(path)
    sentence = f"{report.sentence} It cannot be made again here: {reason}"
    return replace(report, verdict="unverifiable", sentence=sentence)


def _examine(path: str | os.PathLike[str], width: int, height: int, marks: metadata.Marks) -> Report:
    written, format = marks.image or {}, containers.format_of(path)
    synthetic = marks.source_type == metadata.SYNTHETIC
    intact = format in images.FORMATS and written.get("data") == metadata.fingerprint(path)
    verdict: Verdict
    if marks.recipe is None:
        verdict = "foreign" if synthetic else "unmarked"
    elif not _is_as_large(written, width, height, even=format == "mp4"):
        verdict = "resized"
    elif format not in images.FORMATS:
        verdict = "claimed"
    else:
        verdict = "intact" if intact else "rewritten"
    report = Report(
        path=os.fspath(path),
        verdict=verdict,
        sentence="",
        format=format,
        width=width,
        height=height,
        synthetic=synthetic,
        intact=intact,
        tool=marks.tool,
        recipe=marks.recipe,
    )
    return _with_sentence(report, marks)


def _is_as_large(written: Mapping[str, Any], width: int, height: int, even: bool) -> bool:
    """Whether a file still has the size that it was written with; even: as a video has it."""
    sides = written.get("width", width), written.get("height", height)
    return sides == (width, height) or (
        even and [side + side % 2 for side in sides if type(side) is int] == [width, height]
    )


def _is_animated(path: str | os.PathLike[str]) -> bool:
    from PIL import Image

    with Image.open(path) as image:
        return bool(getattr(image, "is_animated", False))


def _encoding(marks: metadata.Marks) -> tuple[str, int | None]:
    """Format and quality that a file says it was written with; exact comparison where it says nothing possible."""
    written = marks.image or {}
    format, quality = written.get("format"), written.get("quality")
    if format in ("jpg", "webp") and type(quality) is int and 1 <= quality <= 100:
        return str(format), quality
    return "png", None


def _looks_recompressed(pixels: Pixels, again: Pixels) -> bool:
    """Whether the difference is spread thinly over the whole picture, as an encoder spreads it."""
    import numpy as np

    difference: np.ndarray[Any, np.dtype[np.float32]] = pixels.astype(np.float32) - again  # [H, W, C]
    height, width, channels = difference.shape
    margins = (0, -height % _BLOCK), (0, -width % _BLOCK), (0, 0)
    blocks = np.pad(difference, margins, mode="edge").reshape(-(-height // _BLOCK), _BLOCK, -1, _BLOCK, channels)
    share = float((difference != 0).any(axis=2).mean())
    return share >= _CHANGED_SHARE and float(np.abs(blocks.mean(axis=(1, 3))).max()) <= _BLOCK_BOUND


def _with_sentence(report: Report, marks: metadata.Marks) -> Report:
    recipe, written = report.recipe or {}, marks.image or {}
    subject = {"faces": "This person", "cats": "This cat"}.get(str(recipe.get("model")), "What this image shows")
    seed = f"seed {_plain(recipe.get('seed'))}"
    maker = f"tpdne {_plain(recipe.get('version'))}" + (f" from {seed}" if "seed" in recipe else "")
    apart = f"up to {report.max_difference} of 255 levels apart"
    size, was = f"{report.width}x{report.height}", f"{_plain(written.get('width'))}x{_plain(written.get('height'))}"
    setting = f"{_plain(recipe.get('precision'))} on {_plain(recipe.get('device'))}"
    again = "and comes out the same again" + (f", {apart}" if report.max_difference else "")
    since = "" if report.intact else ", though the file was saved again since"
    sentence = {
        "verified": f"{subject} does not exist: made by {maker}, {again}{since}.",
        "claimed": f"It says that it was made by {maker}; {report.format.upper()} does not tell whether it was edited.",
        "intact": f"It says that it was made by {maker}, and is untouched since; only making it again can prove it.",
        "rewritten": f"It says that it was made by {maker}, but was saved again or edited since.",
        "resized": f"It was {was} pixels when made by {maker} and is {size} now: cropped, resized or turned since.",
        "recompressed": f"It is the picture made from {seed}, but saved again with loss or lightly retouched: {apart}.",
        "changed": f"It is not the picture made from {seed}: edited since, or under the recipe of another.",
        "other pixels": f"It is untouched, but {seed} gives other pixels here, {apart}: it was made with {setting}, by "
        "another version, or its recipe is false.",
        "foreign": f"It says that a model made it, but not tpdne: {_plain(report.tool)}.",
        "unmarked": "It carries no mark: tpdne never made it, or the mark was removed.",
    }[report.verdict]
    return replace(report, sentence=sentence)


def _plain(value: Any) -> str:
    """A value out of a file, safe to print: ASCII, one line, short."""
    if value is None:
        return "unknown"
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
