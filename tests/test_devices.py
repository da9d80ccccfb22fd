"""Devices that are missing, old, full or broken: one sentence each. Several at once: the same bytes, the same order."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import children, files, shell, start

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

        def zeros(*size: object, device: object = "cpu", **settings: object) -> torch.Tensor:
            if torch.device(device).type != "cuda":
                return genuine(*size, **settings)
            if failure:
                raise (torch.cuda.OutOfMemoryError if "memory" in failure else RuntimeError)(failure)
            return torch.ones(1)

        genuine = torch.zeros
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


@pytest.mark.parametrize("failure", [NO_KERNEL, "CUDA out of memory"])
def test_auto_goes_on_without_a_gpu_that_cannot_be_used(gpu, capsys, tiny_model, failure):
    gpu(failure=failure)
    assert run(["generate", str(tiny_model), "--seed", "1"]) == 0
    assert capsys.readouterr().err == ""


def test_what_half_precision_cannot_hold_is_no_image(capsys, tiny_model, monkeypatch, tmp_path):
    """Some GPUs give NaN in float16, which would be black."""
    conv2d = F.conv2d
    broken = lambda x, *a, **k: conv2d(x, *a, **k) * (torch.nan if x.dtype == torch.float16 else 1)  # noqa: E731
    monkeypatch.setattr(F, "conv2d", broken)
    assert run(["generate", str(tiny_model), "--seed", "1", "--precision", "float16", "-o", "a.png"]) == 1
    assert "no numbers in float16: use --precision float32" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_auto_takes_the_gpu_where_there_is_one(gpu, monkeypatch):
    gpu()
    assert devices.choose("auto") == torch.device("cuda")
    gpu(available=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.choose("auto") == torch.device("mps")


def test_a_network_that_does_not_fit(capsys, tiny_model, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full")))
    assert run(["generate", str(tiny_model), "--seed", "1", "--precision", "float16"]) == 1
    assert "not enough memory for the network" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory", "torch/_refs"),
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
    assert not devices.is_out_of_memory(OSError(errno.ENOENT, "No such file or directory"))


def test_float32_on_cuda_is_no_tf32(monkeypatch):
    cudnn, matmul = SimpleNamespace(allow_tf32=True), SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert devices.choose_precision("auto", torch.device("cuda")) == torch.float16
    assert devices.choose_precision("float32", torch.device("cpu")) == torch.float32
    assert cudnn.allow_tf32 and matmul.allow_tf32
    assert devices.choose_precision("float32", torch.device("cuda")) == torch.float32
    assert not cudnn.allow_tf32 and not matmul.allow_tf32


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


linux = pytest.mark.skipif(sys.platform != "linux", reason="worker processes are forked on Linux only")


@linux
@pytest.mark.parametrize("command", ["inspect --verify x.png", "inspect x.png", "bench", "doctor"])
@pytest.mark.parametrize("end", ["os.abort()", "os._exit(1)", "raise OSError(errno.ENOMEM, 'Cannot allocate memory')"])
def test_libraries_that_end_a_process_without_memory_do_so_in_a_copy_of_it(tmp_path, monkeypatch, capfd, command, end):
    """As OpenBLAS and torch do where `ulimit -v` leaves them too little: one sentence, whichever command loads them."""
    monkeypatch.setattr(devices, "_address_space_is_limited", lambda: True)
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    mother = os.getpid()

    def load(package: str) -> None:
        assert os.getpid() != mother and package in ("numpy", "torch")
        faulthandler.disable()  # pytest's
        exec(f"import errno, os; {end}")

    monkeypatch.setattr(devices, "import_module", load)
    assert run(command.split()) == 1
    out, err = capfd.readouterr()
    assert err == "Error: There is not enough memory to begin: close other programs, or raise the limit (ulimit -v).\n"
    assert ("packages" in out) == (command == "doctor"), "which tells what it can"


@linux
@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect --verify -q x.png", "bench", "doctor"])
def test_a_limit_of_memory_that_not_even_the_libraries_fit_in(tmp_path, tiny_model, command):
    assert run(["generate", str(tiny_model), "--seed", "1", "-o", "x.png"]) == 0
    done = shell(f"ulimit -v 500000; tpdne {command}", tmp_path, cold=True)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr
    assert done.stderr.startswith(b"Error: There is not enough memory to begin"), done.stderr


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 2)


@linux
def test_processes_make_the_same_files(two_cores, capsys, tmp_path, tiny_model):
    before = children(os.getpid())
    call = ["generate", str(tiny_model), "--seeds", "0-40", "--seed", "bob", "--batch-size", "3", "--noise", "random"]
    assert run([*call, "-o", "many"]) == 0
    assert run([*call, "-o", "one", "--device", "cpu,cpu"]) == 0
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    assert len(files(tmp_path / "many")) == 42
    assert children(os.getpid()) == before, "the processes end with the run"


@linux
def test_how_many_processes(two_cores, tiny_model, monkeypatch):
    sampler = Sampler(models.load(tiny_model), batch_size=8)
    assert isinstance(fleet.assemble(sampler.model, images=100), fleet.Fleet)
    assert [fleet.processes(sampler, n) for n in (1, 8, 9, 1000)] == [1, 1, 2, 2]
    monkeypatch.setattr(devices, "memory", lambda: 3 << 30)
    assert fleet.processes(sampler, 1000) == 1, "a small machine"
    monkeypatch.setattr(devices, "memory", lambda: 64 << 30)
    monkeypatch.setattr(fleet, "LARGEST_FOR_PROCESSES", 16)
    assert fleet.processes(sampler, 1000) == 1, "a large network"


@linux
def test_errors_of_a_process_are_those_of_its_sampler(two_cores, tiny_model, monkeypatch):
    monkeypatch.setattr(Sampler, "_run", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(DeviceError, match="not enough memory for one image of tiny"):
        list(fleet.assemble(models.load(tiny_model), images=100)(range(100)))


@linux
def test_a_process_that_is_killed_is_told_in_one_sentence(two_cores, capsys, tiny_model, monkeypatch):
    mother = os.getpid()
    monkeypatch.setattr(Sampler, "_run", lambda *_: os.getpid() != mother and os.kill(os.getpid(), signal.SIGKILL))
    assert run(["generate", str(tiny_model), "--seeds", "0-40"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Error: A worker process was killed") and err.count("\n") == 1


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("cores", [1, 2])
def test_a_process_that_dies_of_a_large_batch_is_followed_by_one_with_a_smaller(
    tiny_model, capfd, monkeypatch, number, cores
):
    """As the kernel's killer does, and native code that does not look at what malloc gave it."""
    monkeypatch.setattr(devices, "cores", lambda: cores)
    monkeypatch.setattr(devices, "memory_is_limited", lambda: True)
    before, genuine, mother = children(os.getpid()), Sampler._run, os.getpid()

    def fragile(self: Sampler, seeds: list) -> list:
        assert os.getpid() != mother, "it would have been this process"
        if len(seeds) > 2:
            faulthandler.disable()  # pytest's
            os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'")
            os.kill(os.getpid(), number)
        return genuine(self, seeds)

    expected = list(Sampler(models.load(tiny_model))(range(33)))
    monkeypatch.setattr(Sampler, "_run", fragile)
    samples = list(fleet.assemble(models.load(tiny_model), images=33, batch_size=8)(range(33)))
    assert [s.seed for s in samples] == list(range(33))
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(samples, expected, strict=True))
    assert capfd.readouterr().err == "", "the end of a process is no news for the user"
    assert children(os.getpid()) == before


