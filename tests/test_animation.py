"""animation.py: what other programs' decoders make of the files, and what happens to memory meanwhile."""

from __future__ import annotations

import builtins
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tpdne_cli import animation, metadata
from tpdne_cli.animation import Motion, check, format_for, save_animation
from tpdne_cli.errors import ImageError, OutputError, SettingsError
from tpdne_cli.sampler import Sample

RECIPE = {"model": "faces", "seed": [1, "zwei"], "latent": {"kind": "walk", "frames": 6}}
STILL = ("gif", "webp", "png")  # what Pillow reads


def film(count, height=32, width=48, channels=3):
    """Smooth colours that wander, a little like a walk."""
    y, x = np.mgrid[:height, :width]
    for k in range(count):
        planes = [np.sin((x + y * (c + 1) + 3 * k) / (9 + 4 * c)) for c in range(channels)]
        yield (127.5 + 127 * np.stack(planes, 2)).astype(np.uint8)


def decoded(path):
    """All frames as RGB, and how long each lasts in milliseconds."""
    with Image.open(path) as image:
        frames, times = [], []
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
            times.append(image.info["duration"])
        return np.stack(frames), times, image.info


def save(tmp_path, format, frames, **options):
    path = tmp_path / f"film.{format}"
    count = save_animation(frames, path, **options)
    return path, count


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("format", STILL)
def test_frames_survive(tmp_path, format, channels):
    originals = np.stack([np.broadcast_to(p, (32, 48, 3)) for p in film(9, channels=channels)]).astype(int)
    path, count = save(tmp_path, format, film(9, channels=channels), fps=20, recipe=RECIPE)
    frames, times, info = decoded(path)
    assert count == 9 == len(frames) and times == [50] * 9 and info["loop"] == 0
    error = np.abs(frames - originals)
    if format == "png" or (format == "gif" and channels == 1):  # 256 greys fit into a palette
        assert error.max() == 0
    else:
        assert error.mean() < 6, "mean error in levels"


def test_webp_at_quality_100_is_lossless(tmp_path):
    path, _ = save(tmp_path, "webp", film(4), quality=100)
    assert np.array_equal(decoded(path)[0], np.stack(list(film(4))))
    small, _ = save(tmp_path, "webp", film(4), quality=20)
    assert small.stat().st_size < 4000


@pytest.mark.parametrize("format", STILL)
def test_odd_sizes_and_a_single_frame(tmp_path, format):
    path, count = save(tmp_path, format, film(1, 33, 17), recipe=RECIPE)
    with Image.open(path) as image:
        assert image.size == (17, 33) and count == 1 and getattr(image, "n_frames", 1) == 1
        image.load()
    path, _ = save(tmp_path, format, film(3), size=24, recipe=RECIPE)
    assert decoded(path)[0].shape == (3, 16, 24, 3)


def test_durations_add_up():
    for fps in (30, Fraction(30000, 1001), 7, 50):
        for unit in (100, 1000):
            times = Motion(Fraction(fps), None, None, None).times(unit)
            taken = [next(times) for _ in range(int(10 * fps))]
            assert abs(sum(taken) - unit * int(10 * fps) / fps) <= 0.5 and max(taken) - min(taken) <= 1


def test_gif_has_one_palette_for_all_frames(tmp_path):
    path, _ = save(tmp_path, "gif", film(5))
    data = path.read_bytes()
    assert data[10] & 0x80 and data[10] & 7 == 7, "a global palette of 256 colours"
    descriptors = re.findall(rb"!\xf9\x04.{4}\0,\0\0\0\0\x30\0\x20\0(.)", data, re.DOTALL)
    assert descriptors == [b"\0"] * 5, "and no frame with one of its own"


@pytest.mark.parametrize("format", ["webp", "png"])
def test_marks_are_read_back_and_the_fingerprint_holds(tmp_path, format):
    path, _ = save(tmp_path, format, film(6), recipe=RECIPE)
    marks = metadata.read_marks(path)
    assert marks.recipe == RECIPE and marks.source_type == metadata.SYNTHETIC
    assert marks.image["data"] == metadata.fingerprint(path)
    assert (marks.image["width"], marks.image["height"], marks.image["format"]) == (48, 32, format)
    bare, _ = save(tmp_path, format, film(6))
    assert metadata.read_marks(bare) == metadata.Marks()


@pytest.mark.parametrize("format", STILL)
def test_samples_leave_the_mark_without_being_asked(tmp_path, format):
    samples = [Sample(k, pixels, {"seed": k}, 0.0) for k, pixels in enumerate(film(3))]
    path, count = save(tmp_path, format, iter(samples))
    marks = metadata.read_marks(path)
    assert count == 3 and marks.source_type == metadata.SYNTHETIC and "seed" not in marks.recipe
    path, _ = save(tmp_path, format, samples, metadata=False)
    assert metadata.read_marks(path) == metadata.Marks()


@pytest.mark.parametrize("format", [*STILL, "mp4"])
@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_another_program_reads_the_mark(tmp_path, format):
    if format == "mp4":
        pytest.importorskip("av")
    path, _ = save(tmp_path, format, film(6), recipe=RECIPE, fps=25)
    said = json.loads(subprocess.run(["exiftool", "-j", path], capture_output=True, check=True).stdout)[0]
    assert said["DigitalSourceType"] == metadata.SYNTHETIC and said["CreatorTool"].startswith("tpdne ")
    assert said["Recipe"] == metadata.compact(RECIPE) and "Warning" not in said
    if format != "png":
        assert said["Duration"] == "0.24 s"
    bare, _ = save(tmp_path, format, film(6), fps=25)
    assert b"xpacket" not in bare.read_bytes()


