"""Contact sheets and tables: many images in one, row by row.

A PNG is written as its rows come, so memory holds one row of images whatever their number; JPEG and WebP encoders want
the whole picture, and hold no side above 16383 pixels.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any, BinaryIO

import numpy as np

from tpdne_cli import images
from tpdne_cli.errors import ImageError, SettingsError
from tpdne_cli.metadata import check_recipe, packet
from tpdne_cli.sampler import Pixels, Sample
from tpdne_cli.streaming import Destination, recipe_of, spooled

PAPER, INK = 255, 40
LINES = 16  # filtered and compressed at a time
CHUNK = 1 << 16


@dataclass(frozen=True)
class Layout:
    """Where the cells of a sheet lie. cell: their side in pixels; head: the first row and column stand apart."""

    columns: int
    rows: int
    cell: int
    labels: bool = False
    head: bool = False

    @property
    def gap(self) -> int:
        return max(2, self.cell // 32)

    @property
    def font_size(self) -> int:
        return min(max(9, self.cell // 9), 32)

    @property
    def label_height(self) -> int:
        return self.font_size * 3 // 2 if self.labels else 0

    def start(self, index: int, pitch: int) -> int:
        """Where the index-th column or row begins."""
        return self.gap + index * pitch + (3 * self.gap if self.head and index else 0)

    def left(self, column: int) -> int:
        return self.start(column, self.cell + self.gap)

    def top(self, row: int) -> int:
        return self.start(row, self.cell + self.label_height + self.gap)

    @property
    def width(self) -> int:
        return self.left(self.columns)

    @property
    def height(self) -> int:
        return self.top(self.rows)

    def check(self, format: str) -> None:
        """Raises SettingsError for what cannot be drawn, before any image is made."""
        if self.columns < 1 or self.rows < 1:
            raise SettingsError(f"A sheet of {self.columns}x{self.rows} images is empty: give at least 1x1.")
        if format not in images.FORMATS:
            raise SettingsError(f"{format!r} is not an image format: choose one of {', '.join(images.FORMATS)}.")
        limit = 2**31 - 1 if format == "png" else images.MAX_SIDE
        if max(self.width, self.height) > limit:
            raise SettingsError(
                f"The sheet would have {self.width}x{self.height} pixels, and a {format} holds no side above {limit}: "
                "write a .png, or give a smaller size or grid."
            )


def save_sheet(
    samples: Iterable[Sample | Pixels | None],
    path: Destination,
    grid: tuple[int, int],
    *,
    labels: bool | Iterable[str] = False,
    head: bool = False,
    size: int | None = None,
    format: str | None = None,
    quality: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    metadata: bool = True,
    replace: bool = True,
) -> tuple[int, int]:
    """Write a grid of (columns, rows) images, row by row; None leaves a cell blank, and so does what is missing.

    samples: Samples, or uint8 [H, H, 3 or 1]. labels: texts under the images, or True for Samples' seeds. head: the
    first row and column stand apart. size: side of each image. path: a name, or a binary stream, which gets a PNG
    unless `format` says jpg or webp. recipe: goes into the file with the mark of a synthetic image; without one Samples
    leave the mark, and arrays, which could be photographs, nothing. metadata: False leaves all of it out.
    Returns (width, height). Raises SettingsError for a sheet that cannot be, OutputError where it cannot be written
    (or is there, and not to be replaced), ImageError where there are no images or of different sizes, or for a recipe
    that is too long.
    """
    if format is None:
        format = images.format_for(path) if isinstance(path, (str, os.PathLike)) else "png"
        if format is None:
            raise SettingsError(f"{path} does not end with .png, .jpg or .webp: its name says how to write it.")
    quality = images.check_quality(format, quality)
    if metadata and recipe is not None:
        check_recipe(recipe)
    samples = iter(samples)
    waiting = list(_up_to_an_image(samples))
    first = waiting[-1] if waiting else None
    if first is None:
        raise ImageError("There are no images: a sheet needs at least one.")
    side = size or (first.pixels if isinstance(first, Sample) else first).shape[0]
    layout = Layout(*grid, side, bool(labels), head)
    layout.check(format)
    recipe = recipe_of(first, recipe, metadata)
    strips = _strips(_cells(chain(waiting, samples), labels, size), layout)
    with spooled(path, replace) as file:
        if format == "png":
            _write_png(strips, file, layout.width, layout.height, recipe)
        else:
            file.write(images.encode(np.concatenate(list(strips)), format, quality, recipe))
    return layout.width, layout.height


Cell = tuple[Pixels | None, str]  # [side, side, 3], and what stands below it


def _cells(samples: Iterable[Sample | Pixels | None], labels: bool | Iterable[str], size: int | None) -> Iterator[Cell]:
    """The images in one size and in colour, each with its label. Raises ImageError for one that does not fit."""
    texts = repeat("") if isinstance(labels, bool) else chain(labels, repeat(""))
    side = size
    for sample, text in zip(samples, texts, strict=False):
        if sample is None:
            yield None, text
            continue
        pixels = sample.pixels if isinstance(sample, Sample) else sample
        pixels = pixels if size is None else images.resize(pixels, size)
        side = pixels.shape[0] if side is None else side
        if pixels.shape[:2] != (side, side):
            raise ImageError(f"An image is {list(pixels.shape)} where a side of {side} belongs: make all of one size.")
        if labels is True and isinstance(sample, Sample):
            text = str(sample.seed)
        yield np.broadcast_to(pixels, (side, side, 3)), text


def _up_to_an_image(samples: Iterator[Sample | Pixels | None]) -> Iterator[Sample | Pixels | None]:
    """Blank cells and the first image, which tells the size of all."""
    for sample in samples:
        yield sample
        if sample is not None:
            return


def _strips(cells: Iterator[Cell], layout: Layout) -> Iterator[Pixels]:
    """The sheet in horizontal strips [height, width, 3], one for each row of images."""
    for row in range(layout.rows):
        top = layout.top(row)
        start = top if row else 0
        strip = np.full((layout.top(row + 1) - start, layout.width, 3), PAPER, np.uint8)
        for column, (pixels, label) in enumerate(islice(cells, layout.columns)):
            if pixels is None:
                continue
            left, end = layout.left(column), top - start + layout.cell
            strip[top - start : end, left : left + layout.cell] = pixels
            if label:
                text = _text(label, layout.font_size, layout.cell, layout.label_height)
                strip[end : end + layout.label_height, left : left + layout.cell] = text
        yield strip


def _text(text: str, size: int, width: int, height: int) -> Pixels:
    """A line of text in the middle of [height, width, 1], smaller or cut where it would not fit."""
    from PIL import Image, ImageDraw

    text = "".join(c if c.isprintable() else " " for c in text)
    while size > 7 and _font(size).getlength(text) > width:
        size -= 1
    font, whole = _font(size), text
    while len(text) > 1 and font.getlength(text) > width:
        text = whole[: len(text.removesuffix("…")) - 1] + "…"
    image = Image.new("L", (width, height), PAPER)
    ImageDraw.Draw(image).text((width / 2, height / 2), text, INK, font, anchor="mm")
    return np.asarray(image)[:, :, None]


@functools.cache
def _font(size: int) -> Any:
    """Pillow's own font: it is the same on every machine."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _write_png(
    strips: Iterable[Pixels], file: BinaryIO, width: int, height: int, recipe: Mapping[str, Any] | None
) -> None:
    """A PNG of 8-bit RGB from strips [h, width, 3] that are `height` lines together."""
    digest = hashlib.sha256()  # what metadata.fingerprint covers

    def chunk(kind: bytes, body: bytes) -> None:
        if kind[:1].isupper():
            digest.update(kind + len(body).to_bytes(8, "big") + body)
        file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))

    def mark(digest: str) -> None:
        image = {"format": "png", "width": width, "height": height, "quality": None, "data": digest}
        chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + packet(recipe or {}, image))

    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    at = file.tell()
    if recipe is not None:
        mark(digest.hexdigest())  # a place for the last one, which is as long
    for data in _compressed(strips, width):
        chunk(b"IDAT", data)
    chunk(b"IEND", b"")
    if recipe is not None:
        file.seek(at)
        mark(digest.hexdigest())


