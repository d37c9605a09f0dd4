"""Float64 NumPy statement of Cal-QL's losses, gradients and one full update, written from the formulas.

It shares no code with `rllib_calql`, uses neither torch nor Ray, and prefers loops over speed: it is what the package
is compared with. Gradients are hand-written reverse mode, proved by finite differences in `test_oracle_self_check.py`.

Axes: `B` batch, `C` critics, `N` actions per source, `M` all sampled actions, `A` action dimension, `T` time.

Parameters are one ordered dict name -> float64 array (weights `[in, out]`, scalars of shape `()`). Gradients have the
same names:

    policy.layers.{i}.weight / .bias, policy.head.weight / .bias       head gives concat(mean, raw log-std), [2A]
    policy.log_std_multiplier, policy.log_std_offset
    critic.{c}.obs_weight, .action_weight, .bias0                      first layer, split by input
    critic.{c}.layers.{i}.weight / .bias (i from 1), critic.{c}.head.weight / .bias
    policy.norms.{i}.scale / .shift, critic.{c}.norms.{i}.scale / .shift      of hidden layer i, where it is normalised
    target.{c}. ...                                                    the same as critic.{c}.; gradients are zero
    reference.layers.{i}.weight / .bias, reference.head.weight / .bias, reference.norms.{i}.scale / .shift
    target_reference. ...                                              V(s) where it is learned; likewise
    log_alpha, log_alpha_prime

Source: Nakamoto et al. 2023, arXiv:2303.05479; Kumar et al. 2020, arXiv:2006.04779 (regulariser, Lagrangian);
Haarnoja et al. 2018, arXiv:1812.05905 (actor, temperature); Kingma and Ba 2014, arXiv:1412.6980 (Adam);
Ba et al. 2016, arXiv:1607.06450 (layer norm).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Params = dict[str, Array]
Noise = dict[str, Array]

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
LAYER_NORM_EPS = 1e-5
ALPHA_PRIME_MAX = 1e6
DATA_ACTION_LIMIT = 0.99999


@dataclass(frozen=True)
class Settings:
    """Settings of one update.

    `learn` switches the conservative term: without it the critic loss is the TD error alone and the Lagrange
    multiplier is neither trained nor stepped. `bc` replaces the actor's Q term by the log-prob of the data actions.
    `bc_weight` adds -log-prob of the offline rows' actions. Without `moves_actor` policy and temperature stay. The
    critics of the target's minimum are those of `noise["subset"]`, or all.
    `reference` is what bounds offline rows and what bounds online ones: "column" (`returns_to_go` of the batch),
    "learned" (the network `reference`), "quantile" (the number of that name) or "none". The network is fitted to the
    column or, with `reference_td`, by temporal differences; on all rows or, with `fits_offline`, on offline ones.
    `bounds_uniform` calibrates uniform actions too; `penalty` is tau of the other form of calibration, None: max.
    `layer_norm` (both networks, "actor" or "critic") shapes random cases; losses follow the parameters they are given.
    """

    calibrate: bool = True
    importance_sampling: bool = True
    lagrangian: bool = False
    lagrangian_thresh: float = 0.8
    max_target_backup: bool = True
    deterministic_backup: bool = True
    num_critics: int = 2
    num_actions: int = 4
    temperature: float = 1.0
    min_q_weight: float = 5.0
    gap_clip: tuple[float, float] = (-math.inf, math.inf)
    gamma: float = 0.99
    tau: float = 5e-3
    actor_lr: float = 1e-4
    critic_lr: float = 3e-4
    alpha_lr: float = 1e-4
    target_entropy: float = -2.0
    learn: bool = True
    bc: bool = False
    actor_q: str = "min"
    bc_weight: float = 0.0
    moves_actor: bool = True
    layer_norm: bool | str = False
    reference: tuple[str, str] = ("column", "column")
    has_reference: bool = False
    reference_td: bool = False
    fits_offline: bool = True
    quantile: float = 0.0
    bounds_uniform: bool = False
    penalty: float | None = None
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8


@dataclass(frozen=True)
class Batch:
    """Transitions: `obs`, `next_obs` [B, obs]; `actions` [B, A]; the others [B]; `terminateds` holds 0 or 1.

    `is_offline` holds 0 or 1, None: all 1. With targets of several steps `rewards` are sums, `terminateds` that of the
    last step, `bootstrap_obs` [B, obs] the observation after it, and `bootstrap_discounts` its discount.
    """

    obs: Array
    actions: Array
    rewards: Array
    next_obs: Array
    terminateds: Array
    returns_to_go: Array
    is_offline: Array | None = None
    bootstrap_obs: Array | None = None
    bootstrap_discounts: Array | None = None


@dataclass(frozen=True)
class PolicyPass:
    """One forward pass of the policy: `mean`, `log_std` [B, A], and what its backward pass needs.

    `sums` are what hidden layers add up, before normalisation and activation.
    """

    layer_inputs: list[Array]
    sums: list[Array]
    mean: Array
    raw: Array
    unclipped: Array
    log_std: Array


@dataclass(frozen=True)
class CriticPass:
    """One forward pass of one critic: `q` [B], and what its backward pass needs."""

    obs: Array
    actions: Array
    sums: list[Array]
    hiddens: list[Array]
    q: Array


@dataclass(frozen=True)
class SampledAction:
    """One action per transition, constant for the critic; `source` is "uniform", "next" or "current"."""

    source: str
    actions: Array
    log_density: Array


@dataclass(frozen=True)
class CriticLoss:
    """Critic terms: `td`, `gap`, `penalty` [C, B] unreduced; `q_data` [C, B]; `per_critic` [C]; `total` their sum.

    `calibrated_next` and `calibrated_current` [C, N, B] tell where `Q < V`, so that the maximum takes V.
    """

    td: Array
    gap: Array
    penalty: Array
    q_data: Array
    per_critic: Array
    total: float
    calibrated_next: npt.NDArray[np.bool_]
    calibrated_current: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class AdamState:
    """Adam's state of one parameter."""

    step: int
    first_moment: Array
    second_moment: Array


