"""The other network's verdict: how real an image looks to the critic its generator learned from, and who may pass.

A critic is the discriminator of a training run, beside its generator as NAME-critic.safetensors. Its raw scores mean
nothing by themselves; the file's header holds their quantiles over the generator's own images, so that an image's
realism is a percentile: 30 says that it looks more real than 30 of 100 of its siblings.

Asked whether an image is a photograph, a critic answers by the traits that its generator had last learned to hide, and
hardly tells a broken face from a sound one. But it sees what it does not say: an image whose features lie far from
those that the generator's images usually have is mostly one that a person finds broken. So that distance is the score,
where calibration has stored what is usual (Typical), and else the critic's own answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tpdne_cli.errors import CheckpointError, SettingsError, TpdneError
from tpdne_cli.models import Model
from tpdne_cli.sampler import Pixels, Sample, Sampler
from tpdne_cli.seeds import MAX_SEED, Seed
from tpdne_cli.store import critic_path

if TYPE_CHECKING:
    import torch

Scores = np.ndarray[Any, np.dtype[np.float32]]
Quantiles = np.ndarray[Any, np.dtype[np.float64]]

PERCENTILES = 101  # quantiles in a critic's header, of 0, 1, ..., 100 %
PATIENCE = 1000  # images tried before a selection may give up
RIDGE = 1e-3  # share of the mean variance that is added to each, so that none is too small to divide by
HOPELESS = 50  # it does when fewer than one in so many of those that should pass do


def path_of(model: Model) -> Path:
    """Where a generator's critic lies, if it has one."""
    return critic_path(model.path)


