"""Encoded images: pixels survive, bytes repeat, and other readers (Pillow, exiftool, zlib) find what was put in."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tpdne_cli import __version__, images, metadata
from tpdne_cli.errors import ImageError, SettingsError

RECIPE = {
    "model": "faces",
    "weights": "ab" * 32,
    "seed": "Zoë <&> \"q\" 'a' ]]> \\ \x00\x1b\x7f\n\t \u2028 \U0001f600 \udcff",
    "settings": {"truncation": 0.7, "noise": "const", "class": None, "cutoff": 8},
    "version": "0.1.0",
}
WAYS = [("png", None), ("jpg", None), ("webp", None), ("webp", 100)]


def face(height: int = 48, width: int | None = None, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth shapes with some grain: what a network's output looks like to an encoder. [H, W, C]"""
    width = width or height
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(5 * x + k) * np.cos(4 * y - k) for k in range(channels)], axis=-1)
    grain = np.random.RandomState(seed).randn(height, width, 1)
    return np.clip(128 + 90 * waves + 3 * grain, 0, 255).astype(np.uint8)


def png_chunks(data: bytes) -> dict[bytes, bytes]:
    """Every chunk, its CRC checked with zlib: a second reader of the format."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body), kind
        chunks[kind] = chunks.get(kind, b"") + body
        at += 12 + length
    return chunks


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (48, 48), (33, 51)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("recipe", [None, RECIPE])
def test_lossless_formats_keep_every_pixel(shape, channels, recipe):
    pixels = face(*shape, channels)
    for format, quality in [("png", None), ("webp", 100)]:
        assert images.is_lossless(format, quality)
        data = images.encode(pixels, format, quality, recipe)
        with Image.open(io.BytesIO(data)) as image:
            decoded = np.asarray(image)
        assert (decoded.reshape(*shape, -1) == pixels).all()
        assert (images.read_pixels(data) == pixels).all()
    assert images.read_pixels(images.encode(pixels, "png")).shape == pixels.shape


@pytest.mark.parametrize(("format", "worst"), [("jpg", 16), ("webp", 40)])
def test_lossy_formats_stay_near_and_keep_size_and_order_of_colours(format, worst):
    pixels = face(64)
    decoded = images.read_pixels(images.encode(pixels, format))
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).max() <= worst
    assert not images.is_lossless(format)


@pytest.mark.parametrize(("format", "quality"), WAYS)
def test_bytes_repeat_and_metadata_leaves_the_encoded_image_alone(format, quality):
    pixels = face()
    marked = images.encode(pixels, format, quality, RECIPE)
    assert marked == images.encode(pixels.copy(), format, quality, dict(reversed(RECIPE.items())))
    bare = images.encode(pixels, format, quality)
    assert metadata.fingerprint(marked) == metadata.fingerprint(bare)
    assert (images.read_pixels(marked) == images.read_pixels(bare)).all()


@pytest.mark.parametrize(("format", "quality"), WAYS)
def test_recipe_and_mark_come_back_equal(format, quality, tmp_path):
    data = images.encode(face(31, 17), format, quality, RECIPE)
    path = tmp_path / "an image\nof nobody.bin"  # the content decides, not the name
    path.write_bytes(data)
    for source in (data, path, str(path)):
        assert images.read_recipe(source) == RECIPE
        assert images.is_marked(source)
        assert metadata.format_of(source) == format
    marks = metadata.read_marks(data)
    assert marks.tool == f"tpdne {__version__}"
    assert marks.image == {
        "format": format,
        "height": 31,
        "width": 17,
        "quality": quality or images.FORMATS[format].quality,
        "data": metadata.fingerprint(data),
    }


@pytest.mark.parametrize("format", images.FORMATS)
def test_without_recipe_there_is_no_metadata(format):
    data = images.encode(face(), format)
    assert images.read_recipe(data) is None
    assert not images.is_marked(data)
    assert metadata.read_marks(data) == metadata.Marks()
    assert b"tpdne" not in data


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    ),
    st.sampled_from(sorted(images.FORMATS)),
)
def test_any_json_recipe_comes_back(recipe, format):
    assert images.read_recipe(images.encode(face(4), format, recipe=recipe)) == recipe


@pytest.mark.skipif(not shutil.which("exiftool"), reason="exiftool is not installed (Debian: libimage-exiftool-perl)")
def test_exiftool_reads_the_mark_and_the_recipe(tmp_path):
    recipe = {**RECIPE, "seed": "Zoë <&> ]]> \x00\n\U0001f600"}
    for number, (format, quality) in enumerate(WAYS):
        data = images.encode(face(), format, quality, recipe)
        (tmp_path / f"{number}{images.FORMATS[format].suffix}").write_bytes(data)
    command = ["exiftool", "-n", "-json", "-G1", "-validate", "-all", str(tmp_path)]
    for tags in json.loads(subprocess.run(command, capture_output=True, check=True).stdout):
        assert tags["XMP-iptcExt:DigitalSourceType"] == metadata.SYNTHETIC
        assert tags["XMP-xmp:CreatorTool"] == f"tpdne {__version__}"
        found = tags["XMP-tpdne:Recipe"]
        assert (json.loads(found) if isinstance(found, str) else found) == recipe
        assert tags["ExifTool:Validate"] == "0 0 0", tags


@pytest.mark.skipif(not shutil.which("exiftool"), reason="exiftool is not installed (Debian: libimage-exiftool-perl)")
@pytest.mark.parametrize(("format", "quality"), WAYS)
def test_the_recipe_survives_another_program_that_rewrites_the_metadata(format, quality, tmp_path):
    path = tmp_path / f"face{images.FORMATS[format].suffix}"
    path.write_bytes(images.encode(face(), format, quality, RECIPE))
    before = metadata.fingerprint(path)
    command = ["exiftool", "-q", "-XMP-dc:Title=nobody", "-Artist=nobody", "-Orientation#=1", str(path)]
    subprocess.run(command, check=True)
    assert metadata.read_marks(path).recipe == RECIPE
    assert images.is_marked(path)
    assert metadata.fingerprint(path) == before, "the pixels were not touched"


def test_png_is_well_formed_and_the_packet_comes_before_the_pixels():
    data = images.encode(face(20, 30), "png", recipe=RECIPE)
    chunks = png_chunks(data)
    assert list(chunks) == [b"IHDR", b"iTXt", b"IDAT", b"IEND"]
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (30, 20)
    assert len(zlib.decompress(chunks[b"IDAT"])) == 20 * (30 * 3 + 1)
    chunks[b"iTXt"].decode()
    with Image.open(io.BytesIO(data)) as image:
        assert metadata.SYNTHETIC in image.info["XML:com.adobe.xmp"]


def test_pillow_finds_the_packet_in_webp_and_jpeg():
    for format, quality in WAYS[1:]:
        with Image.open(io.BytesIO(images.encode(face(5, 9), format, quality, RECIPE))) as image:
            image.load()
            assert metadata.SYNTHETIC.encode() in image.info["xmp"]
            assert image.size == (9, 5)


def test_a_moving_webp_can_be_marked_too():
    buffer = io.BytesIO()
    frames = [Image.fromarray(face(16, seed=k)) for k in range(3)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    data = metadata.embed(buffer.getvalue(), RECIPE, {"format": "webp", "width": 16, "height": 16, "quality": None})
    assert images.read_recipe(data) == RECIPE
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3


def test_fingerprint_sees_pixels_and_only_pixels():
    for format, quality in WAYS:
        one, other = (images.encode(face(seed=k), format, quality, RECIPE) for k in (0, 1))
        assert metadata.fingerprint(one) != metadata.fingerprint(other)
        assert metadata.fingerprint(one) != metadata.fingerprint(one[: len(images.encode(face(), format, quality)) - 5])
        assert metadata.fingerprint(one) == metadata.fingerprint(images.encode(face(), format, quality, {"seed": 1}))
    jpeg = images.encode(face(), "jpg")
    adobe = jpeg[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0\0" + jpeg[2:]  # says: these channels are RGB
    assert metadata.fingerprint(adobe) != metadata.fingerprint(jpeg)
    assert metadata.fingerprint(jpeg[:2] + b"\xff\xfe\x00\x04hi" + jpeg[2:]) == metadata.fingerprint(jpeg)


@pytest.mark.parametrize("quality", [1, 50, 92, 95, 100])
def test_pure_noise_the_worst_case_of_every_encoder(quality):
    noise = np.random.RandomState(0).randint(0, 256, (96, 80, 3)).astype(np.uint8)
    for format in ("jpg", "webp"):
        assert images.read_pixels(images.encode(noise, format, quality, RECIPE)).shape == noise.shape
    assert (images.read_pixels(images.encode(noise, "png", None, RECIPE)) == noise).all()


# Resizing


def test_resize_keeps_shape_rules_and_flat_colours():
    assert images.resize(face(40, 20), 10).shape == (10, 5, 3)
    assert images.resize(face(20, 40), 80).shape == (40, 80, 3)
    assert images.resize(face(40, 1), 8).shape == (8, 1, 3)
    assert images.resize(face(40, 30, 1), 8).shape == (8, 6, 1)
    pixels = face(16)
    assert images.resize(pixels, 16) is pixels
    flat = np.full((50, 50, 3), (10, 200, 77), np.uint8)
    for size in (7, 49, 128):
        assert (images.resize(flat, size) == flat[0, 0]).all()
    assert images.read_pixels(images.encode(face(64), size=16)).shape == (16, 16, 3)


def test_resize_does_not_alias():
    columns = np.zeros((64, 64, 3), np.uint8)
    columns[:, ::2] = 255  # finer than the small image can show: nothing but grey may be left
    small = images.resize(columns, 16)[4:12, 4:12].astype(int)
    assert np.abs(small - 127.5).max() <= 2


def test_resize_agrees_with_the_lanczos_formula():
    signal = face(1, 32, 1)[0, :, 0].astype(np.float64)
    factor, out = 4, []
    for k in range(8):
        centre = (k + 0.5) * factor
        taps = (np.arange(32) + 0.5 - centre) / factor
        weights = np.where(np.abs(taps) < 3, np.sinc(taps) * np.sinc(taps / 3), 0)
        out.append((weights @ signal) / weights.sum())
    got = images.resize(np.repeat(face(1, 32, 1), 4, axis=0), 8)[0, :, 0]
    assert np.abs(got - np.clip(out, 0, 255)).max() <= 1


# What must be refused, each with a sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"format": "gif"}, "'gif' is not an image format: choose one of png, jpg, webp"),
        ({"quality": 90}, "The format png is lossless and has no quality"),
        ({"format": "jpg", "quality": 0}, "A quality of 0 is not possible"),
        ({"format": "webp", "quality": 101}, "A quality of 101 is not possible"),
        ({"size": 0}, "A size of 0 pixels is not possible"),
        ({"size": 16384}, "choose 1 to 16383."),
    ],
)
def test_settings_out_of_range(arguments, sentence):
    with pytest.raises(SettingsError, match=sentence):
        images.encode(face(8), **arguments)


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), face(4)[:0]]
)
def test_pixels_that_are_none(pixels):
    with pytest.raises(ImageError, match="make no image"):
        images.encode(pixels)


def test_recipe_that_does_not_fit_and_image_that_does_not_fit():
    with pytest.raises(ImageError, match="use a shorter seed"):
        images.encode(face(8), recipe={"seed": "x" * 70_000})
    for format in images.FORMATS:
        long = {"seed": "é" * 10_000}
        assert images.read_recipe(images.encode(face(8), format, recipe=long)) == long
    with pytest.raises(ImageError, match="An image of 20000x1 pixels cannot be written as webp"):
        images.encode(face(1, 20_000), "webp")
    with pytest.raises(ValueError):
        images.encode(face(8), recipe={"psi": float("nan")})


def test_files_that_are_no_images(tmp_path):
    for name, content in {"empty.png": b"", "text.png": b"hello", "page.webp": b"RIFF    WAVE"}.items():
        (tmp_path / name).write_bytes(content)
        for reader in (images.read_recipe, images.is_marked, images.read_pixels, metadata.fingerprint):
            with pytest.raises(ImageError, match=f"{name}' is not a PNG, JPEG or WebP image"):
                reader(tmp_path / name)
    with pytest.raises(ImageError, match=r"gone.png' cannot be read \(No such file or directory\)"):
        images.read_pixels(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="cannot be read"):
        images.read_recipe(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        images.read_recipe("a\0b.png")


def packed(packet: bytes) -> bytes:
    """A PNG of one pixel that carries this packet."""
    chunk = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + packet
    data = images.encode(face(1))
    return data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def test_hostile_packets_are_neither_obeyed_nor_believed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text('{"seed": "secret"}')
    recipe = b'<r xmlns:t="urn:x-tpdne:1/"><t:recipe>%s</t:recipe></r>'
    assert images.read_recipe(packed(recipe % b'{"seed": 1}')) == {"seed": 1}
    lol = b"".join(b'<!ENTITY l%d "%s">' % (k + 1, b"&l%d;" % k * 10) for k in range(20))
    hostile = {
        "billion laughs": b'<!DOCTYPE r [<!ENTITY l0 "ha">' + lol + b"]>" + recipe % b"&l20;",
        "external entity": b'<!DOCTYPE r [<!ENTITY x SYSTEM "file://%s">]>' % str(secret).encode() + recipe % b"&x;",
        "utf-16 doctype": ('<!DOCTYPE r [<!ENTITY x "{}">]><r/>').encode("utf-16"),
        "not xml": b"\xff\xfe\x00 <",
        "cut off": (recipe % b'{"seed": 1}')[:-6],
        "json bomb": recipe % (b"[" * 50_000),
        "long number": recipe % (b'{"seed": ' + b"9" * 10_000 + b"}"),
        "not a mapping": recipe % b"[1, 2]",
        "twice": recipe % b'{"seed": 1}</t:recipe><t:recipe>{"seed": 2}',
        "deep": b"<a>" * 100_000,
        "pieces": recipe % (b"x<b/>" * 100_000),
        "too large": recipe % (b'{"seed": "' + b"x" * (2 << 20) + b'"}'),
    }
    for name, packet in hostile.items():
        assert images.read_recipe(packed(packet)) is None, name


def test_properties_written_as_attributes_count_as_well():
    packet = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" i:DigitalSourceType="%s"/></rdf:RDF>'
        b"</x:xmpmeta>" % metadata.SYNTHETIC.encode()
    )
    assert images.is_marked(packed(packet))
    assert images.read_recipe(packed(packet)) is None
    assert not images.is_marked(packed(packet.replace(b"trained", b"compositeWithTrained")))


def test_a_small_file_that_claims_a_huge_image_is_refused():
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    data = images.encode(face(4))
    bomb = data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    with pytest.raises(ImageError, match="too many pixels"):
        images.read_pixels(bomb)
    assert images.read_recipe(bomb) is None


@pytest.mark.parametrize(("format", "quality"), WAYS)
def test_damage_anywhere_ends_in_a_sentence(format, quality):
    data = images.encode(face(24), format, quality, RECIPE)
    random = np.random.RandomState(1)
    for _ in range(300):
        broken = bytearray(data[: random.randint(len(data))] if random.rand() < 0.3 else data)
        for _ in range(random.randint(1, 6)):
            if broken:
                broken[random.randint(len(broken))] = random.randint(256)
        for reader in (images.read_recipe, images.read_pixels, metadata.fingerprint):
            try:
                reader(bytes(broken))
            except ImageError as error:
                assert str(error).count("\n") == 0


def test_importing_the_room_needs_neither_torch_nor_numpy_nor_pillow():
    code = "import sys, tpdne_cli.images; print({'torch', 'numpy', 'PIL'} & {*sys.modules})"
    root = Path(images.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout == "set()\n"