OptState = dict[str, AdamState]


# Layer norm, of networks whose parameters hold one


def _normalised(params: Params, name: str, sums: Array) -> Array:
    """Return the sums [B, H] of a hidden layer, each row normalised, scaled and shifted, if the layer has a norm."""
    if f"{name}.scale" not in params:
        return sums
    return _standardised(sums)[0] * params[f"{name}.scale"] + params[f"{name}.shift"]


def _through_norm(params: Params, name: str, sums: Array, grad: Array, grads: Params) -> Array:
    """Return the gradient of the sums, given that of what the norm makes of them; add those of scale and shift."""
    if f"{name}.scale" not in params:
        return grad
    standardised, deviations = _standardised(sums)
    grads[f"{name}.scale"] = (grad * standardised).sum(axis=0)
    grads[f"{name}.shift"] = grad.sum(axis=0)
    # The Jacobian of x^ = (x - mean) / deviation is (I - 1/H - x^ x^T / H) / deviation in every row.
    size = sums.shape[1]
    outer = standardised[:, :, None] * standardised[:, None, :]
    jacobians = (np.eye(size) - 1.0 / size - outer / size) / deviations[:, None, None]
    return np.asarray(np.einsum("bij,bj->bi", jacobians, grad * params[f"{name}.scale"]))


def _standardised(sums: Array) -> tuple[Array, Array]:
    """Return (x - mean) / deviation of every row [B, H], and the deviations [B]."""
    deviations = np.sqrt(np.var(sums, axis=1) + LAYER_NORM_EPS)
    return (sums - sums.mean(axis=1)[:, None]) / deviations[:, None], deviations


# Policy


def policy_forward(params: Params, obs: Array) -> PolicyPass:
    """Return mean and clipped log standard deviation at `obs`."""
    inputs, sums = [obs], []
    for i in range(_num_layers(params, "policy", first=0)):
        sums.append(inputs[-1] @ params[f"policy.layers.{i}.weight"] + params[f"policy.layers.{i}.bias"])
        inputs.append(np.maximum(_normalised(params, f"policy.norms.{i}", sums[-1]), 0.0))
    head = inputs[-1] @ params["policy.head.weight"] + params["policy.head.bias"]
    mean, raw = np.split(head, 2, axis=1)
    unclipped = params["policy.log_std_multiplier"] * raw + params["policy.log_std_offset"]
    return PolicyPass(inputs, sums, mean, raw, unclipped, np.clip(unclipped, LOG_STD_MIN, LOG_STD_MAX))


def policy_backward(params: Params, policy: PolicyPass, grad_mean: Array, grad_log_std: Array) -> Params:
    """Return the gradient of every policy parameter, given those of mean and log-std [B, A]."""
    inside = (policy.unclipped >= LOG_STD_MIN) & (policy.unclipped <= LOG_STD_MAX)
    grad_unclipped = grad_log_std * inside
    grads: Params = {
        "policy.log_std_multiplier": np.asarray(np.sum(grad_unclipped * policy.raw)),
        "policy.log_std_offset": np.asarray(np.sum(grad_unclipped)),
    }
    grad = np.concatenate([grad_mean, grad_unclipped * params["policy.log_std_multiplier"]], axis=1)
    names = [f"policy.layers.{i}" for i in range(len(policy.sums))] + ["policy.head"]
    for i, name in reversed(list(enumerate(names))):
        inputs = policy.layer_inputs[i]
        grads[f"{name}.weight"] = inputs.T @ grad
        grads[f"{name}.bias"] = grad.sum(axis=0)
        if i > 0:
            grad = (grad @ params[f"{name}.weight"].T) * (inputs > 0)
            grad = _through_norm(params, f"policy.norms.{i - 1}", policy.sums[i - 1], grad, grads)
    return grads


def sample_actions(policy: PolicyPass, eps: Array) -> tuple[Array, Array]:
    """Return `tanh(mean + std * eps)` [B, A] and its log-prob [B]."""
    z = policy.mean + np.exp(policy.log_std) * eps
    return np.tanh(z), _tanh_gaussian_log_prob(z, eps, policy.log_std)


def data_log_prob(policy: PolicyPass, actions: Array) -> Array:
    """Return the log-prob [B] of given `actions`, which are clipped to +-0.99999."""
    z = np.arctanh(np.clip(actions, -DATA_ACTION_LIMIT, DATA_ACTION_LIMIT))
    return _tanh_gaussian_log_prob(z, (z - policy.mean) / np.exp(policy.log_std), policy.log_std)


