"""Diagnostics of gradient steps as tensors, and their mean over the steps of an update call. No host syncs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rllib_calql.common import metrics as keys
from rllib_calql.learning.losses import CriticLoss, SampledValues

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

_MAY_BE_EMPTY = (
    *(keys.CALIBRATION_GAP_OFFLINE, keys.CALIBRATION_GAP_ONLINE),
    *(keys.CLIPPED_OFFLINE, keys.CLIPPED_ONLINE),
    *(keys.REFERENCE_GAP, keys.REFERENCE_VALUE_MEAN),
)


@torch.no_grad()
def critic_diagnostics(
    q_data: Tensor,
    values: SampledValues | None,
    terms: CriticLoss,
    returns_to_go: Tensor,
    is_offline: Tensor,
) -> dict[str, Tensor]:
    """Per-critic statistics and the calibration gap of one step, or of several; see `metrics.py` for each key.

    Each tensor may have further axes in front, such as one of steps, which the results then have.

    Args:
        q_data: Q of the data actions, shape (C, B).
        values: Q of the sampled actions before calibration; None without the conservative term, whose statistics are
            then left out.
        terms: The unreduced critic loss.
        returns_to_go: G, shape (B,), or what a column of the data has in its place.
        is_offline: 1.0 for offline rows, shape (B,).

    Returns:
        By metric key, shape (). A part of the batch that is empty gives NaN.
    """
    scalars = _of_critics({keys.TD_LOSS_OF_CRITIC: terms.td.mean(dim=-1), keys.Q_DATA_OF_CRITIC: q_data.mean(dim=-1)})
    if values is not None:
        scalars |= _of_sampled_actions(values, terms)
    difference, is_online = q_data.mean(dim=-2) - returns_to_go, 1.0 - is_offline
    scalars[keys.CALIBRATION_GAP] = difference.mean(dim=-1)
    scalars[keys.CALIBRATION_GAP_OFFLINE] = (difference * is_offline).sum(dim=-1) / is_offline.sum(dim=-1)
    scalars[keys.CALIBRATION_GAP_ONLINE] = (difference * is_online).sum(dim=-1) / is_online.sum(dim=-1)
    return scalars


def _of_sampled_actions(values: SampledValues, terms: CriticLoss) -> dict[str, Tensor]:
    assert terms.gap is not None
    assert terms.bound_current is not None
    assert terms.bound_next is not None
    sampled = torch.cat([values.q_uniform, values.q_current, values.q_next], dim=-2)
    optional = {}
    if terms.bound_uniform is not None:
        optional[keys.BOUND_RATE_UNIFORM_OF_CRITIC] = terms.bound_uniform.float().mean(dim=(-2, -1))
    if terms.penalty is not None:
        optional[keys.CALIBRATION_PENALTY_OF_CRITIC] = terms.penalty.mean(dim=-1)
    return _of_critics(
        {
            keys.GAP_OF_CRITIC: terms.gap.mean(dim=-1),
            keys.Q_UNIFORM_OF_CRITIC: values.q_uniform.mean(dim=(-2, -1)),
            keys.Q_CURRENT_OF_CRITIC: values.q_current.mean(dim=(-2, -1)),
            keys.Q_NEXT_OF_CRITIC: values.q_next.mean(dim=(-2, -1)),
            keys.Q_STD_OF_CRITIC: sampled.std(dim=-2, correction=0).mean(dim=-1),
            keys.BOUND_RATE_CURRENT_OF_CRITIC: terms.bound_current.float().mean(dim=(-2, -1)),
            keys.BOUND_RATE_NEXT_OF_CRITIC: terms.bound_next.float().mean(dim=(-2, -1)),
            **optional,
        }
    )


def _of_critics(stacked: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each critic by metric key, from tensors of shape (..., C) by the key's template."""
    return {
        template.format(c=c + 1): value
        for template, values in stacked.items()
        for c, value in enumerate(values.unbind(dim=-1))
    }


@torch.no_grad()
def clipping_diagnostics(clipped: Tensor, is_offline: Tensor) -> dict[str, Tensor]:
    """Mean share of clipped numbers in the two parts of a batch, or of several; NaN for one that is empty.

    Args:
        clipped: Share of the numbers of each observation, shape (B,).
        is_offline: 1.0 for offline rows, shape (B,).
    """
    is_online = 1.0 - is_offline
    return {
        keys.CLIPPED_OFFLINE: (clipped * is_offline).sum(dim=-1) / is_offline.sum(dim=-1),
        keys.CLIPPED_ONLINE: (clipped * is_online).sum(dim=-1) / is_online.sum(dim=-1),
    }


