"""Shows a run of Ray Tune while it goes on: one line per trial, and a summary of each at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rllib_calql.common import metrics as keys
from rllib_calql.progress.budget import format_budget, format_reached
from rllib_calql.progress.lines import Totals, TrialProgress, format_line, format_summary, observe
from rllib_calql.system.stop_signals import outliving_terminal


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
        for finding in (result.get(keys.OFFLINE_DATA_WARNINGS) or "").splitlines():
            if finding not in self._data:
                self._data.add(finding)
                self._print(f"Warning, offline data: {finding}.")
        for warning in (result.get(keys.Q_WARNING), result.get(keys.SUCCESS_WARNING)):
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
            result = trial.last_result or {}
            already_ended = None
            if progress is None:
                if not result:  # Never started.
                    continue
                progress = observe(TrialProgress(label=str(trial)), result, self._totals(trial))
                already_ended = format_reached(result, self._stop) or "a scheduler or its algorithm had ended it"
            status = "failed" if trial.status == Trial.ERROR else "ended"
            checkpoint = trial.checkpoint.path if trial.checkpoint else None
            budget = format_budget(result, self._stop)
            self._print(format_summary(progress, status, checkpoint, budget=budget, already_ended=already_ended))

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
