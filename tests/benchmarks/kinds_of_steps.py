"""Time of gradient steps with other settings beside the default one, one update of each in turn, without Ray.

Observations 29, actions 8, batch 256, networks of 256x256, 10 actions per source. Prints medians of wall and processor
time, their ratios to the first line, and the load of the machine. Keep it quiet.

    python tests/benchmarks/kinds_of_steps.py
    python tests/benchmarks/kinds_of_steps.py --turns 60 --threads 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from updates import ACTION_DIM, BATCH_SIZE, OBS_DIM

from rllib_calql import CalQLConfig
from rllib_calql.learning.learner import CalQLTorchLearner
from rllib_calql.networks.precision import float32_products
from rllib_calql.networks.side_by_side import one_thread_an_operation

NUM_WARM_UP = 20  # The actor of the last line steps once in them.
_SAC = {"conservative_online": False}
_TEN = {**_SAC, "num_critics": 10}
# Name -> settings, layer norm, and whether the update belongs to the online phase.
KINDS: dict[str, tuple[dict[str, Any], bool | str, bool]] = {
    "default": ({}, False, False),
    "layer norm, both networks": ({}, True, False),
    "layer norm, critics": ({}, "critic", False),
    "no conservative term": (_SAC, False, True),
    "the same, 10 critics": (_TEN, False, True),
    "the same, subset of 2": ({**_TEN, "critic_subset": 2}, False, True),
    "the same, actor every 20th": ({**_TEN, "critic_subset": 2, "actor_update_period": 20}, False, True),
}


def make_learner(settings: dict[str, Any], layer_norm: bool | str, *, online: bool) -> CalQLTorchLearner:
    """A learner of the benchmark's sizes."""
    config = CalQLConfig().training(num_actions=10).debugging(seed=0)
    config.rl_module(model_config={"layer_norm": layer_norm})
    config.update_from_dict(settings)
    spaces = (gym.spaces.Box(-9.0, 9.0, (OBS_DIM,), np.float32), gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32))
    learner: CalQLTorchLearner = config.build_learner(spaces={"default_policy": spaces})
    learner._online = online
    return learner


def random_batch(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Transitions whose returns stop about half of the policy's actions from being pushed down."""
    columns = {
        "obs": rng.normal(size=(BATCH_SIZE, OBS_DIM)),
        "new_obs": rng.normal(size=(BATCH_SIZE, OBS_DIM)),
        "actions": rng.uniform(-0.9, 0.9, size=(BATCH_SIZE, ACTION_DIM)),
        **{name: rng.normal(size=BATCH_SIZE) for name in ("rewards", "returns_to_go")},
        **{name: np.zeros(BATCH_SIZE) for name in ("terminateds", "is_offline")},
    }
    return {name: torch.from_numpy(column.astype(np.float32)) for name, column in columns.items()}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    learners = {
        name: make_learner(settings, layer_norm, online=online)
        for name, (settings, layer_norm, online) in KINDS.items()
        if name in options.only
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in learners}
    rng = np.random.default_rng(0)
    with float32_products("fp32"), one_thread_an_operation():
        for turn in range(NUM_WARM_UP + options.turns):
            for name, learner in learners.items():
                batch = random_batch(rng)
                begin = time.perf_counter(), time.process_time()
                learner._uncompiled_update({"default_policy": batch})
                taken = time.perf_counter() - begin[0], time.process_time() - begin[1]
                if turn >= NUM_WARM_UP:
                    seconds[name].append(taken)
    # The mean where few steps cost more than the others, else the median, which a busy moment does not move.
    typical = {
        name: [(statistics.fmean if "20th" in name else statistics.median)(one) for one in zip(*each, strict=True)]
        for name, each in seconds.items()
    }
    wall_of_first, processor_of_first = next(iter(typical.values()))
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for name, (wall, processor) in typical.items():
        print(
            f"{name:28}{1e3 * wall:8.1f} ms, {1e3 * processor:8.1f} ms of processors, "
            f"ratios {wall / wall_of_first:.2f} and {processor / processor_of_first:.2f}"
        )


if __name__ == "__main__":
    main()
