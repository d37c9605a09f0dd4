"""`CalQLConfig`: its defaults, that every setting arrives, and that everything else is refused by name."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.collection.callbacks import EpisodeCutCallback, EpisodeOutcomeCallback
from rllib_calql.datasets import InMemoryEpisodes

INF = float("inf")
NAN = float("nan")
HUGE = 10**400  # A whole number that is no float.

# The table "Public names" of the design, typed in by hand. One deliberate departure: `warmup_env_steps` is None, which
# means 0 with offline data and 1,000 random steps without.
DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {
        "calibrate": True,
        "reference_value": "returns_to_go",
        "reference_updates": 5_000,
        "reference_fit": "monte_carlo",
        "reference_online": None,
        "calibration_quantile": 0.5,
        "calibration_form": "maximum",
        "bound_uniform_actions": False,
        "min_q_weight": 5.0,
        "num_actions": 10,
        "temperature": 1.0,
        "importance_sampling": True,
        "lagrangian": False,
        "lagrangian_thresh": 0.8,
        "max_target_backup": True,
        "deterministic_backup": True,
        "n_step": 1,
        "conservative_gap_clip": (-INF, INF),
        "num_critics": 2,
        "critic_subset": None,
        "actor_q": "min",
        "actor_update_period": 1,
        "actor_lr": 1e-4,
        "critic_lr": 3e-4,
        "alpha_lr": 1e-4,
        "tau": 5e-3,
        "target_update_period": 1,
        "bc_updates": 0,
        "bc_weight": 0.0,
        "precision": "fp32",
        "store_buffer_in_checkpoints": True,
        # RLlib's own, with the authors' values.
        "gamma": 0.99,
        "train_batch_size_per_learner": 256,
        "grad_clip": None,
    },
    "offline_data": {
        "reward_scale": 1.0,
        "reward_bias": 0.0,
        "failure_reward": None,
        "truncation": "none",
        "action_space_of_data": "environment",
        "normalize_observations": False,
        "observation_clip": 10.0,
        "use_recorded_returns": False,
        "unfinished_episodes": "error",
        "missing_final_observation": "drop_step",
        "max_episode_steps_in_data": None,
        "observation_jump_tolerance": 1e-6,
        "store_memory_limit": None,
        "cache_dir": None,
        "share_offline_data": True,
        "validation_fraction": 0.0,
        "validation_seed": 0,
    },
    "external_clients": {
        "external_port": None,
        "external_host": "127.0.0.1",
        "external_token_file": None,
    },
    "fine_tuning": {
        "offline_updates": None,
        "updates_per_iteration": 1000,
        "mixing_ratio": 0.5,
        "updates_per_env_step": 1,
        "min_q_weight_online": None,
        "conservative_online": True,
        "max_target_backup_online": None,
        "deterministic_backup_online": None,
        "actor_update_period_online": None,
        "calibrate_online": True,
        "warmup_env_steps": None,
        "online_capacity": 1_000_000,
        "sample_async": True,
        "max_staleness_env_steps": None,
        "max_episode_env_steps": 10_000,
        "max_online_env_steps": None,
        "pretrained": None,
    },
}

OTHER_VALUES: dict[str, dict[str, Any]] = {
    "training": {
        "precision": "bf16",
        "calibrate": False,
        "min_q_weight": 0.0,
        "num_actions": 1,
        "temperature": 0.5,
        "importance_sampling": False,
        "lagrangian": True,
        "lagrangian_thresh": 5.0,
        "max_target_backup": False,
        "deterministic_backup": False,
        "n_step": 3,
        "conservative_gap_clip": (-200.0, 200.0),
        "num_critics": 5,
        "critic_subset": 2,
        "actor_q": "mean",
        "actor_update_period": 20,
        "actor_lr": [[0, 3e-4], [1000, 3e-5]],
        "critic_lr": 1e-3,
        "alpha_lr": 2e-4,
        "tau": 1.0,
        "target_update_period": 2,
        "bc_updates": 100,
        "bc_weight": [[0, 2.0], [1000, 0.0]],
        "store_buffer_in_checkpoints": False,
        "gamma": 0.9,
        "train_batch_size_per_learner": 64,
        "grad_clip": 1.0,
        "initial_alpha": 0.2,
        "target_entropy": -3.0,
    },
    "offline_data": {
        "reward_scale": 10.0,
        "reward_bias": -5.0,
        "failure_reward": 0.0,
        "truncation": "steady",
        "action_space_of_data": "module",
        "normalize_observations": True,
        "observation_clip": 5.0,
        "use_recorded_returns": True,
        "unfinished_episodes": "drop",
        "missing_final_observation": "repeat",
        "max_episode_steps_in_data": 1000,
        "observation_jump_tolerance": 0.5,
        "store_memory_limit": 10**9,
        "cache_dir": "/cache",
        "share_offline_data": False,
        "validation_fraction": 0.2,
        "validation_seed": 3,
        "input_filesystem": LocalFileSystem(),
    },
    "fine_tuning": {
        "offline_updates": 20_000,
        "updates_per_iteration": 7,
        "mixing_ratio": "proportional",
        "updates_per_env_step": 0.5,
        "min_q_weight_online": 0.0,
        "conservative_online": False,
        "max_target_backup_online": True,
        "deterministic_backup_online": False,
        "actor_update_period_online": 4,
        "calibrate_online": False,
        "warmup_env_steps": 5_000,
        "online_capacity": 50_000,
        "sample_async": False,
        "max_staleness_env_steps": 0,
        "max_episode_env_steps": 500,
        "max_online_env_steps": 6_000,
        "pretrained": "/runs/checkpoint",
    },
}


class OtherCallback(RLlibCallback):
    """A user's callback."""


def flat(table: dict[str, dict[str, Any]]) -> list[tuple[str, str, Any]]:
    return [(method, name, value) for method, settings in table.items() for name, value in settings.items()]


def complete_config() -> CalQLConfig:
    """Offline data, normalised and held out, environment and a Lagrangian, so that every setting alone is in order."""
    return (
        CalQLConfig()
        .environment("Pendulum-v1")
        .offline_data(input_="rows.parquet", normalize_observations=True, validation_fraction=0.1)
        .training(lagrangian=True)
        .fine_tuning(offline_updates=10)
    )


# --- Defaults ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_in_order() -> None:
    CalQLConfig().validate()


