"""Restoring into other configs, without the online data, and beginning from another run's networks."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.train._internal.storage import StorageContext
from tiny import TINY_NETWORKS, LineEnv, assert_identical, line_config, run_state

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.checkpoints.reading import CheckpointFiles
from rllib_calql.common import metrics as keys

pytestmark = pytest.mark.usefixtures("ray_session")


def learner_states(algo: CalQL) -> list[dict[str, Any]]:
    """Parameters, optimisers, temperature and update count of every learner."""

    def state_of(learner: Any) -> dict[str, Any]:
        state = {name: learner.get_state()[name] for name in ("rl_module", "optimizer", "calql")}
        state["calql"] = {k: v for k, v in state["calql"].items() if k not in ("generator", "seed")}
        for optimizer in state["optimizer"].values():  # Learning rates are those of the config.
            optimizer["state"] = optimizer["state"]["state"]
        return state

    return [result.get() for result in algo.learner_group.foreach_learner(state_of)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resuming")


@pytest.fixture(scope="module")
def config_of(folder: Path) -> Callable[..., CalQLConfig]:
    return lambda: line_config(folder, offline_updates=6, updates_per_iteration=3)


@pytest.fixture(scope="module")
def saved(folder: Path, ray_session: None) -> dict[str, Any]:
    """A run with its checkpoints after the first offline iteration and in the online phase."""
    algo = line_config(folder, offline_updates=6, updates_per_iteration=3).build()
    content: dict[str, Any] = {}
    algo.train()
    content["offline"] = algo.save_to_path(folder / "offline")
    content["offline_learner"] = learner_states(algo)[0]
    for _ in range(3):
        algo.train()
    content["online"] = algo.save_to_path(folder / "online")
    content["online_learner"], content["online_run"] = learner_states(algo)[0], run_state(algo)
    algo.stop()
    return content


# --- from_checkpoint(path, config=...) --------------------------------------------------------------------------------


def test_remote_runners_and_a_learner_continue_a_local_run(
    saved: dict[str, Any], config_of: Callable[..., CalQLConfig], tmp_path: Path
) -> None:
    config = config_of().env_runners(num_env_runners=1, num_envs_per_env_runner=2).learners(num_learners=1)
    restored = CalQL.from_checkpoint(saved["online"], config=config)
    assert restored.config.num_env_runners == 1
    assert_identical(learner_states(restored), [saved["online_learner"]])
    assert_identical(run_state(restored), saved["online_run"])
    expected = saved["online_learner"]["rl_module"]["default_policy"]["policy.head.weight"]
    weights = restored.env_runner_group.foreach_env_runner(
        lambda runner: runner.module.get_state()["policy.head.weight"]
    )
    assert len(weights) >= 1
    assert all(np.array_equal(weight, expected) for weight in weights)
    updates = restored.num_online_updates
    while restored.num_online_updates == updates:
        restored.train()
    path = restored.save_to_path(tmp_path / "checkpoint")
    restored.learner_group.foreach_learner(lambda learner: setattr(learner, "get_metadata", None))
    with pytest.raises(RuntimeError, match="A learner could not write its part of the checkpoint"):
        restored.save_to_path(path)
    restored.stop()
    assert CheckpointFiles.find(path).learner_state().keys() >= {"rl_module", "optimizer", "calql"}


@pytest.mark.slow
def test_two_learners_continue_a_local_run_and_a_local_one_continues_theirs(
    saved: dict[str, Any], config_of: Callable[..., CalQLConfig], tmp_path: Path
) -> None:
    two = CalQL.from_checkpoint(saved["offline"], config=config_of().learners(num_learners=2))
    assert_identical(learner_states(two), [saved["offline_learner"]] * 2)
    assert two.num_offline_updates == 3
    two.train()
    one_rank, other_rank = learner_states(two)
    assert_identical(one_rank, other_rank)
    path = two.save_to_path(tmp_path / "two")
    two.stop()
    local = CalQL.from_checkpoint(path, config=config_of().env_runners(num_env_runners=0).learners(num_learners=0))
    assert_identical(learner_states(local), [one_rank])
    assert local.num_offline_updates == 6
    local.train()
    assert local.num_online_env_steps > 0
    local.stop()


def test_unknown_arguments_are_refused_by_name(saved: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="takes `path`, `filesystem` and `config`, got `confg`, `policy_ids`; drop"):
        CalQL.from_checkpoint(saved["offline"], confg=1, policy_ids=2)
    with pytest.raises(TypeError, match="`config` must be a `CalQLConfig`, got dict"):
        CalQL.from_checkpoint(saved["offline"], config={"lr": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.rl_module(model_config=TINY_NETWORKS | {"critic_hiddens": [9]}),
            r"with `critic_hiddens` \[8\], this run has \[9\]",
        ),
        (lambda c: c.training(num_critics=3), "made with `num_critics` 2, this run has 3"),
        (lambda c: c.offline_data(reward_scale=2.0), r"`reward_scale` 1.0, this run has 2.0: its online data and Q va"),
        (lambda c: c.training(gamma=0.5), r"`gamma` 0.99, this run has 0.5"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_and_says_why(
    saved: dict[str, Any], config_of: Callable[..., CalQLConfig], change: Any, message: str
) -> None:
    config = config_of()
    change(config)
    with pytest.raises(ValueError, match=message):
        CalQL.from_checkpoint(saved["offline"], config=config)


def test_a_refused_checkpoint_leaves_the_run_as_it_was(
    saved: dict[str, Any], config_of: Callable[..., CalQLConfig]
) -> None:
    algo = config_of().training(lagrangian=True).build()
    path = algo.save_to_path(Path(saved["offline"]).with_name("lagrangian"))
    algo.stop()
    algo = config_of().debugging(seed=1).build()
    before = learner_states(algo)
    with pytest.raises(ValueError, match=r"made with `lagrangian=True`, this run has False; restore with True"):
        algo.restore_from_path(path)
    assert_identical(learner_states(algo), before)
    algo.train()
    algo.stop()


# --- Learning rates ---------------------------------------------------------------------------------------------------


def watch_rates(learner: Any) -> None:
    """Writes down the rate with which every optimiser makes its first step."""
    learner.first_rates = {}
    for name, optimizer in learner._named_optimizers.items():

        def note(stepped: Any, *args: Any, name: str = name) -> None:
            learner.first_rates.setdefault(name, float(stepped.param_groups[0]["lr"]))

        optimizer.register_step_pre_hook(note)


@pytest.mark.parametrize("num_learners", [0, 1])
def test_changed_learning_rates_and_schedules_are_used_in_the_first_update(
    saved: dict[str, Any], config_of: Callable[..., CalQLConfig], num_learners: int
) -> None:
    env_steps = saved["online_run"][keys.NUM_ONLINE_ENV_STEPS_LIFETIME]
    scheduled = config_of().training(actor_lr=[[0, 0.0], [1000, 1.0]], critic_lr=[[0, 0.5], [1000, 0.5]], alpha_lr=0.03)
    constant = config_of().training(actor_lr=0.02, critic_lr=[[0, 0.0], [1, 0.25]], alpha_lr=0.04)
    path = Path(saved["online"])
    for config, expected in (
        (scheduled, {"policy": None, "critic": 0.5, "alpha": 0.03}),
        (constant, {"policy": 0.02, "critic": 0.25, "alpha": 0.04}),
    ):
        algo = CalQL.from_checkpoint(path, config=config.learners(num_learners=num_learners))
        algo.learner_group.foreach_learner(watch_rates)
        algo.train()
        (result,) = algo.learner_group.foreach_learner(lambda learner: learner.first_rates)
        rates = {name.removeprefix("default_policy_"): rate for name, rate in result.get().items()}
        collected = algo.num_online_env_steps
        path = Path(algo.save_to_path(path.parent / f"rates_{num_learners}"))
        algo.stop()
        if expected["policy"] is None:
            assert collected > env_steps
            expected["policy"] = collected / 1000
        assert rates == pytest.approx(expected)


# --- Online data ------------------------------------------------------------------------------------------------------


def test_online_data_can_be_left_out_and_the_run_goes_on_without(
    saved: dict[str, Any],
    config_of: Callable[..., CalQLConfig],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="rllib_calql")
    lean_config = config_of().training(store_buffer_in_checkpoints=False)
    lean = CalQL.from_checkpoint(saved["online"], config=lean_config)
    num_online = lean.store.num_online
    assert_identical(run_state(lean)["store"]["rng"], saved["online_run"]["store"]["rng"])
    assert num_online > 0
    path = lean.save_to_path(tmp_path / "lean")
    counters = lean.lifetime.counters()
    lean.stop()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("rllib_calql")]
    restored = CalQL.from_checkpoint(path, config=config_of())
    (warning,) = [r for r in caplog.records if "store_buffer_in_checkpoints=False" in r.getMessage()]
    assert f"the {num_online} online transitions that the run had are missing" in warning.getMessage()
    assert restored.store.num_online == 0
    assert restored.lifetime.counters() == counters
    while restored.num_online_updates == counters[keys.NUM_ONLINE_UPDATES_LIFETIME]:
        restored.train()
    steps = restored.num_online_env_steps - counters[keys.NUM_ONLINE_ENV_STEPS_LIFETIME]
    assert restored.store.num_online == steps > 0
    assert restored.num_online_updates - counters[keys.NUM_ONLINE_UPDATES_LIFETIME] == steps
    caplog.clear()
    restored.save_to_path(tmp_path / "full")
    assert f"holds {steps} online transitions" in caplog.text
    restored.stop()


def test_a_checkpoint_says_what_is_in_it(saved: dict[str, Any]) -> None:
    content = json.loads((Path(saved["online"]) / "calql.json").read_text())
    run = saved["online_run"]
    columns = run["store"]["online"]["columns"]
    assert content["phase"] == keys.ONLINE
    assert content[keys.NUM_OFFLINE_UPDATES_LIFETIME] == 6
    assert content[keys.NUM_ONLINE_ENV_STEPS_LIFETIME] == run[keys.NUM_ONLINE_ENV_STEPS_LIFETIME]
    assert content["online_data"]["transitions"] == len(columns["rewards"])
    num_bytes = sum(column.nbytes for column in columns.values())
    assert content["online_data"]["mebibytes"] == pytest.approx(num_bytes / 2**20, abs=1e-3)
    assert content["networks"]["actor_hiddens"] == [8]
    assert content["spaces"]["action_space"] == {
        "size": 1,
        "low": [-2.0],
        "high": [2.0],
        "space": "Box(-2.0, 2.0, (1,), float32)",
    }


# --- Another run's networks -------------------------------------------------------------------------------------------


def test_pretrained_takes_over_networks_optimisers_and_the_count_of_updates(
    saved: dict[str, Any], config_of: Callable[..., CalQLConfig]
) -> None:
    config = config_of().fine_tuning(pretrained=saved["online"], offline_updates=8).training(actor_lr=0.07)
    algo = config.debugging(seed=5).build()
    assert_identical(learner_states(algo), [saved["online_learner"]])
    assert algo.lifetime.counters() == {
        keys.NUM_OFFLINE_UPDATES_LIFETIME: 6,
        keys.NUM_ONLINE_UPDATES_LIFETIME: 0,
        keys.NUM_ONLINE_ENV_STEPS_LIFETIME: 0,
        keys.NUM_ONLINE_EPISODES_LIFETIME: 0,
        keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME: 0,
    }
    assert algo.store.num_online == 0
    optimizer = algo.learner_group._learner.get_optimizer("default_policy", "policy")
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.07])
    expected = saved["online_learner"]["rl_module"]["default_policy"]["policy.head.weight"]
    np.testing.assert_array_equal(algo.env_runner.module.get_state()["policy.head.weight"], expected)
    assert algo.phase == keys.OFFLINE
    told = algo.train()[keys.PRETRAINED_WARNING]
    assert told == (
        "6 offline updates come along with the networks and count for `offline_updates`, 8: 2 are left before it goes "
        "online. For 8 more of them set `offline_updates` to 14"
    )
    assert algo.num_offline_updates == 8
    assert algo.phase == keys.ONLINE
    algo.stop()


def fit_updates_of(algo: CalQL) -> int:
    (number,) = (result.get() for result in algo.learner_group.foreach_learner(attrgetter("num_reference_updates")))
    assert isinstance(number, int)
    return number


def test_a_learned_reference_value_is_fitted_in_a_run_from_a_checkpoint_without_and_not_again_on_the_same_data(
    saved: dict[str, Any], config_of: Callable[..., CalQLConfig], tmp_path: Path
) -> None:
    def learned(path: Any) -> CalQLConfig:
        config = config_of().training(reference_value="learned", reference_updates=4)
        return config.fine_tuning(pretrained=path, offline_updates=9)

    algo = learned(saved["offline"]).build()
    assert fit_updates_of(algo) == 0
    result = algo.train()["learners"]["default_policy"]
    assert (result["num_reference_updates_lifetime"], result["reference_loss"] > 0.0) == (4, True)
    path = algo.save_to_path(tmp_path / "learned")
    algo.stop()
    with pytest.raises(ValueError, match=r"has the network of a learned .*`reference_value='learned'`, this run has"):
        CalQL.from_checkpoint(path, config=config_of().fine_tuning(offline_updates=9))
    for reward_scale, expected in ((1.0, 4), (2.0, 0)):
        algo = learned(path).offline_data(reward_scale=reward_scale).build()
        assert fit_updates_of(algo) == expected
        algo.stop()


def test_without_data_a_learned_reference_value_has_to_be_in_the_checkpoint(saved: dict[str, Any]) -> None:
    config = CalQLConfig().environment(LineEnv).rl_module(model_config=TINY_NETWORKS)
    config.training(num_actions=3, train_batch_size_per_learner=8, reference_value="learned")
    with pytest.raises(ValueError, match="lacks the network of a learned reference value, and there are no offline"):
        config.fine_tuning(pretrained=saved["offline"]).build()


def test_pretrained_without_further_offline_updates_or_data_begins_online(saved: dict[str, Any]) -> None:
    config = CalQLConfig().environment(LineEnv).rl_module(model_config=TINY_NETWORKS).debugging(seed=0)
    config.training(num_actions=3, train_batch_size_per_learner=8).learners(num_learners=1)
    algo = config.fine_tuning(pretrained=saved["offline"]).build()
    assert_identical(learner_states(algo), [saved["offline_learner"]])
    assert (algo.phase, algo.num_offline_updates) == (keys.ONLINE, 3)
    algo.train()
    assert algo.num_online_updates == algo.num_online_env_steps > 0
    algo.stop()


def test_fine_tunings_from_one_checkpoint_differ_by_their_seeds_only(
    saved: dict[str, Any], config_of: Callable[..., CalQLConfig]
) -> None:
    weights, noises = [], []
    for seed in (1, 1, 2):
        algo = config_of().fine_tuning(pretrained=saved["offline"], offline_updates=None).debugging(seed=seed).build()
        noises.append(algo.learner_group._learner.get_state()["calql"]["generator"])
        algo.train()
        weights.append(learner_states(algo)[0]["rl_module"]["default_policy"]["policy.head.weight"])
        algo.stop()
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(noises[0], noises[1])
    assert not np.array_equal(noises[0], noises[2])
    assert not np.array_equal(weights[0], weights[2])


class WideEnv(LineEnv):
    """Moves by actions in [-3, 3]."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.action_space = gym.spaces.Box(-3.0, 3.0, (1,), np.float32)


