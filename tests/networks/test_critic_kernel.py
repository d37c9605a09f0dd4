"""The critics' kernel against finite differences and plain NumPy, in one block and in many, dense and sparse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from plain_networks import is_by_kernel, one_by_kernel, plain_critic, random, randomise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rllib_calql.networks import critic_kernel
from rllib_calql.networks.actor_critic import EnsembleCritic

NUM_STATES, NUM_ACTIONS, ACTION_DIM = 5, 4, 2


@pytest.fixture(params=[None, 1, 9 * 8 * 7], ids=["one block", "a block per state", "uneven blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(critic_kernel, "_BLOCK_BYTES", request.param)


def parameters_of(widths: list[int]) -> list[Tensor]:
    """Observation part, action weight, then weight and bias of every further layer."""
    tensors = [random(NUM_STATES, widths[0], seed=1), random(ACTION_DIM, widths[0], seed=2)]
    for number, (n_in, n_out) in enumerate(zip(widths, [*widths[1:], 1], strict=True)):
        tensors += [random(n_in, n_out, seed=3 + 2 * number), random(n_out, seed=4 + 2 * number)]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("widths", [[6], [7, 5], [3, 7, 4, 5]], ids=str)
@pytest.mark.parametrize("dense", [True, False])
def test_gradients_equal_finite_differences(widths: list[int], dense: bool) -> None:
    actions = random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=0)

    def q(obs_part: Tensor, *parameters: Tensor) -> Tensor:
        return one_by_kernel(obs_part, actions, torch.float64, *parameters)

    # The slow mode asks for the gradient of one Q at a time: all other rows are left out.
    assert torch.autograd.gradcheck(q, parameters_of(widths), eps=1e-6, atol=1e-7, rtol=1e-6, fast_mode=dense)


@pytest.mark.usefixtures("_blocks")
def test_values_equal_a_plain_mlp() -> None:
    critic = EnsembleCritic(3, 3, ACTION_DIM, [7, 5]).double()
    randomise(critic)
    obs, actions = random(NUM_STATES, 3, seed=1), random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=2)
    q = critic(obs, actions)
    assert is_by_kernel(q)
    with torch.no_grad():
        torch.testing.assert_close(critic(obs, actions), q.detach(), rtol=0, atol=0)
    for c in range(3):
        expected = plain_critic(critic, c, obs.numpy(), actions.numpy(), "relu")
        np.testing.assert_allclose(q[c].detach().numpy(), expected, rtol=1e-12)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_rows_without_gradient_change_nothing(share: float) -> None:
    parameters = parameters_of([7, 5])
    actions = random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=0)
    left_out = np.random.default_rng(5).random((NUM_ACTIONS, NUM_STATES)) < share
    left_out[:, 2] = share > 0.0  # A state of which nothing is left.
    weights = torch.from_numpy(np.where(left_out, 0.0, np.random.default_rng(6).normal(size=left_out.shape)))

    def gradients(rows: list[tuple[int, int]]) -> list[Tensor]:
        """Sum over those rows, each by itself: no row beside it."""
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        for m, b in rows:
            obs_part = parameters[0][b : b + 1]
            q = one_by_kernel(obs_part, actions[m : m + 1, b : b + 1], torch.float64, *parameters[1:])
            grads = torch.autograd.grad(weights[m, b] * q.sum(), parameters)
            totals = [total + grad for total, grad in zip(totals, grads, strict=True)]
        return totals

    q = one_by_kernel(parameters[0], actions, torch.float64, *parameters[1:])
    found = torch.autograd.grad((q * weights).sum(), parameters)
    expected = gradients([(m, b) for m in range(NUM_ACTIONS) for b in range(NUM_STATES) if not left_out[m, b]])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rows_left_out_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = critic_kernel._add_product_

    def spy(total: Tensor, left: Tensor, right: Tensor) -> None:
        rows.append(len(right))
        original(total, left, right)

    monkeypatch.setattr(critic_kernel, "_add_product_", spy)
    parameters = parameters_of([7, 5])
    actions = random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=0)
    one_by_kernel(parameters[0], actions, torch.float64, *parameters[1:])[0, :3].sum().backward()
    assert rows == [3, 3]


def test_a_gradient_that_is_nan_is_not_left_out() -> None:
    parameters = parameters_of([7])
    actions = random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=0)
    q = one_by_kernel(parameters[0], actions, torch.float64, *parameters[1:])
    (q[0, 1] * torch.nan).backward()
    assert all(parameter.grad.isnan().any() for parameter in parameters)


def test_blocks_cover_every_state_once_and_the_longest_comes_first() -> None:
    for batch_size, num_actions, width in ((256, 31, 256), (7, 3, 10_000_000), (1, 1, 1), (1000, 10, 300)):
        blocks = critic_kernel._blocks(batch_size, num_actions, width, torch.float32)
        states = sorted(state for first, end in blocks for state in range(first, end))
        assert states == list(range(batch_size))
        sizes = [end - first for first, end in blocks]
        assert sizes[0] == max(sizes)
        assert max(sizes) - min(sizes) <= 1


class TypesOfProducts(TorchDispatchMode):
    """Types of the factors of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes the type of the first matrix."""
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmv", "bmm", "baddbmm"):
            self.seen.append((name, args[0 if name in ("mm", "bmm") else 1].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "elu", "silu"], ids=["kernel", "kernel elu", "autograd"])
def test_in_bfloat16_hidden_layers_are_rounded_and_the_last_is_not(activation: str, layer_norm: bool) -> None:
    torch.manual_seed(0)
    critic = EnsembleCritic(2, 3, ACTION_DIM, [64, 64, 64], activation=activation, layer_norm=layer_norm)
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(16, 3, generator=generator)
    actions = torch.rand(NUM_ACTIONS, 16, ACTION_DIM, generator=generator) * 2.0 - 1.0
    weights = torch.randn(2, NUM_ACTIONS, 16, generator=generator)
    results = []
    for dtype in (None, torch.bfloat16):
        critic.product_dtype = dtype
        critic.zero_grad()
        with TypesOfProducts() as products:
            q = critic(obs, actions)
            (q * weights).sum().backward()
        results.append((q.detach(), {name: p.grad.clone() for name, p in critic.named_parameters()}, products.seen))
    (q, grads, seen), (rounded_q, rounded_grads, rounded_seen) = results
    assert {dtype for _, dtype in seen} == {torch.float32}
    forward = [dtype is torch.bfloat16 for _, dtype in rounded_seen[:5]]  # Of the first critic.
    assert forward == [False, True, True, True, False]
    assert rounded_q.dtype == torch.float32
    # A factor errs by up to 2^-9 of itself. Fresh critics are near zero, sums that cancel, so errors are larger.
    assert 0.0 < (q - rounded_q).norm() < 0.2 * q.norm()
    for name, exact in grads.items():
        assert rounded_grads[name].dtype == torch.float32
        is_last_bias = name == "biases.3"  # Its gradient is the sum of the weights, whatever the layers do.
        assert is_last_bias == torch.equal(exact, rounded_grads[name])
        assert (exact - rounded_grads[name]).norm() < 0.2 * exact.norm()
