"""Training from clients in processes of their own, which can import neither Ray nor torch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from client_server import free_port
from tiny import TINY_NETWORKS, LineEnv, line_config

from rllib_calql import CalQL, CalQLConfig, PolicyClient
from rllib_calql.common import metrics as keys

CLIENT = Path(__file__).parents[2] / "support" / "line_client.py"

pytestmark = pytest.mark.usefixtures("ray_session")


def start_client(port: int, num_episodes: int, log: Path) -> subprocess.Popen[bytes]:
    log.touch()
    return subprocess.Popen([sys.executable, str(CLIENT), f"127.0.0.1:{port}", str(num_episodes), str(log)])


def lengths(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split("\n")[:-1]]


def test_a_killed_client_and_a_restart_of_the_run_cost_unfinished_episodes_alone(tmp_path: Path) -> None:
    port = free_port()
    config = line_config(tmp_path, offline_updates=4, updates_per_iteration=4).env_runners(num_env_runners=1)
    killed_log, log = tmp_path / "killed", tmp_path / "log"
    clients = [start_client(port, 10_000, killed_log)]
    try:
        algo = config.external_clients(external_port=port).build()
        result = algo.train()
        while algo.num_online_episodes < 4:
            result = algo.train()
        clients.append(start_client(port, 12, log))  # Now, so that it has not ended before both are there.
        while result[keys.COLLECTION][keys.NUM_CLIENTS] < 2:
            result = algo.train()
        assert 0.0 <= result["env_runners"]["success_rate"] <= 1.0
        clients[0].kill()
        clients[0].wait()
        for _ in range(2):
            algo.train()
        checkpoint = algo.save_to_path(tmp_path / "checkpoint")
        algo.stop()
        algo = CalQL.from_checkpoint(checkpoint)
        while clients[1].poll() is None:
            result = algo.train()
        assert clients[1].returncode == 0
    finally:
        for client in clients:
            client.kill()
    of_survivor, of_killed = lengths(log), lengths(killed_log)
    assert len(of_survivor) == 12
    num_of_killed = algo.num_online_episodes - 12
    assert num_of_killed - len(of_killed) in (0, 1)  # Stored, and killed before it was noted.
    num_env_steps = sum(of_survivor) + sum(of_killed)
    assert 0 <= algo.num_online_env_steps - num_env_steps <= 20 * (num_of_killed - len(of_killed))
    assert algo.lifetime.num_online_env_steps_taken == algo.num_online_env_steps == algo.store.num_online
    assert algo.num_online_updates + algo.lifetime.updates_owed == algo.num_online_env_steps
    rows = [tuple(row) for row in np.column_stack([algo.store.online_column(n) for n in ("obs", "new_obs", "actions")])]
    assert max(Counter(rows).values()) == 1
    algo.stop()


def test_without_data_and_environment_clients_draw_the_warm_up_and_then_act(tmp_path: Path) -> None:
    env, port = LineEnv(), free_port()
    config = CalQLConfig().environment(observation_space=env.observation_space, action_space=env.action_space)
    config.training(num_actions=3, train_batch_size_per_learner=8).rl_module(model_config=TINY_NETWORKS)
    config.fine_tuning(warmup_env_steps=25, updates_per_iteration=5).external_clients(external_port=port)
    algo = config.build()
    client = start_client(port, 5, tmp_path / "log")  # The warm-up is over even if random episodes are short.
    seen = []
    with PolicyClient(f"127.0.0.1:{port}") as watching:
        while client.poll() is None:
            algo.train()
            seen.append((algo.num_online_env_steps, watching.is_warm_up, algo.num_online_updates))
        assert all(num_updates == 0 for steps, _, num_updates in seen if steps < 25)
        assert seen[0][1]
        end = time.monotonic() + 30.0
        while watching.is_warm_up and time.monotonic() < end:  # What it is sent comes a moment later.
            time.sleep(0.05)
        assert not watching.is_warm_up
        metadata = watching.policy.metadata  # type: ignore[union-attr]
        assert metadata["checkpoint"]["num_updates"] == watching.policy_version
    assert algo.num_online_env_steps == sum(lengths(tmp_path / "log"))
    with pytest.raises(RuntimeError, match=r"Clients .* are not evaluated"):
        algo.evaluate()
    algo.stop()
