"""Several samplers as one: each that is free takes the next batch, and the images come in order.

They are devices that the user names, or on Linux the cores of the processor, one process each: measured on two cores,
two processes of one thread made 19 % more images of 128 pixels a second than one process of two threads (93.5 to 78.6),
5 % more of 256 and 10 % more of 512. Two threads that each drive the network in one process were slower than that.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn, Protocol, TypeVar

from tpdne_cli import devices
from tpdne_cli.critic import Critic, Judged
from tpdne_cli.errors import DeviceError
from tpdne_cli.models import Model
from tpdne_cli.pipeline import in_order
from tpdne_cli.sampler import Sample, Sampler, Settings

# Above, a process needs gigabytes for its activations, and convolutions are large enough to be shared by threads.
LARGEST_FOR_PROCESSES = 256
MEMORY_PER_PROCESS = 1 << 30  # bytes; 128 pixels need 0.2 GiB, 256 pixels with wide layers 0.6

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_forking = threading.Lock()  # a connection that a process inherits unknown would outlive its owner
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()  # this process's ends of those to its workers


class Maker(Protocol):
    """A Sampler, or what asks one for images of other things than seeds."""

    @property
    def recipe(self) -> Callable[..., dict[str, Any]]: ...

    def __call__(self, items: Iterable[Any], /) -> Iterator[Sample]: ...


class Drawer(Maker, Protocol):
    """A Maker that says how many it takes at a time: Sampler, Judged, Worker, or one on another machine."""

    @property
    def batch_size(self) -> int: ...


M = TypeVar("M", bound=Maker)


class Worker:
    """A sampler, or what makes images of other things with one, in a process of its own, forked from this one.

    Native code may crash where memory runs out (oneDNN uses kernels that it failed to allocate), and the kernel of a
    machine that is full kills. Such an end of the process is no end of the work: another one goes on with half the
    batch.
    """

    def __init__(self, maker: Maker, batch_size: int, threads: int = 1) -> None:
        self.maker, self.batch_size, self.threads = maker, batch_size, threads
        self.recipe = maker.recipe
        self._begin()

    def __call__(self, items: Iterable[Any]) -> Iterator[Sample]:
        """As the maker does, whose errors are raised here. DeviceError where not even one image could be made."""
        pending = list(items)
        while batch := pending[: self.batch_size]:
            try:
                self.connection.send(batch)
                answer = self.connection.recv()
            except (EOFError, OSError, MemoryError):  # the last: no room here for what it sent
                self._retreat()
                continue
            if isinstance(answer, Exception):
                raise answer
            yield from answer
            del pending[: len(batch)]

    def _begin(self) -> None:
        """Raises OSError where the system grants no process."""
        threads = self.threads if self.threads == 1 or devices.end_threads() else 1
        with _forking:
            self.connection, far = Pipe()
            before, pid = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS), -1
            try:
                pid = os.fork()
            finally:
                if pid != 0:  # the child lets signals in when it has learned to ignore them
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if pid == 0:
                _serve(self.maker, far, [self.connection, *_connections], threads)
            _connections.add(self.connection)
        far.close()
        self.end = weakref.finalize(self, _end, self.connection, pid)

    def _retreat(self) -> None:
        self.end()
        if self.batch_size == 1:
            raise DeviceError(
                "A worker process was killed with only one image to make, perhaps for want of memory: close other "
                "programs, raise the limit (ulimit -v), or use fewer processes (OMP_NUM_THREADS)."
            )
        self.batch_size = (self.batch_size + 1) // 2
        try:
            self._begin()
        except OSError as error:
            raise DeviceError(f"A worker process was killed, and no other can be had: {error.strerror}.") from None


def _serve(maker: Maker, connection: Connection, inherited: Iterable[Connection], threads: int) -> NoReturn:
    """Answer batches until the parent closes its end, or dies: then the connection ends."""
    try:
        for number in SIGNALS:  # Ctrl-C reaches the whole group: the parent decides
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for end in inherited:
            end.close()
        be_expendable()
        import torch

        torch.set_num_threads(threads)
        while True:
            batch = connection.recv()
            try:
                answer: list[Sample] | Exception = list(maker(batch))
            except Exception as error:
                answer = error
            connection.send(answer)
    except (EOFError, OSError, MemoryError):
        pass
    finally:
        os._exit(0)


def be_expendable() -> None:
    """The kernel of a machine without memory kills this process first; what dies says nothing, its parent does."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if os.environ.get("TPDNE_DEBUG") != "1":
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end(connection: Connection, pid: int) -> None:
    connection.close()
    os.waitpid(pid, 0)


class Fleet:
    """Samplers of one model that share the work. A slower one takes fewer batches; none waits for another."""

    def __init__(self, samplers: Sequence[Drawer]) -> None:
        self.samplers = samplers
        self.recipe = samplers[0].recipe

    def __call__(self, items: Iterable[Any]) -> Iterator[Sample]:
        """One Sample per seed, or other item, in order. Raises what a Sampler raises."""
        idle: SimpleQueue[Drawer] = SimpleQueue()
        for sampler in self.samplers:
            idle.put(sampler)

        def run(batch: list[Any]) -> list[Sample]:
            sampler = idle.get()
            try:
                return list(sampler(batch))
            finally:
                idle.put(sampler)

        pending, size, workers = iter(items), self.samplers[0].batch_size, len(self.samplers)
        batches = iter(lambda: list(islice(pending, size)), [])
        for samples in in_order(run, batches, workers, window=2 * workers):
            yield from samples


def assemble(
    model: Model,
    settings: Settings | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    images: int = 1,
    judged: bool = False,
) -> Sampler | Judged | Fleet:
    """What makes `images` images fastest: a Sampler, or a Fleet of devices ('cuda:0,cuda:1') or of processes.

    judged: with their realism in the recipe. Raises as Sampler does, and Critic.load.
    """
    names = [name.strip() for name in device.split(",")]
    if "" in names:
        raise DeviceError(f"{device!r} is not a list of devices: write them as cuda:0,cuda:1.")
    for name in names:  # all of them are there, before the network is copied to the first
        devices.choose(name)
    plain = [Sampler(model, settings, name, precision, batch_size) for name in names]
    samplers = [Judged(s, Critic.load(model, str(s.device))) for s in plain] if judged else plain
    if len(samplers) > 1:
        return Fleet(samplers)
    return spread(samplers[0], plain[0], images)


def spread(maker: M, sampler: Sampler, images: int) -> M | Fleet:
    """What makes images with a sampler, in as many processes as make so many fastest; itself where it does.

    Where memory is limited there is one at least, which may die of it.
    """
    count = processes(sampler, images)
    if count == 1 and not (sampler.device.type == "cpu" and devices.memory_is_limited()):
        return maker
    workers: list[Worker] = []
    with suppress(OSError):  # fewer, where the system grants no more
        for _ in range(count):
            workers.append(Worker(maker, sampler.batch_size, threads=devices.cores() if count == 1 else 1))
    return Fleet(workers) if workers else maker


def processes(sampler: Sampler, images: int) -> int:
    """How many processes make so many images fastest; 1 where this one does with all its threads."""
    if sys.platform != "linux" or sampler.device.type != "cpu" or sampler.model.resolution > LARGEST_FOR_PROCESSES:
        return 1  # elsewhere a fork is not safe behind the system's own libraries
    batches = -(-images // sampler.batch_size)
    return max(1, min(devices.cores(), devices.memory() // 2 // MEMORY_PER_PROCESS, batches))
