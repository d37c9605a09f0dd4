"""`CalQLSettings`: every setting of Cal-QL with its default's provenance, and the typed methods that set them.

"Authors" below means the authors' released code (nakamotoo/Cal-QL), "paper" Nakamoto et al. 2023, arXiv:2303.05479.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.algorithms.cql.cql import CQLConfig
from ray.rllib.utils.annotations import override

from rllib_calql.networks.model_settings import DEFAULT_MODEL_CONFIG
from rllib_calql.settings.data_settings import PathLike
from rllib_calql.settings.external_clients import ClientSettings
from rllib_calql.settings.quantities import plain_numbers

if TYPE_CHECKING:
    from typing_extensions import Self

Schedulable = float | Sequence[Sequence[float]]  # A number, or [[online env steps, value], ...].


class CalQLSettings(ClientSettings):
    """Holds the settings; `CalQLConfig` adds what they mean for RLlib."""

    def __setattr__(self, key: str, value: Any) -> None:
        # What NumPy computes, such as a point of a grid, is a number like any other.
        super().__setattr__(key, plain_numbers(value, in_dicts=key == "_model_config"))

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)

        # .training()
        self.calibrate = True
        self.reference_value = "returns_to_go"
        self.reference_updates = 5_000
        self.reference_fit = "monte_carlo"  # Paper, appendix D.
        self.reference_online: str | None = None
        self.calibration_quantile = 0.5  # rlox.
        self.calibration_form = "maximum"
        self.bound_uniform_actions = False  # Authors; ConRFT: True.
        self.min_q_weight = 5.0  # Paper, AntMaze; 1.0 for Adroit.
        self.num_actions = 10  # Authors.
        self.temperature = 1.0  # Authors.
        self.importance_sampling = True  # Authors.
        self.lagrangian = False
        self.lagrangian_thresh = 0.8  # Paper, AntMaze.
        self.max_target_backup = True  # Authors; RLlib's CQL has no such option.
        self.deterministic_backup = True  # Authors (`backup_entropy=False`).
        self.n_step = 1  # Authors; CPQL and d3rlpy's examples take more.
        self.conservative_gap_clip: tuple[float, float] = (float("-inf"), float("inf"))
        self.num_critics = 2
        self.critic_subset: int | None = None  # Authors; REDQ and RLPD: 2 of 10.
        self.actor_q = "min"  # Authors; RLPD: "mean".
        self.actor_update_period = 1
        self.bc_weight: Schedulable = 0.0
        self.actor_lr = 1e-4  # Authors.
        self.critic_lr = 3e-4  # Authors; RLlib's CQL 1e-3.
        self.alpha_lr = 1e-4  # Authors: the policy's rate.
        self.tau = 5e-3
        self.target_update_period = 1
        self.bc_updates = 0
        self.precision = "fp32"
        self.store_buffer_in_checkpoints = True  # RLlib: False, which loses what was collected.
        self.gamma = 0.99
        self.grad_clip = None
        self.train_batch_size_per_learner = 256

        # .fine_tuning()
        self.offline_updates: int | None = None
        self.updates_per_iteration = 1_000
        self.mixing_ratio: Schedulable | str = 0.5  # Authors.
        self.updates_per_env_step: float = 1  # Authors' UTD ratio.
        self.min_q_weight_online: Schedulable | None = None
        self.conservative_online = True
        # The authors keep both as offline in any case, also where `conservative_online=False` is to be SAC.
        self.max_target_backup_online: bool | None = None
        self.deterministic_backup_online: bool | None = None
        self.actor_update_period_online: int | None = None
        self.calibrate_online = True  # Authors; CORL switches it off.
        self.warmup_env_steps: int | None = None
        self.online_capacity = 1_000_000
        self.sample_async = True
        self.max_staleness_env_steps: int | None = None
        self.max_episode_env_steps = 10_000
        self.max_online_env_steps: int | None = None
        self.pretrained: str | None = None

        # .evaluation()
        self.success_key: str | None = None
        self.success_rule = "any"
        self.offline_evaluation_type: str | None = None  # RLlib: "eval_loss".
        self.offline_evaluation_duration: int | None = None  # RLlib: 1.

        # .rl_module()
        self._model_config = copy.deepcopy(DEFAULT_MODEL_CONFIG)

    @override(CQLConfig)
    def training(
        self,
        *,
        calibrate: bool = NotProvided,
        reference_value: str = NotProvided,
        reference_updates: int = NotProvided,
        reference_fit: Literal["monte_carlo", "td"] = NotProvided,
        reference_online: Literal["returns_to_go", "learned", "none"] | None = NotProvided,
        calibration_quantile: float = NotProvided,
        calibration_form: Literal["maximum", "penalty"] = NotProvided,
        bound_uniform_actions: bool = NotProvided,
        min_q_weight: float = NotProvided,
        num_actions: int = NotProvided,
        temperature: float = NotProvided,
        importance_sampling: bool = NotProvided,
        lagrangian: bool = NotProvided,
        lagrangian_thresh: float = NotProvided,
        max_target_backup: bool = NotProvided,
        deterministic_backup: bool = NotProvided,
        n_step: int = NotProvided,
        conservative_gap_clip: Sequence[float] = NotProvided,
        num_critics: int = NotProvided,
        critic_subset: int | None = NotProvided,
        actor_q: Literal["min", "mean"] = NotProvided,
        actor_update_period: int = NotProvided,
        actor_lr: Any = NotProvided,
        critic_lr: Any = NotProvided,
        alpha_lr: Any = NotProvided,
        tau: float = NotProvided,
        target_update_period: int = NotProvided,
        bc_updates: int = NotProvided,
        bc_weight: Schedulable = NotProvided,
        precision: Literal["fp32", "medium", "bf16"] = NotProvided,
        store_buffer_in_checkpoints: bool = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """Sets loss, critics, learning rates and targets.

        Where the defaults are from is told in `rllib_calql/settings/SETTINGS.md`.

        Args:
            calibrate: Whether the push-down of Q stops at the reference value. False is CQL(H).
            reference_value: What Q is bounded by: "returns_to_go", the Monte-Carlo return of the row's own episode;
                "learned", a network fitted to the data, without the noise of single returns; "quantile", one number
                from the returns of all episodes; or the name of a numeric column of the offline data that holds another
                policy's value, in units of training rewards.
            reference_updates: Gradient updates that fit the network of a learned reference value before the first
                update of all others. From then on it is updated with these.
            reference_fit: What it is fitted to: "monte_carlo", returns-to-go, or "td", the reward and the value of the
                next state, which needs no rule for the return of episodes that were cut.
            reference_online: Where `reference_value` names a column, which online rows lack, what bounds these:
                "returns_to_go", their own; "learned", a network fitted to the column; "none", nothing. None: their
                own returns.
            calibration_quantile: Of the discounted returns of all episodes, offline ones and those finished online so
                far, in (0, 1), with `reference_value="quantile"`; and the weight with `calibration_form="penalty"`.
            calibration_form: "maximum", the paper's max(Q, V), or "penalty", which adds
                tau mean max(Q - V, 0) (Q - Q(s, a)) to the conservative term instead, for comparison.
            bound_uniform_actions: Whether the uniform actions are calibrated as well.
            min_q_weight: Weight w of the conservative term, at least 0.
            num_actions: Actions drawn per source (uniform, current, next) and state, N.
            temperature: T of the soft maximum, positive.
            importance_sampling: Whether each action's Q is divided by its proposal density.
            lagrangian: Whether w is multiplied by a dual variable that holds the gap at `lagrangian_thresh`.
            lagrangian_thresh: That gap, in units of Q.
            max_target_backup: Whether the target takes the best of `num_actions` next actions.
            deterministic_backup: Whether the target leaves out the entropy term.
            n_step: Rewards that the target sums before it goes on with a value, fewer at the end of an episode.
                Uncorrected: above 1 the target holds the policy of the data for `n_step` steps, not the one that is
                trained.
            conservative_gap_clip: Bounds of the gap of each transition.
            num_critics: Size of the critic ensemble.
            critic_subset: Critics that the minimum in the target runs over, drawn anew for every gradient update, at
                most `num_critics`; None: all of them.
            actor_q: What the actor improves: the "min" or the "mean" of Q over all critics.
            actor_update_period: Gradient updates between two steps of actor and temperature.
            actor_lr: Learning rate of the policy, or RLlib's schedule [[env_steps, value], ...].
            critic_lr: Learning rate of critics and dual variable, or a schedule.
            alpha_lr: Learning rate of the entropy temperature, or a schedule.
            tau: Step of the target networks towards the critics, in (0, 1].
            target_update_period: Gradient updates between two steps of the targets.
            bc_updates: First gradient updates in which the actor clones the data's actions.
            bc_weight: Weight, at least 0, of the mean of -log pi(a|s) over the offline rows of a batch in the actor's
                loss, or a schedule [[online env steps, weight], ...]. Needs offline data.
            precision: Arithmetic of the learners' matrix products. "fp32"; "medium", the factors rounded to TF32 on
                GPUs and to bfloat16 on CPUs that can; or "bf16", hidden layers in bfloat16. First layers see
                observations in float32, and last layers, targets, losses, gradients of parameters and optimisers are in
                float32 always.
            store_buffer_in_checkpoints: Whether checkpoints hold the online transitions. Without them a restored run
                goes on with offline data alone until new episodes are there.
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
            reference_updates=reference_updates,
            reference_fit=reference_fit,
            reference_online=reference_online,
            calibration_quantile=calibration_quantile,
            calibration_form=calibration_form,
            bound_uniform_actions=bound_uniform_actions,
            min_q_weight=min_q_weight,
            num_actions=num_actions,
            temperature=temperature,
            importance_sampling=importance_sampling,
            lagrangian=lagrangian,
            lagrangian_thresh=lagrangian_thresh,
            max_target_backup=max_target_backup,
            deterministic_backup=deterministic_backup,
            n_step=n_step,
            conservative_gap_clip=conservative_gap_clip,
            num_critics=num_critics,
            critic_subset=critic_subset,
            actor_q=actor_q,
            actor_update_period=actor_update_period,
            actor_lr=actor_lr,
            critic_lr=critic_lr,
            alpha_lr=alpha_lr,
            tau=tau,
            target_update_period=target_update_period,
            bc_updates=bc_updates,
            bc_weight=bc_weight,
            precision=precision,
            store_buffer_in_checkpoints=store_buffer_in_checkpoints,
        )
        return self

    def fine_tuning(
        self,
        *,
        offline_updates: int = NotProvided,
        updates_per_iteration: int = NotProvided,
        mixing_ratio: Schedulable | Literal["proportional"] = NotProvided,
        updates_per_env_step: float = NotProvided,
        min_q_weight_online: Schedulable | None = NotProvided,
        conservative_online: bool = NotProvided,
        max_target_backup_online: bool | None = NotProvided,
        deterministic_backup_online: bool | None = NotProvided,
        actor_update_period_online: int | None = NotProvided,
        calibrate_online: bool = NotProvided,
        warmup_env_steps: int | None = NotProvided,
        online_capacity: int = NotProvided,
        sample_async: bool = NotProvided,
        max_staleness_env_steps: int | None = NotProvided,
        max_episode_env_steps: int = NotProvided,
        max_online_env_steps: int | None = NotProvided,
        pretrained: PathLike | None = NotProvided,
    ) -> Self:
        """Sets the two phases and the switch between them.

        Where the defaults are from is told in `rllib_calql/settings/SETTINGS.md`.

        Args:
            offline_updates: Gradient updates before the switch. Required with offline data, unless `pretrained` is
                set; 0 starts online at once.
            updates_per_iteration: Gradient updates of one `train()` call in the offline phase.
            mixing_ratio: Share of offline rows in every online batch, exactly `round(B * mixing_ratio)` rows; a
                schedule [[online env steps, share], ...] of it; or "proportional" to the two amounts of data.
            updates_per_env_step: Gradient updates per env step collected, the update-to-data ratio.
            min_q_weight_online: `min_q_weight` after the switch, or a schedule [[online env steps, weight], ...];
                None keeps the offline one.
            conservative_online: Whether the conservative term stays on after the switch. False is SAC.
            max_target_backup_online: `max_target_backup` after the switch. None: as offline while the conservative term
                is on, else SAC's own, which is False.
            deterministic_backup_online: `deterministic_backup` after the switch. None: as offline while the
                conservative term is on, else SAC's own, which is False, the entropy being in the target.
            actor_update_period_online: `actor_update_period` after the switch; None keeps the offline one.
            calibrate_online: Whether calibration stays on after the switch.
            warmup_env_steps: Env steps collected after the switch before the first online update: by the pre-trained
                policy, or by random actions if there was no pre-training. None: 0 with offline data, 1,000 without.
            online_capacity: Transitions of online data kept; the oldest give way.
            sample_async: Whether remote env runners go on collecting while learners update. False: an episode of
                every runner, then its updates, which is reproducible. Without remote runners it is always so.
            max_staleness_env_steps: With `sample_async`, the env steps stored and not yet trained on above which env
                runners wait for the learners. None: the mean length of an episode for every environment.
            max_episode_env_steps: Steps after which an online episode is cut by the truncation rule and stored, at most
                `online_capacity`. The environment is not reset there.
            max_online_env_steps: Env steps that training may take over the lifetime of the run, never more, warm-up
                included and evaluation not; None for no bound. The result that reaches it has `done=True`, and the next
                `train()` raises `BudgetSpentError` without touching the environment.
            pretrained: Checkpoint of another run that this one starts from: its networks, optimisers and temperature,
                and its count of offline updates, which counts for `offline_updates`. That may be left out then, for no
                more of them. It is code, as every checkpoint: name only one that you would run as a program.

        Returns:
            This config.
        """
        if pretrained is not NotProvided and pretrained:
            pretrained = os.fspath(pretrained)
            # As with `cache_dir`.
            pretrained = os.path.abspath(os.path.expanduser(pretrained)) if "://" not in pretrained else pretrained
        self._set_provided(
            offline_updates=offline_updates,
            updates_per_iteration=updates_per_iteration,
            mixing_ratio=mixing_ratio,
            updates_per_env_step=updates_per_env_step,
            min_q_weight_online=min_q_weight_online,
            conservative_online=conservative_online,
            max_target_backup_online=max_target_backup_online,
            deterministic_backup_online=deterministic_backup_online,
            actor_update_period_online=actor_update_period_online,
            calibrate_online=calibrate_online,
            warmup_env_steps=warmup_env_steps,
            online_capacity=online_capacity,
            sample_async=sample_async,
            max_staleness_env_steps=max_staleness_env_steps,
            max_episode_env_steps=max_episode_env_steps,
            max_online_env_steps=max_online_env_steps,
            pretrained=pretrained,
        )
        return self

    @override(AlgorithmConfig)
    def evaluation(
        self,
        *,
        success_key: str | None = NotProvided,
        success_rule: Literal["any", "last", "fraction"] = NotProvided,
        offline_evaluation_type: Literal["fqe", "held_out"] | None = NotProvided,
        offline_evaluation_duration: int | None = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """Sets how the policy is evaluated, and what counts as a success in evaluation and collected episodes.

        The defaults stand in `rllib_calql/settings/SETTINGS.md` as well.

        Args:
            success_key: Key of the environment's infos that says whether a step is a success: True, False, 1 or 0; NaN
                and None say nothing. With "/" between the levels of nested infos, as "task/done". None: "success" and
                "is_success".
            success_rule: How the success of an episode is made of its steps: 1 if "any" of them is a success, 1 if the
                "last" one is, or the "fraction" that are. Steps that say nothing do not count, and an episode without
                any that does is left out of `success_rate`.
            offline_evaluation_type: What judges the policy every `offline_evaluation_interval` iterations: "fqe", its
                value fitted to the data, or "held_out", losses on held-out episodes, see `validation_fraction`.
            offline_evaluation_duration: Gradient updates of a fit with "fqe"; None: 4,000.
            **kwargs: RLlib's own settings (`evaluation_interval`, `evaluation_duration`, `evaluation_num_env_runners`,
                ...).

        Returns:
            This config.
        """
        super().evaluation(**kwargs)
        self._set_provided(
            success_key=success_key,
            success_rule=success_rule,
            offline_evaluation_type=offline_evaluation_type,
            offline_evaluation_duration=offline_evaluation_duration,
        )
        return self

    @override(AlgorithmConfig)
    def rl_module(self, *, model_config: Any = NotProvided, **kwargs: Any) -> Self:
        """Sets the networks.

        Where the defaults are from is told in `rllib_calql/settings/SETTINGS.md`.

        Args:
            model_config: Any of `actor_hiddens`, `critic_hiddens`, `activation`, `layer_norm`, True for both networks,
                "critic" or "actor" for one of them, `orthogonal_init`, and for images `conv_filters`, a list of
                [channels, kernel, stride], `image_features`, the width between encoder and networks, and `random_shift`
                in pixels; the others keep their defaults.
            **kwargs: RLlib's own settings.

        Returns:
            This config.
        """
        if model_config is not NotProvided and isinstance(model_config, dict):
            model_config = copy.deepcopy(DEFAULT_MODEL_CONFIG | model_config)
        super().rl_module(model_config=model_config, **kwargs)
        return self
