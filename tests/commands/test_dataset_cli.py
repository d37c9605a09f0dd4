"""`rllib dataset ...`: what it prints, writes and refuses, and with which exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from rllib_calql.commands.main import main
from rllib_calql.datasets.episodes.reader import ReadOptions
from rllib_calql.datasets.generated import catalog
from rllib_calql.datasets.readers.opening import open_input
from rllib_calql.datasets.report.summary import DatasetReport

SMALL = "test/pendulum-small-v0"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["dataset", *arguments])


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default picture is written into the working folder."""
    monkeypatch.chdir(tmp_path)


def write_rows(file: Path, *, ends: bool = True, **columns: Any) -> Path:
    """3 episodes of 2, 3 and 4 steps with reward -1, the second reaching 0 at its end."""
    lengths = (2, 3, 4)
    last = np.cumsum(lengths) - 1
    terminateds, truncateds = np.zeros(9, bool), np.zeros(9, bool)
    terminateds[last[1]], truncateds[last[0]], truncateds[last[2]] = True, True, ends
    rows = {
        "eps_id": np.repeat(["a", "b", "c"], lengths),
        "obs": [[float(t), 0.0] for t in range(9)],
        "new_obs": [[float(t + 1), 0.0] for t in range(9)],
        "actions": [[(-1.0) ** t, 0.5 * (-1.0) ** t] for t in range(9)],
        "rewards": np.where(np.arange(9) == last[1], 0.0, -1.0),
        "terminateds": terminateds,
        "truncateds": truncateds,
        **columns,
    }
    pq.write_table(pa.table(rows), file)
    return file


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_prints_the_report_and_writes_the_picture(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.parquet")
    result = run("inspect", str(file), "--failure-reward", "-1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:3] == [f"dataset           {file}", "episodes          3", "transitions       9"]
    assert "success           33.33 % of the episodes; in 66.67 % every reward is -1" in lines
    assert (tmp_path / "dataset_report.png").read_bytes().startswith(b"\x89PNG")
    assert result.stderr == "Wrote dataset_report.png\n"


def test_inspect_prints_json_that_is_the_report(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.parquet")
    result = run("inspect", str(file), "--json", "--no-plot")
    assert result.exit_code == 0, result.output
    report = DatasetReport.from_dict(json.loads(result.stdout))
    # Returns -2, -2 and -4.
    assert (report.num_episodes, report.return_distribution.mean) == (3, -8 / 3)
    assert [(info.low, info.high) for info in report.actions] == [((-1.0, -0.5), (1.0, 0.5))]
    assert result.stderr == ""
    assert list(tmp_path.glob("*.png")) == []


TANK = """
import gymnasium as gym
from gymnasium.spaces import Box, Dict, Text

class Tank(gym.Env):
    observation_space = Dict(level=Box(0, 2, (1,)), temperature=Box(15, 100, (1,)))
    action_space = Box(0, 100, (1,))
    def __init__(self, config=None): pass

class Talking(Tank):
    observation_space = Text(9)

class Broken(Tank):
    def __init__(self, config=None): raise OSError("no such port")
"""


@pytest.fixture
def tank_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Swapped columns, and openings of a valve as shares of 1; and a module with the environment."""
    sys.modules.pop("inspected_tank", None)  # Of another test.
    (tmp_path / "inspected_tank.py").write_text(TANK)
    monkeypatch.syspath_prepend(tmp_path)
    t = np.linspace(0, 1, 300)
    columns = {"observations/level": 20 + 30 * t[:, None], "observations/temperature": 1.5 * t[:, None]}
    rest = {"actions": t[:, None], "rewards": t, "terminals": np.arange(300) == 299}
    np.savez(tmp_path / "tank.npz", **columns, **rest)
    return "tank.npz"


def test_inspect_compares_data_with_an_environment(tank_data: str) -> None:
    result = run("inspect", tank_data, "--no-plot", "--env", "inspected_tank:Tank")
    assert result.exit_code == 0, result.output
    assert "Compared with inspected_tank:Tank: keys and shapes match" in result.stdout
    assert "100 % of the values lie outside [0, 2], the bounds of the observation space" in result.stdout
    assert "actions[0]: the values use 1 % of the action space's range [0, 100]" in result.stdout
    assert "nothing looks wrong" not in result.stdout
    assert "what does not fit inspected_tank:Tank is told below" in result.stdout
    assert "nothing looks wrong" in run("inspect", tank_data, "--no-plot").stdout
    content = json.loads(run("inspect", tank_data, "--no-plot", "--json", "--env", "inspected_tank:Tank").stdout)
    assert content["environment"]["matches"] is True
    assert len(content["environment"]["findings"]) == 3
    assert [(info["path"], info["share_outside"], info["constant"]) for info in content["observations"]] == [
        ("level", [1.0], [False]),
        ("temperature", [1.0], [False]),
    ]
    misfit = run("inspect", tank_data, "--plot", "tank.png", "--json", "--env", "Pendulum-v1")
    other = json.loads(misfit.stdout)["environment"]
    assert other["matches"] is False
    assert other["mismatches"]
    assert (misfit.exit_code, Path("tank.png").is_file()) == (1, True)  # Data that fit, with warnings, are no failure.


@pytest.mark.parametrize(
    ("env", "exit_code", "message"),
    [
        ("Pendlum-v1", 2, "`--env` 'Pendlum-v1' is not registered. Did you mean 'Pendulum-v1'"),
        ("inspected_tank:Talking", 2, "The observation space of `--env` 'inspected_tank:Talking' is a Text space"),
        ("CartPole-v1", 2, "The action space of `--env` 'CartPole-v1' must be a Box(n,) of real numbers"),
        ("inspected_tank:Broken", 1, "OSError: no such port"),
    ],
)
def test_an_environment_that_cannot_be_compared_with_is_told(
    tank_data: str, env: str, exit_code: int, message: str
) -> None:
    result = run("inspect", tank_data, "--no-plot", "--env", env)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in " ".join(result.stderr.split())


def test_several_inputs_are_one_report_and_the_picture_goes_where_it_is_told(tmp_path: Path) -> None:
    files = [str(write_rows(tmp_path / name)) for name in ("one.parquet", "two.parquet")]
    result = run("inspect", *files, "--plot", "both.png")
    assert result.exit_code == 0, result.output
    assert "episodes          6" in result.stdout.splitlines()
    assert [file.name for file in tmp_path.glob("*.png")] == ["both.png"]


@pytest.mark.parametrize(("treatment", "num_episodes"), [("truncate", 3), ("drop", 2)])
def test_inspect_treats_unfinished_episodes_as_told(tmp_path: Path, treatment: str, num_episodes: int) -> None:
    file = write_rows(tmp_path / "rows.parquet", ends=False)
    result = run("inspect", str(file), "--no-plot", "--json", "--unfinished-episodes", treatment)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert (content["num_episodes"], content["share_unfinished"]) == (num_episodes, 1 / 3)


@pytest.mark.parametrize(("treatment", "lengths"), [("repeat", [3, 3, 3]), ("drop_step", [2, 2, 2])])
def test_inspect_divides_rows_and_completes_episodes_as_told(
    tmp_path: Path, treatment: str, lengths: list[int]
) -> None:
    rows = {"observations": np.zeros((9, 2)), "actions": np.zeros((9, 1)), "rewards": np.arange(9.0)}
    np.savez(tmp_path / "rows.npz", **rows, terminals=np.zeros(9, bool), timeouts=np.zeros(9, bool))
    arguments = ("--max-episode-steps", "3", "--missing-final-observation", treatment)
    result = run("inspect", "rows.npz", "--no-plot", "--json", *arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["num_transitions"] == sum(lengths)
    assert (content["length_distribution"]["minimum"], content["length_distribution"]["maximum"]) == (lengths[0],) * 2


def test_a_broken_data_set_ends_in_one_line_and_exit_code_1(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.parquet", ends=False)
    result = run("inspect", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: Episode 'c' ends neither terminated nor truncated")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.glob("*.png")) == []


def test_a_missing_data_set_is_a_failed_run_that_names_what_resembles_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet")
    result = run("inspect", str(tmp_path / "row.parquet"))
    assert result.exit_code == 1
    assert "Did you mean 'rows.parquet'?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument 'INPUT...'"),
        (("x", "--plot", "a.png", "--no-plot"), "`--plot` and `--no-plot` contradict each other"),
        (("x", "--plot", "report.pdf"), "must name a .png file, got 'report.pdf'"),
        (("x", "--plot", "nowhere/report.png"), "the folder of 'nowhere/report.png' does not exist"),
        (("x", "--env-config", "{g: 9}"), "`--env-config` is that of an environment; name it with `--env`"),
        (("x", "--episode", "0", "--env-config", "{g: 9}"), "`--env-config` is that of an environment; name it with"),
        (("x", "--env-config", "9", "--env", "Pendulum-v1"), "`--env-config` must be a mapping"),
        (("x", "--failure-reward", "nan"), "`--failure-reward` must be a finite number, got nan"),
        (("x", "--unfinished-episodes", "keep"), "'keep' is not one of"),
        (("x", "--max-episode-steps", "0"), "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage_of_inspect_is_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = run("inspect", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_without_matplotlib_the_report_is_printed_and_only_an_asked_for_picture_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = str(write_rows(tmp_path / "rows.parquet"))
    result = run("inspect", file)
    assert (result.exit_code, result.stdout.splitlines()[1]) == (0, "episodes          3")
    assert 'pip install "rllib-calql[plots]"' in result.stderr
    asked = run("inspect", file, "--plot", "a.png")
    assert (asked.exit_code, asked.stdout) == (1, "")
    assert 'pip install "rllib-calql[plots]"' in asked.stderr


def test_a_picture_that_cannot_be_written_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rllib_calql.datasets.report.plots.plot_report", full)
    result = run("inspect", str(write_rows(tmp_path / "rows.parquet")))
    assert (result.exit_code, result.stderr) == (1, "Error: [Errno 28] No space left on device\n")
    assert "episodes          3" in result.stdout


def test_an_interrupted_command_ends_with_exit_code_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rllib_calql.datasets.readers.opening.open_input", interrupted)
    assert run("inspect", str(write_rows(tmp_path / "rows.parquet"))).exit_code == 130


# --- convert ----------------------------------------------------------------------------------------------------------


def test_a_converted_data_set_gives_the_same_report(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.parquet")
    result = run("convert", str(file), "rows.npz")
    assert (result.exit_code, result.stdout) == (0, "rows.npz: 3 episodes, 9 transitions\n"), result.output
    reports = []
    for name in (str(file), "rows.npz"):
        inspected = run("inspect", name, "--json", "--no-plot")
        assert inspected.exit_code == 0, inspected.output
        reports.append({key: value for key, value in json.loads(inspected.stdout).items() if key != "names"})
    assert reports[0] == reports[1]


def test_convert_replaces_a_file_only_if_told(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.parquet")
    (tmp_path / "rows.npz").write_bytes(b"mine")
    result = run("convert", str(file), "rows.npz")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "rows.npz" in result.stderr
    assert (tmp_path / "rows.npz").read_bytes() == b"mine"
    assert run("convert", str(file), "rows.npz", "--overwrite").exit_code == 0
    assert (tmp_path / "rows.npz").read_bytes() != b"mine"


def test_several_inputs_become_one_data_set(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.parquet")
    two = write_rows(tmp_path / "two.parquet", ends=False, eps_id=np.repeat(["d", "e", "f"], (2, 3, 4)))
    result = run("convert", str(one), str(two), "both.npz", "--unfinished-episodes", "drop")
    assert (result.exit_code, result.stdout) == (0, "both.npz: 5 episodes, 14 transitions\n"), result.output


def test_convert_needs_an_input_and_an_output() -> None:
    result = run("convert", "rows.parquet")
    assert result.exit_code == 2
    assert "Missing argument 'INPUT...'" in result.stderr


@pytest.fixture
def buffer(tmp_path: Path) -> str:
    """Stable-Baselines3's arrays of two environments side by side, three steps each, actions in [-1, 1]."""
    ends = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]], np.float32)
    np.savez(
        tmp_path / "buffer.npz",
        observations=np.arange(18, dtype=np.float32).reshape(3, 2, 3) / 18,
        next_observations=np.arange(6, 24, dtype=np.float32).reshape(3, 2, 3) / 18,
        actions=np.array([[[-1.0], [0.5]], [[0.0], [1.0]], [[0.25], [-0.5]]], np.float32),
        rewards=np.ones((3, 2), np.float32),
        dones=ends,
        timeouts=ends,
    )
    return "buffer.npz"


