"""What the networks share: resampling filters, biased activations, the fully connected layer and the mapping network.

Everything here is plain torch. On a CPU in float32, outside autograd, each image's numbers are the same alone or in
any batch: the dense layers go row by row (`linear`), the convolutions share one weight for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SQRT2 = math.sqrt(2.0)

Pair = tuple[int, int]  # (x, y)

# name -> (function, gain that keeps the variance of a unit normal input)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "linear": (lambda x: x, 1.0),
    "relu": (torch.relu, SQRT2),
    "lrelu": (lambda x: F.leaky_relu(x, 0.2), SQRT2),
    "tanh": (torch.tanh, 1.0),
    "sigmoid": (torch.sigmoid, 1.0),
    "elu": (F.elu, 1.0),
    "selu": (F.selu, 1.0),
    "softplus": (F.softplus, 1.0),
    "swish": (F.silu, SQRT2),
}


def setup_filter(taps: Sequence[float]) -> Tensor:
    """FIR taps -> a filter that sums to one: [k, k] by outer product, or [k] (separable) from 8 taps on."""
    f = [tap / sum(taps) for tap in taps]
    return torch.tensor(f if len(f) >= 8 else [[a * b for b in f] for a in f], dtype=torch.float32)


def normal(*shape: int, std: float = 1.0) -> Tensor:
    """Initial values for a parameter. On the meta device only their shape: drawing there imports half of torch."""
    values = torch.empty(shape)
    return values if values.is_meta else values.normal_(0, std)


def constant(*shape: int, value: float = 0.0) -> Tensor:
    """One initial value for a whole parameter; see `normal`."""
    values = torch.empty(shape)
    return values if values.is_meta else values.fill_(value)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """One number for both axes, or (x, y)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Insert zeros, pad or crop, filter, drop samples: [N, C, H, W] -> [N, C, H', W'].

    f: [kh, kw], or [k] for both axes, or None. Padding is (x0, x1, y0, y1), negative to crop. The filter is applied
    as a convolution; flip_filter makes it a correlation.
    """
    n, c, h, w = x.shape
    (upx, upy), (downx, downy) = pair(up), pair(down)
    px0, px1, py0, py1 = (padding,) * 4 if isinstance(padding, int) else padding
    if f is not None and x.requires_grad and torch.is_grad_enabled():
        taps = (torch.outer(f, f) if f.ndim == 1 else f) * gain
        taps = taps if flip_filter else taps.flip([0, 1])
        y: Tensor = _Resample.apply(x, taps, (upx, upy), (downx, downy), (px0, px1, py0, py1))  # type: ignore[no-untyped-call]
        return y
    if upx > 1 or upy > 1:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, upx - 1, 0, 0, 0, upy - 1]).reshape(n, c, h * upy, w * upx)
    if (px0, px1, py0, py1) != (0, 0, 0, 0):
        x = F.pad(x, [px0, px1, py0, py1])
    if f is not None:
        f = (f * gain ** (f.ndim / 2)).to(x.dtype)
        f = f if flip_filter else f.flip(list(range(f.ndim)))
        if f.ndim == 2:
            return F.conv2d(x, f.expand(c, 1, -1, -1), groups=c, stride=(downy, downx))
        x = F.conv2d(x, f.reshape(1, 1, -1, 1).expand(c, -1, -1, -1), groups=c, stride=(downy, 1))
        return F.conv2d(x, f.reshape(1, 1, 1, -1).expand(c, -1, -1, -1), groups=c, stride=(1, downx))
    if gain != 1:
        x = x * gain
    return x[:, :, ::downy, ::downx]


class _Resample(torch.autograd.Function):
    """upfirdn2d for training: its gradient is upfirdn2d again, up and down exchanged and the taps turned round.

    Left to itself, autograd goes through the gradient of a grouped convolution: five times the time of this one, and in
    the second derivative that R1 needs one channel after the other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, up: Pair, down: Pair, padding: tuple[int, int, int, int]) -> Tensor:
        (n, c, h, w), (px0, px1, py0, py1) = x.shape, padding
        if px0 == px1 >= 0 and py0 == py1 >= 0:
            margin, inner = (0, 0, 0, 0), (py0, px0)  # the convolution's own padding does
        else:
            margin, inner = padding, (0, 0)
        if up == (1, 1):
            x = x if inner != (0, 0) else F.pad(x, margin)
        else:  # zeros around and between in one piece
            left, right, top, bottom = (max(side, 0) for side in margin)
            size = (n, top + h * up[1] + bottom, left + w * up[0] + right, c)
            spread = x.new_zeros(size).permute(0, 3, 1, 2)  # channels last
            spread[:, :, top : top + h * up[1] : up[1], left : left + w * up[0] : up[0]] = x
            x = spread if min(margin) >= 0 else F.pad(spread, [min(side, 0) for side in margin])
        kernel = taps.to(x.dtype).expand(c, 1, -1, -1)
        y = F.conv2d(x, kernel, groups=c, padding=inner, stride=(down[1], down[0]))
        kh, kw = taps.shape
        px1 = w * up[0] - y.shape[3] * down[0] + px0 - up[0] + 1
        py1 = h * up[1] - y.shape[2] * down[1] + py0 - up[1] + 1
        ctx.taps, ctx.back = taps, (down, up, (kw - px0 - 1, px1, kh - py0 - 1, py1))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _Resample.apply(grad, ctx.taps.flip([0, 1]), *ctx.back), None, None, None, None  # type: ignore[no-untyped-call]


