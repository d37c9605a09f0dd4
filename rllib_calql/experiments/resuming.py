"""What `--resume` makes of a run's folder before Ray Tune restores it.

Tune restores the state that it saved last, some ten seconds before a sudden end, with the settings of then. Here that
state is brought up to date: with the newest whole checkpoint of every trial, and with what may change at a resume.
"""

from __future__ import annotations

import copy
import json
import posixpath
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import pyarrow.fs
from ray import tune
from ray.train._internal.session import _TrainingResult
from ray.train._internal.storage import get_fs_and_path
from ray.tune.experiment import Trial
from ray.tune.result import EXPR_RESULT_FILE, TRAINING_ITERATION
from ray.tune.utils import flatten_dict

from rllib_calql.experiments import run_state
from rllib_calql.experiments.experiment import Experiment
from rllib_calql.experiments.reading.schedulers import mutations
from rllib_calql.experiments.reading.spaces import find_spaces
from rllib_calql.experiments.run_checkpoints import drop_results_made_again, tell_where_it_goes_on
from rllib_calql.progress.budget import is_budget_spent

# How a run is executed and when it ends, not what it computes. Only these settings of the file count at a resume.
EXECUTION_SETTINGS = frozenset(
    {
        *("num_env_runners", "num_envs_per_env_runner", "num_cpus_per_env_runner", "num_gpus_per_env_runner"),
        *("custom_resources_per_env_runner", "gym_env_vectorize_mode", "max_requests_in_flight_per_env_runner"),
        *("sample_async", "max_staleness_env_steps", "sample_timeout_s", "max_online_env_steps"),
        "_ends_at_env_steps",
        *("external_port", "external_host", "external_token_file"),
        *("num_learners", "num_cpus_per_learner", "num_gpus_per_learner", "local_gpu_idx"),
        *("num_cpus_for_main_process", "placement_strategy", "log_level"),
        *("evaluation_num_env_runners", "evaluation_parallel_to_training", "evaluation_sample_timeout_s"),
        *("restart_failed_env_runners", "ignore_env_runner_failures", "max_num_env_runner_restarts"),
        *("delay_between_env_runner_restarts_s", "restart_failed_sub_environments"),
        *("env_runner_health_probe_timeout_s", "env_runner_restore_timeout_s"),
        *("store_memory_limit", "cache_dir", "share_offline_data"),
    }
)
_MAX_VALUE_LENGTH = 60


class ResumeError(ValueError):
    """A run that cannot be continued. The message says what to do."""


