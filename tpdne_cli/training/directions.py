"""Finds named directions in W: draws images, measures what they show, and asks which steps change one measure alone.

    python -m tpdne_cli.training.directions faces --features bench/features.safetensors --detector faces/bin/python

Measures are linear in w to a good part. With X the ws, Y the standardised measures and S the covariance of w, ridge
regression gives B with Y = XB, and the likeliest steps (of least Mahalanobis length) that move one measure by a
standard deviation and none of the others are the columns of S B (B' S B)^-1. They go into the header of the
generator's file, whose hash that changes: do it before the images of a model are given to anybody.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tpdne_cli import installing, models
from tpdne_cli.checkpoints import safetensors
from tpdne_cli.errors import CheckpointError, SettingsError, TpdneError
from tpdne_cli.images import resize
from tpdne_cli.sampler import Pixels, Sampler, Settings
from tpdne_cli.training import features
from tpdne_cli.training.detect import SIDE, find_faces

IMAGES = 2_000
CHECKED = 100  # further images on which each direction is tried
RIDGE = 0.03  # of the mean variance of w
LEFT_OUT = 5  # every fifth image is kept from the regression that is judged
YEARS = (25.0, 35.0, 45.0, 55.0, 65.0, 75.0)  # middles of features.AGES

ABOUT = {
    "light": "dark at -3, light at 3",
    "warm": "cold colours at -3, warm ones at 3",
    "age": "younger below 0, older above, as a network trained on FairFace's labels guesses",
    "woman": "women above 0, men below, as a network trained on FairFace's labels guesses",
    "smile": "earnest below 0, smiling above: the width of the mouth",
    "turn": "to the left below 0, to the right above, as the onlooker sees it",
}

Array = np.ndarray[Any, np.dtype[np.float64]]


def measure(pixels: Pixels, network: features.FeatureNet | None = None, python: str = "") -> dict[str, Array]:
    """What uint8 [N, H, W, C] show, [N] each: light and colour, and as far as there are means for it age and so on.

    Not a number where there is no face to measure. Raises OSError or subprocess.CalledProcessError without MediaPipe.
    """
    side = pixels.shape[1]
    middle = pixels[:, side // 4 : 7 * side // 8, side // 4 : 3 * side // 4].astype(np.float64) / 255
    found = {"light": middle.mean((1, 2, 3))}
    if pixels.shape[3] == 3:
        found["warm"] = (middle[..., 0] - middle[..., 2]).mean((1, 2))
    if network is not None:
        seen = features.extract(network, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        ages, genders = network.logits(seen / network.scale + network.mean)
        found["age"] = (ages.softmax(1) @ torch.tensor(YEARS)).double().numpy()
        found["woman"] = (genders[:, 0] - genders[:, 1]).double().numpy()
    if python:
        faces = find_faces(np.stack([resize(image, SIDE) for image in pixels]), python)
        points = np.array([face["points"] or np.full((6, 2), np.nan) for face in faces])
        left, right, _, nose, corner, other = points.transpose(1, 0, 2)  # [N, 2] each
        apart = np.linalg.norm(right - left, axis=1)
        found["smile"] = (other - corner)[:, 0] / apart
        found["turn"] = (nose - (left + right) / 2)[:, 0] / apart
    return found


def steps(w: Array, measures: Array) -> tuple[Array, Array]:
    """Steps [K, w_dim] that each move one of the measures [N, K] of ws [N, w_dim] by a standard deviation.

    Also the shares [K] of the measures' variance that w tells of, on images that the regression was not shown.
    Raises SettingsError for fewer images than a regression needs, and for a measure that is always the same.
    """
    if len(w) <= 2 * len(measures[0]) or (measures.std(0) == 0).any():
        raise SettingsError(f"{len(w)} images do not tell what changes: draw more of them.")
    x, y = w - w.mean(0), (measures - measures.mean(0)) / measures.std(0)
    kept = np.arange(len(w)) % LEFT_OUT > 0
    rest = y[~kept] - x[~kept] @ _regression(x[kept], y[kept])
    told = 1 - rest.var(0) / y[~kept].var(0)
    b, covariance = _regression(x, y), np.cov(x.T)
    return np.linalg.solve(b.T @ covariance @ b, b.T @ covariance).astype(np.float64), told


def _regression(x: Array, y: Array) -> Array:  # [N, D], [N, K] -> [D, K]
    gram = x.T @ x / len(x)
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    b: Array = np.linalg.solve(gram + ridge, x.T @ y / len(x))
    return b


def find(
    model: models.Model, images: int = IMAGES, network: features.FeatureNet | None = None, python: str = ""
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Directions as a file's header holds them, and of each its measure's share "told" by w and its deviation "spread".

    Raises what `measure`, `steps` and a Sampler raise.
    """
    sampler = Sampler(model, Settings(truncation=1.0))
    pixels = np.stack([sample.pixels for sample in sampler(range(images))])
    measured = measure(pixels, network, python)
    table = np.stack(list(measured.values()), 1)
    with torch.inference_mode():
        w = sampler.map(list(range(images)))[:, 0].cpu().double().numpy()
    whole = np.isfinite(table).all(1)
    found, told = steps(w[whole], table[whole])
    entries = {
        name: {"w": [float(f"{value:.5g}") for value in step], "about": ABOUT[name]}
        for name, step in zip(measured, found, strict=True)
    }
    spread = dict(zip(measured, table[whole].std(0).tolist(), strict=True))
    shares = dict(zip(measured, told.round(3).tolist(), strict=True))
    return entries, {name: {"told": shares[name], "spread": spread[name]} for name in measured}


