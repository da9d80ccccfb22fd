"""--min-realism: seeds go on until enough images have passed the critic, and every kept one is the seed's own."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_critic import write_pair

from tpdne_cli import devices, models
from tpdne_cli.cli import run
from tpdne_cli.sampler import sample
from tpdne_cli.training.calibrate import calibrate


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    path = write_pair(tmp_path_factory.mktemp("pair"))
    calibrate(path, images=50)
    return path


@pytest.fixture
def cli(capsysbinary, tmp_path, generator, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str):
        code = run(["generate", str(generator), *map(str, arguments)])
        out, err = capsysbinary.readouterr()
        return code, out, err.decode()

    return call


def test_further_seeds_are_drawn_until_enough_have_passed(cli, generator):
    code, out, err = cli("--seed", 0, "-n", 8, "--min-realism", 60, "--json")
    images = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(images) == 8
    assert all(image["realism"] > 60 for image in images)
    seeds = [image["seed"] for image in images]
    assert seeds == sorted(seeds)
    assert f"8 of {seeds[-1] + 1} images passed the critic." in err
    for image, plain in zip(images, sample(models.load(generator), seeds), strict=True):
        assert Path(image["path"]).name == f"tiny-{image['seed']:06d}.png"
        assert np.array_equal(np.asarray(Image.open(image["path"])), plain.pixels), "the seed's own image"
    everybody = {s for s in range(50) if s not in seeds}
    _, out, _ = cli("--seeds", "0-49", "--min-realism", 0, "--json", "-o", "all")
    rest = {i["seed"]: i["realism"] for i in map(json.loads, out.splitlines()) if i["seed"] in everybody}
    assert all(rest[s] <= 60 for s in range(seeds[-1]) if s in rest), "nobody who would have passed was left out"


def test_what_was_kept_can_be_made_again(cli, generator, capsysbinary):
    _, out, _ = cli("--seed", 3, "-n", 2, "--min-realism", 50)
    paths = out.decode().split()
    assert run(["inspect", "--verify", "--model", str(generator), *paths, "--json"]) == 0
    records = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert len(records) == 2 and all(record["recipe"]["realism"] > 50 for record in records)
    assert all("realism" not in record["command"] for record in records), "its seed alone makes it"


def test_a_broken_off_run_goes_on(cli):
    options = ("--seed", "ann", "-n", 6, "--min-realism", 50)
    _, whole, _ = cli(*options)
    names = whole.decode().split()
    kept = {name: Path(name).read_bytes() for name in names}
    Path(names[3]).unlink()
    code, _, err = cli(*options)
    assert code == 1 and "exists" in err
    other = Path(names[1]).read_bytes().replace(b'"version":"0.', b'"version":"1.')
    Path(names[1]).write_bytes(other)  # of another version, so it cannot come out the same again
    there = {name: Path(name).stat().st_mtime_ns for name in names if Path(name).exists()}
    code, again, err = cli(*options, "--skip-existing", "--manifest", "m")
    assert code == 0 and again.decode().split() == [names[3]], "only what is new is told"
    assert "images passed the critic. 5 of them are there already." in err
    assert {name: Path(name).stat().st_mtime_ns for name in there} == there, "and nothing else is written"
    assert {name: Path(name).read_bytes() for name in names} == kept | {names[1]: other}
    records = [json.loads(line) for line in Path("m").read_text().splitlines()]
    assert [(record["path"], record["seconds"] is None) for record in records] == [(n, n in there) for n in names]
    code, _, err = cli(*options, "--skip-existing", "--truncation", 0.5)
    assert code == 1 and "was made with truncation" in err


def test_an_archive_of_those_who_passed(cli):
    code, out, _ = cli("--seed", 3, "-n", 3, "--min-realism", 30, "-o", "-")
    assert code == 0
    with tarfile.open(fileobj=io.BytesIO(out)) as archive:
        assert len(archive.getnames()) == 3


def test_what_cannot_be(cli, tiny_model):
    code, _, err = cli("-n", 2, "--min-realism", 100)
    assert code == 2 and "--min-realism" in err
    code, _, err = cli("--seeds", "0-3", "--min-realism", 5, "--shard", "1/2")
    assert code == 2 and "--shard" in err
    assert run(["generate", str(tiny_model), "-n", "1", "--min-realism", "5"]) == 2, "it has no critic"


def test_next_to_nobody_passes(tmp_path, capsys):
    generator = write_pair(tmp_path, meta={"quantiles": [1e6 + i for i in range(101)]})
    assert run(["generate", str(generator), "-n", "1", "--min-realism", "30", "-o", str(tmp_path / "d")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Next to nothing passes: 0 of 1000 images" in err
    assert list((tmp_path / "d").iterdir()) == []


def test_a_file_that_is_there_is_refused_before_anything_is_drawn(cli):
    Path("a.png").write_bytes(b"mine")
    code, out, err = cli("--seed", 1, "--min-realism", 99, "-o", "a.png")
    assert (code, out, Path("a.png").read_bytes()) == (1, b"", b"mine")
    assert "a.png exists" in err and "passed the critic" not in err


def test_a_precision_that_nobody_chose_is_no_other_image(cli):
    if not devices.bfloat16_survives():
        pytest.skip("this processor does not live through bfloat16")
    options = ("--seed", 3, "-n", 2, "--min-realism", 0)
    cli(*options, "--precision", "bfloat16")
    code, again, err = cli(*options, "--skip-existing")
    assert (code, again) == (0, b"") and "2 of them are there already" in err
    code, _, err = cli(*options, "--skip-existing", "--precision", "float16")
    assert code == 1 and "was made with precision" in err


def test_what_a_killed_run_left_half_written_is_cleared_for_seeds_that_are_gone_on_to(cli):
    options = ("--seed", 0, "-n", 3, "--min-realism", 60, "--name", "{seed}/x")
    folders = [Path(name).parent for name in cli(*options)[1].decode().split()]
    assert folders[-1].name > "000002", "one that nobody gave"
    (folders[-1] / ".tpdne-1-abcd.tmp").write_bytes(b"half")
    assert cli(*options, "--skip-existing")[0] == 0
    assert [path.name for path in folders[-1].iterdir()] == ["x.png"]
