"""The losses of one gradient step, assembled from the terms of `losses.py`, and what is logged of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from ray.rllib.core.columns import Columns
from torch import Tensor

from rllib_calql.common import metrics as keys
from rllib_calql.common.references import LEARNED, NONE, QUANTILE
from rllib_calql.common.schedules import is_schedule, value_at
from rllib_calql.learning import losses
from rllib_calql.learning.step_records import OfCritics, StepRecord
from rllib_calql.networks import steps as outputs
from rllib_calql.networks.steps import KindOfStep
from rllib_calql.store.replay import IS_OFFLINE

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

Values = dict[str, Tensor]


class Duals(NamedTuple):
    """What is trained beside the networks.

    Attributes:
        log_alpha: Logarithm of the entropy temperature, shape (1,).
        log_alpha_prime: Logarithm of the conservative term's dual variable, shape (1,).
    """

    log_alpha: Tensor
    log_alpha_prime: Tensor

    @property
    def alpha(self) -> Tensor:
        """The temperature without gradient, shape ()."""
        return self.log_alpha.exp().detach().squeeze(0)


class ScheduledWeight:
    """The weight of a loss term: a number, or a schedule over the online env steps.

    That of a schedule lies on the device and is changed in place, so that a recorded step follows it.

    Args:
        setting: The number or schedule.
        device: Of the learner.
    """

    def __init__(self, setting: float | list[list[float]], device: torch.device) -> None:
        self._setting = setting
        self._scheduled = torch.zeros((), dtype=torch.float64, device=device) if is_schedule(setting) else None
        self.move(0)

    def move(self, env_steps: int) -> None:
        """Sets the value of these online env steps."""
        if self._scheduled is not None:
            self._scheduled.fill_(value_at(self._setting, env_steps))

    def of(self, dtype: torch.dtype) -> float | Tensor:
        """The weight, as a number or a scalar of this type."""
        return value_at(self._setting, 0) if self._scheduled is None else self._scheduled.to(dtype)


class StepLosses(NamedTuple):
    """Losses of a step.

    Attributes:
        total: Sum of critic, actor, temperature and dual loss and that of a learned reference value, as far as they
            step; their parameters are disjoint.
        record: What is logged.
    """

    total: Tensor
    record: StepRecord


def losses_of_step(
    config: CalQLConfig,
    kind: KindOfStep,
    batch: Values,
    values: Values,
    duals: Duals,
    *,
    target_entropy: Tensor,
    action_dim: int,
    conservative_weight: ScheduledWeight,
    bc_weight: ScheduledWeight,
    reference_quantile: Tensor,
) -> StepLosses:
    """All losses of one step.

    Args:
        config: The settings of the losses.
        kind: What the step does.
        batch: Columns of B rows.
        values: What `CalQLTorchRLModule._forward_train` answered.
        duals: Temperature and dual variable.
        target_entropy: Of the policy, shape ().
        action_dim: Dimensions of an action that leave a choice.
        conservative_weight: Weight of the conservative term in this phase.
        bc_weight: Weight of the imitation term.
        reference_quantile: The quantile of the episodes' returns that may be the reference value, shape ().
    """
    if kind.fits_reference_alone:
        loss, scalars = _losses_of_reference(config, kind, batch, values)
        return StepLosses(loss, StepRecord(scalars, of_rows={}, of_bound_rows={}))
    reference_value = _reference_of_rows(config, batch, values, reference_quantile)
    total, record = _critic_losses(config, kind, batch, values, duals, action_dim, conservative_weight, reference_value)
    scalars, of_rows = record.scalars, record.of_rows
    if kind.evaluates_reference:
        reference_loss, of_reference = _losses_of_reference(config, kind, batch, values)
        total = total + reference_loss
        scalars |= of_reference
    scalars[keys.ALPHA_VALUE] = duals.alpha
    if kind.moves_actor:
        policy_loss = _policy_loss(kind, batch, values, duals.alpha, bc_weight)
        log_prob = values[outputs.ACTOR_LOG_PROB]
        alpha_loss = losses.temperature_loss(duals.log_alpha, log_prob, target_entropy)
        total = total + policy_loss + alpha_loss
        scalars |= {keys.POLICY_LOSS: policy_loss, keys.ALPHA_LOSS: alpha_loss}
        of_rows[keys.LOG_PROB] = log_prob
    return StepLosses(total, record._replace(clipped=values.get(outputs.CLIPPED)))


def _policy_loss(kind: KindOfStep, batch: Values, values: Values, alpha: Tensor, bc_weight: ScheduledWeight) -> Tensor:
    log_prob = values[outputs.ACTOR_LOG_PROB]
    if kind.clones_behaviour:
        return losses.behaviour_cloning_loss(log_prob, values[outputs.DATA_LOG_PROB], alpha).mean()
    loss = losses.actor_loss(log_prob, values[outputs.ACTOR_Q], alpha).mean()
    if not kind.imitates:
        return loss
    return loss + bc_weight.of(loss.dtype) * losses.imitation_loss(values[outputs.DATA_LOG_PROB], batch[IS_OFFLINE])


def _critic_losses(
    config: CalQLConfig,
    kind: KindOfStep,
    batch: Values,
    values: Values,
    duals: Duals,
    action_dim: int,
    conservative_weight: ScheduledWeight,
    reference_value: Tensor,
) -> tuple[Tensor, StepRecord]:
    """Critic loss summed over critics, with the dual variable's loss, and what is logged of them."""
    q_data = values[outputs.Q_DATA]
    target = losses.td_target(
        batch[Columns.REWARDS],
        batch[Columns.TERMINATEDS],
        values[outputs.TARGET_NEXT_Q],
        values[outputs.TARGET_NEXT_LOG_PROB],
        gamma=batch.get(outputs.BOOTSTRAP_DISCOUNT, config.gamma),
        entropy_alpha=None if config.has_deterministic_backup(online=kind.is_online) else duals.alpha,
    )
    sampled = _sampled_values(values, action_dim) if kind.is_conservative else None
    terms = losses.critic_loss(
        q_data,
        target,
        sampled,
        reference_value if config.calibrates(online=kind.is_online) else None,
        temperature=config.temperature,
        importance_sampling=config.importance_sampling,
        gap_clip=config.conservative_gap_clip,
        bounds_uniform=config.bound_uniform_actions,
        penalty_weight=config.calibration_penalty_weight,
    )
    record = StepRecord(
        scalars={},
        of_rows={keys.TARGET_Q: target},
        of_bound_rows={},
        critics=OfCritics(q_data, sampled, terms, batch[Columns.RETURNS_TO_GO], batch[IS_OFFLINE]),
    )
    if config.reference_value != LEARNED or kind.evaluates_reference:
        some_are_unbound = NONE in config.reference_of_rows
        (record.of_bound_rows if some_are_unbound else record.of_rows)[keys.REFERENCE_VALUE_MEAN] = reference_value
    per_critic = terms.td.mean(dim=1)
    if terms.conservative is None:
        qf_loss = per_critic.sum()
        record.scalars[keys.QF_LOSS] = qf_loss
        return qf_loss, record
    mean_gap, weight = terms.conservative.mean(dim=1), conservative_weight.of(q_data.dtype)
    if not config.lagrangian:
        conservative = weight * mean_gap
        qf_loss = (per_critic + conservative).sum()
        record.scalars.update({keys.QF_LOSS: qf_loss, keys.CQL_LOSS: conservative.sum()})
        return qf_loss, record
    multiplier = losses.lagrange_multiplier(duals.log_alpha_prime)
    conservative = multiplier.detach() * weight * (mean_gap - config.lagrangian_thresh)
    prime_loss = losses.lagrange_loss(
        duals.log_alpha_prime, mean_gap, min_q_weight=weight, lagrangian_thresh=config.lagrangian_thresh
    )
    qf_loss = (per_critic + conservative).sum()
    record.scalars.update({keys.QF_LOSS: qf_loss, keys.CQL_LOSS: conservative.sum()})
    record.scalars.update({keys.ALPHA_PRIME: multiplier.squeeze(0), keys.ALPHA_PRIME_LOSS: prime_loss})
    return qf_loss + prime_loss, record


