"""What every reader of offline data shares: its description, its options, and blocks of whole episodes.

A reader turns its format into `EpisodeBlock`s: rows of whole, finished episodes, one after another, as arrays. Loading
works on blocks, without a Python object per row or episode; `episodes_of` cuts a block into `SingleAgentEpisode`s for
those who want these.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import numpy as np
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.datasets.episodes.columns import IS_INTERVENTION

Nested: TypeAlias = Any
"""An array, or dicts and tuples of arrays; every array has one row per time step."""

ActionsKind: TypeAlias = Literal["environment", "module"]

_LARGEST = float(np.finfo(np.float32).max)

# What readers remark about the episodes they yielded, counted in `EpisodeReader.remarks`.
CUT_AT_JUMP = "episodes ended by a jump of the observation"
CUT_AT_LENGTH = "episodes ended by `max_episode_steps_in_data`"
TRUNCATED = "unfinished episodes taken as truncated"
DROPPED = "unfinished episodes dropped"
DROPPED_STEPS = "last steps dropped, since no observation follows them"
LOST_REWARDS = (
    "of these steps had the only different reward of their episode, such as a success; keep it by "
    '`missing_final_observation="repeat"`'
)
AFTER_END = "steps after the end of their episode left out"
ENDS_UNTOLD = "episodes whose end is told by `dones` alone, without a success, taken as truncated"
REPEATED = "missing final observations replaced by the last one"


@dataclass(frozen=True)
class ReadOptions:
    """How incomplete data are read. Every choice that is made is counted in the reader's `remarks`.

    Attributes:
        unfinished_episodes: What becomes of an episode that ends neither terminated nor truncated: "error",
            "truncate" (its last row counts as a time-out) or "drop".
        missing_final_observation: What becomes of an episode's last step if the format does not store the observation
            after it and the episode was not terminated: "drop_step" (the observation of the last row becomes the
            final one) or "repeat" (the last observation stands for the one after it). After a terminated step the
            observation is never bootstrapped from, so it is repeated in any case.
        max_episode_steps: In rows without episode ids, an episode ends after this many steps at the latest; None: no
            limit.
        observation_jump: In rows without episode ids, an episode ends where `next_obs[t]` and `obs[t + 1]` differ by
            more than this, relative to max(1, |obs|). With ids the same difference is an error.
        columns: Names of further numeric columns that are wanted; None: all of them.
        filesystem: PyArrow filesystem on which paths are looked up; None: the local one, or what a URI says.
    """

    unfinished_episodes: Literal["error", "truncate", "drop"] = "error"
    missing_final_observation: Literal["drop_step", "repeat"] = "drop_step"
    max_episode_steps: int | None = None
    observation_jump: float = 1e-6
    columns: frozenset[str] | None = None
    filesystem: Any = None

    @property
    def key_parts(self) -> dict[str, Any]:
        """What the episodes read depend on, JSON-safe."""
        return {
            "unfinished_episodes": self.unfinished_episodes,
            "missing_final_observation": self.missing_final_observation,
            "max_episode_steps": self.max_episode_steps,
            "observation_jump": self.observation_jump,
        }

    def wants(self, column: str) -> bool:
        """Whether a further column of numbers is to be read."""
        return self.columns is None or column in self.columns or column == IS_INTERVENTION  # Reports count it.


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
        num_transitions: Number of transitions at most, if it is known before reading.
        reference_scores: Returns (min, max) that stand for a normalised score of 0 and 1, if recorded.
        ignored_columns: Columns of the data that are not read, with the reason where it is not obvious.
        env_spec: Gymnasium's description of the environment, where the format records it.
    """

    name: str
    observation_space: gym.Space[Any] | None
    action_space: gym.Space[Any] | None
    actions: ActionsKind
    num_transitions: int | None
    reference_scores: tuple[float, float] | None = None
    ignored_columns: tuple[str, ...] = ()
    env_spec: Any = None


@dataclass(frozen=True)
class EpisodeBlock:
    """Rows of E >= 1 whole, finished episodes, one after another; R is the number of rows, the sum of `lengths`.

    Attributes:
        ids: One id per episode.
        lengths: [E] Number of rows of each episode, at least 1.
        observations: [R, ...], possibly nested: the observation before each row's action.
        final_observations: [E, ...] in the same structure: the observation after each episode's last row.
        actions: [R, ...], possibly nested.
        rewards: [R]
        terminateds: [E] Whether each episode ended by termination.
        truncateds: [E] Whether each episode was cut; one of the two is true.
        where: Says where a row of this block was read, e.g. "row 17 of data/part-2.parquet".
        extra_model_outputs: Further columns of numbers, [R, ...] each.
    """

    ids: list[str]
    lengths: NDArray[np.int64]
    observations: Nested
    final_observations: Nested
    actions: Nested
    rewards: NDArray[Any]
    terminateds: NDArray[np.bool_]
    truncateds: NDArray[np.bool_]
    where: Callable[[int], str]
    extra_model_outputs: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.rewards)

    def id_of(self, row: int) -> str:
        """Id of the episode that a row belongs to."""
        return self.ids[int(np.searchsorted(np.cumsum(self.lengths), row, side="right"))]


