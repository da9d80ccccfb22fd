"""The members of the zip that torch.save writes, as views of the file.

Only what torch writes is read: members stored as they are. A compressed member is refused, so there is nothing that
could swell; names are only compared, never used as paths.
"""

from __future__ import annotations

import re
import struct

from tpdne_cli.checkpoints.pickles import Budget, Machine, Maker, show
from tpdne_cli.checkpoints.storage import Storage, storage_of
from tpdne_cli.errors import AGAIN, CheckpointError

MAX_MEMBERS = 20_000
MAX_NAME = 512
MAX_EXTRA = 1024  # bytes of one member's further fields; torch writes some 30

_END = struct.Struct("<4s4H2LH")  # end of the central directory
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # one member in the central directory
_LOCAL = struct.Struct("<4s5H3L2H")  # the same member's header in front of its bytes


def damaged(what: str) -> CheckpointError:
    return CheckpointError(f"damaged or cut short: {what}; {AGAIN}.")


def members(data: memoryview) -> dict[str, memoryview]:
    """Name -> bytes of every member. Raises CheckpointError."""
    count, size, start = _directory(data)
    found: dict[str, memoryview] = {}
    pos, end = start, start + size
    for _ in range(count):
        if end - pos < _ENTRY.size:
            raise damaged("the zip's list of members ends early")
        fields = _ENTRY.unpack_from(data, pos)
        signature, flags, method, stored, whole = fields[0], fields[3], fields[4], fields[8], fields[9]
        name_size, extra_size, comment_size, offset = fields[10], fields[11], fields[12], fields[16]
        pos += _ENTRY.size
        if signature != b"PK\1\2" or extra_size > MAX_EXTRA or end - pos < name_size + extra_size + comment_size:
            raise damaged("the zip's list of members is none")
        name = _name(data[pos : pos + name_size])
        extra = bytes(data[pos + name_size : pos + name_size + extra_size])
        whole, stored, offset = _wide(extra, (whole, stored, offset))
        pos += name_size + extra_size + comment_size
        if method != 0 or stored != whole or flags & 1:
            raise CheckpointError(
                f"refused: {show(name)} is compressed or encrypted, which torch.save never does; {AGAIN}."
            )
        if name in found:
            raise CheckpointError(f"refused: the zip has two members called {show(name)}; {AGAIN}.")
        found[name] = _contents(data[:start], name, offset, stored)
    return found


def _directory(data: memoryview) -> tuple[int, int, int]:
    """Number of members, size and start of their list."""
    end = len(data) - _END.size  # torch writes no comment behind it
    if end < 0 or bytes(data[end : end + 4]) != b"PK\5\6":
        raise damaged("the end of the zip is missing")
    _, disk, _, _, count, size, start, comment = _END.unpack_from(data, end)
    locator = end - _END64_LOCATOR.size
    if 0xFFFF in (disk, count) or 0xFFFFFFFF in (size, start):
        if locator < 0 or bytes(data[locator : locator + 4]) != b"PK\6\7":
            raise damaged("the end of the zip is missing")
        end = _END64_LOCATOR.unpack_from(data, locator)[2]
        if end + _END64.size > locator or bytes(data[end : end + 4]) != b"PK\6\6":
            raise damaged("the end of the zip is missing")
        count, size, start = _END64.unpack_from(data, end)[7:]
    if comment or start + size > end:
        raise damaged("the zip's list of members is not where it should be")
    if count > MAX_MEMBERS:
        raise CheckpointError(f"refused: the zip has {count} members; no generator's has more than {MAX_MEMBERS}.")
    return count, size, start


def _name(raw: memoryview) -> str:
    name = bytes(raw[:MAX_NAME]).decode("utf-8", "replace")
    parts = re.split(r"[/\\]", name)
    if len(raw) > MAX_NAME or ".." in parts or parts[0] in ("", ".") or not name.isprintable():
        raise CheckpointError(f"refused: the zip has a member with the unsafe name {show(name)}; {AGAIN}.")
    return name


def _wide(extra: bytes, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Sizes and offset, from the zip64 field where they do not fit 32 bits."""
    wide: list[int] = []
    pos = 0
    while pos + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, pos)
        if kind == 1:
            field = extra[pos + 4 : pos + 4 + size]
            wide = [int.from_bytes(field[i : i + 8], "little") for i in range(0, len(field) - 7, 8)]
        pos += 4 + size
    wanted = sizes.count(0xFFFFFFFF)
    if len(wide) < wanted:
        raise damaged("a member of the zip has no size")
    values = iter(wide)
    whole, stored, offset = (next(values) if size == 0xFFFFFFFF else size for size in sizes)
    return whole, stored, offset


def _contents(data: memoryview, name: str, offset: int, size: int) -> memoryview:
    if offset + _LOCAL.size > len(data):
        raise damaged(f"{show(name)} lies outside of the zip")
    fields = _LOCAL.unpack_from(data, offset)
    begin = offset + _LOCAL.size + fields[9]
    if fields[0] != b"PK\3\4" or bytes(data[offset + _LOCAL.size : begin]) != name.encode():
        raise damaged(f"{show(name)} is not where the zip says")
    begin += fields[10]
    if begin + size > len(data):
        raise damaged(f"{show(name)} lies outside of the zip")
    return data[begin : begin + size]


def read_zip(data: memoryview, budget: Budget, allowed: dict[tuple[str, str], Maker | None]) -> object:
    """torch.save: data.pkl, and a member data/KEY for each storage it refers to."""
    files = members(data)
    pickles = [name for name in files if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError("refused: this zip was not written by torch.save, which puts one data.pkl into it.")
    folder = pickles[0].removesuffix("data.pkl")
    if bytes(files.get(folder + "byteorder", memoryview(b"little"))[:7]) != b"little":
        raise CheckpointError("refused: the file was saved on a big-endian machine; save it again on a common one.")
    storages: dict[str, Storage] = {}
    value = Machine(files[pickles[0]], allowed, budget, 0, lambda pid: storage_of(pid, storages)).run()
    for key, storage in storages.items():
        if folder + "data/" + key not in files:
            raise damaged(f"storage {show(key)} is missing")
        storage.fill(files[folder + "data/" + key])
    return value
