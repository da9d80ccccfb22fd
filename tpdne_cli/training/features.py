"""A small network that learns age and gender from FairFace's labels, and whose features measure our generators.

Distances on these features compare runs of this project with each other; they are not the published FID, which stands
on a network and photographs that we may not use.

    python -m tpdne_cli.training.features --data faces-128.zip -o runs/features.safetensors
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpdne_cli.errors import TrainingError
from tpdne_cli.files import write_atomic
from tpdne_cli.training import data
from tpdne_cli.training.precision import choose_dtype

RESOLUTION = 128
AGES = ("20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")
GENDERS = ("Female", "Male")
WIDTHS = (32, 64, 96, 128, 160)  # channels at 64, 32, 16, 8 and 4 px
TEXTURE_STAGE = 2  # the 16 px stage, which still sees hair and grain
LICENCE = "CC BY 4.0; trained on FairFace (Karkkainen & Joo, WACV 2021)"
BATCH = 64
HELD_OUT = 10  # every tenth labelled photograph is kept from the training


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (1512.03385); the first halves the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [N, I, H, W] -> [N, O, H/2, W/2]
        y = self.norm1(self.conv1(F.relu(self.norm0(self.conv0(x)))))
        return F.relu(y + self.skip(F.avg_pool2d(x, 2)))


class FeatureNet(nn.Module):
    """Photographs [N, 3, 128, 128] in [-1, 1] -> features [N, 256] of mean 0 and variance 1 over the photographs.

    The features are spatial means of two stages: one of texture, and the last, from which age and gender are told.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(below, above) for below, above in pairwise(WIDTHS))
        self.age = nn.Linear(WIDTHS[-1], len(AGES))
        self.gender = nn.Linear(WIDTHS[-1], len(GENDERS))
        size = WIDTHS[TEXTURE_STAGE] + WIDTHS[-1]
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def pooled(self, x: Tensor) -> Tensor:
        """Spatial means, not yet normalised: [N, 256] float32."""
        x = F.relu(self.stem(x))
        means = []
        for stage, block in enumerate(self.blocks, 1):
            x = block(x)
            if stage in (TEXTURE_STAGE, len(WIDTHS) - 1):
                means.append(x.float().mean([2, 3]))
        return torch.cat(means, 1)

    def logits(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Ages [N, 6] and genders [N, 2] from the last stage's share of pooled features."""
        last = pooled[:, -WIDTHS[-1] :]
        return self.age(last), self.gender(last)

    def forward(self, x: Tensor) -> Tensor:
        return (self.pooled(x) - self.mean) * self.scale

    def labels(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the network takes people for, from their features: numbers in AGES [N] and in GENDERS [N]."""
        age, gender = self.logits(features / self.scale + self.mean)
        return age.argmax(1), gender.argmax(1)


@dataclass(frozen=True)
class Labelled:
    """Photographs uint8 [N, 3, R, R] and, as class numbers with -1 for unknown, ages and genders [N]."""

    pictures: Tensor
    ages: Tensor
    genders: Tensor

    @property
    def splits(self) -> tuple[Tensor, Tensor]:
        """Numbers of the photographs with labels: those to learn from, and those held out."""
        known = torch.nonzero((self.ages >= 0) & (self.genders >= 0))[:, 0]
        held_out = torch.arange(len(known)) % HELD_OUT == 0
        return known[~held_out], known[held_out]


def load_labelled(source: Path) -> Labelled:
    """A zip of photographs with a sources.csv. Raises TrainingError where the two do not belong together."""
    pictures = data.load_images(source, RESOLUTION)
    try:
        with zipfile.ZipFile(source) as archive:
            rows = list(csv.DictReader(io.StringIO(archive.read("sources.csv").decode())))
        rows.sort(key=lambda row: row["file"])
        ages = [AGES.index(row["age"]) if row["age"] in AGES else -1 for row in rows]
        genders = [GENDERS.index(row["gender"]) if row["gender"] in GENDERS else -1 for row in rows]
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise TrainingError(f"{source} has no sources.csv with file, age and gender ({error}).") from None
    if len(rows) != len(pictures):
        raise TrainingError(f"{source} holds {len(pictures)} pictures and {len(rows)} lines in its sources.csv.")
    return Labelled(pictures, torch.tensor(ages), torch.tensor(genders))


@torch.no_grad()
def extract(network: FeatureNet, pictures: Tensor) -> Tensor:
    """Features float32 [N, 256] of uint8 [N, 3, R, R] of any size, resized to the network's."""
    return torch.cat([network(x) for x in _batches(network, pictures)])


def _batches(network: FeatureNet, pictures: Tensor) -> Iterator[Tensor]:
    """Resized float batches, under the precision that suits the machine."""
    device = network.mean.device
    with torch.autocast(device.type, torch.bfloat16, enabled=choose_dtype("auto", device) == torch.bfloat16):
        for part in torch.split(pictures, BATCH):
            x = data.to_float(part.to(device))
            if x.shape[-1] != RESOLUTION:
                x = F.interpolate(x, size=(RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
            yield x


def train(labelled: Labelled, epochs: int = 8, seed: int = 0) -> tuple[FeatureNet, dict[str, float]]:
    """A trained network, frozen, and its accuracies on the held-out photographs."""
    torch.manual_seed(seed)
    network = _channels_last(FeatureNet())
    learn, held_out = labelled.splits
    steps = epochs * (len(learn) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.2)
    bfloat16 = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
    start = time.monotonic()
    for epoch in range(epochs):
        total = 0.0
        for numbers in torch.split(learn[torch.randperm(len(learn))], BATCH)[: len(learn) // BATCH]:
            x = _augment(data.to_float(labelled.pictures[numbers]))
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                pooled = network.pooled(x)
            age, gender = network.logits(pooled)
            loss = F.cross_entropy(age, labelled.ages[numbers], label_smoothing=0.1)
            loss = loss + F.cross_entropy(gender, labelled.genders[numbers], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total * epochs / steps:.3f}, {time.monotonic() - start:.0f} s",
              file=sys.stderr)  # fmt: skip
    network.eval().requires_grad_(False)
    _normalise(network, labelled.pictures)
    return network, accuracy(network, labelled, held_out)


def _augment(x: Tensor) -> Tensor:
    """Mirrored by chance, shifted by up to 8 pixels, lighter or darker, more or less contrast; [N, 3, R, R]."""
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3))
    dx, dy = (int(torch.randint(-8, 9, ())) for _ in range(2))  # one shift for the batch is as good over many batches
    x = F.pad(x, [8, 8, 8, 8], mode="reflect")[:, :, 8 + dy :, 8 + dx :][:, :, :RESOLUTION, :RESOLUTION]
    contrast, light = 0.7 + 0.6 * torch.rand(len(x), 1, 1, 1), 0.4 * torch.rand(len(x), 3, 1, 1) - 0.2
    return (x * contrast + light).contiguous(memory_format=torch.channels_last)


def _normalise(network: FeatureNet, pictures: Tensor) -> None:
    features = extract(network, pictures).double()
    network.mean.copy_(features.mean(0))
    network.scale.copy_(1 / features.std(0).clamp_min(1e-6))


@torch.no_grad()
def accuracy(network: FeatureNet, labelled: Labelled, numbers: Tensor) -> dict[str, float]:
    """Shares of right answers over some photographs: age exactly, age within one class, gender."""
    pooled = torch.cat([network.pooled(x) for x in _batches(network, labelled.pictures[numbers])])
    age, gender = (logits.argmax(1) for logits in network.logits(pooled))
    off = (age - labelled.ages[numbers]).abs()
    shares = {"age": off == 0, "age_within_one": off <= 1, "gender": gender == labelled.genders[numbers]}
    return {name: round(right.double().mean().item(), 4) for name, right in shares.items()}


def save(network: FeatureNet, path: Path, about: dict[str, float]) -> None:
    """Write the network, its weights in float16, and its accuracies. Raises OutputError."""
    from safetensors.torch import save as to_bytes

    exact = ("mean", "scale")
    state = {k: v.half() if v.is_floating_point() and k not in exact else v for k, v in network.state_dict().items()}
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write_atomic(path, to_bytes(tensors, {"accuracy": json.dumps(about), "licence": LICENCE}))


def load(path: Path) -> tuple[FeatureNet, dict[str, float]]:
    """A network that save() wrote, frozen, and its accuracies. Raises TrainingError."""
    from safetensors import safe_open

    network = FeatureNet()
    try:
        with safe_open(path, framework="pt") as file:
            accuracies = json.loads(file.metadata()["accuracy"])
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    except Exception as error:  # a missing, damaged or foreign file: each library's own kind
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"{path} holds no feature network ({reason}): train one with python -m tpdne_cli.training.features."
        ) from None
    return _channels_last(network).eval().requires_grad_(False), accuracies


def _channels_last(network: FeatureNet) -> FeatureNet:
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save; prints the held-out accuracies as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="zip of photographs with a sources.csv")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/features.safetensors"))
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args(arguments)
    network, accuracies = train(load_labelled(given.data), given.epochs)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    save(network, given.out, accuracies)
    print(json.dumps(accuracies))


if __name__ == "__main__":
    main()
