"""directions.py: a named step moves every image by itself, whatever makes it, and is part of its recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tpdne_cli import directions, images, models
from tpdne_cli.checkpoints import safetensors
from tpdne_cli.errors import CheckpointError, SettingsError
from tpdne_cli.interpolation import interpolate
from tpdne_cli.sampler import Sampler, Settings, sample
from tpdne_cli.styles import mix, vary
from tpdne_cli.training import directions as finding

W_DIM = 32


def described(source, target, entries):
    """A copy of a generator's file whose header has these directions."""
    shutil.copy(source, target)
    safetensors.amend(target, {"directions": entries})
    return target


@pytest.fixture(scope="module")
def path(tiny_model, tmp_path_factory):
    steps = np.random.RandomState(0).randn(2, W_DIM).round(3)
    entries = {
        name: {"w": w.tolist(), "about": f"more {name}"} for name, w in zip(("smile", "age"), steps, strict=True)
    }
    return described(tiny_model, tmp_path_factory.mktemp("named") / "named.safetensors", entries)


@pytest.fixture(scope="module")
def model(path):
    return models.load(path)


def moved(model, seed, **attributes):
    """The image by the networks alone: the steps are added to every layer's truncated w."""
    from tpdne_cli.seeds import latents

    z = torch.from_numpy(latents([seed], 32).astype(np.float32))
    stored = safetensors.read_header(model.path).meta["directions"]
    with torch.inference_mode():
        ws = model.generator.mapping(z, None, 0.8)
        for name, amount in attributes.items():
            ws = ws + amount * torch.tensor(stored[name]["w"])
        image = model.generator.synthesis(ws, "const")
    return (image[0] * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def test_a_step_is_added_to_the_truncated_w(model):
    wanted = {"smile": 1.5, "age": -0.5}
    for made in sample(model, [3, 4], attributes=wanted):
        expected = moved(model, made.seed, **wanted)
        assert np.abs(made.pixels.astype(int) - expected).max() <= 1
        assert made.recipe["attributes"] == wanted
    (plain,) = sample(model, [3])
    assert np.abs(plain.pixels.astype(int) - moved(model, 3, smile=1.5)).mean() > 2, "the step is seen"


def test_nothing_is_nothing(model):
    (plain,), (zero,) = sample(model, [3]), sample(model, [3], attributes={"age": 0.0})
    assert plain.recipe == zero.recipe and "attributes" not in plain.recipe
    assert np.array_equal(plain.pixels, zero.pixels)


def test_an_image_is_the_same_in_every_batch(model):
    settings = Settings(attributes=(("smile", 1.0), ("age", 2.0)))
    alone = {s.seed: s.pixels for seed in range(7) for s in Sampler(model, settings)([seed])}
    for size in (3, 7):
        for made in Sampler(model, settings, batch_size=size)(reversed(range(7))):
            assert np.array_equal(made.pixels, alone[made.seed]), f"seed {made.seed} in batches of {size}"


def test_walks_mixtures_and_neighbours_take_the_step_once(model):
    """Their beginnings are the seed's own images of the same attributes."""
    chosen = {"smile": 1.5}
    ends = [s.pixels for s in sample(model, [1, 2], attributes=chosen)]
    for space, method in (("w", "spline"), ("z", "slerp")):
        walk = [s.pixels for s in interpolate(model, [1, 2], 5, space=space, method=method, attributes=chosen)]
        assert np.array_equal(walk[0], ends[0]) and np.array_equal(walk[-1], ends[1]), space
        assert not np.array_equal(walk[2], walk[0])
    (same,) = mix(model, [1], [1], attributes=chosen)
    assert np.array_equal(same.pixels, ends[0])
    (still,) = vary(model, 1, 1, strength=0, attributes=chosen)
    assert np.array_equal(still.pixels, ends[0])
    (near,), (near_plain,) = vary(model, 1, 1, strength=0.5, attributes=chosen), vary(model, 1, 1, strength=0.5)
    assert near.recipe == near_plain.recipe | {"attributes": chosen}


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"mood": 1.0}, "named has no direction 'mood': it has age, smile."),
        ({"age": float("nan")}, "The amount nan of age is out of reach"),
        ({"age": -1e4}, "The amount -10000 of age is out of reach"),
    ],
    ids=str,
)
def test_what_no_direction_is(model, attributes, sentence):
    with pytest.raises(SettingsError, match=sentence):
        next(sample(model, [1], attributes=attributes))


