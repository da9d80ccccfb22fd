"""`tpdne inspect`: what it says of files that are ours, touched, borrowed or foreign, and its exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import shell

from tpdne_cli import images, metadata
from tpdne_cli.cli import run
from tpdne_cli.remaking import Remaker


@pytest.fixture
def make(cli, tiny_model):
    """Write images of the small model; returns their paths."""

    def call(*arguments: object) -> list[str]:
        code, out, err = cli("generate", tiny_model, *arguments)
        assert code == 0, err
        return out

    return call


SETTINGS = [
    ["--seed", "42"],
    ["--seed", "Zoë <&> 面"],
    ["--seed", "7", "--noise", "random", "--truncation", "0.3", "--truncation-cutoff", "2"],
    ["--seed", "7", "--noise", "none", "--format", "jpg", "--size", "50"],
    ["--seed", "7", "--format", "webp"],
    ["--seed", "7", "--format", "webp", "--quality", "100", "--size", "20"],
    ["--seed", "7", "--precision", "float16"],
]


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_every_setting_is_verified_and_named_by_a_command_that_makes_it_again(cli, make, tiny_model, settings):
    (path,) = make(*settings)
    code, (line, command), err = cli("inspect", path)
    assert (code, err) == (0, "") and line.startswith(f"{path}: It says that it was made by tpdne ")
    assert command.startswith("  tpdne generate tiny --seed ")
    code, (line, _), err = cli("inspect", "--verify", "--model", tiny_model, path)
    assert (code, err) == (0, "") and "does not exist: made by tpdne" in line and "the same again" in line
    again = shell(f"mkdir x && cd x && {command.replace('generate tiny', f'generate {tiny_model}')}", Path())
    assert again.returncode == 0, again.stderr
    remade = Path("x", path).with_suffix(".png")
    recipes = [json.loads(cli("inspect", "--json", file)[1][0])["recipe"] for file in (path, remade)]
    assert recipes[0] == recipes[1]
    if "--format" not in settings:
        assert remade.read_bytes() == Path(path).read_bytes()


def test_the_bundled_models_are_found_by_their_names(cli):
    cli("faces", "--seed", "42", "-o", "face.jpg")
    cli("cats", "--seed", "bob", "-o", "cat.png")
    code, out, _ = cli("inspect", "--verify", "-q", "face.jpg", "cat.png")
    assert code == 0
    assert out[0].startswith("face.jpg: This person does not exist: made by tpdne 0.1.0 from seed 42, and comes out")
    assert out[1].startswith("cat.png: This cat does not exist: made by tpdne 0.1.0 from seed bob, and comes out")


def test_a_directory_of_animations(cli, tmp_path, tiny_model, capsys):
    assert run(["interpolate", "--model", str(tiny_model), "--seeds", "1,2", "--frames", "3", "-o", "d/w.gif"]) == 0
    capsys.readouterr()
    code, out, _ = cli("inspect", "d", "--json")
    record = json.loads(out[0])
    assert code == 0 and record["verdict"] == "claimed" and record["recipe"]["seed"] == [1, 2]
    assert record["command"] is None, "no single seed describes it"


def test_directories_and_json(cli, make, tmp_path, tiny_model):
    paths = make("--seeds", "0-2", "-o", "d/e")
    Path("d/notes.txt").write_text("hello")
    Path("d/e/.tpdne-1-ab.tmp").write_bytes(b"half")
    code, out, _ = cli("inspect", "d", "--json")
    records = [json.loads(line) for line in out]
    assert code == 0 and [r["path"] for r in records] == paths
    assert {(r["verdict"], r["synthetic"], r["intact"]) for r in records} == {("intact", True, True)}
    assert records[2]["recipe"]["seed"] == 2 and "--seed 2" in records[2]["command"]
    code, out, _ = cli("inspect", "d", "--json", "--verify", "--model", tiny_model)
    assert code == 0 and {json.loads(line)["verdict"] for line in out} == {"verified"}
    code, out, err = cli("inspect", "empty")
    assert (code, out) == (1, []) and "empty" in err
    Path("empty").mkdir()
    code, out, err = cli("inspect", "empty")
    assert (code, out) == (1, []) and "no image in empty" in err
    code, out, err = cli("inspect", "empty", *paths, "-q")
    assert (code, len(out)) == (1, 3) and "no image in empty" in err, "and goes on to the others"


def touched(path: str, how: str) -> None:
    packet = metadata.read_marks(path)
    assert packet.recipe is not None
    image = Image.open(path).convert("RGB")
    if how == "stripped":
        image.save(path)
        return
    if how == "cropped":
        image = image.crop((0, 0, 20, 32))
    if how == "painted over":
        image.paste((255, 0, 0), (8, 8, 16, 16))
    info = Image.open(path).info["xmp"]
    image.save(path, **({"xmp": info} if path.endswith(".jpg") else {}), quality=60)


@pytest.mark.parametrize(
    ("how", "verdict", "plain", "words"),
    [
        ("painted over", "changed", 0, "It is not the picture made from seed 5"),
        ("cropped", "resized", 0, "cropped, resized or turned"),
        ("recompressed", "recompressed", 0, "saved again with loss"),
        ("stripped", "unmarked", 1, "carries no mark"),
    ],
)
def test_what_was_done_to_an_image_is_said(cli, make, tiny_model, how, verdict, plain, words):
    (path,) = make("--seed", "5", "--format", "jpg")
    touched(path, how)
    assert cli("inspect", path)[0] == plain
    code, out, _ = cli("inspect", "--verify", "--model", tiny_model, path, "--json")
    record = json.loads(out[0])
    assert code == 1 and record["verdict"] == verdict and words in record["sentence"]


def test_one_bad_image_among_good_ones(cli, make, tiny_model):
    good, bad = make("--seeds", "1-2")
    data = Path(bad).read_bytes()
    Path(bad).write_bytes(data[:500])
    code, out, err = cli("inspect", bad, good, "missing.png", "-q")
    assert code == 1 and len(out) == 1 and out[0].startswith(good)
    assert err.count("Error: ") == err.count("\n") == 2
    code, out, _ = cli("inspect", bad, good, "--json")
    assert [json.loads(line)["verdict"] for line in out] == ["unreadable", "intact"]


def forged(path: str, **changes: object) -> str:
    """The image with something else in its recipe, made as our own encoder makes files."""
    recipe = {**(images.read_recipe(path) or {}), **changes}
    Path(path).write_bytes(images.encode(images.read_pixels(path), "png", None, recipe))
    return path


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"seed": 6}, "other pixels", "its recipe is false"),
        ({"truncation": 0.1}, "other pixels", "its recipe is false"),
        ({"weights": "00" * 32}, "unverifiable", "other weights"),
        ({"seed": -1}, "unverifiable", "outside 0.."),
        ({"seed": True}, "unverifiable", "no possible seed"),
        ({"seed": [1, 2]}, "unverifiable", "no possible seed"),
        ({"seed": ""}, "unverifiable", "empty"),
        ({"truncation": "1"}, "unverifiable", "no possible truncation"),
        ({"truncation_cutoff": 10**9}, "unverifiable", "cutoff"),
        ({"noise": ["random"]}, "unverifiable", "no possible noise"),
        ({"class_index": 3}, "unverifiable", "no classes"),
        ({"precision": {}}, "unverifiable", "no possible precision"),
        ({"precision": "float8"}, "unverifiable", "no possible precision"),
        ({"smile": 2.0}, "unverifiable", "asks for 'smile'"),
        ({"latent": {"kind": "walk"}}, "unverifiable", "made again here"),
        ({"latent": 5}, "unverifiable", "made again here"),
        ({"latent": {"kind": "sheet"}, "seed": [1, 2]}, "unverifiable", "single"),
    ],
)
def test_a_false_or_hostile_recipe(cli, make, tiny_model, changes, verdict, words):
    path = forged(make("--seed", "5")[0], **changes)
    assert cli("inspect", path)[0] == 0
    code, out, err = cli("inspect", "--verify", "--model", tiny_model, path, "--json")
    record = json.loads(out[0])
    assert (code, err, record["verdict"]) == (1, "", verdict)
    assert words in record["sentence"] and record["sentence"].count("\n") == 0


@pytest.mark.parametrize(
    ("precision", "device", "levels"),
    [("float32", "cpu", 0), ("float32", "cuda", 2), ("float16", "cpu", 8), ("bfloat16", "mps", 24), ("odd", "cpu", 0)],
)
def test_how_far_an_image_may_be_from_its_recipe(precision, device, levels):
    """A processor's float32 is exact; what is stated in the README holds for everything else."""
    assert Remaker(None, "cpu").tolerance({"precision": precision, "device": device}) == levels


