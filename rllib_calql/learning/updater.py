"""`Updater`: how learners are fed, how env runners get their weights, and what happens if a learner is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any

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

from rllib_calql.common import metrics as keys
from rllib_calql.common.episode_returns import EpisodeReturns
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.common.schedules import value_at
from rllib_calql.learning.divergence import DivergenceWatch
from rllib_calql.learning.learner import FITS_REFERENCE, ONLINE, REFERENCE_QUANTILE, UPDATES
from rllib_calql.learning.recovery import LearnerRecovery, is_loss
from rllib_calql.learning.skipped_updates import check_updates_are_applied, number_of
from rllib_calql.learning.weights import WeightPublisher, set_weights
from rllib_calql.store.offline_data import as_multi_agent_batch
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.resident_store import ROW_NUMBERS, ResidentStore, resident_store
from rllib_calql.system import activity

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

_MAX_BYTES_PER_UPDATE_CALL = 64 * 2**20  # Bounds the copies of a super-batch, whatever the observations' size.
_MAX_UPDATES_PER_CALL = 250  # About 20 s on two cores at the sizes of the paper: progress and Ctrl-C stay responsive.
_MAX_UPDATES_BETWEEN_REFRESHES = 250
_REBUILD_TIMEOUT_S = 300.0

_MODULE = "default_policy"
logger = logging.getLogger(__name__)


class Updater:
    """Makes gradient updates with batches from the store.

    Args:
        config: The algorithm's config.
        learner_group: RLlib's `LearnerGroup`.
        store: What batches are drawn from.
        episode_returns: Of all episodes, for a quantile of them.
        lifetime: Counts the updates.
        divergence: Looks at mean Q after each call.
        metrics: RLlib's `MetricsLogger`.
        weights: Where env runners get their weights.
        on_rebuilt: Called with the new group after lost learners have been replaced.
    """

    def __init__(
        self,
        config: CalQLConfig,
        learner_group: Any,
        *,
        store: TransitionStore,
        episode_returns: EpisodeReturns,
        lifetime: Lifetime,
        divergence: DivergenceWatch,
        metrics: Any,
        weights: WeightPublisher,
        on_rebuilt: Callable[[Any], None],
    ) -> None:
        self._config = config
        self._learner_group = learner_group
        self._store = store
        self._episode_returns = episode_returns
        self._lifetime = lifetime
        self._divergence = divergence
        self._metrics = metrics
        self._weights = weights
        self._on_rebuilt = on_rebuilt
        self._recovery = LearnerRecovery(timeout_s=_REBUILD_TIMEOUT_S)
        self._resident_store: ResidentStore | None = None
        self._num_updates_timed, self._seconds_timed = 0, 0.0
        self._seconds_per_update: float | None = None
        self._refreshed_at: tuple[int, int] | None = None  # Updates and episodes when returns were last refreshed.
        self._is_reference_fitted = not config.has_reference_network

    def make_store_resident(self) -> None:
        """Lets a learner on a GPU, in this process, draw its batches there."""
        if not self._learner_group.is_remote:
            learner = self._learner_group._learner
            self._resident_store = resident_store(self._store, torch.device(learner._device))
            learner.draw_from(self._resident_store)

    # --- Updates -----------------------------------------------------------------------------------------------------

    def update(self, num_updates: int, *, online: bool, part_of: tuple[int, int] | None = None) -> None:
        """Makes gradient updates, fewer if a learner is lost meanwhile, then hands the weights to the env runners.

        Before the first of all, a learned reference value is fitted.

        Args:
            num_updates: How many.
            online: Of which phase they are.
            part_of: Of what they are a part, for the progress: updates made of it before, and all of it.

        Raises:
            RuntimeError: If updates change nothing, or learners are lost again and again.
        """
        begin = time.perf_counter()
        try:
            if not self._is_reference_fitted:
                self._fit_reference()
                begin = time.perf_counter()  # It is no part of what such updates take.
            self._make_updates(num_updates, online=online, part_of=part_of or (0, num_updates))
            seconds = time.perf_counter() - begin
            self._num_updates_timed += num_updates
            self._seconds_timed += seconds
            self._seconds_per_update = seconds / num_updates
            if self._lifetime.phase == keys.ONLINE:  # Also after the last offline update: the next step collects.
                with self._metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                    self.publish_weights()
            is_switch = not online and self._lifetime.phase == keys.ONLINE
            if is_switch or self._recovery.is_due():
                self.take_snapshot()
        except RayError as error:
            if not (self._learner_group.is_remote and is_loss(error, self._learner_group)):
                raise
            self._rebuild_learners(error)

    def num_offline_rows(self, *, online: bool) -> int:
        """Rows of a batch in the given phase that are offline data."""
        batch_size: int = self._config.train_batch_size_per_learner
        if not online:
            return batch_size
        ratio = self._config.mixing_ratio
        if not isinstance(ratio, str):
            ratio = value_at(ratio, self._lifetime.num_online_env_steps)
        return self._store.num_offline_rows(batch_size, ratio)

    @property
    def seconds_per_update(self) -> float | None:
        """Of the latest call; None before the first."""
        return self._seconds_per_update

    @property
    def seconds_timed(self) -> float:
        """Seconds of all calls since `take_speed`."""
        return self._seconds_timed

    def take_speed(self) -> float | None:
        """Updates per second since the last time; None without any."""
        speed = self._num_updates_timed / self._seconds_timed if self._seconds_timed else None
        self._num_updates_timed, self._seconds_timed = 0, 0.0
        return speed

    def _updates_per_call(self) -> int:
        num_learners = max(1, self._config.num_learners)
        bytes_per_update = self._store.row_nbytes * self._config.train_batch_size_per_learner * num_learners
        return max(1, min(_MAX_UPDATES_PER_CALL, int(_MAX_BYTES_PER_UPDATE_CALL // bytes_per_update)))

    def _fit_reference(self) -> None:
        """Makes what is left of the updates that fit a learned reference value on offline rows, before all others."""
        num_made = self.foreach_learner(attrgetter("num_reference_updates"))[0]
        total, per_call = self._config.reference_updates, self._updates_per_call()
        if num_made < total and self._store.num_training_rows:
            self._refresh_returns()
            errors = []
            for number in range(num_made, total, per_call):
                activity.say(f"fitting the reference value: {{done}} of {total:,}", unit=UPDATES, done=number)
                results = self._results_of(min(per_call, total - number), online=False, fits_reference=True)
                errors.append(number_of(results[0][_MODULE][keys.REFERENCE_LOSS]))
            logger.info(
                "The reference value is fitted: mean squared error %.4g in the first updates, %.4g in the last.",
                errors[0],
                errors[-1],
            )
        self._is_reference_fitted = True

    def _make_updates(self, num_updates: int, *, online: bool, part_of: tuple[int, int]) -> None:
        self._refresh_returns()
        per_call = self._updates_per_call()
        with self._metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            for start in range(0, num_updates, per_call):
                self._say_updating(part_of[0] + start, part_of[1], online=online)
                self._update_once(min(per_call, num_updates - start), online=online)

    def _say_updating(self, num_made: int, num_updates: int, *, online: bool) -> None:
        if online:
            activity.say(f"updating: {{done}} of {num_updates:,}", unit=UPDATES, done=num_made)
        else:
            activity.say(
                "updating" if self._seconds_per_update is not None or num_made else "first updates",
                unit=UPDATES,
                counter=keys.NUM_OFFLINE_UPDATES_LIFETIME,
                base=self._lifetime.num_offline_updates,
            )

    def _update_once(self, num_updates: int, *, online: bool) -> None:
        results = self._results_of(num_updates, online=online)
        self._lifetime.count_updates(num_updates, online=online)
        made = self._lifetime.num_online_updates if online else self._lifetime.num_offline_updates
        self._divergence.observe(results, online=online, num_updates=made)

    def _results_of(self, num_updates: int, *, online: bool, fits_reference: bool = False) -> Any:
        """Results of updates on rows that are drawn for them, one entry for each learner."""
        batch_size = self._config.train_batch_size_per_learner
        drawing = {
            "num_batches": num_updates,
            "batch_size": batch_size,
            "num_offline_rows": self.num_offline_rows(online=online),
        }
        if self._resident_store is not None:
            self._resident_store.follow()
            batches = [as_multi_agent_batch({ROW_NUMBERS: self._store.draw(**drawing).reshape(-1)})]
        else:
            batches = [
                as_multi_agent_batch(self._store.sample(**drawing)) for _ in range(max(1, self._config.num_learners))
            ]
        is_remote = self._learner_group.is_remote
        data = {"batch_refs": [ray.put(batch) for batch in batches]} if is_remote else {"batch": batches[0]}
        timesteps: dict[str, Any] = {
            NUM_ENV_STEPS_SAMPLED_LIFETIME: self._lifetime.num_online_env_steps,
            ONLINE: online,
            FITS_REFERENCE: fits_reference,
        }
        if self._config.has_reference_quantile:
            timesteps[REFERENCE_QUANTILE] = self._episode_returns.quantile(self._config.calibration_quantile)
        results = self._learner_group.update(**data, minibatch_size=batch_size, timesteps=timesteps)
        self._metrics.aggregate(results, key=LEARNER_RESULTS)
        check_updates_are_applied(results)
        return results

    def _refresh_returns(self) -> None:
        """Renews bootstrapped returns if there are new episodes, or learners have moved on."""
        if self._config.truncation != "bootstrap":
            return
        now = (self._lifetime.num_updates, self._lifetime.num_online_episodes)
        if self._refreshed_at is not None:
            updates, episodes = self._refreshed_at
            if now[1] == episodes and now[0] - updates < _MAX_UPDATES_BETWEEN_REFRESHES:
                return
        self._store.refresh_returns(self._estimate_values)
        self._refreshed_at = now

    def _estimate_values(self, observations: np.ndarray) -> np.ndarray:
        chunks = np.array_split(observations, max(1, len(observations) // 4096))
        values = [self.foreach_learner(methodcaller("estimate_values", chunk))[0] for chunk in chunks]
        return np.concatenate(values)

    # --- Learners ----------------------------------------------------------------------------------------------------

    @property
    def has_remote_learners(self) -> bool:
        """Whether learners are actors of their own."""
        return bool(self._learner_group.is_remote)

    def foreach_learner(self, func: Callable[[Any], Any]) -> list[Any]:
        """Calls `func` with every learner; an error of one is raised."""
        results = []
        for result in self._learner_group.foreach_learner(func):
            if not result.ok:
                raise result.get()
            results.append(result.get())
        return results

    def on_one_learner(self, func: Callable[[Any], Any]) -> Any:
        """Calls `func` with the first learner, which is equal to all others; lost learners are replaced before."""
        try:
            return self._of_first_learner(func)
        except RayError as error:
            if not (self._learner_group.is_remote and is_loss(error, self._learner_group)):
                raise
            self._rebuild_learners(error)
            return self._of_first_learner(func)

    def _of_first_learner(self, func: Callable[[Any], Any]) -> Any:
        first = [0] if self.has_remote_learners else None
        (result,) = self._learner_group.foreach_learner(func, remote_actor_ids=first, healthy_only=False)
        if not result.ok:
            raise result.get()
        return result.get()

    def set_learner_state(self, func: Callable[[Any, dict[str, Any]], None], state: dict[str, Any]) -> None:
        """Calls `func` with every learner and the state, which remote ones share."""
        if self.has_remote_learners:
            reference = ray.put(state)
            self.foreach_learner(lambda learner: func(learner, ray.get(reference)))
        else:
            self.foreach_learner(lambda learner: func(learner, state))

    def take_snapshot(self) -> None:
        """Keeps the state of remote learners, for the case that one is lost."""
        if self.has_remote_learners:
            self._recovery.take_snapshot(self._learner_group, self._lifetime.counters())

    def _rebuild_learners(self, error: BaseException) -> None:
        """Replaces lost learners; updates made since the last snapshot are made again."""
        old: Any = self._learner_group
        self._learner_group, counters = self._recovery.rebuild(
            old, lambda: old.config.build_learner_group(rl_module_spec=old._module_spec), error
        )
        self._is_reference_fitted = not self._config.has_reference_network
        self._on_rebuilt(self._learner_group)
        self._lifetime.take_back_updates(counters)
        self.publish_weights()

    # --- Weights -----------------------------------------------------------------------------------------------------

    def publish_weights(self) -> None:
        """Gives the local runner the learners' weights; remote ones get them with their next request."""
        if self._weights.is_needed:
            self._weights.publish(self._state_for_runners())

    def set_weights_on(self, group: Any) -> None:
        """Sets the learners' weights on every runner of a group, if there is one, and waits."""
        if group is not None:
            set_weights(group, self._state_for_runners())

    def begin_anew(self, group: Any) -> None:
        """Brings everything in line with learners whose state was set from outside.

        Args:
            group: Env runners that get the weights, or None.
        """
        self.publish_weights()
        self.set_weights_on(group)
        self._refreshed_at = None
        self._is_reference_fitted = not self._config.has_reference_network
        self.take_snapshot()

    def _state_for_runners(self) -> dict[str, Any]:
        state = self._learner_group.get_state(
            components=COMPONENT_LEARNER + "/" + COMPONENT_RL_MODULE, inference_only=True
        )[COMPONENT_LEARNER]
        return {COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE]}
