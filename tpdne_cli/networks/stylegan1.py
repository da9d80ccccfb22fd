"""StyleGAN (Karras et al. 2019, arXiv 1812.04948), the generator at its final resolution.

There never was a PyTorch checkpoint of NVIDIA's, so the names here follow those of StyleGAN2: b{r} is a resolution,
conv0 doubles the size, conv1 refines. Kernels are stored at unit variance. Differences to the TensorFlow files, which a
reader of them smooths out: every conv0 is nearest-neighbour upsampling and a correlation (TensorFlow's layers from
128 px on convolve), affine biases hold the 1 that is added to a scale, and mapping biases are divided by the gain
sqrt(2) that stands behind our activations and before theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpdne_cli.networks.ops import (
    SQRT2,
    FullyConnected,
    MappingNetwork,
    constant,
    conv2d,
    conv_transpose2d,
    normal,
    setup_filter,
    upfirdn2d,
)  # fmt: skip
from tpdne_cli.networks.stylegan2 import NOISE_MODES, Channels, Noise, resolutions


@dataclass(frozen=True)
class Config(Channels):
    """The generator. Every field can be read from a published checkpoint."""

    channel_base: int = 16384
    z_dim: int = 512
    w_dim: int = 512
    c_dim: int = 0  # no conditional generator was published
    img_channels: int = 3
    mapping_layers: int = 8
    mapping_features: int | None = None  # hidden width of the mapping network; None: w_dim
    mapping_lr_multiplier: float = 0.01
    blur_filter: tuple[float, ...] = (1, 2, 1)
    use_noise: bool = True

    @property
    def num_ws(self) -> int:
        return 2 * int(math.log2(self.resolution)) - 2


class Epilogue(nn.Module):
    """Noise, bias, leaky ReLU, and adaptive instance normalisation (section 2 and eq. 1)."""

    noise_const: Tensor

    def __init__(self, channels: int, resolution: int, config: Config) -> None:
        super().__init__()
        self.resolution, self.use_noise = resolution, config.use_noise
        self.bias = nn.Parameter(constant(channels))
        self.affine = FullyConnected(config.w_dim, 2 * channels)  # scales, shifts
        self.affine.bias = nn.Parameter(torch.cat([constant(channels, value=1), constant(channels)]))
        if config.use_noise:
            self.register_buffer("noise_const", normal(resolution, resolution))
            self.noise_strength = nn.Parameter(constant(channels))

    def noise(self, n: int, noise: Noise, device: torch.device) -> Tensor | None:
        """The noise image times each channel's strength, [n or 1, C, R, R]."""
        if isinstance(noise, str) and noise not in NOISE_MODES:
            raise ValueError(f"noise mode {noise!r} is none of {NOISE_MODES}")
        if not self.use_noise or noise == "none":
            return None
        size = self.resolution
        if noise == "const":
            image = self.noise_const[None, None]
        else:
            image = torch.randn(n, 1, size, size, device=device) if isinstance(noise, str) else noise(size, size)
        return image * self.noise_strength[:, None, None]

    def epilogue(self, x: Tensor, w: Tensor, noise: Noise) -> Tensor:  # [N, C, R, R], [N, w_dim] -> [N, C, R, R]
        x = x.to(torch.float32)
        noise_image = self.noise(len(x), noise, x.device)
        x = x if noise_image is None else x + noise_image
        x = F.leaky_relu_(x + self.bias[:, None, None], 0.2)
        x = x - spatial_mean(x)
        scale, shift = self.affine(w)[:, :, None, None].chunk(2, 1)  # [N, C, 1, 1] each
        return torch.addcmul(shift, x, scale * (spatial_mean(x.square()) + 1e-8).rsqrt())


def spatial_mean(x: Tensor) -> Tensor:
    """[N, C, R, R] -> [N, C, 1, 1]; pooling adds up each window in one order, whatever the batch or the threads."""
    while x.shape[2] > 1:
        x = F.avg_pool2d(x, min(x.shape[2], 32))
    return x


