"""Style layers of several images in one (1812.04948, section 3.1), and neighbours of an image.

An image is steered by one w per layer: the first ones decide pose, shape and hair, the last ones colour and light.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tpdne_cli.errors import SettingsError
from tpdne_cli.interpolation import Path, Walker
from tpdne_cli.models import Model
from tpdne_cli.sampler import Pixels, Sample, Sampler, SeededNoise, Settings
from tpdne_cli.seeds import Seed, parse_seed, parse_seeds, random_state

if TYPE_CHECKING:
    import torch

NAMED = {"coarse": (0, 4), "middle": (4, 8), "fine": (8, None)}  # of the paper: 4x4 to 8x8, 16x16 to 32x32, the rest
STRENGTH = 0.3


def parse_styles(text: str, num_ws: int, model: str = "The model") -> list[int]:
    """'coarse', 'middle', 'fine', '0-6', '5' or several with commas -> layers, in order.

    Raises SettingsError for anything else, and for layers that a model of `num_ws` layers does not have.
    """
    layers: set[int] = set()
    for part in text.split(","):
        name = part.strip().lower()
        match = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", name, re.ASCII)
        if name in NAMED:
            first, end = NAMED[name]
            chosen = range(num_ws)[first:end]
        elif match is not None:
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise SettingsError(f"The layers {name} run backwards: write {last}-{first}.")
            chosen = range(first, last + 1)
        else:
            raise SettingsError(f"{part.strip()!r} names no style layers: write coarse, middle, fine, or 0-6.")
        if not chosen or chosen[-1] >= num_ws:
            raise SettingsError(f"{model} has no style layers {name}: its {num_ws} are 0 to {num_ws - 1}.")
        layers.update(chosen)
    return sorted(layers)


@dataclass(frozen=True)
class Mixture:
    """An image with the given style layers of one seed, `row`, and the remaining ones of another, `column`."""

    row: Seed
    column: Seed

    @property
    def seed(self) -> Seed:
        """Whose noise it has, and its Sample's seed."""
        return self.row


@dataclass(frozen=True)
class Neighbour:
    """The index-th image (1, 2, ...) in the neighbourhood of a seed; index 0 is the seed's own."""

    seed: Seed
    index: int


class Mixer:
    """Makes mixtures: `styles` names the layers that rows give. Raises SettingsError for layers that are not there."""

    def __init__(self, sampler: Sampler, styles: str = "coarse") -> None:
        self.sampler, self.styles = sampler, styles
        self.layers = parse_styles(styles, sampler.generator.num_ws, sampler.model.name)

    def __call__(self, mixtures: Iterable[Mixture]) -> Iterator[Sample]:
        """One Sample per mixture, in order; its seed is the row's."""
        return _samples(self.sampler, mixtures, self._map, self.recipe)

    def recipe(self, mixture: Mixture) -> dict[str, Any]:
        latent = {"kind": "mix", "styles": self.styles}
        return {**self.sampler.recipe(mixture.row), "seed": [mixture.row, mixture.column], "latent": latent}

    def _map(self, batch: list[Mixture]) -> torch.Tensor:
        ws = self.sampler.map([mixture.column for mixture in batch]).clone()
        ws[:, self.layers] = self.sampler.map([mixture.row for mixture in batch])[:, self.layers]
        return ws


class Varier:
    """Makes neighbours: a step in W of `strength` times what tells another image, drawn for each, from the average.

    Their average is the seed's own image. Within a class it is what tells two images from each other, over sqrt(2):
    the model's average lies between the classes. fine: keep the w and take the other's fine layers (8 on) as they are.
    Raises SettingsError for a strength that is not one, and for `fine` where the model has no such layers.
    """

    def __init__(self, sampler: Sampler, strength: float = STRENGTH, fine: bool = False) -> None:
        if not 0 <= strength <= 10:
            raise SettingsError(f"The strength {strength} is outside 0..10: 0.1 is hardly visible, 1 another image.")
        self.sampler, self.strength, self.fine = sampler, float(strength), fine
        num_ws = sampler.generator.num_ws
        self.layers = parse_styles("fine", num_ws, sampler.model.name) if fine else list(range(num_ws))

    def __call__(self, neighbours: Iterable[Neighbour]) -> Iterator[Sample]:
        """One Sample per neighbour, in order."""
        return _samples(self.sampler, neighbours, self._map, self.recipe)

    def recipe(self, neighbour: Neighbour) -> dict[str, Any]:
        how = {"styles": "fine"} if self.fine else {"strength": self.strength}
        return {
            **self.sampler.recipe(neighbour.seed),
            "latent": {"kind": "neighbour", "index": neighbour.index, **how},
        }

    def _map(self, batch: list[Neighbour]) -> torch.Tensor:
        ws = self.sampler.map([neighbour.seed for neighbour in batch]).clone()
        z_dim = self.sampler.model.config.z_dim
        drawn = np.stack([random_state(n.seed, f"neighbour {n.index}").randn(2, z_dim) for n in batch])
        others = self.sampler.map_latents(drawn[:, 0])
        if self.sampler.settings.class_index is None:
            steps = others - self.sampler.generator.mapping.w_avg
        else:
            steps = (others - self.sampler.map_latents(drawn[:, 1])) / math.sqrt(2)
        for row, neighbour in enumerate(batch):
            if neighbour.index and self.fine:
                ws[row, self.layers] = others[row, self.layers]
            elif neighbour.index:
                ws[row] += self.strength * steps[row]
        return ws


