"""How smooth are walks? Step length from frame to frame, for every method, on closed walks of several random keys.

    python bench/smoothness.py faces cats
    python bench/smoothness.py mine.safetensors --walks 4 --keys 5 --frames 20 --truncation 0.7

Per method, means over the walks (levels of 255, root mean square over pixels):

    step      median distance between neighbouring frames
    max/med   largest step over the median step: 1 is an even walk
    turn      largest change of step, |f[k+1] - 2 f[k] + f[k-1]|, over the median step: a corner at a key is 1 or more
    spread    standard deviation of pixels over the walk: paths that cut through the middle of W look alike and bland
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from tpdne_cli import models
from tpdne_cli.interpolation import Path, Walker
from tpdne_cli.sampler import Sampler, Settings

WAYS = [("spline", "w"), ("linear", "w"), ("spline", "z"), ("linear", "z"), ("slerp", "z")]


def distance(a: np.ndarray) -> np.ndarray:
    """Root mean square over the pixels of each image; [N, H, W, C] -> [N]."""
    return np.sqrt(np.square(a).mean((1, 2, 3)))


def measure(frames: np.ndarray) -> list[float]:
    """step, max/med, turn, spread of a closed walk [N, H, W, C]."""
    before, after = np.roll(frames, 1, 0), np.roll(frames, -1, 0)
    step, turn = distance(after - frames), distance(after - 2 * frames + before)
    median = float(np.median(step))
    return [median, step.max() / median, turn.max() / median, float(frames.std(0).mean())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="installed names or files")
    parser.add_argument("--walks", type=int, default=6)
    parser.add_argument("--keys", type=int, default=6)
    parser.add_argument("--frames", type=int, default=24, help="from key to key")
    parser.add_argument("--truncation", type=float, help="default: the model's own")
    given = parser.parse_args()
    for name in given.models:
        sampler = Sampler(models.load(name), Settings(given.truncation))
        print(f"{name}: {given.walks} closed walks of {given.keys} keys, {given.frames} frames from key to key")
        print("method  space    step  max/med    turn  spread  ms/frame")
        for method, space in WAYS:
            start, results = time.perf_counter(), []
            for walk in range(given.walks):
                keys = tuple(range(walk * given.keys, (walk + 1) * given.keys))
                path = Path(keys, given.keys * given.frames, True, method, space)
                results.append(measure(np.stack([s.pixels for s in Walker(sampler, path)()]).astype(np.float32)))
            took = (time.perf_counter() - start) / (given.walks * given.keys * given.frames)
            step, ratio, turn, spread = np.mean(results, 0)
            print(
                f"{method:7} {space:5} {step:7.2f} {ratio:8.2f} {turn:7.2f} {spread:7.1f} {took * 1e3:9.1f}", flush=True
            )


if __name__ == "__main__":
    main()
