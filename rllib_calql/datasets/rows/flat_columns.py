"""Which arrays of a file of flat columns are read, and as what; every array has one row per time step.

Nested observations and actions are arrays with paths as names: "observations/camera" is the entry "camera" of a dict,
and the names "0" to "n-1" below one path are the entries of a tuple. Here a leaf is one array of a column, named by
RLlib's name of the column and its path: "obs/camera".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
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

Table: TypeAlias = dict[str, NDArray[Any]]
"""Leaves by name, all with the same number of rows."""

_REQUIRED = (Columns.OBS, Columns.ACTIONS, Columns.REWARDS, Columns.TERMINATEDS)
_NESTED = (Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS)
_FLAGS = (Columns.TERMINATEDS, Columns.TRUNCATEDS, MASKS, VALIDS)
_SCALARS = (*_FLAGS, Columns.REWARDS, Columns.EPS_ID, Columns.T)
_IGNORED = (Columns.AGENT_ID, Columns.MODULE_ID, Columns.INFOS)
_MAX_ROW_BYTES = 2**30


@dataclass(frozen=True)
class ArrayHeader:
    """Shape and type of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class FlatColumns:
    """What is read from one file.

    Attributes:
        stored: Leaf -> name of the array in the file.
        headers: Leaf -> what is stored there, in native byte order.
        extras: Leaves that are further columns of numbers.
        num_rows: Rows of every one of these arrays.
        ignored: Columns that are not read, with the reason where it is not obvious.
    """

    stored: dict[str, str]
    headers: dict[str, ArrayHeader]
    extras: tuple[str, ...]
    num_rows: int
    ignored: tuple[str, ...]

    def row_bytes(self) -> int:
        """Bytes of one row of all leaves."""
        return sum(_row_bytes(header) for header in self.headers.values())


def columns_of(arrays: Mapping[str, ArrayHeader], options: ReadOptions, where: str) -> FlatColumns:
    """Divides the arrays of a file into needed columns, further columns of numbers and what is ignored.

    Args:
        arrays: What is in the file, by name. A name "group/*" stands for a group that was not looked into.
        options: Says which further columns are wanted.
        where: The file, for messages.

    Raises:
        ValueError: If a column is missing, is stored twice, has an unusable type or shape, or lengths differ.
    """
    paths: dict[str, list[str]] = {}
    for name in arrays:
        paths.setdefault(name.partition("/")[0], []).append(name)
    found = find_columns(paths, where)
    require_columns(found, _REQUIRED, paths, where)
    stored = {
        column + name[len(top) :]: name
        for column, top in found.items()
        for name in paths[top]
        # A group where one number per row belongs is reported under the name of the column.
        if column in _NESTED or name == top
    }
    _check_nesting(found, stored, where)
    num_rows = _num_rows(arrays[next(name for leaf, name in stored.items() if _column(leaf) == Columns.OBS)])
    masks = arrays.get(MASKS)
    if masks is not None and masks.shape in ((num_rows,), (num_rows, 1)):
        stored[MASKS] = MASKS
    if VALIDS in arrays:
        if arrays[VALIDS].shape not in ((num_rows,), (num_rows, 1)):
            raise bad_valids(f"has shape {arrays[VALIDS].shape} in {where}, which has {num_rows} rows")
        check_valids(arrays, where)
        stored[VALIDS] = VALIDS
    not_executed = next((top for top in paths if is_not_executed(top, found)), None)
    used = {*found.values(), *stored} | ({not_executed} if not_executed is not None else set())
    extras, ignored = _further_columns(arrays, paths, used, num_rows, options)
    if not_executed is not None:
        ignored = (*ignored, f"{not_executed} ({replaced_by(found)})")
    columns = FlatColumns(
        stored={**stored, **{name: name for name in extras}},
        headers={
            leaf: ArrayHeader(arrays[name].shape, arrays[name].dtype.newbyteorder("="))
            for leaf, name in (*stored.items(), *((name, name) for name in extras))
        },
        extras=extras,
        num_rows=num_rows,
        ignored=ignored,
    )
    _check_lengths(columns, where)
    if num_rows:
        _check_types(columns, where)
    return columns


def check_agreement(first: FlatColumns, first_file: str, other: FlatColumns, other_file: str) -> None:
    """Raises a ValueError if two files differ in their columns, row shapes or kinds of numbers."""
    different = sorted(first.stored.keys() ^ other.stored.keys())
    if different:
        leaf = different[0]
        has, lacks = (first_file, other_file) if leaf in first.stored else (other_file, first_file)
        raise ValueError(
            f"{has} has a column `{leaf}` and {lacks} has not; the files of one data set must have the same columns: "
            "remove or add it, or read the files as separate inputs."
        )
    for leaf, header in first.headers.items():
        found = other.headers[leaf]
        same_kind = leaf in _SCALARS or header.dtype.kind == found.dtype.kind
        if not same_kind or (leaf not in _SCALARS and header.shape[1:] != found.shape[1:]):
            raise ValueError(
                f"`{first.stored[leaf]}` holds {header.dtype} rows of shape {header.shape[1:]} in {first_file}, and "
                f"{found.dtype} rows of shape {found.shape[1:]} in {other_file}; the files of one data set must agree."
            )


