"""Observations of every space: data, episodes, the module and the store agree with Gymnasium's own flattening."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import tree
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, OneOf, Sequence, Text, Tuple
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.collection.requests import EpisodeJoiner
from rllib_calql.common.encoding import encoded_space, flat_size, flatten_observations, observation_dtype
from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets.episodes.reader import DatasetInfo, EpisodeBlock
from rllib_calql.datasets.writers.recording import record
from rllib_calql.store.ingestion import Conversion
from rllib_calql.store.offline_table import OfflineTableBuilder
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.transitions import encoded_observations

ACTIONS = Box(-1.0, 1.0, (1,))
LENGTH = 3
NETWORKS = {"actor_hiddens": [4], "critic_hiddens": [4], "conv_filters": [[2, 2, 1]], "image_features": 3}


def boxes(dtype: Any) -> st.SearchStrategy[Box]:
    low, high = (0, 100) if np.dtype(dtype).kind in "ub" else (-100, 100)
    return st.lists(st.integers(1, 3), max_size=3).map(
        lambda shape: Box(low, min(high, 1 if dtype == np.bool_ else high), tuple(shape), dtype)
    )


LEAVES = st.one_of(
    st.sampled_from(
        [np.float32, np.float64, np.float16, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16]
    ).flatmap(boxes),
    st.builds(lambda n, start: Discrete(n, start=start), st.integers(1, 4), st.integers(-3, 3)),
    st.lists(st.tuples(st.integers(1, 4), st.integers(-3, 3)), min_size=1, max_size=3).map(
        lambda pairs: MultiDiscrete([n for n, _ in pairs], start=[start for _, start in pairs])
    ),
    st.builds(
        lambda n, start: MultiDiscrete([[n, 2], [3, n]], start=[[start, 0], [0, -start]]),
        st.integers(1, 3),
        st.integers(-2, 2),
    ),
    st.one_of(st.integers(1, 3), st.just([2, 2])).map(MultiBinary),
)
NESTED = st.recursive(
    LEAVES,
    lambda parts: st.one_of(
        st.lists(parts, min_size=1, max_size=3).map(Tuple),
        st.dictionaries(st.sampled_from(["b", "a", "B", "10", "9", "0"]), parts, min_size=1, max_size=3).map(Dict),
    ),
    max_leaves=4,
)
IMAGES = st.tuples(st.integers(4, 6), st.integers(4, 6), st.integers(1, 4)).map(
    lambda shape: Box(0, 255, shape, np.uint8)
)
SPACES = st.one_of(NESTED, NESTED, IMAGES)


class Emitter(gym.Env):  # type: ignore[type-arg]
    """Emits what `space` samples, episodes of `LENGTH` steps; the reward of every step is the episode's number."""

    space: gym.Space[Any] = Discrete(2)
    emitted: list[list[Any]] = []  # noqa: RUF012, of all instances, by episode

    def __init__(self, config: Any = None) -> None:
        self.observation_space, self.action_space = self.space, ACTIONS

    def _emit(self) -> Any:
        obs = self.observation_space.sample()
        self.emitted[self.number].append(obs)
        return obs

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begins the next episode."""
        self.t, self.number = 0, len(self.emitted)
        self.emitted.append([])
        return self._emit(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Samples."""
        self.t += 1
        return self._emit(), float(self.number), False, self.t == LENGTH, {}


def emitting(space: gym.Space[Any], seed: int = 0) -> type[Emitter]:
    space.seed(seed)
    return type("Emitting", (Emitter,), {"space": space, "emitted": []})


def expected_rows(space: gym.Space[Any], observations: list[Any]) -> np.ndarray:
    """By Gymnasium, one observation after another."""
    rows = [np.asarray(gym.spaces.utils.flatten(space, obs), np.float32).reshape(-1) for obs in observations]
    return np.stack(rows)


def config_of(env: type[Emitter], **settings_: Any) -> CalQLConfig:
    config = (
        CalQLConfig()
        .environment(env)
        .rl_module(
            model_config=NETWORKS
            if len(env.space.shape or ()) == 3 and env.space.dtype == np.uint8
            else {k: NETWORKS[k] for k in ("actor_hiddens", "critic_hiddens")}
        )
    )
    config.training(num_actions=2, train_batch_size_per_learner=4).env_runners(**settings_).debugging(seed=0)
    return config


