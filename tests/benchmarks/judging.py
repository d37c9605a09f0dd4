"""How well data alone rank policies: fitted Q evaluation and held-out TD errors beside success in the simulator.

Trains Cal-QL, CQL and cloning on data with a tenth of the episodes held out, keeps checkpoints of several stages,
judges each by data (`rllib score`) and by 100 episodes, and lets sequential halving spend 40 episodes (`rllib select`).
Writes a line of JSON for each checkpoint as soon as it is judged; given again, it goes on.

    python tests/benchmarks/judging.py --output judging.jsonl --checkpoints folder
    python tests/benchmarks/judging.py --output judging.jsonl --summary
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from rllib_calql.experiments.experiment import read_experiments

EXAMPLES = Path(__file__).parents[2] / "tuned_examples"
SEEDS = (0, 1, 2)
NUM_EPISODES = 100
NUM_SELECTING = 40
# Task -> algorithm -> experiment file, settings on top of it, updates after which a checkpoint is kept.
_MAZE, _LONG = "pointmaze_umaze", "pointmaze_medium"
PLANS: dict[str, dict[str, tuple[str, dict[str, Any], tuple[int, ...]]]] = {
    _MAZE: {
        "Cal-QL": (f"{_MAZE}.yaml", {}, (500, 1000, 2000, 7000)),
        "BC": (f"recipes/{_MAZE}_bc.yaml", {}, (500, 7000)),
    },
    _LONG: {
        "Cal-QL": (f"{_LONG}.yaml", {}, (1000, 2500, 5000, 10000)),
        "CQL": (f"{_LONG}.yaml", {"calibrate": False}, (2500, 10000)),
    },
}
_FIRST_SEED = 10_000  # Of the 100 episodes; `rllib select` begins at 0.


def trained(task: str, algorithm: str, seed: int, folder: Path) -> Iterator[tuple[int, Path, float]]:
    """Trains, and yields each stage with its checkpoint and the training's own TD error on held-out rows."""
    file, changes, stages = PLANS[task][algorithm]
    (experiment,) = read_experiments(EXAMPLES / file)
    config = experiment.config.copy(copy_frozen=False)
    config.update_from_dict(changes)
    config.env_runners(num_env_runners=0)
    config.resources(num_cpus_for_main_process=1)
    config.offline_data(validation_fraction=0.1)
    config.fine_tuning(updates_per_iteration=math.gcd(*stages))
    config.evaluation(evaluation_interval=None, offline_evaluation_interval=1, offline_evaluation_type="held_out")
    config.debugging(seed=seed)
    algo = config.build()
    try:
        while algo.num_offline_updates < stages[-1]:
            result = algo.train()
            if algo.num_offline_updates in stages:
                path = folder / f"{task}_{algorithm}_{seed}_{algo.num_offline_updates}"
                algo.save_to_path(str(path))
                yield algo.num_offline_updates, path, float(result["evaluation"]["held_out"]["td_loss"])
    finally:
        algo.stop()


def judged(checkpoints: Sequence[Path]) -> list[dict[str, Any]]:
    """What the data say of each, and 100 episodes of its greedy policy."""
    from pyarrow.fs import LocalFileSystem

    from rllib_calql.evaluation.checkpoint_episodes import run_episodes
    from rllib_calql.evaluation.fqe.judging import score_checkpoints

    filesystem = LocalFileSystem()
    found = []
    for one in score_checkpoints([(filesystem, str(path)) for path in checkpoints]):
        assert one.score is not None, one.error
        episodes = run_episodes(one.checkpoint, filesystem, num_episodes=NUM_EPISODES, seed=_FIRST_SEED)
        found.append({"score": one.score.to_dict(), "success": episodes.success_rate})
    return found


def select(rows: Sequence[dict[str, Any]], folder: Path) -> tuple[str, int]:
    """The checkpoint that sequential halving chooses by 40 episodes from the ranking by data, and what it spent."""
    from pyarrow.fs import LocalFileSystem

    from rllib_calql.evaluation.checkpoint_episodes import run_episodes
    from rllib_calql.evaluation.selection import select_by_episodes

    def run(name: str, count: int, number: int) -> tuple[Sequence[float], float | None]:
        done = run_episodes(str(folder / name), LocalFileSystem(), num_episodes=count, seed=1_000 * number)
        return done.returns, done.success_rate

    ranking = sorted(rows, key=lambda row: -row["score"]["value"]["mean"])
    chosen = select_by_episodes([row["checkpoint"] for row in ranking], NUM_SELECTING, run)
    assert chosen.winner is not None
    return chosen.winner.name, chosen.episodes_spent


