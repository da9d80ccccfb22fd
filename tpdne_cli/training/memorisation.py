"""Does a generator draw the people it was shown? Its images' nearest photographs, beside those of other photographs.

Nothing is held out from a generator's training, so the yardstick is each photograph's nearest other one: a generator
that has learned nobody by heart is no nearer to its photographs than they are to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tpdne_cli.training.metrics import chunks, nearest

SMALL = 32  # side at which pixels are compared: who somebody is, not the grain of the photograph
PAIRS = 50
COLUMNS = 5
YARDSTICK = 2000  # photographs whose nearest other one is looked for
PERCENTILES = (0, 1, 5, 50)


@dataclass(frozen=True)
class Space:
    """The photographs and, behind them, their mirror images in one measure of likeness: rows [2N, F]."""

    name: str
    references: Tensor

    @property
    def photographs(self) -> int:
        return len(self.references) // 2

    def yardstick(self) -> Tensor:
        """Distances of some photographs to their nearest other one, mirrored or not."""
        rows = torch.linspace(0, self.photographs - 1, min(YARDSTICK, self.photographs)).long()
        itself = torch.stack([rows, rows + self.photographs], 1)
        return nearest(self.references[rows], self.references, itself)[0]


def shrink(pictures: Tensor) -> Tensor:
    """Pixels as features: uint8 [N, 3, R, R] -> float32 [N, 3 * 32 * 32], distances in levels of 255 (RMS)."""
    size = (SMALL, SMALL)
    parts = [F.interpolate(x.float(), size=size, mode="area").flatten(1) for x in chunks(pictures)]
    return torch.cat(parts).div_((3 * SMALL * SMALL) ** 0.5)


def compare(samples: Tensor, space: Space) -> tuple[dict[str, Any], Tensor, Tensor]:
    """A report, and for each sample's row the distance to its nearest photograph and that one's number (of 2N).

    closer_than_1_percent: share of samples nearer to a photograph than the nearest hundredth of photographs is to
    another; where nobody was learned by heart it is about 0.01, or less.
    """
    distances, rows = nearest(samples, space.references)
    between = space.yardstick()
    quantiles = torch.tensor(PERCENTILES) / 100
    report = {
        "samples": _named(distances.quantile(quantiles)),
        "photographs": _named(between.quantile(quantiles)),
        "closer_than_1_percent": round((distances < between.quantile(0.01)).double().mean().item(), 4),
    }
    return report, distances, rows


def _named(values: Tensor) -> dict[str, float]:
    return {f"{p}%" if p else "closest": round(v, 3) for p, v in zip(PERCENTILES, values.tolist(), strict=True)}


def write_pairs(path: Path, samples: Tensor, photographs: Tensor, closest: list[tuple[Tensor, Tensor]]) -> None:
    """A sheet of the closest pairs, sample left and photograph right, an equal share from each space, closest first.

    samples, photographs: uint8 [N, 3, R, R], [M, 3, R, R]; closest: of each space, distances and rows (of 2M).
    """
    side = photographs.shape[-1]
    share = PAIRS // len(closest)
    tiles = []
    for distances, rows in closest:
        for sample in distances.argsort()[:share].tolist():
            row = int(rows[sample])
            photograph = photographs[row % len(photographs)]
            photograph = photograph.flip(2) if row >= len(photographs) else photograph
            left = Image.fromarray(samples[sample].permute(1, 2, 0).numpy()).resize((side, side))
            tiles.append((left, Image.fromarray(photograph.permute(1, 2, 0).contiguous().numpy())))
    width, gap = 2 * side, 8
    lines = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + gap) - gap, lines * (side + gap) - gap), "white")
    for number, (left, right) in enumerate(tiles):
        x, y = number % COLUMNS * (width + gap), number // COLUMNS * (side + gap)
        sheet.paste(left, (x, y))
        sheet.paste(right, (x + side, y))
    sheet.save(path)
