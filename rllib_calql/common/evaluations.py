"""Evaluations in results: RLlib repeats the last one in the results of iterations without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The duration is measured, so no two evaluations have the same; the counters of episodes change in repetitions, too.
_MARKS = ("episode_return_mean", "episode_return_min", "episode_return_max", "episode_duration_sec_mean")


def mark_of_evaluation(result: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What tells the evaluation in a result from others; equal to that of the result before in a repetition.

    Args:
        result: Of `train()`, for any algorithm of RLlib.

    Returns:
        None if there is no evaluation in it.
    """
    runners = (result.get("evaluation") or {}).get("env_runners") or {}
    marks = tuple(runners.get(name) for name in _MARKS)
    return None if all(mark is None for mark in marks) else marks
