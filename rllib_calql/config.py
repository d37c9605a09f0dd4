"""`CalQLConfig`: what the settings mean for RLlib, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.algorithms.cql.cql import CQLConfig
from ray.rllib.connectors.module_to_env import GetActions
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.annotations import override

from rllib_calql.collection.connectors import ActionsForEnv, EncodedEpisodes, FlatObservations, LatestObservations
from rllib_calql.common.encoding import encoded_space
from rllib_calql.common.references import LEARNED, PENALTY, QUANTILE, REFERENCE_VALUES, RETURNS_TO_GO, TD
from rllib_calql.common.spaces import check_observation_space, is_flat_or_image
from rllib_calql.datasets.episodes.reader import ReadOptions
from rllib_calql.environments.sharing import SharedEnv, shared_env
from rllib_calql.settings.calql_settings import CalQLSettings, Schedulable
from rllib_calql.settings.checks import validate_config
from rllib_calql.settings.input_settings import filesystem_of
from rllib_calql.settings.keywords import check_keys, with_checked_keywords
from rllib_calql.settings.shown_defaults import with_shown_defaults
from rllib_calql.store.table_cache import default_memory_limit

if TYPE_CHECKING:
    from ray.rllib.connectors.connector_v2 import ConnectorV2
    from ray.rllib.core.learner.learner import Learner
    from typing_extensions import Self

    from rllib_calql.algorithm import CalQL

_RANDOM_WARMUP_ENV_STEPS = 1_000  # Without offline data there is no policy worth collecting with yet.


@dataclass(frozen=True)
class KeptInCheckpoints:
    """What checkpoints hold in place of the config that an algorithm is built with.

    Attributes:
        config: The config, with its environment.
        manifest: Entries of the manifest.
    """

    config: CalQLConfig
    manifest: Mapping[str, Any]


@with_checked_keywords
@with_shown_defaults
class CalQLConfig(CalQLSettings):
    """Configures Cal-QL: offline pre-training with calibrated CQL, then online fine-tuning.

    `help(CalQLConfig.training)` shows every setting of that method with its default. What is not given stays as it is.
    Where the defaults are from is told in `rllib_calql/settings/SETTINGS.md`.

    Example:
        >>> config = (
        ...     CalQLConfig()
        ...     .environment("Pendulum-v1")
        ...     .offline_data(input_="minari:rllib-calql/pendulum-swingup-v0")
        ...     .fine_tuning(offline_updates=5_000)
        ... )
        >>> algo = config.build()
    """

    _kept_in_checkpoints: KeptInCheckpoints | None = None  # Of an algorithm that trains without its environment.
    _ends_at_env_steps: int | float | None = None  # Where the `stop` of an experiment ends a trial.
    _shared_env: SharedEnv | None = None  # In copies and pickles, for processes that do not know the environment.

    def __init__(self, algo_class: type | None = None) -> None:
        from rllib_calql.algorithm import CalQL
        from rllib_calql.collection.callbacks import OWN_CALLBACKS
        from rllib_calql.store.offline_data import CalQLOfflineData

        super().__init__(algo_class=algo_class or CalQL)

        # RLlib's settings whose inherited defaults do not fit; the first group is refused if set (settings/refused.py).
        self.lr = None
        self.bc_iters = None
        self.replay_buffer_config = {"type": "EpisodeReplayBuffer"}
        self.dataset_num_iters_per_learner = 1
        self.offline_data_class = CalQLOfflineData
        self.min_time_s_per_iteration = None  # A result's content must not depend on the machine's speed.
        self.min_sample_timesteps_per_iteration = 0
        self.min_train_timesteps_per_iteration = 0
        self.batch_mode = "complete_episodes"
        self.num_env_runners = 0
        self.callbacks_class = list(OWN_CALLBACKS)
        self.evaluation_config = AlgorithmConfig.overrides(explore=False)  # Authors evaluate the greedy policy.
        # An environment that fails must surface, not make a runner sleep for a minute and vanish.
        self.delay_between_env_runner_restarts_s = 1.0
        self.sample_timeout_s = 600.0  # A round is a whole episode; RLlib's 60 s would silently drop longer ones.
        self.max_requests_in_flight_per_env_runner = 2  # With 1, runners would wait for updates under way.

    @override(AlgorithmConfig)
    def callbacks(self, callbacks_class: Any = NotProvided, **kwargs: Any) -> Self:
        """Sets callbacks, RLlib's signature.

        The package's own ones, which log the success rate and cut long episodes, stay in place.
        """
        from rllib_calql.collection.callbacks import OWN_CALLBACKS

        if callbacks_class is not NotProvided:
            given = list(callbacks_class) if isinstance(callbacks_class, (list, tuple)) else [callbacks_class]
            callbacks_class = [*OWN_CALLBACKS, *(c for c in given if c not in OWN_CALLBACKS)]
        super().callbacks(callbacks_class, **kwargs)
        return self

    # --- What the settings mean for the other parts ------------------------------------------------------------------

    @property
    def num_offline_updates(self) -> int:
        """Gradient updates of the offline phase; 0 without offline data."""
        return (self.offline_updates or 0) if self.is_offline else 0

    @property
    def reference_column(self) -> str | None:
        """Column of the offline data in the place of computed returns-to-go; None if these are computed."""
        if self.names_column:
            return self.reference_value
        return RETURNS_TO_GO if self.use_recorded_returns else None

    @property
    def names_column(self) -> bool:
        """Whether `reference_value` is a column of the offline data, which online rows lack."""
        return self.reference_value not in REFERENCE_VALUES

    @property
    def reference_of_rows(self) -> tuple[str, str]:
        """What bounds Q in offline and in online rows: their own column, "learned", "quantile", or "none"."""
        if not self.names_column:
            return self.reference_value, self.reference_value
        return RETURNS_TO_GO, self.reference_online or RETURNS_TO_GO

    @property
    def has_reference_network(self) -> bool:
        """Whether there is a network that learns a reference value."""
        return LEARNED in (self.reference_value, self.reference_online)

    def uses_reference_network(self, *, online: bool) -> bool:
        """Whether that network bounds Q in the given phase; it is not trained in one in which it does not."""
        is_bound = self.calibrates(online=online) and self.is_conservative(online=online)
        return self.has_reference_network and is_bound

    @property
    def bootstraps_reference(self) -> bool:
        """Whether the network is fitted by temporal differences."""
        return self.has_reference_network and self.reference_fit == TD

    @property
    def has_reference_quantile(self) -> bool:
        """Whether a quantile of episode returns bounds Q."""
        return self.reference_value == QUANTILE

    @property
    def calibration_penalty_weight(self) -> float | None:
        """Tau of the penalty form of calibration; None with the maximum.

        Source:
            rlox 1.2.0, where the level of the quantile is the weight as well.
        """
        return self.calibration_quantile if self.calibration_form == PENALTY else None

    @property
    def read_options(self) -> ReadOptions:
        """What the readers of `input_` are told."""
        return ReadOptions(
            unfinished_episodes=self.unfinished_episodes,  # type: ignore[arg-type]
            missing_final_observation=self.missing_final_observation,  # type: ignore[arg-type]
            max_episode_steps=self.max_episode_steps_in_data,
            observation_jump=self.observation_jump_tolerance,
            columns=frozenset([self.reference_column] if self.reference_column else []),
            filesystem=filesystem_of(self.input_filesystem, self.input_filesystem_kwargs),
        )

    @property
    def memory_limit_of_store(self) -> int:
        """Bytes of memory for offline transitions."""
        return default_memory_limit() if self.store_memory_limit is None else self.store_memory_limit

    @property
    def num_warmup_env_steps(self) -> int:
        """Env steps collected before the first online update."""
        if self.warmup_env_steps is not None:
            return self.warmup_env_steps
        return 0 if self.is_offline or self.pretrained is not None else _RANDOM_WARMUP_ENV_STEPS

    @property
    def episode_limit_env_steps(self) -> int:
        """Env steps after which an online episode is cut; never more than the store holds."""
        return min(self.max_episode_env_steps, self.online_capacity)

    def calibrates(self, *, online: bool) -> bool:
        """Whether Q is bounded by the reference value in the given phase."""
        return self.calibrate and (self.calibrate_online or not online)

    def is_conservative(self, *, online: bool) -> bool:
        """Whether the conservative term is on in the given phase."""
        return self.conservative_online or not online

    def conservative_weight(self, *, online: bool) -> Schedulable:
        """Weight of the conservative term in the given phase, a number or a schedule."""
        if online and self.min_q_weight_online is not None:
            return self.min_q_weight_online
        return self.min_q_weight

    def has_max_target_backup(self, *, online: bool) -> bool:
        """Whether the target takes the best of several next actions in the given phase."""
        return self._of_backup(self.max_target_backup, self.max_target_backup_online, online=online)

    def has_deterministic_backup(self, *, online: bool) -> bool:
        """Whether the target leaves out the entropy term in the given phase."""
        return self._of_backup(self.deterministic_backup, self.deterministic_backup_online, online=online)

    def _of_backup(self, offline: bool, after_the_switch: bool | None, *, online: bool) -> bool:
        """Without the conservative term nothing holds down what the best of several actions makes of Q's errors.

        Source:
            Haarnoja et al. 2018, arXiv:1812.05905, equation 6: one next action, entropy in the target.
        """
        if not online:
            return offline
        if after_the_switch is not None:
            return after_the_switch
        return offline and self.is_conservative(online=True)

    def period_of_actor(self, *, online: bool) -> int:
        """Gradient updates between two steps of actor and temperature in the given phase."""
        if online and self.actor_update_period_online is not None:
            return self.actor_update_period_online
        return self.actor_update_period

    # --- RLlib's hooks -----------------------------------------------------------------------------------------------

    @property
    def is_offline(self) -> bool:
        """Whether there are offline data. RLlib takes strings only for such."""
        return bool(self.input_) and self.input_ != "sampler"

    @property
    def is_online(self) -> bool:
        """Whether there is an environment, here or of clients. Without one, RLlib must build no env runners."""
        return self.env is not None or self.has_clients

    @override(AlgorithmConfig)
    def get_evaluation_config_object(self) -> Any:
        """RLlib's. Evaluations are made in the environment, not by clients."""
        config = super().get_evaluation_config_object()
        if isinstance(config, CalQLConfig) and self.has_clients:
            config.env_runner_cls = None
        return config

    def build(self, env: Any = None, use_copy: bool = True) -> CalQL:
        """Builds the algorithm; the same as `build_algo`, without RLlib's deprecation notice.

        Args:
            env: Environment to set first, if any.
            use_copy: Whether the algorithm gets a copy of this config.

        Returns:
            The algorithm, ready to `train()`.
        """
        algorithm: CalQL = self.build_algo(env, use_copy)
        return algorithm

    @override(AlgorithmConfig)
    def get_state(self) -> dict[str, Any]:
        """RLlib's state, and the settings of value -1, which RLlib takes for its mark of a deprecated one and drops.

        Every algorithm is built from this state, so that without it `reward_bias=-1.0` would silently become 0.
        """
        state: dict[str, Any] = super().get_state()
        defaults = type(self)()
        for name, value in vars(self).items():
            is_minus_one = isinstance(value, (int, float)) and value == -1
            if is_minus_one and getattr(defaults, name, None) != -1:
                state[name] = value
        return state | self._env_for_others()

    @classmethod
    @override(AlgorithmConfig)
    def from_state(cls, state: dict[str, Any]) -> Any:
        """RLlib's, and registers the environment where this process does not know it."""
        config = super().from_state(state)
        if isinstance(config, CalQLConfig) and config._shared_env is not None:
            config._shared_env.restore()
        return config

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold; the latter go to processes that lack an id registered in this one."""
        return vars(self) | self._env_for_others()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes that over."""
        self.__dict__.update(state)
        if self._shared_env is not None:
            self._shared_env.restore()

    def _env_for_others(self) -> dict[str, Any]:
        own = self._shared_env if self._shared_env is not None and self._shared_env.name == self.env else None
        shared = shared_env(self.env) or own
        return {} if shared is None and self._shared_env is None else {"_shared_env": shared}

    @override(AlgorithmConfig)
    def update_from_dict(self, config_dict: dict[str, Any]) -> Self:
        """RLlib's, which takes any key for a setting; here unknown ones are refused.

        Raises:
            TypeError: Naming the key and the settings that are similar.
        """
        check_keys(self, config_dict)
        settings = dict(config_dict.items())
        networks = settings.pop("model_config", None)  # RLlib's own dictionaries have it under its private name.
        super().update_from_dict(settings)
        return self if networks is None else self.rl_module(model_config=networks)

    @override(CQLConfig)
    def validate(self) -> None:
        """Checks every setting once and changes nothing.

        Raises:
            ValueError: Naming the setting, what is allowed, what it got and what to do.
        """
        validate_config(self, super().validate)

    @override(AlgorithmConfig)
    def _validate_offline_settings(self) -> None:
        """RLlib asks for spaces when there is no environment; ours come from the data, see `CalQLOfflineData`."""

    @override(CQLConfig)
    def get_default_learner_class(self) -> type[Learner]:
        """The learner class."""
        from rllib_calql.learning.learner import CalQLTorchLearner

        return CalQLTorchLearner

    @override(CQLConfig)
    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The module class."""
        from rllib_calql.networks.rl_module import CalQLTorchRLModule

        return RLModuleSpec(module_class=CalQLTorchRLModule)

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        of_losses = ("num_critics", "num_actions", "max_target_backup", "critic_subset", "actor_q")
        names = (*of_losses, "has_reference_network", "normalize_observations", "observation_clip")
        included: dict[str, Any] = super()._model_config_auto_includes
        return included | {name: getattr(self, name) for name in names}

    @override(AlgorithmConfig)
    def build_env_to_module_connector(self, env: Any = None, spaces: Any = None, device: Any = None) -> ConnectorV2:
        """One connector where the user sets none; others get observations flattened as the offline data are."""
        config = self
        space = _single_observation_space(env, spaces, self.observation_space)
        if space is not None and self._env_to_module_connector is None:
            check_observation_space(space, "The observation space")
            if self._has_lean_connectors(space):
                lean = LatestObservations(device=device)
                if not is_flat_or_image(space):
                    lean = FlatObservations(space, device=device)
                config = self.copy(copy_frozen=False)
                config._env_to_module_connector = lambda *_: lean
                config.add_default_connectors_to_env_to_module_pipeline = False
            elif not is_flat_or_image(space):
                config = self.copy(copy_frozen=False)
                config._env_to_module_connector = lambda *_: EncodedEpisodes(space)
        return super(CalQLConfig, config).build_env_to_module_connector(env, spaces, device)

    @override(AlgorithmConfig)
    def build_module_to_env_connector(self, env: Any = None, spaces: Any = None) -> ConnectorV2:
        """One connector behind RLlib's `GetActions` where the user sets none, else RLlib's pipeline."""
        config = self
        if self._has_lean_connectors(_single_observation_space(env, spaces, self.observation_space)):
            config = self.copy(copy_frozen=False)
            config._module_to_env_connector = lambda *_: [GetActions(), ActionsForEnv()]
            config.add_default_connectors_to_module_to_env_pipeline = False
        return super(CalQLConfig, config).build_module_to_env_connector(env, spaces)

    @override(AlgorithmConfig)
    def build_learner_connector(
        self,
        input_observation_space: gym.Space[Any] | None,
        input_action_space: gym.Space[Any] | None,
        device: Any = None,
    ) -> ConnectorV2:
        """RLlib's, which it asks what the module sees where there is no environment: what env runners would make."""
        if input_observation_space is not None:
            check_observation_space(input_observation_space, "The observation space")
            input_observation_space = encoded_space(input_observation_space)
        return super().build_learner_connector(input_observation_space, input_action_space, device)

    def _has_lean_connectors(self, space: gym.Space[Any] | None) -> bool:
        """Whether the user leaves RLlib's pipelines alone. They know each other: both are replaced, or none."""
        return (
            space is not None
            and self._env_to_module_connector is None
            and self._module_to_env_connector is None
            and self.add_default_connectors_to_env_to_module_pipeline
            and self.add_default_connectors_to_module_to_env_pipeline
        )


def _single_observation_space(env: Any, spaces: Any, configured: gym.Space[Any] | None) -> gym.Space[Any] | None:
    """Observation space of one sub-environment, by the same precedence as RLlib's pipeline."""
    from ray.rllib.env import INPUT_ENV_SINGLE_SPACES

    if env is not None:
        space: gym.Space[Any] = getattr(env, "single_observation_space", env.observation_space)
        return space
    if spaces is not None and INPUT_ENV_SINGLE_SPACES in spaces:
        return spaces[INPUT_ENV_SINGLE_SPACES][0]  # type: ignore[no-any-return]
    return configured
