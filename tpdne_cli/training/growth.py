"""Networks of a run: built anew, grown to the next resolution, or taken from another generator's file."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from tpdne_cli import models, store
from tpdne_cli.checkpoints import Checkpoint, sniff
from tpdne_cli.errors import TrainingError
from tpdne_cli.networks.discriminator import Discriminator, DiscriminatorConfig
from tpdne_cli.networks.stylegan2 import Config, Generator
from tpdne_cli.training.config import TrainConfig


@dataclasses.dataclass
class Networks:
    """The three networks of a run: generator, its moving average, discriminator.

    images_before: photographs that the weights had seen before this run.
    fresh_critic: whether the discriminator knows nothing of what the generator draws.
    """

    generator: Generator
    ema: Generator
    discriminator: Discriminator
    images_before: int = 0
    fresh_critic: bool = False


def build(config: TrainConfig, resolution: int) -> Networks:
    """Networks with fresh weights for the first stage."""
    generator = Generator(
        Config(
            resolution,
            config.channel_base,
            config.channel_max,
            z_dim=config.z_dim,
            w_dim=config.w_dim,
            mapping_layers=config.mapping_layers,
        )
    )
    discriminator = Discriminator(DiscriminatorConfig(resolution, config.channel_base, config.channel_max))
    return Networks(generator, _frozen_copy(generator), discriminator)


def from_file(path: Path, resolution: int) -> Networks:
    """Networks that begin with another generator's weights, and its critic's where that lies beside it.

    Raises TrainingError where the generator is not a StyleGAN2 of that resolution that draws in colour and without
    classes, CheckpointError for damaged files.
    """
    source = sniff.read(path)
    found = source.config.get("resolution")
    if source.arch != "stylegan2" or found != resolution:
        raise TrainingError(
            f"{path} is a {source.arch} of {found} pixels: begin the schedule with a StyleGAN2 of that size, "
            f"e.g. --schedule {found}."
        )
    for key, wanted, trouble in (("c_dim", 0, "has classes"), ("img_channels", 3, "does not draw in red, green, blue")):
        if source.config.get(key, wanted) != wanted:
            raise TrainingError(f"{path} {trouble}, which training does not know: begin with another generator.")
    generator = Generator(Config(**_tuples(source.config)))
    _load(generator, models.with_mean_w(source, str(path)), path)
    _at_full_strength(generator, source.meta.get("constant_noise"))
    beside = store.critic_path(path)
    with_critic = source if source.discriminator_tensors or not beside.exists() else sniff.read(beside)
    critic = _critic(with_critic, beside, generator.config)
    before = sum(int(source.meta.get(key) or 0) for key in ("images_before", "images_seen"))
    return Networks(generator, _frozen_copy(generator), critic, before, with_critic.discriminator_tensors is None)


def grow(old: Networks) -> Networks:
    """The same networks at twice the resolution.

    Both grow without a seam. The skip generator's new block adds an image whose toRGB weights begin at zero; the
    discriminator's new block begins as the old fromRGB on the halved image, so that it forgets nothing.
    """
    generator = Generator(_doubled(old.generator.config))
    discriminator = Discriminator(_doubled(old.discriminator.config))
    ema = _frozen_copy(generator)
    for new, before in ((generator, old.generator), (ema, old.ema)):
        _copy_tensors(before, new)
        torgb = new.get_submodule(f"synthesis.b{generator.config.resolution}.torgb")
        nn.init.zeros_(torgb.get_parameter("weight"))
    _copy_tensors(old.discriminator, discriminator)
    _begin_as_fromrgb(discriminator, old.discriminator)
    return Networks(generator, ema, discriminator)


def carry_moments(
    old_module: nn.Module, old: torch.optim.Optimizer, new_module: nn.Module, new: torch.optim.Optimizer
) -> None:
    """Hands Adam's moments of the tensors that both modules share on to the new optimiser."""
    before = dict(old_module.named_parameters())
    for name, parameter in new_module.named_parameters():
        if name in before and before[name].shape == parameter.shape and before[name] in old.state:
            new.state[parameter] = old.state[before[name]]


