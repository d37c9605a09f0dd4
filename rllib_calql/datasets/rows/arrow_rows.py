"""Episodes from Arrow tables of rows, one transition per row, wherever the tables come from.

Tables are streamed some megabytes at a time, and an episode is passed on as soon as it is complete. Only if rows of
different episodes are interleaved are all rows held in memory at once.

Axes: R rows, E episodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.boundaries import RowBlock, whole_episodes
from rllib_calql.datasets.episodes.columns import VALIDS, check_whole_steps, times_for_steps
from rllib_calql.datasets.episodes.final_rows import shifted, without_final_rows
from rllib_calql.datasets.episodes.reader import ActionsKind, DatasetInfo, EpisodeBlock, EpisodeReader, ReadOptions
from rllib_calql.datasets.rows.arrow import Where, decode_numbers
from rllib_calql.datasets.rows.arrow_columns import (
    ColumnDecoder,
    Table,
    check_kinds,
    check_row_shapes,
    decode_batch,
    find_row_columns,
    row_shapes,
)
from rllib_calql.datasets.rows.episode_index import EpisodeIndex, index_episodes
from rllib_calql.datasets.rows.flat_episodes import EpisodeDivider

BLOCK_BYTES = 4 * 2**20
_ROW = "__row__"
_STARTS = "__starts__"


class RowSource(Protocol):
    """Arrow tables of rows that follow each other.

    Attributes:
        label: How messages call them.
        schema: Arrow schema of all of them.
        num_rows: Number of all rows, None if only reading tells.
    """

    label: str
    schema: Any
    num_rows: int | None

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Yields Arrow record batches of some megabytes, in order."""
        ...

    def where(self, row: int) -> str:
        """Names a row, counted from 0 over all tables."""
        ...

    def part_of(self, row: int) -> int:
        """Number of the file that holds the row."""
        ...


