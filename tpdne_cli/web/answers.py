"""Answers: images with validators, text that is compressed where it helps, problems as RFC 9457 has them."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

FOREVER = "public, max-age=31536000, immutable"
NEVER = "no-store"
FRESH = "no-cache"  # kept, but asked for again
ASKED = f"public, {FRESH}"
WORTH_COMPRESSING = 1000  # bytes; a packet holds about as many


def problem(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as JSON that says what is wrong and what to do."""
    body = {"title": HTTPStatus(status).phrase, "status": status, "detail": sentence}
    return Response(
        json.dumps(body), status, {"cache-control": NEVER, **(headers or {})}, media_type="application/problem+json"
    )


def matches(request: Request, etag: str) -> bool:
    """Whether the client has it already (If-None-Match, compared weakly as RFC 9110 section 13.1.2 wants)."""
    given = request.headers.get("if-none-match")
    if given is None:
        return False
    bare = etag.removeprefix("W/")
    return given.strip() == "*" or bare in re.findall(r'"[^"]*"', given)


def not_modified(etag: str, cache_control: str, vary: bool = False) -> Response:
    headers = {"etag": etag, "cache-control": cache_control, **({"vary": "accept-encoding"} if vary else {})}
    return Response(None, 304, headers)


def accepts_gzip(request: Request) -> bool:
    wanted = request.headers.get("accept-encoding", "")
    return bool(re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", wanted, re.IGNORECASE))


def text(
    request: Request,
    body: str | bytes,
    media_type: str,
    cache_control: str,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Text with an ETag of its content, compressed where the client takes that and it is worth it."""
    data = body.encode() if isinstance(body, str) else body
    compressed = len(data) >= WORTH_COMPRESSING and accepts_gzip(request)
    said = {"cache-control": cache_control, "vary": "accept-encoding", **(headers or {})}
    if cache_control != NEVER:
        etag = f'"{hashlib.sha256(data).hexdigest()[:32]}{"-gz" if compressed else ""}"'
        if status == 200 and matches(request, etag):
            return not_modified(etag, cache_control, vary=True)
        said["etag"] = etag
    if compressed:
        data = gzip.compress(data, 5, mtime=0)
        said["content-encoding"] = "gzip"
    return Response(data, status, said, media_type=media_type)


def as_json(request: Request, value: Any, cache_control: str = FRESH) -> Response:
    return text(request, json.dumps(value), "application/json", cache_control)
