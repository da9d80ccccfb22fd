"""The filtered leaky ReLU of StyleGAN3 (Karras et al. 2021, arXiv 2106.12423, section 3.1 and appendix D), twice.

`filtered_lrelu` is the formulation of the paper: any device, differentiable. `FilteredLrelu` is the same map for
generation on a CPU. There each 1-D resampling becomes products of one small constant matrix with overlapping windows
of the signal; it works on 16 channels and a strip of rows at a time, so that the signal at the doubled rate, by far
the largest, never leaves the cache; and only the samples that survive the decimation are computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpdne_cli.networks.ops import SQRT2, upfirdn2d

CHANNELS = 16  # the least per chunk: 64 bytes, a cache line
UP_TILE, DOWN_TILE = 4, 4  # input samples per matrix going up, output samples per matrix going down
STRIP_BYTES = 3 << 20  # the signal at the high rate, 16 channels of a strip
CHUNK_BYTES = 1 << 20  # the same, more channels of a small image
TOLERANCE = 1e-5  # of what a sum of separable filters may leave out, relative to its largest part


def filtered_lrelu(
    x: Tensor,
    up_filter: Tensor | None,
    down_filter: Tensor | None,
    bias: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    gain: float = SQRT2,
    slope: float = 0.2,
    clamp: float | None = None,
) -> Tensor:
    """Bias, upsampling, leaky ReLU times gain, clamp, downsampling: [N, C, H, W] -> [N, C, H', W'].

    Padding (x0, x1, y0, y1) counts samples at the high rate, negative to crop. Filters are [taps] or [taps, taps].
    """
    x = x if bias is None else x + bias.to(x.dtype)[:, None, None]
    x = upfirdn2d(x, up_filter, up=up, padding=padding, gain=up * up)
    x = F.leaky_relu(x, slope) * gain
    x = x if clamp is None else x.clamp(-clamp, clamp)
    return upfirdn2d(x, down_filter, down=down)


def lowpass(taps: int, cutoff: float, width: float, rate: float, radial: bool = False) -> Tensor:
    """Kaiser-windowed low-pass filter [taps], or its rotationally symmetric version [taps, taps] (appendix C).

    cutoff, width of the transition band and sampling rate share one unit. Identity (one tap) needs no filter.
    """
    attenuation = 2.285 * (taps - 1) * math.pi * width / (rate / 2) + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    else:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21) if attenuation > 21 else 0.0
    window = torch.kaiser_window(taps, periodic=False, beta=beta, dtype=torch.float64)
    t = (torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2) / rate  # no tap lies at zero: their number is even
    if not radial:
        f = window * torch.sinc(2 * cutoff * t)
    else:
        r = torch.hypot(t[:, None], t)
        f = torch.special.bessel_j1(2 * math.pi * cutoff * r) / r * torch.outer(window, window)
    return (f / f.sum()).to(torch.float32)


@dataclass(frozen=True)
class Resampling:
    """A 1-D resampling as products of one matrix: output tile i [T] is matrix [T, K] @ input[i * step :][:K]."""

    matrix: Tensor
    step: int

    def reach(self, tiles: int) -> int:
        """How many input samples that many tiles read."""
        return (tiles - 1) * self.step + self.matrix.shape[1]

    def apply(self, x: Tensor, out: Tensor, tiles: int) -> None:
        """Resample along the first dimension: x [>= reach, ...] -> out [tiles * T, ...], both contiguous."""
        (t, k), n = self.matrix.shape, x[0].numel()
        windows = x.as_strided((tiles, k, n), (self.step * n, n, 1))
        torch.bmm(self.matrix.expand(tiles, -1, -1), windows, out=out.view(tiles, t, n))


def toeplitz(taps: Tensor, offset: int, stride_in: int, stride_out: int, shape: tuple[int, int]) -> Tensor:
    """Entry [t, i] is tap number offset + stride_in * i - stride_out * t, or zero where there is none."""
    j = offset + stride_in * torch.arange(shape[1]) - stride_out * torch.arange(shape[0])[:, None]
    return torch.where((j >= 0) & (j < len(taps)), taps[j.clamp(0, len(taps) - 1)], 0.0)


def upsampling(taps: Tensor, up: int, padding: int, gain: float) -> tuple[Resampling, int]:
    """Zero insertion, padding and filtering; and the place in the signal of the first sample that it reads."""
    f = taps.to(torch.float64).flip(0) * gain
    first = math.ceil(-padding / up)
    last = (len(f) - 1 + UP_TILE * up - 1 - padding) // up  # read by the first tile
    matrix = toeplitz(f, up * first + padding, up, 1, (UP_TILE * up, last - first + 1))
    return Resampling(matrix.to(torch.float32), UP_TILE), first


def downsampling(f: Tensor, down: int) -> tuple[Resampling, Resampling, int]:
    """Filtering and decimation, first along x, then along y, and the rank of the filter.

    A filter of rank r is a sum of r outer products. Going along x, each tile yields all r intermediate signals;
    going along y, each sums over all of them, which lie interleaved row by row.
    """
    pairs = separate(f)
    taps, rank = f.shape[0], len(pairs)
    shape = (DOWN_TILE, (DOWN_TILE - 1) * down + taps)
    along_y = torch.stack([toeplitz(y.to(torch.float64).flip(0), 0, 1, down, shape) for y, _ in pairs], 2)  # [T, K, r]
    along_x = torch.cat([toeplitz(x.to(torch.float64).flip(0), 0, 1, down, shape) for _, x in pairs])  # [r * T, K]
    step = DOWN_TILE * down
    x, y = Resampling(along_x.to(torch.float32), step), Resampling(along_y.flatten(1).to(torch.float32), step * rank)
    return x, y, rank


def separate(f: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A filter as a short sum of outer products (along y, along x): two to four for the published radial filters."""
    if f.ndim == 1:
        return [(f, f)]
    u, s, vh = torch.linalg.svd(f.to(torch.float64))
    return [(u[:, i] * s[i].sqrt(), vh[i] * s[i].sqrt()) for i in range(len(s)) if s[i] > TOLERANCE * s[0]]


