"""Going on: what counts as finished, what is another image, and a manifest that ends complete."""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from running import files

from tpdne_cli import images
from tpdne_cli.cli import manifest as manifests
from tpdne_cli.cli.manifest import open_manifest
from tpdne_cli.errors import OutputError
from tpdne_cli.pipeline import Encoding, write_files
from tpdne_cli.resume import INCIDENTAL, describe, is_finished, objection
from tpdne_cli.sampler import Sample

RECIPE = {"model": "m", "weights": "ab", "seed": "Zoë", "truncation": 0.7, "truncation_cutoff": None, "noise": "const",
          "class_index": None, "precision": "float32", "device": "cpu", "version": "0.1.0"}  # fmt: skip


def pixels(size: int = 32):
    import numpy as np

    return np.random.RandomState(0).randint(0, 256, (size, size, 3)).astype(np.uint8)


def written(folder: Path, encoding: Encoding, recipe=RECIPE, size: int = 32):
    path = folder / f"x.{encoding.format}"
    sample = Sample(recipe["seed"], pixels(size), recipe, 0.5)
    return next(iter(write_files([(sample, path)], encoding, replace=True)))


ENCODINGS = [
    Encoding(), Encoding("jpg"), Encoding("jpg", 50), Encoding("webp"), Encoding("webp", 100), Encoding(size=48),
    Encoding(metadata=False), Encoding("webp", size=16, metadata=False),
]  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_finished_file_is_finished_and_described_as_its_run_described_it(tmp_path, encoding):
    done = written(tmp_path, encoding)
    assert objection(done.path, RECIPE, encoding, 32) is None
    again = describe(done.path, RECIPE, encoding, 32)
    assert {**again.record(), "seconds": 0.5} == done.record()


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        (Encoding("jpg", 91), "quality of 92"),
        (Encoding("jpg", size=33), "is a jpg of 32x32"),
        (Encoding("png"), "is a jpg of"),
    ],
)
def test_a_file_written_another_way(tmp_path, encoding, reason):
    path = written(tmp_path, Encoding("jpg")).path
    assert reason in objection(path, RECIPE, encoding, 32)
    assert is_finished(path, RECIPE, Encoding("jpg", 92), 32), "the default said outright"
    assert is_finished(path, RECIPE, Encoding("jpg", size=32), 32), "the size said outright"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": "Zoe"}, "made with seed"),
        ({"seed": 1}, "not 1"),
        ({"truncation": 0.5}, "truncation 0.7, not 0.5"),
        ({"truncation_cutoff": 3}, "truncation_cutoff null, not 3"),
        ({"weights": "cd"}, "weights"),
        ({"precision": "bfloat16"}, "precision"),
        ({"smile": 2}, "smile null, not 2"),
    ],
)
def test_a_file_of_another_recipe(tmp_path, change, reason):
    path = written(tmp_path, Encoding()).path
    assert reason in objection(path, {**RECIPE, **change}, Encoding(), 32)
    path = written(tmp_path, Encoding(), {**RECIPE, **change}).path
    assert objection(path, RECIPE, Encoding(), 32), "nor the other way round"


def test_another_version_or_device_goes_on_and_a_precision_that_nobody_chose(tmp_path):
    path = written(tmp_path, Encoding()).path
    other = {**RECIPE, "version": "9.9", "device": "cuda"}
    assert is_finished(path, other, Encoding(), 32)
    assert not is_finished(path, {**other, "precision": "float16"}, Encoding(), 32)
    assert is_finished(path, {**other, "precision": "float16"}, Encoding(), 32, INCIDENTAL | {"precision"})


