"""Networks of Cal-QL: a tanh-Gaussian policy and an ensemble of critics with a leading critic axis.

Axes: `C` critics, `M` sampled actions, `B` batch, `A` action dimension, `H` hidden width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from rllib_calql.networks.critic_kernel import KERNEL_ACTIVATIONS, evaluate_by_kernel

LOG_STD_BOUNDS = (-20.0, 2.0)  # Authors' code and Haarnoja et al. 2018.
DATA_ACTION_LIMIT = 0.99999  # Data actions are clipped to +-this before arctanh (authors' code).
_HIDDEN_GAIN = math.sqrt(2.0)  # Orthogonal init, authors' code.
_OUTPUT_GAIN = 1e-2

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "tanh": torch.tanh,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "leaky_relu": functional.leaky_relu,
}


def initialise(weight: Tensor, bias: Tensor, *, orthogonal: bool, is_output: bool) -> None:
    """Fills one layer, weight of shape (in, out): orthogonal as the authors do, else as torch does."""
    if orthogonal:
        nn.init.orthogonal_(weight, gain=_OUTPUT_GAIN if is_output else _HIDDEN_GAIN)
        nn.init.zeros_(bias)
    else:
        bound = 1.0 / math.sqrt(weight.shape[0])
        nn.init.uniform_(weight, -bound, bound)
        nn.init.uniform_(bias, -bound, bound)


class TanhGaussianPolicy(nn.Module):
    """Tanh-squashed diagonal Gaussian over [-1, 1]^A.

    The standard deviation is exp(multiplier * output + offset), multiplier and offset being learned scalars that start
    at 1 and -1 (authors' code), clipped to exp([-20, 2]).

    Args:
        obs_dim: Size of an observation.
        action_dim: Size of an action.
        hiddens: Widths of the hidden layers.
        activation: A key of `ACTIVATIONS`.
        layer_norm: Whether every hidden layer is normalised before its activation.
        orthogonal_init: Whether weights start orthogonal, biases zero.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hiddens: Sequence[int],
        *,
        activation: str = "relu",
        layer_norm: bool = False,
        orthogonal_init: bool = True,
    ) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[activation]
        self.product_dtype: torch.dtype | None = None  # Of hidden layers; None is that of the parameters.
        widths = [obs_dim, *hiddens]
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(n) for n in hiddens) if layer_norm else None
        self.head = nn.Linear(widths[-1], 2 * action_dim)
        self.log_std_multiplier = nn.Parameter(torch.tensor(1.0))
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))
        for layer in [*self.layers, self.head]:
            initialise(layer.weight.data.T, layer.bias.data, orthogonal=orthogonal_init, is_output=layer is self.head)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log standard deviation before squashing, each of shape (B, A)."""
        hidden = apply_hidden(obs, self.layers, self.norms, self._activation, self.product_dtype)
        mean, raw_log_std = apply_linear(self.head, hidden, obs.dtype).chunk(2, dim=-1)
        log_std = self.log_std_multiplier * raw_log_std + self.log_std_offset
        return mean, log_std.clamp(*LOG_STD_BOUNDS)


def apply_hidden(
    inputs: Tensor,
    layers: nn.ModuleList,
    norms: nn.ModuleList | None,
    activation: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None,
) -> Tensor:
    """Hidden layers in turn, the products of all but the first in `dtype`; None is that of the parameters."""
    hidden = inputs
    for index, layer in enumerate(layers):
        assert isinstance(layer, nn.Linear)
        hidden = layer(hidden) if index == 0 else apply_linear(layer, hidden, dtype)
        if norms is not None:
            hidden = norms[index](hidden)
        hidden = activation(hidden)
    return hidden


def apply_linear(layer: nn.Linear, inputs: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A layer whose product and result are of another type than its parameters."""
    if dtype is None or dtype == inputs.dtype == layer.weight.dtype:
        return functional.linear(inputs, layer.weight, layer.bias)
    return functional.linear(inputs.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Reparameterised sample of the tanh-Gaussian and its log-density.

    Args:
        mean: Shape (B, A).
        log_std: Shape (B, A).
        noise: Standard normal, shape (..., B, A).

    Returns:
        Actions in (-1, 1), shape (..., B, A), and their log-densities, shape (..., B).
    """
    unsquashed = torch.addcmul(mean, log_std.exp(), noise)
    return torch.tanh(unsquashed), _log_density(noise, log_std, unsquashed)


def log_prob_of(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Log-density of given actions of [-1, 1]^A, clipped away from the ends, shape (..., B)."""
    unsquashed = torch.atanh(actions.clamp(-DATA_ACTION_LIMIT, DATA_ACTION_LIMIT))
    noise = (unsquashed - mean) * (-log_std).exp()
    return _log_density(noise, log_std, unsquashed)


def _log_density(noise: Tensor, log_std: Tensor, unsquashed: Tensor) -> Tensor:
    """Log-density of tanh(z) with z = mean + std * noise, summed over the dimensions of an action, shape (..., B).

    Each has -noise^2 / 2 - log std - log(2 pi) / 2 of the Gaussian, and log(1 - tanh(z)^2) of the squashing, which is
    2 (log 2 - z - softplus(-2 z)), without cancellation for large |z| (Haarnoja et al. 2018, arXiv:1801.01290,
    appendix C). Few operations, and the constants once for all dimensions: small batches take as long as these do.
    """
    of_gaussian = torch.addcmul(log_std, noise, noise, value=0.5)
    of_slope = unsquashed + functional.softplus(-2.0 * unsquashed)
    constant = noise.shape[-1] * (2.0 * math.log(2.0) + 0.5 * math.log(2.0 * math.pi))
    return -constant - torch.sub(of_gaussian, of_slope, alpha=2.0).sum(dim=-1)


class EnsembleCritic(nn.Module):
    """C independent Q networks, their parameters stacked on a leading critic axis.

    The first layer is split, W [s, a] = W_s s + W_a a, so that the observation part is computed once per state however
    many actions are judged there.

    Args:
        num_critics: C.
        obs_dim: Size of an observation.
        action_dim: Size of an action.
        hiddens: Widths of the hidden layers, at least one.
        activation: A key of `ACTIVATIONS`.
        layer_norm: Whether every hidden layer is normalised before its activation.
        orthogonal_init: Whether weights start orthogonal, biases zero.
    """

    def __init__(
        self,
        num_critics: int,
        obs_dim: int,
        action_dim: int,
        hiddens: Sequence[int],
        *,
        activation: str = "relu",
        layer_norm: bool = False,
        orthogonal_init: bool = True,
    ) -> None:
        super().__init__()
        self.num_critics = num_critics
        self._activation = ACTIVATIONS[activation]
        self._kernel_activation = activation if activation in KERNEL_ACTIVATIONS else None
        self.product_dtype: torch.dtype | None = None  # Of hidden layers; None is that of the parameters.
        widths = [obs_dim + action_dim, *hiddens, 1]
        sizes = list(itertools.pairwise(widths))
        joint = torch.empty(num_critics, *sizes[0])
        self.weights = nn.ParameterList(torch.empty(num_critics, n_in, n_out) for n_in, n_out in sizes[1:])
        self.biases = nn.ParameterList(torch.empty(num_critics, n_out) for _, n_out in sizes)
        for index, weight in enumerate([joint, *self.weights]):
            for c in range(num_critics):
                is_output = index == len(sizes) - 1
                initialise(weight.data[c], self.biases[index].data[c], orthogonal=orthogonal_init, is_output=is_output)
        # Two parameters rather than one sliced in `forward`: the optimiser sees leaves, and no gradient is assembled.
        self.obs_weight = nn.Parameter(joint[:, :obs_dim].clone())
        self.action_weight = nn.Parameter(joint[:, obs_dim:].clone())
        norms = hiddens if layer_norm else []
        self.norm_scales = nn.ParameterList(torch.ones(num_critics, n) for n in norms)
        self.norm_shifts = nn.ParameterList(torch.zeros(num_critics, n) for n in norms)
        self._layers, self._norms = self._parameters_of_layers()

    def _parameters_of_layers(self) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, Tensor], ...]]:
        """As `forward` takes them, kept because to go through torch's lists of parameters at each step takes long."""
        further = zip(self.weights, list(self.biases)[1:], strict=True)
        layers = (self.obs_weight, self.biases[0], self.action_weight, *itertools.chain.from_iterable(further))
        return layers, tuple(zip(self.norm_scales, self.norm_shifts, strict=True))

    def forward(self, obs: Tensor, actions: Tensor, *, frozen: bool = False, members: Tensor | None = None) -> Tensor:
        """Q of M actions at each of B states.

        Args:
            obs: Shape (B, obs_dim).
            actions: Shape (M, B, A).
            frozen: Whether the parameters are constants, so that only `actions` receives gradient.
            members: Numbers of K critics, shape (K,), if not all of them are asked.

        Returns:
            Q values, shape (C, M, B), or (K, M, B).
        """
        if actions.dim() != 3 or obs.dim() != 2 or actions.shape[1] != obs.shape[0]:
            raise ValueError(
                f"`obs` must be (B, obs_dim) and `actions` (M, B, A), got {tuple(obs.shape)}, {tuple(actions.shape)}."
            )
        # `torch.func` gives others to one call, and `load_state_dict` may have assigned others.
        are_kept = self._parameters["obs_weight"] is self._layers[0]
        of_layers, of_norms = (self._layers, self._norms) if are_kept else self._parameters_of_layers()
        parameters, norms = list(of_layers), list(of_norms)
        if frozen:
            parameters = [parameter.detach() for parameter in parameters]
            norms = [(scale.detach(), shift.detach()) for scale, shift in norms]
        if members is not None:
            parameters = [parameter.index_select(0, members) for parameter in parameters]
            norms = [(scale.index_select(0, members), shift.index_select(0, members)) for scale, shift in norms]
        dtype = self.product_dtype or obs.dtype
        obs_weight, bias, *others = parameters
        activation = self._kernel_activation if obs.device.type == "cpu" else None
        if activation is not None or self._are_batched(len(obs_weight), len(actions), obs.device):
            obs_part = _product(obs.expand(len(obs_weight), -1, -1), obs_weight, bias)
            if activation is None:
                return self._evaluate(obs_part, actions, dtype, others, norms)
            return evaluate_by_kernel(obs_part, actions, dtype, *others, activation=activation, norms=norms)
        q = []
        for c, (obs_weight, bias, *others) in enumerate(zip(*(p.unbind() for p in parameters), strict=True)):
            own_norms = [(scale[c], shift[c]) for scale, shift in norms]
            q.append(self._evaluate(_product(obs, obs_weight, bias), actions, dtype, others, own_norms))
        return torch.stack(q)

    @staticmethod
    def _are_batched(num_critics: int, num_actions: int, device: torch.device) -> bool:
        """Whether one batched product for all critics, a C-th of the kernels, is faster than a product for each.

        On a CPU it is where each product is small: 0.4 to 0.8 of the time for one action and ten critics, 1.0 to 1.6
        for 13 actions (two threads, 128 to 256 rows and units).
        """
        return device.type != "cpu" or (num_actions == 1 and num_critics > 2)

    def _evaluate(
        self,
        obs_part: Tensor,
        actions: Tensor,
        dtype: torch.dtype,
        parameters: Sequence[Tensor],
        norms: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Q of one critic, shape (M, B), or of all, shape (C, M, B), where everything but `actions` has that axis.

        Args:
            obs_part: What the first layer makes of the observations, shape (..., B, H).
            actions: Shape (M, B, A).
            dtype: Of the products of all layers but the last.
            parameters: Of the first layer's action part, then weight and bias of every other layer.
            norms: Scale and shift of every layer norm.
        """
        action_weight, *layers = parameters
        last = len(layers) - 2
        action_part = torch.matmul(actions.flatten(0, 1).to(dtype), action_weight.to(dtype))
        shape = (*action_part.shape[:-2], *actions.shape[:2])
        hidden = action_part.view(*shape, -1) + obs_part.to(dtype).unsqueeze(-3)
        hidden = hidden.flatten(-3, -2)
        for index in range(0, len(layers), 2):
            if norms:
                scale, shift = norms[index // 2]
                hidden = _normalised(hidden, scale.to(dtype), shift.to(dtype))
            hidden = self._activation(hidden)
            of_layer = obs_part.dtype if index == last else dtype
            hidden = _product(hidden.to(of_layer), layers[index].to(of_layer), layers[index + 1].to(of_layer))
        return hidden.view(shape)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer of one critic, inputs (R, n_in), or of all at once, inputs (C, R, n_in)."""
    if inputs.dim() == 2:
        return torch.addmm(bias, inputs, weight)
    return torch.baddbmm(bias.unsqueeze(1), inputs, weight)


def _normalised(hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm of one critic, hidden (R, n), or of all at once, hidden (C, R, n)."""
    if hidden.dim() == 2:
        return functional.layer_norm(hidden, scale.shape, scale, shift)
    return functional.layer_norm(hidden, hidden.shape[-1:]) * scale.unsqueeze(1) + shift.unsqueeze(1)