def _at_full_strength(generator: Generator, constant_noise: float | None) -> None:
    """Takes back what an export did to the constant noise, or the next export would weaken it again."""
    for name, buffer in generator.named_buffers():
        if name.endswith("noise_const") and constant_noise:
            buffer.div_(constant_noise)


def _critic(source: Checkpoint, path: Path, config: Config) -> Discriminator:
    """The critic of a file, or a fresh one for a generator of that shape."""
    if source.discriminator_config is None or source.discriminator_tensors is None:
        shape = DiscriminatorConfig(config.resolution, config.channel_base, config.channel_max, config.channels)
        return Discriminator(shape)
    critic = Discriminator(DiscriminatorConfig(**_tuples(source.discriminator_config)))
    _load(critic, source.discriminator_tensors, path)
    return critic


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def _load(network: nn.Module, tensors: Mapping[str, np.ndarray[Any, Any]], path: Path) -> None:
    models.check_shapes(network, {k: v.shape for k, v in tensors.items()}, str(path))
    network.load_state_dict({k: torch.from_numpy(np.array(v, dtype=np.float32)) for k, v in tensors.items()})


AnyConfig = TypeVar("AnyConfig", Config, DiscriminatorConfig)


def _doubled(config: AnyConfig) -> AnyConfig:
    listed: tuple[int, ...] = config.channels or ()
    channels = (*listed, max(listed[-1] // 2, 1)) if listed else None
    return dataclasses.replace(config, resolution=config.resolution * 2, channels=channels)


def _begin_as_fromrgb(new: Discriminator, old: Discriminator) -> None:
    """Sets the front block of `new` to see what `old` saw: its fromRGB after a halving of the image.

    A colour c passes a leaky ReLU as the pair lrelu(c), lrelu(-c), whose difference is 1.2 c. The pairs go through
    fromRGB and conv0, and conv1 halves them and applies the old fromRGB. All other ways begin at zero in conv1 and
    in the skip, and learn from there.
    """
    colours, config = new.config.img_channels, new.config
    if config.architecture != "resnet" or config.width(config.resolution) < 2 * colours:
        return
    front: Any = new.get_submodule(f"b{config.resolution}")
    before: Any = old.get_submodule(f"b{old.config.resolution}.fromrgb")
    pairs = torch.cat([torch.eye(colours), -torch.eye(colours)])  # [2C, C]
    colour = pairs.T / (1.2 * math.sqrt(2))  # [C, 2C]: from pairs, which bear the activation's gain, back to colours
    with torch.no_grad():
        fromrgb, conv0, conv1 = front.fromrgb, front.conv0, front.conv1
        fromrgb.weight[: 2 * colours, :, 0, 0] = pairs / fromrgb.weight_gain
        conv0.weight[: 2 * colours] = 0
        conv0.weight[: 2 * colours, : 2 * colours, 1, 1] = pairs @ colour / conv0.weight_gain
        conv1.weight.zero_()
        # The residual block's gain of sqrt(1/2) cancels the activation's, which the old fromRGB had.
        # The new networks are still on the CPU, wherever the old ones are.
        old_weight = before.weight[:, :, 0, 0].cpu() * (before.weight_gain * math.sqrt(2))
        conv1.weight[:, : 2 * colours, 1, 1] = old_weight @ colour / conv1.weight_gain
        conv1.bias.copy_(before.bias * math.sqrt(2))
        front.skip.weight.zero_()


def _copy_tensors(source: nn.Module, target: nn.Module) -> None:
    wanted = target.state_dict()
    shared = {k: v for k, v in source.state_dict().items() if k in wanted and wanted[k].shape == v.shape}
    target.load_state_dict(shared, strict=False)


def _frozen_copy(generator: Generator) -> Generator:
    return copy.deepcopy(generator).eval().requires_grad_(False)
