"""The one place where pickles that stand in data are opened: arrays and plain values come out, and nothing else.

A pickle is a program that may call any function of any module, and data come from anywhere. Here its instructions are
looked through first (`pickle_instructions`): those that make objects of classes are refused, and so is what would
exhaust memory or compute without end. Then the standard unpickler runs it, and finds in place of every module the few
objects below, which rebuild NumPy's arrays and cannot be changed. No NumPy function gets an argument that has not been
checked, since NumPy trusts the state of a pickled type and would take numbers for addresses.

Rows of one recording differ in their numbers alone: what stands before and after these in the first row is compared
with the other rows, whose numbers are then taken where they lie.
"""

from __future__ import annotations

import base64
import io
import math
import pickle
import re
import zlib
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from rllib_calql.datasets.decoding.pickle_instructions import Buffer, looked_through

MAX_VALUE_BYTES = 2**28
"""Bytes of one packed value at most, once it is decompressed."""

_MAX_DEPTH = 16
_SMALL_BYTES = 2**26  # What arrays may always take, however often one and the same of them is held.
_LZ4_RATIO = 255  # What LZ4 reaches at most.
_LZ4_MAGIC = b"\x04\x22\x4d\x18"
_NUMBER_OR_TEXT = re.compile(r"[<>=|]?[biufcSU]([1-9][0-9]{0,8})")

_MAX_AXES = 64  # Of NumPy.


def load_plain(payload: bytes) -> Any:
    """The array or plain value in a pickle.

    Args:
        payload: A pickle of any protocol.

    Returns:
        An array or scalar of numbers or text, a number, text, bytes, None, or lists, tuples and dicts of these.

    Raises:
        ValueError: If the pickle asks for anything else, is damaged, or would make something much larger than itself.
    """
    return _load(payload)[0]


class PackedValues:
    """Decodes what `ray.rllib.utils.compression.pack` makes of arrays: Base64 text of LZ4 frames of pickles."""

    def __init__(self) -> None:
        self._layouts: dict[int, _Layout] = {}

    def unpack(self, packed: str | bytes) -> Any:
        """One value; see `load_plain`.

        Raises:
            ImportError: If `lz4` is not installed.
            ValueError: If it is no such text, or not allowed; the message goes on after "in row 3 of the file ".
        """
        try:
            payload = _decompressed(base64.b64decode(packed))
        except (ValueError, RuntimeError, MemoryError) as err:
            raise ValueError(f"is no text that RLlib packed ({err or type(err).__name__})") from err
        layout = self._layouts.get(len(payload))
        if layout is not None and layout.fits(payload):
            return layout.array_in(payload)
        value, buffers = _load(payload)
        layout = _layout_of(payload, value, buffers)
        if layout is not None:
            self._layouts[len(payload)] = layout
        return value


def npy_from_text(text: str, max_bytes: int = MAX_VALUE_BYTES) -> NDArray[Any]:
    """An array as RLlib stores those of spaces: Base64 text of a compressed `.npy` file.

    Args:
        text: The text.
        max_bytes: Of the file, once it is decompressed.

    Raises:
        ValueError: If it is anything else, holds Python objects, or is larger.
    """
    decompressor = zlib.decompressobj()
    try:
        content = decompressor.decompress(base64.b64decode(text), max_bytes)
    except zlib.error as err:
        raise ValueError(f"is no compressed array ({err})") from err
    if not decompressor.eof:
        raise ValueError(f"is cut off, or holds more than {max_bytes} bytes")
    stream = io.BytesIO(content)
    header = read_npy_header(stream)
    if header is None or header[1].hasobject:
        raise ValueError("holds Python objects, which only unpickling could restore")
    shape, dtype, is_fortran = header
    if math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"does not hold the array of shape {shape} that it announces")
    array = np.frombuffer(content, dtype, offset=stream.tell())
    return array.reshape(shape, order="F" if is_fortran else "C")


def read_npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any], bool] | None:
    """Shape, type and whether it is stored by columns; None for a version that arrays of numbers do not need.

    Raises:
        ValueError: If there is no such header.
    """
    version = npy_format.read_magic(stream)
    # Version 3 differs in the names of fields, which columns of numbers have not.
    read = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}.get(version)
    if read is None:
        return None
    shape, is_fortran, dtype = read(stream)
    return shape, dtype, bool(is_fortran)


def number_or_text_type(spec: Any, order: str = "=") -> np.dtype[Any]:
    """A type of numbers or text of fixed length by NumPy's short name, such as "<f4".

    Raises:
        ValueError: If it is another type.
    """
    if not isinstance(spec, str):  # Not shown: as text it may be without end.
        raise ValueError("holds a structured type, where only numbers and text are read")
    if not _NUMBER_OR_TEXT.fullmatch(spec) or order not in ("=", "<", ">", "|"):
        what = "Python objects" if spec in ("O", "O4", "O8", "|O") else f"the type {spec[:40]!r}"
        raise ValueError(f"holds {what}, where only numbers and text are read")
    try:
        dtype = np.dtype(spec)
    except TypeError as err:
        raise ValueError(f"holds the type {spec[:40]!r}, which NumPy does not know") from err
    return dtype if order in ("=", "|") else dtype.newbyteorder(order)  # type: ignore[arg-type]