def _compressed(strips: Iterable[Pixels], width: int) -> Iterator[bytes]:
    """The zlib stream of a PNG's lines, in parts of 64 KiB or a little more."""
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)  # as images.encode has it, for the same reasons
    above, parts, length = np.zeros((1, width, 3), np.uint8), [], 0
    for strip in strips:
        for first in range(0, len(strip), LINES):
            lines = strip[first : first + LINES]
            parts.append(deflate.compress(_filtered(lines, np.concatenate([above, lines[:-1]]))))
            above = lines[-1:]
            length += len(parts[-1])
            if length >= CHUNK:
                yield b"".join(parts)
                parts, length = [], 0
    yield b"".join(parts) + deflate.flush()


def _filtered(lines: Pixels, above: Pixels) -> bytes:
    """Lines [n, width, 3] and those above them -> each with Paeth's filter (PNG Specification, section 9.4)."""
    b = above.astype(np.int16)
    a, c = np.zeros_like(b), np.zeros_like(b)
    a[:, 1:], c[:, 1:] = lines[:, :-1], b[:, :-1]
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    predicted = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
    rest = (lines - predicted).astype(np.uint8).reshape(len(lines), -1)
    return np.concatenate([np.full((len(lines), 1), 4, np.uint8), rest], 1).tobytes()
