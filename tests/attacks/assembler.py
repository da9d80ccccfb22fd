"""Pickle opcodes by hand, for what no pickler writes."""

from __future__ import annotations

import struct

MARK, STOP, NONE = b"(", b".", b"N"
TUPLE, TUPLE1, TUPLE2, TUPLE3 = b"t", b"\x85", b"\x86", b"\x87"
EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT, EMPTY_SET = b")", b"]", b"}", b"\x8f"
REDUCE, BUILD, NEWOBJ = b"R", b"b", b"\x81"
SETITEM, SETITEMS, APPEND, APPENDS, ADDITEMS = b"s", b"u", b"a", b"e", b"\x90"
STACK_GLOBAL, MEMOIZE, BINPERSID = b"\x93", b"\x94", b"Q"


def pickle(*parts: bytes, protocol: int = 4) -> bytes:
    return bytes([0x80, protocol]) + b"".join(parts) + STOP


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def real(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


def blob(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*parts: bytes) -> bytes:
    return MARK + b"".join(parts) + TUPLE


def list_of(*parts: bytes) -> bytes:
    return EMPTY_LIST + MARK + b"".join(parts) + APPENDS


def dict_of(**items: bytes) -> bytes:
    return EMPTY_DICT + MARK + b"".join(text(key) + value for key, value in items.items()) + SETITEMS


def call(target: bytes, *args: bytes) -> bytes:
    return target + tuple_of(*args) + REDUCE


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def legacy(count: int = 4, data: bytes | None = None, body: bytes | None = None, **changes: bytes) -> bytes:
    """torch.save of one storage without a zip, whole or with parts exchanged."""
    pid = tuple_of(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), integer(count), NONE)
    system = dict_of(protocol_version=integer(1001), little_endian=b"\x88", type_sizes=EMPTY_DICT)
    parts = {
        "magic": pickle(b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", protocol=2),
        "protocol": pickle(b"M\xe9\x03", protocol=2),
        "system": pickle(system, protocol=2),
        "object": pickle(body or pid + BINPERSID, protocol=2),
        "keys": pickle(list_of(text("0")), protocol=2),
        "numel": struct.pack("<q", count),
    }
    return b"".join({**parts, **changes}.values()) + (bytes(4 * count) if data is None else data)


def storage(count: int = 4, **changes: bytes) -> bytes:
    return call(name("torch.storage", "_load_from_bytes"), blob(legacy(count, **changes)))


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, of: bytes | None = None) -> bytes:
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        of or storage(),
        integer(offset),
        tuple_of(*map(integer, shape)),
        tuple_of(*map(integer, stride)),
        b"\x89",
        call(name("collections", "OrderedDict")),
    )


def module(class_name: str = "Generator", **state: bytes) -> bytes:
    """A persistent object; `state` beside the dicts that every module has."""
    state = {"_parameters": EMPTY_DICT, "_buffers": EMPTY_DICT, "_modules": EMPTY_DICT, **state}
    meta = dict_of(
        type=text("class"),
        version=integer(6),
        module_src=text("import os"),
        class_name=text(class_name),
        state=dict_of(**state),
    )
    return call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), meta)


def network(root: bytes) -> bytes:
    return pickle(dict_of(G_ema=root))


def dtype(kind: str = "f4", state: bytes | None = None) -> bytes:
    usual = tuple_of(integer(3), text("<"), NONE, NONE, NONE, integer(-1), integer(-1), integer(0))
    return call(name("numpy", "dtype"), text(kind), b"\x89", b"\x88") + (state or usual) + BUILD


def array(shape: tuple[int, ...], raw: bytes, kind: bytes | None = None, state: bytes | None = None) -> bytes:
    reconstruct = name("numpy.core.multiarray", "_reconstruct")
    empty = call(reconstruct, name("numpy", "ndarray"), tuple_of(integer(0)), blob(b"b"))
    usual = tuple_of(integer(1), tuple_of(*map(integer, shape)), kind or dtype(), b"\x89", raw)
    return empty + (state or usual) + BUILD
