"""An address -> a whole file in the cache, and its sha256.

What has arrived stays in KEY-NAME.part beside a note of which version of the file it is a part of, so that an
interrupted download goes on where it stopped, also days later. The file gets its name when it is complete and its
content is the one expected: the pinned sha256, or the one that the address gave the first time.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlsplit

from tpdne_cli import store, transport
from tpdne_cli.errors import DownloadError, SettingsError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

Progress = Callable[[int, "int | None"], None]
Waiting = Callable[[str, float], None]

CHUNK = 2**16  # what a broken connection can lose at most
BY_HAND = "or fetch it by other means and run 'tpdne models import FILE'"
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_REDIRECTS = {301, 302, 303, 307, 308}
_SAYS = {
    401: "asks for a login",
    403: "refuses access",
    404: "has no such file",
    407: "is behind a proxy that asks for a login",
    410: "has the file no longer",
}


@dataclass(frozen=True)
class Policy:
    """How patient a download is, in seconds, and how much it takes, in bytes."""

    attempts: int = 5  # in a row without getting any further
    backoff: float = 1.0  # doubled after each
    longest_wait: float = 60.0
    connect_timeout: float = 15.0
    read_timeout: float = 30.0
    max_bytes: int = 2**33
    spare_bytes: int = 2**26  # left free on the disk
    max_redirects: int = 5
    sleep: Callable[[float], None] = time.sleep


class _Transient(Exception):
    """A failure that may be gone at the next attempt, and after how many seconds where the server says."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def _ignore(*_told: object) -> None:
    pass


def fetch(
    url: str,
    on_progress: Progress = _ignore,
    expected_sha256: str | None = None,
    *,
    on_wait: Waiting = _ignore,
    policy: Policy | None = None,
) -> tuple[Path, str]:
    """The file at an address, complete in the cache, and its sha256 in hex; from the cache where it is there already.

    on_progress: called with (bytes so far, bytes in all or None); on_wait: with (what went wrong, seconds until the
    next attempt). Proxies come from the environment; with TPDNE_OFFLINE set nothing is asked of the network. Raises
    DownloadError, SettingsError for what is no sha256, and OutputError where the cache cannot be written.
    """
    _check_address(url)
    pinned = _checked_digest(expected_sha256)
    path = _cached(url)
    with store.locked(path.with_name(f"{path.name}.lock")):
        seen = store.read_json(store.seen_path(url))
        wanted = pinned or _text(seen.get("sha256"))
        if path.is_file() and wanted is not None and store.file_sha256(path) == wanted:
            return path, wanted
        if is_offline():
            raise DownloadError(f"{shown(url)} cannot be fetched while TPDNE_OFFLINE is set: unset it, {BY_HAND}.")
        job = _Job(url, path.with_name(f"{path.name}.part"), on_progress, on_wait, policy or Policy())
        with _disk_errors(job.part):
            job.run()
            digest = store.file_sha256(job.part)
            if wanted is not None and digest != wanted:
                job.drop()
                raise DownloadError(_other_content(url, digest, wanted, None if pinned else seen))
            if digest != seen.get("sha256"):
                record = {"url": shown(url), "sha256": digest, "bytes": job.size(), "first_seen": store.today()}
                store.write_json(store.seen_path(url), record)
            job.part.replace(path)
            job.note.unlink(missing_ok=True)
        return path, digest


def forget(url: str) -> None:
    """Throw away what an address gave, and the memory of it, so that the next attempt begins anew."""
    path = _cached(url)
    with store.locked(path.with_name(f"{path.name}.lock")):
        for file in (path, store.seen_path(url)):
            file.unlink(missing_ok=True)


def _cached(url: str) -> Path:
    return store.make_cache_dir() / f"{store.url_key(url)}-{file_name(url)}"


def is_offline() -> bool:
    """Whether the user forbids the network."""
    return os.environ.get("TPDNE_OFFLINE", "").lower() not in ("", "0", "false", "no")


def file_name(url: str) -> str:
    """The last part of an address as a harmless file name: '.../a%20cat.pkl?raw=1' -> 'a-cat.pkl'."""
    last = unquote(urlsplit(url).path).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last)[-100:].strip("-.") or "file"


