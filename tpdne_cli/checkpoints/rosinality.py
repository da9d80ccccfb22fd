"""Checkpoints of rosinality/stylegan2-pytorch: written by its training or by its converter, with a zip or without."""

from __future__ import annotations

from typing import Any

import numpy as np

from tpdne_cli.checkpoints import Checkpoint
from tpdne_cli.checkpoints.pickles import Maker, Record
from tpdne_cli.checkpoints.renaming import (
    MAX_LAYERS,
    SIZES,
    Table,
    add_filters,
    flat,
    noise_layer,
    rename,
    same,
    without,
)
from tpdne_cli.checkpoints.shapes import discriminator_config, generator_config, resolutions, taps
from tpdne_cli.checkpoints.storage import Array, array_of
from tpdne_cli.errors import AGAIN, CheckpointError

MAX_TENSORS = 5_000
LR_MULTIPLIER = 0.01  # its training script knows no other
GROUP_SIZE = 4
KERNELS = r"(convs\.\d+\.conv\.blur|to_rgbs\.\d+\.upsample|convs\.\d+\.(conv2|skip)\.0)\.kernel"


class Namespace(Record):
    """argparse.Namespace: the options of the training run, which are of no use here."""

    def build(self, state: Any) -> None:
        if type(state) is not dict:
            raise CheckpointError(f"refused: an argparse.Namespace in an unknown form; {AGAIN}.")


def new_namespace(args: tuple[Any, ...]) -> Namespace:
    if args:
        raise CheckpointError(f"refused: an argparse.Namespace in an unknown form; {AGAIN}.")
    return Namespace()


GLOBALS: dict[tuple[str, str], Maker | None] = {("argparse", "Namespace"): new_namespace}


def reads(tree: Any) -> bool:
    """Whether this is what such a file holds."""
    return type(tree) is dict and type(tree.get("g_ema")) is dict and "input.input" in tree["g_ema"]


def read(tree: dict[Any, Any]) -> Checkpoint:
    """{'g_ema', 'latent_avg' or 'd' and the rest of a training run} -> Checkpoint."""
    theirs = arrays(tree["g_ema"])
    tensors = rename(theirs, generator_table(), KERNELS)
    if "latent_avg" in tree:
        tensors["mapping.w_avg"] = flat(array_of(tree["latent_avg"]))
    add_noise(tensors)
    add_filters(tensors, "synthesis.", kernel(theirs, ".blur.kernel"))
    config = generator_config(tensors, LR_MULTIPLIER, None)
    checkpoint = Checkpoint("stylegan2", config, tensors, meta={"format": "rosinality"})
    if type(tree.get("d")) is dict:
        try:
            theirs = arrays(tree["d"])
            critic = rename(theirs, discriminator_table(config["resolution"]), KERNELS)
            add_filters(critic, "", kernel(theirs, ".conv2.0.kernel"))
            checkpoint.discriminator_config = discriminator_config(critic, GROUP_SIZE, None)
            checkpoint.discriminator_tensors = critic
        except CheckpointError as error:  # the generator is none the worse for it
            checkpoint.meta["discriminator"] = f"left out: {error}"
    return checkpoint


def arrays(state: dict[Any, Any]) -> dict[str, Array]:
    if len(state) > MAX_TENSORS or not all(type(name) is str for name in state):
        raise CheckpointError(f"damaged: a state dict is none; {AGAIN}.")
    return {name: array_of(value) for name, value in state.items()}


def kernel(tensors: dict[str, Array], ending: str) -> list[float]:
    """The taps of the first resampling filter, whose sum is of no account; [1, 3, 3, 1] where nothing is resampled."""
    name = next((name for name in tensors if name.endswith(ending)), None)
    if name is None:
        return [1, 3, 3, 1]
    value = flat(tensors[name]).reshape(tensors[name].shape)
    return taps({name: value / max(value.sum(), 1e-9)}, name)


def add_noise(tensors: dict[str, Array]) -> None:
    """The first versions stored no noise images and drew new ones every time: any will do, as long as they stay."""
    for size in resolutions(tensors, "synthesis."):
        for conv in ("conv0", "conv1"):
            layer = f"synthesis.b{size}.{conv}"
            if f"{layer}.noise_strength" in tensors and f"{layer}.noise_const" not in tensors:
                random = np.random.RandomState(size + int(conv[-1]))
                tensors[f"{layer}.noise_const"] = random.randn(size, size).astype(np.float32)


def styled(theirs: str, ours: str) -> Table:
    return {
        f"{theirs}.conv.weight": (f"{ours}.weight", without(1)),
        f"{theirs}.conv.modulation.weight": (f"{ours}.affine.weight", same),
        f"{theirs}.conv.modulation.bias": (f"{ours}.affine.bias", same),
        f"{theirs}.noise.weight": (f"{ours}.noise_strength", without(1)),
        f"{theirs}.activate.bias": (f"{ours}.bias", same),
        f"{theirs}.bias": (f"{ours}.bias", flat),  # of to_rgb
    }


def generator_table() -> Table:
    table: Table = {"input.input": ("synthesis.b4.const", without(1))}
    table |= styled("conv1", "synthesis.b4.conv1") | styled("to_rgb1", "synthesis.b4.torgb")
    for i in range(MAX_LAYERS):
        for part in ("weight", "bias"):
            table[f"style.{i + 1}.{part}"] = (f"mapping.fc{i}.{part}", same)
        table[f"noises.noise_{i}"] = (noise_layer(i), without(2))
    for k, size in enumerate(SIZES[1:]):
        for i in (0, 1):
            table |= styled(f"convs.{2 * k + i}", f"synthesis.b{size}.conv{i}")
        table |= styled(f"to_rgbs.{k}", f"synthesis.b{size}.torgb")
    return table


def discriminator_table(resolution: int) -> Table:
    pairs = {
        "convs.0.0.weight": f"b{resolution}.fromrgb.weight",
        "convs.0.1.bias": f"b{resolution}.fromrgb.bias",
        "final_conv.0.weight": "b4.conv.weight",
        "final_conv.1.bias": "b4.conv.bias",
    }
    for part in ("weight", "bias"):
        pairs |= {f"final_linear.0.{part}": f"b4.fc.{part}", f"final_linear.1.{part}": f"b4.out.{part}"}
    for k, size in enumerate(reversed(SIZES[1 : SIZES.index(resolution) + 1]), start=1):
        theirs, ours = f"convs.{k}", f"b{size}"
        pairs |= {
            f"{theirs}.conv1.0.weight": f"{ours}.conv0.weight",
            f"{theirs}.conv1.1.bias": f"{ours}.conv0.bias",
            f"{theirs}.conv2.1.weight": f"{ours}.conv1.weight",
            f"{theirs}.conv2.2.bias": f"{ours}.conv1.bias",
            f"{theirs}.skip.1.weight": f"{ours}.skip.weight",
        }
    return {theirs: (ours, same) for theirs, ours in pairs.items()}
