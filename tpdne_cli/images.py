"""Pixels -> encoded bytes with their metadata, and back."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import containers, metadata
from .errors import ImageError, SettingsError
from .files import write_atomic as write_atomic  # the last arrow of the data path, for callers of this room

if TYPE_CHECKING:  # numpy and Pillow are imported where pixels are touched: reading FORMATS or a recipe needs neither
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]  # [H, W, 3] or [H, W, 1]

MAX_PIXELS = 89_478_485  # what Pillow takes for harmless
MAX_SIDE = 16_383  # of WebP, the smallest limit of the three

# What sRGB is in the words of a PNG (PNG specification, sections 11.3.2.1, 11.3.2.5 and 11.3.2.6): editors write it so.
_GAMMA = 0.45455
_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_CODES = bytes([1, 13, 0, 1])
_PROFILE_BOUND = 8  # levels of 255 by which a colour profile may move pixels and still count as one of sRGB


class Format(NamedTuple):
    suffix: str
    mime: str
    encoder: str  # its name in Pillow
    quality: int | None  # the default; None: the format has no such thing


FORMATS = {
    "png": Format(".png", "image/png", "PNG", None),
    "jpg": Format(".jpg", "image/jpeg", "JPEG", 92),
    "webp": Format(".webp", "image/webp", "WEBP", 90),
}


def format_for(path: str | os.PathLike[str]) -> str | None:
    """The format that a file name asks for, None where its suffix is none of ours."""
    suffix = Path(path).suffix.lower()
    if suffix == ".jpeg":
        return "jpg"
    return next((name for name, entry in FORMATS.items() if entry.suffix == suffix), None)


def is_lossless(format: str, quality: int | None = None) -> bool:
    """Whether pixels survive: PNG, and WebP at quality 100."""
    return format == "png" or (format == "webp" and quality == 100)


def encode(
    pixels: Pixels,
    format: str = "png",
    quality: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    size: int | None = None,
) -> bytes:
    """One image as the bytes of a file; the same arguments give the same bytes.

    `pixels` is uint8 [H, W, 3] or [H, W, 1]; `quality` 1-100 (jpg: 92 unless told, webp: 90, and 100 is lossless);
    `size` is the longest side in pixels. With a `recipe` (anything JSON can say) the file carries it and the mark of a
    synthetic image; without, it carries no metadata. Raises SettingsError for a setting outside its range, ImageError
    for pixels or a recipe that no file can hold.
    """
    quality = check_quality(format, quality)
    if size is not None:
        pixels = resize(pixels, size)
    image = _to_pillow(pixels)
    buffer = io.BytesIO()
    try:
        image.save(buffer, FORMATS[format].encoder, **_encoder_settings(format, quality))
    except (OSError, ValueError) as error:
        raise ImageError(
            f"An image of {image.width}x{image.height} pixels cannot be written as {format} ({error}): "
            "use png, or a smaller size."
        ) from error
    data = buffer.getvalue()
    if recipe is None:
        return data
    written = {"format": format, "height": image.height, "width": image.width, "quality": quality}
    return metadata.embed(data, recipe, written)


def scaled(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the longest side `size`."""
    longest = max(width, height)
    return max(1, round(width * size / longest)), max(1, round(height * size / longest))


def resize(pixels: Pixels, size: int) -> Pixels:
    """`pixels` [H, W, C] with the longest side `size`; the same array where it has that size already.

    Lanczos in both directions. Pillow widens the kernel when it shrinks, so nothing aliases: on a zone plate shrunk
    four-fold it lets through a third of what an area mean does (5.7 against 15.7 levels RMS above Nyquist), and keeps
    more of what is below. Raises SettingsError for a size outside 1-16383.
    """
    import numpy as np
    from PIL import Image

    height, width = pixels.shape[:2]
    longest = max(height, width)
    if longest == size:
        return pixels
    if not 1 <= size <= MAX_SIDE:
        raise SettingsError(f"A size of {size} pixels is not possible: choose 1 to {MAX_SIDE}.")
    target = scaled(width, height, size)
    shrunk = np.asarray(_to_pillow(pixels).resize(target, Image.Resampling.LANCZOS))
    return shrunk.reshape(target[1], target[0], -1)


def read_pixels(source: str | os.PathLike[str] | bytes) -> Pixels:
    """The pixels of a PNG, JPEG or WebP file (a path or its bytes): uint8 [H, W, 1] for grey, else [H, W, 3].

    Raises ImageError for what is not an image, is damaged, or claims more pixels than Pillow takes for harmless (89
    million), before any memory is taken for them.
    """
    import numpy as np

    with _opened(source) as image:
        decoded = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        return decoded.reshape(image.height, image.width, -1)


def is_turned(source: str | os.PathLike[str] | bytes) -> bool:
    """Whether viewers turn or mirror what `read_pixels` gives, because the file tells them to. Raises ImageError."""
    with _opened(source) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return image.getexif().get(0x0112) in range(2, 9)  # Exif's Orientation; 1 is upright


