"""How fast `tpdne serve` is, beside the generator alone: needs wrk, which is in Debian and Homebrew.

    python bench/serve.py faces                              10 s a measurement, 1, 16 and 256 connections

For each number of connections: requests/s, p50 and p99 of uncached images (every request another seed) and of one
cached image, and the ratio of the uncached ones to what the same machine makes without a server just before and just
after, in a process of its own: the network alone and the pipeline of `tpdne faces` (network, encoder, metadata; its
bytes go nowhere), both as `tpdne faces` runs them, with a process for each core. A single connection waits for each
image before it asks for the next: it is compared with one core that draws images one by one.
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
results = {}
for stage in ("network", "pipeline"):
    size = 1 if together == 1 else None
    sampler = assemble(models.load(name), batch_size=size, images=1 if together == 1 else 10**6)
    samples = sampler(itertools.count(10**6))
    made = samples
    if stage == "pipeline":
        sink = open(os.devnull, "wb")
        made = write_stream(((sample, "x") for sample in samples), Encoding(format), sink, tar=True)
    for _ in range(2 if together == 1 else 64):  # warm, and the queues filled
        next(made)
    start, before, count = time.perf_counter(), cpu(), 0
    while time.perf_counter() - start < seconds:
        next(made)
        count += 1
    results[stage] = {"rate": count / (time.perf_counter() - start), "cpu": (cpu() - before) / count}
    made.close()
    del sampler, samples, made
print(json.dumps(results))
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


def alone(model: str, format: str, seconds: float, together: int) -> dict[str, dict[str, float]]:
    """Without a server; one core and images one by one where `together` is 1."""
    threads = {"OMP_NUM_THREADS": "1"} if together == 1 else {}
    command = [sys.executable, "-c", ALONE, model, format, str(seconds), str(together)]
    done = subprocess.run(command, env=ENVIRONMENT | threads, check=True, capture_output=True)
    return json.loads(done.stdout)


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


def cpu_seconds(pid: int) -> float:
    total = 0.0
    for each in family(pid):
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
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--format", default="webp")
    given = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed: apt install wrk, or brew install wrk.")
    with server(given.model) as (pid, url, name):
        urlopen(f"{url}/{name}/7.{given.format}").read()
        for connections in given.connections:
            own = [alone(given.model, given.format, given.seconds / 2, connections)]
            script = FRESH.format(first=time.time() * 10 % 2**31, name=name, format=given.format)
            before = cpu_seconds(pid)
            fresh = load(url, connections, given.seconds, script)
            fresh["cpu"] = (cpu_seconds(pid) - before) / fresh["count"]
            own.append(alone(given.model, given.format, given.seconds / 2, connections))
            before = cpu_seconds(pid)
            cached = load(f"{url}/{name}/7.{given.format}", connections, given.seconds / 2)
            cached["cpu"] = (cpu_seconds(pid) - before) / cached["count"]
            report(connections, fresh, own, cached, memory(pid))


def report(connections: int, fresh: dict, own: list[dict], cached: dict, mebibytes: float) -> None:
    rate = {stage: statistics.mean(o[stage]["rate"] for o in own) for stage in own[0]}
    cpu = {stage: statistics.mean(o[stage]["cpu"] for o in own) for stage in own[0]}
    print(f"{connections} connections, {mebibytes:.0f} MiB")
    print(f"  without a server: network {rate['network']:.1f}/s ({cpu['network'] * 1e3:.1f} ms CPU each)", end="")
    print(f", pipeline {rate['pipeline']:.1f}/s ({cpu['pipeline'] * 1e3:.1f} ms)")
    print(f"  uncached {describe(fresh)}, {fresh['cpu'] * 1e3:.1f} ms CPU each")
    print(f"    of the network {fresh['rate'] / rate['network']:.0%}, of the pipeline", end="")
    print(f" {fresh['rate'] / rate['pipeline']:.0%}; by CPU time {cpu['network'] / fresh['cpu']:.0%}", end="")
    print(f" and {cpu['pipeline'] / fresh['cpu']:.0%}")
    print(f"  cached   {describe(cached)}, {cached['cpu'] * 1e6:.0f} us CPU each", flush=True)


def describe(run: dict[str, float]) -> str:
    return f"{run['rate']:.1f}/s, p50 {run['p50']:.2f} ms, p99 {run['p99']:.2f} ms, {run['errors']:.0f} errors"


if __name__ == "__main__":
    main()
