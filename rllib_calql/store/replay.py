"""`TransitionStore`: an offline table and an online ring, sampled uniformly at an exact ratio."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns

from rllib_calql.common.target_steps import TargetSteps
from rllib_calql.networks.steps import BOOTSTRAP_DISCOUNT, BOOTSTRAP_OBS
from rllib_calql.store.offline_table import OfflineTable
from rllib_calql.store.online_ring import OnlineRing, RowColumns
from rllib_calql.store.split import Split

IS_OFFLINE = "is_offline"  # 1.0 for offline rows: which part of a batch a row came from.
logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]


class TransitionStore:
    """Transitions with their reference values: an offline table and an online ring.

    Both parts are sampled uniformly with replacement. Every batch holds exactly the asked number of offline rows,
    never that number in expectation. Held-out rows are in the offline table like all others, and are never drawn.

    Args:
        obs_dim: Size of a flat observation.
        action_dim: Size of an action.
        online_capacity: Rows of the online ring; the oldest give way.
        seed: Seed of the one random generator, or None for an unpredictable one.
        track_tails: Whether returns hold a value of the last observation that `refresh_returns` renews.
        obs_dtype: Type of observations in the ring and in batches.
        n_step: Steps of rewards that targets sum. Above 1, rewards and terminations of a batch are those of
            `TargetSteps`, and there are two more columns: `BOOTSTRAP_OBS`, the observation after the last reward of the
            sum, and `BOOTSTRAP_DISCOUNT`, gamma^m. Next observations stay those of one step.
        gamma: Discount of these rewards; used with `n_step` above 1 only.

    Attributes:
        offline: The offline table, or None.
        split: Which of its episodes are held out; None if none are.
    """

    def __init__(
        self,
        *,
        obs_dim: int,
        action_dim: int,
        online_capacity: int,
        seed: int | None = None,
        track_tails: bool = False,
        obs_dtype: npt.DTypeLike = np.float32,
        n_step: int = 1,
        gamma: float = 1.0,
    ) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            Columns.OBS: (obs_dim,),
            Columns.NEXT_OBS: (obs_dim,),
            Columns.ACTIONS: (action_dim,),
            Columns.REWARDS: (),
            Columns.TERMINATEDS: (),
            Columns.RETURNS_TO_GO: (),
        }
        self._batch_columns = tuple(shapes)
        self._track_tails = track_tails
        self.target_steps = TargetSteps(n_step, gamma)
        self.offline: OfflineTable | None = None
        self.split: Split | None = None
        self._online = OnlineRing(shapes, limit=online_capacity, obs_dtype=np.dtype(obs_dtype), track_tails=track_tails)
        self._rng = np.random.default_rng(seed)

    @property
    def num_offline(self) -> int:
        """Offline rows held, those of held-out episodes included."""
        return 0 if self.offline is None else len(self.offline)

    @property
    def num_training_rows(self) -> int:
        """Offline rows that batches are drawn from."""
        return self.num_offline if self.split is None else self.split.num_training_rows

    def training_rows(self) -> npt.NDArray[np.int64]:
        """Numbers of the offline rows that batches are drawn from, ascending."""
        return np.arange(self.num_offline) if self.split is None else self.split.training_rows()

    def held_out_rows(self) -> npt.NDArray[np.int64]:
        """Numbers of the offline rows that are held out, ascending."""
        return np.empty(0, np.int64) if self.split is None else self.split.held_out_rows()

    def held_out_episodes(self) -> npt.NDArray[np.int64]:
        """Numbers of the offline episodes that are held out, ascending."""
        return np.empty(0, np.int64) if self.split is None else self.split.held_out_episodes

    @property
    def num_online(self) -> int:
        """Online rows held."""
        return self._online.size

    @property
    def obs_dtype(self) -> np.dtype[Any]:
        """Type of observations in batches."""
        return self._online.columns[Columns.OBS].dtype

    @property
    def row_nbytes(self) -> int:
        """Bytes of one sampled row."""
        return sum(column.nbytes for column in self.empty_columns(1).values())

    @property
    def tracks_tails(self) -> bool:
        """Whether `refresh_returns` changes returns."""
        return self._track_tails

    @property
    def online_capacity(self) -> int:
        """Online rows that the store can hold."""
        return self._online.limit

    @property
    def online_version(self) -> tuple[int, int]:
        """How often all online rows were replaced, and how many were ever appended."""
        return self._online.num_replaced, self._online.num_appended

    def newest_online_rows(self, num_rows: int) -> npt.NDArray[np.int64]:
        """Numbers of the online rows appended last, at most all that are held."""
        return self._online.newest_rows(num_rows)

    def empty_columns(self, *num_rows: int) -> dict[str, Array]:
        """Columns of a batch, not filled, of shape (*num_rows, ...) each."""
        columns = {
            name: np.empty((*num_rows, *column.shape[1:]), dtype=column.dtype)
            for name, column in self._online.columns.items()
            if name in self._batch_columns
        }
        if self.target_steps.n_step > 1:
            columns[BOOTSTRAP_OBS] = np.empty_like(columns[Columns.NEXT_OBS])
            columns[BOOTSTRAP_DISCOUNT] = np.empty(num_rows, dtype=np.float32)
        return columns

    def add_online(self, rows: RowColumns) -> None:
        """Adds the rows of one whole online episode, see `OnlineRing.append`.

        Raises:
            ValueError: If the episode is longer than the capacity.
        """
        self._online.append(rows)

    def gather(self, rows: npt.NDArray[np.int64], out: Mapping[str, Array]) -> None:
        """Writes rows, all offline or all online, into columns of a batch.

        Args:
            rows: [n] Row numbers, as `draw` gives them.
            out: Arrays of n rows, those of `empty_columns`; `BOOTSTRAP_OBS` may be missing.
        """
        if len(rows) and rows[0] < self.num_offline:
            self._offline_data().gather(rows, out, self.target_steps)
        else:
            self._online.gather(rows - self.num_offline, out, self.target_steps)

    def rows_of_last_reward(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows whose rewards are the last in the targets of these rows, all offline or all online, see `draw`."""
        if len(rows) and rows[0] < self.num_offline:
            return self._offline_data().rows_of_last_reward(rows, self.target_steps)
        return self._online.rows_of_last_reward(rows - self.num_offline, self.target_steps) + self.num_offline

    def offline_episode_returns(self) -> Array:
        """G_0 of the offline episodes to train on, without the value of any last observation, shape (E,), float64."""
        return np.empty(0) if self.offline is None else self.offline.episode_returns(self.split)

    def offline_column(self, name: str) -> Array:
        """Copy of an offline column in memory, shape (num_offline, ...), read-only."""
        return self._offline_data().column(name)

    def offline_rows(self, rows: npt.NDArray[np.int64]) -> dict[str, Array]:
        """Columns of a batch for these offline rows."""
        columns = self.empty_columns(len(rows))
        self.gather(rows, columns)
        return columns

    def online_column(self, name: str) -> Array:
        """Read-only view of an online column, shape (num_online, ...), in storage order."""
        view = self._online.columns[name][: self._online.size]
        view.flags.writeable = False
        return view

    @property
    def online_interventions(self) -> npt.NDArray[np.bool_]:
        """Whether a person chose the action of each online row, shape (num_online,), in storage order."""
        marks: npt.NDArray[np.bool_] = self._online.is_intervention[: self._online.size].copy()
        return marks

    def num_offline_rows(self, batch_size: int, mixing_ratio: float | str) -> int:
        """Offline rows of every online batch: `round(batch_size * mixing_ratio)`, all online without offline data."""
        if self.num_offline == 0:
            return 0
        if mixing_ratio == "proportional":
            mixing_ratio = self.num_training_rows / (self.num_training_rows + self.num_online)
        return round(batch_size * float(mixing_ratio))

    def draw_seed(self) -> int:
        """Draws a seed for one round of collection, so that a resumed run collects what the uninterrupted one would."""
        return int(self._rng.integers(2**31))

    def sample(self, *, num_batches: int, batch_size: int, num_offline_rows: int) -> dict[str, Array]:
        """Draws batches laid end to end.

        Args:
            num_batches: K.
            batch_size: B.
            num_offline_rows: Offline rows of every batch, 0 to B; they come first in each.

        Returns:
            Columns of K * B rows, and `IS_OFFLINE`.

        Raises:
            ValueError: If a part that is asked for is empty.
        """
        rows = self.draw(num_batches=num_batches, batch_size=batch_size, num_offline_rows=num_offline_rows)
        batch = self.empty_columns(num_batches, batch_size)
        if num_offline_rows:
            self._gather_offline(
                rows[:, :num_offline_rows], {name: column[:, :num_offline_rows] for name, column in batch.items()}
            )
        if num_offline_rows < batch_size:
            online_rows = rows[:, num_offline_rows:] - self.num_offline
            online = {name: column[:, num_offline_rows:] for name, column in batch.items()}
            self._online.gather(online_rows, online, self.target_steps)
        is_offline = np.zeros((num_batches, batch_size), dtype=np.float32)
        is_offline[:, :num_offline_rows] = 1.0
        batch[IS_OFFLINE] = is_offline
        return {name: column.reshape(num_batches * batch_size, *column.shape[2:]) for name, column in batch.items()}

    def draw(self, *, num_batches: int, batch_size: int, num_offline_rows: int) -> npt.NDArray[np.int64]:
        """Draws the rows of batches: what `sample` draws, not yet looked up.

        Args:
            num_batches: K.
            batch_size: B.
            num_offline_rows: Offline rows of every batch, 0 to B; they come first in each.

        Returns:
            Row numbers of shape (K, B): offline rows from 0 on, then those of the online ring.

        Raises:
            ValueError: If a part that is asked for is empty.
        """
        offline = self._draw_part("offline", self.num_training_rows, num_batches, num_offline_rows)
        online = self._draw_part("online", self.num_online, num_batches, batch_size - num_offline_rows)
        if self.split is not None:
            offline = self.split.rows_of(offline)
        return np.concatenate([offline, online + self.num_offline], axis=1)

    def _offline_data(self) -> OfflineTable:
        if self.offline is None:
            raise ValueError("The store holds no offline data.")
        return self.offline

    def _draw_part(self, kind: str, size: int, num_batches: int, num_rows: int) -> npt.NDArray[np.int64]:
        if num_rows == 0:
            return np.empty((num_batches, 0), dtype=np.int64)
        if size == 0:
            raise ValueError(f"A batch needs {num_rows} {kind} rows, but the store holds none.")
        return self._rng.integers(size, size=(num_batches, num_rows))

    def _gather_offline(self, rows: npt.NDArray[np.int64], out: dict[str, Array]) -> None:
        """Gathers all batches at once, straight into the batch where offline rows fill it."""
        is_whole = all(column.flags.c_contiguous for column in out.values())
        flat = {
            name: column.reshape(rows.size, *column.shape[2:])
            if is_whole
            else np.empty((rows.size, *column.shape[2:]), column.dtype)
            for name, column in out.items()
        }
        self._offline_data().gather(rows.reshape(-1), flat, self.target_steps)
        if not is_whole:
            for name, column in out.items():
                column[...] = flat[name].reshape(column.shape)

    def observation_statistics(self) -> tuple[Array, Array]:
        """Mean and deviation of the offline observations not held out, in float64, each of shape (obs_dim,)."""
        return self._offline_data().observation_statistics(self.split)

    def refresh_returns(self, estimate_values: Callable[[Array], Array]) -> None:
        """Renews the value of the last observation in the returns of all episodes that were cut ("bootstrap").

        Args:
            estimate_values: Maps observations (n, obs_dim) to values (n,).
        """
        if self.offline is not None:
            self.offline.refresh_tails(estimate_values)
        if self._track_tails:
            self._online.refresh_tails(estimate_values)

    @property
    def online_nbytes(self) -> int:
        """Bytes of the online rows held."""
        return self._online.nbytes

    def get_state(self, *, with_online: bool = True) -> dict[str, Any]:
        """Online data and random state. Offline data are read again from their source at restore.

        Args:
            with_online: Whether the online data are in it.
        """
        return {
            "online": self._online.get_state() if with_online else None,
            "num_online": self.num_online,
            "rng": self._rng.bit_generator.state,
        }

    def set_state(self, state: Mapping[str, Any]) -> int:
        """Restores online data and random state; online data of before are dropped.

        Returns:
            Online rows that the state was made with and does not hold.

        Raises:
            ValueError: If columns or capacity are not those of the state.
        """
        online = state["online"]
        if online is None:
            self._online.clear()
        else:
            self._online.set_state(online)
            if self.target_steps.n_step > 1 and self.num_online and "steps_left" not in online:
                logger.warning(
                    "The checkpoint is of an earlier version, which did not keep where online episodes end: its %d "
                    "online transitions have targets of one step, new ones of `n_step` %d.",
                    self.num_online,
                    self.target_steps.n_step,
                )
        self._rng.bit_generator.state = state["rng"]
        return int(state["num_online"]) - self.num_online
