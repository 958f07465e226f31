"""Reads the pickles of CIFAR's python version without Python's pickle: an interpreter that cannot call anything.

It has the operations that plain data and byte arrays need (protocols 2 to 4). A name in the file ("numpy ndarray") is
never imported, and three calls of such names are recognized, each by one line here. Everything else raises ValueError:
another name, another operation, another dtype. No size in the file leads to an allocation; data is sliced, not copied.

Operations: https://docs.python.org/3/library/pickletools.html
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

MAX_OPERATIONS = 2_000_000
"""In one file; CIFAR-100's largest has about 400,000. An operation of one byte can allocate a hundred."""
MAX_CONTAINERS = 1_000
"""Lists, dicts and tuples in one file."""
LONG_STRING = 2**16
MARK = object()
UINT8_STATE = (3, "|", None, None, None, -1, -1, 0)
MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")


class Name(tuple):
    """("numpy", "ndarray"): what GLOBAL leaves on the stack. It is compared, never imported."""


@dataclass
class Array:
    """An array under construction; `value` is set by BUILD."""

    value: np.ndarray | None = None


class Dtype:
    """The dtype uint8, the only one in these files."""


def loads(data: bytes) -> Any:
    """The value of a pickle of dicts, lists, tuples, numbers, strings, bytes and uint8 arrays; arrays share `data`.

    Python 2's strings become bytes. Raises ValueError for anything else, and for a truncated pickle.
    """
    try:
        return _finished(_Reader(data).run())
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a pickle of plain data ({type(error).__name__}: {error})") from None


def _finished(value: Any) -> Any:
    """Replace `Array` by its value in the outermost dict, where these files have arrays."""
    if isinstance(value, dict):
        return {key: entry.value if isinstance(entry, Array) else entry for key, entry in value.items()}
    return value.value if isinstance(value, Array) else value


class _Reader:
    """The stack machine of pickle. Each operation is an entry of CONSTANTS, NUMBERS, SIZED or OPERATIONS."""

    def __init__(self, data: bytes):
        self.data, self.place = memoryview(data), 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0
        self.containers = 0

    def run(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            code = bytes(self.take(1))
            if code == b".":
                return self.stack.pop()
            self.step(code)
        raise ValueError(f"more than {MAX_OPERATIONS:,} operations")

    def step(self, code: bytes) -> None:
        self.containers += code in CONTAINERS
        if self.containers > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS:,} lists, dicts and tuples")
        if code in CONSTANTS:
            self.stack.append(CONSTANTS[code]())
        elif code in NUMBERS:
            self.stack.append(self.number(*NUMBERS[code]))
        elif code in SIZED:
            width, decode = SIZED[code]
            self.stack.append(decode(self.take(self.number(width))))
        elif code in OPERATIONS:
            OPERATIONS[code](self)
        else:
            raise ValueError(f"operation {code!r} at byte {self.place - 1}, which plain data does not need")

    def take(self, count: int) -> memoryview:
        if self.place + count > len(self.data):
            raise ValueError(f"truncated at byte {len(self.data)}")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def line(self) -> str:
        start = self.place
        while self.take(1) != b"\n":
            if self.place - start > 100:
                raise ValueError(f"a name of more than 100 characters at byte {start}")
        return bytes(self.data[start : self.place - 1]).decode("ascii")

    def skip(self, count: int) -> None:
        self.take(count)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def since_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not MARK:
            items.append(item)
        return items[::-1]

    def join(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(items[::-1]))

    def append(self, items: list[Any]) -> None:
        _of(list, self.stack[-1]).extend(items)

    def fill(self, items: list[Any]) -> None:
        if not all(isinstance(key, str | bytes) for key in items[::2]):
            raise ValueError("a dict with keys that are not strings")
        _of(dict, self.stack[-1]).update(zip(items[::2], items[1::2], strict=True))

    def name(self, module: str, name: str) -> None:
        self.stack.append(Name((module, name)))

    def call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        made = _call(_of(Name, name), _of(tuple, arguments))
        self.encoded += len(made) if isinstance(made, bytes) else 0
        if self.encoded > len(self.data):
            raise ValueError("more encoded strings than the file has bytes")  # copies of one string, without end
        self.stack.append(made)

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Array) and made.value is None:
            made.value = _array(*_of(tuple, state))
        elif not (isinstance(made, Dtype) and tuple(map(_text, _of(tuple, state))) == UINT8_STATE):
            raise ValueError("an object other than an array of uint8")