def filter_size(f: Tensor | None) -> tuple[int, int]:
    """(width, height) of a filter; none counts as one tap."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def upsample2d(x: Tensor, f: Tensor | None, up: int = 2) -> Tensor:
    """[N, C, H, W] -> [N, C, up*H, up*W], keeping the mean."""
    fw, fh = filter_size(f)
    padding = ((fw + up - 1) // 2, (fw - up) // 2, (fh + up - 1) // 2, (fh - up) // 2)
    return upfirdn2d(x, f, up=up, padding=padding, gain=up * up)


def downsample2d(x: Tensor, f: Tensor | None, down: int = 2) -> Tensor:
    """[N, C, H, W] -> [N, C, H/down, W/down]."""
    fw, fh = filter_size(f)
    padding = ((fw - down + 1) // 2, (fw - down) // 2, (fh - down + 1) // 2, (fh - down) // 2)
    return upfirdn2d(x, f, down=down, padding=padding)


def filter2d(x: Tensor, f: Tensor | None) -> Tensor:
    """[N, C, H, W] -> the same size."""
    fw, fh = filter_size(f)
    return upfirdn2d(x, f, padding=(fw // 2, (fw - 1) // 2, fh // 2, (fh - 1) // 2))


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """clamp(act(x + b) * gain) with b along dimension 1; alpha is the slope of lrelu."""
    function, default_gain = ACTIVATIONS[act]
    if b is not None:
        x = x + b.to(x.dtype).reshape([1, -1] + [1] * (x.ndim - 2))
    x = F.leaky_relu(x, alpha) if alpha is not None else function(x)
    gain = default_gain if gain is None else gain
    x = x * gain if gain != 1 else x
    return x if clamp is None else x.clamp(-clamp, clamp)


def clamp_(x: Tensor, limit: float) -> Tensor:
    """Within -limit..limit, in place where no gradient goes through: what is in front of it may need its result."""
    return x.clamp(-limit, limit) if x.requires_grad else x.clamp_(-limit, limit)


# torch hands a lone small image, and 1x1 kernels on one thread, to other CPU kernels than the rest, which sum in
# another order. The next two functions keep every call on the same road, so that a row's bits never depend on the
# batch or on the number of threads: a lone small image takes a copy along, and a 1x1 kernel claims a dilation that it
# cannot feel.
SMALL_IMAGE = 32768  # numbers in one image; torch's own limit is 20480


def is_lone(x: Tensor) -> bool:
    return len(x) == 1 and x.numel() <= SMALL_IMAGE and x.device.type == "cpu"


def conv2d(x: Tensor, w: Tensor, b: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """F.conv2d of x [N, I, H, W] with w [O, I, k, k], b [O]; a row's bits are the same in every batch."""
    if torch.is_grad_enabled():
        if _derived_twice:
            y: Tensor = _Conv2d.apply(x, w, b, stride, padding)  # type: ignore[no-untyped-call]
            return y
        return F.conv2d(x, w, b, stride=stride, padding=padding)
    dilation = 2 if w.shape[2:] == (1, 1) else 1
    y = F.conv2d(torch.cat([x, x]) if is_lone(x) else x, w, b, stride=stride, padding=padding, dilation=dilation)
    return y[: len(x)]


