"""Memory, actors, references and files of the online phase at full speed: nothing may grow after the warm-up.

The main job's settings with asynchronous collection, two env runners and a remote learner. The online store is full
before the warm-up ends, and a checkpoint is written to the same place every minute. Memory of a process is its
anonymous memory, since pages of the object store count for whoever maps them. Prints a table and writes JSON; exits 1
if a limit is broken.

    python tests/benchmarks/soak.py --minutes 10 --warm-up 3 --output soak.json
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from rllib_calql import CalQL, CalQLConfig

EXAMPLE = Path(__file__).parents[2] / "tuned_examples" / "pointmaze_umaze.py"
NUM_RUNNERS = 2
SAMPLE_S, CHECKPOINT_S = 5.0, 60.0
MAX_MB_PER_MINUTE = 1.0
# One more for every checkpoint or evaluation is more than this; a request more or less under way is not.
MAX_GROWTH_OF_COUNT = 2.0
MAX_GROWTH_OF_ACTORS = 0.0

Row = dict[str, float]


def build(capacity: int, updates_per_env_step: float) -> CalQL:
    """The main job, online almost from the start, with every kind of process."""
    config: CalQLConfig = runpy.run_path(str(EXAMPLE))["config"].copy(copy_frozen=False)
    config.fine_tuning(
        offline_updates=200,
        updates_per_iteration=100,
        sample_async=True,
        online_capacity=capacity,
        updates_per_env_step=updates_per_env_step,
    )
    config.env_runners(num_env_runners=NUM_RUNNERS, num_cpus_per_env_runner=0.5)
    config.learners(num_learners=1)
    config.evaluation(evaluation_interval=20, evaluation_duration=5)
    return config.build()


def pids_of(algo: CalQL) -> dict[str, int]:
    """Processes of the run by name."""
    runners = algo.env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)
    learners = [result.get() for result in algo.learner_group.foreach_learner(lambda _: os.getpid())]
    named = {"driver": os.getpid()}
    named |= {f"learner {number}": pid for number, pid in enumerate(learners, 1)}
    return named | {f"runner {number}": pid for number, pid in enumerate(runners, 1)}


def anonymous_mb(pid: int) -> float:
    """Anonymous memory of a process, swapped pages included, in MB; a page that several share counts once."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "SwapPss:"))) * 1024 / 1e6


class Sampler:
    """Takes one row of measurements at a time, without requests to the processes themselves."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids

    def sample(self) -> Row:
        """Values by name."""
        row = {f"{name}, MB": anonymous_mb(pid) for name, pid in self._pids.items()}
        row |= {f"{name}, files": float(len(os.listdir(f"/proc/{pid}/fd"))) for name, pid in self._pids.items()}
        actors = ray._private.state.actors(actor_state_name="ALIVE")
        references = ray._private.worker.global_worker.core_worker.get_all_reference_counts()
        of_store = "object_store_memory"
        stored = ray.cluster_resources()[of_store] - ray.available_resources()[of_store]
        row["actors"] = float(len(actors))
        row["references of the driver"] = float(len(references))
        row["object store, MB"] = stored / 1e6
        return row


def soak(algo: CalQL, seconds: float, folder: Path) -> tuple[list[Row], float]:
    """Trains for that long.

    Returns:
        Rows of measurements with the "minute" of each, and the minute in which the online store was full.
    """
    capacity = algo.config.online_capacity
    sampler, rows, full_at = Sampler(pids_of(algo)), [], float("nan")
    begin = time.perf_counter()
    next_sample, next_checkpoint, next_line = 0.0, CHECKPOINT_S, 0.0
    while (now := time.perf_counter() - begin) < seconds:
        algo.train()
        now = time.perf_counter() - begin
        if np.isnan(full_at) and algo.store.num_online == capacity:
            full_at = now / 60
        if now >= next_checkpoint:
            algo.save_to_path(folder / "checkpoint")
            next_checkpoint += CHECKPOINT_S
        if now >= next_sample:
            counters = {"env steps": algo.num_online_env_steps, "updates": algo.num_online_updates}
            rows.append({"minute": now / 60, **sampler.sample(), **counters})
            next_sample = now + SAMPLE_S
        if now >= next_line:
            memory = ", ".join(f"{name} {value:.1f}" for name, value in rows[-1].items() if name.endswith(", MB"))
            print(f"{now / 60:5.1f} min, {algo.num_online_env_steps} env steps; {memory}", flush=True)
            next_line += 60.0
    return rows, full_at


def line_through(minutes: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Least-squares slope and its standard error, which takes the deviations as independent."""
    centred = minutes - minutes.mean()
    spread = float(centred @ centred)
    slope = float(centred @ values) / spread
    deviations = values - values.mean() - slope * centred
    variance = float(deviations @ deviations) / (len(values) - 2)
    return slope, (variance / spread) ** 0.5


