"""What a critic makes of its generator's images, written into its file: what is typical, and what scores are common.

python -m tpdne_cli.training.calibrate weights/faces.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tpdne_cli import critic, installing, models
from tpdne_cli.checkpoints import safetensors
from tpdne_cli.errors import TpdneError
from tpdne_cli.sampler import Sampler, Settings

IMAGES = 10_000
TRUNCATIONS = (0.5, 0.7, 0.85, 1.0)
FEWER = 2_000  # images at a truncation that is not the model's own


def calibrate(generator: Path | str, images: int = IMAGES, device: str = "auto", precision: str = "auto") -> Path:
    """Writes what the seeds 0, 1, ... look like to the critic at the model's own truncation; returns the critic's path.

    Into the file go the distribution of their features, by which images are judged from then on, the quantiles of
    their scores, and those of fewer images, of the seeds after them, at other truncations. On a CPU with matrix units
    bfloat16 is three times as fast, and moved no percentile by more than one. Raises SettingsError where there is no
    critic, CheckpointError, OutputError.
    """
    model = models.load(generator)
    own = model.truncation
    judge = critic.Critic.load(model, device=device)
    seen = {own: look(judge, Sampler(model, device=device, precision=precision), range(images))}
    for psi in TRUNCATIONS:
        if psi != own:
            sampler = Sampler(model, Settings(truncation=psi), device=device, precision=precision)
            seen[psi] = look(judge, sampler, range(images, images + min(images, FEWER)))
    typical = critic.Typical.of(seen[own])
    scores = {psi: typical.scores(torch.from_numpy(found)) for psi, found in seen.items()}
    scores[own] = held_out(scores[own])
    curves = {psi: critic.quantiles(found.tolist()) for psi, found in scores.items()}
    about: dict[str, Any] = {"quantiles": curves.pop(own), "quantiles_of": images}
    about["quantiles_at"] = {f"{psi:g}": curve for psi, curve in curves.items()}
    tensors = {safetensors.TYPICAL + name: getattr(typical, name).numpy() for name in ("mean", "whitening")}
    safetensors.amend(judge.path, about, tensors)
    installing.record_anew(model.path)
    return judge.path


def held_out(scores: torch.Tensor) -> torch.Tensor:
    """The scores [N] that images would have, had each been left out when it was found out what is typical.

    For each of them pulls mean and covariance towards itself, as no image does that is judged later. The formula is
    Sherman and Morrison's (1950), for the inverse of a covariance without one of its rows.
    """
    n, squared = len(scores), scores.double().square()
    left = (1 - n / (n - 1) ** 2 * squared).clamp_min(1 / n)
    return -(n / (n - 1) * ((n - 2) / (n - 1) * squared / left).sqrt())


def look(judge: critic.Critic, sampler: Sampler, seeds: range) -> critic.Scores:
    """The features [N, F] that the critic sees in the images of N seeds."""
    judge.network.to(sampler.device).set_precision(sampler.precision)
    samples = sampler(seeds)
    parts = []
    while batch := list(islice(samples, sampler.batch_size)):
        parts.append(judge.features(np.stack([sample.pixels for sample in batch])))
    return np.concatenate(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate the critic of one generator; prints its path."""
    parser = argparse.ArgumentParser(description="Write what its generator's images look like to it into a critic.")
    parser.add_argument("model", help="installed name or file of the generator")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"how many to judge (default {IMAGES})")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    given = parser.parse_args(arguments)
    try:
        print(calibrate(given.model, given.images, given.device, given.precision))
    except TpdneError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
