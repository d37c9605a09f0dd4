"""`UpdatingCQL`: how learners are fed, how env runners get weights, and what happens if a learner is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import methodcaller
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE
from ray.rllib.utils.metrics import (
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)

from rllib_calql.checkpoints.saving import ResumableCQL
from rllib_calql.collection.requests import Weights
from rllib_calql.common import metrics as keys
from rllib_calql.learning.divergence import DivergenceWatch
from rllib_calql.learning.learner import ONLINE
from rllib_calql.learning.recovery import LearnerRecovery, is_loss
from rllib_calql.learning.skipped_updates import check_updates_are_applied
from rllib_calql.store.offline_data import as_multi_agent_batch
from rllib_calql.store.resident_store import ROW_NUMBERS, ResidentStore, resident_store

_MAX_BYTES_PER_UPDATE_CALL = 64 * 2**20  # Bounds the copies of a super-batch, whatever the observations' size.
_MAX_UPDATES_PER_CALL = 250  # About 20 s on two cores at the sizes of the paper: progress and Ctrl-C stay responsive.
_MAX_UPDATES_BETWEEN_REFRESHES = 250
_REBUILD_TIMEOUT_S = 300.0


class UpdatingCQL(ResumableCQL):
    """The part of `CalQL` that concerns learners."""

    learner_group: Any

    def _set_up_updates(self) -> None:
        self._num_updates_timed, self._seconds_timed = 0, 0.0
        self._seconds_per_update: float | None = None
        self._recovery = LearnerRecovery(timeout_s=_REBUILD_TIMEOUT_S)
        self._weights: Weights | None = None
        self._refreshed_at: tuple[int, int] | None = None  # Updates and episodes when returns were last refreshed.
        self._resident_store: ResidentStore | None = None
        self._divergence = DivergenceWatch(
            gamma=self.config.gamma, has_entropy_term=not self.config.deterministic_backup
        )

    def _set_up_residence(self) -> None:
        """Lets a learner on a GPU, in this process, draw its batches there."""
        if not self.learner_group.is_remote:
            learner = self.learner_group._learner
            self._resident_store = learner.resident_store = resident_store(self.store, torch.device(learner._device))

    @property
    def phase(self) -> str:
        """The phase of the next training step, "offline" or "online"."""
        return keys.OFFLINE if self.num_offline_updates < self.config.num_offline_updates else keys.ONLINE

    # --- Updates -----------------------------------------------------------------------------------------------------

    def _update(self, num_updates: int, *, online: bool) -> None:
        """Makes gradient updates, fewer if a learner is lost meanwhile, then hands the weights to the env runners."""
        begin = time.perf_counter()
        try:
            self._make_updates(num_updates, online=online)
            seconds = time.perf_counter() - begin
            self._num_updates_timed += num_updates
            self._seconds_timed += seconds
            self._seconds_per_update = seconds / num_updates
            if self.phase == keys.ONLINE:  # Also after the last offline update: the next step collects.
                with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                    self._publish_weights()
            is_switch = not online and self.phase == keys.ONLINE
            if self.learner_group.is_remote and (is_switch or self._recovery.is_due()):
                self._take_snapshot()
        except RayError as error:
            if not (self.learner_group.is_remote and is_loss(error, self.learner_group)):
                raise
            self._rebuild_learners(error)

    def _make_updates(self, num_updates: int, *, online: bool) -> None:
        self._refresh_returns()
        num_learners = max(1, self.config.num_learners)
        bytes_per_update = self.store.row_nbytes * self.config.train_batch_size_per_learner * num_learners
        per_call = max(1, min(_MAX_UPDATES_PER_CALL, _MAX_BYTES_PER_UPDATE_CALL // bytes_per_update))
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            for start in range(0, num_updates, per_call):
                self._update_once(min(per_call, num_updates - start), online=online)

    def _update_once(self, num_updates: int, *, online: bool) -> None:
        batch_size = self.config.train_batch_size_per_learner
        drawing = {
            "num_batches": num_updates,
            "batch_size": batch_size,
            "num_offline_rows": self._num_offline_rows(online=online),
        }
        if self._resident_store is not None:
            self._resident_store.follow()
            batches = [as_multi_agent_batch({ROW_NUMBERS: self.store.draw(**drawing).reshape(-1)})]
        else:
            batches = [
                as_multi_agent_batch(self.store.sample(**drawing)) for _ in range(max(1, self.config.num_learners))
            ]
        is_remote = self.learner_group.is_remote
        data = {"batch_refs": [ray.put(batch) for batch in batches]} if is_remote else {"batch": batches[0]}
        results = self.learner_group.update(
            **data,
            minibatch_size=batch_size,
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_online_env_steps, ONLINE: online},
        )
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        check_updates_are_applied(results)
        if online:
            self.num_online_updates += num_updates
            self._updates_owed -= num_updates
        else:
            self.num_offline_updates += num_updates
        made = self.num_online_updates if online else self.num_offline_updates
        self._divergence.observe(results, online=online, num_updates=made)

    def _num_offline_rows(self, *, online: bool) -> int:
        batch_size = self.config.train_batch_size_per_learner
        if not online:
            return batch_size
        return self.store.num_offline_rows(batch_size, self.config.mixing_ratio)

    def _refresh_returns(self) -> None:
        """Renews bootstrapped returns if there are new episodes, or learners have moved on."""
        if self.config.truncation != "bootstrap":
            return
        now = (self.num_offline_updates + self.num_online_updates, self.num_online_episodes)
        if self._refreshed_at is not None:
            updates, episodes = self._refreshed_at
            if now[1] == episodes and now[0] - updates < _MAX_UPDATES_BETWEEN_REFRESHES:
                return
        self.store.refresh_returns(self._estimate_values)
        self._refreshed_at = now

    def _estimate_values(self, observations: np.ndarray) -> np.ndarray:
        chunks = np.array_split(observations, max(1, len(observations) // 4096))
        values = [self._foreach_learner(methodcaller("estimate_values", chunk))[0] for chunk in chunks]
        return np.concatenate(values)

    # --- Learners ----------------------------------------------------------------------------------------------------

    def _foreach_learner(self, func: Callable[[Any], Any]) -> list[Any]:
        results = []
        for result in self.learner_group.foreach_learner(func):
            if not result.ok:
                raise result.get()
            results.append(result.get())
        return results

    def _take_snapshot(self) -> None:
        self._recovery.take_snapshot(self.learner_group, self._counters_of_phases())

    def _rebuild_learners(self, error: BaseException) -> None:
        """Replaces lost learners; updates made since the last snapshot are made again."""
        old: Any = self.learner_group
        self.learner_group, counters = self._recovery.rebuild(
            old, lambda: old.config.build_learner_group(rl_module_spec=old._module_spec), error
        )
        self.num_offline_updates = counters[keys.NUM_OFFLINE_UPDATES_LIFETIME]
        self._updates_owed += self.num_online_updates - counters[keys.NUM_ONLINE_UPDATES_LIFETIME]
        self.num_online_updates = counters[keys.NUM_ONLINE_UPDATES_LIFETIME]
        self._publish_weights()

    # --- Weights -----------------------------------------------------------------------------------------------------

    def _state_for_runners(self) -> dict[str, Any]:
        state = self.learner_group.get_state(
            components=COMPONENT_LEARNER + "/" + COMPONENT_RL_MODULE, inference_only=True
        )[COMPONENT_LEARNER]
        return {COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE]}

    def _publish_weights(self) -> None:
        """Gives the local runner the learners' weights; remote ones get them with their next request."""
        if self.env_runner_group is None:
            return
        state = self._state_for_runners()
        if self.env_runner_group.local_env_runner is not None:
            self.env_runner_group.local_env_runner.set_state(state)
        if self.config.num_env_runners:
            version = 0 if self._weights is None else self._weights.version + 1
            self._weights = Weights(version, ray.put(state))

    def _sync_weights(self, group: Any) -> None:
        """Sets the learners' weights on every runner and waits.

        RLlib's `sync_weights` does not wait and drops the call silently while an earlier one is under way, so that
        restored runners kept their initial weights.
        """
        if group is None:
            return
        # Without a sequence number runners always take the weights, also older ones out of a checkpoint.
        weights = ray.put(self._state_for_runners())
        group.foreach_env_runner(lambda runner: runner.set_state(ray.get(weights)), timeout_seconds=60.0)
