"""Q of many actions at each state on a CPU, with a hand-written backward pass: the bulk of the work of Cal-QL.

Three departures from what autograd would do, none of which changes the result but for the order of sums:

* It goes block by block through the states, so that a block's activations stay in the processor's cache from one layer
  to the next, where whole layers would be written to and read from main memory at every step.
* Biases, activations and their derivatives are computed in place; few large buffers are allocated.
* Rows whose gradient is exactly zero, which are those that calibration stopped pushing down, are left out of the
  backward pass.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_BLOCK_BYTES = 2**20  # Of one layer's activations: two or three of them fit into a core's cache.
_MIN_SHARE_LEFT_OUT = 0.1  # Of a block's rows; the copies cost more than fewer would save.


def evaluate_by_kernel(
    obs_part: Tensor, actions: Tensor, dtype: torch.dtype, action_weight: Tensor, *layers: Tensor
) -> Tensor:
    """Q of one critic with ReLU layers. Gradient flows into `obs_part` and the parameters, never into `actions`.

    Args:
        obs_part: The first layer's share of the observations, bias included, shape (B, H1).
        actions: Shape (M, B, A).
        dtype: Of products and activations, the last layer apart.
        action_weight: The first layer's weight of the actions, shape (A, H1).
        *layers: Weight (n_in, n_out) and bias (n_out,) of every further layer in turn, the last with one output.

    Returns:
        Q, shape (M, B).
    """
    q: Tensor = _ReluCritic.apply(obs_part, actions, dtype, action_weight, *layers)  # type: ignore[no-untyped-call]
    return q


class _ReluCritic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, obs_part: Tensor, actions: Tensor, dtype: torch.dtype, action_weight: Tensor, *layers: Tensor
    ) -> Tensor:
        """Evaluates all blocks; keeps the activations where a gradient is wanted."""
        num_actions, batch_size, _ = actions.shape
        num_rows = num_actions * batch_size
        weights = [weight.to(dtype) for weight in (action_weight, *layers[:-2:2])]
        biases = [bias.to(dtype) for bias in layers[1:-2:2]]
        last_weight, last_bias = layers[-2].squeeze(1), layers[-1]
        rows = actions.transpose(0, 1).reshape(num_rows, -1).to(dtype)  # Rows of one state lie side by side.
        blocks = _blocks(batch_size, num_actions, max(weight.shape[1] for weight in weights), dtype)
        keeps = any(ctx.needs_input_grad)
        num_kept = num_rows if keeps else min(num_rows, (blocks[0][1] - blocks[0][0]) * num_actions)
        hiddens = [obs_part.new_empty((num_kept, weight.shape[1]), dtype=dtype) for weight in weights]
        q = obs_part.new_empty(num_rows)
        for first, end in blocks:
            here = slice(first * num_actions, end * num_actions)
            kept = here if keeps else slice(0, (end - first) * num_actions)
            hidden = torch.mm(rows[here], weights[0], out=hiddens[0][kept])
            hidden.view(end - first, num_actions, -1).add_(obs_part[first:end].unsqueeze(1))
            hidden.relu_()
            for weight, bias, buffer in zip(weights[1:], biases, hiddens[1:], strict=True):
                hidden = torch.addmm(bias, hidden, weight, out=buffer[kept]).relu_()
            torch.addmv(last_bias, hidden.to(q.dtype), last_weight, out=q[here])
        if keeps:
            ctx.save_for_backward(rows, *weights, last_weight, *hiddens)
            ctx.blocks, ctx.num_actions = blocks, num_actions
        return q.view(batch_size, num_actions).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `obs_part` and of all parameters."""
        rows, *saved = ctx.saved_tensors
        num_layers = (len(saved) - 1) // 2
        weights, last_weight, hiddens = saved[:num_layers], saved[num_layers], saved[num_layers + 1 :]
        num_actions = ctx.num_actions
        grad_rows = grad_q.t().reshape(-1)
        grad_obs_part = grad_q.new_zeros((grad_q.shape[1], weights[0].shape[1]))
        grad_weights = [grad_q.new_zeros(weight.shape) for weight in weights]
        grad_biases = [grad_q.new_zeros(weight.shape[1]) for weight in weights[1:]]
        grad_last = torch.zeros_like(last_weight)
        for first, end in ctx.blocks:
            here = slice(first * num_actions, end * num_actions)
            grad, inputs = grad_rows[here], [rows[here], *(hidden[here] for hidden in hiddens)]
            kept = grad.nonzero().squeeze(1)
            is_sparse = len(kept) <= (1.0 - _MIN_SHARE_LEFT_OUT) * len(grad)
            if is_sparse:
                grad, inputs = grad[kept], [values.index_select(0, kept) for values in inputs]
            last_hidden = inputs[-1]
            grad_last.addmv_(last_hidden.to(grad.dtype).t(), grad)
            grad_hidden = torch.outer(grad, last_weight).to(last_hidden.dtype)
            for index in reversed(range(num_layers)):
                _through_relu_(grad_hidden, inputs[index + 1])
                _add_product_(grad_weights[index], inputs[index].t(), grad_hidden)
                if index:
                    grad_biases[index - 1].add_(grad_hidden.sum(0, dtype=grad.dtype))
                    grad_hidden = torch.mm(grad_hidden, weights[index].t())
            if is_sparse:
                states, counts = (kept // num_actions).unique_consecutive(return_counts=True)
                starts = counts.cumsum(0) - counts
                every = torch.arange(len(kept))
                sums = functional.embedding_bag(every, grad_hidden.to(grad.dtype), starts, mode="sum")
                grad_obs_part[first:end].index_copy_(0, states, sums)
            else:
                per_state = grad_hidden.view(end - first, num_actions, -1)
                torch.sum(per_state, dim=1, dtype=grad.dtype, out=grad_obs_part[first:end])
        of_layers = [grad for pair in zip(grad_weights[1:], grad_biases, strict=True) for grad in pair]
        grad_last_bias = grad_rows.sum().unsqueeze(0)
        return (grad_obs_part, None, None, grad_weights[0], *of_layers, grad_last.unsqueeze(1), grad_last_bias)


def _blocks(batch_size: int, num_actions: int, width: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """First and end states of every block, the blocks as even as possible."""
    states = max(1, _BLOCK_BYTES // (num_actions * width * dtype.itemsize))
    num_blocks = -(-batch_size // states)
    ends = [batch_size * number // num_blocks for number in range(num_blocks + 1)]
    blocks = list(itertools.pairwise(ends))
    return sorted(blocks, key=lambda block: block[0] - block[1])  # The longest first: it sets the size of buffers.


def _through_relu_(grad: Tensor, activation: Tensor) -> None:
    """Multiplies by the derivative of the ReLU, in place."""
    torch.ops.aten.threshold_backward.grad_input(grad, activation, 0.0, grad_input=grad)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))
