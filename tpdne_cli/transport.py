"""HTTP for downloads: one request as the environment wants it made, and what the head of an answer says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse


def get(url: str, headers: Mapping[str, str], connect_timeout: float, read_timeout: float) -> BaseHTTPResponse:
    """Ask for one address, through the proxy that the environment (or the system) names for it, or directly.

    Time-outs in seconds. The body is not read yet and redirects are not followed. Raises urllib3's errors.
    """
    from urllib.request import getproxies, proxy_bypass

    import urllib3

    parts = urlsplit(url)
    timeout = urllib3.Timeout(connect=connect_timeout, read=read_timeout)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    client: urllib3.PoolManager
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        client = urllib3.PoolManager(timeout=timeout)
    else:
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        login = urllib3.util.parse_url(proxy).auth
        proxy_headers = urllib3.make_headers(proxy_basic_auth=unquote(login)) if login else None
        client = urllib3.ProxyManager(proxy, proxy_headers=proxy_headers, timeout=timeout)
    return client.request("GET", url, headers=headers, preload_content=False, redirect=False, retries=False)


def retry_after(response: BaseHTTPResponse) -> float | None:
    """How many seconds the server asks to wait, where it says so in a way that can be read."""
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    try:
        return Retry().get_retry_after(response)
    except InvalidHeader:
        return None


def content_range(header: str) -> tuple[int, int | None]:
    """'bytes 5-9/10' -> (5, 10); (-1, None) for what is none."""
    match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", header.strip())
    if not match:
        return -1, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def validator(headers: Mapping[str, str]) -> str | None:
    """What tells one version of the file from another, byte by byte (RFC 9110, 8.8): a strong ETag or an old date."""
    tag = headers.get("ETag", "")
    if tag.startswith('"'):
        return tag
    try:
        changed = parsedate_to_datetime(headers.get("Last-Modified", ""))
        asked = parsedate_to_datetime(headers.get("Date", ""))
        return headers["Last-Modified"] if (asked - changed).total_seconds() >= 1 else None
    except (TypeError, ValueError):  # a date is missing, is none, or lacks its zone
        return None


def reason(error: Exception) -> str:
    """What went wrong, in words of ours: a client's own name its classes and show whole addresses."""
    from urllib3 import exceptions

    reasons: list[tuple[type[Exception], str]] = [
        (exceptions.NameResolutionError, "the network is down or its name is not known"),
        (exceptions.NewConnectionError, "its server cannot be reached"),
        (exceptions.ConnectTimeoutError, "its server does not answer"),
        (exceptions.ReadTimeoutError, "its server fell silent"),
        (exceptions.ProxyError, "the proxy that the environment names cannot be reached or refuses"),
        (exceptions.ProxySchemeUnknown, "the environment names a proxy that is none of http or https"),
        (exceptions.SSLError, "its certificate cannot be verified; SSL_CERT_FILE names whom to trust"),
        (exceptions.LocationValueError, "the address cannot be read"),
        (exceptions.ProtocolError, "the connection broke"),
    ]
    return next((text for kind, text in reasons if isinstance(error, kind)), f"the network failed: {error}")
