"""Looks in, encoded images out: models loaded once, requests batched, images cached, equal requests made once."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import platform
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from tpdne_cli import pipeline
from tpdne_cli.metadata import compact
from tpdne_cli.sampler import Sampler
from tpdne_cli.web.batching import Batcher
from tpdne_cli.web.cache import Cache, Encoded
from tpdne_cli.web.crew import Crew, Made, Picture, Wish
from tpdne_cli.web.looks import Look, recipe
from tpdne_cli.web.metrics import Metrics
from tpdne_cli.web.ranking import Ranking


@dataclass(frozen=True)
class Limits:
    """Bounds of what a server takes on. seconds: for one image; cache_bytes: of encoded images; size: in pixels."""

    queue: int = 256
    seconds: float = 30.0
    deadline: float = 0.003
    cache_bytes: int = 64 << 20
    size: int = 1024


@dataclass
class _Shared:
    """Work that several requests wait for; it stops when the last of them goes away."""

    task: asyncio.Task[Encoded]
    waiting: int = field(default=0)


class Studio:
    """The generators of one server and everything between a request and its bytes. names: as they are served."""

    def __init__(self, names: list[str], crew: Crew, limits: Limits, metrics: Metrics) -> None:
        self.names, self.crew, self.limits, self.metrics = names, crew, limits, metrics
        self.samplers: dict[str, Sampler] = {}
        self.cache: Cache[Picture] = Cache(limits.cache_bytes)
        self._batcher: Batcher[Wish, Any] = Batcher(
            self._carry_out, _group, self._batch_size, self._share, crew.workers, limits.queue, limits.deadline
        )
        self._making: dict[Picture, _Shared] = {}
        self._loading: dict[str, asyncio.Lock] = {}
        self._callers = ThreadPoolExecutor(crew.workers, thread_name_prefix="crew")
        self._encoders = ThreadPoolExecutor(pipeline.WORKERS, thread_name_prefix="encoder")

    def start(self) -> None:
        self._batcher.start()

    async def close(self) -> None:
        await self._batcher.close()
        await asyncio.to_thread(self.crew.close)
        for threads in (self._callers, self._encoders):
            threads.shutdown(wait=True, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Images that wait for the network."""
        return len(self._batcher.waiting)

    def check_room(self, picture: Picture) -> None:
        """Refuse a picture before any work is done for it: under overload most requests end here.

        Raises QueueFullError.
        """
        if picture not in self._making:
            self._batcher.check_room()

    def seconds_to_wait(self) -> int:
        return self._batcher.seconds_to_wait()

    async def sampler(self, name: str) -> Sampler:
        """The model's sampler, loaded by the first who asks. Raises as models.load does."""
        if name not in self.samplers:
            async with self._loading.setdefault(name, asyncio.Lock()):
                if name not in self.samplers:
                    await asyncio.to_thread(self.load, name)
        return self.samplers[name]

    def load(self, name: str) -> Sampler:
        self.samplers[name] = self.crew.learn(name)
        return self.samplers[name]

    def recipe(self, look: Look) -> dict[str, Any]:
        return recipe(self.samplers[look.model], look)

    async def scores(self, ranking: Ranking) -> list[float]:
        """Of the ranking's seeds; see Ranking.carry_out. Raises QueueFullError."""
        scores: list[float] = await self._batcher(ranking)
        return scores

    def etag(self, picture: Picture) -> str:
        """Of a picture, whether made or not: of all that decides its bytes.

        Strong on a CPU in float32, where the same recipe gives the same bytes; weak elsewhere.
        """
        sampler = self.samplers[picture.look.model]
        made = recipe(sampler, picture.look)
        decides = {**made, "format": picture.format, "size": picture.size, "here": _platform()}
        exact = made["device"] == "cpu" and made["precision"] == "float32"
        return f'{"" if exact else "W/"}"{hashlib.sha256(compact(decides).encode()).hexdigest()[:32]}"'

    async def picture(self, picture: Picture) -> Encoded:
        """The bytes of a picture: from the cache, from a request that makes it already, or made now.

        The model is loaded already. Raises QueueFullError.
        """
        known = self.cache.get(picture)
        self.metrics.add("tpdne_cache_total", result="miss" if known is None else "hit")
        if known is not None:
            return known
        shared = self._making.get(picture)
        if shared is None:
            shared = self._making[picture] = _Shared(_task(self._make(picture)))
            shared.task.add_done_callback(lambda task: self._forget(picture, task))
        shared.waiting += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if not shared.waiting and not shared.task.done():
                self._forget(picture, shared.task)
                shared.task.cancel()

    def _forget(self, picture: Picture, task: asyncio.Task[Encoded]) -> None:
        if picture in self._making and self._making[picture].task is task:
            del self._making[picture]

    async def _make(self, picture: Picture) -> Encoded:
        data = await self._batcher(picture)
        if callable(data):
            data = await asyncio.get_running_loop().run_in_executor(self._encoders, data)
        entry = Encoded(data, self.etag(picture))
        self.cache.put(picture, entry)
        return entry

    async def _carry_out(self, wishes: list[Wish]) -> list[Any]:
        name = _model(wishes[0])
        made: Made = await asyncio.get_running_loop().run_in_executor(self._callers, self.crew, name, wishes)
        self.metrics.add("tpdne_batches_total", model=name)
        self.metrics.add("tpdne_images_total", made.images, model=name)
        self.metrics.add("tpdne_network_seconds_total", made.seconds, model=name)
        return made.results

    def _batch_size(self, group: str) -> int:
        return self.samplers[group].batch_size if group in self.samplers else 1

    def _share(self, group: str) -> int:
        return self.crew.share(group.partition("/")[0])

    def describe(self, name: str) -> dict[str, Any]:
        """What is known of a loaded model."""
        model = self.samplers[name].model
        known: dict[str, Any] = {
            key: model.info[key] for key in ("images_seen", "licence", "data") if key in model.info
        }
        return {
            "name": name,
            "arch": model.arch,
            "resolution": model.resolution,
            "truncation": model.truncation,
            "classes": model.config.c_dim,
            "directions": sorted(model.directions),
            "weights": model.sha256,
            **known,
        }


def _model(wish: Wish) -> str:
    return wish.model if isinstance(wish, Ranking) else wish.look.model


def _group(wish: Wish) -> str:
    """Images of one model share batches; a ranking is a batch of its own."""
    return f"{wish.model}/ranking" if isinstance(wish, Ranking) else wish.look.model


def _task(work: Coroutine[Any, Any, Encoded]) -> asyncio.Task[Encoded]:
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(lambda t: t.cancelled() or t.exception())  # whoever asked may have left: nothing to warn of
    return task


@functools.cache
def _platform() -> list[str]:
    """What, beside the recipe, an image's bytes may depend on."""
    return [platform.machine(), version("torch"), version("pillow"), version("numpy")]
