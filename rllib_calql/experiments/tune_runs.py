"""Runs an experiment through Ray Tune, from the beginning or from where an earlier run of it ended."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.train._internal.storage import get_fs_and_path

from rllib_calql.experiments.experiment import Experiment
from rllib_calql.experiments.resuming import prepare_resume
from rllib_calql.experiments.run_state import KeepResumable, write_whole
from rllib_calql.experiments.safety_net import SafetyNetCallback
from rllib_calql.experiments.tune_callbacks import CheckpointOnInterrupt, KeepLogs
from rllib_calql.progress import report
from rllib_calql.progress.display import Display
from rllib_calql.progress.results_table import ResultsTable
from rllib_calql.progress.runs import read_run
from rllib_calql.progress.tune_display import ProgressCallback
from rllib_calql.progress.waiting import SayWaiting
from rllib_calql.system.stop_signals import StopSignals


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        errors: Why trials failed.
        is_interrupted: Whether Ctrl-C or a signal ended it.
        is_at_once: Whether an interrupt did not wait for checkpoints.
    """

    errors: tuple[Exception, ...] = ()
    is_interrupted: bool = False
    is_at_once: bool = False


def run_experiment(
    experiment: Experiment,
    storage_path: str,
    *,
    resume: bool,
    announce: Callable[[str], None],
    stop: StopSignals | None = None,
    display: Display | None = None,
    on_saved: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs all trials to their end. Ray must have been started.

    Args:
        experiment: What to run.
        storage_path: Folder or URI of all runs.
        resume: Whether to continue the run of this name, if it has got as far as a first state.
        announce: Called with what the user should know at once.
        stop: Signals that end the run with a checkpoint. Default: Ctrl-C does.
        display: Where progress is shown, entered. Default: on standard output.
        on_saved: Called after every checkpoint.

    Raises:
        ResumeError: If `resume` is set and the run cannot be continued.
    """
    if display is None:
        with Display() as display:
            return run_experiment(
                experiment,
                storage_path,
                resume=resume,
                announce=announce,
                stop=stop,
                display=display,
                on_saved=on_saved,
            )
    display.stage("starting the run")
    safety = SafetyNetCallback(experiment.safety_net, experiment.scheduler, announce=announce, on_saved=on_saved)
    progress = ProgressCallback(experiment.stop, display, best_of=safety.describe_best)
    interrupt = CheckpointOnInterrupt(announce, stop)
    run_config = tune.RunConfig(
        name=experiment.name,
        storage_path=storage_path,
        stop=experiment.stop,
        callbacks=[
            *(KeepResumable(), KeepLogs(), safety, progress, interrupt, ResultsTable(), SayWaiting(announce)),
            *(logger.build() for logger in experiment.loggers),
        ],
        checkpoint_config=experiment.safety_net.tune_config(),
        failure_config=tune.FailureConfig(max_failures=experiment.max_failures),
        verbose=0,
    )
    if resume and prepare_resume(experiment, storage_path, announce):
        tuner = _restored(experiment, run_config, f"{storage_path}/{experiment.name}", announce)
    else:
        tuner = tune.Tuner(
            experiment.algorithm,
            param_space=experiment.param_space,
            tune_config=experiment.tune_config(),
            run_config=run_config,
        )
    with interrupt:
        try:
            results = tuner.fit()
        except KeyboardInterrupt:
            return Outcome(is_interrupted=True, is_at_once=True)
        finally:
            progress.close()
        _write_page(experiment, storage_path, display)
    return Outcome(errors=tuple(results.errors), is_interrupted=interrupt.interrupted)


def _write_page(experiment: Experiment, storage_path: str, display: Display) -> None:
    """Writes what came out into the run's folder, as a page and a picture. Its failure is not the run's."""
    display.stage(f"writing {report.PAGE}")
    filesystem, root = get_fs_and_path(storage_path)
    folder = posixpath.join(root, experiment.name)
    try:
        trials = report.named_trials([read_run(filesystem, folder, is_running=False)])
        if not any(trial.points for trial in trials.values()):
            return
        picture = None
        try:
            picture = report.draw(trials, experiment.name)
            write_whole(filesystem, posixpath.join(folder, report.PICTURE), picture)
        except ImportError as error:
            display.print(f"There are no curves in {report.PAGE}. {error}")
        page = report.page(experiment.name, trials, picture, settings=_settings_of(experiment), stop=experiment.stop)
        write_whole(filesystem, posixpath.join(folder, report.PAGE), page.encode())
        display.print(f"What came out is drawn in {storage_path}/{experiment.name}/{report.PAGE}")
    except Exception as error:  # Of any storage, and of whatever the results hold.
        display.print(f"{report.PAGE} could not be written to '{folder}': {type(error).__name__}: {error}")


def _settings_of(experiment: Experiment) -> dict[str, str]:
    """What the experiment sets, as text."""
    default = experiment.algorithm.get_default_config().to_dict()  # type: ignore[attr-defined]
    settings = {setting: repr(value) for setting, value in experiment.config.to_dict().items()}
    return {setting: text for setting, text in settings.items() if text != repr(default.get(setting))}


def _restored(
    experiment: Experiment, run_config: tune.RunConfig, folder: str, announce: Callable[[str], None]
) -> tune.Tuner:
    # A search makes new trials of the space, which Tune does not store whole.
    param_space = None if experiment.search_alg is None else experiment.param_space
    tuner = tune.Tuner.restore(folder, experiment.algorithm, resume_errored=True, param_space=param_space)
    # Tune restores callbacks, scheduler and stop criteria of the first run. It keeps no state of a scheduler.
    internal: Any = tuner._local_tuner
    internal._run_config = run_config
    internal._tune_config.scheduler = experiment.scheduler
    num_samples = internal._tune_config.num_samples
    if num_samples != experiment.num_samples:
        announce(f"Not applied on --resume: `num_samples`; the run has {num_samples}, now {experiment.num_samples}.")
    return tuner