def common_dtypes(files: Sequence[FlatColumns]) -> dict[str, np.dtype[Any]]:
    """The type of every leaf that is no flag, id or time: the smallest that holds the numbers of all files exactly."""
    dtypes: dict[str, np.dtype[Any]] = {
        leaf: np.result_type(*(columns.headers[leaf].dtype for columns in files))
        for leaf in files[0].headers
        if leaf == Columns.REWARDS or leaf not in _SCALARS
    }
    # Compared with `obs` and stored behind it, so both have one type.
    dtypes.update(
        {leaf: dtypes[_obs_leaf(leaf)] for leaf in dtypes if _column(leaf) == Columns.NEXT_OBS},
    )
    return dtypes


def in_type_of_obs(name: str, values: NDArray[Any], dtype: np.dtype[Any], where: Callable[[int], str]) -> NDArray[Any]:
    """Numbers in the type of `obs`, with which they are compared and behind which they are stored.

    Args:
        name: The column, for the message.
        values: [R, ...]
        dtype: Of `obs`.
        where: Says where a row was read.

    Raises:
        ValueError: If the type is one of integers that cannot hold a value, which would come out as another number.
    """
    converted = values.astype(dtype, copy=False)
    if dtype.kind in "iu" and values.dtype != dtype and (wrong := converted != values).any():
        row = int(np.argwhere(wrong)[0][0])
        raise ValueError(
            f"`{name}` holds {values[wrong][0]} in {where(row)}, which {dtype}, the type of `{Columns.OBS}`, cannot "
            "hold; store both in one type."
        )
    return converted


def leaves_of(table: Iterable[str], column: str) -> list[str]:
    """Names of the leaves of a column, in order of their paths."""
    return sorted(leaf for leaf in table if _column(leaf) == column)


def nested(table: Table, column: str) -> Nested:
    """The column as dicts and tuples of arrays, or as the one array that it is."""
    root: dict[str, Any] = {}
    for leaf in leaves_of(table, column):
        *groups, last = ["", *leaf.split("/")[1:]]
        level = root
        for group in groups:
            level = level.setdefault(group, {})
        level[last] = table[leaf]
    return _with_tuples(root[""])


def as_flags(name: str, values: NDArray[Any], where: Callable[[int], str]) -> NDArray[np.bool_]:
    """Booleans from booleans, or from numbers that are all exactly 0 or 1; always a new array.

    Args:
        name: The column, for the message.
        values: [R] or [R, 1]
        where: Says where a row was read.

    Raises:
        ValueError: If a value is anything else.
    """
    values = values.reshape(len(values))
    # A damaged file may hold booleans that are neither; NumPy believes them.
    numbers = values.view(np.uint8) if values.dtype == np.bool_ else values
    ones: NDArray[np.bool_] = numbers == 1
    is_other = ~ones & (numbers != 0)
    if is_other.any():
        row = int(np.argmax(is_other))
        raise ValueError(f"`{name}` must be 0 or 1 in every row, got {numbers[row]} in {where(row)}; repair the value.")
    return ones


def as_texts(ids: NDArray[Any], where: Callable[[int], str]) -> list[str]:
    """Episode ids as strings; `where` says where an entry was read.

    Raises:
        ValueError: If an id is a bool or a number that is not whole, or is not UTF-8.
    """
    if ids.dtype.kind == "f":
        is_odd = ids != np.floor(ids)
        if is_odd.any() or not np.isfinite(ids).all():
            entry = int(np.argmax(is_odd | ~np.isfinite(ids)))
            raise ValueError(
                f"`{Columns.EPS_ID}` must be a whole number or text, got {ids[entry]} in {where(entry)}; repair the id."
            )
        return [str(int(id_)) for id_ in ids.tolist()]
    if ids.dtype.kind == "b":
        raise ValueError(f"`{Columns.EPS_ID}` must be a whole number or text, got bool in {where(0)}; convert the ids.")
    if ids.dtype.kind != "S":
        return [str(id_) for id_ in ids.tolist()]
    try:
        return [id_.decode() for id_ in ids.tolist()]
    except UnicodeDecodeError as err:
        raise ValueError(
            f"`{Columns.EPS_ID}` {err.object!r}, one of those from {where(0)} on, is not UTF-8; store it as a number."
        ) from err


def _column(leaf: str) -> str:
    return leaf.partition("/")[0]


def _obs_leaf(leaf: str) -> str:
    return f"{Columns.OBS}{leaf[len(Columns.NEXT_OBS) :]}"


