"""One job in several parts: which part is this process's, said outright or read from whoever started it.

A part is every N-th item of the whole list, so it depends on the list alone: no process needs to know of another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tpdne_cli.errors import SettingsError

T = TypeVar("T")

# variable that numbers the processes -> the first number, and the variable that says how many there are
NUMBERED: dict[str, tuple[int, str | None]] = {
    "JOB_COMPLETION_INDEX": (0, None),  # Kubernetes indexed jobs
    "RANK": (0, "WORLD_SIZE"),  # torchrun
    "PARALLEL_SEQ": (1, None),  # GNU parallel
}
ARRAY = "SLURM_ARRAY_TASK_ID"


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1."""

    index: int
    count: int

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """This part of the items: every count-th one. The parts have nothing in common and together they are all."""
        return items[self.index - 1 :: self.count]


def parse(text: str, environment: Mapping[str, str] | None = None) -> Shard:
    """'2/8', 'auto', or 'auto/8' where the environment tells the part but not how many there are.

    Raises SettingsError for anything else, and where the environment tells nothing or contradicts itself.
    """
    match = re.fullmatch(r"(auto|\d+)(?:/(\d+))?", text, re.ASCII)
    if match is None or (match[1] != "auto" and match[2] is None):
        raise SettingsError(f"{text!r} is not a shard: write 1/8 to 8/8, or auto.")
    count = int(match[2]) if match[2] else None
    if match[1] == "auto":
        return auto(os.environ if environment is None else environment, count)
    return _checked(int(match[1]), int(match[2]), f"The shard {text}")


def auto(environment: Mapping[str, str], count: int | None = None) -> Shard:
    """The part of a Slurm array's task, a Kubernetes indexed job's pod, torchrun's rank or GNU parallel's job.

    `count` is needed where only the part is told, and must agree where both are. Raises SettingsError.
    """
    found = [name for name in (ARRAY, *NUMBERED) if environment.get(name)]
    if not found:
        raise SettingsError(f"--shard auto finds none of {', '.join((ARRAY, *NUMBERED))}: write --shard I/N.")
    if len(found) > 1:  # nested or left over? Guessing wrong would make images twice, or never.
        raise SettingsError(f"--shard auto finds both {found[0]} and {found[1]}: write --shard I/N.")
    index, told = _array(environment) if found == [ARRAY] else _numbered(environment, found[0])
    if count is None and told is None:
        raise SettingsError(f"{found[0]} does not tell of how many: write --shard auto/N with their number.")
    if count is not None and told is not None and count != told:
        raise SettingsError(f"--shard auto/{count} contradicts the environment, which tells of {told} parts.")
    return _checked(index, told or count or 0, f"The part that {found[0]}={environment[found[0]]} tells")


def _numbered(environment: Mapping[str, str], name: str) -> tuple[int, int | None]:
    first, total = NUMBERED[name]
    return _number(environment, name) - first + 1, _number(environment, total) if total else None


def _array(environment: Mapping[str, str]) -> tuple[int, int]:
    """Slurm numbers an array's tasks as its user likes: --array=0-9, 1-10, 100-190:10."""
    task, low, high = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX"))
    step = _number(environment, "SLURM_ARRAY_TASK_STEP", "1") or 1
    count = _number(environment, "SLURM_ARRAY_TASK_COUNT", str((high - low) // step + 1))
    if (task - low) % step or (high - low) != step * (count - 1):
        raise SettingsError("The Slurm array has gaps: number its tasks without, such as --array=0-9.")
    return (task - low) // step + 1, count


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name) or default
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise SettingsError(f"--shard auto needs a number in {name}, which holds {text!r}: write --shard I/N.")
    return int(text)


def _checked(index: int, count: int, what: str) -> Shard:
    if count < 1 or not 1 <= index <= count:
        raise SettingsError(f"{what} is outside 1/{count} to {count}/{count}: shards are counted from 1.")
    return Shard(index, count)
