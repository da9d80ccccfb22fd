"""Encoded images in memory, the least recently used leaving first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
OVERHEAD = 1024  # bytes of key, record and dictionary slot, so that a million tiny images stay within the limit, too


@dataclass(frozen=True)
class Encoded:
    """The bytes of one image file and its ETag, quotation marks included."""

    data: bytes
    etag: str


class Cache(Generic[K]):
    """At most `limit` bytes of images."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.entries: OrderedDict[K, Encoded] = OrderedDict()

    def get(self, key: K) -> Encoded | None:
        entry = self.entries.get(key)
        if entry is not None:
            self.entries.move_to_end(key)
        return entry

    def put(self, key: K, entry: Encoded) -> None:
        if key in self.entries:
            self.bytes -= _weight(self.entries.pop(key))
        self.entries[key] = entry
        self.bytes += _weight(entry)
        while self.bytes > self.limit and self.entries:
            self.bytes -= _weight(self.entries.popitem(last=False)[1])


def _weight(entry: Encoded) -> int:
    return len(entry.data) + OVERHEAD
