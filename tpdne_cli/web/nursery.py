"""Worker processes that draw and encode, all of one memory.

    server ---- nursery: holds the models, serves nobody
         \\____ worker, worker, ...: forked from the nursery, one for each core

The network and Python's own lock would otherwise take the core from each other, and two processes of one thread draw
more than one process of two threads (fleet.py has the numbers). The server has threads and connections, which a fork
must not copy; the nursery has neither, so that a worker can be forked at any time: for one that was killed, and for
those that were born before a model was loaded. A worker shares the memory of all models with the nursery.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from queue import LifoQueue
from typing import Any, NoReturn

import torch

from tpdne_cli import devices, fleet
from tpdne_cli.errors import DeviceError
from tpdne_cli.fleet import LARGEST_FOR_PROCESSES, MEMORY_PER_PROCESS
from tpdne_cli.models import Model
from tpdne_cli.sampler import Sampler
from tpdne_cli.web.crew import Made, Placement, Wish, load, make

ATTEMPTS = 2  # an image is made again by another worker where one is killed


class Worker:
    """The server's end of a worker process."""

    def __init__(self, connection: Connection, pid: int, knows: frozenset[str]) -> None:
        self.connection, self.pid, self.knows = connection, pid, knows

    def __call__(self, name: str, threads: int, wishes: list[Wish], seconds: float) -> Made:
        """Raises EOFError or OSError where it dies, TimeoutError where it does not answer."""
        self.connection.send((name, threads, wishes))
        if not self.connection.poll(seconds):
            raise TimeoutError
        answer: Made | Exception = self.connection.recv()
        if isinstance(answer, Exception):
            raise _Raised(answer)
        return answer


class _Raised(Exception):
    """Around what the network raised in a worker, which may well be of the kinds that tell of its death."""


