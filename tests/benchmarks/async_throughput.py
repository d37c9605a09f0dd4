"""Collecting and updating at once beside each of them alone, with an environment of 5 ms a step and two env runners.

The ratio of updates to env steps is set to that of the two rates alone, so that neither has to wait for the other.

    python tests/benchmarks/async_throughput.py --output async.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from rllib_calql import CalQL, CalQLConfig

OBS_DIM, ACTION_DIM, EPISODE_LENGTH = 29, 8, 100
NUM_RUNNERS = 2
STEP_S = 0.005


class SlowEnv(gym.Env):  # type: ignore[type-arg]
    """Sleeps 5 ms a step, as a robot or a slow simulator leaves the processor alone."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode."""
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Waits."""
        time.sleep(STEP_S)
        self.t += 1
        return self._observe(), 0.0, False, self.t >= EPISODE_LENGTH, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.normal(size=OBS_DIM).astype(np.float32)


def write_data(path: Path) -> None:
    """Random episodes of the environment's sizes."""
    rng = np.random.default_rng(0)
    num_rows, length = 10_000, EPISODE_LENGTH
    obs = rng.normal(size=(num_rows + 1, OBS_DIM)).astype(np.float32)
    is_last = np.arange(1, num_rows + 1) % length == 0
    columns = {
        "eps_id": (np.arange(num_rows) // length).astype(str).tolist(),
        "obs": list(obs[:-1]),
        "actions": list(rng.uniform(-1, 1, size=(num_rows, ACTION_DIM)).astype(np.float32)),
        "rewards": rng.normal(size=num_rows),
        "new_obs": list(obs[1:]),
        "terminateds": np.zeros(num_rows, bool),
        "truncateds": is_last,
    }
    pq.write_table(pa.table(columns), path)


def build(data: Path, *, offline_updates: int, updates_per_env_step: float = 1.0, num_learners: int = 0) -> CalQL:
    """The algorithm with one thread for updates, since the runners' policies need the other core."""
    config = (
        CalQLConfig()
        .environment(SlowEnv)
        .offline_data(input_=str(data))
        .training(num_actions=4, train_batch_size_per_learner=128)
        .rl_module(model_config={"actor_hiddens": [128, 128], "critic_hiddens": [128, 128]})
        .env_runners(num_env_runners=NUM_RUNNERS, num_cpus_per_env_runner=0.5)
        .learners(num_learners=num_learners)
        .fine_tuning(
            offline_updates=offline_updates,
            updates_per_iteration=500,
            updates_per_env_step=updates_per_env_step,
            max_staleness_env_steps=4 * NUM_RUNNERS * EPISODE_LENGTH,
        )
        .debugging(seed=0)
    )
    return config.build()


def rate_of_updates(data: Path, seconds: float, num_learners: int) -> float:
    """Gradient updates per second of the learner alone: the offline phase."""
    algo = build(data, offline_updates=10**9, num_learners=num_learners)
    algo.train()
    begin, before = time.perf_counter(), algo.num_offline_updates
    while time.perf_counter() - begin < seconds:
        algo.train()
    rate = (algo.num_offline_updates - before) / (time.perf_counter() - begin)
    algo.stop()
    return rate


def rate_of_env_steps(data: Path, seconds: float, num_learners: int) -> float:
    """Env steps per second of the runners alone: next to no updates, and never a reason to wait."""
    algo = build(data, offline_updates=1, updates_per_env_step=1e-6, num_learners=num_learners)
    for _ in range(4):
        algo.train()
    begin, before = time.perf_counter(), algo.num_online_env_steps
    while time.perf_counter() - begin < seconds:
        algo.train()
    rate = (algo.num_online_env_steps - before) / (time.perf_counter() - begin)
    algo.stop()
    return rate


def rates_together(data: Path, seconds: float, updates_per_env_step: float, num_learners: int) -> dict[str, float]:
    """Both at once."""
    algo = build(data, offline_updates=1, updates_per_env_step=updates_per_env_step, num_learners=num_learners)
    for _ in range(8):
        algo.train()
    begin, steps, updates = time.perf_counter(), algo.num_online_env_steps, algo.num_online_updates
    behind = []
    while time.perf_counter() - begin < seconds:
        behind.append(algo.train()["collection"]["num_env_steps_behind"])
    elapsed = time.perf_counter() - begin
    result = {
        "updates_per_s": (algo.num_online_updates - updates) / elapsed,
        "env_steps_per_s": (algo.num_online_env_steps - steps) / elapsed,
        "updates_per_env_step": algo.num_online_updates / algo.num_online_env_steps,
        "most_env_steps_behind": max(behind),
    }
    algo.stop()
    return result


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="Of each measurement.")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--num-learners", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    folder = tempfile.TemporaryDirectory()
    data = Path(folder.name) / "episodes.parquet"
    write_data(data)
    results = []
    for _ in range(options.repetitions):
        updates = rate_of_updates(data, options.seconds, options.num_learners)
        env_steps = rate_of_env_steps(data, options.seconds, options.num_learners)
        together = rates_together(data, options.seconds, updates / env_steps, options.num_learners)
        result = {"updates_alone": updates, "env_steps_alone": env_steps, "asked": updates / env_steps, **together}
        results.append(result)
        print(
            f"alone {updates:.1f} updates/s, {env_steps:.1f} env steps/s; together {together['updates_per_s']:.1f} "
            f"({together['updates_per_s'] / updates:.1%}), {together['env_steps_per_s']:.1f} "
            f"({together['env_steps_per_s'] / env_steps:.1%}); {together['updates_per_env_step']:.4f} updates per env "
            f"step of {updates / env_steps:.4f}, at most {together['most_env_steps_behind']:.0f} env steps behind",
            flush=True,
        )
    ray.shutdown()
    folder.cleanup()
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
