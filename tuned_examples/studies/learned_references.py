"""The data of the study of reference values: PointMaze UMaze with sticky actions, and returns-to-go with noise.

`python tuned_examples/studies/learned_references.py`, then `rllib study tuned_examples/studies/learned_references.yaml`
in the same folder.

`StickyUMaze` is the evaluation environment of PointMaze UMaze in which every step repeats the action before it with
probability 0.95, in place of the one that was asked for (Machado et al. 2018, section 5.2). One drive to the goal then
takes much longer than the next, and so single returns of one state differ. Its data are demonstrations as those of
`rllib-calql/pointmaze-umaze-demos-v0`: a controller drives from the start to the goal with a little noise.

The files, of all three tasks, have a column `noisy`: the Monte-Carlo returns-to-go, which lie between 0 and 100, with
Gaussian noise of standard deviation 25 at each step.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import gymnasium_robotics  # noqa: F401 - registers the environment.
import minari
import numpy as np
from gymnasium.wrappers import StickyAction

from rllib_calql.common.returns import RewardSettings, returns_to_go
from rllib_calql.datasets import ensure_dataset, record
from rllib_calql.datasets.generated.pointmaze import MAZES, next_cells
from rllib_calql.datasets.pointmaze import evaluation_env_config

REPEAT_PROBABILITY = 0.95
NOISE = 25.0
NUM_DRIVES = 100
STICKY = "rllib-calql-studies/pointmaze-umaze-sticky-demos-v0"
# Of the tasks' experiment files.
DEMONSTRATIONS = RewardSettings(gamma=0.99, reward_scale=100.0, failure_reward=0.0)
MEDIUM = RewardSettings(gamma=0.985, reward_scale=100.0, failure_reward=0.0)


class StickyUMaze(gym.Wrapper):  # type: ignore[type-arg]
    """PointMaze UMaze whose actions stick."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        env = gym.make("PointMaze_UMaze-v3", **evaluation_env_config("umaze"))
        super().__init__(StickyAction(env, repeat_action_probability=REPEAT_PROBABILITY))


class Driver:
    """A PD controller from cell to cell on the shortest way to the goal, with Gaussian noise."""

    gain, damping, noise = 1.5, 0.5, 0.1

    def __init__(self, seed: int) -> None:
        self.maze = MAZES["umaze"]
        (self.goal_cell,) = self.maze.cells("g")
        self.way = next_cells(self.maze, self.goal_cell)
        self.rng = np.random.default_rng(seed)

    def __call__(self, obs: dict[str, Any]) -> np.ndarray:
        """The action for an observation of PointMaze."""
        position, velocity = obs["observation"][:2], obs["observation"][2:]
        cell = self.maze.cell_at(tuple(position))
        target = obs["desired_goal"] if cell == self.goal_cell else np.asarray(self.maze.centre(self.way[cell]))
        action = self.gain * (target - position) - self.damping * velocity
        return np.clip(action + self.rng.normal(scale=self.noise, size=2), -1.0, 1.0).astype(np.float32)


def write_noisy(dataset_id: str, file: str, rewards: RewardSettings) -> None:
    """Writes a data set of Minari as a file with a column of noisy returns-to-go."""
    columns: dict[str, list[np.ndarray]] = {}
    for episode in minari.load_dataset(dataset_id).iterate_episodes():
        obs = np.concatenate([episode.observations[key] for key in sorted(episode.observations)], axis=1)
        is_success = bool(episode.terminations[-1])
        for name, column in {
            "observations": obs[:-1],
            "next_observations": obs[1:],
            "actions": episode.actions,
            "rewards": episode.rewards,
            "terminals": episode.terminations,
            "timeouts": episode.truncations,
            "noisy": returns_to_go(episode.rewards, terminated=is_success, settings=rewards),
        }.items():
            columns.setdefault(name, []).append(column)
    table = {name: np.concatenate(parts) for name, parts in columns.items()}
    returns = table["noisy"]
    table["noisy"] = returns + np.random.default_rng(0).normal(scale=NOISE, size=len(returns))
    np.savez_compressed(file, **table)
    print(f"Wrote {file}: {len(returns):,} steps, returns {returns.min():.1f} to {returns.max():.1f}.")


def main() -> None:
    """Writes all data of the study."""
    record(Driver(seed=0), StickyUMaze, NUM_DRIVES, f"minari:{STICKY}", seed=0, overwrite=True)
    write_noisy(STICKY, "sticky_noisy.npz", DEMONSTRATIONS)
    for dataset_id, file, rewards in (
        ("rllib-calql/pointmaze-umaze-demos-v0", "demonstrations_noisy.npz", DEMONSTRATIONS),
        ("rllib-calql/pointmaze-medium-play-v0", "medium_noisy.npz", MEDIUM),
    ):
        ensure_dataset(dataset_id)
        write_noisy(dataset_id, file, rewards)


if __name__ == "__main__":
    main()
