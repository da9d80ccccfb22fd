"""What the page that explains shows beside the generator's own pictures: the critic's opinion, and earlier stages."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tpdne_cli.critic import Critic, path_of
from tpdne_cli.errors import TpdneError
from tpdne_cli.sampler import Sampler
from tpdne_cli.web.pages import address

if TYPE_CHECKING:
    from tpdne_cli.web.studio import Studio

COUNT = 32  # images that the critic is shown
AT_ONCE = 4  # at most, so that other requests get between
SHOWN = 4  # of the best, and of the worst


class Ranking(NamedTuple):
    """A wish: how usual the images of some seeds look to the model's critic."""

    model: str
    seeds: range

    def carry_out(self, sampler: Sampler) -> list[float]:
        """Scores, higher for the more usual; none where the critic is damaged, which spoils only its own section."""
        try:
            critic = Critic.load(sampler.model)
        except TpdneError:
            return []
        return [float(critic.score(sample.pixels[np.newaxis])[0]) for sample in sampler(self.seeds)]


class Rankings:
    """Each model's ranking, made when it is first asked for and kept. The models are loaded already.

    It may take longer than anybody waits for it: whoever asks later finds it.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.tasks: dict[str, asyncio.Task[dict[str, Any] | None]] = {}

    async def close(self) -> None:
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def possible(self, name: str) -> bool:
        """Whether the model has a critic."""
        return path_of(self.studio.samplers[name].model).is_file()

    async def of(self, name: str) -> dict[str, Any] | None:
        """{count, best, worst}, the latter lists of addresses; None without a critic. Raises QueueFullError."""
        if not self.possible(name):
            return None
        if name not in self.tasks:
            self.tasks[name] = asyncio.create_task(self._rank(name))
            self.tasks[name].add_done_callback(lambda task: self._forget_failure(name, task))
        return await asyncio.shield(self.tasks[name])

    def _forget_failure(self, name: str, task: asyncio.Task[dict[str, Any] | None]) -> None:
        if task.cancelled() or task.exception():
            del self.tasks[name]

    async def _rank(self, name: str) -> dict[str, Any] | None:
        step = min(AT_ONCE, self.studio.samplers[name].batch_size)
        scores: list[float] = []
        for first in range(0, COUNT, step):
            seeds = range(first, min(first + step, COUNT))
            scores += await self.studio.scores(Ranking(name, seeds))
            if not scores:
                return None
        order = sorted(range(COUNT), key=lambda seed: -scores[seed])
        images = [address(name, seed, "webp") for seed in order]
        return {"count": COUNT, "best": images[:SHOWN], "worst": images[-SHOWN:]}

    def stages(self, name: str) -> Path | None:
        """A strip of pictures from the same seed through training, where it lies beside the weights."""
        path = self.studio.samplers[name].model.path
        strip = path.with_name(f"{path.stem}-stages.webp")
        return strip if strip.is_file() else None
