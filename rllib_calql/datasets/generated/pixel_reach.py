"""A point that is driven to a goal and seen only as an image, and data of a controller mixed with random actions.

The smallest task in which a policy has to learn from pixels: both points lie anywhere, one frame says all, NumPy draws
it, so no graphics library is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

IMAGE_SIZE = 32
MAX_EPISODE_STEPS = 40
_STEP = 0.12  # Of a full action, in a square from -1 to 1: about 12 steps across.
_GOAL_DISTANCE = 0.15
_MARGIN = 0.8  # Start and goal lie within, so that both are seen whole.
_RADIUS = 2.5  # Pixels.
_ACTION_NOISE = 0.2
_REFERENCE_SEED = 20_230_309
_REGISTERED_ID = "rllib-calql/PixelReach-v0"

_PIXELS = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2.0 - 1.0

Point = npt.NDArray[np.float64]


def render(position: Point, goal: Point) -> npt.NDArray[np.uint8]:
    """Draws the point in red and the goal in green, shape (32, 32, 3).

    Args:
        position: (x, y) in [-1, 1].
        goal: The same.
    """
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for channel, (x, y) in enumerate((position, goal)):
        distance = np.hypot(_PIXELS[None, :] - x, _PIXELS[:, None] - y) * IMAGE_SIZE / 2.0
        image[:, :, channel] = np.clip((_RADIUS - distance + 0.5) * 255.0, 0.0, 255.0)
    return image


class PixelReach(gym.Env[npt.NDArray[np.uint8], npt.NDArray[np.float32]]):
    """Drive a point to a goal. Reward -1 a step and 0 in the one that reaches the goal, which ends the episode."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.position: Point = np.zeros(2)
        self.goal: Point = np.zeros(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        """Draws start and goal, apart from each other."""
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-_MARGIN, _MARGIN, (2, 2))
        while self._is_there():
            self.goal = self.np_random.uniform(-_MARGIN, _MARGIN, 2)
        return render(self.position, self.goal), {"success": False}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Moves by the action, within the square."""
        move = _STEP * np.clip(action, -1.0, 1.0)
        self.position = np.clip(self.position + move, -1.0, 1.0)
        is_there = self._is_there()
        return render(self.position, self.goal), 0.0 if is_there else -1.0, is_there, False, {"success": is_there}

    def _is_there(self) -> bool:
        return bool(np.hypot(*(self.position - self.goal)) < _GOAL_DISTANCE)


if _REGISTERED_ID not in gym.registry:
    gym.register(id=_REGISTERED_ID, entry_point=f"{__name__}:PixelReach", max_episode_steps=MAX_EPISODE_STEPS)


def evaluation_env_id() -> str:
    """Id of the environment with the module that registers it, for `gymnasium.make` and RLlib's `.environment(...)`."""
    return f"{__name__}:{_REGISTERED_ID}"


def collect(*, num_steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """Plays whole episodes until they hold `num_steps` steps; each has its own share of random actions.

    Args:
        num_steps: Least number of steps of all episodes together.
        seed: The same seed gives the same episodes, bit for bit.

    Yields:
        One episode of T steps, as the fields of a Minari `EpisodeBuffer`: images (T + 1, 32, 32, 3), actions (T, 2),
        rewards, terminations (at the goal), truncations (after 40 steps), the `seed` of the reset.
    """
    rng = np.random.default_rng(seed)
    env = PixelReach()
    while num_steps > 0:
        env_seed = int(rng.integers(2**31))
        episode = _play(env, env_seed, rng, random_share=rng.random(), action_noise=_ACTION_NOISE)
        yield {**episode, "seed": env_seed}
        num_steps -= len(episode["rewards"])


def reference_scores(*, num_episodes: int) -> tuple[float, float]:
    """Mean return of uniform random actions, and of the controller without noise."""
    rng = np.random.default_rng(_REFERENCE_SEED)
    env = PixelReach()
    random, expert = (
        float(
            np.mean(
                [
                    _play(env, _REFERENCE_SEED + number, rng, random_share=share, action_noise=0.0)["rewards"].sum()
                    for number in range(num_episodes)
                ]
            )
        )
        for share in (1.0, 0.0)
    )
    return random, expert


def _play(
    env: PixelReach, seed: int, rng: np.random.Generator, *, random_share: float, action_noise: float
) -> dict[str, Any]:
    observation, _ = env.reset(seed=seed)
    observations: list[Any] = [observation]
    actions: list[Any] = []
    rewards: list[float] = []
    is_there = False
    while not is_there and len(rewards) < MAX_EPISODE_STEPS:
        if rng.random() < random_share:
            wanted = rng.uniform(-1.0, 1.0, 2)
        else:
            wanted = (env.goal - env.position) / _STEP + rng.normal(scale=action_noise, size=2)
        action = np.clip(wanted, -1.0, 1.0).astype(np.float32)
        observation, reward, is_there, _, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
    num_steps = len(rewards)
    is_last = np.arange(num_steps) == num_steps - 1
    return {
        "observations": np.stack(observations),
        "actions": np.stack(actions),
        "rewards": np.array(rewards),
        "terminations": is_last & is_there,
        "truncations": is_last & (not is_there),
    }
