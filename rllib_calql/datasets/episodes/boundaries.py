"""From rows with flags to whole episodes: what ends an episode, and what is done where the data are incomplete."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.reader import (
    DROPPED,
    DROPPED_STEPS,
    LOST_REWARDS,
    REPEATED,
    TRUNCATED,
    EpisodeBlock,
    Nested,
    ReadOptions,
    check_finite,
)

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class RowBlock:
    """Rows that are divided into episodes already, as formats of rows store them; R rows of E episodes.

    Attributes:
        ids: One id per episode.
        lengths: [E] Number of rows of each episode, at least 1.
        observations: [R, ...], possibly nested.
        next_observations: [R, ...], the observation after each row's action, or None if the format has none.
        actions: [R, ...], possibly nested.
        rewards: [R] or [R, 1]
        terminateds: [R]
        truncateds: [R]
        where: Says where a row of this block was read.
        extra_model_outputs: Further columns, [R, ...] each.
        unfinished_remedy: What to do about an episode that ends neither terminated nor truncated.
    """

    ids: list[str]
    lengths: NDArray[np.int64]
    observations: Nested
    next_observations: Nested | None
    actions: Nested
    rewards: NDArray[Any]
    terminateds: Bools
    truncateds: Bools
    where: Callable[[int], str]
    extra_model_outputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    unfinished_remedy: str = "drop it or mark its last step"

    def id_of(self, row: int) -> str:
        """Id of the episode that a row belongs to."""
        return self.ids[int(np.searchsorted(np.cumsum(self.lengths), row, side="right"))]


def whole_episodes(rows: RowBlock, options: ReadOptions, remarks: Counter[str]) -> EpisodeBlock | None:
    """Checks rows and completes what is incomplete, by the rules in `options`.

    Args:
        rows: Whole episodes, or what there is of them.
        options: What is done about missing ends and missing final observations.
        remarks: Counts what was done.

    Returns:
        The episodes; None if none is left.

    Raises:
        ValueError: If numbers are not finite, rows are out of order or missing, an episode goes on after its end, or
            it has no end and `options` do not say what to do then.
    """
    last_rows = np.cumsum(rows.lengths) - 1
    rewards = rows.rewards[:, 0] if rows.rewards.shape[1:] == (1,) else rows.rewards
    block = EpisodeBlock(
        ids=rows.ids,
        lengths=rows.lengths,
        observations=rows.observations,
        final_observations=_take(
            rows.observations if rows.next_observations is None else rows.next_observations, last_rows
        ),
        actions=rows.actions,
        rewards=rewards,
        terminateds=rows.terminateds[last_rows],
        truncateds=rows.truncateds[last_rows],
        where=rows.where,
        extra_model_outputs=rows.extra_model_outputs,
    )
    check_finite(block)
    _check_order_and_ends(rows, last_rows, options.observation_jump)
    unfinished = ~(block.terminateds | block.truncateds)
    if unfinished.any():
        block = _finish(rows, block, unfinished, options, remarks)
    if rows.next_observations is None and len(block.lengths):
        block = _complete_final_observations(block, options, remarks)
    return block if len(block.lengths) else None


def jumps(obs: Nested, next_obs: Nested, tolerance: float) -> Bools:
    """Whether `next_obs[t]` is not `obs[t + 1]`, shape (R - 1,) for R rows.

    Args:
        obs: [R, ...], possibly nested.
        next_obs: [R, ...] in the same structure.
        tolerance: Allowed difference of a number, relative to max(1, |obs|). Not finite numbers differ.
    """
    differs: Bools | None = None
    for array, next_array in zip(tree.flatten(obs), tree.flatten(next_obs), strict=True):
        following, after = array[1:], next_array[:-1]
        # Equality is cheap and the rule; only the exceptions are measured.
        unequal: Bools = (following != after).any(axis=tuple(range(1, array.ndim)))
        rows = np.flatnonzero(unequal)
        if len(rows) and array.dtype.kind == "f":
            there = following[rows].reshape(len(rows), -1).astype(np.float64)
            distance = np.abs(there - after[rows].reshape(len(rows), -1))
            unequal[rows] = ~(distance <= tolerance * np.maximum(1.0, np.abs(there))).all(axis=1)
        differs = unequal if differs is None else differs | unequal
    assert differs is not None
    return differs


def _check_order_and_ends(rows: RowBlock, last_rows: NDArray[np.int64], tolerance: float) -> None:
    done = rows.terminateds | rows.truncateds
    ended_early = np.setdiff1d(np.flatnonzero(done), last_rows, assume_unique=True)
    if rows.next_observations is not None:
        broken = np.append(jumps(rows.observations, rows.next_observations, tolerance), False)
        broken[last_rows] = False
        # Two episodes under one id break the chain exactly where the first of them ends; anything else is disorder.
        broken[ended_early] = False
        if broken.any():
            row = int(np.argmax(broken))
            _check_next_obs_is_finite(rows, row)
            raise ValueError(
                f"Rows of episode {rows.id_of(row)!r} are out of order or missing: `{Columns.NEXT_OBS}` in "
                f"{rows.where(row)} is not the `{Columns.OBS}` that follows in {rows.where(row + 1)}; store the rows "
                f"of an episode in order of time, or number them in a column `{Columns.T}`."
            )
    if ended_early.size:
        row = int(ended_early[0])
        flag = Columns.TERMINATEDS if rows.terminateds[row] else Columns.TRUNCATEDS
        raise ValueError(
            f"Episode {rows.id_of(row)!r} goes on after its end: `{flag}` is true in {rows.where(row)}, which is "
            f"not its last row; set the flag on the last row only, or give every episode its own `{Columns.EPS_ID}`."
        )


def _check_next_obs_is_finite(rows: RowBlock, row: int) -> None:
    """Tells NaN, which is the observation of no row, from disorder."""
    for array in tree.flatten(rows.next_observations):
        values = np.atleast_1d(array[row])
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(
                f"`{Columns.NEXT_OBS}` holds {values[~np.isfinite(values)][0]} in episode {rows.id_of(row)!r}, "
                f"{rows.where(row)}; observations must be finite: repair the value or drop the episode."
            )


def _finish(
    rows: RowBlock, block: EpisodeBlock, unfinished: Bools, options: ReadOptions, remarks: Counter[str]
) -> EpisodeBlock:
    if options.unfinished_episodes == "truncate":
        remarks[TRUNCATED] += int(unfinished.sum())
        return replace(block, truncateds=block.truncateds | unfinished)
    if options.unfinished_episodes == "drop":
        remarks[DROPPED] += int(unfinished.sum())
        return _kept(block, episodes=~unfinished, rows=np.repeat(~unfinished, block.lengths), lengths=block.lengths)
    episode = int(np.argmax(unfinished))
    row = int(np.cumsum(block.lengths)[episode]) - 1
    raise ValueError(
        f"Episode {block.ids[episode]!r} ends neither terminated nor truncated (its last step is "
        f"{block.where(row)}), so its return-to-go is unknown; {rows.unfinished_remedy}, or set "
        '`unfinished_episodes="truncate"` (or "drop").'
    )


def _complete_final_observations(block: EpisodeBlock, options: ReadOptions, remarks: Counter[str]) -> EpisodeBlock:
    """`final_observations` are those of the last rows so far."""
    cut = ~block.terminateds
    if options.missing_final_observation == "repeat" or not cut.any():
        remarks[REPEATED] += len(cut)
        return block
    remarks[REPEATED] += int((~cut).sum())
    remarks[DROPPED_STEPS] += int(cut.sum())
    if lost := _num_lost_rewards(block, cut):
        remarks[LOST_REWARDS] += lost
    rows = np.ones(block.num_rows, dtype=bool)
    rows[(np.cumsum(block.lengths) - 1)[cut]] = False
    lengths = block.lengths - cut
    return _kept(block, episodes=lengths > 0, rows=rows, lengths=lengths)


def _num_lost_rewards(block: EpisodeBlock, cut: Bools) -> int:
    """Cut episodes in whose last row alone the reward differs: without it, a success would look like a failure."""
    last_rows = np.cumsum(block.lengths) - 1
    starts = last_rows - block.lengths + 1
    changes = np.append(block.rewards[1:] != block.rewards[:-1], False)
    changes[last_rows] = False
    num_changes = np.add.reduceat(changes, starts, dtype=np.int64)
    # At least two equal rewards before, as a sparse reward has.
    is_lost = cut & (block.lengths > 2) & (num_changes == 1) & changes[np.maximum(last_rows - 1, 0)]
    return int(is_lost.sum())


def _kept(block: EpisodeBlock, *, episodes: Bools, rows: Bools, lengths: NDArray[np.int64]) -> EpisodeBlock:
    """The block without some episodes and rows; `lengths` are those of all episodes without the rows."""
    kept = np.flatnonzero(rows)
    where = block.where
    return EpisodeBlock(
        ids=[id_ for id_, keep in zip(block.ids, episodes, strict=True) if keep],
        lengths=lengths[episodes],
        observations=_take(block.observations, kept),
        final_observations=_take(block.final_observations, episodes),
        actions=_take(block.actions, kept),
        rewards=block.rewards[kept],
        terminateds=block.terminateds[episodes],
        truncateds=block.truncateds[episodes],
        where=lambda row: where(int(kept[row])),
        extra_model_outputs={name: column[kept] for name, column in block.extra_model_outputs.items()},
    )


def _take(values: Nested, index: NDArray[Any]) -> Nested:
    return tree.map_structure(lambda array: array[index], values)
