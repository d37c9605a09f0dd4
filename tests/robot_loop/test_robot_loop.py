"""`tuned_examples/robot_loop`: two rounds with the example's files, less training, and counters from the files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from no_ray import BLOCKED

from rllib_calql import CalQL, export_policy, load_policy
from rllib_calql.commands.main import main
from rllib_calql.experiments.experiment import read_experiments

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tuned_examples" / "robot_loop"
README = EXAMPLE / "README.md"


def control_loop(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs it in a process that can import neither Ray nor torch."""
    command = [sys.executable, "-c", BLOCKED, str(EXAMPLE / "control_loop.py"), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def on_disk(folder: Path) -> list[dict[str, Any]]:
    return [dict(np.load(file)) for file in sorted((folder / "episodes").glob("*.npz"))]


@pytest.mark.slow
def test_two_rounds_carry_every_episode_back_once(tmp_path: Path) -> None:
    (experiment,) = read_experiments(EXAMPLE / "pretrain.yaml")
    config: Any = experiment.config
    assert config.env is None
    pre = tmp_path / "robot-loop"
    assert experiment.stop == {"num_offline_updates_lifetime": config.offline_updates}
    algo = config.fine_tuning(offline_updates=2, updates_per_iteration=2).build()
    algo.train()
    algo.save_to_path(pre)
    algo.stop()
    export_policy(pre, tmp_path / "policy.npz")
    updates, episodes = 0, on_disk(tmp_path)
    for number in (1, 2):
        driven = control_loop(tmp_path, "--env-steps", "301", "--seed", str(number))  # At most 300 steps an episode.
        assert driven.returncode == 0, driven.stderr
        num_before, episodes = len(episodes), on_disk(tmp_path)
        num_steps = sum(len(episode["rewards"]) for episode in episodes)
        assert len(episodes) == num_before + driven.stdout.count("episode ")
        assert f"policy of {updates:,} online updates" in driven.stdout
        command = f"fine-tune {pre} --episodes {tmp_path}/episodes --export {tmp_path}/policy.npz"
        tuned = CliRunner().invoke(main, [*command.split(), "--updates-per-env-step", "0.01"])
        assert tuned.exit_code == 0, tuned.output
        about = load_policy(tmp_path / "policy.npz").metadata["checkpoint"]
        updates = about["num_online_updates_lifetime"]
        assert about["num_online_env_steps_lifetime"] == num_steps
        assert updates == int(0.01 * num_steps)
    algo = CalQL.from_checkpoint(tmp_path / "robot-loop-fine-tuned")
    stored = algo.store.online_column("obs")
    assert algo.num_online_episodes == len(episodes)
    algo.stop()
    parts = ("achieved_goal", "desired_goal", "observation")
    logged = np.concatenate([np.hstack([e[f"observations/{part}"] for part in parts]) for e in episodes])
    np.testing.assert_array_equal(np.unique(stored, axis=0), np.unique(logged.astype(np.float32), axis=0))
    assert len(stored) == len(logged)


def test_the_control_loop_says_what_is_wrong(tmp_path: Path) -> None:
    failed = control_loop(tmp_path, "--greedy", "1")
    assert failed.returncode == 1
    assert "FileNotFoundError" in failed.stderr
    assert "policy.npz" in failed.stderr


def test_the_table_of_the_example_is_that_of_the_raw_results() -> None:
    lines = (ROOT / "tests" / "evidence" / "robot_loop.jsonl").read_text().splitlines()
    runs = {result["seed"]: result for result in map(json.loads, lines)}
    rows = re.findall(r"^\| (\d) \| (.*) \| ([\d,]+) steps, (\d+) episodes \|$", README.read_text(), flags=re.MULTILINE)
    assert [int(seed) for seed, *_ in rows] == sorted(runs) == [0, 1, 2, 3, 4]
    for seed, scores, steps, episodes in rows:
        result = runs[int(seed)]
        assert scores.split(" | ") == [f"{score:.2f}" for score in result["success"]]
        assert int(steps.replace(",", "")) == sum(result["env_steps"])
        assert int(episodes) == sum(result["episodes"])
    (means,) = re.findall(r"^\| mean \| (.*) \| \|$", README.read_text(), flags=re.MULTILINE)
    columns = zip(*(result["success"] for result in runs.values()), strict=True)
    assert means.split(" | ") == [f"{np.mean(column):.2f}" for column in columns]
