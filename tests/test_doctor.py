"""`tpdne doctor` tells what is wrong, and only that."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from tpdne_cli import __version__, devices, images, models
from tpdne_cli.cli import run


@pytest.fixture
def doctor(capsys, monkeypatch):
    monkeypatch.setattr(devices, "bfloat16_survives", lambda: True)  # its child process has a test of its own

    def call(*arguments: str):
        code = run(["doctor", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def weights(tmp_path, tiny_model, monkeypatch) -> Path:
    """The small model in the place of the bundled ones."""
    shutil.copy(tiny_model, tmp_path / "faces.safetensors")
    monkeypatch.setattr(models, "weights_dir", lambda: tmp_path)
    return tmp_path


def test_a_healthy_installation(doctor):
    code, out, err = doctor("--json")
    found = json.loads(out)
    assert (code, err, found["problems"]) == (0, "", [])
    assert found["tpdne"] == __version__ and found["self_test"]["passed"]
    assert found["packages"]["torch"] and found["processor"]["cores"] >= 1
    assert {"faces", "cats"} <= {model["name"] for model in found["models"]}
    for model in found["models"]:
        assert model["sha256"] == hashlib.sha256(Path(model["path"]).read_bytes()).hexdigest()
    assert found["devices"][0] == {"device": "cpu", "usable": True}


def test_the_same_for_people(doctor, weights, monkeypatch):
    monkeypatch.setenv("HOME", str(weights.parent))
    code, out, err = doctor()
    assert (code, err) == (0, "")
    for word in ("tpdne", "torch", "cores", "float32 works, bfloat16 works", "faces", "sha256", "self-test", "passed"):
        assert word in out
    assert re.search(r"^weights +~/", out, re.MULTILINE), "a name of a user does not belong in a bug report"


def test_a_damaged_generator(doctor, weights):
    (weights / "cats.safetensors").write_bytes((weights / "faces.safetensors").read_bytes()[:100])
    code, _, err = doctor()
    assert code == 1 and "The generator cats cannot be read" in err and "Traceback" not in err


def test_no_generator_at_all(doctor, weights):
    (weights / "faces.safetensors").unlink()
    code, out, err = doctor("--json")
    assert code == 1 and "install tpdne again" in err
    assert json.loads(out)["self_test"] == {"passed": False}


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_an_encoder_that_writes_something_else(doctor, weights, monkeypatch, format):
    genuine = images.encode

    def encode(pixels, chosen="png", *rest, **settings):
        return genuine(255 - pixels if chosen == format and settings else pixels, chosen, *rest, **settings)

    monkeypatch.setattr(images, "encode", encode)
    code, _, err = doctor()
    assert code == 1 and f"a {format} file is not what was written" in err


def test_an_encoder_that_fails(doctor, weights, monkeypatch):
    monkeypatch.setattr(images, "encode", lambda *_, **__: 1 / 0)
    code, _, err = doctor()
    assert code == 1 and "ZeroDivisionError" in err and err.count("\n") == 1
