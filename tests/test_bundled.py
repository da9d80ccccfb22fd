"""The generators in weights/: today's code draws with them what the code that landed them drew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tpdne_cli as tpdne
from tpdne_cli.remaking import TOLERANCE

PINS = Path(__file__).with_name("golden") / "bundled.json"
SEEDS = [0, 4294967295, "alice@example.com"]
EVERY = 8  # pixels from one that is pinned to the next


def drawn(model: tpdne.Model) -> dict[str, list[list[list[int]]]]:
    """Every eighth pixel of every eighth row of each seed's image."""
    images = tpdne.sample(model, SEEDS, device="cpu", precision="float32")
    return {str(image.seed): image.pixels[::EVERY, ::EVERY].tolist() for image in images}


@pytest.mark.parametrize("name", ["faces", "cats"])
def test_the_bundled_generators_draw_what_they_drew_when_they_landed(name):
    model, pinned = tpdne.load(name), json.loads(PINS.read_text())[name]
    assert model.sha256 == pinned["weights"], f"new weights: python tests/{Path(__file__).name} pins them"
    got = drawn(model)
    assert list(got) == list(pinned["images"])
    for seed, pixels in got.items():
        apart = np.abs(np.asarray(pixels) - np.asarray(pinned["images"][seed])).max()
        assert apart <= TOLERANCE["float32"], f"{name}, seed {seed}: a pixel is {apart} levels away from its pin"


if __name__ == "__main__":  # pin anew, after looking at the pictures
    pins = {}
    for name in ("faces", "cats"):
        model = tpdne.load(name)
        pins[name] = {"weights": model.sha256, "images": drawn(model)}
    PINS.parent.mkdir(exist_ok=True)
    PINS.write_text(json.dumps(pins, separators=(",", ":")) + "\n")
