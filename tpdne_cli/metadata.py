"""What an image says about itself: that a model made it, and from which recipe.

One XMP packet says both, because XMP is the one place that PNG, JPEG and WebP share and that other programs read (XMP
Specification part 3; IPTC Photo Metadata Standard for the source type). It is put between the bytes that the encoder
wrote, which stay the same with it or without.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO
from xml.parsers import expat

from . import __version__
from .containers import JPEG, PNG, Block, blocks, opened, read_at
from .containers import format_of as format_of
from .containers import name_of as name_of
from .errors import ImageError

SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MAX_PACKET = 65_504  # one JPEG segment; the same for all formats, so that any image can be converted
MAX_FOREIGN_PACKET = 1 << 20  # other programs append history and padding; beyond this it is not worth a look

_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_XMP = "http://ns.adobe.com/xap/1.0/"
_OURS = "urn:x-tpdne:1/"
_FIELDS = {f"{_IPTC} DigitalSourceType", f"{_XMP} CreatorTool", f"{_OURS} recipe", f"{_OURS} image"}

_PNG_KEY = b"XML:com.adobe.xmp"
_JPEG_KEY = b"http://ns.adobe.com/xap/1.0/\0"
GIF_KEY = b"\x0bXMP DataXMP"
GIF_END = bytes([1, *range(255, -1, -1), 0])  # leads a decoder that knows no XMP out of the packet
MP4_KEY = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")  # XMP Specification part 3, section 1.1.5 (MPEG-4)
_WEBP_XMP_FLAG = 0x04
_COLOURS = {b"gAMA", b"cHRM", b"iCCP", b"sRGB", b"cICP", b"\xe2", b"ICCP"}  # of PNG, JPEG (APP2) and WebP

_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="{xmp}" xmlns:Iptc4xmpExt="{iptc}" xmlns:tpdne="{ours}">
   <xmp:CreatorTool>tpdne {version}</xmp:CreatorTool>
   <Iptc4xmpExt:DigitalSourceType>{synthetic}</Iptc4xmpExt:DigitalSourceType>
   <tpdne:image>{image}</tpdne:image>
   <tpdne:recipe>{recipe}</tpdne:recipe>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""

# No image needs more room to be described.
_LONGEST = {"format": "webp", "width": 2**31, "height": 2**31, "quality": 100, "frames": 10**9, "data": 64 * "f"}


@dataclass(frozen=True)
class Marks:
    """What a file claims. Nothing in it is signed: a recipe is a claim until its pixels are made again."""

    source_type: str | None = None  # IPTC DigitalSourceType, a URL
    tool: str | None = None
    recipe: dict[str, Any] | None = None  # as it was given to `images.encode`
    image: dict[str, Any] | None = None  # as written: format, width, height, quality, data (its `fingerprint`)


def compact(value: Mapping[str, Any]) -> str:
    """JSON, the same for equal mappings, in plain ASCII: XML forbids control characters and lone surrogates."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Raises ImageError for a recipe that no file holds, before anything is drawn for it."""
    packet(recipe, _LONGEST)


def packet(recipe: Mapping[str, Any], image: Mapping[str, Any]) -> bytes:
    """The XMP packet that says: synthetic, made by tpdne, from `recipe`; image: how the file was written.

    Raises ImageError for a recipe that does not fit.
    """
    text = _PACKET.format(
        xmp=_XMP,
        iptc=_IPTC,
        ours=_OURS,
        version=__version__,
        synthetic=SYNTHETIC,
        image=html.escape(compact(image), quote=False),
        recipe=html.escape(compact(recipe), quote=False),
    ).encode()
    if len(text) > MAX_PACKET:
        raise ImageError(
            f"The recipe takes {len(text):,} bytes of metadata and an image holds {MAX_PACKET:,}: "
            "use a shorter seed or fewer of them, or leave the metadata out (--no-metadata)."
        )
    return text


def embed(data: bytes, recipe: Mapping[str, Any], image: Mapping[str, Any]) -> bytes:
    """The encoded PNG, JPEG or WebP `data` with its packet: synthetic, made by tpdne, from `recipe`.

    `image` says how the file was written; its fingerprint is added here. Same arguments, same bytes: no clock is read.
    Raises ImageError for a recipe that does not fit.
    """
    marks = packet(recipe, {**image, "data": fingerprint(data)})
    if data.startswith(PNG):
        chunk = b"iTXt" + _PNG_KEY + b"\0\0\0\0\0" + marks
        at = 33  # behind IHDR, before the pixels: a reader finds it without reading them
        return data[:at] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]
    if data.startswith(JPEG):
        at = 4 + int.from_bytes(data[4:6], "big") if data[2:4] == b"\xff\xe0" else 2  # JFIF wants to be first
        segment = _JPEG_KEY + marks
        return data[:at] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[at:]
    return _embed_webp(data, marks, int(image["width"]), int(image["height"]))


