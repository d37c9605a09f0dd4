"""What the evaluations since the switch say about fine-tuning: the dip and the regret."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rllib_calql.common.metrics import DIP, REGRET, SUCCESS_RATE

_RETURN = "episode_return_mean"


class EvaluationHistory:
    """Keeps the evaluation at the switch and the later ones.

    Args:
        reference_scores: Returns of a random and of a reference policy, or None.
    """

    def __init__(self, reference_scores: tuple[float, float] | None = None) -> None:
        self._reference_scores = reference_scores
        self._at_switch: float | None = None
        self._online_returns: list[float] = []
        self._online_scores: list[float] = []

    def normalized_score(self, episode_return: float) -> float | None:
        """100 * (return - ref_min) / (ref_max - ref_min), or None without reference scores.

        Source:
            Fu et al. 2020, arXiv:2004.07219, section 4 (D4RL's normalised score).
        """
        if self._reference_scores is None or self._reference_scores[0] == self._reference_scores[1]:
            return None
        low, high = self._reference_scores
        return 100.0 * (episode_return - low) / (high - low)

    def add(self, evaluation: Mapping[str, Any], *, online: bool) -> None:
        """Records one evaluation's env-runner results, after an iteration of the given phase."""
        episode_return = float(evaluation[_RETURN])
        if not online:
            self._at_switch = episode_return  # The last one before the switch stays.
            return
        self._online_returns.append(episode_return)
        score = self.normalized_score(episode_return)
        if SUCCESS_RATE in evaluation:
            self._online_scores.append(float(evaluation[SUCCESS_RATE]))
        elif score is not None:
            self._online_scores.append(score / 100.0)

    def summary(self) -> dict[str, float]:
        """The dip (at most 0) and the regret, each where it is known.

        The regret is the mean over the online evaluations of 1 - score, the score being the success rate, or the
        normalised score / 100 where the environment reports no success (CORL's cumulative regret).
        """
        summary = {}
        if self._online_returns and self._at_switch is not None:
            summary[DIP] = min(0.0, min(self._online_returns) - self._at_switch)
        if self._online_scores:
            summary[REGRET] = sum(1.0 - score for score in self._online_scores) / len(self._online_scores)
        return summary

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "at_switch": self._at_switch,
            "online_returns": list(self._online_returns),
            "online_scores": list(self._online_scores),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        self._at_switch = state["at_switch"]
        self._online_returns = list(state["online_returns"])
        self._online_scores = list(state["online_scores"])
