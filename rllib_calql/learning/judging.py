"""Judges critics and policy on rows that are given, by the losses of training and without a trace in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.core.columns import Columns
from torch import Tensor

from rllib_calql.common import metrics as keys
from rllib_calql.networks.precision import float32_products
from rllib_calql.networks.rl_module import CalQLTorchRLModule
from rllib_calql.networks.steps import KindOfStep
from rllib_calql.store.replay import IS_OFFLINE

if TYPE_CHECKING:
    from rllib_calql.learning.learner import CalQLTorchLearner

_ROWS_AT_ONCE = 256  # Every row has the values of many actions.
# What training logs of each critic -> its mean over the critics.
_OF_CRITICS = {
    keys.TD_LOSS_OF_CRITIC: keys.TD_LOSS,
    keys.GAP_OF_CRITIC: keys.GAP,
    keys.Q_DATA_OF_CRITIC: keys.Q_DATA,
}
_AS_IN_TRAINING = (keys.CALIBRATION_GAP, keys.REFERENCE_LOSS)


@torch.no_grad()
def judge_rows(
    learner: CalQLTorchLearner,
    columns: Mapping[str, npt.NDArray[Any]],
    *,
    online: bool,
    seed: int,
    reference_quantile: float | None = None,
    td_loss_only: bool = False,
) -> dict[str, float]:
    """Means over the rows.

    All noise is drawn from a generator of its own, so that the same rows and seed see the same noise every time, and
    training goes on as if nothing had been judged. Images are not shifted.

    Args:
        learner: Whose networks and losses.
        columns: Offline rows, columns as in a batch.
        online: The phase whose losses they are.
        seed: Of the noise.
        reference_quantile: The quantile of the episodes' returns, where it is the reference value.
        td_loss_only: Whether the rest is left out, which is much faster.

    Returns:
        By metric key; the gap only where the phase has a conservative term, the loss of the reference value only where
        one is learned that bounds Q.
    """
    module, config, device = learner._calql_module, learner.config, torch.device(learner._device)
    if reference_quantile is not None:  # Every update sets it anew.
        learner._reference_quantile.fill_(reference_quantile)
    uses_reference = config.uses_reference_network(online=online) and not td_loss_only
    kind = KindOfStep(
        is_online=online,
        is_conservative=config.is_conservative(online=online) and not td_loss_only,
        takes_best_target=config.has_max_target_backup(online=online),
        moves_actor=False,
        moves_targets=False,
        evaluates_reference=uses_reference,
        bootstraps_reference=uses_reference and config.bootstraps_reference,
        shifts_images=False,
    )
    num_rows = len(columns[Columns.REWARDS])
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=device))
    with _apart_from_training(module, kind, seed, device), float32_products(config.precision):
        for start in range(0, num_rows, _ROWS_AT_ONCE):
            batch = {
                name: torch.from_numpy(np.ascontiguousarray(column[start : start + _ROWS_AT_ONCE])).to(device)
                for name, column in columns.items()
            }
            batch[IS_OFFLINE] = torch.ones_like(batch[Columns.REWARDS])
            scalars = learner._losses_of(batch, module.forward_train(batch)).record.reduced()
            judged = _over_critics(scalars, module.critic.num_critics)
            if td_loss_only:
                judged = {keys.TD_LOSS: judged[keys.TD_LOSS]}
            else:
                log_prob, distance = module.compare_actions(batch[Columns.OBS], batch[Columns.ACTIONS])
                judged |= {name: scalars[name] for name in _AS_IN_TRAINING if name in scalars}
                judged |= {keys.LOG_PROB: log_prob.mean(), keys.ACTION_DISTANCE: distance.mean()}
            for name, mean in judged.items():
                sums[name] += mean.to(torch.float64) * len(batch[IS_OFFLINE])
    return {name: float(total) / num_rows for name, total in sums.items()}


def _over_critics(scalars: Mapping[str, Tensor], num_critics: int) -> dict[str, Tensor]:
    return {
        name: torch.stack([scalars[of_critic.format(c=c + 1)] for c in range(num_critics)]).mean()
        for of_critic, name in _OF_CRITICS.items()
        if of_critic.format(c=1) in scalars
    }


@contextmanager
def _apart_from_training(
    module: CalQLTorchRLModule, kind: KindOfStep, seed: int, device: torch.device
) -> Iterator[None]:
    """Gives the module a kind of step and generators of its own, and those of training back at the end."""
    of_training = module.kind_of_step, module.generator, module.generator_of_subsets
    generator = torch.Generator(device=device)
    generator.manual_seed(seed)
    module.kind_of_step, module.generator, module.generator_of_subsets = kind, generator, generator
    try:
        yield
    finally:
        module.kind_of_step, module.generator, module.generator_of_subsets = of_training