def growth(values: np.ndarray) -> float:
    """Median of the last third minus that of the first."""
    third = max(1, len(values) // 3)
    return float(np.median(values[-third:]) - np.median(values[:third]))


def judge(rows: list[Row], warm_up: float, full_at: float) -> dict[str, Any]:
    """Trends after the warm-up, and the limits that are broken."""
    kept = [row for row in rows if row["minute"] >= warm_up]
    if len(kept) < 3:
        raise ValueError(f"There are {len(kept)} samples after the warm-up; raise `--minutes` or lower `--warm-up`.")
    minutes = np.array([row["minute"] for row in kept])
    trends, failures = [], []
    for name in kept[0]:
        if name in ("minute", "env steps", "updates"):
            continue
        values = np.array([row[name] for row in kept])
        slope, error = line_through(minutes, values)
        trend = {"name": name, "mean": float(values.mean()), "slope": slope, "error": error, "growth": growth(values)}
        trends.append(trend)
        if name.endswith(", MB"):
            limit, found, unit = MAX_MB_PER_MINUTE, slope, "MB a minute"
            is_broken = slope >= limit
        else:
            limit = MAX_GROWTH_OF_ACTORS if name == "actors" else MAX_GROWTH_OF_COUNT
            found, unit, is_broken = trend["growth"], "from the first to the last third", trend["growth"] > limit
        if is_broken:
            failures.append(f"{name}: {found:+.2f} {unit}, allowed are {limit:g}")
    if not full_at <= warm_up:
        failures.append(f"the online store was full at minute {full_at:.1f}, the warm-up ended at {warm_up:g}")
    elapsed = 60 * (minutes[-1] - minutes[0])
    rates = {f"{name} per s": (kept[-1][name] - kept[0][name]) / elapsed for name in ("env steps", "updates")}
    return {"samples": len(kept), **rates, "trends": trends, "failures": failures}


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="Of training, warm-up included.")
    parser.add_argument("--warm-up", type=float, default=3.0, help="Minutes that are not judged.")
    parser.add_argument("--capacity", type=int, default=10_000, help="Rows of the online store.")
    parser.add_argument("--updates-per-env-step", type=float, default=0.25, help="Keeps both sides busy on two cores.")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    algo = build(options.capacity, options.updates_per_env_step)
    while algo.phase == "offline":
        algo.train()
    pids = pids_of(algo)
    with tempfile.TemporaryDirectory() as folder:
        rows, full_at = soak(algo, 60 * options.minutes, Path(folder))
    outcome = judge(rows, options.warm_up, full_at)
    if pids_of(algo) != pids:
        outcome["failures"].append("a process was replaced")
    algo.stop()
    ray.shutdown()
    print(f"\n{'after the warm-up':<26}{'mean':>10}{'per minute':>12}{'+-':>8}{'growth':>9}")
    for one in outcome["trends"]:
        print(f"{one['name']:<26}{one['mean']:>10.1f}{one['slope']:>+12.3f}{one['error']:>8.3f}{one['growth']:>+9.1f}")
    print(f"{outcome['samples']} samples, {outcome['env steps per s']:.0f} env steps/s, ", end="")
    print(f"{outcome['updates per s']:.0f} updates/s, online store full at minute {full_at:.1f}")
    print("\n".join(outcome["failures"]) or "All limits hold.")
    if options.output:
        settings = {"minutes": options.minutes, "warm_up": options.warm_up, "capacity": options.capacity}
        options.output.write_text(json.dumps({**settings, "full_at": full_at, **outcome, "rows": rows}, indent=2))
    sys.exit(bool(outcome["failures"]))


if __name__ == "__main__":
    main()
