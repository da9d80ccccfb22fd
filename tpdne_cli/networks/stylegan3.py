"""StyleGAN3 (Karras et al. 2021, arXiv 2106.12423), the generator: configurations T and R.

Feature maps are samples of continuous signals. A layer's sampling rate, cutoff and stopband follow from a few numbers
(section 3.2 and appendix C); the maps have a margin around the image, and every non-linearity acts between an
upsampling and a downsampling filter. Parameters and buffers bear the names of the published PyTorch checkpoints, so a
state dict is a file's contents, filters included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpdne_cli.networks.filtered import CHANNELS, FilteredLrelu, filtered_lrelu, lowpass
from tpdne_cli.networks.ops import SQRT2, FullyConnected, MappingNetwork, constant, conv2d, linear, normal
from tpdne_cli.networks.winograd import LEAST_CHANNELS, Winograd

Noise = str | Callable[[int, int], Tensor]


@dataclass(frozen=True)
class LayerGeometry:
    """What one layer does to the signal: rates and frequencies in cycles per unit, the image being one unit wide."""

    name: str
    in_channels: int
    out_channels: int
    in_size: int
    out_size: int
    in_rate: int
    out_rate: int
    in_cutoff: float
    out_cutoff: float
    in_half_width: float  # half of the filters' transition bands
    out_half_width: float
    is_torgb: bool
    kernel: int
    lrelu_upsampling: int
    filter_size: int
    radial: bool  # the downsampling filter

    @property
    def high_rate(self) -> int:
        """The rate at which the non-linearity acts."""
        return max(self.in_rate, self.out_rate) * (1 if self.is_torgb else self.lrelu_upsampling)

    @property
    def up(self) -> int:
        return self.high_rate // self.in_rate

    @property
    def down(self) -> int:
        return self.high_rate // self.out_rate

    @property
    def up_taps(self) -> int:
        return self.filter_size * self.up if self.up > 1 and not self.is_torgb else 1

    @property
    def down_taps(self) -> int:
        return self.filter_size * self.down if self.down > 1 and not self.is_torgb else 1

    @property
    def is_separable_resampling(self) -> bool:
        """Whether FilteredLrelu can serve."""
        return self.up_taps > 1 and self.down_taps > 1 and self.up % self.down == 0

    @property
    def conv_size(self) -> int:
        """Side of the convolution's output, which is padded in full."""
        return self.in_size + self.kernel - 1

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """x0, x1, y0, y1 at the high rate: what makes the output out_size wide, and keeps the image's centre."""
        total = (self.out_size - 1) * self.down + 1 - self.conv_size * self.up + self.up_taps + self.down_taps - 2
        low = (total + self.up) // 2
        return low, total - low, low, total - low


@dataclass(frozen=True)
class Config:
    """The generator. Every field can be read from a published checkpoint; the defaults are configuration T."""

    resolution: int
    z_dim: int = 512
    w_dim: int = 512
    c_dim: int = 0  # number of classes, 0: unconditional
    img_channels: int = 3
    mapping_layers: int = 2
    mapping_lr_multiplier: float = 0.01
    channel_base: int = 32768
    channel_max: int = 512
    num_layers: int = 14  # without torgb
    num_critical: int = 2  # layers at the end without a margin in frequency
    first_cutoff: float = 2.0
    first_stopband: float = 2**2.1
    last_stopband_rel: float = 2**0.3  # of the last cutoff
    margin_size: int = 10  # samples around the image
    output_scale: float = 0.25
    conv_kernel: int = 3  # 1 in configuration R
    filter_size: int = 6  # taps per sample of the lower rate
    lrelu_upsampling: int = 2
    use_radial_filters: bool = False  # True in configuration R
    conv_clamp: float | None = 256.0

    @property
    def num_ws(self) -> int:
        return self.num_layers + 2

    @cached_property
    def layers(self) -> tuple[LayerGeometry, ...]:
        """All layers and torgb, by the geometric progressions of appendix C. Raises ValueError for impossible ones."""
        if not 0 < self.num_critical < self.num_layers <= 64:
            raise ValueError(f"StyleGAN3 has no {self.num_layers} layers of which {self.num_critical} are critical")
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise ValueError(f"StyleGAN3 images measure a power of two from 8 on, not {self.resolution}")
        steps = [min(i / (self.num_layers - self.num_critical), 1) for i in range(self.num_layers + 1)]
        last_cutoff = self.resolution / 2
        last_stopband = last_cutoff * self.last_stopband_rel
        cutoffs = [self.first_cutoff * (last_cutoff / self.first_cutoff) ** t for t in steps]
        stopbands = [self.first_stopband * (last_stopband / self.first_stopband) ** t for t in steps]
        rates = [2 ** math.ceil(math.log2(min(2 * f, self.resolution))) for f in stopbands]
        half_widths = [max(f, s / 2) - c for c, f, s in zip(cutoffs, stopbands, rates, strict=True)]
        sizes = [s + 2 * self.margin_size for s in rates[:-2]] + [self.resolution] * 2
        channels = [round(min(self.channel_base / 2 / c, self.channel_max)) for c in cutoffs[:-1]] + [self.img_channels]
        layers = []
        for i in range(self.num_layers + 1):
            last, before = i == self.num_layers, max(i - 1, 0)
            layers.append(
                LayerGeometry(
                    f"L{i}_{sizes[i]}_{channels[i]}", channels[before], channels[i], sizes[before], sizes[i],
                    rates[before], rates[i], cutoffs[before], cutoffs[i], half_widths[before], half_widths[i],
                    is_torgb=last, kernel=1 if last else self.conv_kernel, lrelu_upsampling=self.lrelu_upsampling,
                    filter_size=self.filter_size,
                    radial=self.use_radial_filters and i < self.num_layers - self.num_critical,
                )
            )  # fmt: skip
        return tuple(layers)


