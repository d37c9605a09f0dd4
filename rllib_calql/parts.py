"""`Parts`: what `CalQL` consists of, each part built with what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES

from rllib_calql.checkpoints.manifest import manifest_of
from rllib_calql.checkpoints.pretrained import Pretrained
from rllib_calql.checkpoints.saving import Saving
from rllib_calql.collection.budget import EnvStepBudget
from rllib_calql.collection.collection import EpisodeCollection
from rllib_calql.collection.intake import EpisodeIntake
from rllib_calql.collection.storing import EpisodeKeeper
from rllib_calql.collection.success_key import SuccessKeyWatch
from rllib_calql.common.encoding import encoded_space, flat_size, observation_dtype
from rllib_calql.common.episode_returns import EpisodeReturns
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.common.returns import reward_settings
from rllib_calql.common.spaces import is_image
from rllib_calql.evaluation.held_out import HeldOut
from rllib_calql.evaluation.history import EvaluationHistory
from rllib_calql.evaluation.offline_evaluation import OfflineEvaluation
from rllib_calql.evaluation.regime import Episodes
from rllib_calql.learning.divergence import DivergenceWatch
from rllib_calql.learning.updater import Updater
from rllib_calql.learning.weights import WeightPublisher
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.resolution import remark_on_constants
from rllib_calql.store.returns_connector import AddReturnsToGo

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig
    from rllib_calql.store.offline_data import CalQLOfflineData


@dataclass(frozen=True)
class Spaces:
    """The spaces of a run.

    Attributes:
        observation: Of one sub-environment, before any connector.
        action: Of one sub-environment.
        module: Of observations as the module sees them, episodes hold them and the store keeps them.
    """

    observation: gym.Space[Any]
    action: gym.spaces.Box
    module: gym.spaces.Box


def all_spaces(config: CalQLConfig, spaces: Mapping[str, Any] | None) -> Spaces:
    """The spaces of a run.

    Args:
        config: The algorithm's.
        spaces: RLlib's `Algorithm.spaces`, those of env runners; None without any.
    """
    if spaces is not None and INPUT_ENV_SINGLE_SPACES in spaces:
        observation_space, action_space = spaces[INPUT_ENV_SINGLE_SPACES]
    else:
        observation_space, action_space = config.observation_space, config.action_space
    # Connectors encode observations, once, and offline data are encoded by the same function. Connectors of the user
    # may make anything of them; there are no offline data then.
    if config._env_to_module_connector is None or spaces is None:
        return Spaces(observation_space, action_space, encoded_space(observation_space))
    return Spaces(observation_space, action_space, spaces[DEFAULT_MODULE_ID][0])


@dataclass(frozen=True)
class Parts:
    """The parts of an algorithm.

    Attributes:
        lifetime: Counts what has been done, and knows the phase.
        store: Holds the transitions.
        divergence: Compares mean Q with the returns that are possible.
        updater: Makes gradient updates.
        keeper: Stores finished episodes.
        intake: Stores episodes from outside.
        collection: Collects episodes.
        history: Keeps what evaluations said.
        held_out: Judges by held-out episodes; None if none are held out.
        success_key: Notices a `success_key` that no episode shows.
        pretrained: Takes over another run's networks.
        saving: Writes checkpoints and restores them.
        offline_evaluation: Judges the policy by data, if the config says how.
        align: Brings env runners in line with learners whose state was set, and waits for it.
    """

    lifetime: Lifetime
    store: TransitionStore
    divergence: DivergenceWatch
    updater: Updater
    keeper: EpisodeKeeper
    intake: EpisodeIntake
    collection: EpisodeCollection
    history: EvaluationHistory
    held_out: HeldOut | None
    success_key: SuccessKeyWatch
    pretrained: Pretrained
    saving: Saving
    offline_evaluation: OfflineEvaluation
    align: Callable[[], None]


def build_parts(
    config: CalQLConfig,
    spaces: Spaces,
    *,
    env_runner_group: Any,
    learner_group: Any,
    offline_data: CalQLOfflineData | None,
    metrics: Any,
    on_rebuilt: Callable[[Any], None],
) -> Parts:
    """Reads the offline data and builds everything around them.

    Args:
        config: The frozen config.
        spaces: The spaces.
        env_runner_group: RLlib's `EnvRunnerGroup`, or None without an environment.
        learner_group: RLlib's `LearnerGroup`.
        offline_data: What `input_` names, not read yet; None without.
        metrics: RLlib's `MetricsLogger`.
        on_rebuilt: Called with the new learner group after lost learners have been replaced.

    Raises:
        ValueError: If the data do not fit the environment, or are needed and missing.
    """
    store = TransitionStore(
        obs_dim=flat_size(spaces.module),
        action_dim=flat_size(spaces.action),
        online_capacity=config.online_capacity,
        seed=config.seed,
        track_tails=config.truncation == "bootstrap",
        obs_dtype=observation_dtype(spaces.module),
        n_step=config.n_step,
        gamma=config.gamma,
    )
    divergence = DivergenceWatch(
        gamma=config.gamma,
        has_entropy_term=not config.has_deterministic_backup(online=False),
        has_entropy_term_online=not config.has_deterministic_backup(online=True),
    )
    add_returns = AddReturnsToGo(reward_settings(config))
    if offline_data is not None:
        offline_data.load(store, add_returns, observation_space=spaces.observation, action_space=spaces.action)
        assert store.offline is not None
        divergence.include(*store.offline.possible_returns)
    lifetime = Lifetime(
        offline_updates=config.num_offline_updates,
        updates_per_env_step=config.updates_per_env_step,
        warmup_env_steps=config.num_warmup_env_steps,
    )
    weights = WeightPublisher(env_runner_group, has_remote_runners=config.num_env_runners > 0)
    episode_returns = EpisodeReturns(store.offline_episode_returns())
    updater = Updater(
        config,
        learner_group,
        store=store,
        episode_returns=episode_returns,
        lifetime=lifetime,
        divergence=divergence,
        metrics=metrics,
        weights=weights,
        on_rebuilt=on_rebuilt,
    )
    keeper = EpisodeKeeper(
        store,
        lifetime,
        divergence,
        episode_returns,
        add_returns=add_returns,
        space=spaces.module,
        action_space=spaces.action,
        episode_limit_env_steps=config.episode_limit_env_steps,
        env=_called(config.env),
    )
    intake = EpisodeIntake(config, keeper, lifetime, observation_space=spaces.observation, action_space=spaces.action)
    success_key = SuccessKeyWatch(config.success_key)
    collection = EpisodeCollection(
        config,
        env_runner_group,
        store=store,
        lifetime=lifetime,
        budget=EnvStepBudget(lifetime, config.max_online_env_steps, config.num_envs_per_env_runner),
        keeper=keeper,
        weights=weights,
        metrics=metrics,
        success_key=success_key,
    )
    history = EvaluationHistory(
        offline_data.reference_scores if offline_data else None,
        data=_episodes_of(offline_data),
        max_episodes=config.metrics_num_episodes_for_smoothing,
    )

    held_out = None
    if store.split is not None:
        quantile = partial(episode_returns.quantile, config.calibration_quantile)
        held_out = HeldOut(
            store,
            lifetime,
            on_one_learner=updater.on_one_learner,
            reference_quantile=quantile if config.has_reference_quantile else None,
        )
    offline_evaluation = OfflineEvaluation(
        config,
        store,
        on_one_learner=updater.on_one_learner,
        sees_images=is_image(spaces.module),
        held_out=held_out,
    )

    def align() -> None:
        collection.forget_unfinished()
        updater.begin_anew(env_runner_group)

    def manifest() -> dict[str, Any]:
        made = manifest_of(
            config,
            store,
            lifetime.counters(),
            observation_space=spaces.observation,
            action_space=spaces.action,
        )
        return made if config._kept_in_checkpoints is None else {**made, **config._kept_in_checkpoints.manifest}

    pretrained = Pretrained(
        config.pretrained,
        learners=updater,
        lifetime=lifetime,
        manifest=manifest,
        on_loaded=align,
        offline_updates=config.num_offline_updates,
    )
    saving = Saving(
        lifetime=lifetime,
        store=store,
        keeps_online_data=config.store_buffer_in_checkpoints,
        history=history,
        collection=(
            *(keeper, intake, collection, divergence, episode_returns, offline_evaluation),
            *([held_out] if held_out is not None else []),
        ),
        learners=updater,
        pretrained=pretrained,
        manifest=manifest,
        on_restored=align,
    )
    updater.make_store_resident()
    if config.normalize_observations and config.pretrained is None:
        _set_observation_statistics(store, updater, offline_data, spaces.observation)
    return Parts(
        lifetime=lifetime,
        store=store,
        divergence=divergence,
        updater=updater,
        keeper=keeper,
        intake=intake,
        collection=collection,
        history=history,
        held_out=held_out,
        success_key=success_key,
        pretrained=pretrained,
        saving=saving,
        offline_evaluation=offline_evaluation,
        align=align,
    )


def with_input(config: CalQLConfig, input_: Any) -> CalQLConfig:
    """The config, frozen, with other data, and with what follows of RLlib's settings from ours."""
    changed: CalQLConfig = config.copy(copy_frozen=False)
    changed.input_ = input_
    # RLlib merges the states of runners' connectors after every iteration and waits for all runners, however long their
    # requests are. Only connectors set by the user have a state.
    has_connectors = config._env_to_module_connector is not None or config._module_to_env_connector is not None
    changed._dont_auto_sync_env_runner_states = not has_connectors
    changed.freeze()
    return changed


def _called(env: Any) -> str:
    """What messages call an environment; empty without one."""
    if env is None:
        return ""
    return repr(env) if isinstance(env, str) else repr(getattr(env, "__name__", type(env).__name__))


def _episodes_of(offline_data: CalQLOfflineData | None) -> Episodes | None:
    """The episodes of the offline data as recorded, before `reward_scale` and `reward_bias`."""
    if offline_data is None or offline_data.report is None:
        return None
    report = offline_data.report
    returns = report.return_distribution
    return Episodes(report.num_episodes, returns.mean, returns.std, report.share_succeeded)


def _set_observation_statistics(
    store: TransitionStore, updater: Updater, offline_data: CalQLOfflineData | None, space: gym.Space[Any]
) -> None:
    if offline_data is None or store.num_offline == 0:
        raise ValueError("`normalize_observations` takes its statistics from offline data; set `input_` or drop it.")
    mean, std = store.observation_statistics()
    if remark := remark_on_constants(space, mean, std):
        offline_data.warn(remark)
    updater.foreach_learner(methodcaller("set_observation_statistics", mean, std))
