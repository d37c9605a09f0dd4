"""`EpisodeKeeper` without an algorithm: rows, returns, debts, and episodes that cannot be stored."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.collection.storing import EpisodeKeeper
from rllib_calql.common.episode_returns import EpisodeReturns
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.common.returns import RewardSettings
from rllib_calql.learning.divergence import DivergenceWatch
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo

GAMMA = 0.5
ACTIONS = gym.spaces.Box(-2.0, 2.0, (1,))


def episode_of(rewards: list[float], *, terminated: bool = True) -> SingleAgentEpisode:
    return SingleAgentEpisode(
        observations=[np.float32([t]) for t in range(len(rewards) + 1)],
        actions=[np.float32([0.1 * t]) for t in range(len(rewards))],
        rewards=rewards,
        infos=[{}] * (len(rewards) + 1),
        terminated=terminated,
        truncated=not terminated,
        len_lookback_buffer=0,
    ).to_numpy()


class Kept:
    """A keeper and what it fills."""

    def __init__(self, *, env: str = "", action_space: gym.spaces.Box = ACTIONS, action_dim: int = 1) -> None:
        self.store = TransitionStore(obs_dim=1, action_dim=action_dim, online_capacity=100, seed=0)
        self.lifetime = Lifetime(offline_updates=0, updates_per_env_step=2.0, warmup_env_steps=0)
        self.divergence = DivergenceWatch(gamma=GAMMA, has_entropy_term=False)
        self.episode_returns = EpisodeReturns([8.0])
        self.keeper = EpisodeKeeper(
            self.store,
            self.lifetime,
            self.divergence,
            self.episode_returns,
            add_returns=AddReturnsToGo(RewardSettings(gamma=GAMMA)),
            space=gym.spaces.Box(-100.0, 100.0, (1,)),
            action_space=action_space,
            env=env,
            episode_limit_env_steps=1_000,
        )


def test_an_episode_becomes_rows_with_returns_and_owes_updates() -> None:
    kept = Kept()
    kept.keeper.keep([episode_of([1.0, 2.0, 4.0]), episode_of([8.0])])
    column: Any = kept.store.online_column
    assert column(Columns.RETURNS_TO_GO).tolist() == [3.0, 4.0, 4.0, 8.0]  # 1 + (2 + 4 / 2) / 2 and so on.
    assert column(Columns.TERMINATEDS).tolist() == [0, 0, 1, 1]
    assert column(Columns.NEXT_OBS).reshape(-1).tolist() == [1, 2, 3, 1]
    assert (kept.lifetime.num_online_env_steps, kept.lifetime.num_online_episodes) == (4, 2)
    assert kept.episode_returns.quantile(0.25) == 5.5  # Of 3, 8 and the offline 8: discounted, and not of rows.
    assert kept.lifetime.updates_owed == 8.0
    assert kept.divergence.possible_returns == (3.0, 8.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_an_episode_that_cannot_be_stored_is_left_out_and_counted(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        kept.keeper.keep([episode_of([1.0, bad]), episode_of([1.0])])
    assert (kept.store.num_online, kept.keeper.num_discarded, kept.lifetime.num_online_episodes) == (1, 1, 1)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["An episode is discarded"]


def test_ten_bad_episodes_in_a_row_end_the_run() -> None:
    kept = Kept()
    bad, good = episode_of([np.nan]), episode_of([1.0])
    kept.keeper.keep([bad] * 9)
    kept.keeper.keep([good])
    kept.keeper.keep([bad] * 9)
    with pytest.raises(ValueError, match="step 0: the environment returned a reward with NaN"):
        kept.keeper.keep([bad])
    assert kept.keeper.num_discarded == 19


def test_the_count_of_discarded_episodes_survives() -> None:
    kept, restored = Kept(), Kept()
    kept.keeper.keep([episode_of([np.nan])])
    restored.keeper.set_state(kept.keeper.get_state())
    assert restored.keeper.num_discarded == 1
    restored.keeper.set_state({})  # A checkpoint of a version that did not count.
    assert restored.keeper.num_discarded == 0
