"""The critics' kernel with layer norm and other activations: finite differences, plain formulas, rows left out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from plain_networks import is_by_kernel, one_by_kernel, plain_critic, random, randomise
from torch import Tensor
from torch.nn import functional

from rllib_calql.networks import critic_kernel
from rllib_calql.networks.actor_critic import ACTIVATIONS, EnsembleCritic
from rllib_calql.networks.critic_kernel import KERNEL_ACTIVATIONS

NUM_STATES, NUM_ACTIONS, ACTION_DIM = 5, 4, 2
LAYERS = [("relu", True), *itertools.product(("tanh", "elu", "leaky_relu"), (False, True))]
of_every_kind = pytest.mark.parametrize(("activation", "layer_norm"), LAYERS)
PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "tanh": torch.tanh,
    "elu": lambda x: torch.where(x > 0, x, torch.expm1(x.clamp(max=0.0))),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
}


@pytest.fixture(params=[None, 1, 9 * 8 * 7], ids=["one block", "a block per state", "uneven blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        for name in ("_BLOCK_BYTES", "_NORM_BLOCK_BYTES"):
            monkeypatch.setattr(critic_kernel, name, request.param)


def parameters_of(widths: list[int], *, layer_norm: bool) -> list[Tensor]:
    """Observation part, action weight, weight and bias of further layers, then scale and shift of every norm."""
    tensors = [random(NUM_STATES, widths[0], seed=1), random(ACTION_DIM, widths[0], seed=2)]
    for number, (n_in, n_out) in enumerate(zip(widths, [*widths[1:], 1], strict=True)):
        tensors += [random(n_in, n_out, seed=3 + 2 * number), random(n_out, seed=4 + 2 * number)]
    for number, width in enumerate(widths if layer_norm else []):
        tensors += [random(width, seed=20 + 2 * number) + 0.5, random(width, seed=21 + 2 * number)]
    return [tensor.requires_grad_() for tensor in tensors]


def by_kernel(actions: Tensor, parameters: list[Tensor], activation: str, num_norms: int, dtype: torch.dtype) -> Tensor:
    obs_part, *others = parameters
    layers, of_norms = (others, []) if num_norms == 0 else (others[: -2 * num_norms], others[-2 * num_norms :])
    norms = list(zip(of_norms[::2], of_norms[1::2], strict=True))
    return one_by_kernel(obs_part, actions, dtype, *layers, activation=activation, norms=norms)


def by_formula(actions: Tensor, parameters: list[Tensor], activation: str, num_norms: int) -> Tensor:
    """The same for all rows at once, from sums and roots; autograd differentiates it."""
    obs_part, action_weight, *others = parameters
    layers, of_norms = (others, []) if num_norms == 0 else (others[: -2 * num_norms], others[-2 * num_norms :])
    hidden = obs_part + actions @ action_weight
    for number in range(0, len(layers), 2):
        if of_norms:
            centred = hidden - hidden.mean(dim=-1, keepdim=True)
            deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
            hidden = centred / deviation * of_norms[number] + of_norms[number + 1]
        hidden = PLAIN_ACTIVATIONS[activation](hidden) @ layers[number] + layers[number + 1]
    return hidden.squeeze(-1)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dense", [True, False])
@of_every_kind
def test_gradients_equal_finite_differences(activation: str, layer_norm: bool, dense: bool) -> None:
    widths = [3, 5, 4]
    actions = random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=0)
    num_norms = len(widths) if layer_norm else 0

    def q(*parameters: Tensor) -> Tensor:
        return by_kernel(actions, list(parameters), activation, num_norms, torch.float64)

    # The slow mode asks for the gradient of one Q at a time: all other rows are left out.
    parameters = parameters_of(widths, layer_norm=layer_norm)
    assert torch.autograd.gradcheck(q, parameters, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=dense)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("widths", [[6], [7, 5], [3, 7, 4, 5]], ids=str)
@pytest.mark.parametrize("share_left_out", [0.0, 0.05, 0.5, 1.0])
@of_every_kind
def test_values_and_gradients_equal_the_formula_for_all_rows_at_once(
    activation: str, layer_norm: bool, share_left_out: float, widths: list[int]
) -> None:
    parameters = parameters_of(widths, layer_norm=layer_norm)
    actions = random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=0)
    num_norms = len(widths) if layer_norm else 0
    left_out = np.random.default_rng(5).random((NUM_ACTIONS, NUM_STATES)) < share_left_out
    left_out[:, 2] = share_left_out > 0.0  # A state of which nothing is left.
    weights = torch.from_numpy(np.where(left_out, 0.0, np.random.default_rng(6).normal(size=left_out.shape)))
    both = (
        by_kernel(actions, parameters, activation, num_norms, torch.float64),
        by_formula(actions, parameters, activation, num_norms),
    )
    results = [[q, *torch.autograd.grad((q * weights).sum(), parameters)] for q in both]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("_blocks")
@of_every_kind
def test_values_equal_a_plain_mlp(activation: str, layer_norm: bool) -> None:
    critic = EnsembleCritic(3, 3, ACTION_DIM, [7, 5], activation=activation, layer_norm=layer_norm).double()
    randomise(critic)
    obs, actions = random(NUM_STATES, 3, seed=1), random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=2)
    q = critic(obs, actions)
    assert is_by_kernel(q)
    with torch.no_grad():
        torch.testing.assert_close(critic(obs, actions), q.detach(), rtol=0, atol=0)
    for c in range(3):
        expected = plain_critic(critic, c, obs.numpy(), actions.numpy(), activation)
        np.testing.assert_allclose(q[c].detach().numpy(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-2)], ids=str)
@pytest.mark.parametrize("share_left_out", [0.0, 0.5])
@of_every_kind
def test_in_shorter_types_the_error_is_that_of_autograd(
    activation: str, layer_norm: bool, share_left_out: float, dtype: torch.dtype, bound: float
) -> None:
    critic = EnsembleCritic(1, 8, 8, [64, 48], activation=activation, layer_norm=layer_norm)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in critic.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) / max(parameter[0].shape[0], 9) ** 0.5
        parameter.data = noise + (1.0 if "scales" in name else 0.0)
    obs = torch.randn(40, 8, generator=generator)
    actions = torch.rand(6, 40, 8, generator=generator) * 2.0 - 1.0
    weights = torch.randn(6, 40, generator=generator)
    weights *= torch.rand(weights.shape, generator=generator) >= share_left_out

    def results(*, in_double: bool = False, has_kernel: bool = True) -> list[Tensor]:
        judge = copy.deepcopy(critic).to(torch.float64 if in_double else torch.float32)
        judge.product_dtype = None if in_double else dtype
        judge._kernel_activation = activation if has_kernel else None
        q = judge(*(values.to(judge.obs_weight.dtype) for values in (obs, actions)))[0]
        assert is_by_kernel(q) == has_kernel
        return [q, *torch.autograd.grad((q * weights).sum(), list(judge.parameters()))]

    exact = results(in_double=True, has_kernel=False)
    errors = []
    for found in (results(), results(has_kernel=False)):
        assert {one.dtype for one in found} == {torch.float32}
        relative = [((one - truth).norm() / truth.norm()).item() for one, truth in zip(found, exact, strict=True)]
        assert max(relative) <= bound
        errors.append(np.linalg.norm(relative))
    assert errors[0] <= 2.0 * errors[1] + 1e-6  # Roundings are random.


@pytest.mark.parametrize("layer_norm", [False, True])
def test_rows_left_out_are_not_computed(layer_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[str, int]] = []

    def spy(name: str, position: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            rows.append((name, len(args[position])))
            return original(*args)

        return call

    for name, position in (("_add_product_", 2), ("_through_norm", 0)):  # Where the gradient of the rows stands.
        monkeypatch.setattr(critic_kernel, name, spy(name, position, getattr(critic_kernel, name)))
    parameters = parameters_of([7, 5], layer_norm=layer_norm)
    actions = random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=0)
    by_kernel(actions, parameters, "tanh", 2 * layer_norm, torch.float64)[0, :3].sum().backward()
    of_layer = [("_through_norm", 3)] * layer_norm + [("_add_product_", 3)]
    assert rows == 2 * of_layer


@of_every_kind
def test_a_gradient_that_is_nan_is_not_left_out(activation: str, layer_norm: bool) -> None:
    parameters = parameters_of([7, 5], layer_norm=layer_norm)
    actions = random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=0)
    q = by_kernel(actions, parameters, activation, 2 * layer_norm, torch.float64)
    (q[0, 1] * torch.nan).backward()
    assert all(parameter.grad.isnan().any() for parameter in parameters)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("frozen", ["all", "all but one"])
def test_parameters_that_are_constants_get_no_gradient(layer_norm: bool, frozen: str) -> None:
    parameters = parameters_of([7, 5], layer_norm=layer_norm)
    actions = random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=0)
    free = by_kernel(actions, parameters, "elu", 2 * layer_norm, torch.float64)
    (expected,) = torch.autograd.grad(free.square().sum(), parameters[-1])
    for parameter in parameters[: -1 if frozen == "all but one" else None]:
        parameter.requires_grad_(False)
    q = by_kernel(actions, parameters, "elu", 2 * layer_norm, torch.float64)
    torch.testing.assert_close(q, free, rtol=0, atol=0)
    assert q.requires_grad == (frozen == "all but one")
    if q.requires_grad:
        q.square().sum().backward()
        torch.testing.assert_close(parameters[-1].grad, expected, rtol=0, atol=0)
        assert all(parameter.grad is None for parameter in parameters[:-1])


def test_an_activation_of_the_kernel_is_the_one_of_the_networks() -> None:
    values = torch.linspace(-4.0, 4.0, 101, dtype=torch.float64)
    for name in KERNEL_ACTIVATIONS:
        found = torch.empty_like(values)
        critic_kernel.IN_PLACE_ACTIVATIONS[name].evaluate(values, found)
        torch.testing.assert_close(found, ACTIVATIONS[name](values), rtol=0, atol=0)
    assert functional.layer_norm(values, values.shape).equal(
        functional.layer_norm(values, values.shape, eps=critic_kernel.LAYER_NORM_EPS)
    )


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sampled_actions_and_those_of_the_actor_take_the_kernel(activation: str, layer_norm: bool) -> None:
    critic = EnsembleCritic(1, 3, 2, [8], activation=activation, layer_norm=layer_norm)
    obs, actions = torch.zeros(2, 3), torch.zeros(4, 2, 2)
    has_kernel = activation in ("relu", "tanh", "elu", "leaky_relu")
    assert is_by_kernel(critic(obs, actions)) == has_kernel
    assert is_by_kernel(critic(obs, actions.requires_grad_(), frozen=True)) == has_kernel
