"""Layers of the critics' kernel: activations in place, and products of one critic or of several at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """An activation whose derivative follows from its value, so that nothing else need be kept.

    Attributes:
        evaluate: Of the first tensor into the second, which may be the same.
        differentiate: Multiplies the first, a gradient, by the derivative where the activation is the second, in place.
    """

    evaluate: Callable[[Tensor, Tensor], Any]
    differentiate: Callable[[Tensor, Tensor], Any]


_aten = torch.ops.aten
_MOST_ROWS_OF_LAST_BATCHED = 32  # With one output a batched product is far slower than one for each critic.
IN_PLACE_ACTIVATIONS = {  # With torch's default constants. The others' derivatives need what they were taken of.
    "relu": Activation(
        lambda x, out: torch.clamp_min(x, 0.0, out=out),
        lambda grad, y: _aten.threshold_backward.grad_input(grad, y, 0.0, grad_input=grad),
    ),
    "tanh": Activation(
        lambda x, out: torch.tanh(x, out=out),
        lambda grad, y: _aten.tanh_backward.grad_input(grad, y, grad_input=grad),
    ),
    "elu": Activation(
        lambda x, out: _aten.elu.out(x, out=out),
        lambda grad, y: _aten.elu_backward.grad_input(grad, 1.0, 1.0, 1.0, True, y, grad_input=grad),
    ),
    "leaky_relu": Activation(
        lambda x, out: _aten.leaky_relu.out(x, out=out),
        lambda grad, y: _aten.leaky_relu_backward.grad_input(grad, y, 0.01, True, grad_input=grad),
    ),
}


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor) -> None:
    """A layer of one critic, inputs (R, n_in), or of several at once, inputs (C, R, n_in)."""
    if out.dim() == 2:
        torch.mm(inputs, weight, out=out) if bias is None else torch.addmm(bias, inputs, weight, out=out)
    elif bias is None:
        torch.bmm(inputs, weight, out=out)
    else:
        torch.baddbmm(bias.unsqueeze(1), inputs, weight, out=out)


def last_product(hidden: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor) -> None:
    """The layer with one output, of one critic, hidden (R, n), or of several, hidden (C, R, n)."""
    if out.dim() == 1:
        torch.addmv(bias, hidden, weight, out=out)
    elif out.shape[1] > _MOST_ROWS_OF_LAST_BATCHED:
        for of_critic in zip(hidden, weight, bias, out, strict=True):
            last_product(*of_critic[:3], out=of_critic[3])
    else:
        torch.baddbmm(bias.view(-1, 1, 1), hidden, weight.unsqueeze(-1), out=out.unsqueeze(-1))


def add_last_product_(total: Tensor, hidden: Tensor, grad: Tensor) -> None:
    """Adds the gradient of the last layer's weight, (n,) or (C, n)."""
    if total.dim() == 1:
        total.addmv_(hidden.t(), grad)
    elif grad.shape[1] > _MOST_ROWS_OF_LAST_BATCHED:
        for of_critic in zip(total, hidden, grad, strict=True):
            add_last_product_(*of_critic)
    else:
        total.unsqueeze(-1).baddbmm_(hidden.transpose(1, 2), grad.unsqueeze(-1))
