"""Returns-to-go against double sums, closed forms and hand-worked numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_calql.common.returns import (
    RewardSettings,
    discounted_sums,
    is_failure,
    returns_of_episodes,
    returns_to_go,
    tail_discounts,
)

REWARDS = st.lists(st.floats(-10.0, 10.0, allow_nan=False, width=32), min_size=1, max_size=30)
GAMMAS = st.floats(0.0, 0.999)


@settings(max_examples=200, deadline=None)
@given(
    # Few distinct values, so that episodes whose rewards are all the same, and failures, come up.
    rewards=st.one_of(REWARDS, st.lists(st.sampled_from([0.0, -1.0]), min_size=1, max_size=4)),
    gamma=GAMMAS,
    terminated=st.booleans(),
    truncation=st.sampled_from(["none", "steady", "bootstrap"]),
    last_value=st.floats(-100.0, 100.0),
    scale=st.floats(0.1, 10.0),
    bias=st.floats(-5.0, 5.0),
    failure_reward=st.sampled_from([None, 0.0, -1.0]),
)
def test_returns_equal_explicit_double_sums_under_all_rules(
    rewards: list[float],
    gamma: float,
    terminated: bool,
    truncation: str,
    last_value: float,
    scale: float,
    bias: float,
    failure_reward: float | None,
) -> None:
    expected = oracle.returns_to_go(
        [scale * r + bias for r in rewards],
        gamma,
        terminated=terminated,
        truncated=not terminated,
        truncation=truncation,
        bootstrap_value=last_value,
        env_rewards=rewards,
        failure_reward=failure_reward,
        reward_scale=scale,
        reward_bias=bias,
    )
    actual = returns_to_go(
        np.asarray(rewards, np.float32),
        terminated=terminated,
        settings=RewardSettings(gamma, scale, bias, failure_reward, truncation),
        last_value=last_value,
    )
    assert actual.dtype == np.float32
    scale_of_sums = 1.0 + (abs(scale) * 10.0 + abs(bias)) * len(rewards)
    np.testing.assert_allclose(actual, expected, rtol=2e-7, atol=1e-9 * scale_of_sums)


EPISODES = st.lists(
    st.tuples(
        # Few distinct values, so that episodes whose rewards are all the same, and failures, come up.
        st.one_of(REWARDS, st.lists(st.sampled_from([0.0, -1.0]), min_size=1, max_size=4)),
        st.booleans(),
        st.floats(-100.0, 100.0),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=1000, deadline=None)
@given(
    episodes=EPISODES,
    gamma=GAMMAS,
    truncation=st.sampled_from(["none", "steady", "bootstrap"]),
    scale=st.floats(0.1, 10.0),
    bias=st.floats(-5.0, 5.0),
    failure_reward=st.sampled_from([None, 0.0, -1.0]),
)
def test_returns_of_many_episodes_are_the_double_sums_of_each_alone(
    episodes: list[tuple[list[float], bool, float]],
    gamma: float,
    truncation: str,
    scale: float,
    bias: float,
    failure_reward: float | None,
) -> None:
    returns, has_value = returns_of_episodes(
        np.concatenate([np.asarray(rewards, np.float32) for rewards, _, _ in episodes]),
        np.array([len(rewards) for rewards, _, _ in episodes]),
        terminateds=np.array([terminated for _, terminated, _ in episodes]),
        settings=RewardSettings(gamma, scale, bias, failure_reward, truncation),
        last_values=np.array([value for _, _, value in episodes]),
    )
    stop = 0
    for (rewards, terminated, last_value), with_value in zip(episodes, has_value, strict=True):
        start, stop = stop, stop + len(rewards)
        expected = oracle.returns_to_go(
            [scale * r + bias for r in rewards],
            gamma,
            terminated=terminated,
            truncated=not terminated,
            truncation=truncation,
            bootstrap_value=last_value,
            env_rewards=rewards,
            failure_reward=failure_reward,
            reward_scale=scale,
            reward_bias=bias,
        )
        scale_of_sums = 1.0 + (abs(scale) * 10.0 + abs(bias)) * len(rewards)
        np.testing.assert_allclose(returns[start:stop], expected, rtol=2e-7, atol=1e-9 * scale_of_sums)
        failed = failure_reward is not None and all(r == failure_reward for r in rewards)
        assert with_value == (truncation == "bootstrap" and not terminated and not failed)
    assert stop == len(returns)


@settings(max_examples=100, deadline=None)
@given(episodes=EPISODES, chosen=st.integers(0, 5), gamma=GAMMAS)
def test_other_episodes_change_nothing(
    episodes: list[tuple[list[float], bool, float]], chosen: int, gamma: float
) -> None:
    chosen %= len(episodes)
    lengths = np.array([len(rewards) for rewards, _, _ in episodes])
    rows = np.repeat(np.arange(len(episodes)), lengths) == chosen
    rewards = np.concatenate([rewards for rewards, _, _ in episodes])
    terminateds = np.array([terminated for _, terminated, _ in episodes])
    results = [
        returns_of_episodes(values, lengths, terminateds=ends, settings=RewardSettings(gamma, truncation="steady"))
        for values, ends in (
            (rewards, terminateds),
            (np.where(rows, rewards, 1e6), np.where(np.arange(len(episodes)) == chosen, terminateds, ~terminateds)),
        )
    ]
    np.testing.assert_array_equal(results[0][0][rows], results[1][0][rows])


@settings(max_examples=100, deadline=None)
@given(rewards=REWARDS, gamma=GAMMAS, tail=st.floats(-100.0, 100.0))
def test_each_return_is_its_reward_plus_gamma_times_the_next_return(
    rewards: list[float], gamma: float, tail: float
) -> None:
    returns = discounted_sums(np.asarray(rewards), np.array([len(rewards)]), gamma, tail)
    following = np.append(returns[1:], tail)
    np.testing.assert_allclose(returns, np.asarray(rewards) + gamma * following, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_reward_one_everywhere_is_a_geometric_series(gamma: float) -> None:
    returns = returns_to_go(np.ones(40), terminated=True, settings=RewardSettings(gamma))
    np.testing.assert_allclose(returns, (1.0 - gamma ** np.arange(40, 0, -1)) / (1.0 - gamma), rtol=1e-6)


def test_without_discount_the_return_is_the_sum_of_the_rest() -> None:
    returns = returns_to_go(np.array([1.0, 2.0, 4.0]), terminated=True, settings=RewardSettings(1.0))
    assert returns.tolist() == [7.0, 6.0, 4.0]


def test_a_long_episode_is_summed_in_double_precision() -> None:
    # Beyond 2^23 a float32 has no fraction left, so that a sum of 8.3s would grow by 8 a step.
    num_steps = 2**24 // 8 + 1000
    returns = returns_to_go(np.full(num_steps, 8.3), terminated=True, settings=RewardSettings(1.0))
    assert returns[0] == pytest.approx(8.3 * num_steps, rel=1e-7)


def test_rewards_are_scaled_and_shifted_once_and_left_as_they_are() -> None:
    rewards = np.array([0.0, 0.0, 1.0], dtype=np.float32)
    returns = returns_to_go(rewards, terminated=True, settings=RewardSettings(0.5, reward_scale=10.0, reward_bias=-5.0))
    assert returns.tolist() == [-5.0 - 2.5 + 1.25, -5.0 + 2.5, 5.0]
    assert rewards.tolist() == [0.0, 0.0, 1.0]


# What follows the last step


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        ("none", [1 + 0.5 * 2, 2.0]),
        ("steady", [1 + 0.5 * 4, 4.0]),  # 2 for ever is 2 / (1 - 0.5).
        ("bootstrap", [1 + 0.5 * 2 + 0.25 * 8, 2 + 0.5 * 8]),
    ],
)
def test_a_truncated_episode_goes_on_by_its_rule_and_a_terminated_one_never(
    truncation: str, expected: list[float]
) -> None:
    rules = RewardSettings(0.5, truncation=truncation)
    rewards = np.array([1.0, 2.0])
    assert returns_to_go(rewards, terminated=False, settings=rules, last_value=8.0).tolist() == expected
    assert returns_to_go(rewards, terminated=True, settings=rules, last_value=8.0).tolist() == [2.0, 2.0]


def test_the_steady_rule_continues_the_scaled_reward() -> None:
    rules = RewardSettings(0.5, reward_scale=10.0, reward_bias=-5.0, truncation="steady")
    assert returns_to_go(np.array([1.0]), terminated=False, settings=rules).tolist() == [10.0]


def test_the_bootstrap_value_is_in_training_units_already() -> None:
    rules = RewardSettings(0.5, reward_scale=10.0, reward_bias=-5.0, truncation="bootstrap")
    assert returns_to_go(np.array([1.0]), terminated=False, settings=rules, last_value=8.0).tolist() == [9.0]


def test_bootstrapping_without_a_value_is_refused_unless_the_episode_terminated() -> None:
    rules = RewardSettings(0.9, truncation="bootstrap")
    with pytest.raises(ValueError, match=r'`truncation="bootstrap"` needs the value of the last observation, got None'):
        returns_to_go(np.ones(2), terminated=False, settings=rules)
    assert returns_to_go(np.ones(1), terminated=True, settings=rules).tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("truncation", RewardSettings(1.0, truncation="steady")),
        ("failure_reward", RewardSettings(1.0, failure_reward=1.0)),
    ],
)
def test_endless_sums_without_discount_are_refused(name: str, rules: RewardSettings) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` sums rewards for ever, which needs `gamma` < 1, got 1.0"):
        returns_to_go(np.ones(2), terminated=False, settings=rules)


# Failures of sparse-reward tasks


@pytest.mark.parametrize("terminated", [True, False])
@pytest.mark.parametrize("truncation", ["none", "steady", "bootstrap"])
def test_a_failed_episode_fails_for_ever_however_it_ended(terminated: bool, truncation: str) -> None:
    rules = RewardSettings(0.9, 10.0, -5.0, failure_reward=0.0, truncation=truncation)
    returns = returns_to_go(np.zeros(3), terminated=terminated, settings=rules, last_value=7.0)
    np.testing.assert_allclose(returns, [-50.0] * 3, rtol=1e-6)


def test_an_episode_with_one_other_reward_is_no_failure() -> None:
    rules = RewardSettings(0.5, 10.0, -5.0, failure_reward=0.0)
    assert returns_to_go(np.array([0.0, 1.0]), terminated=True, settings=rules).tolist() == [-2.5, 5.0]


@pytest.mark.parametrize("failure_reward", [-0.1, 0.1, 1.0 / 3.0, -1234.5678])
def test_rewards_stored_in_single_precision_still_count_as_failure(failure_reward: float) -> None:
    stored = np.full(5, failure_reward, dtype=np.float32)
    assert is_failure(stored, failure_reward)
    assert not is_failure(stored * np.float32(1.0 + 1e-5), failure_reward)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([0.0, 0.0], True), ([-0.0], True), ([0.0, 1e-8], False), ([0.0, math.nan], False), ([], False)],
)
def test_failure_at_zero_means_exactly_zero_everywhere(rewards: list[float], expected: bool) -> None:
    assert is_failure(np.asarray(rewards), 0.0) is expected


def test_failures_differ_from_successes_by_all_rewards_and_not_by_their_mean() -> None:
    assert not is_failure(np.array([-1.0, 1.0]), 0.0)
    assert not is_failure(np.array([-1.0, -1.0, 0.0]), -1.0)


# The weight of the last observation's value


@settings(max_examples=50, deadline=None)
@given(num_steps=st.integers(1, 30), gamma=GAMMAS, value=st.floats(-100.0, 100.0))
def test_the_tail_discount_is_what_the_bootstrap_value_adds(num_steps: int, gamma: float, value: float) -> None:
    rules = RewardSettings(gamma, truncation="bootstrap")
    rewards = np.zeros(num_steps)
    with_value: Any = returns_to_go(rewards, terminated=False, settings=rules, last_value=value)
    np.testing.assert_allclose(with_value, value * tail_discounts(num_steps, gamma), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_failures_are_told_in_every_type_of_rewards(dtype: Any) -> None:
    assert is_failure(np.full(3, -0.1, dtype), -0.1)
    assert not is_failure(np.full(3, -0.11, dtype), -0.1)


def test_tail_discounts_by_hand() -> None:
    assert tail_discounts(3, 0.5).tolist() == [0.125, 0.25, 0.5]
    assert tail_discounts(2, 1.0).tolist() == [1.0, 1.0]
    assert tail_discounts(2, 0.0).tolist() == [0.0, 0.0]
