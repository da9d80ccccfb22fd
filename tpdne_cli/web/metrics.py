"""Counters in Prometheus' text form (exposition format 0.0.4)."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping

Labels = tuple[tuple[str, str], ...]

MEANINGS = {
    "tpdne_requests_total": ("counter", "Requests by kind and status; 499: the client went away."),
    "tpdne_request_seconds": ("histogram", "From the first byte of a request to the last of its answer."),
    "tpdne_images_total": ("counter", "Images that the network made."),
    "tpdne_batches_total": ("counter", "Batches that the network ran."),
    "tpdne_network_seconds_total": ("counter", "Time the network worked."),
    "tpdne_cache_total": ("counter", "Images asked for, by whether the cache had them."),
    "tpdne_cache_bytes": ("gauge", "Bytes of encoded images in the cache."),
    "tpdne_cache_images": ("gauge", "Encoded images in the cache."),
    "tpdne_waiting": ("gauge", "Images that wait for the network."),
    "tpdne_resident_bytes": ("gauge", "Memory of all processes of the server."),
    "tpdne_workers": ("gauge", "Processes that work for the server."),
    "tpdne_info": ("gauge", "Version of tpdne."),
}
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters and histograms by name and labels; `add` may be called on any thread."""

    def __init__(self) -> None:
        self.values: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self.times: defaultdict[Labels, list[float]] = defaultdict(lambda: [0.0] * (len(BOUNDS) + 2))
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self.values[name, tuple(labels.items())] += amount

    def observe(self, seconds: float, **labels: str) -> None:
        """One request's time."""
        with self._lock:
            counts = self.times[tuple(labels.items())]
            counts[next((i for i, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))] += 1
            counts[-1] += seconds

    def render(self, gauges: Mapping[tuple[str, Labels], float]) -> str:
        """The page that Prometheus reads; gauges are looked up by the caller when asked for."""
        with self._lock:
            values = {**self.values, **gauges}
            times = {labels: list(counts) for labels, counts in self.times.items()}
        lines = []
        for name, (kind, meaning) in MEANINGS.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{_series(name, key[1])} {value:.10g}" for key, value in values.items() if key[0] == name]
            if kind == "histogram":
                lines += [line for labels, counts in times.items() for line in _histogram(name, labels, counts)]
        return "\n".join(lines) + "\n"


def _histogram(name: str, labels: Labels, counts: list[float]) -> list[str]:
    lines, total = [], 0.0
    for bound, count in zip([*map(str, BOUNDS), "+Inf"], counts[:-1], strict=True):
        total += count
        lines.append(f"{_series(name + '_bucket', (*labels, ('le', bound)))} {total:.10g}")
    return [
        *lines,
        f"{_series(name + '_sum', labels)} {counts[-1]:.10g}",
        f"{_series(name + '_count', labels)} {total:.10g}",
    ]


def _series(name: str, labels: Labels) -> str:
    if not labels:
        return name
    escaped = {key: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for key, value in labels}
    return name + "{" + ",".join(f'{key}="{value}"' for key, value in escaped.items()) + "}"


def resident_bytes(pids: Iterable[int] = ()) -> float:
    """Memory that this process and others hold now, what they share counted once; elsewhere than on Linux the largest
    that this process has held so far."""
    try:
        return _proportional("self") + sum(map(_proportional_or_none, pids))
    except OSError:
        try:
            import resource
            import sys
        except ImportError:
            return 0.0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)


def _proportional(pid: int | str) -> float:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:  # noqa: PTH123 (one read of a kernel's file)
        return next(float(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))


def _proportional_or_none(pid: int) -> float:
    try:
        return _proportional(pid)
    except (OSError, StopIteration):  # it has ended by now
        return 0.0
