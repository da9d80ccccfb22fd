"""StyleGAN2's configuration out of the shapes of its tensors, which say nearly all of it and cannot be outdated.

Keyword arguments that a file stores are only what somebody once asked for, and their defaults differ between the
repositories. Every weight is checked against its neighbours, so a network built from the result is no larger than the
file it came from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpdne_cli.checkpoints.pickles import show
from tpdne_cli.checkpoints.storage import Array
from tpdne_cli.errors import AGAIN, CheckpointError

Tensors = Mapping[str, Array]

MAX_RESOLUTION = 4096
MAX_CLASSES = 100_000
MAX_Z = 1 << 14  # latents of ten thousand seeds are drawn where a file lacks its mean w


def shape_of(tensors: Tensors, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"not a complete generator: it has no {name}; {AGAIN}.")
    shape: tuple[int, ...] = tensors[name].shape
    if len(shape) != dimensions:
        raise CheckpointError(f"wrong shape: {name} has {len(shape)} dimensions, not {dimensions}; {AGAIN}.")
    return shape


def expect(tensors: Tensors, name: str, *shape: int) -> None:
    found = shape_of(tensors, name, len(shape))
    if found != shape:
        raise CheckpointError(f"wrong shape: {name} is {list(found)}, but {list(shape)} fits its neighbours; {AGAIN}.")


def resolutions(tensors: Tensors, prefix: str) -> list[int]:
    """The sizes of the blocks `prefix`b4, b8, ..., none left out."""
    matches = (re.match(re.escape(prefix) + r"b(\d{1,5})\.", name) for name in tensors)
    found = sorted({int(match[1]) for match in matches if match})
    if len(found) < 2 or found[-1] > MAX_RESOLUTION or found != [4 << i for i in range(len(found))]:
        raise CheckpointError(f"not a complete generator: its blocks are of the sizes {found[:16]}, not 4, 8, 16, ...")
    return found


def finite(value: Any, name: str) -> float:
    """A plain number from whatever stores one."""
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise CheckpointError(f"damaged: {show(name)} is no number; {AGAIN}.")
    return value  # type: ignore[no-any-return]


def taps(tensors: Tensors, name: str) -> list[float]:
    """The resampling filter as it is written in configurations: [1, 3, 3, 1] for the usual one."""
    size = tensors[name].size if name in tensors else 0
    if not 0 < size <= 64 * 64 or tensors[name].ndim not in (1, 2):
        raise CheckpointError(f"wrong shape: {name} is no resampling filter; {AGAIN}.")
    kernel = tensors[name].astype(np.float64)
    if not np.isfinite(kernel).all():
        raise CheckpointError(f"damaged: {name} holds values that are not numbers (NaN or infinity); {AGAIN}.")
    line = kernel.sum(1) if kernel.ndim == 2 else kernel
    whole = np.outer(line, line) if kernel.ndim == 2 else line
    smallest = np.abs(line[line != 0]).min(initial=1.0)
    if whole.shape != kernel.shape or not np.allclose(whole, kernel, atol=1e-5) or smallest < 1e-9:
        raise CheckpointError(f"not supported: {name} is a resampling filter that is no product of two.")
    ratio = line / smallest
    exact = np.allclose(ratio, ratio.round(), atol=1e-4)
    return [int(value) for value in ratio.round()] if exact else [float(value) for value in line]


def mapping_config(tensors: Tensors, w_dim: int) -> dict[str, Any]:
    """z_dim, c_dim and the hidden layers of `mapping.`; w_dim is what the synthesis network takes."""
    layers = sum(bool(re.fullmatch(r"mapping\.fc\d{1,3}\.weight", name)) for name in tensors)
    embed = classes = 0
    if "mapping.embed.weight" in tensors:
        embed, classes = shape_of(tensors, "mapping.embed.weight", 2)
    if classes > MAX_CLASSES:
        raise CheckpointError(f"refused: a generator of {classes} classes; the largest published has 1000.")
    features, width = w_dim, embed
    for i in range(layers):
        out, width_in = shape_of(tensors, f"mapping.fc{i}.weight", 2)
        if i == 0:
            width, features = width_in, out if layers > 1 else w_dim
        expect(tensors, f"mapping.fc{i}.weight", features if i < layers - 1 else w_dim, width)
        expect(tensors, f"mapping.fc{i}.bias", out)
        width = features
    z_dim = tensors["mapping.fc0.weight"].shape[1] - embed if layers else 0
    if z_dim > MAX_Z:
        raise CheckpointError(f"refused: a generator whose z has {z_dim} numbers; the largest published has 512.")
    return {
        "z_dim": z_dim,
        "w_dim": w_dim,
        "c_dim": classes,
        "mapping_layers": layers,
        "mapping_features": features,
        "embed_features": embed or None,
    }


def latent_mapping_config(tensors: Tensors, w_dim: int) -> dict[str, Any]:
    """mapping_config of a generator, which maps a z; a discriminator maps a label alone."""
    config = mapping_config(tensors, w_dim)
    if config["z_dim"] < 1:
        raise CheckpointError("not supported: a generator whose mapping network takes no z.")
    return config


def _expect_square(tensors: Tensors, name: str) -> None:
    """Forks begin with 4x6 or the like; NVIDIA's cars of 512x384 lie between black bars in a square."""
    _, height, width = shape_of(tensors, name, 3)
    if height != width:
        raise CheckpointError(f"not supported: images that are not square; this network begins with {width}x{height}.")