def effects(
    model: models.Model, spread: Mapping[str, float], first: int, count: int, network: Any, python: str
) -> dict[str, dict[str, float]]:
    """By how many standard deviations a step from -1 to 1 changes each measure, halved: {direction: {measure: mean}}.

    At the model's own truncation, on the seeds from `first` on. A direction that keeps its word moves itself by 1.
    """
    moved: dict[str, dict[str, float]] = {}
    for name in model.directions:
        ends = []
        for amount in (-1.0, 1.0):
            sampler = Sampler(model, Settings(attributes=((name, amount),)))
            pixels = np.stack([sample.pixels for sample in sampler(range(first, first + count))])
            ends.append(measure(pixels, network, python))
        moved[name] = {
            key: round(float(np.nanmean(ends[1][key] - ends[0][key]) / 2 / spread[key]), 2) for key in spread
        }
    return moved


def store(model: models.Model, entries: Mapping[str, Any]) -> models.Model:
    """The model with these directions in its file. Raises CheckpointError for a file that is not ours, OutputError."""
    if not models.is_ours(model.path):
        raise CheckpointError(f"{model.path} is not of our format: tpdne models import makes one that is.")
    safetensors.amend(model.path, {"directions": dict(entries)})
    installing.record_anew(model.path)
    return models.load(model.path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Find, store and try directions; prints JSON."""
    parser = argparse.ArgumentParser(description="Find named directions and write them into a generator's file.")
    parser.add_argument("model", help="installed name or file of the generator")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"how many to measure (default {IMAGES})")
    parser.add_argument("--features", type=Path, help="network that guesses age and gender")
    parser.add_argument("--detector", default="", help="a python with MediaPipe 0.10.14, for smile and turn")
    parser.add_argument("--check", type=int, default=CHECKED, help=f"images to try each on (default {CHECKED})")
    given = parser.parse_args(arguments)
    try:
        network = features.load(given.features)[0] if given.features else None
        model = models.load(given.model)
        entries, known = find(model, given.images, network, given.detector)
        model = store(model, entries)
        spread = {name: about["spread"] for name, about in known.items()}
        moved = effects(model, spread, given.images, given.check, network, given.detector) if given.check else {}
    except (TpdneError, OSError, subprocess.CalledProcessError) as error:
        parser.exit(1, f"{error}\n")
    json.dump({name: {**about, "moves": moved.get(name)} for name, about in known.items()}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
