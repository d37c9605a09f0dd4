"""What the command adds to a Tune run: a checkpoint on Ctrl-C, and logs that outlive a failure of a trial."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.result import EXPR_PROGRESS_FILE, EXPR_RESULT_FILE, SHOULD_CHECKPOINT

from rllib_calql.experiments.run_state import write_whole
from rllib_calql.system.stop_signals import StopSignals

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_COPIES = 60.0  # Of a log to a storage where every copy is a whole one.


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
    """Keeps the results of a trial that fails and is restarted, and of a run that is killed and resumed.

    Tune's loggers then begin with the files in the storage, where the last results may be missing: they are copied
    there in the background, once in a while. `rllib train file` uses it before those loggers.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._copied_at: dict[str, float] = {}  # Trial -> when.

    def __reduce__(self) -> tuple[type[KeepLogs], tuple[()]]:
        """Tune pickles callbacks with the experiment; a fresh one has the same meaning."""
        return KeepLogs, ()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Copies the files of the trial's loggers to the storage."""
        # Without a checkpoint the loggers go on with the files that they have.
        for name in (EXPR_RESULT_FILE, EXPR_PROGRESS_FILE) if trial.checkpoint else ():
            _bring_to_storage(trial, name, can_append=False)

    def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Copies the results, so that those before a checkpoint are there as well as the checkpoint."""
        is_local = isinstance(trial.storage.storage_filesystem, pyarrow.fs.LocalFileSystem)
        now = self._clock()
        if is_local or now - self._copied_at.get(trial.trial_id, -math.inf) >= _SECONDS_BETWEEN_COPIES:
            self._copied_at[trial.trial_id] = now
            _bring_to_storage(trial, EXPR_RESULT_FILE, can_append=is_local)


def _bring_to_storage(trial: Trial, name: str, *, can_append: bool) -> None:
    storage = trial.storage
    local, path = Path(storage.trial_driver_staging_path, name), f"{storage.trial_fs_path}/{name}"
    if not local.is_file():
        return
    try:
        storage.syncer.wait()  # What is on its way may be older.
        if can_append:
            _append_rest(local, Path(path))
        else:
            write_whole(storage.storage_filesystem, path, local.read_bytes())
    except Exception as error:  # Of any storage; the trial goes on.
        logger.warning("'%s' could not be saved to '%s': %s", name, storage.trial_fs_path, error)


def _append_rest(source: Path, target: Path) -> None:
    """Makes a log that grows at its end, and of which `target` is an earlier copy, the same there."""
    size = target.stat().st_size if target.is_file() else 0
    with source.open("rb") as log:
        log.seek(size)
        rest = log.read()
    if rest:
        with target.open("ab") as copy:
            copy.write(rest)
            copy.flush()
            os.fsync(copy.fileno())