def _embed_webp(data: bytes, marks: bytes, width: int, height: int) -> bytes:
    """A still or moving WebP in the extended layout, which alone may carry XMP (RFC 9649, section 2.7)."""
    body = data[12:]
    if body[:4] != b"VP8X":
        canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + body
    body = body[:8] + bytes([body[8] | _WEBP_XMP_FLAG]) + body[9:]
    body += b"XMP " + struct.pack("<I", len(marks)) + marks + b"\0" * (len(marks) % 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def read_marks(source: str | os.PathLike[str] | bytes) -> Marks:
    """The marks of a PNG, JPEG, WebP, GIF or MP4 file (a path or its bytes), without decoding a pixel.

    Marks without recipe, or with nothing at all, come back for images of other origin and for damaged packets.
    Raises ImageError for what is not an image or cannot be read.
    """
    with opened(source) as file:
        for block in blocks(file):
            text = _packet_of(file, block)
            if text is not None:
                fields = _parse(text)
                return Marks(
                    source_type=fields.get(f"{_IPTC} DigitalSourceType"),
                    tool=fields.get(f"{_XMP} CreatorTool"),
                    recipe=_mapping(fields.get(f"{_OURS} recipe")),
                    image=_mapping(fields.get(f"{_OURS} image")),
                )
    return Marks()


def fingerprint(source: str | os.PathLike[str] | bytes) -> str:
    """SHA-256 (hex) of the parts of a file that hold pixels or say how colours are meant, which ours do not.

    Other metadata may come and go, a changed pixel shows.
    Of PNG, JPEG and WebP; our GIF and MP4 files tell none to compare with.
    Raises ImageError for what is not an image or cannot be read.
    """
    digest = hashlib.sha256()
    with opened(source) as file:
        for block in blocks(file):
            if block.is_pixels or block.kind in _COLOURS:
                digest.update(block.kind + block.length.to_bytes(8, "big"))
                digest.update(read_at(file, block.start, block.length))
    return digest.hexdigest()


def _packet_of(file: BinaryIO, block: Block) -> bytes | None:
    """The XMP packet that a block holds, if it holds one."""
    if block.kind not in {b"iTXt", b"\xe1", b"XMP ", b"!\xff", b"uuid"} or not 0 < block.length <= MAX_FOREIGN_PACKET:
        return None
    body = read_at(file, block.start, block.length)
    if block.kind == b"XMP ":
        return body
    for kind, begin, end in ((b"\xe1", _JPEG_KEY, b""), (b"!\xff", GIF_KEY, GIF_END), (b"uuid", MP4_KEY, b"")):
        if block.kind == kind:
            return body[len(begin) : len(body) - len(end)] if body.startswith(begin) and body.endswith(end) else None
    key, _, rest = body.partition(b"\0")
    if key != _PNG_KEY or rest[:1] != b"\0":  # the XMP specification wants it uncompressed
        return None
    return rest[2:].split(b"\0", 2)[-1]  # behind language and translated keyword


def _parse(packet: bytes) -> dict[str, str]:
    """The properties we know, each as an element or as an attribute (both are RDF); nothing from a malformed packet.

    A stream parser that stops at a DOCTYPE: no entities, no tree, no memory beyond the packet itself.
    """
    found: dict[str, list[str]] = {}
    path: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        path.append(name)
        for key in _FIELDS & attributes.keys():
            found.setdefault(key, []).append(attributes[key])

    def end(_: str) -> None:
        path.pop()

    def text(piece: str) -> None:
        if path and path[-1] in _FIELDS:
            found.setdefault(path[-1], []).append(piece)

    def doctype(*_: object) -> None:
        raise ValueError("a document type in a packet")

    parser = expat.ParserCreate("utf-8", " ")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text, doctype
    try:
        parser.Parse(packet.strip(b"\0 \r\n\t"), True)
    except (expat.ExpatError, ValueError):
        return {}
    return {key: "".join(pieces) for key, pieces in found.items()}


def _mapping(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not _is_deep(value) else None


def _is_deep(value: Any, levels: int = 16) -> bool:
    """Whether a value is nested as no recipe is: whoever walks through it would run out of stack."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deep(v, levels - 1) for v in inner)
