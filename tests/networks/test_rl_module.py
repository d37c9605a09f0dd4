"""Which network each output of the module reaches, and which state each action comes from and is judged at."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from plain_networks import plain_critic, random, randomise
from ray.rllib.core.columns import Columns
from scipy import stats
from small_learners import make_learner
from torch import Tensor

from rllib_calql.networks import rl_module as outputs
from rllib_calql.networks.actor_critic import log_prob_of
from rllib_calql.networks.rl_module import CalQLTorchRLModule, Noise


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
    module, plain = make_module(normalize_observations=True, observation_clip=0.9), make_module()
    mean, std = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 0.5, 0.0])
    module.set_observation_statistics(mean, std)
    divisor = np.array([2.0, 0.5, 1.0])  # A constant observation must not blow up.
    batch = transitions()

    def by_hand(obs: Tensor) -> Tensor:
        return torch.from_numpy(np.clip((obs.numpy() - mean.numpy()) / divisor, -0.9, 0.9))

    scaled = {**batch, **{name: by_hand(batch[name]) for name in (Columns.OBS, Columns.NEXT_OBS)}}
    share = (np.abs((batch[Columns.OBS].numpy() - mean.numpy()) / divisor) > 0.9).mean(axis=1)
    assert share.min() < share.max()  # The test would show little otherwise.
    noise = use_one_noise(module)
    plain.draw_noise = lambda *_: noise  # type: ignore[method-assign]
    for call in ("forward_train", "forward_inference", "compute_q_values", "forward_target"):
        actual, expected = getattr(module, call)(batch), getattr(plain, call)(scaled)
        if call == "forward_train":
            np.testing.assert_allclose(actual.pop(outputs.CLIPPED).numpy(), share, rtol=1e-6)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-6, msg=f"{call}: {name}")
    assert {"obs_mean", "obs_std"} <= module.state_dict().keys()


def test_a_set_point_that_never_varied_enters_as_its_change_and_small_units_keep_their_meaning() -> None:
    module = make_module(normalize_observations=True)
    # A set-point, a current in units of 1e-5, and one that is 45 up to the rounding of float32.
    module.set_observation_statistics(
        torch.tensor([45.0, 2e-5, 45.0]).double(), torch.tensor([0.0, 1e-5, 1e-5]).double()
    )
    seen = module._normalise(torch.tensor([[46.0, 4e-5, 46.0], [45.0, 0.0, 1000.0]]).double())
    np.testing.assert_allclose(seen.numpy(), [[1.0, 2.0, 1.0], [0.0, -2.0, 10.0]], rtol=1e-5)


@pytest.mark.parametrize("clip", [None, math.inf])
def test_without_a_clip_nothing_is_clipped_and_no_share_is_told(clip: float | None) -> None:
    module = make_module(normalize_observations=True, observation_clip=clip)
    assert float(module._normalise(torch.full((1, 3), 1e6).double()).max()) == 1e6
    assert outputs.CLIPPED not in module.forward_train(transitions())
    assert outputs.CLIPPED not in make_module().forward_train(transitions())


def test_statistics_are_ignored_where_observations_are_not_normalised() -> None:
    module = make_module()
    obs = random(5, 3, seed=7)
    before = module.forward_inference({Columns.OBS: obs})[Columns.ACTIONS]
    module.set_observation_statistics(torch.full((3,), 9.0), torch.full((3,), 5.0))
    assert torch.equal(module.forward_inference({Columns.OBS: obs})[Columns.ACTIONS], before)
