"""Frames -> moving pictures: GIF, WebP, APNG and MP4.

Frames are taken one at a time and what is encoded goes to disk, so memory stays flat over any number of them. The GIF
looks at all frames before it writes the first, for the palette that they share: until then they wait on disk.
Pillow encodes the stills. The containers around them are written here, since Pillow's keep all frames in memory.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from tpdne_cli import images, metadata
from tpdne_cli.errors import ImageError, SettingsError
from tpdne_cli.metadata import check_recipe
from tpdne_cli.pipeline import in_order
from tpdne_cli.sampler import Pixels, Sample
from tpdne_cli.streaming import Destination, recipe_of, spooled

FPS = 25
MAX_FPS = {"gif": 50, "webp": 1000, "png": 1000, "mp4": 240}  # browsers slow GIFs down that ask for more
SUFFIXES = {".gif": "gif", ".webp": "webp", ".png": "png", ".apng": "png", ".mp4": "mp4"}
QUALITIES = {"webp": 90, "mp4": 65}  # 65 is H.264's constant rate factor 18, which the eye takes for lossless
PALETTE_PIXELS = 1 << 20  # so many, evenly taken from all frames, decide on the palette


class Motion(NamedTuple):
    """How the frames are shown and written; folder: where a file may grow that has no name yet."""

    fps: Fraction
    quality: int | None
    recipe: Mapping[str, Any] | None
    folder: Path | None

    def times(self, unit: int) -> Iterator[int]:
        """How long each frame lasts, in 1/unit seconds; the roundings do not add up."""
        frame = 0
        while True:
            yield round((frame + 1) * unit / self.fps) - round(frame * unit / self.fps)
            frame += 1

    def packet(self, format: str, width: int, height: int, frames: int, digest: str | None = None) -> bytes:
        """The mark of a finished animation."""
        image = {"format": format, "width": width, "height": height, "quality": self.quality, "frames": frames}
        return metadata.packet(self.recipe or {}, image if digest is None else {**image, "data": digest})


def format_for(path: str | os.PathLike[str]) -> str | None:
    """The kind of animation that a file name asks for: gif, webp, png or mp4; None where it is none of them."""
    return SUFFIXES.get(Path(path).suffix.lower())


def check(format: str, fps: float | Fraction = FPS, quality: int | None = None) -> None:
    """Raises SettingsError for what cannot be written, before any frame is made."""
    if format not in MAX_FPS:
        raise SettingsError(f"{format!r} is not a format for moving pictures: choose one of {', '.join(MAX_FPS)}.")
    if not 0.1 <= fps <= MAX_FPS[format]:
        raise SettingsError(f"{float(fps):g} frames a second are outside 0.1..{MAX_FPS[format]}, what {format} can do.")
    if quality is not None and format not in QUALITIES:
        raise SettingsError(f"The format {format} has no quality: leave it out, or choose webp or mp4.")
    if quality is not None and not 1 <= quality <= 100:
        raise SettingsError(f"A quality of {quality} is not possible: choose 1 to 100.")
    if format == "mp4":
        _pyav()


def save_animation(
    frames: Iterable[Sample | Pixels],
    path: Destination,
    fps: float | Fraction = FPS,
    *,
    format: str | None = None,
    quality: int | None = None,
    size: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    metadata: bool = True,
    replace: bool = True,
) -> int:
    """Write frames (Samples, or uint8 [H, W, 3 or 1]) as .gif, .webp, .png/.apng or .mp4, which all repeat for ever.

    path: a name, or a binary stream, for which `format` must be given. quality: 1-100, for webp (100: lossless) and
    mp4. size: longest side. recipe: goes into the file with the mark of a synthetic image; without one Samples leave
    the mark, and arrays, which could be photographs, nothing. metadata: False leaves all of it out.
    Returns the number of frames. Raises SettingsError as `check` does, OutputError where the file cannot be written
    (or is there, and not to be replaced), ImageError for frames of different sizes and a recipe that is too long.
    """
    if format is None:
        format = format_for(path) if isinstance(path, (str, os.PathLike)) else None
        if format is None:
            name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else "The stream"
            raise SettingsError(f"{name} does not end with {', '.join(SUFFIXES)}: its name says how to write it.")
    check(format, fps, quality)
    if metadata and recipe is not None:
        check_recipe(recipe)
    folder = Path(path).parent if isinstance(path, (str, os.PathLike)) else None
    write = {"gif": write_gif, "webp": write_webp, "png": write_apng, "mp4": write_mp4}[format]
    with spooled(path, replace) as file:
        frames = iter(frames)
        leading = list(islice(frames, 1))
        said = recipe_of(leading[0] if leading else None, recipe, metadata)
        motion = Motion(Fraction(fps).limit_denominator(1001), quality or QUALITIES.get(format), said, folder)
        pixels = (frame.pixels if isinstance(frame, Sample) else frame for frame in chain(leading, frames))
        return write(_alike(pixels if size is None else (images.resize(p, size) for p in pixels)), file, motion)


def _alike(frames: Iterable[Pixels]) -> Iterator[Pixels]:
    """The frames, as long as they have the first one's size. Raises ImageError, also where there is none."""
    shape = None
    for frame in frames:
        if shape is not None and frame.shape != shape:
            raise ImageError(f"A frame is {list(frame.shape)} where {list(shape)} went before: make all of one size.")
        shape = frame.shape
        yield frame
    if shape is None:
        raise ImageError("There are no frames: a moving picture needs at least one.")


