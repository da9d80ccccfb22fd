"""Pickles that try to run code."""

from __future__ import annotations

from collections.abc import Callable

from attacks import CANARY
from attacks.assembler import (
    ADDITEMS,
    APPEND,
    BINPERSID,
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_SET,
    EMPTY_TUPLE,
    MARK,
    NEWOBJ,
    NONE,
    REDUCE,
    SETITEM,
    STACK_GLOBAL,
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
    tensor,
    text,
    tuple_of,
)

SHELL = text(f"touch {CANARY}")
PYTHON = text(f"open({CANARY!r}, 'w')")
EVIL = call(name("posix", "system"), SHELL)
LOAD = name("torch.storage", "_load_from_bytes")


def inside(evil: bytes) -> bytes:
    """Deep in what otherwise looks like a generator."""
    return network(module(_modules=dict_of(synthesis=module("SynthesisNetwork", architecture=evil))))


def by_memo() -> bytes:
    """The name is put together from memo entries that were something harmless before."""
    return pickle(
        text("collections"), put(0), text("OrderedDict"), put(1), get(0), get(1), STACK_GLOBAL, EMPTY_TUPLE, REDUCE,
        text("posix"), put(0), text("system"), put(1), get(0), get(1), STACK_GLOBAL, put(7),
        get(7), SHELL, b"\x85", REDUCE,
    )  # fmt: skip


def stacked(module_name: str, attribute: str, *args: bytes) -> bytes:
    return inside(text(module_name) + text(attribute) + STACK_GLOBAL + tuple_of(*args) + REDUCE)


def structured_dtype() -> bytes:
    state = tuple_of(
        integer(3), text("<"), NONE, tuple_of(text("f")), dict_of(f=EVIL), integer(8), integer(8), integer(0)
    )
    return pickle(dtype("f4", state))


DOTTED = {
    "OrderedDict.__init__.__globals__": "collections",
    "_utils.warnings.sys.modules": "torch",
    "ndarray.__class__.__base__": "numpy",
    "_load_from_bytes.__globals__": "torch.storage",
    "_reconstruct_persistent_obj.__builtins__.eval": "torch_utils.persistence",
    "FloatStorage.__init__": "torch",
    "": "collections",
    "OrderedDict\n": "collections",
    "OrderedDict\0": "collections",
    "\0" * 200: "collections",
}