@pytest.mark.parametrize(("method", "name", "value"), flat(DEFAULTS), ids=lambda value: str(value)[:30])
def test_a_default_is_the_one_of_the_design(method: str, name: str, value: Any) -> None:
    default = getattr(CalQLConfig(), name)
    assert default == value
    assert isinstance(default, bool) == isinstance(value, bool)


def test_the_networks_default_to_those_of_the_authors() -> None:
    networks = {
        "actor_hiddens": [256, 256],
        "critic_hiddens": [256, 256],
        "activation": "relu",
        "layer_norm": False,
        "orthogonal_init": True,
    }
    assert CalQLConfig().model_config.items() >= networks.items()


def test_the_config_belongs_to_calql() -> None:
    assert CalQLConfig().algo_class is CalQL
    assert type(CalQL.get_default_config()) is CalQLConfig


def test_two_configs_share_no_setting_that_can_change() -> None:
    first, second = CalQLConfig(), CalQLConfig()
    hiddens = first.model_config["actor_hiddens"]
    hiddens.append(1)
    try:
        assert second.model_config["actor_hiddens"] == [256, 256]
        assert CalQLConfig().model_config["actor_hiddens"] == [256, 256]
    finally:
        hiddens.remove(1)


# --- Setting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "name", "value"), flat(OTHER_VALUES), ids=lambda value: str(value)[:30])
def test_a_setting_arrives_through_its_method_and_is_accepted(method: str, name: str, value: Any) -> None:
    config = complete_config()
    assert getattr(config, method)(**{name: value}) is config
    assert getattr(config, name) == value
    assert getattr(CalQLConfig(), name) != value
    config.validate()
    assert getattr(config, name) == value


def test_numbers_of_numpy_are_numbers_and_what_belongs_to_others_stays_as_it_is() -> None:
    env_config = {"seed": np.int64(3)}
    schedule = [[np.int64(0), np.float32(0.5)], [np.int32(100), 0.25]]
    config = (
        complete_config()
        .environment("Pendulum-v1", env_config=env_config)
        .training(min_q_weight=np.float32(0.5), num_actions=np.int64(4), calibrate=np.bool_(False), bc_weight=schedule)
        .fine_tuning(offline_updates=np.int32(7))
        .rl_module(model_config={"actor_hiddens": [np.int64(32)]})
    )
    config.validate()
    found = [config.min_q_weight, config.num_actions, config.calibrate, config.offline_updates, config.bc_weight[0]]
    assert found == [0.5, 4, False, 7, [0, 0.5]]
    assert [type(value) for value in found] == [float, int, bool, int, list]
    assert {type(number) for point in config.bc_weight for number in point} == {int, float}
    assert [type(size) for size in config.model_config["actor_hiddens"]] == [int]
    assert type(config.env_config["seed"]) is np.int64


def test_every_setting_of_the_design_is_tried() -> None:
    # What bounds Q contradicts `calibrate=False`; it is tried in `test_reference_settings.py`.
    of_references = ("reference_value", "reference_updates", "reference_fit", "reference_online")
    of_calibration = ("calibration_quantile", "calibration_form", "bound_uniform_actions")
    tried_elsewhere = {("training", name) for name in (*of_references, *of_calibration)}
    # Clients exclude settings of environments; see `test_external_clients.py`.
    tried_elsewhere |= {("external_clients", name) for name in DEFAULTS["external_clients"]}
    tried = {(method, name) for method, name, _ in flat(OTHER_VALUES)}
    assert {(method, name) for method, name, _ in flat(DEFAULTS)} - tried_elsewhere <= tried


@pytest.mark.parametrize("method", ["training", "offline_data", "fine_tuning", "rl_module"])
def test_an_unknown_keyword_is_refused(method: str) -> None:
    with pytest.raises(TypeError, match="min_q_wieght"):
        getattr(CalQLConfig(), method)(min_q_wieght=1.0)


def test_what_is_not_given_stays_as_it_was() -> None:
    config = CalQLConfig().training(min_q_weight=1.0).fine_tuning(mixing_ratio=0.25)
    config.training(num_actions=4).fine_tuning(updates_per_env_step=2).offline_data(reward_scale=2.0)
    assert (config.min_q_weight, config.mixing_ratio) == (1.0, 0.25)


@pytest.mark.parametrize(
    ("input_", "expected"),
    [
        ("rows.parquet", "rows.parquet"),
        (Path("data/rows.parquet"), "data/rows.parquet"),
        (["a", "minari:b"], ["a", "minari:b"]),
        ([Path("a"), "b"], ["a", "b"]),
        ((Path("a"), Path("b")), ["a", "b"]),
    ],
)
def test_input_takes_paths_strings_and_sequences_of_them(input_: Any, expected: Any) -> None:
    config = CalQLConfig().offline_data(input_=input_).fine_tuning(offline_updates=1)
    assert config.input_ == expected
    assert config.is_offline
    config.environment("Pendulum-v1").validate()


def test_model_config_keeps_the_defaults_of_what_is_not_named() -> None:
    config = CalQLConfig().rl_module(model_config={"critic_hiddens": [512, 512, 512]})
    assert config.model_config["critic_hiddens"] == [512, 512, 512]
    assert config.model_config["actor_hiddens"] == [256, 256]
    assert config.model_config["activation"] == "relu"
    config.validate()


@pytest.mark.parametrize("clip", [None, INF, 10.0])
def test_a_clip_that_does_nothing_is_accepted_only_where_it_is_off_or_the_default(clip: float | None) -> None:
    CalQLConfig().offline_data(observation_clip=clip).validate()
    CalQLConfig().offline_data(normalize_observations=True, observation_clip=3).validate()
    with pytest.raises(ValueError, match=r"`observation_clip` is 3 but `normalize_observations` is False.*set"):
        CalQLConfig().offline_data(observation_clip=3).validate()


def test_a_seed_that_draws_nothing_is_refused() -> None:
    CalQLConfig().offline_data(validation_seed=0).validate()
    with pytest.raises(ValueError, match=r"`validation_seed` is 3 but `validation_fraction` is 0, .* drop the seed"):
        CalQLConfig().offline_data(validation_seed=3).validate()


def test_the_module_is_told_the_settings_it_needs() -> None:
    config = CalQLConfig().training(num_critics=3, num_actions=4, max_target_backup=False)
    config.offline_data(normalize_observations=True)
    told = {"num_critics": 3, "num_actions": 4, "max_target_backup": False, "normalize_observations": True}
    told |= {"observation_clip": 10.0}
    assert config.model_config.items() >= told.items()


