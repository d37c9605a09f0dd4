"""`EpisodeCollection`: how env runners collect, and how collecting and updating keep pace with each other."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, ENV_RUNNER_SAMPLING_TIMER, TIMERS

from rllib_calql.collection.budget import BudgetSpentError, EnvStepBudget
from rllib_calql.collection.callbacks import ENV_STEPS
from rllib_calql.collection.clients import ClientEpisodes
from rllib_calql.collection.collector import SECONDS_PER_REQUEST, Collector
from rllib_calql.collection.env_errors import told
from rllib_calql.collection.requests import EpisodeJoiner, collect, collect_or_tell
from rllib_calql.collection.storing import EpisodeKeeper
from rllib_calql.collection.success_key import SuccessKeyWatch
from rllib_calql.common import metrics as keys
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.learning.updater import Updater
from rllib_calql.learning.weights import WeightPublisher
from rllib_calql.store.replay import TransitionStore
from rllib_calql.system import activity

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

_SECONDS_OF_CLIENTS = 30.0  # That an iteration waits for clients at most.
_UPDATES_AT_ONCE = 50  # The same however often they are interrupted, for a batch follows from how many are drawn.
_UPDATE_SHARE_OF_REQUEST = 0.4  # Longer updates in between left env runners idle up to a fifth of the time.


class EpisodeCollection:
    """Collects episodes by the env runners of an algorithm, and hands them to the keeper.

    Args:
        config: The algorithm's config.
        env_runner_group: RLlib's `EnvRunnerGroup`; None without an environment, and `step` is not called then.
        store: Says whether there are rows to update with, and draws the seeds of requests.
        lifetime: Says how many updates are due.
        budget: Grants the env steps.
        keeper: Gets the episodes.
        weights: What the policy is to collect with.
        metrics: RLlib's `MetricsLogger`.
        success_key: Notices a `success_key` that no episode shows.
    """

    def __init__(
        self,
        config: CalQLConfig,
        env_runner_group: Any,
        *,
        store: TransitionStore,
        lifetime: Lifetime,
        budget: EnvStepBudget,
        keeper: EpisodeKeeper,
        weights: WeightPublisher,
        metrics: Any,
        success_key: SuccessKeyWatch,
    ) -> None:
        self._config = config
        self._success_key = success_key
        self._group = env_runner_group
        self._store = store
        self._lifetime = lifetime
        self._budget = budget
        self._keeper = keeper
        self._weights = weights
        self._metrics = metrics
        self._num_envs = max(1, config.num_env_runners) * config.num_envs_per_env_runner
        self._num_failures_before = 0
        self._generation = 0
        self._joiner = EpisodeJoiner()
        self._clients = ClientEpisodes() if config.has_clients else None
        self._collector: Collector | None = None
        if env_runner_group is not None and config.num_env_runners:
            self._collector = Collector(
                env_runner_group,
                timeout_s=config.sample_timeout_s,
                num_envs=config.num_envs_per_env_runner,
                max_requests=config.max_requests_in_flight_per_env_runner,
                budget=budget,
            )

    # --- One training step -------------------------------------------------------------------------------------------

    def step(self, updater: Updater) -> None:
        """Collects an episode of every environment, and has the updates made that they owe.

        As the budget of env steps is spent, the episodes under way are cut and stored. Then, and where `stop` ends the
        run by its env steps, all updates are made that are still owed.

        Raises:
            RuntimeError: If the environment or all env runners fail again and again.
            ValueError: If episodes cannot be stored again and again.
        """
        if not self.has_environment:
            self.make_owed_updates(updater, self._config.updates_per_iteration)
            return
        if self._collector is not None and self._config.sample_async:
            self._collect_and_update(self._collector, updater)
            end = self._config._ends_at_env_steps
            if end is not None and self._lifetime.num_online_env_steps >= end:
                self.make_owed_updates(updater)  # Nobody would make them after this iteration.
            return
        begin, is_waiting = time.perf_counter(), not self._budget.is_spent
        while is_waiting:
            with self._metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
                episodes, metrics = self._collect_round()
            self._take_in(episodes, metrics)
            is_waiting = (
                not episodes and self._clients is not None and time.perf_counter() - begin < _SECONDS_OF_CLIENTS
            )
        if self._budget.is_spent:
            self._take_in(self._cut(), [])
        if num_updates := self._num_updates_due(updater):
            updater.update(num_updates, online=True)

    @property
    def has_environment(self) -> bool:
        """Whether there are env runners; without any, episodes come by `CalQL.add_episodes` alone."""
        return self._group is not None

    def make_owed_updates(self, updater: Updater, most: int | None = None) -> int:
        """Makes the updates that stored env steps owe, and returns how many it has made.

        Args:
            updater: Makes them.
            most: How many at most; None for all that are owed now.

        Raises:
            ValueError: If `most` is no number of updates.
        """
        if most is not None and (isinstance(most, bool) or not isinstance(most, Integral) or most < 0):
            raise ValueError(f"`most` must be None or an integer of at least 0, got {most!r}.")
        made, most = 0, self._num_updates_due(updater) if most is None else most
        while num_updates := min(self._num_updates_due(updater), _UPDATES_AT_ONCE, max(0, most - made)):
            begun = self._lifetime.num_online_updates
            updater.update(num_updates, online=True, part_of=(made, most))
            made += self._lifetime.num_online_updates - begun  # Fewer if a learner was lost meanwhile.
        return made

    def is_complete(self, updater: Updater) -> bool:
        """Whether no env step is left to take, by the budget or without an environment, and no owed update to make."""
        return (self._budget.is_spent or not self.has_environment) and not self._num_updates_due(updater)

    def refuse_more(self, updater: Updater) -> None:
        """Refuses another step once this `is_complete`.

        Raises:
            BudgetSpentError: If the budget is spent; the message names the way out.
            RuntimeError: If there is no environment.
        """
        if self.is_complete(updater) and not self.has_environment:
            raise RuntimeError(
                f"The offline phase is over after {self._lifetime.num_offline_updates} updates and there is no "
                "environment; set `.environment(...)` to fine-tune, or raise `offline_updates`. Episodes that were "
                "made elsewhere are handed over by `add_episodes`."
            )
        if self.is_complete(updater):
            limit, taken = self._budget.limit, self._lifetime.num_online_env_steps_taken
            raise BudgetSpentError(
                f"`max_online_env_steps` is {limit}, and {taken} env steps have been taken; the environment is not "
                "touched any more. To go on, raise it: `CalQL.from_checkpoint(path, config=...)` in Python, in the "
                "experiment's file with `--resume`."
            )

    def _collect_round(self) -> tuple[list[SingleAgentEpisode], list[dict[str, Any]]]:
        """One round of every env runner: an episode each, or with several sub-environments a share of steps."""
        self._say_collecting()
        is_vectorised = self._config.num_envs_per_env_runner > 1
        arguments = self._request(self._num_env_steps_per_round() if is_vectorised else None)
        if self._collector is not None:
            return self._collector.collect_round(
                lambda _, granted: partial(collect_or_tell, **arguments, max_env_steps=granted),
                max_granted=self._env_steps_of_a_request,
            )
        granted, taken = self._budget.grant(self._env_steps_of_a_request()), 0

        def note(num_env_steps: int) -> None:
            nonlocal taken
            taken = num_env_steps

        try:
            with told("Collecting an episode"):
                arguments |= {"weights": None, "max_env_steps": granted, "on_taken": note}
                collected = collect(self._group.local_env_runner, **arguments)
        finally:
            self._budget.settle(granted, taken)
        if self._clients is not None:
            self._clients.receipt, self._clients.num_connected = collected.receipt, collected.num_clients
        return self._joiner.add(collected.pieces), [collected.metrics]

    def _env_steps_of_a_request(self) -> float:
        """Env steps that one runner may make of a round: its share of those left, but not less than an episode."""
        num_runners = max(1, self._config.num_env_runners)
        if self._config.num_envs_per_env_runner > 1:
            most: float = self._num_env_steps_per_round() + self._config.num_envs_per_env_runner - 1
        elif math.isinf(self._budget.left):
            return math.inf
        else:
            most = float(self._config.episode_limit_env_steps)
        if math.isinf(self._budget.left):
            return most
        mean_length = self._env_steps_of_a_round() / self._num_envs if self._lifetime.num_online_episodes else 0.0
        share = max(self._budget.left // num_runners, math.ceil(mean_length), self._config.num_envs_per_env_runner)
        return float(min(most, share))

    def _cut(self) -> list[SingleAgentEpisode]:
        return self._joiner.cut() + (self._collector.cut() if self._collector is not None else [])

    def _collect_and_update(self, collector: Collector, updater: Updater) -> None:
        """Updates while env runners collect, until as many episodes are stored as there are environments."""
        lifetime, budget = self._lifetime, self._budget
        begin, num_begun, seconds_before = time.perf_counter(), lifetime.num_online_episodes, updater.seconds_timed
        num_steps_begun = lifetime.num_online_env_steps
        while not self.is_complete(updater):
            if lifetime.num_online_episodes - num_begun >= self._num_envs and not budget.is_spent:
                break
            if self._clients is not None and time.perf_counter() - begin > _SECONDS_OF_CLIENTS:
                break  # Nobody may be connected, and whoever asks for checkpoints or an end is to be heard.
            round_env_steps = self._env_steps_of_a_round()
            staleness = self._config.max_staleness_env_steps
            limit = round_env_steps if staleness is None else float(staleness)
            # Learners that have nothing to do need the ends of episodes.
            if not self._num_updates_due(updater) or lifetime.num_env_steps_behind <= limit:
                collector.ask(
                    lambda num_env_steps, granted: partial(
                        collect_or_tell, **self._request(num_env_steps), max_env_steps=granted
                    ),
                    max_env_steps=max(limit, round_env_steps),
                    # Clients take their steps unasked, so that a request that is lost has taken none.
                    max_granted=None if self._clients is None else math.inf,
                )
            self._take_in(*collector.fetch())
            if budget.is_spent:
                self._take_in(self._cut(), [])
            if num_updates := self._num_updates_due(updater):
                updater.update(min(num_updates, _num_updates_between_requests(updater)), online=True)
            elif not budget.is_spent:
                self._say_collecting(lifetime.num_online_env_steps - num_steps_begun)
                with self._metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
                    collector.wait()
        busy = (updater.seconds_timed - seconds_before) / (time.perf_counter() - begin)
        self._metrics.log_value((keys.COLLECTION, keys.LEARNER_BUSY_SHARE), busy, window=1)

    def _env_steps_of_a_round(self) -> float:
        """Env steps of an episode of every environment, by the mean of those stored."""
        if self._lifetime.num_online_episodes == 0:
            return math.inf
        return float(self._num_envs * self._lifetime.num_online_env_steps / self._lifetime.num_online_episodes)

    def _say_collecting(self, num_env_steps: int = 0) -> None:
        expected = self._env_steps_of_a_round()
        if self._clients is not None and self._collector is not None:
            self._clients.num_connected = self._collector.num_clients
        from_whom = "" if self._clients is None else f" from {self._clients.told}"
        of = "" if math.isinf(expected) else f" of ~{expected:,.0f}"
        activity.say(
            f"collecting: {{done}}{of} env steps{from_whom}",
            unit=ENV_STEPS,
            done=num_env_steps,
            counter=keys.NUM_ONLINE_ENV_STEPS_LIFETIME,
            base=self._lifetime.num_online_env_steps - num_env_steps,
        )

    def _num_updates_due(self, updater: Updater) -> int:
        """Updates to make now: those owed, none as long as a batch needs online rows and there are none."""
        is_all_offline = updater.num_offline_rows(online=True) == self._config.train_batch_size_per_learner
        return int(self._lifetime.updates_owed) if self._store.num_online or is_all_offline else 0

    def _request(self, num_env_steps: int | None) -> dict[str, Any]:
        """Arguments of `collect`."""
        has_policy = self._config.pretrained or self._lifetime.num_updates > 0
        notes = {} if self._clients is None else {"notes": self._clients.notes(self._lifetime.num_updates)}
        return {
            **notes,
            "seed": self._store.draw_seed(),
            "num_env_steps": num_env_steps,
            "random_actions": not has_policy and self._lifetime.is_warming_up,
            "weights": self._weights.latest,
            "generation": self._generation,
        }

    def _num_env_steps_per_round(self) -> int:
        """Steps of one runner and round with several sub-environments: about one update call's worth of updates."""
        steps = self._config.updates_per_iteration / self._config.updates_per_env_step
        num_envs: int = self._config.num_envs_per_env_runner
        return max(num_envs, round(steps / max(1, self._config.num_env_runners)))

    def _take_in(self, episodes: list[SingleAgentEpisode], metrics: list[dict[str, Any]]) -> None:
        if metrics:
            self._metrics.aggregate(metrics, key=ENV_RUNNER_RESULTS)
        if self._clients is not None:
            new = self._clients.new(episodes)
            self._lifetime.count_env_steps_taken(sum(map(len, new)) - sum(map(len, episodes)))
            episodes = new
        self._success_key.include(episodes)
        self._keeper.keep(episodes)

    # --- Env runners that fail ---------------------------------------------------------------------------------------

    def collects_with(self, group: Any) -> bool:
        """Whether this brings back the lost env runners of a group itself, without waiting for them."""
        return self._collector is not None and group is self._group

    def take_recovered(self) -> list[int]:
        """Indices of env runners that came back since the last call."""
        return [] if self._collector is None else self._collector.take_recovered()

    @property
    def num_failures(self) -> int:
        """Failures of env runners over the lifetime, also of runs before that this one continues."""
        return self._num_failures_before + (0 if self._collector is None else self._collector.num_failures)

    def stop(self) -> None:
        """Ends the requests to env runners."""
        if self._collector is not None:
            self._collector.stop()

    # --- Results and checkpoints -------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """What a result says of remote env runners and of clients; nothing without any."""
        of_clients = {} if self._clients is None else {keys.NUM_CLIENTS: self._clients.num_connected}
        if self._collector is None:
            return of_clients
        return {
            **of_clients,
            keys.NUM_HEALTHY_ENV_RUNNERS: self._collector.num_healthy,
            keys.NUM_ENV_RUNNER_FAILURES_LIFETIME: self.num_failures,
        }

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        of_clients = {} if self._clients is None else self._clients.get_state()
        return {keys.NUM_ENV_RUNNER_FAILURES_LIFETIME: self.num_failures, **self._budget.get_state(), **of_clients}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint; empty in one of an earlier version."""
        self._num_failures_before = state.get(keys.NUM_ENV_RUNNER_FAILURES_LIFETIME, 0)
        self._budget.set_state(state)
        if self._clients is not None:
            self._clients.set_state(state)
        if self._collector is not None:
            self._collector.forget_failures()  # They belong to the run that is left.

    def forget_unfinished(self) -> None:
        """Gives up all episodes and requests under way, as after a restore."""
        self._joiner.clear()
        self._generation += 1
        if self._collector is not None:
            self._collector.forget_outstanding()


def _num_updates_between_requests(updater: Updater) -> int:
    """Updates that take less time than a request, so that a runner has its next one before it ends the last."""
    if updater.seconds_per_update is None:
        return 10
    return max(1, round(_UPDATE_SHARE_OF_REQUEST * SECONDS_PER_REQUEST / updater.seconds_per_update))
