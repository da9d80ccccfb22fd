"""interpolation.py: paths against independent formulas, and walks whose keys are the seeds' own images."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpdne_cli import models
from tpdne_cli.errors import SeedError, SettingsError
from tpdne_cli.interpolation import EASINGS, METHODS, Path, Walker, interpolate, linear, slerp, spline
from tpdne_cli.sampler import Sampler, Settings

KEYS = (5, "alice@example.com", 7, 4294967295)
WAYS = [("spline", "w"), ("spline", "z"), ("linear", "w"), ("linear", "z"), ("slerp", "z")]


@pytest.fixture(scope="module")
def model(tiny_model):
    return models.load(tiny_model)


def points(curve, legs, steps=8):
    return np.stack([curve(leg, k / steps) for leg in range(legs) for k in range(steps)])


@given(st.integers(2, 12), st.booleans(), st.integers(0, 40))
def test_every_key_has_a_frame_and_legs_differ_by_one_frame_at_most(count, loop, extra):
    path = Path(tuple(range(count)), count + extra, loop)
    keys = path.key_frames
    assert keys[0] == 0 and all(path.place(frame) == (leg, 0) for leg, frame in enumerate(keys))
    lengths = np.diff([*keys, path.frames] if loop else keys)
    assert lengths.min() >= 1 and lengths.max() - lengths.min() <= 1
    assert loop or keys[-1] == path.frames - 1
    places = [path.place(frame) for frame in range(path.frames)]
    assert places == sorted(set(places)) and all(0 <= t < 1 for _, t in places)


def test_frames_unless_told():
    assert Path((1, 2, 3)).frames == 121 and Path((1, 2, 3)).key_frames == [0, 60, 120]
    assert Path((1, 2, 3), loop=True).frames == 180 and Path((1, 2, 3), loop=True).key_frames == [0, 60, 120]


@pytest.mark.parametrize("easing", EASINGS)
def test_easings_are_monotone_and_keep_the_ends(easing):
    values = [EASINGS[easing](t) for t in np.linspace(0, 1, 50)]
    assert values[0] == 0 and values[-1] == 1 and (np.diff(values) > 0).all()
    speed_at_start, speed_at_end = values[1] / (1 / 49), (1 - values[-2]) / (1 / 49)
    assert (speed_at_start < 0.1) == (easing in ("in", "in-out")), "where it leaves gently"
    assert (speed_at_end < 0.1) == (easing in ("out", "in-out")), "where it arrives gently"


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_curves_meet_their_keys_bit_for_bit(method, loop):
    keys = np.random.RandomState(0).randn(5, 32)
    curve = METHODS[method](keys, loop)
    assert all(np.array_equal(curve(leg, 0.0), keys[leg]) for leg in range(5))


def pieces(keys, loop):
    """Each leg's cubic, recovered from four of its points: coefficients [leg, 4, dims], highest power first."""
    curve, t = spline(keys, loop), np.array([0, 0.25, 0.5, 0.75])
    legs = len(keys) - (not loop)
    return np.stack([np.linalg.solve(np.vander(t), np.stack([curve(leg, x) for x in t])) for leg in range(legs)])


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 9), st.booleans(), st.integers(0, 99))
def test_spline_is_a_cubic_with_continuous_first_and_second_derivative(count, loop, seed):
    keys = np.random.RandomState(seed).randn(count, 3)
    cubics = pieces(keys, loop)
    a, b, c, _ = cubics.transpose(1, 0, 2)
    ends = [cubics.sum(1), 3 * a + 2 * b + c, 6 * a + 2 * b]  # value, first and second derivative at t = 1
    starts = [cubics[:, 3], c, 2 * b]  # ... and at t = 0
    for end, start in zip(ends, starts, strict=True):
        following = np.roll(start, -1, 0)
        assert np.allclose(end if loop else end[:-1], following if loop else following[:-1], atol=1e-10)
    if not loop:
        assert np.allclose(2 * b[0], 0, atol=1e-10) and np.allclose((6 * a + 2 * b)[-1], 0, atol=1e-10), "straight ends"


