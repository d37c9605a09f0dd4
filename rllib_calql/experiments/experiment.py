"""Strict experiment files: YAML or Python in, validated experiments out.

The YAML format is the one of RLlib's former `rllib train file`: `name: {run, env, stop, config}`.
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.rllib.algorithms import registry
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune import PlacementGroupFactory
from ray.tune.schedulers import TrialScheduler

from rllib_calql.common import metrics as keys
from rllib_calql.config import CalQLConfig
from rllib_calql.experiments.best_checkpoint import BestMetric
from rllib_calql.experiments.reading.errors import ExperimentError, did_you_mean, refuse_unknown, reported
from rllib_calql.experiments.reading.loggers import Logger, parse_loggers
from rllib_calql.experiments.reading.schedulers import mutations, parse_scheduler
from rllib_calql.experiments.reading.search_algorithms import SearchAlgorithm, parse_search_alg
from rllib_calql.experiments.reading.spaces import (
    KeyPath,
    find_spaces,
    foreseeable_choices,
    foreseeable_combinations,
    substitute,
)
from rllib_calql.experiments.reading.typed_settings import build_config, settings_by_method
from rllib_calql.experiments.reading.yaml_files import load_yaml, name_in_yaml
from rllib_calql.experiments.safety_net import SAFETY_KEYS, SafetyNet, safety_settings
from rllib_calql.registration import register
from rllib_calql.sources import check_sources
from rllib_calql.stopping import check_judged_by, parse_stop
from rllib_calql.system.plain_names import refuse_unplain_name

_EXPERIMENT_KEYS = (
    "run",
    "env",
    "stop",
    "config",
    "num_samples",
    "scheduler",
    "search_alg",
    "loggers",
    "max_failures",
    *SAFETY_KEYS,
)


def num_cpus_of_largest(requests: Iterable[PlacementGroupFactory]) -> int:
    """Whole CPUs that Ray needs for the largest of several trials, at least 1.

    Args:
        requests: What each trial asks Ray for.
    """
    cpus: list[float] = [request.required_resources.get("CPU", 0) for request in requests]
    return max(1, math.ceil(max(cpus, default=1)))


@dataclass(frozen=True)
class Experiment:
    """One experiment, checked and ready for `tune.Tuner`.

    Attributes:
        name: Name of the experiment and of its folder.
        algorithm: Algorithm class.
        config: Its config. Values may be Tune search spaces.
        stop: Metric path ("/" between levels) -> value at which a trial ends.
        num_samples: Trials per point of the grid.
        scheduler: Tune's scheduler, or None for all trials to the end.
        search_alg: Who chooses the settings of the trials; None for grids and independent draws.
        loggers: Where results go besides the run's folder.
        checkpoint_config: `checkpoint_frequency`, `checkpoint_at_end` and `num_to_keep`, where they are given.
        checkpoint_every_s: See `SafetyNet.every_s`.
        keep_best: By what the best checkpoint is chosen; None to keep none.
        max_failures: How often a trial that died is restarted from its last checkpoint; -1 for always.
        examples: Configs with every search space replaced by a value, each foreseeable value in at least one.
    """

    name: str
    algorithm: type
    config: AlgorithmConfig
    stop: dict[str, float] = field(default_factory=dict)
    num_samples: int = 1
    scheduler: TrialScheduler | None = None
    search_alg: SearchAlgorithm | None = None
    loggers: tuple[Logger, ...] = ()
    checkpoint_config: dict[str, Any] = field(default_factory=dict)
    checkpoint_every_s: float | None = None
    keep_best: BestMetric | None = field(default_factory=BestMetric)
    max_failures: int = 0
    examples: tuple[AlgorithmConfig, ...] = ()

    @property
    def param_space(self) -> dict[str, Any]:
        """What Tune draws the configs of trials from: `config`, and for Cal-QL the env steps at which `stop` ends."""
        space: dict[str, Any] = self.config.to_dict()
        if isinstance(self.config, CalQLConfig):
            space["_ends_at_env_steps"] = self.stop.get(keys.NUM_ONLINE_ENV_STEPS_LIFETIME)
        return space

    @property
    def safety_net(self) -> SafetyNet:
        """Which checkpoints are written and kept."""
        return SafetyNet.of(self.checkpoint_config, self.checkpoint_every_s, self.keep_best)

    @property
    def requests(self) -> list[PlacementGroupFactory]:
        """What each of `examples` asks Ray for."""
        return [self.algorithm.default_resource_request(config) for config in self.examples]  # type: ignore[attr-defined]

    @property
    def num_cpus_of_largest_trial(self) -> int:
        """CPUs that the largest trial asks Ray for."""
        return num_cpus_of_largest(self.requests)

    def tune_config(self) -> tune.TuneConfig:
        """How many trials Tune makes, who chooses them, and who ends them."""
        return tune.TuneConfig(
            num_samples=self.num_samples,
            scheduler=self.scheduler,
            **({} if self.search_alg is None else self.search_alg.tune_settings()),
        )

    def with_seed(self, seed: int) -> Experiment:
        """The same experiment with the config's seed set."""
        config = self.config.copy(copy_frozen=False)
        return replace(self, config=config.debugging(seed=seed))


