"""Settings of RLlib that are not used here are refused by name with the remedy, by whatever way they are set."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.offline.offline_prelearner import OfflinePreLearner
from ray.rllib.policy.policy import PolicySpec
from tiny import LineEnv

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.experiments.experiment import read_experiments
from rllib_calql.experiments.reading.errors import ExperimentError
from rllib_calql.settings.refused import DEPRECATED_REMEDIES, KEYWORDS, UNUSED_SETTINGS, deprecated_settings


class OtherPreLearner(OfflinePreLearner):
    """A user's pre-learner."""


class OtherClass:
    """Stands for any class a setting may be given."""


# How each refused setting is reached from the public API: method, keyword if it is not the name, other value.
REFUSED: dict[str, tuple[str, Any]] = {
    "lr": ("training", 1e-3),
    "bc_iters": ("training", 20_000),
    "twin_q": ("training", False),
    "q_model_config": ("training", {"fcnet_hiddens": [8]}),
    "policy_model_config": ("training", {"fcnet_hiddens": [8]}),
    "replay_buffer_config": ("training", {"type": "PrioritizedEpisodeReplayBuffer", "alpha": 0.6}),
    "training_intensity": ("training", 2.0),
    "num_steps_sampled_before_learning_starts": ("training", 10),
    "target_network_update_freq": ("training", 100),
    "optimization": ("training", {"actor_learning_rate": 1e-3}),
    "clip_actions": ("environment", True),
    "_deterministic_loss": ("training", True),
    "_use_beta_distribution": ("training", True),
    "num_epochs": ("training", 2),
    "minibatch_size": ("training", 32),
    "shuffle_batch_per_epoch": ("training", True),
    "num_aggregator_actors_per_learner": ("learners", 1),
    "train_batch_size": ("training", 512),
    "model": ("training", {"fcnet_hiddens": [8]}),
    "optimizer": ("training", {"eps": 1e-5}),
    "torch_compile_learner": ("framework", True),
    "_torch_grad_scaler_class": ("experimental", OtherClass),
    "rollout_fragment_length": ("env_runners", 10),
    "batch_mode": ("env_runners", "truncate_episodes"),
    "explore": ("env_runners", False),
    "min_sample_timesteps_per_iteration": ("reporting", 100),
    "min_train_timesteps_per_iteration": ("reporting", 100),
    "input_read_method": ("offline_data", "read_json"),
    "input_read_method_kwargs": ("offline_data", {"override_num_blocks": 2}),
    "input_read_schema": ("offline_data", {"obs": "observations"}),
    "input_read_episodes": ("offline_data", True),
    "input_read_sample_batches": ("offline_data", True),
    "input_read_batch_size": ("offline_data", 8),
    "input_compress_columns": ("offline_data", ["actions"]),
    "materialize_data": ("offline_data", True),
    "materialize_mapped_data": ("offline_data", False),
    "map_batches_kwargs": ("offline_data", {"concurrency": 2}),
    "iter_batches_kwargs": ("offline_data", {"prefetch_batches": 2}),
    "ignore_final_observation": ("offline_data", True),
    "prelearner_class": ("offline_data", OtherPreLearner),
    "prelearner_buffer_class": ("offline_data", OtherClass),
    "prelearner_buffer_kwargs": ("offline_data", {"capacity": 10}),
    "prelearner_module_synch_period": ("offline_data", 3),
    "prelearner_use_recorded_module_states": ("offline_data", True),
    "dataset_num_iters_per_learner": ("offline_data", 5),
    "actions_in_input_normalized": ("offline_data", True),
    "shuffle_buffer_size": ("offline_data", 7),
    "input_config": ("offline_data", {"format": "json"}),
    "postprocess_inputs": ("offline_data", True),
}
KEYWORDS_OF_METHODS = {
    "optimization": "optimization_config",
    "dataset_num_iters_per_eval_runner": "dataset_num_iters_per_offline_eval_runner",
    **{name: name.removeprefix("callbacks_") for name in UNUSED_SETTINGS if name.startswith("callbacks_")},
}
# RLlib's evaluation on offline data; the type of a value does not matter.
REFUSED |= {name: ("evaluation", 7) for name in UNUSED_SETTINGS if "offline_eval" in name or "eval_runner" in name}
REFUSED |= {name: ("callbacks", print) for name in UNUSED_SETTINGS if name.startswith("callbacks_")}
REFUSED |= {
    "offline_loss_for_module_fn": ("evaluation", print),
    "off_policy_estimation_methods": ("evaluation", {"is": {"type": "is"}}),
    "ope_split_batch_by_episode": ("evaluation", False),
}


