"""`DivergenceWatch`: whether mean Q is still a return that the data make possible. For the driver.

The range is that of the returns seen, offline and online, of 0, from where untrained critics begin, and of what follows
the end of a cut episode if it goes on as it was on average. With an entropy term in the target it is wider by that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rllib_calql.common import metrics as keys
from rllib_calql.common.returns import horizon
from rllib_calql.learning.skipped_updates import number_of

# Widths of the range. In the runs of `tests/evidence` mean Q was under 0.6 of them outside, by the most careful bound.
OUT_OF_RANGE = 1.0
_CALLS_IN_A_ROW = 2  # Critics that have hardly been trained may be anywhere.

_MODULE = "default_policy"
_POSSIBLE_RETURNS = "possible_returns"
logger = logging.getLogger(__name__)


class DivergenceWatch:
    """Compares mean Q of the batches' own actions with the range of possible returns, and warns once per phase.

    Args:
        gamma: Discount.
        has_entropy_term: Whether the target holds one offline (`deterministic_backup=False`).
        has_entropy_term_online: The same online; None: as offline.

    Attributes:
        out_of_range: How far the latest mean Q, of the worst critic, is outside, in widths of the range.
        warning: What was warned of in this phase, or None.
    """

    def __init__(self, *, gamma: float, has_entropy_term: bool, has_entropy_term_online: bool | None = None) -> None:
        self._horizon = horizon(gamma)
        is_same = has_entropy_term_online is None
        self._has_entropy_term = {
            False: has_entropy_term,
            True: has_entropy_term if is_same else has_entropy_term_online,
        }
        self._log_prob = 0.0  # The latest: between two steps of the actor there is none.
        self._low, self._high = math.inf, -math.inf
        self._is_online = False
        self._num_calls_outside = 0
        self.out_of_range = 0.0
        self.warning: str | None = None

    @property
    def possible_returns(self) -> tuple[float, float]:
        """The range of returns so far, (inf, -inf) before the first."""
        return self._low, self._high

    def include(self, low: float, high: float) -> None:
        """Widens the range to hold these returns."""
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint: the range."""
        return {_POSSIBLE_RETURNS: self.possible_returns}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint; empty in one of an earlier version."""
        self.include(*state.get(_POSSIBLE_RETURNS, (math.inf, -math.inf)))

    def observe(self, learner_results: Sequence[Mapping[str, Any]], *, online: bool, num_updates: int) -> None:
        """Takes in the results of an update call, and warns if it has to.

        Args:
            learner_results: What `LearnerGroup.update` returned; learners are identical, so the first one's count.
            online: The phase.
            num_updates: Updates of this phase so far.
        """
        if online != self._is_online:
            self._is_online, self._num_calls_outside, self.warning = online, 0, None
        logged = {name: number_of(value) for name, value in learner_results[0][_MODULE].items()}
        values: list[float] = []
        while (name := keys.Q_DATA_OF_CRITIC.format(c=len(values) + 1)) in logged:
            values.append(logged[name])
        low, high = min(self._low, 0.0), max(self._high, 0.0)
        self._log_prob = logged.get(keys.LOG_PROB, self._log_prob)
        if self._has_entropy_term[online]:
            entropy = -logged.get(keys.ALPHA_VALUE, 0.0) * self._log_prob * self._horizon
            low, high = low + min(entropy, 0.0), high + max(entropy, 0.0)
        # An update that was skipped has NaN; that is told by itself.
        excess = {q: max(q - high, low - q, 0.0) for q in values if not math.isnan(q)}
        if not excess or not high > low:
            return
        worst = max(excess, key=lambda q: excess[q])
        self.out_of_range = excess[worst] / (high - low)
        self._num_calls_outside = self._num_calls_outside + 1 if self.out_of_range >= OUT_OF_RANGE else 0
        if self._num_calls_outside >= _CALLS_IN_A_ROW and self.warning is None:
            phase = keys.ONLINE if online else keys.OFFLINE
            self.warning = (
                f"Mean Q is {worst:.4g} after {num_updates:,} {phase} updates, where returns between {low:.4g} and "
                f"{high:.4g} are possible: the critics diverge. {_REMEDY[worst > high]} `rllib dataset inspect` shows "
                f"rewards that stand out. `{keys.Q_OUT_OF_RANGE}` says how far it goes, in widths of that range"
            )
            logger.warning("%s; said once per phase.", self.warning)


_REMEDY = {
    True: "Set `max_target_backup=False`, `layer_norm=True` or a larger `min_q_weight`, lower `critic_lr`, `tau` or "
    "`gamma`, or normalise observations.",
    False: "Lower `min_q_weight` or `critic_lr`, leave `calibrate` on, set a `conservative_gap_clip`, or normalise "
    "observations.",
}
