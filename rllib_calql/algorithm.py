"""`CalQL`: the two phases, offline pre-training and online fine-tuning, as one RLlib algorithm."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from operator import methodcaller
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.cql.cql import CQL
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EPISODE_RETURN_MEAN, EVALUATION_RESULTS

from rllib_calql.collection.collection import CollectingCQL
from rllib_calql.collection.env_errors import start_failures_told, told
from rllib_calql.collection.requests import evaluate_or_tell
from rllib_calql.common import metrics as keys
from rllib_calql.common.encoding import encoded_space, flat_size, observation_dtype
from rllib_calql.common.held_data import with_handles
from rllib_calql.common.returns import reward_settings
from rllib_calql.config import CalQLConfig
from rllib_calql.evaluation.history import EvaluationHistory
from rllib_calql.registration import register
from rllib_calql.store.offline_data import with_spaces_of_data
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.resolution import remark_on_deviations
from rllib_calql.store.returns_connector import AddReturnsToGo

logger = logging.getLogger(__name__)

_SECONDS_FOR_RESTART = 60.0  # Of the env runners of evaluations.


class CalQL(CollectingCQL):
    """Calibrated conservative Q-learning (Nakamoto et al. 2023, arXiv:2303.05479) on RLlib's new API stack.

    `train()` makes `updates_per_iteration` gradient updates on offline data until `offline_updates` is reached. From
    then on each call collects whole episodes with the env runners, stores them with their returns, and makes
    `updates_per_env_step` updates for every env step stored. The phase follows from the lifetime count of offline
    updates, so it survives checkpoints and does not depend on how often `train()` was called.
    """

    config: CalQLConfig

    @classmethod
    @override(CQL)
    def get_default_config(cls) -> CalQLConfig:
        """The default settings."""
        return CalQLConfig()

    @override(CQL)
    def setup(self, config: CalQLConfig) -> None:
        """Builds runners and learners, reads the offline data and checks them against the environment.

        Raises:
            ValueError: If there is neither environment nor data, or the data do not fit the environment.
            FileNotFoundError: If an input does not exist.
        """
        if config.env is None and not config.is_offline:
            raise ValueError("There is neither an environment nor offline data; set `.environment(...)` or `input_`.")
        self.num_offline_updates = 0
        self.num_online_updates = 0
        self.num_online_env_steps = 0
        self.num_online_episodes = 0
        self._updates_owed = 0.0
        self._set_up_updates()
        if config.env is None:
            config = with_spaces_of_data(config)
        # Runners and learners, and their parts of checkpoints, keep the config they are built with. Data handed over
        # in Python would be in each of them; they stay with the algorithm alone.
        self.config = _with_input(config, with_handles(config.input_))
        with start_failures_told(self.config):
            super().setup(self.config)
        self.config = config = _with_input(self.config, config.input_)
        self._add_returns = AddReturnsToGo(reward_settings(config))
        self._set_up_collection()
        self._observation_space, self._action_space = self._environment_spaces()
        self._stored_space = self._space_of_episodes()
        self.store = TransitionStore(
            obs_dim=flat_size(self._stored_space),
            action_dim=flat_size(self._action_space),
            online_capacity=config.online_capacity,
            seed=config.seed,
            track_tails=config.truncation == "bootstrap",
            obs_dtype=observation_dtype(self._stored_space),
        )
        if self.offline_data is not None:
            self.offline_data.load(
                self.store,
                self._add_returns,
                observation_space=self._observation_space,
                action_space=self._action_space,
            )
            assert self.store.offline is not None
            self._divergence.include(*self.store.offline.possible_returns)
        self._set_up_residence()
        self._history = EvaluationHistory(self.offline_data.reference_scores if self.offline_data else None)
        if config.normalize_observations and config.pretrained is None:
            self._set_observation_statistics()
        self._load_pretrained()
        self._publish_weights()
        self._sync_weights(self.env_runner_group)
        if self.learner_group.is_remote:
            self._take_snapshot()

    def _environment_spaces(self) -> tuple[Any, Any]:
        """Spaces of one sub-environment before any connector, or the configured ones without an environment."""
        if self.spaces is not None and INPUT_ENV_SINGLE_SPACES in self.spaces:
            return self.spaces[INPUT_ENV_SINGLE_SPACES]  # type: ignore[no-any-return]
        return self.config.observation_space, self.config.action_space

    def _space_of_episodes(self) -> Any:
        """Space of observations as the module sees them, episodes hold them and the store keeps them.

        Connectors encode observations, once, and offline data are encoded by the same function. Connectors of the user
        may make anything of them; there are no offline data then.
        """
        if self.config._env_to_module_connector is None or self.spaces is None:
            return encoded_space(self._observation_space)
        return self.spaces[DEFAULT_MODULE_ID][0]

    def _set_observation_statistics(self) -> None:
        if self.store.num_offline == 0:
            raise ValueError(
                "`normalize_observations` takes its statistics from offline data; set `input_` or drop it."
            )
        mean, std = self.store.observation_statistics()
        if remark := remark_on_deviations(std):
            logger.warning("%s", remark)
        self._foreach_learner(methodcaller("set_observation_statistics", mean, std))

    @override(Algorithm)
    def _create_local_replay_buffer_if_necessary(self, config: Any) -> None:
        """No RLlib buffer: transitions live in `self.store`."""

    # --- Training ----------------------------------------------------------------------------------------------------

    @override(CQL)
    def training_step(self) -> None:
        """One iteration of the phase we are in.

        Raises:
            RuntimeError: If the offline phase is over and there is no environment to go on with.
        """
        self._phase_of_result = self.phase
        if self.phase == keys.OFFLINE:
            remaining = self.config.num_offline_updates - self.num_offline_updates
            self._update(min(self.config.updates_per_iteration, remaining), online=False)
        elif self.env_runner_group is None:
            raise RuntimeError(
                f"The offline phase is over after {self.num_offline_updates} updates and there is no environment; set "
                "`.environment(...)` to fine-tune, or raise `offline_updates`."
            )
        else:
            self._online_step()

    @override(CollectingCQL)
    def cleanup(self) -> None:
        """Ends all workers, and lets go of offline data that are shared with other trials."""
        super().cleanup()
        if self.offline_data is not None:
            self.offline_data.close()

    # --- Results -----------------------------------------------------------------------------------------------------

    @override(Algorithm)
    def evaluate(self, parallel_train_future: Any = None) -> dict[str, Any]:
        """Evaluates the greedy policy, and adds the normalised score where the data have reference scores.

        Raises:
            RuntimeError: Without an environment, or if the environment fails again and again.
        """
        if self.env_runner_group is None:
            raise RuntimeError("Evaluation needs an environment; set `.environment(...)`.")
        group = self.eval_env_runner_group or self.env_runner_group
        self._sync_weights(group)
        with told("Evaluating") if not group.num_remote_env_runners() else nullcontext():
            results: dict[str, Any] = super().evaluate(parallel_train_future)
        runner_results = results.get(ENV_RUNNER_RESULTS)
        if not runner_results and group.num_remote_env_runners():
            _check_evaluation_works(group)
        if runner_results and EPISODE_RETURN_MEAN in runner_results:
            runner_results = _known(runner_results)
            results = {**results, ENV_RUNNER_RESULTS: runner_results}
            score = self._history.normalized_score(runner_results[EPISODE_RETURN_MEAN])
            if score is not None:
                runner_results[keys.NORMALIZED_SCORE] = score
        return results

    @override(Algorithm)
    def _compile_iteration_results(self, *, train_results: Any, eval_results: Any) -> dict[str, Any]:
        """RLlib's result, completed so that schedulers and loggers find the same keys in both phases."""
        results: dict[str, Any] = super()._compile_iteration_results(
            train_results=train_results, eval_results=eval_results
        )
        results[keys.PHASE] = self._phase_of_result
        results.update(self._counters_of_phases())
        results[keys.Q_OUT_OF_RANGE] = self._divergence.out_of_range
        if self._divergence.warning is not None:
            results[keys.Q_WARNING] = self._divergence.warning
        results[keys.COLLECTION] = {
            **results.get(keys.COLLECTION, {}),
            keys.NUM_ENV_STEPS_BEHIND: self._num_env_steps_behind(),
            keys.NUM_DISCARDED_EPISODES_LIFETIME: self._num_discarded,
        }
        if self._collector is not None:
            results[keys.COLLECTION] |= {
                keys.NUM_HEALTHY_ENV_RUNNERS: self._collector.num_healthy,
                keys.NUM_ENV_RUNNER_FAILURES_LIFETIME: self._num_env_runner_failures,
            }
        results[keys.STORE] = {
            keys.NUM_OFFLINE_TRANSITIONS: self.store.num_offline,
            keys.NUM_ONLINE_TRANSITIONS: self.store.num_online,
        }
        if self.offline_data is not None:
            results[keys.OFFLINE_DATA] = self.offline_data.report.headline
        if self._seconds_timed:
            results[keys.UPDATES_PER_S] = self._num_updates_timed / self._seconds_timed
            self._num_updates_timed, self._seconds_timed = 0, 0.0
        runner_results = _known(results.get(ENV_RUNNER_RESULTS) or {})
        # Tune's schedulers stop a trial whose result lacks their metric.
        runner_results.setdefault(EPISODE_RETURN_MEAN, float("nan"))
        results[ENV_RUNNER_RESULTS] = runner_results
        evaluation = (eval_results or {}).get(EVALUATION_RESULTS, {}).get(ENV_RUNNER_RESULTS)
        if evaluation and EPISODE_RETURN_MEAN in evaluation:
            self._history.add(evaluation, online=self._phase_of_result == keys.ONLINE)
        if fine_tuning := self._history.summary():
            results[keys.FINE_TUNING] = fine_tuning
        return results


