"""How the cost of an update grows: batch size, actions per source, critics, rows in the store. JSON and a plot.

Each point is the median time of an update through the algorithm: drawn from the store, handed to the learner, applied.
The plot shows it beside the arithmetic of the matrix products, scaled to the default sizes.

    python tests/benchmarks/scaling.py --output scaling.json --plot scaling.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import updates
from updates import ACTION_DIM, OBS_DIM

from rllib_calql import CalQL

DEFAULTS = {"train_batch_size_per_learner": 256, "num_actions": 10, "num_critics": 2, "rows": 10_000}
AXES: dict[str, tuple[int, ...]] = {
    "train_batch_size_per_learner": (64, 128, 256, 512, 1024),
    "num_actions": (4, 8, 10, 16, 32),
    "num_critics": (2, 3, 5, 10),
    "rows": (10_000, 100_000, 1_000_000, 10_000_000),
}
LABELS = {
    "train_batch_size_per_learner": "batch size",
    "num_actions": "actions per source, N",
    "num_critics": "critics",
    "rows": "transitions in the store",
}
WIDTH = 256
RATES = (2, 5, 10, 20, 50)  # Marked in the plot.
ROWS_AT_ONCE = 100_000


def giga_operations(sizes: dict[str, int]) -> float:
    """Multiplications and additions of the matrix products of one update, in 1e9; networks of two layers."""
    batch, num_actions, critics = (sizes[name] for name in list(DEFAULTS)[:3])
    of_a_critic = 2.0 * (ACTION_DIM * WIDTH + WIDTH * WIDTH + WIDTH)
    of_policy = 2.0 * (OBS_DIM * WIDTH + WIDTH * WIDTH + WIDTH * 2 * ACTION_DIM)
    judged = batch * (3 * num_actions + 1)
    per_critic = 3.0 * judged * of_a_critic + batch * num_actions * of_a_critic + 3.0 * batch * of_a_critic
    return (critics * per_critic + 4.0 * batch * of_policy) / 1e9


def build(path: Path, sizes: dict[str, int]) -> CalQL:
    """The algorithm of these sizes, its online store filled with random transitions."""
    training = {name: sizes[name] for name in list(DEFAULTS)[:3]}
    config = updates.calql_config(path, 10, **training)
    config.fine_tuning(offline_updates=1, mixing_ratio=0.0, online_capacity=sizes["rows"]).env_runners(
        num_env_runners=0
    )
    algo = config.build()
    rng = np.random.default_rng(0)
    num_rows = min(ROWS_AT_ONCE, sizes["rows"])
    episode = {
        "obs": rng.normal(size=(num_rows, OBS_DIM)).astype(np.float32),
        "new_obs": rng.normal(size=(num_rows, OBS_DIM)).astype(np.float32),
        "actions": rng.uniform(-0.9, 0.9, size=(num_rows, ACTION_DIM)).astype(np.float32),
        **{name: rng.normal(size=num_rows).astype(np.float32) for name in ("rewards", "returns_to_go")},
        "terminateds": np.zeros(num_rows, np.float32),
    }
    for _ in range(sizes["rows"] // num_rows):
        algo.store.add_online(episode)
    assert algo.store.num_online == sizes["rows"]
    return algo


def seconds_per_update(algo: CalQL, seconds: float) -> float:
    """Median over short calls."""
    algo._parts.updater._update_once(3, online=True)
    begin = time.perf_counter()
    algo._parts.updater._update_once(3, online=True)
    num_updates = max(1, round(seconds / 5 / ((time.perf_counter() - begin) / 3)))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        algo._parts.updater._update_once(num_updates, online=True)
        times.append((time.perf_counter() - begin) / num_updates)
    return statistics.median(times)


def plot(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """One panel per axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(16, 3.8), sharey=True)
    for panel, (axis, points) in zip(panels, results.items(), strict=True):
        sizes = [point["sizes"][axis] for point in points]
        reference = next(point for point in points if point["sizes"] == DEFAULTS)
        scale = reference["seconds"] / reference["giga_operations"]
        panel.plot(sizes, [1.0 / point["seconds"] for point in points], "o-", label="measured")
        expected = [1.0 / (scale * point["giga_operations"]) for point in points]
        panel.plot(sizes, expected, "k--", linewidth=1.0, label="by arithmetic")
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis], xticks=sizes)
        panel.set_xticklabels([f"{size:,}" for size in sizes], fontsize=8)
        panel.set_yticks(RATES, [str(rate) for rate in RATES])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("gradient steps per second")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="Of each point.")
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    parser.add_argument("--plot", type=Path, help="PNG file to write; needs matplotlib.")
    options = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    results: dict[str, list[dict[str, Any]]] = {axis: [] for axis in AXES}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        updates.write_rows(path, 2_000)
        for axis, values in AXES.items():
            for value in values:
                sizes = {**DEFAULTS, axis: value}
                algo = build(path, sizes)
                seconds = seconds_per_update(algo, options.seconds)
                algo.stop()
                operations = giga_operations(sizes)
                results[axis].append({"sizes": sizes, "seconds": seconds, "giga_operations": operations})
                print(
                    f"{LABELS[axis]:26}{value:>12,}{1e3 * seconds:10.2f} ms{1.0 / seconds:9.2f} steps/s"
                    f"{operations / seconds:9.0f} GFLOP/s",
                    flush=True,
                )
    ray.shutdown()
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
