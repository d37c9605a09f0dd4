"""`CalQLConfig`: every setting of Cal-QL, its default's provenance, and the checks.

"Authors" below means the authors' released code (nakamotoo/Cal-QL), "paper" Nakamoto et al. 2023, arXiv:2303.05479.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.algorithms.cql.cql import CQLConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.annotations import override
from typing_extensions import Self

from rllib_calql.config_checks import DEFAULT_MODEL_CONFIG, input_as_strings, validate_config
from rllib_calql.transitions import is_flat

if TYPE_CHECKING:
    from ray.rllib.connectors.connector_v2 import ConnectorV2
    from ray.rllib.core.learner.learner import Learner

    from rllib_calql.algorithm import CalQL

PathLike = str | os.PathLike[str]

_RANDOM_WARMUP_ENV_STEPS = 1_000  # Without offline data there is no policy worth collecting with yet.


class CalQLConfig(CQLConfig):
    """Configures Cal-QL: offline pre-training with calibrated CQL, then online fine-tuning.

    Example:
        >>> config = (
        ...     CalQLConfig()
        ...     .environment("Pendulum-v1")
        ...     .offline_data(input_="minari:rllib-calql/pendulum-swingup-v0")
        ...     .fine_tuning(offline_updates=5_000)
        ... )
        >>> algo = config.build()
    """

    def __init__(self, algo_class: type | None = None) -> None:
        from rllib_calql.algorithm import CalQL
        from rllib_calql.callbacks import EpisodeOutcomeCallback
        from rllib_calql.offline_data import CalQLOfflineData

        super().__init__(algo_class=algo_class or CalQL)

        # .training()
        self.calibrate = True
        self.reference_value = "returns_to_go"
        self.min_q_weight = 5.0  # Paper, AntMaze; 1.0 for Adroit.
        self.num_actions = 10  # Authors.
        self.temperature = 1.0  # Authors.
        self.importance_sampling = True  # Authors.
        self.lagrangian = False
        self.lagrangian_thresh = 0.8  # Paper, AntMaze.
        self.max_target_backup = True  # Authors; RLlib's CQL has no such option.
        self.deterministic_backup = True  # Authors (`backup_entropy=False`).
        self.conservative_gap_clip: tuple[float, float] = (float("-inf"), float("inf"))
        self.num_critics = 2
        self.actor_lr = 1e-4  # Authors.
        self.critic_lr = 3e-4  # Authors; RLlib's CQL 1e-3.
        self.alpha_lr = 1e-4  # Authors: the policy's rate.
        self.tau = 5e-3
        self.target_update_period = 1
        self.bc_updates = 0
        self.precision = "fp32"
        self.gamma = 0.99
        self.grad_clip = None
        self.train_batch_size_per_learner = 256

        # .offline_data()
        self.reward_scale = 1.0
        self.reward_bias = 0.0
        self.failure_reward: float | None = None
        self.truncation = "none"  # Authors.
        self.action_space_of_data = "environment"
        self.normalize_observations = False  # Authors.

        # .fine_tuning()
        self.offline_updates: int | None = None
        self.updates_per_iteration = 1_000
        self.mixing_ratio: float | str = 0.5  # Authors.
        self.updates_per_env_step: float = 1  # Authors' UTD ratio.
        self.min_q_weight_online: float | None = None
        self.conservative_online = True
        self.calibrate_online = True  # Authors; CORL switches it off.
        self.warmup_env_steps: int | None = None
        self.online_capacity = 1_000_000

        # .rl_module()
        self._model_config = copy.deepcopy(DEFAULT_MODEL_CONFIG)

        # RLlib's settings whose inherited defaults do not fit; the first group is refused if set, see config_checks.py.
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
        self.callbacks_class = EpisodeOutcomeCallback
        self.evaluation_config = AlgorithmConfig.overrides(explore=False)  # Authors evaluate the greedy policy.
        # An environment that fails must surface, not make a runner sleep for a minute and vanish.
        self.delay_between_env_runner_restarts_s = 1.0
        self.sample_timeout_s = 600.0  # A round is a whole episode; RLlib's 60 s would silently drop longer ones.

    @override(CQLConfig)
    def training(
        self,
        *,
        calibrate: bool = NotProvided,
        reference_value: Literal["returns_to_go"] = NotProvided,
        min_q_weight: float = NotProvided,
        num_actions: int = NotProvided,
        temperature: float = NotProvided,
        importance_sampling: bool = NotProvided,
        lagrangian: bool = NotProvided,
        lagrangian_thresh: float = NotProvided,
        max_target_backup: bool = NotProvided,
        deterministic_backup: bool = NotProvided,
        conservative_gap_clip: Sequence[float] = NotProvided,
        num_critics: int = NotProvided,
        actor_lr: Any = NotProvided,
        critic_lr: Any = NotProvided,
        alpha_lr: Any = NotProvided,
        tau: float = NotProvided,
        target_update_period: int = NotProvided,
        bc_updates: int = NotProvided,
        precision: Literal["fp32"] = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """Sets loss, critics, learning rates and targets.

        Args:
            calibrate: Whether the push-down of Q stops at the reference value. False is CQL(H).
            reference_value: What Q is bounded by: "returns_to_go", the Monte-Carlo return of the data's policy.
            min_q_weight: Weight w of the conservative term, at least 0.
            num_actions: Actions drawn per source (uniform, current, next) and state, N.
            temperature: T of the soft maximum, positive.
            importance_sampling: Whether each action's Q is divided by its proposal density.
            lagrangian: Whether w is multiplied by a dual variable that holds the gap at `lagrangian_thresh`.
            lagrangian_thresh: That gap, in units of Q.
            max_target_backup: Whether the target takes the best of `num_actions` next actions.
            deterministic_backup: Whether the target leaves out the entropy term.
            conservative_gap_clip: Bounds of the gap of each transition.
            num_critics: Size of the critic ensemble; targets and actor use its minimum.
            actor_lr: Learning rate of the policy, or RLlib's schedule [[env_steps, value], ...].
            critic_lr: Learning rate of critics and dual variable, or a schedule.
            alpha_lr: Learning rate of the entropy temperature, or a schedule.
            tau: Step of the target networks towards the critics, in (0, 1].
            target_update_period: Gradient updates between two steps of the targets.
            bc_updates: First gradient updates in which the actor clones the data's actions.
            precision: "fp32".
            **kwargs: RLlib's own settings (`gamma`, `train_batch_size_per_learner`, `grad_clip`, `initial_alpha`,
                `target_entropy`, ...).

        Returns:
            This config.
        """
        super().training(**kwargs)
        if isinstance(conservative_gap_clip, list):
            conservative_gap_clip = tuple(conservative_gap_clip)
        self._set_provided(
            calibrate=calibrate,
            reference_value=reference_value,
            min_q_weight=min_q_weight,
            num_actions=num_actions,
            temperature=temperature,
            importance_sampling=importance_sampling,
            lagrangian=lagrangian,
            lagrangian_thresh=lagrangian_thresh,
            max_target_backup=max_target_backup,
            deterministic_backup=deterministic_backup,
            conservative_gap_clip=conservative_gap_clip,
            num_critics=num_critics,
            actor_lr=actor_lr,
            critic_lr=critic_lr,
            alpha_lr=alpha_lr,
            tau=tau,
            target_update_period=target_update_period,
            bc_updates=bc_updates,
            precision=precision,
        )
        return self

    @override(CQLConfig)
    def offline_data(
        self,
        *,
        input_: PathLike | Sequence[PathLike] = NotProvided,
        reward_scale: float = NotProvided,
        reward_bias: float = NotProvided,
        failure_reward: float | None = NotProvided,
        truncation: Literal["none", "steady", "bootstrap"] = NotProvided,
        action_space_of_data: Literal["environment", "module"] = NotProvided,
        normalize_observations: bool = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """Sets where the data come from and how rewards and returns are computed.

        Args:
            input_: One or more of: "minari:<dataset id>", a Parquet file, a folder of Parquet rows or of what RLlib
                recorded.
            reward_scale: Factor on every reward, offline and online.
            reward_bias: Added after scaling. Reported returns stay in the environment's units.
            failure_reward: In a sparse-reward task, the reward (environment units) of every step of a failed episode;
                such an episode counts as failing for ever.
            truncation: What follows the last step of an episode that was cut: nothing ("none"), its last reward for
                ever ("steady"), or the learner's value estimate of the last observation ("bootstrap").
            action_space_of_data: Whether actions in data without metadata are in the environment's units or in the
                module's [-1, 1].
            normalize_observations: Whether observations are normalised by the offline data's mean and deviation.
            **kwargs: RLlib's own settings.

        Returns:
            This config.
        """
        if input_ is not NotProvided:
            kwargs["input_"] = input_as_strings(input_)
        super().offline_data(**kwargs)
        self._set_provided(
            reward_scale=reward_scale,
            reward_bias=reward_bias,
            failure_reward=failure_reward,
            truncation=truncation,
            action_space_of_data=action_space_of_data,
            normalize_observations=normalize_observations,
        )
        return self

    @override(AlgorithmConfig)
    def callbacks(self, callbacks_class: Any = NotProvided, **kwargs: Any) -> Self:
        """Sets callbacks, RLlib's signature. The package's own one, which logs the success rate, stays in place."""
        from rllib_calql.callbacks import EpisodeOutcomeCallback

        if callbacks_class is not NotProvided:
            given = list(callbacks_class) if isinstance(callbacks_class, (list, tuple)) else [callbacks_class]
            callbacks_class = [EpisodeOutcomeCallback, *(c for c in given if c is not EpisodeOutcomeCallback)]
        super().callbacks(callbacks_class, **kwargs)
        return self

    def fine_tuning(
        self,
        *,
        offline_updates: int = NotProvided,
        updates_per_iteration: int = NotProvided,
        mixing_ratio: float | Literal["proportional"] = NotProvided,
        updates_per_env_step: float = NotProvided,
        min_q_weight_online: float | None = NotProvided,
        conservative_online: bool = NotProvided,
        calibrate_online: bool = NotProvided,
        warmup_env_steps: int | None = NotProvided,
        online_capacity: int = NotProvided,
    ) -> Self:
        """Sets the two phases and the switch between them.

        Args:
            offline_updates: Gradient updates before the switch. Required with offline data; 0 starts online at once.
            updates_per_iteration: Gradient updates of one `train()` call in the offline phase.
            mixing_ratio: Share of offline rows in every online batch, exactly `round(B * mixing_ratio)` rows, or
                "proportional" to the two amounts of data.
            updates_per_env_step: Gradient updates per env step collected, the update-to-data ratio.
            min_q_weight_online: `min_q_weight` after the switch; None keeps the offline one.
            conservative_online: Whether the conservative term stays on after the switch. False is SAC.
            calibrate_online: Whether calibration stays on after the switch.
            warmup_env_steps: Env steps collected after the switch before the first online update: by the pre-trained
                policy, or by random actions if there was no pre-training. None: 0 with offline data, 1,000 without.
            online_capacity: Transitions of online data kept; the oldest give way.

        Returns:
            This config.
        """
        self._set_provided(
            offline_updates=offline_updates,
            updates_per_iteration=updates_per_iteration,
            mixing_ratio=mixing_ratio,
            updates_per_env_step=updates_per_env_step,
            min_q_weight_online=min_q_weight_online,
            conservative_online=conservative_online,
            calibrate_online=calibrate_online,
            warmup_env_steps=warmup_env_steps,
            online_capacity=online_capacity,
        )
        return self

    @override(AlgorithmConfig)
    def rl_module(self, *, model_config: Any = NotProvided, **kwargs: Any) -> Self:
        """Sets the networks.

        Args:
            model_config: Any of `actor_hiddens`, `critic_hiddens`, `activation`, `layer_norm`, `orthogonal_init`;
                the others keep their defaults.
            **kwargs: RLlib's own settings.

        Returns:
            This config.
        """
        if model_config is not NotProvided and isinstance(model_config, dict):
            model_config = copy.deepcopy(DEFAULT_MODEL_CONFIG | model_config)
        super().rl_module(model_config=model_config, **kwargs)
        return self

    def _set_provided(self, **settings: Any) -> None:
        for name, value in settings.items():
            if value is not NotProvided:
                setattr(self, name, value)

    # --- What the settings mean for the other parts ------------------------------------------------------------------

    @property
    def num_offline_updates(self) -> int:
        """Gradient updates of the offline phase; 0 without offline data."""
        return (self.offline_updates or 0) if self.is_offline else 0

    @property
    def num_warmup_env_steps(self) -> int:
        """Env steps collected before the first online update."""
        if self.warmup_env_steps is not None:
            return self.warmup_env_steps
        return 0 if self.is_offline else _RANDOM_WARMUP_ENV_STEPS

    def calibrates(self, *, online: bool) -> bool:
        """Whether Q is bounded by the reference value in the given phase."""
        return self.calibrate and (self.calibrate_online or not online)

    def is_conservative(self, *, online: bool) -> bool:
        """Whether the conservative term is on in the given phase."""
        return self.conservative_online or not online

    def conservative_weight(self, *, online: bool) -> float:
        """Weight of the conservative term in the given phase."""
        if online and self.min_q_weight_online is not None:
            return self.min_q_weight_online
        return self.min_q_weight

    # --- RLlib's hooks -----------------------------------------------------------------------------------------------

    @property
    def is_online(self) -> bool:
        """Whether there is an environment. Without one, RLlib must build no env runners."""
        return self.env is not None

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
        return state

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
        from rllib_calql.learner import CalQLTorchLearner

        return CalQLTorchLearner

    @override(CQLConfig)
    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The module class."""
        from rllib_calql.rl_module import CalQLTorchRLModule

        return RLModuleSpec(module_class=CalQLTorchRLModule)

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        names = ("num_critics", "num_actions", "max_target_backup", "normalize_observations")
        included: dict[str, Any] = super()._model_config_auto_includes
        return included | {name: getattr(self, name) for name in names}

    @override(AlgorithmConfig)
    def build_env_to_module_connector(self, env: Any = None, spaces: Any = None, device: Any = None) -> ConnectorV2:
        """RLlib's pipeline; observations that are no flat vector are flattened as the offline data are."""
        from ray.rllib.connectors.env_to_module import FlattenObservations

        space = _single_observation_space(env, spaces, self.observation_space)
        if self._env_to_module_connector is None and space is not None and not is_flat(space):
            flattening = self.copy(copy_frozen=False)
            flattening._env_to_module_connector = lambda *_: FlattenObservations()
            return super(CalQLConfig, flattening).build_env_to_module_connector(env, spaces, device)
        return super().build_env_to_module_connector(env, spaces, device)


def _single_observation_space(env: Any, spaces: Any, configured: gym.Space[Any] | None) -> gym.Space[Any] | None:
    """Observation space of one sub-environment, by the same precedence as RLlib's pipeline."""
    from ray.rllib.env import INPUT_ENV_SINGLE_SPACES

    if env is not None:
        space: gym.Space[Any] = getattr(env, "single_observation_space", env.observation_space)
        return space
    if spaces is not None and INPUT_ENV_SINGLE_SPACES in spaces:
        return spaces[INPUT_ENV_SINGLE_SPACES][0]  # type: ignore[no-any-return]
    return configured
