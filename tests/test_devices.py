"""Devices that are missing, old, full or broken: one sentence each. Several at once: the same bytes, the same order."""

from __future__ import annotations

import threading
import time
import warnings

import numpy as np
import pytest
import torch
from running import files

from tpdne_cli import devices, fleet, models
from tpdne_cli.cli import run
from tpdne_cli.errors import DeviceError
from tpdne_cli.sampler import Sampler

OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
    "(Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:109.)"
)
NO_KERNEL = (
    "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronously "
    "reported at some other API call, so the stacktrace below might be incorrect.\nFor debugging consider passing "
    "CUDA_LAUNCH_BLOCKING=1"
)


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose torch was built for CUDA; what its driver says is the test's to choose."""

    def machine(available: bool = True, count: int = 1, warning: str = "", failure: str = "") -> None:
        def is_available() -> bool:
            if warning:
                warnings.warn(warning, UserWarning, stacklevel=2)
            return available

        def zeros(*_: object, **__: object) -> torch.Tensor:
            if failure:
                raise (torch.cuda.OutOfMemoryError if "memory" in failure else RuntimeError)(failure)
            return torch.ones(1)

        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch, "zeros", zeros)
        devices.cuda_problem.cache_clear()

    yield machine
    devices.cuda_problem.cache_clear()


def says(capsys, tiny_model, device: str, *words: str) -> None:
    assert run(["generate", str(tiny_model), "--seed", "1", "--device", device]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Error: ") and err.count("\n") == 1 and len(err) < 300, err
    for word in words:
        assert word in err, err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_torch_without_cuda(capsys, tiny_model, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    says(capsys, tiny_model, "cuda", "no CUDA support", "--device cpu")


def test_no_device(gpu, capsys, tiny_model):
    gpu(available=False)
    says(capsys, tiny_model, "cuda", "CUDA cannot be used (no device was found)", "nvidia-smi", "--device cpu")


def test_an_old_driver(gpu, capsys, tiny_model):
    gpu(available=False, warning=OLD_DRIVER)
    says(capsys, tiny_model, "cuda:0", "driver on your system is too old (found version 11040)", "--device cpu")


def test_a_device_number_that_is_not_there(gpu, capsys, tiny_model):
    gpu(count=2)
    says(capsys, tiny_model, "cuda:2", "There is no cuda:2", "2 CUDA device(s)")
    says(capsys, tiny_model, "cuda:0,cuda:2", "There is no cuda:2")


def test_a_device_too_old_for_this_torch(gpu, capsys, tiny_model):
    gpu(failure=NO_KERNEL)
    says(capsys, tiny_model, "cuda", "no kernel image is available", "--device cpu")


def test_a_device_that_others_have_filled(gpu, capsys, tiny_model):
    gpu(failure="CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 15.77 GiB of which")
    says(capsys, tiny_model, "cuda", "cuda cannot be used (CUDA out of memory)", "--device cpu")


def test_auto_goes_on_without_a_gpu_and_without_noise(gpu, capsys, tiny_model):
    gpu(available=False, warning=OLD_DRIVER)
    assert run(["generate", str(tiny_model), "--seed", "1", "--device", "auto"]) == 0
    assert capsys.readouterr().err == ""


def test_a_network_that_does_not_fit(capsys, tiny_model, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full")))
    assert run(["generate", str(tiny_model), "--seed", "1", "--precision", "float16"]) == 1
    assert "not enough memory for the network" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.94 GB"),
    ],
)
def test_every_way_of_saying_that_memory_ran_out(error):
    assert devices.is_out_of_memory(error)
    assert not devices.is_out_of_memory(RuntimeError("shapes differ"))


def test_apple_and_others(capsys, tiny_model, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    says(capsys, tiny_model, "mps", "no Apple GPU")
    says(capsys, tiny_model, "xpu", "not a device that tpdne runs on")
    says(capsys, tiny_model, "cpu,", "not a list of devices")
    says(capsys, tiny_model, "cpu,abacus", "'abacus' is not a device")


@pytest.mark.parametrize("device", ["cpu", "cpu,cpu", "cpu, cpu,cpu"])
def test_several_devices_make_the_same_files_in_the_same_order(capsys, tmp_path, tiny_model, device):
    call = ["generate", str(tiny_model), "--seeds", "0-40", "--batch-size", "3", "--device"]
    assert run([*call, "cpu", "-o", "one"]) == 0
    one = capsys.readouterr().out.replace("one/", "many/")
    assert run([*call, device, "-o", "many"]) == 0
    assert capsys.readouterr().out == one
    assert files(tmp_path / "one") == files(tmp_path / "many")
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_each_device_takes_the_next_batch_when_it_is_free(tiny_model, monkeypatch):
    slow, fast = (Sampler(models.load(tiny_model), batch_size=2) for _ in range(2))
    taken: dict[str, int] = {"slow": 0, "fast": 0}
    together = threading.Barrier(2, timeout=20)

    def watched(sampler: Sampler, name: str, seconds: float) -> None:
        genuine = sampler._run

        def run(seeds: list) -> list:
            if taken[name] == 0:
                together.wait()  # both are at work at the same time
            taken[name] += len(seeds)
            time.sleep(seconds)
            return genuine(seeds)

        monkeypatch.setattr(sampler, "_run", run)

    watched(slow, "slow", 0.2)
    watched(fast, "fast", 0)
    samples = list(fleet.Fleet([slow, fast])(range(41)))
    assert [s.seed for s in samples] == list(range(41))
    expected = Sampler(models.load(tiny_model))(range(41))
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(samples, expected, strict=True))
    assert sum(taken.values()) == 41 and taken["fast"] > 2 * taken["slow"]


def test_a_device_that_fails_ends_the_run_after_what_came_before(tiny_model, monkeypatch):
    samplers = [Sampler(models.load(tiny_model), batch_size=2) for _ in range(2)]
    for sampler in samplers:
        genuine = sampler._run

        def run(seeds: list, genuine=genuine) -> list:
            if 10 in seeds:
                raise DeviceError("The device fell off the bus.")
            return genuine(seeds)

        monkeypatch.setattr(sampler, "_run", run)
    seen = []
    with pytest.raises(DeviceError, match="fell off"):
        for sample in fleet.Fleet(samplers)(range(40)):
            seen.append(sample.seed)
    assert seen == list(range(10))
    assert isinstance(fleet.assemble(models.load(tiny_model), device="cpu"), Sampler)