def test_slerp_turns_evenly_on_the_sphere():
    keys = np.random.RandomState(1).randn(2, 64)
    keys *= 8 / np.linalg.norm(keys, axis=1, keepdims=True)
    way = points(slerp(keys, False), 1, 10)
    assert np.allclose(np.linalg.norm(way, axis=1), 8)
    steps = np.linalg.norm(np.diff(way, axis=0), axis=1)
    assert np.allclose(steps, steps[0])
    middle = slerp(keys, False)(0, 0.5)
    assert np.allclose(middle / 8, keys.sum(0) / np.linalg.norm(keys.sum(0)))


def test_linear_is_a_straight_line():
    keys = np.random.RandomState(2).randn(3, 8)
    way = points(linear(keys, True), 3, 4)
    assert np.allclose(np.diff(way[:5], axis=0), (keys[1] - keys[0]) / 4)
    assert np.allclose(way[-1], keys[2] / 4 + keys[0] * 3 / 4)


@pytest.mark.parametrize(("method", "space"), WAYS)
@pytest.mark.parametrize("noise", ["const", "random"])
def test_key_frames_are_the_images_of_the_seeds(model, method, space, noise):
    model.generator.synthesis.b32.conv1.noise_strength.fill_(0.5)
    try:
        sampler = Sampler(model, Settings(0.7, 5, noise), batch_size=3)
        alone = {sample.seed: sample.pixels for sample in sampler(KEYS)}
        for loop in (False, True):
            path = Path(KEYS, 11, loop, method, space)
            frames = list(Walker(sampler, path)())
            assert len(frames) == 11
            for seed, frame in zip(KEYS, path.key_frames, strict=True):
                assert np.array_equal(frames[frame].pixels, alone[seed]), f"{seed} at frame {frame}, loop: {loop}"
                assert frames[frame].seed == seed
    finally:
        model.generator.synthesis.b32.conv1.noise_strength.fill_(0)


@pytest.mark.parametrize(("method", "space"), WAYS)
def test_a_frame_is_the_same_in_every_batch_and_alone(model, method, space):
    path = Path(KEYS, 10, True, method, space, "in-out")
    together = [sample.pixels for sample in Walker(Sampler(model, batch_size=8), path)()]
    for size in (1, 3):
        again = [sample.pixels for sample in Walker(Sampler(model, batch_size=size), path)()]
        assert all(map(np.array_equal, together, again)), f"batch size {size}"
    alone = next(Walker(Sampler(model), path)([7]))
    assert np.array_equal(alone.pixels, together[7]) and alone.recipe["latent"]["frame"] == 7


def test_random_noise_is_the_same_in_every_batch_and_keeps_its_strength(model):
    from tpdne_cli.interpolation import DriftingNoise

    places = [(1, 2, 0.0), (1, 2, 0.4), (2, 3, 0.5)]
    together = DriftingNoise(places, "cpu")(64, 64)
    alone = [DriftingNoise([place], "cpu")(64, 64)[0] for place in places]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert np.allclose([image.std() for image in alone], 1, atol=0.05)
    path = Path((1, 2), 6, True)
    sampler = Sampler(model, Settings(noise="random"))
    walks = [[s.pixels for s in Walker(Sampler(model, sampler.settings, batch_size=n), path)()] for n in (2, 6)]
    assert all(map(np.array_equal, *walks))


def test_truncated_walk_is_the_walk_truncated(model):
    """Interpolating truncated ws and truncating interpolated ones is the same, up to rounding."""
    import torch

    whole = Sampler(model, Settings(1.0))
    with torch.inference_mode():
        ws = whole.map([1, 2, 3]).numpy().astype(np.float64)
        average = model.generator.mapping.w_avg.numpy()
        cut = Sampler(model, Settings(0.6)).map([1, 2, 3]).numpy()
    way, expected = points(spline(cut, True), 3), average + 0.6 * (points(spline(ws, True), 3) - average)
    assert np.allclose(way, expected, atol=1e-6)


