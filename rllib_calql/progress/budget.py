"""What a trial has used of its budget: the metrics in `stop` that only grow, and `max_online_env_steps`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rllib_calql.common import metrics as keys

_TIMES = ("time_total_s", "time_since_restore")
_UNITS = {
    keys.NUM_ONLINE_ENV_STEPS_LIFETIME: "online env steps",
    keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME: "online env steps taken",
    "num_env_steps_sampled_lifetime": "env steps",
    "env_runners/num_env_steps_sampled_lifetime": "env steps",
    keys.NUM_ONLINE_EPISODES_LIFETIME: "online episodes",
    "env_runners/num_episodes_lifetime": "episodes",
    keys.NUM_OFFLINE_UPDATES_LIFETIME: "offline updates",
    keys.NUM_ONLINE_UPDATES_LIFETIME: "online updates",
    "training_iteration": "iterations",
}


def value_of(result: Mapping[str, Any], metric: str) -> float | None:
    """The number at a path ("/" between levels) of a result; None if there is none."""
    value: Any = result
    for level in metric.split("/"):
        value = value.get(level) if isinstance(value, Mapping) else None
    return None if value is None or isinstance(value, str) else float(value)


def format_budget(result: Mapping[str, Any], stop: Mapping[str, float]) -> str | None:
    """What was used of the budget, for example `1,998 of 2,000 online env steps, 3:12 of 10:00 min`.

    Args:
        result: The trial's last result.
        stop: Metric path -> value at which the trial ends.

    Returns:
        None if nothing in `stop` is a budget, as a score that is to be reached.
    """
    parts = []
    for metric, limit in stop.items():
        used = value_of(result, metric) or 0.0
        if not math.isfinite(limit):
            continue
        if metric in _TIMES:
            unit = "h" if max(used, limit) >= 3600 else "min"
            parts.append(f"{format_duration(used)} of {format_duration(limit)} {unit}")
        elif metric in _UNITS:
            parts.append(f"{used:,.0f} of {limit:,.0f} {_UNITS[metric]}")
    return ", ".join(parts) or None


def limits_of(stop: Mapping[str, float], config: Mapping[str, Any]) -> dict[str, float]:
    """`stop` and, as a metric like those in it, the setting `max_online_env_steps` of a trial's config."""
    limit = config.get("max_online_env_steps")
    return dict(stop) if limit is None else {**stop, keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME: limit}


def is_budget_spent(result: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a result has reached `max_online_env_steps`: all sub-environments of a runner step together."""
    limit = config.get("max_online_env_steps")
    taken = value_of(result, keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME) or 0
    return limit is not None and taken + config.get("num_envs_per_env_runner", 1) > limit


def format_reached(result: Mapping[str, Any], stop: Mapping[str, float], config: Mapping[str, Any]) -> str | None:
    """Which metrics of `stop` a result has reached, for example "`training_iteration` is 3 of 3"; None if none.

    Args:
        result: The trial's last result.
        stop: Metric path -> value at which the trial ends.
        config: The trial's, whose `max_online_env_steps` is one more reason.
    """
    values = {metric: value_of(result, metric) for metric in stop}
    reached = [
        f"`{metric}` is {_number(value)} of {_number(stop[metric])}"
        for metric, value in values.items()
        if value is not None and value >= stop[metric]
    ]
    if is_budget_spent(result, config):
        taken = value_of(result, keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME) or 0
        reached.append(f"{taken:,.0f} of `max_online_env_steps` {config['max_online_env_steps']:,} are taken")
    return ", ".join(reached) or None


def format_duration(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"
