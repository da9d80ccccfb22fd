"""Pickles that try to take all memory, all time, or the C stack."""

from __future__ import annotations

import struct
from collections.abc import Callable

from attacks.assembler import (
    ADDITEMS,
    APPEND,
    APPENDS,
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_SET,
    EMPTY_TUPLE,
    MARK,
    MEMOIZE,
    NEWOBJ,
    NONE,
    REDUCE,
    SETITEM,
    SETITEMS,
    TUPLE1,
    array,
    blob,
    call,
    dict_of,
    dtype,
    get,
    integer,
    legacy,
    list_of,
    module,
    name,
    network,
    pickle,
    put,
    storage,
    tensor,
    text,
    tuple_of,
)

MANY = 100_000
HUGE = 1 << 40


def weights(value: bytes) -> bytes:
    """A generator one weight of which is `value`."""
    block = module("SynthesisBlock", _parameters=dict_of(const=value))
    return network(module(_modules=dict_of(synthesis=module(_modules=dict_of(b4=block)))))


def shared_modules(depth: int, fan: int) -> bytes:
    """A dict of modules by memo: module i holds module i - 1 `fan` times."""
    built = [text("m0") + module() + put(0)]
    for i in range(1, depth):
        parts = dict_of(**{f"p{k}": get(i - 1) for k in range(fan)})
        built.append(text(f"m{i}") + module(_modules=parts) + put(i))
    return pickle(EMPTY_DICT, MARK, *built, text("G_ema"), get(depth - 1), SETITEMS)


def cyclic_module() -> bytes:
    """A module that is its own part."""
    return pickle(
        dict_of(),
        MARK,
        text("parts"), EMPTY_DICT, put(1),
        text("G_ema"), module(_modules=get(1)), put(2),
        text("loop"), get(1), text("self"), get(2), SETITEM,
        SETITEMS,
    )  # fmt: skip


def colliding_keys() -> bytes:
    """Integers that all hash alike."""
    keys = b"".join(integer(i * (2**61 - 1)) + NONE for i in range(1, 100_000))
    return pickle(EMPTY_DICT, MARK, keys, SETITEMS)


def modules_of_nothings() -> bytes:
    """450 modules that share one dict of 100,000 parts which are not there."""
    nothings = EMPTY_DICT + MARK + b"".join(text(f"n{i}") + NONE for i in range(100_000)) + SETITEMS + put(0)
    parts = b"".join(text(f"m{i}") + module(_parameters=get(0)) for i in range(450))
    return pickle(
        EMPTY_DICT,
        MARK,
        text("x"),
        nothings,
        text("G_ema"),
        module(_modules=EMPTY_DICT + MARK + parts + SETITEMS),
        SETITEMS,
    )


def shared_tensors() -> bytes:
    """1,800 modules that share a dict of 500 tensors: nine kilobytes that would be two million arrays."""

    def many(count: int, pattern: str, value: bytes) -> bytes:
        return EMPTY_DICT + MARK + b"".join(text(pattern % i) + value for i in range(count)) + SETITEMS

    return pickle(
        EMPTY_DICT,
        MARK,
        text("tensor"), tensor((4,), (1,)) + put(0),
        text("tensors"), many(500, "p%d", get(0)) + put(1),
        text("module"), module(_parameters=get(1), _buffers=get(1)) + put(2),
        text("modules"), module(_modules=many(100, "m%d", get(2))) + put(3),
        text("G_ema"), module(_modules=many(18, "g%d", get(3))),
        SETITEMS,
    )  # fmt: skip


def long_dtype() -> bytes:
    """One dtype that is given one long state again and again."""
    state = tuple_of(integer(3), text("<"), NONE, NONE, NONE, *[NONE] * 150_000)
    return repeated(dtype() + put(0) + state + put(1), get(0) + get(1) + BUILD, 100_000)


def doubled(depth: int) -> bytes:
    """A pair of two pairs of two pairs ...: to print it would take all memory there is."""
    return EMPTY_TUPLE + (put(0) + get(0) + b"\x86") * depth


def tensorflow(critic: bytes, **settings: bytes) -> bytes:
    """(G, D, Gs) around a critic's state."""
    new = name("dnnlib.tflib.network", "Network") + EMPTY_TUPLE + NEWOBJ
    state = dict_of(variables=EMPTY_LIST, components=EMPTY_DICT, static_kwargs=dict_of(**settings))
    return pickle(tuple_of(NONE, new + critic + BUILD, new + state + BUILD))


