"""Files of episodes whose every number is known, as a control loop logs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rllib_calql import EpisodeLog


def write_episode(folder: Path, *, length: int = 3, terminated: bool = True, start: float = 0.0) -> None:
    """Reward 1, 2, ...; executed 0.5, 0.25, ... where 1.0 was asked for; a person acts in the last step."""
    log = EpisodeLog(folder)
    log.reset(np.float32([start]))
    for t in range(1, length + 1):
        ends = t == length
        log.step(
            np.float32([1.0]),
            float(t),
            terminated and ends,
            ends and not terminated,
            np.float32([start + t]),
            executed_action=np.float32([0.5**t]),
            is_intervention=ends,
        )
