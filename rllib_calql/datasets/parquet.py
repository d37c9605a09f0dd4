"""Reads Parquet rows, one transition per row, under the column names that RLlib uses.

Files are streamed in natural order (part-2 before part-10), a few thousand rows at a time, and an episode is passed on
as soon as it is complete. Only if rows of different episodes are interleaved are all rows held in memory at once.

Axes: R rows, E episodes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.datasets.arrow import Where, decode_numbers, is_numeric
from rllib_calql.datasets.episodes import (
    ActionsKind,
    DatasetInfo,
    EpisodeBlock,
    Nested,
    close_matches,
    episodes_of,
)

REQUIRED_COLUMNS = (
    Columns.EPS_ID,
    Columns.OBS,
    Columns.ACTIONS,
    Columns.REWARDS,
    Columns.NEXT_OBS,
    Columns.TERMINATEDS,
    Columns.TRUNCATEDS,
)
# Known, and neither needed nor a model output.
_IGNORED_COLUMNS = (Columns.AGENT_ID, Columns.MODULE_ID, Columns.INFOS, Columns.T)
_DECODED_COLUMNS = (Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS)
_ROW = "__row__"

_BLOCK_BYTES = 4 * 2**20
_READ_BUFFER_BYTES = 2**20

Table = dict[str, Nested]
ColumnDecoder = Callable[[Any, Any, Where], Nested]
"""(field, array, where) -> one row per entry of the array; `where` says where an entry was read."""


def find_parquet_files(path: Path) -> list[Path]:
    """Returns the file itself, or the Parquet files below a folder in natural order.

    Raises:
        FileNotFoundError: If nothing is at `path`; the message names entries of the parent folder that resemble it.
        ValueError: If the folder has no Parquet file.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"`input_` {str(path)!r}: no such file or folder.{close_matches(path.name, siblings)}")
    files = [file for file in path.rglob("*.parquet") if not file.name.startswith((".", "_"))]
    if not files:
        raise ValueError(f"Folder {str(path)!r} is empty: there is no `*.parquet` file in it or below it.")
    return sorted(files, key=lambda file: _natural_key(file.relative_to(path)))


