"""What a training run is: one frozen dataclass that travels in every checkpoint."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from tpdne_cli.errors import TrainingError

Augmentation = Literal["none", "diffaugment", "ada"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Defaults are the small recipe for pictures up to 128 px.

    data: folder or zip; run_dir: where checkpoints, log and sample sheets go.
    schedule: stages of growth, e.g. '32:60k,64:150k,128' = 60k images at 32 px, then 150k at 64, the rest at 128.
    images: photographs shown in all; gamma: weight of R1 (None: 0.0002 * resolution^2 / batch).
    ema_images: half life of the generator's moving average, shorter at first (ema_rampup of the images seen).
    from_model: a generator file to start from, with its critic where there is one.
    freeze_critic: how many of that critic's blocks, from the image on, learn no more.
    """

    data: str
    run_dir: str
    schedule: str = "32:100k,64:150k,128"
    images: int = 500_000
    batch: int = 32
    z_dim: int = 256
    w_dim: int = 256
    mapping_layers: int = 4
    channel_base: int = 8192
    channel_max: int = 256
    learning_rate: float = 0.0025
    gamma: float | None = None
    r1_every: int = 16
    style_mixing: float = 0.9
    ema_images: int = 10_000
    ema_rampup: float = 0.05
    mirror: bool = True
    augment: Augmentation = "diffaugment"
    augment_strength: float = 1.0
    ada_target: float = 0.6
    ada_images: int = 500_000
    critic_head_start: int = 500
    from_model: str | None = None
    freeze_critic: int = 0
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    threads: int | None = None
    compile: bool = False
    checkpoint_seconds: float = 300.0
    log_every: int = 16

    def __post_init__(self) -> None:
        for name in ("images", "batch", "r1_every", "log_every", "z_dim", "w_dim", "mapping_layers", "ema_images"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}, and must be at least 1.")
        stages = parse_schedule(self.schedule)
        if self.from_model is None and self.channel_base < stages[-1].resolution:
            raise TrainingError(
                f"channel_base is {self.channel_base}, and must be at least {stages[-1].resolution}, the resolution."
            )
        blocks = stages[0].resolution.bit_length() - 3
        if self.freeze_critic and self.from_model is None:
            raise TrainingError("freeze_critic keeps what another critic has learned: it needs a model to begin with.")
        if not 0 <= self.freeze_critic <= blocks:
            raise TrainingError(f"freeze_critic is {self.freeze_critic}, and the critic has {blocks} blocks.")

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in a checkpoint."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Stage:
    """One resolution of the growth and how many images it sees (None: until the run ends)."""

    resolution: int
    images: int | None


def recommended(resolution: int, images: int, on_gpu: bool, lowest: int = 32) -> dict[str, Any]:
    """Settings for a new run: growth from `lowest` px in three fifths of the images, and sizes for the machine.

    Small batches take more steps from the same images, which a CPU does at the same speed and a GPU does not.
    """
    lower = [lowest << i for i in range(16) if lowest << i < resolution]
    stages = [f"{r}:{3 * images // (5 * len(lower))}" for r in lower] + [str(resolution)]
    sizes = {"batch": 64, "channel_base": 8192} if on_gpu else {"batch": 16, "channel_base": 4096}
    return {"schedule": ",".join(stages), "images": images, **sizes}


def parse_schedule(text: str) -> tuple[Stage, ...]:
    """'32:60k,64:150k,128' -> stages. Raises TrainingError for anything else."""
    stages = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?::(\d+(?:\.\d+)?)([km]?))?", part, re.IGNORECASE)
        if match is None:
            raise TrainingError(f"'{part}' is no stage of a schedule; write e.g. 32:60k,64:150k,128.")
        scale = {"": 1, "k": 1_000, "m": 1_000_000}[(match[3] or "").lower()]
        stages.append(Stage(int(match[1]), round(float(match[2]) * scale) if match[2] else None))
    resolutions = [stage.resolution for stage in stages]
    if any(r < 8 or r & (r - 1) for r in resolutions):
        raise TrainingError(f"schedule '{text}': resolutions are powers of two from 8 up.")
    if any(b != 2 * a for a, b in pairwise(resolutions)):
        raise TrainingError(f"schedule '{text}': each stage doubles the resolution of the one before.")
    if any(stage.images is None for stage in stages[:-1]):
        raise TrainingError(f"schedule '{text}': every stage but the last needs its number of images, e.g. 32:60k.")
    return tuple(stages)
