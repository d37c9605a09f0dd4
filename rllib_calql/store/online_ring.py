"""`OnlineRing`: the transitions of online episodes, of which the oldest give way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns

from rllib_calql.common.target_steps import TargetSteps
from rllib_calql.datasets.episodes.columns import IS_INTERVENTION
from rllib_calql.networks.steps import BOOTSTRAP_DISCOUNT, BOOTSTRAP_OBS
from rllib_calql.store.returns_connector import TAIL_DISCOUNT

_LAST_ROW = "last_row"  # Row of the same ring that holds the episode's last transition.
_REWARD_SUM = "reward_sum"  # Return-to-go without the value of the last observation.
_OF_TAILS = (TAIL_DISCOUNT, _REWARD_SUM, _LAST_ROW)
_MIN_CAPACITY = 1024

Array = npt.NDArray[Any]
RowColumns = Mapping[str, Array]


class OnlineRing:
    """A ring of rows in columns of fixed type, which grows to its limit; rows of an episode are adjacent.

    Args:
        column_shapes: Columns of a batch: their names, and the shape of one row.
        limit: Rows that it holds at most; the oldest give way.
        obs_dtype: Type of observations.
        track_tails: Whether returns hold a value of the last observation, which `refresh_tails` renews.

    Attributes:
        limit: As given.
        size: Rows held.
        position: The next row to write.
        num_appended: Rows ever appended, and
        num_replaced: how often all rows were replaced or dropped: what a copy has to follow.
        columns: Arrays of at least `size` rows: those of a batch, and with `track_tails` what goes with the tails.
        steps_left: [capacity] Steps that are left in the episode, the row's own included. The rows that follow are
            there as long as the row is, for the oldest are overwritten first.
        is_intervention: [capacity] Whether a person chose the row's action.
    """

    def __init__(
        self,
        column_shapes: Mapping[str, tuple[int, ...]],
        *,
        limit: int,
        obs_dtype: np.dtype[Any],
        track_tails: bool = False,
    ) -> None:
        self.limit = limit
        self.size = 0
        self.position = 0
        self.num_appended = 0
        self.num_replaced = 0
        self._track_tails = track_tails
        shapes = {**column_shapes, **(dict.fromkeys(_OF_TAILS, ()) if track_tails else {})}
        dtypes = {Columns.OBS: obs_dtype, Columns.NEXT_OBS: obs_dtype, _LAST_ROW: np.dtype(np.int64)}
        self.columns: dict[str, Array] = {
            name: np.empty((0, *shape), dtype=dtypes.get(name, np.float32)) for name, shape in shapes.items()
        }
        self.steps_left = np.empty(0, dtype=np.int32)
        self.is_intervention = np.empty(0, dtype=bool)

    def _grow(self, num_rows: int) -> None:
        for name, column in self.columns.items():
            self.columns[name] = self._grown(column, num_rows)
        self.steps_left = self._grown(self.steps_left, num_rows)
        self.is_intervention = self._grown(self.is_intervention, num_rows)

    def _grown(self, column: Array, num_rows: int) -> Array:
        grown = np.empty((num_rows, *column.shape[1:]), dtype=column.dtype)
        grown[: self.size] = column[: self.size]
        return grown

    def append(self, rows: RowColumns) -> None:
        """Adds one episode's rows, columns as in `transitions_from_episode`, and `is_intervention` if it is known.

        Raises:
            ValueError: If there are more than the ring can hold.
        """
        if self._track_tails:
            rows = {**rows, _REWARD_SUM: rows[Columns.RETURNS_TO_GO]}
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
        self.steps_left[where] = np.arange(num_rows, 0, -1)
        self.is_intervention[where] = rows.get(IS_INTERVENTION, False)
        self.position = (self.position + num_rows) % self.limit
        self.size = min(self.size + num_rows, capacity)
        self.num_appended += num_rows

    def gather(self, rows: npt.NDArray[np.int64], out: Mapping[str, Array], steps: TargetSteps) -> None:
        """Writes rows, of any shape, into columns of that shape; `out` as in `OfflineTable.gather`."""
        if steps.n_step == 1:
            for name, column in out.items():
                column[...] = self.columns[name][rows]
            return
        num_rewards = steps.num_rewards(self.steps_left[rows])
        last_rows = (rows + num_rewards - 1) % self.limit
        rewards = self.columns[Columns.REWARDS]
        for name, column in out.items():
            if name == Columns.REWARDS:
                column[...] = steps.sum_rewards(num_rewards, lambda k, places: rewards[(rows[places] + k) % self.limit])
            elif name == BOOTSTRAP_DISCOUNT:
                column[...] = steps.bootstrap_discounts(num_rewards)
            elif name == BOOTSTRAP_OBS:
                column[...] = self.columns[Columns.NEXT_OBS][last_rows]
            else:
                column[...] = self.columns[name][last_rows if name == Columns.TERMINATEDS else rows]

    def rows_of_last_reward(self, rows: npt.NDArray[np.int64], steps: TargetSteps) -> npt.NDArray[np.int64]:
        """The rows whose rewards are the last in the targets of these rows."""
        return (rows + steps.num_rewards(self.steps_left[rows]) - 1) % self.limit

    def refresh_tails(self, estimate_values: Callable[[Array], Array]) -> None:
        """Renews the value of the last observation in the returns of all episodes that have such a tail.

        Args:
            estimate_values: Maps observations (n, obs_dim) to values (n,).
        """
        rows = np.flatnonzero(self.columns[TAIL_DISCOUNT][: self.size])
        if len(rows) == 0:
            return
        # An episode is overwritten from its start, so the last row outlives every row that points to it.
        last_rows, episode_of_row = np.unique(self.columns[_LAST_ROW][rows], return_inverse=True)
        values = estimate_values(self.columns[Columns.NEXT_OBS][last_rows])
        tails = self.columns[TAIL_DISCOUNT][rows] * values[episode_of_row]
        self.columns[Columns.RETURNS_TO_GO][rows] = self.columns[_REWARD_SUM][rows] + tails

    def newest_rows(self, num_rows: int) -> npt.NDArray[np.int64]:
        """Numbers of the rows appended last, at most all that are held."""
        num_rows = min(num_rows, self.size)
        return (self.position - num_rows + np.arange(num_rows)) % self.limit

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held."""
        return sum(column[: self.size].nbytes for column in self.columns.values())

    def clear(self) -> None:
        """Drops all rows."""
        self.size = self.position = 0
        self.num_replaced += 1

    def get_state(self) -> dict[str, Any]:
        """Copies of the rows held, and where the next one goes."""
        columns = {name: column[: self.size].copy() for name, column in self.columns.items()}
        return {
            "columns": columns,
            "steps_left": self.steps_left[: self.size].copy(),
            IS_INTERVENTION: self.is_intervention[: self.size].copy(),
            "position": self.position,
            "limit": self.limit,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Replaces all rows by those of the state.

        Raises:
            ValueError: If columns or limit are not those of the state.
        """
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
        # Earlier versions did not keep them. Targets of one step are right for every row.
        self.steps_left = np.array(state.get("steps_left", np.ones(self.size)), dtype=np.int32)
        self.is_intervention = np.array(state.get(IS_INTERVENTION, np.zeros(self.size)), dtype=bool)
        self.position = state["position"]
        self.num_replaced += 1
