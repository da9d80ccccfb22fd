"""Requests that come together go through the network together.

While one batch runs, the next gathers by itself; the network never idles to wait for company that is not in sight.
Only where several requests came together last time does a batch wait for as many again, and no longer than the
deadline: clients that were just served come back within a millisecond or two.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    """Awaitable per item, `run` per batch, on one thread that is its own.

    group: items with the same group may share a batch. size: group -> how many at most. limit: how many may wait.
    A caller that is cancelled leaves the queue and costs nothing.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], list[Result]],
        group: Callable[[Item], str],
        size: Callable[[str], int],
        limit: int = 256,
        deadline: float = 0.003,
    ) -> None:
        self.run, self.group, self.size, self.limit, self.deadline = run, group, size, limit, deadline
        self.waiting: dict[asyncio.Future[Result], _Waiting[Item]] = {}  # in order of arrival
        self.seconds_per_item = 0.1
        self._together = 1
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop().create_task(self._serve())

    async def close(self) -> None:
        """Stop; whoever still waits is told so."""
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        for future in self.waiting:
            future.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def __call__(self, item: Item) -> Result:
        """What `run` makes of the item, or raises. Raises QueueFullError at once where too many wait."""
        self.check_room()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self.waiting[future] = _Waiting(item, self.group(item), loop.time())
        self._arrival.set()
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

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._gather()
            if not batch:
                self._arrival.clear()
                await self._arrival.wait()
                continue
            items = [self.waiting.pop(future).item for future in batch]
            start = loop.time()
            try:
                results = await loop.run_in_executor(self._thread, self.run, items)
                for future, result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)
            except Exception as error:  # of the network: it belongs to those who asked, and the next batch goes on
                for future in batch:
                    if not future.done():
                        future.set_exception(error)
            self._together = len(batch)
            self.seconds_per_item += 0.1 * ((loop.time() - start) / len(batch) - self.seconds_per_item)

    async def _gather(self) -> list[asyncio.Future[Result]]:
        """The next batch: the oldest request and those of its group; nothing where nobody waits."""
        loop = asyncio.get_running_loop()
        while self.waiting:
            oldest = next(iter(self.waiting.values()))
            size = self.size(oldest.group)
            batch = [future for future, w in self.waiting.items() if w.group == oldest.group][:size]
            left = oldest.since + self.deadline - loop.time()
            if len(batch) >= min(size, self._together) or left <= 0:
                return batch
            self._arrival.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrival.wait(), left)
        return []