@pytest.mark.parametrize(
    "given", [OtherCallback, [OtherCallback], [EpisodeOutcomeCallback, OtherCallback]], ids=["class", "list", "both"]
)
@pytest.mark.parametrize("by", ["method", "dict"])
def test_the_package_s_callbacks_stay_beside_the_user_s(given: Any, by: str) -> None:
    config = CalQLConfig()
    if by == "method":
        config.callbacks(given)
    else:
        config.update_from_dict({"callbacks": given})
    assert config.callbacks_class == [EpisodeCutCallback, EpisodeOutcomeCallback, OtherCallback]
    config.validate()


def test_the_package_s_callbacks_stay_beside_a_user_s_function() -> None:
    calls: list[Any] = []
    config = CalQLConfig().callbacks(on_episode_end=calls.append)
    assert config.callbacks_class == [EpisodeCutCallback, EpisodeOutcomeCallback]
    assert config.callbacks_on_episode_end == calls.append


# --- Meaning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibrate", "calibrate_online", "offline", "online"),
    [(True, True, True, True), (True, False, True, False), (False, True, False, False), (False, False, False, False)],
)
def test_calibration_by_phase(calibrate: bool, calibrate_online: bool, offline: bool, online: bool) -> None:
    config = CalQLConfig().training(calibrate=calibrate).fine_tuning(calibrate_online=calibrate_online)
    assert config.calibrates(online=False) is offline
    assert config.calibrates(online=True) is online


@pytest.mark.parametrize(("weight_online", "expected"), [(None, 5.0), (0.0, 0.0), (2.5, 2.5)])
def test_the_online_weight_replaces_the_offline_one_after_the_switch_only(
    weight_online: float | None, expected: float
) -> None:
    config = CalQLConfig().training(min_q_weight=5.0).fine_tuning(min_q_weight_online=weight_online)
    assert config.conservative_weight(online=False) == 5.0
    assert config.conservative_weight(online=True) == expected


@pytest.mark.parametrize("conservative_online", [True, False])
def test_the_conservative_term_can_be_off_after_the_switch_only(conservative_online: bool) -> None:
    config = CalQLConfig().fine_tuning(conservative_online=conservative_online)
    assert config.is_conservative(online=False) is True
    assert config.is_conservative(online=True) is conservative_online


@pytest.mark.parametrize(
    ("has_data", "given", "expected"),
    [(True, None, 0), (False, None, 1_000), (True, 300, 300), (False, 300, 300), (False, 0, 0)],
)
def test_warm_up_depends_on_whether_there_are_data(has_data: bool, given: int | None, expected: int) -> None:
    config = complete_config() if has_data else CalQLConfig()
    assert config.fine_tuning(warmup_env_steps=given).num_warmup_env_steps == expected


@pytest.mark.parametrize(("has_data", "expected"), [(True, 10), (False, 0)])
def test_there_is_no_offline_phase_without_data(has_data: bool, expected: int) -> None:
    assert (complete_config() if has_data else CalQLConfig()).num_offline_updates == expected


# --- What is refused --------------------------------------------------------------------------------------------------

HOST: dict[str, tuple[Callable[[CalQLConfig], Any], str]] = {
    "tf2": (lambda c: c.framework("tf2"), "`framework` must be \"torch\", got 'tf2'"),
    "old api stack": (
        lambda c: c.api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False),
        r"new API stack only; drop the `\.api_stack",
    ),
    "half an api stack": (
        lambda c: c.api_stack(enable_rl_module_and_learner=False),
        r"new API stack only; drop the `\.api_stack",
    ),
    "several agents": (
        lambda c: c.multi_agent(policies={"a", "b"}, policy_mapping_fn=lambda *_, **__: "a"),
        r"one agent; drop the `\.multi_agent",
    ),
    "raw actions": (lambda c: c.environment(normalize_actions=False), "`normalize_actions` must be True"),
    "discrete actions": (
        lambda c: c.environment(action_space=gym.spaces.Discrete(3)),
        r"`action_space` must be a Box\(n,\) of real numbers, got Discrete\(3\)",
    ),
    "integer actions": (
        lambda c: c.environment(action_space=gym.spaces.Box(0, 5, (2,), np.int64)),
        r"`action_space` must be a Box\(n,\) of real numbers, got Box",
    ),
    "a matrix of actions": (
        lambda c: c.environment(action_space=gym.spaces.Box(-1, 1, (2, 2))),
        r"`action_space` must be a Box\(n,\) of real numbers, got Box",
    ),
    "unbounded actions": (
        lambda c: c.environment(action_space=gym.spaces.Box(-INF, INF, (2,))),
        "`action_space` must be bounded, got Box.*wrap the environment",
    ),
    "actions bounded on one side": (
        lambda c: c.environment(action_space=gym.spaces.Box(0, INF, (2,))),
        "`action_space` must be bounded, got Box.*wrap the environment",
    ),
}


@pytest.mark.parametrize("case", HOST)
def test_what_the_algorithm_cannot_run_on_is_refused(case: str) -> None:
    change, message = HOST[case]
    config = CalQLConfig()
    change(config)
    with pytest.raises(ValueError, match=message):
        config.validate()


# --- Ranges -----------------------------------------------------------------------------------------------------------