def test_a_name_that_stands_for_other_weights_here_is_in_no_command(cli, tiny_model, tmp_path):
    """It would draw somebody else."""
    (tmp_path / "cats.safetensors").write_bytes(tiny_model.read_bytes())
    assert cli("generate", "./cats.safetensors", "--seed", 1, "-o", "a.png")[0] == 0
    code, (line,), err = cli("inspect", "a.png", "--json")
    assert code == 0 and json.loads(line)["command"] is None, err


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    "odd", [{"truncation": 10**400}, {"truncation": 1e308}, {"rotate": 10**400}, {"foo": nested(600)}]
)
def test_an_odd_recipe_hides_no_other_image(cli, make, tiny_model, odd):
    (good,) = make("--seed", "1", "-o", "d/b.png")
    recipe = images.read_recipe(good) | odd
    Path("d/a.png").write_bytes(images.encode(images.read_pixels(good), "png", None, recipe))
    for verify in ([], ["--verify", "--model", tiny_model]):
        _, out, err = cli("inspect", "d", *verify)
        assert any("b.png: " in line for line in out) and "unforeseen" not in err


@pytest.mark.parametrize(
    ("device", "off", "verdict"), [("cpu", 1, "other pixels"), ("cuda", 2, "verified"), ("cuda", 3, "other pixels")]
)
def test_the_command_allows_what_the_readme_says(cli, make, tiny_model, device, off, verdict):
    (path,) = make("--seed", 5)
    pixels, recipe = images.read_pixels(path).astype(int), images.read_recipe(path)
    pixels[3, 4, 1] += off if pixels[3, 4, 1] < 128 else -off
    Path(path).write_bytes(images.encode(pixels.astype(np.uint8), "png", None, {**recipe, "device": device}))
    code, (line,), _ = cli("inspect", "--verify", "--model", tiny_model, path, "--json")
    assert (code, json.loads(line)["verdict"]) == (int(verdict != "verified"), verdict)


