"""`stop` of an experiment: at which values of which metrics trials end, and that some end comes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune.schedulers import AsyncHyperBandScheduler, HyperBandScheduler, TrialScheduler

from rllib_calql.common import metrics as keys
from rllib_calql.config import CalQLConfig
from rllib_calql.result_metrics import metrics_of, why_absent

# Metrics that grow as long as a trial interacts with its environment.
_GROWING = (
    *("training_iteration", "iterations_since_restore", "time_total_s", "time_since_restore", "timestamp"),
    *("num_env_steps_sampled_lifetime", keys.NUM_ONLINE_ENV_STEPS_LIFETIME, keys.NUM_ONLINE_EPISODES_LIFETIME),
    *(keys.NUM_ONLINE_UPDATES_LIFETIME, keys.NUM_OFFLINE_UPDATES_LIFETIME, "timesteps_total", "episodes_total"),
    *("num_env_steps_sampled", "num_env_steps_trained", keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME),
)
# The same anywhere below these places.
_GROWING_PLACES = ("env_runners", "evaluation", "learners")
_GROWING_BELOW = (
    *("num_env_steps_sampled_lifetime", "num_episodes_lifetime", "num_agent_steps_sampled_lifetime"),
    *("num_module_steps_sampled_lifetime", "num_env_steps_trained_lifetime", "num_module_steps_trained_lifetime"),
    keys.NUM_UPDATES_LIFETIME,
)
_STORED = f"{keys.STORE}/{keys.NUM_ONLINE_TRANSITIONS}"


def parse_stop(
    stop: Any,
    name: str,
    config: AlgorithmConfig,
    examples: Sequence[AlgorithmConfig],
    scheduler: TrialScheduler | None = None,
) -> dict[str, float]:
    """Checks `stop` of an experiment.

    Args:
        stop: Metric -> value, nested mappings or paths with "/"; `{}` for no end; None if it is not there.
        name: Of the experiment.
        config: Its config; values may be search spaces.
        examples: What trials may get, without search spaces.
        scheduler: May end trials as well.

    Returns:
        Metric path -> value at which a trial ends.

    Raises:
        ValueError: If results have no such metric, or an experiment with an environment would never end.
    """
    flat = _flattened(stop if stop is not None else {}, name)
    metrics = metrics_of(config)
    for metric, value in flat.items():
        if fault := metrics.fault_of(metric):
            raise ValueError(f"`stop` of experiment '{name}': {fault}.")
        for example in examples:
            if reason := why_absent(metric, example):
                raise ValueError(
                    f"`stop` of experiment '{name}': `{metric}` never appears, because {reason}, or drop it."
                )
        if _is_growing(metric) and value <= 0:
            raise ValueError(
                f"`stop` of experiment '{name}': `{metric}` must be above 0, got {value!r}, which would end the run at "
                "its first result."
            )
    if stop is None or flat:
        for example in examples:
            _check_end(flat, name, example, scheduler)
    return flat


def _flattened(stop: Any, name: str) -> dict[str, float]:
    if not isinstance(stop, dict):
        raise ValueError(f"`stop` of experiment '{name}' must map metrics to numbers, got {stop!r}.")
    flat: dict[str, float] = {}
    for key, value in stop.items():
        inner = (
            {f"{key}/{path}": number for path, number in _flattened(value, name).items()} if _is_level(value) else {}
        )
        if not inner:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise ValueError(f"`stop` of experiment '{name}': `{key}` must be a number, got {value!r}.")
            inner = {str(key): value}
        if twice := flat.keys() & inner.keys():
            raise ValueError(f"`stop` of experiment '{name}' has `{min(twice)}` twice; drop one.")
        flat |= inner
    return flat


def _is_level(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _is_growing(metric: str) -> bool:
    levels = metric.split("/")
    return metric in _GROWING or (levels[0] in _GROWING_PLACES and bool(set(_GROWING_BELOW) & set(levels[-2:])))


def _check_end(stop: Mapping[str, float], name: str, config: AlgorithmConfig, scheduler: TrialScheduler | None) -> None:
    """Refuses an experiment that would interact with its environment for ever, and does not say so."""
    if config.env is None or _ends_by_scheduler(scheduler) or getattr(config, "max_online_env_steps", None) is not None:
        return
    if any(_is_growing(metric) and _is_reached_in_time(metric, value, config) for metric, value in stop.items()):
        return
    if _STORED in stop and isinstance(config, CalQLConfig) and stop[_STORED] <= config.online_capacity:
        return
    is_calql = isinstance(config, CalQLConfig)
    env_steps = keys.NUM_ONLINE_ENV_STEPS_LIFETIME if is_calql else "num_env_steps_sampled_lifetime"
    setting = ", or `max_online_env_steps: 2000` in `config`" if is_calql else ""
    beyond = ""
    if is_calql and keys.NUM_OFFLINE_UPDATES_LIFETIME in stop:
        beyond = (
            f" `{keys.NUM_OFFLINE_UPDATES_LIFETIME}` does not grow above `offline_updates`, which is "
            f"{config.num_offline_updates}."
        )
    what = f"only ends at {', '.join(f'`{metric}`' for metric in stop)}, which may never come" if stop else "has no end"
    raise ValueError(
        f"Experiment '{name}' has an environment and {what}, so it may interact with it for ever.{beyond} Set a bound, "
        f"for example `stop: {{{env_steps}: 2000}}` or `stop: {{time_total_s: 3600}}` (in seconds){setting}. To go on "
        "until somebody stops it, say so with `stop: {}`, or `time_total_s: .inf` beside other metrics."
    )


def _is_reached_in_time(metric: str, value: float, config: AlgorithmConfig) -> bool:
    """Whether a growing metric gets there. Infinity says that it need not, which is as explicit as `stop: {}`."""
    if metric != keys.NUM_OFFLINE_UPDATES_LIFETIME or not isinstance(config, CalQLConfig):
        return True
    return value <= config.num_offline_updates or math.isinf(value)


def _ends_by_scheduler(scheduler: TrialScheduler | None) -> bool:
    """Whether a scheduler ends every trial after a time: Hyperband does, at its `max_t`."""
    if isinstance(scheduler, (AsyncHyperBandScheduler, HyperBandScheduler)):
        return bool(getattr(scheduler, "_stop_last_trials", True))
    return False
