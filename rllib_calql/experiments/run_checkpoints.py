"""Which checkpoint stands for a run: the newest or the best of its trials; and from where a resumed one goes on."""

from __future__ import annotations

import json
import os
import posixpath
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.fs
from ray.train._internal.storage import get_fs_and_path
from ray.tune.experiment import Trial
from ray.tune.result import EXPR_PROGRESS_FILE, EXPR_RESULT_FILE, TRAINING_ITERATION

from rllib_calql.checkpoints.folders import MANIFEST, MARK
from rllib_calql.checkpoints.integrity import read_file
from rllib_calql.common import metrics as keys
from rllib_calql.experiments import run_state
from rllib_calql.experiments.best_checkpoint import read_best
from rllib_calql.progress.budget import format_duration
from rllib_calql.progress.results_table import with_rows_of

_REMEDY = "give the folder of a run, a trial or a checkpoint, as `rllib train` prints them"
_TIMESTAMP = "timestamp"  # RLlib's, in results: seconds since 1970.


@dataclass(frozen=True)
class Chosen:
    """A checkpoint that stands for a run or a trial.

    Attributes:
        filesystem: PyArrow file system.
        path: Folder in it.
        reason: Why this one, readable; empty if it was named itself.
    """

    filesystem: pyarrow.fs.FileSystem
    path: str
    reason: str


# --- Of a run or a trial ----------------------------------------------------------------------------------------------


def is_checkpoint(filesystem: pyarrow.fs.FileSystem, folder: str) -> bool:
    """Whether the folder is that of a checkpoint, damaged or not."""
    return any(name in run_state.names_in(filesystem, folder) for name in (MARK, MANIFEST))


def has_checkpoint(location: str) -> bool:
    """Whether a run, in a folder or at a URI, has a whole checkpoint."""
    try:
        choose_checkpoint(location, best=False)
    except (OSError, ValueError):
        return False
    return True


def choose_checkpoint(location: str, *, best: bool) -> Chosen:
    """The checkpoint itself, or the newest or the best whole one of a run or of one trial.

    Args:
        location: Folder or URI of a checkpoint, a run or a trial.
        best: Takes the best one, as `keep_best` has chosen it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it has no such checkpoint; the message says why, and what to do.
    """
    found = _found_at(location)
    if isinstance(found, Chosen):
        if best:
            raise ValueError(
                f"`--best` chooses from the checkpoints of a run or a trial, '{location}' is a single one; drop "
                f"`--best`, or give '{posixpath.dirname(found.path)}'."
            )
        return found
    filesystem, trials = found
    return _best_of(filesystem, trials, location) if best else _newest_of(filesystem, trials, location)


def all_checkpoints(location: str) -> list[Chosen]:
    """The checkpoint itself, or every one of a run or of one trial, those that are damaged included.

    Args:
        location: Folder or URI of a checkpoint, a run or a trial.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no checkpoint in it.
    """
    chosen = _found_at(location)
    if isinstance(chosen, Chosen):
        return [chosen]
    filesystem, trials = chosen
    return [
        Chosen(filesystem, path, "")
        for trial in trials
        for _, path in run_state.numbered_checkpoints(filesystem, trial)
    ]


def _found_at(location: str) -> Chosen | tuple[pyarrow.fs.FileSystem, list[str]]:
    """The checkpoint at a location, or the folders of the trials there that have checkpoints."""
    filesystem, folder = get_fs_and_path(location if "://" in location else os.path.abspath(location))
    folder = folder.rstrip("/")
    if filesystem.get_file_info(folder).type == pyarrow.fs.FileType.NotFound:
        raise FileNotFoundError(f"'{location}' does not exist; {_REMEDY}.")
    # One whose own files are there is damaged, and which of them is said when it is read.
    if is_checkpoint(filesystem, folder):
        return Chosen(filesystem, folder, "")
    trials = _trials_in(filesystem, folder)
    if not trials:
        inside = [posixpath.join(folder, name) for name in run_state.names_in(filesystem, folder)]
        runs = [path for path in inside if _trials_in(filesystem, path)]
        hint = f" Did you mean '{runs[-1]}'?" if runs else ""
        raise ValueError(
            f"'{location}' is not a checkpoint of an algorithm, nor a run or trial with any; {_REMEDY}.{hint}"
        )
    return filesystem, trials