def _num_rows(header: ArrayHeader) -> int:
    return header.shape[0] if header.shape else 0


def _row_bytes(header: ArrayHeader) -> int:
    return math.prod(header.shape[1:]) * max(header.dtype.itemsize, 1)


def _with_tuples(values: Nested) -> Nested:
    if not isinstance(values, dict):
        return values
    entries = {key: _with_tuples(value) for key, value in values.items()}
    if set(entries) == {str(i) for i in range(len(entries))}:
        return tuple(entries[str(i)] for i in range(len(entries)))
    return entries


def _check_nesting(found: Mapping[str, str], stored: Mapping[str, str], where: str) -> None:
    for column, top in found.items():
        leaves = leaves_of(stored, column)
        if not leaves:
            raise ValueError(f"`{top}` in {where} is a group without arrays of numbers; store arrays in it.")
        for leaf in leaves:
            inner = next((other for other in leaves if other.startswith(leaf + "/")), None)
            if inner is not None:
                raise ValueError(
                    f"{where} has the arrays `{stored[leaf]}` and `{stored[inner]}`; an entry is either an array or a "
                    "group of arrays: rename one."
                )
    if Columns.NEXT_OBS not in found:
        return
    unmatched = {_obs_leaf(leaf) for leaf in leaves_of(stored, Columns.NEXT_OBS)} ^ {*leaves_of(stored, Columns.OBS)}
    if unmatched:
        entry = min(unmatched).partition("/")[2] or "(the array itself)"
        raise ValueError(
            f"`{found[Columns.OBS]}` and `{found[Columns.NEXT_OBS]}` in {where} differ in the entry {entry!r}; both "
            "must have the same entries."
        )


def _further_columns(
    arrays: Mapping[str, ArrayHeader],
    paths: Mapping[str, list[str]],
    used: set[str],
    num_rows: int,
    options: ReadOptions,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    extras, ignored = [], []
    for top in sorted(paths):
        if top in used:
            continue
        header = arrays.get(top)
        if header is None:
            ignored.append(f"{top}/*")
        elif top in _IGNORED:
            ignored.append(top)
        elif header.dtype.kind not in "fiub":
            ignored.append(f"{top} (holds no numbers)")
        elif header.shape[:1] != (num_rows,):
            ignored.append(f"{top} (shape {header.shape}, not one row per step)")
        elif math.prod(header.shape[1:]) == 0:
            ignored.append(f"{top} (empty rows)")
        elif not options.wants(top):
            ignored.append(f"{top} (not asked for)")
        else:
            extras.append(top)
    return tuple(extras), tuple(ignored)


def _check_lengths(columns: FlatColumns, where: str) -> None:
    obs = columns.stored[leaves_of(columns.stored, Columns.OBS)[0]]
    for leaf, header in columns.headers.items():
        name = columns.stored[leaf]
        if not header.shape:
            raise ValueError(f"`{name}` in {where} is a single value; a column has one row per time step.")
        if header.shape[0] != columns.num_rows:
            raise ValueError(
                f"{where} has {columns.num_rows} rows of `{obs}` and {header.shape[0]} of `{name}`; all columns need "
                "one row per time step: write the file again."
            )


def _check_types(columns: FlatColumns, where: str) -> None:
    for leaf, header in columns.headers.items():
        name, row_shape = columns.stored[leaf], header.shape[1:]
        if leaf == Columns.T and header.dtype.kind in "mM":
            raise times_for_steps(f"it has the type {header.dtype.name} in {where}")
        kinds = "iufbSU" if leaf == Columns.EPS_ID else "fiub"
        if header.dtype.kind not in kinds:
            what = "numbers or fixed-length text" if leaf == Columns.EPS_ID else "numbers"
            raise ValueError(f"`{name}` must hold {what}, got {header.dtype.name} in {where}; convert the column.")
        if leaf in _SCALARS and math.prod(row_shape) != 1:
            raise ValueError(
                f"`{name}` must hold one value per row, got rows of shape {row_shape} in {where}; store a scalar."
            )
        if math.prod(row_shape) == 0 or _row_bytes(header) > _MAX_ROW_BYTES:
            raise ValueError(
                f"`{name}` in {where} has rows of shape {row_shape}; a row must hold at least one number and at most "
                f"{_MAX_ROW_BYTES} bytes."
            )
        if _column(leaf) == Columns.NEXT_OBS:
            obs = columns.headers[_obs_leaf(leaf)]
            if (obs.shape, obs.dtype.kind) != (header.shape, header.dtype.kind):
                raise ValueError(
                    f"`{name}` in {where} has {header.dtype} rows of shape {row_shape}, "
                    f"`{columns.stored[_obs_leaf(leaf)]}` has {obs.dtype} rows of shape {obs.shape[1:]}; they must "
                    "agree."
                )