def damaged(data: bytes, way: str) -> bytes:
    return {
        "empty": b"",
        "text": b"hello",
        "half": data[: len(data) // 2],
        "cut": data[:-200],
        "one bit": data[:-50] + bytes([data[-50] ^ 1]) + data[-49:],
    }[way]


REASONS = ("is no whole image", "was damaged or edited since", "holds no recipe that can be read")


@pytest.mark.parametrize("way", ["empty", "text", "half", "cut", "one bit"])
@pytest.mark.parametrize("encoding", [Encoding(), Encoding("jpg"), Encoding("webp"), Encoding(metadata=False)])
def test_a_damaged_file_is_never_finished(tmp_path, encoding, way):
    path = written(tmp_path, encoding).path
    path.write_bytes(damaged(path.read_bytes(), way))
    assert objection(path, RECIPE, encoding, 32) in REASONS


def test_an_image_of_somebody_else(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (32, 32)).save(path)
    assert objection(path, RECIPE, Encoding(), 32) == "holds no recipe that can be read"
    path.write_bytes(images.encode(pixels(), "png", None, {"seed": 1}))
    assert "made with class_index" not in (objection(path, RECIPE, Encoding(), 32) or "")
    assert not is_finished(path, RECIPE, Encoding(), 32)


@pytest.fixture
def cli(cli, tiny_model):
    return partial(cli, "generate", tiny_model)


def records(path: str) -> list[dict]:
    return [{**json.loads(line), "seconds": None} for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("extra", [[], ["--no-metadata"], ["--format", "jpg", "--size", "20"]])
def test_the_manifest_of_a_resumed_run_is_that_of_an_undisturbed_one(cli, extra):
    options = ["--seeds", "0-5", "--seed", "bob", "--manifest", "m.jsonl", "-o", "d", *extra]
    assert cli(*options)[0] == 0
    whole, names = records("m.jsonl"), files(Path("d"))
    assert len(whole) == 7
    for name in names[1::2]:
        Path("d", name).unlink()
    code, out, err = cli(*options)
    assert code == 1 and "m.jsonl exists" in err and "--skip-existing completes it" in err
    code, out, err = cli(*options, "--skip-existing")
    assert (code, out) == (0, [f"d/{name}" for name in names[1::2]]), "only what is new is printed"
    assert "4 of 7 images are there already" in err
    assert records("m.jsonl") == whole
    assert Path("m.jsonl").read_text().count('"seconds": null') == 4
    code, out, _ = cli(*options, "--skip-existing")
    assert (code, out, records("m.jsonl")) == (0, [], whole)


def test_a_file_that_is_not_ours_to_skip_stops_the_run_before_it_begins(cli):
    cli("--seeds", "0-3", "-o", "d", "--manifest", "m.jsonl")
    before = Path("m.jsonl").read_bytes()
    Path("d/tiny-000000.png").unlink()
    edited = Path("d/tiny-000002.png")
    edited.write_bytes(damaged(edited.read_bytes(), "one bit"))
    code, out, err = cli("--seeds", "0-3", "-o", "d", "--manifest", "m.jsonl", "--skip-existing")
    assert (code, out) == (1, []) and "d/tiny-000002.png was damaged or edited since" in err
    assert not Path("d/tiny-000000.png").exists() and Path("m.jsonl").read_bytes() == before
    assert cli("--seeds", "0-3", "-o", "d", "--manifest", "m.jsonl", "--force")[0] == 0


def test_a_precision_said_outright_counts(cli):
    cli("--seed", "1", "--precision", "float32")
    assert cli("--seed", "1", "--skip-existing")[:2] == (0, [])
    code, _, err = cli("--seed", "1", "--skip-existing", "--precision", "float16")
    assert code == 1 and "precision" in err


def test_a_manifest_that_cannot_be_written_is_told_before_anything_is_made(cli):
    for place in ("nowhere/m.jsonl", "d"):
        Path("d").mkdir(exist_ok=True)
        code, out, err = cli("--seed", "1", "--manifest", place)
        assert code in (1, 2) and out == [] and place in err and err.count("\n") == 1
        assert not files(Path())


def paths(manifest: str = "m.jsonl") -> list[str]:
    return [record["path"] for record in records(manifest)]


def test_a_manifest_is_completed_and_keeps_what_other_runs_wrote(cli):
    cli("--seeds", "0-2", "-o", "d", "--manifest", "m.jsonl")
    cli("--seed", "7", "-o", "e", "--manifest", "m.jsonl", "--skip-existing")
    earlier = [f"d/tiny-00000{i}.png" for i in range(3)]
    assert paths() == [*earlier, "e/tiny-000007.png"]
    with Path("m.jsonl").open("a") as file:
        file.write('{"path": "d/tin')  # as a full disk leaves it
    code, _, err = cli("--seeds", "1-3", "-o", "d", "--manifest", "m.jsonl", "--skip-existing")
    assert code == 0, err
    assert paths() == [earlier[0], "e/tiny-000007.png", *earlier[1:], "d/tiny-000003.png"], "one line for each"
    assert cli("-n", "1", "-o", "f", "--manifest", "m.jsonl", "--skip-existing")[0] == 0
    assert len(paths()) == 6, "fresh seeds too"


def test_a_resumed_run_that_breaks_off_again_loses_no_line(cli, monkeypatch):
    options = ["--seeds", "0-5", "-o", "d", "--manifest", "m.jsonl"]
    cli(*options)
    whole, seen = paths(), []
    for name in ("d/tiny-000001.png", "d/tiny-000004.png"):
        Path(name).unlink()

    def link(*_: object) -> None:
        seen.append(paths())
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", link)
    assert cli(*options, "--skip-existing")[0] == 1
    assert set(whole) <= set(seen[0]), "not even while it runs: it could be killed"
    assert sorted(paths()) == whole
    monkeypatch.undo()


@pytest.mark.parametrize(
    "content", [b"name,seed\nbob,1\n", b"hello", b"[1]\n", b'{"seed": 1}\n', b"\x89PNG\r\n\x1a\n\0\0", b"\n"]
)
def test_another_file_is_not_taken_for_a_manifest(cli, content):
    Path("accounts.csv").write_bytes(content)
    code, out, err = cli("--seed", "1", "--manifest", "accounts.csv", "--skip-existing")
    assert (code, out, err.count("\n")) == (1, [], 1) and "accounts.csv is no manifest" in err
    assert files(Path()) == ["accounts.csv"] and Path("accounts.csv").read_bytes() == content


def test_a_line_is_in_the_manifest_before_the_next_image_is_made(tmp_path):
    with open_manifest(str(tmp_path / "m")) as manifest:
        manifest.add({"path": "a.png"})
        assert (tmp_path / "m").read_bytes() == b'{"path": "a.png"}\n', "a kill -9 would lose it"


LINE = b'{"path": "a.png"}\n'


@pytest.mark.parametrize("way", [{}, {"skip": True}, {"force": True}], ids=str)
@pytest.mark.parametrize("first", [{}, {"skip": True}, {"force": True}], ids=str)
def test_of_two_runs_that_write_one_manifest_the_second_is_told_and_no_line_is_lost(tmp_path, first, way):
    path = tmp_path / "m"
    if first:
        path.write_bytes(b'{"path": "b.png"}\n')
    with open_manifest(str(path), **first) as manifest:
        manifest.add({"path": "a.png"})
        there = path.read_bytes()
        with pytest.raises(OutputError, match=r"Another run is writing the manifest .*/m: .*--shard auto"):
            open_manifest(str(path), **way).__enter__()
        assert path.read_bytes() == there
    assert path.read_bytes() == there and there.endswith(LINE)
    with open_manifest(str(path), skip=True) as manifest:
        manifest.add({"path": "c.png"})
    assert path.read_bytes().count(b"\n") == there.count(b"\n") + 1, "what has ended keeps nobody away"


def test_the_second_of_two_runs_is_told_before_it_makes_an_image(cli):
    with open_manifest("m"):
        code, out, err = cli("--seeds", "0-3", "--shard", "1/2", "--manifest", "m", "--skip-existing")
    assert (code, out, files(Path()), err.count("\n")) == (1, [], ["m"], 1) and "Another run is writing" in err


def test_a_line_does_not_go_to_a_manifest_that_another_run_has_replaced(tmp_path, monkeypatch):
    """It finishes between two steps of ours: the file that we have opened is no longer the one of that name."""
    path, asked = tmp_path / "m", []

    def late(*arguments, **settings):
        if not asked:
            (tmp_path / "tidied").write_bytes(LINE)
            (tmp_path / "tidied").replace(path)
        asked.append(arguments)
        return True

    path.write_bytes(LINE * 2)
    monkeypatch.setattr(manifests, "lock", late)
    with open_manifest(str(path), skip=True) as manifest:
        manifest.add({"path": "b.png"})
    assert path.read_bytes() == LINE + b'{"path": "b.png"}\n'


def test_a_manifest_by_a_link_to_a_file_that_is_not_there_yet(tmp_path):
    (tmp_path / "link").symlink_to("m")
    with open_manifest(str(tmp_path / "link")) as manifest:
        manifest.add({"path": "a.png"})
    assert (tmp_path / "m").read_bytes() == LINE and (tmp_path / "link").is_symlink()


def test_force_empties_a_manifest(tmp_path):
    (tmp_path / "m").write_bytes(b"x" * 100)
    with open_manifest(str(tmp_path / "m"), force=True) as manifest:
        manifest.add({"path": "a.png"})
    assert (tmp_path / "m").read_bytes() == LINE
