"""Time and memory of loading offline data into the store, each format in a process of its own.

python tests/benchmarks/loading.py                 1,000,000 rows in every format, beside RLlib's own pipeline
python tests/benchmarks/loading.py --large         50,000,000 rows through the cache: first start, second start, updates
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from updates import ACTION_DIM, OBS_DIM, stock_config, write_rows

from rllib_calql import CalQLConfig
from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets.episodes.reader import EpisodeBlock
from rllib_calql.datasets.writers.file_formats import DatasetMetadata
from rllib_calql.datasets.writers.writers import write_blocks
from rllib_calql.store.offline_data import CalQLOfflineData
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo

EPISODE_LENGTH = 1000
OBS_SPACE = gym.spaces.Box(-10.0, 10.0, (OBS_DIM,), np.float32)
ACTION_SPACE = gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
LARGE_LIMIT = 2**30
_MIB = 2**20


def status_bytes(field: str) -> int:
    """A field of this process's memory status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def blocks(num_rows: int) -> Iterator[EpisodeBlock]:
    """Random episodes of 1,000 steps."""
    rng = np.random.default_rng(0)
    for number in range(num_rows // EPISODE_LENGTH):
        obs = rng.normal(size=(EPISODE_LENGTH + 1, OBS_DIM)).astype(np.float32).clip(-9, 9)
        yield EpisodeBlock(
            ids=[str(number)],
            lengths=np.array([EPISODE_LENGTH]),
            observations=obs[:-1],
            final_observations=obs[-1:],
            actions=rng.uniform(-1, 1, size=(EPISODE_LENGTH, ACTION_DIM)).astype(np.float32),
            rewards=rng.normal(size=EPISODE_LENGTH).astype(np.float32),
            terminateds=np.array([False]),
            truncateds=np.array([True]),
            where=str,
        )


def write(folder: str, num_rows: int) -> dict[str, str]:
    """Writes the same rows in every format; returns format -> input."""
    os.environ["MINARI_DATASETS_PATH"] = folder
    inputs = {"Minari": "minari:benchmark/rows-v0"} | {
        name: f"{folder}/rows.{suffix}" for name, suffix in (("Parquet", "parquet"), ("HDF5", "hdf5"), ("npz", "npz"))
    }
    metadata = DatasetMetadata(observation_space=OBS_SPACE, action_space=ACTION_SPACE)
    for input_ in inputs.values():
        write_blocks(blocks(num_rows), input_, metadata=metadata)
    return inputs


def load(folder: str, input_: str, **settings: Any) -> dict[str, float]:
    """Loads one input in this process; returns seconds, peak memory above the start, and the store's bytes."""
    os.environ["MINARI_DATASETS_PATH"] = folder
    config = CalQLConfig().offline_data(input_=input_, **settings)
    import h5py  # noqa: F401 - libraries are loaded before the clock starts.
    import minari  # noqa: F401
    import scipy.signal  # noqa: F401

    store = TransitionStore(obs_dim=OBS_DIM, action_dim=ACTION_DIM, online_capacity=1, seed=0)
    before = status_bytes("VmRSS")
    begin = time.perf_counter()
    CalQLOfflineData(config).load(
        store, AddReturnsToGo(RewardSettings(0.99)), observation_space=OBS_SPACE, action_space=ACTION_SPACE
    )
    seconds = time.perf_counter() - begin
    peak = status_bytes("VmHWM") - before  # Unlike `ru_maxrss`, not that of the process that started this one.
    assert store.offline is not None
    return {"rows": store.num_offline, "seconds": seconds, "peak": peak, "stored": store.offline.nbytes}


def stock_rows_per_s(folder: str, num_rows: int) -> float:
    """Rows per second of RLlib's own offline pipeline, from a Parquet file to batches of learners."""
    import ray

    path = Path(folder) / "stock.parquet"
    write_rows(path, num_rows)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    algo = stock_config(path, 1).build_algo()
    begin = time.perf_counter()
    # By default everything is mapped to batches and kept before the first one is returned.
    algo.offline_data.sample(num_samples=256, num_shards=0)
    seconds = time.perf_counter() - begin
    algo.stop()
    del algo
    gc.collect()  # Ray Data complains about iterators that outlive Ray.
    ray.shutdown()
    return num_rows / seconds


def in_new_process(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs a function in a fresh interpreter, so that memory and imports are its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args, kwargs)


def compare_formats(num_rows: int, stock_rows: int) -> dict[str, Any]:
    """Loads the same rows from every format."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = in_new_process(write, folder, num_rows)
        # Observations are stored once; a table of rows has them twice, as `obs` and `new_obs`.
        in_rows = num_rows * 4 * (2 * OBS_DIM + ACTION_DIM + 3)
        for name, input_ in inputs.items():
            results[name] = result = in_new_process(load, folder, input_)
            assert result["rows"] == num_rows
            print(
                f"{name:8} {num_rows:,} rows in {result['seconds']:5.2f} s, peak {result['peak'] / _MIB:4.0f} MiB = "
                f"{result['peak'] / in_rows:.2f} times the columns of the rows, "
                f"{result['peak'] / result['stored']:.2f} times the store ({result['stored'] / _MIB:.0f} MiB)"
            )
        if stock_rows:
            rate = in_new_process(stock_rows_per_s, folder, stock_rows)
            results["RLlib"] = {"rows_per_s": rate}
            print(f"RLlib's pipeline, Parquet: {rate:,.0f} rows/s, {num_rows / rate:,.0f} s for {num_rows:,} rows")
    return results


def train(folder: str, input_: str, num_updates: int) -> dict[str, float]:
    """Builds the algorithm on an input that is larger than the limit, and makes some updates."""
    config = (
        CalQLConfig()
        .environment(observation_space=OBS_SPACE, action_space=ACTION_SPACE)
        .offline_data(input_=input_, store_memory_limit=LARGE_LIMIT, cache_dir=folder)
        .fine_tuning(offline_updates=10**9, updates_per_iteration=num_updates)
        .debugging(seed=0)
    )
    algo = config.build()
    algo.train()
    begin = time.perf_counter()
    algo.train()
    return {
        "rows": algo.store.num_offline,
        "updates_per_s": num_updates / (time.perf_counter() - begin),
        "peak": status_bytes("VmHWM"),
        "mapped": status_bytes("RssFile"),
        "anonymous": status_bytes("RssAnon"),
    }


def large(num_rows: int) -> dict[str, Any]:
    """The case that does not fit: a sparse file of zeros, of which nothing but the flags is written."""
    import h5py

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/sparse.hdf5"
        with h5py.File(path, "w") as file:
            file.create_dataset("observations", (num_rows, OBS_DIM), "f4", chunks=(16_384, OBS_DIM))
            file.create_dataset("actions", (num_rows, ACTION_DIM), "f4", chunks=(16_384, ACTION_DIM))
            rewards = file.create_dataset("rewards", (num_rows,), "f4", chunks=(16_384,))
            rewards[:1] = 1.0  # Else nothing would tell success from failure.
            file["terminals"] = np.arange(num_rows) % EPISODE_LENGTH == EPISODE_LENGTH - 1
        limited = {"store_memory_limit": LARGE_LIMIT, "cache_dir": folder}
        for start in ("first", "second"):
            results[start] = result = in_new_process(load, folder, path, **limited)
            stored = f"{result['stored'] / 1e9:.1f} GB"
            print(f"{start} start: {result['rows']:,} rows in {result['seconds']:.2f} s, {stored}")
        print(f"The second start is {results['first']['seconds'] / results['second']['seconds']:.0f} times faster.")
        results["training"] = result = in_new_process(train, folder, path, 200)
        print(
            f"{result['updates_per_s']:.1f} updates/s; resident after 400 updates, libraries included: "
            f"{result['anonymous'] / _MIB:.0f} MiB and {result['mapped'] / _MIB:.0f} MiB of files; "
            f"limit {LARGE_LIMIT / _MIB:.0f} MiB"
        )
    return results


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="Rows (default: 1,000,000, with --large 50,000,000).")
    parser.add_argument("--stock-rows", type=int, default=20_000, help="Rows of RLlib's own pipeline; 0: leave it out.")
    parser.add_argument("--large", action="store_true", help="The case that does not fit into memory.")
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    options = parser.parse_args()
    if options.large:
        results = large(options.rows or 50_000_000)
    else:
        results = compare_formats(options.rows or 1_000_000, options.stock_rows)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
