"""Data handed over as Python objects: RLlib episodes, and `ray.data.Dataset`s of rows."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

# Checkpoints of before name the handles and values of a config here.
from rllib_calql.common.held_data import DATASET_NAME, EPISODES_NAME, DataHandle, InMemoryDataset, InMemoryEpisodes
from rllib_calql.datasets.episodes.boundaries import whole_episodes
from rllib_calql.datasets.episodes.chunks import extra_columns_of, gather, join_chunks, observation_space_of
from rllib_calql.datasets.episodes.reader import ActionsKind, DatasetInfo, EpisodeBlock, EpisodeReader, ReadOptions
from rllib_calql.datasets.rows.arrow import describe_type
from rllib_calql.datasets.rows.arrow_columns import find_row_columns
from rllib_calql.datasets.rows.arrow_rows import BLOCK_BYTES, ArrowRowsReader
from rllib_calql.datasets.rows.episode_index import is_id_type, runs_of

__all__ = ["DataHandle", "DatasetReader", "DatasetSource", "EpisodesReader", "InMemoryDataset", "InMemoryEpisodes"]

if TYPE_CHECKING:
    import ray.data


class EpisodesReader(EpisodeReader):
    """Episodes from a list; chunks of one episode are joined.

    Actions count as an RLModule's where its outputs stand beside them, as in what env runners sample, and as the
    environment's elsewhere.
    """

    def __init__(self, held: InMemoryEpisodes, options: ReadOptions) -> None:
        """Looks at the first episode for its spaces.

        Raises:
            ValueError: If no episode has a step, or some have an RLModule's actions and others the environment's.
        """
        super().__init__()
        self._episodes = held.episodes
        self._options = options
        for number, episode in enumerate(self._episodes):
            _check_steps_of_its_own(episode, number)
        first = next((episode for episode in self._episodes if len(episode)), None)
        if first is None:
            raise ValueError("`input_` is empty: its episodes have no steps; hand over episodes that have.")
        self.info = DatasetInfo(
            name=EPISODES_NAME,
            observation_space=observation_space_of(first),
            action_space=first.action_space,
            actions=_actions_of(self._episodes),
            num_transitions=sum(map(len, self._episodes)),
            ignored_columns=tuple(extra_columns_of(first, options)[1]),
        )

    @property
    def records_ids(self) -> bool:
        """RLlib gives every episode one of its own."""
        return True

    def blocks(self) -> Iterator[EpisodeBlock]:
        """Yields the episodes in the order in which they end in the list.

        Raises:
            ValueError: If an episode is not whole or holds numbers that are not finite.
        """
        self.remarks.clear()
        chunks = ((episode, f"entry {i} of {EPISODES_NAME}") for i, episode in enumerate(self._episodes))
        for rows in gather(join_chunks(chunks, self._options), unfinished_remedy="drop it or set `is_truncated`"):
            block = whole_episodes(rows, self._options, self.remarks)
            if block is not None:
                yield block


class DatasetReader(ArrowRowsReader):
    """Episodes from the rows of a `ray.data.Dataset`; see `ArrowRowsReader` for the columns.

    The data set is executed for its schema, for the episode ids and for every reading of the rows. Materialise it
    first if that is expensive.
    """

    def __init__(self, held: InMemoryDataset, options: ReadOptions) -> None:
        """Checks the columns.

        Raises:
            ValueError: If a column is missing, or there are no rows.
        """
        super().__init__(DATASET_NAME, DatasetSource(held.dataset, options), options)


class DatasetSource:
    """The rows of a `ray.data.Dataset`, in order."""

    def __init__(self, dataset: ray.data.Dataset, options: ReadOptions) -> None:
        """Reads the schema.

        Raises:
            ValueError: If there are no rows, or they are no tables.
        """
        self.label = DATASET_NAME
        self.num_rows: int | None = None
        self._dataset = dataset
        first = next((table for table in _tables(dataset, num_rows=1) if table.num_rows), None)
        if first is None:
            raise ValueError(f"`input_` {DATASET_NAME} is empty: it has no rows; hand over one that has.")
        self.schema = first.schema
        if {Columns.AGENT_ID, Columns.MODULE_ID} <= set(self.schema.names):
            raise ValueError(
                f"`input_` {DATASET_NAME} has the columns `{Columns.AGENT_ID}` and `{Columns.MODULE_ID}` of what RLlib "
                "records, whose actions are an RLModule's and whose rows may be there repeatedly; give the recorded "
                "folder itself as `input_`."
            )
        self._id_column = find_row_columns(self.schema, options, self.label).known.get(Columns.EPS_ID)
        self._order = _RowOrder()

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Yields record batches of the columns.

        Raises:
            ValueError: If the rows come in another order than those of the ids did, or blocks differ in type.
        """
        is_index = columns == [self._id_column]
        # An execution may order its rows otherwise than the one before, if it shuffles for instance.
        names = columns if is_index or self._id_column is None else [*columns, self._id_column]
        if is_index:
            self._order = _RowOrder()
        row = 0
        for table in _tables(self._dataset, names):
            self._check_types(table.schema, row)
            if self._id_column is not None and is_id_type(table.schema.field(self._id_column).type):
                ids = runs_of(table.column(self._id_column).combine_chunks())
                if is_index:
                    self._order.extend(ids)
                else:
                    self._order.check(row, ids)
            step = int(np.clip(BLOCK_BYTES * table.num_rows // max(table.nbytes, 1), 16, 2**16))
            for batch in table.select(columns).combine_chunks().to_batches(max_chunksize=step):
                yield batch
                row += len(batch)
        if self._id_column is not None:
            self._order.check_end(row)

    def where(self, row: int) -> str:
        """Names a row, counted from 0."""
        return f"row {row} of {DATASET_NAME}"

    def part_of(self, row: int) -> int:
        """All rows count as one file."""
        return 0

    def _check_types(self, schema: Any, row: int) -> None:
        for field in schema:
            expected, found = (describe_type(each.field(field.name).type) for each in (self.schema, schema))
            if found != expected:
                raise ValueError(
                    f"`{field.name}` holds {expected} in {self.where(0)} and {found} from {self.where(row)} on; store "
                    "it in one type."
                )


def _actions_of(episodes: Sequence[SingleAgentEpisode]) -> ActionsKind:
    """What the actions are: env runners keep what the RLModule put out, before it is scaled to the environment."""
    numbers = [number for number, episode in enumerate(episodes) if len(episode)]
    is_module = [Columns.ACTION_DIST_INPUTS in episodes[number].extra_model_outputs for number in numbers]
    if len(set(is_module)) > 1:
        with_, without = (numbers[is_module.index(kind)] for kind in (True, False))
        raise ValueError(
            f"Entry {with_} of {EPISODES_NAME} has `{Columns.ACTION_DIST_INPUTS}`, so its actions are an RLModule's in "
            f"[-1, 1]; entry {without} has not, so its actions are in the environment's units, as an env runner's "
            "random ones are; hand them over as two lists: `input_=[episodes, random_episodes]`."
        )
    return "module" if is_module[0] else "environment"


def _check_steps_of_its_own(episode: SingleAgentEpisode, number: int) -> None:
    """Refuses an episode that RLlib's constructor made empty; a chunk that has just been cut off is empty rightly."""
    has_lookback = len(episode.rewards.data) > 0
    if not len(episode) and has_lookback and (episode.is_done or episode.t_started == 0):
        raise ValueError(
            f"Episode {episode.id_!r} (entry {number} of {EPISODES_NAME}) has no steps: `SingleAgentEpisode` takes all "
            "that it is made with as lookback, unless told otherwise; make it with `len_lookback_buffer=0`."
        )


class _RowOrder:
    """Episode ids in the order of the rows, as runs of equal ids."""

    def __init__(self) -> None:
        self._ids: list[Any] = []
        self._stops: list[int] = []

    def extend(self, runs: Iterable[tuple[Any, int]]) -> None:
        """Appends runs."""
        for id_, length in runs:
            stop = (self._stops[-1] if self._stops else 0) + length
            if self._ids and self._ids[-1] == id_:
                self._stops[-1] = stop
            else:
                self._ids.append(id_)
                self._stops.append(stop)

    def check(self, row: int, runs: Iterable[tuple[Any, int]]) -> None:
        """Raises a ValueError if the runs that begin at a row are not the known ones."""
        for id_, length in runs:
            number = bisect.bisect_right(self._stops, row)
            if number == len(self._ids) or self._ids[number] != id_ or row + length > self._stops[number]:
                raise self._error(row)
            row += length

    def check_end(self, row: int) -> None:
        """Raises a ValueError if rows are missing at the end."""
        if self._stops and row != self._stops[-1]:
            raise self._error(row)

    def _error(self, row: int) -> ValueError:
        return ValueError(
            f"{DATASET_NAME} yields its rows in another order, or other rows, at every reading: row {row} belongs to "
            "another episode than before; hand over `dataset.materialize()`."
        )


def _tables(dataset: ray.data.Dataset, columns: list[str] | None = None, num_rows: int | None = None) -> Iterator[Any]:
    """Yields Arrow tables in the order of the rows.

    Args:
        dataset: Rows.
        columns: Those that are wanted; None: all.
        num_rows: How many rows are wanted; None: all.

    Raises:
        ValueError: If Ray Data cannot make them, as when blocks have different columns or a file cannot be read.
    """
    # The copy has a context of its own, so that the user's keeps its settings.
    ordered = type(dataset).copy(dataset, _deep_copy=True)
    ordered.context.execution_options.preserve_order = True
    ordered.context.enable_progress_bars = False
    try:
        chosen = ordered if columns is None else ordered.select_columns(columns)
        chosen = chosen if num_rows is None else chosen.limit(num_rows)
        tables = iter(chosen.iter_batches(batch_size=None, batch_format="pyarrow"))
        while (table := next(tables, None)) is not None:
            yield table
    except MemoryError:
        raise
    # Whatever the steps of the user's pipeline raise, in Ray's wrapping or as it is.
    except Exception as err:
        *_, reason = str(err).strip().splitlines() or [""]
        raise ValueError(
            f"{DATASET_NAME} cannot be read ({type(err).__name__}: {reason}); all its blocks must have the same "
            "columns and types, and all steps that make it must run: try `dataset.materialize()`."
        ) from err