def inverse_transform(rotate: float = 0.0, tx: float = 0.0, ty: float = 0.0) -> Tensor:
    """The [3, 3] matrix for `synthesis.input.transform` that turns the image by `rotate` degrees and then moves it.

    tx and ty count image widths. The network looks up each output position in its input: hence the inverse.
    """
    a = math.radians(rotate)
    forward = [[math.cos(a), math.sin(a), tx], [-math.sin(a), math.cos(a), ty], [0, 0, 1]]
    inverse: Tensor = torch.linalg.inv(torch.tensor(forward, dtype=torch.float64))
    return inverse.to(torch.float32)


class SynthesisInput(nn.Module):
    """Fourier features of random frequencies, turned and shifted by w and by the user (section 3.1, appendix F)."""

    freqs: Tensor
    phases: Tensor
    transform: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        first = config.layers[0]
        channels = first.in_channels
        self.size, self.rate, self.bandwidth = first.in_size, first.in_rate, first.in_cutoff
        freqs, phases = normal(channels, 2), constant(channels)
        if not freqs.is_meta:  # nothing to compute there; see ops.normal
            phases = torch.rand(channels) - 0.5
            radii = freqs.square().sum(1, keepdim=True).sqrt()
            freqs = freqs / (radii * radii.square().exp().pow(0.25)) * self.bandwidth  # even density over the disc
        self.weight = nn.Parameter(normal(channels, channels))
        self.affine = FullyConnected(config.w_dim, 4)
        nn.init.zeros_(self.affine.weight)
        self.affine.bias.data = torch.tensor([1.0, 0.0, 0.0, 0.0])  # no rotation, no translation
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", phases)
        self.register_buffer("transform", torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]))

    def transforms(self, w: Tensor) -> Tensor:
        """w's rotation after w's translation after the user's transform: [N, w_dim] -> [N, 3, 3]."""
        t = self.affine(w)  # [N, 4]: cosine, sine, x, y
        t = t / t[:, :2].norm(dim=1, keepdim=True)
        cos, sin, x, y = t.unbind(1)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        turn = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], 1).view(-1, 3, 3)
        move = torch.stack([one, zero, -x, zero, one, -y, zero, zero, one], 1).view(-1, 3, 3)
        return turn @ move @ self.transform

    def forward(self, w: Tensor) -> Tensor:  # [N, w_dim] -> [N, C, size, size], in channels_last order
        m = self.transforms(w)
        phases = self.phases + (self.freqs @ m[:, :2, 2:]).squeeze(2)  # [N, C]
        freqs = self.freqs @ m[:, :2, :2]  # [N, C, 2]
        # A transform may carry a frequency out of the band; it fades before it would alias.
        excess = (freqs.norm(dim=2) - self.bandwidth) / (self.rate / 2 - self.bandwidth)
        amplitudes = (1 - excess).clamp(0, 1)  # [N, C]
        at = (torch.arange(self.size, device=w.device) + 0.5 - self.size / 2) / self.rate
        grid = torch.stack([at.expand(self.size, -1), at[:, None].expand(-1, self.size)], 2)  # [H, W, (x, y)]
        x = grid @ freqs.transpose(1, 2)[:, None] + phases[:, None, None]  # [N, H, W, C]
        x = torch.sin(x * (2 * math.pi)) * amplitudes[:, None, None]
        # As a convolution, not as one large product: see Winograd.tiles.
        return conv2d(x.permute(0, 3, 1, 2), (self.weight / math.sqrt(len(self.weight)))[:, :, None, None])


