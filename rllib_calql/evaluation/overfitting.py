"""`OverfittingWatch`: whether the critics go on to fit the rows they train on, and held-out ones less and less."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

NUM_SMOOTHED = 3  # Evaluations whose mean is looked at. Single ones go up and down with the latest batches.
NUM_RISES = 4  # In a row. If losses were noise alone, this would happen at one evaluation of 500.

logger = logging.getLogger(__name__)


class Losses(NamedTuple):
    """TD losses of one evaluation.

    Attributes:
        num_updates: Gradient updates so far, of both phases.
        held_out: On held-out rows.
        training: On as many rows to train on.
    """

    num_updates: int
    held_out: float
    training: float


class OverfittingWatch:
    """Warns once the held-out TD loss has risen for `NUM_RISES` evaluations in a row while the training one fell.

    Means over the latest `NUM_SMOOTHED` evaluations are compared. Every evaluation is of the same rows and noise, so
    that they differ by what was learned in between. The warning stays until the held-out loss is back at what it was
    before it rose. With the phase, the losses mean something else, and counting begins anew.

    Attributes:
        warning: What was warned of, or None.
    """

    def __init__(self) -> None:
        self._latest: list[Losses] = []  # At most `NUM_SMOOTHED`.
        self._rising: list[Losses] = []  # The latest means, each of which rose above the one before.
        self._is_online = False
        self._risen_from: float | None = None
        self.warning: str | None = None

    def observe(self, losses: Losses, *, online: bool) -> None:
        """Takes in an evaluation, unless nothing was learned since the last one."""
        if online != self._is_online:
            self._is_online, self._latest, self._rising = online, [], []
            self._risen_from, self.warning = None, None
        if self._latest and losses.num_updates == self._latest[-1].num_updates:
            return
        self._latest = [*self._latest, losses][-NUM_SMOOTHED:]
        if len(self._latest) == NUM_SMOOTHED:
            self._compare(Losses(losses.num_updates, *map(fmean, zip(*(one[1:] for one in self._latest), strict=True))))

    def _compare(self, mean: Losses) -> None:
        last = self._rising[-1] if self._rising else None
        is_rise = last is not None and mean.held_out > last.held_out and mean.training < last.training
        self._rising = [*self._rising, mean] if is_rise else [mean]
        if self._risen_from is not None and mean.held_out <= self._risen_from:
            self._risen_from, self.warning = None, None
        if self.warning is None and len(self._rising) > NUM_RISES:
            self._warn(self._rising[0], mean)

    def _warn(self, first: Losses, last: Losses) -> None:
        self._risen_from = first.held_out
        self.warning = (
            f"The critics overfit: from update {first.num_updates:,} to {last.num_updates:,} the TD loss of held-out "
            f"rows has risen at each of {NUM_RISES} evaluations, from {first.held_out:.4g} to {last.held_out:.4g}, "
            f"while that of rows to train on fell, from {first.training:.4g} to {last.training:.4g} (means of "
            f"{NUM_SMOOTHED} evaluations). Lower `offline_updates`, give more data, or keep the checkpoint of the "
            "least held-out loss by `keep_best: {metric: evaluation/held_out/td_loss, mode: min}`"
        )
        logger.warning("%s.", self.warning)

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "latest": [tuple(losses) for losses in self._latest],
            "rising": [tuple(losses) for losses in self._rising],
            "is_online": self._is_online,
            "risen_from": self._risen_from,
            "warning": self.warning,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        self._latest = [Losses(*losses) for losses in state["latest"]]
        self._rising = [Losses(*losses) for losses in state["rising"]]
        self._is_online, self._risen_from = state["is_online"], state["risen_from"]
        self.warning = state["warning"]
