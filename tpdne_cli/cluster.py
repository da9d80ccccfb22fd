"""The samplers of a Ray cluster as one Fleet: an actor on each GPU, or on each core where there is none.

Needs the extra `ray`. Ray places the actors, feeds them, and starts those again whose machine was lost; they draw what
a Sampler draws, and the images come back in order. The generator's file travels with the work: only tpdne has to be
installed on the other machines.
"""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tpdne_cli import __version__, models
from tpdne_cli.critic import Critic, Judged, path_of
from tpdne_cli.errors import DeviceError, SettingsError
from tpdne_cli.fleet import LARGEST_FOR_PROCESSES, MEMORY_PER_PROCESS, Fleet
from tpdne_cli.models import Model
from tpdne_cli.sampler import Sample, Sampler, Settings

IMAGES_PER_ACTOR = 8  # below, starting another one takes longer than drawing
ATTEMPTS = 3  # of an actor's start, and of a batch, when machines are lost
PATIENCE = 300  # seconds until the first sampler is to have found a place and loaded torch and the generator
GRACE = 20  # and the others after it: who has not is left out
ANSWER = 10  # seconds until a cluster is to answer
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class Order:
    """What an actor is to draw with. files: the generator's and, if its images are judged, the critic's, by name."""

    files: Mapping[str, bytes]
    name: str
    settings: Settings | None
    how: tuple[str, str, int | None]  # device, precision, batch size
    judged: bool
    version: str = __version__

    def sampler(self) -> Sampler | Judged:
        """Raises as models.load, Sampler and Critic.load do."""
        if self.version != __version__:
            raise SettingsError(f"The cluster has tpdne {__version__}, not your {self.version}: install the same one.")
        with TemporaryDirectory(prefix="tpdne-") as folder:
            for file, data in self.files.items():
                (Path(folder) / file).write_bytes(data)
            model = models.load(Path(folder) / next(iter(self.files)))
            model.name = self.name
            sampler = Sampler(model, self.settings, *self.how)
            return Judged(sampler, Critic.load(model, str(sampler.device))) if self.judged else sampler


class Actor:
    """A sampler where Ray puts it. It is made when first asked: a constructor's error would arrive as Ray's own.

    order: a list that holds a reference to an Order. It comes with every question, since an actor that is started again
    has forgotten it.
    """

    def __init__(self) -> None:
        self.maker: Sampler | Judged | None = None

    def about(self, order: list[Any]) -> tuple[int, dict[str, Any]]:
        """Batch size, and the recipe of seed 0."""
        maker = self._maker(order)
        return maker.batch_size, maker.recipe(0)

    def draw(self, order: list[Any], seeds: list[Any]) -> list[Sample]:
        return list(self._maker(order)(seeds))

    def _maker(self, order: list[Any]) -> Sampler | Judged:
        if self.maker is None:
            self.maker = import_module("ray").get(order[0]).sampler()
        assert self.maker is not None
        return self.maker


class Distant:
    """What a Fleet takes for a sampler. Raises what the one behind it raises, DeviceError where it is lost for good."""

    def __init__(self, ray: Any, actor: Any, order: Any) -> None:
        self.ray, self.actor, self.order = ray, actor, [order]
        self.answer = actor.about.remote(self.order)

    def ready(self) -> Distant:
        """This one, when it has answered: all of them start at the same time. Raises as Order.sampler does."""
        self.batch_size, self.about = self._get(self.answer)
        return self

    @property
    def recipe(self) -> Callable[[Any], dict[str, Any]]:
        return lambda seed: {**self.about, "seed": seed}

    def __call__(self, items: Iterable[Any]) -> Iterator[Sample]:
        yield from self._get(self.actor.draw.remote(self.order, list(items)))

    def _get(self, answer: Any) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(answer)
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except errors.RayActorError as error:
            if getattr(error, "actor_init_failed", False):  # before a line of ours ran: what it was sent means nothing
                raise DeviceError(
                    f"tpdne {__version__} cannot be started on a machine of the cluster ({_line(error)}): install the "
                    "same version there."
                ) from None
            raise DeviceError(
                f"The cluster lost a sampler and could not start it again ({_line(error)}): --skip-existing goes on."
            ) from None


