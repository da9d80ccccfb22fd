"""What there is to know of an installation when something does not work: versions, devices, weights, a self-test."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, TypeVar

from tpdne_cli import __version__, devices, models, store
from tpdne_cli.errors import DeviceError, TpdneError

PACKAGES = ("torch", "numpy", "pillow", "click", "tqdm", "safetensors", "platformdirs", "filelock", "urllib3")
OPTIONAL = ("av", "starlette", "uvicorn", "jinja2", "ray")  # for MP4, serve and --engine ray
LIBRARIES = ("numpy", "torch")  # of native code, which may be there and yet not load

T = TypeVar("T")


def diagnose() -> dict[str, Any]:
    """Everything, as one object of JSON; 'problems' holds a sentence for each thing that is not as it should be.

    What cannot be told is None. Where the native libraries do not load, nothing is asked that would only say so again.
    """
    problems: list[str] = []
    loaded = _load(problems)
    names = _attempt("The generators cannot be listed", models.names, problems) or []
    return {
        "tpdne": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "platform": platform.platform(),
        "packages": {name: _version(name, problems) for name in PACKAGES},
        "optional": {name: version for name in OPTIONAL if (version := _version(name))},
        "processor": _attempt("The processor cannot be told", lambda: _processor(loaded), problems),
        "devices": _attempt("The devices cannot be told", _devices, problems) if loaded else None,
        "precisions": {name: devices.survives(name) for name in ("float16", "bfloat16")} if loaded else None,
        "places": _attempt("The places of files cannot be told", _places, problems),
        "models": [_model(name, loaded, problems) for name in names],
        "self_test": _self_test(names, problems) if loaded else {"passed": False},
        "problems": problems,
    }


def _attempt(what: str, function: Callable[[], T], problems: list[str]) -> T | None:
    """What the function finds; None where it fails, which is a problem."""
    try:
        return function()
    except TpdneError as error:
        problems.append(f"{what}: {error}")
    except Exception as error:  # whatever it is, it belongs into the report
        problems.append(f"{what} ({type(error).__name__}: {devices.first_line(error)}).")
    return None


def _load(problems: list[str]) -> bool:
    """Whether the native libraries load."""
    for name in LIBRARIES:
        try:
            devices.rehearse_import(name)
            import_module(name)
        except DeviceError as error:
            problems.append(str(error))
            return False
        except Exception as error:
            reason = f"{type(error).__name__}: {devices.first_line(error)}"
            problems.append(f"The package {name} does not load ({reason}): install tpdne again.")
            return False
    return True


def _version(package: str, problems: list[str] | None = None) -> str | None:
    """problems: where the package is needed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if problems is not None:
            problems.append(f"The package {package} is missing: install tpdne again.")
        return None


def _processor(loaded: bool) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    memory = devices.memory() if sys.platform != "win32" else None
    return {"name": name, "cores": devices.cores() if loaded else os.cpu_count(), "memory": memory}


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
    return {"weights": str(models.weights_dir()), "data": str(store.data_dir()), "cache": str(store.cache_dir())}


def _model(name: str, loaded: bool, problems: list[str]) -> dict[str, Any]:
    """What a report needs of a generator; its files and its critic's are verified. Its hash needs no library."""
    describe = models.describe if loaded else _file
    about = _attempt(f"The generator {name} cannot be read", lambda: describe(name), problems)
    if about is None:
        return {"name": name, "problem": problems[-1]}
    if loaded:
        from tpdne_cli import installing

        _attempt(f"The generator {name} is damaged", lambda: installing.verify(name), problems)
    return {key: about.get(key) for key in ("name", "path", "bytes", "sha256", "arch")}


def _file(name: str) -> dict[str, Any]:
    path = models.find(name)
    return {"name": name, "path": str(path), "bytes": path.stat().st_size, "sha256": store.file_sha256(path)}


def _self_test(names: list[str], problems: list[str]) -> dict[str, Any]:
    """One image: alone and in company the same, written, read back and proven by its recipe."""
    if not names:
        problems.append("There are no bundled generators: install tpdne again.")
        return {"passed": False}
    name, start = names[0], time.perf_counter()
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
