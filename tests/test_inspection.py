"""What inspect and verify say of images that are ours, touched, borrowed or foreign; the generator is a stand-in."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw
from PIL.PngImagePlugin import PngInfo
from test_images import WAYS, face

from tpdne_cli import containers, images, metadata
from tpdne_cli.animation import save_animation
from tpdne_cli.errors import ImageError, ModelNotFoundError
from tpdne_cli.inspection import LOSSY_BOUND, Report, inspect, verify

RECIPE = {
    "model": "faces",
    "weights": "ab" * 32,
    "seed": 42,
    "truncation": 0.7,
    "precision": "float32",
    "device": "cpu",
    "version": "0.1.0",
}
ANY = pytest.mark.parametrize(("format", "quality"), WAYS)


def regenerate(recipe: Mapping[str, Any]) -> np.ndarray:
    return face(64, seed=recipe["seed"])


def almost(recipe: Mapping[str, Any]) -> np.ndarray:
    """The same picture as another device makes it: one level off in one value of a hundred."""
    pixels = regenerate(recipe).astype(int)
    random = np.random.RandomState(0)
    return np.clip(pixels + (random.rand(*pixels.shape) < 0.01), 0, 255).astype(np.uint8)


def write(
    folder: Path, format: str = "png", quality: int | None = None, size: int | None = None, **changes: Any
) -> Path:
    recipe = {**RECIPE, **changes}
    path = folder / f"face{images.FORMATS[format].suffix}"
    path.write_bytes(images.encode(regenerate(recipe), format, quality, recipe, size))
    return path


def save_again(path: Path, image: Image.Image, suffix: str | None = None, **settings: Any) -> Path:
    """Save as an editor does that keeps the metadata; Pillow writes it, not our own code."""
    packet = re.search(rb"<\?xpacket begin.*<\?xpacket end=.r.\?>", path.read_bytes(), re.DOTALL)
    assert packet
    target = path.with_suffix(suffix or path.suffix)
    if target.suffix == ".png":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet[0].decode())
        image.save(target, pnginfo=info, **settings)
    else:
        image.save(target, xmp=packet[0], **settings)
    return target


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def says(report: Report, verdict: str, *words: str) -> None:
    assert report.verdict == verdict, report
    assert report.verified == (verdict == "verified")
    assert report.sentence.endswith(".") and report.sentence.isprintable()
    for word in words:
        assert word in report.sentence, report.sentence
    json.dumps(dataclasses.asdict(report), allow_nan=False)


@ANY
@pytest.mark.parametrize("size", [None, 40, 100])
def test_an_untouched_image_is_verified(tmp_path, format, quality, size):
    path = write(tmp_path, format, quality, size)
    report = inspect(path)
    says(report, "intact", "tpdne 0.1.0 from seed 42", "only making it again can prove it")
    assert (report.format, report.width, report.height) == (format, size or 64, size or 64)
    assert report.synthetic and report.intact and report.recipe == RECIPE and report.path == str(path)
    report = verify(path, regenerate)
    says(report, "verified", "This person does not exist: made by tpdne 0.1.0 from seed 42")
    assert report.max_difference == 0 and report.mean_difference == 0


def test_the_subject_is_named_by_the_model(tmp_path):
    says(verify(write(tmp_path, model="cats"), regenerate), "verified", "This cat does not exist")
    says(verify(write(tmp_path, model="dishes"), regenerate), "verified", "What this image shows does not exist")


def test_another_device_is_told_from_the_same_one(tmp_path):
    for format, quality in [("png", None), ("webp", 100)]:
        path = write(tmp_path, format, quality, device="cuda", precision="float16")
        says(verify(path, almost), "other pixels", "up to 1 of 255 levels apart", "float16 on cuda")
        report = verify(path, almost, tolerance=1)
        says(report, "verified", "up to 1 of 255 levels apart")
        assert report.max_difference == 1 and 0 < report.mean_difference < 0.02
    report = verify(write(tmp_path, "jpg"), almost)
    says(report, "verified")
    assert 0 < report.max_difference <= LOSSY_BOUND


@ANY
def test_a_recipe_that_is_not_its_own(tmp_path, format, quality):
    forged = tmp_path / "forged"
    forged.write_bytes(images.encode(regenerate({"seed": 7}), format, quality, RECIPE))  # a whole file, a false recipe
    says(inspect(forged), "intact")
    says(verify(forged, lambda recipe: 255 - regenerate(recipe)), "other pixels", "its recipe is false")


@ANY
def test_metadata_added_by_others_changes_nothing(tmp_path, format, quality):
    path = write(tmp_path, format, quality)
    data = path.read_bytes()
    if format == "jpg":
        data = data[:2] + b"\xff\xfe\x00\x08noted\x00" + data[2:]
    elif format == "webp":
        data += b"NOTE\x04\x00\x00\x00text"
    else:
        data = data[:-12] + b"\0\0\0\x04tEXta\0bc" + b"\0\0\0\0" + data[-12:]
    path.write_bytes(data)
    says(inspect(path), "intact")


def test_saved_again_without_loss(tmp_path):
    path = write(tmp_path)
    save_again(path, opened(path), compress_level=9)
    says(inspect(path), "rewritten", "saved again or edited since")
    says(verify(path, regenerate), "verified", "though the file was saved again since")
    path = write(tmp_path, "jpg")
    converted = save_again(path, opened(path), ".png")
    says(inspect(converted), "rewritten")
    says(verify(converted, regenerate), "verified", "though the file was saved again since")


@ANY
@pytest.mark.parametrize(("suffix", "settings"), [(".jpg", {"quality": 60}), (".webp", {"quality": 60})])
def test_saved_again_with_loss(tmp_path, format, quality, suffix, settings):
    path = write(tmp_path, format, quality)
    again = save_again(path, opened(path), suffix, **settings)
    says(inspect(again), "rewritten")
    report = verify(again, regenerate)
    says(report, "recompressed", "from seed 42", "of 255 levels apart")
    assert report.max_difference > LOSSY_BOUND


def painted(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).rectangle((20, 20, 25, 25), fill=(255, 0, 0))
    return image


def cloned_patch(image: Image.Image) -> Image.Image:
    image.paste(image.crop((0, 0, 12, 12)), (40, 40))
    return image


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def another(_: Image.Image) -> Image.Image:
    return Image.fromarray(255 - regenerate(RECIPE))


@ANY
@pytest.mark.parametrize("edit", [painted, cloned_patch, mirrored, another])
def test_edits_are_seen(tmp_path, format, quality, edit):
    path = write(tmp_path, format, quality)
    settings = {} if format == "png" else {"quality": 90}
    save_again(path, edit(opened(path)), **settings)
    says(inspect(path), "rewritten")
    says(verify(path, regenerate), "changed", "not the picture made from seed 42")


def test_the_faintest_edit_of_a_lossless_image_is_seen(tmp_path):
    path = write(tmp_path)
    pixels = images.read_pixels(path)
    pixels[63, 63, 2] ^= 1
    save_again(path, Image.fromarray(pixels))
    report = verify(path, regenerate)
    says(report, "changed")
    assert report.max_difference == 1


@ANY
def test_cropped_resized_and_turned(tmp_path, format, quality):
    for change in (
        lambda image: image.crop((8, 8, 56, 56)),
        lambda image: image.resize((32, 32)),
        lambda image: image.crop((0, 0, 64, 60)).rotate(90, expand=True),
    ):
        path = write(tmp_path, format, quality)
        save_again(path, change(opened(path)))
        for report in (inspect(path), verify(path, regenerate)):
            says(report, "resized", "64x64 pixels when made", "cropped, resized or turned since")


def with_orientation(image: Image.Image, value: int) -> dict[str, Any]:
    exif = image.getexif()
    exif[0x0112] = value
    return {"exif": exif}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_what_a_viewer_turns_is_turned(tmp_path, suffix):
    path = write(tmp_path)
    lossless = {".jpg": {}, ".webp": {"lossless": True}, ".png": {}}[suffix]
    turned = save_again(path, opened(path), suffix, **lossless, **with_orientation(opened(path), 3))
    for report in (inspect(turned), verify(turned, regenerate)):
        says(report, "resized", "turned since")
    upright = save_again(path, opened(path), suffix, **lossless, **with_orientation(opened(path), 1))
    says(inspect(upright), "rewritten")


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_what_is_transparent_vouches_for_nothing(tmp_path, suffix):
    """A page shows its own picture through it."""
    path = write(tmp_path)
    image = opened(path).convert("RGBA")
    settings = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    opaque = save_again(path, image, suffix, **settings)
    says(verify(opaque, regenerate), "verified", "saved again since")
    alpha = image.getchannel("A")
    alpha.paste(0, (30, 30, 50, 50))
    image.putalpha(alpha)
    seen_through = save_again(path, image, suffix, **settings)
    assert np.array_equal(images.read_pixels(seen_through), regenerate(RECIPE)), "the colours are there"
    says(verify(seen_through, regenerate), "changed")


def with_chunk(path: Path, kind: bytes, body: bytes) -> Path:
    data = path.read_bytes()
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(data[:33] + chunk + data[33:])
    return path


PRIMARIES = [31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000]


@pytest.mark.parametrize(
    ("kind", "body", "verdict"),
    [
        (b"gAMA", struct.pack(">I", 45455), "verified"),
        (b"gAMA", struct.pack(">I", 10_000_000), "changed"),
        (b"cHRM", struct.pack(">8I", *PRIMARIES), "verified"),
        (b"cHRM", struct.pack(">8I", *PRIMARIES[:2], *PRIMARIES[:1:-1]), "changed"),
        (b"cICP", bytes([1, 13, 0, 1]), "verified"),
        (b"cICP", bytes([9, 18, 0, 1]), "changed"),
        (b"sRGB", b"\0", "verified"),
    ],
)
def test_what_a_viewer_recolours_is_changed(tmp_path, kind, body, verdict):
    """Not what says in other words that it is sRGB, as many programs do when they save an image again."""
    path = with_chunk(write(tmp_path), kind, body)
    says(inspect(path), "rewritten")
    says(verify(path, regenerate), verdict)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize(("profile", "verdict"), [("sRGB", "verified"), ("XYZ", "changed"), (None, "changed")])
def test_colour_profiles(tmp_path, suffix, profile, verdict):
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile(profile)).tobytes() if profile else b"none that can be read"
    settings = {".jpg": {"quality": 92, "subsampling": "4:4:4"}, ".webp": {"lossless": True}, ".png": {}}[suffix]
    path = write(tmp_path, "jpg" if suffix == ".jpg" else "png")
    path = save_again(path, Image.fromarray(regenerate(RECIPE)), suffix, icc_profile=data, **settings)
    says(inspect(path), "rewritten")
    says(verify(path, regenerate), verdict)


def test_a_generator_of_another_shape(tmp_path):
    says(verify(write(tmp_path), lambda _: face(64, 32)), "changed")


def test_never_ours(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(face()).save(path)
    for report in (inspect(path), verify(path, regenerate)):
        says(report, "unmarked", "no mark")
        assert not report.synthetic and report.recipe is None
    packet = (
        '<r xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:x="http://ns.adobe.com/xap/1.0/">'
        f"<i:DigitalSourceType>{metadata.SYNTHETIC}</i:DigitalSourceType>"
        "<x:CreatorTool>Dream\u2028 3</x:CreatorTool></r>"
    )
    Image.fromarray(face()).save(path, xmp=packet.encode())
    says(verify(path, regenerate), "foreign", 'not tpdne: "Dream\\u2028 3".')


def test_stripped_of_metadata(tmp_path):
    path = write(tmp_path)
    opened(path).save(path)
    says(inspect(path), "unmarked", "or the mark was removed")


def test_a_recipe_that_cannot_be_made_again_is_the_callers_to_tell(tmp_path):
    def missing(recipe: Mapping[str, Any]) -> np.ndarray:
        raise ModelNotFoundError(f"There is no generator called {recipe['model']!r}.")

    with pytest.raises(ModelNotFoundError, match="faces"):
        verify(write(tmp_path), missing)


@pytest.mark.parametrize(
    "record",
    [
        {"format": ["jpg"], "quality": {}, "width": "wide", "height": None, "data": 5},
        {"format": "jpg", "quality": 10**9, "width": 64, "height": 64},
        {"format": "jpg", "quality": True, "width": 64, "height": 64},
        {"format": "gif", "quality": -1},
        {},
    ],
)
def test_hostile_records_are_reported_like_any_other(tmp_path, record):
    recipe = {"model": ["\x1b[2J"], "seed": "\x1b[31m\n" * 100, "version": {"a": 1}}
    pixels = regenerate(RECIPE)
    path = tmp_path / "hostile.png"
    data = images.encode(pixels, "png", recipe=recipe)
    ours = metadata.compact(metadata.read_marks(data).image or {}).encode()
    packet = re.search(rb"<\?xpacket begin.*<\?xpacket end=.r.\?>", data, re.DOTALL)
    assert packet
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet[0].replace(ours, json.dumps(record).encode()).decode())
    Image.fromarray(pixels).save(path, pnginfo=info)
    for report in (inspect(path), verify(path, lambda _: regenerate(RECIPE))):
        says(report, report.verdict)
        assert len(report.sentence) < 400


@pytest.mark.parametrize("format", ["webp", "png"])
def test_one_true_frame_does_not_vouch_for_an_animation(tmp_path, format):
    still = write(tmp_path, format, quality=100 if format == "webp" else None)
    others = [Image.fromarray(255 - regenerate(RECIPE))]
    first, settings = opened(still), {"save_all": True, "append_images": others, "lossless": True}
    moving = save_again(still, first, **(settings if format == "webp" else {"save_all": True, "append_images": others}))
    assert np.array_equal(images.read_pixels(moving), regenerate(RECIPE)), "the first frame is the one of the recipe"
    says(verify(moving, regenerate), "unverifiable", "animation")


@pytest.mark.parametrize("format", ["gif", "mp4"])
@pytest.mark.parametrize("side", [16, 33])
def test_animations_that_keep_no_fingerprint_say_what_they_claim(tmp_path, format, side):
    if format == "mp4":
        pytest.importorskip("av")
    path = tmp_path / f"walk.{format}"
    frames = [np.full((side, side, 3), level, np.uint8) for level in (10, 200)]
    save_animation(frames, path, recipe=RECIPE)
    report = inspect(path)
    says(report, "claimed", "made by tpdne", format.upper(), "edited")
    assert report.recipe == RECIPE and report.synthetic and not report.intact and report.format == format
    assert (report.width, report.height) == ((side + side % 2,) * 2 if format == "mp4" else (side, side))
    says(verify(path, regenerate), "unverifiable", "animation")
    save_animation(frames, path)
    says(inspect(path), "unmarked")
    says(verify(path, regenerate), "unmarked")
    path.write_bytes(path.read_bytes()[: 9 if format == "gif" else 12])
    with pytest.raises(ImageError, match="no picture"):
        inspect(path)


def test_another_programs_gif_and_its_many_blocks(tmp_path):
    path = tmp_path / "other.gif"
    Image.new("P", (7, 5)).save(path, comment=b"x" * 1000)
    report = inspect(path)
    says(report, "unmarked")
    assert (report.width, report.height) == (7, 5)
    path.write_bytes(path.read_bytes()[:13] + b"!\xff" + b"\x01a" * 500_000)  # ends after MAX_BLOCKS steps
    says(inspect(path), "unmarked")


def test_a_sheet_too_large_to_be_decoded_is_taken_as_it_says(tmp_path, monkeypatch):
    path = write(tmp_path)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses to open from twice of it on
    monkeypatch.setattr(images, "read_pixels", None)
    says(inspect(path), "intact", "made by tpdne")
    says(verify(path, regenerate), "unverifiable", "more pixels than are read")


def test_lengths_beyond_all_files(tmp_path):
    head = (16).to_bytes(4, "big") + b"ftypisom" + bytes(4)
    for length in (2**63 + 5, 2**64 - 1, 3):
        hostile = head + (1).to_bytes(4, "big") + b"mdat" + length.to_bytes(8, "big") + bytes(64)
        assert metadata.read_marks(hostile) == metadata.Marks() and containers.dimensions(hostile) is None
    with pytest.raises(ImageError, match="is not a PNG"):
        containers.format_of(head.replace(b"isom", b"avif"))


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_dimensions_without_decoding(tmp_path, format):
    data = images.encode(np.zeros((20, 31, 3), np.uint8), format, recipe=RECIPE)
    assert containers.dimensions(data) == (31, 20)
    bare = images.encode(np.zeros((20, 31, 3), np.uint8), format)
    assert containers.dimensions(bare) == (None if format == "webp" else (31, 20)), "its simple layout hides it"


def test_what_is_no_image(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ImageError, match=r"notes.txt' is not a PNG, JPEG or WebP image"):
        inspect(path)
    path.write_bytes(write(tmp_path).read_bytes()[:-3000])
    with pytest.raises(ImageError, match=r"notes.txt' is damaged"):
        verify(path, regenerate)
