"""Study files: tasks x algorithms x seeds, read strictly and checked whole before the first trial begins.

Keys of a study file: `name`; `seeds`, a list; `tasks`, each with `file` (an experiment file, whose `stop` says how many
env steps a trial has), `config` (settings for all algorithms on this task), `evaluation_episodes`,
`evaluate_every_offline_updates` and `evaluate_every_env_steps`; `algorithms`, each with the settings in which it
differs from the tasks' experiments, where null takes a setting out. `tuned_examples/studies` has examples.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rllib_calql.common import metrics as keys
from rllib_calql.config import CalQLConfig
from rllib_calql.experiments.experiment import Experiment, parse_experiment
from rllib_calql.experiments.reading.errors import ExperimentError, refuse_unknown
from rllib_calql.experiments.reading.spaces import find_spaces
from rllib_calql.experiments.reading.typed_settings import settings_by_method
from rllib_calql.experiments.reading.yaml_files import load_yaml, name_in_yaml
from rllib_calql.study.folder import TRIALS_FOLDER
from rllib_calql.system.plain_names import refuse_unplain_name

_STUDY_KEYS = ("name", "seeds", "tasks", "algorithms")
_TASK_KEYS = (
    "file",
    "config",
    "evaluation_episodes",
    "evaluate_every_offline_updates",
    "evaluate_every_env_steps",
)
_MAX_NAME_LENGTH = 100  # Of a trial's folder; longer names end in a digest.
_NEVER = 10**9  # Evaluations are asked for; an interval makes RLlib build the runner for them.


@dataclass(frozen=True)
class Schedule:
    """When a trial is evaluated and ends.

    Attributes:
        num_env_steps: Online env steps of the trial.
        evaluation_episodes: Episodes of each evaluation.
        every_offline_updates: Updates between evaluations of the offline phase; the switch is always one.
        every_env_steps: Env steps between evaluations of the online phase; the end is always one.
    """

    num_env_steps: int
    evaluation_episodes: int
    every_offline_updates: int
    every_env_steps: int


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        task: Name of the task.
        algorithm: Name of the algorithm.
        seed: Seed.
        config: Its whole config.
        schedule: When it is evaluated and ends.
        fingerprint: Digest of all settings.
    """

    task: str
    algorithm: str
    seed: int
    config: CalQLConfig
    schedule: Schedule
    fingerprint: str

    @property
    def name(self) -> str:
        """For people."""
        return " ".join(f"{self.task} | {self.algorithm} | seed {self.seed}".split())

    @property
    def folder(self) -> Path:
        """Where its results lie in the study's folder."""
        return Path(TRIALS_FOLDER, _as_file_name(self.task), _as_file_name(self.algorithm), f"seed_{self.seed}")


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        name: Name of the study.
        trials: Seed by seed, so that a study that is stopped early has all algorithms.
        description: The settings as they are in the files, to be kept with the results.
    """

    name: str
    trials: tuple[Trial, ...]
    description: dict[str, Any]


def read_study(path: Path) -> Study:
    """Reads and checks a study file and the experiment files of its tasks.

    Raises:
        ExperimentError: Naming the place, the setting, and what to do.
    """
    if not path.is_file():
        raise ExperimentError(f"The study file '{path}' does not exist; give a .yaml file.")
    content = load_yaml(path)
    refuse_unknown(content, _STUDY_KEYS, f"study file '{path}'")
    for key in _STUDY_KEYS[1:]:
        if not content.get(key):
            raise ExperimentError(f"The study file '{path}' has no `{key}`; it needs {', '.join(_STUDY_KEYS[1:])}.")
    seeds = content["seeds"]
    if not isinstance(seeds, list) or not all(_is_count(seed, 0) for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ExperimentError(f"`seeds` of '{path}' must be a list of different whole numbers >= 0, got {seeds!r}.")
    tasks, algorithms = _mapping(content, "tasks", path), _mapping(content, "algorithms", path)
    entries = {name: _read_task(name, task, path) for name, task in tasks.items()}
    trials = {}
    for task, (entry, how) in entries.items():
        for algorithm, changes in algorithms.items():
            where = f"{task} | {algorithm}"
            changed = _with_settings(entry, changes or {}, where)
            experiment = parse_experiment(where, changed)
            schedule = _schedule(experiment, how, where)
            for seed in seeds:
                trials[(seed, task, algorithm)] = _trial(experiment, schedule, task, algorithm, seed, changed)
    folders = [trial.folder for trial in trials.values()]
    if len(set(folders)) < len(folders):
        raise ExperimentError(f"Names of '{path}' differ in signs alone; rename tasks or algorithms.")
    ordered = tuple(trials[key] for key in sorted(trials, key=lambda key: seeds.index(key[0])))
    name = name_in_yaml(content.get("name", path.stem), f"`name` of the study file '{path}'")
    try:
        refuse_unplain_name(name, f"`name` of the study file '{path}'")
    except ValueError as error:
        raise ExperimentError(str(error)) from error
    description = {
        "name": name,
        "seeds": seeds,
        "tasks": {task: {"experiment": entry, **how} for task, (entry, how) in entries.items()},
        "algorithms": {name: changes or {} for name, changes in algorithms.items()},
    }
    return Study(name, ordered, description)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _mapping(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content[key]
    if not isinstance(value, dict) or not all(inner is None or isinstance(inner, dict) for inner in value.values()):
        raise ExperimentError(f"`{key}` of '{path}' must map names to settings, got {value!r}.")
    for name in map(str, value):
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", name):
            raise ExperimentError(f"`{key}` of '{path}' has the name {name!r}; take the control characters out of it.")
    return {name_in_yaml(name, f"A name of `{key}` in '{path}'"): inner for name, inner in value.items()}


def _read_task(name: str, task: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The experiment of a task with the task's own settings, and how it is evaluated."""
    refuse_unknown(task, _TASK_KEYS, f"task '{name}' of '{path}'")
    for key in _TASK_KEYS:
        if key != "config" and key not in task:
            raise ExperimentError(f"Task '{name}' of '{path}' has no `{key}`.")
        if key not in ("file", "config") and not _is_count(task[key], 1):
            raise ExperimentError(f"`{key}` of task '{name}' must be a whole number >= 1, got {task[key]!r}.")
    file = path.parent / str(task["file"])
    if not file.is_file():
        raise ExperimentError(f"The experiment file '{file}' of task '{name}' does not exist.")
    content = load_yaml(file)
    if not isinstance(content, dict) or len(content) != 1:
        raise ExperimentError(f"'{file}' of task '{name}' must hold one experiment.")
    (entry,) = content.values()
    entry = _with_settings(entry, task.get("config") or {}, name)
    return entry, {key: task[key] for key in _TASK_KEYS if key not in ("file", "config")}