def _known(runner_results: Mapping[str, Any]) -> dict[str, Any]:
    """Without the success rate where no episode said anything: RLlib reports NaN then, if one did earlier."""
    rate = runner_results.get(keys.SUCCESS_RATE)
    is_unknown = isinstance(rate, float) and math.isnan(rate)
    return {name: value for name, value in runner_results.items() if not (is_unknown and name == keys.SUCCESS_RATE)}


def _check_evaluation_works(group: Any) -> None:
    """Asks remote env runners without results for what they raise, which RLlib leaves in their logs.

    RLlib ends a runner that raises, and Ray starts it anew meanwhile. One that died for another reason is fine again.

    Raises:
        RuntimeError: With that.
    """
    deadline = time.monotonic() + _SECONDS_FOR_RESTART
    answers: list[Any] = []
    while not answers and (seconds_left := deadline - time.monotonic()) > 0:
        answers = group.foreach_env_runner(
            evaluate_or_tell, local_env_runner=False, healthy_only=False, timeout_seconds=seconds_left
        )
    for failure in answers:
        if failure is not None:
            raise RuntimeError(f"Evaluating failed, {failure.cause}")


def _with_input(config: CalQLConfig, input_: Any) -> CalQLConfig:
    changed: CalQLConfig = config.copy(copy_frozen=False)
    changed.input_ = input_
    # RLlib merges the states of runners' connectors after every iteration and waits for all runners, however long their
    # requests are. Only connectors set by the user have a state.
    has_connectors = config._env_to_module_connector is not None or config._module_to_env_connector is not None
    changed._dont_auto_sync_env_runner_states = not has_connectors
    changed.freeze()
    return changed


# RLlib is loaded now. Its list keeps the name resolvable after `ray.shutdown()`.
import_module("ray.rllib.algorithms.registry")
register()