def _tanh_gaussian_log_prob(z: Array, eps: Array, log_std: Array) -> Array:
    log_one_minus_tanh_squared = 2.0 * (math.log(2.0) - z - np.logaddexp(0.0, -2.0 * z))
    per_dim = -0.5 * eps**2 - log_std - 0.5 * math.log(2.0 * math.pi) - log_one_minus_tanh_squared
    return np.asarray(per_dim.sum(axis=1))


# Critics


def critic_forward(params: Params, name: str, obs: Array, actions: Array) -> CriticPass:
    """Return Q [B] of the critic called `name`, such as "critic.0" or "target.1"."""
    first = obs @ params[f"{name}.obs_weight"] + actions @ params[f"{name}.action_weight"] + params[f"{name}.bias0"]
    sums = [first]
    hiddens = [np.maximum(_normalised(params, f"{name}.norms.0", first), 0.0)]
    for i in range(1, 1 + _num_layers(params, name, first=1)):
        sums.append(hiddens[-1] @ params[f"{name}.layers.{i}.weight"] + params[f"{name}.layers.{i}.bias"])
        hiddens.append(np.maximum(_normalised(params, f"{name}.norms.{i}", sums[-1]), 0.0))
    q = hiddens[-1] @ params[f"{name}.head.weight"] + params[f"{name}.head.bias"]
    return CriticPass(obs, actions, sums, hiddens, q[:, 0])


def critic_backward(params: Params, name: str, critic: CriticPass, grad_q: Array) -> tuple[Params, Array]:
    """Return the gradient of the critic's parameters and of its actions [B, A], given that of Q [B]."""
    grads: Params = {}
    grad = grad_q[:, None]
    layers = [f"{name}.layers.{i}" for i in range(1, len(critic.hiddens))] + [f"{name}.head"]
    for i, layer in reversed(list(enumerate(layers))):
        inputs = critic.hiddens[i]
        grads[f"{layer}.weight"] = inputs.T @ grad
        grads[f"{layer}.bias"] = grad.sum(axis=0)
        grad = (grad @ params[f"{layer}.weight"].T) * (inputs > 0)
        grad = _through_norm(params, f"{name}.norms.{i}", critic.sums[i], grad, grads)
    grads[f"{name}.obs_weight"] = critic.obs.T @ grad
    grads[f"{name}.action_weight"] = critic.actions.T @ grad
    grads[f"{name}.bias0"] = grad.sum(axis=0)
    return grads, grad @ params[f"{name}.action_weight"].T


# The reference value


@dataclass(frozen=True)
class ValuePass:
    """One forward pass of V: `v` [B], and what its backward pass needs."""

    layer_inputs: list[Array]
    sums: list[Array]
    v: Array


def value_forward(params: Params, name: str, obs: Array) -> ValuePass:
    """Return V [B] of the network called `name`, "reference" or "target_reference"."""
    inputs, sums = [obs], []
    for i in range(_num_layers(params, name, first=0)):
        sums.append(inputs[-1] @ params[f"{name}.layers.{i}.weight"] + params[f"{name}.layers.{i}.bias"])
        inputs.append(np.maximum(_normalised(params, f"{name}.norms.{i}", sums[-1]), 0.0))
    head = inputs[-1] @ params[f"{name}.head.weight"] + params[f"{name}.head.bias"]
    return ValuePass(inputs, sums, head[:, 0])


def value_backward(params: Params, name: str, value: ValuePass, grad_v: Array) -> Params:
    """Return the gradient of the network's parameters, given that of V [B]."""
    grads: Params = {}
    grad = grad_v[:, None]
    names = [f"{name}.layers.{i}" for i in range(len(value.sums))] + [f"{name}.head"]
    for i, layer in reversed(list(enumerate(names))):
        grads[f"{layer}.weight"] = value.layer_inputs[i].T @ grad
        grads[f"{layer}.bias"] = grad.sum(axis=0)
        if i > 0:
            grad = (grad @ params[f"{layer}.weight"].T) * (value.layer_inputs[i] > 0)
            grad = _through_norm(params, f"{name}.norms.{i - 1}", value.sums[i - 1], grad, grads)
    return grads


def _is_offline(batch: Batch) -> Array:
    return np.ones(len(batch.rewards)) if batch.is_offline is None else batch.is_offline


def reference_values(params: Params, batch: Batch, settings: Settings) -> Array:
    """Return what bounds each row [B]; minus infinity where nothing does."""
    values = {
        "column": batch.returns_to_go,
        "quantile": np.full(len(batch.rewards), settings.quantile),
        "none": np.full(len(batch.rewards), -math.inf),
    }
    if settings.has_reference:
        values["learned"] = value_forward(params, "reference", batch.obs).v
    offline, online = (values[name] for name in settings.reference)
    return np.array([offline[b] if flag else online[b] for b, flag in enumerate(_is_offline(batch))])


def reference_loss(params: Params, batch: Batch, settings: Settings) -> float:
    """Return mean (V - target)^2 over the rows that V is fitted to."""
    return _reference_loss_and_grads(params, batch, settings)[0]


