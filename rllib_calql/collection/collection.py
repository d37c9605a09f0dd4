"""`CollectingCQL`: how env runners collect, how their episodes are stored, and how many updates follow."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from typing import Any

import numpy as np
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, ENV_RUNNER_SAMPLING_TIMER, TIMERS
from ray.util import log_once

from rllib_calql.checkpoints.saving import ResumableCQL
from rllib_calql.collection.collector import SECONDS_PER_REQUEST, Collector
from rllib_calql.collection.env_errors import told
from rllib_calql.collection.requests import EpisodeJoiner, collect, collect_or_tell
from rllib_calql.common import metrics as keys
from rllib_calql.common.returns import possible_returns
from rllib_calql.learning.updater import UpdatingCQL
from rllib_calql.store.resolution import REMEDY, remark_on_resolution
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.transitions import check_storable, encoded_observations, transitions_from_episode

logger = logging.getLogger(__name__)

_UPDATE_SHARE_OF_REQUEST = 0.4  # Longer updates in between left env runners idle up to a fifth of the time.
_MAX_DISCARDED_IN_A_ROW = 10
_POSSIBLE_RETURNS = "possible_returns"


class CollectingCQL(UpdatingCQL):
    """The part of `CalQL` that concerns env runners and their episodes."""

    _add_returns: AddReturnsToGo
    _stored_space: Any

    def _set_up_collection(self) -> None:
        config = self.config
        self._num_envs = max(1, config.num_env_runners) * config.num_envs_per_env_runner
        self._num_discarded, self._num_discarded_in_a_row = 0, 0
        self._num_failures_before = 0
        self._generation = 0
        self._joiner = EpisodeJoiner()
        self._collector: Collector | None = None
        if self.env_runner_group is not None and config.num_env_runners:
            self._collector = Collector(
                self.env_runner_group,
                timeout_s=config.sample_timeout_s,
                num_envs=config.num_envs_per_env_runner,
                max_requests=config.max_requests_in_flight_per_env_runner,
            )

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
        with told("Collecting an episode"):
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
        settings = self._add_returns.settings
        self._add_returns(batch={}, episodes=[episode])
        with np.errstate(over="ignore", invalid="ignore"):  # What overflows is found below.
            emitted = encoded_observations(episode, self._stored_space)
            observations = emitted.astype(self.store.obs_dtype, copy=False)
            actions = np.asarray(episode.get_actions()).reshape(len(episode), -1)
            rows = transitions_from_episode(episode, observations=observations, actions=actions, settings=settings)
        try:
            check_storable(episode, observations, rows, settings)
        except ValueError as error:
            self._discard_episode(error)
            return
        if (remark := remark_on_resolution(emitted)) and log_once("calql_resolution"):
            logger.warning("%s; if that matters, %s. Said once.", remark, REMEDY)
        self._num_discarded_in_a_row = 0
        self.store.add_online(rows)
        whole = np.array([len(episode)]), np.array([episode.is_terminated])
        self._divergence.include(
            *possible_returns(rows[Columns.RETURNS_TO_GO], rows[Columns.REWARDS], *whole, settings.gamma)
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

    @property
    def _num_env_runner_failures(self) -> int:
        """Failures of env runners over the lifetime, also of runs before that this one continues."""
        return self._num_failures_before + (0 if self._collector is None else self._collector.num_failures)

    @override(ResumableCQL)
    def _collection_state(self) -> dict[str, Any]:
        return {
            keys.NUM_DISCARDED_EPISODES_LIFETIME: self._num_discarded,
            keys.NUM_ENV_RUNNER_FAILURES_LIFETIME: self._num_env_runner_failures,
            _POSSIBLE_RETURNS: self._divergence.possible_returns,
        }

    @override(ResumableCQL)
    def _set_collection_state(self, state: dict[str, Any]) -> None:
        self._num_discarded = state.get(keys.NUM_DISCARDED_EPISODES_LIFETIME, 0)
        self._divergence.include(*state.get(_POSSIBLE_RETURNS, (math.inf, -math.inf)))
        self._num_failures_before = state.get(keys.NUM_ENV_RUNNER_FAILURES_LIFETIME, 0)
        if self._collector is not None:
            self._collector.num_failures = 0  # They belong to the run that is left.

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

    @override(Algorithm)
    def cleanup(self) -> None:
        """Ends the requests to env runners, then the workers themselves."""
        if self._collector is not None:
            self._collector.stop()
        super().cleanup()
