"""Where the time of an env step goes: one env runner beside a bare loop, and its profile by whose code it is.

    python tests/benchmarks/env_runner.py --env Pendulum-v1
    python tests/benchmarks/env_runner.py --env gymnasium_robotics:PointMaze_UMaze-v3

Both act with the same policy network (256x256), one observation at a time, in turn and on one thread. The profile is by
processor time within each function, of which a package is the sum; the profiler itself makes Python's part look longer.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from rllib_calql import CalQLConfig
from rllib_calql.environments.resolving import resolve_env

OWN = Path(__file__).resolve().parents[2] / "rllib_calql"
PACKAGES = {  # Parts of paths, in their order.
    "this package": (str(OWN),),
    "RLlib": ("/ray/rllib/",),
    "Ray besides": ("/ray/",),
    "torch": ("/torch/", "torch."),
    "the environment": ("/gymnasium", "/mujoco/"),
}


class BareLoop:
    """Policy and environment, and nothing else."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        self._env = env
        self._space: Any = env.action_space
        num_inputs = gym.spaces.flatdim(env.observation_space)
        self._policy = torch.nn.Sequential(
            *(torch.nn.Linear(num_inputs, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU()),
            torch.nn.Linear(256, 2 * self._space.shape[0]),
        )
        self._obs, _ = env.reset(seed=0)

    @torch.no_grad()
    def run(self, num_steps: int) -> None:
        """Steps."""
        space = self._env.observation_space
        for _ in range(num_steps):
            obs = torch.from_numpy(gym.spaces.flatten(space, self._obs).astype(np.float32)).unsqueeze(0)
            mean, log_std = self._policy(obs).chunk(2, dim=-1)
            action = torch.tanh(mean + log_std.clamp(-20.0, 2.0).exp() * torch.randn_like(mean))[0].numpy()
            action = self._space.low + (action + 1.0) * 0.5 * (self._space.high - self._space.low)
            self._obs, _, terminated, truncated, _ = self._env.step(action.astype(np.float32))
            if terminated or truncated:
                self._obs, _ = self._env.reset()


def whose(function: tuple[str, int, str]) -> str:
    """The package of a function of a profile."""
    path = function[0] if function[0] != "~" else function[2]
    return next((name for name, parts in PACKAGES.items() if any(part in path for part in parts)), "Python and NumPy")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--functions", type=int, default=12, help="Lines of the profile.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = CalQLConfig().environment(options.env).env_runners(num_env_runners=0).debugging(seed=0)
    algo = config.build()
    try:
        runner = algo.env_runner
        loop = BareLoop(resolve_env(options.env).make(None))
        seconds: dict[str, list[float]] = {"runner": [], "loop": []}
        for _ in range(options.rounds + 1):  # The first is not counted.
            for name, run in (
                ("runner", lambda n: runner.sample(num_timesteps=n, random_actions=False)),
                ("loop", loop.run),
            ):
                begin = time.process_time()
                run(options.steps)
                seconds[name].append(time.process_time() - begin)
        pairs = [loop / runner for runner, loop in zip(seconds["runner"][1:], seconds["loop"][1:], strict=True)]
        for name, found in seconds.items():
            print(f"{name}: {options.steps / statistics.median(found[1:]):,.0f} env steps per second of processor time")
        print(
            f"the runner has {statistics.median(pairs):.2f} [{min(pairs):.2f}, {max(pairs):.2f}] of the loop's speed\n"
        )
        profile = cProfile.Profile(time.process_time)
        profile.runcall(runner.sample, num_timesteps=options.steps, random_actions=False)
    finally:
        algo.stop()
    stats: Any = pstats.Stats(profile)
    times: dict[str, float] = defaultdict(float)
    for function, (_, _, own_time, _, _) in stats.stats.items():
        times[whose(function)] += own_time
    total = sum(times.values())
    for name, spent in sorted(times.items(), key=lambda item: -item[1]):
        print(f"{name}: {1e6 * spent / options.steps:.0f} us per step, {spent / total:.0%}")
    print("\nthe longest functions, in us per step")
    for function, (_, calls, own_time, _, _) in sorted(stats.stats.items(), key=lambda item: -item[1][2])[
        : options.functions
    ]:
        path = "/".join(Path(function[0]).parts[-2:])
        print(f"{1e6 * own_time / options.steps:7.1f}  {calls / options.steps:5.1f} calls  {path}:{function[2]}")


if __name__ == "__main__":
    main()