def _reference_loss_and_grads(params: Params, batch: Batch, settings: Settings) -> tuple[float, float, Params]:
    """Return mean (V - target)^2 and mean V - G over the rows that V is fitted to, and the gradient of the former."""
    value = value_forward(params, "reference", batch.obs)
    rows = np.flatnonzero(_is_offline(batch)) if settings.fits_offline else np.arange(len(batch.rewards))
    loss = gap = 0.0
    grad = np.zeros_like(value.v)
    after = batch.next_obs if batch.bootstrap_obs is None else batch.bootstrap_obs
    for b in rows:
        aim = batch.returns_to_go[b]
        if settings.reference_td:
            discount = settings.gamma if batch.bootstrap_discounts is None else batch.bootstrap_discounts[b]
            following = value_forward(params, "target_reference", after).v[b]
            aim = batch.rewards[b] + discount * (1.0 - batch.terminateds[b]) * following
        loss += (value.v[b] - aim) ** 2 / len(rows)
        grad[b] = 2.0 * (value.v[b] - aim) / len(rows)
        gap += (value.v[b] - batch.returns_to_go[b]) / len(rows)
    return loss, gap, value_backward(params, "reference", value, grad)


def target(params: Params, batch: Batch, noise: Noise, settings: Settings) -> Array:
    """Return the TD target y [B]; the proposal is chosen by the smallest target Q, before entropy is subtracted."""
    after = batch.next_obs if batch.bootstrap_obs is None else batch.bootstrap_obs
    policy = policy_forward(params, after)
    num_proposals = settings.num_actions if settings.max_target_backup else 1
    members = noise["subset"].astype(int) if "subset" in noise else np.arange(settings.num_critics)
    if len(noise["eps_next_target"]) != num_proposals:
        raise ValueError(f"`eps_next_target` must hold {num_proposals} draws, got {len(noise['eps_next_target'])}.")
    min_q, log_probs = [], []
    for eps in noise["eps_next_target"]:
        actions, log_prob = sample_actions(policy, eps)
        qs = [critic_forward(params, f"target.{c}", after, actions).q for c in members]
        min_q.append(np.min(qs, axis=0))
        log_probs.append(log_prob)
    y = np.empty_like(batch.rewards)
    for b in range(len(y)):
        best = int(np.argmax([q[b] for q in min_q]))
        value = min_q[best][b]
        if not settings.deterministic_backup:
            value = value - np.exp(params["log_alpha"]) * log_probs[best][b]
        discount = settings.gamma if batch.bootstrap_discounts is None else batch.bootstrap_discounts[b]
        y[b] = batch.rewards[b] + discount * (1.0 - batch.terminateds[b]) * value
    return y


def sampled_actions(params: Params, batch: Batch, noise: Noise, settings: Settings) -> list[SampledAction]:
    """Return the M = 3N actions of the regulariser: N uniform, then N proposed at s', then N proposed at s."""
    at_obs = policy_forward(params, batch.obs)
    at_next_obs = policy_forward(params, batch.next_obs)
    uniform, following, current = [], [], []
    for n in range(settings.num_actions):
        actions = noise["uniform"][n]
        log_density = np.full(len(actions), -actions.shape[1] * math.log(2.0))
        uniform.append(SampledAction("uniform", actions, log_density))
        following.append(SampledAction("next", *sample_actions(at_next_obs, noise["eps_next"][n])))
        current.append(SampledAction("current", *sample_actions(at_obs, noise["eps_current"][n])))
    return uniform + following + current


def critic_loss(params: Params, batch: Batch, noise: Noise, settings: Settings) -> CriticLoss:
    """Return the critic terms; `total` is the sum over critics of L_c."""
    return _critic_loss_and_grads(params, batch, noise, settings)[0]


def _critic_loss_and_grads(params: Params, batch: Batch, noise: Noise, settings: Settings) -> tuple[CriticLoss, Params]:
    y = target(params, batch, noise, settings)
    samples = sampled_actions(params, batch, noise, settings)
    batch_size = len(y)
    grads: Params = {}
    tds, gaps, penalties, q_datas, per_critic, below = [], [], [], [], [], []
    values = reference_values(params, batch, settings)
    weight, thresh = _conservative_weight(params, settings)
    for c in range(settings.num_critics):
        name = f"critic.{c}"
        data = critic_forward(params, name, batch.obs, batch.actions)
        passes = [critic_forward(params, name, batch.obs, sample.actions) for sample in samples]
        gap, grad_gap_data, grad_gap_samples = _gap_and_grads(data.q, passes, samples, values, settings)
        penalty = np.zeros_like(gap)
        if settings.penalty is not None and settings.calibrate:
            penalty = _add_penalty(data.q, passes, samples, values, settings, grad_gap_data, grad_gap_samples)
        td = (data.q - y) ** 2
        grad_data = (2.0 * (data.q - y) + weight * grad_gap_data) / batch_size
        _accumulate(grads, critic_backward(params, name, data, grad_data)[0])
        for sampled, grad_gap in zip(passes, grad_gap_samples, strict=True):
            _accumulate(grads, critic_backward(params, name, sampled, weight * grad_gap / batch_size)[0])
        tds.append(td)
        gaps.append(gap)
        penalties.append(penalty)
        q_datas.append(data.q)
        conservative = weight * ((gap + penalty).mean() - thresh) if settings.learn else 0.0
        per_critic.append(td.mean() + conservative)
        below.append([sampled.q < values for sampled in passes])
    calibrated = np.asarray(below)
    n = settings.num_actions
    loss = CriticLoss(
        td=np.asarray(tds),
        gap=np.asarray(gaps),
        penalty=np.asarray(penalties),
        q_data=np.asarray(q_datas),
        per_critic=np.asarray(per_critic),
        total=float(np.sum(per_critic)),
        calibrated_next=calibrated[:, n : 2 * n],
        calibrated_current=calibrated[:, 2 * n :],
    )
    return loss, grads


