"""What a user sees of a Tune run while it runs: one progress line per trial, and a checkpoint on Ctrl-C."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.result import EXPR_PROGRESS_FILE, EXPR_RESULT_FILE, SHOULD_CHECKPOINT
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rllib_calql.common import metrics as keys
from rllib_calql.experiments.progress import Totals, TrialProgress, format_line, format_summary, observe
from rllib_calql.experiments.run_state import write_whole
from rllib_calql.system.stop_signals import StopSignals, outliving_terminal

logger = logging.getLogger(__name__)


class ProgressCallback(tune.Callback):
    """Prints progress while Tune runs, and a summary of every trial at the end.

    On a terminal the lines of the trials stay in place and are rewritten. Elsewhere a line is printed per result, at
    most one per trial and `interval_s`; a change of phase is always printed.

    Args:
        stop: Metric -> value at which trials end.
        console: Where to print.
        interval_s: Least seconds between two plain lines of a trial.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        stop: Mapping[str, float],
        console: Console,
        *,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop = dict(stop)
        self._console = console
        self._interval_s = interval_s
        self._clock = clock
        self._trials: dict[str, TrialProgress] = {}
        self._printed_at: dict[str, float] = {}
        self._data: set[str] = set()  # Lines about offline data that were printed; trials often share their data.
        self._warnings: set[tuple[str, str]] = set()  # Of trials, printed.
        self._live: Live | None = None

    def __reduce__(self) -> tuple[Callable[..., ProgressCallback], tuple[dict[str, float]]]:
        """Tune pickles callbacks with the experiment; a console has no place in there."""
        return _restored_callback, (self._stop,)

    def setup(self, *args: Any, **info: Any) -> None:
        """Starts the live display."""
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Shows the trial."""
        if trial.trial_id not in self._trials:
            self._trials[trial.trial_id] = TrialProgress(label=str(trial))
            self._show(trial.trial_id, always=True)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Updates the trial's line."""
        data = result.get(keys.OFFLINE_DATA)
        if data is not None and data not in self._data:
            self._data.add(data)
            self._print(f"Offline data: {data}.")
        warning = result.get(keys.Q_WARNING)
        if warning is not None and (trial.trial_id, warning) not in self._warnings:
            self._warnings.add((trial.trial_id, warning))
            self._print(f"Warning, {trial}: {warning}.")
        before = self._trials.setdefault(trial.trial_id, TrialProgress(label=str(trial)))
        after = observe(before, result, self._totals(trial))
        self._trials[trial.trial_id] = after
        self._show(trial.trial_id, always=after.phase != before.phase or bool(result.get("done")))

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Ends the live display and prints the summaries."""
        self.close()
        for trial in trials:
            progress = self._trials.get(trial.trial_id)
            if progress is None:
                if not trial.last_result:  # Never started.
                    continue
                # Finished before the run was resumed.
                progress = observe(TrialProgress(label=str(trial)), trial.last_result, self._totals(trial))
            status = "failed" if trial.status == Trial.ERROR else "ended"
            checkpoint = trial.checkpoint.path if trial.checkpoint else None
            self._print(format_summary(progress, status, checkpoint))

    def close(self) -> None:
        """Leaves the terminal as it was; the last lines stay."""
        if self._live is not None:
            with outliving_terminal():
                self._live.stop()
            self._live = None

    def _totals(self, trial: Trial) -> Totals:
        return Totals(offline_updates=trial.config.get("offline_updates"), stop=self._stop)

    def _show(self, trial_id: str, *, always: bool) -> None:
        if self._live is not None:
            lines = [Text(format_line(p), no_wrap=True, overflow="ellipsis") for p in self._trials.values()]
            self._live.update(Group(*lines))
            return
        now = self._clock()
        if always or now - self._printed_at.get(trial_id, -math.inf) >= self._interval_s:
            self._printed_at[trial_id] = now
            self._print(format_line(self._trials[trial_id]))

    def _print(self, text: str) -> None:
        with outliving_terminal():
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _restored_callback(stop: dict[str, float]) -> ProgressCallback:
    return ProgressCallback(stop, Console())


class CheckpointOnInterrupt(tune.Callback):
    """On SIGINT, lets every running trial finish its iteration and write a checkpoint, then ends the run.

    Trials keep the state "running" in the experiment, so that a resumed run continues them. A second SIGINT raises
    `KeyboardInterrupt` at once. Tune's own handler must be off (`TUNE_DISABLE_SIGINT_HANDLER=1`): it ends the run
    without a checkpoint.

    Args:
        announce: Called with the message for the user at the first SIGINT.
        stop: Who hears the signals, if not this: then SIGTERM and SIGHUP do the same.
    """

    def __init__(self, announce: Callable[[str], None], stop: StopSignals | None = None) -> None:
        self._announce = announce
        self._stop = stop
        self._saved: set[str] = set()
        self._previous: Any = None
        self.interrupted = False
        self.is_complete = False  # Whether no trial is left to wait for.

    def __reduce__(self) -> tuple[Callable[..., CheckpointOnInterrupt], tuple[Callable[[str], None]]]:
        """Tune pickles callbacks with the experiment; a fresh one has the same meaning."""
        return CheckpointOnInterrupt, (print,)

    def __enter__(self) -> CheckpointOnInterrupt:
        if self._stop is None:
            self._previous = signal.signal(signal.SIGINT, self._on_sigint)
        else:
            self._stop.on_stop = self._interrupt
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stop is None:
            signal.signal(signal.SIGINT, self._previous)
        else:
            self._stop.on_stop = None

    def _on_sigint(self, signum: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self._interrupt()

    def _interrupt(self) -> None:
        self.interrupted = True
        what, again = "Interrupted", "Ctrl-C again stops at once."
        if self._stop is not None and self._stop.signum != signal.SIGINT:
            what = self._stop.name
            again = f"It has {self._stop.grace_s:g} s for that; a second signal stops at once."
        self._announce(f"{what}: writing a checkpoint after the current iteration. {again}")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Asks Tune for a checkpoint of this result."""
        if self.interrupted:
            result[SHOULD_CHECKPOINT] = True

    def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Notes the checkpoint. One that was on its way at the interrupt counts as well."""
        if self.interrupted:
            self._saved.add(trial.trial_id)
            self._end_if_saved(trials)

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Ends the run when no trial is left to wait for."""
        if self.interrupted:
            self._end_if_saved(trials)

    def _end_if_saved(self, trials: list[Trial]) -> None:
        running = {trial.trial_id for trial in trials if trial.status == Trial.RUNNING}
        if running <= self._saved:
            self.is_complete = True
            # Tune's documented way to end a run early and keep it resumable.
            signal.raise_signal(signal.SIGUSR1)


class KeepLogs(tune.Callback):
    """Keeps the results of a trial that fails and is restarted.

    Tune's loggers then begin with the files in the storage, where the last results may be missing: they are copied
    there in the background, once in a while. `rllib train file` uses it before those loggers.
    """

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Copies the files of the trial's loggers to the storage."""
        storage = trial.storage
        # Without a checkpoint the loggers go on with the files that they have.
        for name in (EXPR_RESULT_FILE, EXPR_PROGRESS_FILE) if trial.checkpoint else ():
            local = Path(storage.trial_driver_staging_path, name)
            if local.is_file():
                try:
                    storage.syncer.wait()  # What is on its way may be older.
                    write_whole(storage.storage_filesystem, f"{storage.trial_fs_path}/{name}", local.read_bytes())
                except Exception as error:  # Of any storage; the trial goes on.
                    logger.warning("'%s' could not be saved to '%s': %s", name, storage.trial_fs_path, error)
