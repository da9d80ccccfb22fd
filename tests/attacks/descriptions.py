"""Our own files whose header describes a network that takes for ever to be built, or all memory, or none at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from attacks.containers import entry, safetensors

HUGE = 10**9


def described(arch: str, config: dict[str, Any], **about: Any) -> Callable[[], bytes]:
    description = json.dumps({"version": 1, "arch": arch, "config": config, **about})
    return lambda: safetensors({"__metadata__": {"tpdne": description}, "a": entry([1], 0, 4)}, bytes(4))


def stylegan2(**config: Any) -> Callable[[], bytes]:
    return described("stylegan2", {"resolution": 8, **config})


def stylegan3(**config: Any) -> Callable[[], bytes]:
    return described("stylegan3", {"resolution": 16, **config})


ATTACKS: dict[str, Callable[[], bytes]] = {
    **{
        f"stylegan2: {key} {value!r}": stylegan2(**{key: value})
        for key in ("z_dim", "w_dim", "c_dim", "mapping_layers", "mapping_features", "channel_max")
        for value in (HUGE, 2**70, -1, 1.5, "x", None, float("nan"), float("inf"))
    },
    "stylegan2: a long filter": stylegan2(resample_filter=[1] * 100_000),
    "stylegan2: a filter of lists": stylegan2(resample_filter=[[1] * 300] * 300),
    "stylegan2: no filter": stylegan2(resample_filter=[]),
    "stylegan2: a filter of text": stylegan2(resample_filter=["1"]),
    "stylegan2: wide layers": stylegan2(channels=[HUGE, HUGE]),
    "stylegan2: other channels": stylegan2(channels=[1, 2, 3]),
    **{f"stylegan2: resolution {r!r}": stylegan2(resolution=r) for r in (2**62, 8192, 12, "8", 8.0, None)},
    **{
        f"stylegan3: {key} {value!r}": stylegan3(**{key: value})
        for key in ("resolution", "mapping_layers", "num_layers", "margin_size", "filter_size", "lrelu_upsampling")
        for value in (10**4, HUGE, 2**62, -1, 1.5, "x")
    },
    "stylegan3: radial filters": stylegan3(use_radial_filters=True, filter_size=5000),
    "stylegan3: rates": stylegan3(first_cutoff=1e-300, first_stopband=1e300),
    "stylegan1: a long filter": described("stylegan1", {"resolution": 8, "blur_filter": [1] * 100_000}),
    "another network": described("os.system", {}),
    "a setting of another name": stylegan2(__class__="x"),
    "a deep setting": stylegan2(architecture={"a": {"b": ["c"]}}),
}
