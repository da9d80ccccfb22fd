"""How good is a generator? Its images against photographs: distances, detected faces, memorised people, the critic.

    python -m tpdne_cli.training.evaluate weights/faces.safetensors --data faces-128.zip --sheets runs/sheets

Prints one JSON object. Distances are taken on features that this project trained (features.py), so they can be compared
between its own generators, for the same number of images, and with nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tpdne_cli import critic, models, store
from tpdne_cli.errors import TpdneError
from tpdne_cli.files import write_atomic
from tpdne_cli.sampler import Sampler, Settings
from tpdne_cli.training import data, features, memorisation, metrics
from tpdne_cli.training.detect import SIDE, find_faces
from tpdne_cli.training.precision import choose_dtype

# Where the photographs' eyes and mouths lie, of 128 px: left eye, right eye, mouth.
PLACES = ((40.9, 39.7), (86.0, 39.6), (63.5, 88.4))
PHOTOGRAPHS_SEEN = 500  # photographs shown to the face detector, for comparison
SHOWN = 64  # images on a sheet

Array = np.ndarray[Any, Any]


@dataclass
class Photographs:
    """The data a generator is measured by. Their features are kept in the file `cache`."""

    source: Path
    network: features.FeatureNet
    cache: Path

    @cached_property
    def pictures(self) -> Tensor:
        """uint8 [N, 3, 128, 128]"""
        return data.load_images(self.source, features.RESOLUTION)

    @cached_property
    def features(self) -> Tensor:
        """Of the photographs and then their mirror images, [2N, F]."""
        if self.cache.exists():
            return torch.from_numpy(np.load(self.cache))
        mirrored = [features.extract(self.network, part.flip(3)) for part in metrics.chunks(self.pictures)]
        found = torch.cat([features.extract(self.network, self.pictures), *mirrored])
        buffer = io.BytesIO()
        np.save(buffer, found.numpy())
        write_atomic(self.cache, buffer.getvalue())
        return found

    @cached_property
    def spaces(self) -> tuple[memorisation.Space, ...]:
        """The measures in which an image may turn out to be a memory."""
        pixels = memorisation.shrink(self.pictures)
        mirrored = pixels.reshape(-1, 3, memorisation.SMALL, memorisation.SMALL).flip(3).flatten(1)
        both = torch.cat([pixels, mirrored])
        return memorisation.Space("features", self.features), memorisation.Space("pixels", both)

    def some(self, number: int) -> Tensor:
        """Which photographs stand for all where only `number` can: the same ones every time."""
        return torch.randperm(len(self.features) // 2, generator=torch.Generator().manual_seed(0))[:number]


@dataclass
class Batch:
    """Images of one generator: uint8 [N, 3, R, R], their features [N, F], and the critic's scores [N] if it has one."""

    pictures: Tensor
    features: Tensor
    scores: Array | None


def draw(model: models.Model, psi: float, count: int, precision: str, network: features.FeatureNet) -> Batch:
    """The images of seeds 0, 1, ..., measured."""
    sampler = Sampler(model, Settings(psi), precision=precision)
    pixels = np.stack([sample.pixels for sample in sampler(range(count))])
    scores = None
    if critic.path_of(model).is_file():
        judge = critic.Critic.load(model, str(sampler.device))
        judge.network.set_precision(sampler.precision)
        parts = np.split(pixels, range(sampler.batch_size, count, sampler.batch_size))
        scores = np.concatenate([judge.score(part) for part in parts])
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Batch(pictures, features.extract(network, pictures), scores)


def distances(fake: Tensor, photographs: Tensor, peers: Tensor) -> dict[str, float]:
    """Of features: Frechet distance to photographs and their mirror images; precision and recall against `peers`.

    Of these and the images as many as there are of both, since the sizes of the sets move both shares.
    """
    frechet = metrics.frechet_distance(metrics.moments(fake), metrics.moments(photographs))
    precision, recall = metrics.precision_recall(peers[: len(fake)], fake[: len(peers)])
    return {"frechet": round(frechet, 3), "precision": round(precision, 4), "recall": round(recall, 4)}


