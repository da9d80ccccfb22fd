"""Reads the files named on standard input under a limit of memory, and says of each what came of it.

With --load as argument it also builds the networks that the files describe.

Run on its own, so that a crash or a limit hits this process and not the tests. "PATH" reads a file; "PATH PERCENTS"
reads it cut short at each of those percents. One JSON object per reading: path, percent, error, message, and seconds
of processor time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tpdne_cli.checkpoints import sniff
from tpdne_cli.errors import CheckpointError

MEMORY = 256 << 20  # beyond what the interpreter with numpy takes, and beyond the files, which are mapped


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def attempt(path: str, percent: int | None = None) -> None:
    start = time.process_time()
    error, message = "none", ""
    try:
        message = f"read as {(load if '--load' in sys.argv else sniff.read)(path).arch}"
    except CheckpointError as caught:
        error, message = "CheckpointError", str(caught)
    except BaseException as caught:
        error, message = type(caught).__name__, str(caught)[:200]
    seconds = time.process_time() - start
    print(
        json.dumps({"path": path, "percent": percent, "error": error, "message": message, "seconds": seconds}),
        flush=True,
    )


def load(path: str) -> Any:
    from tpdne_cli import models

    return models.load(path)


def main() -> None:
    if "--load" in sys.argv:
        import torch._dynamo  # noqa: F401 - torch imports it when a network is described, and it needs much memory
    limit_memory()
    for line in sys.stdin:
        path, *percents = line.rstrip("\n").split("\t")
        if not percents:
            attempt(path)
            continue
        size = Path(path).stat().st_size
        for percent in sorted(map(int, percents), reverse=True):
            os.truncate(path, size * percent // 100)
            attempt(path, percent)


if __name__ == "__main__":
    main()
