"""Runs the trials of a study through Ray Tune, as many at once as there are CPUs, and gathers their evaluations."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ray import tune

import rllib_calql
from rllib_calql.algorithm import CalQL
from rllib_calql.experiments.reading.errors import ExperimentError
from rllib_calql.study.evaluations import Evaluation, write_results
from rllib_calql.study.folder import TUNE_FOLDER
from rllib_calql.study.plan import Study, Trial
from rllib_calql.study.trial import checkpoints, finished_evaluations, run_trial
from rllib_calql.system.stop_signals import StopSignals

_PACKAGES = ("ray", "torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari", "ogbench")
_STOP_FILE = "rllib_calql_stop"  # In Tune's folder: asks the trials to stop.
_TRIAL = "trial"  # Key of Tune's config: the number of the trial.


@dataclass(frozen=True)
class Outcome:
    """How a study ended.

    Attributes:
        num_finished: Trials that have all their evaluations.
        errors: Name and error of each trial that failed.
        is_interrupted: Whether Ctrl-C or a signal ended it.
    """

    num_finished: int
    errors: tuple[tuple[str, Exception], ...] = ()
    is_interrupted: bool = False


def requests(study: Study) -> list[Any]:
    """What each trial asks Ray for."""
    return [_resources(trial) for trial in study.trials]


def run_study(
    study: Study,
    waiting: Sequence[Trial],
    folder: Path,
    announce: Callable[[str], None],
    stop: StopSignals | None = None,
) -> Outcome:
    """Runs what is not finished yet, and writes the evaluations of all finished trials.

    Args:
        study: The whole study.
        waiting: What of it to run, as `unfinished_trials` says. If there is any, Ray must have been started.
        folder: Of this study's results. Finished trials in it are kept, begun ones are continued. On a cluster it must
            be the same folder on all machines.
        announce: Called with a line for people, again and again.
        stop: Signals at which the running trials write a checkpoint and the study ends.
    """
    if len(waiting) < len(study.trials):
        announce(f"{len(study.trials) - len(waiting)} of {len(study.trials)} trials are finished already.")
    errors: tuple[tuple[str, Exception], ...] = ()
    is_interrupted = False
    if waiting:
        try:
            errors = _run_with_tune(waiting, folder, announce, stop)
            is_interrupted = stop is not None and stop.signum is not None
        except KeyboardInterrupt:
            is_interrupted = True
    finished = [(t, finished_evaluations(folder / t.folder)) for t in study.trials]
    rows: list[Evaluation] = [row for _, found in finished if found is not None for row in found[1]]
    write_results(folder, rows, {**study.description, "versions": _versions()})
    return Outcome(sum(found is not None for _, found in finished), errors, is_interrupted)


def unfinished_trials(study: Study, folder: Path) -> list[Trial]:
    """Trials that the folder has no evaluations of.

    Raises:
        ExperimentError: If it has some that were made with other settings, or that are damaged.
    """
    waiting = []
    for trial in study.trials:
        try:
            found = finished_evaluations(folder / trial.folder)
            for checkpoint in [] if found else checkpoints(folder / trial.folder):
                finished_evaluations(checkpoint)
        except ValueError as error:
            raise ExperimentError(f"{error} Delete it to run '{trial.name}' again.") from error
        if found is None:
            waiting.append(trial)
        elif found[0] != trial.fingerprint:
            raise ExperimentError(
                f"'{folder / trial.folder}' was made with other settings than '{trial.name}' has now; move it away to "
                "run the trial again, or give another `--output`."
            )
    return waiting


def _run_with_tune(
    trials: Sequence[Trial], folder: Path, announce: Callable[[str], None], stop: StopSignals | None
) -> tuple[tuple[str, Exception], ...]:
    request = folder / TUNE_FOLDER / _STOP_FILE  # Trials on other machines see it as well.

    def trainable(config: dict[str, Any]) -> None:
        trial = trials[config[_TRIAL]]

        def report(row: Evaluation) -> None:
            tune.report({"line": _line(trial, row)})

        if not run_trial(trial, folder / trial.folder, report, is_stopped=request.exists):
            tune.report({"is_stopped": True})

    tuner = tune.Tuner(
        tune.with_resources(trainable, lambda config: _resources(trials[config[_TRIAL]])),
        param_space={_TRIAL: tune.grid_search(list(range(len(trials))))},
        run_config=tune.RunConfig(
            name=TUNE_FOLDER, storage_path=str(folder), verbose=0, callbacks=[_Announcing(trials, announce, request)]
        ),
    )

    def ask_for_checkpoints() -> None:
        assert stop is not None
        announce(f"{stop.name}: the running trials write a checkpoint after their iteration. Again stops at once.")
        request.touch()

    if stop is not None:
        stop.check()
        stop.on_stop = ask_for_checkpoints
    try:
        results = tuner.fit()
    finally:
        if stop is not None:
            stop.on_stop = None
    return tuple((trials[result.config[_TRIAL]].name, result.error) for result in results if result.error is not None)


class _Announcing(tune.Callback):
    """Says what trials report, and ends the study when those that are to stop have done so."""

    def __init__(self, trials: Sequence[Trial], announce: Callable[[str], None], request: Path) -> None:
        self._trials = trials
        self._announce = announce
        self._request = request
        self._num_ended = 0

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """Ends the study if it is to stop and no trial runs."""
        is_running = any(trial.status == tune.experiment.Trial.RUNNING for trial in trials)
        if self._request.exists() and not is_running:
            # Tune's documented way to end a run early.
            signal.raise_signal(signal.SIGUSR1)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """One evaluation."""
        if "line" in result:
            self._announce(result["line"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """The end of one."""
        if (trial.last_result or {}).get("is_stopped"):
            self._announce(f"{self._trials[trial.config[_TRIAL]].name}: stopped")
        else:
            self._say_ended(trial, "finished")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Its failure."""
        self._say_ended(trial, "FAILED")

    def _say_ended(self, trial: Any, how: str) -> None:
        self._num_ended += 1
        self._announce(f"{self._trials[trial.config[_TRIAL]].name}: {how} ({self._num_ended}/{len(self._trials)})")


def _resources(trial: Trial) -> Any:
    return CalQL.default_resource_request(trial.config)


def _line(trial: Trial, row: Evaluation) -> str:
    steps = f"{row.num_offline_updates:,} updates, {row.num_online_env_steps:,}/{trial.schedule.num_env_steps:,} steps"
    return f"{trial.name}: {steps}, score {row.score:.2f}"


def _versions() -> dict[str, str]:
    versions = {"rllib-calql": rllib_calql.__version__, "python": platform.python_version()}
    installed = {str(distribution.metadata["Name"]).lower() for distribution in metadata.distributions()}
    versions |= {package: metadata.version(package) for package in _PACKAGES if package in installed}
    return versions | {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs"}
