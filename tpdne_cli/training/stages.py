"""The same latents at several stages of a run, as one picture: `tpdne serve` explains itself with NAME-stages.webp.

python -m tpdne_cli.training.stages runs/faces weights/faces-stages.webp
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from tpdne_cli import images
from tpdne_cli.errors import TrainingError

SIDE = 8  # of a sample sheet, in images
STAGES, CELLS = 6, (1, 2)  # columns; the images of a sheet that make the rows
QUALITY = 88


def strip(run_dir: str | os.PathLike[str], cells: tuple[int, ...] = CELLS) -> images.Pixels:
    """uint8 [rows * R, STAGES * R, 3]: sheets from the first to the last, each twice as late as the one before.

    Raises TrainingError for a run with too few sample sheets.
    """
    sheets = sorted(Path(run_dir).glob("samples-*.png"))
    if len(sheets) < STAGES:
        raise TrainingError(f"{run_dir} holds {len(sheets)} sample sheets and {STAGES} are needed: train on.")
    pages = [images.read_pixels(path) for path in chosen(sheets)]
    resolution = max(len(page) for page in pages) // SIDE
    columns = [
        np.concatenate([images.resize(np.ascontiguousarray(cell(page, k)), resolution) for k in cells])
        for page in pages
    ]
    return np.concatenate(columns, axis=1)


def chosen(sheets: list[Path]) -> list[Path]:
    """STAGES of them, the images seen growing evenly in proportion; most happens early on."""
    seen = [int(path.stem.removeprefix("samples-")) for path in sheets]
    marks = np.geomspace(seen[0], seen[-1], STAGES)
    picked: list[int] = []
    for number, mark in enumerate(marks):
        first, last = (picked[-1] + 1 if picked else 0), len(sheets) - (STAGES - number)
        picked.append(min(range(first, last + 1), key=lambda k: abs(seen[k] - mark)))
    return [sheets[k] for k in picked]


def cell(page: images.Pixels, k: int) -> images.Pixels:
    side = len(page) // SIDE
    row, column = divmod(k, SIDE)
    return page[row * side : (row + 1) * side, column * side : (column + 1) * side]


def main() -> None:
    parser = argparse.ArgumentParser(description="One picture of several stages of a training run.")
    parser.add_argument("run", help="the run's directory")
    parser.add_argument("out", help="NAME-stages.webp, beside NAME.safetensors")
    parser.add_argument("--cells", type=int, nargs="+", default=list(CELLS), help="which images of a sheet, 0 to 63")
    given = parser.parse_args()
    pixels = strip(given.run, tuple(given.cells))
    recipe = {"kind": "stages", "cells": given.cells}
    images.write_atomic(given.out, images.encode(pixels, "webp", QUALITY, recipe))


if __name__ == "__main__":
    main()