class SynthesisLayer(Epilogue):
    """3x3 convolution at equalised learning rate, or nearest-neighbour upsampling, convolution and blur; epilogue."""

    def __init__(self, in_channels: int, out_channels: int, resolution: int, up: int, config: Config) -> None:
        super().__init__(out_channels, resolution, config)
        self.up = up
        self.weight = nn.Parameter(normal(out_channels, in_channels, 3, 3))
        self.weight_gain = SQRT2 / math.sqrt(in_channels * 9)
        self.blur_filter = config.blur_filter
        self.prepared: Tensor | None = None

    def prepare(self) -> None:
        self.prepared = self.kernel().detach().contiguous(memory_format=torch.channels_last)

    def kernel(self) -> Tensor:
        """The convolution's kernel [O, I, 3, 3], or that of the transposed one, [I, O, 3, 3]."""
        w = self.weight * self.weight_gain
        return w if self.up == 1 else w.flip([2, 3]).transpose(0, 1)

    def forward(self, x: Tensor, w: Tensor, noise: Noise = "const") -> Tensor:
        # x: [N, I, R/up, R/up], w: [N, w_dim] -> [N, O, R, R]
        kernel = (self.kernel() if self.prepared is None else self.prepared).to(x.dtype)
        if self.up == 1:
            x = conv2d(x, kernel, padding=1)
        else:
            # Repeating a sample twice is zero insertion and a box; the box can go behind the convolution.
            x = upfirdn2d(conv_transpose2d(x, kernel, stride=2), x.new_ones(2, 2))
            before, after = len(self.blur_filter) // 2, (len(self.blur_filter) - 1) // 2
            x = upfirdn2d(x, setup_filter(self.blur_filter).to(x), padding=(before, after, before, after))
        return self.epilogue(x, w, noise)


class ConstLayer(Epilogue):
    """The learned input's epilogue; it has no convolution."""

    def forward(self, x: Tensor, w: Tensor, noise: Noise = "const") -> Tensor:
        return self.epilogue(x, w, noise)


class ToRGB(nn.Module):
    """1x1 convolution to the image's channels, without activation."""

    def __init__(self, in_channels: int, img_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(constant(img_channels))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor) -> Tensor:  # [N, I, R, R] -> [N, C, R, R]
        return conv2d(x, self.weight * self.weight_gain) + self.bias[:, None, None]


class SynthesisBlock(nn.Module):
    """All layers of one resolution; torgb only at the last one."""

    def __init__(self, resolution: int, config: Config) -> None:
        super().__init__()
        channels = config.width(resolution)
        if resolution == 4:
            self.const = nn.Parameter(constant(channels, 4, 4, value=1))
            self.conv0: nn.Module = ConstLayer(channels, 4, config)
        else:
            self.conv0 = SynthesisLayer(config.width(resolution // 2), channels, resolution, up=2, config=config)
        self.conv1 = SynthesisLayer(channels, channels, resolution, up=1, config=config)
        if resolution == config.resolution:
            self.torgb = ToRGB(channels, config.img_channels)

    def forward(self, x: Tensor | None, ws: Tensor, dtype: torch.dtype, noise: Noise) -> Tensor:
        # x: [N, I, R/2, R/2] or None, ws: [N, 2, w_dim] -> [N, O, R, R]
        if x is None:
            x = self.const.expand(len(ws), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        x = self.conv0(x.to(dtype), ws[:, 0], noise)
        y: Tensor = self.conv1(x.to(dtype), ws[:, 1], noise)
        return y


class SynthesisNetwork(nn.Module):
    """ws -> image. set_precision chooses the type of the convolutions; everything else is float32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dtype = config, torch.float32
        for resolution in resolutions(config.resolution):
            self.add_module(f"b{resolution}", SynthesisBlock(resolution, config))

    def set_precision(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def forward(self, ws: Tensor, noise: Noise = "const") -> Tensor:  # [N, num_ws, w_dim] -> [N, C, R, R]
        ws, x = ws.to(torch.float32), None
        for i, resolution in enumerate(resolutions(self.config.resolution)):
            block = self.get_submodule(f"b{resolution}")
            x = block(x, ws[:, 2 * i : 2 * i + 2], self.dtype, noise)
        image: Tensor = self.get_submodule(f"b{self.config.resolution}.torgb")(x)
        return image


class Generator(nn.Module):
    """z -> image: [N, z_dim] -> [N, C, R, R] in nominal range [-1, 1]. Published settings: psi 0.7, cutoff 8."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.num_ws = config, config.num_ws
        self.mapping = MappingNetwork(
            config.z_dim, config.c_dim, config.w_dim, config.num_ws, config.mapping_layers,
            config.mapping_features, lr_multiplier=config.mapping_lr_multiplier,
        )  # fmt: skip
        self.synthesis = SynthesisNetwork(config)

    def forward(
        self, z: Tensor, c: Tensor | None = None, psi: float = 1.0, cutoff: int | None = None, noise: Noise = "const"
    ) -> Tensor:
        image: Tensor = self.synthesis(self.mapping(z, c, psi, cutoff), noise)
        return image
