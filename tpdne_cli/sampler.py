"""seeds -> batches -> pixels: the generator on its device, in the precision and batch size that suit it.

On a CPU in float32 a seed's pixels are the same bits in every batch (the networks see to that). Elsewhere all batches
have one shape, the last one padded, so that the device always runs the same kernels.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tpdne_cli import __version__, directions
from tpdne_cli.errors import DeviceError, SettingsError
from tpdne_cli.models import MAX_TRUNCATION, Model
from tpdne_cli.seeds import Seed, latents, parse_seeds, random_state

if TYPE_CHECKING:
    import torch

MAX_MOVE = 1e6  # degrees, image widths: far beyond all use
NOISE_MODES = ("const", "random", "none")
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What, beside model and seed, decides what an image shows.

    truncation: psi, 1 as trained, 0 the average face; None: the model's own choice. truncation_cutoff: number of
    style layers it applies to; None: the model's own choice, mostly all. noise: 'const' (the model's own), 'random'
    (drawn from the seed) or 'none'. class_index: for conditional models; None: class 0. rotate (degrees) and translate
    (x, y in image widths): of the whole scene, for StyleGAN3, which continues beyond the frame. attributes: (name,
    amount) of each step along one of the model's named directions, taken after truncation.
    """

    truncation: float | None = None
    truncation_cutoff: int | None = None
    noise: str = "const"
    class_index: int | None = None
    rotate: float = 0.0
    translate: tuple[float, float] = (0.0, 0.0)
    attributes: directions.Attributes = ()

    @property
    def is_moved(self) -> bool:
        return self.rotate != 0 or tuple(self.translate) != (0, 0)

    def recipe(self) -> dict[str, Any]:
        """These settings as plain values; place in the frame and attributes only where they are not the usual ones."""
        values = dataclasses.asdict(self)
        unusual = {"rotate": self.rotate, "translate": list(self.translate)} if self.is_moved else {}
        if self.attributes:
            unusual["attributes"] = dict(self.attributes)
        return {k: v for k, v in values.items() if k not in ("rotate", "translate", "attributes")} | unusual

    def check(self, model: Model) -> Settings:
        """These settings with the model's own choices filled in. Raises SettingsError for what it does not have."""
        psi = model.truncation if self.truncation is None else self.truncation
        if not abs(psi) <= MAX_TRUNCATION:
            raise SettingsError(
                f"The truncation {psi} is not a number that is possible: 0 gives the average image, 1 the full variety."
            )
        num_ws = model.generator.num_ws
        cutoff = self.truncation_cutoff
        if cutoff is None and model.truncation_cutoff is not None:
            cutoff = min(model.truncation_cutoff, num_ws)  # that of a large model may stand in a small one's file
        if cutoff is not None and not 0 <= cutoff <= num_ws:
            raise SettingsError(f"The truncation cutoff {cutoff} is outside 0..{num_ws}, {model.name}'s layers.")
        if self.noise not in NOISE_MODES:
            raise SettingsError(f"The noise mode {self.noise!r} is none of {', '.join(NOISE_MODES)}.")
        if not all(abs(value) <= MAX_MOVE for value in (self.rotate, *self.translate)):
            raise SettingsError("The rotation or translation is not possible: give degrees, and image widths.")
        if self.is_moved and model.arch != "stylegan3":
            raise SettingsError(
                f"{model.name} cannot be rotated or translated: only StyleGAN3 goes on beyond its frame."
            )
        chosen = directions.check(self.attributes, model.directions, model.name)
        psi = float(psi) + 0.0  # -0.0 gives the same image, and is to have the same recipe
        return dataclasses.replace(
            self, truncation=psi, truncation_cutoff=cutoff, class_index=self._class(model), attributes=chosen
        )

    def _class(self, model: Model) -> int | None:
        classes = model.config.c_dim
        if not classes:
            if self.class_index is not None:
                raise SettingsError(f"{model.name} has no classes: leave the class out.")
            return None
        index = self.class_index or 0
        if not 0 <= index < classes:
            raise SettingsError(f"The class {index} is outside 0..{classes - 1}, {model.name}'s classes.")
        return index


