"""Q of many actions at each state on a CPU, with a hand-written backward pass: the bulk of the work of Cal-QL.

Departures from what autograd would do, none of which changes the result but for the order of sums:

* It goes block by block through the states, so that a block's activations stay in the processor's cache from one layer
  to the next, where whole layers would be written to and read from main memory at every step.
* Critics, and runs of blocks of each, are computed side by side, see `side_by_side.py`. The division depends on the
  sizes alone, so that any number of threads gives the same bits.
* Where rows are few, or critics many, one batched product for several critics takes the place of one for each.
* Biases, activations and their derivatives are computed in place; few large buffers are allocated.
* Rows whose gradient is exactly zero, which are those that calibration stopped pushing down, are left out of the
  backward pass.

With layer norm only the sums of each layer are kept. To normalise them again in the backward pass, in the cache, is
as fast as to keep and fetch the activations too, and takes half the memory. Blocks are larger then: a norm is several
more operations a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rllib_calql.networks.kernel_layers import (
    IN_PLACE_ACTIVATIONS,
    Activation,
    add_last_product_,
    last_product,
    product,
)
from rllib_calql.networks.side_by_side import compute

LAYER_NORM_EPS = 1e-5  # As torch's.
_BLOCK_BYTES = 2**20  # Of one layer's activations: two or three of them fit into a core's cache.
_NORM_BLOCK_BYTES = 2**22  # The same with layer norm: they fit into the cache that cores share.
_MOST_RUNS = 4  # Of a critic's blocks, so that two critics are enough for eight threads.
# Where a critic's rows are one block, critics share products, in groups. Multiplications of a hidden layer of all
# critics from which on there are several groups, on threads, and those of a group.
_LEAST_WORK_OF_THREADS = 2**25
_WORK_OF_A_GROUP = 2**26
_ALL = slice(None)
_MIN_SHARE_LEFT_OUT = 0.1  # Of a block's rows; the copies cost more than fewer would save.

KERNEL_ACTIVATIONS = frozenset(IN_PLACE_ACTIVATIONS)


def evaluate_by_kernel(
    obs_part: Tensor,
    actions: Tensor,
    dtype: torch.dtype,
    action_weight: Tensor,
    *layers: Tensor,
    activation: str = "relu",
    norms: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """Q of C critics. Gradient flows into `obs_part`, `actions` and the parameters, as far as they require it.

    Args:
        obs_part: The first layer's share of the observations, bias included, shape (C, B, H1).
        actions: Shape (M, B, A).
        dtype: Of products and activations, the last layer apart.
        action_weight: The first layer's weight of the actions, shape (C, A, H1).
        *layers: Weight (C, n_in, n_out) and bias (C, n_out) of every further layer in turn, the last with one output.
        activation: One of `KERNEL_ACTIVATIONS`.
        norms: With layer norm the scale and shift (C, n) of every hidden layer, which is normalised before its
            activation.

    Returns:
        Q, shape (C, M, B).
    """
    of_norms = itertools.chain.from_iterable(norms)
    how = _How(dtype, IN_PLACE_ACTIVATIONS[activation], len(norms), keeps=torch.is_grad_enabled())
    q: Tensor = _BlockwiseCritics.apply(obs_part, actions, how, action_weight, *layers, *of_norms)  # type: ignore[no-untyped-call]
    return q


class _How(NamedTuple):
    """What is no tensor.

    Attributes:
        dtype: Of products and activations, the last layer apart.
        activation: Of the hidden layers.
        num_norms: Of them, 0 without layer norm.
        keeps: Whether a backward pass may follow.
    """

    dtype: torch.dtype
    activation: Activation
    num_norms: int
    keeps: bool

    @property
    def batches_critics(self) -> bool:
        """Whether several critics may share a product. torch's mixed norm, of shorter types, knows one scale alone."""
        return not self.num_norms or self.dtype == torch.promote_types(self.dtype, torch.float32)


class _Part(NamedTuple):
    """A part of the rows of one critic, or all rows of several critics where they are few.

    Attributes:
        critic: Index into the critics' axis: a number, which takes it away, or a slice.
        run: Which of its critic's parts it is.
        blocks: First and end states.
    """

    critic: int | slice
    run: int
    blocks: list[tuple[int, int]]


