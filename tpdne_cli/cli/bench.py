"""`tpdne bench`: images per second here, per stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tpdne_cli import devices
from tpdne_cli.cli import options
from tpdne_cli.cli.generate import complete_model
from tpdne_cli.cli.output import Output

if TYPE_CHECKING:
    from tpdne_cli.benchmark import Benchmark

STAGES = {  # in the order of the work
    "mapping": "seeds to styles",
    "synthesis": "styles to pixels",
    "copy": "pixels to bytes in memory",
    "encode": "bytes to a file's contents, on one thread",
    "write": "the file to a temporary directory",
    "together": "all of it, as tpdne generate does it",
    "bound": "the convolutions of the synthesis alone",
}


@click.command(short_help="Measure images per second here, stage by stage.")
@click.argument("model", default="faces", shell_complete=complete_model)
@options.device_options
@click.option("--format", "format", type=click.Choice(["png", "jpg", "webp"]), default="png", help="Default png.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    default=10,
    metavar="S",
    help="About how long it may take (default 10); everything is done at least once.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    model: str,
    batch_size: int | None,
    device: str,
    precision: str,
    format: str,
    seconds: float,
    as_json: bool,
) -> int:
    """Measure images per second here, stage by stage.

    And those that the convolutions of the network alone would allow, by torch's own on this machine.

    \b
    tpdne bench
    tpdne bench dishes.safetensors --batch-size 4 --json | jq .ratio
    """
    devices.rehearse_import("torch")
    from tpdne_cli import benchmark, models
    from tpdne_cli.pipeline import Encoding
    from tpdne_cli.sampler import Sampler

    output = Output(as_json)
    sampler = Sampler(models.load(model), device=device, precision=precision, batch_size=batch_size)
    found = benchmark.benchmark(sampler, Encoding(format), seconds)
    if as_json:
        output.result("", found.record())
    else:
        output.table(rows(found))
        output.result(sentence(found))
    return 0


def rows(found: Benchmark) -> Iterator[tuple[str, ...]]:
    """A table for people: what, images per second, milliseconds per image."""
    yield found.model, "images/s", "ms/image", f"{found.device}, {found.precision}, batches of {found.batch_size}"
    times = {**found.stages, "together": found.together, "bound": found.bound}
    for name, what in STAGES.items():
        yield name, f"{1 / times[name]:8.1f}", f"{1000 * times[name]:8.2f}", what


def sentence(found: Benchmark) -> str:
    rate = found.flop / found.bound / 1e9
    return (
        f"The synthesis takes {found.ratio:.2f} times as long as its convolutions alone "
        f"({found.flop / 1e9:.1f} GFLOP an image at {rate:.0f} GFLOP/s)."
    )
