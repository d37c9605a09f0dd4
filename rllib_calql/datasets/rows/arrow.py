"""Arrow columns of numbers, lists, tensors and structs as NumPy arrays, without a loop over rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rllib_calql.datasets.episodes.reader import Nested
from rllib_calql.system.parsed_json import parsed_json

Where = Callable[[int], str]
"""Says where an entry of a column was read."""


def decode_numbers(field: Any, array: Any, where: Where) -> Nested:
    """Turns an Arrow column of numbers, lists, tensors or structs into NumPy arrays, without a loop over rows.

    A struct becomes a dict, or a tuple if its fields are called "0", "1", and so on.

    Raises:
        ValueError: If a value is missing, is no number, or rows differ in shape.
    """
    if array.null_count:
        row = first_null(array)
        raise ValueError(f"`{field.name}` has no value in {where(row)}; fill it in, or drop the row's episode.")
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    shape = _tensor_shape(field, array, where)
    if isinstance(array, pa.ExtensionArray):
        if shape is None and pa.types.is_struct(array.type.storage_type):
            raise ValueError(
                f"`{field.name}` holds tensors of different shapes ({array.type}) at or after {where(0)}; every row "
                "must have the same shape."
            )
        array = array.storage
    if pa.types.is_struct(array.type):
        children = {
            array.type.field(i).name: decode_numbers(array.type.field(i), child, where)
            for i, child in enumerate(array.flatten())
        }
        is_tuple = list(children) == [str(i) for i in range(len(children))]
        return tuple(children.values()) if is_tuple else children
    if not is_numeric(array.type):
        raise ValueError(
            f"`{field.name}` must hold numbers or lists of numbers, got {array.type} in {where(0)}; convert the column."
        )
    values = _decode_lists(field.name, array, where)
    if shape is None:
        return values
    if math.prod(shape) != math.prod(values.shape[1:]):
        raise ValueError(
            f"`{field.name}` holds {math.prod(values.shape[1:])} numbers in {where(0)}, and tensors of shape {shape} "
            "by its metadata; write the file again."
        )
    return values.reshape(len(values), *shape)


def is_numeric(type_: Any) -> bool:
    """Whether a column of this Arrow type holds numbers or lists of numbers."""
    while isinstance(type_, pa.BaseExtensionType) or _is_list(type_):
        type_ = type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_.value_type
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_))


def is_text_or_bytes(type_: Any) -> bool:
    """Whether a column of this Arrow type holds strings."""
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(check(type_) for check in checks)


def describe_type(type_: Any) -> str:
    """Names what decides about the decoded arrays, so that all ways to store the same vectors are called the same."""
    while isinstance(type_, pa.BaseExtensionType) or _is_list(type_) or pa.types.is_dictionary(type_):
        type_ = type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_.value_type
    if pa.types.is_struct(type_):
        return ", ".join(f"{field.name}: {describe_type(field.type)}" for field in type_).join("{}")
    return str(type_).removeprefix("large_")


def first_null(array: Any) -> int:
    """Index of the first missing value of an array that has one."""
    return int(pc.index(pc.is_null(array), True).as_py())


def _is_list(type_: Any) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _tensor_shape(field: Any, array: Any, where: Where) -> tuple[int, ...] | None:
    """Row shape of a tensor column (Ray's or Arrow's own), which is stored as a flat list."""
    if isinstance(array, pa.ExtensionArray):
        shape = getattr(array.type, "shape", None)
        return None if shape is None else tuple(shape)
    # Ray's tensor type is only an annotation on the field until `ray.data` is imported.
    metadata = field.metadata or {}
    if not metadata.get(b"ARROW:extension:name", b"").startswith(b"ray.data.arrow_tensor"):
        return None
    try:
        shape = parsed_json(metadata[b"ARROW:extension:metadata"])
    except (KeyError, ValueError):
        shape = None
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(
            f"`{field.name}` is a column of tensors that does not tell their shape in {where(0)}; Ray 2.49 to 2.54 "
            "stored it as a pickle, which is not opened here: write the column as fixed-size lists."
        )
    return tuple(shape)


def _decode_lists(name: str, array: Any, where: Where, per_row: int = 1) -> NDArray[Any]:
    """Decodes numbers and (nested) lists of one length: one array axis per level.

    Args:
        name: Of the column.
        array: The column, or the values of its lists.
        where: Says where a row was read.
        per_row: How many entries of `array` belong to one row.
    """
    if array.null_count:
        row = first_null(array) // max(per_row, 1)
        raise ValueError(f"`{name}` has a list with a missing value in {where(row)}; fill it in.")
    if not _is_list(array.type):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    if pa.types.is_fixed_size_list(array.type):
        length = array.type.list_size
    else:
        lengths = np.diff(array.offsets.to_numpy())
        length = int(lengths[0]) if len(lengths) else 0
        if np.any(lengths != length):
            entry = int(np.argmax(lengths != length))
            raise ValueError(
                f"`{name}` has {lengths[entry]} values in {where(entry // max(per_row, 1))} and {length} in "
                f"{where(0)}; every row must have the same shape."
            )
    values = _decode_lists(name, array.flatten(), where, per_row * length)
    return values.reshape(len(array), length, *values.shape[1:])