def check_online(env: type[Emitter], *, num_envs: int = 1, num_env_steps: int = 12, **settings_: Any) -> None:
    """Episodes, their final observations and what the module sees, against what the environment emitted."""
    runner = SingleAgentEnvRunner(config=config_of(env, num_envs_per_env_runner=num_envs, **settings_))
    seen: list[np.ndarray] = []
    forward = runner.module.forward_exploration

    def spy(batch: dict[str, Any], **kwargs: Any) -> Any:
        seen.extend(batch[Columns.OBS].numpy().astype(np.float32).reshape(num_envs, -1))
        return forward(batch, **kwargs)

    runner.module.forward_exploration = spy
    joiner, finished = EpisodeJoiner(), []
    for _ in range(2):
        finished += joiner.add(runner.sample(num_timesteps=num_env_steps, explore=True))
    runner.stop()
    assert len(finished) >= 2 * num_envs
    for episode in finished:
        number = int(episode.get_rewards(0))
        rows = encoded_observations(episode, encoded_space(env.space))
        np.testing.assert_array_equal(rows.astype(np.float32), expected_rows(env.space, env.emitted[number]))
        for row in rows[:-1].astype(np.float32):
            assert any(np.array_equal(row, one) for one in seen)


def check_offline(space: gym.Space[Any], observations: list[Any]) -> None:
    """Data in the structure of the space, and flat ones."""
    expected = expected_rows(space, observations)
    stacked = tree.map_structure(lambda *parts: np.stack([np.asarray(part) for part in parts]), *observations)
    np.testing.assert_array_equal(flatten_observations(space, stacked), expected)
    # Integers of one possible value each look alike, encoded or not.
    is_ambiguous = isinstance(space, (Discrete, MultiDiscrete)) and expected.shape[1] == max(
        1, int(np.prod(space.shape))
    )
    for form in [stacked] if is_ambiguous else [stacked, expected]:
        block = EpisodeBlock(
            ids=["0"],
            lengths=np.array([len(observations) - 1]),
            observations=tree.map_structure(lambda array: array[:-1], form),
            final_observations=tree.map_structure(lambda array: array[-1:], form),
            actions=np.zeros((len(observations) - 1, 1), np.float32),
            rewards=np.zeros(len(observations) - 1),
            terminateds=np.array([True]),
            truncateds=np.array([False]),
            where=lambda row: f"row {row}",
        )
        store = TransitionStore(
            obs_dim=flat_size(space),
            action_dim=1,
            online_capacity=10,
            obs_dtype=observation_dtype(encoded_space(space)),
        )
        conversion = Conversion(
            observation_space=space,
            action_space=ACTIONS,
            connector=AddReturnsToGo(RewardSettings(0.9)),
            actions_without_metadata="environment",
            reference_column=None,
            obs_dtype=store.obs_dtype,
        )
        builder = OfflineTableBuilder(action_dim=1)
        builder.add(
            conversion.columns(type("R", (), {"info": DatasetInfo("data", None, None, "environment", None)})(), block)
        )  # type: ignore[arg-type]
        store.offline = builder.build(gamma=0.9)
        rows = store.offline_rows(np.arange(len(observations) - 1))
        np.testing.assert_array_equal(rows[Columns.OBS].astype(np.float32), expected[:-1])
        np.testing.assert_array_equal(rows[Columns.NEXT_OBS].astype(np.float32), expected[1:])


@settings(max_examples=60, deadline=None)
@given(space=SPACES, seed=st.integers(0, 99))
def test_data_of_every_space_are_encoded_as_gymnasium_flattens_them(space: gym.Space[Any], seed: int) -> None:
    space.seed(seed)
    check_offline(space, [space.sample() for _ in range(5)])


@settings(max_examples=12, deadline=None)
@given(space=SPACES, num_envs=st.integers(1, 2))
def test_episodes_of_every_space_hold_what_the_module_saw_and_gymnasium_makes_of_it(
    space: gym.Space[Any], num_envs: int
) -> None:
    check_online(emitting(space), num_envs=num_envs)


TRICKY = Dict(
    OrderedDict(
        z=Tuple([Discrete(3, start=-1), Dict({"y": Box(-1, 1, (), np.float64), "x": MultiBinary([2, 2])})]),
        a=MultiDiscrete([[2, 3]], start=[[1, -1]]),
    )
)


def sorted_space(space: gym.Space[Any]) -> gym.Space[Any]:
    """The same with keys in the order in which RLlib flattens them."""
    if isinstance(space, Dict):
        return Dict({key: sorted_space(part) for key, part in sorted(space.spaces.items())})
    return Tuple([sorted_space(part) for part in space.spaces]) if isinstance(space, Tuple) else space


def test_parts_of_dicts_are_taken_in_sorted_order() -> None:
    TRICKY.seed(1)
    samples = [TRICKY.sample() for _ in range(3)]
    expected = expected_rows(sorted_space(TRICKY), samples)
    stacked = tree.map_structure(lambda *parts: np.stack([np.asarray(part) for part in parts]), *samples)
    np.testing.assert_array_equal(flatten_observations(TRICKY, stacked), expected)
    assert expected.shape == (3, flat_size(TRICKY))