def write_apng(frames: Iterator[Pixels], file: BinaryIO, motion: Motion) -> int:
    """PNG with further frames behind the first (PNG Specification, third edition, section 11.3.6)."""
    first = next(frames)
    height, width = first.shape[:2]
    # Its mark is the animation's: what a fingerprint covers of an animated PNG is the first frame.
    head = list(_png_chunks(images.encode(first, "png", recipe=motion.recipe)))
    delay = struct.pack(">HH", *_small(1 / motion.fps))
    sequence = 0

    def control() -> bytes:
        nonlocal sequence
        sequence += 1
        return _png_chunk(b"fcTL", struct.pack(">IIIII", sequence - 1, width, height, 0, 0) + delay + bytes(2))

    file.write(b"\x89PNG\r\n\x1a\n" + _png_chunk(*head[0]))
    at, count = file.tell(), 1
    file.write(_png_chunk(b"acTL", bytes(8)))
    file.writelines(_png_chunk(*chunk) for chunk in head[1:] if chunk[0] == b"iTXt")
    file.write(control())
    file.writelines(_png_chunk(*chunk) for chunk in head if chunk[0] == b"IDAT")
    for still in in_order(images.encode, frames):
        file.write(control())
        for kind, body in _png_chunks(still):
            if kind == b"IDAT":
                file.write(_png_chunk(b"fdAT", struct.pack(">I", sequence) + body))
                sequence += 1
        count += 1
    file.write(_png_chunk(b"IEND", b""))
    file.seek(at)
    file.write(_png_chunk(b"acTL", struct.pack(">II", count, 0)))
    return count


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def _small(value: Fraction) -> tuple[int, int]:
    """A fraction that fits into 16 bits above and below."""
    value = value.limit_denominator(65535 if value < 1 else 6000)
    return value.numerator, value.denominator


def write_webp(frames: Iterator[Pixels], file: BinaryIO, motion: Motion) -> int:
    """Each frame a still picture of its own (RFC 9649, section 2.7): on a walk all pixels change anyway."""
    first = next(frames)
    height, width = first.shape[:2]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    digest, count = hashlib.sha256(), 0

    def chunk(kind: bytes, body: bytes) -> None:
        if kind in (b"ANIM", b"ANMF"):  # what metadata.fingerprint covers
            digest.update(kind + len(body).to_bytes(8, "big") + body)
        file.write(kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2))

    file.write(b"RIFF\0\0\0\0WEBP")
    chunk(b"VP8X", bytes([0x02 | (0x04 if motion.recipe is not None else 0), 0, 0, 0]) + canvas)
    chunk(b"ANIM", bytes(4) + bytes(2))  # background, and 0: for ever
    stills = in_order(lambda p: images.encode(p, "webp", motion.quality), chain([first], frames))
    for still, time in zip(stills, motion.times(1000), strict=False):
        body = bytes(6) + canvas + time.to_bytes(3, "little") + b"\x02"  # at 0, 0; do not blend
        chunk(b"ANMF", body + _webp_picture(still))
        count += 1
    if motion.recipe is not None:
        chunk(b"XMP ", motion.packet("webp", width, height, count, digest.hexdigest()))
    end = file.tell()
    if end > 1 << 32:
        raise ImageError("The animation is larger than the 4 GiB that a WebP file holds: use mp4, or fewer frames.")
    file.seek(4)
    file.write(struct.pack("<I", end - 8))
    return count


