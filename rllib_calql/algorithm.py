"""`CalQL`: the two phases, offline pre-training and online fine-tuning, as one RLlib algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from operator import methodcaller
from typing import Any

import numpy as np
import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.cql.cql import CQL
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    EPISODE_RETURN_MEAN,
    EVALUATION_RESULTS,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)

from rllib_calql import metrics as keys
from rllib_calql.collection import EpisodeJoiner, collect
from rllib_calql.config import CalQLConfig
from rllib_calql.connectors import AddReturnsToGo
from rllib_calql.datasets.in_memory import with_handles
from rllib_calql.evaluation_history import EvaluationHistory
from rllib_calql.offline_data import as_multi_agent_batch, with_spaces_of_data
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

_MAX_BYTES_PER_UPDATE_CALL = 64 * 2**20  # Bounds the copies of a super-batch, whatever the observations' size.
_MAX_EMPTY_ROUNDS = 5  # Rounds that env runners get to come back in, after a failure of all of them.
_MAX_UPDATES_PER_CALL = 250  # About 20 s on two cores at the sizes of the paper: progress and Ctrl-C stay responsive.


class CalQL(ResumableCQL):
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
        self._num_empty_rounds = 0
        self._num_updates_timed, self._seconds_timed = 0, 0.0
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
        self._joiner = EpisodeJoiner()
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
        self._history = EvaluationHistory(self.offline_data.reference_scores if self.offline_data else None)
        if config.normalize_observations:
            self._set_observation_statistics()
        self._sync_weights(self.env_runner_group)

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

    def _foreach_learner(self, func: Callable[[Any], Any]) -> list[Any]:
        return [result.get() for result in self.learner_group.foreach_learner(func)]

    @override(Algorithm)
    def _create_local_replay_buffer_if_necessary(self, config: Any) -> None:
        """No RLlib buffer: transitions live in `self.store`."""

    # --- Training ----------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """The phase of the next training step, "offline" or "online"."""
        return keys.OFFLINE if self.num_offline_updates < self.config.num_offline_updates else keys.ONLINE

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
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            episodes = self._collect_episodes()
        for episode in episodes:
            self._store_episode(episode)
        num_updates = int(self._updates_owed)
        num_offline_rows = self._num_offline_rows(online=True)
        if num_updates and (self.store.num_online or num_offline_rows == self.config.train_batch_size_per_learner):
            self._updates_owed -= num_updates
            self._update(num_updates, online=True)

    def _collect_episodes(self) -> list[SingleAgentEpisode]:
        """One round of every env runner: an episode each, or with several sub-environments a share of steps."""
        is_vectorised = self.config.num_envs_per_env_runner > 1
        has_policy = self.num_offline_updates + self.num_online_updates > 0
        task = partial(
            collect,
            seed=self.store.draw_seed(),
            num_env_steps=self._num_env_steps_per_round() if is_vectorised else None,
            random_actions=not has_policy and self.num_online_env_steps < self.config.num_warmup_env_steps,
        )
        results = self.env_runner_group.foreach_env_runner(
            task,
            local_env_runner=self.config.num_env_runners == 0,
            timeout_seconds=self.config.sample_timeout_s if self.config.num_env_runners else None,
        )
        self._num_empty_rounds = 0 if results else self._num_empty_rounds + 1
        if self._num_empty_rounds == _MAX_EMPTY_ROUNDS:
            raise RuntimeError(
                f"No env runner returned an episode in {_MAX_EMPTY_ROUNDS} rounds. Either the environment fails, see "
                "the runners' log, or an episode takes longer than `sample_timeout_s`, "
                f"{self.config.sample_timeout_s} s; raise that."
            )
        if results:
            self.metrics.aggregate([runner_metrics for _, runner_metrics in results], key=ENV_RUNNER_RESULTS)
        return self._joiner.add([piece for pieces, _ in results for piece in pieces])

    def _num_env_steps_per_round(self) -> int:
        """Steps of one runner and round with several sub-environments: about one update call's worth of updates."""
        steps = self.config.updates_per_iteration / self.config.updates_per_env_step
        num_envs: int = self.config.num_envs_per_env_runner
        return max(num_envs, round(steps / max(1, self.config.num_env_runners)))

    def _store_episode(self, episode: SingleAgentEpisode) -> None:
        self._add_returns(batch={}, episodes=[episode])
        observations = flatten_observations(self._observation_space, episode.get_observations())
        actions = np.asarray(episode.get_actions()).reshape(len(episode), -1)
        check_finite(episode.id_, "an observation", observations)
        check_finite(episode.id_, "a reward", np.asarray(episode.get_rewards()).reshape(-1, 1))
        self.store.add_online(
            transitions_from_episode(
                episode, observations=observations, actions=actions, settings=self._add_returns.settings
            )
        )
        begun = max(self.num_online_env_steps, self.config.num_warmup_env_steps)
        self.num_online_env_steps += len(episode)
        self.num_online_episodes += 1
        self._updates_owed += self.config.updates_per_env_step * max(0, self.num_online_env_steps - begun)

    def _num_offline_rows(self, *, online: bool) -> int:
        batch_size = self.config.train_batch_size_per_learner
        if not online:
            return batch_size
        return self.store.num_offline_rows(batch_size, self.config.mixing_ratio)

    def _update(self, num_updates: int, *, online: bool) -> None:
        """Makes gradient updates, then hands the weights to the env runners."""
        begin = time.perf_counter()
        if self.config.truncation == "bootstrap":
            self.store.refresh_returns(self._estimate_values)
        num_learners = max(1, self.config.num_learners)
        bytes_per_update = self.store.row_nbytes * self.config.train_batch_size_per_learner * num_learners
        per_call = max(1, min(_MAX_UPDATES_PER_CALL, _MAX_BYTES_PER_UPDATE_CALL // bytes_per_update))
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            for start in range(0, num_updates, per_call):
                self._update_once(min(per_call, num_updates - start), online=online)
        self._num_updates_timed += num_updates
        self._seconds_timed += time.perf_counter() - begin
        if self.phase == keys.ONLINE:  # Also after the last offline update: the next step collects.
            with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                self._sync_weights(self.env_runner_group)

    def _update_once(self, num_updates: int, *, online: bool) -> None:
        from rllib_calql.learner import ONLINE

        batch_size = self.config.train_batch_size_per_learner
        batches = [
            as_multi_agent_batch(
                self.store.sample(
                    num_batches=num_updates,
                    batch_size=batch_size,
                    num_offline_rows=self._num_offline_rows(online=online),
                )
            )
            for _ in range(max(1, self.config.num_learners))
        ]
        is_remote = self.learner_group.is_remote
        data = {"batch_refs": [ray.put(batch) for batch in batches]} if is_remote else {"batch": batches[0]}
        results = self.learner_group.update(
            **data,
            minibatch_size=batch_size,
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_online_env_steps, ONLINE: online},
        )
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        if online:
            self.num_online_updates += num_updates
        else:
            self.num_offline_updates += num_updates

    def _estimate_values(self, observations: np.ndarray) -> np.ndarray:
        chunks = np.array_split(observations, max(1, len(observations) // 4096))
        values = [self._foreach_learner(methodcaller("estimate_values", chunk))[0] for chunk in chunks]
        return np.concatenate(values)

    def _sync_weights(self, group: Any) -> None:
        """Sets the learners' weights on every runner and waits.

        RLlib's `sync_weights` does not wait and drops the call silently while an earlier one is under way, so that
        restored runners kept their initial weights.
        """
        if group is None:
            return
        state = self.learner_group.get_state(
            components=COMPONENT_LEARNER + "/" + COMPONENT_RL_MODULE, inference_only=True
        )[COMPONENT_LEARNER]
        # Without a sequence number runners always take the weights, also older ones out of a checkpoint.
        weights = ray.put({COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE]})
        group.foreach_env_runner(lambda runner: runner.set_state(ray.get(weights)), timeout_seconds=60.0)

    @override(ResumableCQL)
    def _after_restore(self) -> None:
        self._joiner.clear()
        self._sync_weights(self.env_runner_group)

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
    changed.freeze()
    return changed


# RLlib is loaded now. Its list keeps the name resolvable after `ray.shutdown()`.
import_module("ray.rllib.algorithms.registry")
register()