def measure(output: Path, folder: Path, tasks: Sequence[str]) -> None:
    """Trains and judges what `output` does not hold yet."""
    rows = _read(output)
    done = {row["checkpoint"] for row in rows if row["kind"] == "checkpoint"}
    for task in tasks:
        for algorithm, (_, _, stages) in PLANS[task].items():
            for seed in SEEDS:
                if all(f"{task}_{algorithm}_{seed}_{stage}" in done for stage in stages):
                    continue
                kept = list(trained(task, algorithm, seed, folder))
                begin = time.perf_counter()
                for (stage, path, td_loss), found in zip(kept, judged([path for _, path, _ in kept]), strict=True):
                    row = {
                        "kind": "checkpoint",
                        **{"task": task, "algorithm": algorithm, "seed": seed, "updates": stage},
                        **{"checkpoint": path.name, "td_loss": td_loss, **found},
                    }
                    _append(output, row)
                    print(path.name, f"value {found['score']['value']['mean']:.3g}, success {found['success']:.2f}")
                print(f"judged in {time.perf_counter() - begin:.0f} s", flush=True)
    rows = _read(output)
    selected = {(row["task"], row["seed"]) for row in rows if row["kind"] == "selection"}
    for task in tasks:
        of_task = [row for row in rows if row["kind"] == "checkpoint" and row["task"] == task]
        for seed in (*SEEDS, None):
            if (task, seed) not in selected:
                group = [row for row in of_task if seed is None or row["seed"] == seed]
                winner, spent = select(group, folder)
                _append(
                    output, {"kind": "selection", "task": task, "seed": seed, "checkpoint": winner, "episodes": spent}
                )


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Rank correlations with their intervals, and the regret of what was chosen, as tables."""
    lines = []
    by_task = defaultdict(list)
    for row in rows:
        if row["kind"] == "checkpoint":
            by_task[row["task"]].append(row)
    numbers: dict[str, Callable[[dict[str, Any]], float]] = {
        "value by FQE": lambda row: row["score"]["value"]["mean"],
        "TD error of FQE's fit on held-out rows, negative": lambda row: -row["score"]["held_out_td_error"],
        "TD error of the training's critics on held-out rows, negative": lambda row: -row["td_loss"],
    }
    for task, of_task in by_task.items():
        success = np.array([row["success"] for row in of_task])
        lines += [f"{task}: {len(of_task)} checkpoints, success {success.min():.2f} to {success.max():.2f}"]
        for name, number in numbers.items():
            lines.append(f"  {name}: {_correlation(np.array([number(row) for row in of_task]), success)}")
        for seed in (*SEEDS, None):
            group = [row for row in of_task if seed is None or row["seed"] == seed]
            if not group:
                continue
            best = max(row["success"] for row in group)
            by_data = max(group, key=lambda row: row["score"]["value"]["mean"])
            said = f"  {'all' if seed is None else f'seed {seed}'}: best {best:.2f}, regret by data alone "
            said += f"{best - by_data['success']:.2f} ({by_data['checkpoint']})"
            for row in rows:
                if row["kind"] == "selection" and (row["task"], row["seed"]) == (task, seed):
                    (chosen,) = (one for one in group if one["checkpoint"] == row["checkpoint"])
                    said += f", with {row['episodes']} episodes {best - chosen['success']:.2f} ({row['checkpoint']})"
            lines.append(said)
    return "\n".join(lines)


def _correlation(ranked: Any, success: Any) -> str:
    """Spearman's, with the 95 % percentile bootstrap over checkpoints."""
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(4_000):
        chosen = rng.integers(len(success), size=len(success))
        if np.ptp(ranked[chosen]) and np.ptp(success[chosen]):
            resampled.append(spearmanr(ranked[chosen], success[chosen]).statistic)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return f"{spearmanr(ranked, success).statistic:.2f} [{low:.2f}, {high:.2f}]"


def _read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def _append(output: Path, row: dict[str, Any]) -> None:
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, help="Folder in which the checkpoints are kept.")
    parser.add_argument("--task", choices=PLANS, action="append", help="Default: all of them.")
    parser.add_argument("--summary", action="store_true", help="Print what `--output` holds, and measure nothing.")
    arguments = parser.parse_args()
    if not arguments.summary:
        if arguments.checkpoints is None:
            parser.error("--checkpoints is needed, but for --summary")
        arguments.checkpoints.mkdir(parents=True, exist_ok=True)
        measure(arguments.output, arguments.checkpoints.absolute(), arguments.task or list(PLANS))
    print(summary(_read(arguments.output)))


if __name__ == "__main__":
    main()