POSITIVE_INTEGERS = (
    "training.num_actions",
    "training.num_critics",
    "training.n_step",
    "training.target_update_period",
    "training.reference_updates",
    "training.train_batch_size_per_learner",
    "fine_tuning.updates_per_iteration",
    "fine_tuning.online_capacity",
    "fine_tuning.max_episode_env_steps",
)
BOOLEANS = (
    "training.calibrate",
    "training.bound_uniform_actions",
    "training.importance_sampling",
    "training.lagrangian",
    "training.max_target_backup",
    "training.deterministic_backup",
    "offline_data.normalize_observations",
    "fine_tuning.conservative_online",
    "fine_tuning.calibrate_online",
    "fine_tuning.sample_async",
    "training.store_buffer_in_checkpoints",
    "offline_data.share_offline_data",
)
NOT_FINITE_OR_NO_NUMBER = (NAN, INF, -INF, HUGE, "1.0", None, True)
BAD_SCHEDULES = (
    *([], [[0, 0.5]], [0, 0.5], [[0, 0.5], [9]], [[0, 0.5], [9, "x"]], [[0, 0.5], [9, NAN]], [[0, 0.5], [INF, 0.5]]),
    *([[5, 0.5], [9, 0.1]], [[0, 0.5], [9, 0.4], [8, 0.3]], [[0, 0.5], [9, -0.1]], [[-1, 0.5], [9, 0.5]]),
    *([[0, True], [9, 0.5]], [[0, 0.5], None], [[0, HUGE], [9, 0.5]], [[0, 0.5], [HUGE, 0.5]]),
    *([[0, 0.5], [0, 0.1]], [[0, 0.5], [9, 0.4], [9, 0.3], [9, 0.2]]),  # Values that hold nowhere.
)
BAD_VALUES: list[tuple[str, tuple[Any, ...], str]] = [
    *((name, (0, -2, 1.0, "2", True), "must be a positive integer") for name in POSITIVE_INTEGERS),
    *((name, (1, 0, "yes", None), "must be True or False") for name in BOOLEANS),
    ("training.temperature", (0, -1.5, *NOT_FINITE_OR_NO_NUMBER), "must be a positive number"),
    ("training.tau", (0, -0.5, *NOT_FINITE_OR_NO_NUMBER), "must be a positive number"),
    ("training.tau", (1.001, 2), r"must be in \(0, 1\]"),
    ("fine_tuning.updates_per_env_step", (0, -1, *NOT_FINITE_OR_NO_NUMBER), "must be a positive number"),
    ("training.min_q_weight", (-0.1, -1, *NOT_FINITE_OR_NO_NUMBER), "must be a number of at least 0"),
    (
        "fine_tuning.min_q_weight_online",
        (-0.1, -1, NAN, INF, "1.0", True),
        "must be None or a number of at least 0",
    ),
    ("training.bc_weight", (-0.1, *NOT_FINITE_OR_NO_NUMBER), "must be a number of at least 0, or a schedule"),
    *(
        (name, BAD_SCHEDULES, "or a schedule .*: (it|its) ")
        for name in (
            *("training.actor_lr", "training.critic_lr", "training.alpha_lr", "training.bc_weight"),
            *("fine_tuning.min_q_weight_online", "fine_tuning.mixing_ratio"),
        )
    ),
    ("fine_tuning.mixing_ratio", ([[0, 0.5], [9, 1.5]],), r"got .*: its values must be at least 0 and at most 1"),
    ("training.critic_subset", (0, -1, 1.5, "2", True, 3), "must be None or an integer from 1 to `num_critics`, 2"),
    ("training.actor_q", ("max", None, 1), r"must be one of \('min', 'mean'\)"),
    ("fine_tuning.actor_update_period_online", (0, -1, 1.5, "2", True), "must be None or a positive integer"),
    ("fine_tuning.max_target_backup_online", (1, 0, "yes"), "must be None, True or False"),
    ("fine_tuning.deterministic_backup_online", (1, 0, "yes"), "must be None, True or False"),
    ("training.gamma", (-0.1, 1.01, NAN, "0.9", None, True), r"must be in \[0, 1\]"),
    ("training.bc_updates", (-1, 0.5, "1", None, True), "must be an integer of at least 0"),
    ("fine_tuning.offline_updates", (-1, 0.5, "1", True), "must be an integer of at least 0"),
    ("fine_tuning.max_staleness_env_steps", (-1, 0.5, "1", True), "must be None or an integer of at least 0"),
    ("fine_tuning.pretrained", ("",), "must be None or the folder of a checkpoint"),
    ("env_runners.num_env_runners", (-1, 0.5, "1", None, True), "must be an integer of at least 0"),
    ("env_runners.num_envs_per_env_runner", (1.5, True), "must be a positive integer"),
    ("learners.num_learners", (-1, 0.5, "1", None, True), "must be an integer of at least 0"),
    ("fine_tuning.warmup_env_steps", (-1, 0.5, "1", True), "must be None or an integer of at least 0"),
    ("offline_data.reward_scale", NOT_FINITE_OR_NO_NUMBER, "must be a finite number"),
    ("offline_data.reward_bias", NOT_FINITE_OR_NO_NUMBER, "must be a finite number"),
    ("training.lagrangian_thresh", NOT_FINITE_OR_NO_NUMBER, "must be a finite number"),
    ("offline_data.failure_reward", (NAN, INF, "0", True), "must be None or a finite number"),
    ("offline_data.validation_fraction", (-0.1, 1, 1.5, *NOT_FINITE_OR_NO_NUMBER), "must be at least 0 and below 1"),
    ("offline_data.validation_seed", (-1, 0.5, "1", None, True), "must be an integer of at least 0"),
    ("fine_tuning.mixing_ratio", (-0.1, 1.5, NAN, "half", None, True), r'must be in \[0, 1\] or "proportional"'),
    (
        "training.conservative_gap_clip",
        ((1.0, 1.0), (2.0, -2.0), (0.0,), (0.0, 1.0, 2.0), (NAN, 1.0), ("a", "b"), 3.0, None),
        r"must be a pair \(low, high\) with low < high",
    ),
    (
        "training.reference_value",
        ("", None, 3),
        'must be "returns_to_go", "learned", "quantile" or the name of a column',
    ),
    ("training.calibration_quantile", (0, 1, -0.1, 1.5, NAN, "0.5", None, True), r"must be a number in \(0, 1\)"),
    ("training.reference_fit", ("mc", None, 1), r"must be one of \('monte_carlo', 'td'\)"),
    (
        "training.reference_online",
        ("off", "quantile", 1),
        r"must be one of \(None, 'returns_to_go', 'learned', 'none'\)",
    ),
    ("training.calibration_form", ("max", None, 1), r"must be one of \('maximum', 'penalty'\)"),
    ("offline_data.use_recorded_returns", ("yes", None, 1), "must be True or False"),
    ("offline_data.unfinished_episodes", ("keep", None), r"must be one of \('error', 'truncate', 'drop'\)"),
    ("offline_data.missing_final_observation", ("drop", None), r"must be one of \('drop_step', 'repeat'\)"),
    ("offline_data.max_episode_steps_in_data", (0, -1, 2.5, "9", True), "must be None or a positive integer"),
    ("offline_data.store_memory_limit", (0, -1, 2.5, "1GB", True), "must be None or a positive integer"),
    ("offline_data.observation_jump_tolerance", (-1.0, NAN, INF, "0", None, True), "must be a number of at least 0"),
    (
        "offline_data.observation_clip",
        (0, -1.0, NAN, -INF, "10", True),
        "must be a positive number, or None or infinity",
    ),
    ("offline_data.cache_dir", ("",), "must be None or the path of a folder"),
    ("offline_data.input_filesystem", ("ftp", 3), "must be a `pyarrow.fs.FileSystem`, an fsspec file system"),
    ("training.precision", ("bfloat16", "tf32", 32, None), r"must be one of \('fp32', 'medium', 'bf16'\)"),
    ("offline_data.truncation", ("time-out", None, False), r"must be one of \('none', 'steady', 'bootstrap'\)"),
    ("offline_data.action_space_of_data", ("env", None), 'must be "environment" or "module"'),
    ("training.grad_clip", (-1.0, 0.0), "must be > 0|must be None or a positive"),
    *(
        (
            name,
            (0.0, -1e-3, NAN, INF, "3e-4", None, True, [], [[0, 1e-3]], [[0, 1e-3], [9, "x"]], [[5, 1e-3], [9, 1e-4]]),
            "must be a positive number or a schedule",
        )
        for name in ("training.actor_lr", "training.critic_lr", "training.alpha_lr")
    ),
    ("training.initial_alpha", (0.0, *NOT_FINITE_OR_NO_NUMBER), "must be a positive number"),
    ("training.target_entropy", ("automatic", None, NAN, INF, True), '"auto"'),
]


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [(setting, value, rule) for setting, values, rule in BAD_VALUES for value in values],
    ids=lambda value: repr(value)[:40],
)
def test_a_value_out_of_range_is_refused_with_setting_rule_and_value(setting: str, value: Any, rule: str) -> None:
    method, name = setting.split(".")
    config = complete_config()
    getattr(config, method)(**{name: value})
    with pytest.raises(ValueError, match=rf"`{name}` .*({rule})") as error:
        config.validate()
    shown = repr(tuple(value)) if name == "conservative_gap_clip" and isinstance(value, tuple) else repr(value)
    assert shown in str(error.value) or name == "grad_clip"  # RLlib's own message for the last.


