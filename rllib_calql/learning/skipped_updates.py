"""Gradient updates that are skipped because of a gradient that Adam cannot take: the decision, the counts, the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rllib_calql.common import metrics as keys

# A skipped update changes no parameter, so only the batch differs between tries. Even if half of all batches were bad,
# a million updates would hold about one such row, and a run that skips half of its updates is rightly stopped.
MAX_SKIPPED_UPDATES_IN_A_ROW = 20

# Adam's second moment is a mean of squared gradients. One square that overflows float32 makes it infinite, and with it
# every later step of that parameter 0. Squares up to this stay finite, and so does every mean of them.
_LARGEST_GRADIENT = 0.999 * math.sqrt(torch.finfo(torch.float32).max)

_FEWEST_NUMBERS_ALONE = 4096  # Of a tensor that is looked at by itself; smaller ones are put together before.

_MODULE = "default_policy"


class SkipCounts(NamedTuple):
    """Skipped updates.

    Attributes:
        lifetime: All of them.
        new: Those since the previous reading.
        in_a_row: Those since the last update that was not skipped.
    """

    lifetime: int
    new: int
    in_a_row: int


class SkippedUpdates:
    """Decides on the device whether an update is skipped, and counts there: no host synchronisation.

    Attributes:
        found_inf: 1.0 if the latest update is skipped, else 0.0. The name is PyTorch's: fused Adam with an attribute
            `found_inf` of 1.0 leaves parameters, moments and step count as they are.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.found_inf = torch.zeros((), device=device)
        self._factor = torch.ones((), device=device)
        self._lifetime = torch.zeros((), dtype=torch.float64, device=device)
        self._in_a_row = torch.zeros_like(self._lifetime)
        self._lifetime_read = 0

    def begin(self) -> None:
        """Begins with an update that is not skipped."""
        self.found_inf = torch.zeros_like(self._factor)

    def judge(self, gradients: list[Tensor]) -> None:
        """Skips the update if any element of its gradients is NaN or infinite.

        One fused pass looks at each element, where a sum or a square could overflow; PyTorch's loss scalers use it.
        """
        self.begin()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.found_inf, self._factor)

    def judge_squares(self, gradients: list[Tensor]) -> None:
        """Skips the update also if an element is NaN or infinite, or if its square would make a moment of Adam so.

        Args:
            gradients: What the optimisers are to get, after clipping.
        """
        if self.found_inf.is_cuda:
            largest = torch.stack(torch._foreach_norm(gradients, math.inf)).max()
        else:
            largest = _largest_on_cpu(gradients)
        # Negated, because NaN compares false with everything.
        self.found_inf = torch.maximum(self.found_inf, (~(largest <= _LARGEST_GRADIENT)).to(self.found_inf.dtype))

    def count(self) -> None:
        """Counts the update that was judged."""
        self._lifetime.add_(self.found_inf)
        self._in_a_row.add_(self.found_inf).mul_(self.found_inf)

    def read(self) -> SkipCounts:
        """Brings the counts to the host."""
        lifetime, in_a_row = (int(count) for count in torch.stack([self._lifetime, self._in_a_row]).tolist())
        counts = SkipCounts(lifetime, lifetime - self._lifetime_read, in_a_row)
        self._lifetime_read = lifetime
        return counts

    def get_state(self) -> int:
        """The lifetime count. A restored run gets a new row of tries."""
        return int(self._lifetime.item())

    def set_state(self, lifetime: int) -> None:
        """Restores what `get_state` returned."""
        self._lifetime.fill_(lifetime)
        self._lifetime_read = lifetime
        self._in_a_row.zero_()


def _largest_on_cpu(gradients: list[Tensor]) -> Tensor:
    """The largest absolute value, NaN if there is one; torch's infinity norm takes several times as long there."""
    alone = [gradient for gradient in gradients if gradient.numel() >= _FEWEST_NUMBERS_ALONE]
    small = [gradient.flatten() for gradient in gradients if gradient.numel() < _FEWEST_NUMBERS_ALONE]
    if small:
        alone.append(torch.cat(small))
    return torch.stack([extreme for numbers in alone for extreme in numbers.aminmax()]).abs().max()


def number_of(logged: Any) -> float:
    """A number that a learner returned, bare or in RLlib's statistics."""
    return float(logged.peek() if hasattr(logged, "peek") else logged)


def check_updates_are_applied(learner_results: Sequence[Mapping[str, Any]]) -> None:
    """Ends a run whose learners skip every update. For the driver: an error in a remote learner would kill its actor.

    Args:
        learner_results: What `LearnerGroup.update` returned, one entry per learner.

    Raises:
        RuntimeError: If `MAX_SKIPPED_UPDATES_IN_A_ROW` updates or more were skipped since the last one that was not.
    """
    for results in learner_results:
        skipped = int(number_of(results[_MODULE][keys.NUM_SKIPPED_UPDATES_IN_A_ROW]))
        if skipped >= MAX_SKIPPED_UPDATES_IN_A_ROW:
            raise RuntimeError(
                f"The last {skipped} gradient updates were skipped, because a gradient was NaN, infinite or too large "
                "in each; the parameters are those before them. Look for extreme rewards or observations in the data, "
                "then lower the learning rates or set `grad_clip`, and continue from a checkpoint."
            )
