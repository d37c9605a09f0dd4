"""What is logged of gradient steps: kept as it is for a few steps, then reduced together, which is much less work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rllib_calql.learning.diagnostics import MeanAccumulator, clipping_diagnostics, critic_diagnostics
from rllib_calql.learning.losses import CriticLoss, SampledValues
from rllib_calql.networks.steps import KindOfStep

_MOST_STEPS = 16  # More would save nothing that can be measured.
_MOST_BYTES = 2**20  # Of all steps that are kept; for a large step the reduction is a small part of its work.


class OfCritics(NamedTuple):
    """Values and terms of the critics in one step, or in several, whose axis then stands in front.

    Attributes:
        q_data: Q of the data actions, shape (C, B).
        sampled: Q of the sampled actions before calibration; None without the conservative term.
        terms: The unreduced critic loss.
        returns_to_go: G, shape (B,), or what a column of the data has in its place.
        is_offline: 1.0 for offline rows, shape (B,).
    """

    q_data: Tensor
    sampled: SampledValues | None
    terms: CriticLoss
    returns_to_go: Tensor
    is_offline: Tensor


class StepRecord(NamedTuple):
    """All that is logged of one step, or of several, whose axis then stands in front of each tensor.

    Attributes:
        scalars: By metric key, shape ().
        of_rows: By metric key, whose mean is logged, shape (B,).
        of_bound_rows: By metric key, whose mean over rows that are not infinite is logged, shape (B,).
        critics: Of the critics; None where only a reference value is fitted.
        clipped: Share of the clipped numbers of each observation, shape (B,); None where none are clipped.
    """

    scalars: dict[str, Tensor]
    of_rows: dict[str, Tensor]
    of_bound_rows: dict[str, Tensor]
    critics: OfCritics | None = None
    clipped: Tensor | None = None

    @torch.no_grad()
    def reduced(self) -> dict[str, Tensor]:
        """Scalars by metric key, of several steps one for each. A part of a batch that is empty gives NaN."""
        scalars = {name: values.mean(dim=-1) for name, values in self.of_rows.items()}
        for name, values in self.of_bound_rows.items():
            is_bound = torch.isfinite(values)
            total = torch.where(is_bound, values, torch.zeros_like(values)).sum(dim=-1)
            scalars[name] = total / is_bound.sum(dim=-1)
        if self.critics is not None:
            scalars |= critic_diagnostics(*self.critics)
            if self.clipped is not None:
                scalars |= clipping_diagnostics(self.clipped, self.critics.is_offline)
        return scalars | self.scalars


class StepLog:
    """Means of all that steps log, read once. On a GPU each step is reduced at once, so that a graph can replay it."""

    def __init__(self) -> None:
        self._means = MeanAccumulator()
        self._kept: dict[KindOfStep, list[StepRecord]] = {}
        self._most_kept: dict[KindOfStep, int] = {}

    def add(self, kind: KindOfStep, record: StepRecord) -> None:
        """Adds one step; steps of the same kind log the same."""
        record = _detached(record)
        kept = self._kept.setdefault(kind, [])
        if not kept:
            self._most_kept[kind] = _most_kept(record)
        kept.append(record)
        if len(kept) >= self._most_kept[kind]:
            self._reduce(kept)

    def pop(self) -> dict[str, float]:
        """Returns the means since the last call and starts anew."""
        for kept in self._kept.values():
            if kept:
                self._reduce(kept)
        return self._means.pop()

    def forget(self) -> None:
        """Starts anew without the steps since the last call."""
        for kept in self._kept.values():
            kept.clear()
        self._means.forget()

    def _reduce(self, kept: list[StepRecord]) -> None:
        record: StepRecord = kept[0] if len(kept) == 1 else _stacked(kept)
        kept.clear()
        self._means.add(record.reduced())


def _detached(value: Any) -> Any:
    """The same without gradient, so that no step's graph is kept."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {name: _detached(one) for name, one in value.items()}
    return type(value)(*map(_detached, value)) if isinstance(value, tuple) else value


def _stacked(values: Sequence[Any]) -> Any:
    """Tensors of several steps with the steps' axis in front, in the same structure."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(list(values))
    if isinstance(first, dict):
        return {name: _stacked([value[name] for value in values]) for name in first}
    return type(first)(*map(_stacked, zip(*values, strict=True))) if isinstance(first, tuple) else first


def _most_kept(record: StepRecord) -> int:
    """How many such steps are kept before they are reduced."""
    tensors = list(_tensors(record))
    if any(tensor.is_cuda for tensor in tensors):
        return 1
    return max(1, min(_MOST_STEPS, _MOST_BYTES // sum(tensor.nbytes for tensor in tensors)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
