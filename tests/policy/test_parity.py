"""A policy file gives the actions that environments get from env runners, greedy and sampled, for all spaces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from policies import ACTIONS, CASES, VECTOR, Case, Trained, assert_same_actions, trained
from scipy import stats

from rllib_calql.policy.file_format import packed, unpacked
from rllib_calql.policy.loading import numpy_policy
from rllib_calql.policy.policy import Policy

NUM_OBSERVATIONS = 1000


@pytest.fixture(scope="module", params=CASES)
def policy_in_runner(request: pytest.FixtureRequest) -> Any:
    made = trained(CASES[request.param])
    yield made
    made.runner.stop()


def policy_of(made: Trained) -> Policy:
    return numpy_policy(*unpacked(packed(made.data.metadata, made.data.arrays), "the file"))


def stacked(space: Any, observations: list[Any]) -> Any:
    """A batch of observations, in the structure of one."""
    first = observations[0]
    if isinstance(first, dict):
        return {key: stacked(space[key], [one[key] for one in observations]) for key in first}
    if isinstance(first, tuple):
        return tuple(stacked(part, [one[i] for one in observations]) for i, part in enumerate(space.spaces))
    return np.stack(observations)


def test_greedy_actions_are_those_of_env_runners(policy_in_runner: Trained) -> None:
    observations, expected = policy_in_runner.acts(NUM_OBSERVATIONS)
    policy = policy_of(policy_in_runner)
    found = np.stack([policy(observation) for observation in observations])
    assert_same_actions(found, expected, policy_in_runner.case.actions)
    batch = policy.compute_actions(stacked(policy_in_runner.case.observations, observations))
    assert_same_actions(batch, expected, policy_in_runner.case.actions)
    free = policy_in_runner.case.actions.low < policy_in_runner.case.actions.high
    assert (expected.std(axis=0)[free] > 0.0).all()  # The observations matter.


def test_sampled_actions_are_those_of_env_runners_for_the_same_noise(policy_in_runner: Trained) -> None:
    observations, expected = policy_in_runner.acts(NUM_OBSERVATIONS, noise=np.random.default_rng(3))
    policy, rng = policy_of(policy_in_runner), np.random.default_rng(3)
    found = np.stack([policy(observation, explore=True, rng=rng) for observation in observations])
    assert_same_actions(found, expected, policy_in_runner.case.actions)


@pytest.fixture(scope="module")
def small() -> Trained:
    made = trained(Case(VECTOR))
    made.runner.stop()
    return made


def test_samples_are_a_squashed_gaussian(small: Trained) -> None:
    # In float64 by the formula of the paper: tanh(mean + std * noise), std = exp(multiplier * output + offset).
    arrays = {name: array.astype(np.float64) for name, array in small.data.arrays.items()}
    observation = np.linspace(-1.0, 1.0, 5).astype(np.float32)
    hidden = observation.astype(np.float64)
    for number in range(2):
        hidden = np.maximum(arrays[f"hidden_{number}.weight"] @ hidden + arrays[f"hidden_{number}.bias"], 0.0)
    mean, raw = np.split(arrays["head.weight"] @ hidden + arrays["head.bias"], 2)
    std = np.exp(np.clip(arrays["log_std_multiplier"] * raw + arrays["log_std_offset"], -20.0, 2.0))
    batch = np.repeat(observation[None], 4000, axis=0)
    sampled = policy_of(small).compute_actions(batch, explore=True, rng=np.random.default_rng(0))
    standard = (np.arctanh(sampled.astype(np.float64)) - mean) / std
    for dimension in range(3):
        inside = standard[:, dimension][np.abs(sampled[:, dimension]) < 1.0]
        assert stats.kstest(inside, stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(standard[:, 0], standard[:, 1])[0, 1]) < 0.05


def test_a_generator_gives_the_same_sample_again_and_others_give_another(small: Trained) -> None:
    policy, observation = policy_of(small), np.ones(5, np.float32)
    one, same, other = (policy(observation, explore=True, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(policy(observation, explore=True), policy(observation, explore=True))
    np.testing.assert_array_equal(policy(observation), policy(observation))
    assert ACTIONS.contains(one)


def test_an_observation_is_not_changed(small: Trained) -> None:
    observation = np.ones(5, np.float32)
    policy_of(small)(observation)
    np.testing.assert_array_equal(observation, np.ones(5, np.float32))


def test_a_batch_of_none_gives_no_action(small: Trained) -> None:
    assert policy_of(small).compute_actions(np.zeros((0, 5), np.float32)).shape == (0, 3)
