"""Who makes the images of a server: worker processes where a fork is safe, else threads of this process.

A crew knows models by name. `learn` gives a Sampler that tells all about one; calling it makes what is wanted of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from tpdne_cli import devices, models
from tpdne_cli.pipeline import Encoding
from tpdne_cli.sampler import Sample, Sampler
from tpdne_cli.web.looks import Look, draw
from tpdne_cli.web.ranking import Ranking

Placement = tuple[str, str, int | None]  # device, precision, batch size, as a Sampler takes them


class Picture(NamedTuple):
    """An encoded image by name: what it shows, and how it is written."""

    look: Look
    format: str
    size: int | None

    def encode(self, sample: Sample) -> bytes:
        return Encoding(self.format, size=self.size)(sample)


Wish = Picture | Ranking


class Made(NamedTuple):
    """What became of wishes: results in their order (or functions that finish them), and what it took."""

    results: list[Any]
    images: int
    seconds: float  # of the network


class Crew(Protocol):
    """workers: how many calls it serves at the same time."""

    workers: int

    @property
    def is_well(self) -> bool: ...

    @property
    def pids(self) -> Sequence[int]:
        """Of its processes, beside this one."""
        ...

    def learn(self, name: str) -> Sampler:
        """Load a model. Raises as models.load and Sampler do."""
        ...

    def share(self, name: str) -> int:
        """How many of the workers one batch of a model keeps busy."""
        ...

    def __call__(self, name: str, wishes: list[Any]) -> Made:
        """What they ask for, all of one model and of one kind. Raises what the network raises, and DeviceError."""
        ...

    def close(self) -> None: ...


def assemble(names: Mapping[str, str], placement: Placement, seconds: float) -> Crew:
    """The fastest crew for models by the names that they are served under; call it before any thread is started.

    seconds: after which nobody waits for an image any more. Raises DeviceError.
    """
    from tpdne_cli.web.nursery import Nursery

    device = devices.choose(placement[0])
    devices.choose_precision(placement[1], device)
    if sys.platform == "linux" and device.type == "cpu":  # elsewhere a fork is not safe behind the system's libraries
        return Nursery(names, placement, seconds)
    return Here(names, placement)


def load(source: str, placement: Placement) -> Sampler:
    device, precision, batch_size = placement
    return Sampler(models.load(source), None, device, precision, batch_size)


def make(sampler: Sampler, wishes: Sequence[Wish], later: bool = False) -> Made:
    """Draw what is wanted, each look once, and encode it; or (later) give functions that do."""
    if isinstance(first := wishes[0], Ranking):
        return Made([first.carry_out(sampler)], len(first.seeds), 0.0)
    pictures = [wish for wish in wishes if isinstance(wish, Picture)]
    looks = list(dict.fromkeys(picture.look for picture in pictures))
    samples = dict(zip(looks, draw(sampler, looks), strict=True))
    seconds = sum(sample.seconds for sample in samples.values())
    finishers: list[Callable[[], bytes]] = [_finisher(picture, samples[picture.look]) for picture in pictures]
    return Made(list(finishers) if later else [finish() for finish in finishers], len(looks), seconds)


def _finisher(picture: Picture, sample: Sample) -> Callable[[], bytes]:
    return lambda: picture.encode(sample)


class Here:
    """The models in this process: one batch at a time, which a GPU or all threads draw; encoding is left to others."""

    workers = 1
    is_well = True
    pids: Sequence[int] = ()

    def __init__(self, names: Mapping[str, str], placement: Placement) -> None:
        self.names, self.placement = names, placement
        self.samplers: dict[str, Sampler] = {}

    def learn(self, name: str) -> Sampler:
        self.samplers[name] = load(self.names[name], self.placement)
        return self.samplers[name]

    def share(self, name: str) -> int:  # noqa: ARG002
        return 1

    def __call__(self, name: str, wishes: list[Wish]) -> Made:
        return make(self.samplers[name], wishes, later=True)

    def close(self) -> None:
        pass
