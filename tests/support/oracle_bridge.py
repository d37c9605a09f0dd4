"""Puts the oracle's parameters, noise and batch into a learner, and reads the learner's under the oracle's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import torch
from ray.rllib.core.columns import Columns
from small_learners import make_learner

from rllib_calql.learning.learner import CalQLTorchLearner
from rllib_calql.networks.rl_module import CalQLTorchRLModule
from rllib_calql.networks.steps import BOOTSTRAP_DISCOUNT, BOOTSTRAP_OBS, Noise
from rllib_calql.store.replay import IS_OFFLINE

MODULE = "default_policy"


def float64_learner(settings: oracle.Settings, **more: Any) -> CalQLTorchLearner:
    """A learner with the oracle's settings, in double precision."""
    learner = make_learner(
        calibrate=settings.calibrate,
        importance_sampling=settings.importance_sampling,
        lagrangian=settings.lagrangian,
        max_target_backup=settings.max_target_backup,
        deterministic_backup=settings.deterministic_backup,
        num_critics=settings.num_critics,
        num_actions=settings.num_actions,
        temperature=settings.temperature,
        min_q_weight=settings.min_q_weight,
        conservative_gap_clip=settings.gap_clip,
        gamma=settings.gamma,
        tau=settings.tau,
        actor_lr=settings.actor_lr,
        critic_lr=settings.critic_lr,
        alpha_lr=settings.alpha_lr,
        bc_updates=more.get("actor_update_period", 1) if settings.bc else 0,
        actor_q=settings.actor_q,
        conservative_online=settings.learn,
        max_target_backup_online=settings.max_target_backup,
        deterministic_backup_online=settings.deterministic_backup,
        layer_norm=settings.layer_norm,
        bound_uniform_actions=settings.bounds_uniform,
        **more,
    )
    learner._online = not settings.learn  # The conservative term can be switched off in the online phase only.
    module_of(learner).double()
    for scalar in (learner.curr_log_alpha[MODULE], learner.log_alpha_prime):
        scalar.data = scalar.data.double()
    return learner


def module_of(learner: CalQLTorchLearner) -> CalQLTorchRLModule:
    module: CalQLTorchRLModule = learner.module[MODULE]
    return module


def tensors_by_oracle_name(learner: CalQLTorchLearner) -> Iterator[tuple[str, torch.Tensor, int | None, bool]]:
    """Yields (oracle name, parameter, critic index or None, whether the oracle holds it transposed)."""
    module = module_of(learner)
    for i, layer in enumerate(module.policy.layers):
        yield f"policy.layers.{i}.weight", layer.weight, None, True
        yield f"policy.layers.{i}.bias", layer.bias, None, False
    for i, norm in enumerate(module.policy.norms or ()):
        yield f"policy.norms.{i}.scale", norm.weight, None, False
        yield f"policy.norms.{i}.shift", norm.bias, None, False
    yield "policy.head.weight", module.policy.head.weight, None, True
    yield "policy.head.bias", module.policy.head.bias, None, False
    yield "policy.log_std_multiplier", module.policy.log_std_multiplier, None, False
    yield "policy.log_std_offset", module.policy.log_std_offset, None, False
    for prefix, ensemble in (("critic", module.critic), ("target", module.target_critic)):
        last = len(ensemble.weights) - 1
        for c in range(ensemble.num_critics):
            yield f"{prefix}.{c}.obs_weight", ensemble.obs_weight, c, False
            yield f"{prefix}.{c}.action_weight", ensemble.action_weight, c, False
            yield f"{prefix}.{c}.bias0", ensemble.biases[0], c, False
            for i, weight in enumerate(ensemble.weights):
                name = "head" if i == last else f"layers.{i + 1}"
                yield f"{prefix}.{c}.{name}.weight", weight, c, False
                yield f"{prefix}.{c}.{name}.bias", ensemble.biases[i + 1], c, False
            for i, (scale, shift) in enumerate(zip(ensemble.norm_scales, ensemble.norm_shifts, strict=True)):
                yield f"{prefix}.{c}.norms.{i}.scale", scale, c, False
                yield f"{prefix}.{c}.norms.{i}.shift", shift, c, False
    for prefix in ("reference", "target_reference"):
        network = getattr(module, prefix, None)
        if network is None:
            continue
        for i, layer in enumerate(network.layers):
            yield f"{prefix}.layers.{i}.weight", layer.weight, None, True
            yield f"{prefix}.layers.{i}.bias", layer.bias, None, False
        for i, norm in enumerate(network.norms or ()):
            yield f"{prefix}.norms.{i}.scale", norm.weight, None, False
            yield f"{prefix}.norms.{i}.shift", norm.bias, None, False
        yield f"{prefix}.head.weight", network.head.weight, None, True
        yield f"{prefix}.head.bias", network.head.bias, None, False
    yield "log_alpha", learner.curr_log_alpha[MODULE], 0, False
    yield "log_alpha_prime", learner.log_alpha_prime, 0, False


