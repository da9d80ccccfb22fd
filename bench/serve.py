"""How fast `tpdne serve` is, beside the generator alone: needs wrk, which is in Debian and Homebrew.

    python bench/serve.py faces       three rounds with 10 s of requests each, for 1, 16 and 256 connections

For each number of connections: requests/s, p50 and p99 of uncached images (every request another seed) and of one
cached image, and what part the uncached ones are of what the machine makes without a server just before and after:
of the network alone, and of the pipeline of `tpdne faces` (network, encoder, metadata; its bytes go nowhere), both as
`tpdne faces` runs them, with a process for each core. A single connection waits for each image before it asks for the
next: it is compared with one core that draws images one by one. All are medians of the rounds.
Other work on the machine disturbs seconds, so the CPU time that server and pipeline spend on an image is compared, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TICK = os.sysconf("SC_CLK_TCK")

ALONE = """
import contextlib, glob, itertools, json, os, sys, time
from tpdne_cli import models
from tpdne_cli.fleet import assemble
from tpdne_cli.pipeline import Encoding, write_stream

def cpu():
    total = 0
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = open(path).read().rpartition(")")[2].split()
            if path == f"/proc/{os.getpid()}/stat" or int(fields[1]) == os.getpid():
                total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")

name, format, seconds, together = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
sampler = assemble(models.load(name), batch_size=1 if together == 1 else None, images=1 if together == 1 else 10**6)
for line in sys.stdin:
    samples = made = sampler(itertools.count(10**6))
    if line.strip() == "pipeline":
        sink = open(os.devnull, "wb")
        made = write_stream(((sample, "x") for sample in samples), Encoding(format), sink, tar=True)
    for _ in range(2 if together == 1 else 64):  # warm, and the queues filled
        next(made)
    start, before, count = time.perf_counter(), cpu(), 0
    while time.perf_counter() - start < seconds:
        next(made)
        count += 1
    print(json.dumps({"rate": count / (time.perf_counter() - start), "cpu": (cpu() - before) / count}), flush=True)
    made.close()
"""

# Every request another seed; each thread of wrk counts in a range of its own.
FRESH = """
local first = math.floor({first})
local count = 0
function request()
  count = count + 1
  return wrk.format("GET", "/{name}/" .. string.format("%d", first + count) .. ".{format}")
end
"""


@contextlib.contextmanager
def alone(model: str, format: str, seconds: float, together: int):
    """stage -> what it does without a server; one core and images one by one where `together` is 1."""
    threads = {"OMP_NUM_THREADS": "1"} if together == 1 else {}
    command = [sys.executable, "-c", ALONE, model, format, str(seconds), str(together)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=ENVIRONMENT | threads, **pipes)

    def measure(stage: str) -> dict[str, float]:
        process.stdin.write(f"{stage}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield measure
    finally:
        process.stdin.close()
        process.wait()


@contextlib.contextmanager
def server(model: str):
    command = [
        sys.executable,
        "-c",
        "from tpdne_cli.cli import main; main()",
        "serve",
        model,
        "--port=0",
        "--json",
        "-q",
    ]
    process = subprocess.Popen([*command, "--queue=512"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        ready = json.loads(process.stdout.readline())
        yield process.pid, ready["url"].rstrip("/"), ready["models"][0]
    finally:
        process.terminate()
        process.wait()


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found


def cpu_seconds(*pids: int) -> float:
    total = 0.0
    for each in pids:
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICK
    return total


def memory(pid: int) -> float:
    """MiB of all processes, what they share counted once."""
    texts = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in family(pid)]
    return sum(int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1]) for text in texts) / 1024


def load(url: str, connections: int, seconds: float, script: str | None = None) -> dict[str, float]:
    """One run of wrk."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script or "")
        file.flush()
        scripted = ["-s", file.name] if script else []
        command = ["wrk", "-t1", f"-c{connections}", f"-d{round(seconds)}s", "--timeout=60s", "--latency"]
        report = subprocess.run([*command, *scripted, url], check=True, capture_output=True, text=True).stdout

    def milliseconds(label: str) -> float:
        value, unit = re.search(rf"{label}\s+([\d.]+)(us|ms|s|m)\b", report).groups()
        return float(value) * {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}[unit]

    count = int(re.search(r"(\d+) requests in", report)[1])
    errors = sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", report)))
    errors += int((re.search(r"Non-2xx or 3xx responses: (\d+)", report) or [0, 0])[1])
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", report)[1])
    return {"rate": rate, "count": count, "p50": milliseconds("50%"), "p99": milliseconds("99%"), "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="faces")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--format", default="webp")
    given = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed: apt install wrk, or brew install wrk.")
    with server(given.model) as (pid, url, name):
        urlopen(f"{url}/{name}/7.{given.format}").read()
        for connections in given.connections:
            with alone(given.model, given.format, given.seconds / 2, connections) as own:
                rounds = [measure(pid, url, name, own, connections, given) for _ in range(given.rounds)]
            report(connections, rounds, memory(pid))


def measure(pid: int, url: str, name: str, own, connections: int, given) -> dict[str, dict[str, float]]:
    script = FRESH.format(first=time.time() * 1000 % 2**31, name=name, format=given.format)
    found = {"network": own("network")}
    before, http = cpu_seconds(*family(pid)), cpu_seconds(pid)
    fresh = found["uncached"] = load(url, connections, given.seconds, script)
    fresh["cpu"] = (cpu_seconds(*family(pid)) - before) / fresh["count"]
    fresh["http"] = (cpu_seconds(pid) - http) / fresh["count"]
    found["pipeline"] = own("pipeline")
    before = cpu_seconds(pid)
    cached = found["cached"] = load(f"{url}/{name}/7.{given.format}", connections, given.seconds / 2)
    cached["cpu"] = (cpu_seconds(pid) - before) / cached["count"]
    return found


def report(connections: int, rounds: list[dict[str, dict[str, float]]], mebibytes: float) -> None:
    """Medians over the rounds; ratios are those of each round."""

    def median(what: str, key: str) -> float:
        return statistics.median(found[what][key] for found in rounds)

    print(f"{connections} connections, {mebibytes:.0f} MiB")
    for stage in ("network", "pipeline"):
        ratio = statistics.median(found["uncached"]["rate"] / found[stage]["rate"] for found in rounds)
        cpu = statistics.median(found[stage]["cpu"] / found["uncached"]["cpu"] for found in rounds)
        print(f"  {stage} alone {median(stage, 'rate'):.1f}/s, {median(stage, 'cpu') * 1e3:.1f} ms CPU each;", end="")
        print(f" the server makes {ratio:.0%} of that, by CPU time {cpu:.0%}")
    for what in ("uncached", "cached"):
        errors = sum(found[what]["errors"] for found in rounds)
        print(f"  {what} {median(what, 'rate'):.1f}/s, p50 {median(what, 'p50'):.2f} ms,", end="")
        print(f" p99 {median(what, 'p99'):.2f} ms, {errors:.0f} errors, {median(what, 'cpu') * 1e3:.2f} ms CPU each")
    print(
        f"  of an uncached one's CPU time {median('uncached', 'http') * 1e3:.2f} ms outside of the workers", flush=True
    )


if __name__ == "__main__":
    main()
