"""Inert arrays of pickled checkpoints: torch storages and the tensors that view them, numpy arrays, dtypes and scalars.

Nothing is copied: every array is a read-only view of the file, made when `array()` asks for it and checked against the
bytes that are really there. Arrays may be unaligned and are little-endian; copy one before handing it to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from tpdne_cli.checkpoints.pickles import Budget, Global, Machine, Maker, Record, check_keys, show
from tpdne_cli.errors import AGAIN, CheckpointError

Array = np.ndarray[Any, Any]

MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 40
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in a torch.save without a zip
LEGACY_PROTOCOL = 1001

STORAGE_DTYPES = {
    "torch.DoubleStorage": "<f8",
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}
NUMPY_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


def damaged(what: str) -> CheckpointError:
    return CheckpointError(f"damaged: {what}; {AGAIN}.")


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def check_shape(shape: Any) -> tuple[int, ...]:
    """A shape that has elements and is not absurd."""
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        raise damaged("an array's shape is none")
    if not all(is_count(size) and size > 0 for size in shape):
        raise damaged("an array's shape is not made of positive integers")
    return shape


class Storage(Record):
    """A run of numbers; the bytes may come later than the tensors that view them."""

    def __init__(self, dtype: str, numel: int) -> None:
        self.dtype, self.numel = np.dtype(dtype), numel
        self.data: memoryview | None = None

    def fill(self, data: memoryview) -> None:
        if len(data) != self.numel * self.dtype.itemsize:
            raise damaged(f"a storage of {self.numel} {self.dtype} has {len(data)} bytes")
        self.data = data


class Tensor(Record):
    """A strided view of a storage (elements, not bytes), inside it and without two indices for one element."""

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
        reach = 1
        for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
            if step < reach:
                raise CheckpointError(f"refused: a tensor {list(shape)} counts elements of its storage twice; {AGAIN}.")
            reach = step * size
        last = offset + sum(step * (size - 1) for step, size in zip(stride, shape, strict=True))
        if last >= storage.numel:
            raise CheckpointError(f"refused: a tensor {list(shape)} reaches beyond its storage; {AGAIN}.")

    def array(self) -> Array:
        if self.storage.data is None:
            raise damaged("a tensor has no storage")
        size = self.storage.dtype.itemsize
        strides = tuple(step * size for step in self.stride)
        view: Array = np.ndarray(self.shape, self.storage.dtype, self.storage.data, self.offset * size, strides)
        return view


class NumpyDtype(Record):
    """A numpy dtype: numbers and truth values only."""

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(name)

    def build(self, state: Any) -> None:
        match state:  # version, byte order, and what only structured types have
            case (int(), "<" | ">" | "|" | "=" as order, None, None, None, *_):
                self.dtype = self.dtype.newbyteorder("<" if order == "=" else order)
            case _:
                raise CheckpointError(f"refused: a numpy dtype that is no plain number; {AGAIN}.")


class NumpyArray(Record):
    """A numpy array, empty until BUILD brings its state."""

    def __init__(self, value: Array | None = None) -> None:
        self.value = value

    def build(self, state: Any) -> None:
        match state:
            case (int(), tuple() as shape, NumpyDtype() as kind, bool() as fortran, raw):
                self.value = numpy_view(raw, kind, shape, "F" if fortran else "C")
            case _:
                raise damaged("a numpy array has an unknown layout")

    def array(self) -> Array:
        if self.value is None:
            raise damaged("a numpy array has no contents")
        return self.value


def numpy_view(raw: Any, kind: NumpyDtype, shape: Any, order: Literal["C", "F"] = "C") -> Array:
    shape = check_shape(shape)
    if type(raw) is str and len(raw) < 256 and max(raw, default="") <= "\xff":  # a short str of Python 2
        raw = memoryview(raw.encode("latin-1"))
    if type(raw) is not memoryview or len(raw) != math.prod(shape) * kind.dtype.itemsize:
        raise damaged(f"a numpy array {list(shape)} has other bytes than its shape asks for")
    view: Array = np.frombuffer(raw, kind.dtype).reshape(shape, order=order)
    return view


def array_of(value: Any) -> Array:
    """The numbers of whatever holds them, in the file's precision."""
    if isinstance(value, Tensor | NumpyArray):
        return value.array()
    if isinstance(value, np.generic):
        return np.asarray(value)
    raise damaged("a weight is no array")


# -- makers: what the listed globals turn their arguments into


def rebuild_tensor(args: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])"""
    match args:
        case (Storage() as storage, offset, tuple() as shape, tuple() as stride, *_) if is_count(offset):
            if len(shape) != len(stride) or not all(is_count(step) for step in stride):
                raise CheckpointError(f"refused: a tensor's strides are not those of an array; {AGAIN}.")
            return Tensor(storage, offset, check_shape(shape), stride)
    raise damaged("a tensor is described in an unknown way")


def rebuild_parameter(args: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks)"""
    match args:
        case (Tensor() as tensor, *_):
            return tensor
    raise damaged("a parameter holds no tensor")


def numpy_dtype(args: tuple[Any, ...]) -> NumpyDtype:
    match args:
        case (str() as name, *_) if name in NUMPY_DTYPES:
            return NumpyDtype(name)
    raise CheckpointError(f"refused: a numpy dtype that is no plain number; {AGAIN}.")


