"""The checks behind `CalQLConfig.validate`: ranges, choices, and what must fit together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rllib_calql.common.returns import TRUNCATION_RULES, is_endless, reward_settings
from rllib_calql.common.schedules import is_schedule
from rllib_calql.common.spaces import check_action_space, check_observation_space
from rllib_calql.common.success import SUCCESS_RULES
from rllib_calql.networks.model_settings import check_model_config, check_module_spec, check_names
from rllib_calql.networks.precision import PRECISIONS
from rllib_calql.settings.external_clients import check_clients
from rllib_calql.settings.input_settings import filesystem_of
from rllib_calql.settings.offline_evaluation import check_offline_evaluation
from rllib_calql.settings.online_checks import check_online_side
from rllib_calql.settings.quantities import A_SCHEDULE, check_schedulable, is_integer, is_one_of, is_real
from rllib_calql.settings.reference_checks import check_reference
from rllib_calql.settings.refused import check_unused

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

_POSITIVE = ("temperature", "tau", "updates_per_env_step", "initial_alpha")
_NOT_NEGATIVE = ("min_q_weight",)
_IN_FLOAT32 = (
    *("temperature", "tau", "initial_alpha", "min_q_weight", "min_q_weight_online", "bc_weight", "lagrangian_thresh"),
    *("target_entropy", "actor_lr", "critic_lr", "alpha_lr", "reward_scale", "reward_bias", "failure_reward"),
)
_POSITIVE_INTEGERS = (
    "num_actions",
    "num_critics",
    "n_step",
    "target_update_period",
    "actor_update_period",
    "updates_per_iteration",
    "reference_updates",
    "online_capacity",
    "max_episode_env_steps",
    "train_batch_size_per_learner",
)
_CLIPPED_BY = ("value", "norm", "global_norm")
_BOOLEANS = (
    "calibrate",
    "importance_sampling",
    "lagrangian",
    "max_target_backup",
    "deterministic_backup",
    "normalize_observations",
    "conservative_online",
    "calibrate_online",
    "bound_uniform_actions",
    "use_recorded_returns",
    "store_buffer_in_checkpoints",
    "share_offline_data",
    "sample_async",
)


def validate_config(config: CalQLConfig, parent_validate: Callable[[], None]) -> None:
    """Runs RLlib's checks and ours.

    Raises:
        ValueError: At the first setting that is wrong.
    """
    _check_host(config)
    defaults = type(config)()
    check_unused(config, defaults)
    check_names(config._model_config)
    check_module_spec(config._rl_module_spec, config.get_default_rl_module_spec().module_class)
    _check_classes(config, defaults)
    _check_clipping(config)
    with _without_new_stack_banners():
        parent_validate()
    _check_ranges(config)
    _check_choices(config)
    check_reference(config)
    check_online_side(config)
    _check_float32(config)
    _check_data(config)
    check_model_config(config.model_config)
    _check_collection(config)
    check_clients(config, defaults)
    _check_budget(config)
    _check_phases(config)
    _check_success(config)
    check_offline_evaluation(config)


def _check_host(config: CalQLConfig) -> None:
    if config.framework_str != "torch":
        raise ValueError(f'`framework` must be "torch", got {config.framework_str!r}.')
    if not (config.enable_rl_module_and_learner and config.enable_env_runner_and_connector_v2):
        raise ValueError("CalQL runs on RLlib's new API stack only; drop the `.api_stack(...)` call.")
    if not config.normalize_actions:
        raise ValueError(
            "`normalize_actions` must be True: module actions lie in [-1, 1] and RLlib maps them to the bounds."
        )
    if config.action_space is not None:
        check_action_space(config.action_space, "`action_space`")
    if config.observation_space is not None and config._env_to_module_connector is None:
        check_observation_space(config.observation_space, "`observation_space`")


def _check_classes(config: CalQLConfig, defaults: CalQLConfig) -> None:
    """Refuses classes of a user that do other work than the ones here."""
    if config._learner_class is not None:
        _check_subclass("learner_class", config._learner_class, config.get_default_learner_class())
    if config.env_runner_cls is not None:
        from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

        _check_subclass("env_runner_cls", config.env_runner_cls, SingleAgentEnvRunner)
    _check_subclass("offline_data_class", config.offline_data_class, defaults.offline_data_class)


def _check_clipping(config: CalQLConfig) -> None:
    clip_to = config.grad_clip
    if clip_to is not None and not (is_real(clip_to) and 0 < clip_to < math.inf):
        raise ValueError(f"`grad_clip` must be None or a positive number, got {clip_to!r}.")
    if not is_one_of(config.grad_clip_by, _CLIPPED_BY):
        raise ValueError(f"`grad_clip_by` must be one of {_CLIPPED_BY}, got {config.grad_clip_by!r}.")


def _check_subclass(setting: str, kind: Any, own: type) -> None:
    if not (isinstance(kind, type) and issubclass(kind, own)):
        raise ValueError(f"`{setting}` must be a subclass of `{own.__name__}`, got {kind!r}; drop it.")


@contextmanager
def _without_new_stack_banners() -> Iterator[None]:
    """RLlib warns at each validation that the new API stack is in use, which is the only one here."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return "on the new API stack!" not in record.getMessage()

    names = ("ray.rllib.algorithms.sac.sac", "ray.rllib.algorithms.algorithm_config")
    for name in names:
        logging.getLogger(name).addFilter(is_wanted)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(is_wanted)


