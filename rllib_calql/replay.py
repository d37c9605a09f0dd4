"""`TransitionStore`: offline columns and an online ring, sampled uniformly at an exact ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns

from rllib_calql.connectors import TAIL_DISCOUNT

IS_OFFLINE = "is_offline"  # 1.0 for offline rows: which part of a batch a row came from.

_LAST_ROW = "last_row"  # Row of the same table that holds the episode's last transition.
_REWARD_SUM = "reward_sum"  # Return-to-go without the value of the last observation.
_MIN_CAPACITY = 1024

Array = npt.NDArray[Any]
RowColumns = Mapping[str, Array]


class _Table:
    """Rows in columns of fixed type. A ring if `limit` is given, else it grows; rows of an episode are adjacent."""

    def __init__(self, column_shapes: Mapping[str, tuple[int, ...]], limit: int | None = None) -> None:
        self.limit = limit
        self.size = 0
        self.position = 0  # Next row to write.
        self.columns: dict[str, Array] = {
            name: np.empty((0, *shape), dtype=np.int64 if name == _LAST_ROW else np.float32)
            for name, shape in column_shapes.items()
        }

    def reserve(self, num_rows: int) -> None:
        """Makes room for `num_rows` rows in total. Untouched rows cost no memory until they are written."""
        for name, column in self.columns.items():
            if len(column) < num_rows:
                grown = np.empty((num_rows, *column.shape[1:]), dtype=column.dtype)
                grown[: self.size] = column[: self.size]
                self.columns[name] = grown

    def append(self, rows: RowColumns) -> None:
        """Adds one episode's rows."""
        num_rows = len(rows[Columns.REWARDS])
        if self.limit is not None and num_rows > self.limit:
            raise ValueError(
                f"An episode of {num_rows} steps does not fit into `online_capacity` {self.limit}; raise the capacity."
            )
        capacity = len(self.columns[Columns.REWARDS])
        needed = self.size + num_rows
        if needed > capacity and (self.limit is None or capacity < self.limit):
            doubled = max(needed, 2 * capacity, _MIN_CAPACITY)
            self.reserve(doubled if self.limit is None else min(doubled, self.limit))
            capacity = len(self.columns[Columns.REWARDS])
        where = (self.position + np.arange(num_rows)) % capacity
        for name, column in self.columns.items():
            column[where] = where[-1] if name == _LAST_ROW else rows[name]
        self.position += num_rows
        if self.limit is not None:
            self.position %= self.limit
        self.size = min(self.size + num_rows, capacity)

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


