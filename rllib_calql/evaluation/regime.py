"""Which is the better prior of fine-tuning: the pre-trained policy, or the data it was trained on.

Source:
    Li et al. 2025, arXiv:2510.01460 (three regimes: what is better is to be preserved online, and both if about equal).
    How "about equal" is decided here stands at `regime_of`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

POLICY, DATA, BOTH = "policy", "data", "both"
RETURN, SUCCESS = "return", "success rate"
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Episodes:
    """What is known of some episodes, in units of the environment.

    Attributes:
        number: How many there are, at least 1.
        mean: Of their undiscounted returns.
        std: Of their returns, the population's.
        success_rate: Mean of their successes, each in [0, 1]; None if that is not known.
    """

    number: int
    mean: float
    std: float
    success_rate: float | None = None


class Regime(NamedTuple):
    """What is better at the switch.

    Attributes:
        better: `POLICY`, `DATA`, or `BOTH` if the episodes do not tell them apart.
        quantity: What was compared, `RETURN` or `SUCCESS`.
        policy: Its mean over the episodes of the evaluation.
        data: Its mean over the episodes of the data.
    """

    better: str
    quantity: str
    policy: float
    data: float


def regime_of(policy: Episodes, data: Episodes) -> Regime | None:
    """Compares the mean returns, or the success rates where all returns are one number.

    One of the two is better if their difference is significant at 95 % by a two-sided t test. The standard deviation of
    an episode is taken to be the larger one of the two samples, on both sides. So ten successes in a row do not pass
    for certainty where the data fail now and then, and one episode is enough where the other side shows the spread.

    Returns:
        None if nothing can be said: one episode on either side, or returns that are all equal and no success rates.
    """
    if policy.std == data.std == 0.0 and policy.mean == data.mean:
        if policy.success_rate is None or data.success_rate is None:
            return None
        policy, data = _of_successes(policy.number, policy.success_rate), _of_successes(data.number, data.success_rate)
        quantity = SUCCESS
    else:
        quantity = RETURN
    known = [side for side in (policy, data) if side.number > 1]
    if not known:
        return None
    spread, degrees = max((side.std * math.sqrt(side.number / (side.number - 1)), side.number - 1) for side in known)
    difference = policy.mean - data.mean
    if abs(difference) <= _quantile(degrees) * spread * math.sqrt(1.0 / policy.number + 1.0 / data.number):
        better = BOTH
    else:
        better = POLICY if difference > 0.0 else DATA
    return Regime(better, quantity, policy.mean, data.mean)


def _of_successes(number: int, rate: float) -> Episodes:
    """Successes in place of returns. No values in [0, 1] of this mean spread more than zeros and ones."""
    return Episodes(number, rate, math.sqrt(rate * (1.0 - rate)))


def _quantile(degrees: int) -> float:
    from scipy import stats  # Takes a while, and is needed once in a run.

    return float(stats.t.ppf(0.5 + _CONFIDENCE / 2.0, degrees))