class FilteredLrelu:
    """filtered_lrelu for one layer's filters and sizes, on a CPU in float32; signals are square.

    size and out_size are the sides of input and output, padding the samples before the signal at the high rate. up
    must be a multiple of down. Gain sqrt(2) and slope 0.2 are those of every published layer.
    """

    def __init__(
        self, up_filter: Tensor, down_filter: Tensor, up: int, down: int, padding: int, size: int, out_size: int,
        clamp: float | None,
    ) -> None:  # fmt: skip
        # A positive gain commutes with the leaky ReLU, so it goes into the filter, half of it on each axis.
        self.up, self.first = upsampling(up_filter, up, padding, up * SQRT2**0.5)
        self.down_x, self.down_y, self.rank = downsampling(down_filter, down)
        self.size, self.out_size, self.clamp, self.up_factor, self.down = size, out_size, clamp, up, down
        self.rise = self.up.matrix.abs().sum(1).max().item() ** 2  # the most that upsampling makes of one
        unit = max(DOWN_TILE, UP_TILE * up // down)  # strips begin where tiles do, on both sides
        line = self.extent(out_size)[1] * UP_TILE * up * CHANNELS * 4  # bytes
        self.strip = max(STRIP_BYTES // (line * down) // unit * unit, 2 * unit)

    def extent(self, length: int) -> tuple[int, int, int]:
        """Input samples read, tiles going up and tiles going down for so many output samples."""
        down_tiles = -(-length // DOWN_TILE)
        up_tiles = -(-self.down_x.reach(down_tiles) // (UP_TILE * self.up_factor))
        return self.up.reach(up_tiles), up_tiles, down_tiles

    def __call__(self, x: Tensor, scale: Tensor, bias: Tensor, out_scale: Tensor) -> Tensor:
        """filtered_lrelu(x * scale + bias) * out_scale.

        x: [1, C, size, size] in channels_last order, C a multiple of 16; vectors: [C]; returns [1, C, out, out].
        """
        c, n = x.shape[1], self.out_size
        out = torch.empty(1, c, n, n, memory_format=torch.channels_last)
        source, target = x[0].permute(1, 2, 0), out[0].permute(1, 2, 0)  # [H, W, C]
        for top in range(0, n, self.strip):
            strip = Strip(self, top, min(self.strip, n - top), c)
            for start in range(0, c, strip.channels):
                part = slice(start, start + strip.channels)
                y = strip.run(source[:, :, part], scale[part], bias[part])
                torch.mul(y, out_scale[part], out=target[top : top + strip.height, :, part])
        return out


class Strip:
    """The buffers of one strip of output rows, reused by all its chunks of channels, and the work in them."""

    def __init__(self, op: FilteredLrelu, top: int, height: int, channels: int) -> None:
        rows, self.up_rows, self.down_rows = op.extent(height)
        cols, self.up_cols, self.down_cols = op.extent(op.out_size)
        up_rows, up_cols = (tiles * UP_TILE * op.up_factor for tiles in (self.up_rows, self.up_cols))
        down_rows, down_cols = self.down_rows * DOWN_TILE, self.down_cols * DOWN_TILE
        # Small images leave room for more channels at once.
        fits = CHUNK_BYTES // (up_rows * up_cols * 4)
        self.channels = c = next(
            n for n in (4 * CHANNELS, 2 * CHANNELS, CHANNELS) if n == CHANNELS or (n <= fits and channels % n == 0)
        )
        self.op, self.height = op, height
        # Where the signal lies in the strip's window; the zeros around it are the padding, and stay.
        self.y = overlap(op.first + top * op.down // op.up_factor, rows, op.size)
        self.x = overlap(op.first, cols, op.size)
        self.window = torch.zeros(rows, cols, c)
        # Two buffers take turns on either side of the signal at the high rate.
        one = torch.empty(up_rows * max(cols, op.rank * down_cols) * c)
        two = torch.empty(up_rows * max(cols, op.rank * down_cols) * c)
        self.tall, self.tall_t = view(one, up_rows, cols, c), view(two, cols, up_rows, c)
        self.large = torch.empty(up_cols, up_rows, c)  # transposed
        self.narrow_t = view(two, self.down_cols, op.rank, DOWN_TILE, up_rows, c)
        self.narrow = view(one, up_rows, op.rank, self.down_cols, DOWN_TILE, c)
        self.result = view(two, down_rows, down_cols, c)

    def run(self, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:  # [H, W, c], [c], [c] -> [height, out, c]
        op, (y_in, y_window), (x_in, x_window), large = self.op, self.y, self.x, self.large
        torch.addcmul(bias, x[y_in, x_in], scale, out=self.window[y_window, x_window])
        # Every product runs along the first dimension, in the order of memory; between them lies a cheap transpose.
        op.up.apply(self.window, self.tall, self.up_rows)
        self.tall_t.copy_(self.tall.transpose(0, 1))
        op.up.apply(self.tall_t, large, self.up_cols)
        F.leaky_relu_(large, 0.2)
        if op.clamp is not None and op.rise * max(-self.window.amin(), self.window.amax()) > op.clamp:
            large.clamp_(-op.clamp, op.clamp)
        op.down_x.apply(large, self.narrow_t, self.down_cols)
        self.narrow.copy_(self.narrow_t.permute(3, 1, 0, 2, 4))
        op.down_y.apply(self.narrow.flatten(0, 1), self.result, self.down_rows)
        return self.result[: self.height, : op.out_size]


def view(buffer: Tensor, *shape: int) -> Tensor:
    """The beginning of a buffer, in a shape."""
    return buffer[: math.prod(shape)].view(shape)


def overlap(first: int, length: int, size: int) -> tuple[slice, slice]:
    """Where the window [first, first + length) meets the signal [0, size): the part in the signal, in the window."""
    low, high = max(first, 0), min(first + length, size)
    return slice(low, high), slice(low - first, high - first)
