"""What `record` writes is what an instrumented environment saw, whoever acts in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import tree
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from tiny import LineEnv

from rllib_calql.datasets import open_input
from rllib_calql.datasets.writers.conversion import convert
from rllib_calql.datasets.writers.recording import record

pytestmark = pytest.mark.usefixtures("ray_session")


class DictLineEnv(LineEnv):
    """The line with dict observations, of which one array is used again and again; lengths vary from 1 to 20."""

    emitted: list[Any]
    received: list[Any]

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        """`config` may hold `bounds` of the actions."""
        super().__init__()
        bound = (config or {}).get("bound", 2.0)
        self.action_space = gym.spaces.Box(-bound, bound, (1,), np.float32)
        box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.observation_space = gym.spaces.Dict({"position": box, "goal": gym.spaces.Box(-9, 9, (1,), np.float32)})
        self._position = np.zeros(2)
        self.emitted, self.received = [], []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """As the line."""
        obs, info = super().reset(seed=seed, options=options)
        return self._emit("reset", obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As the line, and the log of what came in and went out."""
        self.received.append(np.array(action))
        obs, reward, terminated, truncated, info = super().step(action)
        return self._emit((reward, terminated, truncated), obs), reward, terminated, truncated, info

    def _emit(self, what: Any, obs: np.ndarray) -> Any:
        self._position[:] = obs[0], self.t
        self.emitted.append((what, self._position.copy()))
        return {"position": self._position, "goal": np.array([self.GOAL], np.float32)}


def episodes_of_log(env: DictLineEnv) -> list[dict[str, Any]]:
    """The episodes of the environment's own log that ended, by a plain loop."""
    episodes: list[dict[str, Any]] = []
    actions = iter(env.received)
    for what, position in env.emitted:
        if what == "reset":
            episodes.append({"obs": [position], "actions": [], "rewards": [], "end": None})
            continue
        episode = episodes[-1]
        episode["obs"].append(position)
        episode["actions"].append(next(actions))
        episode["rewards"].append(what[0])
        episode["end"] = what[1:]
    return [episode for episode in episodes if episode["end"] is not None and any(episode["end"])]


def assert_recorded(to: Any, expected: list[dict[str, Any]]) -> None:
    (reader,) = open_input(to)
    got = list(reader)
    assert len(got) == len(expected)
    for episode, want in zip(got, expected, strict=True):
        observations = episode.get_observations()
        np.testing.assert_array_equal(observations["position"], want["obs"])
        assert observations["position"].dtype == np.float64
        np.testing.assert_array_equal(observations["goal"], np.full((len(want["obs"]), 1), LineEnv.GOAL, np.float32))
        np.testing.assert_array_equal(episode.get_actions(), want["actions"])
        np.testing.assert_array_equal(episode.get_rewards(), want["rewards"])
        assert (episode.is_terminated, episode.is_truncated) == want["end"]