class PlaneEnv(LineEnv):
    """Observes two numbers."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.observation_space = gym.spaces.Box(-10.0, 10.0, (2,), np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Doubles the observation."""
        obs, info = super().reset(**kwargs)
        return np.repeat(obs, 2), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Doubles the observation."""
        obs, *rest = super().step(action)
        return np.repeat(obs, 2), *rest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.rl_module(model_config={"actor_hiddens": [9]}),
            r"`actor_hiddens` \[8\], this run has \[9\], so its",
        ),
        (lambda c: c.training(num_critics=4), r"`num_critics` 2, this run has 4, .*; set `num_critics=2`"),
        (lambda c: c.environment(PlaneEnv), r"observation space Box\(.*\(1,\).*\), the environment has Box\(.*\(2,\)"),
        (lambda c: c.environment(WideEnv), r"action space Box\(-2.0, 2.0.*, the environment has Box\(-3.0, 3.0"),
    ],
)
def test_other_networks_and_spaces_are_refused_before_anything_is_loaded(
    saved: dict[str, Any], change: Any, message: str
) -> None:
    config = CalQLConfig().environment(LineEnv).rl_module(model_config=TINY_NETWORKS)
    config.fine_tuning(pretrained=saved["offline"])
    change(config)
    with pytest.raises(ValueError, match=r"^`pretrained`: The checkpoint was made with .*" + message):
        config.build()


def test_other_reward_units_are_warned_of(
    saved: dict[str, Any], config_of: Callable[..., CalQLConfig], caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of().offline_data(reward_scale=10.0).training(gamma=0.9)
    config.fine_tuning(pretrained=saved["offline"]).build().stop()
    (warning,) = [r.getMessage() for r in caplog.records if "other units" in r.getMessage()]
    assert "`gamma` was 0.99 and is 0.9, `reward_scale` was 1.0 and is 10.0" in warning


def test_a_restored_run_needs_the_pretrained_checkpoint_no_more(
    saved: dict[str, Any], config_of: Callable[..., CalQLConfig], tmp_path: Path
) -> None:
    shutil.copytree(saved["offline"], tmp_path / "base")
    config = config_of().fine_tuning(pretrained=tmp_path / "base")
    algo = config.build()
    algo.train()
    path = algo.save_to_path(tmp_path / "run")
    before = learner_states(algo), run_state(algo)
    algo.stop()
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match=r"^`pretrained`: There is no checkpoint at '.*base'"):
        config.build()
    restored = CalQL.from_checkpoint(path)
    assert_identical((learner_states(restored), run_state(restored)), before)
    assert restored.num_offline_updates == 6
    restored.stop()
    # Ray Tune restores a trial only after it has been set up.
    storage = StorageContext(storage_path=str(tmp_path), experiment_dir_name="tune", trial_dir_name="trial")
    trial = CalQL(config, storage=storage)
    trial.load_checkpoint(path)
    trial.step()
    assert trial.num_online_env_steps > 0
    assert_identical(learner_states(trial)[0]["calql"]["num_updates"], 6 + trial.num_online_updates)
    trial.stop()
    fresh = CalQL(config, storage=storage)
    with pytest.raises(FileNotFoundError, match=r"^`pretrained`: There is no checkpoint"):
        fresh.step()
    fresh.stop()
