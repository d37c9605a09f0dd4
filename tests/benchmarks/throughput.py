"""Gradient steps per second of CalQL beside RLlib's CQL and beside the bare update, measured in turn in one run.

Observations 29, actions 8, batch 256, 10 actions per source, networks 256x256, max target backup on. Prints a table and
writes JSON. Keep the machine quiet while it runs.

    python tests/benchmarks/throughput.py --output throughput.json
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
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
from ray.rllib.algorithms.cql import CQLConfig

from rllib_calql import CalQLConfig

OBS_DIM, ACTION_DIM, BATCH_SIZE = 29, 8, 256
EPISODE_LENGTH = 1_000


class BoxEnv(gym.Env):  # type: ignore[type-arg]
    """Spaces of the benchmark; never stepped."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.observation_space = gym.spaces.Box(-10.0, 10.0, (OBS_DIM,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns zeros."""
        return np.zeros(OBS_DIM, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Returns zeros."""
        return np.zeros(OBS_DIM, np.float32), 0.0, False, False, {}


def write_rows(path: Path, num_rows: int, *, obs_dim: int = OBS_DIM, action_dim: int = ACTION_DIM) -> int:
    """Writes random walks as Parquet rows in RLlib's column names, and returns the bytes of the columns."""
    rng = np.random.default_rng(0)
    step = np.arange(num_rows)
    steps = rng.normal(scale=0.1, size=(num_rows + 1, obs_dim)).astype(np.float32)
    obs = np.clip(np.cumsum(steps, axis=0, dtype=np.float32) % 4.0, -9.0, 9.0)
    columns = {
        "obs": obs[:-1],
        "new_obs": obs[1:],
        "actions": rng.uniform(-0.9, 0.9, size=(num_rows, action_dim)).astype(np.float32),
    }
    table = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        for name, values in columns.items()
    }
    table["eps_id"] = pa.array((step // EPISODE_LENGTH).astype(str))
    table["rewards"] = pa.array(rng.normal(size=num_rows).astype(np.float32))
    table["terminateds"] = pa.array(np.zeros(num_rows, bool))
    table["truncateds"] = pa.array((step % EPISODE_LENGTH == EPISODE_LENGTH - 1) | (step == num_rows - 1))
    table["agent_id"] = pa.array(["default_agent"] * num_rows)
    table["module_id"] = pa.array(["default_policy"] * num_rows)
    pq.write_table(pa.table(table), path)
    return sum(values.nbytes for values in columns.values()) + 3 * 4 * num_rows


def calql_config(path: Path, num_steps: int) -> CalQLConfig:
    """Ours, at the benchmark's sizes."""
    config: CalQLConfig = (
        CalQLConfig()
        .environment(BoxEnv)
        .offline_data(input_=path)
        .training(max_target_backup=True, num_actions=10, train_batch_size_per_learner=BATCH_SIZE)
        .fine_tuning(offline_updates=10**9, updates_per_iteration=num_steps)
        .debugging(seed=0)
    )
    return config


def stock_config(path: Path, num_steps: int) -> CQLConfig:
    """RLlib's CQL at the same sizes. Behaviour cloning is off, so that its actor loss is the same as ours."""
    config = CQLConfig().environment(BoxEnv)
    config.training(
        lr=None, bc_iters=0, num_actions=10, train_batch_size_per_learner=BATCH_SIZE, deterministic_backup=True
    )
    config.offline_data(
        input_=[str(path)],
        dataset_num_iters_per_learner=num_steps,
        map_batches_kwargs={"concurrency": 1},
        iter_batches_kwargs={"prefetch_batches": 1},
    )
    config.reporting(min_time_s_per_iteration=None, min_train_timesteps_per_iteration=0)
    return config


def seconds_per_step_of_bare_loop(algo: Any, num_steps: int) -> float:
    """The learner's update on prepared tensors: no store, no learner group, no logging."""
    learner = algo.learner_group._learner
    columns = algo.store.sample(num_batches=num_steps, batch_size=BATCH_SIZE, num_offline_rows=BATCH_SIZE)
    batch = {name: torch.from_numpy(values) for name, values in columns.items()}
    begin = time.perf_counter()
    for start in range(0, num_steps * BATCH_SIZE, BATCH_SIZE):
        rows = {name: values[start : start + BATCH_SIZE] for name, values in batch.items()}
        learner._uncompiled_update({"default_policy": rows})
    return (time.perf_counter() - begin) / num_steps


def seconds_per_step_of_training(algo: Any, num_steps: int) -> float:
    """One `algo.train()` of that many gradient steps, all of RLlib included."""
    begin = time.perf_counter()
    algo.train()
    return (time.perf_counter() - begin) / num_steps


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="Turns of every program.")
    parser.add_argument("--steps", type=int, default=100, help="Gradient steps of ours per turn.")
    parser.add_argument("--stock-steps", type=int, default=15, help="Gradient steps of RLlib's CQL per turn.")
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    options = parser.parse_args()
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    seconds: dict[str, list[float]] = {"CalQL train()": [], "CalQL bare loop": [], "RLlib CQL train()": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        write_rows(path, 20_000)
        ours = calql_config(path, options.steps).build()
        stock = stock_config(path, options.stock_steps).build_algo()
        seconds_per_step_of_training(ours, options.steps)  # Warm-up of both.
        seconds_per_step_of_training(stock, options.stock_steps)
        for _ in range(options.rounds):
            seconds["CalQL train()"].append(seconds_per_step_of_training(ours, options.steps))
            seconds["CalQL bare loop"].append(seconds_per_step_of_bare_loop(ours, options.steps))
            seconds["RLlib CQL train()"].append(seconds_per_step_of_training(stock, options.stock_steps))
        ours.stop()
        stock.stop()
        del ours, stock
        gc.collect()  # Ray Data complains about iterators that outlive Ray.
        ray.shutdown()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        "steps_per_s": {name: 1.0 / value for name, value in medians.items()},
        "times_stock": medians["RLlib CQL train()"] / medians["CalQL train()"],
        "overhead": medians["CalQL train()"] / medians["CalQL bare loop"] - 1.0,
        "torch_threads": torch.get_num_threads(),
        "seconds_per_step": seconds,
    }
    for name, value in results["steps_per_s"].items():
        print(f"{name:20} {value:7.2f} gradient steps/s")
    print(f"CalQL / RLlib CQL    {results['times_stock']:7.2f} times")
    print(f"RLlib overhead       {100 * results['overhead']:7.2f} % of a bare step")
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
