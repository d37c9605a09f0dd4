"""`EpisodeCollection` without an algorithm: rounds, debts that are paid at once, warm-up, and what a restore drops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllib_calql import CalQLConfig
from rllib_calql.collection.budget import EnvStepBudget
from rllib_calql.collection.collection import EpisodeCollection
from rllib_calql.collection.storing import EpisodeKeeper
from rllib_calql.collection.success_key import SuccessKeyWatch
from rllib_calql.common.episode_returns import EpisodeReturns
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.common.returns import RewardSettings
from rllib_calql.learning.divergence import DivergenceWatch
from rllib_calql.learning.weights import WeightPublisher
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo


class Runner:
    """Stands for RLlib's local runner: episodes of three steps, or pieces of two steps."""

    def __init__(self) -> None:
        self.worker_index, self.num_envs = 0, 1
        self.module = SimpleNamespace(explores_randomly=False)
        self.was_random: list[bool] = []
        self.asked: list[dict[str, Any]] = []
        self._episode: SingleAgentEpisode | None = None

    def sample(self, **arguments: Any) -> list[SingleAgentEpisode]:
        """What is asked for."""
        self.asked.append(arguments)
        self.was_random.append(self.module.explores_randomly)
        return [self._piece(3)] if "num_episodes" in arguments else [self._piece(2)]

    def _piece(self, num_steps: int) -> SingleAgentEpisode:
        if self._episode is None:
            self._episode = SingleAgentEpisode()
            self._episode.add_env_reset(np.zeros(1, np.float32))
        else:
            self._episode = self._episode.cut()
        for _ in range(num_steps):
            ends = self._episode.t + 1 >= 3
            self._episode.add_env_step(np.zeros(1, np.float32), np.zeros(1, np.float32), 1.0, terminated=ends)
            if ends:
                break
        piece = self._episode
        if piece.is_done:
            self._episode = None
        return piece.to_numpy()

    def _try_env_step(self, actions: Any) -> None:
        """Not called: `sample` makes its episodes itself."""

    def get_metrics(self) -> dict[str, Any]:
        """None."""
        return {}


class Updates:
    """Stands for the updater: counts what it is asked for."""

    def __init__(self, lifetime: Lifetime) -> None:
        self.calls: list[int] = []
        self._lifetime = lifetime

    def num_offline_rows(self, *, online: bool) -> int:
        """Half of the batch."""
        return 2

    def update(self, num_updates: int, *, online: bool) -> None:
        """Counts."""
        assert online
        self.calls.append(num_updates)
        self._lifetime.count_updates(num_updates, online=True)


class Made:
    """A collection and its neighbours."""

    def __init__(self, *, num_envs: int = 1, updates_per_env_step: float = 1.0, warmup_env_steps: int = 0) -> None:
        config = CalQLConfig().training(train_batch_size_per_learner=4)
        config.fine_tuning(updates_per_env_step=updates_per_env_step)
        config.env_runners(num_envs_per_env_runner=num_envs)
        self.runner = Runner()
        self.store = TransitionStore(obs_dim=1, action_dim=1, online_capacity=100, seed=0)
        self.lifetime = Lifetime(
            offline_updates=0, updates_per_env_step=updates_per_env_step, warmup_env_steps=warmup_env_steps
        )
        self.updates = Updates(self.lifetime)
        keeper = EpisodeKeeper(
            self.store,
            self.lifetime,
            DivergenceWatch(gamma=0.99, has_entropy_term=False),
            EpisodeReturns(),
            add_returns=AddReturnsToGo(RewardSettings(gamma=0.99)),
            space=gym.spaces.Box(-1.0, 1.0, (1,)),
            action_space=gym.spaces.Box(-2.0, 2.0, (1,)),
            episode_limit_env_steps=1_000,
        )
        group = SimpleNamespace(local_env_runner=self.runner)
        self.collection = EpisodeCollection(
            config,
            group,
            store=self.store,
            lifetime=self.lifetime,
            budget=EnvStepBudget(self.lifetime, None, num_envs),
            keeper=keeper,
            weights=WeightPublisher(group, has_remote_runners=False),
            metrics=MetricsLogger(root=True),
            success_key=SuccessKeyWatch(None),
        )

    def step(self) -> None:
        """One."""
        self.collection.step(self.updates)  # type: ignore[arg-type]


def test_a_step_stores_an_episode_and_has_its_updates_made() -> None:
    made = Made(updates_per_env_step=2.0)
    made.step()
    assert (made.store.num_online, made.updates.calls, made.lifetime.updates_owed) == (3, [6], 0.0)


def test_fractions_of_updates_are_owed_until_they_are_whole() -> None:
    made = Made(updates_per_env_step=0.5)
    for _ in range(3):
        made.step()
    assert made.updates.calls == [1, 2, 1]  # Of 1.5, 2 and 1.5 owed.
    assert made.lifetime.updates_owed == pytest.approx(0.5)


def test_random_actions_end_with_the_warm_up_and_it_owes_nothing() -> None:
    made = Made(warmup_env_steps=5)
    for _ in range(3):
        made.step()
    assert made.runner.was_random == [True, True, False]
    assert made.updates.calls == [1, 3]


def test_pieces_of_several_environments_are_stored_once_their_episode_ends() -> None:
    made = Made(num_envs=2)
    made.step()
    assert (made.store.num_online, made.updates.calls) == (0, [])
    made.step()
    assert (made.store.num_online, made.updates.calls) == (3, [3])
    assert all("num_timesteps" in asked for asked in made.runner.asked)


def test_a_restore_drops_episodes_under_way() -> None:
    made = Made(num_envs=2)
    made.step()
    made.collection.forget_unfinished()
    made.step()  # The end of an episode whose beginning is gone.
    assert made.store.num_online == 0
    assert made.runner._needs_initial_reset is True  # type: ignore[attr-defined]


def test_without_remote_runners_there_is_nothing_to_say_of_them() -> None:
    made = Made()
    assert made.collection.results() == {}
    assert made.collection.take_recovered() == []
    made.collection.set_state({"num_env_runner_failures_lifetime": 3})
    assert made.collection.num_failures == 3
    made.collection.set_state({})
    assert made.collection.get_state() == {"num_env_runner_failures_lifetime": 0, "num_env_steps_granted": 0}
