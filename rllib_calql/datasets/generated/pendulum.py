"""Swing-up data of Gymnasium's Pendulum-v1: a scripted controller, mixed with random actions to a varying degree.

The controller pumps energy into the hanging pendulum and balances it with a PD law near the top. Every episode draws
the share of its actions that are uniformly random, from none to all, so the data reach from near-expert to random.

Source:
    Astrom and Furuta 2000, "Swinging up a pendulum by energy control", Automatica 36(2) (energy shaping).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

ENV_ID = "Pendulum-v1"
MAX_TORQUE = 2.0  # gymnasium/envs/classic_control/pendulum.py, `max_torque`; the bound of the action space.
_UPRIGHT_ENERGY = 15.0  # Of E = thdot^2 / 2 + 15 cos(th): with g = 10 and m = l = 1, thddot = 15 sin(th) + 3 u.
_ENERGY_GAIN = 1.0
_BALANCE_ANGLE = 0.4  # rad; beyond it 15 sin(th) exceeds what the full torque, 3 * 2, can hold.
_ANGLE_GAIN = 12.0
_SPEED_GAIN = 3.0
_ACTION_NOISE = 0.1  # Standard deviation on the controller's own actions, so that no state is left without variation.
_REFERENCE_SEED = 20_230_309  # The reference scores depend on the environment only, not on the data's seed.


def swing_up_torque(angle: float, speed: float) -> float:
    """Torque of the scripted controller, within the action bounds.

    Args:
        angle: rad, 0 is upright, in [-pi, pi].
        speed: rad/s.
    """
    if abs(angle) < _BALANCE_ANGLE:
        torque = -_ANGLE_GAIN * angle - _SPEED_GAIN * speed
    else:
        # dE/dt = 3 u thdot. At rest there is no direction to push in, so the sign of 0 counts as positive.
        missing_energy = _UPRIGHT_ENERGY - (0.5 * speed**2 + _UPRIGHT_ENERGY * math.cos(angle))
        torque = _ENERGY_GAIN * missing_energy * math.copysign(max(abs(speed), 1.0), speed)
    return min(MAX_TORQUE, max(-MAX_TORQUE, torque))


def collect(*, num_steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """Plays whole episodes of 200 steps until they hold `num_steps` steps.

    Args:
        num_steps: Least number of steps of all episodes together.
        seed: The same seed gives the same episodes, bit for bit, on one platform.

    Yields:
        One episode of T steps, as the fields of a Minari `EpisodeBuffer`: observations (T + 1, 3), environment actions
        (T, 1) in [-2, 2], float64 rewards, terminations (none), truncations (the last step), the `seed` of the reset.
    """
    rng = np.random.default_rng(seed)
    env, max_steps = _make_env()
    try:
        while num_steps > 0:
            env_seed = int(rng.integers(2**31))
            first_obs, _ = env.reset(seed=env_seed)
            share = rng.random()
            episode = _play(env, first_obs, rng, random_share=share, action_noise=_ACTION_NOISE, num_steps=max_steps)
            yield {**episode, "seed": env_seed}
            num_steps -= max_steps
    finally:
        env.close()


def reference_scores(*, num_episodes: int) -> tuple[float, float]:
    """Mean return of uniform random actions, and of the controller without noise.

    Args:
        num_episodes: Episodes per score.
    """
    rng = np.random.default_rng(_REFERENCE_SEED)
    env, max_steps = _make_env()
    scores = []
    try:
        for random_share in (1.0, 0.0):
            returns = []
            for episode_index in range(num_episodes):
                first_obs, _ = env.reset(seed=_REFERENCE_SEED + episode_index)
                episode = _play(env, first_obs, rng, random_share=random_share, action_noise=0.0, num_steps=max_steps)
                returns.append(episode["rewards"].sum())
            scores.append(float(np.mean(returns)))
    finally:
        env.close()
    return scores[0], scores[1]


def _make_env() -> tuple[Any, int]:
    """The bare environment (its attributes are not part of `gymnasium.Env`) and its time limit in steps."""
    env = gym.make(ENV_ID)
    assert env.spec is not None
    assert env.spec.max_episode_steps is not None
    return env.unwrapped, env.spec.max_episode_steps


def _play(
    env: Any,
    first_obs: npt.NDArray[np.float32],
    rng: np.random.Generator,
    *,
    random_share: float,
    action_noise: float,
    num_steps: int,
) -> dict[str, Any]:
    """Plays a freshly reset environment for `num_steps` steps."""
    is_random = rng.random(num_steps) < random_share
    random_actions = rng.uniform(-MAX_TORQUE, MAX_TORQUE, num_steps)
    noise = rng.normal(scale=action_noise, size=num_steps)
    observations = np.empty((num_steps + 1, 3), dtype=np.float32)
    observations[0] = first_obs
    actions = np.empty((num_steps, 1), dtype=np.float32)
    rewards = np.empty(num_steps)
    for step in range(num_steps):
        angle, speed = env.state.tolist()
        wrapped_angle = math.remainder(angle, 2 * math.pi)
        action = random_actions[step] if is_random[step] else swing_up_torque(wrapped_angle, speed) + noise[step]
        actions[step] = min(MAX_TORQUE, max(-MAX_TORQUE, action))
        observations[step + 1], rewards[step], _, _, _ = env.step(actions[step])
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "terminations": np.zeros(num_steps, dtype=bool),
        "truncations": np.arange(num_steps) == num_steps - 1,
    }
