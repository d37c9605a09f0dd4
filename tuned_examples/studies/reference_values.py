"""Writes the demonstrations of PointMaze UMaze with other reference values, as columns of a file in the current folder.

`python tuned_examples/studies/reference_values.py`, then `rllib study tuned_examples/studies/reference_values.yaml`.

The columns: `raised` and `lowered`, the Monte-Carlo returns-to-go, which lie between 0 and 100, 25 higher and lower;
`noisy`, the same with Gaussian noise of standard deviation 25 at each step.
"""

from __future__ import annotations

import minari
import numpy as np

from rllib_calql.common.returns import RewardSettings, returns_to_go
from rllib_calql.datasets import ensure_dataset

DATASET = "rllib-calql/pointmaze-umaze-demos-v0"
FILE = "pointmaze_umaze_demos_references.npz"
REWARDS = RewardSettings(gamma=0.99, reward_scale=100.0, failure_reward=0.0)  # Of pointmaze_umaze_demos.yaml.
SHIFT = 25.0

ensure_dataset(DATASET)
columns: dict[str, list[np.ndarray]] = {}
returns_of_episodes = []
for episode in minari.load_dataset(DATASET).iterate_episodes():
    obs = np.concatenate([episode.observations[key] for key in sorted(episode.observations)], axis=1)
    is_success = bool(episode.terminations[-1])
    returns_of_episodes.append(returns_to_go(episode.rewards, terminated=is_success, settings=REWARDS))
    for name, column in {
        "observations": obs[:-1],
        "next_observations": obs[1:],
        "actions": episode.actions,
        "rewards": episode.rewards,
        "terminals": episode.terminations,
        "timeouts": episode.truncations,
    }.items():
        columns.setdefault(name, []).append(column)
table = {name: np.concatenate(parts) for name, parts in columns.items()}
returns = np.concatenate(returns_of_episodes)
table["raised"] = returns + SHIFT
table["lowered"] = returns - SHIFT
table["noisy"] = returns + np.random.default_rng(0).normal(scale=SHIFT, size=len(returns))
np.savez_compressed(FILE, **table)
print(f"Wrote {FILE}: {len(returns):,} steps, returns {returns.min():.1f} to {returns.max():.1f}.")
