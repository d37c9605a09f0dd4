"""Tuple observations, and what else of arrays and parts recorded data hold, are read as they were recorded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import msgpack
import msgpack_numpy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crafted import packed
from gymnasium.spaces import Box, Dict, Tuple
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.common.spaces import check_bounds, check_observation_space
from rllib_calql.datasets import open_input
from rllib_calql.datasets.decoding.safe_decoding import load_plain
from rllib_calql.datasets.readers.packed_episodes import unpacked_episode
from rllib_calql.datasets.readers.rllib_recorded import _as_parts
from rllib_calql.store.transitions import to_module_actions

T = 3


def episode_of(space: gym.Space[Any], infos: list[Any] | None = None) -> SingleAgentEpisode:
    space.seed(0)
    return SingleAgentEpisode(
        id_="a",
        observations=[space.sample() for _ in range(T + 1)],
        infos=infos or [{}] * (T + 1),
        actions=[np.float32([0.5])] * T,
        rewards=[1.0] * T,
        terminated=True,
        observation_space=space,
        action_space=Box(-1, 1, (1,)),
        len_lookback_buffer=0,
    )


def through_msgpack(episode: SingleAgentEpisode) -> SingleAgentEpisode:
    return unpacked_episode(msgpack.packb(episode.get_state(), default=msgpack_numpy.encode))


@pytest.mark.parametrize("is_array", [True, False], ids=["arrays", "steps"])
@pytest.mark.parametrize(
    "space",
    [
        Tuple([Box(-1, 1, (2,)), Box(-1, 1, (3,))]),
        Tuple([Box(-1, 1, (2,)), Box(-1, 1, (2,))]),
        Dict(a=Tuple([Box(-1, 1, (2,)), Tuple([Box(-1, 1, (1,))])]), b=Box(-1, 1, (1,))),
    ],
    ids=["ragged", "equal", "nested"],
)
def test_msgpack_episodes_keep_their_tuples(space: gym.Space[Any], is_array: bool) -> None:
    episode = episode_of(space)
    expected = [episode.get_observations(step) for step in range(T + 1)]
    read = through_msgpack(episode.to_numpy() if is_array else episode)
    for step in range(T + 1):
        assert space.contains(read.get_observations(step))
        assert gym.spaces.utils.flatten(space, read.get_observations(step)).tolist() == (
            gym.spaces.utils.flatten(space, expected[step]).tolist()
        )


def test_parts_of_equal_shapes_in_packed_rows_stay_parts() -> None:
    read = _as_parts(load_plain(pickle.dumps((np.zeros(3), np.ones(3)))))
    assert isinstance(read, tuple)
    assert [part.tolist() for part in read] == [[0, 0, 0], [1, 1, 1]]
    assert _as_parts(load_plain(pickle.dumps([1.0, 2.0]))).tolist() == [1, 2]


def test_packed_rows_of_tuples_are_read_as_a_tuple(tmp_path: Path) -> None:
    rows = [(np.float32([step, 1, 2]), np.float32([3, 4, step])) for step in range(T + 1)]
    obs, new_obs = ([packed(pickle.dumps(row)) for row in part] for part in (rows[:-1], rows[1:]))
    table = {"eps_id": ["a"] * T, "obs": obs, "new_obs": new_obs, "actions": [[0.1]] * T, "rewards": [1.0] * T}
    table |= {"terminateds": [False, False, True], "truncateds": [False] * T}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    (reader,) = open_input(str(tmp_path / "rows.parquet"))
    (episode,) = reader
    for step in range(T + 1):
        first, second = episode.get_observations(step)
        assert (first.tolist(), second.tolist()) == ([step, 1, 2], [3, 4, step])


def test_one_array_that_is_held_often_is_small() -> None:
    array = np.arange(64 * 64.0)
    assert [part.tolist() for part in load_plain(pickle.dumps([array] * 30))] == [array.tolist()] * 30


def test_bounds_are_shown_as_plain_numbers() -> None:
    with pytest.raises(ValueError, match=r"\[90\.0, 90\.00"):
        check_bounds(Box(np.float32([90]), np.float32([90.0001])), "It")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_fixed_dimension_is_compared_in_the_precision_of_the_data(dtype: Any) -> None:
    space = Box(np.float32([0.1, -1]), np.float32([0.1, 1]))
    actions = np.array([[0.1, 0.5]], dtype)
    assert to_module_actions(actions, space, str).tolist() == [[0, 0.5]]
    with pytest.raises(ValueError, match="outside"):
        to_module_actions(np.array([[0.11, 0.5]], dtype), space, str)


@pytest.mark.parametrize("shape", [(1, 64, 8), (7, 96, 16)])
def test_strips_with_many_channels_are_not_taken_for_channels_first(shape: tuple[int, ...]) -> None:
    check_observation_space(Box(0, 255, shape, np.uint8), "It")


def test_a_memory_map_is_read_as_the_array_that_its_pickle_holds(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "numbers", np.float32, "w+", shape=(3,))
    mapped[:] = [1, 2, 3]
    read = load_plain(pickle.dumps(mapped))
    assert type(read) is np.ndarray
    assert read.tolist() == [1, 2, 3]