# Settings without an argument of a method.
ATTRIBUTES = {"offline_evaluation_parallel_to_training"}


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - ATTRIBUTES))
def test_a_setting_that_is_not_read_here_is_refused_by_name(name: str) -> None:
    method, value = REFUSED[name]
    config = CalQLConfig()
    before = copy.deepcopy(getattr(config, name))
    getattr(config, method)(**{KEYWORDS_OF_METHODS.get(name, name): value})
    assert getattr(config, name) != before
    with pytest.raises(ValueError, match=rf"`{name}` is not used by CalQL, got .*: .*\w.*\.$"):
        config.validate()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("num_offline_eval_runners", "`offline_evaluation_type`"),
        ("lr", "`actor_lr`, `critic_lr` and `alpha_lr`"),
        ("bc_iters", "`bc_updates`"),
        ("twin_q", "`num_critics`"),
        ("q_model_config", "`critic_hiddens`"),
        ("policy_model_config", "`actor_hiddens`"),
        ("replay_buffer_config", "`online_capacity`"),
        ("training_intensity", "`updates_per_env_step`"),
        ("num_steps_sampled_before_learning_starts", "`warmup_env_steps`"),
        ("target_network_update_freq", "`target_update_period`"),
        ("minibatch_size", "`train_batch_size_per_learner`"),
        ("dataset_num_iters_per_learner", "`updates_per_iteration`"),
        ("actions_in_input_normalized", "`action_space_of_data`"),
    ],
)
def test_a_refusal_names_the_setting_to_use_instead(name: str, remedy: str) -> None:
    assert remedy in UNUSED_SETTINGS[name]
    assert not set(re.findall(r"`(\w+)`", UNUSED_SETTINGS[name])) & set(UNUSED_SETTINGS)


@pytest.mark.parametrize("name", sorted(ATTRIBUTES))
def test_an_attribute_that_is_not_read_here_is_refused_by_name(name: str) -> None:
    config = CalQLConfig()
    setattr(config, name, 7)
    with pytest.raises(ValueError, match=rf"`{name}` is not used by CalQL, got 7: .*`offline_evaluation_duration`\.$"):
        config.validate()


def test_settings_of_rllib_s_evaluation_on_offline_data_that_ask_for_its_runners_are_refused() -> None:
    names = {name for name in vars(CalQLConfig()) if "offline_eval" in name or "evaluate_offline" in name}
    assert len(names) > 20
    used = {f"offline_evaluation_{name}" for name in ("interval", "type", "duration")}
    assert names - used - {f"callbacks_on_evaluate_offline_{when}" for when in ("start", "end")} <= set(UNUSED_SETTINGS)


# --- All of them, by all ways -----------------------------------------------------------------------------------------

OTHER_VALUES: dict[str, Any] = {
    "policies": {"a": PolicySpec(), "b": PolicySpec()},
    "policies_to_train": ["a"],
    "_is_atari": True,
    "count_steps_by": "agent_steps",
    "batch_mode": "truncate_episodes",
    "algorithm_config_overrides_per_module": {"default_policy": AlgorithmConfig.overrides(gamma=0.5)},
}
ALL_REFUSED = sorted({*UNUSED_SETTINGS, *deprecated_settings(CalQLConfig())})


def other_value(name: str) -> Any:
    """A value of about the default's kind that is not the default."""
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    default = getattr(CalQLConfig(), name)
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default + 8
    if isinstance(default, dict):
        return {**default, "something": 1}
    if isinstance(default, list):
        return [*default, "something"]
    return "something" if isinstance(default, str) else (OtherClass if callable(default) else 7)


def refusal(name: str, place: str = "") -> str:
    """What is said of a setting."""
    remedy = (DEPRECATED_REMEDIES | UNUSED_SETTINGS).get(name, "RLlib has given it up and reads it nowhere; drop it")
    return rf"^`{KEYWORDS.get(name, name)}`{place} is not used by CalQL, got .*: {re.escape(remedy)}\.$"


@pytest.mark.parametrize("name", ALL_REFUSED)
def test_a_setting_is_refused_in_a_dict_and_in_overrides_for_evaluation(name: str) -> None:
    value = other_value(name)
    for config in (CalQLConfig().update_from_dict({}), CalQLConfig.from_dict({})):
        config.validate()
        setattr(config, name, value)
        with pytest.raises(ValueError, match=f"(?s){refusal(name)}"):
            config.validate()
    config = CalQLConfig()
    config.evaluation_config = {"explore": False, name: value}
    if name == "explore":
        config.validate()
        return
    with pytest.raises(ValueError, match=f"(?s){refusal(name, ' in `evaluation_config`')}"):
        config.validate()


