"""A tiny environment whose every step is known, and data from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tree

from rllib_calql import CalQL, CalQLConfig

TINY_NETWORKS = {"actor_hiddens": [8], "critic_hiddens": [8]}
# Every setting of the online side, each with another value than its default, and a reference value that is learned.
ONLINE_SIDE: dict[str, Any] = {
    "num_critics": 4,
    "critic_subset": 2,
    "n_step": 3,
    "actor_q": "mean",
    "actor_update_period": 3,
    "actor_update_period_online": 2,
    "bc_weight": [[0, 1.0], [50, 0.25]],
    "mixing_ratio": [[0, 0.75], [60, 0.25]],
    "min_q_weight_online": [[0, 3.0], [40, 1.0]],
    "max_target_backup_online": False,
    "deterministic_backup_online": False,
    "reference_value": "learned",
    "reference_fit": "td",
    "reference_updates": 6,
}


class LineEnv(gym.Env):  # type: ignore[type-arg]
    """A point on a line moves by its action in [-2, 2]; reaching either end terminates, 20 steps truncate."""

    GOAL = 6.0
    TIME_LIMIT = 20
    log: ClassVar[list[tuple[float, ...]]] = []  # (obs, action, reward, next obs, terminated) of every step.

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.observation_space = gym.spaces.Box(-10.0, 10.0, (1,), np.float32)
        self.action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    @staticmethod
    def reward(next_obs: np.ndarray) -> np.ndarray:
        """-1 a step, 0 at either end."""
        return np.where(np.abs(next_obs[..., 0]) >= LineEnv.GOAL, 0.0, -1.0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts near the middle."""
        super().reset(seed=seed)
        self.t = 0
        self.x = np.array([self.np_random.uniform(-1.0, 1.0)], np.float32)
        return self.x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves."""
        before = self.x
        self.x = (self.x + np.float32(np.clip(action, -2.0, 2.0))).astype(np.float32)
        self.t += 1
        reward = float(self.reward(self.x))
        terminated = reward == 0.0
        LineEnv.log.append((float(before[0]), float(action[0]), reward, float(self.x[0]), float(terminated)))
        return self.x.copy(), reward, terminated, self.t >= self.TIME_LIMIT, {"success": terminated}


def line_episodes(num_episodes: int, seed: int) -> list[dict[str, Any]]:
    """Rows of episodes under uniform random actions, in RLlib's column names."""
    rng = np.random.default_rng(seed)
    env = LineEnv()
    rows = []
    for episode in range(num_episodes):
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        done = False
        while not done:
            action = rng.uniform(-2.0, 2.0, size=1).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append(
                {
                    "eps_id": f"episode-{episode}",
                    "obs": obs,
                    "actions": action,
                    "rewards": reward,
                    "new_obs": next_obs,
                    "terminateds": terminated,
                    "truncateds": truncated and not terminated,
                }
            )
            obs, done = next_obs, terminated or truncated
    return rows


def write_line_data(path: Path, *, num_episodes: int = 12, seed: int = 0) -> Path:
    """Writes a Parquet file of such episodes."""
    rows = line_episodes(num_episodes, seed)
    pq.write_table(pa.table({key: [row[key] for row in rows] for key in rows[0]}), path)
    return path


def line_config(
    tmp_path: Path,
    *,
    offline_updates: int,
    updates_per_iteration: int = 10,
    mixing_ratio: float | str = 0.5,
    updates_per_env_step: float = 1,
    batch_size: int = 8,
) -> CalQLConfig:
    """A config on `LineEnv` and data written below `tmp_path`."""
    path = tmp_path / "line.parquet"
    if not path.exists():
        write_line_data(path)
    config: CalQLConfig = (
        CalQLConfig()
        .environment(LineEnv)
        .offline_data(input_=str(path))
        .training(num_actions=3, train_batch_size_per_learner=batch_size)
        .rl_module(model_config=TINY_NETWORKS)
        .fine_tuning(
            offline_updates=offline_updates,
            updates_per_iteration=updates_per_iteration,
            mixing_ratio=mixing_ratio,
            updates_per_env_step=updates_per_env_step,
        )
        .debugging(seed=0)
    )
    return config


def assert_identical(one: Any, other: Any) -> None:
    """Compares nested states bit for bit."""
    tree.assert_same_structure(one, other)
    for (path, a), (_, b) in zip(tree.flatten_with_path(one), tree.flatten_with_path(other), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b)), path


def run_state(algo: CalQL) -> dict[str, Any]:
    """Counters, owed updates, online data and random state."""
    state: dict[str, Any] = algo.get_state(components=["calql"])["calql"]
    return state
