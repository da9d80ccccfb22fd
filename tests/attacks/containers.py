"""Zips of torch.save and safetensors files that lie about what is in them, swell, or want to be written elsewhere."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable

from attacks.assembler import (
    BINPERSID,
    EMPTY_DICT,
    MARK,
    NONE,
    SETITEMS,
    call,
    dict_of,
    integer,
    name,
    pickle,
    tensor,
    text,
    tuple_of,
)
from attacks.code import EVIL

# -- torch.save


def stored(numel: int = 16, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), integer(numel)) + BINPERSID


def generator(weight: bytes) -> bytes:
    return pickle(dict_of(g_ema=EMPTY_DICT + MARK + text("input.input") + weight + SETITEMS), protocol=2)


CONST = tensor((1, 1, 4, 4), (16, 16, 4, 1), of=stored())
GOOD = generator(CONST)


def archive(members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as writer:
        for member, data in (members or {"a/data.pkl": GOOD, "a/data/0": bytes(64)}).items():
            writer.writestr(zipfile.ZipInfo(member), data, compression)
    return file.getvalue()


def end_of(data: bytes, **changes: int) -> bytes:
    """The archive with other numbers in its last 22 bytes."""
    names = ("disk", "start_disk", "here", "count", "size", "start", "comment")
    values = dict(zip(names, struct.unpack("<4H2LH", data[-18:]), strict=True)) | changes
    return data[:-18] + struct.pack("<4H2LH", *values.values())


def entry_of(data: bytes, offset: int, value: bytes) -> bytes:
    """The archive with other bytes in the first entry of its directory."""
    start = data.index(b"PK\1\2") + offset
    return data[:start] + value + data[start + len(value) :]


def zip64(start: int, size: int, count: int) -> bytes:
    data = archive()
    body, end = data[:-22], data[-22:]
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(body), 1)
    return body + record + locator + end_of(end, count=0xFFFF, size=0xFFFFFFFF, start=0xFFFFFFFF)


def many_members() -> bytes:
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * 65_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65_000, 65_000, len(directory), 4, 0)
    return b"PK\3\4" + directory + end


def long_extras(count: int = 300) -> bytes:
    """Members whose further fields are 16,000 empty ones each: twenty megabytes that take seconds to walk through."""
    extra = bytes(4 * 16_383)
    body = directory = b""
    for i in range(count):
        name = b"a/%06d" % i
        sizes = (0, 0, 0, len(name))
        entry = (b"PK\1\2", 20, 20, 0, 0, 0, 0, *sizes, len(extra), 0, 0, 0, 0, len(body))
        directory += struct.pack("<4s6H3L5H2L", *entry) + name + extra
        body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, *sizes, 0) + name
    return body + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)


def named(member: str) -> Callable[[], bytes]:
    return lambda: archive({"a/data.pkl": GOOD, "a/data/0": bytes(64), member: b"x"})


def with_nul() -> bytes:
    return archive({"a/data.pkl": GOOD, "a/data/0": bytes(64), "a/evil?": b"x"}).replace(b"evil?", b"evil\0")


# -- safetensors


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def described(**tensors: object) -> dict[str, object]:
    return {"__metadata__": {"tpdne": json.dumps({"version": 1, "arch": "stylegan2", "config": {}})}, **tensors}


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def metadata(value: object) -> Callable[[], bytes]:
    return lambda: safetensors({"__metadata__": {"tpdne": value}, "a": entry([1], 0, 4)}, bytes(4))


ATTACKS: dict[str, Callable[[], bytes]] = {
    # code
    "zip: os.system": lambda: archive({"a/data.pkl": pickle(EVIL, protocol=2)}),
    "zip: os.system in a weight": lambda: archive({"a/data.pkl": generator(EVIL), "a/data/0": bytes(64)}),
    "zip: torchscript": lambda: archive({"a/data.pkl": pickle(call(name("__torch__", "Module"))), "a/code/a.py": b"x"}),
    "zip: id of a module": lambda: archive({"a/data.pkl": generator(tuple_of(text("module"), NONE) + BINPERSID)}),
    "zip: id of code": lambda: archive({"a/data.pkl": generator(EVIL + BINPERSID)}),
    # swelling
    "zip: bomb": lambda: archive({"a/data.pkl": GOOD, "a/data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED),
    "zip: bomb of a pickle": lambda: archive({"a/data.pkl": bytes(64 << 20)}, zipfile.ZIP_BZIP2),
    "zip: size of 4 GiB": lambda: entry_of(archive(), 20, b"\xfe\xff\xff\xff\xfe\xff\xff\xff"),
    "zip: zip64 size without one": lambda: entry_of(archive(), 20, b"\xff" * 8),
    "zip: other size": lambda: entry_of(archive(), 24, b"\xff\xff\0\0"),
    "zip: offset beyond": lambda: entry_of(archive(), 42, b"\xff\xff\xff\x7f"),
    "zip: offset of another": lambda: entry_of(archive(), 42, struct.pack("<L", archive().index(b"PK\3\4", 4))),
    "zip: encrypted": lambda: entry_of(archive(), 8, b"\1\0"),
    "zip: many members": many_members,
    "zip: long extra fields": long_extras,
    "zip: a member inside another": lambda: entry_of(archive(), 20, struct.pack("<2L", 200, 200)),
    "zip: more members than there are": lambda: end_of(archive(), count=1000),
    "zip: directory beyond": lambda: end_of(archive(), start=0x7FFFFFFF),
    "zip: comment": lambda: end_of(archive(), comment=5),
    "zip: zip64 beyond": lambda: zip64(2**63, 100, 2),
    "zip: zip64 of 2^64 members": lambda: zip64(0, 100, 2**64 - 1),
    "zip: zip64 record beyond": lambda: zip64(0, 100, 2).replace(b"PK\6\7\0\0\0\0", b"PK\6\7\0\0\0\0" + b"\xff" * 8, 1),
    "zip: only an end": lambda: b"PK\5\6" + bytes(18),
    "zip: only a beginning": lambda: b"PK\3\4",
    # storages
    "zip: storage missing": lambda: archive({"a/data.pkl": GOOD}),
    "zip: storage of another length": lambda: archive({"a/data.pkl": GOOD, "a/data/0": bytes(60)}),
    "zip: storage described twice": lambda: archive(
        {"a/data.pkl": pickle(dict_of(a=stored(16), b=stored(17))), "a/data/0": bytes(64)}
    ),
    "zip: storage of objects": lambda: archive({"a/data.pkl": generator(tensor((1,), (1,), of=stored(kind="Tensor")))}),
    "zip: storage outside": lambda: archive(
        {"a/data.pkl": generator(tensor((1,), (1,), of=stored(key="../../data.pkl"))), "a/data/0": bytes(64)}
    ),
    "zip: big-endian": lambda: archive({"a/data.pkl": GOOD, "a/byteorder": b"big", "a/data/0": bytes(64)}),
    "zip: no pickle": lambda: archive({"word/document.xml": b"x"}),
    "zip: two pickles": lambda: archive({"a/data.pkl": GOOD, "b/data.pkl": GOOD, "a/data/0": bytes(64)}),
    # names
    **{
        f"zip: name {member!r}": named(member)
        for member in ("../../evil", "a/../../evil", "/etc/evil", "..\\evil", "a/x\nb", "a/" + "x" * 5000)
    },
    "zip: name with NUL": with_nul,
    # safetensors
    "safetensors: header of 2^64": lambda: safetensors(b"{}", length=2**64 - 1),
    "safetensors: header of 99 MB": lambda: safetensors(b"{" + b" " * (99 << 20) + b"}"),
    "safetensors: 250,000 tensors": lambda: safetensors(
        described(**{f"t{i}": entry([0], 0, 0) for i in range(250_000)})
    ),
    "safetensors: 900,000 notes": lambda: safetensors({"__metadata__": {f"k{i}": "v" for i in range(900_000)}}),
    "safetensors: a description of 15 MB": metadata(
        '{"version": 1, "arch": "stylegan2", "config": {"a": [' + "[]," * 5_000_000 + "0]}}"
    ),
    "safetensors: header longer than the file": lambda: safetensors(described(), length=100_000),
    "safetensors: header shorter": lambda: safetensors(described(a=entry([1], 0, 4)), bytes(4), length=20),
    "safetensors: no JSON": lambda: safetensors(b"{" + b"\xff" * 50),
    "safetensors: deep JSON": lambda: safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "safetensors: a list": lambda: safetensors(b'{"a": []}'),
    "safetensors: overlapping": lambda: safetensors(described(a=entry([2], 0, 8), b=entry([2], 4, 12)), bytes(12)),
    "safetensors: a gap": lambda: safetensors(described(a=entry([1], 0, 4), b=entry([1], 8, 12)), bytes(12)),
    "safetensors: bytes left over": lambda: safetensors(described(a=entry([1], 0, 4)), bytes(100)),
    "safetensors: end before begin": lambda: safetensors(described(a=entry([1], 4, 0)), bytes(4)),
    "safetensors: shape too large": lambda: safetensors(described(a=entry([2], 0, 4)), bytes(4)),
    "safetensors: huge shape": lambda: safetensors(described(a=entry([2**32, 2**32], 0, 4)), bytes(4)),
    "safetensors: negative shape": lambda: safetensors(described(a=entry([-1, -1], 0, 4)), bytes(4)),
    "safetensors: other dtype": lambda: safetensors(described(a=entry([1], 0, 4, "OBJ")), bytes(4)),
    "safetensors: integers": lambda: safetensors(described(a=entry([1], 0, 8, "I64")), bytes(8)),
    "safetensors: twice a name": lambda: safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "safetensors: no description": lambda: safetensors({"a": entry([1], 0, 4)}, bytes(4)),
    "safetensors: description no JSON": metadata("{"),
    "safetensors: deep description": metadata("[" * 50_000 + "]" * 50_000),
    "safetensors: description a list": metadata("[]"),
    "safetensors: description of a later version": metadata('{"version": 99, "arch": "x", "config": {}}'),
    "safetensors: description no text": metadata(5),
    "safetensors: config no dict": metadata('{"version": 1, "arch": "stylegan2", "config": 5}'),
}
