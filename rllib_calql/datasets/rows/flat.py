"""From files of flat columns to blocks of whole episodes: what HDF5 and NumPy archives have in common.

Files are read once, a few MB of rows at a time; what is held beyond that is the episode whose end has not come yet.
Without episode ids, episodes are inferred from flags, jumps of the observation, times and a maximum length.

Axes: R rows of a piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.boundaries import RowBlock, whole_episodes
from rllib_calql.datasets.episodes.columns import MASKS, VALIDS
from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of, said_of_content
from rllib_calql.datasets.episodes.final_rows import shifted, without_final_rows
from rllib_calql.datasets.episodes.reader import (
    DatasetInfo,
    EpisodeBlock,
    EpisodeReader,
    ReadOptions,
)
from rllib_calql.datasets.rows.flat_columns import (
    ArrayHeader,
    FlatColumns,
    Table,
    as_flags,
    as_texts,
    check_agreement,
    columns_of,
    common_dtypes,
    in_type_of_obs,
    leaves_of,
    nested,
)
from rllib_calql.datasets.rows.flat_episodes import EpisodeDivider

_PIECE_BYTES = 4 * 2**20
_MAX_PIECE_ROWS = 2**17
_STARTS = "__starts__"


class FlatFile(ABC):
    """An open file of columns.

    Attributes:
        arrays: What it holds, by name. A name "group/*" stands for a group that was not looked into.
        reference_scores: Returns (min, max) that stand for a normalised score of 0 and 1, if recorded.
    """

    arrays: Mapping[str, ArrayHeader]
    reference_scores: tuple[float, float] | None = None

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of one array. The calls for an array begin at its row 0 and leave none out.

        Raises:
            ValueError: If the file is damaged.
        """


