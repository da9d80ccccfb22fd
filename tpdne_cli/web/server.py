"""The server process: a socket, uvicorn on it, and a quiet end."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tpdne_cli.errors import DeviceError

KEEP_ALIVE_SECONDS = 15
REQUEST_SECONDS = 15  # for the head of a request to arrive
HEAD_BYTES = 64 << 10  # of the head of a request
WRITE_SECONDS = 30  # for a client to take some of an answer
SHUTDOWN_SECONDS = 10  # for requests in flight
CONNECTIONS = 2048  # beyond this uvicorn itself answers 503
FILES = 2 * CONNECTIONS  # that may be open: there must be room for those that are answered 503, too
LOOPBACK = "127.0.0.1,::1,::ffff:127.0.0.1"  # the last as a socket of both kinds (::) gives the first


def bounded(protocol: Any) -> Any:
    """uvicorn's protocol, closing connections that send a head without end; what they sent would stay in memory."""
    if not hasattr(protocol, "on_headers_complete"):  # not httptools, but h11, which has a limit of its own
        return protocol

    class Bounded(protocol):  # type: ignore[misc]
        head = 0  # bytes since a head was last complete

        def data_received(self, data: bytes) -> None:
            self.head += len(data)
            super().data_received(data)
            if self.head > HEAD_BYTES:
                self.transport.abort()

        def on_headers_complete(self) -> None:
            self.head = 0
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.head = 0
            super().on_body(body)

    return Bounded


def impatient(protocol: Any) -> Any:
    """uvicorn's protocol, closing connections that keep a request's head from being complete (Slowloris), or that
    read nothing of their answer.

    uvicorn itself waits for ever, since every byte that arrives stops its keep-alive clock, and since a connection
    that is closed still delivers what was written.
    """

    class Impatient(protocol):  # type: ignore[misc]
        clock: asyncio.TimerHandle | None = None
        watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.wind()
            self.look(None, 0)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop()
            elif self.clock is None:
                self.wind()

        def connection_lost(self, error: Exception | None) -> None:
            self.stop()
            if self.watch is not None:
                self.watch.cancel()
            super().connection_lost(error)

        def wind(self) -> None:
            self.clock = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

        def stop(self) -> None:
            if self.clock is not None:
                self.clock.cancel()
                self.clock = None

        def look(self, cycle: Any, unread: int) -> None:
            """Hang up where the answer is the one of the last look, and no less of it is unread."""
            before, unread = unread, self.transport.get_write_buffer_size()
            if 0 < before <= unread and self.cycle is cycle:
                self.transport.abort()
            else:
                self.watch = self.loop.call_later(WRITE_SECONDS, self.look, self.cycle, unread)

    return Impatient


class Server(uvicorn.Server):
    """uvicorn, telling when it listens, and ending as soon as what it serves is not well."""

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], is_well: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__(config)
        self.ready, self.is_well = ready, is_well
        self.gave_up = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def on_tick(self, counter: int) -> bool:
        should_exit = await super().on_tick(counter)
        self.gave_up = not should_exit and not self.is_well()
        return should_exit or self.gave_up


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family)
    try:
        if hasattr(socket, "SO_REUSEADDR") and not hasattr(
            socket, "SO_EXCLUSIVEADDRUSE"
        ):  # Windows means another thing
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"


def configure(app: ASGIApp, behind_proxy: bool = False) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,  # addresses may hold people's e-mail addresses
        server_header=False,
        proxy_headers=behind_proxy,
        forwarded_allow_ips=LOOPBACK,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        limit_concurrency=CONNECTIONS,
        ws="none",
    )
    config.load()
    config.http_protocol_class = impatient(bounded(config.http_protocol_class))
    return config


def make_room() -> None:
    """Let this process open the files that CONNECTIONS take, as far as it may: none could be answered 503 otherwise."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(
    app: ASGIApp,
    bound: socket.socket,
    ready: Callable[[], None],
    is_well: Callable[[], bool],
    behind_proxy: bool,
) -> None:
    """Serve until SIGTERM, Ctrl-C, or the death of what holds the models: requests in flight are finished, further ones
    refused.

    Returns after SIGTERM; raises KeyboardInterrupt after Ctrl-C. Raises DeviceError where it is not well any more: who
    watches over the server starts it again, while one that goes on would refuse most requests.
    """
    make_room()
    # uvicorn raises the signal again when it has stopped: then it finds this handler, and the end is a quiet one.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    made = Server(configure(app, behind_proxy), ready, is_well)
    try:
        made.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
    if made.gave_up:
        raise DeviceError(
            "The process that holds the models was killed, perhaps for want of memory: start the server again."
        )
