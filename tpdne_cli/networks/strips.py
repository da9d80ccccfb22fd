"""StyleGAN2's 3x3 layers for one image on a CPU in float32, a strip of rows at a time.

A layer is a scaling of its input, a convolution, and then scaling, bias, noise and leaky ReLU: as many passes over
memory as steps, if each step takes the whole image. A strip of rows stays in the cache from the first step to the last,
so that the image is read once and written once, and nothing of its size lies in between. Two convolutions are
replaced by equal ones with less work: wide ones by Winograd's, and the transposed one before an upsampling filter, for
which oneDNN has no kernel as good as its plain ones, by four plain ones, one for each parity of row and column.

Signals are [H, W, C]; every image goes alone through the same calls, so its bits depend on nothing but itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from tpdne_cli.networks.packed import Convolution
from tpdne_cli.networks.winograd import Winograd

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], None]

STRIP_BYTES = 4 << 20  # of a strip of output
WIDE_BYTES = 16 << 10  # the same for Winograd's algorithm, per channel: its products grow efficient with both
LEAST_CHANNELS = 128  # for Winograd's algorithm: with 64, moving the data costs what is saved
LEAST_SIZE = 16  # of the output; below, all images of a batch at once are faster than one after the other


def layer(weight: Tensor, size: int, taps: Tensor | None) -> Layer | None:
    """What computes a layer of kernel `weight` [O, I, 3, 3] to `size` pixels; taps: its upsampling filter.

    The result takes x [H, W, I], style [I], demod and bias [O], noise [H', W'] or None, and fills out [H', W', O],
    which may be x itself where nothing changes in size: the large images of a network need no second one then.
    None where a batch is better computed as a whole, or where this room has no way.
    """
    if weight.device.type != "cpu" or weight.shape[2:] != (3, 3) or size < LEAST_SIZE:
        return None
    if taps is not None:
        taps = torch.outer(taps, taps) if taps.ndim == 1 else taps
        return UpConv(weight, taps, size // 2) if min(taps.shape) > 1 else None
    return (WideConv if min(weight.shape[:2]) >= LEAST_CHANNELS else NarrowConv)(weight)


def suits(x: Tensor) -> bool:
    """Whether this room can take such a signal now: float32 on a CPU, and nothing to learn from it."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()


class Window:
    """Rows of an image times its style, with zeros around the image."""

    def __init__(self, rows: int, width: int, channels: int, left: int, right: int) -> None:
        self.buffer = torch.zeros(rows, left + width + right, channels)
        self.columns = slice(left, left + width)

    def __call__(self, x: Tensor, style: Tensor, top: int, rows: int) -> Tensor:
        """Rows top to top + rows of x [H, W, C], which may lie above or below it: [rows, left + W + right, C]."""
        low, high = max(top, 0), min(top + rows, len(x))
        view = self.buffer[:rows]
        view[: low - top].zero_()
        view[high - top :].zero_()
        torch.mul(x[low:high], style, out=view[low - top : high - top, self.columns])
        return view


class Strips:
    """Strips of an image that may be overwritten strip by strip, although each reads the last row of the one before."""

    def __init__(self, x: Tensor, out: Tensor, step: int) -> None:
        self.x, self.step, self.in_place = x, step, x.data_ptr() == out.data_ptr()
        self.row = x[0]

    @contextmanager
    def as_it_was(self, top: int) -> Iterator[None]:
        """Inside, the row above `top` is what it was before the strip above was overwritten."""
        if not self.in_place:
            yield
            return
        now = None
        if top:
            now = self.x[top - 1].clone()
            self.x[top - 1] = self.row
        yield
        self.row = self.x[min(top + self.step, len(self.x)) - 1].clone()
        if now is not None:
            self.x[top - 1] = now


class WideConv:
    """lrelu(conv(x * style) * demod + bias + noise) at the same size, by Winograd's algorithm."""

    def __init__(self, weight: Tensor) -> None:
        self.out_channels, self.in_channels = weight.shape[:2]
        self.winograd = Winograd(weight)

    def __call__(
        self, x: Tensor, style: Tensor, demod: Tensor, bias: Tensor, noise: Tensor | None, out: Tensor
    ) -> None:
        height, width, _ = x.shape  # multiples of four
        step = strip_rows(out, WIDE_BYTES * self.out_channels)
        window, strips = Window(step + 2, width, self.in_channels, 1, 1), Strips(x, out, step)
        for top in range(0, height, step):
            strip = out[top : top + step]
            rows, cols = len(strip) // 4, width // 4
            with strips.as_it_was(top):
                tiles = self.winograd.tiles(window(x, style, top - 1, len(strip) + 2), rows, cols)
            torch.addcmul(bias, tiles, demod, out=strip.view(rows, 4, cols, 4, self.out_channels))
            finish(strip, noise, top, strip)


