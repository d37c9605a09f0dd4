"""Which rows of a log belong to which episode, from its column of episode ids.

Axes: R rows, E episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rllib_calql.datasets.rows.arrow import Where, describe_type, first_null
from rllib_calql.datasets.rows.flat_columns import as_texts


@dataclass(frozen=True)
class EpisodeIndex:
    """Which rows belong to which episode: runs of rows with one id, as (episode, number of rows)."""

    ids: list[str]
    runs: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[E] Number of rows per episode."""
        lengths = np.zeros(len(self.ids), dtype=np.int64)
        np.add.at(lengths, self.runs[:, 0], self.runs[:, 1])
        return lengths

    @property
    def is_contiguous(self) -> bool:
        """Whether the rows of every episode stand together; episodes are numbered by their first row."""
        return bool(np.all(np.diff(self.runs[:, 0]) >= 0))

    def row_codes(self) -> NDArray[np.int64]:
        """[R] The episode of each row."""
        return np.repeat(self.runs[:, 0], self.runs[:, 1])


def index_episodes(batches: Iterable[Any], column: str, where_from: Callable[[int], Where]) -> EpisodeIndex:
    """Reads a column of episode ids.

    Args:
        batches: The column as Arrow arrays, in order.
        column: Its name.
        where_from: Says where rows are that follow the given number of rows.

    Returns:
        The index; episodes are numbered by their first row.

    Raises:
        ValueError: If a row has no id, or ids are neither whole numbers nor text.
    """
    codes: dict[Any, int] = {}
    runs: list[tuple[int, int]] = []
    row = 0
    for ids in batches:
        where = where_from(row)
        if ids.null_count:
            raise ValueError(f"`{column}` has no value in {where(first_null(ids))}; give every row an id.")
        if not is_id_type(ids.type):
            raise ValueError(
                f"`{column}` must hold whole numbers or text, got {describe_type(ids.type)} in {where(0)}; convert "
                "the ids."
            )
        if pa.types.is_floating(ids.type):
            as_texts(ids.to_numpy(zero_copy_only=False), where)
        runs += [(codes.setdefault(id_, len(codes)), length) for id_, length in runs_of(ids)]
        row += len(ids)
    return EpisodeIndex([_text_of(id_) for id_ in codes], np.array(runs, dtype=np.int64).reshape(-1, 2))


def is_id_type(type_: Any) -> bool:
    """Whether a column of this Arrow type may hold episode ids: numbers, text or bytes."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    checks = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    return any(check(type_) for check in (*checks, pa.types.is_large_binary, pa.types.is_floating))


def runs_of(ids: Any) -> Iterator[tuple[Any, int]]:
    """Yields (id, number of rows) for each run of equal ids."""
    encoded = pc.run_end_encode(ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids)
    lengths = np.diff(encoded.run_ends.to_numpy(), prepend=0)
    return zip(encoded.values.to_pylist(), lengths.tolist(), strict=True)


def _text_of(id_: Any) -> str:
    if isinstance(id_, bytes):
        return id_.decode(errors="replace")
    return str(int(id_) if isinstance(id_, float) else id_)  # Whole, as `as_texts` has checked.
