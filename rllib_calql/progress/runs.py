"""`read_run`: what the folder of a run tells, while the run goes on and after its end, however it ended."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs

from rllib_calql.common import metrics as keys
from rllib_calql.common.evaluations import NewEvaluations
from rllib_calql.progress.budget import value_of
from rllib_calql.system.file_lock import is_held

RUN_LOCK = ".rllib_calql_run.lock"  # In a run's folder: held as long as the run goes on.
_RESULTS, _SETTINGS, _ERROR = "result.json", "params.json", "error.txt"
_DATE = re.compile(r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d$")
_RETURN = "env_runners/episode_return_mean"
_LEARNER = "learners/default_policy"


@dataclass(frozen=True)
class Point:
    """One result of a trial; None stands for what it does not tell.

    Attributes:
        iteration: Number of the result.
        num_offline_updates: Gradient updates of the offline phase so far.
        num_env_steps: Env steps so far, stored ones since the switch.
        time_s: Seconds of training so far.
        episode_return: Of an evaluation in this iteration.
        success_rate: The same.
        normalized_score: The same.
        held_out_td_loss: The same, of held-out episodes.
        value_by_data: The same, by fitted Q evaluation.
        value_low: Lower end of its 95 % interval.
        value_high: Upper end of its 95 % interval.
        training_return: Mean of recent training episodes.
        calibration_gap: Mean of Q minus the return, over offline rows if that is known.
        td_loss: Mean squared TD error over the critics.
    """

    iteration: int
    num_offline_updates: int
    num_env_steps: int
    time_s: float
    episode_return: float | None = None
    success_rate: float | None = None
    normalized_score: float | None = None
    held_out_td_loss: float | None = None
    value_by_data: float | None = None
    value_low: float | None = None
    value_high: float | None = None
    training_return: float | None = None
    calibration_gap: float | None = None
    td_loss: float | None = None


@dataclass(frozen=True)
class TrialRecord:
    """What is known of a trial.

    Attributes:
        name: Of its folder, without the date.
        status: "running", "ended", "failed" or "interrupted".
        points: Its results in order; of iterations that were made again, the later ones.
        dip: Worst evaluation since the switch minus the one at the switch.
        regret: Mean of 1 - score over the evaluations since the switch.
        data_return: Mean return of the offline data.
        regime: What was better at the switch, "policy", "data" or "both".
        settings: Its settings, as Tune wrote them.
        last_result: The newest result of all.
    """

    name: str
    status: str
    points: tuple[Point, ...]
    dip: float | None = None
    regret: float | None = None
    data_return: float | None = None
    regime: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    last_result: Mapping[str, Any] = field(default_factory=dict)

    def known(self, quantity: str) -> list[float]:
        """Values of an attribute of `Point`, in order."""
        values = (getattr(point, quantity) for point in self.points)
        return [value for value in values if value is not None]


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        name: Of its folder.
        path: Of the folder.
        trials: Those that have results, or have failed without one.
    """

    name: str
    path: str
    trials: tuple[TrialRecord, ...]


def is_run(filesystem: pyarrow.fs.FileSystem, folder: str) -> bool:
    """Whether a folder is that of a run of Ray Tune, or of one of its trials."""
    names = _names(filesystem, folder)
    return _RESULTS in names or any(
        name == "tuner.pkl" or name == RUN_LOCK or name.startswith("experiment_state-") for name in names
    )


def read_run(filesystem: pyarrow.fs.FileSystem, folder: str, *, is_running: bool | None = None) -> RunRecord:
    """Reads what the trials have logged; what is on its way to the folder is missing.

    Args:
        filesystem: Of the folder.
        folder: Of a run, or of one of its trials.
        is_running: Whether the run goes on; None: the lock on its folder tells.

    Raises:
        OSError: If a file cannot be read.
    """
    folder = folder.rstrip("/")
    if is_running is None:
        is_running = _is_locked(filesystem, folder) or _is_locked(filesystem, posixpath.dirname(folder))
    names = _names(filesystem, folder)
    trials = [folder] if _RESULTS in names else [posixpath.join(folder, name) for name in sorted(names)]
    found = (read_trial(filesystem, trial, is_running=is_running) for trial in trials)
    return RunRecord(posixpath.basename(folder), folder, tuple(trial for trial in found if trial is not None))


