"""Spaces of as many numbers that mean something else: data, checkpoints and the spaces in metadata."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.checkpoints.manifest import check_networks
from rllib_calql.common.encoding import flatten_observations
from rllib_calql.common.spaces import description_of, difference_of, is_flat, is_flattening, reordering
from rllib_calql.datasets.episodes.reader import DatasetInfo
from rllib_calql.store.offline_data import check_spaces

ACTIONS = Box(-1.0, 1.0, (1,))


# Rows of data


@pytest.mark.parametrize(
    ("space", "shape", "message"),
    [
        (
            Box(0, 255, (8, 8, 3), np.uint8),
            (3, 8, 8),
            r"have \(8, 8, 3\): transpose them, `array.transpose\(0, 2, 3, 1\)`",
        ),
        (
            Box(0, 255, (3, 8, 6), np.uint8),
            (8, 6, 3),
            r"have \(3, 8, 6\): transpose them, `array.transpose\(0, 3, 1, 2\)`",
        ),
        (
            Box(0, 255, (8, 6, 3), np.uint8),
            (6, 8, 3),
            r"have \(8, 6, 3\): transpose them, `array.transpose\(0, 2, 1, 3\)`",
        ),
        (Box(-1, 1, (2, 3)), (3, 2), r"rows of shape \(3, 2\), .* have \(2, 3\): transpose them"),
        (Box(0, 255, (8, 8, 1), np.uint8), (8, 8), r"reshape them to \(8, 8, 1\), an axis of 1 is the only difference"),
        (Box(-1, 1, (6,)), (2, 3), r"bring them into the shape \(6,\) .*, or store flat rows of 6"),
        (MultiBinary([2, 3]), (3, 2), "transpose them"),
        (MultiDiscrete([[2, 2, 2], [3, 3, 3]]), (3, 2), r"rows of shape \(3, 2\)"),
        (Box(-1, 1, (3,)), (4,), "observations have 4 numbers, the environment's have 3"),
    ],
    ids=str,
)
def test_rows_of_another_shape_are_refused_with_the_way_out(space: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten_observations(space, np.zeros((2, *shape), np.uint8))
    whole = Dict(a=space, b=Discrete(2))
    with pytest.raises(ValueError, match=f"observations 'a' .*{message.removeprefix('observations ')}"):
        flatten_observations(whole, {"a": np.zeros((2, *shape), np.uint8), "b": np.zeros(2, int)})


@pytest.mark.parametrize(
    ("space", "shape"),
    [
        (Box(-1, 1, (2, 3)), (6,)),
        (Box(-1, 1, (1,)), ()),
        (Box(-1, 1, ()), (1,)),
        (Discrete(3), (1,)),
        (MultiBinary([2, 2]), (4,)),
    ],
    ids=str,
)
def test_flat_rows_and_single_numbers_are_taken(space: Any, shape: tuple[int, ...]) -> None:
    assert flatten_observations(space, np.zeros((2, *shape))).shape == (2, gym.spaces.utils.flatdim(space))


def test_the_transpose_that_is_named_is_the_right_one() -> None:
    images = np.random.default_rng(0).random((5, 6, 7, 3))
    for axes in ((0, 3, 1, 2), (0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 2, 1)):
        stored = images.transpose(axes)
        remedy = reordering(stored.shape[1:], images.shape[1:])
        assert remedy is not None
        named = eval(remedy.split("`")[1], {"array": stored})
        np.testing.assert_array_equal(named, images)
    square = reordering((3, 8, 8), (8, 8, 3))  # Both orders of the edges fit; pictures are not mirrored.
    assert square is not None
    assert "(0, 2, 3, 1)" in square


@pytest.mark.parametrize(
    ("space", "observations", "message"),
    [
        (Dict(a=ACTIONS, b=ACTIONS), {"a": np.zeros((2, 1))}, r"have the parts \['a'\]; the space has \['a', 'b'\]"),
        (Dict(a=ACTIONS), {"a": np.zeros((2, 1)), "c": np.zeros((2, 1))}, r"have the parts \['a', 'c'\]"),
        (Dict(a=Dict(x=ACTIONS)), {"a": {"y": np.zeros((2, 1))}}, r"observations 'a' have the parts \['y'\]"),
        (Dict(a=ACTIONS), (np.zeros((2, 1)),), r"are a tuple of 1 entries; the space has the parts \['a'\]"),
        (Tuple([ACTIONS, ACTIONS]), (np.zeros((2, 1)),), "are a tuple of 1 entries; the space has 2 entries"),
        (Tuple([ACTIONS, ACTIONS]), {"0": np.zeros((2, 1))}, r"are a dict of \['0'\]; the space has 2 entries"),
        (Box(-1, 1, (2,)), {"a": np.zeros((2, 2))}, r"are a dict of \['a'\]; the space has Box"),
        (Dict(a=ACTIONS, b=ACTIONS), np.zeros((2, 3)), r"rows of shape \(3,\); neither the parts .* flat rows of 2"),
    ],
)
def test_another_structure_is_refused(space: Any, observations: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten_observations(space, observations)


def test_a_dict_whose_keys_are_numbers_is_read_from_files_that_know_them_as_a_tuple() -> None:
    space = Dict({"0": Box(-9, 9, (1,)), "1": Box(-9, 9, (2,))})
    rows = flatten_observations(space, (np.array([[1.0]]), np.array([[2.0, 3.0]])))
    assert rows.tolist() == [[1.0, 2.0, 3.0]]


def test_pictures_with_the_channels_first_in_a_file_are_refused_and_transposed_ones_are_those_of_the_environment(
    tmp_path: Path, ray_session: None
) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)
    config = CalQLConfig().environment(observation_space=Box(0, 255, (12, 12, 3), np.uint8), action_space=ACTIONS)
    config.rl_module(model_config={"conv_filters": [[2, 3, 2]], "image_features": 3})
    for name, order in (("first", (0, 3, 1, 2)), ("last", (0, 1, 2, 3))):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["observations"] = file["next_observations"] = np.stack([picture] * 4).transpose(order)
            file["actions"], file["rewards"], file["terminals"] = np.zeros((4, 1)), np.arange(4.0), np.arange(4) == 3
    with pytest.raises(ValueError, match=r"rows of shape \(3, 12, 12\), .*`array.transpose\(0, 2, 3, 1\)`"):
        config.copy().offline_data(input_=tmp_path / "first.h5").fine_tuning(offline_updates=1).build()
    algo = config.copy().offline_data(input_=tmp_path / "last.h5").fine_tuning(offline_updates=1).build()
    np.testing.assert_array_equal(algo.store.offline_column("obs")[0], picture.reshape(-1))
    algo.stop()


# Spaces


DIFFERENT: list[tuple[Any, Any, str]] = [
    (
        Dict(pos=Box(-1, 1, (2,)), vel=Box(-1, 1, (3,))),
        Dict(acc=Box(-1, 1, (3,)), pos=Box(-1, 1, (2,))),
        "lacks the part 'acc'",
    ),
    (
        Dict(a=Box(-1, 1, (2,)), b=Box(-1, 1, (3,))),
        Dict(a=Box(-1, 1, (3,)), b=Box(-1, 1, (2,))),
        r"'a' has shape \[2\] against \[3\]",
    ),
    (Dict(a=Box(-1, 1, (2,))), Tuple([Box(-1, 1, (2,))]), "is Dict against Tuple"),
    (Tuple([Discrete(2), Discrete(3)]), Tuple([Discrete(3), Discrete(2)]), "'0' has n 2 against 3"),
    (Tuple([Discrete(2), Discrete(3)]), Tuple([MultiBinary(5)]), "has the part '1', which the latter lacks"),
    (Discrete(5), Discrete(5, start=1), "has start 0 against 1"),
    (Discrete(5), Box(-1, 1, (5,)), "is Discrete against Box"),
    (MultiDiscrete([2, 3]), MultiDiscrete([3, 2]), r"has n \[2, 3\] against \[3, 2\]"),
    (MultiDiscrete([2, 3]), MultiDiscrete([[2, 3]]), r"has n \[2, 3\] against \[\[2, 3\]\]"),
    (Box(-1, 1, (2, 3)), Box(-1, 1, (3, 2)), r"has shape \[2, 3\] against \[3, 2\]"),
    (Box(-1, 1, (6,)), Box(-1, 1, (3, 2)), r"has shape \[6\] against \[3, 2\]"),
    (Box(0, 255, (8, 8, 3), np.uint8), Box(0, 1, (8, 8, 3)), "is image against Box"),
    (Dict(a=Dict(x=Discrete(2))), Dict(a=Dict(y=Discrete(2))), "'a' has the part 'x'"),
]
SAME = [
    (Box(-1, 1, (2,)), Box(-9, np.inf, (2,), np.float64)),
    (Dict({"b": Discrete(2), "a": Box(-1, 1, (2,))}), Dict([("b", Discrete(2)), ("a", Box(0, 1, (2,)))])),
    (MultiDiscrete([2, 3], dtype=np.int32), MultiDiscrete([2, 3])),
]


@pytest.mark.parametrize(("one", "other", "message"), DIFFERENT, ids=str)
def test_spaces_of_as_many_numbers_that_mean_something_else_are_told_apart(one: Any, other: Any, message: str) -> None:
    # Data recorded as flat vectors are taken for any space.
    recorded, actual = (other, one) if is_flat(one) else (one, other)
    with pytest.raises(ValueError, match=r"Dataset 'data' has observation space .*: the former "):
        check_spaces(DatasetInfo("data", recorded, None, "environment", None), actual, ACTIONS)
    assert re.search(message, difference_of(description_of(one), description_of(other)) or "")
    with pytest.raises(
        ValueError,
        match=rf"space {re.escape(str(one))}, the environment has {re.escape(str(other))}: the former (in its part )?"
        rf"{message}",
    ):
        check_networks(manifest_with(one), manifest_with(other))
    check_networks(json.loads(json.dumps(manifest_with(one))), manifest_with(one))


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
def test_bounds_types_and_the_order_of_keys_may_differ(one: Any, other: Any) -> None:
    assert difference_of(description_of(one), description_of(other)) is None
    check_spaces(DatasetInfo("data", one, None, "environment", None), other, ACTIONS)
    check_networks(manifest_with(one), manifest_with(other))


def manifest_with(space: gym.Space[Any], *, structure: bool = True) -> dict[str, Any]:
    described = {"size": gym.spaces.utils.flatdim(space), "space": str(space)}
    if structure:
        described["structure"] = description_of(space)
    return {"networks": {}, "spaces": {"observation_space": described}}


def test_manifests_of_before_are_compared_by_size(caplog: pytest.LogCaptureFixture) -> None:
    one, other, _ = DIFFERENT[0]
    check_networks(manifest_with(one, structure=False), manifest_with(other))
    with pytest.raises(ValueError, match="use an environment with the spaces"):
        check_networks(manifest_with(one, structure=False), manifest_with(Discrete(2)))


def test_a_flat_vector_is_taken_for_the_flattened_dict_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    one, other = Dict(a=Box(-1, 1, (2,)), b=Discrete(3)), Box(-np.inf, np.inf, (5,))
    assert is_flattening(description_of(one), description_of(other))
    with caplog.at_level(logging.WARNING):
        check_networks(manifest_with(one), manifest_with(other))
        check_networks(manifest_with(other), manifest_with(one))
    assert [str(one) in record.getMessage() and str(other) in record.getMessage() for record in caplog.records] == [
        True
    ] * 2


def sampling(space: gym.Space[Any]) -> type[gym.Env[Any, Any]]:
    class Sampling(gym.Env):  # type: ignore[type-arg]
        observation_space, action_space = space, ACTIONS

        def __init__(self, config: Any = None) -> None:
            self.t = 0

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            self.t = 0
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.t += 1
            return self.observation_space.sample(), 0.5, False, self.t == 5, {}

    return Sampling


def test_a_checkpoint_does_not_go_on_where_observations_mean_something_else(tmp_path: Path, ray_session: None) -> None:
    before, now, _ = DIFFERENT[0]

    def config(space: gym.Space[Any]) -> CalQLConfig:
        made = CalQLConfig().environment(sampling(space)).training(train_batch_size_per_learner=4, num_actions=2)
        made.rl_module(model_config={"actor_hiddens": [4], "critic_hiddens": [4]})
        return made.fine_tuning(warmup_env_steps=5, updates_per_iteration=1, updates_per_env_step=0.2)

    algo = config(before).build()
    algo.train()
    path = algo.save_to_path(tmp_path / "checkpoint")
    algo.stop()
    message = r"made with the observation space Dict\('pos'.*, the environment has Dict\('acc'.*: the former lacks "
    with pytest.raises(ValueError, match=message):
        CalQL.from_checkpoint(path, config=config(now))
    with pytest.raises(ValueError, match=message):
        config(now).fine_tuning(pretrained=path).build()
    restored = CalQL.from_checkpoint(path, config=config(before))
    restored.train()
    restored.stop()
