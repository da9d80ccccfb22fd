"""StyleGAN2 (Karras et al. 2020, arXiv 1912.04958), the generator; discriminator.py holds the other network.

Parameters and buffers bear the names of the published PyTorch checkpoints, so a state dict is a file's contents.

One form of modulated convolution serves training, generation and every batch size: instead of scaling the weights for
each image (eq. 1) and normalising them (eq. 3), the input is scaled by the style, convolved with the weights that all
images share, and scaled again by the demodulation factor. The results are equal; a batch is one dense convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpdne_cli.networks import strips
from tpdne_cli.networks.ops import (
    SQRT2,
    FullyConnected,
    MappingNetwork,
    bias_act,
    clamp_,
    constant,
    conv2d,
    conv2d_resample,
    linear,
    normal,
    setup_filter,
    upsample2d,
)

if TYPE_CHECKING:
    from tpdne_cli.networks.discriminator import DiscriminatorConfig

NOISE_MODES = ("const", "random", "none")
Noise = str | Callable[[int, int], Tensor]  # a mode, or a source of noise images [N, 1, height, width] in layer order
UNUSED_FILTER = (1, 3, 3, 1)
ONE_BY_ONE = 64  # pixels: below, a layer's weights are more than an image, and all images of a batch meet them in turn


def resolutions(top: int) -> list[int]:
    """4, 8, ..., top."""
    return [2**i for i in range(2, int(math.log2(top)) + 1)]


@dataclass(frozen=True)
class Channels:
    """Feature maps per resolution: min(channel_base / resolution, channel_max), or a list for 4, 8, ..., R."""

    resolution: int
    channel_base: int = 32768
    channel_max: int = 512
    channels: tuple[int, ...] | None = None

    LEAST_MAPPING: ClassVar[int] = 1  # layers

    def __post_init__(self) -> None:
        """Refuse what no network can be: descriptions come out of files that anybody may have written."""
        if self.resolution not in (4 << i for i in range(1, 12)):
            raise ValueError(f"resolution {self.resolution} is not a power of two from 8 to 8192")
        if self.channels is not None and len(self.channels) != len(resolutions(self.resolution)):
            raise ValueError(f"{len(self.channels)} channel counts for {len(resolutions(self.resolution))} resolutions")
        if not self.LEAST_MAPPING <= getattr(self, "mapping_layers", 8) <= 64:
            raise ValueError(f"the mapping network has between {self.LEAST_MAPPING} and 64 layers")

    def width(self, resolution: int) -> int:
        if self.channels is not None:
            return self.channels[int(math.log2(resolution)) - 2]
        return min(self.channel_base // resolution, self.channel_max)


@dataclass(frozen=True)
class Config(Channels):
    """The generator. Every field can be read from a published checkpoint."""

    z_dim: int = 512
    w_dim: int = 512
    c_dim: int = 0  # number of classes, 0: unconditional
    img_channels: int = 3
    mapping_layers: int = 8
    mapping_features: int | None = None  # hidden width of the mapping network; None: w_dim
    embed_features: int | None = None  # width of the label embedding; None: w_dim
    mapping_lr_multiplier: float = 0.01
    architecture: str = "skip"  # skip | resnet | orig (fig. 7)
    resample_filter: tuple[float, ...] = (1, 3, 3, 1)
    conv_clamp: float | None = None
    use_noise: bool = True

    @property
    def num_ws(self) -> int:
        return 2 * int(math.log2(self.resolution)) - 2


class ModulatedConv(nn.Module):
    """What SynthesisLayer and ToRGB share: a weight, and a style that scales its input channels (section 2.2)."""

    resample_filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, kernel: int) -> None:
        super().__init__()
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(normal(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(constant(out_channels))
        self.prepared: tuple[Tensor, Tensor] | None = None  # weight as the convolution likes it, sums of its squares

    def squares(self) -> Tensor:  # of the weight, summed over the kernel: [O, I]
        return self.weight.square().sum([2, 3])

    def prepare(self) -> None:
        weight = self.weight.detach().contiguous(memory_format=torch.channels_last)
        self.prepared = (weight, self.squares().detach())

    def weight_and_squares(self) -> tuple[Tensor, Tensor]:
        return self.prepared or (self.weight, self.squares())  # [O, I, k, k], [O, I]


class SynthesisLayer(ModulatedConv):
    """Modulated 3x3 convolution, optional upsampling before it, noise, bias, leaky ReLU."""

    noise_const: Tensor

    def __init__(self, in_channels: int, out_channels: int, resolution: int, up: int, config: Config) -> None:
        super().__init__(in_channels, out_channels, config.w_dim, kernel=3)
        self.resolution, self.up, self.conv_clamp, self.use_noise = resolution, up, config.conv_clamp, config.use_noise
        # Layers that do not resample keep the default filter in the published files, unused.
        self.register_buffer("resample_filter", setup_filter(config.resample_filter if up > 1 else UNUSED_FILTER))
        if config.use_noise:
            self.register_buffer("noise_const", normal(resolution, resolution))
            self.noise_strength = nn.Parameter(constant())
        self.alone: strips.Layer | None = None  # computes one image, for generation on a CPU

    def prepare(self) -> None:
        taps = self.resample_filter if self.up > 1 else None
        self.alone = strips.layer(self.weight.detach(), self.resolution, taps)
        if self.alone is not None:  # keeps weights of its own
            self.prepared = (self.weight.detach(), self.squares().detach())
            return
        super().prepare()
        if self.up > 1:  # the transposed convolution wants its inputs first
            assert self.prepared is not None
            weight, squares = self.prepared
            by_input = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)
            self.prepared = (by_input.transpose(0, 1), squares)

    def noise(self, n: int, noise: Noise, device: torch.device) -> Tensor | None:
        """The noise image times its strength, [n or 1, 1, R, R]."""
        if isinstance(noise, str) and noise not in NOISE_MODES:
            raise ValueError(f"noise mode {noise!r} is none of {NOISE_MODES}")
        if not self.use_noise or noise == "none":
            return None
        if noise == "const":
            return self.noise_const[None, None] * self.noise_strength
        size = self.resolution
        image = torch.randn(n, 1, size, size, device=device) if isinstance(noise, str) else noise(size, size)
        return image * self.noise_strength

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None, gain: float = 1.0) -> Tensor:
        # x: [N, I, H, W], w: [N, w_dim], noise: [N or 1, 1, up*H, up*W] -> [N, O, up*H, up*W]
        weight, squares = self.weight_and_squares()
        style = self.affine(w)  # [N, I]
        clamp = self.conv_clamp
        if x.dtype == torch.float16:  # its range is short; demodulation takes the scale out again (eq. 3)
            style = style / style.abs().amax(1, keepdim=True)
            clamp = 256.0 if clamp is None else clamp
        # Both the activation's gain and the block's are positive, so they can go ahead of the leaky ReLU.
        gain = SQRT2 * gain
        demod = (linear(style.square(), squares) + 1e-8).rsqrt() * gain  # [N, O], eq. 3
        noise = None if noise is None else (noise * gain).to(x.dtype)
        if self.alone is not None and strips.suits(x):
            x = self.one_by_one(self.alone, x, style, demod, self.bias * gain, noise)
            return x if clamp is None else clamp_(x, clamp * gain / SQRT2)
        x = x * style.to(x.dtype)[:, :, None, None]
        # The checkpoints store kernels such that an upsampling layer convolves and a plain one correlates.
        x = conv2d_resample(
            x, weight.to(x.dtype), self.resample_filter, up=self.up, padding=1, flip_weight=self.up == 1
        )
        bias = (self.bias * gain).to(x.dtype)[None, :, None, None]
        x = torch.addcmul(bias, x, demod.to(x.dtype)[:, :, None, None])
        if noise is not None:
            x.add_(noise)
        x = F.leaky_relu_(x, 0.2)
        return x if clamp is None else clamp_(x, clamp * gain / SQRT2)

    def one_by_one(
        self, compute: strips.Layer, x: Tensor, style: Tensor, demod: Tensor, bias: Tensor, noise: Tensor | None
    ) -> Tensor:
        """The same for one image after the other, on a CPU in float32; x, if it is of that size, is overwritten."""
        n, size = len(x), self.resolution
        images = x.permute(0, 2, 3, 1).contiguous()  # as they lie in memory already
        out = torch.empty(n, size, size, len(bias)) if images.shape[1:] != (size, size, len(bias)) else images
        for i in range(n):
            own = None if noise is None else noise[i % len(noise), 0]
            compute(images[i], style[i], demod[i], bias, own, out[i])
        return out.permute(0, 3, 1, 2)


class ToRGB(ModulatedConv):
    """Modulated 1x1 convolution to the image's channels, without demodulation; always float32 out."""

    def __init__(self, in_channels: int, resolution: int, config: Config) -> None:
        super().__init__(in_channels, config.img_channels, config.w_dim, kernel=1)
        self.weight_gain = 1 / math.sqrt(in_channels)
        self.conv_clamp, self.alone = config.conv_clamp, resolution >= strips.LEAST_SIZE

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # [N, I, H, W], [N, w_dim] -> [N, C, H, W]
        weight, _ = self.weight_and_squares()
        style = self.affine(w) * self.weight_gain
        if self.alone and strips.suits(x):
            x = torch.cat([conv2d(x[i : i + 1], weight * style[i, :, None, None]) for i in range(len(x))])
        elif x.dtype == torch.bfloat16 and torch.is_grad_enabled():
            # In training the critic rounds the image as well. Each image's weights as a matrix: a third of the time.
            n, channels, height, width = x.shape
            own = (weight.flatten(1) * style[:, None]).to(x.dtype)  # [N, C, I]
            x = x.permute(0, 2, 3, 1).reshape(n, -1, channels) @ own.transpose(1, 2)  # [N, H * W, C]
            x = x.to(torch.float32).reshape(n, height, width, -1).permute(0, 3, 1, 2)
        else:
            x = conv2d(x.to(torch.float32) * style[:, :, None, None], weight)
        return bias_act(x, self.bias, clamp=self.conv_clamp)


