"""Q of many actions at each state on a CPU, with a hand-written backward pass: the bulk of the work of Cal-QL.

Three departures from what autograd would do, none of which changes the result but for the order of sums:

* It goes block by block through the states, so that a block's activations stay in the processor's cache from one layer
  to the next, where whole layers would be written to and read from main memory at every step.
* Biases, activations and their derivatives are computed in place; few large buffers are allocated.
* Rows whose gradient is exactly zero, which are those that calibration stopped pushing down, are left out of the
  backward pass.

With layer norm only the sums of each layer are kept. To normalise them again in the backward pass, in the cache, is
as fast as to keep and fetch the activations too, and takes half the memory. Blocks are larger then: a norm is several
more operations a block, and to start and join the threads of each costs more than the nearest cache saves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

LAYER_NORM_EPS = 1e-5  # As torch's.
_BLOCK_BYTES = 2**20  # Of one layer's activations: two or three of them fit into a core's cache.
_NORM_BLOCK_BYTES = 2**22  # The same with layer norm: they fit into the cache that cores share.
_MIN_SHARE_LEFT_OUT = 0.1  # Of a block's rows; the copies cost more than fewer would save.


class _Activation(NamedTuple):
    """An activation whose derivative follows from its value, so that nothing else need be kept.

    Attributes:
        evaluate: Of the first tensor into the second, which may be the same.
        differentiate: Multiplies the first, a gradient, by the derivative where the activation is the second, in place.
    """

    evaluate: Callable[[Tensor, Tensor], Any]
    differentiate: Callable[[Tensor, Tensor], Any]


_aten = torch.ops.aten
_ACTIVATIONS = {  # With torch's default constants. The others' derivatives need what they were taken of.
    "relu": _Activation(
        lambda x, out: torch.clamp_min(x, 0.0, out=out),
        lambda grad, y: _aten.threshold_backward.grad_input(grad, y, 0.0, grad_input=grad),
    ),
    "tanh": _Activation(
        lambda x, out: torch.tanh(x, out=out),
        lambda grad, y: _aten.tanh_backward.grad_input(grad, y, grad_input=grad),
    ),
    "elu": _Activation(
        lambda x, out: _aten.elu.out(x, out=out),
        lambda grad, y: _aten.elu_backward.grad_input(grad, 1.0, 1.0, 1.0, True, y, grad_input=grad),
    ),
    "leaky_relu": _Activation(
        lambda x, out: _aten.leaky_relu.out(x, out=out),
        lambda grad, y: _aten.leaky_relu_backward.grad_input(grad, y, 0.01, True, grad_input=grad),
    ),
}
KERNEL_ACTIVATIONS = frozenset(_ACTIVATIONS)


def evaluate_by_kernel(
    obs_part: Tensor,
    actions: Tensor,
    dtype: torch.dtype,
    action_weight: Tensor,
    *layers: Tensor,
    activation: str = "relu",
    norms: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """Q of one critic. Gradient flows into `obs_part` and the parameters, never into `actions`.

    Args:
        obs_part: The first layer's share of the observations, bias included, shape (B, H1).
        actions: Shape (M, B, A).
        dtype: Of products and activations, the last layer apart.
        action_weight: The first layer's weight of the actions, shape (A, H1).
        *layers: Weight (n_in, n_out) and bias (n_out,) of every further layer in turn, the last with one output.
        activation: One of `KERNEL_ACTIVATIONS`.
        norms: With layer norm the scale and shift (n,) of every hidden layer, which is normalised before its
            activation.

    Returns:
        Q, shape (M, B).
    """
    of_norms = itertools.chain.from_iterable(norms)
    q: Tensor = _BlockwiseCritic.apply(  # type: ignore[no-untyped-call]
        obs_part, actions, dtype, activation, bool(norms), action_weight, *layers, *of_norms
    )
    return q


class _BlockwiseCritic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        obs_part: Tensor,
        actions: Tensor,
        dtype: torch.dtype,
        activation: str,
        has_norms: bool,
        action_weight: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        """Evaluates all blocks; keeps the activations, or the sums that a norm follows, where a gradient is wanted."""
        num_hidden = len(parameters) // (4 if has_norms else 2)
        layers, of_norms = parameters[: 2 * num_hidden], parameters[2 * num_hidden :]
        num_actions, batch_size, _ = actions.shape
        num_rows = num_actions * batch_size
        weights = [weight.to(dtype) for weight in (action_weight, *layers[:-2:2])]
        biases = [bias.to(dtype) for bias in layers[1:-2:2]]
        last_weight, last_bias = layers[-2].squeeze(1), layers[-1]
        # Where activations are of a shorter type, torch normalises in single precision nevertheless.
        norm_dtype = torch.promote_types(dtype, torch.float32)
        scales, shifts = ([value.to(norm_dtype) for value in of_norms[start::2]] for start in (0, 1))
        rows = actions.transpose(0, 1).reshape(num_rows, -1).to(dtype)  # Rows of one state lie side by side.
        width = max(weight.shape[1] for weight in weights)
        blocks = _blocks(batch_size, num_actions, width, dtype, has_norms=has_norms)
        keeps = any(ctx.needs_input_grad)
        num_kept = num_rows if keeps else min(num_rows, (blocks[0][1] - blocks[0][0]) * num_actions)
        values = [obs_part.new_empty((num_kept, weight.shape[1]), dtype=dtype) for weight in weights]
        q = obs_part.new_empty(num_rows)
        evaluate = _ACTIVATIONS[activation].evaluate
        for first, end in blocks:
            here = slice(first * num_actions, end * num_actions)
            kept = here if keeps else slice(0, (end - first) * num_actions)
            hidden = rows[here]
            for index, weight in enumerate(weights):
                sums = values[index][kept]
                if index == 0:
                    torch.mm(hidden, weight, out=sums)
                    sums.view(end - first, num_actions, -1).add_(obs_part[first:end].unsqueeze(1))
                else:
                    torch.addmm(biases[index - 1], hidden, weight, out=sums)
                hidden = _normalised(sums, scales[index], shifts[index])[0] if has_norms else sums
                evaluate(hidden, hidden)
            torch.addmv(last_bias, hidden.to(q.dtype), last_weight, out=q[here])
        if keeps:
            ctx.save_for_backward(rows, last_weight, *weights, *values, *scales, *shifts)
            ctx.blocks, ctx.num_actions, ctx.num_hidden = blocks, num_actions, num_hidden
            ctx.activation = _ACTIVATIONS[activation]
        return q.view(batch_size, num_actions).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `obs_part` and of all parameters."""
        rows, last_weight, *saved = ctx.saved_tensors
        num_actions, num_hidden = ctx.num_actions, ctx.num_hidden
        weights, values, *of_norms = (saved[at : at + num_hidden] for at in range(0, len(saved), num_hidden))
        norms = list(zip(*of_norms, strict=True))  # Scale and shift of every layer; none without layer norm.
        grad_rows = grad_q.t().reshape(-1)
        grad_obs_part = grad_q.new_zeros((grad_q.shape[1], weights[0].shape[1]))
        grad_weights = [grad_q.new_zeros(weight.shape) for weight in weights]
        grad_biases = [grad_q.new_zeros(weight.shape[1]) for weight in weights[1:]]
        grad_norms = [grad_q.new_zeros((2, weight.shape[1])) for weight in weights] if norms else []
        grad_last = torch.zeros_like(last_weight)
        for first, end in ctx.blocks:
            here = slice(first * num_actions, end * num_actions)
            grad, inputs = grad_rows[here], [rows[here], *(of_layer[here] for of_layer in values)]
            kept = grad.nonzero().squeeze(1)
            is_sparse = len(kept) <= (1.0 - _MIN_SHARE_LEFT_OUT) * len(grad)
            if is_sparse:
                grad, inputs = grad[kept], [of_layer.index_select(0, kept) for of_layer in inputs]
            normalised = []
            for index, (scale, shift) in enumerate(norms, start=1):
                sums = inputs[index]
                inputs[index], mean, rstd = _normalised(sums, scale, shift)
                ctx.activation.evaluate(inputs[index], inputs[index])
                normalised.append((sums, mean, rstd, scale, shift))
            last_hidden = inputs[-1]
            grad_last.addmv_(last_hidden.to(grad.dtype).t(), grad)
            grad_hidden = torch.outer(grad, last_weight).to(last_hidden.dtype)
            for index in reversed(range(num_hidden)):
                ctx.activation.differentiate(grad_hidden, inputs[index + 1])
                if norms:
                    grad_hidden, *of_norm = _through_norm(grad_hidden, *normalised[index])
                    for total, one in zip(grad_norms[index], of_norm, strict=True):
                        total.add_(one)
                _add_product_(grad_weights[index], inputs[index].t(), grad_hidden)
                if index:
                    grad_biases[index - 1].add_(grad_hidden.sum(0, dtype=grad.dtype))
                    grad_hidden = torch.mm(grad_hidden, weights[index].t())
            if is_sparse:
                states, counts = (kept // num_actions).unique_consecutive(return_counts=True)
                starts = counts.cumsum(0) - counts
                every = torch.arange(len(kept))
                sums_of_states = functional.embedding_bag(every, grad_hidden.to(grad.dtype), starts, mode="sum")
                grad_obs_part[first:end].index_copy_(0, states, sums_of_states)
            else:
                per_state = grad_hidden.view(end - first, num_actions, -1)
                torch.sum(per_state, dim=1, dtype=grad.dtype, out=grad_obs_part[first:end])
        of_layers = [grad for pair in zip(grad_weights[1:], grad_biases, strict=True) for grad in pair]
        of_last = (grad_last.unsqueeze(1), grad_rows.sum().unsqueeze(0))
        of_norms = [grad for both in grad_norms for grad in both]
        return (grad_obs_part, None, None, None, None, grad_weights[0], *of_layers, *of_last, *of_norms)


def _blocks(
    batch_size: int, num_actions: int, width: int, dtype: torch.dtype, *, has_norms: bool = False
) -> list[tuple[int, int]]:
    """First and end states of every block, the blocks as even as possible."""
    most_bytes = _NORM_BLOCK_BYTES if has_norms else _BLOCK_BYTES
    states = max(1, most_bytes // (num_actions * width * dtype.itemsize))
    num_blocks = -(-batch_size // states)
    ends = [batch_size * number // num_blocks for number in range(num_blocks + 1)]
    blocks = list(itertools.pairwise(ends))
    return sorted(blocks, key=lambda block: block[0] - block[1])  # The longest first: it sets the size of buffers.


def _normalised(sums: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of rows (R, n), into new memory, their means and the inverse of their standard deviations (R, 1)."""
    return torch.native_layer_norm(sums, scale.shape, scale, shift, LAYER_NORM_EPS)


def _through_norm(
    grad: Tensor, sums: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normalised, of the scale and of the shift, given that of the norm's result."""
    wanted = [True, True, True]
    gradients: tuple[Tensor, Tensor, Tensor] = _aten.native_layer_norm_backward(
        grad, sums, scale.shape, mean, rstd, scale, shift, wanted
    )
    return gradients


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))
