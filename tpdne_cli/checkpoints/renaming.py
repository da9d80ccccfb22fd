"""Tensors under another program's names -> the published PyTorch names, by a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tpdne_cli.checkpoints.pickles import show
from tpdne_cli.checkpoints.storage import Array
from tpdne_cli.errors import AGAIN, CheckpointError

Transform = Callable[[Array], Any]  # of an Array an Array; numpy's own annotations are vaguer
Table = dict[str, tuple[str, Transform]]  # their name -> our name, and what becomes of the numbers

SIZES = [4 << i for i in range(9)]  # 4 to 1024
MAX_LAYERS = 32  # of a mapping network
MAX_WIDTH = 1 << 16  # of a layer
LODS = ("lod", "synthesis/lod")  # TensorFlow's: how many times smaller than full size the images still are


def same(value: Array) -> Array:
    return value


def axes(*order: int) -> Transform:
    """Transpose, where there are as many axes as that."""

    def transposed(value: Array) -> Any:
        if value.ndim != len(order):
            raise CheckpointError(f"wrong shape: a weight has {value.ndim} dimensions, not {len(order)}; {AGAIN}.")
        return value.transpose(order)

    return transposed


def without(count: int) -> Transform:
    """Drop that many leading axes of size one."""

    def dropped(value: Array) -> Any:
        if value.shape[:count] != (1,) * count:
            raise CheckpointError(f"wrong shape: a weight of {list(value.shape)} should begin with ones; {AGAIN}.")
        return value[(0,) * count + (...,)]

    return dropped


KERNEL, DENSE = axes(3, 2, 0, 1), axes(1, 0)  # TensorFlow's layouts


def turned(value: Array) -> Any:
    """TensorFlow's kernel, turned by half a circle."""
    return KERNEL(value)[:, :, ::-1, ::-1]


def flat(value: Array) -> Any:
    """A vector of a layer's width, whatever axes of size one it has; what is made from it may then be a copy."""
    if value.ndim > 4 or not 0 < value.size <= MAX_WIDTH:
        raise CheckpointError(f"wrong shape: a weight of {list(value.shape)} should be a vector; {AGAIN}.")
    return value.reshape(-1)


def plus_one(value: Array) -> Any:
    return flat(value) + np.float32(1)


def rename(source: Mapping[str, Array], table: Table, ignored: str = "") -> dict[str, Array]:
    """Every tensor under its name in the table; CheckpointError for one that is neither there nor to be ignored."""
    renamed: dict[str, Array] = {}
    for theirs, value in source.items():
        if theirs in table:
            ours, transform = table[theirs]
            renamed[ours] = transform(value)
        elif not re.fullmatch(ignored, theirs):
            raise CheckpointError(f"not supported: a network with a {show(theirs)}, which no StyleGAN here has.")
    return renamed


def refuse_unfinished(variables: Mapping[str, Array]) -> None:
    """Networks that grow make full-size images by their last layer alone once they have grown: lod 0."""
    if any(variables[name].size > 1 or np.any(variables[name]) for name in LODS if name in variables):
        raise CheckpointError("not supported: a network whose training stopped before it had grown to full size.")


def noise_layer(index: int) -> str:
    """StyleGAN2's noise images are numbered through: 4x4 has one layer, every other size two."""
    return f"synthesis.b{2 ** ((index + 5) // 2)}.conv{index % 2 ^ 1}.noise_const"


def add_filters(tensors: dict[str, Array], prefix: str, taps: Sequence[Any]) -> None:
    """The resampling filters, which only the PyTorch networks keep with each layer; prefix: 'synthesis.' or ''."""
    used, unused = filter_of(taps), filter_of([1, 3, 3, 1])
    resampling = "conv0" if prefix else "conv1"
    for name, value in list(tensors.items()):
        block = re.match(re.escape(prefix) + r"(b\d+)\.", name)
        if block and (prefix or block[1] != "b4"):
            tensors[f"{prefix}{block[1]}.resample_filter"] = used
        layer, _, leaf = name.rpartition(".")
        if value.ndim == 4 and leaf == "weight" and not layer.endswith("torgb"):
            tensors[f"{layer}.resample_filter"] = used if layer.endswith((resampling, "skip")) else unused


def filter_of(taps: Sequence[Any]) -> Array:
    """FIR taps -> a filter that sums to one: [k, k], or [k] from 8 taps on."""
    line = np.array(taps, np.float32)
    kernel = np.outer(line, line) if len(line) < 8 else line
    return np.asarray(kernel / kernel.sum())
