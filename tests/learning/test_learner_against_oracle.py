"""Loss, gradients and full updates of the learner against the float64 NumPy oracle, with shared noise."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
from oracle_bridge import MODULE, assert_params_equal, float64_learner, load_params, read_params, torch_batch, use_noise

from rllib_calql.common import metrics as keys

_FLAGS = ("calibrate", "importance_sampling", "lagrangian", "max_target_backup", "deterministic_backup")
_COMBINATIONS = [
    oracle.Settings(**dict(zip(_FLAGS, flags, strict=True)), num_critics=num_critics)
    for *flags, num_critics in itertools.product(*[(True, False)] * len(_FLAGS), (2, 5))
]
_VARIATIONS = [
    oracle.Settings(temperature=0.5),
    oracle.Settings(temperature=3.0, importance_sampling=False),
    oracle.Settings(gap_clip=(-0.5, 0.5)),
    oracle.Settings(gap_clip=(0.0, math.inf), lagrangian=True),
    oracle.Settings(min_q_weight=0.0),
    oracle.Settings(learn=False),
    oracle.Settings(learn=False, lagrangian=True),
    oracle.Settings(bc=True),
    oracle.Settings(num_critics=1),
    oracle.Settings(gamma=0.5, tau=0.3, actor_lr=1e-2, critic_lr=2e-3, alpha_lr=5e-3, deterministic_backup=False),
]


def _name(settings: oracle.Settings) -> str:
    default = oracle.Settings()
    changed = [f for f in vars(settings) if getattr(settings, f) != getattr(default, f)]
    return "-".join(f"{f}={getattr(settings, f)}" for f in changed) or "default"


@pytest.mark.parametrize("settings", _COMBINATIONS + _VARIATIONS, ids=_name)
def test_losses_gradients_and_one_full_update_equal_the_oracle(settings: oracle.Settings) -> None:
    params, batch, noise = oracle.random_case(7, settings)
    learner = float64_learner(settings)
    load_params(learner, params)
    use_noise(learner, noise)

    learner._uncompiled_update({MODULE: torch_batch(batch)})

    gradients = oracle.gradients(params, batch, noise, settings)
    updated, _, metrics = oracle.full_update(params, oracle.initial_opt_state(params), batch, noise, settings)
    assert_params_equal(read_params(learner, gradients=True), gradients)
    assert_params_equal(read_params(learner), updated)
    logged = learner._accumulator.pop()
    pairs = {
        keys.QF_LOSS: metrics["critic_loss"],
        keys.POLICY_LOSS: metrics["actor_loss"],
        keys.ALPHA_LOSS: metrics["alpha_loss"],
        keys.LOG_PROB: metrics["log_prob_mean"],
        keys.TARGET_Q: metrics["target_mean"],
        keys.TD_LOSS_OF_CRITIC.format(c=1): metrics["td_loss.0"],
        keys.Q_DATA_OF_CRITIC.format(c=1): metrics["q_data.0"],
    }
    if settings.learn:
        pairs[keys.GAP_OF_CRITIC.format(c=settings.num_critics)] = metrics[f"gap.{settings.num_critics - 1}"]
    if settings.lagrangian and settings.learn:
        pairs[keys.ALPHA_PRIME_LOSS] = metrics["lagrange_loss"]
        pairs[keys.ALPHA_PRIME] = metrics["alpha_prime"]
    if settings.calibrate and settings.learn:
        rates = [
            logged[template.format(c=c + 1)]
            for c in range(settings.num_critics)
            for template in (keys.BOUND_RATE_CURRENT_OF_CRITIC, keys.BOUND_RATE_NEXT_OF_CRITIC)
        ]
        pairs["bound rates"] = (metrics["calibrated_current"] + metrics["calibrated_next"]) / 2
        logged["bound rates"] = float(np.mean(rates))
    for name, expected in pairs.items():
        assert logged[name] == pytest.approx(expected, rel=1e-9, abs=1e-12), name


def test_five_updates_in_a_row_equal_the_oracle() -> None:
    settings = oracle.Settings(lagrangian=True, deterministic_backup=False)
    params, batch, noise = oracle.random_case(3, settings)
    learner = float64_learner(settings)
    load_params(learner, params)
    use_noise(learner, noise)
    state = oracle.initial_opt_state(params)
    for _ in range(5):
        learner._uncompiled_update({MODULE: torch_batch(batch)})
        params, state, _ = oracle.full_update(params, state, batch, noise, settings)
    assert_params_equal(read_params(learner), params)


def test_the_first_update_in_float32_is_within_1e_5_of_the_oracle() -> None:
    settings = oracle.Settings(lagrangian=True)
    params, batch, noise = oracle.random_case(11, settings)
    learner = float64_learner(settings)
    learner.module[MODULE].float()
    for scalar in (learner.curr_log_alpha[MODULE], learner.log_alpha_prime):
        scalar.data = scalar.data.float()
    load_params(learner, params)
    use_noise(learner, {name: value.astype(np.float32) for name, value in noise.items()})
    learner._uncompiled_update({MODULE: {k: v.float() for k, v in torch_batch(batch).items()}})
    expected = oracle.gradients(params, batch, noise, settings)
    actual = read_params(learner, gradients=True)
    # Per network: a single bias may be a sum that cancels, whose own relative error says nothing.
    for network in ("policy.", "critic.0.", "critic.1.", "log_alpha"):
        names = [name for name in expected if name.startswith(network)]
        difference = np.concatenate([np.ravel(actual[name] - expected[name]) for name in names])
        norm = np.linalg.norm(np.concatenate([np.ravel(expected[name]) for name in names]))
        assert 0 < np.linalg.norm(difference) <= 1e-5 * norm, network


def test_behaviour_cloning_ends_after_bc_updates() -> None:
    settings = oracle.Settings(bc=True)
    params, batch, noise = oracle.random_case(5, settings)
    learner = float64_learner(settings)
    load_params(learner, params)
    use_noise(learner, noise)
    state = oracle.initial_opt_state(params)
    for step_settings in (settings, replace(settings, bc=False), replace(settings, bc=False)):
        learner._uncompiled_update({MODULE: torch_batch(batch)})
        params, state, _ = oracle.full_update(params, state, batch, noise, step_settings)
    assert_params_equal(read_params(learner), params)


def test_targets_move_every_target_update_period_gradient_steps() -> None:
    settings = oracle.Settings()
    params, batch, noise = oracle.random_case(5, settings)
    learner = float64_learner(settings, target_update_period=3)
    load_params(learner, params)
    use_noise(learner, noise)
    moved = []
    for _ in range(6):
        before = read_params(learner)["target.0.obs_weight"]
        learner._uncompiled_update({MODULE: torch_batch(batch)})
        moved.append(not np.array_equal(before, read_params(learner)["target.0.obs_weight"]))
    assert moved == [False, False, True, False, False, True]


def test_without_calibration_equals_returns_of_minus_infinity_bit_for_bit() -> None:
    settings = oracle.Settings(lagrangian=True)
    params, batch, noise = oracle.random_case(9, settings)
    results = []
    for calibrate, returns in ((False, batch.returns_to_go), (True, np.full_like(batch.returns_to_go, -np.inf))):
        learner = float64_learner(replace(settings, calibrate=calibrate))
        load_params(learner, params)
        use_noise(learner, noise)
        for _ in range(3):
            learner._uncompiled_update({MODULE: torch_batch(replace(batch, returns_to_go=returns))})
        results.append(read_params(learner))
    for name, value in results[0].items():
        assert np.array_equal(value, results[1][name]), name