def converted_actions(target: str) -> list[float]:
    (reader,) = open_input(target, ReadOptions())
    return [float(action) for block in reader.blocks() for action in block.actions[:, 0]]


def test_a_buffer_of_actions_in_one_range_is_converted_by_the_bounds_of_an_environment(buffer: str) -> None:
    result = run("convert", buffer, "minari:test/buffer-v0", "--env", "Pendulum-v1", "--env-config", "{g: 9.0}")
    assert result.exit_code == 0, result.output
    assert converted_actions("minari:test/buffer-v0") == [-2.0, 0.0, 0.5, 1.0, 2.0, -1.0]
    stored = minari.load_dataset("test/buffer-v0")
    pendulum = gym.make("Pendulum-v1")
    assert (stored.action_space, stored.observation_space) == (pendulum.action_space, pendulum.observation_space)


@pytest.mark.parametrize(
    ("low", "high", "actions"),
    [("-2", "2", [-2.0, 0.0, 0.5, 1.0, 2.0, -1.0]), ("0", "4.0", [0.0, 2.0, 2.5, 3.0, 4.0, 1.0])],
)
def test_bounds_of_the_actions_can_be_said_in_numbers(buffer: str, low: str, high: str, actions: list[float]) -> None:
    result = run("convert", buffer, "rows.npz", f"--action-low={low}", f"--action-high={high}")
    assert result.exit_code == 0, result.output
    assert converted_actions("rows.npz") == actions


