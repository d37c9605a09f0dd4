"""A look through the instructions of a pickle before any of them is followed: what they may be, and on what."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

_MAX_PARTS = 100_000  # Instructions of one pickle; that of an array has about 50, one of a list as many as numbers.
_PLAIN = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS GET BINGET LONG_BINGET MEMOIZE"
)
_STORING = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_INSTRUCTIONS = frozenset(_PLAIN.split()) | _STORING | {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}
_KEYS = frozenset({"str", "int", "int_or_bool", "bool", "float", "bytes", "None"})
_SIZE_OF_LENGTH = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}


@dataclass(frozen=True)
class Buffer:
    """Bytes in a pickle, and where they begin."""

    content: bytes | bytearray
    start: int


def looked_through(payload: bytes) -> list[Buffer]:
    """The bytes in a pickle, if it makes nothing but arrays and plain values, and not too many of them.

    Raises:
        ValueError: If it has an instruction that arrays and plain values do not need, or more than they need.
    """
    buffers = []
    kinds = _Kinds()
    # `genops` ends with the instruction that ends the pickle, or raises a ValueError.
    argument: Any
    for number, (instruction, argument, position) in enumerate(pickletools.genops(payload)):
        if instruction.name not in _INSTRUCTIONS:
            made = f" of `{argument.replace(' ', '.')}`" if instruction.name == "INST" else ""
            raise ValueError(f"is a pickle that makes objects{made} ({instruction.name})")
        # The unpickler fills a list up to the largest number under which a part is stored.
        if number >= _MAX_PARTS or (instruction.name in _STORING and not 0 <= argument <= number):
            raise ValueError(f"is a pickle of more than {_MAX_PARTS} parts")
        kinds.follow(instruction, argument)
        if isinstance(argument, (bytes, bytearray)) and instruction.name in _SIZE_OF_LENGTH:
            assert position is not None
            buffers.append(Buffer(argument, position + 1 + _SIZE_OF_LENGTH[instruction.name]))
    return buffers


class _Kinds:
    """What kinds of objects the instructions of a pickle leave on the stack, without making any.

    Objects that are made of the same parts many times are small, but to hash or to index by them takes for ever. So
    keys are plain, and only dicts and lists are filled.
    """

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._memo: dict[int, str] = {}

    def follow(self, instruction: pickletools.OpcodeInfo, argument: Any) -> None:
        """Follows one instruction.

        Raises:
            ValueError: If it would take something from an empty stack, fill what is no dict or list, or use a key that
                is not plain.
        """
        name = instruction.name
        if name in _STORING or name == "MEMOIZE":
            (kind,) = self._popped(1)
            self._memo[len(self._memo) if name == "MEMOIZE" else int(argument)] = kind
            self._stack.append(kind)
            return
        if name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo.get(int(argument), "any"))
            return
        before = [kind.name for kind in instruction.stack_before]
        items: list[str] = []
        if "mark" in before:
            items = self._popped_to_mark()
            before = before[: before.index("mark")]
        taken = self._popped(len(before))
        if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS") and taken[0] != before[0]:
            raise ValueError("is a pickle that fills something else than a dict or a list")
        keys = {"SETITEM": taken[1:2], "SETITEMS": items[::2], "DICT": items[::2]}.get(name, [])
        if not _KEYS.issuperset(keys):
            raise ValueError("is a pickle of a dict with keys that are neither numbers nor text")
        self._stack += [kind.name for kind in instruction.stack_after]

    def _popped(self, count: int) -> list[str]:
        start = len(self._stack) - count
        if start < 0 or "mark" in self._stack[start:]:
            raise ValueError("is a damaged pickle")
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _popped_to_mark(self) -> list[str]:
        items = []
        while self._stack and self._stack[-1] != "mark":
            items.append(self._stack.pop())
        if not self._stack:
            raise ValueError("is a damaged pickle")
        self._stack.pop()
        return items[::-1]
