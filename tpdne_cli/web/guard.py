"""What every request passes through: who may ask, how often, how long an address may be; and what every answer says."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpdne_cli.web.answers import problem
from tpdne_cli.web.metrics import Metrics
from tpdne_cli.web.refusals import refuse

MAX_ADDRESS = 4096  # bytes of path and query
BURST_SECONDS = 10  # of its rate that a client may use at once
LEAST_BURST = 60.0  # a walk and the pages around it
CLIENTS = 10_000  # remembered by the rate limit

# Everything comes from here, nothing is inline, nobody may frame it.
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),  # an address may hold somebody's e-mail address
    (b"cross-origin-opener-policy", b"same-origin"),
]

log = logging.getLogger("tpdne.web")


@dataclass(frozen=True)
class Rules:
    """hosts: names that this server answers to, beside localhost and plain addresses; '*': to all.

    token: asked of everybody but /healthz. rate: requests a second that one client may send; None: any number.
    """

    hosts: frozenset[str] = frozenset()
    token: str | None = None
    rate: float | None = None


class Guard:
    """The outermost layer: refuses before any work is done, counts, and lets no exception out."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics
        self.buckets = Buckets(rules.rate) if rules.rate else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self.app(scope, receive, send)
            return
        start, status, complete = time.perf_counter(), 0, False

        async def answer(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*self.kept_private(message.get("headers", ())), *HEADERS]
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await (self.refusal(scope) or self.app)(scope, receive, answer)
        except Exception as error:
            log.error("%s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))
            if not complete:  # breaking off is the only way to say that an answer is not whole
                raise
        kind = scope.get("tpdne.kind", "other")
        self.metrics.add("tpdne_requests_total", kind=kind, status=str(status))
        self.metrics.observe(time.perf_counter() - start, kind=kind)

    def refusal(self, scope: Scope) -> ASGIApp | None:
        """The answer to a request that goes no further."""
        request, headers = Request(scope), scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1:
            return refuse(request, 400, "A request names exactly one Host.")
        name = host_name(hosts[0].decode("latin-1"))
        if not self.is_ours(name):
            sentence = f"This server does not answer to the name {name[:100]!r}: --allow-host adds a name."
            return refuse(request, 421, sentence)
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_ADDRESS:
            return refuse(request, 414, f"The address is longer than {MAX_ADDRESS} bytes.")
        if scope["path"] == "/healthz":
            return None
        is_stranger = self.rules.token is not None and not knows(headers, self.rules.token)
        if self.buckets is not None and (is_stranger or not scope["path"].startswith("/static/")):
            client = scope.get("client")
            seconds = self.buckets.take(client[0] if client else "", time.monotonic())
            if seconds:
                wait = {"retry-after": str(math.ceil(seconds))}
                return refuse(request, 429, "Too many requests from this address.", wait)
        if is_stranger:
            challenge = 'Bearer realm="tpdne", Basic realm="tpdne", charset="UTF-8"'
            return problem(401, "This server asks for a token.", {"www-authenticate": challenge})
        return None

    def kept_private(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """An answer's headers; where a token is asked for, no shared cache may hand the answer to those without it."""
        if self.rules.token is None:
            return list(headers)
        return [(k, v.replace(b"public", b"private") if k == b"cache-control" else v) for k, v in headers]

    def is_ours(self, name: str) -> bool:
        """A page that rebinds its own name to this address (DNS rebinding) still sends its own name here."""
        if name == "localhost" or name.endswith(".localhost") or name in self.rules.hosts or "*" in self.rules.hosts:
            return True
        try:
            ipaddress.ip_address(name)  # nobody can rebind a number
        except ValueError:
            return False
        return True


def host_name(header: str) -> str:
    """'Example.org:8000' -> 'example.org'; '[::1]:80' -> '::1'."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].rstrip(".").lower()


def knows(headers: Iterable[tuple[bytes, bytes]], token: str) -> bool:
    """Whether a request carries the token: as Bearer, or as the password of Basic, which browsers can send."""
    for name, value in headers:
        if name != b"authorization":
            continue
        scheme, _, credentials = value.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                credentials = base64.b64decode(credentials, validate=True).partition(b":")[2]
            except binascii.Error:
                continue
        elif scheme.lower() != b"bearer":
            continue
        if hmac.compare_digest(credentials.strip(), token.encode()):
            return True
    return False


class Buckets:
    """A token bucket per client, see client_of: `rate` a second, saved up for bursts."""

    def __init__(self, rate: float) -> None:
        self.rate, self.burst = rate, max(LEAST_BURST, BURST_SECONDS * rate)
        self.levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (level, when)

    def take(self, client: str, now: float) -> float:
        """0 where the request may pass, else the seconds until one may."""
        key = client_of(client)
        level, when = self.levels.pop(key, (self.burst, now))
        level = min(self.burst, level + (now - when) * self.rate)
        passes = level >= 1
        self.levels[key] = (level - passes, now)
        if len(self.levels) > CLIENTS:
            self.levels.popitem(last=False)
        return 0.0 if passes else (1 - level) / self.rate


def client_of(address: str) -> str:
    """Whom an address belongs to: all of one IPv6 network (/64) are one client.

    A socket of both kinds gives those of IPv4 as '::ffff:192.0.2.1': these are clients of their own.
    """
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(parsed.ipv4_mapped or ":".join(parsed.exploded.split(":")[:4]))


def kind(scope: dict[str, Any] | Scope, name: str) -> None:
    """Say what a request was, for the metrics."""
    scope["tpdne.kind"] = name
