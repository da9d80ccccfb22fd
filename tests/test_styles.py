"""styles.py: mixtures and neighbours, against the network called by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tpdne_cli import models
from tpdne_cli.errors import SeedError, SettingsError
from tpdne_cli.interpolation import interpolate
from tpdne_cli.networks.stylegan2 import Config, Generator
from tpdne_cli.sampler import Sampler, Settings, sample
from tpdne_cli.styles import Mixer, Mixture, Neighbour, Varier, mix, parse_styles, remade, vary


@pytest.fixture(scope="module")
def model(tiny_model):
    return models.load(tiny_model)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """64 pixels, ten layers: the smallest that has fine ones."""
    torch.manual_seed(1)
    config = Config(resolution=64, z_dim=16, w_dim=16, mapping_layers=2, channel_base=256, channel_max=16)
    network = Generator(config)
    network.mapping.w_avg.normal_()
    path = tmp_path_factory.mktemp("models") / "deep.safetensors"
    models.save(path, "stylegan2", config, network.state_dict(), {})
    return models.load(path)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("coarse", [0, 1, 2, 3]),
        ("middle", [4, 5, 6, 7]),
        ("fine", [8, 9, 10, 11]),
        ("Coarse, fine", [0, 1, 2, 3, 8, 9, 10, 11]),
        ("0-6", [0, 1, 2, 3, 4, 5, 6]),
        ("5", [5]),
        ("3-4,4-5,11", [3, 4, 5, 11]),
    ],
)
def test_styles_by_name_and_by_range(text, layers):
    assert parse_styles(text, 12) == layers


@pytest.mark.parametrize("text", ["", "rough", "6-2", "0-12", "12", "-1", "1-", "1;2", "coarse,", "٣"])
def test_styles_that_are_none(text):
    with pytest.raises(SettingsError) as caught:
        parse_styles(text, 12)
    assert str(caught.value).endswith(".")


def test_a_small_model_has_no_fine_layers():
    with pytest.raises(SettingsError, match="faces has no style layers fine: its 8 are 0 to 7"):
        parse_styles("fine", 8, "faces")
    assert parse_styles("middle", 6) == [4, 5]


def test_mixing_is_the_networks_own(model):
    """Against ws put together by hand: rows give the named layers, columns the rest."""
    got = list(mix(model, [1, "bob"], [3, 4, 5], "0-2", truncation=0.8))
    assert [s.recipe["seed"] for s in got] == [[r, c] for r in (1, "bob") for c in (3, 4, 5)]
    sampler = Sampler(model, Settings(0.8))
    with torch.inference_mode():
        ws = sampler.map([1, 4])
        image = model.generator.synthesis(torch.cat([ws[:1, :3], ws[1:, 3:]], 1))
    expected = (image[0].permute(1, 2, 0) * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()
    assert np.array_equal(got[1].pixels, expected)


def test_a_seed_mixed_with_itself_is_itself(model):
    for styles in ("coarse", "middle", "2-5"):
        mixed = next(mix(model, [9], [9], styles, noise="random"))
        assert np.array_equal(mixed.pixels, next(sample(model, [9], noise="random")).pixels)


def test_mixtures_do_not_depend_on_the_batch(model):
    together, alone = (
        [s.pixels for s in mix(model, [1, 2], [3, 4], "middle", noise="random", batch_size=n)] for n in (4, 1)
    )
    assert all(map(np.array_equal, together, alone))


def test_neighbours_do_not_depend_on_count_or_batch(deep_model):
    for fine in (False, True):
        many = [s.pixels for s in vary(deep_model, "bob", 5, fine=fine, batch_size=2)]
        few = [s.pixels for s in vary(deep_model, "bob", 2, fine=fine)]
        assert all(map(np.array_equal, many, few)) and not np.array_equal(many[0], many[1])


def test_neighbours_move_away_with_their_strength(deep_model):
    self = next(sample(deep_model, [3])).pixels.astype(float)
    assert np.array_equal(next(vary(deep_model, 3, 1, 0.0)).pixels, self)
    far = [
        np.mean([np.abs(s.pixels - self).mean() for s in vary(deep_model, 3, 8, strength)])
        for strength in (0.05, 0.2, 0.8)
    ]
    assert 0 < far[0] < far[1] < far[2]


def test_index_zero_is_the_seed_itself(deep_model):
    for fine in (False, True):
        varier = Varier(Sampler(deep_model), fine=fine)
        assert np.array_equal(next(varier([Neighbour(5, 0)])).pixels, next(sample(deep_model, [5])).pixels)


def test_neighbours_lie_around_their_seed(deep_model):
    """The mean of many steps in W is no step."""
    varier = Varier(Sampler(deep_model, Settings(1.0)), 0.5)
    with torch.inference_mode():
        self = varier.sampler.map([8])[0, 0]
        ws = varier._map([Neighbour(8, index) for index in range(1, 401)])[:, 0]
        others = varier.sampler.map(list(range(400)))[:, 0]
    drift = (others - deep_model.generator.mapping.w_avg).mean(0) / 2  # w_avg of random weights is no average
    assert torch.allclose(ws.mean(0) - self, drift, atol=0.15 * float((ws - self).norm(dim=1).mean()))


def test_neighbours_stay_in_their_class(tmp_path):
    """Wherever the average of all classes lies, the mean of many steps is no step; and steps have their usual size."""
    torch.manual_seed(2)
    shape = {"mapping_layers": 2, "channel_base": 128, "channel_max": 16}
    config = Config(resolution=16, z_dim=16, w_dim=16, c_dim=3, **shape)
    network = Generator(config)
    network.mapping.w_avg.fill_(5)
    models.save(tmp_path / "m.safetensors", "stylegan2", config, network.state_dict(), {})
    sampler = Sampler(models.load(tmp_path / "m.safetensors"), Settings(0.7, class_index=2))
    with torch.inference_mode():
        steps = Varier(sampler, 0.5)._map([Neighbour(8, index) for index in range(1, 401)]) - sampler.map([8])
        others = sampler.map(list(range(400)))
    assert steps.mean(0).norm(dim=1).max() < 0.15 * steps.norm(dim=2).mean()
    torch.testing.assert_close(steps.std(0).mean(), 0.5 * others.std(0).mean(), rtol=0.1, atol=0)


def test_fine_neighbours_keep_the_other_layers(deep_model):
    varier = Varier(Sampler(deep_model), fine=True)
    with torch.inference_mode():
        self, ws = varier.sampler.map([8])[0], varier._map([Neighbour(8, 1)])[0]
    assert torch.equal(ws[:8], self[:8]) and not torch.isclose(ws[8:], self[8:]).any()


def test_settings_out_of_range(model, deep_model):
    for strength in (-0.1, 11, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="strength"):
            vary(deep_model, 1, 3, strength)
    with pytest.raises(SettingsError, match="no style layers fine"):
        vary(model, 1, 3, fine=True)
    with pytest.raises(SettingsError, match="names no style layers"):
        mix(model, [1], [2], "rough")
    with pytest.raises(SeedError):
        list(mix(model, [1], [-2]))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """16 pixels, of three classes."""
    torch.manual_seed(0)
    config = Config(resolution=16, z_dim=8, w_dim=8, c_dim=3, mapping_layers=2, channel_base=128, channel_max=8)
    path = tmp_path_factory.mktemp("models") / "classes.safetensors"
    models.save(path, "stylegan2", config, Generator(config).state_dict(), {"truncation": 0.8})
    return models.load(path)


def test_every_function_takes_the_settings_that_it_is_given(classes):
    given = {"truncation": 0.3, "truncation_cutoff": 2, "noise": "none", "class_index": 2}
    how = {"batch_size": 1, "device": "cpu", "precision": "float32"}
    for made in (
        sample(classes, [1], **given, **how),
        interpolate(classes, [1, 2], 2, **given, **how),
        mix(classes, [1], [2], **given, **how),
        vary(classes, 1, 1, **given, **how),
    ):
        assert given.items() <= next(made).recipe.items()


def test_one_seed_is_not_a_list_of_letters(classes):
    for call in (
        lambda: mix(classes, "tom", [1]),
        lambda: mix(classes, [1], "tom"),
        lambda: interpolate(classes, "tom", 4),
    ):
        with pytest.raises(SeedError, match=r"write \['tom'\]"):
            list(call())


def test_the_command_of_a_class_names_it(cli, classes):
    assert cli("generate", classes.path, "--seed", 7, "--class", 2, "-o", "a.png")[0] == 0
    assert cli("inspect", "a.png")[1][1].endswith("--class 2")


def test_images_are_made_again_from_their_recipes(deep_model):
    samples = [
        *list(interpolate(deep_model, [1, "two", 3], 7, loop=True, easing="in", noise="random"))[2:4],
        *interpolate(deep_model, [1, 3], 2, method="slerp", noise="random"),
        *mix(deep_model, ["a"], [4], "coarse,fine", noise="random"),
        *vary(deep_model, 6, 2, 0.4, noise="random"),
        *vary(deep_model, 6, 1, fine=True, noise="random"),
    ]
    sampler = Sampler(deep_model, Settings(noise="random"))
    for made in samples:
        assert np.array_equal(remade(sampler, made.recipe), made.pixels), made.recipe["latent"]


@pytest.mark.parametrize(
    "changes",
    [
        {"latent": None},
        {"latent": {}},
        {"latent": {"kind": "sheet"}},
        {"latent": {"kind": "walk"}, "seed": 5},
        {"latent": {"kind": "walk", "frames": "9"}},
        {"latent": {"kind": "walk", "frames": 9, "frame": 9}},
        {"latent": {"kind": "walk", "frames": 9, "frame": None}},
        {"latent": {"kind": "walk", "frames": 9, "colour": 1}},
        {"latent": {"kind": "mix", "styles": 7}},
        {"latent": {"kind": "mix", "styles": "0-99"}},
        {"latent": {"kind": "mix"}, "seed": [1, 2, 3]},
        {"latent": {"kind": "neighbour"}, "seed": 5},
        {"latent": {"kind": "neighbour", "index": 1, "strength": "x"}, "seed": 5},
        {"latent": {"kind": "neighbour", "index": 1}, "seed": [5]},
        {"latent": {"kind": ["walk"]}},
        {"latent": {"kind": "walk", "frames": 9, "frame": float("inf")}},
        {"latent": {"kind": "neighbour", "index": float("inf")}, "seed": 5},
    ],
)
def test_recipes_that_describe_nothing(model, changes):
    with pytest.raises((SettingsError, SeedError)) as caught:
        remade(Sampler(model), {"seed": [1, 2], **changes})
    assert str(caught.value).endswith(".")


def test_a_mixture_names_its_seeds(model):
    recipe = Mixer(Sampler(model), "0-1").recipe(Mixture(1, "b"))
    assert recipe["seed"] == [1, "b"] and recipe["latent"] == {"kind": "mix", "styles": "0-1"}
