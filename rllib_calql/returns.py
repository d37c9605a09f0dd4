"""Rewards and Monte-Carlo returns-to-go of whole episodes: pure NumPy, no Ray.

Source:
    Nakamoto et al. 2023, arXiv:2303.05479, section 5 (reference value from returns) and the authors' released
    `calc_return_to_go` (failure rule for sparse rewards).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

TRUNCATION_RULES = ("none", "steady", "bootstrap")
_FAILURE_TOLERANCE = 1e-6  # Relative. Rewards that were stored as float32 differ from the setting by about 6e-8.

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RewardSettings:
    """How rewards and returns are computed, the same for offline and online episodes.

    Attributes:
        gamma: Discount, in [0, 1].
        reward_scale: Factor on the environment's reward.
        reward_bias: Added after scaling.
        failure_reward: Reward (environment units) of every step of a failed episode in a sparse-reward task, or None.
        truncation: What follows the last step of an episode that was cut, one of `TRUNCATION_RULES`.
    """

    gamma: float
    reward_scale: float = 1.0
    reward_bias: float = 0.0
    failure_reward: float | None = None
    truncation: str = "none"

    def transform(self, rewards: npt.NDArray[Any]) -> Float64Array:
        """Training reward of environment rewards, `reward_scale * r + reward_bias`, in float64."""
        return np.asarray(rewards, dtype=np.float64) * self.reward_scale + self.reward_bias


def is_failure(rewards: npt.NDArray[Any], failure_reward: float) -> bool:
    """Whether **all** rewards of an episode (environment units) equal the failure reward, to float32 accuracy."""
    values = np.asarray(rewards, dtype=np.float64)
    return bool(values.size > 0 and np.allclose(values, failure_reward, rtol=_FAILURE_TOLERANCE, atol=0.0))


def discounted_sums(rewards: npt.NDArray[Any], gamma: float, tail: float = 0.0) -> Float64Array:
    """Backward recursion `G_t = r_t + gamma * G_{t+1}` of one episode, `tail` standing for the G after the last step.

    Args:
        rewards: Training rewards of one whole episode, shape (T,).
        gamma: Discount, in [0, 1].
        tail: Return expected after the last step.

    Returns:
        G, shape (T,), float64.
    """
    backwards = np.asarray(rewards, dtype=np.float64)[::-1].tolist()
    sums = accumulate(backwards, lambda following, reward: reward + gamma * following, initial=float(tail))
    return np.fromiter(sums, dtype=np.float64, count=len(backwards) + 1)[:0:-1]


def returns_to_go(
    rewards: npt.NDArray[Any],
    *,
    terminated: bool,
    settings: RewardSettings,
    last_value: float | None = None,
) -> npt.NDArray[np.float32]:
    """Monte-Carlo return-to-go of every step of one whole episode.

    The three rules for an episode that was cut rather than terminated, and when each is a lower bound of the policy's
    value (the safe side: a too low reference calibrates less, a too high one raises Q without evidence):

    * "none": nothing follows. A lower bound if no later reward could be negative, else it may be too high.
    * "steady": the last reward goes on for ever. A lower bound if the last state's reward never gets worse.
    * "bootstrap": `last_value` follows. As good as that estimate.

    Args:
        rewards: Rewards in environment units, shape (T,), the whole episode and never a slice of it.
        terminated: Whether the episode ended by termination (a terminal state has no future).
        settings: Scaling and rules.
        last_value: Value estimate of the last observation in training-reward units; needed for "bootstrap".

    Returns:
        Returns-to-go in training-reward units, shape (T,), computed in float64, stored as float32.

    Raises:
        ValueError: If "bootstrap" is asked for without `last_value`, or an endless sum does not converge (gamma = 1).
    """
    if settings.failure_reward is not None and is_failure(rewards, settings.failure_reward):
        failed = float(settings.transform(np.float64(settings.failure_reward)))
        return np.full(len(rewards), failed * _endless(settings.gamma, "failure_reward"), dtype=np.float32)
    scaled = settings.transform(rewards)
    tail = 0.0
    if not terminated and settings.truncation == "steady":
        # r / (1 - gamma) for the last step itself means that the same value follows it.
        tail = float(scaled[-1]) * _endless(settings.gamma, "truncation")
    elif not terminated and settings.truncation == "bootstrap":
        if last_value is None:
            raise ValueError('`truncation="bootstrap"` needs the value of the last observation, got None.')
        tail = last_value
    return discounted_sums(scaled, settings.gamma, tail).astype(np.float32)


def tail_discounts(num_steps: int, gamma: float) -> npt.NDArray[np.float32]:
    """Weight gamma^(T-t) of the last observation's value in the return of each step t = 0 .. T-1, shape (T,)."""
    return (gamma ** np.arange(num_steps, 0, -1, dtype=np.float64)).astype(np.float32)


def _endless(gamma: float, setting: str) -> float:
    """Sum of 1 + gamma + gamma^2 + ..."""
    if math.isclose(gamma, 1.0) or gamma > 1.0:
        raise ValueError(f"`{setting}` sums rewards for ever, which needs `gamma` < 1, got {gamma}.")
    return 1.0 / (1.0 - gamma)
