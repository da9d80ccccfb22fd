"""The parts that a PNG, JPEG, WebP, GIF or MP4 file consists of, found without decoding a pixel.

A file may say anything: each step goes forward, none leaves the file, and their number is bounded.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from .errors import ImageError

MAX_BLOCKS = 1 << 16  # a hostile file may consist of a million empty parts
PNG, JPEG, GIF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", (b"GIF87a", b"GIF89a")
MP4 = {*(b"iso%d" % i for i in range(2, 10)), b"isom", b"mp41", b"mp42", b"avc1", b"M4V "}  # brands: others are stills
_SIZED_JPEG = {bytes([0xC0 + i]) for i in (0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15)}  # SOF, ITU T.81, table B.1


class Block(NamedTuple):
    kind: bytes
    start: int
    length: int
    is_pixels: bool  # changing it could change a pixel


def name_of(source: str | os.PathLike[str] | bytes) -> str:
    """How a sentence names an image; quoted, so that no file name can break the line or colour the terminal."""
    return "The image" if isinstance(source, bytes) else repr(os.fspath(source))


def format_of(source: str | os.PathLike[str] | bytes) -> str:
    """'png', 'jpg', 'webp', 'gif' or 'mp4' by content, whatever the name; raises ImageError for anything else."""
    with opened(source) as file:
        return _format(file)


def dimensions(source: str | os.PathLike[str] | bytes) -> tuple[int, int] | None:
    """(width, height) as the file claims; None where it does not, or a WebP is in its simple layout."""
    with opened(source) as file:
        format = _format(file)
        if format == "gif":
            sides = read_at(file, 6, 4)
            return _two(sides, "little") if len(sides) == 4 else None
        for block in blocks(file):
            if block.kind == b"IHDR":
                return _two(read_at(file, block.start, 8), "big")
            if format == "jpg" and block.kind in _SIZED_JPEG:
                return _two(read_at(file, block.start + 1, 4), "big")[::-1]
            if block.kind == b"VP8X":
                width, height = _two(read_at(file, block.start + 4, 6), "little")
                return width + 1, height + 1
            if block.kind == b"tkhd" and block.length >= 8:  # 16.16 fixed point, ISO 14496-12, section 8.3.2
                width, height = _two(read_at(file, block.start + block.length - 8, 8), "big")
                if width and height:  # of a track that is seen
                    return width >> 16, height >> 16
    return None


def _two(data: bytes, order: Literal["big", "little"]) -> tuple[int, int]:
    half = len(data) // 2
    return int.from_bytes(data[:half], order), int.from_bytes(data[half:], order)


@contextmanager
def opened(source: str | os.PathLike[str] | bytes) -> Iterator[BinaryIO]:
    """The file, if it is one of the five kinds. Raises ImageError."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
            if not _format(file):
                raise ImageError(
                    f"{name_of(source)} is not a PNG, JPEG or WebP image, nor GIF or MP4: give a file that is."
                )
            yield file
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ImageError(f"{name_of(source)} cannot be read ({reason}): check its name and permissions.") from error


def _format(file: BinaryIO) -> str:
    head = read_at(file, 0, 12)
    kinds = {
        "png": head.startswith(PNG),
        "jpg": head.startswith(JPEG + b"\xff"),
        "webp": (head[:4], head[8:]) == (b"RIFF", b"WEBP"),
        "gif": head.startswith(GIF),
        "mp4": head[4:8] == b"ftyp" and head[8:12] in MP4,
    }
    return next((kind for kind, found in kinds.items() if found), "")


def blocks(file: BinaryIO) -> Iterator[Block]:
    """The parts of a file in order, as far as they can be followed."""
    size = file.seek(0, os.SEEK_END)
    walk = {"png": _png, "jpg": _jpeg, "webp": _webp, "gif": _gif, "mp4": _mp4}[_format(file)]
    for block in islice(walk(file), MAX_BLOCKS):
        yield block._replace(length=max(min(block.length, size - block.start), 0))


def _png(file: BinaryIO) -> Iterator[Block]:
    at = 8
    while len(head := read_at(file, at, 8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        critical = kind[:1].isupper()  # PNG specification, section 5.4
        yield Block(kind, at + 8, length, critical or kind == b"tRNS")
        at += length + 12


def _jpeg(file: BinaryIO) -> Iterator[Block]:
    at = 2
    while len(head := read_at(file, at, 4)) == 4 and head[0] == 0xFF:
        kind, length = head[1:2], int.from_bytes(head[2:], "big")
        if kind == b"\xff":  # fill byte
            yield Block(kind, at, 0, False)
            at += 1
        elif kind == b"\xda":  # the first scan; from here on all is pixels
            yield Block(kind, at + 2, sys.maxsize, True)
            return
        else:
            describes = b"\xe0" <= kind <= b"\xef" or kind == b"\xfe"  # APP0 to APP15, and comments
            yield Block(kind, at + 4, length - 2, not describes or kind == b"\xee")  # APP14 chooses the colour space
            at += 2 + max(length, 2)


def _webp(file: BinaryIO) -> Iterator[Block]:
    at = 12
    while len(head := read_at(file, at, 8)) == 8:
        kind, length = head[:4], int.from_bytes(head[4:], "little")
        yield Block(kind, at + 8, length, kind in {b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"})
        at += 8 + length + length % 2


def _gif(file: BinaryIO) -> Iterator[Block]:
    """The extensions in front of the first picture (GIF89a, sections 24 and 26): what is said of the whole."""
    flags = read_at(file, 10, 1) or b"\0"
    at = 13 + (3 << (flags[0] & 7) + 1 if flags[0] & 0x80 else 0)
    steps = 0
    while (head := read_at(file, at, 2))[:1] == b"!" and len(head) == 2:
        end = at + 2
        while (size := read_at(file, end, 1)) not in (b"", b"\0") and steps < MAX_BLOCKS:
            end, steps = end + 1 + size[0], steps + 1
        yield Block(head, at + 2, end + 1 - (at + 2), False)
        at = end + 1


def _mp4(file: BinaryIO) -> Iterator[Block]:
    """Boxes (ISO 14496-12, section 4.2), and those in the boxes that lead to a track's header."""
    at = 0
    while len(head := read_at(file, at, 16)) >= 8:
        length, kind, skip = int.from_bytes(head[:4], "big"), head[4:8], 8
        if length == 1:  # 64 bits follow
            length, skip = int.from_bytes(head[8:16], "big"), 16
        inside = kind in {b"moov", b"trak"}
        yield Block(kind, at + skip, length - skip if length else sys.maxsize, False)
        if not inside and length < skip:  # 0: to the end of the file
            return
        at += skip if inside else length


def read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    if offset > sys.maxsize:  # no file reaches so far, whatever a length in it says
        return b""
    file.seek(offset)
    return file.read(length)