def test_bounds_are_of_each_dimension_and_say_nothing_of_the_observations(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.parquet")
    result = run("convert", str(file), "minari:test/rows-v0", "--action-low=-1,-0.5", "--action-high", "1,0.5")
    assert result.exit_code == 0, result.output
    stored = minari.load_dataset("test/rows-v0")
    assert stored.action_space == gym.spaces.Box(np.array([-1.0, -0.5]), np.array([1.0, 0.5]), dtype=np.float64)
    assert stored.observation_space == gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ((), 1, "pass `action_space` (`--env`, or `--action-low` and `--action-high`)"),
        (("--action-low", "-2"), 2, "`--action-low` needs `--action-high` beside it"),
        (("--action-high", "2"), 2, "`--action-high` needs `--action-low` beside it"),
        (("--action-low=-2", "--action-high=x"), 2, "`--action-high` must be a finite number or several"),
        (("--action-low=-inf", "--action-high=2"), 2, "`--action-low` must be a finite number or several"),
        (("--action-low=-2", "--action-high=2,3"), 1, "have 1 dimension, and `--action-high` has 2 numbers"),
        (("--action-low=3", "--action-high=2"), 1, "`--action-low` is 3 and `--action-high` is 2 in dimension 0"),
        (("--action-low=2", "--action-high=2"), 1, "leaves no choice"),
        (("--env", "Pendulum-v1", "--action-low=-2", "--action-high=2"), 2, "`--env` tells the bounds of the actions"),
        (("--env-config", "{g: 9}"), 2, "`--env-config` is that of an environment; name it with `--env`"),
        (("--env", "Pendlum-v1"), 2, "Did you mean 'Pendulum-v1'"),
        (("--env", "MountainCarContinuous-v0"), 1, "observations have 3 numbers, the environment's have 2"),
    ],
)
def test_spaces_that_the_data_cannot_have_are_refused(
    buffer: str, tmp_path: Path, arguments: tuple[str, ...], exit_code: int, message: str
) -> None:
    result = run("convert", buffer, "rows.npz", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "rows.npz").exists()


