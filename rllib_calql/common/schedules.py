"""Values that change with the online env steps: numbers, or piecewise linear schedules [[env steps, value], ...]."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def is_schedule(value: Any) -> bool:
    """Whether a setting is a schedule, not a number or None. What it holds is not looked at."""
    return isinstance(value, (list, tuple))


def value_at(value: Any, env_steps: int) -> float:
    """The value of a number or a schedule.

    Args:
        value: A number, or points [[0, value], [env_steps, value], ...] with a straight line between two of them; of
            two at the same env step the second counts from there on. After the last one its value stays. RLlib's
            schedules of learning rates are the same.
        env_steps: Online env steps of the run so far; 0 before the switch.
    """
    if not is_schedule(value):
        return float(value)
    steps, values = zip(*value, strict=True)
    return float(np.interp(env_steps, steps, values))


def largest_value(value: Any) -> float:
    """The largest value that a number or a schedule takes."""
    return max(float(point[1]) for point in value) if is_schedule(value) else float(value)


def flaw_of_schedule(value: Sequence[Any], *, low: float, high: float = math.inf) -> str | None:
    """What is wrong with a list that is to be a schedule, or None.

    Args:
        value: A list or tuple of anything.
        low: Least value of a point.
        high: Largest value of a point.
    """
    if not all(is_schedule(point) and len(point) == 2 and all(map(_is_finite, point)) for point in value):
        return "its points must be pairs [env_steps, value] of finite numbers"
    if len(value) < 2:
        return "it must have at least 2 points"
    steps, values = zip(*value, strict=True)
    if steps[0] != 0:
        return f"it must start at 0 env steps, not at {steps[0]}"
    for before, after in itertools.pairwise(steps):
        if after < before:
            return f"its env steps must not fall back, and {after} comes after {before}"
    if steps[1] == 0:
        return "its first value holds for no env step, since the second point is at 0 as well; move that to 1 or later"
    if any(first == third for first, third in zip(steps, steps[2:], strict=False)):
        return "it has more than two points at one env step, of which all but the first and the last do nothing"
    for number in values:
        if not low <= number <= high:
            return f"its values must be at least {low:g}" + ("" if math.isinf(high) else f" and at most {high:g}")
    return None


def is_float(value: Any) -> bool:
    """Whether it is a number that a float can hold; NaN is one, a whole number of 400 digits is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _is_finite(value: Any) -> bool:
    return is_float(value) and math.isfinite(value)