def read_trial(filesystem: pyarrow.fs.FileSystem, folder: str, *, is_running: bool) -> TrialRecord | None:
    """Reads the folder of a trial; None if it has no log of results."""
    names = _names(filesystem, folder)
    name = _DATE.sub("", posixpath.basename(folder))
    if _RESULTS not in names:  # A trial that could not be set up has only its error.
        return TrialRecord(name, "running" if is_running else "failed", ()) if _ERROR in names else None
    points: list[Point] = []
    last: Mapping[str, Any] = {}
    evaluations = NewEvaluations()
    dip = regret = data_return = regime = None
    for result in _results(filesystem, posixpath.join(folder, _RESULTS)):
        last = result
        point = _point(result, evaluations.in_result(result))
        while points and points[-1].iteration >= point.iteration:  # Made again after a failure or a resume.
            points.pop()
        points.append(point)
        dip = _first(_number(result, f"{keys.FINE_TUNING}/{keys.DIP}"), dip)
        regret = _first(_number(result, f"{keys.FINE_TUNING}/{keys.REGRET}"), regret)
        regime = _at(result, f"{keys.FINE_TUNING}/{keys.REGIME}") or regime
        data_return = _first(_number(result, f"{keys.STORE}/{keys.OFFLINE_RETURN_MEAN}"), data_return)
    if last.get("done"):
        status = "ended"
    elif is_running:
        status = "running"
    else:
        failed_at = _written_at(filesystem, posixpath.join(folder, _ERROR)) if _ERROR in names else -math.inf
        # The file stays where a trial that failed was resumed.
        status = "failed" if failed_at >= (_number(last, "timestamp") or 0.0) else "interrupted"
    settings: Mapping[str, Any] = {}
    if _SETTINGS in names:
        settings = next(iter(_results(filesystem, posixpath.join(folder, _SETTINGS), is_one=True)), {})
    return TrialRecord(name, status, tuple(points), dip, regret, data_return, regime, settings, last)


def _point(result: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Point:
    phase = result.get(keys.PHASE)
    steps = keys.NUM_ONLINE_ENV_STEPS_LIFETIME if phase else "num_env_steps_sampled_lifetime"
    learner = value if isinstance(value := _at(result, _LEARNER), Mapping) else {}
    losses = [
        value for c in range(1, 100) if (value := _number(learner, keys.TD_LOSS_OF_CRITIC.format(c=c))) is not None
    ]
    return Point(
        iteration=int(result.get("training_iteration", 0)),
        num_offline_updates=int(result.get(keys.NUM_OFFLINE_UPDATES_LIFETIME, 0)),
        num_env_steps=int(_number(result, steps) or 0),
        time_s=_number(result, "time_total_s") or 0.0,
        episode_return=_number(evaluation, _RETURN),
        success_rate=_number(evaluation, f"env_runners/{keys.SUCCESS_RATE}"),
        normalized_score=_number(evaluation, f"env_runners/{keys.NORMALIZED_SCORE}"),
        held_out_td_loss=_number(evaluation, f"{keys.HELD_OUT}/{keys.TD_LOSS}"),
        value_by_data=_number(evaluation, f"{keys.FQE}/{keys.VALUE}"),
        value_low=_number(evaluation, f"{keys.FQE}/{keys.VALUE_LOW}"),
        value_high=_number(evaluation, f"{keys.FQE}/{keys.VALUE_HIGH}"),
        training_return=_number(result, _RETURN),
        calibration_gap=_first(_number(learner, keys.CALIBRATION_GAP_OFFLINE), _number(learner, keys.CALIBRATION_GAP)),
        td_loss=sum(losses) / len(losses) if losses else None,
    )


def _results(filesystem: pyarrow.fs.FileSystem, path: str, *, is_one: bool = False) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line or one in all; what cannot be read is left out."""
    with filesystem.open_input_stream(path) as stream:
        content = stream.read().decode("utf-8", errors="replace")
    for text in [content] if is_one else content.splitlines():
        try:
            value = json.loads(text)
        except ValueError:  # A line that is being written, or was cut off.
            continue
        if isinstance(value, dict):
            yield value


def _at(result: Mapping[str, Any], path: str) -> Any:
    value: Any = result
    for level in path.split("/"):
        value = value.get(level) if isinstance(value, Mapping) else None
    return value


def _number(result: Mapping[str, Any], path: str) -> float | None:
    try:
        value = value_of(result, path)
    except (TypeError, ValueError):
        return None
    return value if value is not None and math.isfinite(value) else None


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _names(filesystem: pyarrow.fs.FileSystem, folder: str) -> set[str]:
    if filesystem.get_file_info(folder).type != pyarrow.fs.FileType.Directory:
        return set()
    return {info.base_name for info in filesystem.get_file_info(pyarrow.fs.FileSelector(folder))}


def _written_at(filesystem: pyarrow.fs.FileSystem, path: str) -> float:
    """Seconds since 1970; infinity where the file system does not say."""
    written_ns = filesystem.get_file_info(path).mtime_ns
    return math.inf if written_ns is None else written_ns / 1e9


def _is_locked(filesystem: pyarrow.fs.FileSystem, folder: str) -> bool:
    path = Path(folder, RUN_LOCK)
    if not isinstance(filesystem, pyarrow.fs.LocalFileSystem) or not path.is_file():
        return False
    return is_held(path)
