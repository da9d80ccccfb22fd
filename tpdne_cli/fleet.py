"""Several samplers as one: each that is free takes the next batch, and the images come in order.

They are devices that the user names, or on Linux the cores of the processor, one process each: measured on two cores,
two processes of one thread made 19 % more images of 128 pixels a second than one process of two threads (93.5 to 78.6),
5 % more of 256 and 10 % more of 512. Two threads that each drive the network in one process were slower than that.
"""

from __future__ import annotations

import os
import signal
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import NoReturn

from tpdne_cli import devices
from tpdne_cli.critic import Critic, Judged
from tpdne_cli.errors import DeviceError
from tpdne_cli.models import Model
from tpdne_cli.pipeline import in_order
from tpdne_cli.sampler import Sample, Sampler, Settings
from tpdne_cli.seeds import Seed

# Above, a process needs gigabytes for its activations, and convolutions are large enough to be shared by threads.
LARGEST_FOR_PROCESSES = 256
MEMORY_PER_PROCESS = 1 << 30  # bytes; 128 pixels need 0.2 GiB, 256 pixels with wide layers 0.6


class Worker:
    """A sampler in a process of its own, forked from this one, with one thread."""

    def __init__(self, sampler: Sampler | Judged, siblings: Sequence[Worker] = ()) -> None:
        self.batch_size, self.recipe = sampler.batch_size, sampler.recipe
        self.connection, far = Pipe()
        pid = os.fork()
        if pid == 0:
            _serve(sampler, far, [self.connection, *(worker.connection for worker in siblings)])
        far.close()
        self.end = weakref.finalize(self, _end, self.connection, pid)

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[Sample]:
        """As a Sampler does, whose errors are raised here."""
        try:
            self.connection.send(list(seeds))
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise DeviceError(
                "A worker process was killed, perhaps for want of memory: use a smaller --batch-size, or fewer "
                "processes (OMP_NUM_THREADS)."
            ) from None
        if isinstance(answer, Exception):
            raise answer
        yield from answer


def _serve(sampler: Sampler | Judged, connection: Connection, inherited: Iterable[Connection]) -> NoReturn:
    """Answer batches of seeds until the parent closes its end, or dies: then the connection ends."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches the whole group: the parent decides
            signal.signal(number, signal.SIG_IGN)
        for end in inherited:
            end.close()
        import torch

        torch.set_num_threads(1)
        while True:
            seeds = connection.recv()
            try:
                answer: list[Sample] | Exception = list(sampler(seeds))
            except Exception as error:
                answer = error
            connection.send(answer)
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def _end(connection: Connection, pid: int) -> None:
    connection.close()
    os.waitpid(pid, 0)


class Fleet:
    """Samplers of one model that share the work. A slower one takes fewer batches; none waits for another."""

    def __init__(self, samplers: Sequence[Sampler | Judged | Worker]) -> None:
        self.samplers = samplers
        self.recipe = samplers[0].recipe

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[Sample]:
        """One Sample per seed, in order. Raises what a Sampler raises."""
        idle: SimpleQueue[Sampler | Judged | Worker] = SimpleQueue()
        for sampler in self.samplers:
            idle.put(sampler)

        def run(batch: list[Seed]) -> list[Sample]:
            sampler = idle.get()
            try:
                return list(sampler(batch))
            finally:
                idle.put(sampler)

        pending, size, workers = iter(seeds), self.samplers[0].batch_size, len(self.samplers)
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
    count = processes(plain[0], images)
    if count == 1:
        return samplers[0]
    workers: list[Worker] = []
    with suppress(OSError):  # fewer, where the system grants no more
        for _ in range(count):
            workers.append(Worker(samplers[0], workers))
    return Fleet(workers) if workers else samplers[0]


def processes(sampler: Sampler, images: int) -> int:
    """How many processes make so many images fastest; 1 where this one does with all its threads."""
    if sys.platform != "linux" or sampler.device.type != "cpu" or sampler.model.resolution > LARGEST_FOR_PROCESSES:
        return 1  # elsewhere a fork is not safe behind the system's own libraries
    batches = -(-images // sampler.batch_size)
    return max(1, min(devices.cores(), devices.memory() // 2 // MEMORY_PER_PROCESS, batches))
