"""Rewards and Monte-Carlo returns-to-go of whole episodes: NumPy and SciPy, no Ray.

Source:
    Nakamoto et al. 2023, arXiv:2303.05479, section 5 (reference value from returns) and the authors' released
    `calc_return_to_go` (failure rule for sparse rewards).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

TRUNCATION_RULES = ("none", "steady", "bootstrap")
_FAILURE_TOLERANCE = 1e-6  # Relative. Rewards that were stored as float32 differ from the setting by about 6e-8.

Float64Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


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
        """Training reward of environment rewards, `reward_scale * r + reward_bias`, in float64, maybe infinite."""
        with np.errstate(over="ignore"):
            return np.asarray(rewards, dtype=np.float64) * self.reward_scale + self.reward_bias

    def endless_return(self, reward: float) -> float:
        """Return of a reward (environment units) that goes on for ever.

        Raises:
            ValueError: If `gamma` is 1.
        """
        return float(self.transform(np.float64(reward))) * _endless(self.gamma, "failure_reward")

    def __str__(self) -> str:
        """What training rewards and returns are made by, for messages."""
        names = ("reward_scale", "reward_bias", "gamma", "truncation")
        return ", ".join(f"`{name}` {getattr(self, name)!r}" for name in names)


def reward_settings(config: Any) -> RewardSettings:
    """Those of a `CalQLConfig`."""
    return RewardSettings(**{field.name: getattr(config, field.name) for field in fields(RewardSettings)})


def is_failure(rewards: npt.NDArray[Any], failure_reward: float) -> bool:
    """Whether **all** rewards of an episode (environment units) equal the failure reward, to float32 accuracy."""
    values = np.asarray(rewards)
    return values.size > 0 and bool(failed_episodes(values, np.array([values.size]), failure_reward)[0])


def failure_tolerance(dtype: np.dtype[Any]) -> float:
    """Relative difference within which rewards of a type count as the failure reward: float16 rounds by 5e-4."""
    is_coarse = dtype.kind == "f" and dtype.itemsize < 4
    return float(np.finfo(dtype).eps) if is_coarse else _FAILURE_TOLERANCE


def failed_episodes(rewards: npt.NDArray[Any], lengths: npt.NDArray[Any], failure_reward: float) -> Bools:
    """Which of some episodes, one after another, have nothing but the failure reward, to float32 accuracy.

    Args:
        rewards: Environment rewards of E whole episodes, shape (R,).
        lengths: Steps of each episode, at least 1, shape (E,).
        failure_reward: In environment units.

    Returns:
        Shape (E,).
    """
    values = np.asarray(rewards)
    fails = np.isclose(
        values.astype(np.float64, copy=False), failure_reward, rtol=failure_tolerance(values.dtype), atol=0.0
    )
    return np.asarray(np.logical_and.reduceat(fails, _starts(lengths)))


def discounted_sums(
    rewards: npt.NDArray[Any], lengths: npt.NDArray[Any], gamma: float, tails: npt.NDArray[Any] | float = 0.0
) -> Float64Array:
    """Backward recursion `G_t = r_t + gamma * G_{t+1}` within each episode, a tail standing for the G after its end.

    The recursion is the filter y_n = x_n + gamma * y_{n-1} over reversed time. Episodes of one length are filtered
    together, so that the number of calls grows with the number of different lengths, at most sqrt(2 R), and neither
    with the number of episodes nor with their steps.

    Args:
        rewards: Training rewards of E whole episodes, one after another, shape (R,).
        lengths: Steps of each episode, at least 1, shape (E,).
        gamma: Discount, in [0, 1].
        tails: Return expected after the last step of each episode, shape (E,) or one number.

    Returns:
        G, shape (R,), float64.
    """
    from scipy.signal import lfilter  # Slow to import, and needed only once there are data.

    values = np.asarray(rewards, dtype=np.float64)
    following = gamma * np.broadcast_to(np.asarray(tails, dtype=np.float64), np.shape(lengths))
    starts = _starts(lengths)
    sums = np.empty_like(values)
    for length in np.unique(lengths):
        episodes = np.flatnonzero(lengths == length)
        rows = starts[episodes, None] + np.arange(length)
        backwards, _ = lfilter([1.0], [1.0, -gamma], values[rows][:, ::-1], axis=1, zi=following[episodes, None])
        sums[rows] = backwards[:, ::-1]
    return sums


def returns_to_go(
    rewards: npt.NDArray[Any],
    *,
    terminated: bool,
    settings: RewardSettings,
    last_value: float | None = None,
) -> npt.NDArray[np.float32]:
    """Monte-Carlo return-to-go of every step of one whole episode; see `returns_of_episodes`.

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
    last_values = None if last_value is None else np.array([last_value])
    returns, _ = returns_of_episodes(
        rewards,
        np.array([len(rewards)]),
        terminateds=np.array([terminated]),
        settings=settings,
        last_values=last_values,
    )
    return returns


