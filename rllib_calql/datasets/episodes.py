"""What every reader of offline data shares: its description, and the way from checked arrays to RLlib episodes.

A reader turns its format into `EpisodeBlock`s, rows of whole episodes one after another. `episodes_of` checks a block
as a whole (vectorised over all of its rows) and cuts it into `SingleAgentEpisode`s that already hold NumPy arrays.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import gymnasium as gym
import numpy as np
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

Nested: TypeAlias = Any
"""An array, or dicts and tuples of arrays; every array has one row per time step."""

ActionsKind: TypeAlias = Literal["environment", "module"]


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a data set before its episodes are read.

    Attributes:
        name: The input as the user wrote it, e.g. "minari:rllib-calql/pointmaze-umaze-play-v0" or a path.
        observation_space: Space of the observations, where the format records it.
        action_space: The environment's action space, where the format records it. It describes the actions in the
            data only if `actions` is "environment".
        actions: "environment" if actions are in the environment's own bounds, "module" if they are what an RLModule
            put out and RLlib scales to the environment's bounds, where [-1, 1] stands for the whole range. Values
            outside [-1, 1] occur (PPO's Gaussian has no bounds): RLlib clips them on the way to the environment.
        num_transitions: Number of transitions, if it is known before reading.
        reference_scores: Returns (min, max) that stand for a normalised score of 0 and 1, if recorded.
    """

    name: str
    observation_space: gym.Space[Any] | None
    action_space: gym.Space[Any] | None
    actions: ActionsKind
    num_transitions: int | None
    reference_scores: tuple[float, float] | None = None


class EpisodeReader(Protocol):
    """Whole, finished episodes of one input, in file order; it can be iterated again and again."""

    @property
    def info(self) -> DatasetInfo:
        """What is known before reading."""
        ...

    def __iter__(self) -> Iterator[SingleAgentEpisode]:
        """Yields terminated or truncated episodes that hold NumPy arrays in the dtypes of the storage.

        Raises:
            ValueError: If the data are not whole episodes of finite numbers; the message names episode and row.
        """
        ...


@dataclass(frozen=True)
class EpisodeBlock:
    """Rows of one or more whole episodes, one after another; R is the number of rows, the sum of `lengths`.

    Attributes:
        ids: One id per episode.
        lengths: Number of rows of each episode, at least 1.
        observations: [R, ...], possibly nested.
        next_observations: [R, ...], the observation after each row's action.
        actions: [R, ...], possibly nested.
        rewards: [R]
        terminateds: [R] bool
        truncateds: [R] bool
        extra_model_outputs: Further columns, [R, ...] each.
        where: Says where a row of this block was read, e.g. "row 17 of data/part-2.parquet".
        unfinished_remedy: What to do about an episode that ends neither terminated nor truncated.
    """

    ids: list[str]
    lengths: NDArray[np.int64]
    observations: Nested
    next_observations: Nested
    actions: Nested
    rewards: NDArray[Any]
    terminateds: NDArray[np.bool_]
    truncateds: NDArray[np.bool_]
    where: Callable[[int], str]
    extra_model_outputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    unfinished_remedy: str = "drop it or mark its last step"


def episodes_of(block: EpisodeBlock) -> Iterator[SingleAgentEpisode]:
    """Checks a block and yields its episodes, with copies of the rows.

    Raises:
        ValueError: If numbers are not finite, rows are out of order or missing, an episode goes on after its end, or
            it has no end.
    """
    check_block(block)
    stops = np.cumsum(block.lengths).tolist()
    starts = [0, *stops[:-1]]
    for id_, start, stop in zip(block.ids, starts, stops, strict=True):
        yield _episode(block, id_, start, stop)


def check_block(block: EpisodeBlock) -> None:
    """Raises a ValueError that names episode and row if the rows are not whole episodes of finite numbers."""
    if block.rewards.ndim != 1:
        raise ValueError(
            f"`{Columns.REWARDS}` must hold one number per row, got arrays of shape {block.rewards.shape[1:]} in "
            f"{block.where(0)}; store a scalar."
        )
    _check_finite(block, Columns.OBS, block.observations)
    _check_finite(block, Columns.NEXT_OBS, block.next_observations)
    _check_finite(block, Columns.ACTIONS, block.actions)
    _check_finite(block, Columns.REWARDS, block.rewards)
    _check_order_and_ends(block)