def prepare_resume(experiment: Experiment, storage_path: str, announce: Callable[[str], None]) -> bool:
    """Brings the state of a run up to date, so that `tune.Tuner.restore` continues it as the experiment says now.

    Every trial continues from the newest whole checkpoint on disk; unfinished ones behind it are removed. From the
    experiment come the settings in `EXECUTION_SETTINGS`, `stop`, `max_failures` and `checkpoint_config`. A trial that
    ended because of the former `stop`, and has not reached the one of now, goes on.

    Args:
        experiment: The experiment as its file is now.
        storage_path: Folder or URI of all runs.
        announce: Called with what the user should know.

    Returns:
        False if the run has not got as far as a first state or checkpoint, so that it may as well begin.

    Raises:
        ResumeError: If the run's state is lost, or it cannot be continued with these settings.
    """
    filesystem, folder = _folder_of_run(experiment, storage_path)
    newest = _read_state(filesystem, folder, announce)
    if newest is None:
        _refuse_lost_state(filesystem, folder)
        announce(f"The run '{experiment.name}' was stopped before its first state was saved; it begins anew.")
        return False
    files, state_name, state, trials = newest
    if other := {trial.trainable_name for trial in trials} - {experiment.algorithm.__name__}:
        raise ResumeError(
            f"The run in '{folder}' is one of {', '.join(other)}, the experiment now one of "
            f"{experiment.algorithm.__name__}; begin it with another `--name`."
        )
    needs_marks = run_state.has_archive(filesystem, folder)
    not_applied: dict[str, None] = {}
    for trial in trials:
        _take_newest_checkpoint(trial, needs_marks=needs_marks, announce=announce)
        former_config = dict(trial.config)
        not_applied |= dict.fromkeys(_apply_settings(trial, experiment))
        _judge_by_stop(trial, experiment.stop, announce, former_config=former_config)
        if trial.storage.trial_dir_name is not None:
            run_state.drop_torn_lines(filesystem, posixpath.join(trial.storage.trial_fs_path, EXPR_RESULT_FILE))
    tell_where_it_goes_on(trials, experiment.name, announce)
    for trial in trials:
        drop_results_made_again(trial)
    if not_applied:
        announce(
            f"Not applied on --resume: {', '.join(not_applied)}. A resumed run keeps its settings, except `stop` and "
            "how it is executed; begin a new run for others."
        )
    state["trial_data"] = [_write_trial(trial) for trial in trials]
    # A decision that waited for a checkpoint which the end prevented would end or pause the trial at its next one.
    state["runner_data"] |= {"_cached_trial_decisions": {}, "_queued_trial_decisions": {}}
    files[state_name] = json.dumps(state).encode()
    if not run_state.is_tuner_whole(filesystem, folder):
        announce(f"'tuner.pkl' in '{folder}' is damaged; it is written anew from the experiment's file.")
        _write_tuner(experiment, storage_path, filesystem, folder)
    run_state.write_state(filesystem, folder, _in_new_session(files, state_name))
    return True


def _folder_of_run(experiment: Experiment, storage_path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    filesystem, root = get_fs_and_path(storage_path)
    return filesystem, posixpath.join(root, experiment.name)


def _read_state(
    filesystem: pyarrow.fs.FileSystem, folder: str, announce: Callable[[str], None]
) -> tuple[dict[str, bytes], str, dict[str, Any], list[Trial]] | None:
    """The newest state that Tune can restore: all its files, the name of the first, its content, its trials."""
    for files in run_state.whole_states(filesystem, folder, announce):
        name = next(name for name in files if run_state.is_state(name))
        try:
            state = json.loads(files[name])
            trials = [_read_trial(stored, metadata, filesystem, folder) for stored, metadata in state["trial_data"]]
            state["runner_data"].keys()
        except Exception as error:  # Whatever a damaged file says.
            announce(f"Skipped '{name}' in '{folder}', which is damaged ({type(error).__name__}: {error}).")
            continue
        return files, name, state, trials
    return None


def _write_tuner(experiment: Experiment, storage_path: str, filesystem: pyarrow.fs.FileSystem, folder: str) -> None:
    path = posixpath.join(folder, "tuner.pkl")
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        run_state.set_aside(filesystem, path)
    tune.Tuner(  # Writes it.
        experiment.algorithm,
        param_space=experiment.param_space,
        tune_config=experiment.tune_config(),
        run_config=tune.RunConfig(name=experiment.name, storage_path=storage_path),
    )


def _refuse_lost_state(filesystem: pyarrow.fs.FileSystem, folder: str) -> None:
    for name in run_state.names_in(filesystem, folder):
        paths = [path for _, path in run_state.numbered_checkpoints(filesystem, posixpath.join(folder, name))]
        if paths:
            whole = (path for path in reversed(paths) if run_state.examine(filesystem, path).is_whole)
            raise ResumeError(
                f"The state of the run in '{folder}' is lost, but not its checkpoints, the newest of a trial at "
                f"'{next(whole, paths[-1])}'; continue from it with `CalQL.from_checkpoint`, or begin a new run with "
                "another `--name`."
            )


def _in_new_session(files: dict[str, bytes], state_name: str) -> dict[str, bytes]:
    old = run_state.session(state_name)
    # Tune takes the greatest name for the newest; a clock may have been set back.
    new = max(datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), old)
    return {name.replace(old, new): content for name, content in files.items()}


