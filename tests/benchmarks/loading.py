"""Time and memory of loading Parquet rows into the store, in a process of its own.

python tests/benchmarks/loading.py --rows 1000000
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from throughput import ACTION_DIM, OBS_DIM, write_rows

from rllib_calql import CalQLConfig
from rllib_calql.connectors import AddReturnsToGo
from rllib_calql.offline_data import CalQLOfflineData
from rllib_calql.replay import TransitionStore
from rllib_calql.returns import RewardSettings


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        # Written by another process, so that the peak below belongs to loading alone.
        import multiprocessing

        with multiprocessing.get_context("spawn").Pool(1) as pool:
            column_bytes = pool.apply(write_rows, (path, options.rows))
        config = CalQLConfig().offline_data(input_=path).fine_tuning(offline_updates=1)
        before = resident_bytes()
        begin = time.perf_counter()
        store = TransitionStore(obs_dim=OBS_DIM, action_dim=ACTION_DIM, online_capacity=1)
        CalQLOfflineData(config).load(
            store,
            AddReturnsToGo(RewardSettings(gamma=0.99)),
            observation_space=gym.spaces.Box(-10.0, 10.0, (OBS_DIM,), np.float32),
            action_space=gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32),
        )
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert store.num_offline == options.rows
    print(f"{options.rows:,} rows in {seconds:.1f} s, columns {column_bytes / 2**20:.0f} MiB,")
    print(f"peak memory above the start {peak / 2**20:.0f} MiB = {peak / column_bytes:.2f} times the columns")


if __name__ == "__main__":
    main()
