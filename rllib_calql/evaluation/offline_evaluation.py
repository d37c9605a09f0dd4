"""`OfflineEvaluation`: the policy judged by data while it is trained, by RLlib's `offline_evaluation_*` settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from rllib_calql.common import metrics as keys
from rllib_calql.common.returns import reward_settings
from rllib_calql.evaluation.fqe.data import JudgedData
from rllib_calql.evaluation.fqe.judging import TRAINED_ON, settings_for
from rllib_calql.evaluation.fqe.policies import ModulePolicy, learner_outputs
from rllib_calql.evaluation.fqe.scoring import Score, score_policy
from rllib_calql.evaluation.held_out import HeldOut
from rllib_calql.evaluation.user_callbacks import call_back
from rllib_calql.settings.offline_evaluation import FQE
from rllib_calql.store.replay import TransitionStore
from rllib_calql.system import activity

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm

    from rllib_calql.config import CalQLConfig

_STATE = "fqe"


class OfflineEvaluation:
    """Judges the policy of the learners by data, and changes nothing of what training does.

    Args:
        config: The frozen config.
        store: With the offline data.
        on_one_learner: Calls a function with one learner; all are the same.
        sees_images: Whether observations are images.
        held_out: Judges by held-out episodes; None if none are held out.

    Attributes:
        latest: What fitted Q evaluation gave last; None before.

    Raises:
        ValueError: If values are to be fitted, and the data do not allow it.
    """

    def __init__(
        self,
        config: CalQLConfig,
        store: TransitionStore,
        *,
        on_one_learner: Callable[[Callable[[Any], Any]], Any],
        sees_images: bool,
        held_out: HeldOut | None,
    ) -> None:
        self._config = config
        self._held_out = held_out
        self._policy = ModulePolicy(
            lambda observations, wants_features: on_one_learner(
                partial(learner_outputs, observations=observations, wants_features=wants_features)
            ),
            sees_images,
        )
        self.latest: dict[str, float | str] | None = None
        self._data: JudgedData | None = None
        if config.offline_evaluation_interval and config.offline_evaluation_type == FQE:
            assert store.offline is not None
            self._data = JudgedData(store.offline, store.split, rewards=reward_settings(config))

    def evaluate(self, algorithm: Algorithm) -> dict[str, Any]:
        """Judges the policy as it is now.

        Args:
            algorithm: Whose callbacks are told.

        Returns:
            The part of a result below "evaluation".

        Raises:
            RuntimeError: If the config asks for no offline evaluation.
        """
        call_back(algorithm, "on_evaluate_offline_start")
        if self._data is not None:
            self.latest = _metrics_of(self._score(self._data))
            results: dict[str, Any] = {keys.FQE: dict(self.latest)}
        elif self._held_out is not None:
            results = {keys.HELD_OUT: self._held_out.evaluate()}
        else:
            raise RuntimeError(
                "Nothing says how to judge by data; set `.evaluation(offline_evaluation_interval=..., "
                'offline_evaluation_type="fqe")`, or "held_out" with `.offline_data(validation_fraction=0.1)`.'
            )
        call_back(algorithm, "on_evaluate_offline_end", evaluation_metrics=results)
        return results

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {_STATE: self.latest}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        self.latest = state.get(_STATE)

    def _score(self, data: JudgedData) -> Score:
        settings = settings_for(self._config, self._config.offline_evaluation_duration)

        def say(num_updates: int) -> None:
            activity.say(f"fitting the policy's value, {num_updates:,} of {settings.updates:,} updates")

        remarks = [TRAINED_ON] if data.has_own_split else []
        return score_policy(data, self._policy, settings, remarks=remarks, on_progress=say)


def _metrics_of(score: Score) -> dict[str, float | str]:
    return {
        keys.VALUE: score.value.mean,
        keys.VALUE_LOW: score.value.low,
        keys.VALUE_HIGH: score.value.high,
        keys.BEHAVIOUR_RETURN: score.behaviour.mean,
        keys.FQE_TD_ERROR: score.held_out_td_error,
        keys.FQE_TD_ERROR_TRAINING: score.training_td_error,
        keys.SHARE_OFF_DATA: score.share_off_data,
        **({keys.FQE_WARNINGS: "\n".join(score.warnings)} if score.warnings else {}),
    }
