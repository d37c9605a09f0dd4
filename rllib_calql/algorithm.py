"""`CalQL`: the two phases, offline pre-training and online fine-tuning, as one RLlib algorithm."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from importlib import import_module
from operator import methodcaller
from typing import Any

import numpy as np
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.cql.cql import CQL
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    EPISODE_RETURN_MEAN,
    EVALUATION_RESULTS,
    TIMERS,
)
from ray.util import log_once

from rllib_calql import metrics as keys
from rllib_calql.collection import EpisodeJoiner, collect, collect_or_tell
from rllib_calql.collector import SECONDS_PER_REQUEST, Collector
from rllib_calql.config import CalQLConfig
from rllib_calql.connectors import AddReturnsToGo
from rllib_calql.datasets.in_memory import with_handles
from rllib_calql.evaluation_history import EvaluationHistory
from rllib_calql.offline_data import with_spaces_of_data
from rllib_calql.registration import register
from rllib_calql.replay import TransitionStore
from rllib_calql.resuming import ResumableCQL
from rllib_calql.returns import RewardSettings
from rllib_calql.transitions import (
    check_finite,
    flat_size,
    flatten_observations,
    observation_dtype,
    transitions_from_episode,
)
from rllib_calql.updating import UpdatingCQL

logger = logging.getLogger(__name__)

_UPDATE_SHARE_OF_REQUEST = 0.4  # Longer updates in between left env runners idle up to a fifth of the time.
_MAX_DISCARDED_IN_A_ROW = 10


class CalQL(UpdatingCQL):
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
        self._num_discarded, self._num_discarded_in_a_row = 0, 0
        self._generation = 0
        self._set_up_updates()
        if config.env is None:
            config = with_spaces_of_data(config)
        # Runners and learners, and their parts of checkpoints, keep the config they are built with. Data handed over
        # in Python would be in each of them; they stay with the algorithm alone.
        self.config = _with_input(config, with_handles(config.input_))
        super().setup(self.config)
        self.config = config = _with_input(self.config, config.input_)
        settings = RewardSettings(
            gamma=config.gamma,
            reward_scale=config.reward_scale,
            reward_bias=config.reward_bias,
            failure_reward=config.failure_reward,
            truncation=config.truncation,
        )
        self._add_returns = AddReturnsToGo(settings)
        self._set_up_collection()
        self._observation_space, self._action_space = self._environment_spaces()
        self.store = TransitionStore(
            obs_dim=flat_size(self._observation_space),
            action_dim=flat_size(self._action_space),
            online_capacity=config.online_capacity,
            seed=config.seed,
            track_tails=config.truncation == "bootstrap",
            obs_dtype=observation_dtype(self._observation_space),
        )
        if self.offline_data is not None:
            self.offline_data.load(
                self.store,
                self._add_returns,
                observation_space=self._observation_space,
                action_space=self._action_space,
            )
        self._set_up_residence()
        self._history = EvaluationHistory(self.offline_data.reference_scores if self.offline_data else None)
        if config.normalize_observations and config.pretrained is None:
            self._set_observation_statistics()
        self._load_pretrained()
        self._publish_weights()
        self._sync_weights(self.env_runner_group)
        if self.learner_group.is_remote:
            self._take_snapshot()

    def _set_up_collection(self) -> None:
        config = self.config
        self._num_envs = max(1, config.num_env_runners) * config.num_envs_per_env_runner
        self._joiner = EpisodeJoiner()
        self._collector: Collector | None = None
        if self.env_runner_group is not None and config.num_env_runners:
            self._collector = Collector(
                self.env_runner_group,
                timeout_s=config.sample_timeout_s,
                num_envs=config.num_envs_per_env_runner,
                max_requests=config.max_requests_in_flight_per_env_runner,
            )

    def _environment_spaces(self) -> tuple[Any, Any]:
        """Spaces of one sub-environment before any connector, or the configured ones without an environment."""
        if self.spaces is not None and INPUT_ENV_SINGLE_SPACES in self.spaces:
            return self.spaces[INPUT_ENV_SINGLE_SPACES]  # type: ignore[no-any-return]
        return self.config.observation_space, self.config.action_space

    def _set_observation_statistics(self) -> None:
        if self.store.num_offline == 0:
            raise ValueError(
                "`normalize_observations` takes its statistics from offline data; set `input_` or drop it."
            )
        mean, std = self.store.observation_statistics()
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

    def _online_step(self) -> None:
        if self._collector is not None and self.config.sample_async:
            self._collect_and_update()
            return
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            episodes, metrics = self._collect_round()
        self._take_in(episodes, metrics)
        if num_updates := self._num_updates_due():
            self._update(num_updates, online=True)

    def _collect_round(self) -> tuple[list[SingleAgentEpisode], list[dict[str, Any]]]:
        """One round of every env runner: an episode each, or with several sub-environments a share of steps."""
        is_vectorised = self.config.num_envs_per_env_runner > 1
        arguments = self._request(self._num_env_steps_per_round() if is_vectorised else None)
        if self._collector is not None:
            return self._collector.collect_round(lambda _: partial(collect_or_tell, **arguments))
        collected = collect(self.env_runner, **arguments | {"weights": None})
        return self._joiner.add(collected.pieces), [collected.metrics]

    def _collect_and_update(self) -> None:
        """Updates while env runners collect, until as many episodes are stored as there are environments."""
        collector = self._collector
        assert collector is not None
        begin, num_begun, seconds_before = time.perf_counter(), self.num_online_episodes, self._seconds_timed
        while self.num_online_episodes - num_begun < self._num_envs:
            round_env_steps = self._env_steps_of_a_round()
            staleness = self.config.max_staleness_env_steps
            limit = round_env_steps if staleness is None else float(staleness)
            # Learners that have nothing to do need the ends of episodes.
            if not self._num_updates_due() or self._num_env_steps_behind() <= limit:
                collector.ask(
                    lambda num_env_steps: partial(collect_or_tell, **self._request(num_env_steps)),
                    max_env_steps=max(limit, round_env_steps),
                )
            self._take_in(*collector.fetch())
            if num_updates := self._num_updates_due():
                self._update(min(num_updates, self._num_updates_between_requests()), online=True)
            else:
                with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
                    collector.wait()
        busy = (self._seconds_timed - seconds_before) / (time.perf_counter() - begin)
        self.metrics.log_value((keys.COLLECTION, keys.LEARNER_BUSY_SHARE), busy, window=1)

    def _env_steps_of_a_round(self) -> float:
        """Env steps of an episode of every environment, by the mean of those stored."""
        if self.num_online_episodes == 0:
            return math.inf
        return float(self._num_envs * self.num_online_env_steps / self.num_online_episodes)

    def _num_env_steps_behind(self) -> float:
        """Env steps stored that updates are still to be made for."""
        behind: float = self._updates_owed / self.config.updates_per_env_step
        return behind

    def _num_updates_between_requests(self) -> int:
        """Updates that take less time than a request, so that a runner has its next one before it ends the last."""
        seconds = _UPDATE_SHARE_OF_REQUEST * SECONDS_PER_REQUEST
        return 10 if self._seconds_per_update is None else max(1, round(seconds / self._seconds_per_update))

    def _num_updates_due(self) -> int:
        """Updates to make now: those owed, none as long as a batch needs online rows and there are none."""
        num_offline_rows = self._num_offline_rows(online=True)
        can_update = self.store.num_online or num_offline_rows == self.config.train_batch_size_per_learner
        return int(self._updates_owed) if can_update else 0

    def _request(self, num_env_steps: int | None) -> dict[str, Any]:
        """Arguments of `collect`."""
        has_policy = self.config.pretrained or self.num_offline_updates + self.num_online_updates > 0
        return {
            "seed": self.store.draw_seed(),
            "num_env_steps": num_env_steps,
            "random_actions": not has_policy and self.num_online_env_steps < self.config.num_warmup_env_steps,
            "weights": self._weights,
            "generation": self._generation,
        }

    def _num_env_steps_per_round(self) -> int:
        """Steps of one runner and round with several sub-environments: about one update call's worth of updates."""
        steps = self.config.updates_per_iteration / self.config.updates_per_env_step
        num_envs: int = self.config.num_envs_per_env_runner
        return max(num_envs, round(steps / max(1, self.config.num_env_runners)))

    def _take_in(self, episodes: list[SingleAgentEpisode], metrics: list[dict[str, Any]]) -> None:
        if metrics:
            self.metrics.aggregate(metrics, key=ENV_RUNNER_RESULTS)
        for episode in episodes:
            self._store_episode(episode)

    def _store_episode(self, episode: SingleAgentEpisode) -> None:
        observations = flatten_observations(self._observation_space, episode.get_observations())
        actions = np.asarray(episode.get_actions()).reshape(len(episode), -1)
        try:
            check_finite(episode.id_, "an observation", observations)
            check_finite(episode.id_, "a reward", np.asarray(episode.get_rewards()).reshape(-1, 1))
        except ValueError as error:
            self._discard_episode(error)
            return
        self._num_discarded_in_a_row = 0
        self._add_returns(batch={}, episodes=[episode])
        self.store.add_online(
            transitions_from_episode(
                episode, observations=observations, actions=actions, settings=self._add_returns.settings
            )
        )
        begun = max(self.num_online_env_steps, self.config.num_warmup_env_steps)
        self.num_online_env_steps += len(episode)
        self.num_online_episodes += 1
        self._updates_owed += self.config.updates_per_env_step * max(0, self.num_online_env_steps - begun)
        if len(episode) >= self.config.episode_limit_env_steps and episode.is_truncated and log_once("calql_cut"):
            logger.warning(
                "An episode was cut after %d env steps and stored as a truncated one; raise `max_episode_env_steps` if "
                "episodes are that long. Said once.",
                len(episode),
            )

    def _discard_episode(self, error: ValueError) -> None:
        """A broken sensor costs an episode. An environment that is broken for good ends the run."""
        self._num_discarded += 1
        self._num_discarded_in_a_row += 1
        if self._num_discarded_in_a_row == _MAX_DISCARDED_IN_A_ROW:
            raise error
        logger.warning("An episode is discarded: %s", error)

    @override(Algorithm)
    def cleanup(self) -> None:
        """Ends all workers, and lets go of offline data that are shared with other trials."""
        if self._collector is not None:
            self._collector.stop()
        super().cleanup()
        if self.offline_data is not None:
            self.offline_data.close()

    @override(ResumableCQL)
    def _after_restore(self) -> None:
        self._joiner.clear()
        self._generation += 1
        if self._collector is not None:
            self._collector.forget_outstanding()
        self._publish_weights()
        self._sync_weights(self.env_runner_group)
        self._refreshed_at = None
        if self.learner_group.is_remote:
            self._take_snapshot()

    @override(Algorithm)
    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """Indices of env runners that came back. `Collector` brings back those that collect, without waiting."""
        if self._collector is not None and env_runner_group is self.env_runner_group:
            return self._collector.take_recovered()
        restored: list[int] = super().restore_env_runners(env_runner_group)
        return restored

    # --- Results -----------------------------------------------------------------------------------------------------

    @override(Algorithm)
    def evaluate(self, parallel_train_future: Any = None) -> dict[str, Any]:
        """Evaluates the greedy policy, and adds the normalised score where the data have reference scores.

        Raises:
            RuntimeError: Without an environment.
        """
        if self.env_runner_group is None:
            raise RuntimeError("Evaluation needs an environment; set `.environment(...)`.")
        self._sync_weights(self.eval_env_runner_group or self.env_runner_group)
        results: dict[str, Any] = super().evaluate(parallel_train_future)
        runner_results = results.get(ENV_RUNNER_RESULTS)
        if runner_results and EPISODE_RETURN_MEAN in runner_results:
            runner_results = dict(runner_results)
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
        results[keys.COLLECTION] = {
            **results.get(keys.COLLECTION, {}),
            keys.NUM_ENV_STEPS_BEHIND: self._num_env_steps_behind(),
            keys.NUM_DISCARDED_EPISODES_LIFETIME: self._num_discarded,
        }
        if self._collector is not None:
            results[keys.COLLECTION] |= {
                keys.NUM_HEALTHY_ENV_RUNNERS: self._collector.num_healthy,
                keys.NUM_ENV_RUNNER_FAILURES_LIFETIME: self._collector.num_failures,
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
        runner_results = dict(results.get(ENV_RUNNER_RESULTS) or {})
        # Tune's schedulers stop a trial whose result lacks their metric.
        runner_results.setdefault(EPISODE_RETURN_MEAN, float("nan"))
        results[ENV_RUNNER_RESULTS] = runner_results
        evaluation = (eval_results or {}).get(EVALUATION_RESULTS, {}).get(ENV_RUNNER_RESULTS)
        if evaluation and EPISODE_RETURN_MEAN in evaluation:
            self._history.add(evaluation, online=self._phase_of_result == keys.ONLINE)
        if fine_tuning := self._history.summary():
            results[keys.FINE_TUNING] = fine_tuning
        return results


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
