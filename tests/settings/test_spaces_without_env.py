"""Every space that works with an environment works without one: the same columns, the same update, and on to online."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets.readers.opening import open_input
from rllib_calql.store.ingestion import Conversion
from rllib_calql.store.offline_data import with_spaces_of_data
from rllib_calql.store.returns_connector import AddReturnsToGo

ACTIONS = Box(-1.0, 1.0, (1,))
LENGTH, NUM_EPISODES = 4, 3
SPACES: dict[str, gym.Space[Any]] = {
    "tank": Dict(level=Box(0, 2, (1,), np.float64), mode=Discrete(3), on=MultiBinary(2)),
    "nested": Dict(
        a=Tuple((MultiDiscrete([2, 3]), Box(0, 1, ()), MultiBinary((2, 2)))),
        b=Dict(n=Discrete(3, start=1), x=Box(-1, 1, (2, 2), np.float64)),
    ),
    "discrete": Discrete(5, start=-1),
    "multidiscrete": MultiDiscrete([[2, 3], [2, 2]]),
    "image": Box(0, 255, (6, 6, 2), np.uint8),
    "matrix": Box(-1, 1, (2, 3), np.float64),
}


def emitting(space: gym.Space[Any]) -> type[gym.Env[Any, Any]]:
    class Emitting(gym.Env):  # type: ignore[type-arg]
        observation_space, action_space = space, ACTIONS

        def __init__(self, config: Any = None) -> None:
            self.t = 0

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            self.t = 0
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.t += 1
            return self.observation_space.sample(), 0.5, False, self.t == LENGTH, {}

    return Emitting


def observations_of(space: gym.Space[Any]) -> list[list[Any]]:
    space.seed(0)
    return [[space.sample() for _ in range(LENGTH + 1)] for _ in range(NUM_EPISODES)]


def episodes_of(space: gym.Space[Any], **spaces: Any) -> list[SingleAgentEpisode]:
    return [
        SingleAgentEpisode(
            id_=f"{number}",
            observations=observations,
            actions=[np.array([0.1 * t], np.float32) for t in range(LENGTH)],
            rewards=[float(t == number) for t in range(LENGTH)],
            terminated=True,
            len_lookback_buffer=0,
            **spaces,
        )
        for number, observations in enumerate(observations_of(space))
    ]


def config_of(space: gym.Space[Any], input_: Any) -> CalQLConfig:
    networks: dict[str, Any] = {"actor_hiddens": [4], "critic_hiddens": [4]}
    if len(space.shape or ()) == 3:
        networks |= {"conv_filters": [[2, 2, 1]], "image_features": 3}
    config = CalQLConfig().rl_module(model_config=networks).offline_data(input_=input_)
    config.training(num_actions=2, train_batch_size_per_learner=4).debugging(seed=0)
    return config.fine_tuning(offline_updates=2, updates_per_iteration=2)  # type: ignore[no-any-return]


def trained(config: CalQLConfig, save_to: Path | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Offline columns, and the module's parameters after two updates."""
    algo: CalQL = config.build()
    algo.train()
    assert algo.store.offline is not None
    columns = {name: algo.store.offline_column(name) for name in ("obs", "new_obs", "actions", "rewards")}
    state = algo.learner_group._learner._calql_module.get_state()  # type: ignore[union-attr]
    if save_to is not None:
        algo.save_to_path(save_to)
    algo.stop()
    return columns, state


def columns_of(space: gym.Space[Any], config: CalQLConfig) -> np.ndarray:
    """Offline observations as the store keeps them, read without an algorithm."""
    (reader,) = open_input(config.input_)
    conversion = Conversion(
        observation_space=space,
        action_space=ACTIONS,
        connector=AddReturnsToGo(RewardSettings(gamma=0.99)),
        actions_without_metadata="environment",
        reference_column=None,
        obs_dtype=np.dtype(np.float32),
    )
    observations = [conversion.columns(reader, block).observations for block in reader.blocks()]
    return np.concatenate(observations).astype(np.float32)


def assert_same(one: Any, other: Any) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("name", SPACES)
def test_data_and_updates_without_an_environment_are_those_with_one(
    name: str, tmp_path: Path, ray_session: None
) -> None:
    space = SPACES[name]
    with_env = trained(config_of(space, episodes_of(space)).environment(emitting(space)))
    given = config_of(space, episodes_of(space)).environment(observation_space=space, action_space=ACTIONS)
    assert_same(trained(given, tmp_path / "saved"), with_env)
    # The columns against Gymnasium's own flattening.
    rows = [gym.spaces.utils.flatten(space, obs) for episode in observations_of(space) for obs in episode[:-1]]
    columns = with_env[0]["obs"].astype(np.float32)
    np.testing.assert_array_equal(columns, np.stack(rows).reshape(len(rows), -1).astype(np.float32))
    if name in ("tank", "image"):
        of_data = config_of(space, episodes_of(space, observation_space=space, action_space=ACTIONS))
        assert_same(trained(of_data), with_env)
    if name == "tank":
        config = config_of(space, episodes_of(space)).environment(emitting(space))
        online = config.fine_tuning(pretrained=tmp_path / "saved", updates_per_env_step=0.5).build()
        result = online.train()
        online.stop()
        assert (result["phase"], result["num_online_env_steps_lifetime"]) == ("online", LENGTH)


