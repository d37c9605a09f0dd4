"""Runs through Ray Tune that were stopped, died or were killed, and go on from what is on disk."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
from ray import tune
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial
from ray.tune.logger import JsonLoggerCallback
from tiny import line_config

from rllib_calql import CalQL
from rllib_calql.common import metrics as keys
from rllib_calql.experiments import run_state
from rllib_calql.experiments.experiment import Experiment
from rllib_calql.experiments.resuming import (
    ResumeError,
    _apply_settings,
    _judge_by_stop,
    _take_newest_checkpoint,
    prepare_resume,
)
from rllib_calql.experiments.tune_runs import run_experiment

LOCAL = pyarrow.fs.LocalFileSystem()


class FailsOnce(CalQL):
    """Raises in its fourth iteration as long as the file named in the environment's config is there, and removes it."""

    def training_step(self) -> None:
        """Fails or trains."""
        trigger = Path(self.config.env_config["trigger"])
        if self.iteration == 3 and trigger.exists():
            trigger.unlink()
            raise RuntimeError("A node was lost.")
        super().training_step()


def failing_experiment(tmp_path: Path, *, iterations: int = 6, **more: Any) -> Experiment:
    (tmp_path / "trigger").touch()
    config = line_config(tmp_path, offline_updates=4, updates_per_iteration=2, updates_per_env_step=0.1)
    config.environment(env_config={"trigger": str(tmp_path / "trigger")})
    return Experiment(
        name="failing",
        algorithm=FailsOnce,
        config=config,
        stop={"training_iteration": iterations},
        checkpoint_config={"checkpoint_frequency": 1},
        **more,
    )


def trial_folder(tmp_path: Path) -> Path:
    (folder,) = (path for path in (tmp_path / "r" / "failing").iterdir() if path.is_dir())
    return folder


def assert_counters_are_exact(folder: Path, iterations: int) -> None:
    checkpoints = run_state.numbered_checkpoints(LOCAL, str(folder))
    with (Path(checkpoints[-1][1]) / "algorithm_state.pkl").open("rb") as file:
        state = pickle.load(file)["calql"]
    # Two offline iterations of two updates each; every online iteration stores one episode, which ends in one row.
    assert state[keys.NUM_OFFLINE_UPDATES_LIFETIME] == 4
    assert state[keys.NUM_ONLINE_EPISODES_LIFETIME] == iterations - 2
    num_rows = len(state["store"]["online"]["columns"]["rewards"])
    assert state[keys.NUM_ONLINE_ENV_STEPS_LIFETIME] == num_rows
    made = state[keys.NUM_ONLINE_UPDATES_LIFETIME] + state["updates_owed"]
    assert made == pytest.approx(0.1 * num_rows)
    results = [json.loads(line) for line in (folder / "result.json").read_text().splitlines()]
    assert [result["training_iteration"] for result in results] == list(range(1, iterations + 1))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- With Ray --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_an_interrupted_trial_is_restored_in_plain_python_with_exact_counters(tmp_path: Path) -> None:
    experiment = failing_experiment(tmp_path)
    tuner = tune.Tuner(
        FailsOnce,
        param_space=experiment.config.to_dict(),
        run_config=tune.RunConfig(
            name="failing",
            storage_path=str(tmp_path / "r"),
            stop=experiment.stop,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            verbose=0,
        ),
    )
    (error,) = tuner.fit().errors
    assert "A node was lost." in str(error)
    results = tune.Tuner.restore(str(tmp_path / "r" / "failing"), FailsOnce, resume_errored=True).fit()
    assert not results.errors
    assert_counters_are_exact(trial_folder(tmp_path), iterations=6)


