"""`search_alg` of an experiment file: who chooses the settings of the next trial, with which options."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune.experiment import Trial
from ray.tune.search import SEARCH_ALG_IMPORT, Searcher
from ray.tune.search.sample import Domain
from ray.tune.search.variant_generator import format_vars

from rllib_calql.common.evaluations import flaw_of_judging
from rllib_calql.experiments.reading.errors import ExperimentError, refuse_unknown, reported
from rllib_calql.experiments.reading.schedulers import DEFAULT_METRIC
from rllib_calql.experiments.reading.spaces import KeyPath

# Type in a file, which is Tune's name -> (module that it needs, how it is installed).
_PACKAGES = {
    "optuna": ("optuna", "optuna"),
    "hyperopt": ("hyperopt", "hyperopt"),
    "ax": ("ax", "ax-platform"),
    "bayesopt": ("bayes_opt", "bayesian-optimization"),
    "hebo": ("hebo", "HEBO"),
}
# Python objects, which a file cannot hold, and the space, which stands in `config`.
_NOT_IN_FILES = {"self", "space", "sampler", "storage", "analysis", "ax_client"}
_MAX_FOLDER_NAME = 130  # Characters before the date, as Tune cuts them.
_SEEDS = ("seed", "random_state", "random_state_seed")


@dataclass(frozen=True)
class FolderName:
    """Names the folder of a trial by what was chosen for it. Tune would take all settings, as a search chooses all.

    Attributes:
        paths: The keys that lead to what is searched over.
    """

    paths: tuple[KeyPath, ...]

    def __call__(self, trial: Trial) -> str:
        """As Tune names those of a grid: trial, number, settings, date."""
        chosen = {path: _at(trial.config, path) for path in self.paths}
        number = trial.experiment_tag.partition("_")[0]
        plain = f"{trial}_{number}_{format_vars(chosen)}"[:_MAX_FOLDER_NAME].replace("/", "_").replace(":", "_")
        return f"{plain}_{datetime.now():%Y-%m-%d_%H-%M-%S}"


def _shown(path: KeyPath) -> str:
    return "/".join(map(str, path)).removeprefix("_")


def _at(config: Any, path: KeyPath) -> Any:
    for key in path:
        config = config[key]
    return config


@dataclass(frozen=True)
class SearchAlgorithm:
    """A search algorithm of Tune, which each run makes anew, since it remembers what it has seen.

    Attributes:
        type: Tune's name.
        options: Arguments of Tune's class.
        paths: The keys that lead to what is searched over.
    """

    type: str
    options: Mapping[str, Any]
    paths: tuple[KeyPath, ...]

    def build(self) -> Searcher:
        """The algorithm, at its begin."""
        search: Searcher = SEARCH_ALG_IMPORT[self.type]()(**self.options)
        logging.getLogger(_PACKAGES[self.type][0]).setLevel(logging.WARNING)
        return search

    def tune_settings(self) -> dict[str, Any]:
        """What Tune is told of it."""
        return {"search_alg": self.build(), "trial_dirname_creator": FolderName(self.paths)}


def parse_search_alg(
    entry: Any, config: AlgorithmConfig, name: str, spaces: Mapping[KeyPath, Any]
) -> SearchAlgorithm | None:
    """The search algorithm of an experiment; None for grids and independent draws.

    Args:
        entry: `{type: ..., metric: ..., mode: ..., ...}` with the arguments of Tune's class, or None.
        config: The experiment's config.
        name: The experiment's name.
        spaces: What is searched over, by the keys that lead to it.

    Raises:
        ExperimentError: Naming the option or the package, if there is no such algorithm, if it is not installed, or if
            it cannot search like this.
    """
    if entry is None:
        return None
    where = f"`search_alg` of experiment '{name}'"
    if not isinstance(entry, dict) or entry.get("type") not in _PACKAGES:
        types = ", ".join(_PACKAGES)
        raise ExperimentError(f"{where} must be {{type: ..., ...}} with a type of {types}; got {entry!r}.")
    kind = entry["type"]
    module, package = _PACKAGES[kind]
    if importlib.util.find_spec(module) is None:
        raise ExperimentError(f"{where} needs the `{package}` package: pip install {package}")
    signature = inspect.signature(SEARCH_ALG_IMPORT[kind]())
    options = {key: value for key, value in entry.items() if key != "type"}
    known = [
        key
        for key, parameter in signature.parameters.items()
        if key not in _NOT_IN_FILES and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    refuse_unknown(options, known, where)
    options = {"metric": DEFAULT_METRIC, "mode": "max"} | options
    if options["mode"] not in ("max", "min"):
        raise ExperimentError(f"`mode` in {where} must be one of max, min; got {options['mode']!r}.")
    if flaw := flaw_of_judging(str(options["metric"]), str(options["mode"]), config):
        raise ExperimentError(f"{where} judges by `{options['metric']}`, but {flaw}.")
    if not spaces:
        raise ExperimentError(f"{where} has nothing to search over; give a setting a space, as `{{uniform: [0, 1]}}`.")
    for path, space in spaces.items():
        if not isinstance(space, Domain):
            raise ExperimentError(
                f"{where} cannot search over the grid of `{_shown(path)}`; take `choice` in place of `grid_search`."
            )
        setting = tuple(itertools.takewhile(lambda key: isinstance(key, str), path))
        if setting != path:
            raise ExperimentError(
                f"{where} cannot search inside the list of `{_shown(setting)}`; take a `{{choice: [...]}}` of lists."
            )
    for seed in _SEEDS:
        if seed in known and options.get(seed) is None and isinstance(config.seed, int):
            options[seed] = config.seed
    search = SearchAlgorithm(kind, options, tuple(spaces))
    with reported(where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Tune's classes refuse spaces that they cannot search only when a run begins.
        search.build().set_search_properties(None, None, config.to_dict())
    return search
