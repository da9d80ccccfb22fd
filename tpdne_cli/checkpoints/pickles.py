"""An interpreter for the few pickle opcodes that checkpoints are made of, which has nothing that could run code.

A pickle is a program for a small stack machine, and Python's own machine imports and calls whatever it is told to. This
one knows no import and no call: a global that is on the caller's list becomes an inert record or plain data, anything
else ends the reading with its name. Byte strings are views of the file and are never copied. What a file can make the
machine do is bounded: operations, nesting, memo, text.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from tpdne_cli.errors import AGAIN, CheckpointError

MAX_OPS = 500_000  # the largest published file takes a tenth of it
MAX_NESTING = 256  # open MARKs
MAX_MEMO = MAX_OPS
MAX_TEXT = 1 << 20  # bytes of one string: pickled networks bring their source files along
MAX_TEXT_TOTAL = 32 << 20
MAX_INT_BYTES = 16
MAX_NAME = 256

MAX_KEY = 1 << 60  # beyond, different integers can be made to share a hash, and a dict of them takes forever

STOP = ord(".")

Maker = Callable[[tuple[Any, ...]], Any]


class Record:
    """An inert stand-in for an object of a file; subclasses say what its state may be."""

    def build(self, state: Any) -> None:  # noqa: ARG002
        """What BUILD does: store the state, or refuse it."""
        raise CheckpointError(f"refused: the file sets the state of a {type(self).__name__}, which has none; {AGAIN}.")


class Global(Record):
    """A listed name. `make` turns the arguments of a call into inert data; None: the name is only ever mentioned."""

    def __init__(self, name: str, make: Maker | None) -> None:
        self.name, self.make = name, make


class Budget:
    """What is left of operations and text; nested streams draw on the same one."""

    def __init__(self, ops: int = MAX_OPS, text: int = MAX_TEXT_TOTAL) -> None:
        self.ops, self.text = ops, text

    def spend(self, ops: int) -> None:
        self.ops -= ops
        if self.ops < 0:
            raise CheckpointError(f"refused: the pickle is longer than {MAX_OPS} operations; no generator's is.")

    def spend_text(self, size: int) -> None:
        self.text -= size
        if size > MAX_TEXT or self.text < 0:
            raise CheckpointError("refused: the pickle holds far more text than any generator's does.")


def show(name: str) -> str:
    """A name out of a file, safe to print and no longer than a line."""
    return ascii(name[:100])[1:-1][:100]


class Machine:
    """Runs one pickle from `start` in data; `pos` is then the byte behind it.

    allowed: (module, name) -> maker of inert data from the arguments of a call. persistent: what BINPERSID asks.
    Raises CheckpointError for anything unknown, out of bounds or cut short.
    """

    def __init__(
        self,
        data: memoryview,
        allowed: Mapping[tuple[str, str], Maker | None],
        budget: Budget,
        start: int = 0,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.data, self.pos, self.start = data, start, start
        self.allowed, self.budget, self.persistent = allowed, budget, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open MARK
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, budget = self.data, self.budget
        try:
            if data[self.start] != ord("\x80"):
                raise CheckpointError(f"not a pickle of protocol 2 to 5; {AGAIN}.")
            while (code := data[self.pos]) != STOP:
                self.pos += 1
                budget.spend(1)
                step = OPCODES.get(code)
                if step is None:
                    raise CheckpointError(f"refused: the pickle uses {opcode_name(code)}; no generator's does.")
                step(self)
            self.pos += 1
            return self.stack.pop()
        except IndexError:  # the end of the data, or a pop from an empty stack
            raise CheckpointError(f"damaged or cut short near byte {self.pos}; {AGAIN}.") from None

    # -- reading

    def take(self, size: int) -> memoryview:
        end = self.pos + size
        if end > len(self.data):
            raise CheckpointError(f"cut short: {size} bytes should follow byte {self.pos}; {AGAIN}.")
        chunk = self.data[self.pos : end]
        self.pos = end
        return chunk

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self, size: int, encoding: str = "utf-8") -> str:
        chunk = self.take(size)
        self.budget.spend_text(size)
        try:
            return str(chunk, encoding)
        except UnicodeDecodeError:
            raise CheckpointError(f"damaged: the text near byte {self.pos} is not UTF-8; {AGAIN}.") from None

    def line(self) -> str:
        size = bytes(self.data[self.pos : self.pos + MAX_NAME]).find(b"\n")
        if size < 0:
            raise CheckpointError(f"damaged: a name near byte {self.pos} has no end; {AGAIN}.")
        text = self.text(size)
        self.pos += 1
        return text

    # -- structure

    def protocol(self) -> None:
        version = self.number(1)
        if self.pos != self.start + 2 or not 2 <= version <= 5:
            raise CheckpointError(f"not a pickle of protocol 2 to 5; {AGAIN}.")

    def frame(self) -> None:
        size = self.number(8)  # a hint for buffered readers: nothing to do
        if size > len(self.data) - self.pos:
            raise CheckpointError(f"cut short: a frame of {size} bytes begins at byte {self.pos}; {AGAIN}.")

    def mark(self) -> None:
        if len(self.below) >= MAX_NESTING:
            raise CheckpointError(f"refused: the pickle is nested deeper than {MAX_NESTING}; no generator's is.")
        self.below.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def remember(self, index: int) -> None:
        if index >= MAX_MEMO:
            raise CheckpointError(f"refused: the pickle wants a memo of {index} entries; no generator's does.")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise CheckpointError(f"damaged: memo entry {index} is used before it is set; {AGAIN}.")
        self.stack.append(self.memo[index])

    # -- values

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def small_integer(self) -> None:
        self.stack.append(int.from_bytes(self.take(4), "little", signed=True))

    def long_integer(self) -> None:
        size = self.number(1)
        if size > MAX_INT_BYTES:
            raise CheckpointError(f"refused: an integer of {size} bytes; no generator has one.")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def real(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise CheckpointError(f"refused: the pickle appends to something that is no list; {AGAIN}.")
        target.extend(items)

    def add_items(self) -> None:
        items = self.items()
        target = self.stack[-1]
        if type(target) is not set:
            raise CheckpointError(f"refused: the pickle adds to something that is no set; {AGAIN}.")
        target.update(check_keys(items))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_pairs([key, value])

    def set_pairs(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise CheckpointError(f"refused: the pickle sets items of something that is no dict; {AGAIN}.")
        target.update(zip(check_keys(items[::2]), items[1::2], strict=True))

    # -- names and what Python would call

    def name(self, module: str, name: str) -> None:
        key = (module, name)
        if key not in self.allowed:
            raise CheckpointError(
                f"refused: the file asks for {show(module)}.{show(name)}; no generator needs it, so nothing was run. "
                "Convert the file where it was made, or get it from its publisher."
            )
        self.stack.append(Global(f"{module}.{name}", self.allowed[key]))

    def name_from_lines(self) -> None:
        module = self.line()
        self.name(module, self.line())

    def name_from_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(module) is not str or type(name) is not str:
            raise CheckpointError(f"refused: the file asks for a name that is no text; {AGAIN}.")
        self.name(module, name)

    def call(self) -> None:
        args, target = self.stack.pop(), self.stack.pop()
        if not isinstance(target, Global) or target.make is None or type(args) is not tuple:
            raise CheckpointError(f"refused: the file calls something that is no listed name; {AGAIN}.")
        self.stack.append(target.make(args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.build(state)
        elif type(target) is not dict or type(state) is not dict or not state.keys() <= {"_metadata"}:
            # torch hangs version numbers on the ordered dicts of its state dicts; they are of no use here
            raise CheckpointError(f"refused: the file sets the state of something that has none; {AGAIN}.")

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise CheckpointError(f"refused: the pickle refers to something outside of it; {AGAIN}.")
        self.stack.append(self.persistent(self.stack.pop()))


def check_keys(keys: list[Any]) -> list[Any]:
    """Only text and small integers are hashed: a nested tuple would take the C stack down."""
    if not all(type(key) is str or (type(key) is int and -MAX_KEY < key < MAX_KEY) for key in keys):
        raise CheckpointError(f"refused: a key of a dict or set is neither text nor an integer; {AGAIN}.")
    return keys


def opcode_name(code: int) -> str:
    import pickletools

    known = next((op.name for op in pickletools.opcodes if op.code == chr(code)), None)
    return f"the opcode {known}" if known else f"byte {code} as an opcode"


OPCODES: dict[int, Callable[[Machine], None]] = {
    ord(code): step
    for code, step in {
        "\x80": Machine.protocol,
        "\x95": Machine.frame,
        "(": Machine.mark,
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "J": Machine.small_integer,
        "K": lambda m: m.push(m.number(1)),
        "M": lambda m: m.push(m.number(2)),
        "\x8a": Machine.long_integer,
        "G": Machine.real,
        "X": lambda m: m.push(m.text(m.number(4))),
        "\x8c": lambda m: m.push(m.text(m.number(1))),
        "\x8d": lambda m: m.push(m.text(m.number(8))),
        "B": lambda m: m.push(m.take(m.number(4))),
        "C": lambda m: m.push(m.take(m.number(1))),
        "\x8e": lambda m: m.push(m.take(m.number(8))),
        "\x96": lambda m: m.push(m.take(m.number(8))),
        "T": lambda m: m.push(m.take(m.number(4))),  # Python 2's str: an array's bytes where it is long,
        "U": lambda m: m.push(m.text(m.number(1), "latin-1")),  # a name where it is short
        "}": lambda m: m.push({}),
        "]": lambda m: m.push([]),
        ")": lambda m: m.push(()),
        "\x8f": lambda m: m.push(set()),
        "t": lambda m: m.push(tuple(m.items())),
        "\x85": lambda m: m.tuple_of(1),
        "\x86": lambda m: m.tuple_of(2),
        "\x87": lambda m: m.tuple_of(3),
        "a": lambda m: m.append_items([m.stack.pop()]),
        "e": lambda m: m.append_items(m.items()),
        "s": Machine.set_item,
        "u": lambda m: m.set_pairs(m.items()),
        "\x90": Machine.add_items,
        "q": lambda m: m.remember(m.number(1)),
        "r": lambda m: m.remember(m.number(4)),
        "\x94": lambda m: m.remember(len(m.memo)),
        "h": lambda m: m.recall(m.number(1)),
        "j": lambda m: m.recall(m.number(4)),
        "c": Machine.name_from_lines,
        "\x93": Machine.name_from_stack,
        "R": Machine.call,
        "\x81": Machine.call,
        "b": Machine.build,
        "Q": Machine.persistent_id,
    }.items()
}
