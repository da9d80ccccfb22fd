"""What all rooms' tests share: where the golden numbers are, and how to read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import running

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


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    running.end_all()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call `tpdne ...` in an empty directory -> (exit code, lines on stdout, stderr)."""
    from tpdne_cli.cli import run

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object):
        code = run([*map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of 32x32 pixels with random weights, as a file."""
    import torch

    from tpdne_cli import models
    from tpdne_cli.networks.stylegan2 import Config, Generator

    torch.manual_seed(0)
    config = Config(resolution=32, z_dim=32, w_dim=32, mapping_layers=2, channel_base=256, channel_max=32)
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    generator = Generator(config)
    smile = {"w": [round(value, 3) for value in torch.randn(32).tolist()], "about": "earnest to merry"}
    about = {"truncation": 0.8, "licence": "MIT", "directions": {"smile": smile}}
    models.save(path, "stylegan2", config, generator.state_dict(), about)
    return path
