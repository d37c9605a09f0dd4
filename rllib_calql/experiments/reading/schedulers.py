"""`scheduler` of an experiment file: which of Tune's schedulers, with which options."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from ray import tune
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from rllib_calql.checkpoints.manifest import SETTINGS_KEPT
from rllib_calql.common.evaluations import flaw_of_judging
from rllib_calql.config import CalQLConfig
from rllib_calql.experiments.reading.errors import ExperimentError, did_you_mean, refuse_unknown, reported
from rllib_calql.experiments.reading.spaces import is_space, parse_spaces

DEFAULT_METRIC = "evaluation/env_runners/episode_return_mean"
_MUTATIONS = "hyperparam_mutations"
_SCHEDULERS: dict[str, type[TrialScheduler]] = {
    "asha": AsyncHyperBandScheduler,
    "hyperband": HyperBandScheduler,
    "median_stopping": MedianStoppingRule,
    "pbt": PopulationBasedTraining,
}


def parse_scheduler(
    entry: Any, config: AlgorithmConfig, name: str, *, settings: Collection[str]
) -> TrialScheduler | None:
    """The scheduler of an experiment, or None for all trials to the end.

    Args:
        entry: `{type: ..., ...}` with the arguments of Tune's class, or None.
        config: The experiment's config.
        name: The experiment's name.
        settings: The settings that "pbt" may change.

    Raises:
        ExperimentError: Naming the option, if there is no such scheduler or it cannot be built like this.
    """
    if entry is None:
        return None
    where = f"`scheduler` of experiment '{name}'"
    if not isinstance(entry, dict) or entry.get("type") not in _SCHEDULERS:
        types = ", ".join(_SCHEDULERS)
        raise ExperimentError(f"{where} must be {{type: ..., ...}} with a type of {types}; got {entry!r}.")
    cls = _SCHEDULERS[entry["type"]]
    options = {key: value for key, value in entry.items() if key != "type"}
    refuse_unknown(options, [p for p in inspect.signature(cls).parameters if p != "self"], where)
    options = {"metric": DEFAULT_METRIC, "mode": "max"} | options
    if cls is PopulationBasedTraining:
        # Not every result has an evaluation to judge by.
        options = {"time_attr": "training_iteration", "perturbation_interval": 1, "require_attrs": False} | options
        options[_MUTATIONS] = _parse_mutations(options.get(_MUTATIONS), where, settings, type(config))
    if flaw := flaw_of_judging(str(options["metric"]), str(options["mode"]), config):
        raise ExperimentError(f"{where} judges by `{options['metric']}`, but {flaw}.")
    with reported(where):
        return cls(**options)


def mutations(scheduler: TrialScheduler | None) -> dict[str, Any]:
    """Setting -> search space of what the scheduler changes while trials run."""
    changed = getattr(scheduler, "_hyperparam_mutations", None) or {}
    return {key: tune.choice(value) if isinstance(value, list) else value for key, value in changed.items()}


def _parse_mutations(entry: Any, where: str, settings: Collection[str], config_class: type) -> dict[str, Any]:
    if not isinstance(entry, dict) or not entry:
        raise ExperimentError(
            f"`{_MUTATIONS}` of {where} must map settings to search spaces or lists of values, got {entry!r}."
        )
    parsed: dict[str, Any] = parse_spaces(entry, (_MUTATIONS,))
    for key, value in parsed.items():
        if key not in settings:
            raise ExperimentError(f"Unknown setting `{key}` in `{_MUTATIONS}` of {where}{did_you_mean(key, settings)}")
        if key in SETTINGS_KEPT and issubclass(config_class, CalQLConfig):
            raise ExperimentError(
                f"`{key}` in `{_MUTATIONS}` of {where} cannot be changed in a run: its networks and data are those of "
                f"the checkpoint that it goes on from. Search over it in `config`, `{key}: {{grid_search: [...]}}`."
            )
        is_list = isinstance(value, list) and len(value) > 0
        if not is_list and (isinstance(value, dict) or not is_space(value)):
            raise ExperimentError(
                f"`{key}` in `{_MUTATIONS}` of {where} must be a list of values or a space to sample from, like "
                f"{{loguniform: [1e-5, 1e-3]}}; got {entry[key]!r}."
            )
    return parsed
