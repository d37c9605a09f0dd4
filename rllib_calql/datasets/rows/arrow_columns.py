"""Columns of Arrow tables of rows: which of them are read, and how they are decoded and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import tree
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.columns import (
    MASKS,
    VALIDS,
    bad_valids,
    check_valids,
    find_columns,
    is_not_executed,
    replaced_by,
    require_columns,
    times_for_steps,
)
from rllib_calql.datasets.episodes.reader import Nested, ReadOptions
from rllib_calql.datasets.rows.arrow import Where, decode_numbers, describe_type, is_numeric
from rllib_calql.datasets.rows.flat_columns import as_flags, in_type_of_obs

REQUIRED_COLUMNS = (Columns.OBS, Columns.ACTIONS, Columns.REWARDS, Columns.TERMINATEDS)

# Written beside the columns by RLlib and pandas; numbers among them are no outputs of a model.
_BOOKKEEPING = (Columns.AGENT_ID, Columns.MODULE_ID, Columns.INFOS, "__index_level_0__")
_DECODED_COLUMNS = (Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS)
_ENDS = (Columns.TERMINATEDS, Columns.TRUNCATEDS)
_FLAGS = (*_ENDS, MASKS, VALIDS)

Table: TypeAlias = dict[str, Nested]
"""RLlib's name of a column -> its rows."""

ColumnDecoder: TypeAlias = Callable[[Any, Any, Where], Nested]
"""(field, array, where) -> one row per entry of the array; `where` says where an entry was read."""


@dataclass(frozen=True)
class RowColumns:
    """Which columns of a table are read.

    Attributes:
        known: RLlib's name -> name in the table.
        extras: Further columns of numbers.
        ignored: All others, with the reason where it is not obvious.
    """

    known: dict[str, str]
    extras: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def in_table(self) -> dict[str, str]:
        """Name in the rows that are read -> name in the table."""
        return self.known | {name: name for name in self.extras}


def find_row_columns(schema: Any, options: ReadOptions, where: str) -> RowColumns:
    """Divides the columns of a table into those that are read and the others.

    Args:
        schema: Arrow schema.
        options: Says which further columns are wanted.
        where: The table, for messages.

    Raises:
        ValueError: If a column that is needed is missing, or is there twice.
    """
    if len(set(schema.names)) < len(schema.names):
        twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
        raise ValueError(f"{where} has more than one column `{twice[0]}`; keep one.")
    known = find_columns(schema.names, where)
    require_columns(known, REQUIRED_COLUMNS, schema.names, where)
    if VALIDS in schema.names:
        check_valids(schema.names, where)
        known |= _flags_of_ogbench(schema, where)
    others = [field for field in schema if field.name not in known.values()]
    extras = [
        field.name
        for field in others
        if field.name not in _BOOKKEEPING
        and not is_not_executed(field.name, known)
        and is_numeric(field.type)
        and options.wants(field.name)
    ]
    ignored = [_said_of_ignored(field, known) for field in others if field.name not in extras]
    return RowColumns(known, tuple(extras), tuple(ignored))


def _said_of_ignored(field: Any, known: dict[str, str]) -> str:
    if is_not_executed(field.name, known):
        return f"{field.name} ({replaced_by(known)})"
    return field.name if is_numeric(field.type) else f"{field.name} ({describe_type(field.type)})"


def _flags_of_ogbench(schema: Any, where: str) -> dict[str, str]:
    """The columns of OGBench's compact data beside those that others have."""
    type_ = schema.field(VALIDS).type
    if not is_numeric(type_) or type_.num_fields:
        raise bad_valids(f"holds {describe_type(type_)} in {where}")
    return {name: name for name in (VALIDS, MASKS) if name in schema.names}