class _Layers(NamedTuple):
    """Parameters of critics, all with their axis in front, in the types in which they are used.

    Attributes:
        weights: Of the hidden layers, the first one's of the actions.
        biases: Of the hidden layers but the first, which `obs_part` has.
        last: Weight (C, n) and bias (C,) of the last layer.
        norms: Scale and shift of every hidden layer; none without layer norm.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    last: tuple[Tensor, Tensor]
    norms: list[tuple[Tensor, Tensor]]

    def all(self) -> list[Tensor]:
        """All of them."""
        return [*self.weights, *self.biases, *self.last, *(value for both in self.norms for value in both)]

    @classmethod
    def from_all(cls, tensors: Sequence[Tensor], num_hidden: int) -> _Layers:
        """The inverse of `all`."""
        left = iter(tensors)
        weights, biases = list(itertools.islice(left, num_hidden)), list(itertools.islice(left, num_hidden - 1))
        return cls(weights, biases, (next(left), next(left)), list(zip(left, left, strict=True)))

    def of(self, critic: int | slice) -> _Layers:
        """Those of one critic, without the axis, or of several."""
        if critic == _ALL:
            return self
        weight, bias = self.last
        return _Layers(
            [one[critic] for one in self.weights],
            [one[critic] for one in self.biases],
            (weight[critic], bias[critic]),
            [(scale[critic], shift[critic]) for scale, shift in self.norms],
        )


class _Sums(NamedTuple):
    """What the gradients of a part are added to.

    Attributes:
        obs_part: Shape (C, B, H1).
        rows: Of the actions, shape (C, rows, A); None where they want none.
        layers: Of the parameters, of one run of parts; None where they want none.
    """

    obs_part: Tensor
    rows: Tensor | None
    layers: _Layers | None

    def of(self, critic: int | slice) -> _Sums:
        """Those of one critic, without the axis, or of several."""
        return _Sums(
            self.obs_part[critic],
            None if self.rows is None else self.rows[critic],
            None if self.layers is None else self.layers.of(critic),
        )


def _layers_of(parameters: Sequence[Tensor], how: _How) -> _Layers:
    of_layers, of_norms = (
        parameters[: len(parameters) - 2 * how.num_norms],
        parameters[len(parameters) - 2 * how.num_norms :],
    )
    # Where activations are of a shorter type, torch normalises in single precision nevertheless.
    norm_dtype = torch.promote_types(how.dtype, torch.float32)
    return _Layers(
        [weight.to(how.dtype) for weight in (of_layers[0], *of_layers[1:-2:2])],
        [bias.to(how.dtype) for bias in of_layers[2:-2:2]],
        (of_layers[-2].squeeze(-1), of_layers[-1].squeeze(-1)),
        [
            (scale.to(norm_dtype), shift.to(norm_dtype))
            for scale, shift in zip(of_norms[::2], of_norms[1::2], strict=True)
        ],
    )


def _zeros_like(layers: _Layers, like: Tensor) -> _Layers:
    """Zeros of the type of `like` in the shapes of parameters."""
    return _Layers(
        [like.new_zeros(weight.shape) for weight in layers.weights],
        [like.new_zeros(bias.shape) for bias in layers.biases],
        (like.new_zeros(layers.last[0].shape), like.new_zeros(layers.last[1].shape)),
        [(like.new_zeros(scale.shape), like.new_zeros(shift.shape)) for scale, shift in layers.norms],
    )


class _BlockwiseCritics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, obs_part: Tensor, actions: Tensor, how: _How, *parameters: Tensor) -> Tensor:
        """Evaluates all parts; keeps the activations, or the sums that a norm follows, where a gradient is wanted."""
        num_critics, num_rows = len(obs_part), actions.shape[0] * actions.shape[1]
        layers = _layers_of(parameters, how)
        rows = actions.transpose(0, 1).reshape(num_rows, -1).to(how.dtype)  # Rows of one state lie side by side.
        widths = [weight.shape[-1] for weight in layers.weights]
        parts = _parts(num_critics, actions.shape[1], actions.shape[0], max(widths), how)
        keeps = how.keeps and any(ctx.needs_input_grad)
        values = [obs_part.new_empty((num_critics, num_rows, n), dtype=how.dtype) for n in widths] if keeps else None
        q = obs_part.new_empty((num_critics, num_rows))
        compute([partial(_evaluate, part, rows, obs_part, layers, how, q, values) for part in parts])
        if values is not None:
            ctx.save_for_backward(rows, *values, *layers.all())
            ctx.how, ctx.parts, ctx.num_hidden = how, parts, len(values)
        return q.view(num_critics, actions.shape[1], actions.shape[0]).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what requires one."""
        num_hidden, parts = ctx.num_hidden, ctx.parts
        rows, *tensors = ctx.saved_tensors
        values, layers = tensors[:num_hidden], _Layers.from_all(tensors[num_hidden:], num_hidden)
        num_critics, num_actions, batch_size = grad_q.shape
        grad_rows = grad_q.transpose(1, 2).reshape(num_critics, -1)
        of_obs_part = grad_q.new_zeros((num_critics, batch_size, layers.weights[0].shape[-1]))
        wants_actions, wants_parameters = ctx.needs_input_grad[1], any(ctx.needs_input_grad[3:])
        of_rows = grad_q.new_zeros((num_critics, *rows.shape)) if wants_actions else None
        num_runs = 1 + max(part.run for part in parts)
        of_runs = [_zeros_like(layers, grad_q) for _ in range(num_runs)] if wants_parameters else []
        sums = [_Sums(of_obs_part, of_rows, of_runs[part.run] if of_runs else None) for part in parts]
        compute(
            [
                partial(_differentiate, part, rows, values, layers, ctx.how, grad_rows, of_part)
                for part, of_part in zip(parts, sums, strict=True)
            ]
        )
        of_actions = None
        if of_rows is not None:
            of_actions = of_rows.sum(0).view(batch_size, num_actions, -1).transpose(0, 1)
        if not of_runs:
            return (of_obs_part, of_actions, *[None] * (len(ctx.needs_input_grad) - 2))
        total = of_runs[0]
        for other in of_runs[1:]:
            torch._foreach_add_(total.all(), other.all())
        of_layers = [grad for pair in zip(total.weights[1:], total.biases, strict=True) for grad in pair]
        of_last = (total.last[0].unsqueeze(-1), grad_rows.sum(1, keepdim=True))
        of_norms = [grad for both in total.norms for grad in both]
        return (of_obs_part, of_actions, None, total.weights[0], *of_layers, *of_last, *of_norms)


