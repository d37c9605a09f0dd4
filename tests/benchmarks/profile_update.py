"""Where the time of an update goes: a table of operators, and a trace for chrome://tracing or ui.perfetto.dev.

python tests/benchmarks/profile_update.py --output trace.json
python tests/benchmarks/profile_update.py --precision bf16 --critic-hiddens 256 256 256 256
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from updates import ACTION_DIM, BATCH_SIZE, OBS_DIM

from rllib_calql import CalQLConfig
from rllib_calql.networks.precision import float32_products
from rllib_calql.networks.side_by_side import one_thread_an_operation
from rllib_calql.store.replay import TransitionStore

NUM_WARM_UP = 5


def main() -> None:
    """Profiles the learner's update on random transitions, without Ray."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10, help="Updates that are profiled.")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "medium", "bf16"])
    parser.add_argument("--critic-hiddens", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--rows", type=int, default=25, help="Of the table.")
    parser.add_argument("--output", type=Path, help="Trace file to write.")
    options = parser.parse_args()
    config = CalQLConfig().training(precision=options.precision).debugging(seed=0)
    config.rl_module(model_config={"critic_hiddens": options.critic_hiddens})
    spaces = (gym.spaces.Box(-9.0, 9.0, (OBS_DIM,), np.float32), gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32))
    learner = config.build_learner(spaces={"default_policy": spaces})
    store = TransitionStore(obs_dim=OBS_DIM, action_dim=ACTION_DIM, online_capacity=20_000, seed=0)
    rng = np.random.default_rng(0)
    store.add_online(
        {
            "obs": rng.normal(size=(20_000, OBS_DIM)),
            "new_obs": rng.normal(size=(20_000, OBS_DIM)),
            "actions": rng.uniform(-0.9, 0.9, size=(20_000, ACTION_DIM)),
            **{name: rng.normal(size=20_000) for name in ("rewards", "returns_to_go")},
            "terminateds": np.zeros(20_000),
        }
    )

    def update(num_updates: int) -> None:
        for _ in range(num_updates):
            columns = store.sample(num_batches=1, batch_size=BATCH_SIZE, num_offline_rows=0)
            rows = {name: torch.from_numpy(column).to(learner._device) for name, column in columns.items()}
            learner._uncompiled_update({"default_policy": rows})

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with float32_products(options.precision), one_thread_an_operation():
        update(NUM_WARM_UP)
        with profile(activities=activities) as profiler:
            update(options.updates)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=options.rows))
    print(f"Of {options.updates} updates.")
    if options.output:
        profiler.export_chrome_trace(str(options.output))


if __name__ == "__main__":
    main()
