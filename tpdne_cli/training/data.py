"""Photographs in a folder or a zip -> one tensor of bytes, and the order in which training sees them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from tpdne_cli.errors import TrainingError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Reader = Callable[[], bytes]


def load_images(source: str | Path, resolution: int, at_least: int | None = None) -> torch.Tensor:
    """Every picture of a folder and the folders in it, or of a zip, centre-cropped to a square of `resolution`.

    Files that are not PNG, JPEG or WebP by name are passed over, and so are hidden ones; the order is the names'.
    Transparent pixels become white. at_least: the smallest side that a picture may have (None: resolution), for a
    training that ends higher than it begins. Returns uint8 [N, 3, R, R].
    Raises TrainingError where there is no such source, no picture in it, or a picture that is damaged or too small.
    """
    path = Path(source)
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes and resizes
        named = list(_readers(path))
        if not named:
            raise TrainingError(f"{path} holds no PNG, JPEG or WebP pictures; give a folder or a zip that does.")
        pictures = list(pool.map(lambda item: _decode(item[0], item[1], resolution, at_least or resolution), named))
    return torch.from_numpy(np.stack(pictures))


def batch_indices(
    count: int, batch: int, seed: int, position: int, device: torch.device | None = None
) -> tuple[torch.Tensor, int]:
    """The next `batch` picture numbers of an endless order that shuffles anew at every pass.

    The order is a pure function of (count, seed, position), so a run is resumed by its position alone.
    Returns (int64 [batch] on the device, the position after it).
    """
    parts, left = [], batch
    while left:
        epoch, offset = divmod(position, count)
        parts.append(_shuffled(count, seed, epoch, device)[offset : offset + left])
        position += len(parts[-1])
        left -= len(parts[-1])
    return torch.cat(parts), position


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int, device: torch.device | None) -> torch.Tensor:
    # A pass at a time goes to the device: a copy in every step would have the step wait for it.
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).to(device)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, R, R] -> float32 in [-1, 1], channels last."""
    return pixels.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


def _readers(path: Path) -> Iterator[tuple[str, Reader]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if _is_picture(file.relative_to(path).as_posix()) and file.is_file():
                yield file.name, file.read_bytes
    elif not path.exists():
        raise TrainingError(f"{path} does not exist; give a folder or a zip of pictures.")
    else:
        yield from _zip_readers(path)


def _zip_readers(path: Path) -> Iterator[tuple[str, Reader]]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise TrainingError(f"{path} is neither a folder nor a readable zip ({error}).") from error
    for name in sorted(archive.namelist()):
        if _is_picture(name):
            yield name, partial(archive.read, name)


def _is_picture(name: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def _decode(name: str, read: Reader, resolution: int, at_least: int) -> np.ndarray[Any, Any]:
    try:
        with Image.open(io.BytesIO(read())) as opened:
            image = _opaque(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow and zipfile raise a dozen kinds for damaged files, SyntaxError among them
        raise TrainingError(f"{name} is not a readable picture ({error}); repair it or take it out.") from error
    side = min(image.size)
    if side < at_least:
        raise TrainingError(
            f"{name} is {image.width}x{image.height} pixels, smaller than the {at_least} of this training: "
            "take it out, or train at a lower resolution."
        )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side % resolution == 0:  # whole factors average squares of pixels exactly
        square = image.reduce(side // resolution, box)
    else:
        square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    pixels: np.ndarray[Any, Any] = np.asarray(square, dtype=np.uint8).transpose(2, 0, 1)  # [3, R, R]
    return pixels


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits of grey, of which Pillow would keep the lower eight
        image = Image.fromarray((np.asarray(image, dtype=np.int64) // 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
