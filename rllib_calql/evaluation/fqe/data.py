"""`JudgedData`: what is read of recorded episodes to judge policies by, the same for all of them.

Axes: `R` training rows, `V` held-out rows, `E` held-out episodes, `n` numbers of an observation, `A` of an action.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns

from rllib_calql.common.returns import RewardSettings, discounted_sums
from rllib_calql.evaluation.fqe.off_data import MAX_ASKED, MAX_KNOWN, sample_of, shares_beyond
from rllib_calql.store.offline_table import OfflineTable
from rllib_calql.store.split import Split, split_episodes

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

OWN_FRACTION = 0.1  # Of the episodes, held out where training held out none.
MIN_HELD_OUT_EPISODES = 2  # One episode has no interval.
MAX_HELD_OUT_ROWS = 10_000  # That TD errors are computed on; more tell no more.
_MAX_TRAINING_BYTES = 2**30  # Of what a fit holds in memory.
_MAX_TRAINING_ROWS = 1_000_000
_BLOCK_ROWS = 8192
_MOST_STARTS_OFF_DATA = 0.5


@dataclass(frozen=True)
class Rows:
    """Some transitions of a table, in the units of the environment.

    Attributes:
        observations: In the type of the table, shape (r, n).
        next_observations: Shape (r, n).
        actions: Module actions, shape (r, A).
        rewards: Environment rewards, float32, shape (r,).
        terminateds: 1.0 where an episode ended by termination, shape (r,).
    """

    observations: Array
    next_observations: Array
    actions: Array
    rewards: Array
    terminateds: Array

    def __len__(self) -> int:
        return len(self.rewards)


class JudgedData:
    """A table with its split, read one step at a time and in environment rewards.

    Args:
        table: All offline episodes.
        split: Which of them are held out; None: a tenth of them, drawn here.
        rewards: How training rewards were made, which is undone; its discount is the one that policies are judged with.
        seed: Of the rows that are drawn where there are more than are needed.

    Attributes:
        table: As given.
        split: As given, or as drawn.
        has_own_split: Whether it was drawn here.
        gamma: Discount.
        training_rows: Numbers of the rows that are fitted, ascending.
        held_out_rows: Numbers of the held-out rows that TD errors are computed on, ascending.
        first_observations: Of the held-out episodes, shape (E, n).
        behaviour_returns: Discounted environment returns of the held-out episodes, shape (E,).
        share_cut: What a reward of every step would give after the end of the held-out episodes that were cut, relative
            to what it would give for ever: mean of gamma^T over the episodes, 0 for those that terminated.
        share_far_starts: Share of the held-out episodes whose first observations are farther from all rows of the fit
            than 99 % of their later ones are.
        scale_of_values: Mean and standard deviation of the discounted environment returns-to-go of the training rows.
            The latter is 1 where they are all the same.
        possible_values: Least and largest discounted sum of rewards that are in the data, for episodes of any length.

    Raises:
        ValueError: If there are too few episodes, or those that are held out begin where the others never are.
    """

    def __init__(self, table: OfflineTable, split: Split | None, *, rewards: RewardSettings, seed: int = 0) -> None:
        if rewards.reward_scale == 0.0:
            raise ValueError(
                "`reward_scale` is 0, so the data's rewards are not known any more; they cannot be judged."
            )
        self.has_own_split = split is None
        self.table, self.split = table, split if split is not None else own_split(table, seed)
        self.gamma = rewards.gamma
        self._rewards = rewards
        if len(self.split.held_out_episodes) < MIN_HELD_OUT_EPISODES:
            raise ValueError(
                f"{len(self.split.held_out_episodes)} episode is held out, and the interval of a value needs at least "
                f"{MIN_HELD_OUT_EPISODES}; raise `validation_fraction` {self.split.fraction}, or give more data."
            )
        rng = np.random.default_rng(seed)
        obs_dtype = table.records.dtype[Columns.OBS]
        self.obs_dim, self.action_dim = obs_dtype.shape[0], table.records.dtype[Columns.ACTIONS].shape[0]
        row_bytes = 2 * np.dtype(np.float32).itemsize * (min(self.obs_dim, 1024) + self.action_dim + 2)
        most = min(_MAX_TRAINING_ROWS, _MAX_TRAINING_BYTES // row_bytes)
        self.training_rows = _drawn(self.split.training_rows(), most, rng)
        self.held_out_rows = _drawn(self.split.held_out_rows(), MAX_HELD_OUT_ROWS, rng)
        stops = np.cumsum(table.lengths, dtype=np.int64)
        lengths = table.lengths[self.split.held_out_episodes]
        starts = stops[self.split.held_out_episodes] - lengths
        self.first_observations = self.rows(starts).observations
        recorded = self._environment_rewards(
            np.concatenate(
                [table.records[Columns.REWARDS][start : start + n] for start, n in zip(starts, lengths, strict=True)]
            )
        )
        self.behaviour_returns = discounted_sums(recorded, lengths, self.gamma)[np.cumsum(lengths) - lengths]
        is_cut = ~table.terminateds[self.split.held_out_episodes]
        self.share_cut = float(np.mean(is_cut * self.gamma ** lengths.astype(np.float64)))
        self.share_far_starts = self._share_far_starts(starts, stops - table.lengths, rng)
        self.scale_of_values, self.possible_values = self._reward_summaries()

    @property
    def num_training_rows(self) -> int:
        """Of the table, of which a fit may take fewer."""
        return self.split.num_training_rows

    def rows(self, numbers: Integers) -> Rows:
        """Transitions of one step, by their numbers."""
        obs = self.table.records.dtype[Columns.OBS]
        out = {
            Columns.OBS: np.empty((len(numbers), *obs.shape), obs.base),
            Columns.NEXT_OBS: np.empty((len(numbers), *obs.shape), obs.base),
            Columns.ACTIONS: np.empty((len(numbers), self.action_dim), np.float32),
            Columns.REWARDS: np.empty(len(numbers), np.float32),
            Columns.TERMINATEDS: np.empty(len(numbers), np.float32),
            Columns.RETURNS_TO_GO: np.empty(len(numbers), np.float32),
        }
        self.table.gather(numbers, out)
        return Rows(
            out[Columns.OBS],
            out[Columns.NEXT_OBS],
            out[Columns.ACTIONS],
            self._environment_rewards(out[Columns.REWARDS]).astype(np.float32),
            out[Columns.TERMINATEDS],
        )

    def blocks(self, numbers: Integers) -> Iterator[tuple[slice, Rows]]:
        """The same, a few thousand rows at a time, each with its place among all of them."""
        for start in range(0, len(numbers), _BLOCK_ROWS):
            here = slice(start, min(start + _BLOCK_ROWS, len(numbers)))
            yield here, self.rows(numbers[here])

    def _reward_summaries(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """`scale_of_values` and `possible_values`, by one look at all rewards."""
        recorded = self._environment_rewards(np.asarray(self.table.records[Columns.REWARDS]))
        returns = discounted_sums(recorded, self.table.lengths, self.gamma)[self.training_rows]
        std = float(returns.std())
        std = std if std > 1e-9 * max(1e-30, float(np.abs(returns).max())) else 1.0
        steps = 1.0 / (1.0 - self.gamma) if self.gamma < 1.0 else float(self.table.lengths.max())
        low, high = float(recorded.min()), float(recorded.max())
        return (float(returns.mean()), std), (min(low, low * steps), max(high, high * steps))

    def _environment_rewards(self, training_rewards: Array) -> npt.NDArray[np.float64]:
        """The inverse of `RewardSettings.transform`."""
        environment: npt.NDArray[np.float64] = (
            np.asarray(training_rewards, dtype=np.float64) - self._rewards.reward_bias
        ) / self._rewards.reward_scale
        return environment

    def _share_far_starts(self, held_out: Integers, starts: Integers, rng: np.random.Generator) -> float:
        """How many held-out episodes begin far from all other rows, by what is far for their later rows.

        Starts may lie apart, as those of a regulator that is soon at its set-point: then other episodes' starts are as
        far from each other, and the values of the held-out ones are read between them. Those that are farther are
        refused, since a value there would be made up.
        """
        is_picture = not np.issubdtype(self.first_observations.dtype, np.floating)
        later = np.setdiff1d(self.held_out_rows, held_out)
        if is_picture or len(later) == 0:
            return 0.0  # Distances of pictures mean little, and without later steps there is nothing to compare with.
        known = self.training_rows[sample_of(len(self.training_rows), MAX_KNOWN, rng)]
        others = np.setdiff1d(starts, held_out)
        others = others[sample_of(len(others), MAX_ASKED, rng)]
        share, share_unknown = shares_beyond(
            self.rows(np.concatenate([known, others])).observations,
            self.rows(later[sample_of(len(later), MAX_ASKED, rng)]).observations,
            self.rows(others).observations,
            self.first_observations,
            rng=rng,
        )
        if share_unknown > _MOST_STARTS_OFF_DATA:
            raise ValueError(
                f"{share_unknown:.0%} of the held-out episodes begin in states that the other episodes never come "
                "near, so the data say nothing about values there; give data of several episodes from each start, or "
                "judge the policy in its environment, by `rllib evaluate` or `rllib select`."
            )
        return share


def own_split(table: OfflineTable, seed: int = 0) -> Split:
    """A tenth of the episodes, at least two, for data of which training has held out none.

    Raises:
        ValueError: If there are fewer than three episodes.
    """
    num_episodes = len(table.lengths)
    if num_episodes <= MIN_HELD_OUT_EPISODES:
        raise ValueError(
            f"The data hold {num_episodes} {'episode' if num_episodes == 1 else 'episodes'}; judging by data needs at "
            f"least {MIN_HELD_OUT_EPISODES + 1}, one to fit values to and {MIN_HELD_OUT_EPISODES} to read them at. "
            "Give more data, or cut it into episodes."
        )
    number = max(MIN_HELD_OUT_EPISODES, round(OWN_FRACTION * num_episodes))
    split = split_episodes(table.lengths, fraction=number / num_episodes, seed=seed)
    assert split is not None
    return split


def _drawn(rows: Integers, most: int, rng: np.random.Generator) -> Integers:
    """At most so many of the rows, in order."""
    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))
