"""`AddReturnsToGo` on RLlib's episodes: what it writes, what it leaves alone, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.common.returns import RewardSettings
from rllib_calql.store.returns_connector import TAIL_DISCOUNT, AddReturnsToGo


def make_episode(
    rewards: list[float], *, terminated: bool = True, truncated: bool = False, as_numpy: bool = True
) -> SingleAgentEpisode:
    episode = SingleAgentEpisode(
        observations=[np.full(2, t, np.float32) for t in range(len(rewards) + 1)],
        actions=[np.full(1, 0.1 * t, np.float32) for t in range(len(rewards))],
        rewards=list(rewards),
        terminated=terminated,
        truncated=truncated,
        len_lookback_buffer=0,
    )
    return episode.to_numpy() if as_numpy else episode


def returns_of(episode: SingleAgentEpisode) -> list[float]:
    return np.asarray(episode.get_extra_model_outputs(Columns.RETURNS_TO_GO)).tolist()


def annotate(*episodes: SingleAgentEpisode, **settings: float | str | None) -> None:
    connector = AddReturnsToGo(RewardSettings(**({"gamma": 0.5} | settings)))  # type: ignore[arg-type]
    connector(batch={}, episodes=list(episodes))


@pytest.mark.parametrize("as_numpy", [True, False])
def test_a_whole_episode_gets_a_column_of_returns(as_numpy: bool) -> None:
    episode = make_episode([1.0, 2.0, 4.0], as_numpy=as_numpy)
    annotate(episode)
    assert returns_of(episode) == [3.0, 4.0, 4.0]
    assert TAIL_DISCOUNT not in episode.extra_model_outputs


def test_the_episodes_rewards_stay_in_the_environments_units() -> None:
    episode = make_episode([0.0, 0.0, 1.0])
    annotate(episode, reward_scale=10.0, reward_bias=-5.0)
    assert returns_of(episode) == [-6.25, -2.5, 5.0]
    assert np.asarray(episode.get_rewards()).tolist() == [0.0, 0.0, 1.0]
    assert episode.get_return() == 1.0


def test_a_return_never_leaks_into_another_episode_of_the_same_call() -> None:
    alone = make_episode([1.0, 1.0])
    annotate(alone)
    among = [make_episode([1000.0] * 3), make_episode([1.0, 1.0]), make_episode([-1000.0] * 4)]
    annotate(*among)
    assert returns_of(among[1]) == returns_of(alone) == [1.5, 1.0]
    assert [len(returns_of(episode)) for episode in among] == [3, 2, 4]


def test_the_returns_survive_slicing_the_episode() -> None:
    episode = make_episode([1.0, 2.0, 4.0, 8.0])
    annotate(episode)
    whole = returns_of(episode)
    for start, stop in ((0, 1), (2, 3), (1, 4)):
        assert returns_of(episode[start:stop]) == whole[start:stop]


def test_the_batch_and_other_columns_are_handed_through() -> None:
    episode = SingleAgentEpisode(
        observations=[0, 1],
        actions=[0],
        rewards=[1.0],
        extra_model_outputs={"action_logp": [-0.5]},
        terminated=True,
        len_lookback_buffer=0,
    ).to_numpy()
    batch = {"anything": [1]}
    assert AddReturnsToGo(RewardSettings(0.5))(batch=batch, episodes=[episode]) is batch
    assert batch == {"anything": [1]}
    assert episode.get_extra_model_outputs("action_logp").tolist() == [-0.5]


def test_annotating_twice_changes_nothing() -> None:
    episode = make_episode([1.0, 2.0])
    annotate(episode)
    annotate(episode)
    assert returns_of(episode) == [2.0, 2.0]


def test_an_episode_without_an_end_is_refused() -> None:
    episode = make_episode([1.0], terminated=False)
    with pytest.raises(ValueError, match=rf"Episode {episode.id_} ends neither .*; drop it or mark its last step"):
        annotate(episode)


@pytest.mark.parametrize("len_lookback_buffer", [0, 1])
def test_the_second_half_of_an_episode_is_refused(len_lookback_buffer: int) -> None:
    beginning = make_episode([1.0, 2.0], terminated=False, as_numpy=False)
    rest = beginning.cut(len_lookback_buffer=len_lookback_buffer)
    rest.add_env_step(np.zeros(2, np.float32), np.zeros(1, np.float32), 4.0, terminated=True)
    with pytest.raises(ValueError, match=rf"Episode {rest.id_} begins at step 2; join its pieces"):
        annotate(rest)


def test_the_first_slice_of_an_episode_is_refused() -> None:
    episode = make_episode([1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="ends neither terminated nor truncated"):
        annotate(episode[0:2])


@pytest.mark.parametrize(
    ("truncation", "expected"), [("none", [2.0, 2.0]), ("steady", [3.0, 4.0]), ("bootstrap", [2.0, 2.0])]
)
def test_the_truncation_rule_reaches_truncated_episodes_only(truncation: str, expected: list[float]) -> None:
    cut = make_episode([1.0, 2.0], terminated=False, truncated=True)
    ended = make_episode([1.0, 2.0])
    both = make_episode([1.0, 2.0], terminated=True, truncated=True)
    annotate(cut, ended, both, truncation=truncation)
    assert returns_of(cut) == expected
    assert returns_of(ended) == returns_of(both) == [2.0, 2.0]


def test_bootstrapping_leaves_the_weight_of_the_last_value_in_a_second_column() -> None:
    cut = make_episode([1.0, 2.0, 4.0], terminated=False, truncated=True)
    ended = make_episode([1.0, 2.0])
    failed = make_episode([0.0, 0.0], terminated=False, truncated=True)
    annotate(cut, ended, failed, truncation="bootstrap", failure_reward=0.0, reward_bias=-1.0)
    weights = [np.asarray(e.get_extra_model_outputs(TAIL_DISCOUNT)).tolist() for e in (cut, ended, failed)]
    assert weights == [[0.125, 0.25, 0.5], [0.0, 0.0], [0.0, 0.0]]
    assert returns_of(cut) == [0.0 + 0.5 + 0.75, 1.0 + 1.5, 3.0]
    assert returns_of(failed) == [-2.0, -2.0]


def test_the_failure_rule_compares_rewards_in_the_environments_units() -> None:
    # Scaled by 10 and shifted by -5 these rewards are all 5, and the setting's own scaled value is -5.
    success, failure = make_episode([1.0, 1.0]), make_episode([0.0, 0.0])
    annotate(success, failure, reward_scale=10.0, reward_bias=-5.0, failure_reward=0.0)
    assert returns_of(success) == [7.5, 5.0]
    assert returns_of(failure) == [-10.0, -10.0]