def _gap_and_grads(
    q_data: Array, passes: Sequence[CriticPass], samples: Sequence[SampledAction], values: Array, settings: Settings
) -> tuple[Array, Array, list[Array]]:
    """Return gap [B] of one critic, its derivative by Q(s, a) [B] and by the Q of each sampled action, M times [B]."""
    temperature = settings.temperature
    gap, grad_data = np.empty_like(q_data), np.empty_like(q_data)
    grad_samples = [np.empty_like(q_data) for _ in passes]
    for b in range(len(q_data)):
        x, slope = [], []
        for sampled, sample in zip(passes, samples, strict=True):
            q = sampled.q[b]
            is_bound = settings.calibrate and settings.penalty is None and _is_calibrated(sample, settings)
            replaced = is_bound and q < values[b]
            entry = values[b] if replaced else q
            x.append(entry - sample.log_density[b] if settings.importance_sampling else entry)
            slope.append(0.0 if replaced else 1.0)
        if not settings.importance_sampling:
            x.append(q_data[b])
        scaled = np.asarray(x) / temperature
        log_sum_exp = scaled.max() + math.log(np.exp(scaled - scaled.max()).sum())
        softmax = np.exp(scaled - log_sum_exp)
        unclipped = temperature * log_sum_exp - q_data[b]
        low, high = settings.gap_clip
        gap[b] = min(max(unclipped, low), high)
        inside = 1.0 if low <= unclipped <= high else 0.0
        for m in range(len(passes)):
            grad_samples[m][b] = inside * softmax[m] * slope[m]
        grad_data[b] = inside * ((0.0 if settings.importance_sampling else softmax[-1]) - 1.0)
    return gap, grad_data, grad_samples


def _is_calibrated(sample: SampledAction, settings: Settings) -> bool:
    return settings.bounds_uniform or sample.source != "uniform"


def _add_penalty(
    q_data: Array,
    passes: Sequence[CriticPass],
    samples: Sequence[SampledAction],
    values: Array,
    settings: Settings,
    grad_data: Array,
    grad_samples: list[Array],
) -> Array:
    """Return tau mean_m max(Q_m - V, 0) (Q_m - Q_data) [B], and add its derivatives to those of the gap."""
    assert settings.penalty is not None
    calibrated = [m for m, sample in enumerate(samples) if _is_calibrated(sample, settings)]
    share = settings.penalty / len(calibrated)
    penalty = np.zeros_like(q_data)
    for b in range(len(q_data)):
        for m in calibrated:
            q = passes[m].q[b]
            if q <= values[b] or values[b] == -math.inf:
                continue
            penalty[b] += share * (q - values[b]) * (q - q_data[b])
            grad_samples[m][b] += share * ((q - q_data[b]) + (q - values[b]))
            grad_data[b] -= share * (q - values[b])
    return penalty


def alpha_prime(params: Params) -> float:
    """Return the Lagrange multiplier `clip(exp(log_alpha_prime), 0, 1e6)`."""
    return float(np.clip(np.exp(params["log_alpha_prime"]), 0.0, ALPHA_PRIME_MAX))


def _conservative_weight(params: Params, settings: Settings) -> tuple[float, float]:
    """Return the factor of the mean gap in L_c and the threshold subtracted from the mean gap."""
    if not settings.learn:
        return 0.0, 0.0
    if settings.lagrangian:
        return alpha_prime(params) * settings.min_q_weight, settings.lagrangian_thresh
    return settings.min_q_weight, 0.0


# Actor, temperature, Lagrange multiplier


def actor_loss(params: Params, batch: Batch, noise: Noise, settings: Settings) -> float:
    """Return mean(alpha log pi(a|s) - min_c Q_c(s, a)); with `bc`, log pi of the data actions in place of Q."""
    return _actor_loss_and_grads(params, batch, noise, settings)[0]


def _actor_loss_and_grads(params: Params, batch: Batch, noise: Noise, settings: Settings) -> tuple[float, Params]:
    policy = policy_forward(params, batch.obs)
    eps, std = noise["eps_actor"], np.exp(policy.log_std)
    actions, log_prob = sample_actions(policy, eps)
    alpha = float(np.exp(params["log_alpha"]))
    batch_size = len(actions)
    # At fixed eps, d log pi / dz = 2 tanh(z) and log_std enters once more directly, with slope -1.
    grad_z = alpha * 2.0 * actions
    grad_mean, grad_log_std = np.zeros_like(actions), np.full_like(actions, -alpha)
    if settings.bc:
        merit = data_log_prob(policy, batch.actions)
        z_data = np.arctanh(np.clip(batch.actions, -DATA_ACTION_LIMIT, DATA_ACTION_LIMIT))
        eps_data = (z_data - policy.mean) / std
        grad_mean -= eps_data / std
        grad_log_std -= eps_data**2 - 1.0
    else:
        names = [f"critic.{c}" for c in range(settings.num_critics)]
        passes = [critic_forward(params, name, batch.obs, actions) for name in names]
        qs = np.asarray([critic.q for critic in passes])
        merit = qs.min(axis=0) if settings.actor_q == "min" else qs.mean(axis=0)
        for c, name in enumerate(names):
            share = (qs.argmin(axis=0) == c).astype(np.float64)
            if settings.actor_q == "mean":
                share = np.full(batch_size, 1.0 / settings.num_critics)
            grad_actions = critic_backward(params, name, passes[c], share)[1]
            grad_z -= grad_actions * (1.0 - actions**2)
    grad_mean = (grad_mean + grad_z) / batch_size
    grad_log_std = (grad_log_std + grad_z * std * eps) / batch_size
    loss = float(np.mean(alpha * log_prob - merit))
    if settings.bc_weight and not settings.bc:
        is_offline = np.ones(batch_size) if batch.is_offline is None else batch.is_offline
        imitated = np.flatnonzero(is_offline)
        likelihood = data_log_prob(policy, batch.actions)
        z_data = np.arctanh(np.clip(batch.actions, -DATA_ACTION_LIMIT, DATA_ACTION_LIMIT))
        eps_data = (z_data - policy.mean) / std
        for b in imitated:
            loss -= settings.bc_weight * likelihood[b] / len(imitated)
            grad_mean[b] -= settings.bc_weight * eps_data[b] / std[b] / len(imitated)
            grad_log_std[b] -= settings.bc_weight * (eps_data[b] ** 2 - 1.0) / len(imitated)
    return loss, policy_backward(params, policy, grad_mean, grad_log_std)