def _trials_in(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[str]:
    """Folders of trials with checkpoints: the folder itself, or those in it."""
    if run_state.numbered_checkpoints(filesystem, folder):
        return [folder]
    inside = [posixpath.join(folder, name) for name in run_state.names_in(filesystem, folder)]
    return [trial for trial in inside if run_state.numbered_checkpoints(filesystem, trial)]


def _best_of(filesystem: pyarrow.fs.FileSystem, trials: Sequence[str], location: str) -> Chosen:
    found = [(trial, best) for trial in trials if (best := read_best(filesystem, trial)) is not None]
    if not found:
        raise ValueError(
            f"'{location}' has no best checkpoint: its run evaluated nothing (`evaluation_interval` is not set), had "
            "`keep_best: false`, or was not made by `rllib train`; drop `--best` to take the newest checkpoint."
        )
    if len({best.by for _, best in found}) > 1:
        metrics = ", ".join(sorted({str(best.metric or "success or return") for _, best in found}))
        raise ValueError(
            f"The trials in '{location}' were judged by different metrics ({metrics}), so none is the best of all; "
            "give the folder of one trial."
        )
    trial, best = max(found, key=lambda one: one[1].score)
    of_trials = f" of the best of {len(trials)} trials, {posixpath.basename(trial)}" if len(trials) > 1 else ""
    return Chosen(filesystem, posixpath.join(trial, best.checkpoint), f"the best{of_trials}: {best.describe()}")


def _newest_of(filesystem: pyarrow.fs.FileSystem, trials: Sequence[str], location: str) -> Chosen:
    newest = []
    for trial in trials:
        paths = [path for _, path in run_state.numbered_checkpoints(filesystem, trial)]
        # Plain runs of Ray Tune have no marks.
        is_marked = any(run_state.is_marked(filesystem, path) for path in paths)
        for path in reversed(paths):
            found = run_state.examine(filesystem, path, reads_files=False)
            if found.is_whole if is_marked else is_checkpoint(filesystem, path):
                result = found.result or {}
                modified = filesystem.get_file_info(path).mtime_ns or 0
                newest.append((result.get(_TIMESTAMP, modified / 1e9), path, result))
                break
    if not newest:
        raise ValueError(f"'{location}' has no whole checkpoint: its first was being written when the run was stopped.")
    _, path, result = max(newest, key=lambda one: one[:2])
    of_trials = f" of {len(trials)} trials" if len(trials) > 1 else ""
    return Chosen(filesystem, path, f"the newest{of_trials}" + (f": {position(result)}" if result else ""))


def position(result: Mapping[str, Any]) -> str:
    """Where a trial was after a result, for example `iteration 7, online, 5,000 updates and 1,200 env steps`."""
    parts = [f"iteration {result.get(TRAINING_ITERATION, 0)}"]
    if keys.PHASE in result:
        updates = result.get(keys.NUM_OFFLINE_UPDATES_LIFETIME, 0) + result.get(keys.NUM_ONLINE_UPDATES_LIFETIME, 0)
        env_steps = result.get(keys.NUM_ONLINE_ENV_STEPS_LIFETIME, 0)
        parts += [str(result[keys.PHASE]), f"{updates:,} updates and {env_steps:,} env steps"]
    elif "num_env_steps_sampled_lifetime" in result:
        parts.append(f"{int(result['num_env_steps_sampled_lifetime']):,} env steps")
    return ", ".join(parts)


# --- Of a run that is resumed -----------------------------------------------------------------------------------------


def tell_where_it_goes_on(
    trials: Sequence[Trial], name: str, announce: Callable[[str], None], clock: Callable[[], float] = time.time
) -> None:
    """Says for every trial of a resumed run from which checkpoint it goes on, and what is made again.

    Args:
        trials: With the checkpoints and the states that they go on with.
        name: Of the run.
        announce: Called with a line for each trial that has begun and not ended.
        clock: Seconds since 1970.
    """
    open_trials = [trial for trial in trials if trial.status != Trial.TERMINATED]
    if open_trials and all(_latest(trial) is None for trial in open_trials):
        announce(f"The run '{name}' was stopped before its first checkpoint; it begins anew.")
    for trial in open_trials:
        last, latest = last_result(trial), _latest(trial)
        if latest is None:
            if trial.storage.trial_dir_name is not None:
                announce(f"Trial '{trial}' has no checkpoint, it begins anew{_made_again(0, last)}.")
            continue
        checkpoint, result = latest.checkpoint, latest.metrics
        own = posixpath.basename(checkpoint.path)
        shown = own if _is_own(trial, checkpoint.path) else checkpoint.path
        written = result.get(_TIMESTAMP)
        age = "" if written is None else f", {format_duration(max(0.0, clock() - written))} old"
        lost = _made_again(int(result.get(TRAINING_ITERATION, 0)), last)
        announce(f"Trial '{trial}' goes on from '{shown}' ({position(result)}{age}){lost}.")


def last_result(trial: Trial) -> Mapping[str, Any]:
    """The trial's last result that is known, by its log or by Tune's state; empty if there is none."""
    lines = _result_lines(trial) if trial.storage.trial_dir_name is not None else []
    logged: Mapping[str, Any] = json.loads(lines[-1]) if lines else {}
    return max(logged, trial.run_metadata.last_result or {}, key=lambda result: result.get(TRAINING_ITERATION, 0))


def drop_results_made_again(trial: Trial) -> None:
    """Removes from the trial's logs the results of iterations that are made again, from their ends backwards.

    The table gets the rows of the others that a sudden end has kept from it.
    """
    latest, is_open = _latest(trial), trial.status != Trial.TERMINATED
    if trial.storage.trial_dir_name is None:
        return
    if is_open and latest is not None and not _is_own(trial, latest.checkpoint.path):
        return  # Population based training gave it another trial's.
    filesystem = trial.storage.storage_filesystem
    lines = _result_lines(trial)
    kept = list(lines)
    if is_open:
        reached = 0 if latest is None else latest.metrics.get(TRAINING_ITERATION, 0)
        while kept and json.loads(kept[-1]).get(TRAINING_ITERATION, 0) > reached:
            kept.pop()
    if kept != lines:
        run_state.write_whole(filesystem, _log_of(trial), b"".join(kept))
    path = posixpath.join(str(trial.storage.trial_fs_path), EXPR_PROGRESS_FILE)
    is_there = filesystem.get_file_info(path).type == pyarrow.fs.FileType.File
    table = read_file(filesystem, path) if is_there else b""
    if (whole := with_rows_of(table, [json.loads(line) for line in kept])) != table:
        run_state.write_whole(filesystem, path, whole)


def _latest(trial: Trial) -> Any:
    return trial.run_metadata.checkpoint_manager.latest_checkpoint_result


def _is_own(trial: Trial, checkpoint: str) -> bool:
    return posixpath.dirname(checkpoint) == str(trial.storage.trial_fs_path).rstrip("/")


def _made_again(reached: int, last: Mapping[str, Any]) -> str:
    """`; iterations 6 to 7 are made again`, or nothing if nothing is."""
    lost = int(last.get(TRAINING_ITERATION, 0))
    if lost <= reached:
        return ""
    which = f"iteration {lost} is" if lost == reached + 1 else f"iterations {reached + 1} to {lost} are"
    return f"; {which} made again"


def _log_of(trial: Trial) -> str:
    return posixpath.join(str(trial.storage.trial_fs_path), EXPR_RESULT_FILE)


def _result_lines(trial: Trial) -> list[bytes]:
    """Lines of the trial's log, which has to be without torn ones."""
    filesystem, path = trial.storage.storage_filesystem, _log_of(trial)
    if filesystem.get_file_info(path).type != pyarrow.fs.FileType.File:
        return []
    return read_file(filesystem, path).splitlines(keepends=True)
