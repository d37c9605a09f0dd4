"""An environment that raises where it is told to, in a module of its own that processes of Ray can import."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class ServoError(Exception):
    """An error that cannot be copied: its constructor takes other arguments than it keeps."""

    def __init__(self, number: int, *, unit: str) -> None:
        super().__init__(f"servo {number} of {unit}")


class BrokenEnv(gym.Env):  # type: ignore[type-arg]
    """Episodes of five steps. `where` is "init", "spaces", "reset" or "step", `error` "plain", "odd" or "empty"."""

    def __init__(self, config: dict[str, Any] | None = None, **settings: Any) -> None:
        self.settings = {"where": "nowhere", "error": "plain", **(config or {}), **settings}
        if self.settings["where"] != "spaces":
            self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._fail("init")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins."""
        super().reset(seed=seed)
        self.t = 0
        self._fail("reset")
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The third one fails, if any."""
        self.t += 1
        if self.t == 3:
            self._fail("step")
        return np.zeros(2, np.float32), 0.5, False, self.t == 5, {}

    def _fail(self, where: str) -> None:
        if where != self.settings["where"]:
            return
        if self.settings["error"] == "odd":
            raise ServoError(7, unit="arm")
        if self.settings["error"] == "empty":
            raise AssertionError
        raise ValueError("the gripper is stuck")


if "Broken-v0" not in gym.registry:
    gym.register("Broken-v0", entry_point="broken_env:BrokenEnv")
