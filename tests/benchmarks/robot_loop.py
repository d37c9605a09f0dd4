"""`tuned_examples/robot_loop` over seeds: success of the greedy policy before the first round and after each.

    python tests/benchmarks/robot_loop.py --seeds 0 1 2 3 4 --output robot_loop.jsonl

What the commands of the example do, one after the other, without starting a process for each: the experiment's
pre-training, its export, and rounds of the example's own control loop and of `rllib fine-tune`. A line for each seed.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import gymnasium_robotics
import numpy as np

from rllib_calql import EpisodeLog, export_policy, load_policy
from rllib_calql.checkpoints.reading import CheckpointFiles
from rllib_calql.experiments.experiment import read_experiments
from rllib_calql.experiments.fine_tuning import FineTuning

EXAMPLE = Path(__file__).parents[2] / "tuned_examples" / "robot_loop"


def run(seed: int, *, rounds: int, env_steps: int, greedy: int) -> dict[str, Any]:
    """One seed, from the logs to the last policy."""
    example = runpy.run_path(str(EXAMPLE / "control_loop.py"))
    folder, begin = Path(tempfile.mkdtemp()), time.process_time()
    (experiment,) = read_experiments(EXAMPLE / "pretrain.yaml")
    algo = experiment.with_seed(seed).config.build_algo()
    while algo.num_offline_updates < experiment.stop["num_offline_updates_lifetime"]:
        algo.train()
    algo.save_to_path(folder / "pre")
    algo.stop()
    policy = folder / "policy.npz"
    export_policy(folder / "pre", policy)
    robot = gym.make("PointMaze_UMaze-v3", maze_map=example["MAZE"], continuing_task=False)
    judge = gym.make("PointMaze_UMaze-v3", maze_map=example["MAZE"], continuing_task=False)
    rng = np.random.default_rng(seed)
    robot.reset(seed=seed)
    success = [example["success_rate"](judge, load_policy(policy), greedy)]
    steps, episodes, goals = [], [], []
    tuning = FineTuning(CheckpointFiles.find(folder / "pre"), folder / "tuned")
    for _ in range(rounds):
        log, reached = EpisodeLog(folder / "episodes"), 0
        while log.num_steps < env_steps:
            reached += example["drive"](robot, load_policy(policy), log, rng)
        new, _ = tuning.read(str(folder / "episodes"))
        tuning.round(new, say=lambda text: None, on_progress=lambda done, of: None, is_stopped=lambda: False)
        export_policy(folder / "tuned", policy, force=True)
        steps.append(log.num_steps)
        episodes.append(log.num_episodes)
        goals.append(reached)
        success.append(example["success_rate"](judge, load_policy(policy), greedy))
    counters = dict(tuning.counters)
    tuning.close()
    shutil.rmtree(folder)
    return {
        "seed": seed,
        "success": success,
        "greedy_episodes": greedy,
        "env_steps": steps,
        "episodes": episodes,
        "episodes_that_reached_the_goal": goals,
        "counters": counters,
        "processor_s": round(time.process_time() - begin, 1),
    }


def main() -> None:
    """Prints and writes a line for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--env-steps", type=int, default=300, help="in each round")
    parser.add_argument("--greedy", type=int, default=30, help="episodes that judge each policy")
    parser.add_argument("--output", type=Path, help="lines of JSON, added to what is there")
    options = parser.parse_args()
    gym.register_envs(gymnasium_robotics)
    for seed in options.seeds:
        line = json.dumps(run(seed, rounds=options.rounds, env_steps=options.env_steps, greedy=options.greedy))
        print(line, flush=True)
        if options.output:
            with options.output.open("a") as lines:
                lines.write(line + "\n")


if __name__ == "__main__":
    main()
