"""Reads what RLlib itself records with `config.offline_data(output=...)`: rows, or whole episodes as msgpack.

What the recorder (`OfflineSingleAgentEnvRunner`, Ray 2.60) writes, and what is done about it here:

* Actions are the module's, not the environment's: RLlib scales them from [-1, 1] to the environment's bounds, and clips
  them, only on their way to the environment. SAC's lie in [-1, 1], PPO's have no bounds. Files do not tell whether the
  recording config had `normalize_actions=False`; its actions would be in the environment's bounds, and misread here.
* Observations are what the env-to-module connectors left in the episode, so flat vectors after `FlattenObservations`.
* Observations are pickled, compressed strings unless `output_compress_columns=[]`. Unpickling runs code: read
  recordings only from where you would run programs from.
* The recorder does not empty its buffer between calls of `sample()` unless `output_max_rows_per_file` is set, so each
  call writes everything again that was written before. Such repetitions are left out.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tree
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils import compression

from rllib_calql.datasets.arrow import Where, decode_numbers
from rllib_calql.datasets.episodes import DatasetInfo, EpisodeBlock, Nested, episodes_of
from rllib_calql.datasets.parquet import ParquetReader, open_parquet

_unpack: Callable[[str | bytes], Any] = compression.unpack

_EPISODE_COLUMN = "item"
_UNFINISHED_REMEDY = 'record whole episodes with `config.env_runners(batch_mode="complete_episodes")`, or drop this one'


def holds_episodes(schema: Any) -> bool:
    """Whether files with this Arrow schema hold episodes as msgpack bytes (`output_write_episodes=True`)."""
    return schema.names == [_EPISODE_COLUMN] and _is_text_or_bytes(schema.field(0).type)


def holds_recorded_rows(schema: Any) -> bool:
    """Whether rows with this Arrow schema come from RLlib's recorder, judged by columns that only it writes."""
    if {Columns.AGENT_ID, Columns.MODULE_ID} <= set(schema.names):
        return True
    return Columns.OBS in schema.names and _is_text_or_bytes(schema.field(Columns.OBS).type)


class RecordedRowsReader(ParquetReader):
    """Episodes from rows recorded by RLlib (`output_write_episodes=False`)."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        """Finds the writes that are not repeated later, then checks their columns; see `ParquetReader`."""
        super().__init__(
            name,
            drop_repeated_writes(files, Columns.EPS_ID),
            actions="module",
            decode=_decode_packed,
            unfinished_remedy=_UNFINISHED_REMEDY,
        )


class RecordedEpisodesReader:
    """Episodes that RLlib recorded as msgpack (`output_write_episodes=True`); chunks of one episode are joined."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        """Decodes the first episode for its spaces.

        Raises:
            ImportError: If `msgpack-numpy` is not installed.
            ValueError: If there are no episodes.
        """
        try:
            self._msgpack = importlib.import_module("msgpack")
            self._msgpack_numpy = importlib.import_module("msgpack_numpy")
        except ImportError as err:
            raise ImportError(
                "Reading episodes that RLlib recorded needs the `msgpack-numpy` package: pip install msgpack-numpy"
            ) from err
        self._files = drop_repeated_writes(files, _EPISODE_COLUMN)
        first = next(self._chunks(), None)
        if first is None:
            raise ValueError(f"`input_` {name!r} is empty: its Parquet files have no episodes.")
        self.info = DatasetInfo(
            name=name,
            observation_space=_space_of(first[0].observation_space, first[0].observations[0]),
            action_space=first[0].action_space,
            actions="module",
            num_transitions=None,
        )

    def __iter__(self) -> Iterator[SingleAgentEpisode]:
        """Yields each episode when its last chunk is read.

        Raises:
            ValueError: If an episode is not whole or holds numbers that are not finite.
        """
        unfinished: dict[str, list[tuple[SingleAgentEpisode, str]]] = {}
        finished = set()
        for chunk, where in self._chunks():
            if chunk.id_ in finished:
                raise ValueError(f"Episode {chunk.id_!r} goes on after its end, or occurs twice: again in {where}.")
            chunks = unfinished.setdefault(chunk.id_, [])
            expected_t = chunks[-1][0].t if chunks else chunk.t_started
            if chunk.t_started != expected_t:
                raise ValueError(
                    f"Rows of episode {chunk.id_!r} are out of order or missing: its chunk in {where} starts at time "
                    f"step {chunk.t_started}, expected {expected_t}."
                )
            chunks.append((chunk, where))
            if chunk.is_done:
                finished.add(chunk.id_)
                yield from episodes_of(_block(unfinished.pop(chunk.id_)))
        for chunks in unfinished.values():
            # Raises: an episode that never finished fails the check of its end.
            yield from episodes_of(_block(chunks))

    def _chunks(self) -> Iterator[tuple[SingleAgentEpisode, str]]:
        """Yields non-empty episodes or parts of them, as recorded, and where each was read."""
        for file in self._files:
            with open_parquet(file) as parquet_file:
                row = 0
                for batch in parquet_file.iter_batches(16, columns=[_EPISODE_COLUMN]):
                    for packed in batch.column(0):
                        state = self._msgpack.unpackb(
                            packed.as_py(), object_hook=self._msgpack_numpy.decode, strict_map_key=False
                        )
                        chunk = SingleAgentEpisode.from_state(state)
                        if len(chunk):
                            yield chunk.to_numpy(), f"row {row} of {str(file)!r}"
                        row += 1


def drop_repeated_writes(files: Sequence[Path], id_column: str) -> list[Path]:
    """Leaves out the files of every write whose rows a later, longer write repeats.

    One write of the recorder is one or more files `<write>_<task>-<block>.parquet` in one folder. A write is taken to
    be repeated by another if both its first and its last row stand at the same places there.

    Args:
        files: In the order in which their rows follow each other.
        id_column: A column that tells the rows of different episodes apart.
    """
    writes: dict[tuple[Path, str], list[Path]] = {}
    for file in files:
        writes.setdefault((file.parent, re.sub(r"_\d+-\d+$", "", file.stem)), []).append(file)
    if len(writes) == 1:
        return list(files)

    repeated: set[Path] = set()
    kept_by_first_id: dict[Any, list[_Write]] = {}
    for write in sorted(map(_Write, writes.values()), key=lambda write: write.num_rows, reverse=True):
        if write.num_rows == 0:
            continue
        first_row, last_row = write.row(0), write.row(write.num_rows - 1)
        kept = kept_by_first_id.setdefault(first_row[id_column][0].as_py(), [])
        if any(other.row(0) == first_row and other.row(write.num_rows - 1) == last_row for other in kept):
            repeated.update(write.files)
        else:
            kept.append(write)
    return [file for file in files if file not in repeated]


class _Write:
    """The rows of one write of the recorder, in one or more files."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        stops = []
        for file in files:
            with open_parquet(file) as parquet_file:
                stops.append(parquet_file.metadata.num_rows)
        self._stops = np.cumsum(stops)
        self.num_rows = int(self._stops[-1])

    def row(self, row: int) -> Any:
        """One row as an Arrow table of the columns that identify it."""
        number = int(np.searchsorted(self._stops, row, side="right"))
        first_row = int(self._stops[number - 1]) if number else 0
        names = [_EPISODE_COLUMN, Columns.EPS_ID, Columns.OBS, Columns.ACTIONS, Columns.REWARDS, Columns.NEXT_OBS]
        with open_parquet(self.files[number]) as parquet_file:
            present = parquet_file.schema_arrow.names
            table = parquet_file.read(columns=[name for name in names if name in present])
        return table.slice(row - first_row, 1)