def open_parquet(file: Path) -> Any:
    """Opens a Parquet file so that it is read in small pieces.

    Raises:
        ValueError: If it is not a Parquet file.
    """
    try:
        # Without a buffer size, pyarrow loads the column chunks of a whole row group, often the whole file.
        return pq.ParquetFile(file, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
    except pa.ArrowInvalid as err:
        raise ValueError(
            f"{str(file)!r} is not a readable Parquet file ({err}); `input_` takes `minari:<dataset id>`, Parquet "
            "files or folders of them, and folders recorded by RLlib."
        ) from err


class ParquetReader:
    """Episodes from Parquet rows.

    Columns: `eps_id`, `obs`, `actions`, `rewards`, `new_obs`, `terminateds`, `truncateds`, and optionally `t`, which
    orders the rows of an episode. Observations and actions are numbers, lists, fixed-size lists, tensors, or structs of
    these. Other columns of numbers become `extra_model_outputs`; other columns of anything else are left out.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        *,
        actions: ActionsKind = "environment",
        decode: ColumnDecoder = decode_numbers,
        unfinished_remedy: str = "drop it or mark its last step",
    ) -> None:
        """Checks columns and sizes; no row is read yet.

        Args:
            name: The input as the user wrote it.
            files: Parquet files in the order in which their rows follow each other.
            actions: What the actions in the files are.
            decode: Turns observations and actions into arrays.
            unfinished_remedy: What an error recommends for an episode that ends neither terminated nor truncated.

        Raises:
            ValueError: If a column is missing, files differ in their columns, or there are no rows.
        """
        self._files = list(files)
        self._decode = decode
        self._unfinished_remedy = unfinished_remedy
        metadata = []
        for number, file in enumerate(self._files):
            with open_parquet(file) as parquet_file:
                if number == 0:
                    self._columns = _columns_to_read(parquet_file.schema_arrow)
                _check_columns(file, parquet_file.schema_arrow.names, self._columns)
                metadata.append(parquet_file.metadata)
        num_rows = [file_metadata.num_rows for file_metadata in metadata]
        self._first_rows = np.concatenate([[0], np.cumsum(num_rows, dtype=np.int64)])
        self.info = DatasetInfo(
            name=name,
            observation_space=None,
            action_space=None,
            actions=actions,
            num_transitions=sum(num_rows),
        )
        if sum(num_rows) == 0:
            raise ValueError(f"`input_` {name!r} is empty: its Parquet files have no rows.")
        num_bytes = sum(m.row_group(i).total_byte_size for m in metadata for i in range(m.num_row_groups))
        self._block_rows = int(np.clip(_BLOCK_BYTES // max(num_bytes // sum(num_rows), 1), 16, 2**16))

    def __iter__(self) -> Iterator[SingleAgentEpisode]:
        """Yields the episodes in the order in which their first rows stand in the files.

        Raises:
            ValueError: If the rows are not whole episodes of finite numbers.
        """
        index = self._index()
        blocks = self._stream(index) if index.is_contiguous else self._group(index)
        for columns, first, stop in blocks:
            yield from episodes_of(self._block(columns, index.ids[first:stop], index.lengths[first:stop]))

    def _where(self, row: int) -> str:
        """Names file and row (from 0) of a row counted over all files."""
        file = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return f"row {row - self._first_rows[file]} of {str(self._files[file])!r}"

    def _index(self) -> "_Index":
        """Reads only the episode ids."""
        codes: dict[Any, int] = {}
        runs: list[tuple[int, int]] = []
        row = 0
        for file in self._files:
            with open_parquet(file) as parquet_file:
                for batch in parquet_file.iter_batches(2**16, columns=[Columns.EPS_ID]):
                    ids = batch.column(0)
                    if ids.null_count:
                        row += pc.index(pc.is_null(ids), True).as_py()
                        raise ValueError(
                            f"`{Columns.EPS_ID}` has no value in {self._where(row)}; give every row an id."
                        )
                    runs += [(codes.setdefault(id_, len(codes)), length) for id_, length in _runs_of(ids)]
                    row += len(ids)
        return _Index([str(id_) for id_ in codes], np.array(runs, dtype=np.int64).reshape(-1, 2))

    def _pieces(self) -> Iterator[Table]:
        """Yields the columns as arrays, some rows at a time, in file order."""
        names = [name for name in self._columns if name != Columns.EPS_ID]
        shapes = None
        row = 0
        for file in self._files:
            with open_parquet(file) as parquet_file:
                schema = parquet_file.schema_arrow
                for batch in parquet_file.iter_batches(self._block_rows, columns=names):

                    def where(i: int, first_row: int = row) -> str:
                        return self._where(first_row + i)

                    piece: Table = {}
                    for name in names:
                        decode = self._decode if name in _DECODED_COLUMNS else decode_numbers
                        piece[name] = decode(schema.field(name), batch.column(name), where)
                    piece[_ROW] = np.arange(row, row + len(batch))
                    shapes = shapes or _row_shapes(piece)
                    _check_row_shapes(piece, shapes, where)
                    yield piece
                    row += len(batch)

    def _stream(self, index: "_Index") -> Iterator[tuple[Table, int, int]]:
        """Yields (columns, first episode, stop episode) as soon as a block's worth of whole episodes is read."""
        ends = np.cumsum(index.lengths)
        held: list[Table] = []
        held_stop = 0
        first_episode = 0
        first_row = 0
        for piece in self._pieces():
            held.append(piece)
            held_stop += len(piece[_ROW])
            stop_episode = int(np.searchsorted(ends, held_stop, side="right"))
            is_full = held_stop - first_row >= self._block_rows or held_stop == ends[-1]
            if is_full and stop_episode > first_episode:
                columns = _concatenate(held)
                num_rows = int(ends[stop_episode - 1]) - first_row
                yield _take(columns, slice(None, num_rows)), first_episode, stop_episode
                held = [_take(columns, slice(num_rows, None))]
                first_episode = stop_episode
                first_row += num_rows

    def _group(self, index: "_Index") -> Iterator[tuple[Table, int, int]]:
        """The same as `_stream` for interleaved episodes: holds all rows, keeps their order within each episode."""
        columns = _concatenate(list(self._pieces()))
        order = np.argsort(index.row_codes(), kind="stable")
        ends = np.cumsum(index.lengths)
        first_episode = 0
        first_row = 0
        while first_episode < len(ends):
            full = np.searchsorted(ends, first_row + self._block_rows, side="right")
            stop_episode = max(int(full), first_episode + 1)
            stop_row = int(ends[stop_episode - 1])
            yield _take(columns, order[first_row:stop_row]), first_episode, stop_episode
            first_episode, first_row = stop_episode, stop_row

    def _block(self, columns: Table, ids: list[str], lengths: NDArray[np.int64]) -> EpisodeBlock:
        if Columns.T in columns:
            columns = self._in_order_of_time(columns, ids, lengths)
        rows = columns[_ROW]
        return EpisodeBlock(
            ids=ids,
            lengths=lengths,
            observations=columns[Columns.OBS],
            # Compared with `obs` and appended to it, so both need one dtype.
            next_observations=tree.map_structure(
                lambda obs, next_obs: next_obs.astype(obs.dtype, copy=False),
                columns[Columns.OBS],
                columns[Columns.NEXT_OBS],
            ),
            actions=columns[Columns.ACTIONS],
            rewards=columns[Columns.REWARDS],
            terminateds=columns[Columns.TERMINATEDS].astype(bool, copy=False),
            truncateds=columns[Columns.TRUNCATEDS].astype(bool, copy=False),
            extra_model_outputs={
                name: columns[name]
                for name in self._columns
                if name not in REQUIRED_COLUMNS and name not in _IGNORED_COLUMNS
            },
            where=lambda row: self._where(int(rows[row])),
            unfinished_remedy=self._unfinished_remedy,
        )

    def _in_order_of_time(self, columns: Table, ids: list[str], lengths: NDArray[np.int64]) -> Table:
        """Sorts the rows of each episode by `t` and checks that none is missing."""
        episodes = np.repeat(np.arange(len(lengths)), lengths)
        t = columns[Columns.T]
        same_episode = episodes[1:] == episodes[:-1]
        if np.any((t[1:] <= t[:-1]) & same_episode):
            columns = _take(columns, np.lexsort((t, episodes)))
            t = columns[Columns.T]
        gaps = np.flatnonzero((t[1:] != t[:-1] + 1) & same_episode)
        if gaps.size:
            row = int(gaps[0])
            raise ValueError(
                f"Rows of episode {ids[episodes[row]]!r} are out of order or missing: after `{Columns.T}` {t[row]} "
                f"({self._where(int(columns[_ROW][row]))}) comes {t[row + 1]} "
                f"({self._where(int(columns[_ROW][row + 1]))}); `{Columns.T}` must count up by 1."
            )
        return columns


@dataclass(frozen=True)
class _Index:
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


def _runs_of(ids: Any) -> Iterator[tuple[Any, int]]:
    """Yields (id, number of rows) for each run of equal ids."""
    encoded = pc.run_end_encode(ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids)
    lengths = np.diff(encoded.run_ends.to_numpy(), prepend=0)
    return zip(encoded.values.to_pylist(), lengths.tolist(), strict=True)


def _natural_key(path: Path) -> list[list[int | str]]:
    # Splitting at digits makes text and numbers alternate, so that two keys never compare a number with text.
    return [[int(s) if s.isdigit() else s for s in re.split(r"([0-9]+)", part)] for part in path.parts]


def _columns_to_read(schema: Any) -> list[str]:
    """Needed columns, whether present or not, `t` if present, and all other columns of numbers."""
    extras = [
        field.name
        for field in schema
        if field.name not in REQUIRED_COLUMNS and field.name not in _IGNORED_COLUMNS and is_numeric(field.type)
    ]
    return [*REQUIRED_COLUMNS, *([Columns.T] if Columns.T in schema.names else []), *extras]


def _check_columns(file: Path, present: Sequence[str], needed: Iterable[str]) -> None:
    missing = [name for name in needed if name not in present]
    if not missing:
        return
    remedy = "rename the column, or add it"
    if missing == [Columns.NEXT_OBS]:
        remedy = "without it the observation after an episode's last step is unknown; add it"
    raise ValueError(
        f"{str(file)!r} has no column {', '.join(f'`{name}`' for name in missing)}; "
        f"its columns are {', '.join(f'`{name}`' for name in present)}; {remedy}."
    )


def _row_shapes(piece: Table) -> dict[str, Any]:
    # Text, because nested shapes would otherwise be tuples that look like structure.
    return {name: tree.map_structure(lambda array: str(array.shape[1:]), column) for name, column in piece.items()}


def _check_row_shapes(piece: Table, expected: dict[str, Any], where: Where) -> None:
    shapes = _row_shapes(piece)
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise ValueError(
                f"`{name}` has shape {shape} from {where(0)} on and {expected[name]} before; every row must have the "
                "same shape."
            )
    if shapes[Columns.OBS] != shapes[Columns.NEXT_OBS]:
        raise ValueError(
            f"`{Columns.OBS}` has shape {shapes[Columns.OBS]} and `{Columns.NEXT_OBS}` has shape "
            f"{shapes[Columns.NEXT_OBS]} in {where(0)}; they must be equal."
        )


def _concatenate(pieces: list[Table]) -> Table:
    columns: Table = tree.map_structure(lambda *arrays: np.concatenate(arrays), *pieces)
    return columns


def _take(columns: Table, rows: slice | NDArray[np.int64]) -> Table:
    taken: Table = tree.map_structure(lambda array: array[rows], columns)
    return taken