def _call(name: Name, arguments: tuple) -> Any:
    """What the recognized calls return."""
    arguments = tuple(_text(argument) for argument in arguments)
    if name[0] in MULTIARRAY and name[1] == "_reconstruct" and arguments == (("numpy", "ndarray"), (0,), "b"):
        return Array()
    if name == ("numpy", "dtype") and arguments[0] in ("u1", "|u1") and arguments[1] in (0, False):
        return Dtype()
    if name == ("_codecs", "encode") and arguments[1:] == ("latin1",):
        return _of(str, arguments[0]).encode("latin1")
    raise ValueError(f"a call of {'.'.join(name)}, which plain data does not need")


def _array(version: int, shape: tuple[int, ...], dtype: Dtype, fortran: bool, data: bytes | memoryview) -> np.ndarray:
    _of(Dtype, dtype)
    if len(shape) > 4 or not all(type(side) is int and side >= 0 for side in shape) or prod(shape) != len(data):
        raise ValueError(f"an array whose shape does not fit its {len(data)} bytes")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _text(value: Any) -> Any:
    """Python 2's strings as str, by which calls are recognized; other values unchanged."""
    return bytes(value).decode("latin1") if isinstance(value, bytes) else value


def _string(content: memoryview) -> str:
    """Decodes UTF-8. A long string beyond Latin-1 is refused: Python would need up to four times its bytes."""
    if len(content) > LONG_STRING and np.frombuffer(content, np.uint8).max() > 0xC3:
        raise ValueError(f"a string of {len(content)} bytes that is not Latin-1")
    return str(content, "utf-8")


CONTAINERS = frozenset(b"][}{)t\x85\x86\x87"[i : i + 1] for i in range(9))
CONSTANTS = {
    b"N": lambda: None,
    b"\x88": lambda: True,
    b"\x89": lambda: False,
    b"}": dict,
    b"]": list,
    b")": tuple,
    b"(": lambda: MARK,
}
NUMBERS = {b"K": (1,), b"M": (2,), b"J": (4, True)}
SIZED = {  # width of the size that precedes the content, and how the content is decoded
    b"U": (1, bytes),
    b"T": (4, lambda content: content),  # an array's bytes: a slice, not a copy
    b"C": (1, bytes),
    b"B": (4, lambda content: content),
    b"X": (4, _string),
    b"\x8c": (1, _string),
}
OPERATIONS = {
    b"\x80": lambda r: r.skip(1),  # protocol
    b"\x95": lambda r: r.skip(8),  # frame
    b"q": lambda r: r.remember(r.number(1)),
    b"r": lambda r: r.remember(r.number(4)),
    b"\x94": lambda r: r.remember(len(r.memo)),
    b"h": lambda r: r.stack.append(r.memo[r.number(1)]),
    b"j": lambda r: r.stack.append(r.memo[r.number(4)]),
    b"\x85": lambda r: r.join(1),
    b"\x86": lambda r: r.join(2),
    b"\x87": lambda r: r.join(3),
    b"t": lambda r: r.stack.append(tuple(r.since_mark())),
    b"a": lambda r: r.append([r.stack.pop()]),
    b"e": lambda r: r.append(r.since_mark()),
    b"s": lambda r: r.fill([r.stack.pop(), r.stack.pop()][::-1]),
    b"u": lambda r: r.fill(r.since_mark()),
    b"c": lambda r: r.name(r.line(), r.line()),
    b"\x93": lambda r: r.name(*[r.stack.pop(), r.stack.pop()][::-1]),
    b"R": lambda r: r.call(),
    b"b": lambda r: r.build(),
}