def generator_config(tensors: Tensors, lr_multiplier: float, conv_clamp: float | None) -> dict[str, Any]:
    """Keyword arguments of the generator's Config from its tensors, under their published PyTorch names."""
    sizes = resolutions(tensors, "synthesis.")
    noisy = "synthesis.b4.conv1.noise_strength" in tensors
    w_dim = shape_of(tensors, "synthesis.b4.conv1.affine.weight", 2)[1]
    channels: list[int] = []
    for size in sizes:
        block = f"synthesis.b{size}"
        width = shape_of(tensors, f"{block}.conv1.weight", 4)[0]
        below = channels[-1] if channels else width
        if size == 4:
            _expect_square(tensors, f"{block}.const")
            expect(tensors, f"{block}.const", width, 4, 4)
        for conv, into in [("conv1", width)] if size == 4 else [("conv0", below), ("conv1", width)]:
            expect(tensors, f"{block}.{conv}.weight", width, into, 3, 3)
            expect(tensors, f"{block}.{conv}.affine.weight", into, w_dim)
            if noisy:
                expect(tensors, f"{block}.{conv}.noise_const", size, size)
        channels.append(width)
    config = latent_mapping_config(tensors, w_dim)
    torgb = f"synthesis.b{sizes[-1]}.torgb.weight"
    colours = shape_of(tensors, torgb, 4)[0]
    expect(tensors, torgb, colours, channels[-1], 1, 1)
    branch = "skip" if "synthesis.b4.torgb.weight" in tensors else "orig"
    return config | {
        "resolution": sizes[-1],
        "img_channels": colours,
        "channels": channels,
        "mapping_lr_multiplier": lr_multiplier,
        "architecture": "resnet" if "synthesis.b8.skip.weight" in tensors else branch,
        "resample_filter": taps(tensors, "synthesis.b4.resample_filter"),
        "conv_clamp": conv_clamp,
        "use_noise": noisy,
    }


def discriminator_config(tensors: Tensors, group_size: int | None, conv_clamp: float | None) -> dict[str, Any]:
    """Keyword arguments of the DiscriminatorConfig from its tensors, under their published PyTorch names."""
    sizes = resolutions(tensors, "")
    width, into = shape_of(tensors, "b4.conv.weight", 4)[:2]
    channels = [width]
    expect(tensors, "b4.conv.weight", width, into, 3, 3)
    expect(tensors, "b4.fc.weight", width, width * 16)
    for size in sizes[1:]:
        width = shape_of(tensors, f"b{size}.conv0.weight", 4)[0]
        expect(tensors, f"b{size}.conv0.weight", width, width, 3, 3)
        expect(tensors, f"b{size}.conv1.weight", channels[-1], width, 3, 3)
        channels.append(width)
    logits = shape_of(tensors, "b4.out.weight", 2)[0]
    expect(tensors, "b4.out.weight", logits, channels[0])
    mapping = mapping_config(tensors, logits)
    classes, extra = mapping["c_dim"], into - channels[0]
    if mapping["z_dim"] or not 0 <= extra <= math.gcd(extra, channels[0]) or (logits != 1 and not classes):
        raise CheckpointError("not supported: a discriminator of an unknown kind.")
    if classes and {mapping["embed_features"], mapping["mapping_features"]} != {logits}:
        raise CheckpointError("not supported: a discriminator whose label mapping has other widths than its output.")
    rgb = f"b{sizes[-1]}.fromrgb.weight"
    colours = shape_of(tensors, rgb, 4)[1]
    expect(tensors, rgb, channels[-1], colours, 1, 1)
    branch = "skip" if "b4.fromrgb.weight" in tensors else "orig"
    return {
        "resolution": sizes[-1],
        "c_dim": classes,
        "img_channels": colours,
        "channels": channels,
        "architecture": "resnet" if "b8.skip.weight" in tensors else branch,
        "resample_filter": taps(tensors, f"b{sizes[-1]}.resample_filter"),
        "conv_clamp": conv_clamp,
        "mbstd_group_size": group_size,
        "mbstd_channels": extra,
        "cmap_dim": logits if classes else None,
        "mapping_layers": mapping["mapping_layers"] if classes else 8,
    }