class Nursery:
    """A crew of processes.

    names: files or installed names by the names that they are served under. seconds: after which a worker that still
    works on a batch is taken for stuck. To be made before the process starts threads. Raises OSError.
    """

    def __init__(self, names: Mapping[str, str], placement: Placement, seconds: float) -> None:
        self.placement, self.seconds = placement, seconds
        self.cores = devices.cores()
        self.workers = max(1, min(self.cores, devices.memory() // 2 // MEMORY_PER_PROCESS))
        self.learned: dict[str, int] = {}  # name -> threads that draw it
        self.staff: LifoQueue[Worker | None] = LifoQueue()  # the free ones; None: a place for one
        for _ in range(self.workers):
            self.staff.put(None)
        self._living: dict[int, Worker] = {}
        self._lock = threading.Lock()
        self._connection, far = Pipe()
        devices.end_threads()
        self.pid = os.fork()
        if self.pid == 0:
            self._connection.close()
            _nurse(far, names, placement)
        far.close()

    @property
    def is_well(self) -> bool:
        """Whether it still can replace workers; the kernel knows of its death before anybody asks it for something."""
        if self._connection.closed:
            return False
        with suppress(ChildProcessError):  # _exchange noticed it meanwhile
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        return False

    @property
    def pids(self) -> list[int]:
        return [self.pid, *self._living] if self.is_well else list(self._living)

    def learn(self, name: str) -> Sampler:
        """Load a model. The Sampler given knows all of it but its weights, which live in the nursery."""
        fields, network, config = self._ask("learn", name)
        with torch.device("meta"):
            generator = network(config)
        sampler = Sampler(Model(generator=generator, **fields), None, *self.placement)
        self.learned[name] = self.cores if sampler.model.resolution > LARGEST_FOR_PROCESSES else 1
        return sampler

    def share(self, name: str) -> int:
        return self.workers if self.learned[name] > 1 else 1

    def __call__(self, name: str, wishes: list[Wish]) -> Made:
        for _ in range(ATTEMPTS):
            worker = self._take(name)
            try:
                made = worker(name, self.learned[name], wishes, self.seconds)
            except _Raised as error:
                self.staff.put(worker)
                raise error.args[0] from None
            except TimeoutError:
                self._dismiss(worker)
                raise DeviceError("A worker process was stuck: give it more --timeout, or smaller batches.") from None
            except (EOFError, OSError):
                self._dismiss(worker)
                continue
            self.staff.put(worker)
            return made
        raise DeviceError("Worker processes were killed, perhaps for want of memory: use a smaller --batch-size.")

    def close(self) -> None:
        """End all processes, whatever they do."""
        if not self._connection.closed:
            self._connection.close()
            os.waitpid(self.pid, 0)

    def _take(self, name: str) -> Worker:
        """A free worker that knows the model."""
        worker = self.staff.get()
        if worker is not None and name in worker.knows:
            return worker
        try:
            if worker is not None:
                self._end(worker)
            return self._hire()
        except OSError as error:  # a want of memory, processes or files, which passes
            self.staff.put(None)
            raise DeviceError(f"No worker process could be started ({error.strerror or error}).") from None
        except Exception:
            self.staff.put(None)
            raise

    def _hire(self) -> Worker:
        knows = frozenset(self.learned)
        with self._lock:
            pid = self._exchange("hire")
            worker = Worker(Connection(recv_handle(self._connection)), pid, knows)
            self._living[pid] = worker
        return worker

    def _dismiss(self, worker: Worker) -> None:
        with suppress(DeviceError):
            self._end(worker)
        self.staff.put(None)

    def _end(self, worker: Worker) -> None:
        worker.connection.close()
        self._living.pop(worker.pid, None)
        self._ask("end", worker.pid)

    def _ask(self, *command: Any) -> Any:
        with self._lock:
            return self._exchange(*command)

    def _exchange(self, *command: Any) -> Any:
        try:
            self._connection.send(command)
            answer = self._connection.recv()
        except (EOFError, OSError):
            self.close()
            raise DeviceError("The process that holds the models was killed: start the server again.") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _nurse(connection: Connection, names: Mapping[str, str], placement: Placement) -> NoReturn:
    """Obey the server until it closes the connection, or dies: then all workers end, too."""
    samplers: dict[str, Sampler] = {}
    pids: set[int] = set()

    def learn(name: str) -> Iterator[Any]:
        sampler = samplers[name] = load(names[name], placement)
        gc.collect()
        gc.freeze()  # what the collector does not touch stays shared
        model = sampler.model
        fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name != "generator"}
        yield fields, type(model.generator), model.config

    def hire() -> Iterator[Any]:
        near, far = Pipe()
        pid = os.fork()
        if pid == 0:
            connection.close()
            near.close()
            _work(far, samplers)
        far.close()
        pids.add(pid)
        yield pid
        send_handle(connection, near.fileno(), 0)
        near.close()

    def end(pid: int) -> Iterator[Any]:
        pids.discard(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        yield None

    commands: Mapping[str, Callable[..., Iterator[Any]]] = {"learn": learn, "hire": hire, "end": end}
    try:
        _be_quiet()
        torch.set_num_threads(1)  # a pool of threads would not survive the forks
        while True:
            command, *arguments = connection.recv()
            try:
                for answer in commands[command](*arguments):
                    connection.send(answer)
            except Exception as error:
                connection.send(error)
    except (EOFError, OSError):
        pass
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def _work(connection: Connection, samplers: Mapping[str, Sampler]) -> NoReturn:
    """Make what is asked for, until the server closes the connection or dies."""
    try:
        fleet.be_expendable()  # rather than the nursery, which is no smaller, and without which nothing goes on
        while True:
            name, threads, wishes = connection.recv()
            torch.set_num_threads(threads)
            try:
                answer: Made | Exception = make(samplers[name], wishes)
            except Exception as error:
                answer = error
            connection.send(answer)
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def _be_quiet() -> None:
    """Ctrl-C reaches the whole group, and so does the end that a service manager sends: the server decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
