"""The published formulation of StyleGAN2 and StyleGAN3, plainly: what ours is measured against and must agree with.

Written from the papers (arXiv 1912.04958 and 2106.12423) over a state dict with the published tensor names, from whose
names and shapes it takes all sizes. Nothing is arranged for speed: each image modulates and demodulates weights of its
own, which one grouped convolution per layer applies; every resampling inserts zeros, pads, filters and then drops
samples; every step makes a new tensor, in NCHW order, from torch's usual allocator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
Padding = tuple[int, int]  # before and behind, the same on both axes


class Oracle:
    """A generator over a state dict, called as those in tpdne_cli.networks are.

    config: the network's Config; of it come only numbers that no tensor tells (clamp, psi's layers, bandwidth ...).
    """

    def __init__(self, arch: str, config: Any, state: State) -> None:
        self.arch, self.config, self.state = arch, config, state

    @torch.no_grad()
    def mapping(self, z: Tensor, c: Tensor | None = None, psi: float = 1.0, cutoff: int | None = None) -> Tensor:
        """[N, z_dim] (and one-hot labels [N, c_dim]) -> ws [N, num_ws, w_dim]"""
        w = mapping(self.state, z.to(torch.float32), c, self.config.mapping_lr_multiplier)
        ws = w[:, None].repeat(1, self.config.num_ws, 1)
        cut = self.config.num_ws if cutoff is None else cutoff
        if psi != 1:
            ws[:, :cut] = self.state["mapping.w_avg"].lerp(ws[:, :cut], psi)
        return ws

    @torch.no_grad()
    def synthesis(self, ws: Tensor, noise: str = "const") -> Tensor:
        """[N, num_ws, w_dim] -> [N, C, R, R] in nominal range [-1, 1]"""
        if self.arch == "stylegan2":
            return stylegan2(self.state, ws, noise, self.config.conv_clamp)
        return stylegan3(self.state, ws, self.config)

    def __call__(
        self, z: Tensor, c: Tensor | None = None, psi: float = 1.0, cutoff: int | None = None, noise: str = "const"
    ) -> Tensor:
        return self.synthesis(self.mapping(z, c, psi, cutoff), noise)


# What both share


def upfirdn2d(x: Tensor, f: Tensor | None, up: int, down: int, padding: Padding, gain: float = 1.0) -> Tensor:
    """Insert up - 1 zeros behind every sample, pad or crop, convolve with f ([k, k], or [k] per axis), keep each
    down-th sample: [N, C, H, W] -> [N, C, H', W']."""
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(n, c, h * up, w * up)
    x = F.pad(x, [*padding, *padding])
    if f is not None:
        kernel = (f * gain ** (f.ndim / 2)).flip(list(range(f.ndim)))
        for shape in [(1, 1, -1, 1), (1, 1, 1, -1)] if f.ndim == 1 else [(1, 1, *f.shape)]:
            x = F.conv2d(x, kernel.reshape(shape).repeat(c, 1, 1, 1), groups=c)
    return x[:, :, ::down, ::down]


def bias_act(x: Tensor, bias: Tensor, slope: float, gain: float, clamp: float | None) -> Tensor:
    """clamp(leaky_relu(x + bias) * gain) with a bias per channel; slope 1 is the identity."""
    x = x + bias.reshape([1, -1] + [1] * (x.ndim - 2))
    x = F.leaky_relu(x, slope) if slope != 1 else x
    x = x * gain if gain != 1 else x
    return x if clamp is None else x.clamp(-clamp, clamp)


def dense(p: State, name: str, x: Tensor, lr: float = 1.0) -> Tensor:
    """A linear layer with equalised learning rate: [N, I] -> [N, O]"""
    weight = p[f"{name}.weight"] * (lr / math.sqrt(x.shape[1]))
    return torch.addmm((p[f"{name}.bias"] * lr)[None], x, weight.t())


def normalised(x: Tensor) -> Tensor:
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def mapping(p: State, z: Tensor, c: Tensor | None, lr: float) -> Tensor:
    """[N, z_dim], [N, c_dim] -> w [N, w_dim]"""
    x = normalised(z)
    if c is not None and "mapping.embed.weight" in p:
        x = torch.cat([x, normalised(dense(p, "mapping.embed", c.to(torch.float32)))], 1)
    for i in range(sum(re.fullmatch(r"mapping\.fc\d+\.weight", name) is not None for name in p)):
        x = F.leaky_relu(dense(p, f"mapping.fc{i}", x, lr), 0.2) * math.sqrt(2)
    return x


def modulated(weight: Tensor, styles: Tensor, demodulate: bool) -> Tensor:
    """Each image's own weights (1912.04958, eq. 1 and 3): [O, I, k, k], [N, I] -> [N, O, I, k, k]"""
    w = weight[None] * styles[:, None, :, None, None]
    return w * (w.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt() if demodulate else w


def grouped_conv(x: Tensor, w: Tensor, padding: int) -> Tensor:
    """One convolution for a batch in which each image has its own weights: [N, I, H, W], [N, O, I, k, k]"""
    n = len(x)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), w.reshape(-1, *w.shape[2:]), padding=padding, groups=n)
    return y.reshape(n, -1, *y.shape[2:])


