"""The discriminator of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958): the network that says what looks real.

Parameters and buffers bear the names of the published PyTorch checkpoints, so a state dict is a file's contents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tpdne_cli.networks.ops import FullyConnected, MappingNetwork, downsample2d, setup_filter
from tpdne_cli.networks.stylegan2 import Channels, Conv2dLayer, resolutions

FEATURES_FROM = 16  # px; the last block whose output tells what is broken: see Typical in critic.py


@dataclass(frozen=True)
class DiscriminatorConfig(Channels):
    """The discriminator."""

    c_dim: int = 0
    img_channels: int = 3
    architecture: str = "resnet"
    resample_filter: tuple[float, ...] = (1, 3, 3, 1)
    conv_clamp: float | None = None
    mbstd_group_size: int | None = 4  # None: the whole batch
    mbstd_channels: int = 1
    cmap_dim: int | None = None  # width of the label projection; None: that of the last layer
    mapping_layers: int = 8

    LEAST_MAPPING: ClassVar[int] = 0  # NVIDIA's converted ones project on the label's embedding itself

    @property
    def features(self) -> int:
        """How many numbers Discriminator.features gives for an image."""
        return self.width(min(FEATURES_FROM, self.resolution) // 2)


class DiscriminatorBlock(nn.Module):
    """All layers of one resolution; conv1 halves the size."""

    resample_filter: Tensor

    def __init__(self, resolution: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.architecture = config.architecture
        channels, above = config.width(resolution), config.width(resolution // 2)
        self.register_buffer("resample_filter", setup_filter(config.resample_filter))
        self.has_fromrgb = resolution == config.resolution or config.architecture == "skip"
        if self.has_fromrgb:
            self.fromrgb = Conv2dLayer(config.img_channels, channels, 1, config)
        self.conv0 = Conv2dLayer(channels, channels, 3, config)
        self.conv1 = Conv2dLayer(channels, above, 3, config, down=2)
        if config.architecture == "resnet":
            self.skip = Conv2dLayer(channels, above, 1, config, activation="linear", bias=False, down=2)

    def forward(self, x: Tensor | None, img: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # x: [N, I, R, R], img: [N, C, R, R] -> ([N, O, R/2, R/2], [N, C, R/2, R/2])
        if self.has_fromrgb:
            y = self.fromrgb(img.to(dtype).contiguous(memory_format=torch.channels_last))
            x = y if x is None else x + y
            img = downsample2d(img, self.resample_filter) if self.architecture == "skip" else img
        assert x is not None
        if self.architecture == "resnet":
            y = self.skip(x, gain=math.sqrt(0.5))
            return y + self.conv1(self.conv0(x), gain=math.sqrt(0.5)), img
        return self.conv1(self.conv0(x)), img


def minibatch_std(x: Tensor, group_size: int | None, channels: int) -> Tensor:
    """Append the standard deviation over groups of images as feature maps (1710.10196, section 3)."""
    n, c, h, w = x.shape
    group = n if group_size is None else min(group_size, n)
    y = x.reshape(group, -1, channels, c // channels, h, w)  # [G, n, F, c, H, W]
    y = (y - y.mean(0)).square().mean(0)
    y = (y + 1e-8).sqrt().mean([2, 3, 4])  # [n, F]
    return torch.cat([x, y.reshape(-1, channels, 1, 1).repeat(group, 1, h, w)], 1)


class DiscriminatorEpilogue(nn.Module):
    """4x4 features -> logits (or the vector that a label is projected on); float32."""

    def __init__(self, config: DiscriminatorConfig, cmap_dim: int) -> None:
        super().__init__()
        channels = config.width(4)
        self.architecture = config.architecture
        self.group, self.std_channels = config.mbstd_group_size, config.mbstd_channels
        if config.architecture == "skip":
            self.fromrgb = Conv2dLayer(config.img_channels, channels, 1, config)
        self.conv = Conv2dLayer(channels + config.mbstd_channels, channels, 3, config)
        self.fc = FullyConnected(channels * 16, channels, "lrelu")
        self.out = FullyConnected(channels, cmap_dim or 1)

    def forward(self, x: Tensor, img: Tensor) -> Tensor:  # [N, I, 4, 4] -> [N, 1 or cmap_dim]
        x = x.to(torch.float32)
        if self.architecture == "skip":
            x = x + self.fromrgb(img)
        if self.std_channels:
            x = minibatch_std(x, self.group, self.std_channels)
        logits: Tensor = self.out(self.fc(self.conv(x).flatten(1)))
        return logits


class Discriminator(nn.Module):
    """image -> logit: [N, C, R, R] (and labels [N, c_dim]) -> [N, 1], high for what looks like the training data."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config, self.dtype = config, torch.float32
        self.cmap_dim = (config.cmap_dim or config.width(4)) if config.c_dim else 0
        for resolution in reversed(resolutions(config.resolution)[1:]):
            self.add_module(f"b{resolution}", DiscriminatorBlock(resolution, config))
        self.b4 = DiscriminatorEpilogue(config, self.cmap_dim)
        if config.c_dim:
            self.mapping = MappingNetwork(0, config.c_dim, self.cmap_dim, None, config.mapping_layers)

    def set_precision(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        x, img = self._blocks(img, lowest=8)
        logits: Tensor = self.b4(x, img)
        if self.config.c_dim:  # projection (1802.05637)
            logits = (logits * self.mapping(None, c)).sum(1, keepdim=True) / math.sqrt(self.cmap_dim)
        return logits

    def features(self, img: Tensor) -> Tensor:
        """What the blocks down to 16 px make of images: spatial means, [N, C, R, R] -> [N, config.features] float32."""
        x, _ = self._blocks(img, FEATURES_FROM)
        means: Tensor = x.float().mean([2, 3])
        return means

    def _blocks(self, img: Tensor, lowest: int) -> tuple[Any, Tensor]:
        x = None
        for resolution in reversed(resolutions(self.config.resolution)[1:]):
            if resolution >= lowest or x is None:
                x, img = self.get_submodule(f"b{resolution}")(x, img, self.dtype)
        return x, img