def _check_float32(config: CalQLConfig) -> None:
    """Refuses what would be 0 or infinite where training computes with it."""
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    for name in _IN_FLOAT32:
        value = getattr(config, name)
        for number in [point[1] for point in value] if is_schedule(value) else [value]:
            if is_real(number) and number != 0 and not smallest <= abs(number) <= largest:
                raise ValueError(
                    f"`{name}` must be 0 or between {smallest:.2g} and {largest:.2g} in size, since training computes "
                    f"in float32; got {value!r}."
                )
    if config.failure_reward is not None:
        value = reward_settings(config).endless_return(config.failure_reward)
        if not abs(value) <= largest:
            raise ValueError(
                f"`failure_reward` {config.failure_reward!r} for ever is a return of {value:.3g} by "
                f"{reward_settings(config)}, but training stores float32, at most {largest:.2g}; lower one of them."
            )


def _check_ranges(config: CalQLConfig) -> None:
    for name in _POSITIVE:
        value = getattr(config, name)
        if not (is_real(value) and 0 < value < math.inf):
            raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        if not (is_real(value) and 0 <= value < math.inf):
            raise ValueError(f"`{name}` must be a number of at least 0, got {value!r}.")
    for name in _POSITIVE_INTEGERS:
        value = getattr(config, name)
        if not is_integer(value, 1):
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    for name in _BOOLEANS:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"`{name}` must be True or False, got {getattr(config, name)!r}.")
    for name in ("actor_lr", "critic_lr", "alpha_lr"):
        rate = getattr(config, name)
        is_rate = is_real(rate) and 0 < rate < math.inf
        check_schedulable(name, rate, is_allowed=is_rate, allowed=f"a positive number or {A_SCHEDULE}")
    entropy = config.target_entropy
    if not is_one_of(entropy, ("auto",)) and not (is_real(entropy) and math.isfinite(entropy)):
        raise ValueError(f'`target_entropy` must be "auto" or a finite number, got {entropy!r}.')
    if config.tau > 1:
        raise ValueError(f"`tau` must be in (0, 1], got {config.tau!r}.")
    if not (is_real(config.gamma) and 0 <= config.gamma <= 1):
        raise ValueError(f"`gamma` must be in [0, 1], got {config.gamma!r}.")
    if not is_integer(config.bc_updates, 0):
        raise ValueError(f"`bc_updates` must be an integer of at least 0, got {config.bc_updates!r}.")
    clip_at = config.observation_clip
    if clip_at is not None and not (is_real(clip_at) and clip_at > 0):
        raise ValueError(
            f"`observation_clip` must be a positive number, or None or infinity for none, got {clip_at!r}."
        )
    if config.warmup_env_steps is not None and not is_integer(config.warmup_env_steps, 0):
        raise ValueError(
            f"`warmup_env_steps` must be None or an integer of at least 0, got {config.warmup_env_steps!r}."
        )
    for name in ("reward_scale", "reward_bias", "lagrangian_thresh"):
        if not (is_real(getattr(config, name)) and math.isfinite(getattr(config, name))):
            raise ValueError(f"`{name}` must be a finite number, got {getattr(config, name)!r}.")
    clip: Any = config.conservative_gap_clip
    if (
        not isinstance(clip, (tuple, list))  # Tune restores a tuple as a list.
        or len(clip) != 2
        or not all(is_real(bound) for bound in clip)
        or clip[0] >= clip[1]
    ):
        raise ValueError(f"`conservative_gap_clip` must be a pair (low, high) with low < high, got {clip!r}.")