# StyleGAN2


def stylegan2(p: State, ws: Tensor, noise: str, clamp: float | None) -> Tensor:
    """1912.04958, figures 2 and 7, in its skip, residual and plain architectures."""
    x = p["synthesis.b4.const"][None].repeat(len(ws), 1, 1, 1)
    image, index, resolution = None, 0, 4  # torgb and the next block's conv0 share their w
    while (block := f"synthesis.b{resolution}") + ".conv1.weight" in p:
        residual = f"{block}.skip.weight" in p
        gain = math.sqrt(0.5) if residual else 1.0
        if residual:
            weight = p[f"{block}.skip.weight"]
            y = F.conv2d(x, weight * (gain / math.sqrt(weight.shape[1])))
            y = upsampled(y, p[f"{block}.skip.resample_filter"])
        if resolution > 4:
            x = synthesis_layer(p, f"{block}.conv0", x, ws[:, index], True, noise, 1.0, clamp)
            index += 1
        x = synthesis_layer(p, f"{block}.conv1", x, ws[:, index], False, noise, gain, clamp)
        index += 1
        x = y + x if residual else x
        image = None if image is None else upsampled(image, p[f"{block}.resample_filter"])
        if f"{block}.torgb.weight" in p:
            rgb = torgb(p, f"{block}.torgb", x, ws[:, index], clamp)
            image = rgb if image is None else image + rgb
        resolution *= 2
    assert image is not None
    return image


