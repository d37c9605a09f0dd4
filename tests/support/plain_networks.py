"""Plain NumPy statements of the networks, and parameters none of which is zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor

from rllib_calql.networks.actor_critic import EnsembleCritic
from rllib_calql.networks.critic_kernel import evaluate_by_kernel

Array = npt.NDArray[np.float64]

NUMPY_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "tanh": np.tanh,
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "gelu": lambda x: 0.5 * x * (1.0 + special.erf(x / math.sqrt(2.0))),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
}


def numpy_mlp(
    inputs: Array,
    weights: list[Array],
    biases: list[Array],
    activation: str,
    norms: list[tuple[Array, Array]] | None = None,
) -> Array:
    """Layers of x W + b, layer norm and activation; the last one is linear. Weights are [in, out]."""
    hidden = inputs
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = hidden @ weight + bias
        if i == len(weights) - 1:
            return hidden
        if norms is not None:
            scale, shift = norms[i]
            centred = hidden - hidden.mean(axis=-1, keepdims=True)
            hidden = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * scale + shift
        hidden = NUMPY_ACTIVATIONS[activation](hidden)
    raise AssertionError


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter a value that is not zero, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def plain_critic(critic: EnsembleCritic, c: int, obs: Array, actions: Array, activation: str) -> Array:
    """Critic c as one MLP on the concatenation (s, a), actions of shape (M, B, A); shape (M, B)."""
    weights = [np.concatenate([critic.obs_weight[c].detach().numpy(), critic.action_weight[c].detach().numpy()])]
    weights += [weight[c].detach().numpy() for weight in critic.weights]
    biases = [bias[c].detach().numpy() for bias in critic.biases]
    norms = [
        (scale[c].detach().numpy(), shift[c].detach().numpy())
        for scale, shift in zip(critic.norm_scales, critic.norm_shifts, strict=True)
    ]
    joint = [np.concatenate([obs, one], axis=1) for one in actions]
    return np.asarray([numpy_mlp(rows, weights, biases, activation, norms or None)[:, 0] for rows in joint])


def is_by_kernel(q: Tensor) -> bool:
    """Whether the critics' kernel is to differentiate it."""
    seen, left = set(), [q.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if "_BlockwiseCritics" in node.name():
            return True
        seen.add(node)
        left += [following for following, _ in node.next_functions]
    return False


def one_by_kernel(
    obs_part: Tensor,
    actions: Tensor,
    dtype: torch.dtype,
    *parameters: Tensor,
    norms: Sequence[tuple[Tensor, Tensor]] = (),
    **how: Any,
) -> Tensor:
    """Q (M, B) of one critic by the critics' kernel, from parameters without an axis of critics."""
    alone = [parameter.unsqueeze(0) for parameter in parameters]
    norms = [(scale.unsqueeze(0), shift.unsqueeze(0)) for scale, shift in norms]
    return evaluate_by_kernel(obs_part.unsqueeze(0), actions, dtype, *alone, norms=norms, **how)[0]
