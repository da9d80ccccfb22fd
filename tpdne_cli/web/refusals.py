"""What goes wrong on the way to an answer, as an answer: a status and one sentence."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tpdne_cli.errors import CheckpointError, DeviceError, ModelNotFoundError, SeedError, SettingsError
from tpdne_cli.web import answers, pages
from tpdne_cli.web.answers import NEVER, problem
from tpdne_cli.web.batching import QueueFullError

UNABLE_SECONDS = 5  # until it may be worth another attempt

log = logging.getLogger("tpdne.web")


class NotThereError(Exception):
    """No such page."""


class GoneError(Exception):
    """The client went away."""


def refuse(request: Request, status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    """A sentence for people on pages, a problem document for programs. Strangers are not told of the generators."""
    if "text/html" not in request.headers.get("accept", ""):
        return problem(status, sentence, headers)
    titles = {404: "Nobody here", 400: "That is no address", 429: "One moment", 503: "One moment"}
    models = list(request.app.state.studio.names) if "app" in request.scope else []  # the guard stands before it
    title = titles.get(status, "That did not work")
    html = pages.render("problem.html", models=models, current="", title=title, sentence=sentence)
    return answers.text(request, html, "text/html", NEVER, status, headers)


async def on_bad_request(request: Request, error: Exception) -> Response:
    return refuse(request, 400, str(error))


async def on_missing(request: Request, error: Exception) -> Response:
    return refuse(request, 404, str(error))


async def on_full(request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFullError)
    return refuse(request, 503, str(error), {"retry-after": str(error.seconds)})


async def on_late(request: Request, _error: Exception) -> Response:
    wait = request.app.state.studio.seconds_to_wait()
    return refuse(request, 503, "The image was not ready in time.", {"retry-after": str(math.ceil(wait))})


async def on_unable(request: Request, error: Exception) -> Response:
    """Too little memory, or a worker process that was killed: it may be better soon."""
    log.error("%s", error)
    return refuse(request, 503, "The image could not be made now.", {"retry-after": str(UNABLE_SECONDS)})


async def on_damaged(request: Request, error: Exception) -> Response:
    log.error("%s", error)  # with the file's path, which is nobody's business
    return refuse(request, 503, "This generator's file is damaged; the server's log says more.")


async def on_removed(request: Request, error: Exception) -> Response:
    log.error("%s", error)
    return refuse(request, 404, "This generator was removed since the server started.")


async def on_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the metrics do


async def on_http(request: Request, error: Any) -> Response:
    """What Starlette itself refuses."""
    sentence = (
        "Only GET and HEAD are understood here." if error.status_code == 405 else "There is nothing at this address."
    )
    return refuse(request, error.status_code, sentence, dict(error.headers or {}))


async def on_error(request: Request, _error: Exception) -> Response:
    """Raised again behind this answer, for the guard to log."""
    return refuse(request, 500, "Something unforeseen happened; the server's log says what.")


HANDLERS: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
    SeedError: on_bad_request,
    SettingsError: on_bad_request,
    NotThereError: on_missing,
    QueueFullError: on_full,
    DeviceError: on_unable,
    CheckpointError: on_damaged,
    ModelNotFoundError: on_removed,
    asyncio.TimeoutError: on_late,
    GoneError: on_gone,
    405: on_http,
    404: on_http,
    Exception: on_error,
}
