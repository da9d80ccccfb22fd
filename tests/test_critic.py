"""critic.py: an image's verdict is its own, a percentile means what it says, and the rule keeps what it should."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training_device import META, Accelerator

from tpdne_cli import devices, models
from tpdne_cli.checkpoints.safetensors import read_header, read_tensors, write
from tpdne_cli.critic import Critic, Judged, Selection, candidates, path_of, quantiles
from tpdne_cli.errors import CheckpointError, SettingsError, TpdneError
from tpdne_cli.networks.discriminator import Discriminator, DiscriminatorConfig
from tpdne_cli.networks.stylegan2 import Config, Generator
from tpdne_cli.sampler import Sampler, Settings, sample
from tpdne_cli.training.calibrate import calibrate

SHAPE = {"resolution": 32, "channel_base": 256, "channel_max": 32}


def write_pair(folder, c_dim=0, critic_shape=None, meta=None):
    """A random generator of 32 px and its random critic, as files; the generator's path."""
    torch.manual_seed(1)
    path = folder / "tiny.safetensors"
    config = Config(**SHAPE, z_dim=32, w_dim=32, mapping_layers=2, c_dim=c_dim)
    models.save(path, "stylegan2", config, Generator(config).state_dict(), {"truncation": 0.8})
    shape = DiscriminatorConfig(**{**SHAPE, "c_dim": c_dim, **(critic_shape or {})})
    network = Discriminator(shape)
    models.save(folder / "tiny-critic.safetensors", "stylegan2-discriminator", shape, network.state_dict(), meta or {})
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.load(write_pair(tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module")
def critic(model):
    return Critic.load(model)


@pytest.fixture(scope="module")
def samples(model):
    return list(sample(model, range(40)))


@pytest.fixture(scope="module")
def scores(critic, samples):
    return critic.score(np.stack([s.pixels for s in samples]))


@pytest.fixture(scope="module")
def calibrated(critic, scores):
    return Critic(critic.path, critic.network, np.array(quantiles(scores)))


@pytest.fixture(scope="module")
def judged(model, calibrated):
    return list(Judged(Sampler(model), calibrated)(range(40)))


def test_a_score_is_the_discriminators_own_of_the_image_alone(model, samples, scores):
    """Against the network as its paper has it, called with one image at a time."""
    network = Discriminator(DiscriminatorConfig(**SHAPE)).eval()
    network.load_state_dict(load_file(path_of(model)))
    with torch.inference_mode():
        for s, score in zip(samples[:8], scores, strict=False):
            image = torch.from_numpy(s.pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
            assert network(image).item() == pytest.approx(float(score), rel=1e-5, abs=1e-6)


def test_a_score_is_the_same_bits_in_any_company(critic, samples, scores):
    pixels = np.stack([s.pixels for s in samples])
    for size in (1, 2, 3, 8):
        parts = [critic.score(pixels[i : i + size]) for i in range(0, len(pixels), size)]
        assert np.concatenate(parts).tobytes() == scores.tobytes(), f"in groups of {size}"
    assert critic.score(pixels[::-1])[::-1].tobytes() == scores.tobytes(), "in another order"
    assert len(set(scores.tolist())) == len(scores), "the critic tells images apart"


def test_a_percentile_counts_the_images_that_score_less(calibrated, scores):
    for score in scores:
        lower = 100 * np.mean(scores < score)
        assert calibrated.percentile(score) == pytest.approx(lower, abs=100 / (len(scores) - 1))
    assert calibrated.percentile(scores.min() - 9) == 0
    assert calibrated.percentile(scores.max() + 9) == 100


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """A generator whose critic was calibrated on sixty images."""
    generator = write_pair(tmp_path_factory.mktemp("settled"), meta={"images_seen": 5})
    before = load_file(generator.with_name("tiny-critic.safetensors"))
    assert calibrate(generator, images=60) == generator.with_name("tiny-critic.safetensors")
    return models.load(generator), before


def test_calibrating_leaves_the_network_as_it_is(settled):
    model, before = settled
    after = load_file(path_of(model))
    assert {name for name in after if name not in before} == {"typical.mean", "typical.whitening"}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    header = read_header(path_of(model))
    assert (header.meta["images_seen"], header.meta["quantiles_of"]) == (5, 60)
    assert sorted(header.meta["quantiles_at"]) == ["0.5", "0.7", "0.85", "1"]


def test_the_score_is_the_distance_from_what_is_typical(settled):
    """In standard deviations, against the formula in double precision on what a hook sees of the network."""
    model, before = settled
    network = Discriminator(DiscriminatorConfig(**SHAPE)).eval()
    network.load_state_dict(before)
    seen = []
    network.b16.register_forward_hook(lambda module, given, out: seen.append(out[0].mean((2, 3)).double().numpy()[0]))
    pixels = np.stack([s.pixels for s in sample(model, range(60))])
    with torch.inference_mode():
        for picture in pixels:
            network(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1)
    features = np.array(seen)
    covariance = np.cov(features.T)
    covariance += 1e-3 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    away = features - features.mean(0)
    expected = -np.sqrt((away * np.linalg.solve(covariance, away.T).T).sum(1))
    critic = Critic.load(model)
    assert critic.score(pixels) == pytest.approx(expected, rel=1e-3)
    unseen = []  # each against all the others, by the long road
    for i, own in enumerate(features):
        others = np.delete(features, i, axis=0)
        apart = np.cov(others.T) + 1e-3 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        away = own - others.mean(0)
        unseen.append(-np.sqrt(away @ np.linalg.solve(apart, away)))
    assert critic.quantiles == pytest.approx(np.percentile(unseen, range(101)), rel=0.01)
    assert critic.quantiles[:90] != pytest.approx(np.percentile(expected, range(90)), rel=0.1), "it would go unnoticed"
    for size in (1, 7):
        parts = [critic.score(pixels[i : i + size]) for i in range(0, len(pixels), size)]
        assert np.concatenate(parts).tobytes() == critic.score(pixels).tobytes(), f"in groups of {size}"


def test_what_the_generator_would_never_draw_is_not_typical(settled):
    critic = Critic.load(settled[0])
    noise = np.random.RandomState(0).randint(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    assert critic.score(noise).max() < critic.quantiles[0]


@pytest.mark.parametrize("psi", [0.5, 0.7, 0.8, 1.0])
def test_a_percentile_is_among_unseen_images_of_the_same_truncation(settled, psi):
    """Images vary more at a higher truncation, and are less typical of its own: three in ten fail, too."""
    model, _ = settled
    judged = list(Judged(Sampler(model, Settings(truncation=psi)), Critic.load(model))(range(200, 400)))
    assert np.mean([s.recipe["realism"] > 30 for s in judged]) == pytest.approx(0.7, abs=0.1)


def test_between_two_known_truncations_scores_are_interpolated(settled):
    critic = Critic.load(settled[0])
    between = {s: critic.percentile(s, 0.925) for s in (critic.at[0.85] + critic.at[1.0])[[10, 50, 90]] / 2}
    assert list(between.values()) == pytest.approx([10, 50, 90])
    for psi, beyond in ((0.5, 0.2), (1.0, 1.7)):
        score = float(critic.at[psi][40])
        assert critic.percentile(score, beyond) == critic.percentile(score, psi) == pytest.approx(40)


def test_a_calibrated_critic_goes_on_learning(settled):
    from tpdne_cli.training import growth

    model, before = settled
    critic = growth.from_file(model.path, 32).discriminator
    for name, tensor in critic.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "typical",
    [
        {"mean": np.zeros(3), "whitening": np.eye(3)},
        {"mean": np.zeros(32)},
        {"mean": np.zeros(32), "whitening": np.full((32, 32), np.nan)},
        {"mean": np.zeros(32), "whitening": np.eye(32), "more": np.zeros(1)},
    ],
    ids=["another size", "half", "no numbers", "more"],
)
def test_damaged_notes_on_what_is_typical(tmp_path, typical):
    model = models.load(write_pair(tmp_path))
    header, tensors = read_header(path_of(model)), read_tensors(path_of(model))
    tensors |= {f"typical.{name}": values.astype(np.float32) for name, values in typical.items()}
    write(path_of(model), header.arch, header.config, tensors, header.meta)
    with pytest.raises(CheckpointError, match="damaged: what it says of typical images"):
        Critic.load(model)


def test_judging_adds_the_percentile_and_changes_nothing_else(judged, samples, scores, calibrated):
    for ours, plain, score in zip(judged, samples, scores, strict=True):
        assert np.array_equal(ours.pixels, plain.pixels)
        assert ours.seed == plain.seed
        assert ours.recipe == {**plain.recipe, "realism": round(calibrated.percentile(score), 2)}


def test_realism_does_not_depend_on_batches(model, judged, calibrated):
    for size in (1, 3, 16):
        again = Judged(Sampler(model, batch_size=size), calibrated)(range(40))
        assert [s.recipe for s in again] == [s.recipe for s in judged], f"in batches of {size}"


def test_a_judge_takes_a_samplers_place_in_a_fleet(model, judged, calibrated):
    from tpdne_cli.fleet import Fleet

    fleet = Fleet([Judged(Sampler(model, batch_size=3), calibrated) for _ in range(2)])
    assert [(s.seed, s.recipe) for s in fleet(range(40))] == [(s.seed, s.recipe) for s in judged]


@pytest.mark.parametrize("minimum", [0, 30, 75])
def test_the_rule_keeps_what_is_above_the_percentile_in_order(judged, minimum):
    passing = [s.seed for s in judged if s.recipe["realism"] > minimum]
    selection = Selection(minimum, wanted=len(passing))
    assert list(selection(judged)) == [judged[seed] for seed in passing]
    assert len(passing) == pytest.approx(40 * (1 - minimum / 100), abs=1)
    assert selection.kept == len(passing)
    assert selection.tried == passing[-1] + 1, "images behind the last one kept were not tried"


def test_it_goes_on_to_further_seeds_until_enough_have_passed(model, calibrated):
    selection = Selection(60, wanted=10)
    kept = list(selection(Judged(Sampler(model), calibrated)(candidates([3]))))
    assert len(kept) == selection.kept == 10
    assert selection.tried == kept[-1].seed - 3 + 1 > 10
    assert [s.seed for s in kept] == sorted(s.seed for s in kept)


def test_next_to_nothing_passes(judged):
    """Images that are all alike bad end the search with a sentence, not never."""
    worst = [s for s in judged if s.recipe["realism"] < 30]
    selection = Selection(30, wanted=1)
    with pytest.raises(TpdneError, match="0 of 1000 images were above the 30th percentile") as caught:
        list(selection(itertools.cycle(worst)))
    assert str(caught.value).endswith(".")


def test_a_high_percentile_is_given_the_tries_that_it_needs(judged):
    """One image in forty passes the 98th: not hopeless, however many are wanted."""
    selection = Selection(98, wanted=30)
    assert len({s.seed for s in selection(itertools.cycle(judged))}) == 1
    assert selection.tried > 1000


def test_images_that_run_out(judged):
    with pytest.raises(TpdneError, match=r"ran out: \d+ of 40 images"):
        list(Selection(50, wanted=1000)(judged))


@pytest.mark.parametrize("minimum", [-1, 100, float("nan")])
def test_what_is_no_percentile(minimum):
    with pytest.raises(SettingsError, match="not a percentile"):
        Selection(minimum, 1)


def test_candidates_count_on_from_the_last_seed():
    def first(seeds, n):
        return list(itertools.islice(candidates(seeds), n))

    assert first([5], 3) == [5, 6, 7]
    assert first([9, 2, 4], 9) == [9, 2, 4, 5, 6, 7, 8, 10, 11], "9 had its turn"
    assert first(["ann#1", "ann"], 4) == ["ann#1", "ann", "ann#2", "ann#3"]
    assert first(["ann", "bob"], 4) == ["ann", "bob", "bob#1", "bob#2"]
    assert first(["ann", "ann#1"], 4) == ["ann", "ann#1", "ann#2", "ann#3"], "as --seed ann --count 4 has it"
    assert first([2**32 - 2], 5) == [2**32 - 2, 2**32 - 1], "there are no more"
    assert first(range(3), 4) == [0, 1, 2, 3]


def test_classes_are_judged_as_such(tmp_path):
    model = models.load(write_pair(tmp_path, c_dim=3))
    critic = Critic.load(model)
    pixels = next(iter(sample(model, [1], class_index=2))).pixels[None]
    assert len({float(critic.score(pixels, c)[0]) for c in range(3)}) == 3
    assert critic.score(pixels) == critic.score(pixels, 0)


def test_an_image_is_judged_as_one_of_its_class(tmp_path):
    model = models.load(write_pair(tmp_path, c_dim=3))
    critic, sampler = Critic.load(model), Sampler(model, Settings(class_index=2))
    scores = critic.score(np.stack([made.pixels for made in sampler(range(20))]), 2)
    critic.quantiles = np.array(quantiles(scores))
    found = [made.recipe["realism"] for made in Judged(sampler, critic)(range(20))]
    assert found == [round(critic.percentile(score), 2) for score in scores]


def test_images_of_another_size(critic):
    with pytest.raises(SettingsError, match="judges images of 32x32x3, not of 16x16x3"):
        critic.score(np.zeros([1, 16, 16, 3], np.uint8))


def test_a_critic_that_is_not_there(tiny_model):
    with pytest.raises(SettingsError, match="tiny has no critic to judge its images"):
        Critic.load(models.load(tiny_model))


def test_a_critic_without_quantiles_says_how_to_get_them(model, critic):
    with pytest.raises(CheckpointError, match=r"python -m tpdne_cli\.training\.calibrate"):
        Judged(Sampler(model), critic)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [({"resolution": 16}, "its resolution is 16, the generator's 32"), ({"c_dim": 2}, "its c_dim is 2")],
    ids=str,
)
def test_another_models_critic(tmp_path, shape, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        Critic.load(models.load(write_pair(tmp_path, critic_shape=shape)))


@pytest.mark.parametrize(
    "values", [[1.0] * 100, [*range(100), 0.0], [float("nan")] * 101, "many", [[1]] * 101, ["x"] * 101, None], ids=str
)
def test_quantiles_that_are_none(tmp_path, values):
    generator = write_pair(tmp_path, meta={"quantiles": values})
    with pytest.raises(CheckpointError, match="quantiles are not 101 rising numbers"):
        Critic.load(models.load(generator))


@pytest.mark.parametrize("at", [{"half": [0.0] * 101}, {"1": [0.0] * 7}, [0.0], {"1": None}], ids=str)
def test_quantiles_at_other_truncations_that_are_none(tmp_path, at):
    generator = write_pair(tmp_path, meta={"quantiles": [0.0] * 101, "quantiles_at": at})
    with pytest.raises(CheckpointError, match="quantiles are not 101 rising numbers"):
        Critic.load(models.load(generator))


def test_damaged_critics(tmp_path):
    model = models.load(write_pair(tmp_path))
    critic = path_of(model)
    whole = critic.read_bytes()
    critic.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        Critic.load(model)
    critic.write_bytes(model.path.read_bytes())
    with pytest.raises(CheckpointError, match="not a critic"):
        Critic.load(model)
    critic.write_bytes(whole[:-4] + struct.pack("<f", float("nan")))
    with pytest.raises(CheckpointError, match="not numbers"):
        Critic.load(model)


def test_a_critic_lies_on_its_device_with_all_that_was_folded(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "choose", lambda _: META)
    critic = Critic.load(models.load(write_pair(tmp_path, c_dim=2)), "cuda")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda scores: torch.zeros(scores.shape))
    with Accelerator():
        assert critic.score(np.zeros((3, 32, 32, 3), np.uint8), 1).shape == (3,)


def test_a_label_mapping_without_layers():
    """NVIDIA's converted critics project on the embedding of the label itself."""
    network = Discriminator(DiscriminatorConfig(**SHAPE, c_dim=2, mapping_layers=0)).eval()
    image, c = torch.randn(3, 3, 32, 32), torch.eye(2)[[0, 1, 1]]
    embedded = network.mapping.embed(c)
    embedded = embedded / embedded.square().mean(1, keepdim=True).sqrt()
    logits = network.b4(*network._blocks(image, 8))
    torch.testing.assert_close(network(image, c), (logits * embedded).sum(1, keepdim=True) / 32**0.5)
    with pytest.raises(ValueError, match="between 1 and 64 layers"):
        Config(**SHAPE, mapping_layers=0)
