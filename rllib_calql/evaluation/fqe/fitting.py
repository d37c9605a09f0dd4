"""Fitted Q evaluation: the value of a frozen policy, fitted to the training rows of some data.

Source:
    Le et al. 2019, arXiv:1903.08738, algorithm 3 (fitted Q evaluation); Paine et al. 2020, arXiv:2007.09055, section 4
    (with networks, and targets that follow slowly). Departures: the target takes the mean over the critics, since
    nothing is to be bounded from below, and the greedy action in place of an expectation over a stochastic policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rllib_calql.common.scales import is_nearly_constant
from rllib_calql.evaluation.fqe.critics import FQECritics, with_ones
from rllib_calql.evaluation.fqe.data import JudgedData

Array = npt.NDArray[Any]

_CLIP = 10.0  # Standard deviations of the training rows.
_NUM_LOOKS = 20  # At the value, on the way.
_UPDATES_PER_DRAW = 64
_FINAL_SHARE_OF_RATE = 0.02


class FrozenPolicy(Protocol):
    """A policy that does not change while it is judged."""

    def features(self, observations: Array) -> Array:
        """What values are fitted to: numbers (r, n) of raw observations (r, obs_dim)."""
        ...

    def actions(self, observations: Array) -> Array:
        """Greedy module actions (r, A) at raw observations (r, obs_dim)."""
        ...


@dataclass(frozen=True)
class FQESettings:
    """How values are fitted.

    Attributes:
        updates: Gradient updates.
        batch_size: Rows of each.
        learning_rate: Adam's at the beginning; it falls to a fiftieth, by half a cosine, in the second half.
        tau: Share of the critics in their targets at each update.
        hiddens: Widths of the critics' hidden layers.
        seed: Of first weights and drawn rows.
    """

    updates: int = 4_000
    batch_size: int = 2048
    learning_rate: float = 1e-3
    tau: float = 0.05
    hiddens: Sequence[int] = (256, 256)
    seed: int = 0

    def learning_rate_at(self, update: int) -> float:
        """Of one update, counted from 0."""
        done = max(0.0, 2.0 * update / self.updates - 1.0)
        share = _FINAL_SHARE_OF_RATE + (1.0 - _FINAL_SHARE_OF_RATE) * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.learning_rate * share


@dataclass(frozen=True)
class FittedValues:
    """The outcome of a fit, in environment rewards.

    Attributes:
        initial_values: Of the held-out episodes' first observations, mean over critics, shape (E,).
        of_each_critic: Mean of them by every critic, shape (C,).
        looks: Mean of them on the way, at equal distances, the last one at the end.
        held_out_td_error: Root of the mean squared TD error on held-out rows.
        training_td_error: The same on as many rows of the fit.
    """

    initial_values: npt.NDArray[np.float64]
    of_each_critic: npt.NDArray[np.float64]
    looks: Sequence[float]
    held_out_td_error: float
    training_td_error: float


def fit_values(
    data: JudgedData,
    policy: FrozenPolicy,
    settings: FQESettings,
    on_progress: Callable[[int], None] = lambda num_updates: None,
) -> FittedValues:
    """Fits Q of the policy to the training rows, and reads it at the held-out episodes' first observations.

    Values are fitted in units in which the data's own returns have mean 0 and standard deviation 1: with Q = m + s f,
    the fixed point of f has the reward (r - m (1 - gamma (1 - terminated))) / s. So a fit begins at the data's mean
    return, whatever the rewards' units and however long their sums.

    Args:
        data: The recorded data.
        policy: Asked once for all rows.
        settings: Of the fit.
        on_progress: Called now and then with the number of updates made.

    Raises:
        ValueError: If the policy's actions are no finite numbers.
    """
    encoder = _Encoder(data, policy)
    mean, std = data.scale_of_values
    fitted = encoder.transitions(data, data.training_rows, mean, std)
    held_out = encoder.transitions(data, data.held_out_rows, mean, std)
    starts = encoder.inputs(data.first_observations)
    generator = torch.Generator().manual_seed(settings.seed)
    critics = FQECritics(starts.shape[1] - 1, settings.hiddens, batch_size=settings.batch_size, generator=generator)
    looks: list[float] = []
    look_every = max(1, settings.updates // _NUM_LOOKS)
    batch = fitted.empty_like(settings.batch_size)
    for update in range(settings.updates):
        place = update % _UPDATES_PER_DRAW
        if place == 0:
            drawn = torch.randint(len(fitted), (_UPDATES_PER_DRAW, settings.batch_size), generator=generator)
            on_progress(update)
        fitted.take(drawn[place], batch)
        critics.step(*batch, learning_rate=settings.learning_rate_at(update), tau=settings.tau)
        if (update + 1) % look_every == 0:
            looks.append(mean + std * float(critics.values(starts).mean()))
    looks.append(mean + std * float(critics.values(starts).mean()))
    on_progress(settings.updates)
    of_each = mean + std * critics.values_of_each(starts).double()
    few = (
        torch.arange(len(fitted))
        if len(fitted) <= len(held_out)
        else torch.randperm(len(fitted), generator=generator)[: len(held_out)]
    )
    return FittedValues(
        of_each.mean(dim=0).numpy(),
        of_each.mean(dim=1).numpy(),
        looks,
        std * _td_error(critics, held_out),
        std * _td_error(critics, fitted.of(few)),
    )


@dataclass(frozen=True)
class _Transitions:
    """What `FQECritics.step` takes, of many rows."""

    inputs: Tensor
    next_inputs: Tensor
    rewards: Tensor
    discounts: Tensor

    def __len__(self) -> int:
        return len(self.rewards)

    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.inputs, self.next_inputs, self.rewards, self.discounts

    def empty_like(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs, next_inputs, rewards, discounts = (
            column.new_empty(num_rows, *column.shape[1:]) for column in self._columns()
        )
        return inputs, next_inputs, rewards, discounts

    def take(self, rows: Tensor, out: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        for column, taken in zip(self._columns(), out, strict=True):
            torch.index_select(column, 0, rows, out=taken)

    def of(self, rows: Tensor) -> _Transitions:
        return _Transitions(*(column[rows] for column in self._columns()))


class _Encoder:
    """Makes the critics' inputs: features standardised by the training rows, actions as they are, and ones."""

    def __init__(self, data: JudgedData, policy: FrozenPolicy) -> None:
        self._policy = policy
        count, total, squares = 0, np.float64(0.0), np.float64(0.0)
        shift: Any = None
        for _, rows in data.blocks(data.training_rows):
            features = np.asarray(policy.features(rows.observations), np.float64)
            shift = features.mean(axis=0) if shift is None else shift  # Squares lose no digits near the mean.
            total = total + (features - shift).sum(axis=0)
            squares = squares + np.square(features - shift).sum(axis=0)
            count += len(features)
        of_shifted = total / count
        std = np.sqrt(np.maximum(0.0, squares / count - np.square(of_shifted)))
        self._mean = shift + of_shifted
        self._std = np.where(is_nearly_constant(self._mean, std), 1.0, std)

    def inputs(self, observations: Array) -> Tensor:
        """Of observations and the policy's actions there, shape (r, n + A + 1)."""
        actions = self._policy.actions(observations)
        if not np.isfinite(actions).all():
            raise ValueError("The policy's actions are NaN: its training diverged; take an earlier checkpoint.")
        return self._joined(observations, actions)

    def transitions(self, data: JudgedData, numbers: npt.NDArray[np.int64], mean: float, std: float) -> _Transitions:
        """Of rows of the data, rewards in the units of the fit."""
        inputs, next_inputs = [], []
        rewards, discounts = torch.empty(len(numbers)), torch.empty(len(numbers))
        for here, rows in data.blocks(numbers):
            inputs.append(self._joined(rows.observations, rows.actions))
            next_inputs.append(self.inputs(rows.next_observations))
            discount = data.gamma * (1.0 - rows.terminateds.astype(np.float64))
            reward = (rows.rewards.astype(np.float64) - mean * (1.0 - discount)) / std
            rewards[here], discounts[here] = torch.from_numpy(reward), torch.from_numpy(discount)
        return _Transitions(torch.cat(inputs), torch.cat(next_inputs), rewards, discounts)

    def _joined(self, observations: Array, actions: Array) -> Tensor:
        features = (np.asarray(self._policy.features(observations), np.float64) - self._mean) / self._std
        clipped = torch.from_numpy(features.clip(-_CLIP, _CLIP).astype(np.float32))
        return with_ones(clipped, torch.from_numpy(np.asarray(actions, np.float32)))


def _td_error(critics: FQECritics, rows: _Transitions) -> float:
    """Root of the mean squared TD error of the critics' mean, against the targets."""
    targets = rows.rewards + rows.discounts * critics.values(rows.next_inputs, of_targets=True)
    return float((critics.values(rows.inputs) - targets).double().square().mean().sqrt())