# --- From compressed text to a pickle ---------------------------------------------------------------------------------


def _decompressed(frame: bytes) -> bytes:
    try:
        import lz4.frame
    except ImportError as err:
        raise ImportError("Reading rows that RLlib packed needs the `lz4` package: pip install lz4") from err
    # The announced size is allocated at once, whatever follows.
    is_small = len(frame) * _LZ4_RATIO <= MAX_VALUE_BYTES and _announced_size(frame) <= MAX_VALUE_BYTES
    if is_small:
        return bytes(lz4.frame.decompress(frame))
    decompressor = lz4.frame.LZ4FrameDecompressor()
    content = bytes(decompressor.decompress(frame, max_length=MAX_VALUE_BYTES))
    if not decompressor.eof:
        raise ValueError(f"it is cut off, or holds more than {MAX_VALUE_BYTES} bytes")
    return content


def _announced_size(frame: bytes) -> int:
    """The size of the content that a frame's header states, 0 if it states none."""
    if not frame.startswith(_LZ4_MAGIC) or len(frame) < 14:
        return MAX_VALUE_BYTES + 1
    return int.from_bytes(frame[6:14], "little") if frame[4] & 8 else 0


# --- Rows that differ in their numbers alone --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """A pickle of one array: all but its numbers."""

    before: bytes
    after: bytes
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    count: int
    order: Any

    def fits(self, payload: bytes) -> bool:
        """Whether a pickle of the same length is the same but for the numbers."""
        return payload.startswith(self.before) and payload.endswith(self.after)

    def array_in(self, payload: bytes) -> NDArray[Any]:
        """The array, a view on the pickle."""
        array = np.frombuffer(payload, self.dtype, self.count, len(self.before))
        return array.reshape(self.shape, order=self.order)


def _layout_of(payload: bytes, value: Any, buffers: list[Buffer]) -> _Layout | None:
    """The layout of a pickle, if its only bytes are the array's numbers."""
    if type(value) is not np.ndarray or not value.nbytes:
        return None
    order = "C" if value.flags.c_contiguous else "F"
    held = [buffer for buffer in buffers if bytes(buffer.content) != b"b"]  # A type code of NumPy's.
    if len(held) != 1 or bytes(held[0].content) != value.tobytes(order):  # type: ignore[arg-type]
        return None
    start = held[0].start
    return _Layout(payload[:start], payload[start + value.nbytes :], value.dtype, value.shape, value.size, order)


# --- The unpickler ----------------------------------------------------------------------------------------------------


def _load(payload: bytes) -> tuple[Any, list[Buffer]]:
    try:
        buffers = looked_through(payload)
        value = _Unpickler(io.BytesIO(payload)).load()
        _check_expanded(value, 4 * len(payload) + 4096)
    except ValueError:
        raise
    # What damaged pickles cause depends on where they are damaged.
    except Exception as err:
        raise ValueError(f"is a damaged pickle ({type(err).__name__}: {err})") from err
    return (np.asarray(value) if isinstance(value, np.ndarray) else value), buffers


def _check_expanded(value: Any, budget: int) -> None:
    """Refuses lists of lists that hold the same parts so often that they are much larger than their pickle."""
    left = [(value, 0)]
    num_bytes = max(budget, _SMALL_BYTES)
    while left:
        part, depth = left.pop()
        budget -= 1
        num_bytes -= part.nbytes if isinstance(part, np.ndarray) else 0
        if budget < 0 or num_bytes < 0 or depth > _MAX_DEPTH:
            raise ValueError("is a pickle of parts within parts without end")
        if isinstance(part, (list, tuple)):
            if len(part) > budget:
                raise ValueError("is a pickle of parts within parts without end")
            left += [(inner, depth + 1) for inner in part]
        elif isinstance(part, dict):
            left += [(inner, depth + 1) for inner in part.values()]
        elif not isinstance(part, (np.ndarray, np.generic, int, float, str, bytes, type(None))):
            raise ValueError("is a pickle of something else than arrays and plain values")


class _Fixed:
    """Stands for a global of NumPy's. A pickle can call it, but neither change nor copy it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> NoReturn:
        raise ValueError("is a pickle that changes functions")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise ValueError("is a pickle that changes functions")


class _ArrayClass(_Fixed):
    """In place of `numpy.ndarray` and `numpy.memmap`, which are only handed to `_reconstruct`."""

    __slots__ = ()


class _PickledType:
    """A type under construction. NumPy's own would take a state that makes it read numbers as addresses."""

    __slots__ = ("_order", "_spec")

    def __init__(self, spec: Any) -> None:
        self._spec, self._order = spec, "="

    def __setstate__(self, state: Any) -> None:
        _, self._order, *rest = state
        if any(part is not None for part in rest[:3]):  # Of a structured type.
            raise ValueError("holds a structured type, where only numbers and text are read")

    def resolved(self) -> np.dtype[Any]:
        """The type."""
        return number_or_text_type(self._spec, self._order)