_derived_twice = False


@contextmanager
def derived_twice() -> Iterator[None]:
    """What is computed herein, its gradient by the image is derived once more: R1 in training."""
    global _derived_twice
    before, _derived_twice = _derived_twice, True
    try:
        yield
    finally:
        _derived_twice = before


class _Conv2d(torch.autograd.Function):
    """conv2d with a gradient by the image that can itself be derived by the weights.

    Left to itself, autograd derives it by convolutions whose kernels are whole feature maps: half as long again, and in
    bfloat16 on processors with AMX wrong without a word for fewer than 16 images.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.settings = stride, padding, b is not None
        return F.conv2d(x, w, b, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (x, w), (stride, padding, has_bias) = ctx.saved_tensors, ctx.settings
        if torch.is_grad_enabled():  # the derivative that is derived again, by the image alone
            rest = [x.shape[i] - ((grad.shape[i] - 1) * stride - 2 * padding + w.shape[i]) for i in (2, 3)]
            gx = F.conv_transpose2d(grad, w, stride=stride, padding=padding, output_padding=rest)
            return gx, None, None, None, None
        bias, shape = [len(w)] if has_bias else None, ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
        gx, gw, gb = torch.ops.aten.convolution_backward(grad, x, w, bias, *shape, ctx.needs_input_grad[:3])
        return gx, gw, gb, None, None


def conv_transpose2d(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """F.conv_transpose2d of x [N, I, H, W] with w [I, O, k, k]; a row's bits are the same in every batch."""
    if torch.is_grad_enabled():
        return F.conv_transpose2d(x, w, stride=stride)
    y = F.conv_transpose2d(torch.cat([x, x]) if is_lone(x) else x, w, stride=stride)
    return y[: len(x)]


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    flip_weight: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """A convolution between a zero-inserting upsampling and a decimation, both band-limited by f (1912.04958, app. B).

    x: [N, I, H, W], w: [O, I, kh, kw], bias: [O]. flip_weight=True is torch's correlation, False a true convolution.
    """
    kh, kw = w.shape[2:]
    fw, fh = filter_size(f)
    px0 = px1 = py0 = py1 = padding
    if up > 1:
        # Zero insertion and the kernel in one transposed convolution, which by itself is a true convolution.
        x = conv_transpose2d(x, (w.flip([2, 3]) if flip_weight else w).transpose(0, 1), stride=up)
        px0 += (fw + up - 1) // 2 - (kw - 1)
        px1 += (fw - up) // 2 - (kw - up)
        py0 += (fh + up - 1) // 2 - (kh - 1)
        py1 += (fh - up) // 2 - (kh - up)
        x = upfirdn2d(x, f, padding=(px0, px1, py0, py1), gain=up * up)
        return x if bias is None else x + bias[:, None, None]
    w = w if flip_weight else w.flip([2, 3])
    if down > 1:
        px0, px1 = px0 + (fw - down + 1) // 2, px1 + (fw - down) // 2
        py0, py1 = py0 + (fh - down + 1) // 2, py1 + (fh - down) // 2
        if kh == kw == 1:  # filter only the samples that are kept
            return conv2d(upfirdn2d(x, f, down=down, padding=(px0, px1, py0, py1)), w, bias)
        return conv2d(upfirdn2d(x, f, padding=(px0, px1, py0, py1)), w, bias, stride=down)
    return conv2d(x, w, bias, padding=padding)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x[N, I] @ w[O, I].T + b[O].

    Matrix kernels round a row differently in batches of different sizes. Outside autograd on a CPU each output is
    therefore one plain sum over one row, which no batch size and no number of threads can change.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, w, b)
    y = torch.stack([(w * row).sum(1) for row in x])
    return y if b is None else y.add_(b)