def test_actions_of_the_environment_are_checked_by_the_bounds_that_are_given(buffer: str, tmp_path: Path) -> None:
    assert run("convert", buffer, "minari:test/wide-v0", "--action-low=-2", "--action-high=2").exit_code == 0
    assert run("convert", "minari:test/wide-v0", "wide.npz").exit_code == 0
    bounds = ("--action-low=-1.5", "--action-high=3")
    outside = run("convert", "wide.npz", "again.npz", *bounds)
    assert outside.exit_code == 1
    assert "action [-2.0] is outside the bounds of Box(-1.5, 3.0, (1,), float32)" in " ".join(outside.stderr.split())
    contradicted = run("convert", "minari:test/wide-v0", "again.npz", *bounds)
    assert contradicted.exit_code == 1
    assert "record the action space Box(-2.0, 2.0, (1,), float32), which is not" in " ".join(
        contradicted.stderr.split()
    )
    assert run("convert", "minari:test/wide-v0", "again.npz", "--env", "Pendulum-v1").exit_code == 0


# --- list and generate ------------------------------------------------------------------------------------------------


def test_a_generated_data_set_is_listed_and_can_be_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    arguments = ("generate", "rllib-calql/pendulum-swingup-v0", "--num-steps", "400", "--seed", "3", "--save-as", SMALL)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (0, f"minari:{SMALL}\n"), result.output
    assert minari.load_dataset(SMALL).storage.metadata["seed"] == 3
    listed = run("list").stdout.splitlines()
    assert [line.split() for line in listed if SMALL in line] == [
        [f"minari:{SMALL}", "2", "episodes,", "400", "transitions"]
    ]
    for dataset_id in catalog.generated_dataset_ids():
        assert [line.split(maxsplit=1)[1] for line in listed if f":{dataset_id} " in line] == ["generated on first use"]
    inspected = run("inspect", f"minari:{SMALL}", "--no-plot")
    assert inspected.exit_code == 0, inspected.output
    assert "normalised score" in inspected.stdout
    again = run(*arguments)
    assert (again.exit_code, again.stdout) == (1, "")
    assert f"There is a dataset '{SMALL}'" in again.stderr