class _TypeClass(_Fixed):
    """In place of `numpy.dtype`."""

    __slots__ = ()

    def __call__(self, spec: Any, align: Any = False, copy: Any = False) -> _PickledType:
        return _PickledType(spec)


class _PickledArray(np.ndarray[Any, Any]):
    """An array that waits for its state."""

    def __setstate__(self, state: Any) -> None:
        *_, shape, type_, is_fortran, content = state
        dtype = _resolved(type_)
        if self.shape != (0,) or not isinstance(content, bytes):
            raise ValueError("is a pickle of no array of numbers")
        _check_shape(shape, dtype, content)
        state = (1, shape, dtype, bool(is_fortran), content)
        super().__setstate__(state)


class _Reconstruct(_Fixed):
    """In place of NumPy's `_reconstruct`, which makes any class of arrays, of any size."""

    __slots__ = ()

    def __call__(self, class_: Any, shape: Any, type_code: Any) -> _PickledArray:
        if not isinstance(class_, _ArrayClass) or shape != (0,) or type_code not in (b"b", "b"):
            raise ValueError("is a pickle of another class of arrays than NumPy's own")
        array: _PickledArray = _PickledArray((0,), np.int8)
        return array


class _FromBuffer(_Fixed):
    """In place of NumPy's `_frombuffer`."""

    __slots__ = ()

    def __call__(self, buffer: Any, type_: Any, shape: Any, order: Any, axis_order: Any = None) -> NDArray[Any]:
        if type(buffer) not in (bytes, bytearray):
            raise ValueError("is a pickle of no array of numbers")
        dtype = _resolved(type_)
        _check_shape(shape, dtype, buffer)
        array: NDArray[Any] = np.frombuffer(buffer, dtype) if len(buffer) else np.empty(0, dtype)
        by_axes = order == "K" and axis_order is not None
        array = array.reshape(shape, order="C" if by_axes else order)
        return array.transpose(axis_order) if by_axes else array


class _Scalar(_Fixed):
    """In place of NumPy's `scalar`."""

    __slots__ = ()

    def __call__(self, type_: Any, content: Any = None) -> Any:
        dtype = _resolved(type_)
        if not isinstance(content, bytes) or len(content) != dtype.itemsize:
            raise ValueError("is a pickle of no number of NumPy's")
        return np.frombuffer(content, dtype)[0]


class _Encode(_Fixed):
    """In place of `_codecs.encode`, by which the protocols 0 to 2 store bytes; other codecs decompress, for one."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise ValueError("is a pickle that encodes text")
        return text.encode("latin-1")


class _EmptyBytes(_Fixed):
    """In place of `bytes`, of which the protocols 0 to 2 make those without content."""

    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


def _check_shape(shape: Any, dtype: np.dtype[Any], content: bytes | bytearray) -> None:
    is_shape = isinstance(shape, tuple) and len(shape) <= _MAX_AXES
    if not is_shape or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError("is a pickle of no array of numbers")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"holds {len(content)} bytes, which is no array of {dtype} of shape {shape}")


def _resolved(type_: Any) -> np.dtype[Any]:
    if not isinstance(type_, _PickledType):
        raise ValueError("is a pickle of no array of numbers")
    return type_.resolved()


_GLOBALS: dict[tuple[str, str], _Fixed] = {
    ("numpy", "ndarray"): _ArrayClass(),
    ("numpy", "memmap"): _ArrayClass(),  # Of which a pickle holds the numbers, and nothing of the file.
    ("numpy", "dtype"): _TypeClass(),
    ("_codecs", "encode"): _Encode(),
    ("builtins", "bytes"): _EmptyBytes(),
    ("__builtin__", "bytes"): _EmptyBytes(),
}
for _package in ("numpy.core", "numpy._core"):  # Of NumPy 1 and of NumPy 2.
    _GLOBALS[(f"{_package}.multiarray", "_reconstruct")] = _Reconstruct()
    _GLOBALS[(f"{_package}.multiarray", "scalar")] = _Scalar()
    _GLOBALS[(f"{_package}.numeric", "_frombuffer")] = _FromBuffer()


class _Unpickler(pickle.Unpickler):
    """Finds nothing but what rebuilds arrays."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        found = _GLOBALS.get((module_name, global_name))
        if found is None:
            raise ValueError(f"is a pickle that asks for `{module_name}.{global_name}`")
        return found

    def persistent_load(self, pid: Any) -> NoReturn:
        raise ValueError("is a pickle that refers to something outside")