ATTACKS: dict[str, Callable[[], bytes]] = {
    "os.system": lambda: pickle(EVIL, protocol=2),
    "os.system inside": lambda: inside(EVIL),
    "nt.system": lambda: inside(call(name("nt", "system"), SHELL)),
    "os.popen by a long line": lambda: inside(call(name("os", "popen" + "x" * 500), SHELL)),
    "subprocess": lambda: inside(call(name("subprocess", "Popen"), SHELL)),
    "eval": lambda: inside(call(name("builtins", "eval"), PYTHON)),
    "exec": lambda: inside(call(name("builtins", "exec"), PYTHON)),
    "getattr": lambda: inside(call(name("builtins", "getattr"), name("builtins", "open"), text("__call__"))),
    "import": lambda: inside(call(name("builtins", "__import__"), text("os"))),
    "python 2 names": lambda: inside(call(name("__builtin__", "eval"), PYTHON)),
    "torch.load": lambda: inside(call(name("torch", "load"), text("/etc/passwd"))),
    "torch jit": lambda: inside(call(name("torch.jit", "load"), text("x"))),
    "numpy.load": lambda: inside(call(name("numpy", "load"), text("/etc/passwd"))),
    "numpy test runner": lambda: inside(call(name("numpy.testing._private.utils", "runstring"), PYTHON, EMPTY_DICT)),
    "pickle.loads": lambda: inside(call(name("_pickle", "loads"), blob(pickle(EVIL)))),
    "codecs": lambda: inside(call(name("_codecs", "encode"), text("x"), text("zip"))),
    "nn.Linear": lambda: inside(name("torch.nn.modules.linear", "Linear") + EMPTY_TUPLE + NEWOBJ),
    "no text as a name": lambda: pickle(integer(1), integer(2), STACK_GLOBAL),
    "by memo": by_memo,
    **{
        f"dotted {module_name}.{attribute!r}": lambda m=module_name, a=attribute: stacked(m, a, PYTHON)
        for attribute, module_name in DOTTED.items()
    },
    # nested streams
    "nested stream": lambda: inside(call(LOAD, blob(pickle(EVIL)))),
    **{
        f"nested stream, part {part}": lambda p=part: inside(call(LOAD, blob(legacy(**{p: pickle(EVIL, protocol=2)}))))
        for part in ("magic", "protocol", "system", "object", "keys")
    },
    "nested in nested": lambda: inside(call(LOAD, blob(legacy(body=call(LOAD, blob(legacy())))))),
    "nested id": lambda: inside(call(LOAD, blob(legacy(body=tuple_of(text("module"), EVIL) + BINPERSID)))),
    "nested id of a global": lambda: inside(call(LOAD, blob(legacy(body=EVIL + BINPERSID)))),
    "nested without bytes": lambda: inside(call(LOAD, text("x"))),
    # opcodes
    "EXT1": lambda: inside(b"\x82\x01"),
    "EXT2": lambda: inside(b"\x83\x01\x01"),
    "EXT4": lambda: inside(b"\x84\x01\x00\x00\x00"),
    "INST": lambda: inside(MARK + SHELL + b"iposix\nsystem\n"),
    "OBJ": lambda: inside(MARK + name("posix", "system") + SHELL + b"o"),
    "NEWOBJ_EX": lambda: inside(name("dnnlib.util", "EasyDict") + EMPTY_TUPLE + EMPTY_DICT + b"\x92"),
    "PERSID": lambda: inside(b"Pposix.system\n"),
    "BINPERSID in a pickle": lambda: inside(tuple_of(text("storage")) + BINPERSID),
    "NEXT_BUFFER": lambda: inside(b"\x97"),
    "DUP": lambda: inside(text("x") + b"2"),
    "an unknown opcode": lambda: inside(b"\xff"),
    "protocol 0": lambda: b"cposix\nsystem\n(S'true'\ntR.",
    "protocol 9": lambda: pickle(NONE, protocol=9),
    "two protocols": lambda: pickle(b"\x80\x00", EVIL),
    # states and calls
    "BUILD on a dict": lambda: inside(EMPTY_DICT + dict_of(__class__=text("x")) + BUILD),
    "BUILD on a dict, no dict": lambda: inside(EMPTY_DICT + tuple_of(dict_of(a=NONE), dict_of(b=NONE)) + BUILD),
    "BUILD on a list": lambda: inside(EMPTY_LIST + dict_of(append=NONE) + BUILD),
    "BUILD on a name": lambda: inside(
        name("collections", "OrderedDict") + dict_of(make=name("numpy", "ndarray")) + BUILD
    ),
    "BUILD on a module": lambda: inside(module() + dict_of(__setstate__=NONE, state=NONE) + BUILD),
    "BUILD on a tensor": lambda: inside(tensor((4,), (1,)) + dict_of(storage=NONE) + BUILD),
    "BUILD on a storage": lambda: inside(name("torch", "FloatStorage") + dict_of(numel=integer(1 << 50)) + BUILD),
    "BUILD of a Network": lambda: inside(name("dnnlib.tflib.network", "Network") + EMPTY_TUPLE + NEWOBJ + NONE + BUILD),
    "BUILD of options": lambda: inside(name("argparse", "Namespace") + EMPTY_TUPLE + NEWOBJ + text("x") + BUILD),
    "options with arguments": lambda: inside(call(name("argparse", "Namespace"), EVIL)),
    "Network with arguments": lambda: inside(call(name("dnnlib.tflib.network", "Network"), text("x"))),
    "dict with arguments": lambda: inside(call(name("collections", "OrderedDict"), list_of(tuple_of(text("a"), NONE)))),
    "call of what is no name": lambda: inside(text("os.system") + SHELL + b"\x85" + REDUCE),
    "call of a mentioned name": lambda: inside(call(name("numpy", "ndarray"), tuple_of(integer(1 << 40)))),
    "call without a tuple": lambda: inside(name("collections", "OrderedDict") + EMPTY_LIST + REDUCE),
    "newer persistence": lambda: network(
        call(
            name("torch_utils.persistence", "_reconstruct_persistent_obj"),
            dict_of(type=text("class"), version=integer(7)),
        )
    ),
    "persistence of a function": lambda: network(
        call(
            name("torch_utils.persistence", "_reconstruct_persistent_obj"),
            dict_of(type=text("func"), version=integer(6)),
        )
    ),
    # numpy
    "object dtype": lambda: inside(dtype("O8")),
    "object array": lambda: inside(array((1,), list_of(EVIL), dtype("O8"))),
    "array of another class": lambda: inside(
        call(name("numpy.core.multiarray", "_reconstruct"), name("collections", "OrderedDict"), NONE, NONE)
    ),
    "structured dtype": structured_dtype,
    "dtype without state": lambda: inside(dtype("f4", NONE)),
    "array without state": lambda: inside(array((1,), blob(bytes(4)))[:-1] + NONE + BUILD),
    # targets
    "APPEND to a name": lambda: inside(name("collections", "OrderedDict") + NONE + APPEND),
    "SETITEM of a name": lambda: inside(name("collections", "OrderedDict") + text("a") + NONE + SETITEM),
    "ADDITEMS to a list": lambda: inside(EMPTY_LIST + MARK + NONE + ADDITEMS),
    "a name in a set": lambda: inside(EMPTY_SET + MARK + name("numpy", "dtype") + ADDITEMS),
    "a name as a key": lambda: inside(EMPTY_DICT + name("numpy", "dtype") + NONE + SETITEM),
}
