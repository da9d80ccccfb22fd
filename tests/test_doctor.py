"""`tpdne doctor` tells what is wrong, and only that."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tpdne_cli import __version__, devices, images, models
from tpdne_cli.cli import run


@pytest.fixture
def doctor(capsys, monkeypatch):
    monkeypatch.setattr(devices, "survives", lambda precision: True)  # its child process has a test of its own

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
    for word in ("tpdne", "torch", "cores", "float16 works, bfloat16 works", "faces", "sha256", "self-test", "passed"):
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


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_a_library_that_does_not_load(doctor, weights, monkeypatch, name):
    """Where doctor is needed most, it tells all that can be told without it."""

    class Broken:
        def find_spec(self, asked: str, *_: object) -> None:
            if asked.partition(".")[0] == name:
                raise ImportError("libcudart.so.13: cannot open shared object file")

    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    code, out, err = doctor("--json")
    found = json.loads(out)
    assert code == 1 and found["packages"]["torch"] and found["devices"] is None
    (problem,) = found["problems"]
    assert f"The package {name} does not load (ImportError: libcudart" in problem and "install tpdne again" in problem
    (model,) = found["models"]
    assert model["sha256"] == hashlib.sha256((weights / "faces.safetensors").read_bytes()).hexdigest()
    code, out, err = doctor()
    assert code == 1 and re.search(r"^packages +torch \d", out, re.MULTILINE) and "not even tried" in out
    assert err == f"Error: {problem}\n"


def test_packages_that_are_missing(doctor, weights, monkeypatch):
    """What a command needs is a problem; what only serve, MP4 or ray need is none."""
    genuine, missing = metadata.version, {"tqdm", "uvicorn"}

    def version(name: str) -> str:
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return genuine(name) if name != "starlette" else "1.2.3"

    monkeypatch.setattr(metadata, "version", version)
    code, out, err = doctor("--json")
    found = json.loads(out)
    assert code == 1 and err == "Error: The package tqdm is missing: install tpdne again.\n"
    assert found["optional"]["starlette"] == "1.2.3" and "uvicorn" not in found["optional"]
    assert found["packages"]["tqdm"] is None


def test_what_fails_by_itself_hides_nothing_else(doctor, weights, monkeypatch):
    from tpdne_cli import diagnosis

    for name in ("_processor", "_devices", "_places"):
        monkeypatch.setattr(diagnosis, name, lambda *_: 1 / 0)
    code, out, err = doctor()
    assert code == 1 and err.count("ZeroDivisionError") == err.count("\n") == 3
    assert re.search(r"^faces .*sha256", out, re.MULTILINE) and "passed" in out


def test_weights_that_are_not_those_of_the_release(doctor, weights):
    digest = hashlib.sha256((weights / "faces.safetensors").read_bytes()).hexdigest()
    (weights / "SHA256SUMS").write_text(f"{digest}  faces.safetensors\n")
    assert doctor()[0] == 0
    data = bytearray((weights / "faces.safetensors").read_bytes())
    data[-3] ^= 1
    (weights / "faces.safetensors").write_bytes(data)
    code, _, err = doctor()
    assert code == 1 and "faces.safetensors has changed" in err and "install tpdne again" in err
