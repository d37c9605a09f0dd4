"""Episodes from outside become the rows that an env runner's would be, once, and owe the updates that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from logged_episodes import write_episode
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from tiny import LineEnv, assert_identical, line_config, run_state

from rllib_calql import CalQL, CalQLConfig, EpisodeLog
from rllib_calql.collection.intake import read_episodes

OBSERVATIONS = gym.spaces.Box(-10.0, 10.0, (1,), np.float32)
ACTIONS = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)


class LoggingLineEnv(LineEnv):
    """Writes down what it does, as a control loop would, and says so."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.episodes = EpisodeLog(config["folder"])

    def reset(self, **arguments: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode of the log."""
        obs, info = super().reset(**arguments)
        self.episodes.reset(obs)
        return obs, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Notes the step; a person acts in the first one."""
        obs, reward, terminated, truncated, info = super().step(action)
        marks = {"executed_action": action, "is_intervention": self.t == 1}
        self.episodes.step(action, reward, terminated, truncated, obs, **marks)
        return obs, reward, terminated, truncated, info | marks


def without_env(config: CalQLConfig) -> CalQLConfig:
    return config.environment(None, observation_space=OBSERVATIONS, action_space=ACTIONS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where offline data are."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def algo(data: Path) -> Any:
    """An algorithm on data alone whose offline phase is over."""
    built = without_env(line_config(data, offline_updates=0, updates_per_env_step=0.5)).training(gamma=0.5).build()
    yield built
    built.stop()


# --- The same rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rewards",
    [
        {"reward_scale": 10.0, "reward_bias": -0.3, "failure_reward": -1.0},
        {"reward_scale": 0.1, "truncation": "bootstrap"},
    ],
)
def test_rows_of_files_are_those_of_env_runners_to_the_bit(tmp_path: Path, rewards: dict[str, Any]) -> None:
    config = line_config(tmp_path, offline_updates=0, updates_per_env_step=0.02).offline_data(**rewards)
    logs = tmp_path / "logs"
    collecting = config.copy(copy_frozen=False).environment(LoggingLineEnv, env_config={"folder": str(logs)}).build()
    for _ in range(3):
        collecting.train()
    adding = without_env(config).build()
    added = adding.add_episodes(logs)
    assert (added.num_episodes, added.num_env_steps) == (3, adding.store.num_online)
    assert added.intervention_share == 3 / added.num_env_steps
    adding.make_owed_updates()
    collected, stored = (run_state(one)["store"]["online"] for one in (collecting, adding))
    if config.truncation == "bootstrap":  # Values are of networks that have seen other batches.
        for state in (collected, stored):
            state["columns"].pop(Columns.RETURNS_TO_GO)
    assert_identical(collected, stored)
    assert adding.lifetime.counters() == collecting.lifetime.counters()
    assert adding.lifetime.updates_owed == collecting.lifetime.updates_owed
    for name in ("intervention_share", "num_intervention_env_steps_lifetime"):
        assert adding._parts.keeper.results()[name] == collecting._parts.keeper.results()[name] > 0
    adding.stop()
    collecting.stop()


def test_rows_are_those_made_by_hand(algo: CalQL, tmp_path: Path) -> None:
    write_episode(tmp_path)
    added = algo.add_episodes(str(tmp_path))
    column: Any = algo.store.online_column
    assert column(Columns.OBS)[:, 0].tolist() == [0, 1, 2]
    assert column(Columns.NEXT_OBS)[:, 0].tolist() == [1, 2, 3]
    assert column(Columns.ACTIONS)[:, 0].tolist() == [0.25, 0.125, 0.0625]  # What was executed, of bounds [-2, 2].
    assert column(Columns.REWARDS).tolist() == [1, 2, 3]
    assert column(Columns.TERMINATEDS).tolist() == [0, 0, 1]
    assert column(Columns.RETURNS_TO_GO).tolist() == [2.75, 3.5, 3.0]  # 1 + (2 + 3 / 2) / 2 and so on.
    assert algo.store.online_interventions.tolist() == [False, False, True]
    assert (added.num_episodes, added.num_env_steps, added.return_mean, added.updates_owed) == (1, 3, 6.0, 1.5)
    assert (added.intervention_share, added.num_skipped) == (1 / 3, 0)


# --- Updates and counters ---------------------------------------------------------------------------------------------


def test_owed_updates_are_made_without_an_environment_and_counted(algo: CalQL, tmp_path: Path) -> None:
    for start in range(4):
        write_episode(tmp_path, start=start, terminated=start % 2 == 0)
    assert algo.add_episodes(tmp_path).updates_owed == 6.0
    assert algo.make_owed_updates(most=2) == 2
    result = algo.train()  # The rest: there is nothing to collect.
    assert result["done"]
    counters = {name: result[f"num_{name}_lifetime"] for name in ("online_updates", "online_env_steps")}
    assert counters == {"online_updates": 6, "online_env_steps": 12}
    assert result["num_online_episodes_lifetime"] == 4
    assert result["num_online_env_steps_taken_lifetime"] == 12
    assert (result["phase"], result["collection"]["num_env_steps_behind"]) == ("online", 0.0)
    assert algo.make_owed_updates() == 0
    with pytest.raises(RuntimeError, match=r"there is no environment; .* handed over by `add_episodes`"):
        algo.train()
    write_episode(tmp_path, start=7, length=4)
    algo.add_episodes(tmp_path, skip_known=True)
    assert algo.train()["num_online_updates_lifetime"] == 8


def test_the_warm_up_owes_nothing(data: Path, tmp_path: Path) -> None:
    config = without_env(line_config(data, offline_updates=0)).fine_tuning(warmup_env_steps=4)
    algo = config.build()
    for start in range(2):
        write_episode(tmp_path, start=start)
    assert algo.add_episodes(tmp_path).updates_owed == 2.0  # Of 6 env steps.
    algo.stop()


def test_in_the_offline_phase_episodes_wait_for_the_switch(data: Path, tmp_path: Path) -> None:
    algo = without_env(line_config(data, offline_updates=2)).build()
    write_episode(tmp_path)
    algo.add_episodes(tmp_path)
    with pytest.raises(RuntimeError, match="2 of `offline_updates` are left"):
        algo.make_owed_updates()
    assert not algo.train().get("done")
    assert algo.phase == "online"
    assert algo.make_owed_updates() == 3
    algo.stop()


def test_spaces_alone_are_enough(tmp_path: Path) -> None:
    config = CalQLConfig().environment(observation_space=OBSERVATIONS, action_space=ACTIONS)
    config.training(num_actions=2, train_batch_size_per_learner=4)
    config.rl_module(model_config={"actor_hiddens": [8], "critic_hiddens": [8]}).fine_tuning(warmup_env_steps=0)
    algo = config.build()
    write_episode(tmp_path)
    algo.add_episodes(tmp_path)
    assert algo.make_owed_updates() == 3
    algo.stop()


# --- Once over the lifetime -------------------------------------------------------------------------------------------


def test_an_episode_is_added_once_over_the_lifetime(algo: CalQL, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    write_episode(logs)
    algo.add_episodes(logs)
    restored = CalQL.from_checkpoint(algo.save_to_path(tmp_path / "checkpoint"))
    (file,) = logs.iterdir()
    file.rename(logs / "renamed.npz")
    write_episode(logs, start=5)
    for one in (algo, restored):
        with pytest.raises(ValueError, match=r"1 of 2 episodes .* added before: Episode .*renamed\.npz.* `skip_known"):
            one.add_episodes(logs)
        assert one.num_online_episodes == 1
        added = one.add_episodes(logs, skip_known=True)
        assert (added.num_episodes, added.num_skipped, one.num_online_episodes) == (1, 1, 2)
    assert_identical(run_state(algo)["store"]["online"], run_state(restored)["store"]["online"])
    restored.stop()


def episode_of(id_: str, *, reward: float = 1.0, **arguments: Any) -> SingleAgentEpisode:
    """One step."""
    given: dict[str, Any] = {
        "observations": [np.float32([0.0]), np.float32([1.0])],
        "actions": [np.float32([0.5])],
        "infos": [{}, {}],
        "terminated": True,
        "len_lookback_buffer": 0,
    }
    return SingleAgentEpisode(id_=id_, rewards=[reward], **(given | arguments))


def test_ids_of_episodes_are_names_for_ever(algo: CalQL) -> None:
    assert algo.add_episodes([episode_of("a"), episode_of("b")]).num_episodes == 2  # Of the same content.
    with pytest.raises(ValueError, match="1 of 1 episodes have been added before: Episode 'b'"):
        algo.add_episodes(episode_of("b"))
    for skip_known in (False, True):
        with pytest.raises(
            ValueError, match=r"Episode 'a' .*has the id of an episode that was added before, and other"
        ):
            algo.add_episodes([episode_of("c"), episode_of("a", reward=2.0)], skip_known=skip_known)
    assert algo.num_online_episodes == 2
    assert algo.add_episodes([]).num_episodes == 0


def test_what_infos_say_was_executed_is_stored(algo: CalQL) -> None:
    infos = [{}, {"executed_action": np.float32([-1.0]), "is_intervention": True}]
    added = algo.add_episodes([episode_of("a", infos=infos), episode_of("b")])
    assert algo.store.online_column(Columns.ACTIONS)[:, 0].tolist() == [-0.5, 0.25]
    assert added.intervention_share == 0.5


def test_units_of_actions_can_be_told(algo: CalQL) -> None:
    algo.add_episodes(episode_of("a"), action_space_of_data="module")
    assert algo.store.online_column(Columns.ACTIONS)[:, 0].tolist() == [0.5]
    with pytest.raises(ValueError, match="`action_space_of_data` must be one of 'environment', 'module'"):
        algo.add_episodes(episode_of("b"), action_space_of_data="degrees")


# --- All or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": [np.float32([2.5])]}, r"'bad'.* action \[2\.5\] is outside the bounds"),
        ({"actions": [np.float32([0.5, 0.5])]}, r"`actions` holds float32 of shape \(2,\) in episode 'bad'"),
        ({"observations": [np.float32([0.0]), np.float32([np.nan])]}, "`new_obs` holds nan in episode 'bad'"),
        (
            {"observations": [np.float32([0, 0]), np.float32([1, 0])]},
            r"`obs` holds float32 of shape \(2,\) in episode 'bad'",
        ),
        ({"reward": np.inf}, "`rewards` holds inf in episode 'bad'"),
        ({"terminated": False}, "Episode 'bad' ends neither terminated nor truncated"),
        ({"infos": [{}, {"executed_action": [9.0]}]}, r"action \[9\.0\] is outside the bounds"),
    ],
)
def test_one_bad_episode_and_nothing_is_added(algo: CalQL, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        algo.add_episodes([episode_of("good"), episode_of("bad", **changes)])
    assert (algo.store.num_online, algo.num_online_episodes, algo.lifetime.updates_owed) == (0, 0, 0.0)
    assert algo.add_episodes(episode_of("good")).num_episodes == 1


def test_a_torn_file_and_nothing_is_added(algo: CalQL, tmp_path: Path) -> None:
    for start in range(2):
        write_episode(tmp_path, start=start)
    torn = sorted(tmp_path.iterdir())[1]
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{torn.name}' is not a readable NumPy"):
        algo.add_episodes(tmp_path)
    assert algo.store.num_online == 0


def test_what_is_no_episode_is_refused_by_its_own_name(algo: CalQL, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`episodes` .*there is no such file"):
        algo.add_episodes(tmp_path / "missing")
    with pytest.raises(TypeError, match="`episodes` must be one of"):
        algo.add_episodes(7)
    with pytest.raises(ValueError, match="`episodes` is an empty text; name a file or a folder"):
        algo.add_episodes("")
    with pytest.raises(TypeError, match="`skip_known` must be True or False, got 'no'"):
        algo.add_episodes(tmp_path, skip_known="no")  # type: ignore[arg-type]
    for most in (-1, 1.0, True, "2", np.nan):
        with pytest.raises(ValueError, match="`most` must be None or an integer of at least 0, got "):
            algo.make_owed_updates(most)  # type: ignore[arg-type]
    write_episode(tmp_path, length=7)
    small = CalQLConfig().fine_tuning(online_capacity=5)
    with pytest.raises(ValueError, match=r"Episode '0' of .* has 7 steps, more than `online_capacity`, 5"):
        read_episodes(tmp_path, small, observation_space=OBSERVATIONS, action_space=ACTIONS)