class Conv2dLayer(nn.Module):
    """Plain convolution with equalised learning rate, resampling, bias and activation."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        config: Config | DiscriminatorConfig,
        activation: str = "lrelu",
        bias: bool = True,
        up: int = 1,
        down: int = 1,
    ) -> None:
        super().__init__()
        self.activation, self.up, self.down, self.padding = activation, up, down, kernel // 2
        self.conv_clamp = config.conv_clamp if bias else None
        self.weight = nn.Parameter(normal(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(constant(out_channels)) if bias else None
        self.weight_gain = 1 / math.sqrt(in_channels * kernel**2)
        resamples = up > 1 or down > 1
        self.register_buffer("resample_filter", setup_filter(config.resample_filter if resamples else UNUSED_FILTER))

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:  # [N, I, H, W] -> [N, O, H', W']
        act_gain = (SQRT2 if self.activation == "lrelu" else 1.0) * gain
        weight = (self.weight * (self.weight_gain * act_gain)).to(x.dtype)
        bias = None if self.bias is None else (self.bias * act_gain).to(x.dtype)
        filters, flip = self.resample_filter, self.up == 1
        x = conv2d_resample(x, weight, filters, self.up, self.down, self.padding, flip, bias)
        if self.activation == "lrelu":
            x = F.leaky_relu_(x, 0.2)
        return x if self.conv_clamp is None else clamp_(x, self.conv_clamp * gain)


class SynthesisBlock(nn.Module):
    """All layers of one resolution (fig. 7): conv0 doubles the size, conv1 refines, torgb adds to the image."""

    resample_filter: Tensor

    def __init__(self, resolution: int, config: Config) -> None:
        super().__init__()
        self.is_first, self.is_last = resolution == 4, resolution == config.resolution
        self.architecture = config.architecture
        channels = config.width(resolution)
        self.register_buffer("resample_filter", setup_filter(config.resample_filter))
        if self.is_first:
            self.const = nn.Parameter(normal(channels, 4, 4))
        else:
            below = config.width(resolution // 2)
            self.conv0 = SynthesisLayer(below, channels, resolution, up=2, config=config)
            if self.architecture == "resnet":
                self.skip = Conv2dLayer(below, channels, 1, config, activation="linear", bias=False, up=2)
        self.conv1 = SynthesisLayer(channels, channels, resolution, up=1, config=config)
        self.has_torgb = self.is_last or self.architecture == "skip"
        if self.has_torgb:
            self.torgb = ToRGB(channels, resolution, config)

    def forward(
        self, x: Tensor | None, img: Tensor | None, ws: Tensor, dtype: torch.dtype, noise: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        # x: [N, I, R/2, R/2], img: [N, C, R/2, R/2], ws: [N, 2 or 3, w_dim] -> ([N, O, R, R], [N, C, R, R])
        if x is None:
            x = self.const.to(dtype).expand(len(ws), -1, -1, -1).contiguous(memory_format=torch.channels_last)
            x = self.conv1(x, ws[:, 0], noise[0])
        elif self.architecture == "resnet":
            y = self.skip(x, gain=math.sqrt(0.5))
            x = y + self.conv1(self.conv0(x, ws[:, 0], noise[0]), ws[:, 1], noise[1], gain=math.sqrt(0.5))
        else:
            x = self.conv1(self.conv0(x, ws[:, 0], noise[0]), ws[:, 1], noise[1])
        if img is not None:
            img = upsample2d(img, self.resample_filter)
        if self.has_torgb:
            rgb = self.torgb(x, ws[:, -1])
            img = rgb if img is None else img + rgb
        return x, img


class SynthesisNetwork(nn.Module):
    """ws -> image. set_precision chooses the type of the convolutions; styles and image stay float32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dtype = config, torch.float32
        for resolution in resolutions(config.resolution):
            self.add_module(f"b{resolution}", SynthesisBlock(resolution, config))

    def set_precision(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def forward(self, ws: Tensor, noise: Noise = "const") -> Tensor:  # [N, num_ws, w_dim] -> [N, C, R, R]
        ws, levels = ws.to(torch.float32), resolutions(self.config.resolution)
        layers = [m for m in self.modules() if isinstance(m, SynthesisLayer)]
        noises = [layer.noise(len(ws), noise, ws.device) for layer in layers]
        alone = self.dtype == torch.float32 and strips.suits(ws) and any(layer.alone for layer in layers)
        if len(ws) == 1 or not alone:
            _, img = self.blocks(levels, None, None, ws, noises)
        else:  # from some size on one image at a time goes through all that follows: memory for one
            low, high = ([r for r in levels if (r >= ONE_BY_ONE) == late] for late in (False, True))
            x, img = self.blocks(low, None, None, ws, noises)
            rows = []
            for i in range(len(ws)):
                own = [n if n is None or len(n) == 1 else n[i : i + 1] for n in noises]
                begun = None if img is None else img[i : i + 1]
                rows.append(self.blocks(high, x[i : i + 1], begun, ws[i : i + 1], own)[1])
            img = torch.cat(rows)
        assert isinstance(img, Tensor)
        return img

    def blocks(
        self, levels: Sequence[int], x: Any, img: Any, ws: Tensor, noises: Sequence[Tensor | None]
    ) -> tuple[Any, Any]:
        """The blocks of some resolutions one after the other; None for what there is not yet."""
        for resolution in levels:
            first = max(2 * int(math.log2(resolution)) - 5, 0)  # layers below
            convs = 1 if resolution == 4 else 2
            noise = noises[first : first + convs]
            # torgb shares its w with the next block's first convolution
            x, img = self.get_submodule(f"b{resolution}")(x, img, ws[:, first : first + convs + 1], self.dtype, noise)
        return x, img


class Generator(nn.Module):
    """z -> image: [N, z_dim] (and labels [N, c_dim]) -> [N, C, R, R] in nominal range [-1, 1]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.num_ws = config, config.num_ws
        widths = (config.mapping_features, config.embed_features, config.mapping_lr_multiplier)
        self.mapping = MappingNetwork(
            config.z_dim, config.c_dim, config.w_dim, config.num_ws, config.mapping_layers, *widths
        )
        self.synthesis = SynthesisNetwork(config)

    def forward(
        self, z: Tensor, c: Tensor | None = None, psi: float = 1.0, cutoff: int | None = None, noise: Noise = "const"
    ) -> Tensor:
        image: Tensor = self.synthesis(self.mapping(z, c, psi, cutoff), noise)
        return image