def _webp_picture(still: bytes) -> bytes:
    """The chunk of a still WebP file that holds its pixels, padding included."""
    at = 12
    while still[at : at + 4] not in (b"VP8 ", b"VP8L"):
        length = int.from_bytes(still[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
    length = int.from_bytes(still[at + 4 : at + 8], "little")
    return still[at : at + 8 + length + length % 2]


def write_gif(frames: Iterator[Pixels], file: BinaryIO, motion: Motion) -> int:
    """One palette for all frames, Floyd-Steinberg dithering (GIF89a); grey frames keep all their levels.

    The octree's palette takes 20 ms and leaves, dithered and slightly blurred as an eye sees it, an error of 1.2 levels
    RMS; median cut 2.7, or 2.0 after 14 s of k-means. Ordered dithering would stand still where the picture does, but
    leaves 2.3.
    """
    from PIL import Image
    from PIL.GifImagePlugin import getdata

    with tempfile.TemporaryFile(dir=motion.folder) as waiting:
        first = next(frames)
        height, width, channels = first.shape
        count = 0
        for frame in chain([first], frames):
            waiting.write(frame.tobytes())
            count += 1
        colours = bytes(level for level in range(256) for _ in range(3))
        if channels == 3:
            palette = _palette(_stored(waiting, count, first.shape), count * height * width)
            colours = bytes(palette.getpalette()).ljust(768, b"\0")
        file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF7, 0, 0) + colours)
        file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")
        if motion.recipe is not None:
            mark = motion.packet("gif", width, height, count)
            file.write(b"!\xff" + metadata.GIF_KEY + mark + metadata.GIF_END)

        def encoded(pixels: Pixels) -> bytes:
            if channels == 1:
                return b"".join(getdata(Image.fromarray(pixels[:, :, 0])))
            dithered = Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
            return b"".join(getdata(dithered))

        pictures = in_order(encoded, _stored(waiting, count, first.shape))
        for picture, time in zip(pictures, motion.times(100), strict=False):
            file.write(b"!\xf9\x04\x04" + struct.pack("<H", time) + b"\0\0" + picture)
        file.write(b";")
    return count


def _stored(file: IO[bytes], count: int, shape: tuple[int, ...]) -> Iterator[Pixels]:
    """Frames that wait on disk, from the first one on."""
    import numpy as np

    file.seek(0)
    for _ in range(count):
        yield np.frombuffer(file.read(math.prod(shape)), np.uint8).reshape(shape)


def _palette(frames: Iterable[Pixels], total: int) -> Any:
    """A Pillow image with 256 colours that suit all frames, which have `total` pixels."""
    import numpy as np
    from PIL import Image

    step = -(-total // PALETTE_PIXELS)
    taken = np.concatenate([f.reshape(-1, 1, 3)[i % step :: step].copy() for i, f in enumerate(frames)])
    return Image.fromarray(taken).quantize(256, method=Image.Quantize.FASTOCTREE)


def write_mp4(frames: Iterator[Pixels], file: BinaryIO, motion: Motion) -> int:
    """H.264 with halved colour resolution, what every player takes; a player can begin before it has the whole file.

    A side of odd length is made even by repeating its last row or column.
    """
    import numpy as np

    av = _pyav()
    first = next(frames)
    height, width, channels = first.shape
    margins = (0, height % 2), (0, width % 2), (0, 0)
    crf = max(1, round((100 - (motion.quality or 0)) * 0.51))  # at 0 H.264 is lossless, which no browser plays
    colour = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709", "color_range": "tv"}
    count = 0
    with tempfile.TemporaryDirectory(prefix="tpdne-") as folder:  # PyAV moves the index forward in named files only
        path = Path(folder) / "animation.mp4"
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            # The number of threads shows in the bytes.
            stream = container.add_stream("libx264", motion.fps, {"crf": str(crf), "threads": "4", **colour})
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            for pixels in chain([first], frames):
                even = np.pad(pixels if channels == 3 else pixels.repeat(3, 2), margins, mode="edge")
                frame = av.VideoFrame.from_ndarray(even, "rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
                frame.pts, frame.time_base = count, 1 / motion.fps
                container.mux(stream.encode(frame))
                count += 1
            container.mux(stream.encode(None))
        with path.open("rb") as written:
            shutil.copyfileobj(written, file)
    if motion.recipe is not None:
        mark = metadata.MP4_KEY + motion.packet("mp4", width, height, count)
        file.write(struct.pack(">I", 8 + len(mark)) + b"uuid" + mark)
    return count


def _pyav() -> Any:
    """PyAV, an optional dependency. Raises SettingsError where it is not there."""
    try:
        av: Any = import_module("av")
        av.Codec("libx264", "w")
        return av
    except ImportError:
        trouble = "MP4 needs PyAV, which is not installed: pip install av"
    except ValueError:  # some distributions leave H.264 out
        trouble = "This PyAV has no H.264 encoder: pip install --force-reinstall av"
    raise SettingsError(f"{trouble}, or write a .webp or .gif.")