def test_a_model_without_directions(tiny_model, tmp_path):
    bare = models.load(described(tiny_model, tmp_path / "bare.safetensors", {}))
    with pytest.raises(SettingsError, match="bare has no direction 'age': its file names none"):
        next(sample(bare, [1], attributes={"age": 1}))


def test_twice_the_same(model):
    with pytest.raises(SettingsError, match="age is given twice"):
        Sampler(model, Settings(attributes=(("age", 1.0), ("smile", 1.0), ("age", 2.0))))


@pytest.mark.parametrize("text", ["age", "age=", "age=old", "=", ""])
def test_what_is_no_attribute(text):
    with pytest.raises(SettingsError, match="is not NAME=AMOUNT"):
        directions.parse([text])


@pytest.mark.parametrize(
    "entries",
    [
        {"age": {"w": [1.0] * (W_DIM - 1)}},
        {"age": {"w": [1.0] * (W_DIM - 1) + [1e300]}},
        {"age": {"w": [[1.0]] * W_DIM}},
        {"age": {"w": ["x"] * W_DIM}},
        {"age": {"about": "no step"}},
        {"age": [1.0] * W_DIM},
        {"age": None},
        ["age"],
        "age",
    ],
    ids=lambda entries: str(entries)[:40],
)
def test_damaged_directions(tiny_model, tmp_path, entries):
    model = models.load(described(tiny_model, tmp_path / "bad.safetensors", entries))
    with pytest.raises(CheckpointError, match="is damaged: its directions are not steps of 32 numbers"):
        Sampler(model)
    assert "directions" in models.describe(model.path), "still described"


# --- the command


def test_the_command_and_its_recipe(cli, path):
    options = ("--attr", "age=1.5", "--attr", "smile=-1")
    code, out, err = cli("generate", path, "--seed", 5, *options, "-o", "a.png", "--json")
    assert code == 0, err
    assert json.loads(out[0])["attributes"] == {"age": 1.5, "smile": -1.0}
    assert "--attr age=1.5 --attr smile=-1.0" in "\n".join(cli("inspect", "a.png")[1])
    assert cli("inspect", "--verify", "--model", path, "a.png")[0] == 0
    code, _, err = cli("generate", path, "--seed", 5, "--attr", "age=1", "-o", "a.png", "--skip-existing")
    assert code == 1 and "attributes" in err, "another image does not count as this one"


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("interpolate", ("--seeds", "1,2", "--frames", 3, "-o", "out")),
        ("vary", ("--seed", 1, "-n", 2, "-o", "out")),
        ("mix", ("--rows", 1, "--cols", "2,3", "-o", "out.png")),
        ("sheet", ("--seeds", "1,2", "-o", "out.png")),
    ],
)
def test_other_commands_know_it_too(cli, path, name, rest):
    code, out, err = cli(name, "--model", path, *rest, "--attr", "age=2", "--json")
    assert code == 0, err
    assert out and all(json.loads(line)["attributes"] == {"age": 2.0} for line in out)


def test_slips(cli, path):
    for given, words in (("old=1", "has no direction 'old': it has age, smile"), ("age", "is not NAME=AMOUNT")):
        code, _, err = cli("generate", path, "--seed", 5, "--attr", given)
        assert code != 0 and words in err


@pytest.mark.parametrize("attributes", [{"old": 1}, {"age": 1e9}, {"age": "1"}, {"age": True}, [1], 3], ids=str)
def test_a_hostile_recipe(cli, path, attributes):
    assert cli("generate", path, "--seed", 5, "-o", "b.png")[0] == 0
    recipe = {**(images.read_recipe("b.png") or {}), "attributes": attributes}
    Path("b.png").write_bytes(images.encode(images.read_pixels("b.png"), "png", None, recipe))
    code, out, _ = cli("inspect", "--verify", "--model", path, "b.png", "--json")
    assert code == 1 and json.loads(out[0])["verdict"] == "unverifiable"