class ArrowRowsReader(EpisodeReader):
    """Episodes from rows in Arrow tables.

    Columns, under RLlib's names or those of `rllib_calql.datasets.episodes.columns`: `obs`, `actions`, `rewards`,
    `terminateds`, and optionally `truncateds`, `new_obs`, `eps_id`, and `t`, which orders the rows of an episode.
    Observations and actions are numbers, lists, fixed-size lists, tensors, or structs of these. Wanted columns of
    numbers become `extra_model_outputs`.
    """

    def __init__(
        self,
        name: str,
        source: RowSource,
        options: ReadOptions,
        *,
        actions: ActionsKind = "environment",
        decode: ColumnDecoder = decode_numbers,
        unfinished_remedy: str = "drop it or mark its last step",
    ) -> None:
        """Checks columns; no row is read yet.

        Args:
            name: The input as the user wrote it.
            source: The rows.
            options: How incomplete data are read.
            actions: What the actions are.
            decode: Turns observations and actions into arrays.
            unfinished_remedy: What an error recommends for an episode that ends neither terminated nor truncated.

        Raises:
            ValueError: If a column is missing.
        """
        super().__init__()
        self._source = source
        self._options = options
        self._decode = decode
        self._unfinished_remedy = unfinished_remedy
        self._columns = find_row_columns(source.schema, options, source.label)
        self.info = DatasetInfo(
            name=name,
            observation_space=None,
            action_space=None,
            actions=actions,
            num_transitions=source.num_rows,
            ignored_columns=self._columns.ignored,
        )

    @property
    def records_ids(self) -> bool:
        """By the column of ids."""
        return Columns.EPS_ID in self._columns.known

    def blocks(self) -> Iterator[EpisodeBlock]:
        """Yields the episodes in the order in which their first rows stand in the tables.

        Raises:
            ValueError: If the rows are not whole episodes of finite numbers.
        """
        self.remarks.clear()
        for rows in self._row_blocks():
            block = whole_episodes(rows, self._options, self.remarks)
            if block is not None:
                yield block

    def _where_from(self, first_row: int) -> Where:
        return lambda row: self._source.where(first_row + row)

    def _row_blocks(self) -> Iterator[RowBlock]:
        if Columns.EPS_ID not in self._columns.known:
            num_episodes = 0
            for columns, lengths in self._divide():
                ids = [str(number) for number in range(num_episodes, num_episodes + len(lengths))]
                num_episodes += len(ids)
                yield self._row_block(columns, ids, lengths)
            return
        index = self._index()
        tables = self._stream(index) if index.is_contiguous else self._group(index)
        for columns, first, stop in tables:
            yield self._row_block(columns, index.ids[first:stop], index.lengths[first:stop])

    def _index(self) -> EpisodeIndex:
        """Reads only the episode ids."""
        column = self._columns.known[Columns.EPS_ID]
        ids = (batch.column(0) for batch in self._source.batches([column]))
        return index_episodes(ids, column, self._where_from)

    def _pieces(self) -> Iterator[Table]:
        """Yields the columns as arrays, some rows at a time, in order."""
        names = {name: column for name, column in self._columns.in_table.items() if name != Columns.EPS_ID}
        shapes = expected = None
        row = 0
        for batch in self._source.batches(list(names.values())):
            if not len(batch):
                continue
            where = self._where_from(row)
            piece = decode_batch(batch, names, self._decode, where)
            piece[_ROW] = np.arange(row, row + len(batch))
            shapes, expected = shapes or row_shapes(piece), expected or _without_rows(piece)
            check_row_shapes(piece, shapes, where, first=self._source.where(0))
            check_kinds(piece, expected, where, first=self._source.where(0))
            yield piece
            row += len(batch)

    def _divide(self) -> Iterator[tuple[Table, NDArray[np.int64]]]:
        """Yields (columns, lengths of their episodes) for rows without episode ids."""
        has_next_obs = Columns.NEXT_OBS in self._columns.known
        divider = EpisodeDivider(self._options, self.remarks, has_next_obs=has_next_obs)
        held: list[Table] = []
        held_bytes = first_row = last_start = 0
        for piece in self._pieces():
            first = int(piece[_ROW][0])
            if VALIDS in piece and not has_next_obs:
                piece[Columns.NEXT_OBS] = shifted(piece[Columns.OBS])
            starts, cuts = divider.divide(_leaves(piece), self._where_from(first))
            if held:
                held[-1][Columns.TRUNCATEDS][-1:] |= cuts[:1]
                if VALIDS in piece and not has_next_obs:
                    for following, leaf in zip(
                        tree.flatten(held[-1][Columns.NEXT_OBS]), tree.flatten(piece[Columns.OBS]), strict=True
                    ):
                        following[-1:] = leaf[:1]
            piece[Columns.TRUNCATEDS][:-1] |= cuts[1:]
            held.append(piece | {_STARTS: starts})
            held_bytes += _num_bytes(piece)
            last_start = first + int(np.flatnonzero(starts)[-1]) if starts.any() else last_start
            if held_bytes >= BLOCK_BYTES and last_start > first_row:
                columns = _concatenate(held)
                yield _with_lengths(_take(columns, slice(None, last_start - first_row)))
                held = [_take(columns, slice(last_start - first_row, None))]
                held_bytes = _num_bytes(held[0])
                first_row = last_start
        held[-1][Columns.TRUNCATEDS][-1:] |= divider.end_file()
        yield _with_lengths(_concatenate(held))

    def _stream(self, index: EpisodeIndex) -> Iterator[tuple[Table, int, int]]:
        """Yields (columns, first episode, stop episode) as soon as a block's worth of whole episodes is read."""
        ends = np.cumsum(index.lengths)
        held: list[Table] = []
        held_bytes = held_stop = first_episode = first_row = 0
        for piece in self._pieces():
            held.append(piece)
            held_bytes += _num_bytes(piece)
            held_stop += len(piece[_ROW])
            stop_episode = int(np.searchsorted(ends, held_stop, side="right"))
            is_full = held_bytes >= BLOCK_BYTES or held_stop == ends[-1]
            if is_full and stop_episode > first_episode:
                columns = _concatenate(held)
                num_rows = int(ends[stop_episode - 1]) - first_row
                yield _take(columns, slice(None, num_rows)), first_episode, stop_episode
                held = [_take(columns, slice(num_rows, None))]
                held_bytes = _num_bytes(held[0])
                first_episode = stop_episode
                first_row += num_rows

    def _group(self, index: EpisodeIndex) -> Iterator[tuple[Table, int, int]]:
        """The same as `_stream` for interleaved episodes: holds all rows, keeps their order within each episode."""
        columns = _concatenate(list(self._pieces()))
        order = np.argsort(index.row_codes(), kind="stable")
        ends = np.cumsum(index.lengths)
        block_rows = max(BLOCK_BYTES * len(order) // _num_bytes(columns), 1)
        first_episode = 0
        first_row = 0
        while first_episode < len(ends):
            full = np.searchsorted(ends, first_row + block_rows, side="right")
            stop_episode = max(int(full), first_episode + 1)
            stop_row = int(ends[stop_episode - 1])
            yield _take(columns, order[first_row:stop_row]), first_episode, stop_episode
            first_episode, first_row = stop_episode, stop_row

    def _row_block(self, columns: Table, ids: list[str], lengths: NDArray[np.int64]) -> RowBlock:
        if Columns.T in columns and Columns.EPS_ID in self._columns.known:
            columns = self._in_order_of_time(columns, ids, lengths)
        rows = columns[_ROW]
        block = RowBlock(
            ids=ids,
            lengths=lengths,
            observations=columns[Columns.OBS],
            next_observations=columns.get(Columns.NEXT_OBS),
            actions=columns[Columns.ACTIONS],
            rewards=columns[Columns.REWARDS],
            terminateds=columns[Columns.TERMINATEDS],
            truncateds=columns[Columns.TRUNCATEDS],
            extra_model_outputs={name: columns[name] for name in self._columns.extras},
            where=lambda row: self._source.where(int(rows[row])),
            unfinished_remedy=self._unfinished_remedy
            if Columns.EPS_ID in self._columns.known
            else f"{self._unfinished_remedy}, tell its length by `max_episode_steps_in_data`",
        )
        if VALIDS in columns:
            if Columns.EPS_ID in self._columns.known:
                block = self._with_next_observations(block)
            return without_final_rows(block, columns[VALIDS])
        self._check_one_file_per_end(block, rows)
        return block

    def _with_next_observations(self, block: RowBlock) -> RowBlock:
        """Compact data with episode ids, whose rows may have come in another order than that of time."""
        if block.next_observations is None:
            block = replace(block, next_observations=shifted(block.observations))
        return block

    def _in_order_of_time(self, columns: Table, ids: list[str], lengths: NDArray[np.int64]) -> Table:
        """Sorts the rows of each episode by `t` and checks that none is missing."""
        episodes = np.repeat(np.arange(len(lengths)), lengths)
        t = columns[Columns.T]
        check_whole_steps(t, lambda row: self._source.where(int(columns[_ROW][row])))
        same_episode = episodes[1:] == episodes[:-1]
        # Where an id stands for two episodes, `t` goes back between them.
        goes_back = bool(np.any((t[1:] < t[:-1]) & same_episode))
        if np.any((t[1:] <= t[:-1]) & same_episode):
            columns = _take(columns, np.lexsort((t, episodes)))
            t = columns[Columns.T]
        is_up, is_still = (t[1:] == t[:-1] + 1) & same_episode, (t[1:] == t[:-1]) & same_episode
        gaps = np.flatnonzero((t[1:] != t[:-1] + 1) & same_episode)
        if gaps.size:
            row = int(gaps[0])
            first, second = (int(columns[_ROW][i]) for i in (row, row + 1))
            if t[row] == t[row + 1] and self._source.part_of(first) != self._source.part_of(second):
                raise self._id_in_two_files(ids[episodes[row]], first, second, f"`{Columns.T}` is {t[row]} in both")
            if is_still.any() and np.count_nonzero(is_still) >= np.count_nonzero(is_up) and not goes_back:
                row = int(np.argmax(is_still))
                raise times_for_steps(f"it stays at {t[row]} in {self._source.where(int(columns[_ROW][row + 1]))}")
            if t[row] != t[row + 1] and not is_up.any():
                raise times_for_steps(f"it is {t[row]} in {self._source.where(first)}, {t[row + 1]} in the next row")
            raise ValueError(
                f"Rows of episode {ids[episodes[row]]!r} are out of order or missing: after `{Columns.T}` {t[row]} "
                f"({self._source.where(first)}) comes {t[row + 1]} ({self._source.where(second)}); `{Columns.T}` must "
                f"count up by 1, and every episode needs its own `{Columns.EPS_ID}`."
            )
        return columns

    def _check_one_file_per_end(self, block: RowBlock, rows: NDArray[np.int64]) -> None:
        """Refuses an id under which one file ends an episode and another file goes on."""
        done = block.terminateds | block.truncateds
        done[np.cumsum(block.lengths) - 1] = False
        for row in np.flatnonzero(done)[:1].tolist():
            first, second = int(rows[row]), int(rows[row + 1])
            if self._source.part_of(first) != self._source.part_of(second):
                raise self._id_in_two_files(block.id_of(row), first, second, "the episode has ended in the first")

    def _id_in_two_files(self, id_: str, first: int, second: int, sign: str) -> ValueError:
        return ValueError(
            f"Two files use the episode id {id_!r} for different episodes: {self._source.where(first)} and "
            f"{self._source.where(second)} ({sign}); give every episode its own `{Columns.EPS_ID}`, for instance "
            "with the file's name in front."
        )


def _leaves(columns: Table) -> dict[str, NDArray[Any]]:
    """Nested columns as one array per leaf, named as the episode divider names them."""
    leaves: dict[str, NDArray[Any]] = {}
    for name, column in columns.items():
        if isinstance(column, np.ndarray):
            leaves[name] = column
        else:
            leaves |= {f"{name}/{number}": leaf for number, leaf in enumerate(tree.flatten(column))}
    return leaves


def _with_lengths(columns: Table) -> tuple[Table, NDArray[np.int64]]:
    starts = np.flatnonzero(columns.pop(_STARTS))
    return columns, np.diff(starts, append=len(columns[_ROW]))


def _without_rows(columns: Table) -> Table:
    # Copied, since an empty view would keep all rows alive.
    empty: Table = tree.map_structure(lambda array: array[:0].copy(), columns)
    return empty


def _num_bytes(columns: Table) -> int:
    return sum(array.nbytes for array in tree.flatten(columns))


def _concatenate(pieces: list[Table]) -> Table:
    columns: Table = tree.map_structure(lambda *arrays: np.concatenate(arrays), *pieces)
    return columns


def _take(columns: Table, rows: slice | NDArray[np.int64]) -> Table:
    taken: Table = tree.map_structure(lambda array: array[rows], columns)
    return taken
