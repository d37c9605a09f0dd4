"""An environment that writes every step to a file, and fails on demand."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rllib_calql import CalQLConfig

Step = tuple[float, float]  # Episode number and time step: unique for every step.


class LoggedEnv(gym.Env):  # type: ignore[type-arg]
    """Observation: a random number of the episode, and the time step. It notices nothing of the action.

    Config: `folder` for the logs, one file per process; `lengths` to draw an episode's length from; `step_s`, seconds
    of a step; `fault`, what happens in step 2 of an episode ("raise", "hang" or "nan"), for the first `num_faults`
    episodes of all processes together.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.config = config
        self.folder = Path(config["folder"])
        self.log = (self.folder / f"{os.getpid()}.steps").open("a", buffering=1)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Draws number and length of the episode."""
        super().reset(seed=seed)
        self.t = 0
        self.number = int(self.np_random.integers(2**24))
        self.length = int(self.np_random.choice(self.config["lengths"]))
        return np.array([self.number, 0], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Writes the step, then waits or fails if it is told to."""
        time.sleep(self.config.get("step_s", 0.0))
        self.t += 1
        obs = np.array([self.number, self.t], np.float32)
        if self.t == 2 and self._fault_is_due():
            if self.config["fault"] == "raise":
                raise ValueError("the gripper is stuck")
            if self.config["fault"] == "hang":
                time.sleep(600.0)
            obs[1] = np.nan
        is_over = self.t >= self.length
        self.log.write(f"{self.number} {self.t - 1} {float(action[0])} {is_over:d}\n")
        return obs, 0.0, is_over, False, {}

    def _fault_is_due(self) -> bool:
        if "fault" not in self.config:
            return False
        for number in range(self.config["num_faults"]):
            try:
                (self.folder / f"fault-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False


def logged_episodes(folder: Path) -> dict[str, list[list[Step]]]:
    """Finished episodes of every process, by its file, in the order of their ends."""
    finished: dict[str, list[list[Step]]] = {}
    for path in sorted(folder.glob("*.steps")):
        finished[path.stem] = []
        under_way: dict[str, list[Step]] = defaultdict(list)
        for line in path.read_text().splitlines():
            fields = line.split()
            if len(fields) != 4:
                continue  # The process was killed while it wrote.
            number, t, _, is_over = fields
            under_way[number].append((float(number), float(t)))
            if is_over == "1":
                finished[path.stem].append(under_way.pop(number))
    return finished


def logged_actions(folder: Path) -> dict[Step, float]:
    """The action of every step, finished episode or not."""
    rows = [line.split() for path in folder.glob("*.steps") for line in path.read_text().splitlines()]
    return {(float(row[0]), float(row[1])): float(row[2]) for row in rows if len(row) == 4}


def stored_steps(algo: Any) -> list[Step]:
    """Steps in the online store, in its order."""
    return [(float(number), float(t)) for number, t in algo.store.online_column("obs")]


def stored_actions(algo: Any) -> dict[Step, float]:
    """The action of every step in the online store."""
    return dict(zip(stored_steps(algo), algo.store.online_column("actions")[:, 0].tolist(), strict=True))


def logged_config(
    folder: Path,
    *,
    num_env_runners: int,
    num_envs: int = 1,
    updates_per_env_step: float = 0.05,
    num_cpus_per_env_runner: float = 0.5,
    **env_config: Any,
) -> CalQLConfig:
    """A tiny config without offline data on `LoggedEnv`."""
    folder.mkdir(exist_ok=True)
    config: CalQLConfig = (
        CalQLConfig()
        .environment(LoggedEnv, env_config={"folder": str(folder), "lengths": [5], **env_config})
        .env_runners(
            num_env_runners=num_env_runners,
            num_envs_per_env_runner=num_envs,
            num_cpus_per_env_runner=num_cpus_per_env_runner,
        )
        .training(num_actions=2, train_batch_size_per_learner=4)
        .rl_module(model_config={"actor_hiddens": [8], "critic_hiddens": [8]})
        .fine_tuning(warmup_env_steps=0, updates_per_env_step=updates_per_env_step)
        .debugging(seed=0)
    )
    return config
