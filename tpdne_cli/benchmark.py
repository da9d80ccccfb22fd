"""How many images a second a generator makes here, stage by stage, and how many its convolutions alone would allow.

The bound is what torch's own dense convolution achieves on this machine at the network's largest shapes, in
channels_last order and for unchanging weights, with nothing around it: no styles, noise, filters or activations.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpdne_cli import __version__, devices, fleet
from tpdne_cli.errors import DeviceError
from tpdne_cli.files import write_atomic
from tpdne_cli.pipeline import Encoding, write_files
from tpdne_cli.sampler import Sampler, to_uint8

if TYPE_CHECKING:
    import torch

COVERED = 0.9  # of a network's arithmetic: the rest is small convolutions, and counted at the rate of the large ones
# Of the time that is given; a slow network takes longer, since everything is done at least once.
SHARES = {"mapping": 0.05, "synthesis": 0.35, "copy": 0.05, "encode": 0.1, "write": 0.05, "together": 0.2, "bound": 0.2}


class Convolution(NamedTuple):
    """A dense convolution of one layer. size: the side of the square plane over which its kernel is multiplied out."""

    in_channels: int
    out_channels: int
    kernel: int
    size: int

    @property
    def flop(self) -> int:
        """Multiplications and additions per image."""
        return 2 * self.in_channels * self.out_channels * self.kernel**2 * self.size**2


def convolutions(arch: str, config: Any) -> list[Convolution]:
    """Those of a generator, in the order of its layers.

    An upsampling layer counts at its input's size: its transposed convolution multiplies no inserted zeros.
    """
    if arch == "stylegan3":
        return [Convolution(g.in_channels, g.out_channels, g.kernel, g.conv_size) for g in config.layers]
    found: list[Convolution] = []
    resolution, below = 4, config.width(4)
    while resolution <= config.resolution:
        width, architecture = config.width(resolution), getattr(config, "architecture", "orig")
        if resolution > 4:
            found.append(Convolution(below, width, 3, resolution // 2))
            if architecture == "resnet":
                found.append(Convolution(below, width, 1, resolution // 2))
        found.append(Convolution(width, width, 3, resolution))
        if resolution == config.resolution or architecture == "skip":
            found.append(Convolution(width, config.img_channels, 1, resolution))
        resolution, below = resolution * 2, width
    return found


def largest(found: Sequence[Convolution]) -> Counter[Convolution]:
    """The shapes that make up most of the arithmetic, largest first, and how many layers have each."""
    total, chosen = sum(c.flop for c in found), Counter[Convolution]()
    for shape in sorted(found, key=lambda c: -c.flop):
        if shape in chosen or flop_of(chosen) < COVERED * total:
            chosen[shape] += 1
    return chosen


def flop_of(shapes: Counter[Convolution]) -> int:
    return sum(shape.flop * layers for shape, layers in shapes.items())


def convolution_rate(
    found: Sequence[Convolution], device: torch.device, dtype: torch.dtype, batch: int, seconds: float
) -> float:
    """Floating-point operations per second of torch's convolution at the largest shapes, the best of several runs.

    On a CPU the better of one image and `batch` images at a time, on a GPU `batch` images.
    """
    shapes = largest(found)
    batches = sorted({1, batch}) if device.type == "cpu" else [batch]
    taken = 0.0
    for shape, layers in shapes.items():
        share = seconds * layers * shape.flop / flop_of(shapes) / len(batches)
        taken += layers * min(seconds_of(shape, n, device, dtype, share) for n in batches)
    return flop_of(shapes) / taken


def seconds_of(shape: Convolution, batch: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Of one convolution, per image: the best of what fits in so many seconds, and of two runs at least."""
    import torch

    weight = torch.randn(shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
    x = torch.randn(batch, shape.in_channels, shape.size, shape.size)
    x, weight = (t.to(device, dtype, memory_format=torch.channels_last) for t in (x, weight))
    run = timed(lambda: torch.conv2d(x, weight, padding=shape.kernel // 2), device)
    return min(repeat(run, seconds, least=2)) / batch


def timed(function: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """The function as one that returns its seconds; those of a GPU are over when it has finished."""
    import torch

    def run() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            function()
        synchronise(device)
        return time.perf_counter() - start

    return run


def synchronise(device: torch.device) -> None:
    """Wait for a GPU to do what it was told."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def repeat(run: Callable[[], float], seconds: float, least: int = 1) -> list[float]:
    """What `run` returns, again and again until so many seconds have passed and it has run so many times."""
    end, taken = time.perf_counter() + seconds, [run()]
    while len(taken) < least or time.perf_counter() < end:
        taken.append(run())
    return taken


@dataclass(frozen=True)
class Benchmark:
    """What was measured. All times are seconds per image.

    stages: mapping (seed to w), synthesis (w to floating-point pixels), copy (to 8 bits, in the memory of the host),
    encode (to a file's bytes, on one thread) and write (that file, whole or not at all). together: all of them as
    generating files does it, encoders beside the network. bound: of the convolutions alone.
    """

    model: str
    arch: str
    resolution: int
    device: str
    precision: str
    batch_size: int
    threads: int
    format: str
    stages: dict[str, float]
    together: float
    bound: float
    flop: int  # of the convolutions of one image

    @property
    def network(self) -> float:
        """Seconds of an image until its pixels are there."""
        return sum(self.stages[name] for name in ("mapping", "synthesis", "copy"))

    @property
    def ratio(self) -> float:
        """How many times as long as its convolutions alone the synthesis takes."""
        return self.stages["synthesis"] / self.bound

    def record(self) -> dict[str, Any]:
        """Everything as one object of JSON."""
        rates = {**self.stages, "network": self.network, "together": self.together, "bound": self.bound}
        return {
            "model": self.model,
            "arch": self.arch,
            "resolution": self.resolution,
            "device": self.device,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "format": self.format,
            "seconds": {name: round(seconds, 9) for name, seconds in rates.items()},
            "images_per_second": {name: round(1 / seconds, 3) for name, seconds in rates.items()},
            "gflop_per_image": round(self.flop / 1e9, 3),
            "bound_gflop_per_second": round(self.flop / self.bound / 1e9, 3),
            "ratio": round(self.ratio, 4),
            "platform": platform.platform(),
            "version": __version__,
        }


def benchmark(sampler: Sampler, encoding: Encoding | None = None, seconds: float = 10.0) -> Benchmark:
    """Measure a sampler's model on its device for about so many seconds, longer where one batch takes long.

    Files are written to a temporary directory. Raises DeviceError where memory runs out.
    """
    import torch

    encoding = encoding or Encoding()
    list(sampler(range(sampler.batch_size)))  # warms up; where memory runs out, the sampler goes on with less
    shares = {name: share * seconds for name, share in SHARES.items()}
    try:
        stages = measure_network(sampler, shares)
        with tempfile.TemporaryDirectory(prefix="tpdne-bench-") as folder:
            stages |= measure_files(sampler, encoding, Path(folder), shares)
            together = measure_together(sampler, encoding, Path(folder), shares["together"], stages["synthesis"])
        found = convolutions(sampler.model.arch, sampler.model.config)
        rate = convolution_rate(found, sampler.device, sampler.precision, sampler.batch_size, shares["bound"])
    except Exception as error:
        if not devices.is_out_of_memory(error):
            raise
        raise DeviceError(f"There is not enough memory on {sampler.device}: use a smaller --batch-size.") from None
    flop = sum(c.flop for c in found)
    return Benchmark(
        sampler.model.name, sampler.model.arch, sampler.model.resolution, str(sampler.device),
        str(sampler.precision).removeprefix("torch."), sampler.batch_size, torch.get_num_threads(), encoding.format,
        stages, together, flop / rate, flop,
    )  # fmt: skip


def measure_network(sampler: Sampler, shares: Mapping[str, float]) -> dict[str, float]:
    """Seconds per image of the stages that the network's device does."""
    import torch

    seeds = list(range(sampler.batch_size))
    images: list[torch.Tensor] = []
    with torch.inference_mode():
        ws = sampler.map(list(seeds))

    def synthesise() -> None:
        images[:] = [sampler.generator.synthesis(ws, "const")]

    def typical(name: str, function: Callable[[], Any]) -> float:
        return statistics.median(repeat(timed(function, sampler.device), shares[name])) / len(seeds)

    return {
        "mapping": typical("mapping", lambda: sampler.map(list(seeds))),
        "synthesis": typical("synthesis", synthesise),
        "copy": typical("copy", lambda: to_uint8(images[0]).cpu().numpy()),
    }


def measure_files(sampler: Sampler, encoding: Encoding, folder: Path, shares: Mapping[str, float]) -> dict[str, float]:
    """Seconds per image of encoding and writing, one at a time."""
    import torch

    samples = list(sampler(range(sampler.batch_size)))
    host, turn, number = torch.device("cpu"), cycle(samples), count()
    data = encoding(samples[0])
    encode = timed(lambda: encoding(next(turn)), host)
    write = timed(lambda: write_atomic(folder / f"alone-{next(number)}", data, exclusive=True), host)
    return {
        "encode": statistics.median(repeat(encode, shares["encode"], least=len(samples))),
        "write": statistics.median(repeat(write, shares["write"], least=3)),
    }


def measure_together(sampler: Sampler, encoding: Encoding, folder: Path, seconds: float, each: float) -> float:
    """Seconds per image of whole batches from seeds to files, by as many processes as generating so many takes.

    each: about how long one image takes.
    """
    batches = max(1, round(seconds / each / sampler.batch_size))
    seeds = range(batches * sampler.batch_size)
    maker = fleet.spread(sampler, sampler, len(seeds))
    list(maker(seeds[: fleet.processes(sampler, len(seeds)) * sampler.batch_size]))  # warms each of them up
    start = time.perf_counter()
    done = list(write_files(((sample, folder / f"{sample.seed}") for sample in maker(seeds)), encoding))
    return (time.perf_counter() - start) / len(done)
