"""Which device and precision a network runs on, and how large a batch suits it."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tpdne_cli.errors import DeviceError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "float32", "bfloat16", "float16")

OUT_OF_MEMORY = (  # in the words of torch, its libraries and drivers
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "alloc_failed",
    "create a primitive",
)
MARGIN = 64 << 20  # bytes between a rehearsal and the limit, for what is in no rehearsal: threads, encoders
NO_ROOM = "There is not enough memory to begin: close other programs, or raise the limit (ulimit -v)."

# Run in a child process: on virtual machines that advertise matrix units without tiles, bfloat16 kills the caller.
PROBE = """
import sys
import torch
dtype = getattr(torch, sys.argv[1])
a = torch.randn(64, 64, dtype=dtype)
x = torch.randn(2, 64, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
w = torch.randn(64, 64, 3, 3, dtype=dtype)
results = [a @ a, torch.conv2d(x, w), torch.conv_transpose2d(x, w, stride=2)]
raise SystemExit(0 if all(r.isfinite().all() for r in results) else 1)
"""


def choose(name: str) -> torch.device:
    """'auto' (CUDA, then Apple's MPS, then CPU), 'cpu', 'cuda', 'cuda:1' or 'mps' -> a device that can be used.

    Raises DeviceError for one that is not.
    """
    import torch

    if name == "auto":
        name = _usable_cuda() or ("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps.") from None
    if device.type == "cuda":
        _check_cuda(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("This machine has no Apple GPU (mps): use --device cpu.")
    elif device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"{name!r} is not a device that tpdne runs on: use auto, cpu, cuda, cuda:1 or mps.")
    if device.type == "cpu":
        keep_freed_memory()
        if torch.get_num_threads() > cores():
            torch.set_num_threads(cores())
    return device


def _usable_cuda() -> str | None:
    """The first GPU that can be used: one may be too old for this build of torch, or full. `tpdne doctor` says why."""
    import torch

    count = torch.cuda.device_count() if cuda_problem() is None else 0
    for name in ("cuda", *(f"cuda:{i}" for i in range(1, count)))[:count]:
        with suppress(DeviceError):
            _check_cuda(torch.device(name))
            return name
    return None


def _check_cuda(device: torch.device) -> None:
    """Raises DeviceError, in one sentence, for each way in which a GPU can fail to be there."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError("This build of torch has no CUDA support: install one that has, or use --device cpu.")
    if reason := cuda_problem():
        raise DeviceError(f"CUDA cannot be used ({reason}): check nvidia-smi, or use --device cpu.")
    if device.index is not None and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError(f"There is no {device}: this machine has {count} CUDA device(s), from cuda:0 on.")
    try:  # a GPU that is there may be too old for this build, broken, full, or another process's alone
        torch.zeros(1, device=device).add(1).item()
    except RuntimeError as error:
        raise DeviceError(f"{device} cannot be used ({first_line(error)}): use another, or --device cpu.") from None


@functools.cache
def cuda_problem() -> str | None:
    """Why CUDA is not available, where torch tells (an old driver, no device); None where it is."""
    import torch

    with warnings.catch_warnings(record=True) as told:  # torch says what is wrong in a warning of several lines
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    return first_line(told[0].message) if told else "no device was found"


def first_line(error: object) -> str:
    """What an exception or a warning of torch says first, short enough for a sentence."""
    text = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    return text if len(text) <= 160 else text[:157] + "..."


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """'auto' is float32 everywhere but on CUDA, where all convolutions run in float16.

    Published networks mostly do so at their highest resolutions only. float32 is the whole of it: torch is told, for
    this process, not to shorten factors to TF32. Raises DeviceError where a precision is not to be had.
    """
    import torch

    if name not in PRECISIONS:
        raise DeviceError(f"{name!r} is not a precision: use one of {', '.join(PRECISIONS)}.")
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    if name == "bfloat16" and device.type == "cpu" and not bfloat16_survives():
        raise DeviceError("bfloat16 crashes or fails on this processor: use --precision float32.")
    dtype: torch.dtype = getattr(torch, name)
    if dtype == torch.float32 and device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return dtype


def bfloat16_survives() -> bool:
    return survives("bfloat16")


@functools.cache
def survives(precision: str) -> bool:
    """Whether a child process lives through products and convolutions in a precision on this CPU."""
    command, environment = [sys.executable, "-c", PROBE, precision], {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        probe = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0


def batch_size(device: torch.device, resolution: int) -> int:
    """Images per batch: on a CPU few, so that activations stay in its cache; on a GPU as many as keep it busy."""
    if device.type == "cpu":
        return max(1, min(8, 1024 // resolution))
    return max(1, min(64, 64 * 256 * 256 // resolution**2))


def place(generator: Any, device: torch.device, precision: torch.dtype) -> Any:
    """The generator on a device with its convolutions in a precision; the same object where it is there already.

    One without weights (of torch's meta device) stands for another process's and stays as it is. Raises DeviceError
    where the device has no room for it.
    """
    import copy

    import torch

    elsewhere = device.type != "cpu" or precision != torch.float32
    if elsewhere and not any(parameter.is_meta for parameter in generator.parameters()):
        try:
            generator = copy.deepcopy(generator).to(device)
            generator.synthesis.set_precision(precision)
            from tpdne_cli.networks.ops import prepare

            prepare(generator)  # what was folded lies on the old device
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceError(
                f"There is not enough memory for the network on {device}: free some, or use another --device."
            ) from None
    return generator


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception means that memory ran out, whichever way libraries say so."""
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, which to import may fail
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    if isinstance(error, ImportError):
        return any(sign in text for sign in ("failed to map", "allocate memory"))
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)


def release_memory(device: torch.device) -> None:
    """Give cached blocks back before trying again with less."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":  # what keep_freed_memory keeps, threads and encoders may need now
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@functools.cache
def cores() -> int:
    """Processor cores for this process: torch's own count (OMP_NUM_THREADS, affinity) within the container's limit.

    More threads than a container may run at once wait for each other most of the time.
    """
    import torch

    threads = torch.get_num_threads()
    quotas = _limits("cpu/cpu.cfs_quota_us"), _limits("cpu/cpu.cfs_period_us")
    for numbers in [*_limits("cpu.max"), *([*q, *p] for q, p in zip(*quotas, strict=False))]:
        if len(numbers) == 2 and numbers[1] > 0:
            threads = min(threads, -(-numbers[0] // numbers[1]))
    return max(1, threads)


def memory() -> int:
    """Bytes of memory of this machine, or of its container."""
    return min([_physical_memory(), *_memory_limits()])


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _memory_limits() -> list[int]:
    return [*chain(*_limits("memory.max"), *_limits("memory/memory.limit_in_bytes"))]


def _limits(name: str) -> list[list[int]]:
    """What a file of Linux's control groups says to this process's group and to those around it.

    name: in version 2 that of the file; in version 1 with its controller before it. A limit may be set on any of them.
    No numbers where a file says 'max', and no list where it is not there.
    """
    root, (controller, _, file) = Path("/sys/fs/cgroup"), name.rpartition("/")
    groups = {Path(controller)}
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                own = Path(controller) / path.strip("/")
                groups |= {own, *(parent for parent in own.parents if parent.is_relative_to(controller))}
    found = []
    for group in sorted(groups):
        with suppress(OSError, ValueError):
            words = (root / group / file).read_text().split()
            found.append([int(word) for word in words if word.isdecimal()])
    return found


def memory_is_limited() -> bool:
    """Whether something less than the machine bounds this process on Linux: `ulimit -v`, a batch system, a container.

    There memory may well run out, and native code does not always survive that.
    """
    if sys.platform != "linux":
        return False
    return _address_space_is_limited() or memory() < _physical_memory()


def _address_space_is_limited() -> bool:
    """Whether `ulimit -v` or a batch system bounds this process."""
    if sys.platform != "linux":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def rehearse(work: Callable[[], object]) -> None:
    """Where address space is limited, let a copy of this process do the work first, with a little less of it.

    Libraries that are loaded without enough memory do not raise, they abort. Raises DeviceError where the copy fails
    for want of memory; whatever else goes wrong is left to the work itself.
    """
    if not _address_space_is_limited():
        return
    try:
        pid = os.fork()
    except OSError:
        raise DeviceError(NO_ROOM) from None
    if pid == 0:
        _rehearse(work)
    if os.waitpid(pid, 0)[1] != 0:
        raise DeviceError(NO_ROOM)


def rehearse_import(package: str) -> None:
    """Before a first import of torch or numpy, which ends the process where address space is too limited for it.

    Raises DeviceError there; returns at once where nothing is limited.
    """
    rehearse(lambda: import_module(package))


def _rehearse(work: Callable[[], object]) -> NoReturn:
    import resource

    code = 1
    try:
        for stream in (1, 2):  # what aborts says so in several lines
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (max(0, soft - MARGIN), hard))
        work()
        code = 0
    except Exception as error:
        code = int(is_out_of_memory(error))
    finally:
        os._exit(code)


def end_threads() -> bool:
    """End the threads that OpenMP keeps for its next loop, so that a fork may start its own; whether that is so.

    They do not follow a fork, and its first loop would wait for them for ever (GNU's libgomp; others notice).
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        for path in {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}:
            ctypes.CDLL(path).omp_pause_resource_all(2)  # omp_pause_hard (OpenMP 5.0)
    except (OSError, AttributeError):
        return False
    return True


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of handing it back after every layer.

    Fresh pages must be zeroed by the kernel, which costs more than the arithmetic done in them.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        if _address_space_is_limited():  # there, what is kept is missing elsewhere
            libc.mallopt(-8, 1)  # M_ARENA_MAX: threads reserve no 64 MB each
            return
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-2, 64 << 20)  # M_TOP_PAD: grow it in large steps
    except (OSError, AttributeError):
        pass
