"""Several devices as one: each that is free takes the next batch, and the images come in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from queue import SimpleQueue
from typing import Any

from tpdne_cli import devices
from tpdne_cli.errors import DeviceError
from tpdne_cli.models import Model
from tpdne_cli.pipeline import in_order
from tpdne_cli.sampler import Sample, Sampler, Settings
from tpdne_cli.seeds import Seed


class Fleet:
    """Samplers of one model that share the work. A slower device takes fewer batches; none waits for another."""

    def __init__(self, samplers: list[Sampler]) -> None:
        self.samplers = samplers

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[Sample]:
        """One Sample per seed, in order. Raises what a Sampler raises."""
        idle: SimpleQueue[Sampler] = SimpleQueue()
        for sampler in self.samplers:
            idle.put(sampler)
        size = self.samplers[0].batch_size

        def run(batch: list[Seed]) -> list[Sample]:
            sampler = idle.get()
            try:
                return list(sampler(batch))
            finally:
                idle.put(sampler)

        workers = len(self.samplers)
        pending = iter(seeds)
        batches = iter(lambda: list(islice(pending, size)), [])
        for samples in in_order(run, batches, workers, window=2 * workers):
            yield from samples

    def recipe(self, seed: Seed) -> dict[str, Any]:
        return self.samplers[0].recipe(seed)


def assemble(
    model: Model,
    settings: Settings | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
) -> Sampler | Fleet:
    """A Sampler, or a Fleet where `device` names several: 'cuda:0,cuda:1'. Raises as Sampler does."""
    names = [name.strip() for name in device.split(",")]
    if "" in names:
        raise DeviceError(f"{device!r} is not a list of devices: write them as cuda:0,cuda:1.")
    for name in names:  # all of them are there, before the network is copied to the first
        devices.choose(name)
    samplers = [Sampler(model, settings, name, precision, batch_size) for name in names]
    return samplers[0] if len(samplers) == 1 else Fleet(samplers)
