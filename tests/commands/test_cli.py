"""The `rllib` command: exit codes, messages, progress lines, Ctrl-C and resuming."""

from __future__ import annotations

import io
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
from click.testing import CliRunner
from rich.console import Console

import rllib_calql
from rllib_calql.commands.main import main
from rllib_calql.commands.setup import root_cause
from rllib_calql.experiments.progress import (
    Evaluation,
    Totals,
    TrialProgress,
    format_duration,
    format_line,
    format_summary,
    observe,
)
from rllib_calql.experiments.run_state import KeepResumable, result_of_whole
from rllib_calql.experiments.tune_callbacks import CheckpointOnInterrupt, ProgressCallback

COMMAND = [sys.executable, "-c", "from rllib_calql.commands.main import main; main(prog_name='rllib')"]
TIMEOUT_S = 120


def result_of(phase: str, done: int, seconds: float, **more: Any) -> dict[str, Any]:
    counter = {"offline": "num_offline_updates_lifetime", "online": "num_online_env_steps_lifetime"}[phase]
    return {"phase": phase, counter: done, "time_total_s": seconds, "training_iteration": 1} | more


def evaluation(episode_return: float, **more: float) -> dict[str, Any]:
    return {"evaluation": {"env_runners": {"episode_return_mean": episode_return, **more}}}


TOTALS = Totals(offline_updates=5_000, stop={"num_online_env_steps_lifetime": 10_000})


def test_an_offline_line_tells_updates_speed_time_left_and_the_evaluation() -> None:
    result = result_of("offline", 3_000, 15.0, **evaluation(31.204, success_rate=0.62))
    line = format_line(observe(TrialProgress("CalQL_a"), result, TOTALS))
    # 3,000 updates in 15 s are 200/s; the other 2,000 take 10 s.
    assert line == "CalQL_a  offline  3,000/5,000 updates  200/s  ETA 0:10  return 31.20  success 0.62"


def test_an_online_line_measures_speed_from_the_switch() -> None:
    progress = observe(TrialProgress("CalQL_a"), result_of("offline", 5_000, 20.0), TOTALS)
    progress = observe(progress, result_of("online", 1_000, 30.0) | {"training_iteration": 6}, TOTALS)
    # 1,000 env steps in the 10 s since the switch are 100/s; the other 9,000 take 90 s.
    assert format_line(progress) == "CalQL_a  online  1,000/10,000 env steps  100/s  ETA 1:30"


def test_a_resumed_run_measures_speed_from_its_first_result() -> None:
    progress = observe(TrialProgress("a"), result_of("offline", 2_000, 100.0) | {"training_iteration": 2}, TOTALS)
    assert format_line(progress) == "a  offline  2,000/5,000 updates"
    progress = observe(progress, result_of("offline", 3_000, 102.0) | {"training_iteration": 3}, TOTALS)
    assert format_line(progress) == "a  offline  3,000/5,000 updates  500/s  ETA 0:04"


def test_other_algorithms_count_iterations_if_they_stop_by_them_and_env_steps_otherwise() -> None:
    result = {"training_iteration": 1, "num_env_steps_sampled_lifetime": 400, "time_total_s": 2.0}
    result |= {"env_runners": {"episode_return_mean": 21.0}}
    by_iterations = observe(TrialProgress("PPO_a"), result, Totals(stop={"training_iteration": 4}))
    assert format_line(by_iterations) == "PPO_a  training  1/4 iterations  0.5/s  ETA 0:06  training return 21.00"
    by_steps = observe(TrialProgress("PPO_a"), result, Totals())
    assert format_line(by_steps) == "PPO_a  training  400 env steps  200/s  training return 21.00"


def test_an_iteration_without_evaluation_keeps_the_last_one_and_nan_is_no_return() -> None:
    progress = observe(TrialProgress("a"), result_of("offline", 1, 1.0, **evaluation(5.0)), TOTALS)
    later = result_of("offline", 2, 2.0, env_runners={"episode_return_mean": float("nan")})
    later |= evaluation(float("nan"))
    progress = observe(progress, later, TOTALS)
    assert progress.last == Evaluation(episode_return=5.0)
    assert progress.training_return is None


def test_the_summary_has_final_and_best_evaluation_dip_and_checkpoint() -> None:
    progress = TrialProgress("CalQL_a")
    for done, episode_return, success_rate in ((1, 10.0, 0.5), (2, 60.2, 0.98), (3, 53.1, 0.97)):
        evaluated = evaluation(episode_return, success_rate=success_rate, normalized_score=2 * episode_return)
        dip = {"fine_tuning": {"dip": -2.125, "regret": 0.1}} if done > 1 else {}
        progress = observe(progress, result_of("online", done, 64.0 * done, **evaluated, **dip), TOTALS)
    assert format_summary(progress, "ended", "/results/checkpoint_000001").splitlines() == [
        "CalQL_a: ended after 3:12",
        "  evaluation return  final 53.10, best 60.20",
        "  success rate       final 0.97, best 0.98",
        "  normalised score   final 106.20, best 120.40",
        "  dip at the switch  -2.12",
        "  checkpoint         /results/checkpoint_000001",
    ]