@pytest.mark.parametrize("arguments", [[], ["--verify"]])
def test_a_recipe_with_a_latent_and_no_seed_stops_nothing(cli, make, arguments):
    odd, good = make("--seeds", "5-6")
    recipe = {key: value for key, value in (images.read_recipe(odd) or {}).items() if key != "seed"}
    data = images.encode(images.read_pixels(odd), "png", None, {**recipe, "latent": {"kind": "neighbour"}})
    Path(odd).write_bytes(data)
    _, out, err = cli("inspect", odd, good, "--json", *arguments)
    assert err == "" and [json.loads(line)["command"] is None for line in out] == [True, False]


@pytest.mark.parametrize("name", ["/etc/passwd", "tiny.safetensors", "../x", None, 5, "", "faces\0"])
def test_a_recipe_names_installed_models_and_never_a_path(cli, make, tiny_model, name):
    shutil.copy(tiny_model, "tiny.safetensors")
    path = forged(make("--seed", "5")[0], model=name)
    code, out, _ = cli("inspect", "--verify", path, "--json")
    record = json.loads(out[0])
    assert (code, record["verdict"]) == (1, "unverifiable") and "no generator called" in record["sentence"]


def test_usage(cli):
    assert cli("inspect")[0] == 2
    code, _, err = cli("inspect", "x.png", "--model", "faces")
    assert code == 2 and "--verify" in err
    code, _, err = cli("inspect", "--verify", "--device", "cuda:7", "x.png")
    assert code == 1 and "CUDA" in err
    code, _, err = cli("inspect", "--verify", "--model", "nope", "x.png")
    assert code == 1 and err.count("\n") == 1


@pytest.mark.skipif(not shutil.which("exiftool"), reason="exiftool is not installed")
@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_an_independent_tool_reads_the_mark(make, format):
    (path,) = make("--seed", "5", "--format", format)
    done = subprocess.run(["exiftool", "-json", "-DigitalSourceType", "-CreatorTool", path], capture_output=True)
    (record,) = json.loads(done.stdout)
    assert record["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert record["CreatorTool"].startswith("tpdne ")
