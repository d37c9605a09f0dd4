"""What RLlib's recorder and this package's `record` write is what the environments emitted, by the environments' log.

Both record the same algorithm with the same weights. RLlib's files hold the module's actions: RLlib's own function
turns them into what the environment must have received, so that everything is compared bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import ray.data
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.offline.offline_env_runner import OfflineSingleAgentEnvRunner
from ray.rllib.utils.spaces.space_utils import unsquash_action

from rllib_calql import CalQLConfig
from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets import open_input, record
from rllib_calql.store.offline_data import CalQLOfflineData
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo

pytestmark = pytest.mark.usefixtures("ray_session")

Transition = tuple[bytes, bytes, float, bytes, bool, bool]

OBSERVATION_SPACE = gym.spaces.Box(-100.0, 100.0, (3,), np.float32)
ACTION_SPACE = gym.spaces.Box(np.float32([-3.0, 0.5]), np.float32([1.0, 2.5]))


@dataclass
class Logged:
    """One episode as the environment lived through it."""

    obs: list[np.ndarray]
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False

    def transitions(self) -> list[Transition]:
        """One tuple per step, by a plain loop."""
        last = len(self.rewards) - 1
        return [
            (
                self.obs[t].tobytes(),
                self.actions[t].tobytes(),
                self.rewards[t],
                self.obs[t + 1].tobytes(),
                self.terminated and t == last,
                self.truncated and t == last,
            )
            for t in range(last + 1)
        ]


class LoggingEnv(gym.Env):  # type: ignore[type-arg]
    """A noisy drift whose episodes end by either flag, or by both, after 1 to 12 steps; all instances log together."""

    log: ClassVar[list[Logged]] = []

    def __init__(self, config: Any = None) -> None:
        self.observation_space, self.action_space = OBSERVATION_SPACE, ACTION_SPACE

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts anywhere."""
        super().reset(seed=seed)
        self.obs = self.np_random.normal(size=3).astype(np.float32)
        self.logged = Logged([self.obs.copy()])
        LoggingEnv.log.append(self.logged)
        return self.obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves, and writes the next observation over the last one."""
        logged = self.logged
        logged.actions.append(np.array(action))
        self.obs[:] = 0.5 * self.obs + np.append(action, 0.0) + self.np_random.normal(size=3)
        reward = float(self.np_random.normal())
        logged.terminated = bool(self.np_random.uniform() < 0.15)
        logged.truncated = len(logged.actions) == 12 or bool(self.np_random.uniform() < 0.05)
        logged.obs.append(self.obs.copy())
        logged.rewards.append(reward)
        return self.obs.copy(), reward, logged.terminated, logged.truncated, {}


@pytest.fixture(scope="module", params=[PPOConfig, SACConfig], ids=["PPO", "SAC"])
def algo(request: pytest.FixtureRequest, ray_session: None) -> Iterator[Algorithm]:
    config = (
        request.param()
        .environment(LoggingEnv)
        .env_runners(num_env_runners=0)
        .rl_module(model_config={"fcnet_hiddens": [8]})
        .debugging(seed=1)
    )
    built: Algorithm = config.build_algo()
    yield built
    built.stop()


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> list[Logged]:
    """An empty log for every test, and a Ray that writes few files."""
    entries: list[Logged] = []
    monkeypatch.setattr(LoggingEnv, "log", entries)
    monkeypatch.setattr(ray.data.DataContext.get_current(), "read_op_min_num_blocks", 3)
    return entries


def ended(log: list[Logged]) -> list[Logged]:
    """Without the episodes that a later reset cut off."""
    return [episode for episode in log if episode.terminated or episode.truncated]


def environment_actions(episode: SingleAgentEpisode, kind: str) -> list[np.ndarray]:
    actions = [np.asarray(action) for action in episode.get_actions()]
    return actions if kind == "environment" else [unsquash_action(action, ACTION_SPACE) for action in actions]


def logged_of(episode: SingleAgentEpisode, kind: str) -> Logged:
    """What an environment must have lived through for this to be recorded."""
    return Logged(
        obs=list(episode.get_observations()),
        actions=environment_actions(episode, kind),
        rewards=[float(reward) for reward in episode.get_rewards()],
        terminated=episode.is_terminated,
        truncated=episode.is_truncated,
    )


def assert_same_transitions(read: list[Logged], expected: list[Logged]) -> None:
    """As multisets, and then episode by episode, whatever the order of the episodes."""
    assert len(expected) > 5
    assert len({len(episode.rewards) for episode in expected}) > 2, "the lengths must vary to mean something"
    counts = Counter(step for episode in read for step in episode.transitions())
    assert counts == Counter(step for episode in expected for step in episode.transitions())
    assert sum(counts.values()) == sum(len(episode.rewards) for episode in expected)
    assert Counter(tuple(e.transitions()) for e in read) == Counter(tuple(e.transitions()) for e in expected)


def rllib_recorder(algo: Algorithm, output: Path, **settings: Any) -> OfflineSingleAgentEnvRunner:
    """RLlib's recorder with the weights of the algorithm."""
    config = algo.config.copy(copy_frozen=False)
    config.env_runners(num_env_runners=0, **settings.pop("env_runners", {}))
    config.offline_data(output=str(output), **settings)
    runner = OfflineSingleAgentEnvRunner(config=config, worker_index=0, spaces=algo.env_runner.spaces)
    runner.set_state(algo.env_runner.get_state())
    return runner


ROWS_PACKED = {"output_write_episodes": False}
ROWS_PLAIN = {"output_write_episodes": False, "output_compress_columns": []}
EPISODES = {"output_write_episodes": True}