def test_the_summary_of_a_trial_without_evaluation_has_the_training_return() -> None:
    progress = TrialProgress("PPO_a", training_return=3.0, wall_s=3.6)
    assert format_summary(progress, "failed", None).splitlines() == [
        "PPO_a: failed after 0:04",
        "  training return    final 3.00",
        "  checkpoint         none",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (605, "10:05"), (3_661, "1:01:01")])
def test_durations_are_minutes_and_hours(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_plain_lines_are_rare_but_a_change_of_phase_is_always_printed() -> None:
    now = [0.0]
    output = io.StringIO()
    callback = ProgressCallback(TOTALS.stop, Console(file=output, width=40), interval_s=5.0, clock=lambda: now[0])
    trial: Any = SimpleNamespace(trial_id="t", config={"offline_updates": 5_000})
    for at, phase, done in (
        (0, "offline", 1),
        (2, "offline", 2),
        (4.9, "offline", 3),
        (5, "offline", 4),
        (6, "online", 5),
    ):
        now[0] = at
        callback.on_trial_result(0, [trial], trial, result_of(phase, done, 0.0))
    lines = output.getvalue().splitlines()
    assert [re.search(r"(offline|online)  (\d)", line).groups() for line in lines] == [  # type: ignore[union-attr]
        ("offline", "1"),
        ("offline", "4"),
        ("online", "5"),
    ]


def test_what_was_decided_about_the_data_is_printed_once_for_all_trials() -> None:
    output = io.StringIO()
    callback = ProgressCallback({}, Console(file=output, width=40))
    result = {"training_iteration": 1, "offline_data": "3 episodes, 12 transitions; 1 unfinished episodes dropped"}
    for name in ("a", "b", "a"):
        trial: Any = SimpleNamespace(trial_id=name, config={})
        callback.on_trial_result(iteration=1, trials=[trial], trial=trial, result=result)
    assert output.getvalue().count("unfinished episodes dropped.") == 1


def test_callbacks_survive_being_stored_with_the_experiment() -> None:
    # Tune pickles them, while a console and a signal handler belong to the process.
    with CheckpointOnInterrupt(print) as interrupt:
        copies = pickle.loads(pickle.dumps([ProgressCallback({"a": 1}, Console()), interrupt, KeepResumable()]))
    assert [type(copy) for copy in copies] == [ProgressCallback, CheckpointOnInterrupt, KeepResumable]


def test_a_second_interrupt_stops_at_once() -> None:
    messages: list[str] = []
    with CheckpointOnInterrupt(messages.append) as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(messages) == 1
    assert "writing a checkpoint" in messages[0]


def test_the_cause_of_a_failure_is_shown_without_rays_tracebacks() -> None:
    text = "ray::CalQL.__init__() (pid=1)\n  File 'a.py', line 1\nValueError: `tau` is wrong,\ngot 7.\n"
    assert root_cause(RuntimeError(text)) == "ValueError: `tau` is wrong,\ngot 7."
    assert root_cause(RuntimeError("plain message")) == "plain message"


def test_version_and_help_are_there() -> None:
    assert rllib_calql.__version__ in CliRunner().invoke(main, ["--version"]).output
    help_text = CliRunner().invoke(main, ["train", "file", "--help"]).output
    options = ("num-samples", "checkpoint-freq", "checkpoint-at-end", "storage-path", "name", "resume", "seed")
    assert all(f"--{option}" in help_text for option in (*options, "num-cpus", "address", "verbose"))


ONE = "a: {run: CalQL, env: Pendulum-v1}\n"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, ["train", "file", "missing.yaml"], r"'missing\.yaml' does not exist"),
        ("a: {run: CalQL, config: {taw: 1}}", ["train", "file", "e.yaml"], r"`taw`.*did you mean `tau`"),
        (ONE, ["train", "file", "e.yaml", "--num-samples", "0"], r"--num-samples"),
        (ONE, ["train", "file", "e.yaml", "--frequency", "1"], r"No such option"),
        (ONE + ONE.replace("a:", "b:"), ["train", "file", "e.yaml", "--name", "x"], r"`--name` needs a file with one"),
        (ONE, ["train", "file", "e.yaml", "--resume", "--storage-path", "r"], r"nothing to resume at '.*/r/a'"),
        (ONE, ["train", "file", "e.yaml", "--num-cpus", "2", "--address", "auto"], r"drop it or `--address`"),
        (
            "a: {run: CalQL, env: Pendulum-v1, config: {num_env_runners: 4}}",
            ["train", "file", "e.yaml", "--num-cpus", "2"],
            r"A trial needs 5 CPUs.*`--num-cpus` is 2",
        ),
        (None, ["evaluate", "missing"], r"'missing' does not exist"),
        ("", ["evaluate", "."], r"'\.' is not a checkpoint of an algorithm"),
        ("", ["evaluate", ".", "--episodes", "0"], r"--episodes"),
    ],
)
def test_wrong_usage_exits_with_2_and_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "e.yaml").write_text(text)
    outcome = CliRunner().invoke(main, arguments)
    assert outcome.exit_code == 2, outcome.output
    assert re.search(message, " ".join(outcome.output.split()))
    assert "Traceback" not in outcome.output


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def checkpoints_in(output: str) -> list[Path]:
    return [Path(path) for path in re.findall(r"^  checkpoint +(/.*)$", output, flags=re.MULTILINE)]