def numpy_scalar(args: tuple[Any, ...]) -> np.generic:
    match args:
        case (NumpyDtype() as kind, raw):
            return numpy_view(raw, kind, (1,))[0]  # type: ignore[no-any-return]
    raise damaged("a numpy scalar is described in an unknown way")


def numpy_reconstruct(args: tuple[Any, ...]) -> NumpyArray:
    match args:
        case (Global(name="numpy.ndarray"), *_):
            return NumpyArray()
    raise CheckpointError(f"refused: a numpy array of an unknown class; {AGAIN}.")


def numpy_frombuffer(args: tuple[Any, ...]) -> NumpyArray:
    """numpy._core.numeric._frombuffer(bytes, dtype, shape, order), the form of protocol 5"""
    match args:
        case (raw, NumpyDtype() as kind, shape, "C" | "F" as order):
            return NumpyArray(numpy_view(raw, kind, shape, order))
    raise damaged("a numpy array has an unknown layout")


def new_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    if args:
        raise CheckpointError(f"refused: a dict with arguments; {AGAIN}.")
    return {}


STORAGES: dict[tuple[str, str], Maker | None] = {("torch", name.split(".")[1]): None for name in STORAGE_DTYPES}


def standard_globals(budget: Budget) -> dict[tuple[str, str], Maker | None]:
    """What the writers of all the formats use: dicts, sets, tensors, numpy's numbers."""

    def new_set(args: tuple[Any, ...]) -> set[Any]:
        match args:
            case (list() as names,):
                budget.spend(len(names))
                return set(check_keys(names))
        raise CheckpointError(f"refused: a set that is not made from a list; {AGAIN}.")

    listed: dict[tuple[str, str], Maker | None] = {
        ("collections", "OrderedDict"): new_dict,
        ("builtins", "set"): new_set,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        ("torch.storage", "_load_from_bytes"): lambda args: load_from_bytes(args, budget),
        ("numpy", "dtype"): numpy_dtype,
        ("numpy", "ndarray"): None,
    }
    for core in ("numpy.core", "numpy._core"):  # renamed by numpy 2
        listed[core + ".multiarray", "scalar"] = numpy_scalar
        listed[core + ".multiarray", "_reconstruct"] = numpy_reconstruct
        listed[core + ".numeric", "_frombuffer"] = numpy_frombuffer
    return listed | STORAGES


# -- torch.save


def storage_of(pid: Any, known: dict[str, Storage]) -> Storage:
    """The storage that a persistent id names: ('storage', type, key, location, numel[, view])."""
    match pid:
        case ("storage", Global(name=kind), str() as key, str(), int() as numel, *view) if view in ([], [None]):
            if kind not in STORAGE_DTYPES or not is_count(numel) or not (key.isascii() and key.isdigit()):
                raise damaged("a storage is described in an unknown way")
        case _:
            raise CheckpointError(f"refused: the file refers to something that is no storage; {AGAIN}.")
    storage = known.setdefault(key, Storage(STORAGE_DTYPES[kind], numel))
    if storage.dtype != np.dtype(STORAGE_DTYPES[kind]) or storage.numel != numel:
        raise damaged(f"storage {show(key)} is described in two ways")
    return storage


def read_legacy(data: memoryview, budget: Budget, allowed: Mapping[tuple[str, str], Maker | None]) -> Any:
    """torch.save without a zip: five pickles, then every storage as int64 length and little-endian numbers."""
    storages: dict[str, Storage] = {}
    pos = 0

    def run(persistent: Callable[[Any], Any] | None = None) -> Any:
        nonlocal pos
        listed = allowed if persistent else {}
        machine = Machine(data, listed, budget, pos, persistent)
        value = machine.run()
        pos = machine.pos
        return value

    if run() != LEGACY_MAGIC or run() != LEGACY_PROTOCOL:
        raise damaged("this is no torch.save file")
    system = run()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise CheckpointError("refused: the file was saved on a big-endian machine; save it again on a common one.")
    value = run(lambda pid: storage_of(pid, storages))
    keys = run()
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != set(storages):
        raise damaged("its list of storages is not that of its tensors")
    for key in dict.fromkeys(keys):
        storage = storages[key]
        size = storage.numel * storage.dtype.itemsize
        if len(data) - pos - 8 < size:
            raise CheckpointError(f"cut short: storage {show(key)} of {size} bytes is not all there; {AGAIN}.")
        if int.from_bytes(data[pos : pos + 8], "little") != storage.numel:
            raise damaged(f"storage {show(key)} has another length than its tensors")
        storage.fill(data[pos + 8 : pos + 8 + size])
        pos += 8 + size
    return value


def load_from_bytes(args: tuple[Any, ...], budget: Budget) -> Storage:
    """torch.storage._load_from_bytes(bytes): a torch.save of one storage inside of another pickle."""
    match args:
        case (memoryview() as data,):
            value = read_legacy(data, budget, STORAGES)
            if isinstance(value, Storage):
                return value
    raise CheckpointError(f"refused: a nested stream that is no storage; {AGAIN}.")
