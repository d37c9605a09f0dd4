"""A control loop on the line of `tiny.LineEnv`, as a program that can import neither Ray, torch nor Gymnasium.

    python line_client.py ADDRESS NUM_EPISODES LOG

It ends after so many episodes. Of each that the run has stored it appends the number of steps to LOG, a line each.
"""

from __future__ import annotations

import sys
from pathlib import Path


class Blocker:
    """Finds no Ray, torch and Gymnasium, whether they are installed or not."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """For the import system."""
        if name.split(".")[0] in ("ray", "torch", "gymnasium"):
            raise ImportError(f"{name} is not to be imported here")


sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]

import numpy as np  # noqa: E402

from rllib_calql import PolicyClient  # noqa: E402


def main(address: str, num_episodes: int, log: Path) -> None:
    """Plays episodes."""
    rng = np.random.default_rng()
    with PolicyClient(address) as client:
        for _ in range(num_episodes):
            client.wait()
            x, t = np.array([rng.uniform(-1.0, 1.0)], np.float32), 0
            client.reset(x)
            terminated = truncated = False
            while not (terminated or truncated):
                action = client.act(x)
                x, t = (x + np.clip(action, -2.0, 2.0)).astype(np.float32), t + 1
                terminated, truncated = bool(abs(x[0]) >= 6.0), t >= 20
                client.step(action, 0.0 if terminated else -1.0, terminated, truncated, x, info={"success": terminated})
            client.flush()
            with log.open("a") as stream:
                stream.write(f"{t}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