T = TypeVar("T", Mixture, Neighbour)


def _samples(
    sampler: Sampler, items: Iterable[T], map: Callable[[list[T]], torch.Tensor], recipe: Callable[[T], dict[str, Any]]
) -> Iterator[Sample]:
    def draw(batch: list[T]) -> SeededNoise:
        return SeededNoise([item.seed for item in batch], sampler.device)

    def run(batch: list[T]) -> list[Sample]:
        pixels, seconds = sampler.render(batch, map, draw)
        return [Sample(item.seed, p, recipe(item), seconds) for item, p in zip(batch, pixels, strict=True)]

    return sampler.in_batches(items, run)


def mix(
    model: Model,
    rows: Iterable[Seed],
    columns: Iterable[Seed],
    styles: str = "coarse",
    *,
    truncation: float | None = None,
    truncation_cutoff: int | None = None,
    noise: str = "const",
    class_index: int | None = None,
    attributes: Mapping[str, float] | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
) -> Iterator[Sample]:
    """Every row's seed with every column's, row by row: the layers `styles` ('coarse', '0-6') are the row's.

    Further arguments are those of Settings and Sampler, and so are the errors.
    """
    settings = Settings(truncation, truncation_cutoff, noise, class_index, attributes=tuple((attributes or {}).items()))
    mixer = Mixer(Sampler(model, settings, device, precision, batch_size), styles)
    down, across = parse_seeds(rows), list(parse_seeds(columns))
    return mixer(Mixture(row, column) for row in down for column in across)


def vary(
    model: Model,
    seed: Seed,
    count: int,
    strength: float = STRENGTH,
    *,
    fine: bool = False,
    truncation: float | None = None,
    truncation_cutoff: int | None = None,
    noise: str = "const",
    class_index: int | None = None,
    attributes: Mapping[str, float] | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
) -> Iterator[Sample]:
    """`count` neighbours of a seed's image, the same ones whatever the count: see Varier.

    Further arguments are those of Settings and Sampler, and so are the errors.
    """
    settings = Settings(truncation, truncation_cutoff, noise, class_index, attributes=tuple((attributes or {}).items()))
    varier = Varier(Sampler(model, settings, device, precision, batch_size), strength, fine)
    parsed = parse_seed(seed)
    return varier(Neighbour(parsed, index) for index in range(1, count + 1))


def remade(sampler: Sampler, recipe: Mapping[str, Any]) -> Pixels:
    """The image of a recipe that has a "latent": a frame of a walk, a mixture or a neighbour; uint8 [H, W, C].

    The sampler must have the recipe's model and settings. A recipe comes out of a file that anybody can write: what it
    says is checked. Raises SettingsError or SeedError for what names no image.
    """
    try:
        latent, seed = dict(recipe["latent"]), recipe["seed"]
        kind = latent.pop("kind")
        if kind == "walk":
            frame = int(latent.pop("frame", 0))  # an animation is known by its first frame
            samples = Walker(sampler, Path(tuple(seed), **latent))([frame])
        elif kind == "mix":
            row, column = map(parse_seed, seed)
            samples = Mixer(sampler, **latent)([Mixture(row, column)])
        elif kind == "neighbour":
            index = int(latent.pop("index"))
            how = {"fine": True} if latent.pop("styles", None) == "fine" else {}
            samples = Varier(sampler, **latent, **how)([Neighbour(parse_seed(seed), index)])
        else:
            raise SettingsError(f"A {kind!r} is not made from a single latent: tpdne makes only single images again.")
        return next(iter(samples)).pixels
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise SettingsError(f"The recipe describes no image that tpdne knows ({error!r}).") from None
