"""`tpdne train`: a generator of one's own from a folder of pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpdne_cli.cli.generate import complete_model
from tpdne_cli.cli.interruption import Interruption
from tpdne_cli.cli.options import group
from tpdne_cli.cli.output import Output
from tpdne_cli.errors import OutputError
from tpdne_cli.files import as_argument

if TYPE_CHECKING:
    from tpdne_cli.training.config import TrainConfig
    from tpdne_cli.training.loop import Progress

SECONDS_BETWEEN_LINES = 30.0
FIXED = ("channel_base", "from_model", "seed")  # what a run in progress can no longer change

what_options = group(
    click.option("-o", "--out", required=True, metavar="NAME.safetensors",
                 type=click.Path(path_type=Path, dir_okay=False), help="The generator; its critic comes beside it."),
    click.option("--resolution", type=int, metavar="PX", help="Of the images in the end (default 128)."),
    click.option("--images", type=click.IntRange(1), metavar="N", help="Pictures to show in all (default 500000)."),
    click.option("--schedule", metavar="STAGES", help="Growth by hand: 32:60k,64:150k,128."),
    click.option("--from", "from_model", metavar="NAME|FILE", shell_complete=complete_model,
                 help="Begin with another generator's weights, e.g. faces: for few pictures."),
    click.option("--freeze-critic", type=click.IntRange(0), metavar="N",
                 help="With --from: its critic's N blocks next to the image learn no more."),
    click.option("--augment", type=click.Choice(["none", "diffaugment", "ada"]),
                 help="Against learning the pictures by heart (default diffaugment)."),
    click.option("--augment-strength", type=click.FloatRange(0, 1), metavar="X", help="Of diffaugment (default 1)."),
    click.option("--mirror/--no-mirror", default=None, help="Show pictures mirrored, too (default yes)."),
)  # fmt: skip
how_options = group(
    click.option("--batch", type=click.IntRange(1), metavar="N", help="Pictures per step (default 16, on a GPU 64)."),
    click.option("--channel-base", type=click.IntRange(8), metavar="N",
                 help="Width of the networks (default 4096, on a GPU 8192)."),
    click.option("--learning-rate", type=float, metavar="X", help="Of Adam (default 0.0025)."),
    click.option("--gamma", type=float, metavar="X", help="Weight of R1 (default 0.0002 * PX^2 / batch)."),
    click.option("--ema-images", type=click.IntRange(1), metavar="N",
                 help="Half life of the generator's average (default 10000); 3000 after --from on few pictures."),
    click.option("--seed", type=int, metavar="N", help="Of everything random (default 0)."),
)  # fmt: skip
run_options = group(
    click.option("--run", "run_dir", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
                 help="Checkpoints, log and sample sheets (default runs/NAME)."),
    click.option("--resume", is_flag=True, help="Go on from the newest checkpoint; settings may change."),
    click.option("--export-only", is_flag=True, help="Write NAME.safetensors from the newest checkpoint, no more."),
    click.option("--checkpoint-seconds", type=click.FloatRange(0), metavar="S",
                 help="Between checkpoints (default 300)."),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps."),
    click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]),
                 help="Of the convolutions; auto tries bfloat16 in a child process."),
    click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads; one beside other work."),
    click.option("--compile/--no-compile", default=None, help="Let torch compile the networks first."),
    click.option("-q", "--quiet", is_flag=True, help="Print results and errors only."),
)  # fmt: skip


@click.command()
@click.argument("source", metavar="[FOLDER|ZIP]", required=False, type=click.Path(path_type=Path))
@what_options
@how_options
@run_options
def train(
    source: Path | None, out: Path, run_dir: Path | None, resume: bool, export_only: bool, quiet: bool, **given: Any
) -> int:
    """Train a generator of your own from a folder of images, or a zip of them.

    Ctrl-C stops with a checkpoint; --resume goes on from it as if nothing had been. Sample sheets in the run's folder
    show how far it is.
    """
    _check_out(out, fresh=not (resume or export_only))
    run_dir = run_dir or Path("runs") / out.stem
    output = Output(quiet=quiet)
    if not export_only:
        config = _config(source, run_dir, resume, {k: v for k, v in given.items() if v is not None})
        if _run(config, resume, output):
            output.note(f"Stopped. Go on with: tpdne train --resume --run {run_dir} -o {out}")
            return 130
    from tpdne_cli.training.export import export

    for path in export(run_dir, out):
        output.result(as_argument(path))
    return 0


def _check_out(out: Path, fresh: bool) -> None:
    """Refuses now what would fail after hours."""
    if out.suffix != ".safetensors":
        raise click.UsageError(f"{out} must end in .safetensors.")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} is no directory: make it, or name another file with -o.")
    if fresh and out.exists():
        raise OutputError(f"{out} exists: name another file with -o, or go on with its training by --resume.")


def _config(source: Path | None, run_dir: Path, resume: bool, given: dict[str, Any]) -> TrainConfig:
    """The stored settings with what was given now, or those of a new run."""
    import dataclasses

    from tpdne_cli import devices
    from tpdne_cli.training import checkpoint
    from tpdne_cli.training.config import TrainConfig, recommended

    resolution = given.pop("resolution", None)
    if source is not None:
        given["data"] = str(source)
    if resume:
        if resolution or any(name in given for name in FIXED):
            raise click.UsageError("--resolution, --channel-base, --from and --seed are settled when a run begins.")
        stored = TrainConfig(**checkpoint.load(run_dir)["config"])
        return dataclasses.replace(stored, run_dir=str(run_dir), **given)
    if source is None:
        raise click.UsageError("Name a folder or a zip of pictures, or --resume a run.")
    lowest = min(resolution or 128, 32)
    if "from_model" in given:
        lowest = _begin_with(given, resolution)
    on_gpu = devices.choose(given.get("device", "auto")).type == "cuda"
    settings = recommended(resolution or max(128, lowest), given.get("images", 500_000), on_gpu, lowest)
    return TrainConfig(**(settings | {"run_dir": str(run_dir)} | given))


def _begin_with(given: dict[str, Any], resolution: int | None) -> int:
    """Finds the generator of --from; its resolution, at which the run begins."""
    from tpdne_cli import models
    from tpdne_cli.checkpoints import sniff

    name, given["from_model"] = given["from_model"], str(models.find(given["from_model"]))
    own = int(sniff.read(given["from_model"]).config.get("resolution", 0))
    if resolution and resolution < own:
        raise click.UsageError(f"{name} draws {own} pixels, and networks only grow: --resolution {own} or more.")
    return own


def _run(config: TrainConfig, resume: bool, output: Output) -> bool:
    """Train; whether it was stopped before its end."""
    from tpdne_cli.training.loop import train as run_training

    with Interruption(output, "Stopping with a checkpoint") as interruption:
        output.start(config.images)
        try:
            run_training(config, _reporter(output), lambda: interruption.asked, resume)
        finally:
            output.finish()
    return interruption.asked


def _reporter(output: Output) -> Callable[[Progress], None]:
    """Progress on the bar of a terminal, or as a line every half minute."""
    said = -SECONDS_BETWEEN_LINES

    def report(p: Progress) -> None:
        nonlocal said
        g_loss = "waits" if math.isnan(p.generator_loss) else f"{p.generator_loss:.2f}"  # while the critic catches up
        state = f"{p.resolution} px, G {g_loss}, D {p.discriminator_loss:.2f}, r_t {p.r_t:.2f}"
        if p.augment_p:
            state += f", p {p.augment_p:.2f}"
        if output.bar is not None and not output.bar.disable:
            output.bar.n = p.images
            output.bar.set_postfix_str(state)
        elif time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            hours = (p.total - p.images) / max(p.images_per_second, 1e-9) / 3600
            output.note(f"{p.images} of {p.total} images, {p.images_per_second:.1f}/s, {hours:.1f} h left, {state}")

    return report