def random_policy(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return lambda obs: rng.uniform(-2.0, 2.0, size=1).astype(np.float32)


def ppo() -> Algorithm:
    config = (
        PPOConfig()
        .environment(DictLineEnv)
        .env_runners(
            num_env_runners=0,
            env_to_module_connector=lambda env, spaces, device: [FlattenObservations(), MeanStdFilter()],
        )
        .training(train_batch_size_per_learner=64, minibatch_size=32, num_epochs=1)
        .rl_module(model_config={"fcnet_hiddens": [8]})
        .debugging(seed=3)
    )
    algo: Algorithm = config.build_algo()
    algo.train()
    return algo


@pytest.fixture(scope="module")
def trained_ppo(ray_session: None) -> Iterator[Algorithm]:
    algo = ppo()
    yield algo
    algo.stop()


# --- Equal to what the environment saw --------------------------------------------------------------------------------


def test_a_callable_is_recorded_as_the_environment_saw_it(tmp_path: Path) -> None:
    env = DictLineEnv()
    summary = record(random_policy(0), env, 9, tmp_path / "rows.parquet", seed=0)
    expected = episodes_of_log(env)
    assert (summary.num_episodes, summary.num_transitions) == (9, sum(len(e["rewards"]) for e in expected))
    assert len({len(e["rewards"]) for e in expected}) > 2, "the lengths must vary for this test to mean something"
    assert_recorded(tmp_path / "rows.parquet", expected)


@pytest.mark.parametrize("to", ["data.hdf5", "data.npz", "minari:test/recorded-v0"])
def test_every_format_holds_the_same_recording(tmp_path: Path, to: str) -> None:
    to = to if to.startswith("minari:") else f"{tmp_path}/{to}"
    env = DictLineEnv()
    record(random_policy(1), env, 4, to, seed=0, overwrite=True)
    assert_recorded(to, episodes_of_log(env))


@pytest.mark.parametrize("explore", [True, False])
def test_ppo_is_recorded_as_the_environment_saw_it(tmp_path: Path, trained_ppo: Algorithm, explore: bool) -> None:
    env = DictLineEnv()
    record(trained_ppo, env, 7, tmp_path / "rows.parquet", seed=0, explore=explore)
    expected = episodes_of_log(env)
    assert len(expected) == 7
    assert_recorded(tmp_path / "rows.parquet", expected)
    actions = np.concatenate([e["actions"] for e in expected])
    assert np.all(np.abs(actions) <= 2.0)


def test_episodes_of_a_seeded_recording_differ_from_each_other(tmp_path: Path, trained_ppo: Algorithm) -> None:
    env = DictLineEnv()
    record(trained_ppo, env, 5, tmp_path / "rows.parquet", seed=0, explore=False)
    assert len({float(e["obs"][0][0]) for e in episodes_of_log(env)}) == 5


def test_sac_actions_are_those_that_the_environment_received(tmp_path: Path) -> None:
    algo = (
        SACConfig()
        .environment(LineEnv)
        .rl_module(model_config={"fcnet_hiddens": [8]})
        .training(num_steps_sampled_before_learning_starts=10**6)
        .build_algo()
    )
    LineEnv.log.clear()
    record(algo, LineEnv(), 5, tmp_path / "rows.parquet", seed=0)
    algo.stop()
    table = pq.read_table(tmp_path / "rows.parquet")
    rows = [
        (obs[0], action[0], reward, new_obs[0], float(terminated))
        for obs, action, reward, new_obs, terminated in zip(
            *(table[name].to_pylist() for name in ("obs", "actions", "rewards", "new_obs", "terminateds")), strict=True
        )
    ]
    assert rows == LineEnv.log
    assert max(abs(row[1]) for row in rows) > 1.0, "actions in [-1, 1] would not show whether they were scaled"


def test_the_policy_of_a_checkpoint_acts_like_the_algorithm_that_was_saved(
    tmp_path: Path, trained_ppo: Algorithm
) -> None:
    trained_ppo.save_to_path(tmp_path / "checkpoint")
    one, other = DictLineEnv(), DictLineEnv()
    record(trained_ppo, one, 3, tmp_path / "one.parquet", seed=5)
    record(tmp_path / "checkpoint", other, 3, tmp_path / "other.parquet", seed=5)
    assert pq.read_table(tmp_path / "one.parquet").equals(pq.read_table(tmp_path / "other.parquet"))


def test_recording_uses_the_trained_weights_and_running_means(tmp_path: Path, trained_ppo: Algorithm) -> None:
    env = DictLineEnv()
    record(trained_ppo, env, 1, tmp_path / "rows.parquet", seed=0, explore=False)
    episode = episodes_of_log(env)[0]
    runner = trained_ppo.env_runner
    state = runner.get_state()["env_to_module_connector"]
    fresh_env = runner.config.build_env_to_module_connector(env=runner.env, spaces=runner.spaces)
    fresh_env.set_state(state)
    mean_std = next(piece for piece in fresh_env if isinstance(piece, MeanStdFilter))
    flat = np.concatenate([[LineEnv.GOAL], episode["obs"][0]]).astype(np.float32)
    normalised = mean_std._filters[None](flat.copy(), update=True)
    with torch.no_grad():
        output = runner.module.forward_inference({"obs": torch.from_numpy(normalised[None].astype(np.float32))})
    mean = float(output["action_dist_inputs"][0, 0])
    expected = np.clip(-2.0 + (mean + 1.0) * 2.0, -2.0, 2.0)
    np.testing.assert_allclose(episode["actions"][0], expected, rtol=1e-5)


def test_the_same_seed_gives_the_same_recording_and_another_one_a_different(
    tmp_path: Path, trained_ppo: Algorithm
) -> None:
    tables = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        record(trained_ppo, DictLineEnv, 3, tmp_path / f"{name}.parquet", seed=seed)
        tables.append(pq.read_table(tmp_path / f"{name}.parquet"))
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def test_recording_leaves_the_global_random_state_and_the_environment_as_they_were(
    tmp_path: Path, trained_ppo: Algorithm
) -> None:
    env = gym.make("Pendulum-v1").unwrapped
    spec = env.spec
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    record(lambda obs: np.zeros(1, np.float32), env, 1, tmp_path / "a.parquet", seed=1, max_episode_steps=3)
    record(trained_ppo, DictLineEnv, 1, tmp_path / "b.parquet", seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert env.spec is spec


# --- Environments -----------------------------------------------------------------------------------------------------


def test_the_environment_may_be_a_name_and_is_recovered_from_minari() -> None:
    still = lambda obs: np.zeros(1, np.float32)  # noqa: E731 - one line says it
    record(still, "Pendulum-v1", 1, "minari:test/pendulum-v0", env_config={"g": 5.0}, max_episode_steps=4, seed=0)
    dataset = minari.load_dataset("test/pendulum-v0")
    assert dataset.total_steps == 4
    assert dataset.recover_environment().unwrapped.g == 5.0


def test_the_algorithm_is_the_same_after_it_was_recorded(tmp_path: Path, trained_ppo: Algorithm) -> None:
    before = copy.deepcopy(trained_ppo.env_runner.get_state())
    record(trained_ppo, DictLineEnv, 2, tmp_path / "rows.parquet", seed=0)
    for (path, was), now in zip(
        tree.flatten_with_path(before), tree.flatten(trained_ppo.env_runner.get_state()), strict=True
    ):
        np.testing.assert_array_equal(now, was, err_msg=str(path))
    assert trained_ppo.env_runner.config.env is DictLineEnv


def test_none_is_the_environment_of_the_policy(tmp_path: Path, trained_ppo: Algorithm) -> None:
    assert record(trained_ppo, None, 2, tmp_path / "rows.parquet").num_episodes == 2


def test_a_callable_makes_the_environment_from_its_config() -> None:
    too_large = lambda obs: np.full(1, 9.0, np.float32)  # noqa: E731 - one line says it
    record(too_large, DictLineEnv, 1, "minari:test/bound-v0", env_config={"bound": 9.0})
    assert open_input("minari:test/bound-v0")[0].info.action_space == gym.spaces.Box(-9.0, 9.0, (1,), np.float32)


def test_longer_episodes_are_cut_and_count_as_truncated(tmp_path: Path) -> None:
    still = lambda obs: np.zeros(1, np.float32)  # noqa: E731 - one line says it
    summary = record(still, DictLineEnv, 3, tmp_path / "rows.parquet", max_episode_steps=4)
    assert summary.num_transitions == 12
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table["truncateds"].to_pylist() == [False, False, False, True] * 3
    assert not any(table["terminateds"].to_pylist())


def test_an_episode_without_an_end_is_an_error_that_names_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_ppo: Algorithm
) -> None:
    monkeypatch.setattr("rllib_calql.datasets.writers.recording._ENDLESS_STEPS", 5)
    monkeypatch.setattr(LineEnv, "GOAL", 1e9)
    for policy in (lambda obs: np.zeros(1, np.float32), trained_ppo):
        with pytest.raises(RuntimeError, match=r"not ended after 5 steps.*`max_episode_steps`"):
            record(policy, DictLineEnv, 1, tmp_path / "rows.parquet")
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_changing_types_become_one_type(tmp_path: Path) -> None:
    class Sloppy(LineEnv):
        def reset(self, **kwargs: Any) -> Any:
            super().reset(**kwargs)
            return [0], {}

        def step(self, action: Any) -> Any:
            return [0.5] if action else np.float32([0.25]), 1 if action else 0.5, bool(action), False, {}

    answers = iter([True, False, True])
    record(lambda obs: next(answers), Sloppy(), 2, tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table["rewards"].to_pylist() == [1.0, 0.5, 1.0]
    assert table["new_obs"].to_pylist() == [[0.5], [0.25], [0.5]]


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"episodes": 0}, ValueError, "`episodes` must be at least 1, got 0"),
        ({"max_episode_steps": 0}, ValueError, "`max_episode_steps` must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0, got -1"),
        ({"explore": False}, ValueError, "`explore=False` is for RLlib policies"),
        ({"policy": 3}, TypeError, "`policy` must be .* got int"),
        ({"policy": "nowhere"}, FileNotFoundError, "no checkpoint"),
        ({"env": None}, ValueError, "`env=None`.*pass `env`"),
        ({"env": 3}, TypeError, "`env` must be .* got int"),
        ({"env": lambda config: 3}, TypeError, "makes a int"),
        ({"env": LineEnv(), "env_config": {}}, ValueError, "`env_config` is for environments made here"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"policy": random_policy(0), "env": LineEnv, "episodes": 1, "to": tmp_path / "rows.parquet"} | arguments
    with pytest.raises(error, match=message):
        record(**given)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_of_another_environment_is_refused(tmp_path: Path, trained_ppo: Algorithm) -> None:
    with pytest.raises(ValueError, match=r"does not fit the environment.*name the environment"):
        record(trained_ppo, "MountainCarContinuous-v0", 1, tmp_path / "rows.parquet")


def test_an_error_of_the_environment_arrives_as_it_was_raised(tmp_path: Path, trained_ppo: Algorithm) -> None:
    class Broken(DictLineEnv):
        def step(self, action: Any) -> Any:
            raise ZeroDivisionError("no road")

    with pytest.raises(ZeroDivisionError, match="no road"):
        record(trained_ppo, Broken, 1, tmp_path / "rows.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_converted_dataset_still_makes_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    record(lambda obs: np.zeros(1), "Pendulum-v1", 1, "minari:swing/first-v0", max_episode_steps=3)
    convert("minari:swing/first-v0", "minari:swing/second-v0")
    env = minari.load_dataset("swing/second-v0").recover_environment()
    assert env.spec is not None
    assert env.spec.id == "Pendulum-v1"
    env.close()