@dataclass(frozen=True)
class Sample:
    """One image: pixels uint8 [H, W, C] with C 3 or 1, and the recipe that makes it again."""

    seed: Seed
    pixels: Pixels
    recipe: dict[str, Any]
    seconds: float  # of the network, its share of the batch

    def save(self, path: str | os.PathLike[str], quality: int | None = None) -> None:
        """Write a PNG, JPEG or WebP file (its suffix says which) that carries the recipe, whole or not at all.

        Raises OutputError where it cannot be written, ImageError for another suffix.
        """
        from tpdne_cli import images

        images.write_atomic(path, images.encode(self.pixels, _format(path), quality, self.recipe))


class Sampler:
    """Turns seeds into images with one model, on one device.

    Raises DeviceError for a device or precision that is not there, SettingsError for settings the model does not have.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings | None = None,
        device: str = "auto",
        precision: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        from tpdne_cli import devices

        self.model = model
        self.settings = (settings or Settings()).check(model)
        self.device = devices.choose(device)
        self.precision = devices.choose_precision(precision, self.device)
        if batch_size is not None and batch_size < 1:
            raise SettingsError(f"The batch size {batch_size} is not a positive number.")
        self.batch_size = batch_size or devices.batch_size(self.device, model.resolution)
        self.generator = devices.place(model.generator, self.device, self.precision)
        self.step = directions.step(model.directions, self.settings.attributes)
        if self.settings.is_moved:
            self._move()

    def _move(self) -> None:
        """Turn and shift the scene; in a copy, since the network belongs to all who loaded it."""
        import copy

        from tpdne_cli.networks.stylegan3 import inverse_transform

        self.generator = copy.deepcopy(self.generator)
        matrix = inverse_transform(self.settings.rotate, *self.settings.translate)
        self.generator.synthesis.input.transform.copy_(matrix.to(self.device))

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[Sample]:
        """One Sample per seed, in order. Raises DeviceError where even one image does not fit in memory."""
        return self.in_batches(parse_seeds(seeds), self._run)

    def in_batches(self, items: Iterable[T], run: Callable[[list[T]], list[Sample]]) -> Iterator[Sample]:
        """What `run` makes of the items, batch after batch. Raises DeviceError as calling does.

        Seeds are one kind of items; frames of a walk or mixed styles (interpolation.py, styles.py) are others.
        """
        pending = iter(items)
        while batch := list(islice(pending, self.batch_size)):
            yield from self._retreating(batch, run)

    def _retreating(self, batch: list[T], run: Callable[[list[T]], list[Sample]]) -> Iterator[Sample]:
        """A batch, in halves where memory runs out; the smaller size is kept."""
        from tpdne_cli import devices

        while batch:
            part = batch[: self.batch_size]
            try:
                samples = run(part)
            except Exception as error:
                if not devices.is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise DeviceError(
                        f"There is not enough memory for one image of {self.model.name} on {self.device}."
                    ) from None
                self.batch_size = (self.batch_size + 1) // 2
                devices.release_memory(self.device)
                continue
            yield from samples
            batch = batch[len(part) :]

    def _run(self, seeds: list[Seed]) -> list[Sample]:
        pixels, seconds = self.render(seeds, self.map, lambda seeds: SeededNoise(seeds, self.device))
        return [Sample(s, p, self.recipe(s), seconds) for s, p in zip(seeds, pixels, strict=True)]

    def render(
        self, batch: list[T], map: Callable[[list[T]], torch.Tensor], draw: Callable[[list[T]], Any]
    ) -> tuple[Pixels, float]:
        """One batch of any items: pixels uint8 [N, H, W, C], and the seconds that each took.

        `map` gives the items' ws, `draw` their noise where it is random. The settings' attributes come on top.
        """
        import torch

        start = time.perf_counter()
        padded = self.padded(batch)
        with torch.inference_mode():
            noise = draw(padded) if self.settings.noise == "random" else self.settings.noise
            ws = map(padded)
            if self.step is not None:
                ws = ws + torch.from_numpy(self.step).to(ws.device)
            images = self.generator.synthesis(ws, noise)
            if self.precision != torch.float32 and not images.isfinite().all():
                raise DeviceError(f"{self.device} gives no numbers in {self.precision_name}: use --precision float32.")
            pixels = to_uint8(images)[: len(batch)].cpu().numpy()
        return pixels, (time.perf_counter() - start) / len(batch)

    def padded(self, batch: list[T]) -> list[T]:
        """The batch in the one shape that the device always runs; on a CPU as it is."""
        size = len(batch) if self.device.type == "cpu" else self.batch_size
        return batch + batch[-1:] * (size - len(batch))

    def map(self, seeds: list[Seed]) -> torch.Tensor:
        """ws [N, num_ws, w_dim] for seeds, truncated."""
        return self.map_latents(latents(seeds, self.model.config.z_dim))

    def map_latents(self, z: np.ndarray[Any, np.dtype[np.float64]]) -> torch.Tensor:
        """ws [N, num_ws, w_dim] for z [N, z_dim], truncated."""
        import torch

        z_on_device = torch.from_numpy(z.astype(np.float32)).to(self.device)
        c = None
        if self.settings.class_index is not None:
            c = torch.zeros(len(z), self.model.config.c_dim, device=self.device)
            c[:, self.settings.class_index] = 1
        psi, cutoff = self.settings.truncation, self.settings.truncation_cutoff
        ws: torch.Tensor = self.generator.mapping(z_on_device, c, psi, cutoff)
        return ws

    @property
    def precision_name(self) -> str:
        return str(self.precision).removeprefix("torch.")

    def recipe(self, seed: Seed) -> dict[str, Any]:
        """All that names this image: model, weights, seed, settings, version."""
        return {
            "model": self.model.name,
            "weights": self.model.sha256,
            "seed": seed,
            **self.settings.recipe(),
            "precision": self.precision_name,
            "device": self.device.type,
            "version": __version__,
        }


def sample(
    model: Model,
    seeds: Iterable[Seed],
    truncation: float | None = None,
    *,
    truncation_cutoff: int | None = None,
    noise: str = "const",
    class_index: int | None = None,
    attributes: Mapping[str, float] | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
) -> Iterator[Sample]:
    """One Sample per seed (integers, or text), in order, made as they are asked for.

    Arguments are those of Settings and Sampler, and so are the errors.
    """
    settings = Settings(truncation, truncation_cutoff, noise, class_index, attributes=tuple((attributes or {}).items()))
    return Sampler(model, settings, device, precision, batch_size)(seeds)


class SeededNoise:
    """Noise that belongs to the seed: each image draws its layers' noise, in layer order, from a stream of its own."""

    def __init__(self, seeds: list[Seed], device: torch.device) -> None:
        self.streams = [random_state(seed, "noise") for seed in seeds]
        self.device = device

    def __call__(self, height: int, width: int) -> torch.Tensor:
        """[N, 1, height, width]"""
        import torch

        noise = np.stack([stream.randn(1, height, width).astype(np.float32) for stream in self.streams])
        return torch.from_numpy(noise).to(self.device)


def _format(path: str | os.PathLike[str]) -> str:
    from tpdne_cli.errors import ImageError
    from tpdne_cli.images import format_for

    format = format_for(path)
    if format is None:
        raise ImageError(f"{os.fspath(path)} does not end with .png, .jpg or .webp: its name says how to write it.")
    return format


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C], as the published tools round."""
    import torch

    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