@dataclass(frozen=True)
class Typical:
    """What images of a generator usually look like to its critic: a normal distribution of Discriminator.features.

    mean: [F]; whitening: [F, F], the inverse root of the covariance.
    """

    mean: torch.Tensor
    whitening: torch.Tensor

    @classmethod
    def of(cls, features: Scores) -> Typical:
        """Of the features [N, F] of a generator's images."""
        import torch

        values = features.astype(np.float64)
        covariance = np.cov(values.T)
        variances, axes = np.linalg.eigh(covariance)
        variances = variances.clip(0) + RIDGE * covariance.trace() / len(covariance) + np.finfo(np.float32).tiny
        whitening = (axes / np.sqrt(variances)) @ axes.T
        return cls(torch.from_numpy(values.mean(0)).float(), torch.from_numpy(whitening).float())

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Minus the distance from the mean in standard deviations (Mahalanobis 1936): [N, F] -> [N]."""
        from tpdne_cli.networks.ops import linear

        away = linear(features - self.mean.to(features.device), self.whitening.to(features.device))
        return -away.square().sum(1).sqrt()


@dataclass
class Critic:
    """A generator's critic, ready to use.

    quantiles: scores [101] at the model's own truncation, or None where the file knows none; at: the same at others.
    """

    path: Path
    network: Any  # [N, C, R, R] in [-1, 1] -> logits [N, 1]
    quantiles: Quantiles | None
    typical: Typical | None = None
    truncation: float = 1.0
    at: Mapping[float, Quantiles] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, model: Model, device: str = "cpu") -> Critic:
        """The critic beside a generator, on a device.

        Raises SettingsError where there is none, CheckpointError where its file is damaged or another model's.
        """
        from tpdne_cli import devices, models
        from tpdne_cli.checkpoints import safetensors
        from tpdne_cli.networks.ops import prepare

        path = path_of(model)
        if not path.is_file():
            raise SettingsError(f"{model.name} has no critic to judge its images: {path} is not there.")
        header = safetensors.read_header(path)
        if header.arch not in safetensors.CRITICS:
            raise CheckpointError(f"{path} holds a {header.arch!r} network, not a critic.")
        network = models.blueprint(header.arch, header.config, str(path))
        own, beside = safetensors.apart(header.shapes)
        models.check_shapes(network, own, str(path))
        _check_kinship(network.config, model, path)
        tensors, usual = safetensors.apart(safetensors.read_tensors(path))
        network = models.build(header.arch, header.config, tensors, str(path))
        # Trained on groups of images, it looks at their variety; alone, an image's score depends on itself only.
        network.get_submodule("b4").group = 1  # type: ignore[assignment]
        typical = _typical(usual, beside, network.config, path)
        quantiles, at = _quantiles(header.meta, path)
        network = prepare(network.to(devices.choose(device)))  # what was folded lies on the old device
        return cls(path, network, quantiles, typical, model.truncation, at)

    def score(self, pixels: Pixels, class_index: int | None = None) -> Scores:
        """Scores [N], higher for what looks more real, of uint8 [N, H, W, C].

        On a CPU an image's score is the same bits in any company. Raises SettingsError for another size of images.
        """
        import torch

        images = self._images(pixels)
        with torch.inference_mode():
            if self.typical is not None:
                scores = self.typical.scores(self.network.features(images))
            else:
                scores = self.network(images, self._classes(images, class_index))[:, 0]
            values: Scores = scores.float().cpu().numpy()
        return values

    def features(self, pixels: Pixels) -> Scores:
        """What it sees in uint8 [N, H, W, C], [N, F]: see Typical. Raises SettingsError for another size of images."""
        import torch

        with torch.inference_mode():
            values: Scores = self.network.features(self._images(pixels)).cpu().numpy()
        return values

    def _images(self, pixels: Pixels) -> torch.Tensor:  # [N, C, R, R] in [-1, 1], on its device
        import torch

        config = self.network.config
        size = (config.resolution, config.resolution, config.img_channels)
        if pixels.ndim != 4 or pixels.shape[1:] != size:
            shape = "x".join(map(str, pixels.shape[1:]))
            raise SettingsError(f"{self.path.name} judges images of {'x'.join(map(str, size))}, not of {shape}.")
        device = next(self.network.parameters()).device
        return torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _classes(self, images: torch.Tensor, class_index: int | None) -> torch.Tensor | None:
        import torch

        if not self.network.config.c_dim:
            return None
        c = torch.zeros(len(images), self.network.config.c_dim, device=images.device)
        c[:, class_index or 0] = 1
        return c

    def percentile(self, score: float, truncation: float | None = None) -> float:
        """Of 100 images of this generator at that truncation (None: its own), how many score less.

        Raises CheckpointError where the file holds no quantiles.
        """
        return float(np.interp(score, self.quantiles_of(truncation), np.linspace(0, 100, PERCENTILES)))

    def quantiles_of(self, truncation: float | None = None) -> Quantiles:
        """Scores [101] of images at that truncation, between two known ones in between. Raises as percentile does."""
        if self.quantiles is None:
            raise CheckpointError(
                f"{self.path} does not know the scores of its generator's images: "
                "python -m tpdne_cli.training.calibrate finds them out."
            )
        curves = sorted({**self.at, self.truncation: self.quantiles}.items())
        psi = self.truncation if truncation is None else truncation
        known = [at for at, _ in curves]
        columns = zip(*(values for _, values in curves), strict=True)
        return np.array([np.interp(psi, known, values) for values in columns])


def _check_kinship(config: Any, model: Model, path: Path) -> None:
    for name in ("resolution", "img_channels", "c_dim"):
        if getattr(config, name) != getattr(model.config, name):
            raise CheckpointError(
                f"{path} is not the critic of {model.name}: "
                f"its {name} is {getattr(config, name)}, the generator's {getattr(model.config, name)}."
            )


def _typical(tensors: dict[str, Any], shapes: dict[str, Any], config: Any, path: Path) -> Typical | None:
    import torch

    if not tensors:
        return None
    size = config.features
    good = shapes == {"mean": (size,), "whitening": (size, size)}
    if not good or not all(np.isfinite(values).all() for values in tensors.values()):
        raise CheckpointError(f"{path} is damaged: what it says of typical images does not fit its {size} features.")
    return Typical(**{name: torch.from_numpy(values.astype(np.float32)) for name, values in tensors.items()})


def _quantiles(meta: dict[str, Any], path: Path) -> tuple[Quantiles | None, dict[float, Quantiles]]:
    """Those of the model's own truncation, and of others."""
    if "quantiles" not in meta:
        return None, {}
    others = meta.get("quantiles_at", {})
    try:
        at = {float(psi): _rising(values) for psi, values in others.items()}
        return _rising(meta["quantiles"]), at
    except (AttributeError, TypeError, ValueError):
        raise CheckpointError(f"{path} is damaged: its quantiles are not {PERCENTILES} rising numbers.") from None


