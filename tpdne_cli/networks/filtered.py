"""The filtered leaky ReLU of StyleGAN3 (Karras et al. 2021, arXiv 2106.12423, section 3.1 and appendix D), twice.

`filtered_lrelu` is the formulation of the paper: any device, differentiable. `FilteredLrelu` is the same map for
generation on a CPU: resampling along y is a product of one small constant matrix with overlapping windows of rows,
along x a depthwise convolution; both work on a strip of rows and few channels at a time, so that the signal at the high
rate, by far the largest, never leaves the cache; and only the samples that survive the decimation are computed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tpdne_cli.networks.ops import SQRT2, upfirdn2d

CHANNELS = 16  # the least per chunk: 64 bytes, a cache line
TILE = 4  # samples at the lower rate per matrix product
STRIP_BYTES = 8 << 20  # the signal at the high rate, 16 channels of a strip
CHUNK_BYTES = 2 << 20  # the same, more channels of a small image
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
    empty = torch.empty((taps, taps) if radial else taps)
    if empty.is_meta:  # a description needs the shape alone; see ops.normal
        return empty
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


def toeplitz(taps: Tensor, offset: int, stride_in: int, stride_out: int, shape: tuple[int, int]) -> Tensor:
    """Entry [t, i] is tap number offset + stride_in * i - stride_out * t, or zero where there is none."""
    j = offset + stride_in * torch.arange(shape[1]) - stride_out * torch.arange(shape[0])[:, None]
    return torch.where((j >= 0) & (j < len(taps)), taps[j.clamp(0, len(taps) - 1)], 0.0).to(torch.float32)


def upsampling(taps: Tensor, up: int, padding: int, tile: int) -> Tensor:
    """[tile * up, K]: zero insertion, padding and filtering, from K samples in a row to the outputs they decide."""
    first = math.ceil(-padding / up)  # what the first output reads, counted from the beginning of the signal
    last = (len(taps) - 1 + tile * up - 1 - padding) // up
    return toeplitz(taps.flip(0), up * first + padding, up, 1, (tile * up, last - first + 1))


def downsampling(taps: Tensor, down: int, tile: int) -> Tensor:
    """[tile, K]: filtering and decimation."""
    return toeplitz(taps.flip(0), 0, 1, down, (tile, (tile - 1) * down + len(taps)))


def separate(f: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A filter as a short sum of outer products (along y, along x): two to four for the published radial filters."""
    f = f.to(torch.float64)
    if f.ndim == 1:
        return [(f, f)]
    u, s, vh = torch.linalg.svd(f)
    return [(u[:, i] * s[i].sqrt(), vh[i] * s[i].sqrt()) for i in range(len(s)) if s[i] > TOLERANCE * s[0]]


def along_y(matrix: Tensor, x: Tensor, step: int, out: Tensor) -> None:
    """Tile i of out, [T, ...], becomes matrix [T, K] @ x[i * step :][:K]; x: [>= reach, ...], out: [tiles * T, ...]."""
    (t, k), n = matrix.shape, x[0].numel()
    tiles = len(out) // t
    windows = x.as_strided((tiles, k, n), (step * n, n, 1))
    torch.bmm(matrix.expand(tiles, -1, -1), windows, out=out.view(tiles, t, n))


def along_x(kernels: Tensor, x: Tensor, step: int = 1) -> Tensor:
    """One kernel per channel: x [H, W, C], kernels [C, K] -> [H, (W - K) / step + 1, C]."""
    image = x.view(1, *x.shape).permute(0, 3, 1, 2)
    y = F.conv2d(image, kernels[:, None, None], stride=(1, step), groups=len(kernels))
    return y.contiguous(memory_format=torch.channels_last)[0].permute(1, 2, 0)


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
        taps = up_filter.to(torch.float64) * (up * SQRT2**0.5)
        self.up_y, self.up_x = upsampling(taps, up, padding, TILE), upsampling(taps, up, padding, 1)
        pairs = separate(down_filter)
        self.down_y = [downsampling(y, down, TILE) for y, _ in pairs]
        self.down_x = [downsampling(x, down, 1) for _, x in pairs]
        self.first = math.ceil(-padding / up)
        self.size, self.out_size, self.clamp, self.up, self.down = size, out_size, clamp, up, down
        line = self.high(out_size) * CHANNELS * 4  # bytes
        unit = max(TILE, TILE * up // down)  # strips begin where tiles do, on both sides
        self.strip = max(STRIP_BYTES // (line * down) // unit * unit, 2 * unit)

    def high(self, length: int) -> int:
        """How many samples at the high rate so many outputs read."""
        return (length - 1) * self.down + self.down_x[0].shape[1]

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
        up, tall = op.up, TILE * op.up
        cols = -(-op.high(op.out_size) // up)  # groups of `up` samples at the high rate
        down_rows = -(-height // TILE) * TILE
        up_rows = -(-op.high(down_rows) // tall) * tall
        # Small images leave room for more channels at once.
        fits = max(CHUNK_BYTES // (up_rows * cols * up * 4), CHANNELS)
        c = self.channels = next(n for n in (128, 64, 32, CHANNELS) if n <= fits and channels % n == 0)
        self.op, self.height = op, height
        rows, reach = (up_rows // tall - 1) * TILE + op.up_y.shape[1], cols - 1 + op.up_x.shape[1]
        # Where the signal lies in the strip's window; the zeros around it are the padding, and stay.
        self.y = overlap(op.first + top * op.down // up, rows, op.size)
        self.x = overlap(op.first, reach, op.size)
        self.window = torch.zeros(rows, reach, up, c)
        self.large = torch.empty(up_rows, cols * up, c)
        self.narrow = torch.empty(down_rows, cols * up, c)
        self.up_x = op.up_x.repeat_interleave(c, 0)  # [up * c, K]
        self.down_x = [kernel.expand(c, -1).contiguous() for kernel in op.down_x]

    def run(self, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:  # [H, W, c], [c], [c] -> [height, out, c]
        op, (y_in, y_window), (x_in, x_window), large = self.op, self.y, self.x, self.large
        signal = self.window[y_window, x_window]  # [.., .., up, c]: one copy for each phase of the output
        torch.addcmul(bias, x[y_in, x_in], scale, out=signal[:, :, 0])
        signal[:, :, 1:].copy_(signal[:, :, :1].expand(-1, -1, op.up - 1, -1))
        # The phases of a row come out side by side: in memory that is the upsampled row.
        wide = along_x(self.up_x, self.window.flatten(2))
        along_y(op.up_y, wide, TILE, large)
        F.leaky_relu_(large, 0.2)
        if op.clamp is not None:
            large.clamp_(-op.clamp, op.clamp)
        along_y(op.down_y[0], large, TILE * op.down, self.narrow)
        y = along_x(self.down_x[0], self.narrow, op.down)
        for down_y, down_x in zip(op.down_y[1:], self.down_x[1:], strict=True):
            along_y(down_y, large, TILE * op.down, self.narrow)
            y.add_(along_x(down_x, self.narrow, op.down))
        return y[: self.height, : op.out_size]


def overlap(first: int, length: int, size: int) -> tuple[slice, slice]:
    """Where the window [first, first + length) meets the signal [0, size): the part in the signal, in the window."""
    low, high = max(first, 0), min(first + length, size)
    return slice(low, high), slice(low - first, high - first)
