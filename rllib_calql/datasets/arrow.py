"""Arrow columns of numbers, lists, tensors and structs as NumPy arrays, without a loop over rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rllib_calql.datasets.episodes import Nested

Where = Callable[[int], str]
"""Says where an entry of a column was read."""


def decode_numbers(field: Any, array: Any, where: Where) -> Nested:
    """Turns an Arrow column of numbers, lists, tensors or structs into NumPy arrays, without a loop over rows.

    Raises:
        ValueError: If a value is missing, is no number, or rows differ in shape.
    """
    if array.null_count:
        row = pc.index(pc.is_null(array), True).as_py()
        raise ValueError(f"`{field.name}` has no value in {where(row)}; fill it in, or drop the row's episode.")
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    shape = _tensor_shape(field, array)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_struct(array.type):
        return {
            array.type.field(i).name: decode_numbers(array.type.field(i), child, where)
            for i, child in enumerate(array.flatten())
        }
    if not is_numeric(array.type):
        raise ValueError(f"`{field.name}` must hold numbers or lists of numbers, got {array.type} in {where(0)}.")
    values = _decode_lists(field.name, array, where)
    return values if shape is None else values.reshape(len(values), *shape)


def is_numeric(type_: Any) -> bool:
    """Whether a column of this Arrow type holds numbers or lists of numbers."""
    while isinstance(type_, pa.BaseExtensionType) or _is_list(type_):
        type_ = type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_.value_type
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_))


def _is_list(type_: Any) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _tensor_shape(field: Any, array: Any) -> tuple[int, ...] | None:
    """Row shape of a tensor column (Ray's or Arrow's own), which is stored as a flat list."""
    if isinstance(array, pa.ExtensionArray):
        shape = getattr(array.type, "shape", None)
        return None if shape is None else tuple(shape)
    # Ray's tensor type is only an annotation on the field until `ray.data` is imported.
    metadata = field.metadata or {}
    if metadata.get(b"ARROW:extension:name", b"").startswith(b"ray.data.arrow_tensor"):
        return tuple(json.loads(metadata[b"ARROW:extension:metadata"]))
    return None


def _decode_lists(name: str, array: Any, where: Where) -> NDArray[Any]:
    """Decodes numbers and (nested) lists of one length: one array axis per level."""
    if array.null_count:
        raise ValueError(f"`{name}` has a list with a missing value, at or after {where(0)}; fill it in.")
    if not _is_list(array.type):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    if pa.types.is_fixed_size_list(array.type):
        length = array.type.list_size
    else:
        lengths = np.diff(array.offsets.to_numpy())
        length = int(lengths[0]) if len(lengths) else 0
        if np.any(lengths != length):
            row = int(np.argmax(lengths != length))
            raise ValueError(
                f"`{name}` has {lengths[row]} values in {where(row)} and {length} in {where(0)}; every row must have "
                "the same shape."
            )
    values = _decode_lists(name, array.flatten(), where)
    return values.reshape(len(array), length, *values.shape[1:])
