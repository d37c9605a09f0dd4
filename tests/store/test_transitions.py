"""From episodes to rows: the same flattening as RLlib's, actions by hand and by RLlib's inverse, end of episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.spaces.space_utils import unsquash_action

from rllib_calql.common.encoding import flat_size, flatten_observations, observation_dtype
from rllib_calql.common.returns import RewardSettings
from rllib_calql.store.returns_connector import TAIL_DISCOUNT, AddReturnsToGo
from rllib_calql.store.transitions import check_module_actions, to_module_actions, transitions_from_episode

# Observations


SPACES: dict[str, gym.Space[Any]] = {
    "vector": Box(-1.0, 1.0, (3,)),
    "scalar": Box(-1.0, 1.0, ()),
    "matrix": Box(-1.0, 1.0, (2, 3)),
    "image": Box(0, 255, (4, 5, 3), np.uint8),
    "double": Box(-1.0, 1.0, (2,), np.float64),
    "discrete": Discrete(4),
    "multi-discrete": MultiDiscrete([2, 5, 3]),
    "multi-binary": MultiBinary(4),
    "dict": Dict({"observation": Box(-1, 1, (3,)), "achieved_goal": Box(-1, 1, (2,)), "desired": Box(-1, 1, (2,))}),
    "tuple": Tuple([Discrete(3), Box(-1.0, 1.0, (2,)), MultiBinary(2)]),
    "nested": Dict(
        {
            "z": Tuple([Discrete(2), Dict({"y": Box(-1, 1, (1,)), "x": MultiDiscrete([2, 2])})]),
            "a": Dict({"image": Box(0, 255, (2, 2, 1), np.uint8), "flag": MultiBinary(3)}),
        }
    ),
}


def episode_of(space: gym.Space[Any], length: int = 6) -> SingleAgentEpisode:
    space.seed(3)
    return SingleAgentEpisode(
        observations=[space.sample() for _ in range(length + 1)],
        actions=[np.zeros(1, np.float32)] * length,
        rewards=[0.0] * length,
        terminated=True,
        len_lookback_buffer=0,
    )


@pytest.mark.parametrize("name", SPACES)
def test_observations_are_flattened_as_rllib_does_on_env_runners(name: str) -> None:
    space = SPACES[name]
    episode = episode_of(space)
    connector = FlattenObservations(space, Box(-1.0, 1.0, (1,)))
    expected = []
    for observation in episode.get_observations():
        single = SingleAgentEpisode(observations=[observation], observation_space=space)
        connector(rl_module=None, batch={}, episodes=[single])
        expected.append(single.get_observations(-1))
    actual = flatten_observations(space, episode.to_numpy().get_observations())
    np.testing.assert_array_equal(actual, np.stack(expected))
    assert actual.dtype == np.float32
    assert actual.shape == (7, flat_size(space)) == (7, connector.observation_space.shape[0])


def test_observations_that_are_flat_already_pass() -> None:
    flat = np.arange(14.0).reshape(2, 7)
    actual = flatten_observations(SPACES["dict"], flat)
    np.testing.assert_array_equal(actual, flat)
    assert actual.dtype == np.float32


def test_dict_parts_are_taken_in_sorted_order_whatever_order_the_data_have() -> None:
    space = Dict({"b": Box(-9, 9, (1,)), "a": Box(-9, 9, (2,))})
    data = {"b": np.array([[3.0]]), "a": np.array([[1.0, 2.0]])}
    assert flatten_observations(space, data).tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float16, np.float32, np.float64])
def test_arrays_keep_their_type_on_request_and_become_single_precision_otherwise(dtype: Any) -> None:
    images = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    space = Box(0, 255, (3, 4), np.uint8)
    kept = flatten_observations(space, images, keep_dtype=True)
    assert kept.dtype == dtype
    np.testing.assert_array_equal(kept, images.reshape(2, 12))
    assert flatten_observations(space, images).dtype == np.float32
    pair = gym.spaces.Dict({"a": space, "b": space})
    both = flatten_observations(pair, {"a": images, "b": images}, keep_dtype=True)
    assert both.dtype == dtype
    mixed = flatten_observations(pair, {"a": images, "b": images.astype(np.int64)}, keep_dtype=True)
    assert mixed.dtype == np.float32
    np.testing.assert_array_equal(mixed, both)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (Box(0, 255, (4, 4, 3), np.uint8), np.uint8),
        (Box(-5, 5, (2,), np.int16), np.int16),
        (Box(-5, 5, (2,), np.int64), np.float32),
        (Box(-5, 5, (2,), np.float64), np.float32),
        (gym.spaces.Discrete(3), np.float32),
    ],
    ids=str,
)
def test_small_integers_stay_what_they_are_in_batches(space: gym.Space[Any], expected: Any) -> None:
    assert observation_dtype(space) == expected


# Actions


def rows_named(data: str) -> Callable[[int], str]:
    return lambda row: f"{data}, row {row}"


def test_actions_are_mapped_to_the_cube_for_each_dimension_by_its_own_bounds() -> None:
    space = Box(np.array([-2.0, 0.0, 10.0], np.float32), np.array([2.0, 8.0, 11.0], np.float32))
    actions = np.array([[-2.0, 0.0, 10.0], [2.0, 8.0, 11.0], [0.0, 4.0, 10.5], [1.0, 2.0, 10.75]])
    expected = [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.5, -0.5, 0.5]]
    np.testing.assert_allclose(to_module_actions(actions, space, rows_named("Data")), expected, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    low=st.lists(st.floats(-50.0, 50.0, width=32), min_size=2, max_size=2),
    width=st.lists(st.floats(0.125, 100.0, width=32), min_size=2, max_size=2),
    module_actions=st.lists(st.tuples(*[st.floats(-1.0, 1.0, width=32)] * 2), min_size=1, max_size=5),
)
def test_mapping_actions_is_the_inverse_of_rllibs_unsquashing(
    low: list[float], width: list[float], module_actions: list[tuple[float, float]]
) -> None:
    space = Box(np.array(low, np.float64), np.array(low) + np.array(width), dtype=np.float64)
    actions = np.array(module_actions)
    environment_actions = np.stack([unsquash_action(action, space) for action in actions])
    np.testing.assert_allclose(to_module_actions(environment_actions, space, rows_named("Data")), actions, atol=1e-9)


def test_actions_of_a_single_precision_recording_may_stand_just_outside() -> None:
    space = Box(-0.3, 0.3, (1,))
    recorded = np.array([[np.nextafter(np.float32(0.3), np.float32(1.0))]])
    np.testing.assert_allclose(to_module_actions(recorded, space, rows_named("Data")), [[1.0]], atol=1e-6)


def test_the_row_of_the_first_action_outside_the_bounds_is_named() -> None:
    space = Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 8.0], np.float32))
    actions = np.array([[0.0, 1.0], [2.0, 8.0], [0.0, 8.5], [9.0, 0.0]])
    with pytest.raises(ValueError, match=r"^Data of mine, row 2: action \[0.0, 8.5\] is outside the bounds"):
        to_module_actions(actions, space, rows_named("Data of mine"))
    with pytest.raises(ValueError, match=r"row 0: action \[-0.1, -0.1\] .*units, clip the recorded actions, or set"):
        to_module_actions(np.array([[-0.1, -0.1]]), space, rows_named("Data"))


def test_module_actions_pass_unchanged_or_are_refused_by_row() -> None:
    actions = np.array([[0.5, -1.0], [1.0, 0.25]], np.float32)
    np.testing.assert_array_equal(check_module_actions(actions, rows_named("Data")), actions)
    with pytest.raises(ValueError, match=r"^Data, row 1: action \[1.0, -1.5\] is outside \[-1, 1\], the range"):
        check_module_actions(np.array([[0.0, 0.0], [1.0, -1.5]]), rows_named("Data"))


# Rows


def rows_of(
    rewards: list[float], *, terminated: bool, truncated: bool, actions: Any = None, **rules: Any
) -> dict[str, np.ndarray]:
    length = len(rewards)
    observations = np.arange(2.0 * (length + 1)).reshape(length + 1, 2)
    episode = SingleAgentEpisode(
        observations=list(observations),
        actions=[np.zeros(1, np.float32)] * length,
        rewards=rewards,
        terminated=terminated,
        truncated=truncated,
        len_lookback_buffer=0,
    ).to_numpy()
    settings_ = RewardSettings(0.5, **rules)
    AddReturnsToGo(settings_)(batch={}, episodes=[episode])
    return transitions_from_episode(
        episode,
        observations=observations,
        actions=np.zeros((length, 1)) if actions is None else np.asarray(actions),
        settings=settings_,
    )


def test_rows_pair_each_observation_with_the_next_one() -> None:
    rows = rows_of([0.0, 0.0, 0.0], terminated=True, truncated=False)
    assert rows[Columns.OBS].tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert rows[Columns.NEXT_OBS].tolist() == [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]


@pytest.mark.parametrize(
    ("terminated", "truncated", "last"), [(True, False, 1.0), (False, True, 0.0), (True, True, 1.0)]
)
def test_only_termination_marks_the_last_row_and_a_time_out_does_not(
    terminated: bool, truncated: bool, last: float
) -> None:
    rows = rows_of([1.0, 1.0, 1.0], terminated=terminated, truncated=truncated)
    assert rows[Columns.TERMINATEDS].tolist() == [0.0, 0.0, last]


def test_rewards_are_scaled_once_and_returns_are_the_connectors() -> None:
    rows = rows_of([0.0, 1.0], terminated=True, truncated=False, reward_scale=10.0, reward_bias=-5.0)
    assert rows[Columns.REWARDS].tolist() == [-5.0, 5.0]
    assert rows[Columns.RETURNS_TO_GO].tolist() == [-2.5, 5.0]
    assert TAIL_DISCOUNT not in rows


def test_the_weight_of_the_last_value_comes_along_under_bootstrapping() -> None:
    rows = rows_of([0.0, 1.0], terminated=False, truncated=True, truncation="bootstrap")
    assert rows[TAIL_DISCOUNT].tolist() == [0.25, 0.5]


def test_actions_are_clipped_away_from_the_ends_of_the_cube() -> None:
    rows = rows_of([0.0] * 4, terminated=True, truncated=False, actions=[[-1.0], [1.0], [0.999995], [0.5]])
    np.testing.assert_array_equal(rows[Columns.ACTIONS][:, 0], np.float32([-0.99999, 0.99999, 0.99999, 0.5]))


def test_integers_are_one_hot_from_the_start_of_their_space_on_in_any_shape() -> None:
    one = flatten_observations(gym.spaces.Discrete(3, start=-1), np.array([-1, 1]))
    assert one.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    table = gym.spaces.MultiDiscrete([[2, 3]], start=[[1, 0]])
    assert flatten_observations(table, np.array([[[2, 1]]])).tolist() == [[0.0, 1.0, 0.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="0 is not one of the 2 values of MultiDiscrete"):
        flatten_observations(table, np.array([[[0, 1]]]))


def test_one_hot_rows_of_integers_are_taken_and_others_of_that_size_refused() -> None:
    space = gym.spaces.MultiDiscrete([2, 3])
    row = [0.0, 1.0, 1.0, 0.0, 0.0]
    assert flatten_observations(space, np.array([row])).tolist() == [row]
    for wrong in (
        [0.0, 1.0, 1.0, 1.0, 0.0],
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, 1.0, 0.0, 0.0],
        [1.0, 1.0, 0.0, 0.0, 0.0],
    ):
        with pytest.raises(ValueError, match="is not one-hot for MultiDiscrete"):
            flatten_observations(space, np.array([row, wrong]))


def test_multi_discrete_of_one_value_each_is_still_one_hot() -> None:
    values = np.zeros((3, 2), np.int64)
    np.testing.assert_array_equal(flatten_observations(gym.spaces.MultiDiscrete([1, 1]), values), np.ones((3, 2)))


def test_an_action_that_is_not_a_number_is_outside_the_bounds() -> None:
    actions = np.array([[0.0], [np.nan]])
    with pytest.raises(ValueError, match="data, row 1: action"):
        to_module_actions(actions, gym.spaces.Box(-1.0, 1.0, (1,)), rows_named("data"))
    with pytest.raises(ValueError, match="data, row 1: action"):
        check_module_actions(actions, rows_named("data"))


@pytest.mark.parametrize("value", [-1, 3, 1.5])
def test_a_number_that_is_no_value_of_a_discrete_space_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"{value} is not one of the 3 values of Discrete"):
        flatten_observations(gym.spaces.Discrete(3), np.array([0, value, 2]))
    with pytest.raises(ValueError, match=f"{value}.* is not one of the 3 values of MultiDiscrete"):
        flatten_observations(gym.spaces.MultiDiscrete([2, 3]), np.array([[1, 2], [0, value]]))