@pytest.mark.usefixtures("ray_session")
def test_max_failures_restarts_a_trial_and_a_resume_brings_the_rest_up_to_date(tmp_path: Path) -> None:
    said: list[str] = []
    storage = str(tmp_path / "r")
    outcome = run_experiment(failing_experiment(tmp_path, max_failures=1), storage, resume=False, announce=said.append)
    assert not outcome.errors
    assert not (tmp_path / "trigger").exists()
    folder = trial_folder(tmp_path)
    assert_counters_are_exact(folder, iterations=6)

    # As after a SIGKILL: Tune's state cut off, a checkpoint there in part; and the file says other things now.
    (state,) = (tmp_path / "r" / "failing").glob("experiment_state-*.json")
    cut_off(state)
    with (folder / "result.json").open("a") as results:
        results.write('{"training_iteration": 7, "cut')
    (folder / "checkpoint_000006").mkdir()
    (folder / "checkpoint_000006" / "class_and_ctor_args.pkl").write_bytes(b"in part")
    (folder / "checkpoint_000006" / "left_over").touch()
    with pytest.raises(ResumeError, match=r"is one of FailsOnce, the experiment now one of CalQL; begin it with"):
        prepare_resume(replace(failing_experiment(tmp_path), algorithm=CalQL), storage, said.append)
    later = failing_experiment(tmp_path, iterations=7)
    (tmp_path / "trigger").unlink()
    later.config.env_runners(sample_timeout_s=123.0).training(gamma=0.5)
    outcome = run_experiment(later, storage, resume=True, announce=said.append)
    assert not outcome.errors
    assert_counters_are_exact(folder, iterations=7)
    assert not (folder / "checkpoint_000006" / "left_over").exists()
    assert run_state.result_of_whole(LOCAL, str(folder / "checkpoint_000006")) is not None
    assert [message.split("'")[0].split(".")[0] for message in said] == [
        "Removed the unfinished checkpoint ",
        "Trial ",
        "Not applied on --resume: `gamma` (the run has 0",
    ]
    last = json.loads((folder / "result.json").read_text().splitlines()[-1])
    assert (last["config"]["gamma"], last["config"]["sample_timeout_s"]) == (0.99, 123.0)