def upsampled(x: Tensor, f: Tensor) -> Tensor:
    return upfirdn2d(x, f, 2, 1, ((f.shape[-1] + 1) // 2, (f.shape[-1] - 2) // 2), gain=4)


def synthesis_layer(
    p: State, name: str, x: Tensor, w: Tensor, up: bool, noise: str, gain: float, clamp: float | None
) -> Tensor:
    """[N, I, H, W] -> [N, O, H, W], or twice that size."""
    n, weight = len(x), modulated(p[f"{name}.weight"], dense(p, f"{name}.affine", w), demodulate=True)
    if up:  # a transposed convolution inserts the zeros; the filter follows
        stacked = weight.transpose(1, 2).reshape(-1, weight.shape[1], *weight.shape[3:])  # [N * I, O, k, k]
        y = F.conv_transpose2d(x.reshape(1, -1, *x.shape[2:]), stacked, stride=2, groups=n)
        f = p[f"{name}.resample_filter"]
        x = upfirdn2d(y.reshape(n, -1, *y.shape[2:]), f, 1, 1, ((f.shape[-1] - 1) // 2, (f.shape[-1] - 2) // 2), 4)
    else:
        x = grouped_conv(x, weight, padding=1)
    if noise != "none" and f"{name}.noise_const" in p:
        constant = p[f"{name}.noise_const"]
        x = x + (constant if noise == "const" else torch.randn(n, 1, *constant.shape)) * p[f"{name}.noise_strength"]
    return bias_act(x, p[f"{name}.bias"], 0.2, math.sqrt(2) * gain, None if clamp is None else clamp * gain)


def torgb(p: State, name: str, x: Tensor, w: Tensor, clamp: float | None) -> Tensor:
    """A modulated 1x1 convolution without demodulation: [N, I, H, W] -> [N, C, H, W]"""
    styles = dense(p, f"{name}.affine", w) / math.sqrt(x.shape[1])
    x = grouped_conv(x, modulated(p[f"{name}.weight"], styles, demodulate=False), padding=0)
    return bias_act(x, p[f"{name}.bias"], 1.0, 1.0, clamp)


# StyleGAN3


def stylegan3(p: State, ws: Tensor, config: Any) -> Tensor:
    """2106.12423, configurations T and R: the filters lie in the state dict, the sizes in the layers' names."""
    layers = list(layer_names(p))
    size = int(layers[0].split("_")[1])  # the input has the size of the first layer
    x = fourier_features(p, ws[:, 0], size, size - 2 * config.margin_size, config.first_cutoff)
    for i, name in enumerate(layers):
        x = filtered_layer(p, f"synthesis.{name}", x, ws[:, i + 1], config.filter_size, config.conv_clamp)
    return x * config.output_scale


def layer_names(p: State) -> Iterator[str]:
    """L0_36_512 and so on, in order: number, width of the output, channels."""
    names = {match[1] for name in p if (match := re.match(r"synthesis\.(L\d+_\d+_\d+)\.", name))}
    yield from sorted(names, key=lambda name: int(name[1:].split("_")[0]))


def fourier_features(p: State, w: Tensor, size: int, rate: float, bandwidth: float) -> Tensor:
    """[N, w_dim] -> [N, C, size, size]: sines whose plane w and the user turn and shift (section 3.1, appendix F)."""
    t = dense(p, "synthesis.input.affine", w)  # cosine, sine, x, y
    t = t / t[:, :2].norm(dim=1, keepdim=True)
    turn, move = torch.eye(3).repeat(len(w), 1, 1), torch.eye(3).repeat(len(w), 1, 1)
    turn[:, 0, 0], turn[:, 0, 1], turn[:, 1, 0], turn[:, 1, 1] = t[:, 0], -t[:, 1], t[:, 1], t[:, 0]
    move[:, 0, 2], move[:, 1, 2] = -t[:, 2], -t[:, 3]
    transform = turn @ move @ p["synthesis.input.transform"]
    freqs, phases = p["synthesis.input.freqs"][None], p["synthesis.input.phases"][None]
    phases = phases + (freqs @ transform[:, :2, 2:])[:, :, 0]  # [N, C]
    freqs = freqs @ transform[:, :2, :2]  # [N, C, 2]
    amplitudes = (1 - (freqs.norm(dim=2) - bandwidth) / (rate / 2 - bandwidth)).clamp(0, 1)  # [N, C]
    axis = (torch.arange(size) + 0.5 - size / 2) / rate
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    plane = torch.stack([x, y], 2)[None, :, :, None]  # [1, H, W, 1, 2]
    waves = torch.sin(2 * math.pi * ((plane * freqs[:, None, None]).sum(4) + phases[:, None, None]))
    weight = p["synthesis.input.weight"]
    mixed = (waves * amplitudes[:, None, None]) @ (weight / math.sqrt(len(weight))).t()  # [N, H, W, C]
    return mixed.permute(0, 3, 1, 2).contiguous()


def filtered_layer(p: State, name: str, x: Tensor, w: Tensor, filter_size: int, clamp: float | None) -> Tensor:
    """Modulated convolution, then bias, upsampling, leaky ReLU, downsampling; the last layer has no filters."""
    weight, styles = p[f"{name}.weight"], dense(p, f"{name}.affine", w)
    up_filter, down_filter = p.get(f"{name}.up_filter"), p.get(f"{name}.down_filter")
    size, kernel = int(name.split("_")[1]), weight.shape[2]
    is_torgb = up_filter is None and down_filter is None
    if is_torgb:
        styles = styles / math.sqrt(x.shape[1])
    else:  # both at unit mean square first, the styles over the whole batch (appendix D)
        weight = weight * weight.square().mean([1, 2, 3], keepdim=True).rsqrt()
        styles = styles * styles.square().mean().rsqrt()
    weight = modulated(weight, styles, demodulate=not is_torgb) * p[f"{name}.magnitude_ema"].rsqrt()
    x = grouped_conv(x, weight, padding=kernel - 1)
    if is_torgb:
        return bias_act(x, p[f"{name}.bias"], 1.0, 1.0, clamp)
    up_taps, down_taps = (1 if f is None else len(f) for f in (up_filter, down_filter))
    up, down = max(up_taps // filter_size, 1), max(down_taps // filter_size, 1)
    # What makes the output as wide as its name says, and keeps the centre of the image in the centre.
    total = (size - 1) * down + 1 + (up_taps - 1) + (down_taps - 1) - x.shape[2] * up
    before = (total + up) // 2
    x = x + p[f"{name}.bias"][:, None, None]
    x = upfirdn2d(x, up_filter, up, 1, (before, total - before), gain=up**2)
    x = F.leaky_relu(x, 0.2) * math.sqrt(2)
    x = x if clamp is None else x.clamp(-clamp, clamp)
    return upfirdn2d(x, down_filter, 1, down, (0, 0))
