"""StyleGAN1 out of TensorFlow variables, under names after the pattern of StyleGAN2's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tpdne_cli.checkpoints import Checkpoint
from tpdne_cli.checkpoints.renaming import (
    DENSE,
    KERNEL,
    MAX_LAYERS,
    SIZES,
    Table,
    Transform,
    flat,
    refuse_unfinished,
    rename,
    same,
    turned,
    without,
)
from tpdne_cli.checkpoints.shapes import expect, mapping_config, shape_of
from tpdne_cli.checkpoints.storage import Array
from tpdne_cli.errors import AGAIN, CheckpointError

FUSED = 128  # from this size on, upsampling and convolution are one transposed one, which does not turn its kernel
TRUNCATION = {"truncation": 0.7, "truncation_cutoff": 8}  # as published
IGNORED = r"lod|synthesis/lod|synthesis/ToRGB_lod\d{1,2}/(weight|bias)"  # ToRGB of smaller sizes: only for training


def reads(variables: Mapping[str, Array]) -> bool:
    return "synthesis/4x4/Const/StyleMod/weight" in variables


def read(variables: dict[str, Array], lr_multiplier: float) -> Checkpoint:
    """TensorFlow's variables by name -> Checkpoint."""
    refuse_unfinished(variables)
    top = max(size for size in SIZES if size == 8 or f"synthesis/{size}x{size}/Conv1/weight" in variables)
    tensors = rename(variables, table(top), IGNORED)
    config = config_of(tensors, top) | {"mapping_lr_multiplier": lr_multiplier}
    return Checkpoint("stylegan1", config, tensors, meta={"format": "tensorflow", **TRUNCATION})


def config_of(tensors: dict[str, Array], top: int) -> dict[str, Any]:
    """Keyword arguments of networks.stylegan1.Config out of the tensors' shapes."""
    w_dim = shape_of(tensors, "synthesis.b4.conv0.affine.weight", 2)[1]
    noisy = "synthesis.b4.conv0.noise_strength" in tensors
    channels: list[int] = []
    for size in SIZES[: SIZES.index(top) + 1]:
        block = f"synthesis.b{size}"
        width = shape_of(tensors, f"{block}.conv1.weight", 4)[0]
        expect(tensors, f"{block}.conv1.weight", width, width, 3, 3)
        if size == 4:
            expect(tensors, f"{block}.const", width, 4, 4)
        else:
            expect(tensors, f"{block}.conv0.weight", width, channels[-1], 3, 3)
        for conv in ("conv0", "conv1"):
            expect(tensors, f"{block}.{conv}.affine.weight", 2 * width, w_dim)
            if noisy:
                expect(tensors, f"{block}.{conv}.noise_const", size, size)
        channels.append(width)
    torgb = f"synthesis.b{top}.torgb.weight"
    colours = shape_of(tensors, torgb, 4)[0]
    expect(tensors, torgb, colours, channels[-1], 1, 1)
    mapping = mapping_config(tensors, w_dim)
    if mapping["z_dim"] < 1 or mapping.pop("embed_features"):
        raise CheckpointError(f"not a complete generator: its mapping network is not StyleGAN1's; {AGAIN}.")
    return mapping | {"resolution": top, "img_channels": colours, "channels": channels, "use_noise": noisy}


def halved_power(value: Array) -> Any:
    """Their mapping multiplies its weights by sqrt(2), ours the sum of weights and bias."""
    return flat(value) / np.float32(np.sqrt(2))


def scale_plus_one(value: Array) -> Any:
    """The first half of a style scales, x * (s + 1), the second shifts."""
    return flat(value) + (np.arange(value.size) < value.size // 2).astype(np.float32)


def styled(theirs: str, ours: str, kernel: Transform = KERNEL) -> Table:
    return {
        f"{theirs}/weight": (f"{ours}.weight", kernel),
        f"{theirs}/bias": (f"{ours}.bias", same),
        f"{theirs}/Noise/weight": (f"{ours}.noise_strength", same),
        f"{theirs}/StyleMod/weight": (f"{ours}.affine.weight", DENSE),
        f"{theirs}/StyleMod/bias": (f"{ours}.affine.bias", scale_plus_one),
    }


def table(top: int) -> Table:
    names: Table = {
        "dlatent_avg": ("mapping.w_avg", same),
        "synthesis/4x4/Const/const": ("synthesis.b4.const", without(1)),
        "synthesis/ToRGB_lod0/weight": (f"synthesis.b{top}.torgb.weight", KERNEL),
        "synthesis/ToRGB_lod0/bias": (f"synthesis.b{top}.torgb.bias", same),
    }
    names |= styled("synthesis/4x4/Const", "synthesis.b4.conv0") | styled("synthesis/4x4/Conv", "synthesis.b4.conv1")
    for i in range(MAX_LAYERS):
        names[f"mapping/Dense{i}/weight"] = (f"mapping.fc{i}.weight", DENSE)
        names[f"mapping/Dense{i}/bias"] = (f"mapping.fc{i}.bias", halved_power)
        names[f"synthesis/noise{i}"] = (f"synthesis.b{4 << i // 2}.conv{i % 2}.noise_const", without(2))
    for size in SIZES[1:]:
        theirs, ours = f"synthesis/{size}x{size}", f"synthesis.b{size}"
        names |= styled(f"{theirs}/Conv0_up", f"{ours}.conv0", turned if size >= FUSED else KERNEL)
        names |= styled(f"{theirs}/Conv1", f"{ours}.conv1")
    return names