def _rising(values: Any) -> Quantiles:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (PERCENTILES,) or not np.isfinite(numbers).all() or (np.diff(numbers) < 0).any():
        raise ValueError(values)
    return numbers


def quantiles(scores: Iterable[float]) -> list[float]:
    """What a critic's header holds: the scores at 0, 1, ..., 100 % of those given."""
    values = np.quantile(np.fromiter(scores, np.float64), np.linspace(0, 1, PERCENTILES))
    return [float(f"{value:.6g}") for value in values]


def candidates(seeds: Sequence[Seed]) -> Iterator[Seed]:
    """The seeds, and then for as long as wanted those that follow the last one, as seeds.successors counts on.

    None comes twice that was not given twice.
    """
    first, last, number = seeds[0], seeds[-1], len(seeds)
    further: Iterable[Seed]
    if isinstance(last, int):
        further = range(last + 1, MAX_SEED + 1)
    else:
        text, k = (first, number) if last == f"{first}#{number - 1}" else (last, 1)
        further = (f"{text}#{i}" for i in count(k))
    given = seeds if isinstance(seeds, range) else set(seeds)
    return chain(seeds, (seed for seed in further if seed not in given))


class Judged:
    """A sampler whose images come with their percentile as 'realism' in the recipe; else it behaves as that sampler.

    It judges where it draws, on the sampler's device or in its process, so several of them share both kinds of work.
    Raises CheckpointError for a critic without quantiles.
    """

    def __init__(self, sampler: Sampler, critic: Critic) -> None:
        self.quantiles = critic.quantiles_of(sampler.settings.truncation)
        self.sampler, self.critic = sampler, critic
        self.batch_size, self.recipe = sampler.batch_size, sampler.recipe

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[Sample]:
        """One Sample per seed, in order. Raises what a Sampler raises."""
        samples = self.sampler(seeds)
        while batch := list(islice(samples, self.sampler.batch_size)):
            pixels = np.stack([sample.pixels for sample in batch])
            scores = self.critic.score(pixels, self.sampler.settings.class_index)
            percentiles = np.interp(scores, self.quantiles, np.linspace(0, 100, PERCENTILES))
            for sample, percentile in zip(batch, percentiles.tolist(), strict=True):
                yield dataclasses.replace(sample, recipe=sample.recipe | {"realism": round(percentile, 2)})


class Selection:
    """The rule that keeps or drops: images above the `minimum`-th percentile pass, until `wanted` have.

    tried and kept count the images up to the last that was handed out. Raises SettingsError for a minimum that is no
    percentile.
    """

    def __init__(self, minimum: float, wanted: int) -> None:
        if not 0 <= minimum < 100:
            raise SettingsError(f"The realism {minimum:g} is not a percentile from 0 to less than 100.")
        self.minimum, self.wanted = minimum, wanted
        self.tried = self.kept = 0

    def __call__(self, judged: Iterable[Sample]) -> Iterator[Sample]:
        """Those of a Judged sampler's images that pass, in order.

        Raises TpdneError where next to nothing passes, or the images end before enough have.
        """
        images = iter(judged)
        while self.kept < self.wanted:
            sample = next(images, None)
            if sample is None:
                raise TpdneError(f"The seeds ran out: {self._account()}.")
            self.tried += 1
            if sample.recipe["realism"] > self.minimum:
                self.kept += 1
                yield sample
            self._check_hope()

    def _check_hope(self) -> None:
        expected = self.tried * (1 - self.minimum / 100)
        # Ten that should have passed and did not may be bad luck at a high percentile.
        if self.tried >= PATIENCE and self.kept < (expected - 10) / HOPELESS:
            raise TpdneError(f"Next to nothing passes: {self._account()}; ask for less realism, or truncate more.")

    def _account(self) -> str:
        return f"{self.kept} of {self.tried} images were above the {self.minimum:g}th percentile of realism"