def nested_networks() -> bytes:
    new = name("dnnlib.tflib.network", "Network") + EMPTY_TUPLE + NEWOBJ
    return pickle((new + EMPTY_DICT + b"U\x01a") * 40_000, NONE, (SETITEM + BUILD) * 40_000)


def repeated(once: bytes, again: bytes, count: int = MANY) -> bytes:
    return pickle(once, EMPTY_LIST, MARK, again * count, APPENDS)


ATTACKS: dict[str, Callable[[], bytes]] = {
    # tensors
    "huge shape": lambda: weights(tensor((HUGE, 4, 4), (16, 4, 1))),
    "huge shape, no stride": lambda: weights(tensor((HUGE, 4, 4), (0, 0, 0))),
    "expanded": lambda: weights(tensor((4, 4, 4), (0, 0, 1))),
    "overlapping": lambda: weights(tensor((3, 2), (1, 1))),
    "negative stride": lambda: weights(tensor((4,), (-1,), offset=3)),
    "negative size": lambda: weights(tensor((-4,), (1,))),
    "negative offset": lambda: weights(tensor((4,), (1,), offset=-4)),
    "huge offset": lambda: weights(tensor((1,), (1,), offset=1 << 62)),
    "huge stride": lambda: weights(tensor((2,), (1 << 62,))),
    "no size": lambda: weights(tensor((0, HUGE), (1, 1))),
    "10,000 dimensions": lambda: weights(tensor((1,) * 10_000, (1,) * 10_000)),
    "fewer strides": lambda: weights(tensor((2, 2), (1,))),
    "truth as a size": lambda: weights(
        call(name("torch._utils", "_rebuild_tensor_v2"), storage(), b"\x88", tuple_of(b"\x88"), tuple_of(b"\x88"))
    ),
    "no tensor": lambda: weights(call(name("torch._utils", "_rebuild_parameter"), text("x"))),
    "no storage": lambda: weights(tensor((4,), (1,), of=text("x"))),
    "huge storage": lambda: weights(tensor((4,), (1,), of=storage(HUGE, data=b""))),
    "longer storage": lambda: weights(tensor((4,), (1,), of=storage(4, numel=struct.pack("<q", HUGE)))),
    "negative storage": lambda: weights(tensor((4,), (1,), of=storage(4, numel=struct.pack("<q", -1)))),
    "storage cut short": lambda: weights(tensor((4,), (1,), of=storage(4, data=bytes(15)))),
    "other keys": lambda: weights(tensor((4,), (1,), of=storage(4, keys=pickle(list_of(text("1")))))),
    "keys that are none": lambda: weights(tensor((4,), (1,), of=storage(4, keys=pickle(list_of(NONE))))),
    "big-endian": lambda: weights(tensor((4,), (1,), of=storage(4, system=pickle(dict_of(little_endian=b"\x89"))))),
    # numpy
    "array without bytes": lambda: pickle(array((HUGE,), blob(b""))),
    "array beyond int64": lambda: pickle(array((HUGE, HUGE, HUGE), blob(bytes(4)))),
    "array of nothing": lambda: pickle(array((0, HUGE), blob(b""))),
    "array of negative size": lambda: pickle(array((-1, -4), blob(bytes(16)))),
    "array of text": lambda: pickle(array((1,), text("\u20ac\u20ac\u20ac\u20ac"))),
    "scalar without bytes": lambda: pickle(call(name("numpy.core.multiarray", "scalar"), dtype("f8"), blob(b""))),
    # lengths
    "memo of 10^9": lambda: pickle(NONE, put(10**9)),
    "memo of 2^32": lambda: pickle(NONE, put(2**32 - 1)),
    "memo never set": lambda: pickle(get(5)),
    "text of 2^63": lambda: pickle(b"\x8d" + struct.pack("<Q", 2**63) + b"x"),
    "text of 4 GiB": lambda: pickle(b"X\xff\xff\xff\xffx"),
    "bytes of 2^64": lambda: pickle(b"\x8e" + b"\xff" * 8),
    "bytearray of 2^64": lambda: pickle(b"\x96" + b"\xff" * 8),
    "frame of 2^64": lambda: pickle(b"\x95" + b"\xff" * 8),
    "integer of 255 bytes": lambda: pickle(b"\x8a\xff" + b"\x7f" * 255),
    "LONG4": lambda: pickle(b"\x8b" + struct.pack("<i", 1 << 30)),
    "text that is none": lambda: pickle(b"X\x02\x00\x00\x00\xc3\x28"),
    "a surrogate": lambda: pickle(text("\ud800")),
    "one long text": lambda: pickle(text("x" * (2 << 20))),
    "much text": lambda: pickle(EMPTY_LIST, MARK, text("x" * 1_000_000) * 40, APPENDS),
    "wide text": lambda: pickle(EMPTY_LIST, MARK, text("x" * 1_000_000 + "\U0001f600") * 40, APPENDS),
    "a name without end": lambda: pickle(b"c" + b"x" * 100_000),
    # nesting
    "MARKs": lambda: pickle(MARK * MANY),
    "tuples": lambda: pickle(EMPTY_TUPLE, TUPLE1 * MANY),
    "lists": lambda: pickle(EMPTY_LIST * MANY, APPEND * (MANY - 1)),
    "dicts": lambda: pickle((EMPTY_DICT + b"U\x01a") * MANY, NONE, SETITEM * MANY),
    "deep tuple as a key": lambda: pickle(EMPTY_DICT, EMPTY_TUPLE, TUPLE1 * MANY, NONE, SETITEM),
    "deep tuple in a set": lambda: pickle(EMPTY_SET, MARK, EMPTY_TUPLE, TUPLE1 * MANY, ADDITEMS),
    "deep tuple as a persistent id": lambda: pickle(
        call(name("torch.storage", "_load_from_bytes"), blob(legacy(body=EMPTY_TUPLE + TUPLE1 * MANY + b"Q")))
    ),
    "deep tuple as an activation": lambda: weights(EMPTY_TUPLE + TUPLE1 * MANY),
    "a list in itself": lambda: pickle(EMPTY_LIST, put(0), get(0), APPEND),
    "modules 64 deep": lambda: shared_modules(64, 1),
    "modules 2^40": lambda: shared_modules(15, 8),
    "a module in itself": cyclic_module,
    "much in a module": lambda: network(
        module(_parameters=EMPTY_DICT + MARK + b"".join(text(f"n{i}") + NONE for i in range(100_000)) + SETITEMS)
    ),
    "modules of nothings": modules_of_nothings,
    "modules that share tensors": shared_tensors,
    "a dtype's long state": long_dtype,
    "Networks in Networks": nested_networks,
    "a setting that cannot be printed": lambda: tensorflow(
        EMPTY_DICT, nonlinearity=doubled(60), label_size=doubled(60)
    ),
    "a doubled weight": lambda: weights(doubled(60)),
    "a doubled class": lambda: network(module(x=doubled(60), _init_kwargs=doubled(60))),
    # floods
    "operations": lambda: pickle(NONE * 5_000_000),
    "sets": lambda: pickle(EMPTY_SET * 1_000_000),
    "dicts beside each other": lambda: pickle(EMPTY_DICT * 1_000_000),
    "frames in frames": lambda: pickle(*(b"\x95" + struct.pack("<Q", 9 * i) for i in range(MANY - 1, 0, -1))),
    "memo": lambda: pickle(NONE, MEMOIZE * 1_000_000),
    "colliding keys": colliding_keys,
    "one nested stream many times": lambda: repeated(
        blob(legacy()) + put(0), name("torch.storage", "_load_from_bytes") + get(0) + TUPLE1 + REDUCE, 50_000
    ),
    "one list as many sets": lambda: repeated(
        list_of(*(text(str(i)) for i in range(50_000))) + TUPLE1 + put(0),
        name("builtins", "set") + get(0) + REDUCE,
        50_000,
    ),
    "one state many times": lambda: repeated(
        dict_of(**{f"k{i}": NONE for i in range(50_000)}) + put(0), EMPTY_DICT + get(0) + BUILD, 50_000
    ),
    "one text as many arrays": lambda: repeated(
        text("x" * 1_000_000) + put(0) + dtype() + put(1), array((250_000,), get(0), get(1)), 10_000
    ),
}
