"""How a run's convolutions compute: in which number format, by which of cuDNN's ways."""

from __future__ import annotations

import functools
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from tpdne_cli.errors import DeviceError

# In a child process, since virtual machines that advertise AMX without its tiles kill whoever uses it.
TRIAL = """
import time, torch, torch.nn.functional as F
torch.set_num_threads(1)
def trial(dtype):
    a = torch.ones(64, 64, dtype=dtype)
    (a @ a).sum().item()
    x = torch.ones(8, 64, 32, 32, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.ones(64, 64, 3, 3, dtype=dtype).requires_grad_()
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        F.conv2d(x, w, padding=1).sum().backward()
        F.conv_transpose2d(x, w, stride=2).sum().backward()
        best = min(best, time.perf_counter() - start)
    return best
print(trial(torch.float32) / trial(torch.bfloat16))
"""
WORTH_IT = 1.3  # below this gain, float32's exactness is the better bargain


def choose_dtype(precision: str, device: torch.device, before: str | None = None) -> torch.dtype:
    """'float32', 'bfloat16' or 'auto': bfloat16 on CUDA from Ampere on, and on a CPU that is seen to be faster with it.

    before: what a run that goes on computed in; 'auto' on a CPU stays with it where it works, whatever a clock says.
    Raises DeviceError where bfloat16 is asked for and does not work.
    """
    if precision == "float32" or (precision == "auto" and device.type == "mps"):
        return torch.float32
    if device.type == "cuda" and precision == "auto" and torch.version.hip is None:
        # Before, cuDNN has no convolutions in bfloat16, and torch's own are slower than float32.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type != "cpu":
        return torch.bfloat16
    if precision == "auto" and before == "float32":
        return torch.float32
    gain = bfloat16_gain()
    if precision == "auto" and before == "bfloat16" and gain > 0:
        return torch.bfloat16
    if precision == "auto":
        return torch.bfloat16 if gain > WORTH_IT else torch.float32
    if gain == 0:
        raise DeviceError("bfloat16 crashes or fails on this processor: use --precision float32.")
    return torch.bfloat16


def tuned(device: torch.device) -> AbstractContextManager[None]:
    """On CUDA convolutions are tried out in each of their shapes, of which a stage has few, and the fastest kept."""
    cudnn = torch.backends.cudnn
    if device.type != "cuda":
        return nullcontext()
    found: AbstractContextManager[None] = cudnn.flags(enabled=True, benchmark=True, allow_tf32=cudnn.allow_tf32)
    return found


@functools.cache
def bfloat16_gain() -> float:
    """How many times faster than float32 a child process trains a convolution in bfloat16; 0 where it dies of it."""
    try:
        done = subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True, timeout=120)
        return float(done.stdout) if done.returncode == 0 else 0.0
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0.0
