"""Readers of generator files, one per format; none of them runs code from a file or knows what a network is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Checkpoint:
    """What a file holds: plain arrays and the keyword arguments of the network's Config.

    arch: 'stylegan1', 'stylegan2' or 'stylegan3'; config: keywords of that network's Config, JSON-able.
    tensors: state-dict names of the published PyTorch networks -> arrays in file precision.
    discriminator_config / discriminator_tensors: the critic, where the file has one.
    meta: what else is known of the file (format, licence, data, critic quantiles, ...), JSON-able.
    """

    arch: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray[Any, Any]]
    discriminator_config: dict[str, Any] | None = None
    discriminator_tensors: dict[str, np.ndarray[Any, Any]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