def actor_log_prob(params: Params, batch: Batch, noise: Noise) -> Array:
    """Return log pi(a|s) [B] of the actor's reparameterised actions."""
    return sample_actions(policy_forward(params, batch.obs), noise["eps_actor"])[1]


def alpha_loss(params: Params, batch: Batch, noise: Noise, settings: Settings) -> float:
    """Return -log_alpha * mean(log pi(a|s) + target_entropy)."""
    entropy_error = np.mean(actor_log_prob(params, batch, noise) + settings.target_entropy)
    return float(-params["log_alpha"] * entropy_error)


def lagrange_loss(params: Params, batch: Batch, noise: Noise, settings: Settings) -> float:
    """Return -1/2 sum_c alpha' w (mean gap_c - lagrangian_thresh), or 0 when the multiplier is not trained."""
    if not (settings.lagrangian and settings.learn):
        return 0.0
    loss = critic_loss(params, batch, noise, settings)
    excess = (loss.gap + loss.penalty).mean(axis=1) - settings.lagrangian_thresh
    return float(-0.5 * alpha_prime(params) * settings.min_q_weight * excess.sum())


# Gradients and one full update


def gradients(params: Params, batch: Batch, noise: Noise, settings: Settings) -> Params:
    """Return every gradient at the same parameters, each block from its own loss only; zeros where there is none."""
    grads = {name: np.zeros_like(value) for name, value in params.items()}
    _accumulate(grads, _critic_loss_and_grads(params, batch, noise, settings)[1])
    if settings.moves_actor:
        _accumulate(grads, _actor_loss_and_grads(params, batch, noise, settings)[1])
        entropy_error = np.mean(actor_log_prob(params, batch, noise) + settings.target_entropy)
        grads["log_alpha"] = np.asarray(-entropy_error)
    if settings.has_reference:
        _accumulate(grads, _reference_loss_and_grads(params, batch, settings)[2])
    if np.exp(params["log_alpha_prime"]) <= ALPHA_PRIME_MAX:
        # alpha' is exp(log_alpha'), its own derivative.
        grads["log_alpha_prime"] = np.asarray(lagrange_loss(params, batch, noise, settings))
    return grads


def initial_opt_state(params: Params) -> OptState:
    """Return Adam's state before the first step, for every parameter but the targets."""
    return {
        name: AdamState(0, np.zeros_like(value), np.zeros_like(value))
        for name, value in params.items()
        if not name.startswith("target")
    }


def adam_step(param: Array, grad: Array, state: AdamState, lr: float, settings: Settings) -> tuple[Array, AdamState]:
    """Return one parameter and its state after one step of Adam."""
    beta1, beta2 = settings.adam_betas
    step = state.step + 1
    first = beta1 * state.first_moment + (1.0 - beta1) * grad
    second = beta2 * state.second_moment + (1.0 - beta2) * grad**2
    corrected_first, corrected_second = first / (1.0 - beta1**step), second / (1.0 - beta2**step)
    moved = param - lr * corrected_first / (np.sqrt(corrected_second) + settings.adam_eps)
    return np.asarray(moved), AdamState(step, np.asarray(first), np.asarray(second))


def full_update(
    params: Params, opt_state: OptState, batch: Batch, noise: Noise, settings: Settings
) -> tuple[Params, OptState, dict[str, float]]:
    """Return parameters, optimiser state and metrics after one update: gradients, then Adam, then targets."""
    grads = gradients(params, batch, noise, settings)
    metrics = _metrics(params, batch, noise, settings)
    new_params, new_state = dict(params), dict(opt_state)
    for name, state in opt_state.items():
        if name == "log_alpha_prime" and not (settings.lagrangian and settings.learn):
            continue
        if (name == "log_alpha" or name.startswith("policy.")) and not settings.moves_actor:
            continue
        lr = settings.critic_lr
        if name == "log_alpha":
            lr = settings.alpha_lr
        elif name.startswith("policy."):
            lr = settings.actor_lr
        new_params[name], new_state[name] = adam_step(params[name], grads[name], state, lr, settings)
    for name in params:
        if name.startswith("target."):
            online = new_params["critic." + name.removeprefix("target.")]
            new_params[name] = (1.0 - settings.tau) * params[name] + settings.tau * online
        elif name.startswith("target_reference."):
            online = new_params[name.removeprefix("target_")]
            new_params[name] = (1.0 - settings.tau) * params[name] + settings.tau * online
    return new_params, new_state, metrics