def _read_trial(stored: str, stored_metadata: str, filesystem: pyarrow.fs.FileSystem, folder: str) -> Trial:
    trial = Trial.from_json_state(stored, stub=True)
    trial.restore_run_metadata(stored_metadata)
    storage = copy.copy(trial.storage)  # The folder may have been moved since.
    storage.storage_filesystem = filesystem
    storage.storage_fs_path, storage.experiment_dir_name = posixpath.split(folder)
    trial.set_storage(storage)
    return trial


def _write_trial(trial: Trial) -> tuple[str, str]:
    trial.stub = False
    trial.invalidate_json_state()
    trial.run_metadata.invalidate_cache()
    stored: tuple[str, str] = trial.get_json_state()
    return stored


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def _take_newest_checkpoint(trial: Trial, *, needs_marks: bool, announce: Callable[[str], None]) -> None:
    storage, manager = trial.storage, trial.run_metadata.checkpoint_manager
    if storage.trial_dir_name is None:  # It never started.
        return
    had_checkpoint = manager.latest_checkpoint_result is not None
    newer = _newer_checkpoints(trial, announce)
    known = [result for result in manager._checkpoint_results if _is_there(result, needs_marks)]
    latest = manager.latest_checkpoint_result
    if newer:
        storage.current_checkpoint_index, latest = newer[-1]
    elif latest is not None:
        older = sorted(
            (result for result in known if result.checkpoint.path != manager.latest_checkpoint_result.checkpoint.path),
            key=lambda result: result.metrics.get(TRAINING_ITERATION, 0),
            reverse=True,
        )
        latest = None
        # PBT may have taken the latest from another trial, where it has been deleted since.
        for result in [manager.latest_checkpoint_result, *older]:
            found = run_state.examine(result.checkpoint.filesystem, result.checkpoint.path)
            if _is_usable(found, needs_marks) and _is_there(result, needs_marks):
                latest = result
                break
            known = [other for other in known if other.checkpoint.path != result.checkpoint.path]
            if found.faults:
                announce(f"Skipped the damaged checkpoint '{result.checkpoint.path}': {found.faults}.")
    manager._checkpoint_results = known + [result for _, result in newer]
    manager._latest_checkpoint_result = latest
    if had_checkpoint and latest is None:
        announce(f"No whole checkpoint of trial '{trial}' is left; it begins anew.")


def _newer_checkpoints(trial: Trial, announce: Callable[[str], None]) -> list[tuple[int, _TrainingResult]]:
    """Whole checkpoints that the state does not know, by number."""
    storage = trial.storage
    filesystem = storage.storage_filesystem
    newer = []
    for number, path in run_state.numbered_checkpoints(filesystem, storage.trial_fs_path):
        if number <= storage.current_checkpoint_index:
            continue
        found = run_state.examine(filesystem, path)
        if found.is_whole:
            newer.append((number, _TrainingResult(tune.Checkpoint(path, filesystem), found.result)))
        # What stayed there would be mixed with the files of the next checkpoint of that number.
        elif found.is_finished:
            faults = found.faults or f"{', '.join(map(repr, found.lost))} is missing"
            aside = run_state.set_aside(filesystem, path)
            announce(f"Skipped the damaged checkpoint '{path}': {faults}; it is now at '{aside}'.")
        else:
            filesystem.delete_dir(path)
            announce(f"Removed the unfinished checkpoint '{path}'.")
    return newer


def _is_there(result: Any, needs_mark: bool) -> bool:
    """Whether a checkpoint that the state knows has all its files, by their sizes."""
    filesystem, path = result.checkpoint.filesystem, result.checkpoint.path
    found = run_state.examine(filesystem, path, reads_files=False)
    if needs_mark and not found.is_finished:
        return False
    is_folder = filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory
    return bool(is_folder and not found.lost and not found.damage)