def test_info_tells_names_not_numbers(cli, path):
    about = json.loads(cli("models", "info", path, "--json")[1][0])
    assert about["directions"] == {"smile": "more smile", "age": "more age"}


# --- finding them


def test_steps_move_one_measure_and_leave_the_others():
    """On ws that depend on each other, and measures that do: the answer is known."""
    random = np.random.RandomState(1)
    w = random.randn(4000, 12) @ random.randn(12, 12)
    weights = random.randn(12, 3)
    measures = w @ weights + 5
    measures[:, 2] += measures[:, 0]  # correlated on purpose
    found, told = finding.steps(w, measures)
    assert told == pytest.approx(1, abs=0.01)
    linear = np.linalg.lstsq(w - w.mean(0), measures - measures.mean(0), rcond=None)[0]
    assert found @ linear / measures.std(0) == pytest.approx(np.eye(3), abs=0.1)
    # The likeliest such step: no other one is shorter in the metric of w.
    inverse = np.linalg.inv(np.cov(w.T))
    for k in range(3):
        other = found[k] + random.randn(12) @ (np.eye(12) - np.linalg.pinv(linear.T) @ linear.T)
        assert other @ linear == pytest.approx(found[k] @ linear, abs=1e-6)
        assert found[k] @ inverse @ found[k] < other @ inverse @ other * 1.02


def test_noise_is_told_of_by_nothing():
    random = np.random.RandomState(2)
    _, told = finding.steps(random.randn(2000, 12), random.randn(2000, 2))
    assert np.abs(told).max() < 0.1


def test_too_few_images_and_measures_without_change():
    random = np.random.RandomState(3)
    with pytest.raises(SettingsError, match="draw more"):
        finding.steps(random.randn(4, 12), random.randn(4, 2))
    with pytest.raises(SettingsError, match="draw more"):
        finding.steps(random.randn(99, 12), np.ones((99, 1)))


def test_light_and_colour_are_measured_in_the_middle():
    pixels = np.zeros((3, 32, 32, 3), np.uint8)
    pixels[1] = 255
    pixels[2, ..., 0] = 255
    pixels[:, :4] = 77  # the border does not count
    found = finding.measure(pixels)
    assert found["light"] == pytest.approx([0, 1, 1 / 3]) and found["warm"] == pytest.approx([0, 0, 1])
    assert finding.measure(pixels[..., :1]).keys() == {"light"}, "grey pictures have no colour"


def test_the_whole_search_keeps_its_word(tiny_model, tmp_path, capsys):
    """Found, written into the file, and tried: steps of light and warmth change those, and seeds keep their images."""
    path = described(tiny_model, tmp_path / "mine.safetensors", {})
    before = [s.pixels for s in sample(models.load(path), [1, 2])]
    finding.main([str(path), "--images", "300", "--check", "40"])
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"light", "warm"}
    for name, other in (("light", "warm"), ("warm", "light")):
        moves = report[name]["moves"]
        assert moves[name] > 0.5 and abs(moves[other]) < moves[name] / 2, report
    model = models.load(path)
    assert all(np.array_equal(a, s.pixels) for a, s in zip(before, sample(model, [1, 2]), strict=True))
    light = finding.measure(np.stack([s.pixels for a in (-2, 2) for s in sample(model, [7], attributes={"light": a})]))
    assert light["light"][0] < light["light"][1]


def test_files_that_are_none_end_with_a_sentence(tiny_model, tmp_path, capsys):
    (tmp_path / "x.pkl").write_bytes(b"nothing")
    for options in ([tmp_path / "x.pkl"], [tiny_model, "--features", tmp_path / "x.pkl"]):
        with pytest.raises(SystemExit):
            finding.main([str(option) for option in options])
        assert "x.pkl" in capsys.readouterr().err