def test_a_broken_local_data_set_is_named_beside_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari" / "broken-v0" / "data").mkdir(parents=True)
    result = run("list")
    assert result.exit_code == 0
    assert "broken-v0" in result.stderr
    assert "broken-v0" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rllib-calql/no-such-v0",), "rllib-calql/pendulum-swingup-v0"),
        (("rllib-calql/pendulum-swingup-v0", "--num-steps", "0"), "0 is not in the range x>=1"),
        (("rllib-calql/pendulum-swingup-v0", "--seed", "-1"), "-1 is not in the range x>=0"),
    ],
)
def test_wrong_usage_of_generate_is_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


# --- Start-up ---------------------------------------------------------------------------------------------------------


def test_the_help_needs_no_reader() -> None:
    code = (
        "import sys; from rllib_calql.commands.main import main; "
        "main(['dataset', 'inspect', '--help'], standalone_mode=False); "
        "sys.exit([name for name in ('ray.rllib', 'gymnasium', 'matplotlib', 'torch') if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "INPUT is a file, a folder, a URI" in done.stdout


def test_a_real_process_prints_nothing_but_the_report(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.parquet")
    code = "from rllib_calql.commands.main import main; main(prog_name='rllib')"
    command = [sys.executable, "-c", code, "dataset", "inspect", str(file), "--no-plot"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("dataset")