def read_experiments(path: str | Path) -> list[Experiment]:
    """Reads and checks all experiments of a file.

    Args:
        path: A `.yaml`, `.yml` or `.py` file.

    Returns:
        The experiments in the order of the file.

    Raises:
        ExperimentError: Naming the file or experiment, the setting, and what to do.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ExperimentError(f"The experiment file '{path}' {what}; give a .yaml or .py file.")
    if path.suffix == ".py":
        return _with_plain_names([_read_python(path)], path)
    if path.suffix not in (".yaml", ".yml"):
        raise ExperimentError(f"The experiment file '{path}' must end in .yaml, .yml or .py.")
    content = load_yaml(path)
    if not isinstance(content, dict) or not content:
        raise ExperimentError(f"'{path}' must map experiment names to {{run, env, stop, config}}, got {content!r}.")
    named = [(name_in_yaml(name, f"The name of an experiment in '{path}'"), entry) for name, entry in content.items()]
    return _with_plain_names([parse_experiment(name, entry) for name, entry in named], path)


def _with_plain_names(experiments: list[Experiment], path: Path) -> list[Experiment]:
    """The same experiments; their names become folders."""
    names = [experiment.name for experiment in experiments]
    try:
        for name in names:
            refuse_unplain_name(name, f"The name of an experiment in '{path}'")
    except ValueError as error:
        raise ExperimentError(str(error)) from error
    if len(set(names)) < len(names):
        raise ExperimentError(f"Two experiments in '{path}' have the same name; there are {', '.join(names)}.")
    return experiments


def _read_python(path: Path) -> Experiment:
    with reported(f"'{path}' could not be run"):
        module = runpy.run_path(str(path), run_name="rllib_experiment")
    config = module.get("config")
    if not isinstance(config, AlgorithmConfig) or config.algo_class is None:
        raise ExperimentError(
            f"'{path}' must define `config`, an algorithm's config like `CalQLConfig()`, got {type(config).__name__}."
        )
    name = str(module.get("name", path.stem))
    examples = _examples_of(config, name)
    return Experiment(
        name=name,
        algorithm=config.algo_class,
        config=config,
        stop=_stop_of(module.get("stop"), name, config, examples),
        examples=examples,
        **safety_settings(module, config, name),
    )


def _examples_of(config: AlgorithmConfig, name: str) -> tuple[AlgorithmConfig, ...]:
    """What trials may get: one value for each space, every foreseeable value once. Bad ones show before training."""
    spaces = dict(find_spaces(vars(config)))
    examples = [_validated(config, spaces, chosen, name) for chosen in foreseeable_choices(spaces)]
    if len(spaces) > 1:
        for chosen in foreseeable_combinations(spaces):
            _validated(config, spaces, chosen, name)
    with reported(f"Experiment '{name}'"):
        check_sources(examples)
    return tuple(examples)


def _validated(
    config: AlgorithmConfig, spaces: Mapping[KeyPath, Any], chosen: Mapping[KeyPath, Any], name: str
) -> AlgorithmConfig:
    example = config.copy(copy_frozen=False)
    for attribute in {path[0] for path in spaces}:
        setattr(example, attribute, substitute(getattr(config, attribute), chosen, (attribute,)))
    with reported(f"Experiment '{name}'"):
        example.validate()
        _check_places(example)
    return example


def _check_places(config: AlgorithmConfig) -> None:
    """Ray Tune reserves a place for every worker of a trial, and Ray refuses one of no size."""
    assert config.algo_class is not None
    if not all(config.algo_class.default_resource_request(config).bundles):
        raise ValueError(
            "`num_cpus_per_env_runner` must be above 0, since Ray Tune reserves a place for every worker, and so must "
            "`num_cpus_per_learner`; set 0.01 to run more of them than there are CPUs."
        )


def parse_experiment(name: str, entry: Any) -> Experiment:
    """Checks one entry of an experiment file, `{run, env, stop, config, ...}`.

    Raises:
        ExperimentError: Naming the setting, and what to do.
    """
    refuse_unknown(entry, _EXPERIMENT_KEYS, f"experiment '{name}'")
    if "run" not in entry:
        raise ExperimentError(f"Experiment '{name}' has no `run`; set it to an algorithm, for example `run: CalQL`.")
    algorithm, default_config = _find_algorithm(entry["run"], name)
    settings = entry.get("config") or {}
    if not isinstance(settings, dict):
        raise ExperimentError(f"`config` of experiment '{name}' must be a mapping, got {settings!r}.")
    for key in sorted(settings.keys() & (set(_EXPERIMENT_KEYS) - {"env"})):
        raise ExperimentError(f"`{key}` is in `config` of experiment '{name}'; it stands beside `config`, so move it.")
    if "env" in entry:
        if "env" in settings:
            raise ExperimentError(f"Experiment '{name}' has `env` twice, beside and inside `config`; drop one.")
        settings = {"env": entry["env"], **settings}
    config = build_config(default_config, settings, name)
    num_samples = entry.get("num_samples", 1)
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ExperimentError(f"`num_samples` of experiment '{name}' must be a whole number >= 1, got {num_samples!r}.")
    max_failures = entry.get("max_failures", 0)
    if not isinstance(max_failures, int) or isinstance(max_failures, bool) or max_failures < -1:
        raise ExperimentError(
            f"`max_failures` of experiment '{name}' must be a whole number >= 0, or -1 to restart a trial however "
            f"often it fails; got {max_failures!r}."
        )
    safety = safety_settings(entry, config, name)
    settable = {s for accepted in settings_by_method(type(config)).values() for s in accepted} & config.to_dict().keys()
    scheduler = parse_scheduler(entry.get("scheduler"), config, name, settings=settable)
    mutated = config.copy(copy_frozen=False)
    for setting, space in mutations(scheduler).items():
        setattr(mutated, setting, space)
    search_alg = parse_search_alg(entry.get("search_alg"), config, name, dict(find_spaces(vars(config))))
    if search_alg is not None and mutations(scheduler):
        raise ExperimentError(
            f"Experiment '{name}' has a `search_alg`, and a `scheduler` that changes settings while trials run, so "
            "that the search would learn from settings that trials no longer have; drop one."
        )
    loggers = parse_loggers(entry.get("loggers"), name)
    examples = _examples_of(config, name) + (_examples_of(mutated, name) if mutations(scheduler) else ())
    judged_by = {
        "scheduler": [getattr(scheduler, "_metric", None), getattr(scheduler, "_time_attr", None)],
        "search_alg": [search_alg.options["metric"] if search_alg is not None else None],
    }
    for key, metrics in judged_by.items():
        for metric in filter(None, metrics):
            with reported(f"`{key}` of experiment '{name}'"):
                check_judged_by(metric, config, examples)
    return Experiment(
        name=name,
        algorithm=algorithm,
        config=config,
        stop=_stop_of(entry.get("stop"), name, config, examples, scheduler),
        num_samples=num_samples,
        scheduler=scheduler,
        search_alg=search_alg,
        loggers=loggers,
        **safety,
        max_failures=max_failures,
        examples=examples,
    )


def _stop_of(
    stop: Any,
    name: str,
    config: AlgorithmConfig,
    examples: Sequence[AlgorithmConfig],
    scheduler: TrialScheduler | None = None,
) -> dict[str, float]:
    try:
        return parse_stop(stop, name, config, examples, scheduler)
    except ValueError as error:
        raise ExperimentError(str(error)) from error


def _find_algorithm(run: Any, name: str) -> tuple[type, AlgorithmConfig]:
    """Class and default config of "CalQL" or of an algorithm that RLlib registers."""
    register()
    if not isinstance(run, str) or run not in registry.ALGORITHMS:
        raise ExperimentError(
            f"Unknown algorithm {run!r} in experiment '{name}'{did_you_mean(str(run), registry.ALGORITHMS)} "
            f"There are {', '.join(sorted(registry.ALGORITHMS))}."
        )
    algorithm, config = registry.ALGORITHMS[run]()
    return algorithm, config