@pytest.mark.parametrize("format", [*STILL, "mp4"])
def test_same_frames_same_bytes(tmp_path, format):
    if format == "mp4":
        pytest.importorskip("av")
    path, _ = save(tmp_path, format, film(5), recipe=RECIPE)
    first = path.read_bytes()
    assert save(tmp_path, format, film(5), recipe=RECIPE)[0].read_bytes() == first
    stream = io.BytesIO()
    save_animation(film(5), stream, format=format, recipe=RECIPE)
    assert stream.getvalue() == first


@pytest.mark.parametrize("shape", [(64, 64), (33, 47)])
@pytest.mark.parametrize("channels", [3, 1])
def test_mp4(tmp_path, shape, channels):
    av = pytest.importorskip("av", reason="PyAV, of the extra 'video', is not installed")
    originals = [np.broadcast_to(p, (*shape, 3)).astype(int) for p in film(12, *shape, channels)]
    path, count = save(tmp_path, "mp4", film(12, *shape, channels), fps=Fraction(30000, 1001), recipe=RECIPE)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001) and count == stream.frames == 12
        assert stream.width % 2 == 0 == stream.height % 2
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    for frame, original in zip(frames, originals, strict=True):
        difference = frame[: shape[0], : shape[1]] - original
        assert np.abs(difference).mean() < 12 and np.abs(difference.mean((0, 1))).max() < 4, "colours are those given"
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "a player can begin at once"


def test_mp4_of_the_highest_quality_is_none_that_browsers_refuse(tmp_path):
    av = pytest.importorskip("av", reason="PyAV, of the extra 'video', is not installed")
    path, _ = save(tmp_path, "mp4", film(3), quality=100)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.profile == "High"


def test_mp4_without_pyav_is_one_sentence(tmp_path, monkeypatch):
    def missing(name, *rest):
        if name == "av":
            raise ImportError("No module named 'av'")
        return importlib.import_module(name, *rest)

    monkeypatch.setattr(animation, "import_module", missing)
    made = []
    with pytest.raises(SettingsError, match="pip install av") as caught:
        save_animation((made.append(1) or frame for frame in film(3)), tmp_path / "film.mp4")
    assert not made and "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", STILL)
def test_memory_stays_flat(tmp_path, format, monkeypatch):
    """Four times the frames do not stay in Python's and numpy's memory."""
    monkeypatch.setattr(animation, "PALETTE_PIXELS", 1 << 15)

    def peak(count):
        tracemalloc.start()
        save(tmp_path, format, film(count, 64, 64))
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    save(tmp_path, format, film(2))
    window = peak(150)  # up to 64 frames may wait for an encoder; how many do depends on the machine
    further = 450 * 64 * 64 * 3
    assert peak(600) < window + further / 4


@pytest.mark.parametrize("format", [*STILL, "mp4"])
def test_nothing_is_left_of_a_walk_that_breaks_off(tmp_path, format):
    if format == "mp4":
        pytest.importorskip("av")

    def broken():
        yield from film(3)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        save(tmp_path, format, broken())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_it_is_to_be_replaced(tmp_path):
    path, _ = save(tmp_path, "webp", film(2))
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        save(tmp_path, "webp", film(3), replace=False)
    assert path.read_bytes() == before
    save(tmp_path, "webp", film(3))
    assert path.read_bytes() != before and [p.name for p in tmp_path.iterdir()] == ["film.webp"]


def test_names_choose_the_format():
    assert format_for("a/WALK.GIF") == "gif" and format_for("walk.apng") == "png" and format_for("walk") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("avi",), "gif, webp, png, mp4"),
        (("gif", 60), "60 frames a second are outside 0.1..50"),
        (("webp", 0), "0 frames a second"),
        (("webp", float("nan")), "nan frames"),
        (("gif", 25, 80), "has no quality"),
        (("webp", 25, 0), "quality of 0"),
    ],
)
def test_settings_that_cannot_be(arguments, words):
    with pytest.raises(SettingsError, match=words) as caught:
        check(*arguments)
    assert str(caught.value).endswith(".")


def test_frames_that_cannot_be(tmp_path):
    with pytest.raises(ImageError, match="no frames"):
        save(tmp_path, "gif", [])
    with pytest.raises(ImageError, match="all of one size"):
        save(tmp_path, "webp", [*film(2), *film(1, 16, 16)])
    with pytest.raises(SettingsError, match=r"film\.avi does not end with"):
        save(tmp_path, "avi", film(1))
    with pytest.raises(ImageError, match="fewer of them"):
        save(tmp_path, "gif", iter([]), recipe={"seed": list(range(20_000))})
    with pytest.raises(OutputError, match="its directory does not exist"):
        save(tmp_path / "nowhere", "gif", film(1))
    assert list(tmp_path.iterdir()) == []


def test_pyav_is_imported_for_mp4_only(tmp_path, monkeypatch):
    real = builtins.__import__
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(builtins, "__import__", real)
    for format in STILL:
        save(tmp_path, format, film(2))