def assemble(
    model: Model,
    settings: Settings | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    images: int = 1,
    judged: bool = False,
    address: str | None = None,
) -> Fleet:
    """A Fleet of actors for `images` images, as fleet.assemble makes one of this machine.

    address: of a cluster that runs ('HOST:PORT', 'ray://HOST:PORT', or 'auto' for this machine's own); None:
    the one of RAY_ADDRESS, or one of this machine alone, for the time being. Raises SettingsError where Ray is not
    installed, DeviceError where there is no cluster or no such device in it, and as Sampler does.
    """
    if device not in DEVICES:
        raise SettingsError(f"A Ray cluster hands its devices out by itself: use {', '.join(DEVICES)}, not {device!r}.")
    ray = connect(address)
    there = ray.cluster_resources()
    if device == "cuda" and not there.get("GPU"):
        raise DeviceError("The cluster has no GPU: use --device cpu.")
    on_gpu = device != "cpu" and there.get("GPU", 0) >= 1
    place, most = ({"num_gpus": 1, "num_cpus": 0}, int(there["GPU"])) if on_gpu else _on_cores(ray, model, there)
    count = max(1, min(most, -(-images // (batch_size or IMAGES_PER_ACTOR))))
    paths = [model.path, *([path_of(model)] if judged else [])]
    if judged and not paths[1].is_file():
        Critic.load(model)  # has the sentence for it
    files = {path.name: path.read_bytes() for path in paths}
    order = ray.put(Order(files, model.name, settings, ("cuda" if on_gpu else "cpu", precision, batch_size), judged))
    kind = ray.remote(**place, max_restarts=ATTEMPTS, max_task_retries=ATTEMPTS)(Actor)
    actors = [Distant(ray, kind.remote(), order) for _ in range(count)]
    asked = [actor.answer for actor in actors]
    if not ray.wait(asked, num_returns=1, timeout=PATIENCE)[0]:
        raise DeviceError(f"No sampler of the cluster was ready after {PATIENCE} s: look at what 'ray status' says.")
    ready, _ = ray.wait(asked, num_returns=count, timeout=GRACE)  # others may find no place beside other people's work
    return Fleet([actor.ready() for actor in actors if actor.answer in ready])


def _on_cores(ray: Any, model: Model, there: Mapping[str, float]) -> tuple[dict[str, Any], int]:
    """What an actor is to get, and how many there can be: as fleet.processes has it for one machine."""
    if model.resolution <= LARGEST_FOR_PROCESSES:
        most = min(there.get("CPU", 0), there.get("memory", math.inf) / MEMORY_PER_PROCESS)
        return {"num_cpus": 1, "memory": MEMORY_PER_PROCESS}, int(most)
    machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cores = min([number for number in machines if number], default=1)  # one actor on each machine
    return {"num_cpus": cores}, int(there.get("CPU", 0) // cores)


def connect(address: str | None) -> Any:
    """Ray, connected. Raises SettingsError where it is not installed, DeviceError where there is no cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise SettingsError("The engine ray needs Ray, which is not installed: pip install ray.") from None
    if ray.is_initialized():
        return ray
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    alone = address is None
    how = {"log_to_driver": False, "logging_level": "ERROR", **({"include_dashboard": False} if alone else {})}
    try:
        # Where nobody listens Ray itself waits for minutes.
        if match := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address or "local"):
            socket.create_connection((match[1], int(match[2])), timeout=ANSWER).close()
        ray.init(address or "local", **how)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        where = "here" if alone else f"at {address}"
        raise DeviceError(f"No Ray cluster can be used {where} ({_line(error)}): check --ray-address.") from None
    return ray


def _line(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    text = re.sub(r"\s+", " ", re.sub(r"\x1b\[\d+m", "", str(error))).strip().rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-190:]}"
