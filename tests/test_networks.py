"""Policy and critics against plain NumPy and SciPy statements, and which network each output of the module reaches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import make_learner
from ray.rllib.core.columns import Columns
from scipy import integrate, special, stats
from torch import Tensor

from rllib_calql import rl_module as outputs
from rllib_calql.networks import EnsembleCritic, TanhGaussianPolicy, log_prob_of, squash
from rllib_calql.rl_module import CalQLTorchRLModule, Noise

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


# The module


def make_module(**settings: Any) -> CalQLTorchRLModule:
    """A module in double precision whose parameters are all random."""
    module: CalQLTorchRLModule = make_learner(num_actions=4, **settings).module["default_policy"]
    module.double()
    randomise(module.policy, seed=1)
    randomise(module.critic, seed=2)
    randomise(module.target_critic, seed=3)
    module.target_critic.requires_grad_(False)
    return module


def use_one_noise(module: CalQLTorchRLModule, batch_size: int = 5) -> Noise:
    noise = Noise(*[part.double() for part in module.draw_noise(batch_size, torch.device("cpu"))])
    module.draw_noise = lambda *_: noise  # type: ignore[method-assign]
    return noise


def transitions(seed: int = 0) -> dict[str, Tensor]:
    return {
        Columns.OBS: random(5, 3, seed=seed),
        Columns.NEXT_OBS: random(5, 3, seed=seed + 1),
        Columns.ACTIONS: torch.tanh(random(5, 2, seed=seed + 2)),
    }


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        (outputs.Q_DATA, "critic."),
        (outputs.Q_UNIFORM, "critic."),
        (outputs.Q_CURRENT, "critic."),
        (outputs.Q_NEXT, "critic."),
        (outputs.ACTOR_LOG_PROB, "policy."),
        (outputs.ACTOR_Q, "policy."),
        (outputs.DATA_LOG_PROB, "policy."),
        (outputs.LOG_PROB_CURRENT, None),
        (outputs.LOG_PROB_NEXT, None),
        (outputs.TARGET_NEXT_Q, None),
        (outputs.TARGET_NEXT_LOG_PROB, None),
    ],
)
def test_each_output_sends_gradient_into_one_network_or_none(name: str, reached: str | None) -> None:
    module = make_module()
    output = module.forward_train(transitions())[name]
    assert output.requires_grad == (reached is not None)
    if reached is None:
        return
    output.square().sum().backward()
    touched = {n.split(".")[0] + "." for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {reached}


def test_next_state_proposals_are_judged_at_the_state() -> None:
    module = make_module()
    noise = use_one_noise(module)
    batch = transitions()
    mean, log_std = module.policy(batch[Columns.NEXT_OBS])
    proposals = np.tanh((mean + log_std.exp() * noise.following).detach().numpy())
    q_next = module.forward_train(batch)[outputs.Q_NEXT].detach().numpy()
    for c in range(2):
        expected = plain_critic(module.critic, c, batch[Columns.OBS].numpy(), proposals, "relu")
        np.testing.assert_allclose(q_next[c], expected, rtol=1e-9, atol=1e-12)


def test_the_next_state_reaches_the_regulariser_through_its_proposals_only() -> None:
    module = make_module()
    use_one_noise(module)
    module.policy.head.weight.data.zero_()  # A policy that is the same everywhere: proposals no longer depend on s'.
    results = []
    for seed in (10, 20):
        batch = transitions() | {Columns.NEXT_OBS: random(5, 3, seed=seed)}
        results.append(module.forward_train(batch))
    for name in (outputs.Q_NEXT, outputs.LOG_PROB_NEXT, outputs.Q_CURRENT, outputs.Q_UNIFORM, outputs.ACTOR_Q):
        assert torch.equal(results[0][name], results[1][name]), name
    assert not torch.isclose(results[0][outputs.TARGET_NEXT_Q], results[1][outputs.TARGET_NEXT_Q]).any()


def test_targets_are_the_minimum_of_the_target_critics_at_the_next_state() -> None:
    module = make_module(num_critics=3)
    noise = use_one_noise(module)
    batch = transitions()
    mean, log_std = module.policy(batch[Columns.NEXT_OBS])
    unsquashed = (mean + log_std.exp() * noise.target).detach().numpy()
    actions = np.tanh(unsquashed)
    next_obs = batch[Columns.NEXT_OBS].numpy()
    expected = np.min([plain_critic(module.target_critic, c, next_obs, actions, "relu") for c in range(3)], axis=0)
    out = module.forward_train(batch)
    np.testing.assert_allclose(out[outputs.TARGET_NEXT_Q].numpy(), expected, rtol=1e-9, atol=1e-12)
    log_cosh = np.logaddexp(unsquashed, -unsquashed) - math.log(2.0)  # 1 - tanh^2 = 1 / cosh^2
    log_prob = stats.norm.logpdf(noise.target.numpy()) - log_std.detach().numpy() + 2.0 * log_cosh
    np.testing.assert_allclose(out[outputs.TARGET_NEXT_LOG_PROB].numpy(), log_prob.sum(axis=-1), rtol=1e-9)


def test_the_actor_is_judged_by_the_minimum_of_the_critics_and_not_of_the_targets() -> None:
    module = make_module(num_critics=3)
    noise = use_one_noise(module)
    batch = transitions()
    mean, log_std = module.policy(batch[Columns.OBS])
    action = np.tanh((mean + log_std.exp() * noise.actor).detach().numpy())[None]
    obs = batch[Columns.OBS].numpy()
    expected = np.min([plain_critic(module.critic, c, obs, action, "relu")[0] for c in range(3)], axis=0)
    actual = module.forward_train(batch)[outputs.ACTOR_Q].detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("max_target_backup", "num_targets"), [(True, 4), (False, 1)])
def test_noise_has_one_entry_for_each_action_and_uniform_actions_fill_the_cube(
    max_target_backup: bool, num_targets: int
) -> None:
    module = make_module(max_target_backup=max_target_backup)
    noise = module.draw_noise(4000, torch.device("cpu"))
    assert noise.actor.shape == (4000, 2)
    assert noise.target.shape == (num_targets, 4000, 2)
    assert noise.uniform.shape == noise.current.shape == noise.following.shape == (4, 4000, 2)
    uniform = noise.uniform.flatten().numpy()
    assert stats.kstest(uniform, stats.uniform(-1.0, 2.0).cdf).pvalue > 1e-3
    for normal in (noise.actor, noise.target, noise.current, noise.following):
        assert stats.kstest(normal.flatten().numpy(), stats.norm.cdf).pvalue > 1e-3


def test_greedy_actions_are_tanh_of_the_mean() -> None:
    module = make_module()
    obs = random(5, 3, seed=7)
    mean, _ = module.policy(obs)
    torch.testing.assert_close(module.forward_inference({Columns.OBS: obs})[Columns.ACTIONS], torch.tanh(mean).detach())


def test_exploring_actions_come_from_the_policy_and_bring_their_density() -> None:
    module = make_module()
    obs = random(3, 3, seed=7).repeat_interleave(4000, dim=0)
    torch.manual_seed(0)
    out = module.forward_exploration({Columns.OBS: obs})
    mean, log_std = (x.detach() for x in module.policy(obs))
    noise = ((torch.atanh(out[Columns.ACTIONS]) - mean) / log_std.exp()).flatten()
    noise = noise[noise.isfinite()]
    assert len(noise) > 20_000
    assert stats.kstest(noise.numpy(), stats.norm.cdf).pvalue > 1e-3
    inside = (out[Columns.ACTIONS].abs() < 0.999).all(dim=1)
    expected = log_prob_of(mean, log_std, out[Columns.ACTIONS])
    torch.testing.assert_close(out[Columns.ACTION_LOGP][inside], expected[inside], rtol=1e-6, atol=1e-6)


def test_random_exploration_is_uniform_over_module_actions() -> None:
    module = make_module()
    module.explores_randomly = True
    torch.manual_seed(0)
    actions = module.forward_exploration({Columns.OBS: random(5000, 3)})[Columns.ACTIONS]
    assert stats.kstest(actions.flatten().numpy(), stats.uniform(-1.0, 2.0).cdf).pvalue > 1e-3


def test_q_values_and_target_values_of_given_actions() -> None:
    module = make_module(num_critics=3)
    batch = transitions()
    obs, actions = batch[Columns.OBS].numpy(), batch[Columns.ACTIONS].numpy()[None]
    main = [plain_critic(module.critic, c, obs, actions, "relu")[0] for c in range(3)]
    target = [plain_critic(module.target_critic, c, obs, actions, "relu")[0] for c in range(3)]
    np.testing.assert_allclose(module.compute_q_values(batch)["qf_preds"].detach().numpy(), main, rtol=1e-9)
    np.testing.assert_allclose(module.forward_target(batch)["qf_target"].numpy(), np.min(target, axis=0), rtol=1e-9)


def test_the_value_estimate_is_the_target_critics_minimum_at_the_greedy_action() -> None:
    module = make_module(num_critics=3)
    obs = random(5, 3, seed=7)
    mean, _ = module.policy(obs)
    greedy = np.tanh(mean.detach().numpy())[None]
    expected = np.min([plain_critic(module.target_critic, c, obs.numpy(), greedy, "relu")[0] for c in range(3)], axis=0)
    estimate = module.estimate_values(obs)
    assert not estimate.requires_grad
    np.testing.assert_allclose(estimate.numpy(), expected, rtol=1e-9)


def test_normalised_observations_are_centred_and_scaled_in_every_forward_pass() -> None:
    module, plain = make_module(normalize_observations=True), make_module()
    mean, std = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 0.5, 0.0])
    module.set_observation_statistics(mean, std)
    floor = torch.tensor([2.0, 0.5, 1e-3])  # A constant observation must not blow up.
    batch = transitions()
    scaled = {
        **batch,
        Columns.OBS: (batch[Columns.OBS] - mean) / floor,
        Columns.NEXT_OBS: (batch[Columns.NEXT_OBS] - mean) / floor,
    }
    noise = use_one_noise(module)
    plain.draw_noise = lambda *_: noise  # type: ignore[method-assign]
    for call in ("forward_train", "forward_inference", "compute_q_values", "forward_target"):
        actual, expected = getattr(module, call)(batch), getattr(plain, call)(scaled)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-6, msg=f"{call}: {name}")
    assert {"obs_mean", "obs_std"} <= module.state_dict().keys()


def test_statistics_are_ignored_where_observations_are_not_normalised() -> None:
    module = make_module()
    obs = random(5, 3, seed=7)
    before = module.forward_inference({Columns.OBS: obs})[Columns.ACTIONS]
    module.set_observation_statistics(torch.full((3,), 9.0), torch.full((3,), 5.0))
    assert torch.equal(module.forward_inference({Columns.OBS: obs})[Columns.ACTIONS], before)
