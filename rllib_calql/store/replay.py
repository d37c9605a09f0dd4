"""`TransitionStore`: an offline table and an online ring, sampled uniformly at an exact ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns

from rllib_calql.store.offline_table import OfflineTable
from rllib_calql.store.returns_connector import TAIL_DISCOUNT

IS_OFFLINE = "is_offline"  # 1.0 for offline rows: which part of a batch a row came from.
# With `n_step` above 1, where the target goes on after the rewards of a row: the observation, and the discount that its
# value gets there, float32.
BOOTSTRAP_OBS = "bootstrap_obs"
BOOTSTRAP_DISCOUNT = "bootstrap_discounts"

_LAST_ROW = "last_row"  # Row of the same table that holds the episode's last transition.
_REWARD_SUM = "reward_sum"  # Return-to-go without the value of the last observation.
_MIN_CAPACITY = 1024

Array = npt.NDArray[Any]
RowColumns = Mapping[str, Array]


class _Table:
    """A ring of rows in columns of fixed type, which grows to its limit; rows of an episode are adjacent."""

    def __init__(self, column_shapes: Mapping[str, tuple[int, ...]], *, limit: int, obs_dtype: np.dtype[Any]) -> None:
        self.limit = limit
        self.size = 0
        self.position = 0  # Next row to write.
        self.num_appended = 0  # Rows ever appended, and
        self.num_replaced = 0  # how often all rows were replaced or dropped: what a copy has to follow.
        dtypes = {Columns.OBS: obs_dtype, Columns.NEXT_OBS: obs_dtype, _LAST_ROW: np.dtype(np.int64)}
        self.columns: dict[str, Array] = {
            name: np.empty((0, *shape), dtype=dtypes.get(name, np.float32)) for name, shape in column_shapes.items()
        }

    def _grow(self, num_rows: int) -> None:
        for name, column in self.columns.items():
            grown = np.empty((num_rows, *column.shape[1:]), dtype=column.dtype)
            grown[: self.size] = column[: self.size]
            self.columns[name] = grown

    def append(self, rows: RowColumns) -> None:
        """Adds one episode's rows."""
        num_rows = len(rows[Columns.REWARDS])
        if num_rows > self.limit:
            raise ValueError(
                f"An episode of {num_rows} steps does not fit into `online_capacity` {self.limit}; raise the capacity."
            )
        capacity = len(self.columns[Columns.REWARDS])
        needed = self.size + num_rows
        if needed > capacity and capacity < self.limit:
            self._grow(min(max(needed, 2 * capacity, _MIN_CAPACITY), self.limit))
            capacity = len(self.columns[Columns.REWARDS])
        where = (self.position + np.arange(num_rows)) % capacity
        for name, column in self.columns.items():
            column[where] = where[-1] if name == _LAST_ROW else rows[name]
        self.position = (self.position + num_rows) % self.limit
        self.size = min(self.size + num_rows, capacity)
        self.num_appended += num_rows

    def clear(self) -> None:
        self.size = self.position = 0
        self.num_replaced += 1

    def get_state(self) -> dict[str, Any]:
        columns = {name: column[: self.size].copy() for name, column in self.columns.items()}
        return {"columns": columns, "position": self.position, "limit": self.limit}

    def set_state(self, state: Mapping[str, Any]) -> None:
        if set(state["columns"]) != set(self.columns) or any(
            column.shape[1:] != self.columns[name].shape[1:] for name, column in state["columns"].items()
        ):
            raise ValueError(
                "The checkpoint's online data have other columns; restore with the config it was made with."
            )
        if state["limit"] != self.limit:
            raise ValueError(
                f"The checkpoint was made with `online_capacity` {state['limit']}, the config has {self.limit}; "
                "restore with the same capacity."
            )
        self.size = len(state["columns"][Columns.REWARDS])
        self.columns = {name: np.array(column) for name, column in state["columns"].items()}
        self.position = state["position"]
        self.num_replaced += 1