def _check_choices(config: CalQLConfig) -> None:
    if not is_one_of(config.precision, PRECISIONS):
        raise ValueError(f"`precision` must be one of {PRECISIONS}, got {config.precision!r}.")
    if not is_one_of(config.truncation, TRUNCATION_RULES):
        raise ValueError(f"`truncation` must be one of {TRUNCATION_RULES}, got {config.truncation!r}.")
    if not is_one_of(config.action_space_of_data, ("environment", "module")):
        raise ValueError(
            f'`action_space_of_data` must be "environment" or "module", got {config.action_space_of_data!r}.'
        )
    if is_endless(config.gamma) and (config.truncation == "steady" or config.failure_reward is not None):
        raise ValueError(
            '`gamma` must be below 1 with `truncation="steady"` or `failure_reward`, whose endless sums diverge at 1; '
            f"got {config.gamma!r}."
        )
    clips = config.observation_clip is not None and config.observation_clip != math.inf
    if clips and config.observation_clip != type(config)().observation_clip and not config.normalize_observations:
        raise ValueError(
            f"`observation_clip` is {config.observation_clip!r} but `normalize_observations` is False, and only "
            "normalised observations are clipped; set `normalize_observations=True` or drop it."
        )
    failure = config.failure_reward
    if failure is not None and not (is_real(failure) and math.isfinite(failure)):
        raise ValueError(f"`failure_reward` must be None or a finite number, got {failure!r}.")
    threshold_was_set = config.lagrangian_thresh != type(config)().lagrangian_thresh
    if threshold_was_set and not config.lagrangian:
        raise ValueError(
            "`lagrangian_thresh` is set but `lagrangian` is False; set `lagrangian=True` or drop the threshold."
        )


def _check_data(config: CalQLConfig) -> None:
    for name, allowed in (
        ("unfinished_episodes", ("error", "truncate", "drop")),
        ("missing_final_observation", ("drop_step", "repeat")),
    ):
        if not is_one_of(getattr(config, name), allowed):
            raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(config, name)!r}.")
    for name in ("max_episode_steps_in_data", "store_memory_limit"):
        value = getattr(config, name)
        if value is not None and not is_integer(value, 1):
            raise ValueError(f"`{name}` must be None or a positive integer, got {value!r}.")
    tolerance = config.observation_jump_tolerance
    if not (is_real(tolerance) and 0 <= tolerance < math.inf):
        raise ValueError(f"`observation_jump_tolerance` must be a number of at least 0, got {tolerance!r}.")
    _check_hold_out(config)
    if config.cache_dir is not None and not (isinstance(config.cache_dir, str) and config.cache_dir):
        raise ValueError(f"`cache_dir` must be None or the path of a folder, got {config.cache_dir!r}.")
    if config.input_filesystem is None and config.input_filesystem_kwargs:
        raise ValueError("`input_filesystem_kwargs` is set but `input_filesystem` is not; set it or drop them.")
    filesystem_of(config.input_filesystem, config.input_filesystem_kwargs)


def _check_hold_out(config: CalQLConfig) -> None:
    fraction, seed = config.validation_fraction, config.validation_seed
    if not (is_real(fraction) and 0 <= fraction < 1):
        raise ValueError(
            f"`validation_fraction` must be at least 0 and below 1, the share of the episodes that is held out; got "
            f"{fraction!r}."
        )
    if not is_integer(seed, 0):
        raise ValueError(f"`validation_seed` must be an integer of at least 0, got {seed!r}.")
    if seed != type(config)().validation_seed and not fraction:
        raise ValueError(
            f"`validation_seed` is {seed!r} but `validation_fraction` is 0, so that no episodes are drawn; set the "
            "latter, or drop the seed."
        )
    if fraction and not config.is_offline and not config.in_evaluation:
        raise ValueError(
            f"`validation_fraction` is {fraction!r}, but there are no offline data to hold out from; set "
            "`.offline_data(input_=...)` or drop it."
        )


def _check_collection(config: CalQLConfig) -> None:
    staleness = config.max_staleness_env_steps
    if staleness is not None and not is_integer(staleness, 0):
        raise ValueError(f"`max_staleness_env_steps` must be None or an integer of at least 0, got {staleness!r}.")
    for name in ("num_env_runners", "num_learners"):
        if not is_integer(getattr(config, name), 0):
            raise ValueError(f"`{name}` must be an integer of at least 0, got {getattr(config, name)!r}.")
    if not is_integer(config.num_envs_per_env_runner, 1):
        raise ValueError(
            f"`num_envs_per_env_runner` must be a positive integer, got {config.num_envs_per_env_runner!r}."
        )


