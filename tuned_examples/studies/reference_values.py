"""Writes the demonstrations of PointMaze UMaze with other reference values, as columns of a file in this folder.

`python tuned_examples/studies/reference_values.py`, then `rllib study tuned_examples/studies/reference_values.yaml`.

The columns: `returns`, the Monte-Carlo returns-to-go, which `reference_value: returns_to_go` would give as well;
`raised` and `lowered`, the same 25 higher and lower (returns lie between 0 and 100); `noisy`, the same with Gaussian
noise of standard deviation 25 at each step.
"""

from __future__ import annotations

import minari
import numpy as np

from rllib_calql.datasets import ensure_dataset

DATASET = "rllib-calql/pointmaze-umaze-demos-v0"
FILE = "pointmaze_umaze_demos_references.npz"
REWARD_SCALE, GAMMA = 100.0, 0.99  # Of pointmaze_umaze_demos.yaml.
SHIFT = 25.0

ensure_dataset(DATASET)
columns: dict[str, list[np.ndarray]] = {}
for episode in minari.load_dataset(DATASET).iterate_episodes():
    obs = np.concatenate([episode.observations[key] for key in sorted(episode.observations)], axis=1)
    steps_to_go = np.arange(len(episode.rewards))[::-1]
    for name, column in {
        "observations": obs[:-1],
        "next_observations": obs[1:],
        "actions": episode.actions,
        "rewards": episode.rewards,
        "terminals": episode.terminations,
        "timeouts": episode.truncations,
        "returns": REWARD_SCALE * episode.rewards[-1] * GAMMA**steps_to_go,  # The one reward is the last.
    }.items():
        columns.setdefault(name, []).append(column)
table = {name: np.concatenate(parts) for name, parts in columns.items()}
returns = table["returns"]
table["raised"] = returns + SHIFT
table["lowered"] = returns - SHIFT
table["noisy"] = returns + np.random.default_rng(0).normal(scale=SHIFT, size=len(returns))
np.savez_compressed(FILE, **table)
print(f"Wrote {FILE}: {len(returns):,} steps, returns {returns.min():.1f} to {returns.max():.1f}.")