BY_PENDULUM = "the steps after which the environment '.*Pendulum-v1' ends an episode"
LONGER_THAN_EPISODES: list[tuple[Callable[[CalQLConfig], Any], int, str]] = [
    (lambda c: c.fine_tuning(max_episode_env_steps=50), 50, "`max_episode_env_steps`, 50, .* or raise"),
    (lambda c: c.fine_tuning(online_capacity=40), 40, "`online_capacity`, 40, .* or raise"),
    (lambda c: c.environment("Pendulum-v1"), 200, f"200, {BY_PENDULUM}"),
    (lambda c: c.environment("gymnasium.envs:Pendulum-v1"), 200, f"200, {BY_PENDULUM}"),
    (lambda c: c.environment("Pendulum-v1", env_config={"max_episode_steps": 30}), 30, f"30, {BY_PENDULUM}"),
]


@pytest.mark.parametrize(("change", "largest", "rule"), LONGER_THAN_EPISODES, ids=lambda value: str(value)[:20])
def test_a_target_is_not_longer_than_an_episode_can_be(
    change: Callable[[CalQLConfig], Any], largest: int, rule: str
) -> None:
    config = CalQLConfig().environment("Pendulum-v1").fine_tuning(warmup_env_steps=0)
    change(config)
    config.training(n_step=largest).validate()
    with pytest.raises(ValueError, match=rf"`n_step` must be at most {rule}") as error:
        config.training(n_step=largest + 1).validate()
    assert f"; got {largest + 1}. Lower it" in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda c: c.environment("Pendulum-v1", env_config={"max_episode_steps": -1}),  # Gymnasium's word for no limit.
        lambda c: c.environment(gym.Env),
        lambda c: c.environment("Pendulum-v1").offline_data(input_="rows.parquet").fine_tuning(offline_updates=1),
        lambda c: c.offline_data(input_="rows.parquet").fine_tuning(offline_updates=1, max_episode_env_steps=5),
    ],
    ids=["no limit", "a class", "data may hold longer ones", "no environment"],
)
def test_a_target_of_many_steps_is_accepted_where_episodes_may_be_as_long(make: Callable[[CalQLConfig], Any]) -> None:
    config = CalQLConfig().training(n_step=300)
    make(config)
    config.validate()


def test_evaluation_may_cut_episodes_earlier_than_targets_are_long() -> None:
    config = complete_config().training(n_step=20)
    config.evaluation(evaluation_config={"max_episode_env_steps": 10}).validate()
    evaluation = config.copy(copy_frozen=False).update_from_dict({"max_episode_env_steps": 10, "in_evaluation": True})
    evaluation.validate()


BAD_NETWORKS = [
    ({"actor_hiddens": 8}, r"`actor_hiddens` must be a list of positive layer widths, got 8"),
    ({"critic_hiddens": []}, r"`critic_hiddens` must be a list of positive layer widths, got \[\]"),
    ({"critic_hiddens": [8, 0]}, r"`critic_hiddens` must be a list of positive layer widths, got \[8, 0\]"),
    ({"actor_hiddens": [8.0]}, r"`actor_hiddens` must be a list of positive layer widths, got \[8.0\]"),
    ({"activation": "swish-ish"}, r"`activation` must be one of \[.*'relu'.*\], got 'swish-ish'"),
    *(
        ({"layer_norm": value}, rf"`layer_norm` must be True or False, .*, or \"actor\" or \"critic\", got {value!r}")
        for value in (1, "both", "critics", None)
    ),
    ({"orthogonal_init": "yes"}, "`orthogonal_init` must be True or False, got 'yes'"),
    ({"fcnet_hiddens": [8]}, r"`model_config` may hold \[.*'actor_hiddens'.*\], got the unknown \['fcnet_hiddens'\]"),
]