@pytest.mark.parametrize("settings", [ROWS_PACKED, ROWS_PLAIN, EPISODES], ids=["packed rows", "rows", "episodes"])
def test_what_rllib_records_is_read_as_the_environment_emitted_it(
    tmp_path: Path, algo: Algorithm, log: list[Logged], settings: dict[str, Any]
) -> None:
    if settings["output_write_episodes"]:
        pytest.importorskip("msgpack_numpy")
    whole = {"batch_mode": "complete_episodes"}
    runner = rllib_recorder(algo, tmp_path / "out", env_runners=whole, **settings)
    sampled = [episode for _ in range(2) for episode in runner.sample(num_episodes=5)]
    runner.stop()
    (reader,) = open_input(tmp_path / "out")
    assert reader.info.actions == "module"
    episodes = list(reader)
    read = [logged_of(episode, "module") for episode in episodes]
    assert_same_transitions(read, ended(log))
    assert [e.id_ for e in episodes] == [e.id_ for e in sampled]
    for episode, other in zip(read, sampled, strict=True):
        assert episode.transitions() == logged_of(other.to_numpy(), "module").transitions()


@pytest.mark.parametrize("settings", [ROWS_PACKED, EPISODES], ids=["rows", "episodes"])
def test_fragments_of_environments_side_by_side_are_joined_as_they_were_lived(
    tmp_path: Path, algo: Algorithm, log: list[Logged], settings: dict[str, Any]
) -> None:
    if settings["output_write_episodes"]:
        pytest.importorskip("msgpack_numpy")
    runner = rllib_recorder(algo, tmp_path / "out", env_runners={"num_envs_per_env_runner": 2}, **settings)
    for _ in range(3):
        runner.sample(num_timesteps=40)
    runner.stop()
    unfinished = [e for e in log if e.rewards and not (e.terminated or e.truncated)]
    data = CalQLOfflineData(CalQLConfig().offline_data(input_=tmp_path / "out", unfinished_episodes="drop"))
    read = [logged_of(episode, "module") for episode in data.readers[0]]
    assert_same_transitions(read, ended(log))
    assert sum(data.readers[0].remarks.values()) == len(unfinished)


@pytest.mark.parametrize("to", ["rows.parquet", "folder/", "data.hdf5", "data.npz", "minari:recorders/agree-v0"])
def test_what_is_recorded_here_is_read_as_the_environment_emitted_it(
    tmp_path: Path, algo: Algorithm, log: list[Logged], to: str
) -> None:
    to = to if to.startswith("minari:") else f"{tmp_path}/{to}"
    summary = record(algo, LoggingEnv, 10, to, seed=0, overwrite=True)
    expected = ended(log)
    assert (summary.num_episodes, summary.num_transitions) == (10, sum(len(e.rewards) for e in expected))
    (reader,) = open_input(to)
    assert reader.info.actions == "environment"
    read = [logged_of(episode, "environment") for episode in reader]
    assert_same_transitions(read, expected)
    assert [e.transitions() for e in read] == [e.transitions() for e in expected], "the order is that of the recording"


def stored(input_: Any) -> dict[str, np.ndarray]:
    store = TransitionStore(obs_dim=3, action_dim=2, online_capacity=1, seed=0)
    CalQLOfflineData(CalQLConfig().offline_data(input_=input_)).load(
        store,
        AddReturnsToGo(RewardSettings(0.9)),
        observation_space=OBSERVATION_SPACE,
        action_space=ACTION_SPACE,
    )
    assert store.offline is not None
    names = ("obs", "actions", "rewards", "new_obs", "terminateds", "returns_to_go")
    return {name: store.offline.column(name) for name in names}


def test_training_sees_the_log_whichever_recorder_wrote_it(tmp_path: Path, algo: Algorithm, log: list[Logged]) -> None:
    record(algo, LoggingEnv, 10, tmp_path / "ours.parquet", seed=0)
    ours_log = ended(log)
    log.clear()
    runner = rllib_recorder(algo, tmp_path / "theirs", env_runners={"batch_mode": "complete_episodes"}, **ROWS_PACKED)
    runner.sample(num_episodes=10)
    runner.stop()
    for input_, episodes in ((tmp_path / "ours.parquet", ours_log), (tmp_path / "theirs", ended(log))):
        columns = stored(input_)
        returns = []
        for episode in episodes:
            following, reversed_returns = 0.0, []
            for reward in reversed(episode.rewards):
                following = reward + 0.9 * following
                reversed_returns.append(following)
            returns += reversed_returns[::-1]
        expected = {
            "obs": np.concatenate([e.obs[:-1] for e in episodes]),
            "new_obs": np.concatenate([e.obs[1:] for e in episodes]),
            "rewards": np.concatenate([e.rewards for e in episodes]),
            "terminateds": np.array([float(step[4]) for e in episodes for step in e.transitions()]),
            "returns_to_go": np.array(returns),
        }
        by_obs = {step.tobytes(): row for row, step in enumerate(expected["obs"])}
        order = [by_obs[step.tobytes()] for step in columns["obs"]]
        assert sorted(order) == list(range(len(expected["obs"])))
        for name in ("obs", "new_obs", "terminateds"):
            np.testing.assert_array_equal(columns[name], expected[name][order], err_msg=name)
        for name in ("rewards", "returns_to_go"):
            np.testing.assert_allclose(columns[name], expected[name][order], rtol=1e-5, atol=1e-6, err_msg=name)
        received = np.concatenate([e.actions for e in episodes])[order]
        back = ACTION_SPACE.low + (columns["actions"] + 1.0) * (ACTION_SPACE.high - ACTION_SPACE.low) / 2.0
        np.testing.assert_allclose(back, received, atol=5e-5)  # Actions are kept 1e-5 away from the ends of [-1, 1].
