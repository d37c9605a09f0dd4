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
_PLACES = {"env_runners": _MARKS, "held_out": _OF_HELD_OUT, "fqe": _OF_FQE}  # Each at its own interval.


def mark_of_evaluation(result: Mapping[str, Any], metric: str | None = None) -> tuple[Any, ...] | None:
    """What tells the evaluation in a result from others; equal to that of the result before in a repetition.

    Args:
        result: Of `train()`, for any algorithm of RLlib.
        metric: Path of a metric whose evaluations are meant, "/" between levels; by default those of any.

    Returns:
        None if there is no evaluation in it.
    """
    marks, place = _marks_of(result), place_of(metric)
    marked = tuple(marks.values()) if place is None else (marks[place],)
    return None if all(mark is None for mark in marked) else marked


class NewEvaluations:
    """Tells what is new in the evaluations of results, which are given one after the other."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[Any, ...] | None] = {}

    def in_result(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What stands below "evaluation", without what is repeated from the result before."""
        marks, before = _marks_of(result), self._before
        self._before = marks
        evaluation = result.get("evaluation") or {}
        return {key: value for key, value in evaluation.items() if key not in marks or marks[key] != before.get(key)}


def _marks_of(result: Mapping[str, Any]) -> dict[str, tuple[Any, ...] | None]:
    evaluation = result.get("evaluation") or {}
    marks = {
        place: tuple((evaluation.get(place) or {}).get(name) for name in names) for place, names in _PLACES.items()
    }
    return {place: None if all(value is None for value in mark) else mark for place, mark in marks.items()}


def place_of(metric: str | None) -> str | None:
    """Below which key of "evaluation" a metric stands, if it is one of those that come at intervals of their own."""
    parts = (metric or "").split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "evaluation" and parts[1] in _PLACES else None


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