INSTEAD_OF_HIDDENS = "`fcnet_hiddens` is not used; set `actor_hiddens` and `critic_hiddens`"
BAD_NETWORKS += [
    ({"fcnet_hiddens": [8]}, INSTEAD_OF_HIDDENS),
    ({"fcnet_activation": "tanh"}, "`fcnet_activation` is not used; set `activation`"),
    ({"critic_hidens": [8]}, r"`critic_hidens` is not used; did you mean `critic_hiddens`\?"),
    ({"use_lstm": True}, "`use_lstm` is not used; drop it"),
    (DefaultModelConfig(fcnet_hiddens=[64, 64]), f"a `DefaultModelConfig`: {INSTEAD_OF_HIDDENS}"),
    (
        DefaultModelConfig(fcnet_activation="relu", use_lstm=True, head_fcnet_hiddens=[8]),
        "`fcnet_activation` is not used; set `activation`; `head_fcnet_hiddens` is not used; set `actor_h.*`use_lstm`",
    ),
    (DefaultModelConfig(), "`model_config` must be a dict of .*'actor_hiddens'.*, got a `DefaultModelConfig`"),
    ([8, 8], r"`model_config` must be a dict of .*, got \[8, 8\]"),
    (None, "`model_config` must be a dict of .*, got None"),
]


@pytest.mark.parametrize(("networks", "message"), BAD_NETWORKS, ids=lambda value: str(value)[:40])
def test_a_wrong_network_setting_is_refused(networks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalQLConfig().rl_module(model_config=networks).validate()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RLModuleSpec(model_config=DefaultModelConfig(fcnet_hiddens=[8])), INSTEAD_OF_HIDDENS),
        (RLModuleSpec(model_config={"fcnet_hiddens": [8]}), INSTEAD_OF_HIDDENS),
        (
            RLModuleSpec(module_class=DefaultSACTorchRLModule),
            "`module_class` of `rl_module_spec` must be a subclass of",
        ),
        (MultiRLModuleSpec(rl_module_specs={"a": RLModuleSpec()}), "`rl_module_spec` must be an `RLModuleSpec`, got"),
    ],
    ids=["dataclass", "dict", "class", "several"],
)
def test_a_module_specification_that_would_not_be_used_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalQLConfig().rl_module(rl_module_spec=spec).validate()


def test_a_module_specification_with_our_settings_is_taken() -> None:
    config = CalQLConfig().rl_module(rl_module_spec=RLModuleSpec(model_config={"actor_hiddens": [8]}))
    config.validate()


@pytest.mark.parametrize("input_", [3, [3], [None], {"pendulum": 1.0}, None], ids=repr)
def test_an_input_that_is_no_path_is_refused_by_name(input_: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"`input_` must be a string, a path, a `ray\.data\.Dataset`, a"):
        CalQLConfig().offline_data(input_=input_).fine_tuning(offline_updates=1).validate()


def test_an_input_that_is_data_is_held_and_not_copied_with_the_config() -> None:
    episode = SingleAgentEpisode(observations=[0, 1], actions=[0], rewards=[1.0], len_lookback_buffer=0)
    for input_ in ([episode], ["rows.parquet", [episode]]):
        config = CalQLConfig().offline_data(input_=input_).fine_tuning(offline_updates=1)
        assert config.is_offline
        held = config.input_ if isinstance(config.input_, InMemoryEpisodes) else config.input_[1]
        assert held.episodes[0] is episode
        copied = config.copy().input_
        assert (copied if isinstance(copied, InMemoryEpisodes) else copied[1]) is held


def test_paths_are_those_of_the_folder_in_which_they_were_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").touch()
    monkeypatch.chdir(tmp_path)
    config = CalQLConfig().offline_data(input_=["rows.parquet", "other.parquet", "minari:b"], cache_dir=Path("cache"))
    assert config.input_ == [str(tmp_path / "rows.parquet"), "other.parquet", "minari:b"]
    assert config.cache_dir == str(tmp_path / "cache")
    assert CalQLConfig().offline_data(cache_dir="~/cache").cache_dir == "~/cache"
    elsewhere = {"input_filesystem": LocalFileSystem()}
    assert CalQLConfig().offline_data(input_="rows.parquet", **elsewhere).input_ == "rows.parquet"
    assert CalQLConfig().offline_data(**elsewhere).offline_data(input_="rows.parquet").input_ == "rows.parquet"


# --- What must fit together -------------------------------------------------------------------------------------------


def test_the_reference_column_is_named_or_none() -> None:
    config = complete_config()
    assert (config.reference_column, config.read_options.columns) == (None, frozenset())
    config.training(reference_value="value").validate()
    assert (config.reference_column, config.read_options.columns) == ("value", frozenset({"value"}))
    recorded = complete_config().offline_data(use_recorded_returns=True)
    recorded.validate()
    assert recorded.reference_column == "returns_to_go"


def test_a_reference_column_needs_offline_data_and_one_name() -> None:
    for config in (
        CalQLConfig().training(reference_value="value"),
        CalQLConfig().offline_data(use_recorded_returns=True),
    ):
        with pytest.raises(ValueError, match="name columns of offline data, and there are none"):
            config.environment("Pendulum-v1").validate()
    both = complete_config().training(reference_value="value").offline_data(use_recorded_returns=True)
    with pytest.raises(ValueError, match="`use_recorded_returns` is True and `reference_value` is 'value'; use one"):
        both.validate()


def test_filesystem_arguments_without_a_filesystem_are_refused() -> None:
    config = complete_config().offline_data(input_filesystem_kwargs={"region": "eu"})
    with pytest.raises(ValueError, match="`input_filesystem_kwargs` is set but `input_filesystem` is not"):
        config.validate()


def test_a_lagrangian_threshold_without_a_lagrangian_is_refused() -> None:
    config = CalQLConfig().training(lagrangian_thresh=5.0)
    message = "`lagrangian_thresh` is set but `lagrangian` is False; set `lagrangian=True` or drop the threshold"
    with pytest.raises(ValueError, match=message):
        config.validate()
    config.training(lagrangian=True).validate()


@pytest.mark.parametrize("settings", [{"truncation": "steady"}, {"failure_reward": 0.0}], ids=str)
def test_endless_sums_need_a_discount(settings: dict[str, Any]) -> None:
    config = complete_config().offline_data(**settings).training(gamma=1.0)
    with pytest.raises(ValueError, match=r"`gamma` must be below 1 with .*diverge"):
        config.validate()
    config.training(gamma=0.999).validate()
    CalQLConfig().training(gamma=1.0).validate()


@pytest.mark.parametrize("env", ["Pendulum-v1", None])
def test_offline_updates_are_required_with_data(env: str | None) -> None:
    config = CalQLConfig().environment(env).offline_data(input_="rows.parquet")
    with pytest.raises(ValueError, match=r"`offline_updates` must be set when `input_` is: `\.fine_tuning\("):
        config.validate()


