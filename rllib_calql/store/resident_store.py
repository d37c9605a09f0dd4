"""`ResidentStore`: the transitions of a store on a GPU, where a recorded gradient step looks up its own batch."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.core.columns import Columns
from torch import Tensor

from rllib_calql.networks.steps import BOOTSTRAP_OBS
from rllib_calql.store.replay import IS_OFFLINE, TransitionStore

_LAST_ROWS = "last_rows"  # Of targets of several steps: the rows of their last rewards.
ROW_NUMBERS = "row_numbers"  # The one column of a batch whose rows the learner looks up itself.

_ROWS_AT_ONCE = 2**16
_SHARE_OF_FREE_MEMORY = 0.5

logger = logging.getLogger(__name__)


class ResidentStore:
    """All columns of a batch for all rows that a store may hold, on one device.

    Tensors stay where they are, so that recorded steps may refer to them.

    Args:
        store: The store to copy. Its offline part must not change any more; its online part is followed.
        device: Where to.
    """

    def __init__(self, store: TransitionStore, device: torch.device) -> None:
        self._store = store
        self._num_offline = store.num_offline
        self._columns = {
            name: torch.zeros((_num_rows(store), *row.shape[1:]), dtype=torch.from_numpy(row).dtype, device=device)
            for name, row in _empty_columns(store, 1).items()
        }
        for start in range(0, self._num_offline, _ROWS_AT_ONCE):
            self._write(np.arange(start, min(start + _ROWS_AT_ONCE, self._num_offline)))
        self._version = (-1, 0)  # Of no ring yet.
        self.follow()

    def follow(self) -> None:
        """Copies the online rows that were added since the last call, or all if the store was restored."""
        version = self._store.online_version
        if version == self._version:
            return
        is_same_ring = self._version[0] == version[0]
        num_new = version[1] - self._version[1] if is_same_ring else self._store.num_online
        newest = self._store.newest_online_rows(num_new)
        for start in range(0, len(newest), _ROWS_AT_ONCE):
            self._write(self._num_offline + newest[start : start + _ROWS_AT_ONCE])
        self._version = version

    def look_up(self, row_numbers: Tensor) -> dict[str, Tensor]:
        """The batch of these rows, as `TransitionStore.sample` would give it.

        Args:
            row_numbers: (B,) as drawn by `TransitionStore.draw`.
        """
        batch = {name: column.index_select(0, row_numbers) for name, column in self._columns.items()}
        if _LAST_ROWS in batch:
            batch[BOOTSTRAP_OBS] = self._columns[Columns.NEXT_OBS].index_select(0, batch.pop(_LAST_ROWS))
        batch[IS_OFFLINE] = (row_numbers < self._num_offline).to(torch.float32)
        return batch

    def _write(self, rows: npt.NDArray[np.int64]) -> None:
        """Copies these rows, all of them offline or all of them online."""
        columns = _empty_columns(self._store, len(rows))
        self._store.gather(rows, {name: column for name, column in columns.items() if name != _LAST_ROWS})
        if _LAST_ROWS in columns:
            columns[_LAST_ROWS] = self._store.rows_of_last_reward(rows)
        for name, column in self._columns.items():
            column[torch.from_numpy(rows).to(column.device)] = torch.from_numpy(columns[name]).to(column.device)


def _empty_columns(store: TransitionStore, num_rows: int) -> dict[str, npt.NDArray[Any]]:
    """What is kept of so many rows: no second observation after them, but the row where it is the next observation."""
    columns = store.empty_columns(num_rows)
    if columns.pop(BOOTSTRAP_OBS, None) is not None:
        columns[_LAST_ROWS] = np.empty(num_rows, dtype=np.int64)
    return columns


def _num_rows(store: TransitionStore) -> int:
    return store.num_offline + store.online_capacity


def resident_store(store: TransitionStore, device: torch.device) -> ResidentStore | None:
    """A copy on a GPU that has room for it, else None.

    None as well where returns are renewed in the course of training (`truncation="bootstrap"`).
    """
    if device.type != "cuda" or store.tracks_tails:
        return None
    needed = _num_rows(store) * sum(column.nbytes for column in _empty_columns(store, 1).values())
    free, _ = torch.cuda.mem_get_info(device)
    if needed > _SHARE_OF_FREE_MEMORY * free:
        logger.info(
            "Batches are drawn on the host: all %d rows take %.1f GB, of %.1f GB free on the GPU; a smaller "
            "`online_capacity` may help.",
            _num_rows(store),
            needed / 1e9,
            free / 1e9,
        )
        return None
    return ResidentStore(store, device)