def _metrics(params: Params, batch: Batch, noise: Noise, settings: Settings) -> dict[str, float]:
    critic = critic_loss(params, batch, noise, settings)
    metrics = {
        "critic_loss": critic.total,
        "actor_loss": actor_loss(params, batch, noise, settings),
        "alpha_loss": alpha_loss(params, batch, noise, settings),
        "lagrange_loss": lagrange_loss(params, batch, noise, settings),
        "alpha": float(np.exp(params["log_alpha"])),
        "alpha_prime": alpha_prime(params),
        "log_prob_mean": float(actor_log_prob(params, batch, noise).mean()),
        "target_mean": float(target(params, batch, noise, settings).mean()),
        "calibrated_next": float(critic.calibrated_next.mean()),
        "calibrated_current": float(critic.calibrated_current.mean()),
    }
    if settings.has_reference:
        metrics["reference_loss"], metrics["reference_gap"], _ = _reference_loss_and_grads(params, batch, settings)
    for c in range(settings.num_critics):
        metrics[f"penalty.{c}"] = float(critic.penalty[c].mean())
        metrics[f"td_loss.{c}"] = float(critic.td[c].mean())
        metrics[f"gap.{c}"] = float(critic.gap[c].mean())
        metrics[f"q_data.{c}"] = float(critic.q_data[c].mean())
    return metrics


def _accumulate(totals: Params, grads: Params) -> None:
    for name, grad in grads.items():
        totals[name] = totals[name] + grad if name in totals else grad


def _num_layers(params: Params, name: str, *, first: int) -> int:
    count = 0
    while f"{name}.layers.{first + count}.weight" in params:
        count += 1
    return count


# Returns-to-go


def returns_to_go(
    rewards: Sequence[float],
    gamma: float,
    *,
    terminated: bool,
    truncated: bool,
    truncation: str = "none",
    bootstrap_value: float = 0.0,
    env_rewards: Sequence[float] | None = None,
    failure_reward: float | None = None,
    reward_scale: float = 1.0,
    reward_bias: float = 0.0,
    relative_tolerance: float = 1e-6,
) -> Array:
    """Return G_t [T] in float64 for one whole episode, as explicit double sums.

    Args:
        rewards: Rewards of the episode, already scaled and biased, length T.
        gamma: Discount.
        terminated: Whether the last step terminated; it then has no tail, truncated or not.
        truncated: Whether the last step was cut.
        truncation: Tail of a cut episode: "none" (nothing), "steady" (the last reward goes on for ever) or
            "bootstrap" (`bootstrap_value`).
        bootstrap_value: Value estimate of the last observation, in scaled units.
        env_rewards: The same rewards in environment units, needed for the failure test only.
        failure_reward: In environment units. If every entry of `env_rewards` equals it, every G_t is
            `(reward_scale * failure_reward + reward_bias) / (1 - gamma)`, however the episode ended.
        reward_scale: Scale already applied to `rewards`.
        reward_bias: Bias already applied to `rewards`.
        relative_tolerance: Of the failure test; with `failure_reward=0` it means exactly 0.

    Raises:
        ValueError: The episode ends neither terminated nor truncated, `truncation` is unknown, or `failure_reward`
            is set without `env_rewards`.
    """
    if not (terminated or truncated):
        raise ValueError("The episode ends neither terminated nor truncated; mark its last step.")
    if truncation not in ("none", "steady", "bootstrap"):
        raise ValueError(f'`truncation` must be "none", "steady" or "bootstrap", got {truncation!r}.')
    length = len(rewards)
    if failure_reward is not None:
        if env_rewards is None:
            raise ValueError("`failure_reward` is set but `env_rewards` is None; pass the unscaled rewards.")
        if all(math.isclose(reward, failure_reward, rel_tol=relative_tolerance) for reward in env_rewards):
            return np.full(length, (reward_scale * failure_reward + reward_bias) / (1.0 - gamma))
    after_the_end = 0.0
    if not terminated and truncation == "steady":
        after_the_end = rewards[-1] / (1.0 - gamma)
    elif not terminated and truncation == "bootstrap":
        after_the_end = bootstrap_value
    returns = np.empty(length)
    for t in range(length):
        total = 0.0
        for k in range(t, length):
            total += gamma ** (k - t) * rewards[k]
        returns[t] = total + gamma ** (length - t) * after_the_end
    return returns


# Random cases


