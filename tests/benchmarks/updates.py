"""Gradient steps per second of CalQL beside a bare loop over its update, plain PyTorch and RLlib's CQL.

Observations 29, actions 8, batch 256, 10 actions per source, max target backup on; critics of 2 or 4 layers of 256,
every precision, all measured in turn in one run. Prints a table and writes JSON. Keep the machine quiet while it runs.

    python tests/benchmarks/updates.py --output updates.json
    python tests/benchmarks/updates.py --precisions fp32 --depths 2 --batch-size 8 --steps 1000
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
from bare_torch import BareCalQL
from ray.rllib.algorithms.cql import CQLConfig

from rllib_calql import CalQLConfig
from rllib_calql.networks.precision import float32_products
from rllib_calql.networks.side_by_side import one_thread_an_operation

OBS_DIM, ACTION_DIM, BATCH_SIZE = 29, 8, 256
PRECISIONS = ("fp32", "medium", "bf16")
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
    # Returns around -10, so that 5 to 25 % of the policy's actions are bound, as in the runs of the evidence.
    table["rewards"] = pa.array(rng.normal(loc=-0.1, size=num_rows).astype(np.float32))
    table["terminateds"] = pa.array(np.zeros(num_rows, bool))
    table["truncateds"] = pa.array((step % EPISODE_LENGTH == EPISODE_LENGTH - 1) | (step == num_rows - 1))
    table["agent_id"] = pa.array(["default_agent"] * num_rows)
    table["module_id"] = pa.array(["default_policy"] * num_rows)
    pq.write_table(pa.table(table), path)
    return sum(values.nbytes for values in columns.values()) + 3 * 4 * num_rows


def calql_config(path: Path, num_steps: int, **training: Any) -> CalQLConfig:
    """Ours, at the benchmark's sizes."""
    config: CalQLConfig = (
        CalQLConfig()
        .environment(BoxEnv)
        .offline_data(input_=path)
        .training(**{"num_actions": 10, "train_batch_size_per_learner": BATCH_SIZE, **training})
        .fine_tuning(offline_updates=10**9, updates_per_iteration=num_steps)
        .debugging(seed=0)
    )
    return config