@contextmanager
def reading(file: DataFile, format_: str) -> Iterator[None]:
    """Turns whatever a library raises at the bytes of a file into a ValueError that names the file.

    Raises:
        ValueError: In place of the library's error.
        FileNotFoundError: If the file is gone.
        PermissionError: If it must not be read.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    # Which exceptions damaged bytes cause is nowhere documented: HDF5 and zip files give a dozen types.
    except Exception as err:
        other = said_of_content(file, format_.split()[0])
        remedy = f".{other}" if other else "; it may be incomplete or damaged: copy or write it again."
        raise ValueError(
            f"{str(file)!r} is not a readable {format_} file ({type(err).__name__}: {err}){remedy}"
        ) from err


class FlatReader(EpisodeReader):
    """Episodes from files of columns, one after another.

    Needed are observations, actions, rewards and terminations; optional are next observations, truncations, episode
    ids and times. With episode ids, a change of the id ends an episode. Without them it ends where a row is
    terminated or truncated, where the observation jumps, where `t` does not count up by 1 and after
    `max_episode_steps` rows. The end of a file ends an episode in any case.
    """

    def __init__(self, name: str, files: Sequence[DataFile], options: ReadOptions) -> None:
        """Checks columns, types and lengths; no row is read yet.

        Args:
            name: The input as the user wrote it.
            files: Files in the order in which their rows follow each other.
            options: How incomplete data are read.

        Raises:
            ImportError: If the format's package is not installed.
            ValueError: If a file is unreadable, lacks a column, differs from the others, or there are no rows.
        """
        super().__init__()
        self._files = tuple(files)
        self._options = options
        self._columns: list[FlatColumns] = []
        reference_scores = None
        for file in self._files:
            with self._open(file) as opened:
                self._columns.append(columns_of(opened.arrays, options, repr(str(file))))
                reference_scores = reference_scores or opened.reference_scores
        num_rows = [columns.num_rows for columns in self._columns]
        if not any(num_rows):
            raise ValueError(f"`input_` {name!r} is empty: its files have no rows; name files that have.")
        self._first_rows = np.concatenate([[0], np.cumsum(num_rows, dtype=np.int64)])
        filled = [number for number, count in enumerate(num_rows) if count]
        first = self._columns[filled[0]]
        for number in filled[1:]:
            check_agreement(
                first, repr(str(self._files[filled[0]])), self._columns[number], repr(str(self._files[number]))
            )
        self._dtypes = common_dtypes([self._columns[number] for number in filled])
        self._schema = first
        self._piece_rows = int(np.clip(_PIECE_BYTES // first.row_bytes(), 1, _MAX_PIECE_ROWS))
        self.info = DatasetInfo(
            name=name,
            observation_space=None,
            action_space=None,
            actions="environment",
            num_transitions=sum(num_rows),
            reference_scores=reference_scores,
            ignored_columns=tuple(dict.fromkeys(name for columns in self._columns for name in columns.ignored)),
        )

    @abstractmethod
    def _open(self, file: DataFile) -> AbstractContextManager[FlatFile]:
        """Opens one file.

        Raises:
            ImportError: If the format's package is not installed.
            ValueError: If the file cannot be read.
        """

    def fingerprint(self) -> str:
        """Digest of the files."""
        return fingerprint_of(self._files)

    @property
    def records_ids(self) -> bool:
        """By the column of ids."""
        return any(Columns.EPS_ID in columns.stored for columns in self._columns)

    def blocks(self) -> Iterator[EpisodeBlock]:
        """Yields blocks of whole episodes in file order.

        Raises:
            ValueError: If the data are not whole episodes of finite numbers.
        """
        self.remarks.clear()
        first_row_of: dict[str, int] = {}
        num_episodes = 0
        for table, first_row in self._whole_tables():
            starts = np.flatnonzero(table.pop(_STARTS))
            if Columns.EPS_ID in table:
                ids = as_texts(table[Columns.EPS_ID][starts], self._where_of(first_row + starts))
                self._check_new(ids, first_row + starts, first_row_of)
            else:
                ids = [str(number) for number in range(num_episodes, num_episodes + len(starts))]
            num_episodes += len(starts)
            block = self._block(table, ids, np.diff(starts, append=len(table[Columns.REWARDS])), first_row)
            if block is not None:
                yield block

    def _where(self, row: int) -> str:
        """Names file and row (from 0) of a row counted over all files."""
        file = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return f"row {row - self._first_rows[file]} of {str(self._files[file])!r}"

    def _where_of(self, rows: NDArray[np.int64]) -> Callable[[int], str]:
        return lambda entry: self._where(int(rows[entry]))

    def _where_from(self, first_row: int) -> Callable[[int], str]:
        return lambda row: self._where(first_row + row)

    def _whole_tables(self) -> Iterator[tuple[Table, int]]:
        """Yields (rows of whole episodes, number of the first row) once they make a block."""
        has_next_obs = bool(leaves_of(self._schema.stored, Columns.NEXT_OBS))
        divider = EpisodeDivider(self._options, self.remarks, has_next_obs=has_next_obs)
        held: list[Table] = []
        first_row = row = last_start = 0
        for table, is_new_file in self._tables():
            if is_new_file and held:
                held[-1][Columns.TRUNCATEDS][-1:] |= divider.end_file()
            starts, cuts = divider.divide(table, self._where_from(row))
            if held:
                if VALIDS in table and not has_next_obs and not is_new_file:
                    for leaf, next_leaf in _next_leaves(table):
                        held[-1][next_leaf][-1:] = table[leaf][:1]
                held[-1][Columns.TRUNCATEDS][-1:] |= cuts[:1]
            table[Columns.TRUNCATEDS][:-1] |= cuts[1:]
            held.append({**table, _STARTS: starts})
            if starts.any():
                last_start = row + int(np.flatnonzero(starts)[-1])
            row += len(starts)
            if row - first_row >= self._piece_rows and last_start > first_row:
                rows = _concatenate(held)
                num_whole = last_start - first_row
                yield {name: array[:num_whole] for name, array in rows.items()}, first_row
                held = [{name: array[num_whole:] for name, array in rows.items()}]
                first_row = last_start
        held[-1][Columns.TRUNCATEDS][-1:] |= divider.end_file()
        yield _concatenate(held), first_row

    def _tables(self) -> Iterator[tuple[Table, bool]]:
        """Yields (a few MB of rows, whether a file begins with them)."""
        for number, (file, columns) in enumerate(zip(self._files, self._columns, strict=True)):
            if not columns.num_rows:
                continue
            with self._open(file) as opened:
                for start in range(0, columns.num_rows, self._piece_rows):
                    stop = min(start + self._piece_rows, columns.num_rows)
                    stored = {leaf: opened.read(name, start, stop) for leaf, name in columns.stored.items()}
                    where = self._where_from(int(self._first_rows[number]) + start)
                    yield self._checked(stored, columns, where), start == 0

    def _checked(self, stored: Table, columns: FlatColumns, where: Callable[[int], str]) -> Table:
        """Brings rows into the common types, and the end of episodes into two flags."""
        num_rows = len(stored[Columns.REWARDS])
        table = {
            leaf: in_type_of_obs(columns.stored[leaf], stored[leaf], dtype, where)
            if leaf.split("/")[0] == Columns.NEXT_OBS
            else stored[leaf].astype(dtype, copy=False)
            for leaf, dtype in self._dtypes.items()
        }
        table[Columns.REWARDS] = table[Columns.REWARDS].reshape(num_rows)
        for name in (Columns.EPS_ID, Columns.T):
            if name in stored:
                table[name] = stored[name].reshape(num_rows)
        flags = {
            name: as_flags(columns.stored[name], stored[name], where)
            for name in (Columns.TERMINATEDS, Columns.TRUNCATEDS, MASKS, VALIDS)
            if name in stored
        }
        terminateds = flags[Columns.TERMINATEDS]
        truncateds = flags.get(Columns.TRUNCATEDS, np.zeros(num_rows, dtype=bool))
        if MASKS in flags:
            ends, terminateds = terminateds, ~flags[MASKS]
            truncateds = truncateds | (ends & ~terminateds)
        table |= {Columns.TERMINATEDS: terminateds, Columns.TRUNCATEDS: truncateds}
        if VALIDS in flags:
            table[VALIDS] = flags[VALIDS]
            if not leaves_of(table, Columns.NEXT_OBS):
                table |= {next_leaf: shifted(table[leaf]) for leaf, next_leaf in _next_leaves(table)}
        return table

    def _check_new(self, ids: list[str], rows: NDArray[np.int64], first_row_of: dict[str, int]) -> None:
        for id_, row in zip(ids, rows.tolist(), strict=True):
            first_row = first_row_of.setdefault(id_, row)
            if first_row != row:
                raise ValueError(
                    f"Episode {id_!r} begins in {self._where(first_row)} and comes back in {self._where(row)}; store "
                    "the rows of an episode together in one file, and give every episode an id of its own, in all "
                    "files."
                )

    def _block(self, table: Table, ids: list[str], lengths: NDArray[np.int64], first_row: int) -> EpisodeBlock | None:
        remedy = "mark its last row as truncated"
        if Columns.EPS_ID not in table:
            remedy += ", tell its length by `max_episode_steps_in_data`"
        rows = RowBlock(
            ids=ids,
            lengths=lengths,
            observations=nested(table, Columns.OBS),
            next_observations=nested(table, Columns.NEXT_OBS) if leaves_of(table, Columns.NEXT_OBS) else None,
            actions=nested(table, Columns.ACTIONS),
            rewards=table[Columns.REWARDS],
            terminateds=table[Columns.TERMINATEDS],
            truncateds=table[Columns.TRUNCATEDS],
            where=self._where_from(first_row),
            extra_model_outputs={name: table[name] for name in self._schema.extras},
            unfinished_remedy=remedy,
        )
        if VALIDS in table:
            rows = without_final_rows(rows, table[VALIDS])
        return whole_episodes(rows, self._options, self.remarks)


def _next_leaves(table: Table) -> list[tuple[str, str]]:
    """Names of the leaves of observations, and of those of the next observations."""
    return [(leaf, Columns.NEXT_OBS + leaf[len(Columns.OBS) :]) for leaf in leaves_of(table, Columns.OBS)]


def _concatenate(tables: list[Table]) -> Table:
    if len(tables) == 1:
        return tables[0]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
