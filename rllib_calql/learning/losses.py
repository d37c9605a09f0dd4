"""The loss terms of Cal-QL as pure functions of tensors, one function per term.

Axes: `C` critics, `N` actions per source, `M` all sampled actions, `B` batch. Critics are axis 0, so that two critics
or ten are the same code. Functions return unreduced tensors; the learner reduces, sums and differentiates. Shapes are
checked at the door, because a wrong broadcast would train silently.

Sources:
    Nakamoto et al. 2023, arXiv:2303.05479, equation 5.1 (calibrated conservative regulariser).
    Kumar et al. 2020, arXiv:2006.04779, equation 4 and appendix F (CQL(H), importance sampling, Lagrangian).
    Haarnoja et al. 2018, arXiv:1812.05905, equations 5 to 18 (actor and temperature).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SampledValues(NamedTuple):
    """Q values at the state `s` and log-densities of the actions the conservative term pushes down.

    Attributes:
        q_uniform: Uniform actions, shape (C, N, B).
        q_current: Actions proposed by the policy at s, shape (C, N, B).
        q_next: Actions proposed by the policy at s', judged at **s**, shape (C, N, B).
        log_prob_current: log pi(b|s), shape (N, B), without gradient.
        log_prob_next: log pi(e|s'), shape (N, B), without gradient.
        action_dim: Size of one action; a uniform action of [-1, 1]^A has the log-density -A log 2.
    """

    q_uniform: Tensor
    q_current: Tensor
    q_next: Tensor
    log_prob_current: Tensor
    log_prob_next: Tensor
    action_dim: int


class CriticLoss(NamedTuple):
    """Terms of the critic loss, unreduced. Without the conservative term all but the first are None.

    Attributes:
        td: Squared TD error, shape (C, B).
        gap: Clipped log-sum-exp of the sampled actions minus Q of the data action, shape (C, B).
        bound_current: Whether a current action was lifted to the reference value, shape (C, N, B), bool.
        bound_next: The same for next-state actions.
        bound_uniform: The same for uniform actions; None where these are not calibrated.
        penalty: What the penalty form of calibration adds to the gap, shape (C, B); None with the maximum.
    """

    td: Tensor
    gap: Tensor | None = None
    bound_current: Tensor | None = None
    bound_next: Tensor | None = None
    bound_uniform: Tensor | None = None
    penalty: Tensor | None = None

    @property
    def conservative(self) -> Tensor | None:
        """The conservative term of each transition, shape (C, B): the gap, and the penalty where there is one."""
        return self.gap if self.gap is None or self.penalty is None else self.gap + self.penalty


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}.")


def td_target(
    rewards: Tensor,
    terminateds: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor,
    *,
    gamma: float | Tensor,
    entropy_alpha: Tensor | None,
) -> Tensor:
    """Bootstrapped target `y`, without gradient.

    The next action with the highest Q (of the minimum over target critics) is taken; with one candidate this is plain
    SAC. Only termination masks the bootstrap, a time-out never does. With targets of m steps, s' is the observation
    after them; nothing corrects for the data's policy having chosen the actions between.

    Args:
        rewards: Scaled rewards, shape (B,); with targets of m steps their discounted sums.
        terminateds: 1.0 where the episode terminated, at the last of the m steps, shape (B,).
        next_q: Minimum over the target critics at (s', a'_n), shape (N, B).
        next_log_prob: log pi(a'_n|s'), shape (N, B).
        gamma: Discount of the value of s'; with targets of m steps gamma^m, shape (B,).
        entropy_alpha: Temperature if the target holds the entropy term, else None.

    Returns:
        The target, shape (B,).

    Source:
        Kumar et al. 2020, appendix F (max backup); Haarnoja et al. 2018, equation 6.
    """
    num_candidates, batch_size = next_q.shape
    _check_shape("rewards", rewards, (batch_size,))
    _check_shape("terminateds", terminateds, (batch_size,))
    _check_shape("next_log_prob", next_log_prob, (num_candidates, batch_size))
    if isinstance(gamma, Tensor):
        _check_shape("gamma", gamma, (batch_size,))
    with torch.no_grad():
        next_value, best = next_q.max(dim=0)
        if entropy_alpha is not None:
            best_log_prob = next_log_prob.gather(0, best.unsqueeze(0)).squeeze(0)
            next_value = next_value - entropy_alpha * best_log_prob
        return rewards + gamma * (1.0 - terminateds) * next_value


def calibrate(q: Tensor, reference_value: Tensor) -> Tensor:
    """Bounds Q from below by the reference value, which stops the push-down of an action already below it.

    Args:
        q: Q values at s, shape (C, N, B).
        reference_value: V(s), shape (B,). -inf calibrates nothing.

    Returns:
        max(q, V), shape (C, N, B). Where q < V the gradient with respect to q is exactly zero.

    Source:
        Nakamoto et al. 2023, equation 5.1.
    """
    _check_shape("reference_value", reference_value, (q.shape[-1],))
    return torch.maximum(q, reference_value.detach())


def calibration_penalty(q_data: Tensor, q: Tensor, reference_value: Tensor, *, weight: float) -> Tensor:
    """The other form of calibration: pushes actions down further, the more the higher they are above V.

    It is for comparison with the paper's, which it is not: below V the push-down of the gap goes on.

    Args:
        q_data: Q of the data action, shape (C, B).
        q: Q of the calibrated actions at s, shape (C, M, B).
        reference_value: V(s), shape (B,). -inf adds nothing.
        weight: tau.

    Returns:
        tau mean_m max(Q_m - V, 0) (Q_m - Q_data), shape (C, B).

    Source:
        rlox 1.2.0, `algorithms/calql.py`, where Q is a log-sum-exp over actions, and tau the level of the quantile.
    """
    _check_shape("q_data", q_data, (q.shape[0], q.shape[-1]))
    _check_shape("reference_value", reference_value, (q.shape[-1],))
    bound = reference_value.detach()
    is_bound = torch.isfinite(bound)
    excess = (q - torch.where(is_bound, bound, torch.zeros_like(bound))).clamp(min=0.0) * is_bound
    return weight * (excess * (q - q_data.unsqueeze(1))).mean(dim=1)


def reference_loss(value: Tensor, target: Tensor, is_fitted: Tensor) -> Tensor:
    """Mean squared error of V over the rows that it is fitted to, a scalar; 0 if there are none.

    Args:
        value: V(s), shape (B,).
        target: The return-to-go of each row, or that of the next state's value, shape (B,). Taken without gradient.
        is_fitted: 1.0 for rows that V is fitted to, shape (B,).

    Source:
        Nakamoto et al. 2023, appendix D (regression on Monte-Carlo returns).
    """
    _check_shape("target", target, tuple(value.shape))
    _check_shape("is_fitted", is_fitted, tuple(value.shape))
    return ((value - target.detach()).square() * is_fitted).sum() / is_fitted.sum().clamp(min=1.0)


def reference_td_target(rewards: Tensor, terminateds: Tensor, next_value: Tensor, *, gamma: float | Tensor) -> Tensor:
    """Target of V by temporal differences, without gradient, shape (B,): the data's policy chose all actions.

    So a sum over m steps is right for that policy, and an episode that was cut goes on with the value of its final
    observation.

    Args:
        rewards: Scaled rewards, shape (B,); with targets of m steps their discounted sums.
        terminateds: 1.0 where the episode terminated, at the last of the m steps, shape (B,). A time-out does not.
        next_value: V of the target network at s', or after m steps, shape (B,).
        gamma: Discount of that value; with targets of m steps gamma^m, shape (B,).
    """
    _check_shape("terminateds", terminateds, tuple(rewards.shape))
    _check_shape("next_value", next_value, tuple(rewards.shape))
    return (rewards + gamma * (1.0 - terminateds) * next_value).detach()


def conservative_gap(
    q_data: Tensor,
    values: SampledValues,
    *,
    temperature: float,
    importance_sampling: bool,
    gap_clip: tuple[float, float],
) -> Tensor:
    """Soft maximum of Q over the sampled actions minus Q of the data action.

    Log-densities are subtracted after calibration: `values` holds the bounded Q already. Without importance sampling
    the data action joins the soft maximum as one more entry (the authors' code; the paper does not treat that case).

    Args:
        q_data: Q of the data action, shape (C, B).
        values: Q and log-densities of the sampled actions.
        temperature: T in T * logsumexp(x / T).
        importance_sampling: Whether each entry is divided by its proposal density.
        gap_clip: Lower and upper bound, applied to each transition before any mean.

    Returns:
        The gap, shape (C, B).

    Source:
        Kumar et al. 2020, equation 4 and appendix F.
    """
    num_critics, num_actions, batch_size = values.q_uniform.shape
    _check_shape("q_data", q_data, (num_critics, batch_size))
    for name in ("q_current", "q_next"):
        _check_shape(name, getattr(values, name), (num_critics, num_actions, batch_size))
    for name in ("log_prob_current", "log_prob_next"):
        _check_shape(name, getattr(values, name), (num_actions, batch_size))
    if importance_sampling:
        log_prob_uniform = -values.action_dim * math.log(2.0)
        entries = [
            values.q_uniform - log_prob_uniform,
            values.q_next - values.log_prob_next.detach(),
            values.q_current - values.log_prob_current.detach(),
        ]
    else:
        entries = [values.q_uniform, values.q_next, values.q_current, q_data.unsqueeze(1)]
    gap = _soft_maximum(torch.cat(entries, dim=1), temperature) - q_data
    return gap if gap_clip == (-math.inf, math.inf) else gap.clamp(*gap_clip)


def _soft_maximum(entries: Tensor, temperature: float) -> Tensor:
    """T log sum exp(x / T) over axis 1."""
    if temperature == 1.0:
        return torch.logsumexp(entries, dim=1)
    return temperature * torch.logsumexp(entries / temperature, dim=1)


def critic_loss(
    q_data: Tensor,
    target: Tensor,
    values: SampledValues | None,
    reference_value: Tensor | None,
    *,
    temperature: float,
    importance_sampling: bool,
    gap_clip: tuple[float, float],
    bounds_uniform: bool = False,
    penalty_weight: float | None = None,
) -> CriticLoss:
    """Assembles TD error and calibrated conservative gap of every critic.

    Calibration reaches current and next-state actions of every critic. Uniform actions are not calibrated by default:
    they are not actions of a policy, so no value of a policy bounds them.

    Args:
        q_data: Q of the data action, shape (C, B).
        target: TD target, shape (B,).
        values: Q and log-densities of the sampled actions, or None without the conservative term.
        reference_value: V(s), shape (B,), or None for plain CQL(H).
        temperature: See `conservative_gap`.
        importance_sampling: See `conservative_gap`.
        gap_clip: See `conservative_gap`. It clips the gap without the penalty.
        bounds_uniform: Whether uniform actions are calibrated as well (ConRFT, Chen et al. 2025, arXiv:2502.05450).
        penalty_weight: tau of `calibration_penalty`, which then takes the place of the maximum; None: the maximum.

    Returns:
        The unreduced terms.
    """
    _check_shape("target", target, (q_data.shape[-1],))
    if values is None:
        return CriticLoss(td=(q_data - target.detach()).square())
    bounded, bound_uniform, penalty = values, None, None
    if reference_value is None:
        bound_current = bound_next = torch.zeros_like(values.q_current, dtype=torch.bool)
        bound_uniform = bound_current if bounds_uniform else None
    else:
        bound_current = values.q_current.detach() < reference_value
        bound_next = values.q_next.detach() < reference_value
        bound_uniform = values.q_uniform.detach() < reference_value if bounds_uniform else None
        if penalty_weight is None:
            bounded = values._replace(
                q_current=calibrate(values.q_current, reference_value),
                q_next=calibrate(values.q_next, reference_value),
                q_uniform=calibrate(values.q_uniform, reference_value) if bounds_uniform else values.q_uniform,
            )
        else:
            q = [values.q_current, values.q_next, *([values.q_uniform] if bounds_uniform else [])]
            penalty = calibration_penalty(q_data, torch.cat(q, dim=1), reference_value, weight=penalty_weight)
    gap = conservative_gap(
        q_data, bounded, temperature=temperature, importance_sampling=importance_sampling, gap_clip=gap_clip
    )
    td = (q_data - target.detach()).square()
    return CriticLoss(td, gap, bound_current, bound_next, bound_uniform, penalty)


def lagrange_multiplier(log_alpha_prime: Tensor) -> Tensor:
    """Dual variable of the conservative constraint, alpha' = clip(exp(log alpha'), 0, 1e6).

    Source:
        Kumar et al. 2020, equation 30; the clip is the authors' code.
    """
    return log_alpha_prime.exp().clamp(0.0, 1e6)


def lagrange_loss(
    log_alpha_prime: Tensor, mean_gap: Tensor, *, min_q_weight: float | Tensor, lagrangian_thresh: float
) -> Tensor:
    """Loss of the dual variable: alpha' grows while the gap exceeds the threshold.

    Args:
        log_alpha_prime: log alpha', shape (1,).
        mean_gap: Gap of each critic, averaged over the batch, shape (C,). Taken without gradient.
        min_q_weight: Weight w of the conservative term.
        lagrangian_thresh: Gap allowed.

    Returns:
        A scalar.
    """
    excess = min_q_weight * (mean_gap.detach() - lagrangian_thresh)
    return -0.5 * (lagrange_multiplier(log_alpha_prime) * excess).sum()


def actor_loss(log_prob: Tensor, q_min: Tensor, alpha: Tensor) -> Tensor:
    """Soft policy improvement, shape (B,): alpha log pi(a|s) - Q(s, a), critics frozen.

    Args:
        log_prob: log pi(a|s), shape (B,).
        q_min: Minimum over the critics at (s, a), shape (B,); or their mean (Chen et al. 2021, arXiv:2101.05982,
            algorithm 1).
        alpha: Temperature.

    Source:
        Haarnoja et al. 2018, equation 9.
    """
    _check_shape("q_min", q_min, tuple(log_prob.shape))
    return alpha.detach() * log_prob - q_min


def imitation_loss(data_log_prob: Tensor, is_imitated: Tensor) -> Tensor:
    """Mean of -log pi(a_data|s) over the imitated rows of a batch, a scalar; 0 if there are none.

    Args:
        data_log_prob: log pi(a_data|s), shape (B,).
        is_imitated: 1.0 for rows to imitate, shape (B,).
    """
    _check_shape("is_imitated", is_imitated, tuple(data_log_prob.shape))
    return -(data_log_prob * is_imitated).sum() / is_imitated.sum().clamp(min=1.0)


def behaviour_cloning_loss(log_prob: Tensor, data_log_prob: Tensor, alpha: Tensor) -> Tensor:
    """Warm start of the actor, shape (B,): alpha log pi(a|s) - log pi(a_data|s).

    The likelihood is that of the data's action, which RLlib's CQL also uses, and which CORL's `log_prob` ignores.
    """
    _check_shape("data_log_prob", data_log_prob, tuple(log_prob.shape))
    return alpha.detach() * log_prob - data_log_prob


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: Tensor) -> Tensor:
    """Loss of the temperature, a scalar: -log_alpha * mean(log pi(a|s) + target entropy).

    Source:
        Haarnoja et al. 2018, equation 18, with log_alpha in alpha's place as in the authors' code.
    """
    return -(log_alpha * (log_prob.detach() + target_entropy).mean()).sum()
