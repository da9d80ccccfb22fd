"""What a critic thinks of its generator's images, written into the critic's header so that scores become percentiles.

python -m tpdne_cli.training.calibrate weights/faces.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from tpdne_cli import critic, installing, models
from tpdne_cli.checkpoints import safetensors
from tpdne_cli.errors import TpdneError
from tpdne_cli.sampler import Sampler

IMAGES = 10_000


def calibrate(generator: Path | str, images: int = IMAGES, device: str = "auto", precision: str = "auto") -> Path:
    """Writes the quantiles of the scores of seeds 0, 1, ... at the model's own truncation; returns the critic's path.

    On a CPU with matrix units bfloat16 is three times as fast, and moved no percentile by more than one. Raises
    SettingsError where there is no critic, CheckpointError, OutputError.
    """
    model = models.load(generator)
    sampler = Sampler(model, device=device, precision=precision)
    judge = critic.Critic.load(model, device=str(sampler.device))
    judge.network.set_precision(sampler.precision)
    samples = sampler(range(images))
    scores: list[float] = []
    while batch := list(islice(samples, sampler.batch_size)):
        scores.extend(judge.score(np.stack([sample.pixels for sample in batch])).tolist())
    header = safetensors.read_header(judge.path)
    about = {**header.meta, "quantiles": critic.quantiles(scores), "quantiles_of": images}
    safetensors.write(judge.path, header.arch, header.config, safetensors.read_tensors(judge.path), about)
    installing.record_anew(model.path)
    return judge.path


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate the critic of one generator; prints its path."""
    parser = argparse.ArgumentParser(description="Write the quantiles of a critic's scores into its file.")
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
