"""The routes: pages, images, JSON, and what operators ask for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tpdne_cli import __version__, models
from tpdne_cli.errors import SettingsError, TpdneError
from tpdne_cli.images import FORMATS
from tpdne_cli.sampler import Sampler
from tpdne_cli.seeds import fresh
from tpdne_cli.styles import NAMED
from tpdne_cli.web import addresses, answers, pages
from tpdne_cli.web.answers import ASKED, FOREVER, FRESH, NEVER, as_json, problem
from tpdne_cli.web.crew import Picture
from tpdne_cli.web.guard import Guard, Rules, kind
from tpdne_cli.web.looks import Look
from tpdne_cli.web.metrics import resident_bytes
from tpdne_cli.web.openapi import document
from tpdne_cli.web.ranking import Rankings
from tpdne_cli.web.refusals import HANDLERS, GoneError, NotThereError
from tpdne_cli.web.studio import Studio

T = TypeVar("T")

RESERVED = ("api", "static", "how", "healthz", "metrics", "openapi.json", "robots.txt")  # no model's name
ROBOTS = "User-agent: *\nAllow: /$\nAllow: /how\nDisallow: /\n"  # its pages lead to ever more pages
WALK_FRAMES = 25

log = logging.getLogger("tpdne.web")


class Site:
    """All handlers. The first of the studio's models is the one at /."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.default = next(iter(studio.names))
        self.rankings = Rankings(studio)

    def routes(self) -> list[Route]:
        return [
            Route("/", self.home),
            Route("/how", self.how),
            Route("/how/stages.webp", self.stages),
            Route("/how/ranking", self.ranking),
            Route("/static/{name}", self.static),
            Route("/api/models", self.models),
            Route("/api/{rest:path}", self.facts),
            Route("/healthz", self.health),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/robots.txt", self.robots),
            Route("/{rest:path}", self.below_a_model),
        ]

    async def home(self, request: Request) -> Response:
        return await self.page(request, self.default, None)

    async def below_a_model(self, request: Request) -> Response:
        """/MODEL, /MODEL/SEED, /MODEL/SEED.FORMAT, and 'random' in place of SEED."""
        parts = addresses.segments(request.scope)
        if len(parts) == 2 and not parts[1]:
            parts.pop()
        if len(parts) > 2 or parts[0] not in self.studio.names:
            raise NotThereError("There is nothing at this address; a slash that belongs to a seed is written %2F.")
        if len(parts) == 1:
            return await self.page(request, parts[0], None)
        model, (seed, format) = parts[0], addresses.target(parts[1])
        if seed == addresses.RANDOM:
            return self.elsewhere(request, model, format)
        if format is None:
            return await self.page(request, model, seed)
        return await self.image(request, model, seed, format)

    def elsewhere(self, request: Request, model: str, format: str | None) -> Response:
        """'random' is another one each time: a redirection to its permanent address."""
        kind(request.scope, "random")
        addresses.query(request.scope)
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(pages.address(model, fresh(1)[0], format) + query, 303, {"cache-control": NEVER})

    async def image(self, request: Request, model: str, seed: str, format: str) -> Response:
        kind(request.scope, "image")
        given = addresses.query(request.scope)
        sampler = await self.studio.sampler(model)
        size = addresses.size(given, self.largest(sampler))
        if size == sampler.model.resolution:
            size = None
        picture = Picture(addresses.look(model, addresses.seed(seed), given, sampler), format, size)
        entry = self.studio.cache.get(picture)
        if "if-none-match" in request.headers:
            etag = entry.etag if entry else self.studio.etag(picture)
            if answers.matches(request, etag):
                return answers.not_modified(etag, kept(sampler))
        if entry is None:
            self.studio.check_room(picture)
            entry = await self.in_time(request, self.studio.picture(picture))
        else:
            self.studio.metrics.add("tpdne_cache_total", result="hit")
        headers = {"etag": entry.etag, "cache-control": kept(sampler), "cross-origin-resource-policy": "cross-origin"}
        return Response(entry.data, 200, headers, media_type=FORMATS[format].mime)

    def largest(self, sampler: Sampler) -> int:
        """The size that may be asked for, at most."""
        return max(self.studio.limits.size, sampler.model.resolution)

    async def page(self, request: Request, model: str, text: str | None) -> Response:
        """Somebody new, or, with a seed's text, always the same."""
        kind(request.scope, "page")
        sampler = await self.studio.sampler(model)
        seed = fresh(1)[0] if text is None else addresses.seed(text)
        given = addresses.query(request.scope)
        if given.keys() - set(addresses.OF_PAGES):
            raise SettingsError("A page shows one seed: sizes, walks and mixes are of images, such as .webp.")
        look = addresses.look(model, seed, given, sampler)
        noun, sentence = pages.subject(model)
        said = pages.parameters(look.settings, sampler.model.truncation)
        html = pages.render(
            "look.html",
            **self.frame(model),
            robots="index, nofollow" if request.url.path == "/" else "noindex, nofollow",
            seed=seed,
            noun=noun,
            sentence=sentence,
            permanent=text is not None,
            truncation=look.settings.truncation,
            own_truncation=sampler.model.truncation,
            attributes=addresses.attributes(look.settings) or "",
            class_index="" if look.settings.class_index is None else look.settings.class_index,
            resolution=sampler.model.resolution,
            image=pages.address(model, seed, "png", **said),
            said={name: value for name, value in said.items() if value is not None},
            permalink=pages.address(model, seed, **said),
            download=pages.address(model, seed, "png", **said),
            filename=f"{model}-{seed}.png",
            api="/api" + pages.address(model, seed, **said),
        )
        return answers.text(request, html, "text/html", NEVER if text is None else FRESH)

    async def how(self, request: Request) -> Response:
        kind(request.scope, "page")
        model = self.default
        sampler = await self.studio.sampler(model)
        seeds = range(1, 5)
        walk = [pages.address(model, 1, "webp")]
        walk += [pages.address(model, 1, "webp", to=2, frame=k, frames=WALK_FRAMES) for k in range(1, WALK_FRAMES - 1)]
        html = pages.render(
            "how.html",
            **self.frame("how"),
            robots="index, nofollow",
            noun=pages.subject(model)[0],
            architecture=pages.ARCHITECTURES.get(sampler.model.arch, sampler.model.arch),
            resolution=sampler.model.resolution,
            seeds=seeds,
            has_fine=sampler.generator.num_ws > NAMED["fine"][0],
            url=lambda seed, format=None, **given: pages.address(model, seed, format, **given),
            walk=[*walk, pages.address(model, 2, "webp")],
            stages="/how/stages.webp" if self.rankings.stages(model) else None,
            ranking=self.rankings.possible(model),
        )
        return answers.text(request, html, "text/html", FRESH)

    async def ranking(self, request: Request) -> Response:
        """Which pictures look usual to the critic, and which strange; the page asks when it is shown."""
        kind(request.scope, "api")
        await self.studio.sampler(self.default)
        ranking = await self.in_time(request, self.rankings.of(self.default))
        if ranking is None:
            raise NotThereError("This generator has no critic.")
        return as_json(request, ranking)

    async def stages(self, _request: Request) -> Response:
        path = self.rankings.stages(self.default)
        if path is None:
            raise NotThereError("This generator's stages of training were not kept.")
        return Response(
            await asyncio.to_thread(path.read_bytes), headers={"cache-control": FRESH}, media_type="image/webp"
        )

    def frame(self, current: str) -> dict[str, Any]:
        return {"models": list(self.studio.names), "current": current}

    async def static(self, request: Request) -> Response:
        kind(request.scope, "static")
        for asset in pages.assets().values():
            if asset.name == request.path_params["name"]:
                return answers.text(request, asset.data, asset.media_type, FOREVER)
        raise NotThereError("There is no such file.")

    async def models(self, request: Request) -> Response:
        """Those that can be used: one that is damaged, gone or too large hides no other."""
        kind(request.scope, "api")
        well = []
        for name in self.studio.names:
            try:
                await self.studio.sampler(name)
                well.append(name)
            except TpdneError as error:
                log.error("%s", error)
        return as_json(request, [self.studio.describe(name) for name in well])

    async def facts(self, request: Request) -> Response:
        """/api/MODEL and /api/MODEL/SEED."""
        kind(request.scope, "api")
        parts = addresses.segments(request.scope)[1:]
        if not 1 <= len(parts) <= 2 or parts[0] not in self.studio.names:
            raise NotThereError("There is nothing at this address: /api/models lists the generators.")
        sampler = await self.studio.sampler(parts[0])
        if len(parts) == 1:
            return as_json(request, self.studio.describe(parts[0]))
        given = addresses.query(request.scope)
        addresses.size(given, self.largest(sampler))
        if parts[1] == addresses.RANDOM:
            return as_json(request, self.seed_facts(parts[0], str(fresh(1)[0]), given, sampler), NEVER)
        return as_json(request, self.seed_facts(parts[0], parts[1], given, sampler))

    def seed_facts(self, model: str, text: str, given: dict[str, str], sampler: Sampler) -> dict[str, Any]:
        look = addresses.look(model, addresses.seed(text), given, sampler)
        query = {name: value for name, value in given.items() if name != "size"}
        sized = {**query, **({"size": given["size"]} if "size" in given else {})}
        plain = look.walk is None and look.mix is None
        shown = {name: value for name, value in given.items() if name in addresses.OF_PAGES}
        return {
            "model": model,
            "seed": look.seed,
            "synthetic": True,
            "recipe": self.studio.recipe(look),
            "page": pages.address(model, look.seed, **shown) if plain and addresses.has_page(look.seed) else None,
            "images": {format: pages.address(model, look.seed, format, **sized) for format in FORMATS},
            "command": command(model, look, sampler) if plain else None,
        }

    async def health(self, request: Request) -> Response:
        kind(request.scope, "health")
        if not self.studio.crew.is_well:
            return problem(503, "The process that holds the models was killed: start the server again.")
        return Response('{"status": "ok"}', headers={"cache-control": NEVER}, media_type="application/json")

    async def metrics(self, request: Request) -> Response:
        kind(request.scope, "metrics")
        pids = self.studio.crew.pids
        memory = await asyncio.to_thread(resident_bytes, pids)
        gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
            ("tpdne_cache_bytes", ()): self.studio.cache.bytes,
            ("tpdne_cache_images", ()): len(self.studio.cache.entries),
            ("tpdne_waiting", ()): self.studio.waiting,
            ("tpdne_resident_bytes", ()): memory,
            ("tpdne_workers", ()): len(pids),
            ("tpdne_info", (("version", __version__),)): 1,
        }
        body = self.studio.metrics.render(gauges)
        return answers.text(request, body, "text/plain; version=0.0.4; charset=utf-8", NEVER)

    async def openapi(self, request: Request) -> Response:
        kind(request.scope, "api")
        return as_json(request, document(list(self.studio.names), self.studio.limits.size))

    async def robots(self, request: Request) -> Response:
        return answers.text(request, ROBOTS, "text/plain", FRESH)

    async def in_time(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """The result, unless time runs out or the client goes away; both give the place in the queue up.

        Raises asyncio.TimeoutError, GoneError.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(departure(request.receive))
        try:
            await asyncio.wait({task, gone}, timeout=self.studio.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise GoneError if gone.done() else asyncio.TimeoutError
        finally:
            gone.cancel()
            task.cancel()


async def departure(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def kept(sampler: Sampler) -> str:
    """How long caches may keep a generator's images: their address names no weights, and other files are replaced."""
    return FOREVER if sampler.model.path.parent == models.weights_dir() else ASKED


def command(model: str, look: Look, sampler: Sampler) -> str:
    """What makes the same image on the command line; of a file, in the folder where that lies."""
    own = sampler.model
    is_installed = own.name in models.names() and models.find(own.name) == own.path
    name = ["generate", own.name if is_installed else own.path.name]
    if is_installed and model in ("faces", "cats"):
        name = [model]
    psi, class_index = look.settings.truncation, look.settings.class_index
    seed = str(look.seed)
    words = ["tpdne", *name, *([f"--seed={seed}"] if seed.startswith("-") else ["--seed", seed])]
    words += [] if psi is None or psi == sampler.model.truncation else ["--truncation", addresses.plain(psi)]
    words += ["--class", str(class_index)] if class_index else []
    for attribute, amount in look.settings.attributes:
        words += ["--attr", f"{attribute}={addresses.plain(amount)}"]
    words += [] if sampler.precision_name == "float32" else ["--precision", sampler.precision_name]
    return shlex.join(words)


def create(studio: Studio, rules: Rules) -> ASGIApp:
    """The whole application. The default model is loaded when it starts; raises as models.load does."""
    site = Site(studio)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        studio.start()
        try:
            yield
        finally:
            await site.rankings.close()
            await studio.close()

    app = Starlette(routes=site.routes(), exception_handlers=HANDLERS, lifespan=lifespan)
    app.state.studio = studio
    app.router.redirect_slashes = False
    return Guard(app, rules, studio.metrics)


def served(names: list[str]) -> dict[str, str]:
    """Names in addresses -> installed names or files. Raises SettingsError for a name that cannot be an address."""
    from pathlib import Path

    found: dict[str, str] = {}
    for given in names:
        name = given if given in models.names() else Path(given).stem
        if name in RESERVED or name in found:
            why = "is an address of the server itself" if name in RESERVED else "is given twice"
            raise SettingsError(f"The name {name!r} {why}: copy the file of {given} under another name.")
        models.find(given)
        found[name] = given
    return found
