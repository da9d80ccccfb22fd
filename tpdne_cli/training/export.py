"""A run's checkpoint -> the files that `tpdne generate` takes: generator and critic."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tpdne_cli import models, store
from tpdne_cli.networks.discriminator import DiscriminatorConfig
from tpdne_cli.networks.stylegan2 import Config, Generator
from tpdne_cli.training import checkpoint

TRUNCATION = 0.7
LATENTS_FOR_MEAN = 20_000


def export(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    info: Mapping[str, Any] | None = None,
    noise: float = 1.0,
) -> tuple[Path, Path]:
    """Writes the averaged generator to `out` and the discriminator to NAME-critic.safetensors beside it, in float16.

    Works on a run in progress as well as on one that has ended. `info` is stored in the files' headers, beside what the
    run knows of itself. noise: strength of the model's own constant noise against that of the training: early on much
    of it is grain that the generator has not yet learned to place, and less of it looks better. Returns both paths.
    Raises TrainingError where there is no checkpoint, OutputError.
    """
    state = checkpoint.load(Path(run_dir))
    path = Path(out)
    critic = store.critic_path(path)
    config = Config(**state["generator_config"])
    tensors = {name: tensor.half() for name, tensor in state["ema"].items()}
    for name in tensors:
        if name.endswith("noise_const"):
            tensors[name] *= noise
    tensors["mapping.w_avg"] = mean_w(config, state["ema"])
    about = {
        "truncation": TRUNCATION,
        "images_seen": state["counters"]["images"],
        "images_before": state["counters"].get("before", 0),
        "constant_noise": noise,
        "training": {k: v for k, v in state["config"].items() if k not in ("data", "run_dir", "from_model")},
        **(info or {}),
    }
    # The critic first: a generator that can be found is complete.
    critic_config = DiscriminatorConfig(**state["discriminator_config"])
    critic_tensors = {name: tensor.half() for name, tensor in state["discriminator"].items()}
    models.save(critic, "stylegan2-discriminator", critic_config, critic_tensors, {"images_seen": about["images_seen"]})
    models.save(path, "stylegan2", config, tensors, about)
    return path, critic


def mean_w(config: Config, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The truncation centre, [w_dim]: the mean of w of the averaged mapping itself.

    The centre tracked in training belongs to the weights of some thousand images ago.
    """
    generator = Generator(config).eval().requires_grad_(False)
    generator.load_state_dict(dict(tensors))
    z = torch.randn(LATENTS_FOR_MEAN, config.z_dim, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():  # matrix products instead of the row-by-row sums that generation needs
        means = [generator.mapping(part)[:, 0].double().mean(0) for part in z.chunk(20)]
    return torch.stack(means).mean(0).float()