class TransitionStore:
    """Transitions with their reference values, offline and online.

    Both parts are sampled uniformly with replacement. Every batch holds exactly the asked number of offline rows,
    never that number in expectation.

    Args:
        obs_dim: Size of a flat observation.
        action_dim: Size of an action.
        online_capacity: Rows of the online ring; the oldest give way.
        seed: Seed of the one random generator, or None for an unpredictable one.
        track_tails: Whether returns hold a value of the last observation that `refresh_returns` renews.
    """

    def __init__(
        self,
        *,
        obs_dim: int,
        action_dim: int,
        online_capacity: int,
        seed: int | None = None,
        track_tails: bool = False,
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
        self._offline = _Table(shapes)
        self._online = _Table(shapes, limit=online_capacity)
        self._rng = np.random.default_rng(seed)

    @property
    def num_offline(self) -> int:
        """Offline rows held."""
        return self._offline.size

    @property
    def num_online(self) -> int:
        """Online rows held."""
        return self._online.size

    @property
    def row_nbytes(self) -> int:
        """Bytes of one sampled row."""
        return sum(self._offline.columns[name][:0].dtype.itemsize * self._width(name) for name in self._batch_columns)

    def _width(self, name: str) -> int:
        return int(np.prod(self._offline.columns[name].shape[1:], dtype=np.int64))

    def reserve_offline(self, num_rows: int) -> None:
        """Allocates room for `num_rows` offline rows at once, where their number is known."""
        self._offline.reserve(num_rows)

    def add_offline(self, rows: RowColumns) -> None:
        """Adds the rows of one whole offline episode, columns as in `transitions_from_episode`."""
        self._offline.append(self._with_tail_columns(rows))

    def add_online(self, rows: RowColumns) -> None:
        """Adds the rows of one whole online episode.

        Raises:
            ValueError: If the episode is longer than the capacity.
        """
        self._online.append(self._with_tail_columns(rows))

    def _with_tail_columns(self, rows: RowColumns) -> RowColumns:
        return {**rows, _REWARD_SUM: rows[Columns.RETURNS_TO_GO]} if self._track_tails else rows

    def offline_column(self, name: str) -> Array:
        """Read-only view of an offline column, shape (num_offline, ...)."""
        view = self._offline.columns[name][: self._offline.size]
        view.flags.writeable = False
        return view

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
        num_online_rows = batch_size - num_offline_rows
        parts = [
            (self._offline, "offline", 0, num_offline_rows),
            (self._online, "online", num_offline_rows, num_online_rows),
        ]
        batch = {
            name: np.empty((num_batches, batch_size, *self._offline.columns[name].shape[1:]), dtype=np.float32)
            for name in self._batch_columns
        }
        for table, kind, start, num_rows in parts:
            if num_rows == 0:
                continue
            if table.size == 0:
                raise ValueError(f"A batch needs {num_rows} {kind} rows, but the store holds none.")
            index = self._rng.integers(table.size, size=(num_batches, num_rows))
            for name, column in batch.items():
                column[:, start : start + num_rows] = table.columns[name][index]
        is_offline = np.zeros((num_batches, batch_size), dtype=np.float32)
        is_offline[:, :num_offline_rows] = 1.0
        batch[IS_OFFLINE] = is_offline
        return {name: column.reshape(num_batches * batch_size, *column.shape[2:]) for name, column in batch.items()}

    def observation_statistics(self) -> tuple[Array, Array]:
        """Mean and standard deviation of the offline observations, in float64, each of shape (obs_dim,)."""
        obs = self.offline_column(Columns.OBS)
        return obs.mean(axis=0, dtype=np.float64), obs.std(axis=0, dtype=np.float64)

    def refresh_returns(self, estimate_values: Callable[[Array], Array]) -> None:
        """Renews the value of the last observation in the returns of all episodes that were cut ("bootstrap").

        Args:
            estimate_values: Maps observations (n, obs_dim) to values (n,).
        """
        for table in (self._offline, self._online):
            rows = np.flatnonzero(table.columns[TAIL_DISCOUNT][: table.size])
            if len(rows) == 0:
                continue
            # The ring overwrites an episode from its start, so the last row outlives every row that points to it.
            last_rows, episode_of_row = np.unique(table.columns[_LAST_ROW][rows], return_inverse=True)
            values = estimate_values(table.columns[Columns.NEXT_OBS][last_rows])
            tails = table.columns[TAIL_DISCOUNT][rows] * values[episode_of_row]
            table.columns[Columns.RETURNS_TO_GO][rows] = table.columns[_REWARD_SUM][rows] + tails

    def get_state(self) -> dict[str, Any]:
        """Online data and random state. Offline data are read again from their source at restore."""
        return {
            "online": self._online.get_state(),
            "rng": self._rng.bit_generator.state,
            "num_offline": self.num_offline,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores online data and random state.

        Raises:
            ValueError: If offline data or capacity are not those of the checkpoint.
        """
        if state["num_offline"] != self.num_offline:
            raise ValueError(
                f"The checkpoint was made with {state['num_offline']} offline transitions, `input_` now has "
                f"{self.num_offline}; restore with the same data."
            )
        self._online.set_state(state["online"])
        self._rng.bit_generator.state = state["rng"]
