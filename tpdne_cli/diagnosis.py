"""What there is to know of an installation when something does not work: versions, devices, weights, a self-test."""

from __future__ import annotations

import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tpdne_cli import __version__, devices, models
from tpdne_cli.errors import TpdneError

PACKAGES = ("torch", "numpy", "pillow", "click", "tqdm", "safetensors")


def diagnose() -> dict[str, Any]:
    """Everything, as one object of JSON; 'problems' holds a sentence for each thing that is not as it should be."""
    problems: list[str] = []
    return {
        "tpdne": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "platform": platform.platform(),
        "packages": {name: _version(name, problems) for name in PACKAGES},
        "processor": _processor(),
        "devices": _devices(),
        "precisions": {"float32": True, "bfloat16": devices.bfloat16_survives()},
        "places": _places(),
        "models": [_model(name, problems) for name in models.names()],
        "self_test": _self_test(problems),
        "problems": problems,
    }


def _version(package: str, problems: list[str]) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        problems.append(f"The package {package} is missing: install tpdne again.")
        return None


def _processor() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    memory = devices.memory() if sys.platform != "win32" else None
    return {"name": name, "cores": devices.cores(), "memory": memory}


def _devices() -> list[dict[str, Any]]:
    """Those that --device takes, and why CUDA is not among them."""
    import torch

    found: list[dict[str, Any]] = [{"device": "cpu", "usable": True}]
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "usable": True})
    if torch.version.cuda is None and torch.version.hip is None:
        return [*found, {"device": "cuda", "usable": False, "reason": "this build of torch has no CUDA support"}]
    if reason := devices.cuda_problem():
        return [*found, {"device": "cuda", "usable": False, "reason": reason}]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        entry = {"device": f"cuda:{index}", "usable": True, "name": about.name, "memory": about.total_memory}
        try:
            devices.choose(f"cuda:{index}")
        except TpdneError as error:
            entry |= {"usable": False, "reason": str(error)}
        found.append(entry)
    return found


def _places() -> dict[str, str]:
    from tpdne_cli import store

    return {"weights": str(models.weights_dir()), "data": str(store.data_dir()), "cache": str(store.cache_dir())}


def _model(name: str, problems: list[str]) -> dict[str, Any]:
    try:
        about = models.describe(name)
    except (TpdneError, OSError) as error:
        problems.append(f"The generator {name} cannot be read: {error}")
        return {"name": name, "problem": str(error)}
    return {key: about.get(key) for key in ("name", "path", "bytes", "sha256", "arch")}


def _self_test(problems: list[str]) -> dict[str, Any]:
    """One image: alone and in company the same, written, read back and proven by its recipe."""
    if not models.names():
        problems.append("There are no bundled generators: install tpdne again.")
        return {"passed": False}
    name, start = models.names()[0], time.perf_counter()
    try:
        reason = _fault(name)
    except Exception as error:  # whatever it is, it belongs into the report
        reason = f"{type(error).__name__}: {error}"
    if reason:
        problems.append(f"The self-test of {name} failed ({reason}).")
    return {"model": name, "passed": not reason, "seconds": round(time.perf_counter() - start, 3)}


def _fault(name: str) -> str | None:
    """What is wrong with the way from a seed to a proven file; None where nothing is."""
    from tempfile import TemporaryDirectory

    import numpy as np

    from tpdne_cli import images, inspection
    from tpdne_cli.remaking import Remaker
    from tpdne_cli.sampler import Sampler

    sampler = Sampler(models.load(name), device="cpu")
    (alone,) = sampler([0])
    if not np.array_equal(alone.pixels, list(sampler([1, 0]))[1].pixels):
        return "an image differs with the batch it is made in"
    with TemporaryDirectory() as folder:
        for format, entry in images.FORMATS.items():
            path = Path(folder) / f"test{entry.suffix}"
            images.write_atomic(path, images.encode(alone.pixels, format, recipe=alone.recipe))
            report = inspection.verify(path, Remaker(device="cpu"))
            if not report.verified:
                return f"a {format} file is not what was written: {report.sentence}"
    return None
