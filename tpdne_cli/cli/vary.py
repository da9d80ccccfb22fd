"""`tpdne vary`: neighbours of one face."""

from __future__ import annotations

from typing import Any

import click

from tpdne_cli.cli import latent, options
from tpdne_cli.cli.target import Target
from tpdne_cli.images import FORMATS
from tpdne_cli.naming import SeedName
from tpdne_cli.seeds import fresh, parse_seed


@click.command(short_help="Write neighbours of one face: the same person in another mood.")
@latent.model_option
@click.option("--seed", metavar="S", help="Whose neighbours: a number, or any text (default: somebody new).")
@click.option("-n", "--count", type=click.IntRange(1, 2**32), default=8, show_default=True, metavar="N")
@click.option(
    "--strength",
    type=float,
    metavar="X",
    help="How far away: 0.1 is hardly visible, 1 somebody else (default 0.3).",
)
@click.option("--fine", is_flag=True, help="Change the fine styles only (layers 8 on): colours and light.")
@options.latent_options
@latent.output_options("DIR|FILE|-", "Directory, one file, or - for bytes on stdout (several: a tar stream).")
@options.resume_option
@options.device_options
@options.report_options
def vary(seed: str | None, count: int, strength: float | None, fine: bool, **given: Any) -> int:
    """Write neighbours of one face: the same person in another mood.

    The k-th neighbour of a seed is the same image whatever the count, and its recipe makes it again.

    \b
    tpdne vary --seed alice@example.com -n 8 --out alice/
    tpdne vary --model cats --seed 7 --strength 0.15 -n 20 --out cats/
    """
    from tpdne_cli.styles import STRENGTH, Neighbour, Varier

    if fine and strength is not None:
        raise click.UsageError("--fine takes other styles as they are and --strength moves all: leave one of them out")
    centre = fresh(1)[0] if seed is None else parse_seed(seed)
    again = f"--seed {centre}" if seed is None else ""
    note = f"Fresh seed {centre}: {again} makes the same ones again." if again else ""
    target = Target.of(given["out"] or ".", given["format"])
    if target.file is not None and count > 1:
        raise click.UsageError(f"{count} images do not fit in the one file {target.file}: give a directory")
    title, suffix = latent.title(given["model"]), FORMATS[target.format].suffix
    kind = "fine" if fine else "near"
    names = [f"{title}-{SeedName(centre)}-{kind}-{index:03d}{suffix}" for index in range(1, count + 1)]
    work = [(Neighbour(centre, index), name) for index, name in enumerate(names, 1)]
    output = latent.begin(target, names, given)
    step = STRENGTH if strength is None else strength
    job = latent.files_job(target, output, given, lambda sampler: Varier(sampler, step, fine), again)
    return job.make(work, options.going_on(note, given["skip_existing"]))
