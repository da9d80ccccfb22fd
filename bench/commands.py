"""Whole commands, beside what they cannot do without: time on the clock, the least of several fresh processes that take
turns.

    python bench/commands.py           help, first (face) and many (1,000 PNGs); about two minutes
    python bench/commands.py many --json

`tpdne --help`; the first face of a cold start beside `import torch`; 1,000 faces as PNGs, start included, beside the
forward passes alone in a process that has started already. Files of the programs are in the disk's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TPDNE = [sys.executable, "-c", "from tpdne_cli.cli import main; main()"]
FACES = 1000

# In the default batches, every pixel made and none kept.
FORWARD = f"""
import time
from tpdne_cli import models
from tpdne_cli.sampler import Sampler
sampler = Sampler(models.load("faces"))
list(sampler(range(2 * sampler.batch_size)))
start = time.perf_counter()
for _ in sampler(range({FACES})):
    pass
print(time.perf_counter() - start)
"""


def clock(*command: str) -> float:
    """Seconds of a process from its start to its end."""
    start = time.perf_counter()
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def in_turn(rounds: int, **functions: Callable[[], float]) -> dict[str, float]:
    """The least that each returns, called in turn: what else the machine does can only add to it."""
    taken = [{name: function() for name, function in functions.items()} for _ in range(rounds)]
    return {name: min(turn[name] for turn in taken) for name in functions}


def help() -> dict[str, float]:
    return in_turn(10, help=lambda: clock(*TPDNE, "--help"), python=lambda: clock(sys.executable, "-c", ""))


def first() -> dict[str, float]:
    found = in_turn(
        10,
        face=lambda: clock(*TPDNE, "faces", "--seed", "1", "--out", "-"),
        import_torch=lambda: clock(sys.executable, "-c", "import torch"),
    )
    return {**found, "difference": found["face"] - found["import_torch"]}


def many() -> dict[str, float]:
    def command() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return clock(*TPDNE, "faces", "--seeds", f"0-{FACES - 1}", "--out", folder, "--quiet")

    def forward() -> float:
        output = subprocess.run([sys.executable, "-c", FORWARD], env=ENVIRONMENT, check=True, stdout=subprocess.PIPE)
        return float(output.stdout)

    found = in_turn(3, command=command, forward=forward)
    return {**found, "ratio": found["command"] / found["forward"]}


MEASUREMENTS = {"help": help, "first": first, "many": many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MEASUREMENTS)} (default: all)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    for name in given.names or MEASUREMENTS:
        found = MEASUREMENTS[name]()
        text = ", ".join(f"{key} {value:.3f}{'' if key == 'ratio' else ' s'}" for key, value in found.items())
        print(json.dumps({"measurement": name, **found}) if given.json else f"{name}: {text}", flush=True)


if __name__ == "__main__":
    main()
