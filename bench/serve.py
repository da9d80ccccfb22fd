"""How fast `tpdne serve` is, beside the sampler alone: needs wrk, which is in Debian and Homebrew.

    python bench/serve.py faces                              10 s a measurement, 1, 16 and 256 connections
    taskset -c 1 python bench/serve.py faces --seconds 5     on one core, which server and client then share

For each number of connections: requests/s, p50 and p99 of uncached images (every request another seed) and of one
cached image; the sampler's own images/s, without and with encoding, measured just before and just after in a process
of its own; and the ratio of the two. Other work on the machine disturbs seconds, so the CPU time that the server and
the sampler spend on an image is compared, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TICK = os.sysconf("SC_CLK_TCK")

SAMPLER = """
import itertools, json, sys, time
from tpdne_cli import models
from tpdne_cli.pipeline import Encoding
from tpdne_cli.sampler import Sampler
encoding, seconds, results = Encoding(sys.argv[2]), float(sys.argv[3]), {}
sampler = Sampler(models.load(sys.argv[1]))
sampler.batch_size = min(sampler.batch_size, int(sys.argv[4]))
list(sampler(range(2 * sampler.batch_size)))
for name, finish in (("sampler", lambda sample: sample), ("sampler and encoder", encoding)):
    start, cpu, count = time.perf_counter(), time.process_time(), 0
    for sample in sampler(itertools.count(10**6)):
        finish(sample)
        count += 1
        if time.perf_counter() - start > seconds:
            break
    results[name] = {"rate": count / (time.perf_counter() - start), "cpu": (time.process_time() - cpu) / count}
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


def sampler(model: str, format: str, seconds: float, together: int) -> dict[str, dict[str, float]]:
    """In batches of no more than what can come together."""
    command = [sys.executable, "-c", SAMPLER, model, format, str(seconds), str(together)]
    return json.loads(subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True).stdout)


@contextmanager
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


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def resident(url: str) -> float:
    text = urlopen(f"{url}/metrics").read().decode()
    return float(re.search(r"^tpdne_resident_bytes (\S+)", text, re.MULTILINE)[1]) / 2**20


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
    rows = []
    with server(given.model) as (pid, url, name):
        urlopen(f"{url}/{name}/7.{given.format}").read()
        for connections in given.connections:
            own = [sampler(given.model, given.format, given.seconds / 2, connections)]
            script = FRESH.format(first=time.time() * 10 % 2**31, name=name, format=given.format)
            before = cpu_seconds(pid)
            fresh = load(url, connections, given.seconds, script)
            fresh["cpu"] = (cpu_seconds(pid) - before) / fresh["count"]
            own.append(sampler(given.model, given.format, given.seconds / 2, connections))
            before = cpu_seconds(pid)
            cached = load(f"{url}/{name}/7.{given.format}", connections, given.seconds)
            cached["cpu"] = (cpu_seconds(pid) - before) / cached["count"]
            rows.append((connections, fresh, own, cached, resident(url)))
    for connections, fresh, own, cached, memory in rows:
        rate = {kind: statistics.mean(o[kind]["rate"] for o in own) for kind in own[0]}
        cpu = statistics.mean(o["sampler and encoder"]["cpu"] for o in own)
        print(f"{connections} connections, {memory:.0f} MiB")
        print(f"  sampler alone {rate['sampler']:.1f}/s, with encoder {rate['sampler and encoder']:.1f}/s", end="")
        print(f" ({cpu * 1e3:.1f} ms CPU each)")
        print(f"  uncached {describe(fresh)}, {fresh['cpu'] * 1e3:.1f} ms CPU each")
        print(f"    of the sampler {fresh['rate'] / rate['sampler']:.0%}", end="")
        print(f", of both {fresh['rate'] / rate['sampler and encoder']:.0%}, by CPU time {cpu / fresh['cpu']:.0%}")
        print(f"  cached   {describe(cached)}, {cached['cpu'] * 1e6:.0f} us CPU each")


def describe(run: dict[str, float]) -> str:
    return f"{run['rate']:.1f}/s, p50 {run['p50']:.2f} ms, p99 {run['p99']:.2f} ms, {run['errors']:.0f} errors"


if __name__ == "__main__":
    main()
