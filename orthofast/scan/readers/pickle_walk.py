"""A pickle read as data: a machine for its opcodes that imports nothing, calls nothing of the file and builds no class.

A pickle is a program. Here every global stays a name, and a call or an object stays a record of what the program asked
for, except for the few functions of our own that a reader passes in ``build``. There is no path from the file to code.
Opcodes: CPython's ``pickletools``; protocols 2 to 5, which torch and its distributed checkpoints write.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orthofast.errors import CheckpointError
from orthofast.scan.readers.files import encodable, shown

MAX_PICKLE_BYTES = 256 << 20  # tensors lie outside of it, so it is small
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function the pickle names; never looked up."""

    path: str


@dataclass(eq=False, slots=True)
class Made:
    """An object the pickle would have made by a call.

    Attributes:
        path: the class or function called.
        args: its arguments.
        state: what would have been put into the object afterwards, None without.
    """

    path: str
    args: tuple[object, ...]
    state: object = None


Build = Callable[..., object]


def _as_dict(*args: object) -> dict[object, object]:
    """An OrderedDict: empty, or from a list of pairs."""
    if not args or not isinstance(args[0], list | tuple):
        return {}
    return dict(pair for pair in args[0] if isinstance(pair, list | tuple) and len(pair) == 2)  # type: ignore[misc]


CONTAINERS: dict[str, Build] = {
    "collections.OrderedDict": _as_dict,
    "collections.Counter": lambda *args: args[0] if args and isinstance(args[0], dict) else {},
    "collections.defaultdict": lambda *args: {},
    "builtins.dict": _as_dict,
}


