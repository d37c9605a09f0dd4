"""What a setting that is a number, or a schedule of numbers, must be."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from rllib_calql.common.schedules import flaw_of_schedule, is_float, is_schedule

A_SCHEDULE = "a schedule [[0, value], [env_steps, value], ...]"


def is_real(value: Any) -> bool:
    """Whether it is a number that a float can hold, infinity included."""
    return is_float(value) and not math.isnan(value)


def is_one_of(value: Any, choices: Collection[str]) -> bool:
    """Whether it is one of these words. An array is none; Python would compare each of its entries."""
    return isinstance(value, str) and value in choices


def is_integer(value: Any, minimum: int) -> bool:
    """Whether it is a whole number of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def plain_numbers(value: Any, *, in_dicts: bool = False) -> Any:
    """The value with Python's numbers in place of NumPy's scalars, also in lists and tuples; else itself.

    Args:
        value: Anything.
        in_dicts: Whether values in dicts are replaced as well.
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        parts = [plain_numbers(part, in_dicts=in_dicts) for part in value]
        is_same = all(part is old for part, old in zip(parts, value, strict=True))
        return value if is_same else type(value)(parts)
    if in_dicts and type(value) is dict:
        found = {name: plain_numbers(part, in_dicts=True) for name, part in value.items()}
        return value if all(found[name] is part for name, part in value.items()) else found
    return value


def check_schedulable(name: str, value: Any, *, is_allowed: bool, allowed: str, high: float = math.inf) -> None:
    """Checks a setting that may be a schedule.

    Args:
        name: Of the setting.
        value: Of the setting.
        is_allowed: Whether it is right where it is no schedule.
        allowed: What it may be, for the message.
        high: Largest value of a schedule's point.

    Raises:
        ValueError: Saying what is allowed, and what is wrong with a schedule.
    """
    if not is_schedule(value):
        if not is_allowed:
            raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
    elif flaw := flaw_of_schedule(value, low=0.0, high=high):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}: {flaw}.")