@pytest.mark.parametrize(
    "override",
    [
        *({"min_q_weight": 1.0}, {"gamma": 0.5}, {"num_critics": 3}, {"reward_scale": 2.0}, {"input_": "a.h5"}),
        *({"offline_evaluation_interval": 1}, {"offline_evaluation_type": "fqe"}, {"offline_evaluation_duration": 5}),
    ],
)
def test_a_setting_of_training_is_refused_in_overrides_for_evaluation(override: dict[str, Any]) -> None:
    config = CalQLConfig().environment("Pendulum-v1").evaluation(evaluation_config=override)
    name = next(iter(override))
    with pytest.raises(ValueError, match=f"`{name}` in `evaluation_config` is .*runs the policy that is trained"):
        config.validate()


def test_a_setting_of_training_with_the_value_of_training_is_taken_in_overrides() -> None:
    overrides = {"gamma": 0.99, "input_": "sampler", "max_episode_env_steps": 10, "seed": 3}
    config = CalQLConfig().environment("Pendulum-v1").evaluation(evaluation_config=overrides)
    config.validate()
    evaluation = config.get_evaluation_config_object()
    assert evaluation is not None
    assert evaluation.max_episode_env_steps == 10


def ways() -> Iterator[tuple[str, str]]:
    """The arguments of RLlib's methods that are refused settings: the method and the setting."""
    attributes = {KEYWORDS.get(name, name): name for name in ALL_REFUSED}
    for method, function in inspect.getmembers(AlgorithmConfig, inspect.isfunction):
        for keyword, parameter in inspect.signature(function).parameters.items():
            is_setting = "NotProvided" in repr(parameter.default)
            if is_setting and keyword in attributes and attributes[keyword] not in REFUSED:
                yield method, attributes[keyword]


@pytest.mark.parametrize(("method", "name"), sorted(ways()))
def test_a_setting_is_refused_that_is_set_by_a_method(method: str, name: str) -> None:
    config = CalQLConfig()
    getattr(config, method)(**{KEYWORDS.get(name, name): other_value(name)})
    with pytest.raises(ValueError, match=rf"^`{KEYWORDS.get(name, name)}` is not used by CalQL, got "):
        config.validate()


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.multi_agent(policies={"default_policy"}),
        lambda config: config.multi_agent(policies_to_train=["default_policy"]),
        lambda config: config.environment(is_atari=False),
        lambda config: config.evaluation(evaluation_config={"explore": True, "num_envs_per_env_runner": 2}),
    ],
    ids=["the one policy", "the one policy trained", "no Atari", "overrides of use"],
)
def test_what_means_the_default_is_taken(change: Callable[[CalQLConfig], Any]) -> None:
    config = CalQLConfig().environment("Pendulum-v1")
    change(config)
    config.validate()
    config.copy(copy_frozen=False).validate()
    CalQLConfig.from_state(config.get_state()).validate()
    evaluation = config.get_evaluation_config_object()
    assert evaluation is not None
    evaluation.validate()


def test_a_learner_connector_is_refused() -> None:
    config = CalQLConfig().learners(learner_connector=lambda *_: [])
    with pytest.raises(ValueError, match="`learner_connector` is not used by CalQL"):
        config.validate()


def test_a_setting_is_refused_in_an_experiment_file_also_as_a_search_space(tmp_path: Path) -> None:
    for value in ("true", "{grid_search: [true, true]}"):
        file = tmp_path / "experiment.yaml"
        file.write_text(f"e: {{run: CalQL, env: Pendulum-v1, stop: {{}}, config: {{clip_rewards: {value}}}}}")
        with pytest.raises(ExperimentError, match=r"`clip_rewards` is not used by CalQL, got True: .*`reward_scale`"):
            read_experiments(file)


def test_a_setting_is_refused_in_the_dict_that_tune_gives_a_trial() -> None:
    space = CalQLConfig().environment(LineEnv).to_dict() | {"compress_observations": tune.choice([True])}
    drawn = space | {"compress_observations": space["compress_observations"].sample()}
    with pytest.raises(ValueError, match="`compress_observations` is not used by CalQL, got True"):
        CalQL(config=drawn)