@linux
def test_a_system_that_grants_no_process(tiny_model, monkeypatch):
    """None at first: this one does the work. None after one has died: a sentence."""
    genuine, mother, forks = os.fork, os.getpid(), []

    def fork() -> int:
        forks.append(1)
        if len(forks) > granted:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return genuine()

    monkeypatch.setattr(devices, "memory_is_limited", lambda: True)
    monkeypatch.setattr(os, "fork", fork)
    granted = 0
    assert isinstance(fleet.assemble(models.load(tiny_model), images=1), Sampler)
    granted, forks = 1, []
    monkeypatch.setattr(Sampler, "_run", lambda *_: os.getpid() != mother and os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DeviceError, match="no other can be had"):
        list(fleet.assemble(models.load(tiny_model), images=1)(range(2)))


@linux
def test_a_forked_process_uses_threads_where_it_is_alone(tiny_model, monkeypatch):
    """OpenMP's threads do not follow a fork: it would wait for them for ever."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(devices, "cores", lambda: 2)
    monkeypatch.setattr(devices, "memory_is_limited", lambda: True)
    torch.set_num_threads(2)
    try:
        torch.randn(1 << 20).exp().sum().item()  # starts this process's own
        fleet_of_one = fleet.assemble(models.load(tiny_model), images=1)
        (worker,) = fleet_of_one.samplers
        (image,) = fleet_of_one([5])
        running = len(list(Path(f"/proc/{children(os.getpid())[-1]}/task").iterdir()))
    finally:
        torch.set_num_threads(threads)
    assert worker.threads == 2 and running >= 2
    (expected,) = Sampler(models.load(tiny_model))([5])
    assert np.array_equal(image.pixels, expected.pixels)


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path, tiny_model, number):
    """Ctrl-C goes to the whole group, kill -9 to the parent alone."""
    child = start("generate", tiny_model, "--seeds", "0-9999", "-o", "d", cwd=tmp_path, cold=True, OMP_NUM_THREADS="2")
    child.stdout.readline()
    workers = children(child.pid)
    if len(workers) != 2:
        child.kill()
        pytest.skip(f"this machine grants {len(workers)} processes")
    for pid in [child.pid, *workers] if number == signal.SIGINT else [child.pid]:
        os.kill(pid, number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == (130 if number == signal.SIGINT else -9) and b"Traceback" not in err
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cwd").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker goes on without its parent"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "1000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu.max": "garbage"}, 16),
    ],
)
def test_cores_of_a_container(monkeypatch, files, expected):
    def read_text(path: Path, *_: object) -> str:
        name = path.relative_to("/sys/fs/cgroup").as_posix()
        if name not in files:
            raise FileNotFoundError
        return files[name]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert devices.cores.__wrapped__() == expected


@linux
@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/", {}, []),
        ("0::/", {"memory.max": "max"}, []),
        ("0::/", {"memory.max": "1000"}, [1000]),  # a container sees its own as the root
        ("0::/a.slice/b.scope", {"a.slice/memory.max": "1000", "a.slice/b.scope/memory.max": "2000"}, [1000, 2000]),
        ("3:cpu,cpuacct:/x\n4:memory:/job/7", {"memory/job/memory.limit_in_bytes": "500"}, [500]),
        ("4:memory:/of/the/host", {"memory/memory.limit_in_bytes": "600"}, [600]),  # mounted in a container
        ("garbage", {"memory.max": "1000"}, [1000]),
    ],
)
def test_memory_of_a_control_group(monkeypatch, groups, limits, expected):
    def read_text(path: Path, *_: object) -> str:
        if str(path) == "/proc/self/cgroup":
            return groups
        name = path.relative_to("/sys/fs/cgroup").as_posix()
        if name not in limits:
            raise FileNotFoundError
        return limits[name]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert sorted(devices._memory_limits.__wrapped__()) == expected
    monkeypatch.setattr(devices, "_memory_limits", lambda: expected)
    assert devices.memory_is_limited() == bool(expected) and (not expected or devices.memory() == expected[0])