def _check_budget(config: CalQLConfig) -> None:
    limit = config.max_online_env_steps
    if limit is None or config.in_evaluation:  # Evaluations are not counted.
        return
    if not is_integer(limit, 1):
        raise ValueError(f"`max_online_env_steps` must be None or a positive integer, got {limit!r}.")
    if config.env is None:
        raise ValueError(
            f"`max_online_env_steps` is {limit} and there is no environment; set `.environment(...)` or drop it."
        )
    if limit < config.num_envs_per_env_runner:
        raise ValueError(
            f"`max_online_env_steps` must be at least `num_envs_per_env_runner`, {config.num_envs_per_env_runner}, "
            f"since sub-environments step together; got {limit}."
        )
    if limit <= config.num_warmup_env_steps:
        raise ValueError(
            f"`max_online_env_steps` is {limit} and the warm-up alone takes {config.num_warmup_env_steps} env steps, "
            "so nothing would be learned online; raise it or lower `warmup_env_steps`."
        )


def _check_phases(config: CalQLConfig) -> None:
    if config.input_ != "sampler" and not config.is_offline:
        raise ValueError(f"`input_` must be a string, a path or a non-empty list of them, got {config.input_!r}.")
    if config.pretrained is not None and not (isinstance(config.pretrained, str) and config.pretrained):
        raise ValueError(f"`pretrained` must be None or the folder of a checkpoint, got {config.pretrained!r}.")
    updates = config.offline_updates
    if updates is not None and not is_integer(updates, 0):
        raise ValueError(f"`offline_updates` must be an integer of at least 0, got {updates!r}.")
    if config.is_offline and updates is None and config.pretrained is None:
        raise ValueError("`offline_updates` must be set when `input_` is: `.fine_tuning(offline_updates=...)`.")
    if updates and not config.is_offline:
        raise ValueError(f"`offline_updates` is {updates} but `input_` is not set; set `.offline_data(input_=...)`.")
    if config.is_offline and config._env_to_module_connector is not None:
        raise ValueError(
            "`env_to_module_connector` would change online observations only, the offline data do not pass through it; "
            "put the change into the environment and the data."
        )
    if config.env is None and config.is_offline and not config.has_clients:
        # Spaces that are set by hand are those of episodes that come by `CalQL.add_episodes`.
        if updates == 0 and (config.observation_space is None or config.action_space is None):
            raise ValueError(
                "`offline_updates` is 0 and there is no environment, so nothing would be trained. For episodes that "
                "come by `add_episodes` alone, set `.environment(observation_space=..., action_space=...)`."
            )
        if not config.in_evaluation:
            _check_evaluation_without_env(config)


def _check_evaluation_without_env(config: CalQLConfig) -> None:
    """Held-out episodes are judged by a learner, so that env runners of evaluations would have nothing to do."""
    if config.evaluation_interval and not config.validation_fraction:
        raise ValueError(
            "`evaluation_interval` needs an environment or held-out episodes; set `.environment(...)`, or "
            "`.offline_data(validation_fraction=0.1)`, or drop it."
        )
    overrides = config.evaluation_config if isinstance(config.evaluation_config, Mapping) else {}
    if overrides.get("env") is not None:
        raise ValueError(
            f"`env` in `evaluation_config` is {overrides['env']!r}, but there is no environment to train in; set "
            "`.environment(...)`, and an end by `stop` where no env steps are to be taken."
        )
    for name in ("evaluation_num_env_runners", "evaluation_parallel_to_training", "custom_evaluation_function"):
        if getattr(config, name):
            raise ValueError(f"`{name}` is set, but there is no environment; set `.environment(...)` or drop it.")


def _check_success(config: CalQLConfig) -> None:
    key = config.success_key
    if key is not None and not (isinstance(key, str) and key.strip()):
        raise ValueError(
            "`success_key` must be None or the name of a key in the environment's infos, with `/` between the levels "
            f"of nested ones; got {key!r}."
        )
    if key is not None and any(part.startswith("_") for part in key.split("/")):
        raise ValueError(
            f"`success_key` is {key!r}, but Gymnasium's vector environments keep no info whose key begins with `_`; "
            "rename it in the environment."
        )
    if not is_one_of(config.success_rule, SUCCESS_RULES):
        raise ValueError(f"`success_rule` must be one of {SUCCESS_RULES}, got {config.success_rule!r}.")
    overrides = config.evaluation_config if isinstance(config.evaluation_config, Mapping) else {}
    for name in ("success_key", "success_rule"):
        if name in overrides and overrides[name] != getattr(config, name):
            raise ValueError(
                f"`{name}` in `evaluation_config` is {overrides[name]!r}, but a success is the same in evaluation and "
                f"in collected episodes; set `.evaluation({name}={overrides[name]!r})`."
            )