def _evaluate(
    part: _Part,
    rows: Tensor,
    obs_part: Tensor,
    layers: _Layers,
    how: _How,
    q: Tensor,
    values: list[Tensor] | None,
) -> None:
    """Writes the part's Q, and its values into `values` where they are kept."""
    layers, obs_part, q = layers.of(part.critic), obs_part[part.critic], q[part.critic]
    num_actions = len(rows) // obs_part.shape[-2]
    if values is None:
        longest = max(end - first for first, end in part.blocks) * num_actions
        kept = [q.new_empty((*q.shape[:-1], longest, w.shape[-1]), dtype=how.dtype) for w in layers.weights]
    else:
        kept = [of_layer[part.critic] for of_layer in values]
    for first, end in part.blocks:
        start, length = first * num_actions, (end - first) * num_actions
        hidden = rows.narrow(0, start, length).expand(*q.shape[:-1], -1, -1)
        for index, weight in enumerate(layers.weights):
            sums = kept[index].narrow(-2, 0 if values is None else start, length)
            if index == 0:
                product(hidden, weight, out=sums)
                of_states = sums.view(*q.shape[:-1], end - first, num_actions, -1)
                of_states.add_(obs_part.narrow(-2, first, end - first).unsqueeze(-2))
            else:
                product(hidden, weight, layers.biases[index - 1], out=sums)
            hidden = _normalised(sums, *layers.norms[index])[0] if layers.norms else sums
            how.activation.evaluate(hidden, hidden)
        last_product(hidden.to(q.dtype), *layers.last, out=q.narrow(-1, start, length))