@pytest.mark.slow
def test_a_grid_of_another_algorithm_runs_and_its_checkpoint_can_be_evaluated(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(
        """
        cart:
          run: PPO
          env: CartPole-v1
          stop: {training_iteration: 2}
          config: {lr: {grid_search: [3e-4, 1e-3]}, train_batch_size_per_learner: 100, minibatch_size: 50,
                   num_epochs: 1, num_env_runners: 0, model_config: {fcnet_hiddens: [8]}}
        """
    )
    trained = run_command("train", "file", f"{tmp_path}/e.yaml", "--storage-path", f"{tmp_path}/r", "--num-cpus", "2")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("  training  2/2 iterations") == 2
    checkpoints = checkpoints_in(trained.stdout)
    assert len(checkpoints) == 2
    first, second = (run_command("evaluate", str(checkpoints[0]), "--episodes", "3", "--seed", "1") for _ in range(2))
    assert first.returncode == 0, first.stderr
    # CartPole pays 1 per step and cannot last longer than 500 steps.
    mean = float(re.search(r"episodes +3\nreturn +([\d.]+) \(std [\d.]+\)\n$", first.stdout)[1])  # type: ignore[index]
    assert 1 <= mean <= 500
    assert second.stdout == first.stdout


@pytest.mark.slow
def test_a_failed_run_exits_with_1_and_names_the_cause(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(
        f"bad: {{run: CalQL, env: Pendulum-v1, config: {{input_: {tmp_path}/nowhere, offline_updates: 10}}}}"
    )
    failed = run_command("train", "file", f"{tmp_path}/e.yaml", "--storage-path", f"{tmp_path}/r", "--num-cpus", "1")
    assert failed.returncode == 1
    assert re.search(r"Error in 'bad': FileNotFoundError: .*nowhere", failed.stderr)
    assert "Traceback" not in failed.stdout + failed.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_can_be_resumed(tmp_path: Path) -> None:
    experiment = """
        pendulum:
          run: CalQL
          env: Pendulum-v1
          stop: {num_online_env_steps_lifetime: %d}
          config: {warmup_env_steps: 0, num_actions: 1, train_batch_size_per_learner: 8, updates_per_env_step: 0.1,
                   model_config: {actor_hiddens: [8], critic_hiddens: [8]}}
    """
    (tmp_path / "e.yaml").write_text(experiment % 10_000_000)
    arguments = ["train", "file", f"{tmp_path}/e.yaml", "--storage-path", f"{tmp_path}/r", "--num-cpus", "1"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "  online  " in line:
                break
        # A terminal sends the signal to every process of the foreground group, Ray's included.
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output
    (checkpoint,) = checkpoints_in(output)
    assert (checkpoint / "class_and_ctor_args.pkl").is_file()
    assert f"Checkpoints are in '{tmp_path}/r/pendulum'" in output
    assert "Traceback" not in output

    result = result_of_whole(pyarrow.fs.LocalFileSystem(), str(checkpoint))
    assert result is not None
    interrupted_at = result["num_online_env_steps_lifetime"]
    stop = interrupted_at + 1  # One more episode, of 200 steps, ends the run.
    (tmp_path / "e.yaml").write_text(experiment % stop)
    resumed = run_command(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    steps = [int(number.replace(",", "")) for number in re.findall(r"online  ([\d,]+)/[\d,]+ env", resumed.stdout)]
    assert steps == [interrupted_at + 200]  # It went on from the checkpoint and did not begin anew.
