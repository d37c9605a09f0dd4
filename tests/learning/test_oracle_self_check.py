"""The oracle is proved before it judges: finite differences for its gradients, hand-worked numbers for its losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
from oracle import Array, Batch, Noise, Params, Settings

STEP = 1e-6
LOG_2, LOG_3, LOG_5 = math.log(2.0), math.log(3.0), math.log(5.0)

SWITCHES = ("calibrate", "importance_sampling", "lagrangian", "max_target_backup", "deterministic_backup")
COMBINATIONS = [
    replace(Settings(num_critics=num_critics), **dict[str, Any](zip(SWITCHES, values, strict=True)))
    for num_critics in (2, 5)
    for values in itertools.product([False, True], repeat=len(SWITCHES))
]


def block_losses(batch: Batch, noise: Noise, settings: Settings) -> dict[str, Callable[[Params], float]]:
    """Parameter prefix -> the one loss its gradient must come from."""
    of_reference = {
        "reference.": lambda params: oracle.reference_loss(params, batch, settings),
    }
    return (of_reference if settings.has_reference else {}) | {
        "policy.": lambda params: oracle.actor_loss(params, batch, noise, settings),
        "critic.": lambda params: oracle.critic_loss(params, batch, noise, settings).total,
        "log_alpha": lambda params: oracle.alpha_loss(params, batch, noise, settings),
        "log_alpha_prime": lambda params: oracle.lagrange_loss(params, batch, noise, settings),
    }


def in_block(name: str, prefix: str) -> bool:
    return name.startswith(prefix) if prefix.endswith(".") else name == prefix


def central_difference(loss: Callable[[Params], float], params: Params, direction: Params) -> float:
    ahead = {name: value + STEP * direction.get(name, 0.0) for name, value in params.items()}
    behind = {name: value - STEP * direction.get(name, 0.0) for name, value in params.items()}
    return (loss(ahead) - loss(behind)) / (2.0 * STEP)


def assert_gradient_along_random_directions(params: Params, batch: Batch, noise: Noise, settings: Settings) -> None:
    grads = oracle.gradients(params, batch, noise, settings)
    rng = np.random.default_rng(3)
    for prefix, loss in block_losses(batch, noise, settings).items():
        direction = {name: rng.normal(size=params[name].shape) for name in params if in_block(name, prefix)}
        norm = math.sqrt(sum(float(np.sum(value**2)) for value in direction.values()))
        direction = {name: np.asarray(value / norm) for name, value in direction.items()}
        analytic = sum(float(np.sum(grads[name] * direction[name])) for name in direction)
        assert analytic == pytest.approx(central_difference(loss, params, direction), rel=1e-6, abs=1e-8), prefix


@pytest.mark.parametrize("num_critics", [2, 5])
def test_gradients_of_every_combination_agree_with_finite_differences(num_critics: int) -> None:
    selected = [settings for settings in COMBINATIONS if settings.num_critics == num_critics]
    assert len(selected) == 32
    for seed, settings in enumerate(selected):
        assert_gradient_along_random_directions(*oracle.random_case(seed, settings), settings)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(num_actions=2),
        Settings(num_actions=2, importance_sampling=False, temperature=2.5, min_q_weight=0.7),
        Settings(num_actions=2, lagrangian=True, gap_clip=(1.5, 1.75), temperature=0.5),
        Settings(num_actions=2, importance_sampling=False, lagrangian=True, gap_clip=(1.6, 1.95)),
        Settings(num_actions=2, bc=True, deterministic_backup=False),
        Settings(num_actions=2, learn=False, lagrangian=True, num_critics=3),
        Settings(num_actions=2, layer_norm=True),
        Settings(num_actions=2, has_reference=True, fits_offline=False, layer_norm=True, bounds_uniform=True),
        Settings(num_actions=2, has_reference=True, reference_td=True, penalty=0.4, gap_clip=(1.5, 1.75)),
        Settings(num_actions=2, penalty=0.4, bounds_uniform=True, lagrangian=True, reference=("column", "none")),
    ],
    ids=[
        *("plain", "temperature", "lagrangian-clipped", "entropy-free-clipped", "bc", "not-conservative", "layer-norm"),
        *("monte-carlo", "td-penalty", "penalty-uniform"),
    ],
)
def test_every_single_gradient_entry_agrees_with_finite_differences(settings: Settings) -> None:
    params, batch, noise = oracle.random_case(5, settings, batch_size=4, hiddens=(6, 5))
    batch = replace(batch, is_offline=np.array([1.0, 0.0, 1.0, 0.0]))
    # Some, not all, log-stds then lie above the upper clip of 2.
    params["policy.log_std_offset"] = np.asarray(1.6)
    grads = oracle.gradients(params, batch, noise, settings)
    for prefix, loss in block_losses(batch, noise, settings).items():
        for name in (name for name in params if in_block(name, prefix)):
            for index in np.ndindex(params[name].shape):
                unit = np.zeros_like(params[name])
                unit[index] = 1.0
                numeric = central_difference(loss, params, {name: unit})
                assert grads[name][index] == pytest.approx(numeric, rel=1e-5, abs=1e-7), (name, index)


def test_the_clipped_cases_hold_clipped_and_unclipped_entries() -> None:
    settings = Settings(num_actions=2, importance_sampling=False, lagrangian=True, gap_clip=(1.6, 1.95))
    params, batch, noise = oracle.random_case(5, settings, batch_size=4, hiddens=(6, 5))
    params["policy.log_std_offset"] = np.asarray(1.6)
    log_std = oracle.policy_forward(params, batch.obs).log_std
    assert 0 < np.sum(log_std == 2.0) < log_std.size
    gap = oracle.critic_loss(params, batch, noise, settings).gap
    clipped = (gap == 1.6) | (gap == 1.95)
    assert 0 < clipped.sum() < gap.size


def test_gradients_have_the_names_and_shapes_of_the_parameters_and_targets_get_none() -> None:
    settings = Settings(lagrangian=True)
    params, batch, noise = oracle.random_case(0, settings)
    grads = oracle.gradients(params, batch, noise, settings)
    assert list(grads) == list(params)
    for name, grad in grads.items():
        assert grad.shape == params[name].shape
        assert np.any(grad != 0.0) != name.startswith("target."), name


def test_the_conservative_term_does_not_reach_actor_or_temperature() -> None:
    settings = Settings(lagrangian=True)
    params, batch, noise = oracle.random_case(1, settings)
    with_term = oracle.gradients(params, batch, noise, settings)
    without = oracle.gradients(params, batch, noise, replace(settings, learn=False))
    for name in params:
        unchanged = np.array_equal(with_term[name], without[name])
        assert unchanged == (not name.startswith("critic.") and name != "log_alpha_prime"), name


def test_random_cases_calibrate_roughly_half_of_the_policy_actions() -> None:
    for seed, settings in enumerate(COMBINATIONS):
        loss = oracle.critic_loss(*oracle.random_case(seed, settings), settings)
        for share in (loss.calibrated_next.mean(), loss.calibrated_current.mean()):
            assert 0.25 < share < 0.75


# Hand-worked numbers. Q(s, a) = |s| for s > 0, whatever the action; the policy is one Gaussian of mean 0 whose density
# at eps = 0 is exactly 2 (log pi = log 2), against the uniform density 1/2. Hence with Q = 1 uncalibrated
# x = 1 + (log 2, -log 2, -log 2) and exp(x) sums to e (2 + 1/2 + 1/2) = 3 e.


def constant_case(*, num_critics: int = 1, num_actions: int = 1, batch_size: int = 1) -> tuple[Params, Batch, Noise]:
    zero, one = np.zeros((1, 1)), np.ones((1, 1))
    params: Params = {
        "policy.layers.0.weight": one,
        "policy.layers.0.bias": np.zeros(1),
        "policy.head.weight": np.zeros((1, 2)),
        "policy.head.bias": np.zeros(2),
        "policy.log_std_multiplier": np.asarray(1.0),
        "policy.log_std_offset": np.asarray(-0.5 * math.log(2.0 * math.pi) - LOG_2),
    }
    for group, slope in (("critic", 1.0), ("target", 0.0)):
        for c in range(num_critics):
            name = f"{group}.{c}"
            params |= {
                f"{name}.obs_weight": slope * one,
                f"{name}.action_weight": zero,
                f"{name}.bias0": np.zeros(1),
                f"{name}.head.weight": one,
                f"{name}.head.bias": np.zeros(1),
            }
    params |= {"log_alpha": np.asarray(0.0), "log_alpha_prime": np.asarray(LOG_3)}
    column = np.ones((batch_size, 1))
    # next_obs = 5: a gap that judged next actions at s' would be off by 4.
    batch = Batch(
        obs=column,
        actions=0.5 * column,
        rewards=np.ones(batch_size),
        next_obs=5.0 * column,
        terminateds=np.ones(batch_size),
        returns_to_go=np.full(batch_size, 1.0 + LOG_3),
    )
    draws = np.zeros((num_actions, batch_size, 1))
    noise = {
        "eps_actor": np.zeros((batch_size, 1)),
        "eps_next_target": draws,
        "uniform": draws,
        "eps_current": draws,
        "eps_next": draws,
    }
    return params, batch, noise


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"calibrate": False}, LOG_3),
        # V = 1 + log 3 triples next and current actions only, before the density: 2 + 3/2 + 3/2 = 5.
        ({"calibrate": True}, LOG_5),
        ({"calibrate": False, "num_actions": 2}, LOG_2 + LOG_3),
        ({"calibrate": True, "num_actions": 2}, LOG_2 + LOG_5),
        # No densities, Q(s, a) as fourth entry: 1 + 1 + 1 + 1 and 1 + 3 + 3 + 1.
        ({"calibrate": False, "importance_sampling": False}, 2.0 * LOG_2),
        ({"calibrate": True, "importance_sampling": False}, 3.0 * LOG_2),
        # T = 2: sqrt(2) + 2 / sqrt(2) = 2 sqrt(2), and e^((x - 1) / 2) = sqrt(2) + 2 sqrt(3/2).
        ({"calibrate": False, "temperature": 2.0}, 3.0 * LOG_2),
        ({"calibrate": True, "temperature": 2.0}, 2.0 * math.log(math.sqrt(2.0) + math.sqrt(6.0))),
        ({"calibrate": True, "gap_clip": (-1.0, 1.25)}, 1.25),
        ({"calibrate": True, "gap_clip": (2.0, 3.0)}, 2.0),
    ],
)
def test_the_gap_of_constant_critics_is_the_hand_worked_number(changes: dict[str, Any], expected: float) -> None:
    settings = replace(Settings(num_critics=1, num_actions=1), **changes)
    params, batch, noise = constant_case(num_actions=settings.num_actions)
    loss = oracle.critic_loss(params, batch, noise, settings)
    np.testing.assert_allclose(loss.gap, [[expected]], rtol=1e-14)


def test_next_actions_are_proposed_at_the_next_observation_and_current_ones_at_the_observation() -> None:
    params, batch, noise = constant_case()
    # The mean is then the observation itself: 1 at s and 5 at s'.
    params["policy.head.weight"] = np.asarray([[1.0, 0.0]])
    samples = oracle.sampled_actions(params, batch, noise, Settings(num_actions=1))
    assert [sample.source for sample in samples] == ["uniform", "next", "current"]
    for sample, action in zip(samples, [0.0, math.tanh(5.0), math.tanh(1.0)], strict=True):
        np.testing.assert_allclose(sample.actions, [[action]], rtol=1e-14)
        log_density = -LOG_2 if sample.source == "uniform" else LOG_2 - math.log(1.0 - action**2)
        np.testing.assert_allclose(sample.log_density, [log_density], rtol=1e-10)


def test_a_reference_value_below_q_changes_nothing() -> None:
    params, batch, noise = constant_case()
    settings = Settings(num_critics=1, num_actions=1)
    loss = oracle.critic_loss(params, replace(batch, returns_to_go=np.asarray([0.9])), noise, settings)
    np.testing.assert_allclose(loss.gap, [[LOG_3]], rtol=1e-14)
    assert not loss.calibrated_next.any()


def test_calibration_stops_the_gradient_of_the_calibrated_actions_exactly() -> None:
    params, batch, noise = constant_case()
    settings = Settings(num_critics=1, num_actions=1, min_q_weight=1.0)
    # TD is zero (Q = 1 = y). Softmax of the uniform action: 2/5 calibrated; all of it uncalibrated. Minus 1 for data.
    calibrated = oracle.gradients(params, batch, noise, settings)
    plain = oracle.gradients(params, batch, noise, replace(settings, calibrate=False))
    np.testing.assert_allclose(calibrated["critic.0.head.bias"], [2.0 / 5.0 - 1.0], rtol=1e-14)
    np.testing.assert_allclose(plain["critic.0.head.bias"], [0.0], atol=1e-15)


@pytest.mark.parametrize("importance_sampling", [False, True])
@pytest.mark.parametrize("lagrangian", [False, True])
def test_calibrate_false_equals_a_reference_value_of_minus_infinity(
    importance_sampling: bool, lagrangian: bool
) -> None:
    settings = Settings(importance_sampling=importance_sampling, lagrangian=lagrangian)
    params, batch, noise = oracle.random_case(2, settings)
    off = oracle.full_update(params, oracle.initial_opt_state(params), batch, noise, replace(settings, calibrate=False))
    unbounded = replace(batch, returns_to_go=np.full_like(batch.returns_to_go, -np.inf))
    infinite = oracle.full_update(params, oracle.initial_opt_state(params), unbounded, noise, settings)
    calibrated = oracle.full_update(params, oracle.initial_opt_state(params), batch, noise, settings)
    for name in params:
        np.testing.assert_array_equal(off[0][name], infinite[0][name], err_msg=name)
    assert off[2]["critic_loss"] == infinite[2]["critic_loss"] != calibrated[2]["critic_loss"]


def test_the_lagrangian_terms_are_the_hand_worked_numbers() -> None:
    settings = Settings(num_critics=3, num_actions=1, lagrangian=True, lagrangian_thresh=0.5, min_q_weight=2.0)
    params, batch, noise = constant_case(num_critics=3)
    # alpha' = 3, w = 2, TD = 0: every critic has 6 (log 5 - 1/2), the multiplier minus half of the sum.
    loss = oracle.critic_loss(params, batch, noise, settings)
    np.testing.assert_allclose(loss.per_critic, [6.0 * (LOG_5 - 0.5)] * 3, rtol=1e-14)
    assert loss.total == pytest.approx(18.0 * (LOG_5 - 0.5), rel=1e-14)
    assert oracle.lagrange_loss(params, batch, noise, settings) == pytest.approx(-9.0 * (LOG_5 - 0.5), rel=1e-14)


def test_the_multiplier_is_clipped_at_a_million_and_then_gets_no_gradient() -> None:
    settings = Settings(num_critics=1, num_actions=1, lagrangian=True)
    params, batch, noise = constant_case()
    params["log_alpha_prime"] = np.asarray(20.0)
    assert oracle.alpha_prime(params) == 1e6
    assert oracle.gradients(params, batch, noise, settings)["log_alpha_prime"] == 0.0


def target_case() -> tuple[Params, Batch, Noise]:
    """Two target critics `2 + a` and `2 - a`, so that min_c is `2 - |a|`; two proposals, the second nearer to 0."""
    params, batch, noise = constant_case(num_critics=2, num_actions=2)
    for c, slope in ((0, 1.0), (1, -1.0)):
        params[f"target.{c}.action_weight"] = np.asarray([[slope]])
        params[f"target.{c}.bias0"] = np.asarray([2.0])
    noise["eps_next_target"] = np.asarray([-1.0, 0.5]).reshape(2, 1, 1)
    return params, replace(batch, terminateds=np.zeros(1)), noise


def test_the_target_takes_the_smallest_critic_then_the_best_proposal() -> None:
    params, batch, noise = target_case()
    std = 0.5 / math.sqrt(2.0 * math.pi)
    settings = Settings(num_actions=2, gamma=0.5)
    expected = 1.0 + 0.5 * (2.0 - math.tanh(0.5 * std))
    np.testing.assert_allclose(oracle.target(params, batch, noise, settings), [expected], rtol=1e-14)
    ended = replace(batch, terminateds=np.ones(1))
    np.testing.assert_array_equal(oracle.target(params, ended, noise, settings), [1.0])
    first_only = noise | {"eps_next_target": noise["eps_next_target"][:1]}
    single = oracle.target(params, batch, first_only, replace(settings, max_target_backup=False))
    np.testing.assert_allclose(single, [1.0 + 0.5 * (2.0 - math.tanh(std))], rtol=1e-14)


def test_the_entropy_of_the_chosen_proposal_enters_the_target() -> None:
    params, batch, noise = target_case()
    params["log_alpha"] = np.asarray(LOG_3)
    std = 0.5 / math.sqrt(2.0 * math.pi)
    settings = Settings(num_actions=2, gamma=0.5, deterministic_backup=False)
    action = math.tanh(0.5 * std)
    log_prob = LOG_2 - 0.5 * 0.25 - math.log(1.0 - action**2)
    expected = 1.0 + 0.5 * (2.0 - action - 3.0 * log_prob)
    np.testing.assert_allclose(oracle.target(params, batch, noise, settings), [expected], rtol=1e-13)


def test_actor_and_temperature_losses_are_the_hand_worked_numbers() -> None:
    params, batch, noise = constant_case(num_critics=2)
    params["critic.1.head.bias"] = np.asarray([-4.0])
    params["log_alpha"] = np.asarray(LOG_3)
    settings = Settings(num_actions=1, target_entropy=-1.0)
    # alpha log pi - min(1, -3), and -log 3 (log 2 - 1).
    assert oracle.actor_loss(params, batch, noise, settings) == pytest.approx(3.0 * LOG_2 + 3.0, rel=1e-14)
    assert oracle.alpha_loss(params, batch, noise, settings) == pytest.approx(-LOG_3 * (LOG_2 - 1.0), rel=1e-14)
    grads = oracle.gradients(params, batch, noise, settings)
    assert grads["log_alpha"] == pytest.approx(1.0 - LOG_2, rel=1e-14)
    # A data action of 0 has the density of the sampled one, so that bc leaves (alpha - 1) log 2.
    cloned = replace(batch, actions=np.zeros((1, 1)))
    cloning = oracle.actor_loss(params, cloned, noise, replace(settings, bc=True))
    assert cloning == pytest.approx(2.0 * LOG_2, rel=1e-14)
    # The mean of 1 and -3 in place of the minimum; half of the same density as an anchor.
    of_mean = oracle.actor_loss(params, cloned, noise, replace(settings, actor_q="mean"))
    assert of_mean == pytest.approx(3.0 * LOG_2 + 1.0, rel=1e-14)
    anchored = oracle.actor_loss(params, cloned, noise, replace(settings, bc_weight=0.5))
    assert anchored == pytest.approx(2.5 * LOG_2 + 3.0, rel=1e-14)


def test_the_policy_density_integrates_to_one() -> None:
    params, _, _ = oracle.random_case(0, Settings(), action_dim=1)
    edges = np.linspace(-1.0, 1.0, 200_001)
    middles = 0.5 * (edges[1:] + edges[:-1])
    policy = oracle.policy_forward(params, np.tile([[0.3, -0.2, 0.5]], (len(middles), 1)))
    density = np.exp(oracle.data_log_prob(policy, middles[:, None]))
    assert np.sum(density) * (edges[1] - edges[0]) == pytest.approx(1.0, abs=1e-6)


def test_a_sampled_action_has_the_log_prob_of_the_same_data_action() -> None:
    params, batch, noise = oracle.random_case(0, Settings())
    policy = oracle.policy_forward(params, batch.obs)
    actions, log_prob = oracle.sample_actions(policy, 0.5 * noise["eps_actor"])
    np.testing.assert_allclose(oracle.data_log_prob(policy, actions), log_prob, rtol=1e-9)


def test_data_actions_on_the_bound_are_clipped() -> None:
    params, batch, _ = oracle.random_case(0, Settings())
    policy = oracle.policy_forward(params, batch.obs)
    on_bound = np.ones_like(batch.actions)
    np.testing.assert_array_equal(
        oracle.data_log_prob(policy, on_bound), oracle.data_log_prob(policy, 0.99999 * on_bound)
    )


def test_adam_takes_the_hand_worked_steps() -> None:
    settings = Settings(adam_betas=(0.5, 0.75), adam_eps=0.0)
    start = oracle.AdamState(0, np.zeros(2), np.zeros(2))
    param, state = oracle.adam_step(np.zeros(2), np.asarray([4.0, -0.1]), start, 0.1, settings)
    np.testing.assert_allclose(param, [-0.1, 0.1], rtol=1e-14)
    # Second step, gradients (0, -0.1): m = 1, v = 3 -> corrected 4/3 and 48/7; a constant gradient moves by lr again.
    param, state = oracle.adam_step(param, np.asarray([0.0, -0.1]), state, 0.1, settings)
    np.testing.assert_allclose(param, [-0.1 - 0.1 * (4.0 / 3.0) / math.sqrt(48.0 / 7.0), 0.2], rtol=1e-14)
    assert state.step == 2


def test_a_full_update_steps_each_block_with_its_own_rate_and_then_moves_the_targets() -> None:
    # With eps next to zero, Adam's first step is the rate times the gradient's sign, and nothing where that is 0.
    settings = Settings(lagrangian=True, actor_lr=1e-2, critic_lr=2e-2, alpha_lr=3e-2, tau=0.25, adam_eps=1e-300)
    params, batch, noise = oracle.random_case(4, settings)
    grads = oracle.gradients(params, batch, noise, settings)
    updated, state, metrics = oracle.full_update(params, oracle.initial_opt_state(params), batch, noise, settings)
    rates = {"policy.": 1e-2, "critic.": 2e-2, "log_alpha": 3e-2, "log_alpha_prime": 2e-2}
    for prefix, rate in rates.items():
        for name in (name for name in params if in_block(name, prefix)):
            expected = params[name] - rate * np.sign(grads[name])
            np.testing.assert_allclose(updated[name], expected, rtol=1e-12, atol=1e-14, err_msg=name)
            assert state[name].step == 1
    bias = "0.head.bias"
    expected_target = 0.75 * params[f"target.{bias}"] + 0.25 * updated[f"critic.{bias}"]
    np.testing.assert_allclose(updated[f"target.{bias}"], expected_target, rtol=1e-14)
    assert metrics["critic_loss"] == oracle.critic_loss(params, batch, noise, settings).total


@pytest.mark.parametrize("changes", [{"lagrangian": False}, {"lagrangian": True, "learn": False}])
def test_the_multiplier_is_stepped_only_when_it_is_used(changes: dict[str, Any]) -> None:
    settings = replace(Settings(), **changes)
    params, batch, noise = oracle.random_case(4, settings)
    updated, state, _ = oracle.full_update(params, oracle.initial_opt_state(params), batch, noise, settings)
    assert updated["log_alpha_prime"] == params["log_alpha_prime"]
    assert state["log_alpha_prime"].step == 0


def test_reward_one_everywhere_is_a_geometric_series() -> None:
    returns = oracle.returns_to_go([1.0] * 6, 0.9, terminated=True, truncated=False)
    np.testing.assert_allclose(returns, [(1.0 - 0.9 ** (6 - t)) / 0.1 for t in range(6)], rtol=1e-14)


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [("none", [2.0, 2.0, 2.0]), ("steady", [2.5, 3.0, 4.0]), ("bootstrap", [3.0, 4.0, 6.0])],
)
def test_the_tail_of_a_cut_episode_follows_the_truncation_rule(truncation: str, expected: list[float]) -> None:
    rewards = [1.0, 1.0, 2.0]
    returns = oracle.returns_to_go(
        rewards, 0.5, terminated=False, truncated=True, truncation=truncation, bootstrap_value=8.0
    )
    np.testing.assert_array_equal(returns, expected)
    ended = oracle.returns_to_go(
        rewards, 0.5, terminated=True, truncated=True, truncation=truncation, bootstrap_value=8.0
    )
    np.testing.assert_array_equal(ended, [2.0, 2.0, 2.0])


def test_an_episode_of_failures_only_gets_the_infinite_sum() -> None:
    def returns(rewards: list[float], env_rewards: list[float]) -> Array:
        return oracle.returns_to_go(
            rewards,
            0.5,
            terminated=False,
            truncated=True,
            env_rewards=env_rewards,
            failure_reward=0.1,
            reward_scale=10.0,
            reward_bias=-5.0,
        )

    # r_fail = 10 * 0.1 - 5 = -4; within the relative tolerance of 1e-6, not outside it.
    np.testing.assert_allclose(returns([-4.0] * 3, [0.1 + 1e-9] * 3), [-8.0] * 3, rtol=1e-14)
    np.testing.assert_array_equal(returns([-4.0, -4.0, 5.0], [0.1, 0.1, 1.0]), [-4.75, -1.5, 5.0])
    np.testing.assert_array_equal(returns([-4.0] * 3, [0.1, 0.1, 0.1001]), [-7.0, -6.0, -4.0])


def test_returns_of_an_episode_without_an_end_are_refused() -> None:
    with pytest.raises(ValueError, match="neither terminated nor truncated"):
        oracle.returns_to_go([1.0], 0.9, terminated=False, truncated=False)
