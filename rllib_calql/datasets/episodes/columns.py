"""Names of the columns in files of rows: this package's (RLlib's), and what other projects call the same thing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.other_tools import JOIN_REMEDY, layout_of_other_tool

ALIASES: dict[str, tuple[str, ...]] = {
    Columns.OBS: ("observations", "observation"),
    Columns.NEXT_OBS: ("next_observations", "next_observation", "next_obs"),
    Columns.ACTIONS: ("action",),
    Columns.REWARDS: ("reward",),
    Columns.TERMINATEDS: ("terminals", "terminations", "terminated"),
    Columns.TRUNCATEDS: ("timeouts", "truncations", "truncated"),
    Columns.EPS_ID: ("episode_ids", "episode_id"),
    Columns.T: (),
}
"""RLlib's name -> other names of the same column: those of D4RL, Gymnasium, Minari and LeRobot."""

EXECUTED_ACTIONS = ("executed_actions", "executed_action")
"""Names of the column of what a system did in place of the actions that it was asked for; it is learned from."""

IS_INTERVENTION = "is_intervention"
"""The column that is 1 in steps whose action a person chose."""

NAMES = frozenset(name for column, others in ALIASES.items() for name in (column, *others)).union(EXECUTED_ACTIONS)
"""All names that mean a column of transitions, and so no further column."""

MASKS = "masks"
"""OGBench's column: 0 where an episode terminates; `terminals` marks the end of every trajectory beside it."""

VALIDS = "valids"
"""OGBench's column: 0 in the last row of every trajectory, which holds its last observation and no transition."""

DONES_REMEDY = (
    "`dones` does not tell terminations, which have no future, from time-outs, which have; split it into "
    f"`{Columns.TERMINATEDS}` and `{Columns.TRUNCATEDS}`"
)


def find_columns(present: Collection[str], where: str) -> dict[str, str]:
    """Maps RLlib's names to the names by which a file calls the columns it has.

    Args:
        present: Names in the file.
        where: The file, for the message.

    Returns:
        RLlib's name -> name in the file. Actions are those that were executed, if the file has them.

    Raises:
        ValueError: If one column occurs under two names.
    """
    found: dict[str, str] = {}
    for canonical, others in ALIASES.items():
        names = [name for name in (canonical, *others) if name in present]
        if len(names) > 1:
            raise ValueError(
                f"{where} has the columns {', '.join(f'`{name}`' for name in names)}, which mean the same; keep one."
            )
        if names:
            found[canonical] = names[0]
    executed = [name for name in EXECUTED_ACTIONS if name in present]
    if len(executed) > 1:
        raise ValueError(f"{where} has the columns `{executed[0]}` and `{executed[1]}`, which mean the same; keep one.")
    if executed and Columns.ACTIONS in found:
        found[Columns.ACTIONS] = executed[0]
    return found


def is_not_executed(name: str, found: Mapping[str, str]) -> bool:
    """Whether a column holds the actions that were asked for, where those that were executed are read in their place.

    Args:
        name: In the file.
        found: As `find_columns` gives it.
    """
    is_asked_for = name in (Columns.ACTIONS, *ALIASES[Columns.ACTIONS])
    return is_asked_for and found.get(Columns.ACTIONS) in EXECUTED_ACTIONS


def replaced_by(found: Mapping[str, str]) -> str:
    """Why the actions that were asked for are not read, for the list of ignored columns."""
    return f"`{found[Columns.ACTIONS]}` is read in its place"


def require_columns(found: Collection[str], needed: Iterable[str], present: Collection[str], where: str) -> None:
    """Refuses a file that lacks a column.

    Args:
        found: RLlib's names of the columns that were found.
        needed: RLlib's names of the columns that must be there.
        present: All names in the file.
        where: The file, for the message.

    Raises:
        ValueError: Naming what is missing, what is there, and the remedy.
    """
    missing = [name for name in needed if name not in found]
    if not missing:
        return
    remedy = "rename the column, or add it"
    if "dones" in present and Columns.TERMINATEDS in missing:
        remedy = DONES_REMEDY
        if Columns.TRUNCATEDS in found:
            remedy += f": `{Columns.TERMINATEDS}` are those `dones` that are no time-outs"
    elif Columns.OBS in missing:
        remedy += f"; {JOIN_REMEDY}"
    elif Columns.TERMINATEDS in missing:
        remedy += (
            f"; `{Columns.TERMINATEDS}` is true where the task ended by itself, `{Columns.TRUNCATEDS}` where the "
            "episode was cut, as by a time limit"
        )
    remedy = layout_of_other_tool(present) or remedy
    raise ValueError(
        f"{where} has no column {', '.join(f'`{name}`' for name in missing)}; "
        f"its columns are {', '.join(f'`{name}`' for name in sorted(present))}; {remedy}."
    )


def check_valids(present: Collection[str], where: str) -> None:
    """Refuses OGBench's compact data if nothing in them tells terminations from the ends of trajectories.

    Args:
        present: Names in the file, `valids` among them.
        where: The file, for the message.

    Raises:
        ValueError: Naming what is missing.
    """
    if {MASKS, Columns.TRUNCATEDS, *ALIASES[Columns.TRUNCATEDS]}.isdisjoint(present):
        raise ValueError(
            f"{where} has the column `{VALIDS}`, as OGBench's compact data have, where `terminals` marks the ends of "
            f"trajectories and not terminations; add `{MASKS}` (0 where an episode terminates), or `timeouts` if "
            f"`terminals` are terminations, or leave `{VALIDS}` out if it means something else."
        )


def bad_valids(what: str) -> ValueError:
    """The error about a column `valids` that is not OGBench's."""
    return ValueError(
        f"`{VALIDS}` {what}; in OGBench's compact data it is 0 in the last row of every trajectory, which holds the "
        "last observation alone, and 1 elsewhere: repair it, or leave the column out if it means something else."
    )


def check_whole_steps(t: NDArray[Any], where: Callable[[int], str]) -> None:
    """Refuses a column `t` [R] that holds other things than whole numbers.

    Raises:
        ValueError: If a number is missing or not whole.
    """
    is_odd = t != np.floor(t)
    if is_odd.any():
        row = int(np.argmax(is_odd))
        if np.isnan(t[row]):
            raise ValueError(f"`{Columns.T}` has no number in {where(row)}; fill it in.")
        raise times_for_steps(f"it is {t[row]:g} in {where(row)}")


def times_for_steps(what: str) -> ValueError:
    """The error about a column `t` that does not number the steps of episodes."""
    return ValueError(
        f"`{Columns.T}` holds times, not steps: {what}. It numbers the steps of every episode by whole numbers that "
        "count up by 1; give a column of times another name, such as `time`: episodes then end where "
        f"`{Columns.TERMINATEDS}`, `{Columns.TRUNCATEDS}` or `{Columns.EPS_ID}` say so."
    )