def detection(pictures: Tensor, python: str) -> tuple[dict[str, Any], Array]:
    """How many images show exactly one face, and how far eyes and mouth are from their places; all confidences [N].

    Raises OSError or subprocess.CalledProcessError where that python has no MediaPipe.
    """
    seen = find_faces(np.stack([_resized(picture) for picture in pictures]), python)
    counts = np.array([s["faces"] for s in seen])
    points = np.array([s["points"][: len(PLACES)] for s in seen if s["points"]]).reshape(-1, len(PLACES), 2)
    off = np.linalg.norm(points - np.array(PLACES), axis=2)  # [M, 3]
    report: dict[str, Any] = {"one_face": _share(counts == 1), "no_face": _share(counts == 0)}
    if len(off):
        for name, distance in zip(("left_eye", "right_eye", "mouth"), off.T, strict=True):
            mean, far = float(distance.mean()), float(np.quantile(distance, 0.95))
            report[f"{name}_off_px"] = {"mean": round(mean, 2), "95%": round(far, 2)}
    return report, np.array([s["confidence"] for s in seen])


def _share(flags: Array) -> float:
    return round(float(flags.mean()), 4)


def _resized(picture: Tensor) -> Array:
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def balance(found: Tensor, network: features.FeatureNet) -> dict[str, float]:
    """Shares of women and of the age groups among features [N, F], as far as the network can tell."""
    age, gender = network.labels(found)
    shares = {"women": _share((gender == features.GENDERS.index("Female")).numpy())}
    return shares | {group: _share((age == number).numpy()) for number, group in enumerate(features.AGES)}


def ranking(batch: Batch, photographs: Photographs, confidence: Array | None) -> dict[str, Any]:
    """Does the critic put last what is broken? Its lowest and highest tenth, by measures that it knows nothing of.

    In features: share within the photographs' manifold (precision) and distance to the nearest photograph. Brightness
    (mean pixel) and the share of women show whether it prefers some people to others.
    """
    assert batch.scores is not None
    real = photographs.features[photographs.some(len(batch.features))]
    inside = metrics.covered(batch.features, real, metrics.radii(real)).numpy()
    distance = metrics.nearest(batch.features, real)[0].numpy()
    brightness = batch.pictures.float().mean([1, 2, 3]).numpy()
    report: dict[str, Any] = {"quantiles": np.quantile(batch.scores, [0, 0.1, 0.5, 0.9, 1]).round(3).tolist()}
    for name, rows in tenths(batch.scores).items():
        report[name] = {
            "precision": _share(inside[rows]),
            "distance": round(float(distance[rows].mean()), 3),
            "brightness": round(float(brightness[rows].mean()), 1),
            "women": balance(batch.features[torch.from_numpy(rows)], photographs.network)["women"],
        }
        if confidence is not None:
            report[name]["confidence"] = _share(confidence[rows])
    return report


