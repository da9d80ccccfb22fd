"""Where files live: installed generators, the records of where they came from, and the cache of downloads.

TPDNE_HOME, where it is set, holds everything; else the platform's own directories for data and for caches do. Every
file appears whole or not at all, so locks only spare work: where they do not work, nothing breaks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tpdne_cli.errors import OutputError, SettingsError
from tpdne_cli.files import write_atomic

CACHE_TAG = """Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache of tpdne: everything in it can be fetched again. See https://bford.info/cachedir/.
"""

# Small letters only: on half of all file systems Cat and cat are one file.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # no file can be called that on Windows
CRITIC_SUFFIX = "-critic"


def data_dir() -> Path:
    """Where installed generators are kept."""
    if home := os.environ.get("TPDNE_HOME"):
        return Path(home).expanduser().absolute()
    from platformdirs import user_data_path

    return user_data_path("tpdne", appauthor=False)


def models_dir() -> Path:
    return data_dir() / "models"


def cache_dir() -> Path:
    """Where downloads are kept; emptying it loses nothing but time."""
    if os.environ.get("TPDNE_HOME"):
        return data_dir() / "cache"
    from platformdirs import user_cache_path

    return user_cache_path("tpdne", appauthor=False)


def make_dir(path: Path) -> Path:
    """The directory, made where it is missing. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"The directory {path} cannot be made: {reason}; TPDNE_HOME names another place.") from None
    return path


def make_cache_dir() -> Path:
    """The cache, marked as one, so that backups leave it out."""
    path = make_dir(cache_dir())
    if not (path / "CACHEDIR.TAG").exists():
        write_atomic(path / "CACHEDIR.TAG", CACHE_TAG.encode())
    return path


def is_name(text: str) -> bool:
    """Whether a generator may be called that: no part of a path, one file on every platform."""
    return bool(_NAME.fullmatch(text)) and not text.endswith((CRITIC_SUFFIX, ".")) and not _DEVICES.fullmatch(text)


def check_name(name: str) -> str:
    """Raises SettingsError for what cannot be a name."""
    if not is_name(name):
        raise SettingsError(
            f"{name!r} is no name for a generator: use small letters, digits, '.', '_' and '-', "
            f"not ending with {CRITIC_SUFFIX!r}."
        )
    return name


def name_for(file_name: str) -> str:
    """A name out of a file's: 'Dishes (v2).PKL' -> 'dishes-v2'. Raises SettingsError where nothing is left of it."""
    stem = re.sub(r"\.(pkl|pt|pth|safetensors)$", "", file_name.lower())
    name = re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._")[:100]
    if not is_name(name):
        raise SettingsError(f"{file_name!r} makes no name for a generator: give one with --name.")
    return name


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def write_json(path: Path, value: dict[str, Any]) -> None:
    make_dir(path.parent)
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """What write_json wrote; empty where there is nothing that can be read: a lost record is no lost generator."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def critic_path(model: Path) -> Path:
    """Where a generator's critic lies, if it has one."""
    return model.with_name(f"{model.stem}{CRITIC_SUFFIX}{model.suffix}")


def record_path(model: Path) -> Path:
    """The record beside an installed generator: origin, licence, when it came, sha256 of the source and the files."""
    return model.with_name(f"{model.stem}.json")


def url_key(url: str) -> str:
    """A file name for an address; it tells nothing of passwords in it."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def seen_path(url: str) -> Path:
    """What an address gave when it was first read from: kept with the data, for the cache may be emptied."""
    return data_dir() / "downloads" / f"{url_key(url)}.json"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with what the lock file stands for. The kernel frees the lock of a process that dies."""
    from filelock import FileLock

    make_dir(path.parent)
    lock = FileLock(path)
    with suppress(OSError, NotImplementedError):  # a file system without locks: go on, every write is atomic
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False