def decode_batch(batch: Any, names: dict[str, str], decode: ColumnDecoder, where: Where) -> Table:
    """Decodes some rows.

    Args:
        batch: Arrow record batch.
        names: RLlib's name of a column -> its name in the batch. Episode ids are left out.
        decode: Turns observations and actions into arrays.
        where: Says where a row was read.

    Returns:
        The columns, and both flags whether they are stored or not. The flags can be written to.

    Raises:
        ValueError: If values are missing, of a wrong type, or differ in shape.
    """
    table: Table = {}
    for name, column in names.items():
        if name != Columns.EPS_ID:
            index = batch.schema.get_field_index(column)
            if name == Columns.T and pa.types.is_temporal(batch.schema.field(index).type):
                raise times_for_steps(f"it has the type {batch.schema.field(index).type} in {where(0)}")
            decode_column = decode if name in _DECODED_COLUMNS else decode_numbers
            table[name] = decode_column(batch.schema.field(index), batch.column(index), where)
    for name in (*_DECODED_COLUMNS, Columns.REWARDS):
        for array in tree.flatten(table.get(name)):
            if array is not None and math.prod(array.shape[1:]) == 0:
                raise ValueError(
                    f"`{names[name]}` has rows of shape {array.shape[1:]} in {where(0)}; a row must hold at least one "
                    "number."
                )
    for name in (*_FLAGS, Columns.T):
        if name in table and (not isinstance(table[name], np.ndarray) or table[name].ndim != 1):
            raise ValueError(
                f"`{names[name]}` must hold one number per row, got more of them in {where(0)}; store a scalar."
            )
    for name in _FLAGS:
        if name in table:
            table[name] = as_flags(names[name], table[name], where)
        elif name in _ENDS:
            table[name] = np.zeros(len(batch), dtype=bool)
    if MASKS in table:
        ends, terminateds = table[Columns.TERMINATEDS], ~table.pop(MASKS)
        table[Columns.TERMINATEDS] = terminateds
        table[Columns.TRUNCATEDS] |= ends & ~terminateds
    if Columns.NEXT_OBS in table:
        _check_next_obs(table, where)
        # Compared with `obs` and appended to it, so both need one dtype.
        table[Columns.NEXT_OBS] = tree.map_structure(
            lambda obs, next_obs: in_type_of_obs(names[Columns.NEXT_OBS], next_obs, obs.dtype, where),
            table[Columns.OBS],
            table[Columns.NEXT_OBS],
        )
    return table


def row_shapes(table: Table) -> dict[str, Any]:
    """Shape of a row of each column, as text."""
    # Text, because nested shapes would otherwise be tuples that look like structure.
    return {name: tree.map_structure(lambda array: str(array.shape[1:]), column) for name, column in table.items()}


def check_kinds(table: Table, expected: Table, where: Where, first: str) -> None:
    """Raises a ValueError if rows hold another kind of number than those of `expected`, which were read at `first`."""
    for name in _DECODED_COLUMNS:
        arrays, first_arrays = tree.flatten(table.get(name)), tree.flatten(expected.get(name))
        for array, first_array in zip(arrays, first_arrays, strict=True):
            if array is not None and array.dtype.kind != first_array.dtype.kind:
                raise ValueError(
                    f"`{name}` holds {array.dtype} from {where(0)} on and {first_array.dtype} before, from {first} on; "
                    "store it in one type."
                )


def check_row_shapes(table: Table, expected: dict[str, Any], where: Where, first: str) -> None:
    """Raises a ValueError if rows have other shapes than the first ones, which were read at `first`."""
    for name, shape in row_shapes(table).items():
        if shape != expected[name]:
            raise ValueError(
                f"`{name}` has shape {shape} from {where(0)} on and {expected[name]} before, from {first} on; every "
                "row must have the same shape."
            )


def _check_next_obs(table: Table, where: Where) -> None:
    shapes = row_shapes(table)
    if shapes[Columns.OBS] != shapes[Columns.NEXT_OBS]:
        raise ValueError(
            f"`{Columns.OBS}` has shape {shapes[Columns.OBS]} and `{Columns.NEXT_OBS}` has shape "
            f"{shapes[Columns.NEXT_OBS]} in {where(0)}; they must be equal."
        )
    for obs, next_obs in zip(tree.flatten(table[Columns.OBS]), tree.flatten(table[Columns.NEXT_OBS]), strict=True):
        if not np.can_cast(next_obs.dtype, obs.dtype, "same_kind"):
            raise ValueError(
                f"`{Columns.OBS}` holds {obs.dtype} and `{Columns.NEXT_OBS}` holds {next_obs.dtype} in {where(0)}; "
                "store both in one type."
            )