def close_matches(name: str, candidates: Iterable[str]) -> str:
    """Returns " Did you mean 'a' or 'b'?" for the candidates that resemble `name`, or an empty string."""
    matches = difflib.get_close_matches(name, sorted(set(candidates)), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def _episode(block: EpisodeBlock, id_: str, start: int, stop: int) -> SingleAgentEpisode:
    """Cuts one episode out of a block. Everything is copied: a kept episode must not keep its whole block alive."""

    # `Any`, because RLlib annotates these arguments as lists and takes arrays as well.
    def rows(array: NDArray[Any]) -> Any:
        return array[start:stop].copy()

    def rows_and_final(array: NDArray[Any], next_array: NDArray[Any]) -> Any:
        return np.concatenate([array[start:stop], next_array[stop - 1 : stop]])

    return SingleAgentEpisode(
        id_=id_,
        observations=tree.map_structure(rows_and_final, block.observations, block.next_observations),
        # Spelled out because the constructor's own default counts the keys of a dict observation, not its rows.
        infos=[{} for _ in range(stop - start + 1)],
        actions=tree.map_structure(rows, block.actions),
        rewards=rows(block.rewards),
        terminated=bool(block.terminateds[stop - 1]),
        truncated=bool(block.truncateds[stop - 1]),
        extra_model_outputs={name: rows(column) for name, column in block.extra_model_outputs.items()},
        len_lookback_buffer=0,
    )


def _check_finite(block: EpisodeBlock, column: str, values: Nested) -> None:
    for array in tree.flatten(values):
        if array.dtype.kind not in "fiub":
            raise ValueError(f"`{column}` must hold numbers, got {array.dtype} in {block.where(0)}.")
        # Integers and booleans cannot hold NaN or infinity.
        if array.dtype.kind != "f":
            continue
        finite = np.isfinite(array)
        if not finite.all():
            row = int(np.argmin(finite.all(axis=tuple(range(1, finite.ndim)))))
            value = np.atleast_1d(array[row])[~np.atleast_1d(finite[row])][0]
            raise ValueError(
                f"`{column}` holds {value} in episode {_id_of(block, row)!r}, {block.where(row)}; observations, "
                "actions and rewards must be finite: repair the value or drop the episode."
            )


def _check_order_and_ends(block: EpisodeBlock) -> None:
    last_rows = np.cumsum(block.lengths) - 1
    done = block.terminateds | block.truncateds
    unfinished = np.flatnonzero(~done[last_rows])
    broken = _broken_rows(block, last_rows)
    ended_early = np.setdiff1d(np.flatnonzero(done), last_rows, assume_unique=True)

    # Two episodes under one id break the chain exactly where the first of them ends; anything else is disorder.
    out_of_order = np.setdiff1d(broken, ended_early, assume_unique=True)
    if out_of_order.size:
        row = int(out_of_order[0])
        raise ValueError(
            f"Rows of episode {_id_of(block, row)!r} are out of order or missing: `{Columns.NEXT_OBS}` in "
            f"{block.where(row)} is not the `{Columns.OBS}` that follows in {block.where(row + 1)}; store the rows of "
            f"an episode in order of time, or number them in a column `{Columns.T}`."
        )
    if ended_early.size:
        row = int(ended_early[0])
        flag = Columns.TERMINATEDS if block.terminateds[row] else Columns.TRUNCATEDS
        raise ValueError(
            f"Episode {_id_of(block, row)!r} goes on after its end: `{flag}` is true in {block.where(row)}, which is "
            f"not its last row; set the flag on the last row only, or give every episode its own `{Columns.EPS_ID}`."
        )
    if unfinished.size:
        row = int(last_rows[unfinished[0]])
        raise ValueError(
            f"Episode {_id_of(block, row)!r} ends neither terminated nor truncated (its last step is "
            f"{block.where(row)}), so its return-to-go is unknown; {block.unfinished_remedy}."
        )


def _broken_rows(block: EpisodeBlock, last_rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows within an episode whose next observation is not the observation of the row after."""
    differs = np.zeros(max(len(block.rewards) - 1, 0), dtype=bool)
    for obs, next_obs in zip(tree.flatten(block.observations), tree.flatten(block.next_observations), strict=True):
        unequal = obs[1:] != next_obs[:-1]
        differs |= unequal.any(axis=tuple(range(1, unequal.ndim)))
    differs[last_rows[:-1]] = False
    return np.flatnonzero(differs)


def _id_of(block: EpisodeBlock, row: int) -> str:
    return block.ids[int(np.searchsorted(np.cumsum(block.lengths), row, side="right"))]
