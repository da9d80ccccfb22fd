"""`tpdne sheet`: a contact sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from tpdne_cli.cli import latent, options
from tpdne_cli.errors import SettingsError
from tpdne_cli.seeds import Seed, fresh

GRID = 8, 5
MAX_CELLS = 1_000_000


class Grid(click.ParamType):  # type: ignore[type-arg]
    """'8x5': eight columns and five rows."""

    name = "grid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"([1-9]\d{0,6})\s*[xX×]\s*([1-9]\d{0,6})", str(value), re.ASCII)
        if match is None:
            self.fail(f"{value!r} is not a grid: write columns and rows, such as 8x5.", param, ctx)
        return int(match[1]), int(match[2])


@click.command(short_help="Lay many images out on one sheet.")
@latent.model_option
@options.seed_options
@click.option("--grid", type=Grid(), metavar="WxH", help="Columns and rows (default: what the count needs, or 8x5).")
@click.option("--labels", is_flag=True, help="Write each seed below its image.")
@options.latent_options
@latent.output_options("FILE|-", "One file, or - for stdout (default sheet.png).")
@options.device_options
@options.report_options
def sheet(
    count: int | None,
    seed: Sequence[str],
    seeds: str | None,
    seeds_from: str | None,
    grid: tuple[int, int] | None,
    labels: bool,
    **given: Any,
) -> int:
    """Lay many images out on one sheet, row by row.

    A PNG is written as its rows are made, so that a sheet of 100x100 needs no more memory than one of 100x1.

    \b
    tpdne sheet --seed 0 --grid 8x5 --labels -o sheet.png
    tpdne sheet --model cats --seeds 0-99 --size 64 -o cats.webp
    """
    from tpdne_cli.fleet import spread
    from tpdne_cli.montage import Layout

    if grid is not None:
        check_cells(math.prod(grid))
    if grid is not None and count is None and len(seed) <= 1 and seeds is None and seeds_from is None:
        count = grid[0] * grid[1]
    known = options.read_seeds(count, seed, seeds, seeds_from)
    wanted = fresh(count or math.prod(GRID)) if known is None else known
    check_cells(len(wanted))
    columns, rows = grid = grid or fitting(len(wanted))
    if len(wanted) > columns * rows:
        raise SettingsError(
            f"A grid of {columns}x{rows} does not suit {len(wanted)} images: leave --grid or --count out."
        )
    target = latent.sheet_target("sheet", given)
    output = latent.begin(target, [""], given, resumable=False)
    sampler = latent.load_sampler(given)
    Layout(columns, rows, given["size"] or sampler.model.resolution, labels).check(target.format)
    if known is None:
        output.note(f"Fresh seeds: {again(wanted, grid)} makes the same sheet again.")
    recipe = {
        **sampler.recipe(wanted[0]),
        "seed": runs(wanted),
        "latent": {"kind": "sheet", "grid": [columns, rows]},
    }

    def save(samples: Iterator[Any], destination: Any) -> Mapping[str, Any]:
        return latent.save_sheet(samples, destination, grid, target.format, recipe, given, labels=labels)

    one = latent.OneFile(target.file, target.format, output, given["manifest"], given["force"])
    return one.make(wanted, spread(sampler, sampler, len(wanted)), save, recipe)


def check_cells(count: int) -> None:
    """Raises SettingsError for more images than a sheet may hold."""
    if count > MAX_CELLS:
        raise SettingsError(f"A sheet of {count:,} images is too large: ask for {MAX_CELLS:,} at most.")


def again(wanted: Sequence[Seed], grid: tuple[int, int]) -> str:
    """The options that name these consecutive seeds on this grid."""
    count = "" if len(wanted) == math.prod(grid) else f" --count {len(wanted)}"
    return f"--seed {wanted[0]} --grid {grid[0]}x{grid[1]}{count}"


def fitting(count: int) -> tuple[int, int]:
    """The grid for so many images that is about as wide as it is high, not higher."""
    if count == math.prod(GRID):
        return GRID
    columns = math.isqrt(count - 1) + 1
    return columns, -(-count // columns)


def runs(seeds: Sequence[Seed]) -> list[Any]:
    """Seeds as a recipe of bounded length can hold them: [first, last] for numbers that count on."""
    found: list[Any] = []
    for seed in seeds:
        if isinstance(seed, int) and found and isinstance(found[-1], list) and found[-1][1] == seed - 1:
            found[-1][1] = seed
        elif isinstance(seed, int):
            found.append([seed, seed])
        else:
            found.append(seed)
    return found
