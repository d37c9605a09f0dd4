"""What `EpisodeLog` and `PolicyClient` ask alike of the reward and the flags of a step."""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST = float(np.finfo(np.float32).max)  # Networks and stores hold float32.


def checked_flag(name: str, flag: Any) -> bool:
    """A flag as a bool.

    Args:
        name: What messages call it.
        flag: True or False, also as 1 or 0, also NumPy's.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(flag, (bool, np.bool_, int, np.integer)) or flag not in (0, 1):
        raise TypeError(f"`{name}` must be True or False, got {flag!r}.")
    return bool(flag)


def checked_reward(reward: Any) -> float:
    """A reward as a float.

    Args:
        reward: A number, bare or in an array of one.

    Raises:
        ValueError: If it is none, or beyond what float32 holds.
    """
    number = as_number(reward)
    if number is None or not abs(number) <= LARGEST:
        raise ValueError(f"`reward` must be a finite number, got {reward!r}; float32 holds up to {LARGEST:.2g}.")
    return number


def as_number(value: Any) -> float | None:
    """A number, bare or in an array of one, as a float; None if it is none, or beyond what float64 holds."""
    if not isinstance(value, (bool, int, float)) and hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            return None
    try:
        return float(value) if isinstance(value, (bool, int, float)) else None
    except OverflowError:
        return None
