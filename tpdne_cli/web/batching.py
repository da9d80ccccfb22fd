"""Requests that come together go through the network together.

While all workers are busy, the next batch gathers by itself; none idles to wait for company that is not in sight.
Only where several requests came together last time does a batch wait for as many again, and no longer than the
deadline: clients that were just served come back within a millisecond or two.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFullError(Exception):
    """No room for another request; `seconds` is when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"The queue is full; there is room again in about {seconds} s.")
        self.seconds = seconds


@dataclass(frozen=True)
class _Waiting(Generic[Item]):
    item: Item
    group: str
    since: float


class Batcher(Generic[Item, Result]):
    """Awaitable per item, `run` per batch, as many batches at a time as there are workers.

    group: items with the same group may share a batch. size: group -> how many at most. share: group -> how many of
    the workers a batch takes. limit: how many may wait. A caller that is cancelled leaves the queue and costs nothing.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[list[Result]]],
        group: Callable[[Item], str],
        size: Callable[[str], int],
        share: Callable[[str], int] = lambda _: 1,
        workers: int = 1,
        limit: int = 256,
        deadline: float = 0.003,
    ) -> None:
        self.run, self.group, self.size, self.share = run, group, size, share
        self.workers, self.limit, self.deadline = workers, limit, deadline
        self.waiting: dict[asyncio.Future[Result], _Waiting[Item]] = {}  # in order of arrival
        self.seconds_per_item = 0.1
        self._free = workers
        self._together = 1
        self._changed = asyncio.Event()  # somebody came, or a worker is free
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._begin(self._serve())

    async def close(self) -> None:
        """Stop; whoever still waits is told so."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for future in self.waiting:
            future.cancel()

    async def __call__(self, item: Item) -> Result:
        """What `run` makes of the item, or raises. Raises QueueFullError at once where too many wait."""
        self.check_room()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self.waiting[future] = _Waiting(item, self.group(item), loop.time())
        self._changed.set()
        try:
            return await future
        finally:
            self.waiting.pop(future, None)

    def check_room(self) -> None:
        """Raises QueueFullError where too many wait."""
        if len(self.waiting) >= self.limit:
            raise QueueFullError(self.seconds_to_wait())

    def seconds_to_wait(self) -> int:
        """How long the queue takes at its present pace, for Retry-After."""
        return max(1, min(60, math.ceil(len(self.waiting) * self.seconds_per_item)))

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self) -> None:
        while True:
            batch, share = await self._gather()
            self._free -= share
            self._together = len(batch)
            self._begin(self._run(batch, [self.waiting.pop(future).item for future in batch], share))

    async def _run(self, batch: list[asyncio.Future[Result]], items: list[Item], share: int) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            results = await self.run(items)
            for future, result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
        except asyncio.CancelledError:
            for future in batch:
                future.cancel()
            raise
        except Exception as error:  # of the network: it belongs to those who asked, and the next batch goes on
            for future in batch:
                if not future.done():
                    future.set_exception(error)
        finally:
            self._free += share
            self._changed.set()
        pace = (loop.time() - start) / len(batch) * share / self.workers
        self.seconds_per_item += 0.1 * (pace - self.seconds_per_item)

    async def _gather(self) -> tuple[list[asyncio.Future[Result]], int]:
        """The next batch, when there are workers for it: the oldest request and those of its group; and its share."""
        loop = asyncio.get_running_loop()
        while True:
            left = None
            if self.waiting:
                oldest = next(iter(self.waiting.values()))
                size, share = self.size(oldest.group), self.share(oldest.group)
                if share <= self._free:
                    batch = list(islice((f for f, w in self.waiting.items() if w.group == oldest.group), size))
                    left = oldest.since + self.deadline - loop.time()
                    if len(batch) >= min(size, self._together) or left <= 0:
                        return batch, share
            self._changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