class TransitionStore:
    """Transitions with their reference values: an offline table and an online ring.

    Both parts are sampled uniformly with replacement. Every batch holds exactly the asked number of offline rows,
    never that number in expectation.

    Args:
        obs_dim: Size of a flat observation.
        action_dim: Size of an action.
        online_capacity: Rows of the online ring; the oldest give way.
        seed: Seed of the one random generator, or None for an unpredictable one.
        track_tails: Whether returns hold a value of the last observation that `refresh_returns` renews.
        obs_dtype: Type of observations in the ring and in batches.
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
        if track_tails:
            shapes |= {TAIL_DISCOUNT: (), _REWARD_SUM: (), _LAST_ROW: ()}
        self._track_tails = track_tails
        self.offline: OfflineTable | None = None
        self._online = _Table(shapes, limit=online_capacity, obs_dtype=np.dtype(obs_dtype))
        self._rng = np.random.default_rng(seed)

    @property
    def num_offline(self) -> int:
        """Offline rows held."""
        return 0 if self.offline is None else len(self.offline)

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
        num_rows = min(num_rows, self.num_online)
        return (self._online.position - num_rows + np.arange(num_rows)) % self._online.limit

    def empty_columns(self, *num_rows: int) -> dict[str, Array]:
        """Columns of a batch, not filled, of shape (*num_rows, ...) each."""
        return {
            name: np.empty((*num_rows, *column.shape[1:]), dtype=column.dtype)
            for name, column in self._online.columns.items()
            if name in self._batch_columns
        }

    def add_online(self, rows: RowColumns) -> None:
        """Adds the rows of one whole online episode, columns as in `transitions_from_episode`.

        Raises:
            ValueError: If the episode is longer than the capacity.
        """
        self._online.append({**rows, _REWARD_SUM: rows[Columns.RETURNS_TO_GO]} if self._track_tails else rows)

    def offline_column(self, name: str) -> Array:
        """Copy of an offline column in memory, shape (num_offline, ...), read-only."""
        return self._offline_data().column(name)

    def offline_rows(self, rows: npt.NDArray[np.int64]) -> dict[str, Array]:
        """Columns of a batch for these offline rows."""
        columns = self.empty_columns(len(rows))
        self._offline_data().gather(rows, columns)
        return columns

    def online_column(self, name: str) -> Array:
        """Read-only view of an online column, shape (num_online, ...), in storage order."""
        view = self._online.columns[name][: self._online.size]
        view.flags.writeable = False
        return view

    def num_offline_rows(self, batch_size: int, mixing_ratio: float | str) -> int:
        """Offline rows of every online batch: `round(batch_size * mixing_ratio)`, all online without offline data."""
        if self.num_offline == 0:
            return 0
        if mixing_ratio == "proportional":
            mixing_ratio = self.num_offline / (self.num_offline + self.num_online)
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
            for name, column in batch.items():
                column[:, num_offline_rows:] = self._online.columns[name][online_rows]
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
        parts = [
            self._draw_part("offline", self.num_offline, num_batches, num_offline_rows),
            self._draw_part("online", self.num_online, num_batches, batch_size - num_offline_rows) + self.num_offline,
        ]
        return np.concatenate(parts, axis=1)

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
        self._offline_data().gather(rows.reshape(-1), flat)
        if not is_whole:
            for name, column in out.items():
                column[...] = flat[name].reshape(column.shape)

    def observation_statistics(self) -> tuple[Array, Array]:
        """Mean and standard deviation of the offline observations, in float64, each of shape (obs_dim,)."""
        return self._offline_data().observation_statistics()

    def refresh_returns(self, estimate_values: Callable[[Array], Array]) -> None:
        """Renews the value of the last observation in the returns of all episodes that were cut ("bootstrap").

        Args:
            estimate_values: Maps observations (n, obs_dim) to values (n,).
        """
        if self.offline is not None:
            self.offline.refresh_tails(estimate_values)
        table = self._online
        rows = np.flatnonzero(table.columns[TAIL_DISCOUNT][: table.size])
        if len(rows) == 0:
            return
        # The ring overwrites an episode from its start, so the last row outlives every row that points to it.
        last_rows, episode_of_row = np.unique(table.columns[_LAST_ROW][rows], return_inverse=True)
        values = estimate_values(table.columns[Columns.NEXT_OBS][last_rows])
        tails = table.columns[TAIL_DISCOUNT][rows] * values[episode_of_row]
        table.columns[Columns.RETURNS_TO_GO][rows] = table.columns[_REWARD_SUM][rows] + tails

    @property
    def online_nbytes(self) -> int:
        """Bytes of the online rows held."""
        return sum(column[: self._online.size].nbytes for column in self._online.columns.values())

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
        if state["online"] is None:
            self._online.clear()
        else:
            self._online.set_state(state["online"])
        self._rng.bit_generator.state = state["rng"]
        return int(state["num_online"]) - self.num_online
