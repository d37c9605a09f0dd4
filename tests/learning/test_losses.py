"""Loss terms against hand-worked numbers, which gradient each lets through, and what the learner makes of them.

Inputs are mostly logarithms of small numbers, so that a log-sum-exp is the logarithm of a sum worked by hand.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rllib_calql.learning import losses
from rllib_calql.learning.losses import SampledValues

NO_CLIP = (-math.inf, math.inf)


def ln(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).log()


def one_of_each(
    uniform: float = 1.0,
    following: float = 3.0,
    current: float = 2.0,
    density_following: float = 0.5,
    density_current: float = 0.25,
    action_dim: int = 1,
) -> SampledValues:
    """One critic, one action per source, one state: exp(Q) and exp(log_prob) are the arguments."""
    return SampledValues(
        q_uniform=ln(uniform).view(1, 1, 1).requires_grad_(),
        q_current=ln(current).view(1, 1, 1).requires_grad_(),
        q_next=ln(following).view(1, 1, 1).requires_grad_(),
        log_prob_current=ln(density_current).view(1, 1).requires_grad_(),
        log_prob_next=ln(density_following).view(1, 1).requires_grad_(),
        action_dim=action_dim,
    )


def two_critics() -> SampledValues:
    """The values of `one_of_each` from two critics that agree."""
    values = one_of_each()
    repeated = {name: getattr(values, name).repeat(2, 1, 1) for name in ("q_uniform", "q_current", "q_next")}
    return values._replace(**repeated)


def gap(values: SampledValues, q_data: Tensor, **changes: Any) -> Tensor:
    settings = {"temperature": 1.0, "importance_sampling": True, "gap_clip": NO_CLIP} | changes
    return losses.conservative_gap(q_data, values, **settings)


def loss_terms(
    q_data: Tensor, target: Tensor, values: SampledValues, reference_value: Tensor | None, **changes: Any
) -> losses.CriticLoss:
    settings = {"temperature": 1.0, "importance_sampling": True, "gap_clip": NO_CLIP} | changes
    return losses.critic_loss(q_data, target, values, reference_value, **settings)


# TD target


NEXT_Q = torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 2.5]])
NEXT_LOG_PROB = torch.tensor([[-10.0, -2.0, -3.0], [0.5, 7.0, -4.0]])
REWARDS = torch.tensor([1.0, 2.0, 3.0])
TERMINATEDS = torch.tensor([0.0, 0.0, 1.0])


def test_td_target_takes_the_best_next_action_and_stops_at_termination() -> None:
    target = losses.td_target(REWARDS, TERMINATEDS, NEXT_Q, NEXT_LOG_PROB, gamma=0.9, entropy_alpha=None)
    torch.testing.assert_close(target, torch.tensor([1.0 + 0.9 * 3.0, 2.0 + 0.9 * 5.0, 3.0]))


def test_td_target_subtracts_the_entropy_of_the_action_with_the_best_q_and_not_of_the_best_soft_value() -> None:
    # In the first column the first action's soft value 1 + 0.5 * 10 is higher, but its Q is not.
    target = losses.td_target(REWARDS, TERMINATEDS, NEXT_Q, NEXT_LOG_PROB, gamma=0.9, entropy_alpha=torch.tensor(0.5))
    torch.testing.assert_close(target, torch.tensor([1.0 + 0.9 * 2.75, 2.0 + 0.9 * 6.0, 3.0]))


def test_td_target_carries_no_gradient_from_any_input() -> None:
    inputs = [t.clone().requires_grad_() for t in (REWARDS, TERMINATEDS, NEXT_Q, NEXT_LOG_PROB)]
    alpha = torch.tensor(0.5, requires_grad=True)
    assert not losses.td_target(*inputs, gamma=0.9, entropy_alpha=alpha).requires_grad


@pytest.mark.parametrize("name", ["rewards", "terminateds", "next_log_prob"])
def test_td_target_refuses_a_shape_that_would_broadcast(name: str) -> None:
    inputs = {"rewards": REWARDS, "terminateds": TERMINATEDS, "next_log_prob": NEXT_LOG_PROB}
    inputs[name] = inputs[name].unsqueeze(-1)
    with pytest.raises(ValueError, match=rf"`{name}` must have shape \((2, )?3,?\), got \((2, )?3, 1\)"):
        losses.td_target(next_q=NEXT_Q, gamma=0.9, entropy_alpha=None, **inputs)


# Conservative gap


def test_the_gap_divides_each_entry_by_its_density() -> None:
    # Uniform density 1/2: 1 / 0.5 + 3 / 0.5 + 2 / 0.25 = 16; the data action has exp(Q) = 4.
    torch.testing.assert_close(gap(one_of_each(), ln(4.0).view(1, 1)), ln(4.0).view(1, 1))


def test_the_uniform_density_is_one_half_to_the_power_of_the_action_dimension() -> None:
    # 1 / 0.5^3 + 6 + 8 = 22.
    torch.testing.assert_close(gap(one_of_each(action_dim=3), ln(1.0).view(1, 1)), ln(22.0).view(1, 1))


def test_the_temperature_divides_each_entry_and_multiplies_the_soft_maximum() -> None:
    expected = 2.0 * math.log(math.sqrt(2.0) + math.sqrt(6.0) + math.sqrt(8.0)) - math.log(4.0)
    assert gap(one_of_each(), ln(4.0).view(1, 1), temperature=2.0).item() == pytest.approx(expected, rel=1e-12)


def test_without_importance_sampling_densities_vanish_and_the_data_action_joins() -> None:
    # 1 + 3 + 2 + 4 = 10, divided by 4.
    actual = gap(one_of_each(), ln(4.0).view(1, 1), importance_sampling=False)
    torch.testing.assert_close(actual, ln(2.5).view(1, 1))


def test_without_importance_sampling_the_data_action_gets_gradient_from_both_places() -> None:
    q_data = ln(4.0).view(1, 1).requires_grad_()
    gap(one_of_each(), q_data, importance_sampling=False).sum().backward()
    assert q_data.grad.item() == pytest.approx(4.0 / 10.0 - 1.0)


def test_the_soft_maximum_runs_over_actions_and_keeps_critics_and_states_apart() -> None:
    # exp(Q), shape (C, N, B) = (2, 2, 2); densities 1, so that only the uniform entries are doubled.
    values = SampledValues(
        q_uniform=ln(*range(1, 9)).view(2, 2, 2),
        q_current=ln(*range(11, 19)).view(2, 2, 2),
        q_next=ln(*range(21, 29)).view(2, 2, 2),
        log_prob_current=torch.zeros(2, 2),
        log_prob_next=torch.zeros(2, 2),
        action_dim=1,
    )
    # Critic 0, state 0: 2 (1 + 3) + (11 + 13) + (21 + 23) = 76; state 1: 2 (2 + 4) + 12 + 14 + 22 + 24 = 84. Critic 1
    # has 4 more in each of the six entries of a state, 8 more in the uniform ones: 76 + 16 + 8 + 8, 84 + 32.
    expected = ln(76.0, 84.0, 108.0, 116.0).view(2, 2)
    torch.testing.assert_close(gap(values, torch.zeros(2, 2, dtype=torch.float64)), expected)


def test_log_densities_belong_to_their_own_source() -> None:
    # Swapped, 3 / 0.25 + 2 / 0.5 would give 2 + 12 + 4 = 18 in place of 16.
    assert gap(one_of_each(), ln(1.0).view(1, 1)).exp().item() == pytest.approx(16.0)


def test_the_gap_is_clipped_for_each_transition_before_any_mean() -> None:
    values = SampledValues(*[ln(1.0, 1.0).view(1, 1, 2)] * 3, torch.zeros(1, 2), torch.zeros(1, 2), action_dim=1)
    q_data = torch.tensor([[math.log(4.0) + 10.0, math.log(4.0) - 10.0]], dtype=torch.float64)  # Gaps -10 and 10.
    clipped = gap(values, q_data, gap_clip=(-1.0, 3.0))
    torch.testing.assert_close(clipped, torch.tensor([[-1.0, 3.0]], dtype=torch.float64))
    assert clipped.mean().item() == pytest.approx(1.0)  # Clipping the mean, which is 0, would leave it at 0.


def test_a_clipped_gap_sends_no_gradient() -> None:
    values, q_data = one_of_each(), ln(1.0).view(1, 1).requires_grad_()
    gap(values, q_data, gap_clip=(0.0, 0.5)).sum().backward()
    assert q_data.grad.item() == 0.0
    assert values.q_uniform.grad.item() == 0.0


def test_the_gap_sends_each_action_its_share_of_the_soft_maximum_and_nothing_into_densities() -> None:
    values, q_data = one_of_each(), ln(4.0).view(1, 1).requires_grad_()
    gap(values, q_data).sum().backward()
    shares = [values.q_uniform.grad.item(), values.q_next.grad.item(), values.q_current.grad.item()]
    assert shares == pytest.approx([2 / 16, 6 / 16, 8 / 16])
    assert q_data.grad.item() == pytest.approx(-1.0)
    assert values.log_prob_current.grad is None
    assert values.log_prob_next.grad is None


@pytest.mark.parametrize("name", ["q_current", "q_next", "log_prob_current", "log_prob_next"])
def test_the_gap_refuses_a_shape_that_would_broadcast(name: str) -> None:
    values = one_of_each()
    wrong = values._replace(**{name: getattr(values, name).unsqueeze(-1)})
    with pytest.raises(ValueError, match=rf"`{name}` must have shape \(1, 1(, 1)?\), got"):
        gap(wrong, ln(1.0).view(1, 1))


def test_the_gap_refuses_q_data_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"`q_data` must have shape \(1, 1\), got \(1,\)"):
        gap(one_of_each(), ln(1.0))


# Calibration


def test_calibration_lifts_policy_actions_before_densities_and_leaves_uniform_ones() -> None:
    # V = ln 5: uniform 1 / 0.5 = 2 stays; next 3 is lifted, 5 / 0.5 = 10; current 8 stays, 8 / 0.25 = 32.
    # Lifting after the division would give 2 + 6 + 32 = 40, lifting the uniform action as well 10 + 10 + 32 = 52.
    terms = loss_terms(ln(1.0).view(1, 1), torch.zeros(1), one_of_each(current=8.0), ln(5.0))
    assert terms.gap.exp().item() == pytest.approx(44.0)
    assert terms.bound_next.item() is True
    assert terms.bound_current.item() is False


def test_calibration_reaches_current_actions_too() -> None:
    # V = ln 5: 2 + 8 / 0.5 + 5 / 0.25 = 38.
    terms = loss_terms(ln(1.0).view(1, 1), torch.zeros(1), one_of_each(following=8.0), ln(5.0))
    assert terms.gap.exp().item() == pytest.approx(38.0)
    assert (terms.bound_next.item(), terms.bound_current.item()) == (False, True)


def test_calibration_reaches_every_critic() -> None:
    terms = loss_terms(torch.zeros(2, 1), torch.zeros(1), two_critics(), ln(5.0))
    torch.testing.assert_close(terms.gap, ln(2.0 + 10.0 + 20.0).expand(2, 1))
    assert terms.bound_current.shape == (2, 1, 1)
    assert bool(terms.bound_current.all())


def test_an_action_below_the_reference_value_gets_exactly_no_gradient() -> None:
    values, reference = one_of_each(current=8.0), ln(5.0).requires_grad_()
    loss_terms(ln(1.0).view(1, 1), torch.zeros(1), values, reference).gap.sum().backward()
    assert values.q_next.grad.item() == 0.0
    assert values.q_current.grad.item() == pytest.approx(32.0 / 44.0)
    assert values.q_uniform.grad.item() == pytest.approx(2.0 / 44.0)
    assert reference.grad is None


def test_without_a_reference_value_nothing_is_lifted() -> None:
    values = one_of_each()
    terms = loss_terms(ln(4.0).view(1, 1), torch.zeros(1), values, None)
    assert terms.gap.exp().item() == pytest.approx(4.0)
    assert terms.bound_current.shape == terms.bound_next.shape == values.q_current.shape
    assert not terms.bound_current.any()
    assert not terms.bound_next.any()


def test_calibrate_takes_each_state_its_own_reference_value() -> None:
    q = torch.tensor([[[0.0, 5.0], [2.0, -7.0]]])
    expected = torch.tensor([[[1.0, 5.0], [2.0, -3.0]]])
    torch.testing.assert_close(losses.calibrate(q, torch.tensor([1.0, -3.0])), expected)


def test_calibrate_refuses_reference_values_that_would_broadcast_over_actions() -> None:
    with pytest.raises(ValueError, match=r"`reference_value` must have shape \(2,\), got \(3, 1\)"):
        losses.calibrate(torch.zeros(2, 3, 2), torch.zeros(3, 1))


# Assembled critic loss


def test_the_td_term_is_the_squared_error_of_each_critic_even_when_large() -> None:
    terms = loss_terms(torch.tensor([[7.0], [-1.0]]), torch.tensor([4.0]), two_critics(), None)
    assert terms.td.tolist() == [[9.0], [25.0]]


def test_the_td_term_sends_gradient_to_q_only() -> None:
    q_data, target = torch.tensor([[7.0]], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    loss_terms(q_data, target, one_of_each(), None).td.sum().backward()
    assert q_data.grad.item() == pytest.approx(6.0)
    assert target.grad is None


def test_the_critic_loss_refuses_a_target_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"`target` must have shape \(1,\), got \(1, 1\)"):
        loss_terms(torch.zeros(1, 1), torch.zeros(1, 1), one_of_each(), None)


# Dual variable, actor, temperature


def test_the_lagrange_loss_by_hand_and_its_gradient() -> None:
    log_alpha_prime, mean_gap = ln(2.0).requires_grad_(), torch.tensor([3.0, 1.0], requires_grad=True)
    loss = losses.lagrange_loss(log_alpha_prime, mean_gap, min_q_weight=5.0, lagrangian_thresh=0.8)
    loss.backward()
    assert loss.item() == pytest.approx(-0.5 * 2.0 * 5.0 * (2.2 + 0.2))
    assert log_alpha_prime.grad.item() == pytest.approx(-12.0)  # Descent raises it: the gap exceeds the threshold.
    assert mean_gap.grad is None


def test_the_multiplier_is_an_exponential_cut_at_one_million() -> None:
    assert losses.lagrange_multiplier(ln(3.0)).item() == pytest.approx(3.0)
    log_alpha_prime = torch.tensor([20.0], requires_grad=True)
    multiplier = losses.lagrange_multiplier(log_alpha_prime)
    multiplier.sum().backward()
    assert multiplier.item() == 1e6
    assert log_alpha_prime.grad.item() == 0.0


def test_the_actor_loss_by_hand_reaches_log_prob_and_q_but_not_alpha() -> None:
    log_prob = torch.tensor([1.0, -2.0], requires_grad=True)
    q_min = torch.tensor([10.0, 20.0], requires_grad=True)
    alpha = torch.tensor(0.5, requires_grad=True)
    loss = losses.actor_loss(log_prob, q_min, alpha)
    assert loss.tolist() == [-9.5, -21.0]
    loss.sum().backward()
    assert log_prob.grad.tolist() == [0.5, 0.5]
    assert q_min.grad.tolist() == [-1.0, -1.0]
    assert alpha.grad is None


def test_the_cloning_loss_by_hand_raises_the_likelihood_of_the_data() -> None:
    log_prob = torch.tensor([1.0, -2.0], requires_grad=True)
    data_log_prob = torch.tensor([-3.0, 4.0], requires_grad=True)
    alpha = torch.tensor(0.5, requires_grad=True)
    loss = losses.behaviour_cloning_loss(log_prob, data_log_prob, alpha)
    assert loss.tolist() == [3.5, -5.0]
    loss.sum().backward()
    assert data_log_prob.grad.tolist() == [-1.0, -1.0]
    assert alpha.grad is None


def test_actor_losses_refuse_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"`q_min` must have shape \(2,\), got \(2, 1\)"):
        losses.actor_loss(torch.zeros(2), torch.zeros(2, 1), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"`data_log_prob` must have shape \(2,\), got \(1, 2\)"):
        losses.behaviour_cloning_loss(torch.zeros(2), torch.zeros(1, 2), torch.tensor(1.0))


def test_the_temperature_loss_by_hand_reaches_log_alpha_only() -> None:
    log_alpha, log_prob = torch.tensor([0.3], requires_grad=True), torch.tensor([1.0, 5.0], requires_grad=True)
    loss = losses.temperature_loss(log_alpha, log_prob, torch.tensor(-2.0))
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(-0.3 * (3.0 - 2.0))
    assert log_alpha.grad.item() == pytest.approx(-1.0)  # Descent raises alpha: the entropy -3 is below its target -2.
    assert log_prob.grad is None
