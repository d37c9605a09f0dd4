"""Reads what RLlib itself records with `config.offline_data(output=...)`: rows, or whole episodes as msgpack.

What the recorder (`OfflineSingleAgentEnvRunner`, Ray 2.60) writes, and what is done about it here:

* Actions are the module's, not the environment's: RLlib scales them from [-1, 1] to the environment's bounds, and clips
  them, only on their way to the environment. SAC's lie in [-1, 1], PPO's have no bounds. Files do not tell whether the
  recording config had `normalize_actions=False`; its actions would be in the environment's bounds, and misread here.
* Observations are what the env-to-module connectors left in the episode, so flat vectors after `FlattenObservations`.
* Observations are pickled, compressed strings unless `output_compress_columns=[]`. What is no array of numbers in them
  is refused and not run; see `rllib_calql.datasets.decoding.safe_decoding`.
* The recorder does not empty its buffer between calls of `sample()` unless `output_max_rows_per_file` is set, so each
  call writes everything again that was written before. Such repetitions are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.datasets.decoding.safe_decoding import PackedValues
from rllib_calql.datasets.episodes.boundaries import whole_episodes
from rllib_calql.datasets.episodes.chunks import extra_columns_of, gather, join_chunks, observation_space_of
from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.datasets.episodes.reader import DatasetInfo, EpisodeBlock, EpisodeReader, Nested, ReadOptions
from rllib_calql.datasets.readers.packed_episodes import unpacked_episode
from rllib_calql.datasets.readers.parquet import ParquetReader
from rllib_calql.datasets.rows.arrow import Where, decode_numbers, is_text_or_bytes
from rllib_calql.datasets.rows.episode_index import is_id_type
from rllib_calql.datasets.rows.parquet_files import open_parquet, readable

_EPISODE_COLUMN = "item"
_MAX_BATCH_BYTES = 2**31  # Of the numbers of a few MB of rows: only what repeats itself for ever takes more.
_UNFINISHED_REMEDY = 'record whole episodes with `config.env_runners(batch_mode="complete_episodes")`, or drop this one'


def holds_episodes(schema: Any) -> bool:
    """Whether files with this Arrow schema hold episodes as msgpack bytes (`output_write_episodes=True`)."""
    return schema.names == [_EPISODE_COLUMN] and is_text_or_bytes(schema.field(0).type)


def holds_recorded_rows(schema: Any) -> bool:
    """Whether rows with this Arrow schema come from RLlib's recorder, judged by columns that only it writes."""
    if {Columns.AGENT_ID, Columns.MODULE_ID} <= set(schema.names):
        return True
    return Columns.OBS in schema.names and is_text_or_bytes(schema.field(Columns.OBS).type)


class RecordedRowsReader(ParquetReader):
    """Episodes from rows recorded by RLlib (`output_write_episodes=False`)."""

    def __init__(self, name: str, files: Sequence[DataFile], options: ReadOptions) -> None:
        """Finds the writes that are not repeated later, then checks their columns; see `ParquetReader`."""
        super().__init__(
            name,
            drop_repeated_writes(files, Columns.EPS_ID),
            options,
            actions="module",
            decode=_decode_packed,
            unfinished_remedy=_UNFINISHED_REMEDY,
        )