def test_every_format_gives_the_same_rows_of_a_dict_without_an_environment(tmp_path: Path) -> None:
    space = SPACES["tank"]
    episodes = observations_of(space)
    steps = [(number, t) for number in range(NUM_EPISODES) for t in range(LENGTH)]
    rest = {
        "actions": np.array([[0.1 * t] for _, t in steps], np.float32),
        "rewards": np.array([float(t == number) for number, t in steps]),
        "terminals": np.array([t == LENGTH - 1 for _, t in steps]),
    }
    columns: dict[str, Any] = {**rest}
    for key in ("level", "mode", "on"):
        columns[f"observations/{key}"] = np.stack([episodes[number][t][key] for number, t in steps])
        columns[f"next_observations/{key}"] = np.stack([episodes[number][t + 1][key] for number, t in steps])
    np.savez(tmp_path / "data.npz", **columns)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        for column, values in columns.items():
            file[column] = values

    def plain(obs: Any) -> dict[str, Any]:
        return {key: np.asarray(part).tolist() for key, part in obs.items()}

    rows = [
        {
            **{"eps_id": number, "obs": plain(episodes[number][t]), "new_obs": plain(episodes[number][t + 1])},
            **{"actions": [np.float32(0.1 * t)], "rewards": float(t == number), "terminateds": t == LENGTH - 1},
            "truncateds": False,
        }
        for number, t in steps
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    lists = episodes_of(space)
    as_json = [
        SingleAgentEpisode(
            observations=[plain(obs) for obs in episode.get_observations()],
            actions=list(episode.get_actions()),
            rewards=list(episode.get_rewards()),
            terminated=True,
            len_lookback_buffer=0,
        )
        for episode in lists
    ]
    expected = np.stack([gym.spaces.utils.flatten(space, episodes[number][t]) for number, t in steps])
    for input_ in (*(tmp_path / f"data.{kind}" for kind in ("npz", "h5", "parquet")), as_json):
        rows_of = columns_of(space, config_of(space, input_))
        np.testing.assert_array_equal(rows_of, expected.astype(np.float32), err_msg=str(input_))


@pytest.mark.parametrize("kind", ["float64 for float32", "flattened"])
def test_a_recorded_space_counts_where_numbers_are_of_another_type_or_flattened(kind: str) -> None:
    space = Dict(level=Box(0, 2, (1,)), mode=Discrete(3))
    episodes = episodes_of(space, observation_space=space, action_space=ACTIONS)
    changed = []
    for episode in episodes:
        observations = [
            gym.spaces.utils.flatten(space, obs)
            if kind == "flattened"
            else {"level": obs["level"].astype(np.float64), "mode": int(obs["mode"])}
            for obs in episode.get_observations()
        ]
        changed.append(
            SingleAgentEpisode(
                id_=episode.id_,
                observations=observations,
                actions=list(episode.get_actions()),
                rewards=list(episode.get_rewards()),
                terminated=True,
                len_lookback_buffer=0,
                observation_space=space,
                action_space=ACTIONS,
            )
        )
    completed = with_spaces_of_data(config_of(space, changed))
    assert (completed.observation_space, completed.action_space) == (space, ACTIONS)
    rows = [gym.spaces.utils.flatten(space, obs) for e in observations_of(space) for obs in e[:-1]]
    np.testing.assert_array_equal(columns_of(space, completed), np.stack(rows).astype(np.float32))


def test_what_the_space_does_not_flatten_to_says_nothing_of_the_space() -> None:
    space = Dict(level=Box(0, 2, (1,)), mode=Discrete(3))
    for observation in (np.zeros(5), {"level": np.zeros(1)}, {"level": np.zeros(1), "mode": 7}):
        episode = SingleAgentEpisode(
            observations=[observation] * 2,
            actions=[np.zeros(1)],
            rewards=[0.0],
            terminated=True,
            len_lookback_buffer=0,
            observation_space=space,
            action_space=ACTIONS,
        )
        with pytest.raises(ValueError, match="the data do not state their observation_space; set"):
            with_spaces_of_data(config_of(space, [episode]))


def test_groups_for_a_flat_space_are_refused_with_both_ways_out() -> None:
    space = SPACES["tank"]
    message = r"join the groups into one array, .*or name the parts: a Dict as .* without one as `observation_space`"
    with pytest.raises(ValueError, match=message):
        columns_of(gym.spaces.utils.flatten_space(space), config_of(space, episodes_of(space)))