def stock_config(path: Path, num_steps: int, **training: Any) -> CQLConfig:
    """RLlib's CQL at the same sizes. Behaviour cloning is off, so that its actor loss is the same as ours."""
    config = CQLConfig().environment(BoxEnv)
    config.training(
        **{
            "lr": None,
            "bc_iters": 0,
            "num_actions": 10,
            "train_batch_size_per_learner": BATCH_SIZE,
            "deterministic_backup": True,
            **training,
        }
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
    batch_size = algo.config.train_batch_size_per_learner
    columns = algo.store.sample(num_batches=num_steps, batch_size=batch_size, num_offline_rows=batch_size)
    batch = {name: torch.from_numpy(values) for name, values in columns.items()}
    with float32_products(algo.config.precision), one_thread_an_operation():
        begin = time.perf_counter()
        for start in range(0, num_steps * batch_size, batch_size):
            rows = {name: values[start : start + batch_size] for name, values in batch.items()}
            learner._uncompiled_update({"default_policy": rows})
        return (time.perf_counter() - begin) / num_steps


def seconds_per_step_of_plain_torch(program: BareCalQL, algo: Any, num_steps: int) -> float:
    """Plain PyTorch on prepared tensors."""
    batch_size = algo.config.train_batch_size_per_learner
    columns = algo.store.sample(num_batches=1, batch_size=batch_size, num_offline_rows=batch_size)
    batch = {name: torch.from_numpy(values) for name, values in columns.items()}
    begin = time.perf_counter()
    for _ in range(num_steps):
        program.step(batch)
    return (time.perf_counter() - begin) / num_steps


def seconds_per_step_of_training(algo: Any, num_steps: int) -> float:
    """One `algo.train()` of that many gradient steps, all of RLlib included."""
    begin = time.perf_counter()
    algo.train()
    return (time.perf_counter() - begin) / num_steps


def shapes_of_products(depth: int, batch_size: int) -> list[tuple[int, int, int]]:
    """Rows, inner and outer size of every matrix product that an update cannot do without; those of states left out."""
    judged, proposed = (3 * 10 + 1) * batch_size, 10 * batch_size
    sizes = [(ACTION_DIM, 256), *[(256, 256)] * (depth - 1)]
    of_critic = []
    for n_in, n_out in sizes:
        of_critic += [(judged, n_in, n_out), (n_in, judged, n_out), (proposed, n_in, n_out)]
        of_critic += [(judged, n_out, n_in)] if n_in == 256 else []  # Gradient of the layer's input.
    return 2 * of_critic


def seconds_per_step_of_products(depth: int, batch_size: int, num_steps: int) -> float:
    """The matrix products of an update and nothing else, into memory that is there already: the arithmetic's floor."""
    products = [
        (torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for m, k, n in shapes_of_products(depth, batch_size)
    ]
    begin = time.perf_counter()
    for _ in range(num_steps):
        for left, right, out in products:
            torch.mm(left, right, out=out)
    return (time.perf_counter() - begin) / num_steps


def measure(path: Path, depth: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per gradient step of every program, one entry per turn."""
    hiddens = [256] * depth
    batch = {"train_batch_size_per_learner": options.batch_size}
    ours = {}
    for precision in options.precisions:
        config = calql_config(path, options.steps, precision=precision, **batch)
        config.rl_module(model_config={"actor_hiddens": [256, 256], "critic_hiddens": hiddens})
        ours[precision] = config.build()
    plain = BareCalQL(OBS_DIM, ACTION_DIM, hiddens)
    stock = None
    if options.stock_steps:
        stock_settings = stock_config(path, options.stock_steps, **batch)
        if depth != 2:  # Otherwise RLlib's own default, two layers of 256 for each of its critics' three parts.
            stock_settings.rl_module(model_config={"fcnet_hiddens": hiddens, "head_fcnet_hiddens": hiddens})
        stock = stock_settings.build_algo()
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float, is_warm_up: bool) -> None:
        if not is_warm_up:
            seconds.setdefault(name, []).append(value)

    for turn in range(options.rounds + 1):
        is_warm_up = turn == 0
        for precision, algo in ours.items():
            note(f"CalQL {precision}", seconds_per_step_of_training(algo, options.steps), is_warm_up)
            note(f"its bare loop, {precision}", seconds_per_step_of_bare_loop(algo, options.steps), is_warm_up)
        first = next(iter(ours.values()))
        note("plain PyTorch", seconds_per_step_of_plain_torch(plain, first, options.steps // 2), is_warm_up)
        seconds_of_products = seconds_per_step_of_products(depth, options.batch_size, options.steps)
        note("its fp32 products alone", seconds_of_products, is_warm_up)
        if stock is not None:
            note("RLlib's CQL", seconds_per_step_of_training(stock, options.stock_steps), is_warm_up)
    for algo in (*ours.values(), stock):
        if algo is not None:
            algo.stop()
    return seconds


def report(depth: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Prints the table, and returns medians and ratios."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    stock = medians.get("RLlib's CQL")
    print(f"\ncritics of {depth} layers       steps/s  ms a step  times RLlib's CQL")
    for name, value in medians.items():
        times = f"{stock / value:10.2f}" if stock else ""
        print(f"{name:26}{1.0 / value:9.2f}{1e3 * value:11.2f}{times}")
    overheads = {}
    for name in seconds:
        if name.startswith("CalQL "):
            precision = name.removeprefix("CalQL ")
            # Turn by turn, because the machine's speed drifts.
            pairs = zip(seconds[name], seconds[f"its bare loop, {precision}"], strict=True)
            overheads[precision] = statistics.median(ours - bare for ours, bare in pairs)
            share = overheads[precision] / medians[f"its bare loop, {precision}"]
            print(f"around a step, {precision}: {1e3 * overheads[precision]:+.3f} ms, {100 * share:+.2f} %")
    return {"seconds_per_step": seconds, "medians": medians, "overhead_s": overheads}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="Turns of every program.")
    parser.add_argument("--steps", type=int, default=60, help="Gradient steps of ours per turn.")
    parser.add_argument("--stock-steps", type=int, default=12, help="Of RLlib's CQL per turn; 0 leaves it out.")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 4], help="Layers of the critics.")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    options = parser.parse_args()
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    results: dict[str, Any] = {"torch_threads": torch.get_num_threads(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        write_rows(path, 20_000)
        for depth in options.depths:
            results[f"{depth} layers"] = report(depth, measure(path, depth, options))
            gc.collect()  # Ray Data complains about iterators that outlive Ray.
    ray.shutdown()
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