def _differentiate(
    part: _Part,
    rows: Tensor,
    values: list[Tensor],
    layers: _Layers,
    how: _How,
    grad_rows: Tensor,
    sums: _Sums,
) -> None:
    """Adds the part's gradients to zeros."""
    layers, values = layers.of(part.critic), [of_layer[part.critic] for of_layer in values]
    grad_rows, (of_obs_part, of_rows, total) = grad_rows[part.critic], sums.of(part.critic)
    lead, num_actions = grad_rows.shape[:-1], len(rows) // of_obs_part.shape[-2]
    for first, end in part.blocks:
        start, length = first * num_actions, (end - first) * num_actions
        grad = grad_rows.narrow(-1, start, length)
        inputs = [rows.narrow(0, start, length).expand(*lead, -1, -1)]
        inputs += [of_layer.narrow(-2, start, length) for of_layer in values]
        kept = None if lead else _rows_to_keep(grad)
        if kept is not None:
            grad, inputs = grad[kept], [of_layer.index_select(0, kept) for of_layer in inputs]
        normalised = []
        for index, (scale, shift) in enumerate(layers.norms, start=1):
            before = inputs[index]
            inputs[index], mean, rstd = _normalised(before, scale, shift)
            how.activation.evaluate(inputs[index], inputs[index])
            normalised.append((before, mean, rstd, scale, shift))
        if total is not None:
            add_last_product_(total.last[0], inputs[-1].to(grad.dtype), grad)
        grad_hidden = (grad.unsqueeze(-1) * layers.last[0].unsqueeze(-2)).to(how.dtype)
        for index in reversed(range(len(layers.weights))):
            how.activation.differentiate(grad_hidden, inputs[index + 1])
            if layers.norms:
                grad_hidden, *of_norm = _through_norm(grad_hidden, *normalised[index])
                for of_parameter, one in zip(total.norms[index] if total is not None else (), of_norm, strict=False):
                    of_parameter.add_(one)
            if total is not None:
                _add_product_(total.weights[index], inputs[index].transpose(-1, -2), grad_hidden)
            if index:
                if total is not None:
                    total.biases[index - 1].add_(grad_hidden.sum(-2, dtype=grad.dtype))
                grad_hidden = torch.matmul(grad_hidden, layers.weights[index].transpose(-1, -2))
        if of_rows is not None:
            of_block = torch.matmul(grad_hidden, layers.weights[0].transpose(-1, -2)).to(grad.dtype)
            where = of_rows.narrow(-2, start, length)
            where.copy_(of_block) if kept is None else where.index_copy_(0, kept, of_block)
        of_states = of_obs_part.narrow(-2, first, end - first)
        if kept is None:
            per_state = grad_hidden.view(*lead, end - first, num_actions, -1)
            torch.sum(per_state, dim=-2, dtype=grad.dtype, out=of_states)
        else:
            states, counts = torch.unique_consecutive(kept // num_actions, return_counts=True)
            starts = counts.cumsum(0) - counts
            every = torch.arange(len(kept))
            sums_of_states = functional.embedding_bag(every, grad_hidden.to(grad.dtype), starts, mode="sum")
            of_states.index_copy_(0, states, sums_of_states)


def _rows_to_keep(grad: Tensor) -> Tensor | None:
    """Numbers of the rows with gradient, if those without are enough to leave them out."""
    kept = grad.nonzero().squeeze(1)
    return kept if len(kept) <= (1.0 - _MIN_SHARE_LEFT_OUT) * len(grad) else None


def _parts(num_critics: int, batch_size: int, num_actions: int, width: int, how: _How) -> list[_Part]:
    """Parts that any number of threads may share out among them."""
    blocks = _blocks(batch_size, num_actions, width, how.dtype, has_norms=how.num_norms > 0)
    if len(blocks) == 1 < num_critics and how.batches_critics:
        work = num_critics * batch_size * num_actions * width**2
        num_groups = 1 if work < _LEAST_WORK_OF_THREADS else max(2, work // _WORK_OF_A_GROUP)
        if num_groups == 1:
            return [_Part(_ALL, 0, blocks)]
        if num_groups < num_critics:
            ends = [num_critics * number // num_groups for number in range(num_groups + 1)]
            return [_Part(slice(first, end), 0, blocks) for first, end in itertools.pairwise(ends)]
    num_runs = min(_MOST_RUNS, len(blocks))
    return [_Part(c, run, blocks[run::num_runs]) for run in range(num_runs) for c in range(num_critics)]


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
    """Layer norm, into new memory, means of rows and the inverse of their standard deviations.

    Args:
        sums: Of one critic, shape (R, n), or of several, shape (C, R, n).
        scale: Shape (n,) or (C, n).
        shift: The same.
    """
    if sums.dim() == 2:
        return torch.native_layer_norm(sums, scale.shape, scale, shift, LAYER_NORM_EPS)
    plain, mean, rstd = torch.native_layer_norm(sums, scale.shape[-1:], None, None, LAYER_NORM_EPS)
    return torch.addcmul(shift.unsqueeze(1), plain, scale.unsqueeze(1)), mean, rstd


def _through_norm(
    grad: Tensor, sums: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normalised, of the scale and of the shift, given that of the norm's result."""
    if sums.dim() == 3:
        of_scale = (grad * ((sums - mean) * rstd)).sum(-2)
        of_sums, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * scale.unsqueeze(1), sums, scale.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
        return of_sums, of_scale, grad.sum(-2)
    wanted = [True, True, True]
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad, sums, scale.shape, mean, rstd, scale, shift, wanted
    )
    return gradients


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype != left.dtype:
        total.add_(torch.matmul(left, right))
    elif total.dim() == 2:
        total.addmm_(left, right)
    else:
        total.baddbmm_(left, right)
