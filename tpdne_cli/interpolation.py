"""Walks through latent space: a path that visits the keys, and the images along it.

Where a frame lies is a pure function of the keys, the path's settings and the frame's number. At a key every kind of
path has the key's own latent bit for bit, so that its frame is the image that the seed alone gives.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tpdne_cli.errors import SeedError, SettingsError
from tpdne_cli.models import Model
from tpdne_cli.sampler import Sample, Sampler, Settings
from tpdne_cli.seeds import Seed, latents, parse_seeds, random_state

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[np.float64]]
Curve = Callable[[int, float], Array]  # (leg, t in [0, 1)) -> a point; leg i leads from key i to key i + 1

SPACES = ("w", "z")
FRAMES_PER_LEG = 60
REACH = 28  # a key moves a spline's slope n keys on by 0.268**n: beyond this, by less than float64 can tell

EASINGS: Mapping[str, Callable[[float], float]] = {
    "none": lambda t: t,
    "in": lambda t: t * t,
    "out": lambda t: t * (2 - t),
    "in-out": lambda t: t * t * (3 - 2 * t),
}


@dataclass(frozen=True)
class Path:
    """A walk from key to key.

    frames: in all, spread evenly over the legs (None: 60 a leg); every key has a frame, the first key frame 0, the
    last one frame `frames - 1`; in a loop the frame after the last is frame 0 again.
    method: 'spline' (a smooth curve), 'linear' or 'slerp' (along great circles of Z's sphere).
    space: 'w' or 'z' (None: z for slerp, else w). easing: how it leaves and reaches each key: 'none' (evenly), 'in',
    'out' or 'in-out'.

    Raises SeedError for fewer than two keys and for a key that follows itself, SettingsError for the rest.
    """

    seeds: tuple[Seed, ...]
    frames: int | None = None
    loop: bool = False
    method: str = "spline"
    space: str | None = None
    easing: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(parse_seeds(self.seeds)))
        self._check_seeds()
        for value, known, what in (
            (self.method, METHODS, "method"),
            (self.easing, EASINGS, "easing"),
            (self.space or "w", SPACES, "space"),
        ):
            if value not in known:
                raise SettingsError(f"{value!r} is not a {what} of a walk: choose one of {', '.join(known)}.")
        if self.method == "slerp" and self.space == "w":
            raise SettingsError("slerp follows the sphere of Z, and W has none: use the space z, or a spline in w.")
        object.__setattr__(self, "space", self.space or ("z" if self.method == "slerp" else "w"))
        keys = len(self.seeds)
        frames = self.legs * FRAMES_PER_LEG + (not self.loop) if self.frames is None else self.frames
        if frames < keys:
            raise SettingsError(f"A walk of {frames} frames cannot visit {keys} keys: ask for {keys} frames or more.")
        object.__setattr__(self, "frames", frames)

    def _check_seeds(self) -> None:
        keys = self.seeds
        if len(keys) < 2:
            what = f"from {keys[0]} alone leads nowhere" if keys else "needs keys"
            raise SeedError(f"A walk {what}: give at least two seeds.")
        for a, b in pairwise(keys):
            if a == b:
                raise SeedError(f"The walk goes from {a} to {a} itself: leave one of the two out.")
        if self.loop and keys[0] == keys[-1]:
            raise SeedError(f"The loop ends on {keys[0]}, where it begins: leave the last seed out, a loop returns.")

    @property
    def legs(self) -> int:
        return len(self.seeds) - (not self.loop)

    @cached_property
    def key_frames(self) -> list[int]:
        """The frame of each key."""
        assert self.frames is not None
        span, legs = self.frames - (not self.loop), self.legs
        return [(2 * leg * span + legs) // (2 * legs) for leg in range(len(self.seeds))]

    def place(self, frame: int) -> tuple[int, float]:
        """(leg, t) of a frame: how far, from 0 up to but not including 1, it lies on the way to the leg's end."""
        assert self.frames is not None
        if not 0 <= frame < self.frames:
            raise SettingsError(f"The walk has no frame {frame}: its frames are 0 to {self.frames - 1}.")
        leg = bisect_right(self.key_frames, frame) - 1
        start, end = [*self.key_frames, self.frames][leg : leg + 2]
        return leg, EASINGS[self.easing]((frame - start) / (end - start))

    def describe(self, frame: int | None = None) -> dict[str, Any]:
        """What a recipe says of the walk, or of one frame of it; `remade` reads it."""
        said = {key: value for key, value in dataclasses.asdict(self).items() if key != "seeds"}
        return {"kind": "walk", **said, **({} if frame is None else {"frame": frame})}


def linear(keys: Array, loop: bool) -> Curve:  # noqa: ARG001 (a leg does not mind where the path ends)
    """Straight lines. keys: [K, ...]"""
    return lambda leg, t: (1 - t) * keys[leg] + t * keys[(leg + 1) % len(keys)]


def slerp(keys: Array, loop: bool) -> Curve:
    """Great circles, the radius changing evenly from one key's to the next one's (Shoemake 1985). keys: [K, z_dim]

    Straight lines where there is no one great circle.
    """
    straight = linear(keys, loop)

    def point(leg: int, t: float) -> Array:
        a, b = keys[leg], keys[(leg + 1) % len(keys)]
        radius_a, radius_b = math.sqrt(float((a * a).sum())), math.sqrt(float((b * b).sum()))
        angle = math.acos(min(max(float((a * b).sum()) / (radius_a * radius_b), -1.0), 1.0))
        if math.sin(angle) < 1e-6:  # one direction (a path's last key may be its first), or opposite ones
            return straight(leg, t)
        radius = (1 - t) * radius_a + t * radius_b
        share_a, share_b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
        mixed: Array = share_a * (radius / radius_a) * a + share_b * (radius / radius_b) * b
        return mixed

    return point


def spline(keys: Array, loop: bool) -> Curve:
    """The cubic spline: position, direction and speed are continuous; closed in a loop, else straight at its ends.

    keys: [K, ...]. It is written with the keys and the slopes there (Hermite), which makes it exact at the keys.
    """
    if loop:
        around = np.arange(-REACH, len(keys) + REACH) % len(keys)
        slope = slopes(keys[around])[REACH:-REACH]
    else:
        slope = slopes(keys)

    def point(leg: int, t: float) -> Array:
        end, s = (leg + 1) % len(keys), 1 - t
        ends: Array = s * s * (1 + 2 * t) * keys[leg] + t * t * (3 - 2 * t) * keys[end]
        ends += s * s * t * slope[leg] - t * t * s * slope[end]
        return ends

    return point


def slopes(keys: Array) -> Array:
    """First derivatives of the natural cubic spline at its keys, one apart; [K, ...] -> [K, ...].

    Tridiagonal elimination in elementwise steps: a linear algebra library may round as its number of threads pleases.
    """
    right: Array = np.empty_like(keys)
    right[0], right[-1] = 3 * (keys[1] - keys[0]), 3 * (keys[-1] - keys[-2])
    right[1:-1] = 3 * (keys[2:] - keys[:-2])
    pivots = [2.0]
    for i in range(1, len(keys)):
        pivots.append((4.0 if i < len(keys) - 1 else 2.0) - 1 / pivots[-1])
        right[i] -= right[i - 1] / pivots[i - 1]
    right[-1] /= pivots[-1]
    for i in range(len(keys) - 2, -1, -1):
        right[i] = (right[i] - right[i + 1]) / pivots[i]
    return right


METHODS: Mapping[str, Callable[[Array, bool], Curve]] = {"spline": spline, "linear": linear, "slerp": slerp}


class Walker:
    """Makes the images along a path.

    With random noise, that of each key changes into that of the next one as it would rotate, so that its strength
    stays the same; in a loop it returns.
    """

    def __init__(self, sampler: Sampler, path: Path) -> None:
        self.sampler, self.path = sampler, path
        if path.space == "z":
            keys = latents(path.seeds, sampler.model.config.z_dim)
        else:
            keys = mapped(sampler, path.seeds).astype(np.float64)
        self.curve = METHODS[path.method](keys, path.loop)

    def __call__(self, frames: Iterable[int] | None = None) -> Iterator[Sample]:
        """One Sample per frame (None: per frame of the whole path), in order, made as they are asked for.

        Its seed is the key where the frame is, or that it has left last.
        """
        assert self.path.frames is not None
        return self.sampler.in_batches(range(self.path.frames) if frames is None else frames, self._run)

    def recipe(self, frame: int | None = None) -> dict[str, Any]:
        """All that names a frame, or (None) the whole walk."""
        seeds = list(self.path.seeds)
        return {**self.sampler.recipe(seeds[0]), "seed": seeds, "latent": self.path.describe(frame)}

    def _run(self, batch: list[int]) -> list[Sample]:
        pixels, seconds = self.sampler.render(batch, self._map, self._draw)
        seeds = [self.path.seeds[self.path.place(frame)[0]] for frame in batch]
        return [Sample(s, p, self.recipe(k), seconds) for s, p, k in zip(seeds, pixels, batch, strict=True)]

    def _map(self, batch: list[int]) -> torch.Tensor:
        import torch

        points = np.stack([self.curve(*self.path.place(frame)) for frame in batch])
        if self.path.space == "z":
            return self.sampler.map_latents(points)
        return torch.from_numpy(points.astype(np.float32)).to(self.sampler.device)

    def _draw(self, batch: list[int]) -> DriftingNoise:
        seeds, places = self.path.seeds, [self.path.place(frame) for frame in batch]
        return DriftingNoise([(seeds[i], seeds[(i + 1) % len(seeds)], t) for i, t in places], self.sampler.device)


def mapped(sampler: Sampler, seeds: Sequence[Seed]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """ws [N, num_ws, w_dim] of any number of seeds, each as the sampler has it when it makes the seed's own image."""
    import torch

    parts = []
    with torch.inference_mode():
        for first in range(0, len(seeds), sampler.batch_size):
            batch = list(seeds[first : first + sampler.batch_size])
            parts.append(sampler.map(sampler.padded(batch))[: len(batch)].cpu().numpy())
    return np.concatenate(parts)


class DriftingNoise:
    """Noise between that of two seeds: cos(t pi/2) of the one's and sin(t pi/2) of the other's, of equal strength."""

    def __init__(self, places: list[tuple[Seed, Seed, float]], device: torch.device) -> None:
        self.places, self.device = places, device
        seeds = {seed for start, end, t in places for seed in ((start, end) if t else (start,))}
        self.streams = {seed: random_state(seed, "noise") for seed in seeds}

    def __call__(self, height: int, width: int) -> torch.Tensor:
        """[N, 1, height, width]"""
        import torch

        drawn = {seed: stream.randn(1, height, width) for seed, stream in self.streams.items()}
        images = [
            math.cos(t * math.pi / 2) * drawn[start] + math.sin(t * math.pi / 2) * drawn[end] if t else drawn[start]
            for start, end, t in self.places
        ]
        return torch.from_numpy(np.stack(images).astype(np.float32)).to(self.device)


def interpolate(
    model: Model,
    seeds: Iterable[Seed],
    frames: int | None = None,
    *,
    loop: bool = False,
    method: str = "spline",
    space: str | None = None,
    easing: str = "none",
    truncation: float | None = None,
    truncation_cutoff: int | None = None,
    noise: str = "const",
    class_index: int | None = None,
    attributes: Mapping[str, float] | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
) -> Iterator[Sample]:
    """The frames of a walk from seed to seed, as Samples, made as they are asked for.

    Arguments are those of Path, Settings and Sampler, and so are the errors. `save_animation` writes what comes out.
    """
    path = Path(tuple(parse_seeds(seeds)), frames, loop, method, space, easing)
    settings = Settings(truncation, truncation_cutoff, noise, class_index, attributes=tuple((attributes or {}).items()))
    return Walker(Sampler(model, settings, device, precision, batch_size), path)()