def _decode_packed(field: Any, array: Any, where: Where) -> Nested:
    """Unpacks a column of packed arrays; everything else is a column of numbers."""
    if not _is_text_or_bytes(array.type) or array.null_count:
        return decode_numbers(field, array, where)
    # One row's next observation is the next row's observation, and resting environments repeat themselves.
    encoded = pc.dictionary_encode(array)
    try:
        values = [np.asarray(_unpack(packed)) for packed in encoded.dictionary.to_pylist()]
    except Exception as err:
        raise ValueError(
            f"`{field.name}` holds text that RLlib's recorder did not pack, at or after {where(0)}; store lists of "
            "numbers."
        ) from err
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        raise ValueError(
            f"`{field.name}` has rows of different shapes, {sorted(shapes)}, at or after {where(0)}; every row must "
            "have the same shape."
        )
    return np.stack(values)[encoded.indices.to_numpy()]


def _block(chunks: list[tuple[SingleAgentEpisode, str]]) -> EpisodeBlock:
    """Joins the chunks of one episode; that their ends meet is for the block's check to find out."""
    episodes = [chunk for chunk, _ in chunks]
    lengths = [len(episode) for episode in episodes]
    stops = np.cumsum(lengths)

    def joined(parts: list[Nested]) -> Nested:
        return tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)

    def where(row: int) -> str:
        number = int(np.searchsorted(stops, row, side="right"))
        return f"step {row - int(stops[number]) + lengths[number]} of {chunks[number][1]}"

    num_steps = int(stops[-1])
    ends = np.zeros((2, num_steps), dtype=bool)
    ends[0, stops - 1] = [episode.is_terminated for episode in episodes]
    ends[1, stops - 1] = [episode.is_truncated for episode in episodes]
    return EpisodeBlock(
        ids=[episodes[0].id_],
        lengths=np.array([num_steps]),
        observations=joined([episode.get_observations(slice(0, len(episode))) for episode in episodes]),
        next_observations=joined([episode.get_observations(slice(1, len(episode) + 1)) for episode in episodes]),
        actions=joined([episode.get_actions(slice(0, len(episode))) for episode in episodes]),
        rewards=joined([episode.get_rewards(slice(0, len(episode))) for episode in episodes]),
        terminateds=ends[0],
        truncateds=ends[1],
        extra_model_outputs=_joined_extras(episodes),
        where=where,
        unfinished_remedy=_UNFINISHED_REMEDY,
    )


def _joined_extras(episodes: list[SingleAgentEpisode]) -> dict[str, Any]:
    extras = {}
    for name in episodes[0].extra_model_outputs:
        parts = [episode.get_extra_model_outputs(name) for episode in episodes]
        if all(isinstance(part, np.ndarray) and part.dtype.kind in "fiub" for part in parts):
            extras[name] = np.concatenate(parts)
    return extras


def _space_of(space: gym.Space[Any] | None, observation: Nested) -> gym.Space[Any] | None:
    """The recorded observation space, unless a connector changed the observations without changing it."""
    return space if space is not None and space.contains(observation) else None


def _is_text_or_bytes(type_: Any) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(check(type_) for check in checks)
