"""3x3 convolutions of wide layers with a quarter of the multiplications, for generation on a CPU in float32.

Winograd's algorithm F(4x4, 3x3) (Lavin & Gray 2015, arXiv 1509.09308): 6x6 input tiles, two samples of overlap, and
kernels are moved to a domain where convolution is a product for each of 36 positions, so that one matrix product per
position mixes the channels. With the interpolation points 0, +-3/4, +-3/2 and infinity, and rows scaled alike, the
rounding is 1.5e-6 of the output's spread at 512 channels, where the direct sum's is 7e-7, that with the customary
points 0, +-1, +-2 is 3e-6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpdne_cli.networks.packed import Products

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # and infinity
LEAST_CHANNELS = 96  # below, moving the data costs what is saved


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Matrices [4, 6] of the output, [6, 3] of the kernel and [6, 6] of the input, float64 (Toom-Cook)."""
    out, kernel, data = (torch.zeros(n, dtype=torch.float64) for n in ((4, 6), (6, 3), (6, 6)))
    everywhere = torch.ones(1, dtype=torch.float64)  # coefficients of prod (x - p), lowest first
    for j, point in enumerate(POINTS):
        others = torch.ones(1, dtype=torch.float64)
        for other in POINTS:
            if other != point:
                others = F.pad(others, [1, 0]) - other * F.pad(others, [0, 1])
        data[j, :5] = others
        powers = point ** torch.arange(4, dtype=torch.float64)
        out[:, j], kernel[j] = powers, powers[:3] / torch.prod(torch.tensor([point - p for p in POINTS if p != point]))
        everywhere = F.pad(everywhere, [1, 0]) - point * F.pad(everywhere, [0, 1])
    data[5], out[3, 5], kernel[5, 2] = everywhere, 1, 1
    # Any diagonal scaling cancels; rows of equal sums round best.
    a, b = data.abs().sum(1), kernel.abs().sum(1)
    return out * (a * b), kernel / b[:, None], data / a[:, None]


class Winograd:
    """Convolution with one kernel [O, I, 3, 3], moved to the transformed domain once (four times the memory)."""

    def __init__(self, weight: Tensor) -> None:
        out, kernel, data = transforms()
        o, i = weight.shape[:2]
        taps = weight.to(torch.float64).permute(2, 3, 0, 1).reshape(9, -1)
        self.channels = i, o
        # One after the other: all at once, in double precision, they would be the most memory that a network takes.
        self.mix = Products((row @ taps).view(o, i).to(torch.float32) for row in torch.kron(kernel, kernel))
        self.out, self.data = out.to(torch.float32), data.to(torch.float32)

    def __call__(self, x: Tensor, padding: int) -> Tensor:
        """F.conv2d(x, weight, padding=padding) for one image, [1, I, H, W] -> [1, O, H', W'], both channels_last."""
        _, i, height, width = x.shape
        h, w = height + 2 * padding - 2, width + 2 * padding - 2
        tiles_y, tiles_x, o = -(-h // 4), -(-w // 4), self.channels[1]
        padded = torch.zeros(4 * tiles_y + 2, 4 * tiles_x + 2, i)
        padded[padding : padding + height, padding : padding + width] = x[0].permute(1, 2, 0)
        result = torch.empty(1, o, 4 * tiles_y, 4 * tiles_x, memory_format=torch.channels_last)
        blocks = result[0].permute(1, 2, 0).view(tiles_y, 4, tiles_x, 4, o)
        # Enough tiles at once to make the products efficient, few enough to stay in the cache.
        rows = max(1, max(i // 2, LEAST_CHANNELS) // tiles_x)
        for top in range(0, tiles_y, rows):
            n = min(rows, tiles_y - top)
            blocks[top : top + n] = self.tiles(padded[4 * top :], n, tiles_x)
        return result[:, :, :h, :w]

    def tiles(self, x: Tensor, rows: int, cols: int) -> Tensor:  # [>= 4 * rows + 2, W, I] -> [rows, 4, cols, 4, O]
        y_stride, x_stride, _ = x.stride()
        i, o = self.channels
        windows = x.as_strided((6, 6, rows, cols, i), (y_stride, x_stride, 4 * y_stride, 4 * x_stride, 1))
        # A product for each column or row of a tile, never one large product: that MKL may sum in another order on
        # two threads than on one.
        windows = windows.reshape(6, 6, -1).transpose(0, 1)  # [x, y, ...]
        windows = torch.bmm(self.data.expand(6, 6, 6), windows).transpose(0, 1)  # along y
        windows = torch.bmm(self.data.expand(6, 6, 6), windows)  # along x
        mixed = self.mix(windows.view(36, rows * cols, i))  # [36, rows * cols, O]
        mixed = torch.bmm(self.out.expand(6, 4, 6), mixed.view(6, 6, -1)).transpose(0, 1)  # along x
        y = torch.bmm(self.out.expand(4, 4, 6), mixed)  # along y: [4 x, 4 y, ...]
        return y.view(4, 4, rows, cols, o).permute(2, 1, 3, 0, 4)