@dataclass
class Prepared:
    """What generation on a CPU needs of a layer; channels are padded to multiples of 16, with zeros."""

    weight: Tensor | Winograd  # [O', I', k, k]
    squares: Tensor  # [O, I], sums over the kernel
    bias: Tensor  # [O']
    padding: int  # of the convolution
    filtered: FilteredLrelu | None


class SynthesisLayer(nn.Module):
    """Modulated convolution and filtered non-linearity; or torgb, which has neither demodulation nor filters."""

    magnitude_ema: Tensor
    up_filter: Tensor | None
    down_filter: Tensor | None

    def __init__(self, geometry: LayerGeometry, config: Config) -> None:
        super().__init__()
        g = self.geometry = geometry
        self.conv_clamp = config.conv_clamp
        self.affine = FullyConnected(config.w_dim, g.in_channels, bias_init=1)
        self.weight = nn.Parameter(normal(g.out_channels, g.in_channels, g.kernel, g.kernel))
        self.bias = nn.Parameter(constant(g.out_channels))
        self.register_buffer("magnitude_ema", constant(value=1))  # mean square of the input, seen in training
        up_filter = down_filter = None
        if g.up_taps > 1:
            up_filter = lowpass(g.up_taps, g.in_cutoff, g.in_half_width * 2, g.high_rate)
        if g.down_taps > 1:
            down_filter = lowpass(g.down_taps, g.out_cutoff, g.out_half_width * 2, g.high_rate, g.radial)
        self.register_buffer("up_filter", up_filter)
        self.register_buffer("down_filter", down_filter)
        self.prepared: Prepared | None = None

    def normal_weight(self) -> Tensor:
        """The kernels [O, I, k, k], of mean square one per output channel where they are demodulated."""
        if self.geometry.is_torgb:
            return self.weight / math.sqrt(self.geometry.in_channels * self.geometry.kernel**2)
        return self.weight * self.weight.square().mean([1, 2, 3], keepdim=True).rsqrt()

    def prepare(self) -> None:
        """Normalise, pad and lay out once what generation would otherwise repeat for every image."""
        g, weight = self.geometry, self.normal_weight().detach()
        squares = weight.square().sum([2, 3])
        more_in, more_out = -g.in_channels % CHANNELS, 0 if g.is_torgb else -g.out_channels % CHANNELS
        weight = F.pad(weight, [0, 0, 0, 0, 0, more_in, 0, more_out])
        bias, crop, filtered = F.pad(self.bias.detach(), [0, more_out]), 0, None
        if g.is_separable_resampling and weight.device.type == "cpu":
            assert self.up_filter is not None and self.down_filter is not None
            # Where the padding is negative, the convolution leaves out what would be cropped from its result.
            crop = max(min(-(g.padding[0] // g.up), -g.padding[1] // g.up, g.kernel - 1), 0)
            filtered = FilteredLrelu(
                self.up_filter, self.down_filter, g.up, g.down, g.padding[0] + crop * g.up, g.conv_size - 2 * crop,
                g.out_size, self.conv_clamp,
            )  # fmt: skip
        wide = g.kernel == 3 and min(weight.shape[:2]) >= LEAST_CHANNELS and filtered is not None
        shared = Winograd(weight) if wide else weight.contiguous(memory_format=torch.channels_last)
        self.prepared = Prepared(shared, squares, bias, g.kernel - 1 - crop, filtered)

    def modulation(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Factors of the input channels [N, I] and of the output channels [N, O], on both sides of shared weights."""
        style, gain = self.affine(w), self.magnitude_ema.rsqrt()
        if self.geometry.is_torgb:
            return style * gain, None
        # Per image, where the published code takes the whole batch: demodulation undoes either, but for its epsilon.
        style = style * style.square().mean(1, keepdim=True).rsqrt()
        squares = self.normal_weight().square().sum([2, 3]) if self.prepared is None else self.prepared.squares
        return style * gain, (linear(style.square(), squares) + 1e-8).rsqrt()

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # [N, I, H, W], [N, w_dim] -> [N, O, H', W']
        g, (style, demod) = self.geometry, self.modulation(w)
        x = x * style.to(x.dtype)[:, :, None, None]
        x = F.conv2d(x, self.normal_weight().to(x.dtype), padding=g.kernel - 1)
        x = x if demod is None else x * demod.to(x.dtype)[:, :, None, None]
        gain, slope = (1.0, 1.0) if g.is_torgb else (SQRT2, 0.2)
        return filtered_lrelu(
            x, self.up_filter, self.down_filter, self.bias, g.up, g.down, g.padding, gain, slope, self.conv_clamp
        )

    def generate(self, x: Tensor, demod: Tensor | None, out_scale: Tensor | float) -> Tensor:
        """forward for one image on a CPU, input already times its style, output times the next layer's.

        x: [1, I', H, W], demod: [O'], out_scale: [O'] -> [1, O', H', W'], all in channels_last order.
        """
        assert self.prepared is not None
        p = self.prepared
        x = p.weight(x, p.padding) if isinstance(p.weight, Winograd) else conv2d(x, p.weight, padding=p.padding)
        if p.filtered is not None:
            assert demod is not None and isinstance(out_scale, Tensor)
            return p.filtered(x, demod, p.bias, out_scale)
        x = x + p.bias[:, None, None]
        x = x if self.conv_clamp is None else x.clamp_(-self.conv_clamp, self.conv_clamp)
        return x * out_scale


class SynthesisNetwork(nn.Module):
    """ws -> image. set_precision chooses the type of the convolutions and filters; styles and image stay float32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dtype = config, torch.float32
        self.input = SynthesisInput(config)
        for geometry in config.layers:
            self.add_module(geometry.name, SynthesisLayer(geometry, config))

    @property
    def layers(self) -> list[SynthesisLayer]:
        return [module for module in self.children() if isinstance(module, SynthesisLayer)]

    def set_precision(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def can_generate(self, ws: Tensor) -> bool:
        """Whether the fast path serves: prepared layers that all resample, a CPU, float32, no autograd."""
        plain = ws.device.type != "cpu" or self.dtype != torch.float32 or torch.is_grad_enabled()
        return not plain and all(
            layer.prepared is not None and (layer.prepared.filtered is not None or layer.geometry.is_torgb)
            for layer in self.layers
        )

    def forward(self, ws: Tensor, noise: Noise = "const") -> Tensor:  # [N, num_ws, w_dim] -> [N, C, R, R]
        """StyleGAN3 has no noise; the argument is there for callers of any network."""
        del noise
        ws = ws.to(torch.float32)
        if self.can_generate(ws):
            return torch.cat([self.generate(ws[i : i + 1]) for i in range(len(ws))])
        x: Tensor = self.input(ws[:, 0]).to(self.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, ws[:, i + 1])
        return x.to(torch.float32) * self.config.output_scale

    def generate(self, ws: Tensor) -> Tensor:  # [1, num_ws, w_dim] -> [1, C, R, R]
        """forward for one image: it fills the caches by itself, and a row that is alone cannot depend on others."""
        layers = self.layers
        factors = [layer.modulation(ws[:, i + 1]) for i, layer in enumerate(layers)]
        scales: list[Tensor | float] = [pad_channels(style[0]) for style, _ in factors]
        x = self.input(ws[:, 0]) * factors[0][0][:, :, None, None]
        x = F.pad(x, [0, 0, 0, 0, 0, -x.shape[1] % CHANNELS]).contiguous(memory_format=torch.channels_last)
        for layer, (_, demod), out_scale in zip(layers, factors, [*scales[1:], self.config.output_scale], strict=True):
            x = layer.generate(x, None if demod is None else pad_channels(demod[0]), out_scale)
        return x


def pad_channels(v: Tensor) -> Tensor:
    return F.pad(v, [0, -len(v) % CHANNELS])


class Generator(nn.Module):
    """z -> image: [N, z_dim] (and labels [N, c_dim]) -> [N, C, R, R] in nominal range [-1, 1]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.num_ws = config, config.num_ws
        self.mapping = MappingNetwork(
            config.z_dim, config.c_dim, config.w_dim, config.num_ws, config.mapping_layers,
            lr_multiplier=config.mapping_lr_multiplier,
        )  # fmt: skip
        self.synthesis = SynthesisNetwork(config)

    def forward(
        self, z: Tensor, c: Tensor | None = None, psi: float = 1.0, cutoff: int | None = None, noise: Noise = "const"
    ) -> Tensor:
        image: Tensor = self.synthesis(self.mapping(z, c, psi, cutoff), noise)
        return image