def tenths(scores: Array) -> dict[str, Array]:
    """Rows of the lowest and of the highest tenth, in no order."""
    order, size = np.argsort(scores, kind="stable"), max(1, len(scores) // 10)
    return {"lowest": np.sort(order[:size]), "highest": np.sort(order[-size:])}


def memories(batch: Batch, photographs: Photographs, sheet: Path | None) -> dict[str, Any]:
    """Nearest photographs in features and in pixels; the closest pairs on a sheet to be looked at."""
    report, closest = {}, []
    for space in photographs.spaces:
        own = batch.features if space.name == "features" else memorisation.shrink(batch.pictures)
        report[space.name], found, rows = memorisation.compare(own, space)
        closest.append((found, rows))
    if sheet is not None:
        memorisation.write_pairs(sheet, batch.pictures, photographs.pictures, closest)
    return report


def write_grid(path: Path, pictures: Tensor, columns: int = 8) -> None:
    """A PNG of the first 64 pictures [N, 3, R, R], in rows of `columns`; what is missing in the last row is white."""
    side, shown = pictures.shape[-1], pictures[:SHOWN]
    rows = -(-len(shown) // columns)
    blank = torch.full([rows * columns - len(shown), *shown.shape[1:]], 255, dtype=torch.uint8)
    grid = torch.cat([shown, blank]).reshape(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2)
    Image.fromarray(grid.reshape(rows * side, columns * side, 3).contiguous().numpy()).save(path)


def evaluate(
    model: models.Model,
    photographs: Photographs,
    psi: float,
    count: int,
    precision: str,
    python: str,
    sheets: Path | None,
) -> dict[str, Any]:
    """All measures of one generator at one truncation; sheets into a folder where one is given."""
    batch = draw(model, psi, count, precision, photographs.network)
    real = photographs.features
    report: dict[str, Any] = distances(batch.features, real, real[photographs.some(count)])
    report["balance"] = balance(batch.features, photographs.network)
    confidence = None
    if python:
        report["detection"], confidence = detection(batch.pictures, python)
    if sheets is not None:
        write_grid(sheets / f"samples-{psi:g}.png", batch.pictures)
    if batch.scores is not None:
        report["critic"] = ranking(batch, photographs, confidence)
        for name, rows in tenths(batch.scores).items():
            if sheets is not None:
                write_grid(sheets / f"critic-{name}-{psi:g}.png", batch.pictures[torch.from_numpy(rows)])
    report["memorisation"] = memories(batch, photographs, sheets / f"pairs-{psi:g}.png" if sheets else None)
    return report


def floor(photographs: Photographs, count: int, python: str) -> dict[str, Any]:
    """The same of photographs themselves: what a perfect generator would get with so many images, or half the data.

    They are measured against the others only: no generator's images lie in the data either.
    """
    real = photographs.features
    number = len(real) // 2
    size = min(count, number // 2)
    own, peers = torch.split(photographs.some(2 * size), size)
    others = torch.ones(number, dtype=torch.bool)
    others[own] = False
    report: dict[str, Any] = {"images": size, **distances(real[own], real[others.repeat(2)], real[peers])}
    report["balance"] = balance(real, photographs.network)
    if python:
        report["detection"], _ = detection(photographs.pictures[photographs.some(PHOTOGRAPHS_SEEN)], python)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description="Measure a generator against photographs.")
    parser.add_argument("model", help="installed name or file")
    parser.add_argument("--data", type=Path, required=True, help="folder or zip of photographs")
    parser.add_argument("--images", type=int, default=10_000, help="how many to draw (default 10000)")
    parser.add_argument("--psi", default="0.7,1", help="truncations (default 0.7,1)")
    parser.add_argument("--precision", default="auto", help="of drawing and judging; bfloat16 is as good for measures")
    parser.add_argument("--features", type=Path, default=Path("runs/features.safetensors"))
    parser.add_argument("--detector", default=sys.executable, help="a python with MediaPipe 0.10.14; '' goes without")
    parser.add_argument("--sheets", type=Path, help="folder for sheets of samples, tenths and closest pairs")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        report = _report(given)
    except TpdneError as error:
        parser.exit(1, f"{error}\n")
    print(json.dumps({**report, "seconds": round(time.monotonic() - start)}, indent=1))


def _report(given: argparse.Namespace) -> dict[str, Any]:
    python = _with_mediapipe(given.detector)
    network, accuracies = features.load(given.features)
    number_format = choose_dtype("auto", network.mean.device)  # of the features: see features.extract
    stamp = f"{models.file_sha256(given.features)} {_stamp(given.data)} {number_format}"
    cache = store.make_cache_dir() / f"features-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.npy"
    photographs = Photographs(given.data, network, cache)
    model = models.load(given.model)
    if given.sheets is not None:
        given.sheets.mkdir(parents=True, exist_ok=True)
    truncations = {}
    for psi in map(float, given.psi.split(",")):
        truncations[f"{psi:g}"] = evaluate(model, photographs, psi, given.images, given.precision, python, given.sheets)
    return {
        "model": model.name,
        "weights": model.sha256,
        "images_seen": model.info.get("images_seen"),
        "resolution": model.resolution,
        "images": given.images,
        "feature_accuracy": accuracies,
        "truncation": truncations,
        "photographs": floor(photographs, given.images, python),
    }


def _stamp(data: Path) -> str:
    """What changes when the photographs of a folder or a zip do."""
    files = sorted(p for p in data.rglob("*") if p.is_file()) if data.is_dir() else [data]
    return repr([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files])


def _with_mediapipe(python: str) -> str:
    """The same, or '' with a note where it has no MediaPipe."""
    if not python:
        return ""
    try:
        subprocess.run([python, "-c", "import mediapipe"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        print(f"{python} has no MediaPipe: faces are not detected. See tpdne_cli/training/detect.py.", file=sys.stderr)
        return ""
    return python


if __name__ == "__main__":
    main()