def test_rllibs_own_pipelines_get_the_same_encoding() -> None:
    class Own(ConnectorV2):
        """A connector of the user, which brings RLlib's pipelines back."""

        def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            return batch

    env = emitting(Dict(a=MultiDiscrete([[2, 3]]), b=Discrete(3, start=4), c=Box(-1, 1, (2, 2))))
    check_online(env, num_envs=2, module_to_env_connector=lambda *_: Own())


@pytest.fixture
def tricky_config() -> CalQLConfig:
    config = config_of(emitting(sorted_space(TRICKY)))
    return config.fine_tuning(warmup_env_steps=4, updates_per_env_step=0.2, updates_per_iteration=2)


def check_store(algo: CalQL, env: type[Emitter]) -> int:
    """Online rows against what the environment emitted; returns their number."""
    columns = {name: algo.store.online_column(name) for name in (Columns.OBS, Columns.NEXT_OBS, Columns.REWARDS)}
    for start in range(0, algo.store.num_online, LENGTH):
        rows = slice(start, start + LENGTH)
        expected = expected_rows(env.space, env.emitted[int(columns[Columns.REWARDS][start])])
        np.testing.assert_array_equal(columns[Columns.OBS][rows], expected[:-1])
        np.testing.assert_array_equal(columns[Columns.NEXT_OBS][rows], expected[1:])
    return algo.store.num_online


@pytest.mark.parametrize(
    "space", [Discrete(5), MultiDiscrete([3, 4]), sorted_space(TRICKY)], ids=["one", "several", "nested"]
)
def test_online_rows_are_encoded_once(space: gym.Space[Any], ray_session: None) -> None:
    env = emitting(space)
    config = config_of(env, num_envs_per_env_runner=2).fine_tuning(
        warmup_env_steps=4, updates_per_env_step=0.2, updates_per_iteration=2
    )
    algo = config.evaluation(evaluation_duration=2).build()
    for _ in range(2):
        algo.train()
    assert check_store(algo, env) >= 2 * LENGTH
    assert algo.evaluate()["env_runners"]["num_episodes"] == 2
    algo.stop()


def test_recorded_rows_of_a_policy_are_the_rows_that_it_would_store_online(
    tricky_config: CalQLConfig, tmp_path: Path, ray_session: None
) -> None:
    env: type[Emitter] = tricky_config.env
    path = tmp_path / "recorded.h5"
    algo = tricky_config.build()
    algo.train()
    env.emitted.clear()
    record(algo, None, 3, path, seed=0)
    algo.stop()
    offline = config_of(env).offline_data(input_=path).fine_tuning(offline_updates=1, updates_per_iteration=1).build()
    expected = np.concatenate([expected_rows(env.space, observations)[:-1] for observations in env.emitted[:3]])
    np.testing.assert_array_equal(offline.store.offline_column(Columns.OBS), expected)
    offline.train()
    offline.stop()


class Echo(gym.Env):  # type: ignore[type-arg]
    """Observes the number of its step in a MultiDiscrete; nothing is shared between processes."""

    observation_space, action_space = MultiDiscrete([3, 4], start=[0, 1]), ACTIONS

    def __init__(self, config: Any = None) -> None:
        self.t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Step 0."""
        self.t = 0
        return np.array([0, 1]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The next step."""
        self.t += 1
        return np.array([self.t % 3, 1 + self.t % 4]), 0.5, False, self.t == LENGTH, {}


def test_remote_env_runners_encode_as_the_local_one(ray_session: None) -> None:
    config = CalQLConfig().environment(Echo).env_runners(num_env_runners=1, num_envs_per_env_runner=2)
    config.training(num_actions=2, train_batch_size_per_learner=4).rl_module(
        model_config={"actor_hiddens": [4], "critic_hiddens": [4]}
    )
    algo = config.fine_tuning(warmup_env_steps=2, updates_per_env_step=0.1, updates_per_iteration=1).build()
    algo.train()
    expected = expected_rows(Echo.observation_space, [np.array([t % 3, 1 + t % 4]) for t in range(LENGTH + 1)])
    online = {name: algo.store.online_column(name)[:LENGTH].copy() for name in (Columns.OBS, Columns.NEXT_OBS)}
    algo.stop()
    np.testing.assert_array_equal(online[Columns.OBS], expected[:-1])
    np.testing.assert_array_equal(online[Columns.NEXT_OBS], expected[1:])


