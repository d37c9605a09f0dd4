"""Episodes of Pendulum as rows, small configs around them, and an environment that fails on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rllib_calql import CalQLConfig

Rows = dict[str, list[Any]]


PENDULUM = gym.make("Pendulum-v1")
OBSERVATION_SPACE, ACTION_SPACE = PENDULUM.observation_space, PENDULUM.action_space


def episode_rows(id_: str, length: int, *, truncated: bool = True, seed: int = 0) -> Rows:
    """An episode with Pendulum's sizes and bounds, as Parquet columns."""
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((length + 1, 3)).astype(np.float32)
    return {
        "eps_id": [id_] * length,
        "obs": obs[:-1].tolist(),
        "new_obs": obs[1:].tolist(),
        "actions": rng.uniform(-2, 2, (length, 1)).astype(np.float32).tolist(),
        "rewards": rng.standard_normal(length).tolist(),
        "terminateds": [False] * (length - 1) + [not truncated],
        "truncateds": [False] * (length - 1) + [truncated],
    }


def two_episodes() -> Rows:
    """Rows 0 to 2 are episode "first", rows 3 to 6 episode "second"."""
    parts = episode_rows("first", 3, truncated=False), episode_rows("second", 4, seed=1)
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def write(file: Path, rows: Rows) -> Path:
    pq.write_table(pa.table(rows), file)
    return file


def small_config(env: Any = "Pendulum-v1") -> CalQLConfig:
    return (
        CalQLConfig()
        .environment(env)
        .env_runners(num_env_runners=0)
        .training(train_batch_size_per_learner=8, num_actions=2)
        .fine_tuning(updates_per_iteration=2)
        .rl_module(model_config={"actor_hiddens": [8], "critic_hiddens": [8]})
        .debugging(seed=0)
    )


def offline_config(input_: Any, env: Any = "Pendulum-v1", **settings: Any) -> CalQLConfig:
    return small_config(env).offline_data(input_=input_, **settings).fine_tuning(offline_updates=2)


class FaultyEnv(gym.Env[Any, Any]):
    """Episodes of five steps whose third returns `obs` and `reward` as configured."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.fault = {"obs": 0.0, "reward": 0.0, **(config or {})}
        self.observation_space = OBSERVATION_SPACE
        self.action_space = self.fault.get("action_space", ACTION_SPACE)
        self.t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Starts at zero."""
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Stays at zero, but for the fault."""
        self.t += 1
        is_faulty = self.t == 3
        obs = np.full(3, self.fault["obs"] if is_faulty else 0.0, np.float32)
        return obs, float(self.fault["reward"] if is_faulty else 0.0), False, self.t == 5, {}