def walk(
    content: bytes,
    what: str,
    *,
    refuse: Callable[[str], str | None],
    build: Mapping[str, Build],
    persistent: Callable[[object], object] | None = None,
) -> object:
    """The object a pickle describes, made of plain containers, :class:`Global`, :class:`Made` and what ``build`` makes.

    Args:
        content: the pickle.
        what: what it is, to start a sentence with.
        refuse: why a global of this dotted path makes the whole file untrusted; None where it does not.
        build: functions that stand in for the globals of these paths.
        persistent: what stands for an object kept outside, given its id.

    Raises:
        CheckpointError: if a global is refused or the pickle is no sound one.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{what} is a pickle of {len(content)} bytes, the limit is {MAX_PICKLE_BYTES}")
    machine = _Machine(content, what, refuse, CONTAINERS | dict(build), persistent)
    try:
        return machine.run()
    except (IndexError, KeyError, TypeError, ValueError, struct.error, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{what} is no sound pickle, at byte {machine.at}: {shown(str(error))}") from None


@dataclass(slots=True)
class _Machine:
    content: bytes
    what: str
    refuse: Callable[[str], str | None]
    build: Mapping[str, Build]
    persistent: Callable[[object], object] | None
    at: int = 0
    stack: list[object] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)

    def run(self) -> object:
        content, steps = self.content, OPCODES
        while True:
            code = content[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                raise ValueError(f"opcode {code:#04x} is not one that weights need")
            step(self)

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def take(self, count: int) -> bytes:
        taken = self.content[self.at : self.at + count]
        if len(taken) < count:
            raise ValueError("it ends early")
        self.at += count
        return taken

    def line(self) -> str:
        end = self.content.index(b"\n", self.at)
        text = self.content[self.at : end].decode("utf-8", "backslashreplace")
        self.at = end + 1
        return text

    def since_mark(self) -> list[object]:
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def name(self, module: object, word: object) -> None:
        if not isinstance(module, str) or not isinstance(word, str):
            raise ValueError("a global has no name")
        path = f"{PYTHON_2.get(module, module)}.{word}"
        why = self.refuse(path)
        if why is not None:
            raise CheckpointError(f"{self.what} {why}")
        self.stack.append(Global(path))

    def call(self, function: object, args: object) -> object:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise ValueError("what is called is no global")
        builder = self.build.get(function.path)
        return Made(function.path, args) if builder is None else builder(*args)

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def new_with_keywords(self) -> None:
        self.stack.pop()
        self.reduce()

    def set_state(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Made):  # tensors and dictionaries need no attributes
            made.state = state

    def add_pairs(self, pairs: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            return
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("pairs are put into what is no dictionary")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def add_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            return
        if not isinstance(target, list):
            raise ValueError("items are put into what is no list")
        target.extend(items)

    def pairs_to_dict(self) -> None:
        pairs = self.since_mark()
        self.stack.append({})
        self.add_pairs(pairs)

    def outside(self) -> None:
        if self.persistent is None:
            raise ValueError("it refers to objects outside")
        self.stack[-1] = self.persistent(self.stack[-1])

    def text(self, size: int) -> None:
        self.stack.append(encodable(self.take(self.number(size)).decode("utf-8", "surrogatepass")))

    def bytes_of(self, size: int) -> None:
        self.stack.append(self.take(self.number(size)))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        self.stack.append(self.memo[key])

    def last_two(self) -> list[object]:
        value = self.stack.pop()
        return [self.stack.pop(), value]

    def stack_global(self) -> None:
        module, word = self.last_two()
        self.name(module, word)

    def push(self, value: object) -> None:
        self.stack.append(value)


OPCODES: dict[int, Callable[[_Machine], object]] = {
    ord("\x80"): lambda m: m.take(1),  # PROTO
    ord("\x95"): lambda m: m.take(8),  # FRAME
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): lambda m: m.since_mark(),
    ord("N"): lambda m: m.push(None),
    ord("\x88"): lambda m: m.push(True),
    ord("\x89"): lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number(4, signed=True)),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    ord("\x8a"): lambda m: m.push(m.number(m.number(1), signed=True)),
    ord("\x8b"): lambda m: m.push(m.number(m.number(4), signed=True)),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("U"): lambda m: m.bytes_of(1),  # SHORT_BINSTRING
    ord("T"): lambda m: m.bytes_of(4),  # BINSTRING
    ord("C"): lambda m: m.bytes_of(1),
    ord("B"): lambda m: m.bytes_of(4),
    ord("\x8e"): lambda m: m.bytes_of(8),
    ord("\x96"): lambda m: m.bytes_of(8),  # BYTEARRAY8
    ord("\x8c"): lambda m: m.text(1),
    ord("X"): lambda m: m.text(4),
    ord("\x8d"): lambda m: m.text(8),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    ord("\x85"): lambda m: m.tuple_of(1),
    ord("\x86"): lambda m: m.tuple_of(2),
    ord("\x87"): lambda m: m.tuple_of(3),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.since_mark()),
    ord("a"): lambda m: m.add_items([m.stack.pop()]),
    ord("e"): lambda m: m.add_items(m.since_mark()),
    ord("}"): lambda m: m.push({}),
    ord("d"): lambda m: m.pairs_to_dict(),
    ord("s"): lambda m: m.add_pairs(m.last_two()),
    ord("u"): lambda m: m.add_pairs(m.since_mark()),
    ord("\x8f"): lambda m: m.push([]),  # EMPTY_SET: members may be records without a hash
    ord("\x90"): lambda m: m.add_items(m.since_mark()),
    ord("\x91"): lambda m: m.push(m.since_mark()),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    ord("\x93"): lambda m: m.stack_global(),
    ord("R"): lambda m: m.reduce(),
    ord("\x81"): lambda m: m.reduce(),  # NEWOBJ: a class called with its arguments
    ord("\x92"): lambda m: m.new_with_keywords(),
    ord("b"): lambda m: m.set_state(),
    ord("h"): lambda m: m.get(m.number(1)),
    ord("j"): lambda m: m.get(m.number(4)),
    ord("q"): lambda m: m.put(m.number(1)),
    ord("r"): lambda m: m.put(m.number(4)),
    ord("\x94"): lambda m: m.put(len(m.memo)),
    ord("Q"): lambda m: m.outside(),
}
