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
SHOWN = 4  # of the best, and of the worst


class Ranking(NamedTuple):
    """A wish: the seeds below `images`, those first that look most usual to the model's critic."""

    model: str
    images: int

    def carry_out(self, sampler: Sampler) -> list[int]:
        """No seeds where the critic is damaged: that spoils nothing but its own section."""
        try:
            critic = Critic.load(sampler.model)
        except TpdneError:
            return []
        samples = sampler(range(self.images))
        scores = [float(critic.score(sample.pixels[np.newaxis])[0]) for sample in samples]
        return sorted(range(self.images), key=lambda seed: -scores[seed])


class Rankings:
    """Each model's ranking, made when it is first asked for and kept. The models are loaded already."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.known: dict[str, dict[str, Any] | None] = {}
        self.lock = asyncio.Lock()

    def possible(self, name: str) -> bool:
        """Whether the model has a critic."""
        return path_of(self.studio.samplers[name].model).is_file()

    async def of(self, name: str) -> dict[str, Any] | None:
        """{count, best, worst}, the latter lists of addresses; None without a critic. Raises QueueFullError."""
        if not self.possible(name):
            return None
        async with self.lock:
            if name not in self.known:
                self.known[name] = await self._rank(name)
            return self.known[name]

    async def _rank(self, name: str) -> dict[str, Any] | None:
        order = await self.studio.rank(Ranking(name, COUNT))
        if not order:
            return None
        images = [address(name, seed, "webp") for seed in order]
        return {"count": COUNT, "best": images[:SHOWN], "worst": images[-SHOWN:]}

    def stages(self, name: str) -> Path | None:
        """A strip of pictures from the same seed through training, where it lies beside the weights."""
        path = self.studio.samplers[name].model.path
        strip = path.with_name(f"{path.stem}-stages.webp")
        return strip if strip.is_file() else None
