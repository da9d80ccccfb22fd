"""How much faster than the published formulation (oracle.py) we are, on this machine, with the same weights.

    python bench/compare.py                      every row, about ten minutes
    python bench/compare.py sg2-256-b8 --json    one of them

The oracle, ours and the convolutions alone run in turn (A B C A B C), each in a fresh process of its own that sleeps in
between; from z to 8-bit pixels, psi 0.7, constant noise, random weights in the official shapes. For each row: seconds
per image of both, the ratio, the peak memory of their processes, the time of the network's convolutions alone
(tpdne_cli.benchmark), and how far the images are apart in levels of 255. What else the machine does can only add to a
time, so each counts with its best round; the ratios of single rounds show how much it was disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import ROWS, Row, random_state

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
PASSES = {"oracle": 1, "ours": 3, "bound": 1}  # in a round: ours are short, and what disturbs one would count for much


# The measured processes


def oracle(row: Row) -> Any:
    """A function that makes a batch of pixels, uint8 [N, H, W, C], in the published formulation."""
    import torch
    from oracle import Oracle

    from tpdne_cli.seeds import latents

    network = Oracle(row.arch, row.config, random_state(row.arch, row.config))
    z = torch.from_numpy(latents(range(row.batch), row.config.z_dim))

    def run() -> Any:
        image = network(z, psi=0.7)
        return (image.permute(0, 2, 3, 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()

    return run


def ours(row: Row) -> Any:
    """The same as every command of ours makes it."""
    sampler = our_sampler(row)

    def run() -> Any:
        import numpy as np

        return np.stack([sample.pixels for sample in sampler(range(row.batch))])

    return run


def our_sampler(row: Row) -> Any:
    from tpdne_cli.models import Model, build
    from tpdne_cli.sampler import Sampler, Settings

    arrays = {name: tensor.numpy() for name, tensor in random_state(row.arch, row.config).items()}
    generator = build(row.arch, dict(row.settings), arrays, row.title)
    model = Model(row.title, Path(), row.arch, generator, {}, "")
    return Sampler(model, Settings(truncation=0.7), device="cpu", batch_size=row.batch)


def bound(row: Row) -> Any:
    """A function that returns the operations per second of the convolutions alone."""
    import torch

    from tpdne_cli import devices
    from tpdne_cli.benchmark import convolution_rate, convolutions

    found, device = convolutions(row.arch, row.config), devices.choose("cpu")
    return lambda: convolution_rate(found, device, torch.float32, row.batch, 0)


def serve(row: Row, who: str, pixels: str) -> None:
    """Be the measured process: one pass for every line that comes in, and one line of JSON about it."""
    run = {"oracle": oracle, "ours": ours, "bound": bound}[who](row)
    for _ in sys.stdin:
        start = time.perf_counter()
        result = run()
        record = {"seconds": (time.perf_counter() - start) / row.batch, "peak_bytes": peak_memory()}
        if who == "bound":
            record["flop_per_second"] = result
        else:
            result.tofile(pixels)
        print(json.dumps(record), flush=True)


def peak_memory() -> int:
    """Bytes; from Linux, where the other way to ask would count the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


# The comparison


class Worker:
    """A fresh process that makes a pass when it is told to, and sleeps otherwise."""

    def __init__(self, key: str, who: str, pixels: Path) -> None:
        command = [sys.executable, __file__, key, "--worker", who, "--pixels", str(pixels)]
        self.pixels, self.records = pixels, []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)

    def turn(self, passes: int) -> None:
        """Make some passes and keep the middle one."""
        made = []
        for _ in range(passes):
            print(file=self.process.stdin, flush=True)
            made.append(json.loads(self.process.stdout.readline()))
        self.records.append(sorted(made, key=lambda record: record["seconds"])[(passes - 1) // 2])

    def least(self) -> float:
        return min(record["seconds"] for record in self.records)

    def close(self) -> None:
        self.process.communicate()


def compare(key: str, seconds: float, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        workers = {who: Worker(key, who, Path(folder) / who) for who in ("oracle", "ours", "bound")}
        try:
            for who, worker in workers.items():
                if who != "oracle" or ROWS[key].arch == "stylegan2":  # the other takes minutes, and needs no warming
                    worker.turn(1)
                    worker.records.clear()
            start = time.perf_counter()
            while time.perf_counter() - start < seconds or len(workers["bound"].records) < rounds:
                for who, worker in workers.items():
                    worker.turn(PASSES[who])
            return summary(key, **workers)
        finally:
            for worker in workers.values():
                worker.close()


def summary(key: str, oracle: Worker, ours: Worker, bound: Worker) -> dict[str, Any]:
    import numpy as np

    from tpdne_cli.benchmark import convolutions

    row = ROWS[key]
    a, b = (np.fromfile(worker.pixels, np.uint8).astype(int) for worker in (oracle, ours))
    gflop = sum(c.flop for c in convolutions(row.arch, row.config)) / 1e9
    rate = max(record["flop_per_second"] for record in bound.records) / 1e9
    each = [(x["seconds"], y["seconds"]) for x, y in zip(oracle.records, ours.records, strict=True)]
    return {
        "row": key,
        "network": row.title,
        "batch": row.batch,
        "rounds": len(each),
        "oracle_seconds": oracle.least(),
        "ours_seconds": ours.least(),
        "ratio": oracle.least() / ours.least(),
        "ratios": sorted(x / y for x, y in each),
        "oracle_peak_bytes": oracle.records[-1]["peak_bytes"],
        "ours_peak_bytes": ours.records[-1]["peak_bytes"],
        "gflop": gflop,
        "gflop_per_second": rate,
        "bound_seconds": gflop / rate,
        "times_the_bound": ours.least() * rate / gflop,
        "largest_difference": int(np.abs(a - b).max()),
        "differing_values": float((a != b).mean()),
        "spread": float(a.std()),
    }


def line(found: dict[str, Any]) -> str:
    return (
        f"{found['network']:33} batch {found['batch']}: oracle {found['oracle_seconds']:.3f} s/image, "
        f"ours {found['ours_seconds']:.3f}, ratio {found['ratio']:.2f} "
        f"({found['ratios'][0]:.2f} to {found['ratios'][-1]:.2f} in {found['rounds']} rounds); "
        f"peak {found['oracle_peak_bytes'] / 2**30:.2f} / {found['ours_peak_bytes'] / 2**30:.2f} GiB; "
        f"convolutions alone {found['bound_seconds']:.3f} s ({found['gflop']:.1f} GFLOP at "
        f"{found['gflop_per_second']:.0f} GFLOP/s), ours {found['times_the_bound']:.2f} times that; "
        f"at most {found['largest_difference']} levels apart, on {found['differing_values']:.4%} of values"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=30, help="per row, at least (30)")
    parser.add_argument("--rounds", type=int, default=2, help="per row, at least (2)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--pixels", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        serve(ROWS[given.rows[0]], given.worker, given.pixels)
        return
    for key in given.rows or ROWS:
        found = compare(key, given.seconds, given.rounds)
        print(json.dumps(found) if given.json else line(found), flush=True)


if __name__ == "__main__":
    main()
