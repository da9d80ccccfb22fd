"""montage.py: every image where it belongs, and sheets as large as one likes."""

from __future__ import annotations

import hashlib
import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tpdne_cli import images, metadata, models
from tpdne_cli.errors import ImageError, OutputError, SettingsError
from tpdne_cli.inspection import inspect
from tpdne_cli.montage import PAPER, Layout, save_sheet
from tpdne_cli.remaking import check
from tpdne_cli.sampler import Sample, Sampler

RECIPE = {"model": "faces", "seed": "0-5"}


def cells(count, side=32, channels=3):
    for k in range(count):
        yield np.random.RandomState(k).randint(0, 200, (side, side, channels)).astype(np.uint8)


def opened(path):
    with Image.open(path) as image:
        image.load()
        return np.asarray(image.convert("RGB"))


def cut(sheet, layout, row, column):
    top, left = layout.top(row), layout.left(column)
    return sheet[top : top + layout.cell, left : left + layout.cell]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(("labels", "head"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_image_is_in_its_cell_bit_for_bit(tmp_path, labels, head, channels):
    path, layout = tmp_path / "sheet.png", Layout(3, 2, 32, labels, head)
    given = list(cells(5, channels=channels))
    size = save_sheet(given, path, (3, 2), labels=["x"] * 5 if labels else False, head=head)
    sheet = opened(path)
    assert size == (layout.width, layout.height) == sheet.shape[1::-1]
    rest = np.ones(sheet.shape[:2], bool)
    for index in range(6):
        row, column = divmod(index, 3)
        expected = np.broadcast_to(given[index], (32, 32, 3)) if index < 5 else np.full((32, 32, 3), PAPER)
        assert np.array_equal(cut(sheet, layout, row, column), expected), index
        rest[layout.top(row) :, layout.left(column) :][: 32 + layout.label_height, :32] = False
    assert (sheet[rest] == PAPER).all(), "paper between the cells"


def test_the_head_stands_apart():
    plain, headed = Layout(4, 4, 64), Layout(4, 4, 64, head=True)
    steps = np.diff([headed.left(k) for k in range(4)])
    assert steps[0] > steps[1] == steps[2] == np.diff([plain.left(k) for k in range(4)])[0]


def test_blank_cells(tmp_path):
    given = [None, *cells(3)]
    save_sheet(given, tmp_path / "sheet.png", (2, 2))
    sheet, layout = opened(tmp_path / "sheet.png"), Layout(2, 2, 32)
    assert (cut(sheet, layout, 0, 0) == PAPER).all() and np.array_equal(cut(sheet, layout, 0, 1), given[1])


def test_labels_are_drawn_below_and_stay_in_their_cell(tmp_path, tiny_model):
    seeds = [1, "a very long text that fits below no image of this size", "日本\n\x07é", 4294967295]
    save_sheet(Sampler(models.load(tiny_model))(seeds), tmp_path / "a.png", (4, 1), labels=True, size=64)
    save_sheet(Sampler(models.load(tiny_model))(seeds), tmp_path / "b.png", (4, 1), size=64)
    labelled, plain, layout = opened(tmp_path / "a.png"), opened(tmp_path / "b.png"), Layout(4, 1, 64, labels=True)
    assert np.array_equal(labelled[: layout.gap + 64], plain[: layout.gap + 64])
    strip = labelled[layout.gap + 64 :].copy()
    for column in range(4):
        left = layout.left(column)
        text = strip[: layout.label_height, left : left + 64]
        assert (text < 128).any(), f"no ink below image {column}"
        strip[: layout.label_height, left : left + 64] = PAPER
    assert (strip == PAPER).all()


def test_images_are_resized_as_elsewhere(tmp_path):
    given = next(cells(1))
    save_sheet([given], tmp_path / "sheet.png", (1, 1), size=20)
    assert np.array_equal(cut(opened(tmp_path / "sheet.png"), Layout(1, 1, 20), 0, 0), images.resize(given, 20))


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_marks(tmp_path, format):
    path = tmp_path / f"sheet.{format}"
    save_sheet(cells(4), path, (2, 2), recipe=RECIPE)
    marks = metadata.read_marks(path)
    assert marks.recipe == RECIPE and marks.source_type == metadata.SYNTHETIC
    assert marks.image["data"] == metadata.fingerprint(path) and marks.image["format"] == format
    assert (marks.image["width"], marks.image["height"]) == opened(path).shape[1::-1]
    save_sheet(cells(4), path, (2, 2))
    assert metadata.read_marks(path) == metadata.Marks(), "arrays could be photographs"


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_samples_leave_the_mark_without_being_asked(tmp_path, format):
    path = tmp_path / f"sheet.{format}"
    samples = [None, *(Sample(k, pixels, {"seed": k}, 0.0) for k, pixels in enumerate(cells(3)))]
    save_sheet(iter(samples), path, (2, 2))
    marks = metadata.read_marks(path)
    assert marks.source_type == metadata.SYNTHETIC and "seed" not in marks.recipe
    assert "made by tpdne" in inspect(path).sentence and "unknown" not in inspect(path).sentence
    with pytest.raises(SettingsError, match="only single ones"):
        check(marks.recipe)
    save_sheet(samples, path, (2, 2), metadata=False)
    assert metadata.read_marks(path) == metadata.Marks()


def test_a_recipe_is_kept_to_the_letter(tmp_path):
    """Also where it holds what stands for the fingerprint until all pixels are known."""
    seed = hashlib.sha256().hexdigest()
    save_sheet(cells(1), tmp_path / "sheet.png", (1, 1), recipe={"seed": [seed]})
    assert images.read_recipe(tmp_path / "sheet.png") == {"seed": [seed]}


def test_png_is_about_as_small_as_pillows(tmp_path):
    y, x = np.mgrid[:64, :64]
    smooth = [(100 + 50 * np.sin((x * a + y)[..., None] / [5, 7, 9])).astype(np.uint8) for a in range(9)]
    save_sheet(smooth, tmp_path / "sheet.png", (3, 3))
    pillow = len(images.encode(opened(tmp_path / "sheet.png")))
    assert (tmp_path / "sheet.png").stat().st_size < 1.25 * pillow


def test_memory_is_that_of_a_row(tmp_path):
    def peak(rows):
        tracemalloc.start()
        save_sheet(cells(10 * rows), tmp_path / "sheet.png", (10, rows))
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    assert peak(30) < 1.2 * peak(6)


def test_a_stream_gets_the_same_bytes(tmp_path):
    save_sheet(cells(2), tmp_path / "sheet.png", (2, 1), recipe=RECIPE)
    stream = io.BytesIO()
    save_sheet(cells(2), stream, (2, 1), recipe=RECIPE)
    assert stream.getvalue() == (tmp_path / "sheet.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([], "s.png", (2, 2)), {}, ImageError, "no images"),
        (([None, None], "s.png", (2, 2)), {}, ImageError, "no images"),
        ((list(cells(1)), "s.png", (0, 2)), {}, SettingsError, "at least 1x1"),
        (([*cells(1), *cells(1, 16)], "s.png", (2, 1)), {}, ImageError, "all of one size"),
        (([np.zeros((8, 9, 3), np.uint8)], "s.png", (1, 1)), {}, ImageError, "all of one size"),
        ((list(cells(1)), "s.gif", (1, 1)), {}, SettingsError, "does not end with"),
        ((list(cells(1)), "s.webp", (1000, 1)), {}, SettingsError, "write a .png"),
        ((list(cells(1)), "s.png", (1, 1)), {"quality": 50}, SettingsError, "png is lossless"),
        ((iter([]), "s.png", (1, 1)), {"recipe": {"seed": "x" * 66_000}}, ImageError, "fewer of them"),
        ((list(cells(1)), "no/s.png", (1, 1)), {}, OutputError, "directory does not exist"),
    ],
)
def test_sheets_that_cannot_be(tmp_path, monkeypatch, arguments, options, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words) as caught:
        save_sheet(*arguments, **options)
    assert str(caught.value).endswith(".") and list(tmp_path.iterdir()) == []