class FullyConnected(nn.Module):
    """A dense layer with equalised learning rate (1710.10196, section 4.1): weights are stored at unit variance."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(out_features, in_features, std=1 / lr_multiplier))
        self.bias = nn.Parameter(constant(out_features, value=bias_init / lr_multiplier))
        self.activation = activation
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier
        self.prepared: tuple[Tensor, Tensor] | None = None

    def prepare(self) -> None:
        """Apply the gains to the weights once and for all; only for networks that no longer learn."""
        self.prepared = (self.weight.detach() * self.weight_gain, self.bias.detach() * self.bias_gain)

    def forward(self, x: Tensor) -> Tensor:  # [N, in] -> [N, out]
        w, b = self.prepared or (self.weight * self.weight_gain, self.bias * self.bias_gain)
        return bias_act(linear(x, w, b), act=self.activation)


def normalize_2nd_moment(x: Tensor) -> Tensor:
    """Rows of mean square one."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class MappingNetwork(nn.Module):
    """z (and class label c) -> w, with truncation towards the mean w (1812.04948, sections 2 and B).

    z: [N, z_dim] (z_dim 0: label only), c: [N, c_dim] one-hot. Returns ws [N, num_ws, w_dim], or [N, w_dim] where
    num_ws is None (the discriminator's label mapping, which has no mean and no truncation).
    """

    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        layer_features: int | None = None,
        embed_features: int | None = None,
        lr_multiplier: float = 0.01,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws, self.num_layers = z_dim, c_dim, w_dim, num_ws, num_layers
        embedded = (w_dim if embed_features is None else embed_features) if c_dim else 0
        hidden = w_dim if layer_features is None else layer_features
        features = [z_dim + embedded] + [hidden] * (num_layers - 1) + [w_dim]
        if c_dim:
            self.embed = FullyConnected(c_dim, embedded)
        for i in range(num_layers):
            self.add_module(f"fc{i}", FullyConnected(features[i], features[i + 1], "lrelu", lr_multiplier))
        if num_ws is not None:
            self.register_buffer("w_avg", constant(w_dim))

    def forward(self, z: Tensor | None, c: Tensor | None = None, psi: float = 1.0, cutoff: int | None = None) -> Tensor:
        parts = []
        if z is not None and self.z_dim:
            parts.append(normalize_2nd_moment(z.to(torch.float32)))
        if self.c_dim:
            if c is None:
                raise ValueError("a conditional network needs a class label")
            parts.append(normalize_2nd_moment(self.embed(c.to(torch.float32))))
        x = torch.cat(parts, 1)
        for i in range(self.num_layers):
            x = self.get_submodule(f"fc{i}")(x)
        if self.num_ws is None:
            return x
        if psi == 1:
            return x.unsqueeze(1).repeat(1, self.num_ws, 1)
        truncated = self.w_avg.lerp(x, psi).unsqueeze(1)
        cut = self.num_ws if cutoff is None else min(max(cutoff, 0), self.num_ws)
        return torch.cat([truncated.expand(-1, cut, -1), x.unsqueeze(1).expand(-1, self.num_ws - cut, -1)], 1)


def prepare(network: nn.Module) -> nn.Module:
    """Freeze a network for generation: evaluation mode, no gradients, constants folded once, not at every call."""
    network.eval().requires_grad_(False)
    for module in network.modules():
        fold = getattr(module, "prepare", None)
        if module is not network and callable(fold):
            fold()
    return network