def test_neighbouring_frames_are_close_and_a_loop_closes(model):
    for method in METHODS:
        frames = np.stack([s.pixels for s in interpolate(model, [1, 2, 3], 60, loop=True, method=method)]).astype(float)
        steps = np.sqrt(((np.roll(frames, -1, 0) - frames) ** 2).mean((1, 2, 3)))
        assert steps[-1] <= 2 * np.median(steps), "the last frame leads to the first"
        assert steps.max() < np.sqrt(((frames[0] - frames[20]) ** 2).mean()) / 2


def test_recipe_names_every_setting(model):
    sample = next(interpolate(model, ["a", 2], 5, easing="out", truncation=0.5))
    assert sample.recipe["seed"] == ["a", 2] and sample.recipe["truncation"] == 0.5
    assert sample.recipe["latent"] == {
        "kind": "walk", "frames": 5, "frame": 0, "loop": False, "method": "spline", "space": "w", "easing": "out",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seeds", "options", "error", "words"),
    [
        ((), {}, SeedError, "at least two"),
        ((4,), {}, SeedError, "from 4 alone leads nowhere"),
        ((4, 4), {}, SeedError, "from 4 to 4"),
        ((4, "4"), {}, SeedError, "from 4 to 4"),
        ((4, 5, 4), {"loop": True}, SeedError, "a loop returns"),
        ((4, -1), {}, SeedError, "outside"),
        ((4, ""), {}, SeedError, "empty"),
        ((4, 5), {"frames": 0}, SettingsError, "0 frames cannot visit 2 keys"),
        ((4, 5), {"frames": -3}, SettingsError, "cannot visit"),
        ((4, 5, 6), {"frames": 2}, SettingsError, "ask for 3"),
        ((4, 5), {"method": "cubic"}, SettingsError, "spline, linear, slerp"),
        ((4, 5), {"space": "x"}, SettingsError, "w, z"),
        ((4, 5), {"easing": "bounce"}, SettingsError, "in-out"),
        ((4, 5), {"method": "slerp", "space": "w"}, SettingsError, "sphere of Z"),
    ],
)
def test_what_is_no_walk(seeds, options, error, words):
    with pytest.raises(error, match=words) as caught:
        Path(seeds, **options)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_keys_may_return_later():
    assert Path((1, 2, 1), 9).key_frames == [0, 4, 8]
    assert math.isclose(Path((1, 2, 1), 9).place(6)[1], 0.5)


def test_walks_within_a_class(tmp_path):
    import torch

    from tpdne_cli.networks.stylegan2 import Config, Generator

    torch.manual_seed(3)
    config = Config(resolution=16, z_dim=8, w_dim=8, c_dim=3, mapping_layers=2, channel_base=128, channel_max=16)
    models.save(tmp_path / "m.safetensors", "stylegan2", config, Generator(config).state_dict(), {})
    sampler = Sampler(models.load(tmp_path / "m.safetensors"), Settings(class_index=2))
    for method, space in WAYS:
        first = next(Walker(sampler, Path((4, 5), 3, False, method, space))())
        assert np.array_equal(first.pixels, next(sampler([4])).pixels) and first.recipe["class_index"] == 2


@pytest.mark.parametrize(("method", "space"), WAYS)
def test_a_walk_may_end_where_it_begins(model, method, space):
    frames = [sample.pixels for sample in interpolate(model, [1, 2, 1], 5, method=method, space=space)]
    assert np.array_equal(frames[0], frames[4]) and not np.array_equal(frames[0], frames[2])


def test_slerp_where_there_is_no_one_great_circle():
    key = np.random.RandomState(3).randn(8)
    for other in (key, 2 * key, -key):
        assert np.allclose(slerp(np.stack([key, other]), False)(0, 0.25), 0.75 * key + 0.25 * other)
