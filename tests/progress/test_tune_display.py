"""What is shown of a run of Ray Tune."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rllib_calql.progress.display import Display
from rllib_calql.progress.tune_display import ProgressCallback

STOP = {"num_online_env_steps_lifetime": 10_000}


def result_of(phase: str, done: int) -> dict[str, Any]:
    counter = {"offline": "num_offline_updates_lifetime", "online": "num_online_env_steps_lifetime"}[phase]
    return {"phase": phase, counter: done, "time_total_s": 0.0, "training_iteration": 1}


def trial_called(name: str, **config: Any) -> Any:
    storage = SimpleNamespace(trial_dir_name=name, trial_driver_staging_path=f"no folder of {name}")
    return SimpleNamespace(trial_id=name, config=config, storage=storage)


def test_plain_lines_are_rare_but_a_change_of_phase_is_always_printed() -> None:
    now = [0.0]
    output = io.StringIO()
    callback = ProgressCallback(STOP, Display(output, interval_s=5.0, clock=lambda: now[0]))
    trial = trial_called("t", offline_updates=5_000)
    for at, phase, done in (
        (0, "offline", 1),
        (2, "offline", 2),
        (4.9, "offline", 3),
        (5, "offline", 4),
        (6, "online", 5),
    ):
        now[0] = at
        callback.on_trial_result(0, [trial], trial, result_of(phase, done))
    lines = output.getvalue().splitlines()
    assert [re.search(r"(offline|online)  (\d)", line).groups() for line in lines] == [  # type: ignore[union-attr]
        ("offline", "1"),
        ("offline", "4"),
        ("online", "5"),
    ]


def test_what_was_decided_about_the_data_is_printed_once_for_all_trials() -> None:
    output = io.StringIO()
    callback = ProgressCallback({}, Display(output))
    result = {"training_iteration": 1, "offline_data": "3 episodes, 12 transitions; 1 unfinished episodes dropped"}
    for name in ("a", "b", "a"):
        trial = trial_called(name)
        callback.on_trial_result(iteration=1, trials=[trial], trial=trial, result=result)
    assert output.getvalue().count("unfinished episodes dropped.") == 1


def test_a_trial_that_had_ended_before_a_resume_is_not_told_as_if_it_had_run() -> None:
    result = {"training_iteration": 2, "num_online_env_steps_lifetime": 10_400, "time_total_s": 61.0}
    trial = trial_called("t")
    trial.status, trial.checkpoint, trial.last_result = "TERMINATED", None, result

    def summary(*, runs: bool) -> str:
        output = io.StringIO()
        callback = ProgressCallback(STOP, Display(output))
        if runs:
            callback.on_trial_result(0, [trial], trial, result | {"phase": "online"})
        callback.on_experiment_end([trial])
        return output.getvalue()

    assert "had already ended before, after 1:01; nothing was run" in summary(runs=False)
    assert "`num_online_env_steps_lifetime` is 10,400 of 10,000" in summary(runs=False)
    assert "ended after 1:01" in summary(runs=True)
    assert "already" not in summary(runs=True)
    assert "10,400 of 10,000 online env steps" in summary(runs=True)


def test_a_trial_that_could_not_be_set_up_has_failed_in_this_run() -> None:
    trial = trial_called("t")
    # What Tune puts into the result of a trial that has none.
    trial.status, trial.checkpoint, trial.last_result = "ERROR", None, {"trial_id": "t", "timestamp": 1}
    output = io.StringIO()
    callback = ProgressCallback(STOP, Display(output))
    callback.on_trial_error(0, [trial], trial)
    callback.on_experiment_end([trial])
    assert "failed after 0:00" in output.getvalue()
    assert "already" not in output.getvalue()


def test_between_two_trials_the_command_starts_the_next_one_and_after_the_last_it_finishes() -> None:
    now = [0.0]
    output = io.StringIO()
    display = Display(output, clock=lambda: now[0])
    callback = ProgressCallback(STOP, display)
    first, second = trial_called("a"), trial_called("b")
    first.status, second.status = "RUNNING", "PENDING"
    for trial, shown in ((first, "starting the processes of the trials"), (second, "finishing")):
        trial.status = "RUNNING"
        callback.on_trial_start(0, [first, second], trial)
        trial.status = "TERMINATED"
        callback.on_trial_complete(0, [first, second], trial)
        now[0] += 10.0
        display.tick()
        assert f"  {shown}, 10 s" in output.getvalue().splitlines()[-1]


def test_the_best_evaluation_in_the_summary_is_that_of_the_whole_run_after_a_resume(tmp_path: Path) -> None:
    def result(iteration: int, value: float) -> dict[str, Any]:
        runners = {"episode_return_mean": value, "episode_duration_sec_mean": 0.1 * iteration}
        return result_of("online", iteration) | {
            "training_iteration": iteration,
            "evaluation": {"env_runners": runners},
        }

    before, now = result(1, 6.07), result(2, 4.85)
    (tmp_path / "result.json").write_text("".join(json.dumps(one) + "\n" for one in (before, now)))
    trial = trial_called("t")
    trial.storage.trial_driver_staging_path = str(tmp_path)
    trial.status, trial.checkpoint, trial.last_result = "TERMINATED", None, now
    output = io.StringIO()
    callback = ProgressCallback(STOP, Display(output))
    callback.on_trial_result(0, [trial], trial, now)
    callback.on_experiment_end([trial])
    assert "evaluation return  final 4.85, best 6.07" in output.getvalue()


@pytest.mark.parametrize(
    ("name", "warning", "printed"),
    [
        ("overfitting", "The critics overfit: since then", ": The critics overfit: since then."),
        (
            "success_warning",
            "`success_key` is 'a', which no info has",
            "`success_key` is 'a', which no info has.",
        ),
    ],
)
def test_a_warning_that_results_repeat_is_printed_once(name: str, warning: str, printed: str) -> None:
    output = io.StringIO()
    callback = ProgressCallback({}, Display(output))
    trial = trial_called("a")
    for number in (1, 2):
        result = {"training_iteration": number, name: warning}
        callback.on_trial_result(iteration=number, trials=[trial], trial=trial, result=result)
    assert output.getvalue().count(printed) == 1


def test_what_looks_wrong_in_the_data_is_printed_once_a_line_each_whatever_number_of_trials_has_it() -> None:
    output = io.StringIO()
    callback = ProgressCallback({}, Display(output))
    for name in ("a", "b"):
        trial = trial_called(name)
        result = {"training_iteration": 1, "offline_data_warnings": "actions[0]: units\nobservations[2]: swapped"}
        callback.on_trial_result(iteration=1, trials=[trial], trial=trial, result=result)
    lines = [line for line in output.getvalue().splitlines() if line.startswith("Warning")]
    assert lines == ["Warning, offline data: actions[0]: units.", "Warning, offline data: observations[2]: swapped."]