def test_a_run_without_environment_takes_every_space(tmp_path: Path, ray_session: None) -> None:
    states = np.arange(21) % 5
    ends = np.arange(20) % 10 == 9
    columns = {"actions": np.zeros((20, 1)), "rewards": np.arange(20.0), "terminals": ends}
    np.savez(tmp_path / "data.npz", observations=states[:-1], next_observations=states[1:], **columns)
    config = CalQLConfig().environment(observation_space=Discrete(5), action_space=ACTIONS)
    config.offline_data(input_=tmp_path / "data.npz").training(num_actions=2, train_batch_size_per_learner=4)
    algo = config.fine_tuning(offline_updates=1, updates_per_iteration=1).build()
    algo.train()
    np.testing.assert_array_equal(algo.store.offline_column(Columns.OBS), np.eye(5)[states[:-1]])
    algo.stop()


def test_episodes_of_the_user_s_connectors_must_hold_what_the_module_saw() -> None:
    space = Dict(a=Box(-1, 1, (2,)), b=Discrete(2))
    env = emitting(space)
    check_online(env, env_to_module_connector=lambda *_: FlattenObservations())
    raw = SingleAgentEpisode(
        observations=[space.sample()] * 2, actions=[0.0], rewards=[0.0], terminated=True, len_lookback_buffer=0
    )
    with pytest.raises(
        ValueError, match=r"holds observations of dict, the module saw \(4,\): a connector in `env_to_mod"
    ):
        encoded_observations(raw.to_numpy(), encoded_space(space))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Text(5), "is a Text space"),
        (Graph(Box(-1, 1, (2,)), None), "is a Graph space"),
        (Sequence(Discrete(2)), "is a Sequence space"),
        (OneOf((Discrete(2), Box(-1, 1, (2,)))), "is a OneOf space"),
        (Dict(a=Tuple([Box(-1, 1, (2,)), Text(3)])), "part 'a/1', is a Text space"),
        (Dict({}), "holds no number"),
        (Dict(a=Box(-1, 1, (2,)), none=Tuple([])), "part 'none', holds no number"),
        (Dict(a=Box(-1, 1, (2,)), none=Box(-1, 1, (0,))), "part 'none', holds no number"),
        (Box(0, 255, (84, 84), np.uint8), r"add the axis of channels, .* \(84, 84, 1\)"),
        (Box(0, 255, (4, 84, 84, 3), np.uint8), "merge the frames into the channels"),
        (Box(0, 255, (128,), np.uint8), "scale them to a float type"),
        (
            Box(0, 255, (3, 84, 84), np.uint8),
            r"channels first, .* `numpy.transpose\(obs, \(1, 2, 0\)\)`, .* \(84, 84, 3\)",
        ),
        (Box(0, 255, (1, 64, 48), np.uint8), "channels first"),
        (Box(0, 254, (3, 84, 84), np.uint8), "channels first"),
        (Box(0, 1, (4, 84, 84), np.uint8), "channels first"),
        (Box(0, 100, (84, 84), np.uint8), "add the axis of channels"),
        (Box(0, 1, (4, 84, 84, 3), np.uint8), "merge the frames into the channels"),
        (Dict(mask=Box(0, 1, (64, 64), np.uint8)), "part 'mask', holds bytes"),
        (Box(0, 255, (12, 84, 84), np.uint8), "channels first"),
        (Dict(camera=Box(0, 255, (32, 32, 3), np.uint8), pos=Box(-1, 1, (2,))), "part 'camera', holds bytes"),
    ],
    ids=str,
)
def test_spaces_that_cannot_be_learned_from_are_refused_by_name(space: gym.Space[Any], message: str) -> None:
    config = CalQLConfig().environment(observation_space=space, action_space=ACTIONS)
    with pytest.raises(ValueError, match=rf"^`observation_space`.*{message}"):
        config.validate()
    with pytest.raises(ValueError, match=rf"^The observation space.*{message}"):
        CalQLConfig().environment(emitting(space)).build_env_to_module_connector(emitting(space)())


@pytest.mark.parametrize(
    "shape", [(84, 84, 4), (84, 84, 12), (64, 48, 1), (7, 7, 20), (9, 10, 2), (1, 10, 3), (4, 64, 3), (32, 32, 32)]
)
def test_images_with_the_channels_last_are_taken_whatever_their_number(shape: tuple[int, ...]) -> None:
    CalQLConfig().environment(observation_space=Box(0, 255, shape, np.uint8), action_space=ACTIONS).validate()


def test_small_counts_in_bytes_are_vectors() -> None:
    for space in (Box(0, 9, (4,), np.uint8), Dict(flags=Box(0, 1, (2, 2), np.uint8))):
        CalQLConfig().environment(observation_space=space, action_space=ACTIONS).validate()