def _sampled_values(values: Values, action_dim: int) -> losses.SampledValues:
    return losses.SampledValues(
        q_uniform=values[outputs.Q_UNIFORM],
        q_current=values[outputs.Q_CURRENT],
        q_next=values[outputs.Q_NEXT],
        log_prob_current=values[outputs.LOG_PROB_CURRENT],
        log_prob_next=values[outputs.LOG_PROB_NEXT],
        action_dim=action_dim,
    )


def _reference_of_rows(config: CalQLConfig, batch: Values, values: Values, quantile: Tensor) -> Tensor:
    """V of each row, without gradient, shape (B,); -inf where nothing bounds it.

    Args:
        config: The settings.
        batch: Columns of B rows. `returns_to_go` holds the column that `reference_value` names, in offline rows.
        values: What the module answered.
        quantile: The quantile of the episodes' returns, shape ().
    """
    returns = batch[Columns.RETURNS_TO_GO]
    of_offline_rows, of_online_rows = config.reference_of_rows
    offline = _reference(of_offline_rows, returns, values, quantile)
    if of_online_rows == of_offline_rows:
        return offline
    return torch.where(batch[IS_OFFLINE] > 0.0, offline, _reference(of_online_rows, returns, values, quantile))


def _reference(kind: str, returns: Tensor, values: Values, quantile: Tensor) -> Tensor:
    if kind == LEARNED:  # Not evaluated in a step that bounds nothing, where NaN harms nobody.
        is_there = outputs.REFERENCE_VALUE in values
        return values[outputs.REFERENCE_VALUE].detach() if is_there else torch.full_like(returns, torch.nan)
    if kind == QUANTILE:
        return quantile.to(returns.dtype).expand(returns.shape)
    return torch.full_like(returns, -torch.inf) if kind == NONE else returns


def _losses_of_reference(
    config: CalQLConfig, kind: KindOfStep, batch: Values, values: Values
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the network of a learned reference value, and what is logged of it.

    It is fitted to offline rows before the switch and to all rows after it. Online rows lack a column that
    `reference_value` names, so that to such a column it is fitted on offline rows alone.

    Args:
        config: The settings.
        kind: What the step does.
        batch: Columns of B rows.
        values: What the module answered.
    """
    value, returns = values[outputs.REFERENCE_VALUE], batch[Columns.RETURNS_TO_GO]
    target = returns
    if kind.bootstraps_reference:
        target = losses.reference_td_target(
            batch[Columns.REWARDS],
            batch[Columns.TERMINATEDS],
            values[outputs.REFERENCE_NEXT_VALUE],
            gamma=batch.get(outputs.BOOTSTRAP_DISCOUNT, config.gamma),
        )
    is_offline_alone = not kind.is_online or config.names_column
    is_fitted = batch[IS_OFFLINE] if is_offline_alone else torch.ones_like(batch[IS_OFFLINE])
    loss = losses.reference_loss(value, target, is_fitted)
    gap = ((value.detach() - returns) * is_fitted).sum() / is_fitted.sum()
    return loss, {keys.REFERENCE_LOSS: loss.detach(), keys.REFERENCE_GAP: gap}