def test_offline_updates_are_refused_without_data() -> None:
    config = CalQLConfig().environment("Pendulum-v1").fine_tuning(offline_updates=7)
    with pytest.raises(ValueError, match=r"`offline_updates` is 7 but `input_` is not set; set `\.offline_data\("):
        config.validate()
    config.fine_tuning(offline_updates=0).validate()


def test_nothing_to_train_is_refused() -> None:
    config = CalQLConfig().offline_data(input_="rows.parquet").fine_tuning(offline_updates=0)
    with pytest.raises(ValueError, match="`offline_updates` is 0 and there is no environment"):
        config.validate()
    config.environment("Pendulum-v1").validate()


def test_evaluation_without_an_environment_is_refused() -> None:
    config = CalQLConfig().offline_data(input_="rows.parquet").fine_tuning(offline_updates=1)
    config.validate()
    config.evaluation(evaluation_interval=1)
    with pytest.raises(ValueError, match="`evaluation_interval` needs an environment or held-out episodes; set"):
        config.validate()


def test_a_connector_for_online_observations_only_is_refused() -> None:
    config = complete_config().env_runners(env_to_module_connector=lambda *_: [])
    with pytest.raises(ValueError, match="`env_to_module_connector` would change online observations only"):
        config.validate()


def test_validation_changes_no_setting() -> None:
    config = complete_config()
    before = {name: copy.deepcopy(getattr(config, name)) for _, name, _ in flat(DEFAULTS)}
    config.validate()
    config.validate()
    assert {name: getattr(config, name) for name in before} == before


def test_a_weight_of_the_conservative_term_is_refused_where_the_term_is_off() -> None:
    config = CalQLConfig().fine_tuning(conservative_online=False, min_q_weight_online=1.0)
    with pytest.raises(ValueError, match=r"`min_q_weight_online` is 1.0, but `conservative_online` is False"):
        config.validate()


@pytest.mark.parametrize("weight", [0.5, [[0, 0.0], [100, 0.5]]])
def test_imitation_needs_offline_data(weight: Any) -> None:
    config = CalQLConfig().environment("Pendulum-v1").training(bc_weight=weight)
    with pytest.raises(ValueError, match=r"`bc_weight` is .* no offline data to imitate; set `.offline_data"):
        config.validate()
    config.offline_data(input_="rows.parquet").fine_tuning(offline_updates=1).validate()
    CalQLConfig().environment("Pendulum-v1").training(bc_weight=[[0, 0], [100, 0.0]]).validate()


def test_a_hold_out_needs_offline_data() -> None:
    config = CalQLConfig().environment("Pendulum-v1").offline_data(validation_fraction=0.1)
    with pytest.raises(ValueError, match=r"`validation_fraction` is 0.1, but there are no offline data .*; set `.off"):
        config.validate()
    config.offline_data(input_="rows.parquet").fine_tuning(offline_updates=1).validate()


def test_imitation_is_refused_where_no_batch_holds_rows_to_imitate() -> None:
    def config(weight: Any, ratio: Any, updates: int) -> CalQLConfig:
        config = CalQLConfig().environment("Pendulum-v1").offline_data(input_="rows.parquet")
        return config.training(bc_weight=weight).fine_tuning(offline_updates=updates, mixing_ratio=ratio)

    for weight, ratio, updates in ((0.5, 0.0, 0), (0.5, [[0, 0.0], [9, 0]], 0), ([[0, 0.0], [9, 0.5]], 0.0, 5)):
        with pytest.raises(ValueError, match=r"`bc_weight` is .* no batch in which it counts .* `mixing_ratio` is"):
            config(weight, ratio, updates).validate()
    for weight, ratio, updates in ((0.5, 0.0, 5), (0.5, "proportional", 0), (0.5, [[0, 0.0], [9, 0.1]], 0)):
        config(weight, ratio, updates).validate()


@pytest.mark.parametrize(("offline_updates", "period_online"), [(10, None), (10, 2), (0, None)])
def test_cloning_that_ends_before_the_actors_first_step_is_refused(
    offline_updates: int, period_online: int | None
) -> None:
    config = CalQLConfig().environment("Pendulum-v1").offline_data(input_="somewhere")
    config.training(bc_updates=4, actor_update_period=5)
    config.fine_tuning(offline_updates=offline_updates, actor_update_period_online=period_online)
    with pytest.raises(ValueError, match=r"`bc_updates` is 4, but the actor makes its first step in update 5"):
        config.validate()
    config.training(bc_updates=5).validate()


def test_cloning_from_the_switch_on_goes_by_the_online_period() -> None:
    config = CalQLConfig().environment("Pendulum-v1").offline_data(input_="somewhere")
    config.training(bc_updates=4, actor_update_period=5)
    config.fine_tuning(offline_updates=0, actor_update_period_online=4).validate()


def test_a_schedule_of_offline_rows_is_refused_without_offline_data() -> None:
    config = CalQLConfig().environment("Pendulum-v1")
    with pytest.raises(ValueError, match=r"`mixing_ratio` is .* no offline data to take rows from; set `.offline_data"):
        config.copy().fine_tuning(mixing_ratio=[[0, 0.5], [9, 0.1]]).validate()
    config.fine_tuning(mixing_ratio=[[0, 0.0], [9, 0.0]]).validate()


@pytest.mark.parametrize(
    "setting",
    [
        *("training.actor_q", "training.precision", "training.target_entropy"),
        *("fine_tuning.mixing_ratio", "offline_data.truncation", "offline_data.action_space_of_data"),
        *("offline_data.unfinished_episodes", "evaluation.success_rule", "rl_module.activation"),
    ],
)
def test_an_array_in_the_place_of_a_word_is_refused_by_name(setting: str) -> None:
    method, name = setting.split(".")
    values: Any = {name: np.array([0.5, 0.2])}
    config = CalQLConfig().environment("Pendulum-v1")
    getattr(config, method)(**({"model_config": values} if method == "rl_module" else values))
    with pytest.raises(ValueError, match=rf"`{name}` must be .*, got array"):
        config.validate()