class RecordedEpisodesReader(EpisodeReader):
    """Episodes that RLlib recorded as msgpack (`output_write_episodes=True`); chunks of one episode are joined."""

    def __init__(self, name: str, files: Sequence[DataFile], options: ReadOptions) -> None:
        """Decodes the first episode for its spaces.

        Raises:
            ValueError: If there are no episodes, or the first is no episode.
        """
        super().__init__()
        self._options = options
        for file in files:
            _check_holds_episodes(file)
        self._files = drop_repeated_writes(files, _EPISODE_COLUMN)
        first = next(self._chunks(), None)
        if first is None:
            raise ValueError(f"`input_` {name!r} is empty: its Parquet files have no episodes; name files that have.")
        self.info = DatasetInfo(
            name=name,
            observation_space=observation_space_of(first[0]),
            action_space=first[0].action_space,
            actions="module",
            num_transitions=None,
            ignored_columns=tuple(extra_columns_of(first[0], options)[1]),
        )

    @property
    def records_ids(self) -> bool:
        """RLlib gives every episode one of its own."""
        return True

    def blocks(self) -> Iterator[EpisodeBlock]:
        """Yields the episodes in the order in which their last chunks stand in the files.

        Raises:
            ValueError: If an episode is not whole or holds numbers that are not finite.
        """
        self.remarks.clear()
        episodes = join_chunks(self._chunks(), self._options)
        for rows in gather(episodes, unfinished_remedy=_UNFINISHED_REMEDY):
            block = whole_episodes(rows, self._options, self.remarks)
            if block is not None:
                yield block

    def fingerprint(self) -> str:
        """Digest of the files."""
        return fingerprint_of(self._files)

    def _chunks(self) -> Iterator[tuple[SingleAgentEpisode, str]]:
        """Yields non-empty episodes or parts of them, as recorded, and where each was read."""
        for file in self._files:
            with open_parquet(file) as parquet_file:
                batches = parquet_file.iter_batches(16, columns=[_EPISODE_COLUMN])
                row = 0
                while True:
                    with readable(file):
                        batch = next(batches, None)
                    if batch is None:
                        break
                    for packed in batch.column(0):
                        where = f"row {row} of {str(file)!r}"
                        chunk = self._unpacked(packed.as_py(), where)
                        if len(chunk):
                            yield chunk, where
                        row += 1

    @staticmethod
    def _unpacked(packed: bytes, where: str) -> SingleAgentEpisode:
        try:
            return unpacked_episode(packed)
        # msgpack and RLlib raise whatever the bytes happen to cause.
        except Exception as err:
            raise ValueError(
                f"There is no episode that RLlib packed in {where} ({type(err).__name__}: {err}); copy or record the "
                "file again. Arrays of numbers and plain values are read, nothing in data is ever run."
            ) from err


def _check_holds_episodes(file: DataFile) -> None:
    # A column of another type might be unpickled by the mere look at a value, once `ray.data` is loaded.
    with open_parquet(file) as parquet_file, readable(file):
        schema = parquet_file.schema_arrow
    if not holds_episodes(schema):
        columns = ", ".join(f"`{field.name}` ({field.type})" for field in schema)
        raise ValueError(
            f"{str(file)!r} has the columns {columns}, where files of episodes have the column `{_EPISODE_COLUMN}` of "
            "bytes alone; read files of rows and files of episodes as separate inputs."
        )


def drop_repeated_writes(files: Sequence[DataFile], id_column: str) -> list[DataFile]:
    """Leaves out the files of every write whose rows a later, longer write repeats.

    One write of the recorder is one or more files `<write>_<task>-<block>.parquet` in one folder. A write is taken to
    be repeated by another if both its first and its last row stand at the same places there.

    Args:
        files: In the order in which their rows follow each other.
        id_column: A column that tells the rows of different episodes apart.
    """
    writes: dict[tuple[str, str], list[DataFile]] = {}
    for file in files:
        writes.setdefault((file.folder, re.sub(r"_\d+-\d+$", "", file.name.rpartition(".")[0])), []).append(file)
    if len(writes) == 1:
        return list(files)

    repeated: set[DataFile] = set()
    kept_by_first_id: dict[Any, list[_Write]] = {}
    for write in sorted(map(_Write, writes.values()), key=lambda write: write.num_rows, reverse=True):
        if write.num_rows == 0:
            continue
        first_row, last_row = write.row(0), write.row(write.num_rows - 1)
        if id_column not in first_row.column_names or not is_id_type(first_row[id_column].type):
            return list(files)  # What is wrong with the column is told when the files are read.
        kept = kept_by_first_id.setdefault(first_row[id_column][0].as_py(), [])
        if any(other.row(0) == first_row and other.row(write.num_rows - 1) == last_row for other in kept):
            repeated.update(write.files)
        else:
            kept.append(write)
    return [file for file in files if file not in repeated]


class _Write:
    """The rows of one write of the recorder, in one or more files."""

    def __init__(self, files: list[DataFile]) -> None:
        self.files = files
        stops = []
        for file in files:
            with open_parquet(file) as parquet_file, readable(file):
                stops.append(parquet_file.metadata.num_rows)
        self._stops = np.cumsum(stops)
        self.num_rows = int(self._stops[-1])

    def row(self, row: int) -> Any:
        """One row as an Arrow table of the columns that identify it."""
        number = int(np.searchsorted(self._stops, row, side="right"))
        first_row = int(self._stops[number - 1]) if number else 0
        names = [_EPISODE_COLUMN, Columns.EPS_ID, Columns.OBS, Columns.ACTIONS, Columns.REWARDS, Columns.NEXT_OBS]
        file = self.files[number]
        with open_parquet(file) as parquet_file, readable(file):
            present = parquet_file.schema_arrow.names
            table = parquet_file.read(columns=[name for name in names if name in present])
        return table.slice(row - first_row, 1)


