"""What all rooms' tests share: where the golden numbers are, and how to read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two torch processes with two threads each slow each other ten-fold

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("TPDNE_SHARED", ROOT.parent / "shared"))


def golden(name: str) -> Path:
    """The folder of one golden fixture; skips the test where the numbers do not lie beside the project."""
    folder = SHARED / "golden" / name
    if not folder.exists():
        pytest.skip(f"golden numbers not found: {name} is not beside the project (../shared/golden)")
    return folder


def load_tensors(path: Path) -> dict:
    """All tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)
