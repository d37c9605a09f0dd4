"""What float32, the type of batches, leaves of numbers that lie far from 0: clocks, coordinates, counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from rllib_calql.common.encoding import flat_names
from rllib_calql.common.scales import LOSSY, ROUNDING, is_nearly_constant
from rllib_calql.common.spaces import leaves_of
from rllib_calql.datasets.report.summary import DatasetReport, is_wide

Array = npt.NDArray[Any]

_NOISE_OF_DOUBLES = 1e-12  # A spread below it, relative, comes from computing a constant in different ways.
# Numbers of about 1 that hardly move are joints at their stops and norms of quaternions: nothing is lost with them.
_ORDINARY, _HARDLY = 10.0, 1e-5
_MOST_NAMED = 8

REMEDY = (
    "subtract a fixed offset, and scale what is left to about 1, in the environment (for example with "
    "`gymnasium.wrappers.TransformObservation`) and in the data"
)


def check_resolution(
    report: DatasetReport,
    space: gym.Space[Any],
    statistics: Callable[[], tuple[Array, Array]],
    *,
    is_normalized: bool,
    warn: Callable[[str], None],
) -> None:
    """Refuses observations that float32 cannot tell apart where they are normalised, and warns elsewhere.

    A dimension counts if rounding moves it by more than a hundredth of its standard deviation.

    Args:
        report: Holds the ranges of observations in wide types.
        space: The environment's observation space, before flattening.
        statistics: Computes mean and standard deviation of flat observations; called only for numbers far from 0.
        is_normalized: Whether the mean is subtracted and the deviation divided by, in float32.
        warn: Takes a warning, a sentence without its end.

    Raises:
        ValueError: Naming the first such dimension, its mean and deviation.
    """
    suspects = list(_suspects(report, space))
    if not suspects:
        return
    means, stds = statistics()
    for name, index, largest in suspects:
        mean, std, rounding = float(means[index]), float(stds[index]), largest * ROUNDING
        if rounding <= LOSSY * std:
            continue
        text = (
            f"observations{name} lie around {mean:.9g} with a standard deviation of {std:.2g}, and float32, which "
            f"training computes in, rounds them by up to {rounding:.2g}"
        )
        if is_normalized and not _is_minor(largest, std):
            names = ", ".join(map(repr, report.names))
            raise ValueError(
                f"Dataset {names}: {text}, so `normalize_observations` would leave little of them; {REMEDY}."
            )
        warn(f"{text}; if that matters, {REMEDY}")


def _suspects(report: DatasetReport, space: gym.Space[Any]) -> Iterator[tuple[str, int, float]]:
    """Name, place in flat observations and largest number of dimensions that may have lost something."""
    places, place = {"": 0}, 0
    for path, leaf in leaves_of(space):
        places[path] = place
        place += gym.spaces.utils.flatdim(leaf)
    for info in report.observations:
        if not any(is_wide(np.dtype(name)) for name in info.dtype.split(" and ")):
            continue
        low, high = np.array(info.low), np.array(info.high)
        # Of n numbers with a spread, the deviation is the spread / sqrt(2 n) at least.
        least_std = (high - low) / np.sqrt(2.0 * report.num_transitions)
        largest = np.maximum(np.abs(low), np.abs(high))
        found = (largest * ROUNDING > LOSSY * least_std) & (high - low > _NOISE_OF_DOUBLES * largest)
        for dimension in np.flatnonzero(found).tolist():
            name = f" {info.path!r}" if info.path else ""
            yield f"{name}, dimension {dimension},", places[info.path] + dimension, float(largest[dimension])


def remark_on_constants(space: gym.Space[Any], mean: Array, std: Array) -> str | None:
    """Which observations `normalize_observations` cannot scale, since the data hold one number for them.

    Args:
        space: The environment's observation space, before flattening.
        mean: Of the flat observations, shape (n,).
        std: Their standard deviation, shape (n,).

    Returns:
        A sentence that names them; None if there is none.
    """
    constant = np.flatnonzero(is_nearly_constant(mean, std)).tolist()
    if not constant:
        return None
    names = flat_names(space)
    shown = [f"{names[place]} (always {mean[place]:.6g})" for place in constant[:_MOST_NAMED]]
    others = len(constant) - len(shown)
    what = ", ".join(shown) + (f" and {others} more" if others else "")
    return (
        f"observations {what} are constant in the data as far as float32 can tell, so `normalize_observations` "
        "subtracts their mean and divides by 1; what to do where they vary cannot be learned from these data"
    )


def remark_on_rewards(lowest: float, highest: float) -> str | None:
    """What float32 loses of training rewards in [lowest, highest]; None if that is nothing."""
    rounding = max(abs(lowest), abs(highest)) * ROUNDING
    if not 0.0 < LOSSY * abs(highest - lowest) < rounding:
        return None
    return (
        f"training rewards lie between {lowest:.9g} and {highest:.9g}, and float32 rounds them by up to {rounding:.2g}"
        "; subtract an offset by `reward_bias`"
    )


def remark_on_resolution(observations: Array) -> str | None:
    """What float32 loses of one episode's observations.

    Args:
        observations: Flat, as the environment made them, shape (T + 1, n).

    Returns:
        A sentence without its end that names the first dimension; None if nothing is lost.
    """
    if not is_wide(observations.dtype):
        return None
    low, high = (extreme.astype(np.float64) for extreme in (observations.min(axis=0), observations.max(axis=0)))
    largest = np.maximum(np.abs(low), np.abs(high))
    suspects = (largest * ROUNDING > LOSSY * (high - low) / np.sqrt(2.0 * len(observations))) & (
        high - low > _NOISE_OF_DOUBLES * largest
    )
    for dimension in np.flatnonzero(suspects).tolist():
        std, rounding = float(observations[:, dimension].astype(np.float64).std()), largest[dimension] * ROUNDING
        if rounding > LOSSY * std and not _is_minor(largest[dimension], std):
            return (
                f"Observations of the environment, dimension {dimension}, lie around {low[dimension]:.9g} and vary by "
                f"{std:.2g} in an episode, and float32, which training computes in, rounds them by up to {rounding:.2g}"
            )
    return None


def _is_minor(largest: float, std: float) -> bool:
    return largest < _ORDINARY and std < _HARDLY
