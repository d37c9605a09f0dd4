"""Settings of RLlib that CalQL inherits and that work, each with what shows it; and the few that nobody sets.

A proof is a test of this package, `test_...`, or the file of RLlib that reads the setting on CalQL's way (new API
stack, torch, `SingleAgentEnvRunner`) where the mechanism is RLlib's and nothing here touches it. A test checks that the
tests exist and that the files still read the setting.
"""

from __future__ import annotations

_ALGORITHM = "algorithms/algorithm.py"
_ENV_RUNNER = "env/single_agent_env_runner.py"
_GROUP = "env/env_runner_group.py"
_RESOURCES = "test_ray_is_asked_for_these_resources"
_CALLBACKS = "test_every_callback_is_called"
_ONE_VALUE = "test_what_the_algorithm_cannot_run_on_is_refused"  # One value only; the others are refused.

# Name -> what shows that it works.
EFFECTIVE_SETTINGS: dict[str, str] = {
    # .api_stack(), .framework()
    "enable_rl_module_and_learner": _ONE_VALUE,
    "enable_env_runner_and_connector_v2": _ONE_VALUE,
    "framework_str": _ONE_VALUE,
    # .resources()
    "placement_strategy": _RESOURCES,
    "num_cpus_for_main_process": _RESOURCES,
    "custom_resources_for_main_process": _RESOURCES,
    # .environment()
    "env": "test_environments_are_made_as_set",
    "env_config": "test_environments_are_made_as_set",
    "observation_space": "test_data_that_state_no_spaces_need_them_in_the_config",
    "action_space": "test_data_that_state_no_spaces_need_them_in_the_config",
    "normalize_actions": _ONE_VALUE,
    # RLlib checks no environment of a single agent, so what True asks for holds.
    "disable_env_checking": "test_an_environment_whose_actions_cannot_be_mapped_is_refused",
    # .env_runners()
    "env_runner_cls": "test_classes_of_the_user_do_the_work",
    "num_env_runners": _RESOURCES,
    "num_envs_per_env_runner": "test_environments_are_made_as_set",
    "gym_env_vectorize_mode": "test_environments_are_made_as_set",
    "num_cpus_per_env_runner": _RESOURCES,
    "num_gpus_per_env_runner": _RESOURCES,
    "custom_resources_per_env_runner": _RESOURCES,
    "create_local_env_runner": _ALGORITHM,
    "create_env_on_local_worker": _ENV_RUNNER,
    "validate_env_runners_after_construction": _GROUP,
    "max_requests_in_flight_per_env_runner": "test_a_runner_collects_while_the_learner_updates",
    "sample_timeout_s": "test_a_runner_whose_environment_fails_is_started_anew_and_the_cause_is_told",
    "episode_lookback_horizon": "test_pieces_of_episodes_look_back_as_far_as_set",
    # With connectors of the user alone; the package's own have no state.
    "_env_to_module_connector": "test_the_lean_pipelines_are_used_unless_the_user_sets_connectors",
    "_module_to_env_connector": "test_the_lean_pipelines_are_used_unless_the_user_sets_connectors",
    "add_default_connectors_to_env_to_module_pipeline": "test_default_connectors_can_be_left_out",
    "add_default_connectors_to_module_to_env_pipeline": "test_default_connectors_can_be_left_out",
    "merge_env_runner_states": _GROUP,
    "broadcast_env_runner_states": _GROUP,
    "sync_filters_on_rollout_workers_timeout_s": _GROUP,
    # .learners()
    "num_learners": "test_two_learners_stay_bit_identical_over_200_updates_though_data_and_noise_differ",
    "num_cpus_per_learner": _RESOURCES,
    "num_gpus_per_learner": _RESOURCES,
    "custom_resources_per_learner": _RESOURCES,
    "local_gpu_idx": "utils/framework.py",
    "_learner_class": "test_classes_of_the_user_do_the_work",
    "learner_config_dict": "test_classes_of_the_user_do_the_work",
    # .training()
    "grad_clip_by": "test_gradients_are_clipped_as_set",
    "initial_alpha": "test_the_entropy_settings_reach_the_learner",
    "target_entropy": "test_the_entropy_settings_reach_the_learner",
    # .rl_module()
    "_rl_module_spec": "test_a_module_specification_with_our_settings_is_taken",
    # .offline_data()
    "input_": "test_offline_batches_hold_the_data_with_scaled_rewards_and_module_actions",
    "input_filesystem": "test_a_file_system_handed_over_gives_the_columns_of_minari",
    "input_filesystem_kwargs": "test_a_file_system_is_made_with_its_arguments",
    "offline_data_class": _ALGORITHM,
    # .callbacks()
    "callbacks_class": "test_the_package_s_callbacks_stay_beside_the_user_s",
    **dict.fromkeys(
        (
            *("callbacks_on_algorithm_init", "callbacks_on_train_result", "callbacks_on_environment_created"),
            *("callbacks_on_episode_created", "callbacks_on_episode_start", "callbacks_on_episode_step"),
            *("callbacks_on_episode_end", "callbacks_on_sample_end"),
            *("callbacks_on_evaluate_start", "callbacks_on_evaluate_end"),
        ),
        _CALLBACKS,
    ),
    **dict.fromkeys(
        ("callbacks_on_evaluate_offline_start", "callbacks_on_evaluate_offline_end"),
        "test_the_policy_is_judged_by_data_as_often_as_set",
    ),
    "callbacks_on_env_runners_recreated": _ALGORITHM,
    "callbacks_on_checkpoint_loaded": _ALGORITHM,
    # .evaluation()
    "evaluation_interval": "test_evaluations_are_made_as_set",
    "evaluation_duration": "test_evaluations_are_made_as_set",
    "evaluation_duration_unit": "test_evaluations_are_made_as_set",
    "evaluation_config": "test_evaluations_are_made_as_set",
    "offline_evaluation_interval": "test_the_policy_is_judged_by_data_as_often_as_set",
    "custom_evaluation_function": "test_an_evaluation_function_of_the_user_takes_the_place_of_ours",
    "evaluation_num_env_runners": _RESOURCES,
    "evaluation_sample_timeout_s": _ALGORITHM,
    "evaluation_parallel_to_training": _ALGORITHM,
    "evaluation_auto_duration_min_env_steps_per_sample": _ALGORITHM,
    "evaluation_auto_duration_max_env_steps_per_sample": _ALGORITHM,
    "evaluation_unhealthy_workers_timeout_s": _ALGORITHM,
    "evaluation_error_after_n_consecutive_skips": _ALGORITHM,
    "evaluation_force_reset_envs_before_iteration": _ALGORITHM,
    # .reporting(), .debugging()
    "metrics_num_episodes_for_smoothing": "test_returns_are_means_over_as_many_episodes_as_set",
    "min_time_s_per_iteration": "test_an_iteration_lasts_as_long_as_set",
    "log_gradients": "test_norms_of_gradients_are_logged",
    "stats_cls_lookup": "test_statistics_of_the_user_compute_metrics",
    "log_level": "test_the_log_level_of_rllib_is_set",
    "seed": "test_another_seed_gives_another_run",
    # .fault_tolerance()
    "restart_failed_env_runners": _GROUP,
    "ignore_env_runner_failures": _GROUP,
    "max_num_env_runner_restarts": _GROUP,
    "delay_between_env_runner_restarts_s": "utils/actor_manager.py",
    "restart_failed_sub_environments": "test_an_environment_that_fails_is_made_anew_if_set",
    "env_runner_health_probe_timeout_s": _GROUP,
    "env_runner_restore_timeout_s": _ALGORITHM,
}

# Name -> why nobody sets it.
PRIVATE_SETTINGS: dict[str, str] = {
    "algo_class": "the algorithm that the config belongs to; given to its constructor",
    "in_evaluation": "RLlib marks the config of evaluation runners by it",
    "_is_frozen": "RLlib's mark of a config that may not be changed any more",
    "_is_online": "replaced by `CalQLConfig.is_online`, which follows from the environment",
    "simple_optimizer": "given up by RLlib, whose own checks still set it",
    "_validate_config": "False switches off all checks, these as well",
    "_prior_exploration_config": "what `.api_stack` puts back for the old API stack, which is refused",
    "_per_module_overrides": "RLlib's copy of settings for single modules, which are refused",
    "_dont_auto_sync_env_runner_states": "CalQL sets it: only connectors of the user have a state",
}
