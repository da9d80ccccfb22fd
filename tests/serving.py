"""`tpdne serve` in a process of its own, for tests that need a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """(process, port) of a server that answers."""
    code = "from tpdne_cli.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", *arguments, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready, f"the server did not start: {process.communicate()[1]}"
        yield process, int(json.loads(ready)["url"].rstrip("/").rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()