# What the target takes, offline and online: (best of several actions, entropy).
@pytest.mark.parametrize(
    ("settings", "offline", "online"),
    [
        ({}, (True, False), (True, False)),
        ({"conservative_online": False}, (True, False), (False, True)),
        ({"conservative_online": False, "max_target_backup_online": True}, (True, False), (True, True)),
        ({"conservative_online": False, "deterministic_backup_online": True}, (True, False), (False, False)),
        ({"max_target_backup": False, "deterministic_backup": False}, (False, True), (False, True)),
        ({"max_target_backup_online": False, "deterministic_backup_online": False}, (True, False), (False, True)),
    ],
)
def test_without_the_conservative_term_the_target_is_that_of_sac_unless_it_is_set(
    settings: dict[str, bool], offline: tuple[bool, bool], online: tuple[bool, bool]
) -> None:
    config = CalQLConfig()
    for name, value in settings.items():
        setattr(config, name, value)
    for is_online, expected in ((False, offline), (True, online)):
        best, deterministic = (
            config.has_max_target_backup(online=is_online),
            config.has_deterministic_backup(online=is_online),
        )
        assert (best, not deterministic) == expected


# --- Copies -----------------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[CalQLConfig], CalQLConfig]] = {
    "copy": lambda config: config.copy(copy_frozen=False),
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "state": lambda config: CalQLConfig.from_state(config.get_state()),
    "pickled state": lambda config: CalQLConfig.from_state(pickle.loads(pickle.dumps(config.get_state()))),
    "dict": lambda config: CalQLConfig().update_from_dict(config.to_dict()),
}


def unusual_config() -> CalQLConfig:
    config = complete_config()
    for method, name, value in flat(OTHER_VALUES):
        getattr(config, method)(**{name: value})
    return config.rl_module(model_config={"critic_hiddens": [7]}).debugging(seed=3)


@pytest.mark.parametrize("way", COPIES)
def test_every_setting_survives_a_copy(way: str) -> None:
    config = unusual_config()
    copied = COPIES[way](config)
    assert copied is not config
    assert type(copied) is CalQLConfig
    expected = {name: value for _, name, value in flat(OTHER_VALUES)}
    assert {name: getattr(copied, name) for name in expected} == expected
    assert copied.model_config == config.model_config
    assert copied.input_ == "rows.parquet"
    assert copied.seed == 3
    assert copied.algo_class is CalQL
    copied.fine_tuning(min_q_weight_online=None).validate()  # It contradicts `conservative_online=False`.


MINUS_ONE = {"reward_bias": "offline_data", "failure_reward": "offline_data"} | dict.fromkeys(
    ("target_entropy", "lagrangian_thresh"), "training"
)


@pytest.mark.parametrize("value", [-1.0, -1], ids=["float", "int"])
@pytest.mark.parametrize("way", COPIES)
def test_settings_of_minus_one_survive_a_copy(way: str, value: float) -> None:
    # RLlib takes -1 for its mark of a deprecated setting and drops it from the state that algorithms are built from.
    config = complete_config()
    for name, method in MINUS_ONE.items():
        getattr(config, method)(**{name: value})
    copied = COPIES[way](COPIES[way](config))
    assert {name: getattr(copied, name) for name in MINUS_ONE} == dict.fromkeys(MINUS_ONE, value)
    copied.validate()


def test_settings_of_minus_one_survive_the_build(ray_session: None, tmp_path: Path) -> None:
    obs = [[0.0, 0.0, float(i)] for i in range(4)]
    rows = {
        "eps_id": [0] * 3,
        "obs": obs[:-1],
        "new_obs": obs[1:],
        "actions": [[0.0]] * 3,
        "rewards": [2.0, 2.0, 2.0],
        "terminateds": [False, False, True],
        "truncateds": [False] * 3,
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    config = (
        CalQLConfig()
        .environment("Pendulum-v1")
        .offline_data(input_=tmp_path / "rows.parquet", reward_bias=-1.0)
        .training(lagrangian=True, lagrangian_thresh=-1.0, gamma=0.5, num_actions=2)
        .fine_tuning(offline_updates=1)
        .rl_module(model_config={"actor_hiddens": [8], "critic_hiddens": [8]})
    )
    algo = config.build()
    try:
        columns = algo.store.sample(num_batches=1, batch_size=64, num_offline_rows=64)
        (lagrangian_thresh,) = algo.learner_group.foreach_learner(lambda learner: learner.config.lagrangian_thresh)
    finally:
        algo.stop()
    assert set(columns["rewards"]) == {1.0}
    assert set(columns["returns_to_go"]) == {1.0, 1.5, 1.75}
    assert lagrangian_thresh.get() == -1.0


def test_a_frozen_config_cannot_be_changed() -> None:
    config = complete_config()
    config.freeze()
    for change, settings in itertools.product(
        (config.fine_tuning, config.training, config.offline_data), ({"mixing_ratio": 0.1}, {"tau": 0.1})
    ):
        with pytest.raises((AttributeError, TypeError), match=r"already frozen|is a setting of"):
            change(**settings)
    with pytest.raises(AttributeError, match=r"mixing_ratio.* already frozen"):
        config.fine_tuning(mixing_ratio=0.1)
    assert config.mixing_ratio == 0.5
    assert config.copy(copy_frozen=False).fine_tuning(mixing_ratio=0.1).mixing_ratio == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.fine_tuning(max_online_env_steps=0), r"must be None or a positive integer, got 0"),
        (lambda c: c.fine_tuning(max_online_env_steps=2.5), r"must be None or a positive integer, got 2\.5"),
        (lambda c: c.fine_tuning(max_online_env_steps=True), r"must be None or a positive integer, got True"),
        (lambda c: c.fine_tuning(max_online_env_steps=1_000), r"is 1000 and the warm-up alone takes 1000 env steps"),
        (
            lambda c: c.fine_tuning(max_online_env_steps=3, warmup_env_steps=0).env_runners(num_envs_per_env_runner=4),
            r"must be at least `num_envs_per_env_runner`, 4, since sub-environments step together; got 3",
        ),
        (
            lambda c: (
                c.environment(None).offline_data(input_="a.h5").fine_tuning(max_online_env_steps=50, offline_updates=3)
            ),
            r"is 50 and there is no environment; set `\.environment\(\.\.\.\)` or drop it",
        ),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(change: Callable[[CalQLConfig], Any], message: str) -> None:
    config = CalQLConfig().environment("Pendulum-v1")
    change(config)
    with pytest.raises(ValueError, match=f"`max_online_env_steps` {message}"):
        config.validate()
    with pytest.raises(ValueError, match=message):
        config.copy(copy_frozen=False).validate()