@pytest.mark.slow
def test_a_driver_killed_while_it_writes_a_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    benchmark = Path(__file__).parents[1] / "benchmarks" / "sigkill.py"
    done = subprocess.run(
        [sys.executable, str(benchmark), *("--kills", "1", "--moments", "checkpoint", "--seed", "3", "--skip-agents")],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All checks passed." in done.stdout


# --- Checkpoints and state on disk -----------------------------------------------------------------------------------


def write_checkpoint(folder: Path, number: int, *, iteration: int, is_marked: bool = True) -> Path:
    path = folder / f"checkpoint_{number:06d}"
    (path / "learner").mkdir(parents=True)
    (path / "state.pkl").write_bytes(b"state")
    (path / "learner" / "weights.pkl").write_bytes(b"weights")
    if is_marked:
        run_state.mark_whole(LOCAL, str(path), {"training_iteration": iteration})
    return path


def test_a_checkpoint_is_whole_as_long_as_every_file_has_its_size(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 0, iteration=7)
    assert run_state.result_of_whole(LOCAL, str(path)) == {"training_iteration": 7}
    (path / "note.txt").write_text("Added by a user.")
    assert run_state.result_of_whole(LOCAL, str(path)) == {"training_iteration": 7}
    cut_off(path / "learner" / "weights.pkl")
    assert run_state.result_of_whole(LOCAL, str(path)) is None
    (path / "learner" / "weights.pkl").unlink()
    assert run_state.result_of_whole(LOCAL, str(path)) is None
    assert run_state.result_of_whole(LOCAL, str(write_checkpoint(tmp_path, 1, iteration=8, is_marked=False))) is None


def test_the_newest_state_is_the_last_of_which_every_file_is_whole(tmp_path: Path) -> None:
    older = {"experiment_state-2026-01-01.json": b'{"a": 1}', "searcher-2026-01-01.json": pickle.dumps({"b": 1})}
    newer = {"experiment_state-2026-01-02.json": b'{"a": 2}', "searcher-2026-01-02.json": pickle.dumps({"b": 2})}
    assert run_state.read_newest_state(LOCAL, str(tmp_path)) == {}
    run_state.write_state(LOCAL, str(tmp_path), older)
    run_state.write_state(LOCAL, str(tmp_path), newer)
    assert run_state.read_newest_state(LOCAL, str(tmp_path)) == newer
    cut_off(tmp_path / "searcher-2026-01-02.json")
    assert run_state.read_newest_state(LOCAL, str(tmp_path)) == newer  # Out of the archive.
    (tmp_path / "rllib_calql_state.zip").unlink()
    assert run_state.read_newest_state(LOCAL, str(tmp_path)) == older
    cut_off(tmp_path / "experiment_state-2026-01-01.json")
    assert run_state.read_newest_state(LOCAL, str(tmp_path)) == {}


def test_tunes_state_is_kept_in_one_file_and_training_survives_a_storage_that_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "staged").mkdir()
    storage = SimpleNamespace(
        experiment_driver_staging_path=str(tmp_path / "staged"),
        experiment_fs_path=str(tmp_path / "missing" / "run"),
        storage_filesystem=LOCAL,
    )
    trials: Any = [SimpleNamespace(storage=storage)]
    callback = run_state.KeepResumable()
    (tmp_path / "staged" / "experiment_state-2026-01-01.json").write_text('{"a": 1}')
    callback.on_step_end(0, trials)
    assert "The run's state could not be saved to" in caplog.text
    (tmp_path / "missing" / "run").mkdir(parents=True)
    for name, text in [("experiment_state-2026-01-02.json", '{"a": 2}'), ("tmp-searcher-2026-01-02.json", "{")]:
        (tmp_path / "staged" / name).write_text(text)
    callback.on_step_end(1, trials)
    newest = run_state.read_newest_state(LOCAL, storage.experiment_fs_path)
    assert newest == {"experiment_state-2026-01-02.json": b'{"a": 2}'}


def test_a_line_of_results_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    run_state.drop_torn_lines(LOCAL, str(path))
    assert not path.exists()
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    run_state.drop_torn_lines(LOCAL, str(path))
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


@pytest.mark.usefixtures("ray_session")
def test_a_restarted_trial_keeps_the_results_that_were_not_copied_to_the_storage_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = make_trial(tmp_path / "storage", num_known=1)
    trial.relative_logdir = trial.storage.trial_dir_name
    old, new = [f'{{"training_iteration": {i}}}\n' for i in (1, 2)]
    stored = Path(trial.storage.trial_fs_path, "result.json")
    local = Path(trial.storage.trial_driver_staging_path, "result.json")
    local.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text("")
    local.write_text(old + new)
    # The last copy is still on its way.
    monkeypatch.setattr(trial.storage.syncer, "wait", lambda: stored.write_text(old))
    callbacks = run_callbacks(monkeypatch, tmp_path)
    loggers = [*callbacks, JsonLoggerCallback()]  # Tune appends its own.
    for callback in loggers:
        callback.on_trial_start(0, [trial], trial)
    loggers[-1].log_trial_result(3, trial, {"training_iteration": 3})
    assert [json.loads(line)["training_iteration"] for line in local.read_text().splitlines()] == [1, 2, 3]

    monkeypatch.setattr(trial.storage.syncer, "wait", lambda: 1 / 0)
    for callback in callbacks:  # A storage that fails does not end the training.
        callback.on_trial_start(1, [trial], trial)


def run_callbacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tune.Callback]:
    """The callbacks that `run_experiment` gives to Tune."""
    given: list[tune.Callback] = []

    class Tuner:
        def __init__(self, *args: Any, run_config: tune.RunConfig, **kwargs: Any) -> None:
            given.extend(run_config.callbacks or ())

        def fit(self) -> list[Any]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tune, "Tuner", Tuner)
        run_experiment(failing_experiment(tmp_path), str(tmp_path / "r"), resume=False, announce=print)
    return given


