"""`tpdne mix`: the coarse styles of some faces with the rest of others."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import click

from tpdne_cli.cli import latent, options
from tpdne_cli.cli.target import Target
from tpdne_cli.errors import SettingsError
from tpdne_cli.images import FORMATS
from tpdne_cli.naming import SeedName
from tpdne_cli.seeds import Seed, fresh

ROWS, COLUMNS = 3, 5  # of a table that is given none


@click.command(short_help="Mix styles: the shape of one face with the colours of another.")
@latent.model_option
@click.option("--rows", metavar="A,B,...", help="Seeds that give the styles: 1,5-9,alice@example.com.")
@click.option("--cols", "--columns", "columns", metavar="A,B,...", help="Seeds that give the rest.")
@click.option(
    "--styles",
    default="coarse",
    show_default=True,
    metavar="NAME|A-B",
    help="The layers that rows give: coarse (0-3: pose, shape), middle (4-7), fine (8 on: colours), or a range.",
)
@click.option("--single", is_flag=True, help="Write each mixture as a file of its own, without the table.")
@options.latent_options
@latent.output_options("FILE|DIR|-", "One file, - for stdout (default mix.png); a directory with --single.")
@options.resume_option
@options.device_options
@options.report_options
def mix(rows: str | None, columns: str | None, styles: str, single: bool, **given: Any) -> int:
    """Mix styles: the shape of one face with the colours of another.

    Rows give the styles that --styles names, columns all others; the first row and column show what is mixed. (NVIDIA's
    tool of this kind names the layers of the columns.)

    \b
    tpdne mix --rows 1,2,3 --cols 10-14 -o mix.png
    tpdne mix --rows alice --cols bob --styles middle --single -o mixed/
    """
    across: Sequence[Seed] = fresh(COLUMNS) if columns is None else latent.seed_list(columns)
    down: Sequence[Seed] = fresh(ROWS) if rows is None else latent.seed_list(rows)
    drawn = rows is None or columns is None
    again = shlex.join(["--rows", latent.listed(down), "--cols", latent.listed(across)]) if drawn else ""
    return (files if single else table)(down, across, styles, given, again)


def note_of(again: str) -> str:
    return f"Fresh seeds: {again} makes the same ones again." if again else ""


def files(rows: Sequence[Seed], columns: Sequence[Seed], styles: str, given: Mapping[str, Any], again: str) -> int:
    """Each crossing as a file of its own. again: the options that name seeds which were drawn."""
    from tpdne_cli.styles import Mixer, Mixture

    target = Target.of(given["out"] or ".", given["format"])
    count = len(rows) * len(columns)
    if target.file is not None and count > 1:
        raise click.UsageError(f"{count} images do not fit in the one file {target.file}: give a directory")
    title, suffix = latent.title(given["model"]), FORMATS[target.format].suffix
    work = [(Mixture(r, c), f"{title}-{SeedName(r)}-{SeedName(c)}{suffix}") for r in rows for c in columns]
    if len({name for _, name in work}) < count:
        raise SettingsError("Two images would have one name: a seed is given twice among the rows or the columns.")
    output = latent.begin(target, [name for _, name in work], given)
    job = latent.files_job(target, output, given, lambda sampler: Mixer(sampler, styles), again)
    return job.make(work, options.going_on(note_of(again), given["skip_existing"]))


def table(rows: Sequence[Seed], columns: Sequence[Seed], styles: str, given: Mapping[str, Any], again: str) -> int:
    """All crossings in one picture, below and beside the images that they are made of."""
    from tpdne_cli.fleet import spread
    from tpdne_cli.montage import Layout
    from tpdne_cli.styles import Mixer, Mixture

    if given["skip_existing"]:
        raise click.UsageError("--skip-existing goes on with single files: add --single")
    target = latent.sheet_target("mix", given)
    grid = len(columns) + 1, len(rows) + 1
    output = latent.begin(target, [""], given, resumable=False)
    sampler = latent.load_sampler(given)
    mixer = Mixer(sampler, styles)
    Layout(*grid, given["size"] or sampler.model.resolution, head=True).check(target.format)
    if again:
        output.note(note_of(again))
    # A seed mixed with itself is its own image: these are the heads.
    items = [Mixture(c, c) for c in columns] + [Mixture(r, c) for r in rows for c in (r, *columns)]
    recipe = {
        **sampler.recipe(rows[0]),
        "seed": [list(rows), list(columns)],
        "latent": {"kind": "table", "styles": styles},
    }

    def save(samples: Iterator[Any], destination: Any) -> Mapping[str, Any]:
        return latent.save_sheet(chain([None], samples), destination, grid, target.format, recipe, given, head=True)

    one = latent.OneFile(target.file, target.format, output, given["manifest"], given["force"])
    return one.make(items, spread(mixer, sampler, len(items)), save, recipe)
