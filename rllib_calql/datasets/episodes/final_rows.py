"""OGBench's compact layout: a trajectory of T transitions is T + 1 rows, whose last holds the last observation alone.

There is no `next_observations`, which are the observations of the next rows, and `valids` is 0 in the last row of every
trajectory. `terminals` is 1 in that row and in the one before, and `masks` is 0 where an episode terminates, be it in
the last row: the transition into it then terminates.
Source: Park et al. (2024), arXiv:2410.20092, and its code, `ogbench/utils.py` (`load_dataset`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.boundaries import Bools, RowBlock
from rllib_calql.datasets.episodes.columns import bad_valids
from rllib_calql.datasets.episodes.reader import Nested


def shifted(observations: Nested) -> Nested:
    """The observation of the next row for every row; its own for the last."""
    following: Nested = tree.map_structure(lambda array: np.concatenate([array[1:], array[-1:]]), observations)
    return following


def check_followed(table: dict[str, NDArray[np.bool_]], valids: Bools, where: Callable[[int], str]) -> None:
    """Refuses a trajectory that is cut, and goes on without a row that holds its last observation.

    Args:
        table: Both flags of some rows.
        valids: Of these rows and the next one.
        where: Says where a row was read.
    """
    is_cut = table[Columns.TRUNCATEDS] & ~table[Columns.TERMINATEDS]
    lost = is_cut & valids[:-1] & valids[1:]
    if lost.any():
        row = int(np.argmax(lost))
        raise bad_valids(f"is 1 in {where(row + 1)}, after a trajectory that ends in {where(row)}")


def without_final_rows(rows: RowBlock, valids: Bools) -> RowBlock:
    """Leaves out the rows without a transition, and moves the flags in them to the row before.

    Args:
        rows: Whole episodes.
        valids: [R]

    Raises:
        ValueError: If such a row is not the last of its episode, there is no row before it, or no flag ends it.
    """
    last_rows = np.cumsum(rows.lengths) - 1
    has_final = ~valids[last_rows]
    misplaced = ~valids
    misplaced[last_rows[rows.lengths > 1]] = False
    if misplaced.any():
        row = int(np.argmax(misplaced))
        raise bad_valids(f"is 0 in {rows.where(row)}, which is not the last of several rows of a trajectory")
    final = last_rows[has_final]
    terminateds, truncateds = rows.terminateds.copy(), rows.truncateds.copy()
    terminateds[final - 1] |= terminateds[final]
    # With `masks`, one of two rows may end by the trajectory's end, and the other by a termination.
    both, either = truncateds[final - 1] & truncateds[final], truncateds[final - 1] | truncateds[final]
    truncateds[final - 1] = np.where(terminateds[final - 1], both, either)
    unflagged = ~(terminateds | truncateds)[final - 1]
    if unflagged.any():
        row = int(final[np.argmax(unflagged)])
        raise bad_valids(f"is 0 in {rows.where(row)}, where no flag ends the trajectory")
    lost = ~has_final & ~terminateds[last_rows] & ~truncateds[last_rows]
    if lost.any():
        raise bad_valids(f"is 1 in {rows.where(int(last_rows[np.argmax(lost)]))}, the last row of a trajectory")
    kept = np.flatnonzero(valids)

    def take(values: Nested) -> Nested:
        return tree.map_structure(lambda array: array[kept], values)

    where = rows.where
    return replace(
        rows,
        lengths=rows.lengths - has_final,
        observations=take(rows.observations),
        next_observations=take(rows.next_observations),
        actions=take(rows.actions),
        rewards=rows.rewards[kept],
        terminateds=terminateds[kept],
        truncateds=truncateds[kept],
        where=lambda row: where(int(kept[row])),
        extra_model_outputs={name: column[kept] for name, column in rows.extra_model_outputs.items()},
    )