def load_params(learner: CalQLTorchLearner, params: oracle.Params) -> None:
    """Copies the oracle's parameters into the learner, and fails on a name that only one side has."""
    seen = set()
    with torch.no_grad():
        for name, tensor, index, transposed in tensors_by_oracle_name(learner):
            value = torch.from_numpy(params[name].T if transposed else params[name])
            (tensor if index is None else tensor[index]).copy_(value)
            seen.add(name)
    assert seen == set(params)


def read_params(learner: CalQLTorchLearner, *, gradients: bool = False) -> oracle.Params:
    """The learner's parameters, or their gradients (zero where there is none), as the oracle names them."""
    read = {}
    for name, tensor, index, transposed in tensors_by_oracle_name(learner):
        value = tensor
        if gradients:
            value = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
        array = (value if index is None else value[index]).detach().numpy().copy()
        read[name] = array.T if transposed else array
    return read


def assert_params_equal(actual: oracle.Params, expected: oracle.Params) -> None:
    """Compares parameters or gradients, to 1e-8 of the largest number of each."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(np.abs(value).max()), 1e-12)
        np.testing.assert_allclose(actual[name], value, rtol=1e-8, atol=1e-8 * scale, err_msg=name)


def use_noise(learner: CalQLTorchLearner, noise: oracle.Noise) -> None:
    """Makes the next gradient steps use the given random numbers."""
    tensors = {name: torch.from_numpy(value) for name, value in noise.items()}
    shared = Noise(
        actor=tensors["eps_actor"],
        target=tensors["eps_next_target"],
        uniform=tensors["uniform"],
        current=tensors["eps_current"],
        following=tensors["eps_next"],
    )
    module_of(learner).draw_noise = lambda *_: shared  # type: ignore[method-assign]
    subset = torch.from_numpy(noise["subset"].astype(np.int64)) if "subset" in noise else None
    module_of(learner).draw_subset = lambda *_: subset  # type: ignore[method-assign]


def torch_batch(batch: oracle.Batch) -> dict[str, torch.Tensor]:
    """The batch as the learner's columns."""
    is_offline = np.ones(len(batch.rewards)) if batch.is_offline is None else batch.is_offline
    columns = {
        Columns.OBS: torch.from_numpy(batch.obs),
        Columns.NEXT_OBS: torch.from_numpy(batch.next_obs),
        Columns.ACTIONS: torch.from_numpy(batch.actions),
        Columns.REWARDS: torch.from_numpy(batch.rewards),
        Columns.TERMINATEDS: torch.from_numpy(batch.terminateds.astype(np.float64)),
        Columns.RETURNS_TO_GO: torch.from_numpy(batch.returns_to_go),
        IS_OFFLINE: torch.from_numpy(is_offline.astype(np.float64)),
    }
    if batch.bootstrap_obs is not None and batch.bootstrap_discounts is not None:
        columns[BOOTSTRAP_OBS] = torch.from_numpy(batch.bootstrap_obs)
        columns[BOOTSTRAP_DISCOUNT] = torch.from_numpy(batch.bootstrap_discounts)
    return columns