def _with_settings(entry: dict[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An experiment with settings replaced, or taken out by None; they win over those grouped by method."""
    if not isinstance(entry, dict):
        raise ExperimentError(f"The experiment of '{where}' must be a mapping, got {entry!r}.")
    groups = settings_by_method(CalQLConfig)
    settings: dict[str, Any] = {}
    for key, value in (entry.get("config") or {}).items():
        is_group = key in groups and isinstance(value, dict)
        kept = {k: v for k, v in value.items() if k not in changes} if is_group else value
        if key not in changes:
            settings[key] = kept
    settings |= {key: value for key, value in changes.items() if value is not None}
    without_env = {key: value for key, value in entry.items() if key != "env" or "env" not in changes}
    return {**without_env, "config": settings}


def _schedule(experiment: Experiment, how: Mapping[str, int], where: str) -> Schedule:
    if not isinstance(experiment.config, CalQLConfig):
        raise ExperimentError(f"'{where}' runs {experiment.algorithm.__name__}; a study runs CalQL.")
    if list(experiment.stop) != [keys.NUM_ONLINE_ENV_STEPS_LIFETIME] or math.isinf(min(experiment.stop.values())):
        raise ExperimentError(
            f"`stop` of '{where}' must be `{keys.NUM_ONLINE_ENV_STEPS_LIFETIME}` alone, so that all algorithms have "
            f"the same budget; got {experiment.stop}."
        )
    if experiment.config.max_online_env_steps is not None:
        raise ExperimentError(
            f"`stop` of '{where}' says how many env steps a trial makes; drop `max_online_env_steps`."
        )
    if any(find_spaces(vars(experiment.config))) or experiment.scheduler or experiment.search_alg:
        raise ExperimentError(f"'{where}' searches over settings; a study needs values.")
    return Schedule(
        num_env_steps=int(experiment.stop[keys.NUM_ONLINE_ENV_STEPS_LIFETIME]),
        evaluation_episodes=how["evaluation_episodes"],
        every_offline_updates=how["evaluate_every_offline_updates"],
        every_env_steps=how["evaluate_every_env_steps"],
    )


def _trial(
    experiment: Experiment, schedule: Schedule, task: str, algorithm: str, seed: int, entry: Mapping[str, Any]
) -> Trial:
    config = experiment.config.copy(copy_frozen=False)
    config.evaluation(
        evaluation_interval=_NEVER,
        evaluation_duration=schedule.evaluation_episodes,
        evaluation_duration_unit="episodes",
    )
    config.debugging(seed=seed)
    text = json.dumps([entry, vars(schedule)], sort_keys=True, default=str)
    fingerprint = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return Trial(task, algorithm, seed, config, schedule, fingerprint)


def _as_file_name(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "_"
    if len(plain) <= _MAX_NAME_LENGTH:
        return plain
    return f"{plain[:_MAX_NAME_LENGTH]}_{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
