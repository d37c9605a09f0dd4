"""Resident memory of Tune's trials on one node, with offline data shared, private, and hardly any.

python tests/benchmarks/sharing.py                 4 trials on 2,000,000 rows, 312 MB
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from loading import ACTION_SPACE, OBS_SPACE, blocks, in_new_process
from ray import tune
from updates import ACTION_DIM, OBS_DIM

from rllib_calql import CalQLConfig
from rllib_calql.datasets.writers.file_formats import DatasetMetadata
from rllib_calql.datasets.writers.writers import write_blocks

_MIB = 2**20


def proportional_bytes(pids: Iterable[int], field: str = "Pss") -> int:
    """Resident memory of processes, in which a page that several map counts once among them; or a part of it."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    return total


def pids_of(*names: str) -> list[int]:
    """Processes whose command begins with one of the names."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    found = (line.split(maxsplit=1) for line in listed[1:])
    return [int(pid) for pid, command in found if command.startswith(names)]


class Measurement(tune.Callback):
    """Measures once every trial has reported, and remembers when each did."""

    def __init__(self, num_trials: int) -> None:
        self._num_trials = num_trials
        self._begin = time.perf_counter()
        self._pids: dict[str, int] = {}
        self.result: dict[str, float] = {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Takes the process id of the trial."""
        self._pids[trial.trial_id] = result["pid"]
        if len(self._pids) == self._num_trials and not self.result:
            seconds = time.perf_counter() - self._begin
            registry = pids_of("ray::_RegistryActor")
            self.result = {
                "rows": result["store"]["num_offline_transitions"],
                "trials": proportional_bytes(self._pids.values()),
                "object_store": proportional_bytes(self._pids.values(), "Pss_Shmem"),
                "registry": proportional_bytes(registry),
                "num_registries": len(registry),
                "seconds": seconds,
            }


def measure(path: str, num_trials: int, share: bool) -> dict[str, float]:
    """Runs the trials until all have reported; returns their memory."""
    ray.init(num_cpus=num_trials, include_dashboard=False, log_to_driver=False)
    config = (
        CalQLConfig()
        .environment(observation_space=OBS_SPACE, action_space=ACTION_SPACE)
        .offline_data(input_=path, share_offline_data=share, normalize_observations=True)  # Reads every row.
        .training(actor_lr=tune.grid_search([1e-4 * (1 + number) for number in range(num_trials)]))
        .fine_tuning(offline_updates=10**9, updates_per_iteration=2)
        .debugging(seed=0)
    )
    measurement = Measurement(num_trials)
    with tempfile.TemporaryDirectory() as folder:
        results = tune.Tuner(
            "CalQL",
            param_space=config,
            run_config=tune.RunConfig(
                storage_path=folder,
                stop=lambda trial_id, result: bool(measurement.result),
                callbacks=[measurement],
                verbose=0,
            ),
        ).fit()
    assert not results.errors
    ray.shutdown()
    return measurement.result


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="Rows (default: 2,000,000).")
    parser.add_argument("--trials", type=int, default=4, help="Trials at the same time (default: 4).")
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    table = options.rows * 4 * (OBS_DIM + ACTION_DIM + 2)
    with tempfile.TemporaryDirectory() as folder:
        for name, num_rows in (("few", 1000), ("all", options.rows)):
            metadata = DatasetMetadata(observation_space=OBS_SPACE, action_space=ACTION_SPACE)
            in_new_process(write_rows_to, f"{folder}/{name}.npz", num_rows, metadata)
        for name, file, share in (("none", "few", False), ("private", "all", False), ("shared", "all", True)):
            results[name] = result = in_new_process(measure, f"{folder}/{file}.npz", options.trials, share)
            print(
                f"{name:8} {result['rows']:>10,} rows: {options.trials} trials {result['trials'] / _MIB:6.0f} MiB, "
                f"registry {result['registry'] / _MIB:3.0f} MiB, first results of all after {result['seconds']:.0f} s"
            )
            if name != "none":
                columns = result["trials"] - results["none"]["trials"]
                stored = result["object_store"]
                print(
                    f"{'':8} more than without data: {columns / _MIB:.0f} MiB, {columns / table:.2f} tables; of this "
                    f"{stored / _MIB:.0f} MiB, {stored / table:.2f} tables, in the object store"
                )
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


def write_rows_to(path: str, num_rows: int, metadata: DatasetMetadata) -> None:
    """Writes random episodes."""
    write_blocks(blocks(num_rows), path, metadata=metadata)


if __name__ == "__main__":
    main()