def make_trial(tmp_path: Path, *, num_known: int = 0, config: dict[str, Any] | None = None) -> Trial:
    """A trial whose state knows the first checkpoints of those on disk."""
    trial = Trial("CalQL", config=config, stub=True, storage=StorageContext(str(tmp_path), "run"))
    trial.storage.trial_dir_name = "trial"
    for number in range(num_known):
        write_checkpoint(tmp_path / "run" / "trial", number, iteration=number + 1)
        checkpoint = tune.Checkpoint(str(tmp_path / "run" / "trial" / f"checkpoint_{number:06d}"), LOCAL)
        result = type("Result", (), {"checkpoint": checkpoint, "metrics": {"training_iteration": number + 1}})()
        trial.run_metadata.checkpoint_manager.register_checkpoint(result)
        trial.storage.current_checkpoint_index += 1
    return trial


def latest_iteration(trial: Trial) -> int | None:
    latest = trial.run_metadata.checkpoint_manager.latest_checkpoint_result
    return latest and latest.metrics["training_iteration"]


def test_a_trial_goes_on_from_the_newest_whole_checkpoint_that_its_state_does_not_know(tmp_path: Path) -> None:
    trial = make_trial(tmp_path, num_known=1)
    write_checkpoint(tmp_path / "run" / "trial", 1, iteration=2)
    write_checkpoint(tmp_path / "run" / "trial", 2, iteration=3)
    partial = write_checkpoint(tmp_path / "run" / "trial", 3, iteration=4, is_marked=False)
    said: list[str] = []
    _take_newest_checkpoint(trial, needs_marks=True, announce=said.append)
    assert latest_iteration(trial) == 3
    assert trial.storage.current_checkpoint_index == 2  # The next one is number 3 again.
    assert said == [f"Removed the unfinished checkpoint '{partial}'."]
    assert not partial.exists()


def test_a_known_checkpoint_that_lost_files_gives_way_to_the_one_before(tmp_path: Path) -> None:
    trial = make_trial(tmp_path, num_known=2)
    folder = tmp_path / "run" / "trial"
    (folder / "checkpoint_000001" / "state.pkl").unlink()
    said: list[str] = []
    _take_newest_checkpoint(trial, needs_marks=True, announce=said.append)
    assert latest_iteration(trial) == 1
    (folder / "checkpoint_000000" / "state.pkl").unlink()
    _take_newest_checkpoint(trial, needs_marks=True, announce=said.append)
    assert latest_iteration(trial) is None
    assert said == [f"No whole checkpoint of trial '{trial}' is left; it begins anew."]


@pytest.mark.parametrize(
    ("status", "reached", "former", "now", "expected"),
    [
        (Trial.PENDING, 5, 10, 10, Trial.PENDING),
        (Trial.PENDING, 10, 10, 10, Trial.TERMINATED),  # Killed after the last checkpoint.
        (Trial.PENDING, 5, 10, 4, Trial.TERMINATED),
        (Trial.TERMINATED, 10, 10, 10, Trial.TERMINATED),
        (Trial.TERMINATED, 10, 10, 20, Trial.PENDING),
        (Trial.TERMINATED, 5, 10, 20, Trial.TERMINATED),  # A scheduler had ended it.
        (Trial.ERROR, 10, 10, 20, Trial.ERROR),
    ],
)
def test_the_stop_criteria_of_now_decide_which_trials_go_on(
    tmp_path: Path, status: str, reached: int, former: int, now: int, expected: str
) -> None:
    trial = make_trial(tmp_path, num_known=1)
    result = {"training_iteration": reached, "learners": {"loss": 1.0}}
    trial.run_metadata.checkpoint_manager.latest_checkpoint_result.metrics.update(result)
    trial.run_metadata.last_result = result
    trial.stopping_criterion = {"training_iteration": former}
    trial.set_status(status)
    _judge_by_stop(trial, {"training_iteration": now, "learners/loss": 2.0}, print)
    assert trial.status == expected
    assert trial.stopping_criterion == {"training_iteration": now, "learners/loss": 2.0}