def shown(url: str) -> str:
    """An address without what may be secret in it: signed links carry their key in the query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _checked_digest(sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise SettingsError(f"{sha256!r} is no sha256: give the 64 hexadecimal digits.")
    return sha256.lower()


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError as error:
        raise DownloadError(f"{url!r} is no address ({error}): give one that begins with https://.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DownloadError(f"{url!r} is no address to fetch from: give one that begins with https://.")
    if parts.username is not None or parts.password is not None:
        raise DownloadError(
            f"The address at {parts.hostname} holds a login, which is not sent: leave it out, {BY_HAND}."
        )


def _other_content(url: str, got: str, wanted: str, seen: dict[str, object] | None) -> str:
    if seen is None:
        return f"{shown(url)} gives a file with sha256 {got}, where {wanted} is expected: do not use it, {BY_HAND}."
    return (
        f"{shown(url)} gives another file (sha256 {got}) than on {seen.get('first_seen', 'an earlier day')} "
        f"(sha256 {wanted}): if that is as it should be, delete {store.seen_path(url)} and run again."
    )


@contextmanager
def _disk_errors(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DownloadError(
            f"{part} cannot be written ({reason}): free some space, or name another place with TPDNE_HOME."
        ) from None


@dataclass
class _Job:
    """One address on its way into one .part file."""

    url: str
    part: Path
    on_progress: Progress
    on_wait: Waiting
    policy: Policy
    reached: int = field(default=0, init=False)  # the farthest point so far, also of attempts that began again

    @property
    def note(self) -> Path:
        """Which version of the file the part is of: its validator, and its whole size."""
        return self.part.with_name(f"{self.part.name}.json")

    def run(self) -> None:
        """Attempt after attempt, until the part is whole. Raises DownloadError."""
        failures = 0
        while True:
            before = self.reached
            try:
                return self._attempt()
            except _Transient as error:
                # Progress makes up for a failure, but only progress past the farthest point: no endless loops.
                failures = 1 if self.reached >= before + 2**20 else failures + 1
                wait = self.policy.backoff * 2 ** (failures - 1) if error.wait is None else error.wait
                if failures >= self.policy.attempts or wait > self.policy.longest_wait:
                    raise DownloadError(self._sentence(str(error), error.wait)) from None
                if wait > 0:
                    self.on_wait(str(error), wait)
                self.policy.sleep(wait)

    def _sentence(self, reason: str, wait: float | None = None) -> str:
        when = f"in {wait:.0f} seconds" if wait else "later"
        size = self.size()
        kept = f", {size / 1e6:.1f} MB of it have come and are kept" if size and self._note().get("validator") else ""
        return f"{shown(self.url)} could not be fetched ({reason}){kept}: try again {when}, {BY_HAND}."

    def size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _note(self) -> dict[str, Any]:
        return store.read_json(self.note)

    def _attempt(self) -> None:
        """Ask for what is missing and append it."""
        note = self._note()
        validator, size = _text(note.get("validator")), self.size()
        if not validator:
            size = 0  # nothing tells whether the file is still the same: begin again
        elif size and size == note.get("total"):
            return
        headers = {"Accept-Encoding": "identity", "User-Agent": "tpdne"}
        if size:
            headers |= {"Range": f"bytes={size}-", "If-Range": str(validator)}
        response = self._open(headers)
        try:
            size, total = self._accept(response, size, str(validator))
            self._receive(response, size, total)
        finally:
            response.close()

    def _open(self, headers: Mapping[str, str]) -> BaseHTTPResponse:
        """The answer at the end of all redirects."""
        url = self.url
        for _ in range(self.policy.max_redirects + 1):
            with self._network():
                response = transport.get(url, headers, self.policy.connect_timeout, self.policy.read_timeout)
            if response.status not in _REDIRECTS:
                return response
            response.close()
            url = self._target(url, response.headers.get("Location", ""))
        raise DownloadError(
            f"{shown(self.url)} leads on more than {self.policy.max_redirects} times: check the address, {BY_HAND}."
        )

    def _target(self, url: str, location: str) -> str:
        """Where a redirect leads: never to files or other kinds of address, never from https down to http."""
        try:
            target = urljoin(url, location)
            scheme = urlsplit(target).scheme
        except ValueError:
            target, scheme = "", ""
        if scheme != "https" and (scheme != "http" or urlsplit(url).scheme == "https"):
            raise DownloadError(
                f"{shown(self.url)} leads on to an address that is not followed (of the kind {scheme!r}): "
                f"check the address, {BY_HAND}."
            )
        return target

    @contextmanager
    def _network(self) -> Iterator[None]:
        from urllib3 import exceptions

        try:
            yield
        except (exceptions.SSLError, exceptions.NameResolutionError, exceptions.LocationValueError) as error:
            raise DownloadError(self._sentence(transport.reason(error))) from None
        except (exceptions.HTTPError, OSError) as error:
            raise _Transient(transport.reason(error)) from None

    def _accept(self, response: BaseHTTPResponse, size: int, validator: str) -> tuple[int, int | None]:
        """(where this answer begins, the whole size) after every check that its head allows."""
        self._check_status(response)
        _check_kind(self.url, response)
        if response.status == 206:
            start, total = transport.content_range(response.headers.get("Content-Range", ""))
            tag = response.headers.get("ETag", validator)
            if not size or start != size or (validator.startswith('"') and tag != validator):
                self.drop()
                raise _Transient("the server sent another part than the one asked for", 0.0)
        else:
            length = response.headers.get("Content-Length", "")
            size, total = 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None
            self.part.unlink(missing_ok=True)  # before the note: a note must never vouch for another version's bytes
            note = {"url": shown(self.url), "validator": transport.validator(response.headers), "total": total}
            store.write_json(self.note, note)
        self._check_room(size, total)
        return size, total

    def _check_status(self, response: BaseHTTPResponse) -> None:
        status = response.status
        if status in (200, 206):
            return
        if status == 416:  # the part is longer than the file is now
            self.drop()
            raise _Transient("the file on the server has changed", 0.0)
        if status in _TRANSIENT:
            raise _Transient(f"its server answers {status}", transport.retry_after(response))
        says = _SAYS.get(status, "does not give the file")
        raise DownloadError(f"{shown(self.url)} {says} (status {status}): check the address, {BY_HAND}.")

    def _check_room(self, size: int, total: int | None) -> None:
        """Raises DownloadError for what is too large, before a byte of it has come where its size is known."""
        if max(size, total or 0) > self.policy.max_bytes:
            self.drop()
            raise DownloadError(
                f"{shown(self.url)} is larger than {self.policy.max_bytes / 1e9:.1f} GB, which no generator is: "
                f"check the address, {BY_HAND}."
            )
        free = shutil.disk_usage(self.part.parent).free
        if total is not None and total - size + self.policy.spare_bytes > free:
            raise DownloadError(
                f"{shown(self.url)} needs {(total - size) / 1e6:.0f} MB in {self.part.parent}, where "
                f"{free / 1e6:.0f} MB are free: free some space, or name another place with TPDNE_HOME."
            )

    def _receive(self, response: BaseHTTPResponse, size: int, total: int | None) -> None:
        with self.part.open("ab") as file:
            self.on_progress(size, total)
            while True:
                with self._network():
                    chunk = response.read(CHUNK, decode_content=False)
                if not chunk:
                    break
                file.write(chunk)
                size += len(chunk)
                self.reached = max(self.reached, size)
                if size > self.policy.max_bytes:
                    self._check_room(size, total)
                self.on_progress(size, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and size != total:
            raise _Transient(f"{size} bytes came of {total}")

    def drop(self) -> None:
        """Forget the part."""
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _check_kind(url: str, response: BaseHTTPResponse) -> None:
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        raise DownloadError(
            f"{shown(url)} gives a web page, not a file: give the address of the file itself, {BY_HAND}."
        )
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise DownloadError(f"{shown(url)} comes in a compressed form that was not asked for: {BY_HAND[3:]}.")
