"""pipeline.py: order, back-pressure, whole files, and streams that other tools read."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tpdne_cli.errors import OutputError
from tpdne_cli.metadata import read_marks
from tpdne_cli.pipeline import Encoding, in_order, write_files, write_stream
from tpdne_cli.sampler import Sample


def samples(n, size=16):
    rng = np.random.RandomState(0)
    for seed in range(n):
        yield Sample(seed, rng.randint(0, 256, (size, size, 3)).astype(np.uint8), {"seed": seed}, 0.0)


def test_results_come_in_order_however_long_each_takes():
    def work(i):
        time.sleep(0.002 * (i % 5))
        return i

    assert list(in_order(work, range(40), workers=4)) == list(range(40))


def test_a_slow_encoder_holds_the_network_back():
    made, release = [], threading.Event()

    def items():
        for i in range(100):
            made.append(i)
            yield i

    def work(i):
        release.wait(5)
        return i

    results = in_order(work, items(), workers=2, window=8)
    threading.Timer(0.2, release.set).start()
    assert next(results) == 0
    assert len(made) <= 9, "no more than the window is made ahead"
    results.close()


def test_a_reader_that_goes_away_stops_the_work():
    started = []
    results = in_order(lambda i: started.append(i) or i, iter(range(10_000)), workers=1, window=4)
    next(results)
    results.close()
    assert len(started) < 100


def test_an_error_in_an_encoder_reaches_the_caller():
    def work(i):
        if i == 5:
            raise OSError(5, "Input/output error")
        return i

    seen = []
    with pytest.raises(OSError, match="Input/output"):
        for i in in_order(work, range(20)):
            seen.append(i)
    assert seen == [0, 1, 2, 3, 4], "what came before is delivered"


def test_what_finds_no_memory_beside_the_network_is_done_between_its_batches():
    mine, tried = threading.get_ident(), []

    def work(i):
        tried.append(i)
        if i % 3 == 0 and threading.get_ident() != mine:
            raise MemoryError
        return i

    assert list(in_order(work, range(20))) == list(range(20))
    assert len(tried) == 27


def test_where_no_thread_can_be_started_the_caller_works(monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert list(in_order(lambda i: (i, threading.get_ident()), range(5))) == [
        (i, threading.get_ident()) for i in range(5)
    ]


def test_an_encoder_without_memory_is_told_from_an_image_that_cannot_be(monkeypatch, tmp_path):
    from tpdne_cli import images
    from tpdne_cli.errors import ImageError

    genuine, calls = images.encode, []

    def encode(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise ImageError("An image cannot be written as png (out of memory when writing image file): use png.")
        return genuine(*arguments)

    monkeypatch.setattr(images, "encode", encode)
    placed = [(s, tmp_path / f"{s.seed}.png") for s in samples(4)]
    assert [done.path for done in write_files(placed, Encoding(), workers=1)] == [path for _, path in placed]
    monkeypatch.setattr(images, "encode", lambda *_: (_ for _ in ()).throw(ImageError("Pixels make no image.")))
    with pytest.raises(ImageError, match="no image"):
        list(write_files(placed, Encoding(), replace=True))


def test_an_error_where_images_are_made_comes_after_what_was_made():
    def failing():
        yield from range(7)
        raise RuntimeError("the network failed")

    seen = []
    with pytest.raises(RuntimeError, match="network"):
        for i in in_order(lambda i: time.sleep(0.01) or i, failing()):
            seen.append(i)
    assert seen == list(range(7))


def test_all_files_that_are_there_are_told_before_the_error(tmp_path, monkeypatch):
    from tpdne_cli import pipeline

    genuine = pipeline.write_atomic

    def failing(path, *rest, **settings):
        if path.name == "3.png":
            time.sleep(0.05)  # others overtake it
            raise OutputError("The disk is full.")
        genuine(path, *rest, **settings)

    monkeypatch.setattr(pipeline, "write_atomic", failing)
    placed = ((s, tmp_path / f"{s.seed}.png") for s in samples(1000))
    told = []
    with pytest.raises(OutputError, match="full"):
        for done in write_files(placed, Encoding(), workers=3):
            told.append(done.path.name)
    assert sorted(told) == sorted(p.name for p in tmp_path.iterdir()) and 3 <= len(told) < 500


def test_files_hold_the_pixels_and_are_described_truly(tmp_path):
    placed = [(s, tmp_path / "deep" / f"{s.seed}.png") for s in samples(5)]
    for done, (sample, path) in zip(write_files(placed, Encoding()), placed, strict=True):
        data = path.read_bytes()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), sample.pixels)
        record = done.record()
        assert record["sha256"] == hashlib.sha256(data).hexdigest()
        assert record["bytes"] == len(data) and record["quality"] is None
        assert (record["path"], record["seed"], record["width"]) == (str(path), sample.seed, 16)


def test_existing_files_are_kept_unless_told_otherwise(tmp_path):
    (sample,) = samples(1)
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError):
        list(write_files([(sample, path)], Encoding()))
    assert path.read_bytes() == b"mine"
    list(write_files([(sample, path)], Encoding(), replace=True))
    assert Image.open(path).size == (16, 16)


def test_a_record_tells_the_size_of_the_file_not_of_the_network(tmp_path):
    (done,) = write_files([(s, tmp_path / "a.png") for s in samples(1)], Encoding(size=40))
    assert (done.record()["width"], done.record()["height"]) == Image.open(tmp_path / "a.png").size == (40, 40)


@pytest.mark.parametrize(("given", "told"), [(None, 92), (40, 40)])
def test_a_record_tells_the_quality(tmp_path, given, told):
    (done,) = write_files([(s, tmp_path / "a.jpg") for s in samples(1)], Encoding("jpg", given))
    assert done.record()["quality"] == read_marks(tmp_path / "a.jpg").image["quality"] == told


def test_one_image_is_its_bytes():
    stream = io.BytesIO()
    list(write_stream([(s, "a.png") for s in samples(1)], Encoding(), stream, tar=False))
    assert Image.open(io.BytesIO(stream.getvalue())).format == "PNG"


def test_several_are_a_tar_archive_without_traces():
    def archive():
        stream = io.BytesIO()
        list(write_stream([(s, f"{s.seed}.png") for s in samples(3)], Encoding(), stream, tar=True))
        return stream.getvalue()

    with tarfile.open(fileobj=io.BytesIO(archive())) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == ["0.png", "1.png", "2.png"]
        assert {(m.mtime, m.uid, m.uname) for m in members} == {(0, 0, "")}
        for member, sample in zip(members, samples(3), strict=True):
            assert np.array_equal(np.asarray(Image.open(tar.extractfile(member))), sample.pixels)
    assert archive() == archive()


def test_a_broken_off_archive_can_be_told():
    def failing():
        yield from ((s, f"{s.seed}.png") for s in samples(2))
        raise RuntimeError("broken off")

    stream = io.BytesIO()
    with pytest.raises(RuntimeError):
        list(write_stream(failing(), Encoding(), stream, tar=True))
    assert not stream.getvalue().endswith(b"\0" * 1024), "no end mark on an archive that is not complete"


def test_memory_stays_flat():
    """Ten thousand images leave no more behind than a hundred."""
    import tracemalloc

    def peak(n):
        tracemalloc.start()
        for _ in in_order(lambda s: s.pixels.sum(), samples(n, size=32), window=16):
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(3000) < peak(100) + 200_000


def test_after_an_error_no_further_images_are_made(tmp_path):
    made = []

    def placed():
        for sample in samples(2000):
            made.append(sample)
            yield sample, tmp_path / f"{sample.seed}.png"

    (tmp_path / "3.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        list(write_files(placed(), Encoding()))
    assert len(made) < 200, "a full disk stops the network, too"