def is_recoloured(source: str | os.PathLike[str] | bytes) -> bool:
    """Whether viewers show other colours than `read_pixels` gives: some are transparent, or not meant as sRGB.

    Raises ImageError.
    """
    with _opened(source) as image:
        image.load()
        if image.has_transparency_data and image.convert("RGBA").getextrema()[3] != (255, 255):
            return True
        told = [image.info.get("gamma", _GAMMA), *image.info.get("chromaticity", _PRIMARIES)]
        profile = image.info.get("icc_profile")
        if any(abs(a - b) > 0.01 for a, b in zip(told, (_GAMMA, *_PRIMARIES), strict=True)) or (
            profile and not _is_srgb(profile, image)
        ):
            return True
    with containers.opened(source) as file:
        codes = [containers.read_at(file, b.start, b.length) for b in containers.blocks(file) if b.kind == b"cICP"]
    return any(code != _CODES for code in codes)


def _is_srgb(profile: bytes, image: Any) -> bool:
    """Whether a colour profile leaves an image as sRGB shows it."""
    import numpy as np
    from PIL import ImageCms

    image = image if image.mode == "L" else image.convert("RGB")
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        shown = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:  # viewers may ignore a broken one, or not: who knows
        return False
    moved = np.abs(np.asarray(shown, np.int16) - np.asarray(image.convert("RGB")))
    return int(moved.max()) <= _PROFILE_BOUND


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes) -> Iterator[Any]:
    """The file as Pillow opens it; what goes wrong with it is an ImageError."""
    from PIL import Image

    name = metadata.name_of(source)
    if metadata.format_of(source) not in FORMATS:  # which has the sentences for a file that is missing
        raise ImageError(f"{name} is not a PNG, JPEG or WebP image: give a file that is.")
    try:
        file = io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=["PNG", "JPEG", "WEBP"])
        yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} claims too many pixels to be harmless: give a smaller image.") from error
    except Exception as error:  # damage leads Pillow's decoders to exceptions of every kind
        raise ImageError(f"{name} is damaged ({error}): make it or copy it again.") from error


def read_recipe(source: str | os.PathLike[str] | bytes) -> dict[str, Any] | None:
    """The recipe given to `encode`, equal to what was given; None where a file (a path or its bytes) has none.

    Anybody can write a recipe into a file: check its values before use. Raises ImageError for what is not an image.
    """
    return metadata.read_marks(source).recipe


def is_marked(source: str | os.PathLike[str] | bytes) -> bool:
    """Whether a file says that a model made it, ours or another. Raises ImageError for what is not an image."""
    return metadata.read_marks(source).source_type == metadata.SYNTHETIC


def check_quality(format: str, quality: int | None) -> int | None:
    """The quality that a format is encoded with, its own choice for None. Raises SettingsError for one it lacks."""
    if format not in FORMATS:
        raise SettingsError(f"{format!r} is not an image format: choose one of {', '.join(FORMATS)}.")
    if quality is None:
        return FORMATS[format].quality
    if FORMATS[format].quality is None:
        raise SettingsError(f"The format {format} is lossless and has no quality: leave it out, or choose jpg or webp.")
    if not 1 <= quality <= 100:
        raise SettingsError(f"A quality of {quality} is not possible: choose 1 to 100.")
    return quality


def _encoder_settings(format: str, quality: int | None) -> dict[str, Any]:
    """Settings by measurement: one thread, faces of 128 px and of 1024 px (Pillow 13 with zlib-ng and libwebp 1.6).

    png   run-length matches only: 1.0 ms 24.6 kB, 61 ms 1.28 MB; level 1: 1.2 ms 26.4 kB, 64 ms 1.31 MB; level 6, the
          default: 3.6 ms 24.5 kB, 347 ms 1.14 MB. A filtered photograph repeats little that a longer search would find.
    jpg   full colour resolution: +17 % bytes, but +1.7 dB at 128 px, where halved colour bleeds over lips and eyes;
          optimal Huffman tables: -7 % and -4 % bytes for +0.1 ms and +10 ms.
    webp  method 2: 0.9 ms 3.3 kB, 41 ms 100 kB; method 4, the default: 1.6 ms 3.3 kB, 131 ms 103 kB, +0.5 dB at 1024.
          Lossless, least effort: 0.6 ms 19.6 kB, 46 ms 0.85 MB, faster and smaller than PNG; usual effort: 21 ms
          17.7 kB, 1.2 s 0.81 MB.
    """
    if format == "png":
        return {"compress_type": 3, "compress_level": 1}  # 3: zlib's Z_RLE, which makes the level nearly irrelevant
    if format == "jpg":
        return {"quality": quality, "subsampling": "4:4:4", "optimize": True}
    if is_lossless(format, quality):
        return {"lossless": True, "quality": 0, "method": 0}  # here both numbers are effort
    return {"quality": quality, "method": 2}


def _to_pillow(pixels: Pixels) -> Any:
    from PIL import Image

    if str(pixels.dtype) != "uint8" or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ImageError(
            f"Pixels of {pixels.dtype} {list(pixels.shape)} make no image: give uint8 [H, W, 3] or [H, W, 1]."
        )
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
