"""What the evaluations at and since the switch say about fine-tuning: the regime, the dip and the regret."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rllib_calql.common import metrics as keys
from rllib_calql.evaluation.regime import Episodes, regime_of

_RETURN, _NUM_EPISODES = "episode_return_mean", "num_episodes"


class EvaluationHistory:
    """Keeps the evaluation at the switch and the later ones.

    Args:
        reference_scores: Returns of a random and of a reference policy, or None.
        data: The episodes of the offline data, or None.
        max_episodes: The latest episodes of an evaluation that RLlib's means run over, at most.
    """

    def __init__(
        self,
        reference_scores: tuple[float, float] | None = None,
        *,
        data: Episodes | None = None,
        max_episodes: int = 100,
    ) -> None:
        self._reference_scores = reference_scores
        self._data = data
        self._max_episodes = max_episodes
        self._at_switch: float | None = None
        self._policy: Episodes | None = None  # At the switch.
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
            self._policy = self._episodes_of(evaluation)
            return
        self._online_returns.append(episode_return)
        score = self.normalized_score(episode_return)
        if keys.SUCCESS_RATE in evaluation:
            self._online_scores.append(float(evaluation[keys.SUCCESS_RATE]))
        elif score is not None:
            self._online_scores.append(score / 100.0)

    def summary(self) -> dict[str, float]:
        """The dip (at most 0) and the regret, each where it is known.

        The regret is the mean over the online evaluations of 1 - score, the score being the success rate, or the
        normalised score / 100 where the environment reports no success (CORL's cumulative regret).
        """
        summary = {}
        if self._online_returns and self._at_switch is not None:
            summary[keys.DIP] = min(0.0, min(self._online_returns) - self._at_switch)
        if self._online_scores:
            summary[keys.REGRET] = sum(1.0 - score for score in self._online_scores) / len(self._online_scores)
        return summary

    def regime(self) -> dict[str, str | float]:
        """Whether the policy was better at the switch or the data, and by which two numbers; nothing if not known."""
        regime = regime_of(self._policy, self._data) if self._policy is not None and self._data is not None else None
        if regime is None:
            return {}
        return {
            keys.REGIME: regime.better,
            keys.REGIME_QUANTITY: regime.quantity,
            keys.REGIME_POLICY: regime.policy,
            keys.REGIME_DATA: regime.data,
        }

    def _episodes_of(self, evaluation: Mapping[str, Any]) -> Episodes | None:
        """None if an own evaluation function of the user does not say how the returns spread."""
        number, std = evaluation.get(_NUM_EPISODES), evaluation.get(keys.EPISODE_RETURN_STD)
        if not number or std is None:
            return None
        success = evaluation.get(keys.SUCCESS_RATE)
        return Episodes(
            number=min(int(number), self._max_episodes),
            mean=float(evaluation[_RETURN]),
            std=float(std),
            success_rate=None if success is None else float(success),
        )

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "at_switch": self._at_switch,
            "policy": None if self._policy is None else asdict(self._policy),
            "online_returns": list(self._online_returns),
            "online_scores": list(self._online_scores),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        self._at_switch = state["at_switch"]
        policy = state.get("policy")  # Not in checkpoints of earlier versions.
        self._policy = None if policy is None else Episodes(**policy)
        self._online_returns = list(state["online_returns"])
        self._online_scores = list(state["online_scores"])
