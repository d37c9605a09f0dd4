"""`Score`: what data say of a policy, each number with its interval and with what is to be known of it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rllib_calql.evaluation.fqe.data import JudgedData
from rllib_calql.evaluation.fqe.fitting import FittedValues, FQESettings, FrozenPolicy, fit_values
from rllib_calql.evaluation.fqe.off_data import MAX_ASKED, MAX_KNOWN, sample_of, share_off_data

Array = npt.NDArray[Any]

CONFIDENCE = 0.95
_NUM_RESAMPLES = 4_000
_FEW_EPISODES = 10
_MUCH_OFF_DATA = 0.1  # The policy that made the data is at 0.01.
_MUCH_CUT = 0.05
_MANY_FAR_STARTS = 0.5


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    Attributes:
        mean: The mean.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """As tables show it."""
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Score:
    """What data say of one policy, in discounted sums of environment rewards.

    Attributes:
        value: FQE's value of the policy at the held-out episodes' first observations, mean over episodes.
        behaviour: Discounted returns of these episodes as they were recorded.
        held_out_td_error: Root of the mean squared TD error of the fitted values, on held-out rows.
        training_td_error: The same on as many rows of the fit.
        share_off_data: Share of held-out states in which the policy's action is farther from the data than 99 % of the
            data's own actions are.
        num_held_out_episodes: Episodes that the values are means over.
        gamma: Discount.
        updates: Gradient updates of the fit.
        seconds: That it took.
        warnings: What is to be known before the value is believed, a sentence each without its end.
        is_possible: Whether the data's rewards can sum up to the value; where they cannot, the fit diverged.
    """

    value: Interval
    behaviour: Interval
    held_out_td_error: float
    training_td_error: float
    share_off_data: float
    num_held_out_episodes: int
    gamma: float
    updates: int
    seconds: float
    warnings: Sequence[str]
    is_possible: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return {**dataclasses.asdict(self), "warnings": list(self.warnings)}


def mean_interval(values: npt.NDArray[np.float64], seed: int = 0) -> Interval:
    """Mean of one value for each episode, with the percentile interval of a bootstrap over episodes.

    Args:
        values: Shape (E,), at least two.
        seed: Of the resamples.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"An interval needs the values of at least 2 episodes, got {len(values)}.")
    counts = np.random.default_rng(seed).multinomial(
        len(values), np.full(len(values), 1.0 / len(values)), size=_NUM_RESAMPLES
    )
    with np.errstate(invalid="ignore"):  # Of infinite values of a fit that diverged, NaN says enough.
        means = counts @ np.asarray(values, np.float64) / len(values)
        low, high = np.quantile(means, [0.5 - CONFIDENCE / 2.0, 0.5 + CONFIDENCE / 2.0])
    return Interval(float(np.mean(values)), float(low), float(high))


def score_policy(
    data: JudgedData,
    policy: FrozenPolicy,
    settings: FQESettings,
    *,
    remarks: Sequence[str] = (),
    on_progress: Callable[[int], None] = lambda num_updates: None,
) -> Score:
    """Judges a policy by data alone.

    Args:
        data: The recorded data.
        policy: What to judge.
        settings: Of the fit.
        remarks: What is to be known of the policy beforehand; they become warnings of the score.
        on_progress: Called now and then with the number of updates made.

    Raises:
        ValueError: If the policy's actions are no finite numbers.
    """
    begin = time.monotonic()
    fitted = fit_values(data, policy, settings, on_progress)
    value, behaviour = mean_interval(fitted.initial_values), mean_interval(data.behaviour_returns)
    share = _share_off_data(data, policy, settings.seed)
    return Score(
        value,
        behaviour,
        fitted.held_out_td_error,
        fitted.training_td_error,
        share,
        len(data.behaviour_returns),
        data.gamma,
        settings.updates,
        time.monotonic() - begin,
        [*remarks, *_warnings(data, fitted, settings, value, behaviour, share)],
        _is_possible(data, value.mean),
    )


def _is_possible(data: JudgedData, value: float) -> bool:
    low, high = data.possible_values
    tolerance = 0.05 * max(high - low, data.scale_of_values[1])  # Rewards that are all 0 leave no room at all.
    return bool(low - tolerance <= value <= high + tolerance)


def _least_updates(data: JudgedData, settings: FQESettings) -> int:
    """Updates in which a reward comes from the end of its horizon to the beginning.

    The horizon is 1 / (1 - gamma) steps, or an episode, if that is shorter. Targets carry a value one step back in
    about 1 / tau updates.
    """
    longest = float(data.table.lengths.max())
    horizon = min(longest, 1.0 / (1.0 - data.gamma)) if data.gamma < 1.0 else longest
    return math.ceil(round(horizon / settings.tau, 6))


def _share_off_data(data: JudgedData, policy: FrozenPolicy, seed: int) -> float:
    rng = np.random.default_rng(seed)
    known = data.rows(data.training_rows[sample_of(len(data.training_rows), MAX_KNOWN, rng)])
    held_out = data.rows(data.held_out_rows[sample_of(len(data.held_out_rows), MAX_ASKED, rng)])
    return share_off_data(
        (policy.features(known.observations), known.actions),
        (policy.features(held_out.observations), held_out.actions),
        policy.actions(held_out.observations),
        rng=rng,
    )


def _warnings(
    data: JudgedData,
    fitted: FittedValues,
    settings: FQESettings,
    value: Interval,
    behaviour: Interval,
    share_off_data: float,
) -> list[str]:
    warnings = []
    width = value.high - value.low
    if not _is_possible(data, value.mean):
        warnings.append(
            "the value lies outside what the data's rewards can sum up to, {:.4g} to {:.4g}: the fit diverged".format(
                *data.possible_values
            )
        )
    drift = abs(fitted.looks[-1] - fitted.looks[len(fitted.looks) // 2])
    if drift > max(0.5 * width, 0.02 * max(abs(value.mean), data.scale_of_values[1])):
        warnings.append(f"the value still moved by {drift:.3g} in the second half of the fit; raise the updates")
    elif settings.updates < (needed := _least_updates(data, settings)):  # A value that has hardly begun to move.
        warnings.append(
            f"{settings.updates:,} updates are too few for rewards to count as far as they should; raise the updates "
            f"to {needed:,}"
        )
    spread = float(np.ptp(fitted.of_each_critic))
    if spread > max(width, 0.1 * data.scale_of_values[1]):
        warnings.append(f"the critics differ by {spread:.3g}, more than the interval tells")
    if share_off_data > _MUCH_OFF_DATA:
        warnings.append(f"in {share_off_data:.0%} of the states the policy leaves the data, where the value is a guess")
    if data.share_far_starts > _MANY_FAR_STARTS:
        warnings.append(
            f"{data.share_far_starts:.0%} of the held-out episodes begin farther from the other data than their later "
            "steps are, so that the value is read between starts; more episodes from there would tell more"
        )
    if value.low <= behaviour.mean <= value.high:
        warnings.append("the interval holds the behaviour's return: the data do not tell the two apart")
    if len(data.behaviour_returns) < _FEW_EPISODES:
        warnings.append(f"{len(data.behaviour_returns)} held-out episodes are few for an interval")
    if data.share_cut > _MUCH_CUT:
        warnings.append(
            f"the behaviour's return leaves out what would follow where episodes were cut, {data.share_cut:.0%} of an "
            "endless one; the value holds it"
        )
    return warnings
