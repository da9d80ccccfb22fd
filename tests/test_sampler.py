"""sampler.py: a seed's pixels are an address, whatever else is asked for in the same run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tpdne_cli import devices, images, models
from tpdne_cli.errors import DeviceError, SeedError, SettingsError
from tpdne_cli.remaking import TOLERANCE
from tpdne_cli.sampler import Sampler, Settings, sample

SEEDS = [0, "alice@example.com", 7, 4294967295, "Zoë", 12, 3]


@pytest.fixture(scope="module")
def model(tiny_model):
    return models.load(tiny_model)


def pixels(model, seeds, **options):
    return {s.seed: s.pixels for s in sample(model, seeds, **options)}


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("noise", ["const", "random", "none"])
def test_pixels_do_not_depend_on_batch_order_or_company(model, noise):
    together = pixels(model, SEEDS, noise=noise, batch_size=8)
    for size in (1, 2, 3):
        assert equal(pixels(model, SEEDS, noise=noise, batch_size=size), together), f"batch size {size}"
    assert equal(pixels(model, SEEDS[::-1], noise=noise), together), "order"
    alone = {s: pixels(model, [s], noise=noise)[s] for s in SEEDS}
    assert equal(alone, together), "alone"


@pytest.mark.parametrize("call", [lambda m, s: sample(m, s), lambda m, s: Sampler(m)(s)], ids=["sample", "Sampler"])
def test_seeds_are_read_alike_wherever_they_are_given(model, call):
    zoe = "Zoe\u0308"
    got = list(call(model, ["1", np.int64(1), zoe]))
    assert [image.seed for image in got] == [1, 1, "Zo\u00eb"] and type(got[1].recipe["seed"]) is int
    assert np.array_equal(got[0].pixels, got[1].pixels)
    for wrong in ("alice", 5, [-1], [None]):
        with pytest.raises(SeedError):
            list(call(model, wrong))


@pytest.mark.parametrize("psi", [1e20, 1e300, float("nan"), 10**400])
def test_a_truncation_beyond_all_use_is_no_black_picture(model, psi):
    with pytest.raises(SettingsError, match="not a number that is possible"):
        list(sample(model, [1], psi))


def test_random_noise_belongs_to_the_seed(model):
    model.generator.synthesis.b32.conv1.noise_strength.fill_(0.5)
    try:
        const, drawn = pixels(model, [1, 2]), pixels(model, [1, 2], noise="random")
        torch.manual_seed(99)
        again = pixels(model, [1, 2], noise="random")
    finally:
        model.generator.synthesis.b32.conv1.noise_strength.fill_(0)
    assert not np.array_equal(const[1], drawn[1])
    assert equal(drawn, again)


def test_images_are_the_networks_own(model):
    """Against the network called by hand, the way the published tools do it."""
    z = torch.from_numpy(np.random.RandomState(5).randn(1, 32))
    with torch.inference_mode():
        img = model.generator(z, psi=0.8)
    expected = (img.permute(0, 2, 3, 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8)[0].numpy()
    assert np.array_equal(pixels(model, [5])[5], expected)


def test_truncation_zero_is_the_average_for_every_seed(model):
    got = pixels(model, [1, "x"], truncation=0, noise="none")
    assert np.array_equal(got[1], got["x"])


@pytest.mark.parametrize("psi", [-0.0, 0, np.float64(-0.0)])
def test_nothing_is_nothing_whatever_its_sign(model, psi):
    """One image, one recipe: the bytes of its file, and what a cache keeps, must not tell -0 from 0."""
    (image,) = sample(model, [1], truncation=psi, attributes={"smile": -0.0})
    assert str(image.recipe["truncation"]) == "0.0" and "attributes" not in image.recipe


def test_recipe_names_everything(model):
    (image,) = sample(model, ["bob"], truncation=0.5, truncation_cutoff=4)
    recipe = image.recipe
    assert recipe["seed"] == "bob"
    assert recipe["weights"] == model.sha256
    assert (recipe["truncation"], recipe["truncation_cutoff"], recipe["precision"]) == (0.5, 4, "float32")
    (default,) = sample(model, [1])
    assert default.recipe["truncation"] == 0.8, "the model's own truncation is written out"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_saved_image_says_what_it_is(model, tmp_path, suffix):
    (image,) = sample(model, ["bob"], 0.5)
    image.save(tmp_path / f"bob.{suffix}", quality=None if suffix == "png" else 100)
    assert images.is_marked(tmp_path / f"bob.{suffix}")
    assert images.read_recipe(tmp_path / f"bob.{suffix}") == image.recipe
    if suffix != "jpg":
        assert np.array_equal(images.read_pixels(tmp_path / f"bob.{suffix}"), image.pixels)


def test_away_from_the_cpu_all_batches_have_one_shape(model, monkeypatch):
    """As many images as before come out, those that they were, though the network draws the last one several times."""
    expected, sizes = pixels(model, range(6)), []
    sampler, synthesis = Sampler(model, batch_size=4), model.generator.synthesis.forward

    def counted(ws, noise):
        sizes.append(len(ws))
        return synthesis(ws, noise)

    def elsewhere(batch):
        with monkeypatch.context() as patch:
            patch.setattr(sampler, "device", torch.device("meta"))
            return Sampler.padded(sampler, batch)

    assert elsewhere([7, "bob"]) == [7, "bob", "bob", "bob"] and elsewhere([1, 2, 3, 4]) == [1, 2, 3, 4]
    monkeypatch.setattr(sampler, "padded", elsewhere)
    monkeypatch.setattr(model.generator.synthesis, "forward", counted)
    assert equal({made.seed: made.pixels for made in sampler(range(6))}, expected) and sizes == [4, 4]


def test_images_come_as_they_are_made(model):
    """An endless stream of seeds gives its first images at once."""
    import itertools

    stream = sample(model, itertools.count(), batch_size=2)
    assert next(stream).seed == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"truncation": float("nan")}, SettingsError),
        ({"truncation_cutoff": 99}, SettingsError),
        ({"noise": "loud"}, SettingsError),
        ({"class_index": 1}, SettingsError),
        ({"batch_size": 0}, SettingsError),
        ({"device": "cuda:77"}, DeviceError),
        ({"device": "quantum"}, DeviceError),
        ({"precision": "float8"}, DeviceError),
    ],
    ids=str,
)
def test_what_the_model_or_machine_does_not_have(model, options, error):
    with pytest.raises(error) as caught:
        list(sample(model, [1], **options))
    assert str(caught.value).endswith(".")


def test_seeds_that_are_none(model):
    for seed in (-1, 2**32, 1.5, None, ""):
        with pytest.raises(SeedError):
            list(sample(model, [seed]))


def test_memory_that_runs_out_halves_the_batch(model, monkeypatch):
    sampler = Sampler(model, batch_size=8)
    run, sizes = sampler._run, []

    def hungry(seeds):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return run(seeds)

    monkeypatch.setattr(sampler, "_run", hungry)
    got = {s.seed: s.pixels for s in sampler(range(10))}
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert equal(got, pixels(model, range(10)))


def test_memory_for_not_even_one_image_is_an_error(model, monkeypatch):
    sampler = Sampler(model, batch_size=4)

    def starving(_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampler, "_run", starving)
    with pytest.raises(DeviceError, match="not enough memory for one image"):
        list(sampler([1]))


def test_other_errors_are_not_taken_for_memory(model, monkeypatch):
    sampler = Sampler(model)
    monkeypatch.setattr(sampler, "_run", lambda _: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(sampler([1]))


def test_bfloat16_is_asked_of_a_child_process_first(model, monkeypatch):
    monkeypatch.setattr(devices, "bfloat16_survives", lambda: False)
    with pytest.raises(DeviceError, match="bfloat16 crashes or fails"):
        Sampler(model, precision="bfloat16")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["faces", "cats"])
def test_half_precision_keeps_within_the_stated_tolerance(name, precision):
    if precision == "bfloat16" and not devices.bfloat16_survives():
        pytest.skip("bfloat16 crashes or fails on this processor")
    model = models.load(name)
    exact, half = (
        np.stack([s.pixels for s in Sampler(model, device="cpu", precision=p)(range(6))]).astype(int)
        for p in ("float32", precision)
    )
    assert 0 < np.abs(half - exact).max() <= TOLERANCE[precision]


def test_the_probe_reports_a_child_that_dies(monkeypatch):
    monkeypatch.setattr(devices, "PROBE", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert devices.survives.__wrapped__("bfloat16") is False
    monkeypatch.setattr(devices, "PROBE", "import sys; sys.exit(sys.argv[1] != 'float16')")
    assert devices.survives.__wrapped__("float16") and not devices.survives.__wrapped__("bfloat16")


def test_conditional_models_take_a_class(tmp_path):
    from tpdne_cli.networks.stylegan2 import Config, Generator

    torch.manual_seed(0)
    shape = {"mapping_layers": 2, "channel_base": 128, "channel_max": 16}
    config = Config(resolution=16, z_dim=16, w_dim=16, c_dim=3, **shape)
    models.save(tmp_path / "cond.safetensors", "stylegan2", config, Generator(config).state_dict())
    conditional = models.load(tmp_path / "cond.safetensors")
    first, third = pixels(conditional, [1]), pixels(conditional, [1], class_index=2)
    assert not np.array_equal(first[1], third[1])
    assert equal(first, pixels(conditional, [1], class_index=0))
    with pytest.raises(SettingsError, match=r"0\.\.2"):
        Settings(class_index=3).check(conditional)


@pytest.mark.parametrize(("resolution", "expected"), [(16, 6), (64, 8)])
def test_a_cutoff_of_the_makers_holds_for_every_psi(tmp_path, resolution, expected):
    """StyleGAN1's, which its file names; an older recipe without one had all layers truncated."""
    from tpdne_cli.networks.stylegan1 import Config, Generator
    from tpdne_cli.remaking import Remaker

    torch.manual_seed(0)
    config = Config(resolution=resolution, z_dim=16, w_dim=16, mapping_layers=2, channel_base=256, channel_max=16)
    path, about = tmp_path / "one.safetensors", {"truncation": 0.7, "truncation_cutoff": 8}
    models.save(path, "stylegan1", config, Generator(config).state_dict(), about)
    first = models.load(path)
    for options in ({}, {"truncation": 0.5}):
        (image,) = sample(first, [1], **options)
        assert image.recipe["truncation_cutoff"] == expected
        assert equal({1: image.pixels}, pixels(first, [1], truncation_cutoff=expected, **options))
    (whole,) = sample(first, [1], 0.5, truncation_cutoff=first.generator.num_ws)
    assert np.array_equal(whole.pixels, image.pixels) == (resolution == 16)
    assert np.array_equal(Remaker(str(path), "cpu")(image.recipe), image.pixels)
    assert np.array_equal(Remaker(str(path), "cpu")({**whole.recipe, "truncation_cutoff": None}), whole.pixels)
