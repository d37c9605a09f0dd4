"""Settings of RLlib that CalQL inherits and does not use: refused with a remedy instead of ignored.

Every attribute of a `CalQLConfig` is ours, in here, or in `inherited.py`; a test walks all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray._common.deprecation import DEPRECATED_VALUE
from ray.rllib.policy.policy import PolicySpec

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

_READ_BY_US = "the data are read by this package's own readers"
_FED_BY_STORE = "learners are fed from the transition store"
_OLD_STACK = "it belongs to the old API stack"
_TENSORFLOW = "the networks are torch's; drop it"
_ONE_AGENT = "it trains one agent; drop the `.multi_agent(...)` call"
_NOT_COMPILED = "neither updates nor policies are compiled; drop it"
_NO_RECORDER = (
    "RLlib's recorder hands on episodes in a form that cannot be stored; record episodes of a trained policy by "
    "`rllib_calql.datasets.record`"
)
_SUB_ENVIRONMENTS = 'set `gym_env_vectorize_mode="async"` for sub-environments in processes of their own'
_PIPELINE_STATES = f"{_OLD_STACK}; set `merge_env_runner_states` and `broadcast_env_runner_states`"
_JUDGED_FROM_DATA = (
    "the algorithm itself judges by data, from those that it has read; set `offline_evaluation_interval` and "
    "`offline_evaluation_type`, and for how long `offline_evaluation_duration`"
)
_OFFLINE_EVALUATION = (
    *("offline_evaluation_parallel_to_training", "offline_evaluation_timeout_s", "offline_loss_for_module_fn"),
    *("num_offline_eval_runners", "offline_eval_runner_class", "offline_eval_batch_size_per_runner"),
    *("dataset_num_iters_per_eval_runner", "offline_eval_rl_module_inference_only"),
    *("num_cpus_per_offline_eval_runner", "num_gpus_per_offline_eval_runner"),
    *("custom_resources_per_offline_eval_runner", "max_requests_in_flight_per_offline_eval_runner"),
    *("broadcast_offline_eval_runner_states", "validate_offline_eval_runners_after_construction"),
    *("restart_failed_offline_eval_runners", "ignore_offline_eval_runner_failures"),
    *("max_num_offline_eval_runner_restarts", "offline_eval_runner_health_probe_timeout_s"),
    *("offline_eval_runner_restore_timeout_s", "callbacks_on_offline_eval_runners_recreated"),
    *("off_policy_estimation_methods", "ope_split_batch_by_episode"),
)

_RECORDER = (
    *("output", "output_config", "output_compress_columns", "output_max_file_size", "output_max_rows_per_file"),
    *("output_write_remaining_data", "output_write_method", "output_write_method_kwargs", "output_filesystem"),
    *("output_filesystem_kwargs", "output_write_episodes"),
)
_OF_TENSORFLOW = (
    *("eager_tracing", "eager_max_retraces", "tf_session_args", "local_tf_session_args", "enable_tf1_exec_eagerly"),
    "_tf_policy_handles_more_than_one_loss",
)
_OF_SEVERAL_AGENTS = (
    *("policies", "policy_mapping_fn", "policies_to_train", "policy_map_capacity", "policy_states_are_swappable"),
    *("observation_fn", "count_steps_by", "algorithm_config_overrides_per_module"),
)
_OF_COMPILING = (
    *("torch_compile_learner_what_to_compile", "torch_compile_learner_dynamo_backend"),
    *("torch_compile_learner_dynamo_mode", "torch_compile_worker", "torch_compile_worker_dynamo_backend"),
    "torch_compile_worker_dynamo_mode",
)
_OF_THE_OLD_STACK = (
    *("sample_collector", "preprocessor_pref", "sampler_perf_stats_ema_coef", "offline_sampling"),
    *("keep_per_episode_custom_metrics", "metrics_episode_collection_timeout_s", "export_native_model_files"),
    *("checkpoint_trainable_policies_only", "log_sys_usage", "fake_sampler", "_fake_gpus", "_disable_preprocessor_api"),
    *("_disable_action_flattening", "_disable_initialize_loss_from_dummy_batch", "replay_sequence_length"),
)

# Settings of the parents that are not read here: name -> (reason and remedy). Refused unless left at their default.
UNUSED_SETTINGS: dict[str, str] = {
    "lr": "there is one rate per optimiser; set `actor_lr`, `critic_lr` and `alpha_lr`",
    "bc_iters": "RLlib's counter never ends behaviour cloning; set `bc_updates`",
    "twin_q": "set the size of the critic ensemble, `num_critics`",
    "q_model_config": "it belongs to the old API stack; set `critic_hiddens` in `.rl_module(model_config=...)`",
    "policy_model_config": "it belongs to the old API stack; set `actor_hiddens` in `.rl_module(model_config=...)`",
    "replay_buffer_config": "transitions are drawn uniformly, never prioritised; set `online_capacity` for the size",
    "training_intensity": "set `updates_per_env_step`",
    "num_steps_sampled_before_learning_starts": "set `warmup_env_steps`",
    "target_network_update_freq": "targets move by gradient updates; set `target_update_period`",
    "optimization": "set `actor_lr`, `critic_lr` and `alpha_lr`",
    "clip_actions": "module actions lie in [-1, 1] and are mapped to the environment's bounds",
    "_deterministic_loss": "the loss needs sampled actions",
    "_use_beta_distribution": "the policy is a tanh-squashed Gaussian",
    "num_epochs": _FED_BY_STORE,
    "minibatch_size": f"{_FED_BY_STORE}; set `train_batch_size_per_learner`",
    "shuffle_batch_per_epoch": _FED_BY_STORE,
    "num_aggregator_actors_per_learner": _FED_BY_STORE,
    "train_batch_size": "it belongs to the old API stack; set `train_batch_size_per_learner`",
    "model": "it belongs to the old API stack; set `.rl_module(model_config=...)`",
    "optimizer": "it belongs to the old API stack; set `actor_lr`, `critic_lr` and `alpha_lr`",
    "explore": "training always samples from the policy; set it in `.evaluation(evaluation_config=...)`",
    "torch_compile_learner": _NOT_COMPILED,
    "_torch_grad_scaler_class": "bfloat16 has the exponents of float32, so no loss needs scaling",
    "rollout_fragment_length": "whole episodes are collected",
    "batch_mode": "returns-to-go need whole episodes",
    "min_sample_timesteps_per_iteration": "one iteration is `updates_per_iteration` updates, or one round of episodes",
    "min_train_timesteps_per_iteration": "one iteration is `updates_per_iteration` updates, or one round of episodes",
    "input_read_method": _READ_BY_US,
    "input_read_method_kwargs": _READ_BY_US,
    "input_read_schema": _READ_BY_US,
    "input_read_episodes": f"{_READ_BY_US}, which tell episodes from rows by themselves",
    "input_read_sample_batches": _READ_BY_US,
    "input_read_batch_size": _READ_BY_US,
    "input_compress_columns": f"{_READ_BY_US}, which find compressed columns by themselves",
    "materialize_data": _READ_BY_US,
    "materialize_mapped_data": _READ_BY_US,
    "map_batches_kwargs": _READ_BY_US,
    "iter_batches_kwargs": _READ_BY_US,
    "ignore_final_observation": "the last observation of a cut episode is needed for its bootstrap",
    "prelearner_class": f"{_READ_BY_US}; there is no pre-learner",
    "prelearner_buffer_class": f"{_READ_BY_US}; there is no pre-learner",
    "prelearner_buffer_kwargs": f"{_READ_BY_US}; there is no pre-learner",
    "prelearner_module_synch_period": f"{_READ_BY_US}; there is no pre-learner",
    "prelearner_use_recorded_module_states": f"{_READ_BY_US}; there is no pre-learner",
    "dataset_num_iters_per_learner": "set `updates_per_iteration`",
    "actions_in_input_normalized": "set `action_space_of_data`",
    "shuffle_buffer_size": "batches are drawn uniformly from all data",
    "input_config": _READ_BY_US,
    "postprocess_inputs": _READ_BY_US,
    **dict.fromkeys(_OFFLINE_EVALUATION, _JUDGED_FROM_DATA),
    **dict.fromkeys(_RECORDER, _NO_RECORDER),
    **dict.fromkeys(_OF_TENSORFLOW, _TENSORFLOW),
    **dict.fromkeys(_OF_SEVERAL_AGENTS, _ONE_AGENT),
    **dict.fromkeys(_OF_COMPILING, _NOT_COMPILED),
    **dict.fromkeys(_OF_THE_OLD_STACK, f"{_OLD_STACK}; drop it"),
    "input_spaces_jsonable": _READ_BY_US,
    "exploration_config": f"{_OLD_STACK}; episodes are collected by the policy's own noise, drop it",
    "compress_observations": f"{_OLD_STACK}; the store holds observations as they are, drop it",
    "observation_filter": f"{_OLD_STACK}; set `normalize_observations`, or wrap the environment",
    "update_worker_filter_stats": _PIPELINE_STATES,
    "use_worker_filter_stats": _PIPELINE_STATES,
    "clip_rewards": f"{_OLD_STACK}; set `reward_scale` and `reward_bias`, which hold for data and environment alike",
    "_is_atari": "pictures are not preprocessed for you; wrap the environment",
    "render_env": "env runners render nothing; wrap the environment, as in Gymnasium's `RecordVideo`",
    "action_mask_key": "continuous actions are not masked; drop it",
    "extra_python_environs_for_driver": f"{_OLD_STACK}; set the variables before Ray starts",
    "extra_python_environs_for_worker": f"{_OLD_STACK}; set `runtime_env` of `ray.init`",
    "num_gpus": f"{_OLD_STACK}; set `num_gpus_per_learner`",
    "remote_worker_envs": _SUB_ENVIRONMENTS,
    "remote_env_batch_wait_ms": _SUB_ENVIRONMENTS,
    "episodes_to_numpy": "only episodes of arrays can be stored; drop it",
    "use_env_runner_state_server": "env runners get their weights with each request; drop it",
    "env_runner_state_server_max_concurrency": "env runners get their weights with each request; drop it",
    "num_consecutive_env_runner_failures_tolerance": (
        "env runners that fail are started anew, and five failures of each without a finished episode end the run; "
        "set `max_num_env_runner_restarts` or `restart_failed_env_runners`"
    ),
    "torch_ddp_kwargs": "gradients of several learners are averaged by one all-reduce, without DDP; drop it",
    "torch_skip_nan_gradients": "an update with a gradient that is not finite is always skipped; drop it",
    "_torch_lr_scheduler_classes": "set `actor_lr`, `critic_lr` and `alpha_lr` to [[env_steps, value], ...]",
    "_learner_connector": _FED_BY_STORE,
    "add_default_connectors_to_learner_pipeline": _FED_BY_STORE,
    "max_requests_in_flight_per_aggregator_actor": _FED_BY_STORE,
    "max_requests_in_flight_per_learner": "learners have one call at a time; drop it",
    "_use_msgpack_checkpoints": "checkpoints are pickled; drop it",
}
# Of the settings that RLlib itself has given up, those that have something in their place here.
DEPRECATED_REMEDIES: dict[str, str] = {
    "buffer_size": "set `online_capacity`",
    "learning_starts": "set `warmup_env_steps`",
    "replay_batch_size": "set `train_batch_size_per_learner`",
    "prioritized_replay": "transitions are drawn uniformly, never prioritised; drop it",
    "evaluation_num_episodes": "set `evaluation_duration`",
    "metrics_smoothing_episodes": "set `metrics_num_episodes_for_smoothing`",
    "min_iter_time_s": "set `min_time_s_per_iteration`",
    "min_time_s_per_reporting": "set `min_time_s_per_iteration`",
}
# Attributes that a user knows by the keyword that sets them.
KEYWORDS = {"_learner_connector": "learner_connector", "_is_atari": "is_atari"}

_DROPPED_BY_RLLIB = "RLlib has given it up and reads it nowhere; drop it"
# RLlib sets these itself on the config of evaluation runners.
_SET_BY_RLLIB_FOR_EVALUATION = frozenset({"batch_mode", "explore", "rollout_fragment_length"})
_OF_USE_IN_EVALUATION = frozenset({"explore"})
_OWN_OF_USE_IN_EVALUATION = frozenset({"max_episode_env_steps"})  # Evaluation episodes are cut as well.
_INHERITED_OF_TRAINING = frozenset(
    {"gamma", "tau", "grad_clip", "grad_clip_by", "initial_alpha", "target_entropy", "train_batch_size_per_learner"}
    | {f"offline_evaluation_{name}" for name in ("interval", "type", "duration")}
)
_SINGLE_MODULE = "default_policy"


def deprecated_settings(defaults: CalQLConfig) -> frozenset[str]:
    """Names whose default is RLlib's mark of a setting that it has given up, but for one that its own checks set.

    Args:
        defaults: A fresh config.
    """
    return frozenset(name for name, value in vars(defaults).items() if _is_mark(value)) - {"simple_optimizer"}


def check_unused(config: CalQLConfig, defaults: CalQLConfig) -> None:
    """Refuses settings of the parents that nothing here would read, and overrides of them for evaluation.

    Args:
        config: What to check.
        defaults: A fresh config of the same class.

    Raises:
        ValueError: At the first one that is not at its default.
    """
    reasons = dict.fromkeys(deprecated_settings(defaults), _DROPPED_BY_RLLIB) | DEPRECATED_REMEDIES | UNUSED_SETTINGS
    for name, reason in reasons.items():
        if config.in_evaluation and name in _SET_BY_RLLIB_FOR_EVALUATION:
            continue
        value = getattr(config, name)
        if not _is_unchanged(name, value, getattr(defaults, name)):
            raise ValueError(f"`{KEYWORDS.get(name, name)}` is not used by CalQL, got {value!r}: {reason}.")
    overrides = config.evaluation_config
    if isinstance(overrides, Mapping):  # A whole config in its place is checked as one.
        for name in sorted(overrides.keys() & reasons.keys() - _OF_USE_IN_EVALUATION):
            if not _is_unchanged(name, overrides[name], getattr(defaults, name)):
                raise ValueError(
                    f"`{KEYWORDS.get(name, name)}` in `evaluation_config` is not used by CalQL, got "
                    f"{overrides[name]!r}: {reasons[name]}."
                )
        for name in sorted(overrides.keys() & _settings_of_training(defaults)):
            is_without_data = (name, overrides[name]) == ("input_", "sampler")  # As all evaluations are.
            if overrides[name] != getattr(config, name) and not is_without_data:
                raise ValueError(
                    f"`{name}` in `evaluation_config` is {overrides[name]!r}, but evaluation runs the policy that is "
                    "trained and makes no updates; set it on the config itself, or drop it."
                )


def _settings_of_training(defaults: CalQLConfig) -> frozenset[str]:
    """Names that only matter where updates are made, or where data are read."""
    cls = type(defaults)
    methods = (cls.training, cls.offline_data, cls.fine_tuning, cls.external_clients)
    named = {name for method in methods for name in inspect.signature(method).parameters}
    return frozenset((named | _INHERITED_OF_TRAINING) & vars(defaults).keys()) - _OWN_OF_USE_IN_EVALUATION


def _is_mark(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == DEPRECATED_VALUE


def _is_unchanged(name: str, value: Any, default: Any) -> bool:
    """Whether a value means the same as the default. RLlib writes some of them in other words while it builds."""
    if name == "policies":
        return set(value) == {_SINGLE_MODULE} and (not isinstance(value, Mapping) or _is_plain(value[_SINGLE_MODULE]))
    if name == "policies_to_train":
        return value is None or (isinstance(value, (list, set, tuple)) and set(value) == {_SINGLE_MODULE})
    if name == "_is_atari":
        return not value  # RLlib replaces None by what it finds.
    return bool(value == default)


def _is_plain(spec: Any) -> bool:
    """Whether RLlib's entry of a policy says nothing of its own. Copies of a config hold it as a tuple."""
    if isinstance(spec, (tuple, list)):
        spec = PolicySpec(*spec)
    return spec is None or (isinstance(spec, PolicySpec) and spec.policy_class is None and not spec.config)