class NarrowConv:
    """The same by the plain convolution, with both scalings in its weights: few enough to make them for each image."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.contiguous(memory_format=torch.channels_last)

    def __call__(
        self, x: Tensor, style: Tensor, demod: Tensor, bias: Tensor, noise: Tensor | None, out: Tensor
    ) -> None:
        weight = self.weight * style[:, None, None] * demod[:, None, None, None]
        step = strip_rows(out, STRIP_BYTES)
        strips = Strips(x, out, step)
        for top in range(0, len(out), step):
            strip = out[top : top + step]
            above = min(top, 1)  # rows; at the edges of the image the convolution's own zeros serve
            with strips.as_it_was(top):
                rows = x[top - above : top + len(strip) + 1][None].permute(0, 3, 1, 2)
                y = F.conv2d(rows, weight, bias, padding=1)[0].permute(1, 2, 0)
            finish(y[above : above + len(strip)], noise, top, strip)


class UpConv:
    """The same with a doubling of the size, band-limited by a filter, after the convolution (1912.04958, app. B).

    A true convolution with a kernel of three on a signal with zeros in between: even outputs see the outer taps, odd
    ones the middle one.
    """

    def __init__(self, weight: Tensor, taps: Tensor, size: int) -> None:  # of the input
        self.out_channels, self.in_channels = weight.shape[:2]
        self.taps = taps.flip([0, 1]) * 4
        self.before = [(size + 1) // 2 - 1 for size in taps.shape]  # zeros that the filter reads before the signal
        parities = ([2, 0], [1])  # taps in the order of the samples they meet
        around = [size + sum(self.reach(axis)) + 1 for axis in (0, 1)]
        self.convolutions = [Convolution(weight[:, :, r][:, :, :, c], *around) for r in parities for c in parities]

    def __call__(
        self, x: Tensor, style: Tensor, demod: Tensor, bias: Tensor, noise: Tensor | None, out: Tensor
    ) -> None:
        height, width, _ = x.shape
        kernel = (self.taps * demod[:, None, None])[:, None].contiguous(memory_format=torch.channels_last)
        step = strip_rows(out, STRIP_BYTES)
        (above, below), (left, right) = (self.reach(axis) for axis in (0, 1))
        cols = left + width + right  # pairs of columns
        window = Window(above + step // 2 + below + 1, width, self.in_channels, left + 1, right)
        spread = torch.empty(above + step // 2 + below, 2, cols, 2, self.out_channels)
        for top in range(0, 2 * height, step):
            strip = out[top : top + step]
            rows = above + len(strip) // 2 + below  # pairs of rows
            self.spread(window(x, style, top // 2 - above - 1, rows + 1), spread[:rows])
            high = spread[:rows].view(2 * rows, 2 * cols, -1)[2 * above - self.before[0] :]
            high = high[: len(strip) + len(self.taps) - 1]
            y = F.conv2d(high[None].permute(0, 3, 1, 2), kernel, bias, groups=self.out_channels)[0].permute(1, 2, 0)
            first = 2 * left - self.before[1]
            finish(y[:, first : first + 2 * width], noise, top, strip)

    def reach(self, axis: int) -> tuple[int, int]:
        """How many pairs of samples the filter reads beyond a strip, before it and after it."""
        before = self.before[axis]
        after = self.taps.shape[axis] - 1 - before
        return (before + 1) // 2, (after + 1) // 2

    def spread(self, x: Tensor, out: Tensor) -> None:
        """The transposed convolution: x [h + 1, w + 1, I] -> out [h, 2, w, 2, O]."""
        both, upright, level, point = self.convolutions
        out[:, 0, :, 0] = both(x)
        out[:, 0, :, 1] = upright(x)[:, 1:]
        out[:, 1, :, 0] = level(x[1:])
        out[:, 1, :, 1] = point(x[1:])[:, 1:]


def finish(x: Tensor, noise: Tensor | None, top: int, out: Tensor) -> None:
    """Adds rows of the noise image [H, W] from `top` on to x [h, W, C], in place, and puts lrelu(x) into `out`."""
    if noise is not None:
        x.add_(noise[top : top + len(x), :, None])
    torch._C._nn.leaky_relu(x, 0.2, out=out)


def strip_rows(out: Tensor, most: int) -> int:
    """Rows per strip of an image [H, W, C] that take at most so many bytes: a multiple of four."""
    row = out.shape[1] * out.shape[2] * 4  # bytes
    return min(len(out), max(4, most // row // 4 * 4))
