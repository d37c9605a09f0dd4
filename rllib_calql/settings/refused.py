"""Settings of RLlib that CalQL inherits and does not use: refused with a remedy instead of ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

_READ_BY_US = "the data are read by this package's own readers"
_FED_BY_STORE = "learners are fed from the transition store"
_EVALUATED_ONLINE = (
    "RLlib's offline evaluation would read the data by a pipeline of its own and wait for it; evaluate in an "
    "environment by `evaluation_interval`"
)
_OFFLINE_EVALUATION = (
    *("offline_evaluation_interval", "offline_evaluation_type", "offline_evaluation_duration"),
    *("offline_evaluation_parallel_to_training", "offline_evaluation_timeout_s", "offline_loss_for_module_fn"),
    *("num_offline_eval_runners", "offline_eval_runner_class", "offline_eval_batch_size_per_runner"),
    *("dataset_num_iters_per_eval_runner", "offline_eval_rl_module_inference_only"),
    *("num_cpus_per_offline_eval_runner", "num_gpus_per_offline_eval_runner"),
    *("custom_resources_per_offline_eval_runner", "max_requests_in_flight_per_offline_eval_runner"),
    *("broadcast_offline_eval_runner_states", "validate_offline_eval_runners_after_construction"),
    *("restart_failed_offline_eval_runners", "ignore_offline_eval_runner_failures"),
    *("max_num_offline_eval_runner_restarts", "offline_eval_runner_health_probe_timeout_s"),
    *("offline_eval_runner_restore_timeout_s", "callbacks_on_offline_eval_runners_recreated"),
    *("callbacks_on_evaluate_offline_start", "callbacks_on_evaluate_offline_end"),
    *("off_policy_estimation_methods", "ope_split_batch_by_episode"),
)

# Settings of the parents that are not read here: name -> (reason and remedy). Refused unless left at their default.
UNUSED_SETTINGS: dict[str, str] = {
    "lr": "there is one rate per optimiser; set `actor_lr`, `critic_lr` and `alpha_lr`",
    "bc_iters": "RLlib's counter never ends behaviour cloning; set `bc_updates`",
    "twin_q": "set the size of the critic ensemble, `num_critics`",
    "q_model_config": "it belongs to the old API stack; set `critic_hiddens` in `.rl_module(model_config=...)`",
    "policy_model_config": "it belongs to the old API stack; set `actor_hiddens` in `.rl_module(model_config=...)`",
    "n_step": "returns of several steps would mix the data's policy into the target; only 1 is possible",
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
    "torch_compile_learner": "the update is not compiled",
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
    **dict.fromkeys(_OFFLINE_EVALUATION, _EVALUATED_ONLINE),
}


def check_unused(config: CalQLConfig) -> None:
    """Refuses settings of the parents that nothing here would read.

    Raises:
        ValueError: At the first one that is not at its default.
    """
    defaults = type(config)()
    for name, reason in UNUSED_SETTINGS.items():
        if config.in_evaluation and name in ("batch_mode", "explore", "rollout_fragment_length"):
            continue  # RLlib sets these itself on the evaluation runners' config.
        value = getattr(config, name)
        if value != getattr(defaults, name):
            raise ValueError(f"`{name}` is not used by CalQL, got {value!r}: {reason}.")
    if config._learner_connector is not None:
        raise ValueError(
            f"`learner_connector` is not used by CalQL, got {config._learner_connector!r}: {_FED_BY_STORE}."
        )