REFERENCE_METRICS = frozenset(  # Of a learned reference value.
    {keys.REFERENCE_LOSS, keys.REFERENCE_GAP, keys.NUM_REFERENCE_UPDATES_LIFETIME}
)
ACTOR_METRICS = frozenset({keys.POLICY_LOSS, keys.ALPHA_LOSS, keys.LOG_PROB})  # Of updates in which the actor steps.


def conservative_metrics(*, num_critics: int) -> frozenset[str]:
    """Names of what is reported of the conservative term, and nowhere else."""
    of_critics = (
        *(keys.GAP_OF_CRITIC, keys.Q_UNIFORM_OF_CRITIC, keys.Q_CURRENT_OF_CRITIC, keys.Q_NEXT_OF_CRITIC),
        *(keys.Q_STD_OF_CRITIC, keys.BOUND_RATE_CURRENT_OF_CRITIC, keys.BOUND_RATE_NEXT_OF_CRITIC),
        *(keys.BOUND_RATE_UNIFORM_OF_CRITIC, keys.CALIBRATION_PENALTY_OF_CRITIC),
    )
    names = {template.format(c=c + 1) for template in of_critics for c in range(num_critics)}
    return frozenset({*names, keys.CQL_LOSS, keys.ALPHA_PRIME, keys.ALPHA_PRIME_LOSS})


def without_what_is_not_evaluated(metrics: Mapping[str, Any], config: CalQLConfig, *, online: bool) -> dict[str, Any]:
    """RLlib's results of a learner, without names that it reported earlier and not in this iteration.

    RLlib reports them as NaN. A NaN of what was evaluated stays.

    Args:
        metrics: Of one module.
        config: The settings.
        online: The phase.
    """
    absent = set(_MAY_BE_EMPTY)
    if config.period_of_actor(online=online) > 1:
        absent |= ACTOR_METRICS
    if not config.is_conservative(online=online):
        absent |= conservative_metrics(num_critics=config.num_critics)
    if not config.uses_reference_network(online=online):
        absent |= REFERENCE_METRICS
    return {
        name: value
        for name, value in metrics.items()
        if not (name in absent and isinstance(value, float) and math.isnan(value))
    }


def metric_names(*, num_critics: int) -> frozenset[str]:
    """Names of all that the learner reports of its losses and updates, some of it with some settings alone."""
    of_critics = (keys.TD_LOSS_OF_CRITIC, keys.Q_DATA_OF_CRITIC)
    return frozenset(
        {
            *(template.format(c=c + 1) for template in of_critics for c in range(num_critics)),
            *conservative_metrics(num_critics=num_critics),
            *ACTOR_METRICS,
            *REFERENCE_METRICS,
            *(keys.QF_LOSS, keys.ALPHA_VALUE, keys.TARGET_Q, keys.REFERENCE_VALUE_MEAN),
            *(keys.CALIBRATION_GAP, keys.CALIBRATION_GAP_OFFLINE, keys.CALIBRATION_GAP_ONLINE),
            *(keys.CLIPPED_OFFLINE, keys.CLIPPED_ONLINE),
            *(keys.NUM_UPDATES_LIFETIME, keys.NUM_SKIPPED_UPDATES_LIFETIME, keys.NUM_SKIPPED_UPDATES_IN_A_ROW),
        }
    )


class MeanAccumulator:
    """Running sums of scalar tensors on their device, read once."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def add(self, scalars: dict[str, Tensor]) -> None:
        """Adds one step's scalars, or those of several steps, all of shape (steps,).

        The same names come together at every step, and are summed as one vector. In place, and the count of steps
        beside the sums, so that a recorded step adds to them as well.
        """
        names = tuple(scalars)
        values = torch.stack(list(scalars.values())).view(len(names), -1)
        if names not in self._sums:
            self._sums[names] = torch.zeros(len(names) + 1, dtype=torch.float64, device=values.device)
        sums = self._sums[names]
        sums[:-1].add_(values.sum(dim=1, dtype=sums.dtype))
        sums[-1].add_(float(values.shape[1]))

    def forget(self) -> None:
        """Starts anew. In place, where a recorded step adds."""
        for sums in self._sums.values():
            sums.zero_()

    def pop(self) -> dict[str, float]:
        """Returns the means since the last call and starts anew; the gap of a part that was empty is left out."""
        if not self._sums:
            return {}
        flat = iter(torch.cat(list(self._sums.values())).tolist())
        totals: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        for names in self._sums:
            of_names = {name: next(flat) for name in names}
            count = next(flat)
            for name, total in of_names.items():
                totals[name] += total
                counts[name] += count
        self.forget()
        means = {name: total / counts[name] for name, total in totals.items() if counts[name]}
        return {name: mean for name, mean in means.items() if not (name in _MAY_BE_EMPTY and math.isnan(mean))}
