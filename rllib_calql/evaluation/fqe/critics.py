"""`FQECritics`: an ensemble of Q networks and its targets, with hand-written gradient steps on a CPU.

A step costs little more than its matrix products. Three things make it so:

* Inputs and hidden layers end with a column of ones. So biases are rows of the weights, and neither they nor their
  gradients take a pass over the activations of their own.
* All parameters lie in one vector, and so do gradients, moments and targets: Adam and the targets are one operation
  each.
* Activations, and the gradients that go back through them, are computed in place, block by block of a batch, so that
  little memory is touched.

Axes: `C` critics, `B` batch, `n` inputs without the ones, `H` hidden width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NUM_CRITICS = 2
_BLOCK_ROWS = 2048  # With two threads 8 % faster than 1024, with one 1 %: fewer operations to start.
_OUTPUT_GAIN = 1e-2
_ALIGNMENT = 16  # Numbers to which rows of hidden layers are padded.


def with_ones(*parts: Tensor) -> Tensor:
    """Joins parts (R, ...) of the critics' input to rows, with the column of ones that they end with."""
    return torch.cat([*parts, parts[0].new_ones(len(parts[0]), 1)], dim=1)


class _Network:
    """One critic's parameters, or as many gradients: views of a vector, weights with biases as last rows.

    Attributes:
        weights: (n_in + 1, n_out) of every layer but the last.
        last: The last layer, (H + 1,).
        units: Its weights without the bias, (H,).
        backwards: (n_out, n_in) of every layer but the last, without biases: what gradients go back through.
    """

    def __init__(self, vector: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
        parts = torch.split(vector, [rows * columns for rows, columns in sizes])
        *self.weights, last = (part.view(size) for part, size in zip(parts, sizes, strict=True))
        self.last, self.units = last[:, 0], last[:-1, 0]
        self.backwards = [weight[:-1].t() for weight in self.weights]


class _Room(NamedTuple):
    """Where activations of one layer go.

    Attributes:
        rows: (R, H + 1), the last column being ones.
        units: (R, H), without that column.
        gradients: (R, H), contiguous.
    """

    rows: Tensor
    units: Tensor
    gradients: Tensor

    def first(self, number: int) -> _Room:
        """Of so many rows."""
        return _Room(*(part[:number] for part in self))


class FQECritics:
    """C critics Q_c(s, a) with ReLU layers, their targets, and Adam.

    Args:
        num_inputs: n.
        hiddens: Widths of the hidden layers, at least one.
        batch_size: B, the rows of every step.
        num_critics: C.
        generator: Draws the first weights; torch's global one is left alone.
        dtype: Of all numbers.
        block_rows: Rows that are computed at once.

    Attributes:
        parameters: Of all critics, one after another: of every layer the weights (n_in, n_out), then the biases.
        targets: The same of their targets.
        gradients: Of the last step.
    """

    def __init__(
        self,
        num_inputs: int,
        hiddens: Sequence[int],
        *,
        batch_size: int,
        num_critics: int = NUM_CRITICS,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        block_rows: int = _BLOCK_ROWS,
    ) -> None:
        sizes = [(n_in + 1, n_out) for n_in, n_out in itertools.pairwise([num_inputs, *hiddens, 1])]
        size = sum(rows * columns for rows, columns in sizes)
        self.num_critics, self.batch_size, self._num_columns = num_critics, batch_size, num_inputs + 1
        self.parameters, self.targets, self.gradients = torch.zeros(3, num_critics * size, dtype=dtype)
        self._critics, self._targets, self._gradients = (
            [_Network(vector, sizes) for vector in torch.split(vectors, size)]
            for vectors in (self.parameters, self.targets, self.gradients)
        )
        for critic in self._critics:
            for weight in (*critic.weights, critic.last.unsqueeze(1)):
                bound = (_OUTPUT_GAIN if weight.shape[1] == 1 else 1.0) / math.sqrt(len(weight) - 1)
                weight.uniform_(-bound, bound, generator=generator)
        self.targets.copy_(self.parameters)
        self._moments = torch.zeros(2, num_critics * size, dtype=dtype)
        self._num_steps = torch.zeros(())
        block = min(block_rows, batch_size)
        self._blocks = [slice(start, min(start + block, batch_size)) for start in range(0, batch_size, block)]
        self._rooms = {block: [_room(block, width, dtype) for width in hiddens]}
        self._scaled = torch.empty(hiddens[-2] if len(hiddens) > 1 else num_inputs, hiddens[-1], dtype=dtype)
        self._errors = torch.empty(batch_size, dtype=dtype)

    def step(
        self,
        inputs: Tensor,
        next_inputs: Tensor,
        rewards: Tensor,
        discounts: Tensor,
        *,
        learning_rate: float,
        tau: float,
    ) -> None:
        """One gradient step of every critic towards r + discount * mean_c Qbar_c(s', a'), then one of the targets.

        Args:
            inputs: Of (s, a), shape (B, n + 1), see `with_ones`.
            next_inputs: Of (s', a'), shape (B, n + 1).
            rewards: r, shape (B,).
            discounts: gamma * (1 - terminated), shape (B,).
            learning_rate: Adam's.
            tau: Share of the critics in the new targets.

        Raises:
            ValueError: If shapes are not those.
        """
        expected = (self.batch_size, self._num_columns)
        if inputs.shape != expected or next_inputs.shape != expected:
            raise ValueError(f"inputs must be {expected}, got {tuple(inputs.shape)} and {tuple(next_inputs.shape)}.")
        if rewards.shape != expected[:1] or discounts.shape != expected[:1]:
            raise ValueError(
                f"rewards and discounts must be {expected[:1]}, got {tuple(rewards.shape)}, {tuple(discounts.shape)}."
            )
        targets = torch.addcmul(rewards, _mean([self._q(one, next_inputs) for one in self._targets]), discounts)
        for critic, gradients in zip(self._critics, self._gradients, strict=True):
            self._differentiate(critic, gradients, inputs, targets)
        self._adam(learning_rate)
        self.targets.lerp_(self.parameters, tau)

    def values(self, inputs: Tensor, *, of_targets: bool = False) -> Tensor:
        """Mean over the critics of Q, shape (R,), for any number of rows (R, n + 1)."""
        return _mean([self._q(one, inputs) for one in (self._targets if of_targets else self._critics)])

    def values_of_each(self, inputs: Tensor) -> Tensor:
        """Q of every critic, shape (C, R)."""
        return torch.stack([self._q(critic, inputs) for critic in self._critics])

    def _q(self, network: _Network, inputs: Tensor) -> Tensor:
        q = inputs.new_empty(len(inputs))
        if len(inputs) == self.batch_size and len(self._blocks) == 1:
            torch.mv(self._forward(network, inputs)[-1].rows, network.last, out=q)
            return q
        most = self._blocks[0].stop
        for start in range(0, len(inputs), most):
            here = slice(start, start + most)
            torch.mv(self._forward(network, inputs[here])[-1].rows, network.last, out=q[here])
        return q

    def _forward(self, network: _Network, inputs: Tensor) -> list[_Room]:
        """Activations of every hidden layer; the next call overwrites them."""
        rooms = self._rooms.get(len(inputs))
        if rooms is None:
            rooms = self._rooms[len(inputs)] = [room.first(len(inputs)) for room in self._rooms[self._blocks[0].stop]]
        rows = inputs
        for weight, room in zip(network.weights, rooms, strict=True):
            torch.relu_(torch.mm(rows, weight, out=room.units))
            rows = room.rows
        return rooms

    def _differentiate(self, network: _Network, gradients: _Network, inputs: Tensor, targets: Tensor) -> None:
        """Computes the gradients of one critic's mean squared error.

        The last layer has one output, so that gradients of the layer before are those of an output weighted 1, times
        its weights: they are multiplied once for all rows, and not in each. They take the place of its activations.
        """
        backwards = list(network.backwards)
        backwards[-1] = torch.mul(network.weights[-1][:-1], network.units, out=self._scaled).t()
        for here in self._blocks:
            is_whole = len(self._blocks) == 1
            own, error = (inputs, self._errors) if is_whole else (inputs[here], self._errors[here])
            rooms = self._forward(network, own)
            torch.mv(rooms[-1].rows, network.last, out=error)
            error.sub_(targets if is_whole else targets[here]).mul_(2.0 / self.batch_size)
            is_first = here.start == 0
            if is_first:
                torch.mv(rooms[-1].rows.t(), error, out=gradients.last)
            else:
                gradients.last.addmv_(rooms[-1].rows.t(), error)
            grad = _masked(error.unsqueeze(1).expand_as(rooms[-1].units), rooms[-1].units, out=rooms[-1].units)
            for index in reversed(range(len(rooms))):
                below = (rooms[index - 1].rows if index else own).t()
                # Of the first block the product is the total, so that none need be set to zero.
                if is_first:
                    torch.mm(below, grad, out=gradients.weights[index])
                else:
                    gradients.weights[index].addmm_(below, grad)
                if index:
                    room = rooms[index - 1]
                    grad = torch.mm(grad, backwards[index], out=room.gradients)
                    _masked(grad, room.units, out=grad)
        gradients.weights[-1].mul_(network.units)

    def _adam(self, learning_rate: float) -> None:
        self._num_steps += 1
        torch._fused_adam_(
            [self.parameters],
            [self.gradients],
            [self._moments[0]],
            [self._moments[1]],
            [],
            [self._num_steps],
            lr=learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


def _masked(gradient: Tensor, activations: Tensor, *, out: Tensor) -> Tensor:
    """The gradient where a ReLU is above 0, else 0; `out` may be one of the two."""
    torch.ops.aten.threshold_backward.grad_input(gradient, activations, 0.0, grad_input=out)
    return out


def _mean(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total.add_(value)
    return total.div_(len(values))


def _room(num_rows: int, width: int, dtype: torch.dtype) -> _Room:
    """Room for a layer; rows with their ones begin at multiples of a cache line."""
    padded = -(-(width + 1) // _ALIGNMENT) * _ALIGNMENT
    rows = torch.ones(num_rows, padded, dtype=dtype)[:, : width + 1]
    return _Room(rows, rows[:, :-1], torch.empty(num_rows, width, dtype=dtype))
