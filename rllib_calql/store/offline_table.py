"""`OfflineTable`: the transitions of all offline episodes, in memory or in memory-mapped files, and how it is filled.

One record per transition holds observation, action, reward and return; the next observation is the observation of the
record after it, or the episode's final one. So every observation is kept once, and a drawn transition is one stretch of
memory, or of a file, and not one per column.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns

from rllib_calql.common.target_steps import TargetSteps
from rllib_calql.networks.steps import BOOTSTRAP_DISCOUNT, BOOTSTRAP_OBS
from rllib_calql.store.split import Split

Array = npt.NDArray[Any]
RECORDS = "records"
FINAL_OBSERVATIONS = "final_observations"

_FAULT_BYTES = 64 * 2**10  # The kernel maps this much around a page that is touched (fault-around).
_MIN_ROWS_AT_ONCE = 256
_ONE_STEP = TargetSteps()
_STATISTICS_ROWS = 2**16
_FINGERPRINT_BYTES = 4 * 2**20


@dataclass(frozen=True)
class EpisodeColumns:
    """What the store keeps of E whole episodes, one after another; R rows.

    Attributes:
        lengths: [E] Steps of each episode, at least 1.
        observations: [R, obs_dim]
        final_observations: [E, obs_dim], the observation after each episode's last step.
        actions: [R, action_dim], module actions.
        rewards: [R], scaled.
        returns_to_go: [R], the reference value, without the value of any last observation.
        terminateds: [E]
        has_tail: [E] Whether the value of the last observation is to be added to the episode's returns.
        possible_returns: Least and largest return that they let one expect, see `returns.possible_returns`.
    """

    lengths: npt.NDArray[np.int64]
    observations: Array
    final_observations: Array
    actions: Array
    rewards: Array
    returns_to_go: Array
    terminateds: npt.NDArray[np.bool_]
    has_tail: npt.NDArray[np.bool_]
    possible_returns: tuple[float, float] = (0.0, 0.0)


def record_dtype(observations: Array, action_dim: int) -> np.dtype[Any]:
    """Layout of one transition, observations in their own type."""
    return np.dtype(
        [
            (Columns.OBS, observations.dtype, observations.shape[1:]),
            (Columns.ACTIONS, np.float32, (action_dim,)),
            (Columns.REWARDS, np.float32),
            (Columns.RETURNS_TO_GO, np.float32),
        ]
    )


class OfflineTable:
    """Transitions of whole episodes, which do not change.

    Args:
        records: [R] of `record_dtype`, an array or a memory map.
        final_observations: [E, obs_dim], an array or a memory map.
        lengths: [E] Steps of each episode.
        terminateds: [E]
        has_tail: [E] Whether returns hold a value of the last observation, see `refresh_tails`.
        gamma: Discount of that value.
        possible_returns: [2] Least and largest return to expect.
        memory_limit: Bytes that pages of a memory map may occupy; they are let go before there are more.
    """

    def __init__(
        self,
        records: Array,
        final_observations: Array,
        *,
        lengths: npt.NDArray[np.int64],
        terminateds: npt.NDArray[np.bool_],
        has_tail: npt.NDArray[np.bool_],
        gamma: float,
        possible_returns: Array | Sequence[float] = (0.0, 0.0),
        memory_limit: int | None = None,
    ) -> None:
        self.records = records
        self.final_observations = final_observations
        self.lengths = lengths
        self.terminateds = terminateds
        self.has_tail = has_tail
        self.possible_returns = (float(possible_returns[0]), float(possible_returns[1]))
        self._gamma = gamma
        self._stops = np.cumsum(lengths, dtype=np.int64)
        self._tail_values: Array | None = None
        self._both_fingerprints: tuple[str, str] | None = None
        # Rows as bytes: `take` then copies whole records, several times faster than NumPy gathers structured ones.
        self._bytes = np.asarray(records).view(np.uint8).reshape(len(records), records.dtype.itemsize)
        self._maps: list[mmap.mmap] = [m for m in (_map_of(records), _map_of(final_observations)) if m is not None]
        self._memory_limit = memory_limit if self._maps else None

    def __len__(self) -> int:
        """R."""
        return len(self.records)

    @property
    def is_mapped(self) -> bool:
        """Whether the records lie in files."""
        return bool(self._maps)

    @property
    def nbytes(self) -> int:
        """Bytes of records and final observations."""
        return int(self.records.nbytes + self.final_observations.nbytes)

    def gather(self, rows: npt.NDArray[np.int64], out: Mapping[str, Array], steps: TargetSteps = _ONE_STEP) -> None:
        """Writes transitions into columns, converting observations to the columns' type.

        Args:
            rows: [n] Row numbers.
            out: Arrays of n rows: obs, next_obs, actions, rewards, terminateds, returns_to_go; with targets of several
                steps also `BOOTSTRAP_DISCOUNT` and, where it is wanted, `BOOTSTRAP_OBS`.
            steps: Of the targets that rewards and terminations are for.
        """
        at_once = self._rows_at_once(steps.n_step) or max(1, len(rows))
        for start in range(0, len(rows), at_once):
            piece = slice(start, start + at_once)
            columns = {name: column[piece] for name, column in out.items()}
            episodes = np.searchsorted(self._stops, rows[piece], side="right")
            self._gather(rows[piece], episodes, columns)
            if steps.n_step > 1:
                self._gather_targets(rows[piece], episodes, columns, steps)
            self._let_go()

    def _rows_at_once(self, n_step: int) -> int | None:
        """Rows whose pages are within the memory limit; None without one."""
        if self._memory_limit is None:
            return None
        pages_per_row = 1 + n_step * self.records.dtype.itemsize // _FAULT_BYTES
        return max(_MIN_ROWS_AT_ONCE, self._memory_limit // (4 * _FAULT_BYTES * pages_per_row))

    def rows_of_last_reward(self, rows: npt.NDArray[np.int64], steps: TargetSteps) -> npt.NDArray[np.int64]:
        """The rows whose rewards are the last in the targets of these rows."""
        episodes = np.searchsorted(self._stops, rows, side="right")
        return rows + steps.num_rewards(self._stops[episodes] - rows) - 1

    def _gather_targets(
        self,
        rows: npt.NDArray[np.int64],
        episodes: npt.NDArray[np.int64],
        out: Mapping[str, Array],
        steps: TargetSteps,
    ) -> None:
        """Overwrites rewards and terminations with those of several steps, and adds what goes with them."""
        num_rewards = steps.num_rewards(self._stops[episodes] - rows)
        following = rows + num_rewards
        is_end = following == self._stops[episodes]
        rewards = self.records[Columns.REWARDS]
        out[Columns.REWARDS][...] = steps.sum_rewards(num_rewards, lambda k, places: rewards[rows[places] + k])
        out[Columns.TERMINATEDS][...] = is_end & self.terminateds[episodes]
        out[BOOTSTRAP_DISCOUNT][...] = steps.bootstrap_discounts(num_rewards)
        if BOOTSTRAP_OBS in out:
            out[BOOTSTRAP_OBS][...] = self._take(np.minimum(following, len(self) - 1))[Columns.OBS]
            out[BOOTSTRAP_OBS][is_end] = self.final_observations[episodes[is_end]]

    def _gather(self, rows: npt.NDArray[np.int64], episodes: npt.NDArray[np.int64], out: Mapping[str, Array]) -> None:
        is_last = rows + 1 == self._stops[episodes]
        records = self._take(rows)
        for name in (Columns.OBS, Columns.ACTIONS, Columns.REWARDS):
            out[name][...] = records[name]
        out[Columns.NEXT_OBS][...] = self._take(np.minimum(rows + 1, len(self) - 1))[Columns.OBS]
        out[Columns.NEXT_OBS][is_last] = self.final_observations[episodes[is_last]]
        out[Columns.TERMINATEDS][...] = is_last & self.terminateds[episodes]
        out[Columns.RETURNS_TO_GO][...] = self._with_tails(records[Columns.RETURNS_TO_GO], rows, episodes)

    def _take(self, rows: npt.NDArray[np.int64]) -> Array:
        taken: Array = np.take(self._bytes, rows, axis=0).view(self.records.dtype)[:, 0]
        return taken

    def _with_tails(self, returns: Array, rows: npt.NDArray[np.int64], episodes: npt.NDArray[np.int64]) -> Array:
        if self._tail_values is None:
            return returns
        with_tails: Array = returns + self._gamma ** (self._stops[episodes] - rows) * self._tail_values[episodes]
        return with_tails

    def refresh_tails(self, estimate_values: Callable[[Array], Array]) -> None:
        """Renews the value of the last observation in the returns of all episodes that have such a tail.

        Args:
            estimate_values: Maps observations (n, obs_dim) to values (n,).
        """
        episodes = np.flatnonzero(self.has_tail)
        if len(episodes) == 0:
            return
        self._tail_values = np.zeros(len(self.lengths))
        self._tail_values[episodes] = estimate_values(np.asarray(self.final_observations[episodes]))
        self._let_go()

    def column(self, name: str) -> Array:
        """A whole column in memory, shape (R, ...), read-only; for tests and diagnostics."""
        obs, actions = self.records.dtype[Columns.OBS], self.records.dtype[Columns.ACTIONS]
        layout = {
            Columns.OBS: (obs.base, obs.shape),
            Columns.NEXT_OBS: (obs.base, obs.shape),
            Columns.ACTIONS: (actions.base, actions.shape),
            Columns.REWARDS: (np.float32, ()),
            Columns.TERMINATEDS: (np.float32, ()),
            Columns.RETURNS_TO_GO: (np.float32, ()),
        }
        columns = {key: np.empty((len(self), *shape), dtype) for key, (dtype, shape) in layout.items()}
        self.gather(np.arange(len(self)), columns)
        column: Array = columns[name]
        column.flags.writeable = False
        return column

    def episode_returns(self, split: Split | None = None) -> npt.NDArray[np.float64]:
        """Return-to-go of each episode's first row, without the value of any last observation, shape (E,).

        Args:
            split: Whose held-out episodes are left out.
        """
        returns = self.records[Columns.RETURNS_TO_GO][self._stops - self.lengths].astype(np.float64)
        self._let_go()
        return np.asarray(returns if split is None else np.delete(returns, split.held_out_episodes))

    def observation_statistics(self, split: Split | None = None) -> tuple[Array, Array]:
        """Mean and standard deviation of the observations in float64, each of shape (obs_dim,), in two passes.

        Args:
            split: Whose held-out rows are left out; None: all rows count.
        """
        num_rows = len(self) if split is None else split.num_training_rows
        sums = (obs.sum(axis=0, dtype=np.float64) for obs in self._observations(split))
        mean = sum(sums, np.float64(0.0)) / num_rows
        squares = sum((((obs - mean) ** 2).sum(axis=0) for obs in self._observations(split)), np.float64(0.0))
        return np.asarray(mean), np.sqrt(squares / num_rows)

    def fingerprint(self) -> str:
        """Digest of all transitions and episodes, the same wherever and from what files they were loaded."""
        return self._fingerprints()[0]

    def behaviour_fingerprint(self) -> str:
        """Digest of the actions and of the episodes' lengths and ends: the same whatever rewards are made of them."""
        return self._fingerprints()[1]

    def _fingerprints(self) -> tuple[str, str]:
        if self._both_fingerprints is None:
            digest = hashlib.blake2b(repr(self.records.dtype.descr).encode(), digest_size=16)
            of_behaviour = hashlib.blake2b(digest_size=16)
            for array in (self._bytes, np.asarray(self.final_observations)):
                rows_at_once = max(1, _FINGERPRINT_BYTES // max(1, array[:1].nbytes))
                for start in range(0, len(array), rows_at_once):
                    digest.update(np.ascontiguousarray(array[start : start + rows_at_once]).data)
                    if array is self._bytes:
                        actions = self.records[Columns.ACTIONS][start : start + rows_at_once]
                        of_behaviour.update(np.ascontiguousarray(actions).data)
                    self._let_go()
            for array in (self.lengths, self.terminateds, self.has_tail):
                digest.update(np.ascontiguousarray(array).data)
            for array in (self.lengths, self.terminateds):
                of_behaviour.update(np.ascontiguousarray(array).data)
            self._both_fingerprints = digest.hexdigest(), of_behaviour.hexdigest()
        return self._both_fingerprints

    def _observations(self, split: Split | None) -> Iterator[Array]:
        for start in range(0, len(self), _STATISTICS_ROWS):
            observations = self.records[Columns.OBS][start : start + _STATISTICS_ROWS]
            rows = np.arange(start, start + len(observations))
            yield observations if split is None else observations[split.is_training_row(rows)]
            self._let_go()

    def _let_go(self) -> None:
        """Unmaps the pages that were touched. They stay in the page cache, from where they are mapped again."""
        if self._memory_limit is not None:
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


class RecordSink(Protocol):
    """Takes what does not fit into memory; `TableCache.build` has one."""

    def write(self, name: str, array: Array) -> None:
        """Appends the rows of a C-contiguous array to the file of that name."""
        ...


class OfflineTableBuilder:
    """Fills an `OfflineTable` episode by episode: in memory as long as it fits, then in files.

    Args:
        action_dim: Size of an action.
        num_rows: Rows to expect at most, if known; room for them is taken at once.
    """

    def __init__(self, *, action_dim: int, num_rows: int | None = None) -> None:
        self._action_dim = action_dim
        self._num_expected = num_rows or 0
        self._records: Array | None = None
        self._sink: RecordSink | None = None
        self._final_observations: list[Array] = []
        self._episodes: list[tuple[Array, Array, Array]] = []
        self._possible_returns: list[tuple[float, float]] = []
        self.dtype: np.dtype[Any] | None = None
        self.num_rows = 0

    def nbytes_with(self, columns: EpisodeColumns) -> int:
        """Bytes of the records once these episodes, and all that are expected, have been added."""
        itemsize = (self.dtype or record_dtype(columns.observations, self._action_dim)).itemsize
        return max(self._num_expected, self.num_rows + len(columns.rewards)) * itemsize

    def add(self, columns: EpisodeColumns) -> None:
        """Adds whole episodes; observations are converted to the type of the first ones.

        Raises:
            OSError: If they are written to a disk, and it is full.
        """
        if self.dtype is None:
            self.dtype = record_dtype(columns.observations, self._action_dim)
        num_new = len(columns.rewards)
        rows = self._room_for(num_new) if self._sink is None else np.empty(num_new, dtype=self.dtype)
        rows[Columns.OBS] = columns.observations
        rows[Columns.ACTIONS] = columns.actions
        rows[Columns.REWARDS] = columns.rewards
        rows[Columns.RETURNS_TO_GO] = columns.returns_to_go
        final = columns.final_observations.astype(self.dtype[Columns.OBS].base)
        if self._sink is None:
            self._final_observations.append(final)
        else:
            self._sink.write(RECORDS, rows)
            self._sink.write(FINAL_OBSERVATIONS, final)
        self.num_rows += num_new
        self._possible_returns.append(columns.possible_returns)
        self._episodes.append((columns.lengths, columns.terminateds, columns.has_tail))

    def move_to(self, sink: RecordSink) -> None:
        """Hands the records so far, and all that follow, to `sink`."""
        if self._records is not None:
            sink.write(RECORDS, self._records[: self.num_rows])
            sink.write(FINAL_OBSERVATIONS, np.concatenate(self._final_observations))
        self._records, self._final_observations, self._sink = None, [], sink

    def episodes(self) -> dict[str, Any]:
        """`lengths`, `terminateds` and `has_tail` of the episodes so far, and `possible_returns` of them all."""
        lengths, terminateds, has_tail = (np.concatenate(parts) for parts in zip(*self._episodes, strict=True))
        possible = np.array([np.min(self._possible_returns), np.max(self._possible_returns)])
        return {"lengths": lengths, "terminateds": terminateds, "has_tail": has_tail, "possible_returns": possible}

    def build(self, *, gamma: float) -> OfflineTable:
        """The table of records held in memory."""
        assert self._records is not None
        self._records.resize(self.num_rows, refcheck=False)
        final_observations = np.concatenate(self._final_observations)
        return OfflineTable(self._records, final_observations, gamma=gamma, **self.episodes())

    def _room_for(self, num_new: int) -> Array:
        needed = self.num_rows + num_new
        if self._records is None:
            # Untouched rows cost no memory until they are written.
            self._records = np.empty(max(needed, self._num_expected), dtype=self.dtype)
        elif len(self._records) < needed:
            # In place: large blocks are moved by their page table, so that there are never two copies. In small steps,
            # because NumPy fills the new rows with zeros, which takes memory at once.
            self._records.resize(max(needed, len(self._records) * 9 // 8), refcheck=False)
        return self._records[self.num_rows : needed]


def _map_of(array: Array) -> mmap.mmap | None:
    base: Any = array
    while base is not None:
        if isinstance(base, mmap.mmap):
            return base
        base = getattr(base, "base", None)
    return None
