"""The RLModule of Cal-QL: policy, critic ensemble, target ensemble, observation statistics.

Module actions live in [-1, 1]^A whatever the bounds of the environment's Box are; RLlib maps them on the way to the
environment, and `offline_data.py` maps recorded environment actions back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchSquashedGaussian
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, QNetAPI, TargetNetworkAPI
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.utils.annotations import override
from torch import Tensor, nn

from rllib_calql.common.scales import is_nearly_constant
from rllib_calql.common.spaces import (
    check_action_space,
    check_observation_space,
    fixed_dimensions,
    is_flat_or_image,
    is_image,
)
from rllib_calql.networks.actor_critic import EnsembleCritic, TanhGaussianPolicy, log_prob_of, squash
from rllib_calql.networks.image_encoder import ImageEncoder, Trunk, random_shifts
from rllib_calql.networks.model_settings import check_image_settings_are_used, has_layer_norm
from rllib_calql.networks.steps import (
    ACTOR_LOG_PROB,
    ACTOR_Q,
    BOOTSTRAP_OBS,
    CLIPPED,
    DATA_LOG_PROB,
    LOG_PROB_CURRENT,
    LOG_PROB_NEXT,
    Q_CURRENT,
    Q_DATA,
    Q_NEXT,
    Q_UNIFORM,
    REFERENCE_NEXT_VALUE,
    REFERENCE_VALUE,
    TARGET_NEXT_LOG_PROB,
    TARGET_NEXT_Q,
    KindOfStep,
    Noise,
    draw_noise,
    draw_subset,
)
from rllib_calql.networks.value_network import ValueNetwork


class Inputs(NamedTuple):
    """What the networks see of one batch, each of shape (B, n). For vectors all of one observation are the same.

    Attributes:
        critic: Of s, with gradient into the image encoder.
        policy: Of s, without.
        bootstrap_policy: Of the observation that the target bootstraps from, which is s' but for targets of several
            steps, without gradient.
        target: Of the same for the target critics.
        next_policy: Of s', where the conservative term proposes actions, if that is another observation; else None.
        reference: Of s, and of the observation that the target bootstraps from, for a learned reference value; that
            of images has an encoder of its own.
    """

    critic: Tensor
    policy: Tensor
    bootstrap_policy: Tensor
    target: Tensor
    next_policy: Tensor | None
    reference: tuple[Tensor, Tensor]


class CalQLTorchRLModule(TorchRLModule, InferenceOnlyAPI, QNetAPI, TargetNetworkAPI):
    """Policy pi(a|s) and critics Q_c(s, a) of Cal-QL, with the forward passes that its loss needs.

    RLlib's own CQL module is not reused: it repeats observations before every network and judges next-state proposals
    at the next state, which is another regulariser than the one of Kumar et al. 2020.

    Dimensions of the action space whose bounds are one number take no part: networks and densities know the others.

    Images, Box(H, W, C) of uint8, pass an encoder first: once per state, for all actions and critics. The critics' loss
    trains it, the actor's does not.

    `model_config` keys: those of `model_settings.DEFAULT_MODEL_CONFIG`, and those that `CalQLConfig` adds
    (`num_critics`, `num_actions`, `max_target_backup`, `critic_subset`, `actor_q`, `has_reference_network`,
    `normalize_observations`, `observation_clip`).
    """

    policy: TanhGaussianPolicy
    critic: EnsembleCritic
    target_critic: EnsembleCritic
    reference: ValueNetwork  # Of a learned reference value, where there is one.
    target_reference: ValueNetwork

    @override(RLModule)
    def setup(self) -> None:
        """Builds the networks from `model_config` and the spaces."""
        settings = self.model_config
        if not is_flat_or_image(self.observation_space):
            raise ValueError(
                f"The module needs flat observations, Box(n,), or images, Box(H, W, C) of uint8, got "
                f"{self.observation_space}; leave `env_to_module_connector` unset so that other spaces are flattened."
            )
        check_observation_space(self.observation_space, "The observation space")
        self._sees_images = is_image(self.observation_space)
        check_image_settings_are_used(settings, sees_images=self._sees_images)
        check_action_space(self.action_space, "The action space")
        free = ~fixed_dimensions(self.action_space)
        # None where every dimension is free: most spaces, for which nothing is to be taken out or put back.
        self._free: Tensor | None
        self.register_buffer("_free", None if free.all() else torch.from_numpy(np.flatnonzero(free)), persistent=False)
        self.num_free_actions = action_dim = int(free.sum())
        network_kwargs = {key: settings[key] for key in ("activation", "orthogonal_init")}
        self.obs_mean: Tensor
        self.obs_std: Tensor
        # Modules of earlier versions have no such setting, and did not clip.
        clip = settings.get("observation_clip") if settings["normalize_observations"] else None
        self._clip: float | None = None if clip is None or math.isinf(clip) else float(clip)
        num_numbers = 0 if self._sees_images else self.observation_space.shape[0]
        self.register_buffer("obs_mean", torch.zeros(num_numbers))
        self.register_buffer("obs_std", torch.ones(num_numbers))
        obs_dim = settings["image_features"] if self._sees_images else num_numbers
        if self._sees_images:
            self.encoder = ImageEncoder(
                self.observation_space.shape, settings["conv_filters"], orthogonal_init=settings["orthogonal_init"]
            )
            self.policy_trunk = Trunk(self.encoder.size, obs_dim)
            if not self.inference_only:
                self.critic_trunk = Trunk(self.encoder.size, obs_dim)
        self.policy = TanhGaussianPolicy(
            obs_dim,
            action_dim,
            settings["actor_hiddens"],
            layer_norm=has_layer_norm(settings, "actor"),
            **network_kwargs,
        )
        self.explores_randomly = False  # Set by `collection.collect` during a random warm-up.
        # Set by the learner; None draws from torch's global generator. All learners draw the same subsets.
        self.generator: torch.Generator | None = None
        self.generator_of_subsets: torch.Generator | None = None
        # Set by the learner before each step; all that there is, until then.
        # Modules of earlier versions have no such setting.
        self._has_reference = bool(settings.get("has_reference_network", False))
        self.kind_of_step = KindOfStep(
            takes_best_target=settings["max_target_backup"],
            imitates=True,
            evaluates_reference=self._has_reference,
            bootstraps_reference=self._has_reference,
        )
        self.action_dist_cls = TorchSquashedGaussian.get_partial_dist_cls(low=-1.0, high=1.0)
        if not self.inference_only:
            self.critic = EnsembleCritic(
                settings["num_critics"],
                obs_dim,
                action_dim,
                settings["critic_hiddens"],
                layer_norm=has_layer_norm(settings, "critic"),
                **network_kwargs,
            )
            if self._has_reference:  # Last, so that the other networks start as they do without it.
                image_shape = self.observation_space.shape if self._sees_images else None
                self.reference = ValueNetwork(obs_dim, settings, image_shape=image_shape)

    @override(TargetNetworkAPI)
    def make_target_networks(self) -> None:
        """Copies the critics and what stands before them. The targets never receive gradient."""
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        if self._sees_images:
            self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.target_trunk = copy.deepcopy(self.critic_trunk).requires_grad_(False)
        if self._has_reference:
            self.target_reference = copy.deepcopy(self.reference).requires_grad_(False)

    @override(TargetNetworkAPI)
    def get_target_network_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of a network and its target."""
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.critic, self.target_critic)]
        if self._sees_images:
            pairs += [(self.encoder, self.target_encoder), (self.critic_trunk, self.target_trunk)]
        return pairs + self.reference_pairs()

    def reference_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The network of a learned reference value and its target; empty without one."""
        return [(self.reference, self.target_reference)] if self._has_reference else []

    @override(InferenceOnlyAPI)
    def get_non_inference_attributes(self) -> list[str]:
        """Parts that env runners do not hold."""
        of_images = ["critic_trunk", "target_encoder", "target_trunk"] if self._sees_images else []
        of_reference = ["reference", "target_reference"] if self._has_reference else []
        return ["critic", "target_critic", *of_images, *of_reference]

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the actor's loss trains."""
        return [*self.policy.parameters(), *(self.policy_trunk.parameters() if self._sees_images else ())]

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the critics' loss trains, the image encoder included."""
        of_images = (self.encoder, self.critic_trunk) if self._sees_images else ()
        return [parameter for network in (self.critic, *of_images) for parameter in network.parameters()]

    def reference_parameters(self) -> list[nn.Parameter]:
        """What the loss of a learned reference value trains, its own image encoder included; empty without one."""
        return list(self.reference.parameters()) if self._has_reference else []

    def set_product_dtype(self, dtype: torch.dtype | None) -> None:
        """Sets the type of hidden layers' activations and products; None is that of the parameters."""
        for network in (self.policy, self.critic, self.target_critic):
            network.product_dtype = dtype
        if self._sees_images:
            self.encoder.product_dtype = self.target_encoder.product_dtype = dtype
        if self._has_reference:
            for value_network in (self.reference, self.target_reference):
                value_network.set_product_dtype(dtype)

    def set_observation_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets the normalisation of observations, each of shape (obs_dim,). They travel with the weights.

        What is nearly constant in the data is divided by 1: it must not blow up when it does vary online.
        """
        self.obs_mean.copy_(mean)
        self.obs_std.copy_(torch.where(is_nearly_constant(mean, std), torch.ones_like(std), std))

    def _free_actions(self, actions: Tensor) -> Tensor:
        """Of actions (..., A) the dimensions that leave a choice: those that networks and densities know."""
        return actions if self._free is None else actions[..., self._free]

    def _whole_actions(self, free_actions: Tensor) -> Tensor:
        """The inverse; 0 stands in dimensions whose bounds are one number, which is what the environment gets there."""
        if self._free is None:
            return free_actions
        actions = free_actions.new_zeros(*free_actions.shape[:-1], self.action_space.shape[0])
        actions[..., self._free] = free_actions
        return actions

    def _normalise(self, obs: Tensor) -> Tensor:
        numbers = obs.to(self.obs_mean.dtype)
        if not self.model_config["normalize_observations"]:
            return numbers
        normalised = (numbers - self.obs_mean) / self.obs_std
        return normalised if self._clip is None else normalised.clamp_(-self._clip, self._clip)

    @torch.no_grad()
    def _share_clipped(self, normalised: Tensor) -> dict[str, Tensor]:
        """`CLIPPED` of normalised observations (B, n); nothing where none are clipped."""
        return {} if self._clip is None else {CLIPPED: (normalised.abs() >= self._clip).float().mean(dim=1)}

    def _policy_input(self, obs: Tensor) -> Tensor:
        return self.policy_trunk(self.encoder(obs)) if self._sees_images else self._normalise(obs)

    def _seen_in_training(self, observations: list[Tensor]) -> Sequence[Tensor]:
        """Vectors normalised, images shifted at random, each by itself."""
        if not self._sees_images:
            return list(map(self._normalise, observations))
        shape = self.encoder.image_shape
        images = torch.cat([obs.view(-1, *shape) for obs in observations])
        most = self.model_config["random_shift"] if self.kind_of_step.shifts_images else 0
        return random_shifts(images, most, self.generator).chunk(len(observations))

    def _training_inputs(self, obs: Tensor, next_obs: Tensor, bootstrap_obs: Tensor | None = None) -> Inputs:
        """Inputs of all networks."""
        observations = [obs, next_obs if bootstrap_obs is None else bootstrap_obs]
        if bootstrap_obs is not None and self.kind_of_step.is_conservative:
            observations.append(next_obs)
        here, bootstrap, *following = self._seen_in_training(observations)
        of_reference = here, bootstrap
        if not self._sees_images:
            return Inputs(here, here, bootstrap, bootstrap, next(iter(following), None), of_reference)
        code = self.encoder(here)
        with torch.no_grad():
            bootstrap_policy = self.policy_trunk(self.encoder(bootstrap))
            target = self.target_trunk(self.target_encoder(bootstrap))
            next_policy = self.policy_trunk(self.encoder(following[0])) if following else None
        seen = self.critic_trunk(code), self.policy_trunk(code.detach())
        return Inputs(*seen, bootstrap_policy, target, next_policy, of_reference)

    @override(TorchRLModule)
    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        mean, log_std = self.policy(self._policy_input(batch[Columns.OBS]))
        return {Columns.ACTION_DIST_INPUTS: torch.cat([mean, log_std], dim=-1)}

    @override(TorchRLModule)
    def forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Greedy actions. RLlib changes the mode of all layers at every env step, which changes nothing in these."""
        return dict(self._forward_inference(batch, **kwargs))

    @override(TorchRLModule)
    def forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Sampled actions, without a change of mode as in `forward_inference`."""
        return dict(self._forward_exploration(batch, **kwargs))

    @override(TorchRLModule)
    def forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Values for the loss, without a change of mode as in `forward_inference`."""
        return dict(RLModule.forward_train(self, batch, **kwargs))

    @override(TorchRLModule)
    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Greedy actions tanh(mean). RLlib's deterministic squashed Gaussian would return the mean before squashing."""
        with torch.no_grad():
            outputs: dict[str, Any] = self._forward(batch)
            mean, _ = outputs[Columns.ACTION_DIST_INPUTS].chunk(2, dim=-1)
            return {Columns.ACTIONS: self._whole_actions(torch.tanh(mean)), **outputs}

    @override(TorchRLModule)
    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Sampled actions. RLlib's distribution would clip the standard deviation more tightly than the loss does."""
        with torch.no_grad():
            outputs: dict[str, Any] = self._forward(batch)
            mean, log_std = outputs[Columns.ACTION_DIST_INPUTS].chunk(2, dim=-1)
            if self.explores_randomly:
                return {Columns.ACTIONS: self._whole_actions(torch.rand_like(mean) * 2.0 - 1.0)}
            actions, log_prob = squash(mean, log_std, torch.randn_like(mean))
            return {Columns.ACTIONS: self._whole_actions(actions), Columns.ACTION_LOGP: log_prob, **outputs}

    @override(QNetAPI)
    def compute_q_values(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Q of the batch's (module) actions: {"qf_preds": shape (C, B)}."""
        obs = batch[Columns.OBS]
        seen = self.critic_trunk(self.encoder(obs)) if self._sees_images else self._normalise(obs)
        return {"qf_preds": self.critic(seen, self._free_actions(batch[Columns.ACTIONS]).unsqueeze(0))[:, 0]}

    @override(TargetNetworkAPI)
    def forward_target(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Minimum over the target critics of the batch's (module) actions: {"qf_target": shape (B,)}."""
        obs = batch[Columns.OBS]
        seen = self.target_trunk(self.target_encoder(obs)) if self._sees_images else self._normalise(obs)
        q = self.target_critic(seen, self._free_actions(batch[Columns.ACTIONS]).unsqueeze(0))
        return {"qf_target": q[:, 0].amin(dim=0)}

    @torch.no_grad()
    def estimate_values(self, obs: Tensor) -> Tensor:
        """V(s) of the greedy policy, min_c of the target critics at tanh(mean), shape (B,)."""
        mean, _ = self.policy(self._policy_input(obs))
        outputs: dict[str, Tensor] = self.forward_target(
            {Columns.OBS: obs, Columns.ACTIONS: self._whole_actions(torch.tanh(mean))}
        )
        return outputs["qf_target"]

    @torch.no_grad()
    def estimate_reference(self, obs: Tensor) -> Tensor:
        """V(s) of the network of a learned reference value, shape (B,); only where there is one."""
        values: Tensor = self.reference(obs if self._sees_images else self._normalise(obs))
        return values

    @torch.no_grad()
    def compare_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of given (module) actions, and squared distance of the greedy ones to them, each of shape (B,).

        Source:
            d3rlpy's `ContinuousActionDiffEvaluator` has the same distance, summed over the dimensions of an action.
        """
        mean, log_std = self.policy(self._policy_input(obs))
        given = self._free_actions(actions)
        return log_prob_of(mean, log_std, given), (torch.tanh(mean) - given).square().sum(dim=-1)

    def draw_noise(self, batch_size: int, device: torch.device) -> Noise:
        """Draws the noise of one gradient step from the learner's generator."""
        return draw_noise(
            self.kind_of_step,
            batch_size=batch_size,
            action_dim=self.num_free_actions,
            num_actions=self.model_config["num_actions"],
            generator=self.generator,
            device=device,
        )

    def draw_subset(self, device: torch.device) -> Tensor | None:
        """Draws the critics of the target's minimum for one gradient step, shape (K,); None: all critics."""
        size = self.model_config.get("critic_subset")  # Modules of earlier versions have no such setting.
        if size is None:
            return None
        return draw_subset(self.critic.num_critics, size, generator=self.generator_of_subsets, device=device)

    @override(TorchRLModule)
    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """All values that the loss of a `kind_of_step` needs, each network evaluated once per distinct input.

        Gradient flows from `Q_*` into the critics and the image encoder only, from `ACTOR_*` and `DATA_LOG_PROB` into
        the policy only, from `REFERENCE_VALUE` into the network of the reference value only.
        """
        kind = self.kind_of_step
        if kind.fits_reference_alone:
            observations = [batch[Columns.OBS]]
            if kind.bootstraps_reference:
                observations.append(batch.get(BOOTSTRAP_OBS, batch[Columns.NEXT_OBS]))
            return self._reference_values(*self._seen_in_training(observations))
        inputs = self._training_inputs(batch[Columns.OBS], batch[Columns.NEXT_OBS], batch.get(BOOTSTRAP_OBS))
        data_actions = self._free_actions(batch[Columns.ACTIONS])
        noise = self.draw_noise(data_actions.shape[0], data_actions.device)
        values = self._share_clipped(inputs.critic)
        if kind.evaluates_reference:
            values |= self._reference_values(*inputs.reference)
        here = None
        if kind.moves_actor or kind.is_conservative:
            with torch.set_grad_enabled(kind.moves_actor and torch.is_grad_enabled()):
                here = self.policy(inputs.policy)
        if here is not None and noise.actor is not None:
            values |= self._values_of_actor(inputs, noise.actor, *here)
            if kind.needs_data_log_prob:
                values[DATA_LOG_PROB] = log_prob_of(here[0], here[1], data_actions)
        with torch.no_grad():
            (target_actions, target_log_prob), following = self._proposed_after(inputs, noise)
            target_q = self.target_critic(inputs.target, target_actions, members=self.draw_subset(data_actions.device))
            values |= {TARGET_NEXT_Q: target_q.amin(dim=0), TARGET_NEXT_LOG_PROB: target_log_prob}
        if here is None or following is None or noise.uniform is None or noise.current is None:
            return values | {Q_DATA: self.critic(inputs.critic, data_actions.unsqueeze(0))[:, 0]}
        with torch.no_grad():
            current, log_prob_current = squash(here[0], here[1], noise.current)
        # Every action is judged at s; only the proposal of `following` comes from s'.
        judged = [data_actions.unsqueeze(0), noise.uniform, current, following[0]]
        q = torch.split(self.critic(inputs.critic, torch.cat(judged)), [len(actions) for actions in judged], dim=1)
        values |= {Q_DATA: q[0][:, 0], Q_UNIFORM: q[1], Q_CURRENT: q[2], Q_NEXT: q[3]}
        return values | {LOG_PROB_CURRENT: log_prob_current, LOG_PROB_NEXT: following[1]}

    def _reference_values(self, here: Tensor, bootstrap: Tensor | None = None) -> dict[str, Tensor]:
        values = {REFERENCE_VALUE: self.reference(here)}
        if self.kind_of_step.bootstraps_reference and bootstrap is not None:
            with torch.no_grad():
                values[REFERENCE_NEXT_VALUE] = self.target_reference(bootstrap)
        return values

    def _values_of_actor(self, inputs: Inputs, noise: Tensor, mean: Tensor, log_std: Tensor) -> dict[str, Tensor]:
        actions, log_prob = squash(mean, log_std, noise)
        q = self.critic(inputs.critic.detach(), actions.unsqueeze(0), frozen=True)[:, 0]
        # Modules of earlier versions have no such setting.
        merit = q.mean(dim=0) if self.model_config.get("actor_q", "min") == "mean" else q.amin(dim=0)
        return {ACTOR_LOG_PROB: log_prob, ACTOR_Q: merit}

    def _proposed_after(
        self, inputs: Inputs, noise: Noise
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """Actions and log-densities of the target, and of the conservative term's proposals at s' if it is on."""
        mean, log_std = self.policy(inputs.bootstrap_policy)
        if noise.following is None:
            return squash(mean, log_std, noise.target), None
        if inputs.next_policy is not None:
            next_mean, next_log_std = self.policy(inputs.next_policy)
            return squash(mean, log_std, noise.target), squash(next_mean, next_log_std, noise.following)
        num_targets = len(noise.target)
        actions, log_prob = squash(mean, log_std, torch.cat([noise.target, noise.following]))
        return (actions[:num_targets], log_prob[:num_targets]), (actions[num_targets:], log_prob[num_targets:])
