"""Environments and data of an experiment file: found wherever the command is run, and missed before Ray is started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner

from rllib_calql.commands import import_path
from rllib_calql.commands.main import main

COMMAND = [sys.executable, "-c", "from rllib_calql.commands.main import main; main(prog_name='rllib')"]
TANK = """
import gymnasium as gym
import numpy as np

class TankEnv(gym.Env):
    observation_space = gym.spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 3.0, (1,), np.float32)

    def __init__(self, config=None):
        pass

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.full(2, 0.5, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(2, 0.5, np.float32), 1.0, False, self.t >= 5, {}
"""


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(import_path, "_added", [])
    yield
    sys.modules.pop("tanks_beside", None)


def refused(*arguments: str) -> str:
    """What the command says to wrong usage; it must not have started Ray."""
    was_started = ray.is_initialized()
    outcome = CliRunner().invoke(main, list(arguments))
    assert outcome.exit_code == 2, outcome.output
    assert ray.is_initialized() == was_started
    assert "Traceback" not in outcome.output
    return " ".join(outcome.output.split())


SETTINGS = "offline_updates: 10"
MISTAKES = [
    ("env: Pendulum-v9", "", r"'a': `env` 'Pendulum-v9' is not registered\. Did you mean 'Pendulum-v1'"),
    ("env: tanks_besid:TankEnv", "", r"there is no module 'tanks_besid'\. Did you mean 'tanks_beside'"),
    ("env: tanks_beside:TankEn", "", r"has no 'TankEn'.*Did you mean 'TankEnv'"),
    ("env: {grid_search: [Pendulum-v1, Pendulum-v7]}", "", r"'Pendulum-v7' is not registered"),
    (
        "env: Pendulum-v1",
        "evaluation_interval: 1, evaluation_config: {env: Tonk-v0}",
        r"`env` in `evaluation_config` 'Tonk-v0' is not registered",
    ),
    ("env: Pendulum-v1", f"input_: nowhere.parquet, {SETTINGS}", r"'a': `input_` .*nowhere\.parquet"),
    ("env: Pendulum-v1", f"input_: 'minari:mine/tank-v0', {SETTINGS}", r"There is no Minari dataset 'mine/tank-v0'"),
    (
        "env: Pendulum-v1",
        f"input_: 'minari:rllib-calql/pendulum-swingup-v1', {SETTINGS}",
        r"Did you mean 'rllib-calql/pendulum-swingup-v0'",
    ),
    ("env: Pendulum-v1", f"input_: notes.txt, {SETTINGS}", r"of no format that can be read"),
    (
        "env: Pendulum-v1",
        f"input_: {{grid_search: [logs.npz, log.npz]}}, {SETTINGS}",
        r"`input_` .*log\.npz.*logs\.npz",
    ),
]


@pytest.mark.parametrize(("env", "settings", "message"), MISTAKES)
def test_what_is_not_there_is_told_before_ray_is_started(
    env: str, settings: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plant").mkdir()
    (tmp_path / "plant" / "tanks_beside.py").write_text(TANK)
    (tmp_path / "notes.txt").write_text("level is low\n")
    (tmp_path / "logs.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "plant" / "e.yaml").write_text(f"a: {{run: CalQL, {env}, stop: {{}}, config: {{{settings}}}}}")
    assert re.search(message, refused("train", "file", "plant/e.yaml", "--storage-path", str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_module_beside_the_experiment_file_is_found_by_workers_and_by_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, elsewhere = tmp_path / "plant", tmp_path / "elsewhere"
    plant.mkdir()
    elsewhere.mkdir()
    (plant / "tanks_beside.py").write_text(TANK)
    (plant / "e.yaml").write_text(
        """
        tank:
          run: CalQL
          env: tanks_beside.TankEnv
          stop: {num_online_env_steps_lifetime: 10}
          config: {num_env_runners: 1, warmup_env_steps: 0, num_actions: 1, train_batch_size_per_learner: 4,
                   updates_per_env_step: 0.2, model_config: {actor_hiddens: [4], critic_hiddens: [4]}}
        """
    )
    trained = subprocess.run(
        [*COMMAND, "train", "file", f"{plant}/e.yaml", "--storage-path", f"{tmp_path}/r", "--num-cpus", "2"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert trained.returncode == 0, trained.stderr
    (mark,) = (tmp_path / "r").glob("tank/*/checkpoint_*/class_and_ctor_args.pkl")
    monkeypatch.chdir(elsewhere)
    arguments = ["evaluate", str(mark.parent), "--episodes", "1"]
    evaluated = CliRunner().invoke(main, arguments)
    assert evaluated.exit_code == 0, evaluated.output
    assert re.search(r"return +5\.00", evaluated.output)

    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(plant)])
    sys.modules.pop("tanks_beside")
    plant.rename(tmp_path / "gone")
    missed = CliRunner().invoke(main, arguments)
    assert missed.exit_code == 1
    told = " ".join(missed.output.split())
    assert re.search(rf"no module 'tanks_beside'.*modules lay in '{plant}'\. Run the command in the folder", told)