def returns_of_episodes(
    rewards: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    *,
    terminateds: npt.NDArray[Any],
    settings: RewardSettings,
    last_values: npt.NDArray[Any] | None = None,
) -> tuple[npt.NDArray[np.float32], Bools]:
    """Monte-Carlo return-to-go of every step of whole episodes, one after another.

    The three rules for an episode that was cut rather than terminated, and when each is a lower bound of the policy's
    value (the safe side: a too low reference calibrates less, a too high one raises Q without evidence):

    * "none": nothing follows. A lower bound if no later reward could be negative, else it may be too high.
    * "steady": the last reward goes on for ever. A lower bound if the last state's reward never gets worse.
    * "bootstrap": the last value follows. As good as that estimate.

    Args:
        rewards: Rewards in environment units of E whole episodes, shape (R,), never slices of them.
        lengths: Steps of each episode, at least 1, shape (E,).
        terminateds: Whether each episode ended by termination (a terminal state has no future), shape (E,).
        settings: Scaling and rules.
        last_values: Value estimate of each last observation in training-reward units, shape (E,); for "bootstrap".

    Returns:
        Returns-to-go in training-reward units, shape (R,), computed in float64, stored as float32, infinite where that
        cannot hold them; and which episodes the last value enters, shape (E,).

    Raises:
        ValueError: If "bootstrap" is asked for without `last_values`, or an endless sum does not converge (gamma = 1).
    """
    scaled = settings.transform(rewards)
    lengths = np.asarray(lengths, dtype=np.int64)
    cut = ~np.asarray(terminateds, dtype=bool)
    failed = np.zeros(len(lengths), dtype=bool)
    if settings.failure_reward is not None and len(lengths):
        failed = failed_episodes(rewards, lengths, settings.failure_reward)
    tails = np.zeros(len(lengths))
    has_value = np.zeros(len(lengths), dtype=bool)
    if settings.truncation == "steady" and cut.any():
        # r / (1 - gamma) for the last step itself means that the same value follows it.
        tails[cut] = scaled[np.cumsum(lengths)[cut] - 1] * _endless(settings.gamma, "truncation")
    elif settings.truncation == "bootstrap":
        has_value = cut & ~failed
        if last_values is None and has_value.any():
            raise ValueError('`truncation="bootstrap"` needs the value of the last observation, got None.')
        tails[has_value] = 0.0 if last_values is None else np.asarray(last_values)[has_value]
    with np.errstate(over="ignore", invalid="ignore"):
        returns = discounted_sums(scaled, lengths, settings.gamma, tails).astype(np.float32)
        if failed.any():
            assert settings.failure_reward is not None
            returns[np.repeat(failed, lengths)] = settings.endless_return(settings.failure_reward)
    return returns, has_value


def possible_returns(
    returns: npt.NDArray[Any],
    rewards: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    terminateds: npt.NDArray[Any],
    gamma: float,
) -> tuple[float, float]:
    """Least and largest return that whole episodes, one after another, let one expect of a state.

    These are their returns, and what follows the end of a cut episode if it goes on as it was on average: the target
    bootstraps there, whatever the truncation rule adds to the returns.

    Args:
        returns: Returns-to-go, shape (R,), R at least 1.
        rewards: Training rewards, shape (R,).
        lengths: Steps of each episode, shape (E,).
        terminateds: Whether each episode ended by termination, shape (E,).
        gamma: Discount, in [0, 1].
    """
    low, high = float(np.min(returns)), float(np.max(returns))
    cut = ~np.asarray(terminateds, dtype=bool)
    if cut.any():
        sums = np.add.reduceat(np.asarray(rewards, dtype=np.float64), _starts(lengths))
        tails = (sums / lengths)[cut] * horizon(gamma)
        low, high = min(low, float(tails.min())), max(high, float(tails.max()))
    return low, high


def horizon(gamma: float) -> float:
    """Steps that an endless sum of rewards amounts to, 1 / (1 - gamma), at most 10,000."""
    return min(1.0 / max(1.0 - gamma, 1e-12), 1e4)


def tail_discounts(num_steps: int, gamma: float) -> npt.NDArray[np.float32]:
    """Weight gamma^(T-t) of the last observation's value in the return of each step t = 0 .. T-1, shape (T,)."""
    return (gamma ** np.arange(num_steps, 0, -1, dtype=np.float64)).astype(np.float32)


def is_endless(gamma: float) -> bool:
    """Whether the sum of 1 + gamma + gamma^2 + ... has no value that means anything."""
    return math.isclose(gamma, 1.0) or gamma > 1.0


def _starts(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """First row of each episode."""
    return np.cumsum(lengths, dtype=np.int64) - np.asarray(lengths, dtype=np.int64)


def _endless(gamma: float, setting: str) -> float:
    """Sum of 1 + gamma + gamma^2 + ..."""
    if is_endless(gamma):
        raise ValueError(f"`{setting}` sums rewards for ever, which needs `gamma` < 1, got {gamma}.")
    return 1.0 / (1.0 - gamma)