@pytest.mark.parametrize(
    ("now", "expected"), [(None, Trial.PENDING), (30, Trial.PENDING), (21, Trial.TERMINATED), (10, Trial.TERMINATED)]
)
def test_a_trial_whose_budget_was_spent_goes_on_with_a_greater_one(
    tmp_path: Path, now: int | None, expected: str
) -> None:
    trial = make_trial(tmp_path, num_known=1, config={"max_online_env_steps": now, "num_envs_per_env_runner": 2})
    result = {"training_iteration": 4, "num_online_env_steps_taken_lifetime": 20, "done": True}
    trial.run_metadata.checkpoint_manager.latest_checkpoint_result.metrics.update(result)
    trial.run_metadata.last_result = result
    trial.stopping_criterion = {"training_iteration": 9}
    trial.set_status(Trial.TERMINATED)
    former = {"max_online_env_steps": 20, "num_envs_per_env_runner": 2}
    _judge_by_stop(trial, {"training_iteration": 9}, print, former_config=former)
    assert trial.status == expected


def test_a_trial_that_ended_without_a_checkpoint_is_said_not_to_go_on(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    trial.run_metadata.last_result = {"training_iteration": 10}
    trial.stopping_criterion = {"training_iteration": 10}
    trial.set_status(Trial.TERMINATED)
    said: list[str] = []
    _judge_by_stop(trial, {"training_iteration": 20}, said.append)
    assert trial.status == Trial.TERMINATED
    assert said == [f"Trial '{trial}' ended without a checkpoint, so it cannot go on."]


def test_only_settings_of_the_execution_are_applied_and_the_others_are_named(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=4)
    config.training(actor_lr=tune.grid_search([1e-4, 1e-3]))
    former = Experiment("e", CalQL, config, stop={"num_online_env_steps_lifetime": 10}).param_space
    trial = make_trial(tmp_path, config=former | {"actor_lr": 1e-3})
    now = config.copy(copy_frozen=False)
    now.env_runners(num_env_runners=3, num_cpus_per_env_runner=0.1).training(tau=0.25)
    now.learners(num_learners=2, num_cpus_per_learner=0.1)
    experiment = Experiment(
        *("e", CalQL, now, {"num_online_env_steps_lifetime": 20}),
        max_failures=4,
        checkpoint_config={"checkpoint_frequency": 9},
    )
    assert _apply_settings(trial, experiment) == ["`tau` (the run has 0.005, now 0.25)"]
    assert (trial.config["num_env_runners"], trial.config["num_learners"]) == (3, 2)
    assert (trial.config["tau"], trial.config["actor_lr"]) == (0.005, 1e-3)
    assert trial.config["_ends_at_env_steps"] == 20
    assert (trial.max_failures, trial.checkpoint_freq) == (4, 9)


def test_a_lost_state_with_checkpoints_is_refused_and_without_any_the_run_begins(tmp_path: Path) -> None:
    experiment = Experiment("run", CalQL, line_config(tmp_path, offline_updates=4))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment_state-2026-01-01.json").write_text('{"cut off')
    said: list[str] = []
    assert not prepare_resume(experiment, str(tmp_path), said.append)
    assert said == ["The run 'run' was stopped before its first state was saved; it begins anew."]
    write_checkpoint(tmp_path / "run" / "trial", 4, iteration=5)
    with pytest.raises(ResumeError, match=r"is lost, but not its checkpoints.*/trial/checkpoint_000004'; continue"):
        prepare_resume(experiment, str(tmp_path), said.append)