def _is_usable(found: run_state.Found, needs_mark: bool) -> bool:
    """Whether a trial can go on from a checkpoint that the state knows with its result."""
    if found.lost or found.damage:
        return False
    # Without a readable mark, checksums tell as well that it is whole.
    return found.result is not None or found.is_summed or not (needs_mark or found.is_finished)


# --- Settings --------------------------------------------------------------------------------------------------------


def _apply_settings(trial: Trial, experiment: Experiment) -> list[str]:
    """Applies what may change. Returns what differs and was not applied, for the user to read."""
    wanted = experiment.param_space
    changed = dict(trial.config)
    not_applied = []
    varied = {path[0] for path, _ in find_spaces(wanted)} | mutations(experiment.scheduler).keys()
    for setting in sorted((wanted.keys() & trial.config.keys()) - varied):
        stored, now = trial.config[setting], wanted[setting]
        if _is_same(stored, now):
            continue
        if setting in EXECUTION_SETTINGS:
            changed[setting] = now
        else:
            not_applied.append(f"`{setting}` (the run has {_shown(stored)}, now {_shown(now)})")
    trial.set_config(changed)
    trial.max_failures = experiment.max_failures
    trial.run_metadata.num_failures = 0
    manager = trial.run_metadata.checkpoint_manager
    manager._checkpoint_config = experiment.safety_net.tune_config()
    try:
        experiment.algorithm.default_resource_request(changed)  # type: ignore[attr-defined]
    except Exception as error:
        raise ResumeError(f"Trial '{trial}' cannot be resumed: {error}") from error
    return not_applied


def _is_same(stored: Any, now: Any) -> bool:
    if isinstance(stored, (type(None), bool, int, float, str)) or isinstance(now, (type(None), bool, int, float, str)):
        return bool(stored == now)
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        return stored.keys() == now.keys() and all(_is_same(stored[key], now[key]) for key in now)
    if isinstance(stored, (list, tuple)) and isinstance(now, (list, tuple)):
        return len(stored) == len(now) and all(map(_is_same, stored, now))
    # Classes and functions of an experiment file in Python are other objects in every process.
    names = [getattr(value, "__qualname__", None) or type(value).__qualname__ for value in (stored, now)]
    return names[0] == names[1]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[:_MAX_VALUE_LENGTH]}..."


def _judge_by_stop(
    trial: Trial,
    stop: Mapping[str, float],
    announce: Callable[[str], None],
    *,
    former_config: Mapping[str, Any] | None = None,
) -> None:
    """Ends a trial that has reached `stop` or its budget, and lets one go on that had only reached the former ones."""
    former, trial.stopping_criterion = trial.stopping_criterion, dict(stop)
    if trial.status == Trial.ERROR:
        return
    latest = trial.run_metadata.checkpoint_manager.latest_checkpoint_result
    last = trial.run_metadata.last_result if trial.status == Trial.TERMINATED else {}
    last = last or (latest.metrics if latest is not None else {})
    has_ended = trial.status == Trial.TERMINATED or bool(last.get("done"))
    is_reached = _is_reached(stop, last) or is_budget_spent(last, trial.config)
    was_reached = _is_reached(former, last) or is_budget_spent(last, former_config or trial.config)
    if is_reached or (has_ended and not was_reached):
        trial.set_status(Trial.TERMINATED)
        trial.run_metadata.last_result = last
    elif has_ended and latest is None:
        announce(f"Trial '{trial}' ended without a checkpoint, so it cannot go on.")
    elif has_ended:
        trial.set_status(Trial.PENDING)
        latest.metrics["done"] = False


def _is_reached(stop: Mapping[str, float], result: Mapping[str, Any]) -> bool:
    flat = flatten_dict(dict(result))
    return any(flat.get(metric, float("-inf")) >= value for metric, value in stop.items())