def _decode_packed(field: Any, array: Any, where: Where) -> Nested:
    """Unpacks a column of packed arrays; everything else is a column of numbers."""
    if not is_text_or_bytes(array.type) or array.null_count:
        return decode_numbers(field, array, where)
    # One row's next observation is the next row's observation, and resting environments repeat themselves.
    encoded = pc.dictionary_encode(array)
    entries = encoded.indices.to_numpy()
    texts = encoded.dictionary.cast(pa.large_binary()).to_pylist()  # As bytes, since text may be no UTF-8.
    values = _unpacked_values(field.name, texts, entries, where)
    if all(isinstance(value, np.ndarray) for value in values):
        return _column_of(field.name, values, entries, where)
    try:
        for value in values:
            tree.assert_same_structure(values[0], value)
    except (TypeError, ValueError) as err:
        raise ValueError(
            f"`{field.name}` has rows of different parts at or after {where(0)}; every row must have the same parts."
        ) from err
    leaves = zip(*map(tree.flatten, values), strict=True)
    columns = [_column_of(field.name, list(parts), entries, where) for parts in leaves]
    nested: Nested = tree.unflatten_as(values[0], columns)
    return nested


def _column_of(name: str, values: list[NDArray[Any]], entries: NDArray[Any], where: Where) -> NDArray[Any]:
    """The rows of one part: `entries` tells which of the different values each row has."""
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        raise ValueError(
            f"`{name}` has rows of different shapes, {sorted(shapes)}, at or after {where(0)}; every row must "
            "have the same shape."
        )
    types = {value.dtype.kind: value.dtype for value in values}
    if not types.keys() <= set("fiub"):
        raise ValueError(
            f"`{name}` must hold arrays of numbers, got {', '.join(map(str, types.values()))} at or after "
            f"{where(0)}; record flat observations, with the connector `FlattenObservations`."
        )
    if len(types) > 1:
        raise ValueError(
            f"`{name}` has rows of the types {' and '.join(sorted(map(str, types.values())))}, at or after "
            f"{where(0)}; store it in one type."
        )
    if len(entries) * values[0].nbytes > _MAX_BATCH_BYTES:
        raise ValueError(
            f"`{name}` holds {len(entries)} rows of {values[0].nbytes} bytes at and after {where(0)}, which "
            "repeat themselves so often that they take a few megabytes in the file; store fewer of them."
        )
    rows: NDArray[Any] = np.stack(values)[entries]
    return rows


def _unpacked_values(name: str, packed: list[bytes], entries: NDArray[Any], where: Where) -> list[Any]:
    """Unpacks the different values of a column; `entries` tells which of them each row has."""
    codec = PackedValues()
    values: list[Any] = []
    num_bytes = 0
    for text in packed:
        try:
            value = codec.unpack(text)
            values.append(_as_parts(value))
        except ValueError as err:
            row = int(np.argmax(entries == len(values)))
            raise ValueError(
                f"`{name}` holds text that RLlib's recorder did not pack in {where(row)}: it {err}. Arrays of numbers "
                "are read, and nothing in data is ever run; store lists of numbers."
            ) from err
        last = values[-1]
        num_bytes += last.nbytes if isinstance(last, np.ndarray) else sum(part.nbytes for part in tree.flatten(last))
        if num_bytes > _MAX_BATCH_BYTES:
            row = int(np.argmax(entries == len(values) - 1))
            raise ValueError(
                f"`{name}` holds more than {_MAX_BATCH_BYTES} bytes up to {where(row)}, and takes a few megabytes in "
                "the file; record smaller observations."
            )
    return values


def _as_parts(value: Any) -> Any:
    """An array, or a tuple of such: parts of a Tuple are never taken for rows of one array, even if they fit."""
    if isinstance(value, tuple) or (isinstance(value, list) and any(isinstance(v, (tuple, np.ndarray)) for v in value)):
        return tuple(map(_as_parts, value)) if value else np.empty(0, object)
    # A dict would become an array of one object, which says less.
    return np.asarray(value, dtype=object if isinstance(value, dict) else None)
