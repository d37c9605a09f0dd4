"""What an environment says of its steps in infos: the action that was executed, and whether a person chose it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rllib_calql.datasets.episodes.columns import EXECUTED_ACTIONS, IS_INTERVENTION

EXECUTED_ACTION = EXECUTED_ACTIONS[1]
"""The key of infos for what the system did in place of the action that it was asked for, in environment units."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class StepReports:
    """What the infos of an episode say of its T steps.

    Attributes:
        executed: [T, A] What was executed, in environment units; 0 where nothing is said. None if no step says it.
        is_executed: [T] Where something is said.
        is_intervention: [T] Where a person chose the action; None if no step says whether one did.
    """

    executed: Array | None
    is_executed: npt.NDArray[np.bool_]
    is_intervention: npt.NDArray[np.bool_] | None

    def first_not_finite(self) -> int | None:
        """The first step whose executed action is NaN or infinite; None if there is none."""
        if self.executed is None or self.executed.dtype.kind != "f":
            return None
        bad = np.flatnonzero(~np.isfinite(self.executed).all(axis=1))
        return int(bad[0]) if len(bad) else None


def step_reports(
    infos: Sequence[Any], num_steps: int, action_shape: tuple[int, ...], where: Callable[[int], str]
) -> StepReports:
    """Reads the infos of an episode.

    Args:
        infos: That of the reset, which says nothing of a step, and those of the steps; missing ones say nothing.
        num_steps: T.
        action_shape: Shape of an action.
        where: Says of a step where it was made, for messages.

    Raises:
        ValueError: If an executed action has another shape than an action, or a mark is neither true nor false.
        TypeError: If an executed action is no array of numbers.
    """
    steps = [info if isinstance(info, Mapping) else {} for info in infos[1 : num_steps + 1]]
    executed = {t: info[EXECUTED_ACTION] for t, info in enumerate(steps) if info.get(EXECUTED_ACTION) is not None}
    marks = {t: info[IS_INTERVENTION] for t, info in enumerate(steps) if info.get(IS_INTERVENTION) is not None}
    is_executed = np.zeros(num_steps, dtype=bool)
    is_executed[list(executed)] = True
    actions = None
    if executed:
        arrays = {t: _action(value, action_shape, where(t)) for t, value in executed.items()}
        dtype = np.result_type(*{array.dtype for array in arrays.values()})
        actions = np.zeros((num_steps, max(1, int(np.prod(action_shape)))), dtype)
        for t, array in arrays.items():
            actions[t] = array.reshape(-1)
    is_intervention = None
    if marks:
        is_intervention = np.zeros(num_steps, dtype=bool)
        for t, mark in marks.items():
            is_intervention[t] = _mark(mark, where(t))
    return StepReports(actions, is_executed, is_intervention)


def columns_of_infos(
    infos: Sequence[Any], num_steps: int, action_shape: tuple[int, ...], where: Callable[[int], str]
) -> dict[str, Array]:
    """The same as columns of rows: `executed_actions`, NaN where nothing is said, and `is_intervention`.

    Raises:
        ValueError: As `step_reports`, and if an executed action is not finite.
        TypeError: As `step_reports`.
    """
    reports = step_reports(infos, num_steps, action_shape, where)
    columns: dict[str, Array] = {}
    if reports.executed is not None:
        if (t := reports.first_not_finite()) is not None:
            raise ValueError(f"{where(t)}: {not_finite(reports.executed[t])}")
        column = reports.executed.astype(np.float64)
        column[~reports.is_executed] = np.nan
        columns[EXECUTED_ACTIONS[0]] = column
    if reports.is_intervention is not None:
        columns[IS_INTERVENTION] = reports.is_intervention
    return columns


def complete_columns(chunks: Sequence[tuple[int, dict[str, Array]]]) -> None:
    """Gives all chunks of one episode the columns of `columns_of_infos` that some have, saying nothing there.

    Args:
        chunks: Steps and columns of each.
    """
    for name, nothing in ((EXECUTED_ACTIONS[0], np.nan), (IS_INTERVENTION, False)):
        told = next((columns[name] for _, columns in chunks if name in columns), None)
        for num_steps, columns in chunks:
            if told is not None and name not in columns:
                columns[name] = np.full((num_steps, *told.shape[1:]), nothing, told.dtype)


def not_finite(action: Array) -> str:
    """What is wrong with an executed action [A] that is not finite."""
    return (
        f"`infos[{EXECUTED_ACTION!r}]` is {action.tolist()}; it must be finite: leave the key out where "
        "it is not known."
    )


def _action(value: Any, shape: tuple[int, ...], where: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError:  # Rows of different lengths.
        array = np.asarray(value, dtype=object)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{where}: `infos[{EXECUTED_ACTION!r}]` must hold numbers, got {array.dtype}: {value!r}.")
    if array.shape != shape:
        raise ValueError(
            f"{where}: `infos[{EXECUTED_ACTION!r}]` has the shape {array.shape}, an action has {shape}; give the whole "
            "action that was executed, in the environment's units."
        )
    return array


def _mark(value: Any, where: str) -> bool:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf" or array.item() not in (0, 1):
        raise ValueError(f"{where}: `infos[{IS_INTERVENTION!r}]` must be True or False, got {value!r}.")
    return bool(array.item())