class EpisodeReader(ABC):
    """Whole, finished episodes of one input, in file order; it can be iterated again and again.

    Attributes:
        info: What is known before reading.
        remarks: What had to be decided about incomplete data, counted by kind during the latest `blocks()`.
    """

    info: DatasetInfo

    @property
    def records_ids(self) -> bool:
        """Whether the data have ids of their episodes, rather than places in files by which they are called here."""
        return False

    def __init__(self) -> None:
        self.remarks: Counter[str] = Counter()

    @abstractmethod
    def blocks(self) -> Iterator[EpisodeBlock]:
        """Yields checked blocks in the dtypes of the storage; resets `remarks` first.

        Raises:
            ValueError: If the data are not whole episodes of finite numbers; the message names episode and row.
        """

    def fingerprint(self) -> str | None:
        """Digest of everything that `blocks()` reads: contents, never file times. None if there is no such thing."""
        return None

    def __iter__(self) -> Iterator[SingleAgentEpisode]:
        """Yields terminated or truncated episodes that hold NumPy arrays in the dtypes of the storage.

        Raises:
            ValueError: As `blocks()`.
        """
        for block in self.blocks():
            yield from episodes_of(block)


def episodes_of(block: EpisodeBlock) -> Iterator[SingleAgentEpisode]:
    """Yields the episodes of a block, with copies of the rows."""
    stops = np.cumsum(block.lengths).tolist()
    starts = [0, *stops[:-1]]
    for episode, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        yield _episode(block, episode, start, stop)


def check_finite(block: EpisodeBlock) -> None:
    """Raises a ValueError that names episode and row if a number is not finite, too large for float32, or no number."""
    if block.rewards.ndim != 1:
        raise ValueError(
            f"`{Columns.REWARDS}` must hold one number per row, got arrays of shape {block.rewards.shape[1:]} in "
            f"{block.where(0)}; store a scalar."
        )
    last_rows = np.cumsum(block.lengths) - 1
    _check_column(block, Columns.OBS, block.observations, None)
    _check_column(block, Columns.NEXT_OBS, block.final_observations, last_rows)
    _check_column(block, Columns.ACTIONS, block.actions, None)
    _check_column(block, Columns.REWARDS, block.rewards, None)
    for name, column in block.extra_model_outputs.items():
        if len(column) != block.num_rows:
            raise ValueError(f"`{name}` has {len(column)} rows, the other columns have {block.num_rows}.")


def _episode(block: EpisodeBlock, episode: int, start: int, stop: int) -> SingleAgentEpisode:
    """Cuts one episode out of a block. Everything is copied: a kept episode must not keep its whole block alive."""

    # `Any`, because RLlib annotates these arguments as lists and takes arrays as well.
    def rows(array: NDArray[Any]) -> Any:
        return array[start:stop].copy()

    def rows_and_final(array: NDArray[Any], final: NDArray[Any]) -> Any:
        return np.concatenate([array[start:stop], final[episode : episode + 1]])

    return SingleAgentEpisode(
        id_=block.ids[episode],
        observations=tree.map_structure(rows_and_final, block.observations, block.final_observations),
        # Spelled out because the constructor's own default counts the keys of a dict observation, not its rows.
        infos=[{} for _ in range(stop - start + 1)],
        actions=tree.map_structure(rows, block.actions),
        rewards=rows(block.rewards),
        terminated=bool(block.terminateds[episode]),
        truncated=bool(block.truncateds[episode]),
        extra_model_outputs={name: rows(column) for name, column in block.extra_model_outputs.items()},
        len_lookback_buffer=0,
    )


def _check_column(block: EpisodeBlock, column: str, values: Nested, rows: NDArray[np.int64] | None) -> None:
    """Checks one column; `rows` are the block's rows that its entries belong to, None if they are all rows in order."""
    for array in tree.flatten(values):
        if array.dtype.kind not in "fiub":
            raise ValueError(
                f"`{column}` must hold numbers, got {array.dtype} in {block.where(0)}; convert the column."
            )
        # Integers and booleans cannot hold NaN or infinity.
        if array.dtype.kind != "f":
            continue
        # Training computes in float32, where a larger number would silently become infinite.
        finite = np.isfinite(array) if array.dtype.itemsize <= 4 else np.abs(array) <= _LARGEST
        if not finite.all():
            entry = int(np.argmin(finite.all(axis=tuple(range(1, finite.ndim)))))
            row = entry if rows is None else int(rows[entry])
            value = np.atleast_1d(array[entry])[~np.atleast_1d(finite[entry])][0]
            rule = f"fit into float32, up to {_LARGEST:.2g}" if np.isfinite(value) else "be finite"
            raise ValueError(
                f"`{column}` holds {value} in episode {block.id_of(row)!r}, {block.where(row)}; observations, "
                f"actions and rewards must {rule}: repair the value or drop the episode."
            )