def random_params(
    seed: int,
    *,
    obs_dim: int,
    action_dim: int,
    num_critics: int,
    hiddens: Sequence[int] = (16, 16),
    layer_norm: bool | str = False,
    has_reference: bool = False,
) -> Params:
    """Return random parameters, scaled normal with non-zero biases, exactly representable in float32.

    Args:
        seed: Of the random numbers. Those of layer norms are drawn last, so that they change no others.
        obs_dim: Size of an observation.
        action_dim: A.
        num_critics: C.
        hiddens: Widths of hidden layers.
        layer_norm: Whether hidden layers are normalised, in both networks, or "actor" or "critic" for one of them.
        has_reference: Whether there is a network V, drawn from other random numbers.
    """
    rng = np.random.default_rng(seed)
    params: Params = {}

    def dense(name: str, fan_in: int, fan_out: int) -> None:
        params[f"{name}.weight"] = rng.normal(size=(fan_in, fan_out)) / math.sqrt(fan_in)
        params[f"{name}.bias"] = 0.3 * rng.normal(size=fan_out)

    sizes = [obs_dim, *hiddens]
    for i in range(len(hiddens)):
        dense(f"policy.layers.{i}", sizes[i], sizes[i + 1])
    dense("policy.head", sizes[-1], 2 * action_dim)
    params["policy.log_std_multiplier"] = np.asarray(0.9)
    params["policy.log_std_offset"] = np.asarray(-0.8)
    for group in ("critic", "target"):
        for c in range(num_critics):
            name, fan_in = f"{group}.{c}", obs_dim + action_dim
            params[f"{name}.obs_weight"] = 1.5 * rng.normal(size=(obs_dim, hiddens[0])) / math.sqrt(fan_in)
            params[f"{name}.action_weight"] = 1.5 * rng.normal(size=(action_dim, hiddens[0])) / math.sqrt(fan_in)
            params[f"{name}.bias0"] = 0.3 * rng.normal(size=hiddens[0])
            for i in range(1, len(hiddens)):
                dense(f"{name}.layers.{i}", hiddens[i - 1], hiddens[i])
            dense(f"{name}.head", hiddens[-1], 1)
    params["log_alpha"] = np.asarray(-0.5)
    params["log_alpha_prime"] = np.asarray(0.4)
    critics = [f"{group}.{c}" for group in ("critic", "target") for c in range(num_critics)]
    for name in {False: [], True: ["policy", *critics], "actor": ["policy"], "critic": critics}[layer_norm]:
        for i, width in enumerate(hiddens):
            params[f"{name}.norms.{i}.scale"] = 1.0 + 0.4 * rng.normal(size=width)
            params[f"{name}.norms.{i}.shift"] = 0.3 * rng.normal(size=width)
    rng = np.random.default_rng([seed, 2])
    for name in ("reference", "target_reference") if has_reference else ():
        for i in range(len(hiddens)):
            dense(f"{name}.layers.{i}", sizes[i], sizes[i + 1])
            if layer_norm in (True, "critic"):
                params[f"{name}.norms.{i}.scale"] = 1.0 + 0.4 * rng.normal(size=hiddens[i])
                params[f"{name}.norms.{i}.shift"] = 0.3 * rng.normal(size=hiddens[i])
        dense(f"{name}.head", sizes[-1], 1)
    return {name: _as_float32_value(value) for name, value in params.items()}


def random_case(
    seed: int,
    settings: Settings,
    *,
    batch_size: int = 8,
    obs_dim: int = 3,
    action_dim: int = 2,
    hiddens: Sequence[int] = (16, 16),
) -> tuple[Params, Batch, Noise]:
    """Return parameters, batch and noise in which V exceeds Q for roughly half of the policies' actions.

    Every number is exactly representable in float32. V lies midway between two neighbouring Q values of its own
    transition, drawn from the middle half, so that float32 rounding is unlikely to change which of the two is larger.
    """
    params = random_params(
        seed,
        obs_dim=obs_dim,
        action_dim=action_dim,
        num_critics=settings.num_critics,
        hiddens=hiddens,
        layer_norm=settings.layer_norm,
        has_reference=settings.has_reference,
    )
    rng = np.random.default_rng([seed, 1])
    per_transition, n = (batch_size, action_dim), settings.num_actions
    num_proposals = n if settings.max_target_backup else 1
    noise = {
        "eps_actor": rng.normal(size=per_transition),
        "eps_next_target": rng.normal(size=(num_proposals, *per_transition)),
        "uniform": rng.uniform(-1.0, 1.0, size=(n, *per_transition)),
        "eps_current": rng.normal(size=(n, *per_transition)),
        "eps_next": rng.normal(size=(n, *per_transition)),
    }
    noise = {name: _as_float32_value(value) for name, value in noise.items()}
    batch = Batch(
        obs=_as_float32_value(rng.normal(size=(batch_size, obs_dim))),
        actions=_as_float32_value(rng.uniform(-0.95, 0.95, size=per_transition)),
        rewards=_as_float32_value(rng.normal(size=batch_size)),
        next_obs=_as_float32_value(rng.normal(size=(batch_size, obs_dim))),
        terminateds=(np.arange(batch_size) % 4 == 3).astype(np.float64),
        returns_to_go=np.zeros(batch_size),
    )
    proposed = sampled_actions(params, batch, noise, settings)[n:]
    qs = np.sort(
        [
            critic_forward(params, f"critic.{c}", batch.obs, sample.actions).q
            for c in range(settings.num_critics)
            for sample in proposed
        ],
        axis=0,
    )
    for b in range(batch_size):
        rank = int(rng.integers(max(1, len(qs) // 4), 3 * len(qs) // 4 + 1))
        batch.returns_to_go[b] = 0.5 * (qs[rank - 1, b] + qs[rank, b])
    return params, Batch(**{**vars(batch), "returns_to_go": _as_float32_value(batch.returns_to_go)}), noise


def _as_float32_value(value: Array) -> Array:
    return np.asarray(np.asarray(value, dtype=np.float32), dtype=np.float64)
