"""The `rllib` command: exit codes, messages, Ctrl-C and resuming."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pyarrow.fs
import pytest
import ray
from click.testing import CliRunner, Result
from drawn_line import BRIGHTER
from tiny import TINY_NETWORKS, LineEnv, write_line_data

import rllib_calql
from rllib_calql import CalQLConfig
from rllib_calql.commands import main as cli
from rllib_calql.commands.main import main
from rllib_calql.commands.setup import root_cause
from rllib_calql.experiments import tune_runs
from rllib_calql.experiments.run_state import KeepResumable, mark_whole, result_of_whole
from rllib_calql.experiments.safety_net import SafetyNet, SafetyNetCallback
from rllib_calql.experiments.tune_callbacks import CheckpointOnInterrupt
from rllib_calql.experiments.tune_runs import Outcome
from rllib_calql.progress.display import Display
from rllib_calql.progress.tune_display import ProgressCallback
from rllib_calql.system.stop_signals import StopSignals

COMMAND = [sys.executable, "-c", "from rllib_calql.commands.main import main; main(prog_name='rllib')"]
TIMEOUT_S = 120


def test_callbacks_survive_being_stored_with_the_experiment() -> None:
    # Tune pickles them, while a console and a signal handler belong to the process.
    with CheckpointOnInterrupt(print) as interrupt:
        callbacks = [ProgressCallback({"a": 1}, Display()), interrupt, KeepResumable(), SafetyNetCallback(SafetyNet())]
        copies = pickle.loads(pickle.dumps(callbacks))
    assert [type(copy) for copy in copies] == [type(callback) for callback in callbacks]


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


ONE = "a: {run: CalQL, env: Pendulum-v1, stop: {}}\n"


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
            "a: {run: CalQL, env: Pendulum-v1, stop: {}, config: {num_env_runners: 4}}",
            ["train", "file", "e.yaml", "--num-cpus", "2"],
            r"A trial needs 5 CPUs.*`--num-cpus` is 2",
        ),
        (None, ["evaluate", "missing"], r"'missing' does not exist"),
        ("", ["evaluate", "."], r"'\.' is not a checkpoint of an algorithm"),
        ("", ["evaluate", ".", "--episodes", "0"], r"--episodes"),
        ("", ["evaluate", ".", "--best"], r"'\.' is not a checkpoint of an algorithm, nor a run or trial with any"),
        ("", ["evaluate", "s3:/bucket/run"], r"'s3:/bucket/run' does not exist"),
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


@pytest.mark.parametrize("is_at_once", [False, True])
def test_an_interrupt_says_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_at_once: bool) -> None:
    said: list[str] = []

    def run(*arguments: object, on_saved: Callable[[], None], stop: StopSignals, **more: object) -> Outcome:
        said.append(stop.saved)  # If the command is ended now.
        if tmp_path.joinpath("saves").exists():
            checkpoint = tmp_path / "r" / "a" / "CalQL_x" / "checkpoint_000000"
            checkpoint.mkdir(parents=True)
            (checkpoint / "class_and_ctor_args.pkl").touch()
            mark_whole(pyarrow.fs.LocalFileSystem(), str(checkpoint), {"training_iteration": 1})
            on_saved()
            said.append(stop.saved)
        return Outcome(is_interrupted=True, is_at_once=is_at_once)

    monkeypatch.setattr(tune_runs, "run_experiment", run)
    monkeypatch.setattr(cli, "start_ray", lambda *arguments, **options: None)
    monkeypatch.setattr(cli, "stop_ray", lambda: None)
    (tmp_path / "e.yaml").write_text("a: {run: CalQL, env: Pendulum-v1, stop: {training_iteration: 1}}\n")
    arguments = ["train", "file", f"{tmp_path}/e.yaml", "--storage-path", f"{tmp_path}/r"]
    nothing = "Nothing was saved, since no checkpoint was written yet; `--resume` or `--overwrite` begins anew."
    outcome = CliRunner().invoke(main, arguments)
    assert outcome.exit_code == 130
    assert outcome.stderr.splitlines()[-1] == ("Stopped at once. " if is_at_once else "") + nothing
    (tmp_path / "saves").touch()
    outcome = CliRunner().invoke(main, arguments)
    saved = f"Checkpoints are in '{tmp_path}/r/a'; add `--resume` to the command to continue."
    assert outcome.stderr.splitlines()[-1] == ("Stopped at once. " if is_at_once else "") + saved
    assert said == [nothing, nothing, saved]


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def join(ray_session: None) -> list[str]:
    """Options with which a command uses the Ray of the tests in place of one of its own."""
    return ["--address", ray.get_runtime_context().gcs_address]


def checkpoints_in(output: str) -> list[Path]:
    return [Path(path) for path in re.findall(r"^  checkpoint +(/.*)$", output, flags=re.MULTILINE)]


def test_a_checkpoint_without_an_environment_is_judged_by_held_out_episodes(tmp_path: Path) -> None:
    data = str(write_line_data(tmp_path / "line.parquet", num_episodes=4))
    config = CalQLConfig().offline_data(input_=data).fine_tuning(offline_updates=2, updates_per_iteration=2)
    config.environment(
        observation_space=gym.spaces.Box(-10.0, 10.0, (1,), np.float32),
        action_space=gym.spaces.Box(-2.0, 2.0, (1,), np.float32),
    ).rl_module(model_config=TINY_NETWORKS)
    for fraction in (0.5, 0.0):
        algo = config.copy().offline_data(validation_fraction=fraction).build()
        expected = algo.evaluate()["held_out"] if fraction else {}
        algo.save_to_path(str(tmp_path / "checkpoint"))
        algo.stop()
        outcome = CliRunner().invoke(main, ["evaluate", str(tmp_path / "checkpoint")])
        if fraction:
            assert outcome.exit_code == 0, outcome.output
            assert f"td_loss           {expected['td_loss']:.4g}" in outcome.stdout.splitlines()
            assert set(expected) == {line.split()[0] for line in outcome.stdout.splitlines()}
        else:
            assert outcome.exit_code == 1
            assert "has no environment and holds no episodes out (`validation_fraction`)" in outcome.stderr


@pytest.fixture(scope="module")
def trained_on_data_alone(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> str:
    """A checkpoint without an environment, whose policy goes right by almost 2 at every step."""
    tmp_path = tmp_path_factory.mktemp("data_alone")
    data = str(write_line_data(tmp_path / "line.parquet", num_episodes=4))
    config = CalQLConfig().offline_data(input_=data).fine_tuning(offline_updates=2, updates_per_iteration=2)
    config.environment(
        observation_space=gym.spaces.Box(-10.0, 10.0, (1,), np.float32),
        action_space=gym.spaces.Box(-2.0, 2.0, (1,), np.float32),
    ).rl_module(model_config=TINY_NETWORKS)
    algo = config.build()
    module = algo.learner_group._learner.module["default_policy"]
    for parameter in module.policy.parameters():
        parameter.data.zero_()
    module.policy.head.bias.data[0] = 3.0
    algo.save_to_path(str(tmp_path / "checkpoint"))
    algo.stop()
    return str(tmp_path / "checkpoint")


def test_a_checkpoint_without_an_environment_is_evaluated_in_the_one_that_is_named(
    trained_on_data_alone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["evaluate", trained_on_data_alone, "--episodes", "3", *arguments])

    whole = evaluated("--env", "tiny:LineEnv")
    assert whole.exit_code == 0, whole.output
    assert "success rate      1.00" in whole.stdout  # From within 1 of the middle it takes three or four steps to 6.
    (mean,) = re.findall(r"return +(-\d\.\d+)", whole.stdout)
    assert -3.0 <= float(mean) <= -2.0

    monkeypatch.chdir(tmp_path)
    (tmp_path / "short_line.py").write_text(
        "from tiny import LineEnv\n\n\n"
        "class ShortLine(LineEnv):\n"
        "    def __init__(self, config):\n"
        "        super().__init__()\n"
        "        self.TIME_LIMIT = config['steps']\n"
    )
    short = evaluated("--env", "short_line.ShortLine", "--env-config", "{steps: 1}")
    assert short.exit_code == 0, short.output
    assert "return            -1.00 (std 0.00)" in short.stdout
    assert "success rate      0.00" in short.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--env", "tiny:LineEnvy"], 2, "`--env` 'tiny:LineEnvy': the module 'tiny' was imported, but it has no"),
        (["--env", "tiny:LineEnv", "--env-config", "steps"], 2, "`--env-config` must be a mapping, for example"),
        (["--env", "tiny:LineEnv", "--env-config", "{1: 2}"], 2, "`--env-config` must be a mapping, for example"),
        (["--env", "tiny:LineEnv", "--env-config", "{a: [}"], 2, "`--env-config` is not valid YAML"),
        (["--env-config", "{}"], 1, "it was trained on data alone. Name one with `--env`"),
        ([], 1, "so there is nothing to evaluate by. Name an environment with `--env`"),
        (
            ["--env", "Pendulum-v1"],
            1,
            "observation space Box(-10.0, 10.0, (1,), float32), the environment has Box(",
        ),
        (["--env", "CartPole-v1"], 1, "the environment has Discrete(2); use an environment with the spaces of the"),
        (["--env", "MountainCarContinuous-v0"], 1, "use an environment with the spaces of the checkpoint"),
    ],
)
def test_an_environment_that_a_checkpoint_cannot_be_evaluated_in_is_refused(
    trained_on_data_alone: str, arguments: list[str], exit_code: int, message: str
) -> None:
    outcome = CliRunner().invoke(main, ["evaluate", trained_on_data_alone, *arguments])
    assert (outcome.exit_code, outcome.stdout) == (exit_code, "")
    assert message in " ".join(outcome.stderr.split())


def brightness_of_frames(file: Path) -> list[int]:
    """Of each frame, in steps of `drawn_line`."""
    from imageio_ffmpeg import read_frames

    frames = read_frames(str(file))
    size = next(frames)["size"]
    assert size == (64, 48)
    return [round(float(np.frombuffer(frame, np.uint8).mean()) / BRIGHTER) for frame in frames]


def test_a_video_shows_every_step_of_the_episodes_that_are_judged(trained_on_data_alone: str, tmp_path: Path) -> None:
    # From within 1 of the middle it takes three or four steps of almost 2 to the end at 6.
    arguments = ["evaluate", trained_on_data_alone, "--episodes", "3", "--seed", "5", "--env", "drawn_line:DrawnLine"]
    LineEnv.log.clear()
    plain = CliRunner().invoke(main, arguments)
    assert plain.exit_code == 0, plain.output
    steps, LineEnv.log[:] = list(LineEnv.log), []
    filmed = CliRunner().invoke(main, [*arguments, "--video", str(tmp_path / "run.mp4")])
    assert filmed.exit_code == 0, filmed.output
    assert (filmed.stdout, LineEnv.log) == (plain.stdout, steps)
    assert filmed.stderr == f"Wrote {tmp_path}/run.mp4\n"
    ends = [number for number, step in enumerate(steps) if step[-1]]
    lengths = np.diff([-1, *ends]).tolist()
    shown = [list(range(length + 1)) for length in lengths]
    assert brightness_of_frames(tmp_path / "run.mp4") == [t for episode in shown for t in episode]
    assert [file.name for file in tmp_path.iterdir()] == ["run.mp4"]

    first = CliRunner().invoke(main, [*arguments, "--video", str(tmp_path / "run.mp4"), "--video-episodes", "1"])
    assert first.stdout == plain.stdout
    assert brightness_of_frames(tmp_path / "run.mp4") == shown[0]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--video", "run.avi"], 2, "`--video` must name a .mp4 file, got 'run.avi'"),
        (
            ["--video", "nowhere/run.mp4"],
            2,
            "`--video`: the folder of 'nowhere/run.mp4' does not exist; create it first",
        ),
        (["--video", "folder.mp4"], 2, "'folder.mp4' is a folder; name a file"),
        (["--video-episodes", "1"], 2, "`--video-episodes` is about a video; name its file with `--video`"),
        (["--video", "run.mp4", "--video-episodes", "11"], 2, "`--video-episodes` is 11, but only 10 are run"),
        (["--video", "run.mp4"], 1, "has no environment, and a video needs one; name it with `--env`"),
        (["--video", "run.mp4", "--env", "tiny:LineEnv"], 1, "declares no render mode, so it cannot be recorded"),
        (["--video", "run.mp4", "--env", "drawn_line:BrokenLine"], 1, "failed, OSError: no context"),
    ],
)
def test_a_video_that_cannot_be_made_is_refused_before_a_step_is_made(
    trained_on_data_alone: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    exit_code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    LineEnv.log.clear()
    outcome = CliRunner().invoke(main, ["evaluate", trained_on_data_alone, *arguments])
    assert (outcome.exit_code, outcome.stdout, LineEnv.log) == (exit_code, "", [])
    assert message in " ".join(outcome.stderr.split())
    assert not (tmp_path / "run.mp4").exists()


def test_a_video_without_moviepy_names_what_to_install(
    trained_on_data_alone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "moviepy", None)
    outcome = CliRunner().invoke(main, ["evaluate", trained_on_data_alone, "--video", str(tmp_path / "run.mp4")])
    assert outcome.exit_code == 1
    assert 'Videos need the `moviepy` package: pip install "rllib-calql[video]"' in outcome.stderr


@pytest.mark.slow
def test_a_grid_of_another_algorithm_runs_and_its_checkpoint_can_be_evaluated(tmp_path: Path, join: list[str]) -> None:
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
    trained = run_command("train", "file", f"{tmp_path}/e.yaml", "--storage-path", f"{tmp_path}/r", *join)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.startswith("0:00  loading RLlib\n")
    assert len(set(re.findall(r"(PPO\S+)  training  2/2 iterations", trained.stdout))) == 2
    assert (tmp_path / "r" / "cart" / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "r" / "cart" / "progress.html").read_text().count("<td>ended</td>") == 2
    checkpoints = checkpoints_in(trained.stdout)
    assert len(checkpoints) == 2
    arguments = ("evaluate", str(checkpoints[0]), "--episodes", "3", "--seed", "1")
    with ThreadPoolExecutor() as both:
        first, second = both.map(lambda _: run_command(*arguments), range(2))
    assert first.returncode == 0, first.stderr
    # CartPole pays 1 per step and cannot last longer than 500 steps.
    mean = float(re.search(r"episodes +3\nreturn +([\d.]+) \(std [\d.]+\)\n$", first.stdout)[1])  # type: ignore[index]
    assert 1 <= mean <= 500
    assert second.stdout == first.stdout


@pytest.mark.slow
def test_a_failed_run_exits_with_1_and_names_the_cause(tmp_path: Path, join: list[str]) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "e.yaml").write_text(
        "bad: {run: CalQL, env: Pendulum-v1, stop: {}, "
        f"config: {{input_: {tmp_path}/torn.parquet, offline_updates: 10}}}}"
    )
    failed = run_command("train", "file", f"{tmp_path}/e.yaml", "--storage-path", f"{tmp_path}/r", *join)
    assert failed.returncode == 1
    assert re.search(r"Error in 'bad': ValueError: .*torn\.parquet", failed.stderr)
    assert "Traceback" not in failed.stdout + failed.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_can_be_resumed(tmp_path: Path, join: list[str]) -> None:
    experiment = """
        pendulum:
          run: CalQL
          env: Pendulum-v1
          stop: {num_online_env_steps_lifetime: %d}
          config: {warmup_env_steps: 0, num_actions: 1, train_batch_size_per_learner: 8, updates_per_env_step: 0.1,
                   model_config: {actor_hiddens: [8], critic_hiddens: [8]}}
    """
    (tmp_path / "e.yaml").write_text(experiment % 10_000_000)
    arguments = ["train", "file", f"{tmp_path}/e.yaml", "--storage-path", f"{tmp_path}/r"]
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--num-cpus", "1"],
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
    assert "<td>interrupted</td>" in (tmp_path / "r" / "pendulum" / "progress.html").read_text()
    assert "Traceback" not in output

    result = result_of_whole(pyarrow.fs.LocalFileSystem(), str(checkpoint))
    assert result is not None
    interrupted_at = result["num_online_env_steps_lifetime"]
    stop = interrupted_at + 1  # One more episode, of 200 steps, ends the run.
    (tmp_path / "e.yaml").write_text(experiment % stop)
    resumed = run_command(*arguments, "--resume", *join)
    assert resumed.returncode == 0, resumed.stderr
    steps = [int(number.replace(",", "")) for number in re.findall(r"online  ([\d,]+)/[\d,]+ env", resumed.stdout)]
    # It went on from the checkpoint and did not begin anew. On a slow machine a line comes in between.
    assert f" goes on from '{checkpoint.name}' (" in resumed.stderr
    assert steps[-1] == interrupted_at + 200
    assert min(steps) >= interrupted_at
