"""The checks of what fine-tuning adds: schedules, critics and steps in the target, steps of the actor, imitation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rllib_calql.common.schedules import is_schedule, largest_value, value_at
from rllib_calql.environments.resolving import time_limit_of
from rllib_calql.settings.quantities import A_SCHEDULE, check_schedulable, is_integer, is_one_of, is_real

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

ACTOR_Q = ("min", "mean")


def check_online_side(config: CalQLConfig) -> None:
    """Checks them.

    Raises:
        ValueError: At the first setting that is wrong.
    """
    _check_mixture(config.mixing_ratio, is_offline=config.is_offline)
    _check_weights(config)
    _check_backup(config)
    _check_actor(config)
    _check_target_steps(config)


def _check_mixture(ratio: Any, *, is_offline: bool) -> None:
    allowed = f'in [0, 1] or "proportional", or {A_SCHEDULE} of shares in [0, 1]'
    is_share = is_one_of(ratio, ("proportional",)) or (is_real(ratio) and 0 <= float(ratio) <= 1)
    check_schedulable("mixing_ratio", ratio, is_allowed=is_share, allowed=allowed, high=1.0)
    if is_schedule(ratio) and largest_value(ratio) > 0 and not is_offline:
        raise ValueError(
            f"`mixing_ratio` is {ratio!r}, but there are no offline data to take rows from; set "
            "`.offline_data(input_=...)` or drop it."
        )


def _check_weights(config: CalQLConfig) -> None:
    weight: Any = config.min_q_weight_online
    if weight is not None:
        _check_weight("min_q_weight_online", weight, f"None or a number of at least 0, or {A_SCHEDULE}")
    if weight is not None and not config.conservative_online:
        raise ValueError(
            f"`min_q_weight_online` is {weight!r}, but `conservative_online` is False, which takes out the term of "
            "that weight; drop one of them."
        )
    weight = config.bc_weight
    _check_weight("bc_weight", weight, f"a number of at least 0, or {A_SCHEDULE}")
    if largest_value(weight) > 0 and not config.is_offline:
        raise ValueError(
            f"`bc_weight` is {weight!r}, but there are no offline data to imitate; set `.offline_data(input_=...)` or "
            "drop it."
        )
    # After the switch, batches without offline rows; before it, the first weight, if there are updates at all.
    has_rows_online = config.mixing_ratio == "proportional" or largest_value(config.mixing_ratio) > 0
    has_rows_offline = config.offline_updates and value_at(weight, 0) > 0
    if largest_value(weight) > 0 and not (has_rows_online or has_rows_offline):
        raise ValueError(
            f"`bc_weight` is {weight!r}, but no batch in which it counts holds offline rows to imitate: `mixing_ratio` "
            f"is {config.mixing_ratio!r} and `offline_updates` {config.offline_updates!r}. Raise `mixing_ratio`, or "
            "drop it."
        )


def _check_weight(name: str, weight: Any, allowed: str) -> None:
    is_weight = is_real(weight) and 0 <= weight < math.inf
    check_schedulable(name, weight, is_allowed=is_weight, allowed=allowed)


def _check_backup(config: CalQLConfig) -> None:
    subset = config.critic_subset
    if subset is not None and not (is_integer(subset, 1) and subset <= config.num_critics):
        raise ValueError(
            f"`critic_subset` must be None or an integer from 1 to `num_critics`, {config.num_critics}, got {subset!r}."
        )
    for name in ("max_target_backup_online", "deterministic_backup_online"):
        if not (getattr(config, name) is None or isinstance(getattr(config, name), bool)):
            raise ValueError(f"`{name}` must be None, True or False, got {getattr(config, name)!r}.")


def _check_actor(config: CalQLConfig) -> None:
    if not is_one_of(config.actor_q, ACTOR_Q):
        raise ValueError(f"`actor_q` must be one of {ACTOR_Q}, got {config.actor_q!r}.")
    period = config.actor_update_period_online
    if period is not None and not is_integer(period, 1):
        raise ValueError(f"`actor_update_period_online` must be None or a positive integer, got {period!r}.")
    first_period = config.period_of_actor(online=not config.num_offline_updates)
    if 0 < config.bc_updates < first_period:
        raise ValueError(
            f"`bc_updates` is {config.bc_updates}, but the actor makes its first step in update {first_period} "
            "(`actor_update_period`), so it would clone nothing; raise `bc_updates` or lower the period."
        )


def _check_target_steps(config: CalQLConfig) -> None:
    """Refuses targets longer than any episode can be. How long those of the data are, is known once they are read."""
    if config.in_evaluation or not config.is_online:  # Evaluation may cut episodes earlier.
        return
    if config.n_step > config.episode_limit_env_steps:
        name = "max_episode_env_steps" if config.episode_limit_env_steps < config.online_capacity else "online_capacity"
        raise ValueError(
            f"`n_step` must be at most `{name}`, {config.episode_limit_env_steps}, for online episodes are not longer; "
            f"got {config.n_step}. Lower it or raise `{name}`."
        )
    limit = None if config.is_offline else time_limit_of(config.env, config.env_config)
    if limit is not None and config.n_step > limit:
        raise ValueError(
            f"`n_step` must be at most {limit}, the steps after which the environment {config.env!r} ends an episode; "
            f"got {config.n_step}. Lower it."
        )
