"""The best checkpoint of a trial: by which metric it is chosen, and the file that says which one it is.

The file is replaced as a whole once the checkpoint it names is whole, so a sudden end leaves the former best or the new
one. The former is removed only after that.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pyarrow.fs
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune.result import TRAINING_ITERATION
from ray.tune.utils import flatten_dict

from rllib_calql.checkpoints.integrity import read_file
from rllib_calql.common import metrics as keys
from rllib_calql.common.evaluations import flaw_of_judging, place_of
from rllib_calql.experiments.reading.errors import ExperimentError, did_you_mean, refuse_unknown
from rllib_calql.experiments.run_state import examine, names_in, write_whole
from rllib_calql.system.parsed_json import parsed_json

BEST_FILE = "rllib_calql_best.json"  # In the folder of a trial.
_EVALUATION = "evaluation/"
_RETURN = f"{_EVALUATION}env_runners/episode_return_mean"
_SUCCESS = f"{_EVALUATION}env_runners/{keys.SUCCESS_RATE}"
_MODES = ("max", "min")

Score = tuple[float, ...]


@dataclass(frozen=True)
class BestMetric:
    """What checkpoints are compared by.

    Attributes:
        metric: Path of a number in results, "/" between levels. None for the success rate of the evaluation where it is
            known, then its mean return.
        mode: "max" or "min".
    """

    metric: str | None = None
    mode: str = "max"

    @property
    def is_of_evaluation(self) -> bool:
        """Whether it is a number of evaluations, which not every result has anew."""
        return self.metric is None or self.metric.startswith(_EVALUATION)

    def score(self, result: Mapping[str, Any]) -> Score | None:
        """What orders results, the greater the better; None for one without the metric, or with NaN or infinity."""
        if self.metric is not None:
            value = _number(result, self.metric)
            return None if value is None else (value if self.mode == "max" else -value,)
        success_rate, episode_return = _number(result, _SUCCESS), _number(result, _RETURN)
        if success_rate is None:
            return None if episode_return is None else (0.0, 0.0, episode_return)
        # Success rates of few episodes are often equal.
        return (1.0, success_rate, -math.inf if episode_return is None else episode_return)

    def missing(self, result: Mapping[str, Any]) -> str:
        """What is wrong if a result that should have the metric does not, readable; empty otherwise."""
        if (
            self.metric is None
            or (self.is_of_evaluation and not result.get("evaluation"))
            or ((place := place_of(self.metric)) is not None and not result["evaluation"].get(place))
            or self.metric in flatten_dict(dict(result))
        ):
            return ""
        known = [
            path
            for path, value in flatten_dict(dict(result)).items()
            if isinstance(value, (int, float)) and path.startswith(_EVALUATION) == self.is_of_evaluation
        ]
        return f"`keep_best` judges by `{self.metric}`, which results do not have{did_you_mean(self.metric, known)}"


@dataclass(frozen=True)
class Best:
    """The best checkpoint of a trial so far.

    Attributes:
        checkpoint: Name of its folder, beside the file.
        metric: `BestMetric.metric`.
        mode: `BestMetric.mode`.
        value: Of the metric, if one was given.
        success_rate: Of its evaluation, where it is known.
        episode_return: Mean return of its evaluation, where it is known.
        training_iteration: Of the checkpoint.
        num_offline_updates: In it; None for algorithms without phases.
        num_online_env_steps: In it; for algorithms without phases the env steps sampled.
        num_evaluations: Results with the metric that it was chosen from.
        counted_to: Iteration up to which these are counted.
    """

    checkpoint: str
    metric: str | None
    mode: str
    value: float | None
    success_rate: float | None
    episode_return: float | None
    training_iteration: int
    num_offline_updates: int | None
    num_online_env_steps: int | None
    num_evaluations: int
    counted_to: int

    @classmethod
    def of_result(cls, result: Mapping[str, Any], by: BestMetric, checkpoint: str, num_evaluations: int) -> Best:
        """The best one, after the iteration that gave `result`."""
        iteration = int(result.get(TRAINING_ITERATION, 0))
        env_steps = result.get(keys.NUM_ONLINE_ENV_STEPS_LIFETIME, result.get("num_env_steps_sampled_lifetime"))
        updates = result.get(keys.NUM_OFFLINE_UPDATES_LIFETIME)
        return cls(
            checkpoint=checkpoint,
            metric=by.metric,
            mode=by.mode,
            value=None if by.metric is None else _number(result, by.metric),
            success_rate=_number(result, _SUCCESS),
            episode_return=_number(result, _RETURN),
            training_iteration=iteration,
            num_offline_updates=None if updates is None else int(updates),
            num_online_env_steps=None if env_steps is None else int(env_steps),
            num_evaluations=num_evaluations,
            counted_to=iteration,
        )

    @property
    def by(self) -> BestMetric:
        """What it was chosen by."""
        return BestMetric(self.metric, self.mode)

    @property
    def score(self) -> Score:
        """See `BestMetric.score`."""
        if self.metric is not None:
            value = math.nan if self.value is None else self.value
            return (value if self.mode == "max" else -value,)
        episode_return = -math.inf if self.episode_return is None else self.episode_return
        return (0.0, 0.0, episode_return) if self.success_rate is None else (1.0, self.success_rate, episode_return)

    def counted(self, num_evaluations: int, counted_to: int) -> Best:
        """The same, chosen from as many."""
        return replace(self, num_evaluations=num_evaluations, counted_to=counted_to)

    def describe(self) -> str:
        """Its values and when they were reached, for example `return -79.59 at 3,000 env steps, best of 12`."""
        values = [] if self.value is None else [f"{self.metric} {self.value:.4g}"]
        if self.metric is None and self.success_rate is not None:
            values.append(f"success {self.success_rate:.2f}")
        if self.metric is None and self.episode_return is not None:
            values.append(f"return {self.episode_return:.2f}")
        if self.num_online_env_steps or self.num_offline_updates is None:
            at = f"{self.num_online_env_steps or 0:,} env steps"
        else:
            at = f"{self.num_offline_updates:,} updates"
        what = "evaluation" if self.by.is_of_evaluation else "result"
        only = f"the only {what}" if self.num_evaluations == 1 else f"best of {self.num_evaluations} {what}s"
        return f"{', '.join(values)} at {at}, {only}"


def parse_keep_best(entry: Any, config: AlgorithmConfig, name: str) -> BestMetric | None:
    """`keep_best` of an experiment file; None to keep no best checkpoint.

    Args:
        entry: None or True for the default metric, False, a metric's path, or `{metric, mode}`.
        config: The experiment's config.
        name: The experiment's name.

    Raises:
        ExperimentError: If it is none of these, or the metric is one of evaluations and nothing is evaluated.
    """
    where = f"`keep_best` of experiment '{name}'"
    if entry is False:
        return None
    if isinstance(entry, dict):
        refuse_unknown(entry, ("metric", "mode"), where)
    options = {"metric": entry} if isinstance(entry, str) else entry if isinstance(entry, dict) else {}
    metric, mode = options.get("metric"), options.get("mode", "max")
    is_known_kind = entry is None or entry is True or (isinstance(metric, str) and metric != "")
    if not is_known_kind:
        raise ExperimentError(
            f"{where} must be true, false, a metric's path like `{_RETURN}`, or {{metric: PATH, mode: max}}; got "
            f"{entry!r}."
        )
    if mode not in _MODES:
        raise ExperimentError(f"`mode` in {where} must be one of {', '.join(_MODES)}; got {mode!r}.")
    flaw = flaw_of_judging(metric or _RETURN, mode, config)
    if entry is not None and flaw is not None:
        raise ExperimentError(
            f"{where} judges by {f'`{metric}`' if metric else 'evaluations'}, but {flaw}, or drop `keep_best`."
        )
    return BestMetric(metric, mode)


def best_of(
    results: Iterable[tuple[str, Mapping[str, Any]]], by: BestMetric, former: Best | None = None
) -> Best | None:
    """The best of a trial's checkpoints.

    Args:
        results: Name of each checkpoint and the result it belongs to, in the order of their iterations.
        by: What they are compared by.
        former: The best one of those that are there whole, as far as it is known; of equals it stays.

    Returns:
        None if none has the metric.
    """
    best = former if former is not None and former.by == by else None
    num_evaluations, counted_to = (best.num_evaluations, best.counted_to) if best is not None else (0, 0)
    for checkpoint, result in results:
        score = by.score(result)
        if score is None:
            continue
        if (iteration := int(result.get(TRAINING_ITERATION, 0))) > counted_to:
            num_evaluations, counted_to = num_evaluations + 1, iteration
        if best is None or score > best.score:
            best = Best.of_result(result, by, checkpoint, num_evaluations)
    return best if best is None else best.counted(num_evaluations, counted_to)


def read_best(filesystem: pyarrow.fs.FileSystem, trial_folder: str) -> Best | None:
    """The best checkpoint in the folder of a trial; None if there is none, or it is not whole any more."""
    if BEST_FILE not in names_in(filesystem, trial_folder):
        return None
    try:
        content = parsed_json(read_file(filesystem, posixpath.join(trial_folder, BEST_FILE)))
        best = Best(**{field.name: content[field.name] for field in fields(Best)})
        if math.isnan(best.score[-1]) or posixpath.basename(best.checkpoint) != best.checkpoint:
            return None
        best.describe()  # Of a damaged file that may fail as well.
    except (OSError, ValueError, TypeError, KeyError):
        return None
    found = examine(filesystem, posixpath.join(trial_folder, best.checkpoint), reads_files=False)
    return best if found.is_whole else None


def write_best(filesystem: pyarrow.fs.FileSystem, trial_folder: str, best: Best) -> None:
    """Replaces the file that says which checkpoint is the best. The checkpoint must be whole."""
    content = json.dumps(asdict(best), indent=1) + "\n"
    write_whole(filesystem, posixpath.join(trial_folder, BEST_FILE), content.encode())


def _number(result: Mapping[str, Any], path: str) -> float | None:
    value = flatten_dict(dict(result)).get(path) if "/" in path else result.get(path)
    try:
        number = float(value)  # type: ignore[arg-type]  # NumPy's numbers are numbers as well.
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
