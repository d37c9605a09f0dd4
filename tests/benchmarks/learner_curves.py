"""Learning curves of two learners with half the batch each beside one learner with all of it, on the main job.

Settings are those of `tuned_examples/pointmaze_umaze.py`, but episodes are collected by the algorithm itself, so that
two learners have the two cores. Every finished run is a line of the output file; runs that are in it are not repeated.
All of it takes half an hour on two cores.

    python tests/benchmarks/learner_curves.py --output curves.jsonl
    python tests/benchmarks/learner_curves.py --output short.jsonl --seeds 0 --scale 0.02
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import time
from pathlib import Path
from typing import Any

import ray

from rllib_calql import CalQLConfig

EXAMPLE = Path(__file__).parents[2] / "tuned_examples" / "pointmaze_umaze.py"
JOINT_BATCH_SIZE = 128
ONLINE_ENV_STEPS = 2_000
VARIANTS = (1, 2)  # Numbers of learners.
NUM_CURVE_POINTS = 8

Run = dict[str, Any]


def config_of(num_learners: int, seed: int, scale: float) -> CalQLConfig:
    """The main job with another number of learners. One learner is the algorithm's own process."""
    config: CalQLConfig = runpy.run_path(str(EXAMPLE))["config"].copy(copy_frozen=False)
    config.fine_tuning(
        offline_updates=max(1, round(config.num_offline_updates * scale)),
        updates_per_iteration=max(1, round(config.updates_per_iteration * scale)),
        sample_async=False,
    )
    config.env_runners(num_env_runners=0)
    config.learners(num_learners=0 if num_learners == 1 else num_learners)
    config.training(train_batch_size_per_learner=JOINT_BATCH_SIZE // num_learners)
    config.evaluation(evaluation_duration=max(2, round(config.evaluation_duration * min(1.0, scale))))
    config.debugging(seed=seed)
    return config


def run(num_learners: int, seed: int, scale: float) -> Run:
    """One run. Its curve holds (online env steps, success rate) of every evaluation from the switch on."""
    begin = time.perf_counter()
    algo = config_of(num_learners, seed, scale).build()
    curve: list[tuple[int, float]] = []
    while True:
        result = algo.train()
        success = result["evaluation"]["env_runners"]["success_rate"]
        env_steps = result["num_online_env_steps_lifetime"]
        if algo.phase == "online":  # Also after the last offline update: the evaluation at the switch.
            curve.append((env_steps, success))
        print(f"{num_learners} learners, seed {seed}: {env_steps:5} env steps, success {success:.2f}", flush=True)
        if env_steps >= ONLINE_ENV_STEPS * scale:
            break
    algo.stop()
    return {
        "num_learners": num_learners,
        "seed": seed,
        "scale": scale,
        "curve": curve,
        "dip": result["fine_tuning"]["dip"],
        "num_updates": algo.num_offline_updates + algo.num_online_updates,
        "minutes": (time.perf_counter() - begin) / 60,
    }


def finished_runs(path: Path) -> list[Run]:
    """The runs in the file. A last line that a kill cut off is removed from it."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def success_at(curve: list[list[float]], env_steps: float) -> float:
    """Success rate of the latest evaluation up to that many env steps."""
    return [success for steps, success in curve if steps <= env_steps][-1]


def print_tables(runs: list[Run], scale: float) -> None:
    """A row per run, then the mean curve of each number of learners."""
    print(f"\n{'learners':>8} {'seed':>6} {'switch':>7} {'online':>7} {'final':>7} {'dip':>7} {'minutes':>8}")
    of_variant: dict[int, list[Run]] = {number: [r for r in runs if r["num_learners"] == number] for number in VARIANTS}
    for number, its_runs in of_variant.items():
        rows = []
        for one in sorted(its_runs, key=lambda r: r["seed"]):
            successes = [success for _, success in one["curve"]]
            rows.append((successes[0], statistics.mean(successes[1:]), successes[-1], one["dip"], one["minutes"]))
            print(f"{number:8} {one['seed']:6}", *(f"{value:7.3f}" for value in rows[-1]))
        if rows:
            print(f"{number:8} {'mean':>6}", *(f"{statistics.mean(column):7.3f}" for column in zip(*rows, strict=True)))
    points = [ONLINE_ENV_STEPS * scale * i / NUM_CURVE_POINTS for i in range(NUM_CURVE_POINTS + 1)]
    print(f"\n{'env steps':>15}", *(f"{point:6.0f}" for point in points))
    for number, its_runs in of_variant.items():
        if its_runs:
            means = [statistics.mean(success_at(one["curve"], point) for one in its_runs) for point in points]
            print(f"{number} learner(s), mean", *(f"{mean:6.3f}" for mean in means))


def main() -> None:
    """Runs what the file lacks, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON-lines file: read, and added to.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="Factor on updates, env steps and evaluations.")
    options = parser.parse_args()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    wanted = [(number, seed) for seed in options.seeds for number in VARIANTS]
    for number, seed in wanted:
        done = {(one["num_learners"], one["seed"], one["scale"]) for one in finished_runs(options.output)}
        if (number, seed, options.scale) not in done:
            finished = run(number, seed, options.scale)
            with options.output.open("a") as file:
                file.write(json.dumps(finished) + "\n")
    ray.shutdown()
    runs = [one for one in finished_runs(options.output) if one["scale"] == options.scale]
    print_tables([one for one in runs if (one["num_learners"], one["seed"]) in wanted], options.scale)


if __name__ == "__main__":
    main()
