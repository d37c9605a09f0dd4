"""What trials amount to: curves, interquartile means, regret, dip, each with an interval over seeds.

Intervals are stratified percentile bootstraps: seeds are drawn anew within each task, which is what a rerun with other
seeds would do. Source of the choice of statistics: Agarwal et al. 2021, arXiv:2108.13264.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import integrate, stats

from rllib_calql.study.evaluations import Evaluation

CONFIDENCE = 0.95
NUM_RESAMPLES = 5_000
_TRIMMED = 0.25  # On either side; what is left is the interquartile mean.

Array = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A statistic with the bounds of its interval, NaN where one seed alone gives none."""

    value: float
    low: float
    high: float


def interquartile_mean(*strata: Array, axis: int = -1) -> Array:
    """Mean of the middle half of all values, along `axis`."""
    trimmed: Array = stats.trim_mean(np.concatenate(strata, axis=axis), _TRIMMED, axis=axis)
    return trimmed


def mean(*strata: Array, axis: int = -1) -> Array:
    """Mean of all values along `axis`."""
    return np.asarray(np.concatenate(strata, axis=axis).mean(axis=axis))


def interval(strata: Sequence[Sequence[float]], statistic: Any = interquartile_mean) -> Interval:
    """A statistic over the seeds of one task, or of several, and its 95 % interval.

    Args:
        strata: Values of the seeds, task by task.
        statistic: `interquartile_mean` or `mean`.
    """
    samples = [np.asarray(values, dtype=np.float64) for values in strata]
    value = float(statistic(*samples))
    low, high = _bounds(samples, statistic)
    return Interval(value, float(low), float(high))


def curve_interval(curves: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Mean over the seeds at each point of a grid, and the bounds of its interval, each of the curves' shape."""
    stacked = np.stack(curves)
    low, high = _bounds([stacked], mean, axis=0)
    return stacked.mean(axis=0), low, high


def _bounds(samples: Sequence[Array], statistic: Any, axis: int = -1) -> tuple[Array, Array]:
    if any(sample.shape[axis] < 2 for sample in samples):
        nothing = np.full(np.delete(samples[0].shape, axis), np.nan)
        return nothing, nothing
    bounds = stats.bootstrap(
        samples,
        statistic,
        axis=axis,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return bounds.low, bounds.high


@dataclass(frozen=True)
class Fate:
    """What became of one trial at and after the switch.

    Attributes:
        at_switch: Score of the last evaluation before the first online env step; None if nothing was learnt before.
        final: Score of the last evaluation.
        regret: 1 - mean score over the online env steps (the area above the curve); None if scores are returns.
        dip: How far the score fell under `at_switch` at worst, at least 0; None without `at_switch`.
        recovered_after: Env steps until the score was back at `at_switch` after its lowest point, 0 without a dip;
            None without `at_switch`, infinite if it never was.
    """

    at_switch: float | None
    final: float
    regret: float | None
    dip: float | None
    recovered_after: float | None


def fate_of(trial: Sequence[Evaluation]) -> Fate:
    """Sums one trial's evaluations up, given in order of time."""
    online = [one for one in trial if one.num_online_env_steps > 0]
    before = [one for one in trial if one.num_online_env_steps == 0]
    begin = before[-1:] or online[:1]
    steps = np.array([one.num_online_env_steps for one in begin + online], dtype=np.float64)
    scores = np.array([one.score for one in begin + online])
    bounded = all(one.success_rate is not None or one.normalized_score is not None for one in trial)
    regret = None
    if online and bounded and steps[-1] > steps[0]:
        regret = 1.0 - float(integrate.trapezoid(scores, steps) / (steps[-1] - steps[0]))
    at_switch = before[-1].score if before and before[-1].num_offline_updates > 0 else None
    dip = recovered_after = None
    if at_switch is not None and online:
        after = np.array([one.score for one in online])
        dip = max(0.0, at_switch - float(after.min()))
        recovered_after = 0.0
        if dip > 0.0:
            back = np.flatnonzero(after[after.argmin() :] >= at_switch)
            lowest = int(after.argmin())
            recovered_after = float(online[lowest + back[0]].num_online_env_steps) if len(back) else math.inf
    return Fate(at_switch, trial[-1].score, regret, dip, recovered_after)


def on_grid(trial: Sequence[Evaluation], grid: Array, *, online: bool, quantity: str = "score") -> Array:
    """A quantity at given times, linear between the evaluations of one phase.

    Args:
        trial: One trial's evaluations in order of time.
        grid: Env steps, or updates of the offline phase.
        online: Which phase. The evaluation at the switch belongs to both.
        quantity: "score" or a column.

    Returns:
        NaN where the trial has no value.
    """
    if online:
        before = [one for one in trial if one.num_online_env_steps == 0]
        phase = before[-1:] + [one for one in trial if one.num_online_env_steps > 0]
        times = [one.num_online_env_steps for one in phase]
    else:
        phase = [one for one in trial if one.num_online_env_steps == 0]
        times = [one.num_offline_updates for one in phase]
    known = [(t, getattr(one, quantity)) for t, one in zip(times, phase, strict=True)]
    known = [(t, value) for t, value in known if value is not None]
    if not known:
        return np.full(len(grid), np.nan)
    at, values = np.array(known, dtype=np.float64).T
    return np.asarray(np.interp(grid, at, values, left=np.nan))
