"""Checkpoints of a run: written whole or not at all, the one before kept, and read without running code."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tpdne_cli.errors import TrainingError

LATEST = "checkpoint.pt"
PREVIOUS = "checkpoint-previous.pt"
PARTIAL = "checkpoint.pt.partial"


def save(run_dir: Path, state: dict[str, Any]) -> Path:
    """Stores tensors and plain values. A kill at any moment leaves at least one whole checkpoint behind."""
    latest = run_dir / LATEST
    temporary = run_dir / PARTIAL
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if latest.exists():
            latest.replace(run_dir / PREVIOUS)
        temporary.replace(latest)  # killed between these two lines: load() takes the previous one
        _sync_folder(run_dir)
    except (OSError, RuntimeError) as error:  # torch's writer tells of a full disk in its own way
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise TrainingError(f"The checkpoint in {run_dir} cannot be written: {_reason(error)}.") from error
    return latest


def load(run_dir: Path) -> dict[str, Any]:
    """The newest checkpoint that can be read, onto the CPU. Raises TrainingError where there is none."""
    problem = "there is none"
    for name in (LATEST, PREVIOUS, PARTIAL):  # the last is whole where a kill came just before it got its name
        try:
            state: dict[str, Any] = torch.load(run_dir / name, map_location="cpu", weights_only=True)
            return state
        except FileNotFoundError:
            continue
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError ... for damaged files
            problem = _reason(error)
    raise TrainingError(f"{run_dir} holds no checkpoint to go on from ({problem}); start the run without --resume.")


def exists(run_dir: Path) -> bool:
    """Whether a run was begun there."""
    return any((run_dir / name).exists() for name in (LATEST, PREVIOUS))


def _reason(error: Exception) -> str:
    """The first line of what torch says at length, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders, and journals the rename itself
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
