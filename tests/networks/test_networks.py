"""Policy and critics against plain NumPy and SciPy statements, and which network each output of the module reaches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from plain_networks import NUMPY_ACTIVATIONS, numpy_mlp, plain_critic, random, randomise
from scipy import integrate, stats

from rllib_calql.networks.actor_critic import EnsembleCritic, TanhGaussianPolicy, log_prob_of, squash

# Tanh-Gaussian


def test_the_density_of_given_actions_equals_scipys_normal_with_the_change_of_variable() -> None:
    mean, log_std = random(6, 3, seed=1), random(6, 3, seed=2)
    actions = torch.tanh(random(4, 6, 3, seed=3))
    gaussian = stats.norm.logpdf(np.arctanh(actions.numpy()), mean.numpy(), np.exp(log_std.numpy()))
    expected = (gaussian - np.log1p(-(actions.numpy() ** 2))).sum(axis=-1)
    np.testing.assert_allclose(log_prob_of(mean, log_std, actions).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.3), (-1.5, 0.5)])
def test_the_density_over_the_actions_integrates_to_one(mean: float, std: float) -> None:
    def density(action: float) -> float:
        m, s, a = (torch.tensor([[x]], dtype=torch.float64) for x in (mean, math.log(std), action))
        return math.exp(log_prob_of(m, s, a).item())

    mass, _ = integrate.quad(density, -1.0, 1.0, points=[math.tanh(mean)], epsabs=1e-8, limit=200)
    assert mass == pytest.approx(1.0, abs=1e-4)


def test_a_sample_is_tanh_of_mean_plus_deviation_times_noise() -> None:
    mean, log_std, noise = random(5, 2, seed=1), random(5, 2, seed=2), random(3, 5, 2, seed=3)
    actions, log_prob = squash(mean, log_std, noise)
    expected = np.tanh(mean.numpy() + np.exp(log_std.numpy()) * noise.numpy())
    np.testing.assert_allclose(actions.numpy(), expected, rtol=1e-12)
    assert log_prob.shape == (3, 5)


def test_a_sample_brings_the_density_of_its_own_action() -> None:
    mean, log_std, noise = random(5, 2, seed=1), 0.3 * random(5, 2, seed=2), random(3, 5, 2, seed=3)
    actions, log_prob = squash(mean, log_std, noise)
    np.testing.assert_allclose(log_prob.numpy(), log_prob_of(mean, log_std, actions).numpy(), rtol=1e-9)


def test_the_density_of_a_sample_far_out_does_not_overflow() -> None:
    # At z = 50, 1 - tanh(z)^2 is 4 exp(-100) and tanh(z) rounds to 1.
    action, log_prob = squash(torch.tensor([[50.0]]), torch.tensor([[0.0]]), torch.tensor([[0.0]]))
    assert action.item() == 1.0
    assert log_prob.item() == pytest.approx(-0.5 * math.log(2 * math.pi) - (math.log(4.0) - 100.0), rel=1e-6)


def test_given_actions_at_the_ends_are_judged_as_if_just_inside() -> None:
    mean, log_std = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    at_end = log_prob_of(mean, log_std, torch.ones(1, 1, dtype=torch.float64)).item()
    inside = log_prob_of(mean, log_std, torch.full((1, 1), 0.99999, dtype=torch.float64)).item()
    assert at_end == inside
    assert math.isfinite(at_end)


def test_a_sample_lets_gradient_into_mean_and_deviation() -> None:
    mean, log_std = random(1, 1, seed=1).requires_grad_(), random(1, 1, seed=2).requires_grad_()
    noise = random(1, 1, seed=3)
    actions, _ = squash(mean, log_std, noise)
    actions.sum().backward()
    slope = 1.0 - actions.item() ** 2
    assert mean.grad.item() == pytest.approx(slope)
    assert log_std.grad.item() == pytest.approx(slope * math.exp(log_std.item()) * noise.item())


# Policy


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", NUMPY_ACTIVATIONS)
def test_the_policy_equals_a_plain_mlp(activation: str, layer_norm: bool) -> None:
    policy = TanhGaussianPolicy(3, 2, [7, 5], activation=activation, layer_norm=layer_norm)
    randomise(policy)
    layers = [*policy.layers, policy.head]
    norms = [(n.weight.detach().numpy(), n.bias.detach().numpy()) for n in policy.norms] if layer_norm else None
    obs = random(6, 3, seed=4)
    raw = numpy_mlp(
        obs.numpy(),
        [layer.weight.detach().numpy().T for layer in layers],
        [layer.bias.detach().numpy() for layer in layers],
        activation,
        norms,
    )
    mean, log_std = policy(obs)
    np.testing.assert_allclose(mean.detach().numpy(), raw[:, :2], rtol=1e-9)
    scaled = policy.log_std_multiplier.item() * raw[:, 2:] + policy.log_std_offset.item()
    np.testing.assert_allclose(log_std.detach().numpy(), scaled, rtol=1e-9)


def test_the_log_deviation_starts_one_lower_and_is_clipped_to_minus_20_and_2() -> None:
    policy = TanhGaussianPolicy(1, 3, [4])
    policy.head.weight.data.zero_()
    policy.head.bias.data.copy_(torch.tensor([0.1, 0.2, 0.3, 1.5, 3.5, -25.0]))
    mean, log_std = policy(torch.zeros(1, 1))
    torch.testing.assert_close(mean, torch.tensor([[0.1, 0.2, 0.3]]))
    torch.testing.assert_close(log_std, torch.tensor([[0.5, 2.0, -20.0]]))


def test_the_policy_starts_orthogonal_with_gain_sqrt_2_and_a_small_head() -> None:
    policy = TanhGaussianPolicy(3, 2, [16, 8])
    first, second = (layer.weight.detach() for layer in policy.layers)
    torch.testing.assert_close(first.T @ first, 2.0 * torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(second @ second.T, 2.0 * torch.eye(8), atol=1e-5, rtol=0)
    head = policy.head.weight.detach()
    torch.testing.assert_close(head @ head.T, 1e-4 * torch.eye(4), atol=1e-9, rtol=0)
    assert all(not layer.bias.any() for layer in [*policy.layers, policy.head])
    assert (policy.log_std_multiplier.item(), policy.log_std_offset.item()) == (1.0, -1.0)


# Critics


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", NUMPY_ACTIVATIONS)
def test_every_critic_equals_a_plain_mlp_on_state_and_action(activation: str, layer_norm: bool) -> None:
    critic = EnsembleCritic(3, 4, 2, [7, 5], activation=activation, layer_norm=layer_norm)
    randomise(critic)
    obs, actions = random(6, 4, seed=5), random(8, 6, 2, seed=6)
    q = critic(obs, actions)
    assert q.shape == (3, 8, 6)
    for c in range(3):
        expected = plain_critic(critic, c, obs.numpy(), actions.numpy(), activation)
        np.testing.assert_allclose(q[c].detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hiddens", [[5], [6, 5, 4]])
def test_critics_of_any_depth_equal_a_plain_mlp(hiddens: list[int]) -> None:
    critic = EnsembleCritic(2, 3, 1, hiddens)
    randomise(critic)
    obs, actions = random(2, 3, seed=5), random(4, 2, 1, seed=6)
    expected = plain_critic(critic, 1, obs.numpy(), actions.numpy(), "relu")
    np.testing.assert_allclose(critic(obs, actions)[1].detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_critics_are_independent(layer_norm: bool) -> None:
    critic = EnsembleCritic(3, 4, 2, [6, 5], layer_norm=layer_norm)
    randomise(critic)
    obs, actions = random(5, 4, seed=5), random(2, 5, 2, seed=6)
    before = critic(obs, actions)
    before[0].sum().backward()
    for name, parameter in critic.named_parameters():
        assert parameter.grad[0].any(), name
        assert not parameter.grad[1:].any(), name
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter[0] += 0.7
    after = critic(obs, actions)
    assert torch.equal(before[1:], after[1:])
    assert not torch.isclose(before[0], after[0]).any()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_frozen_critics_give_the_same_values_and_gradient_to_the_actions_only(layer_norm: bool) -> None:
    critic = EnsembleCritic(2, 4, 2, [6, 5], activation="tanh", layer_norm=layer_norm)
    randomise(critic)
    obs = random(5, 4, seed=5)
    gradients, values = [], []
    for frozen in (False, True):
        critic.zero_grad()
        actions = random(3, 5, 2, seed=6).requires_grad_()
        q = critic(obs, actions, frozen=frozen)
        q.square().sum().backward()
        gradients.append(actions.grad)
        values.append(q.detach())
        assert all((parameter.grad is None) == frozen for parameter in critic.parameters())
    assert torch.equal(*values)
    torch.testing.assert_close(*gradients)
    assert gradients[1].any()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("hiddens", [[5], [5, 7], [5, 7, 6]])
@pytest.mark.parametrize(("activation", "layer_norm"), [("relu", False), ("tanh", False), ("relu", True)])
def test_batched_critics_as_on_gpus_give_the_same_values_and_gradients(
    activation: str, layer_norm: bool, hiddens: list[int], frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = EnsembleCritic(3, 4, 2, hiddens, activation=activation, layer_norm=layer_norm).double()
    randomise(critic)
    obs, weight = random(6, 4, seed=1), random(3, 5, 6, seed=3)
    found = []
    for is_batched in (False, True):
        monkeypatch.setattr(EnsembleCritic, "_are_batched", staticmethod(lambda *_, value=is_batched: value))
        actions = random(5, 6, 2, seed=2).requires_grad_(True)
        q = critic(obs, actions, frozen=frozen)
        assert q.shape == (3, 5, 6)
        wanted = [actions] if frozen else [actions, *critic.parameters()]
        found.append([q, *torch.autograd.grad((q * weight).sum(), wanted)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("num_critics", "num_actions", "num_products"), [(3, 1, 3), (2, 1, 0), (3, 2, 0)])
def test_on_a_cpu_more_than_two_critics_of_one_action_are_one_batched_product_for_each_layer(
    num_critics: int, num_actions: int, num_products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[int] = []
    real = torch.baddbmm

    def counted(*args: torch.Tensor) -> torch.Tensor:
        products.append(len(args[1]))
        return real(*args)

    monkeypatch.setattr(torch, "baddbmm", counted)
    critic = EnsembleCritic(num_critics, 4, 2, [8, 8], activation="silu").double()  # The kernel has no such.
    critic(random(6, 4, seed=1), random(num_actions, 6, 2, seed=2))
    assert products == [num_critics] * num_products


def test_batched_critics_keep_hidden_layers_in_bfloat16_and_the_last_one_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    critic = EnsembleCritic(2, 4, 2, [8, 8])
    randomise(critic)
    critic.float()
    critic.product_dtype = torch.bfloat16
    obs, actions = random(6, 4, seed=1).float(), random(5, 6, 2, seed=2).float().requires_grad_(True)
    alone = critic(obs, actions)
    monkeypatch.setattr(EnsembleCritic, "_are_batched", staticmethod(lambda *_: True))
    together = critic(obs, actions)
    assert together.dtype == torch.float32
    assert not torch.equal(together, together.bfloat16().float())  # The last layer is not rounded.
    torch.testing.assert_close(together, alone, rtol=0.03, atol=0.03)


def test_critics_start_orthogonal_on_state_and_action_together_and_differ() -> None:
    critic = EnsembleCritic(2, 3, 2, [16, 8])
    for c in range(2):
        joint = torch.cat([critic.obs_weight[c], critic.action_weight[c]]).detach()
        torch.testing.assert_close(joint @ joint.T, 2.0 * torch.eye(5), atol=1e-5, rtol=0)
        second, head = (weight[c].detach() for weight in critic.weights)
        torch.testing.assert_close(second.T @ second, 2.0 * torch.eye(8), atol=1e-5, rtol=0)
        assert head.norm().item() == pytest.approx(1e-2, rel=1e-5)
    assert all(not bias.any() for bias in critic.biases)
    for parameter in (critic.obs_weight, critic.action_weight, *critic.weights):
        assert not torch.equal(parameter[0], parameter[1])


def test_without_orthogonal_init_layers_start_as_torchs_own() -> None:
    critic = EnsembleCritic(2, 30, 10, [100, 50], orthogonal_init=False)
    policy = TanhGaussianPolicy(40, 2, [100, 50], orthogonal_init=False)
    first = torch.cat([critic.obs_weight, critic.action_weight], dim=1)
    layers = [
        (first, critic.biases[0], 40),
        (critic.weights[0], critic.biases[1], 100),
        (critic.weights[1], critic.biases[2], 50),
        (policy.layers[0].weight, policy.layers[0].bias, 40),
        (policy.head.weight, policy.head.bias, 50),
    ]
    for weight, bias, fan_in in layers:
        bound = 1.0 / math.sqrt(fan_in)
        for values in (weight, bias):
            assert values.abs().max().item() <= bound
            assert values.any()
        assert weight.abs().max().item() > 0.9 * bound
        assert weight.abs().mean().item() == pytest.approx(bound / 2, rel=0.2)


@pytest.mark.parametrize(("obs_shape", "action_shape"), [((5, 4), (5, 2)), ((5, 4), (3, 4, 2)), ((4,), (3, 5, 2))])
def test_critics_refuse_shapes_that_do_not_belong_together(obs_shape: Any, action_shape: Any) -> None:
    with pytest.raises(ValueError, match=r"`obs` must be \(B, obs_dim\) and `actions` \(M, B, A\), got"):
        EnsembleCritic(2, 4, 2, [6])(torch.zeros(obs_shape), torch.zeros(action_shape))


@pytest.mark.parametrize("way", ["assigned", "of a call", "copied", "of another type"])
def test_critics_compute_with_the_parameters_that_they_have(way: str) -> None:
    critic, other = (EnsembleCritic(2, 3, 2, [8, 5], layer_norm=True).double() for _ in range(2))
    randomise(critic, seed=1)
    randomise(other, seed=2)
    obs, actions = random(4, 3), random(6, 4, 2, seed=1)
    values = other.state_dict()
    if way == "of a call":
        q = torch.func.functional_call(critic, values, (obs, actions))
    else:
        if way == "of another type":
            critic.float().double()
        critic.load_state_dict(values, assign=way == "assigned")
        q = critic(obs, actions)
    for c in range(2):
        expected = plain_critic(other, c, obs.numpy(), actions.numpy(), "relu")
        np.testing.assert_allclose(q[c].detach().numpy(), expected, rtol=1e-11, atol=1e-13)
    if way == "of a call":  # Which leaves the critics their own.
        expected = plain_critic(critic, 0, obs.numpy(), actions.numpy(), "relu")
        np.testing.assert_allclose(critic(obs, actions)[0].detach().numpy(), expected, rtol=1e-11, atol=1e-13)
