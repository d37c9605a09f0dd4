"""Evaluations in results: which are new, as RLlib repeats the last one, and whether one may judge by a metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The duration is measured, so no two evaluations have the same; the counters of episodes change in repetitions, too.
_MARKS = ("episode_return_mean", "episode_return_min", "episode_return_max", "episode_duration_sec_mean")
_EVALUATION = "evaluation/"
_BETTER_BELOW = ("/td_loss", "/td_loss_training", "/action_distance", "/reference_loss")
_OF_HELD_OUT = ("td_loss", "td_loss_training", "q_data", "log_prob")  # None is equal after further updates.
_OF_FQE = ("value", "value_low")


def mark_of_evaluation(result: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What tells the evaluation in a result from others; equal to that of the result before in a repetition.

    Args:
        result: Of `train()`, for any algorithm of RLlib.

    Returns:
        None if there is no evaluation in it.
    """
    evaluation = result.get("evaluation") or {}
    places = (("env_runners", _MARKS), ("held_out", _OF_HELD_OUT), ("fqe", _OF_FQE))
    marks = tuple((evaluation.get(place) or {}).get(name) for place, names in places for name in names)
    return None if all(mark is None for mark in marks) else marks


def flaw_of_judging(metric: str, mode: str, config: Any) -> str | None:
    """Why trials or checkpoints cannot be compared by a metric of evaluations; None if they can, or it is none.

    Args:
        metric: Path, "/" between levels.
        mode: "max" or "min".
        config: Of the algorithm, any of RLlib's.
    """
    if not metric.startswith(_EVALUATION):
        return None
    name, kind = metric.removeprefix(_EVALUATION), getattr(config, "offline_evaluation_type", None)
    if name.startswith("fqe/"):
        setting = "`offline_evaluation_interval` and `offline_evaluation_type: fqe`"
        return None if kind == "fqe" else f"nothing fits values to the data; set {setting}"
    if not config.evaluation_interval and not (name.startswith("held_out/") and kind == "held_out"):
        return "nothing is evaluated; set `evaluation_interval`"
    if name.startswith("env_runners/") and config.env is None:
        return f"there is no environment; set `env`, or judge by `{_EVALUATION}held_out/td_loss` with `mode: min`"
    if name.startswith("held_out/") and not getattr(config, "validation_fraction", 0.0):
        return "nothing is held out; set `validation_fraction`"
    if name.startswith("held_out/") and name.endswith(_BETTER_BELOW) and mode == "max":
        return "the least is the best there; set `mode: min`"
    return None
