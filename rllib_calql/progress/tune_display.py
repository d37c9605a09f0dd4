"""Shows a run of Ray Tune while it goes on: one line per trial, and a summary of each at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pyarrow.fs import LocalFileSystem
from ray import tune
from ray.tune.experiment import Trial

from rllib_calql.common import metrics as keys
from rllib_calql.progress.budget import format_budget, format_reached, limits_of
from rllib_calql.progress.display import Display
from rllib_calql.progress.lines import Evaluation, Totals, TrialProgress, format_summary, observe
from rllib_calql.progress.runs import read_trial
from rllib_calql.system.activity import Listener

_STARTING = "starting the processes of the trials"


class ProgressCallback(tune.Callback):
    """Shows progress while Tune runs, and prints a summary of every trial at the end.

    Args:
        stop: Metric -> value at which trials end.
        display: Where it is shown.
        best_of: What is to be said of a trial's best checkpoint; None if there is none.
    """

    def __init__(
        self,
        stop: Mapping[str, float],
        display: Display,
        *,
        best_of: Callable[[Trial], str | None] = lambda trial: None,
    ) -> None:
        self._stop = dict(stop)
        self._display = display
        self._best_of = best_of
        self._listener: Listener | None = None
        self._trials: dict[str, TrialProgress] = {}
        self._data: set[str] = set()  # Lines about offline data that were printed; trials often share their data.
        self._warnings: set[tuple[str, str]] = set()  # Of trials, printed.

    def __reduce__(self) -> tuple[Callable[..., ProgressCallback], tuple[dict[str, float]]]:
        """Tune pickles callbacks with the experiment; a display has no place in there."""
        return _restored_callback, (self._stop,)

    def setup(self, *args: Any, **info: Any) -> None:
        """Begins to hear what trials do."""
        self._listener = Listener()
        self._listener.start()
        self._display.hear(self._listener)

        self._display.stage(_STARTING)

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Shows trials that are being set up, once they say so. Tune calls this again and again."""
        if self._listener is None:
            return
        speakers = {speaker_of(trial): trial for trial in trials if trial.status in (Trial.PENDING, Trial.RUNNING)}
        self._listener.follow(speakers)
        for speaker, trial in speakers.items():
            if trial.trial_id not in self._trials and self._listener.latest(speaker) is not None:
                self._begin(trial)

    def _begin(self, trial: Trial) -> None:
        self._trials[trial.trial_id] = TrialProgress(label=str(trial))
        self._display.show(speaker_of(trial), self._trials[trial.trial_id], self._totals(trial), always=True)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Shows the trial."""
        if trial.trial_id not in self._trials:
            self._begin(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Updates the trial's line."""
        data = result.get(keys.OFFLINE_DATA)
        if data is not None and data not in self._data:
            self._data.add(data)
            self._display.print(f"Offline data: {data}.")
        for finding in (result.get(keys.OFFLINE_DATA_WARNINGS) or "").splitlines():
            if finding not in self._data:
                self._data.add(finding)
                self._display.print(f"Warning, offline data: {finding}.")
        names = (keys.Q_WARNING, keys.OVERFITTING, keys.SUCCESS_WARNING, keys.PRETRAINED_WARNING)
        for warning in map(result.get, names):
            if warning is not None and (trial.trial_id, warning) not in self._warnings:
                self._warnings.add((trial.trial_id, warning))
                self._display.print(f"Warning, {trial}: {warning}.")
        before = self._trials.setdefault(trial.trial_id, TrialProgress(label=str(trial)))
        after = observe(before, result, self._totals(trial))
        self._trials[trial.trial_id] = after
        always = after.phase != before.phase or bool(result.get("done"))
        self._display.show(speaker_of(trial), after, self._totals(trial), always=always)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Shows the trial no more."""
        self._end(trials, trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Shows the trial no more, until it may be started again. One that could not be set up fails unseen before."""
        self._trials.setdefault(trial.trial_id, TrialProgress(label=str(trial)))
        self._end(trials, trial)

    def _end(self, trials: list[Trial], trial: Trial) -> None:
        is_last = not any(other.status == Trial.PENDING for other in trials)
        self._display.end(speaker_of(trial), then="finishing" if is_last else _STARTING)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Prints the summaries."""
        self.close()
        for trial in trials:
            progress = self._trials.get(trial.trial_id)
            result = trial.last_result or {}
            already_ended = None
            if progress is None:
                if not result:  # Never started.
                    continue
                progress = observe(TrialProgress(label=str(trial)), result, self._totals(trial))
                already_ended = (
                    format_reached(result, self._stop, trial.config) or "a scheduler or its algorithm had ended it"
                )
            progress = replace(progress, best=_best_of_all(trial, progress.best))
            status = "failed" if trial.status == Trial.ERROR else "ended"
            checkpoint = trial.checkpoint.path if trial.checkpoint else None
            summary = format_summary(
                progress,
                status,
                checkpoint,
                best_checkpoint=self._best_of(trial),
                budget=format_budget(result, limits_of(self._stop, trial.config)),
                already_ended=already_ended,
            )
            self._display.print(summary)

    def close(self) -> None:
        """Shows no trial any more."""
        self._display.hear(None)
        self._display.forget_trials()
        if self._listener is not None:
            self._listener.stop()
            self._listener = None

    def _totals(self, trial: Trial) -> Totals:
        stop = limits_of(self._stop, trial.config)
        if (limit := stop.get(keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME)) is not None:
            stored = keys.NUM_ONLINE_ENV_STEPS_LIFETIME
            stop[stored] = min(limit, stop.get(stored, limit))
        return Totals(offline_updates=trial.config.get("offline_updates"), stop=stop)


def _best_of_all(trial: Trial, best: Evaluation) -> Evaluation:
    """The best evaluations of a trial, also of before the run was resumed, as its log has them."""
    record = read_trial(LocalFileSystem(), trial.storage.trial_driver_staging_path, is_running=False)
    if record is None:
        return best
    known = {
        name: [*record.known(name), *([] if (value := getattr(best, name)) is None else [value])]
        for name in ("episode_return", "success_rate", "normalized_score")
    }
    losses = [*record.known("held_out_td_loss"), *([] if best.held_out_td_loss is None else [best.held_out_td_loss])]
    best_of = {name: max(values, default=None) for name, values in known.items()}
    return Evaluation(**best_of, held_out_td_loss=min(losses, default=None))


def speaker_of(trial: Trial) -> str:
    """The name by which a trial tells what it does, that of its folder, see `CalQL.setup`."""
    return trial.storage.trial_dir_name or ""


def _restored_callback(stop: dict[str, float]) -> ProgressCallback:
    return ProgressCallback(stop, Display())
