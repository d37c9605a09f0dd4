"""What the learner makes of the losses: K gradient steps per call, phases, seeds, state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from learner_checks import MODULE, assert_bit_identical, everything, parameters, random_rows, update
from ray.rllib.core.columns import Columns
from small_learners import make_learner
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rllib_calql.common import metrics as keys
from rllib_calql.learning.learner import CalQLTorchLearner
from rllib_calql.learning.skipped_updates import MAX_SKIPPED_UPDATES_IN_A_ROW, SkippedUpdates, check_updates_are_applied
from rllib_calql.store.offline_data import as_multi_agent_batch


def freeze(learner: CalQLTorchLearner) -> None:
    """Makes every optimiser's steps empty."""
    for optimizer in learner._named_optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = 0.0


def test_one_update_call_of_k_minibatches_moves_the_targets_k_times() -> None:
    learner = make_learner(tau=0.25)
    freeze(learner)
    module = learner.module[MODULE]
    with torch.no_grad():
        for target in module.target_critic.parameters():
            target += 1.0
    update(learner, random_rows(4 * 8), 8)
    # The critic stands still, so that each step takes a quarter of the remaining distance: 0.75^4.
    for critic, target in zip(module.critic.parameters(), module.target_critic.parameters(), strict=True):
        torch.testing.assert_close(target - critic, torch.full_like(critic, 0.75**4), rtol=1e-5, atol=1e-6)


def test_one_update_call_of_k_minibatches_equals_k_calls_of_one() -> None:
    rows = random_rows(3 * 8)
    together, apart = make_learner(lagrangian=True), make_learner(lagrangian=True)
    update(together, rows, 8)
    for start in (0, 8, 16):
        update(apart, {name: column[start : start + 8] for name, column in rows.items()}, 8)
    assert_bit_identical(parameters(together), parameters(apart))
    assert torch.equal(together.log_alpha_prime, apart.log_alpha_prime)


def test_metrics_are_means_over_the_minibatches_of_a_call() -> None:
    rows = random_rows(2 * 8)
    together, apart = make_learner(), make_learner()
    results = update(together, rows, 8)
    halves = [update(apart, {k: v[s] for k, v in rows.items()}, 8) for s in (slice(0, 8), slice(8, 16))]
    for name in (keys.QF_LOSS, keys.POLICY_LOSS, keys.LOG_PROB, keys.TARGET_Q, keys.CALIBRATION_GAP_ONLINE):
        assert results[name] == pytest.approx((halves[0][name] + halves[1][name]) / 2, rel=1e-5), name
    assert results[keys.NUM_UPDATES_LIFETIME] == 2


@pytest.mark.parametrize("size", [4, 8])
def test_a_call_logs_nothing_of_an_earlier_one_that_was_interrupted(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, twin = make_learner(), make_learner()
    compute, left = learner.compute_gradients, iter(range(2))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return compute(*args, **kwargs)

    monkeypatch.setattr(learner, "compute_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update(learner, random_rows(40), 8)
    monkeypatch.undo()
    twin.set_state(learner.get_state())
    rows = random_rows(16, seed=1)
    found, expected = update(learner, rows, size), update(twin, rows, size)
    of_losses = [name for name in expected if "lifetime" not in name and not name.startswith("num_")]
    assert keys.QF_LOSS in of_losses
    assert {name: found[name] for name in of_losses} == {name: expected[name] for name in of_losses}


def test_an_update_refuses_rows_that_do_not_fill_the_minibatches() -> None:
    with pytest.raises(ValueError, match="needs whole mini-batches of 8 rows, got 20 rows"):
        update(make_learner(), random_rows(20), 8)


@pytest.mark.parametrize("lagrangian", [False, True])
def test_the_conservative_term_and_the_data_do_not_reach_policy_and_temperature(lagrangian: bool) -> None:
    rows = random_rows(8)
    results = []
    for weight, rewards in ((0.0, rows[Columns.REWARDS]), (1e3, 100.0 * rows[Columns.REWARDS])):
        learner = make_learner(min_q_weight=weight, lagrangian=lagrangian)
        update(learner, rows | {Columns.REWARDS: rewards}, 8)
        results.append((parameters(learner, "policy."), learner.curr_log_alpha[MODULE].detach().clone()))
    assert_bit_identical(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_actor_and_its_temperature_do_not_reach_the_critics() -> None:
    rows = random_rows(8)
    results = []
    for log_alpha in (-3.0, 3.0):
        learner = make_learner()
        learner.curr_log_alpha[MODULE].data.fill_(log_alpha)
        update(learner, rows, 8)
        results.append((parameters(learner, "critic."), parameters(learner, "policy.")))
    assert_bit_identical(results[0][0], results[1][0])
    assert not torch.equal(results[0][1]["policy.head.weight"], results[1][1]["policy.head.weight"])


def test_the_weight_of_the_online_phase_applies_online_only() -> None:
    rows = random_rows(8)
    terms = {
        online: update(make_learner(min_q_weight=6.0, min_q_weight_online=1.5), rows, 8, online=online)[keys.CQL_LOSS]
        for online in (False, True)
    }
    assert terms[False] == pytest.approx(4.0 * terms[True], rel=1e-5)


def test_calibration_switched_off_online_is_cql_online_and_cal_ql_offline() -> None:
    rows = random_rows(8) | {Columns.RETURNS_TO_GO: np.full(8, 50.0, np.float32)}
    switched, never = make_learner(calibrate_online=False), make_learner(calibrate=False)
    assert update(switched, rows, 8)[keys.BOUND_RATE_CURRENT_OF_CRITIC.format(c=1)] == 1.0
    switched = make_learner(calibrate_online=False)
    assert update(switched, rows, 8, online=True)[keys.BOUND_RATE_CURRENT_OF_CRITIC.format(c=1)] == 0.0
    update(never, rows, 8)
    assert_bit_identical(parameters(switched), parameters(never))


def test_learners_of_different_rank_draw_different_noise_and_those_of_one_rank_the_same() -> None:
    draws = []
    for rank in (0, 0, 1, 2):
        built = make_learner()
        learner = CalQLTorchLearner(config=built.config, module_spec=built._module_spec)
        learner._set_learner_index_and_placement_group(learner_index=rank, placement_group=None)
        learner.build()
        draws.append(learner.module[MODULE].draw_noise(4, torch.device("cpu")))
    for field in draws[0]._fields:
        first, second, *others = (getattr(draw, field) for draw in draws)
        assert torch.equal(first, second), field
        assert all(not torch.equal(first, other) for other in others), field
        assert not torch.equal(*others), field


@pytest.mark.parametrize("action_dim", [1, 5])
def test_the_entropy_target_is_minus_the_action_dimension_and_alpha_moves_towards_it(action_dim: int) -> None:
    # The bias of the log-deviation is -1: deviation exp(-10), entropy far below the target; deviation 1, above it.
    for raw_log_std, direction in ((-9.0, 1.0), (1.0, -1.0)):
        learner = make_learner(action_dim=action_dim, alpha_lr=0.1)
        assert float(learner.target_entropy[MODULE]) == -action_dim
        before = learner.curr_log_alpha[MODULE].item()
        learner.module[MODULE].policy.head.bias.data[action_dim:] = raw_log_std
        update(learner, random_rows(64, action_dim=action_dim), 64)
        # Adam's first step has the length of the learning rate.
        assert learner.curr_log_alpha[MODULE].item() - before == pytest.approx(0.1 * direction, rel=1e-3)


def test_behaviour_cloning_really_clones() -> None:
    learner = make_learner(obs_dim=2, action_dim=2, bc_updates=300, actor_lr=1e-2, hiddens=(32,))
    learner.curr_log_alpha[MODULE].data.fill_(-10.0)
    rows = random_rows(300 * 32, obs_dim=2)
    rows[Columns.ACTIONS] = np.tanh(rows[Columns.OBS] @ np.array([[0.5, -0.3], [0.2, 0.4]], np.float32))
    update(learner, rows, 32)
    obs = torch.from_numpy(rows[Columns.OBS][:200])
    greedy = learner.module[MODULE].forward_inference({Columns.OBS: obs})[Columns.ACTIONS]
    assert (greedy - torch.from_numpy(rows[Columns.ACTIONS][:200])).abs().mean().item() < 0.05


def test_a_restored_learner_takes_the_same_next_step() -> None:
    rows = random_rows(2 * 8)
    original = make_learner(lagrangian=True, bc_updates=3)
    update(original, rows, 8)
    state = original.get_state()
    restored = make_learner(lagrangian=True, bc_updates=3, seed=5)
    restored.set_state(state)
    for learner in (original, restored):
        update(learner, rows, 8)
    assert_bit_identical(parameters(restored), parameters(original))
    assert torch.equal(restored.log_alpha_prime, original.log_alpha_prime)
    assert torch.equal(restored.curr_log_alpha[MODULE], original.curr_log_alpha[MODULE])


def test_a_restored_learner_of_another_rank_does_not_draw_rank_zeros_noise() -> None:
    original = make_learner()
    state = original.get_state()
    draws = [original.module[MODULE].draw_noise(4, torch.device("cpu")).actor]
    for rank in (1, 2):
        learner = make_learner()
        learner._learner_index = rank
        learner.set_state(state)
        draws.append(learner.module[MODULE].draw_noise(4, torch.device("cpu")).actor)
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_the_learning_rate_of_the_config_survives_a_restore() -> None:
    state = make_learner(actor_lr=1e-4).get_state()
    learner = make_learner(actor_lr=7e-4)
    learner.set_state(state)
    assert learner._named_optimizers[f"{MODULE}_policy"].param_groups[0]["lr"] == pytest.approx(7e-4)


def test_a_learning_rate_schedule_counts_env_steps_and_holds_from_the_first_update_of_a_call() -> None:
    schedule = [[0, 1e-2], [100, 1e-4]]
    learner = make_learner(actor_lr=schedule)
    optimizer = learner.get_optimizer(MODULE, "policy")
    used = []
    step = optimizer.step
    optimizer.step = lambda *a, **k: (used.append(float(optimizer.param_groups[0]["lr"])), step(*a, **k))[1]  # type: ignore[method-assign]
    for env_steps in (0, 50, 100, 200):
        batch = as_multi_agent_batch(random_rows(8))
        learner.update(batch=batch, minibatch_size=4, timesteps={"num_env_steps_sampled_lifetime": env_steps})
    assert used == pytest.approx([1e-2, 1e-2, 5.05e-3, 5.05e-3, 1e-4, 1e-4, 1e-4, 1e-4])


# --- Skipped updates --------------------------------------------------------------------------------------------------


def bad_rows(num_rows: int = 8, reward: float = np.nan) -> dict[str, np.ndarray]:
    rows = random_rows(num_rows)
    rows[Columns.REWARDS][::8] = reward
    return rows


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "clip", [{}, *({"grad_clip": 1.0, "grad_clip_by": by} for by in ("value", "norm", "global_norm"))]
)
def test_an_update_with_a_gradient_that_is_not_finite_changes_nothing(clip: dict[str, Any], reward: float) -> None:
    learner = make_learner(lagrangian=True, deterministic_backup=False, tau=0.5, **clip)
    update(learner, random_rows(2 * 8), 8)
    before = everything(learner)
    results = update(learner, bad_rows(reward=reward), 8)
    assert_bit_identical(everything(learner), before)
    assert results[keys.NUM_SKIPPED_UPDATES_LIFETIME] == 1
    assert results[keys.NUM_UPDATES_LIFETIME] == 3
    update(learner, random_rows(8), 8)
    assert all(not torch.equal(value, before[name]) for name, value in everything(learner).items() if value.any())


def test_an_infinite_gradient_is_not_clipped_to_a_finite_one(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner(grad_clip=1.0, grad_clip_by="value")
    compute_gradients = learner.compute_gradients

    def with_one_infinity(losses: Any) -> Any:
        gradients = compute_gradients(losses)
        gradients[learner.curr_log_alpha[MODULE]].fill_(np.inf)
        return gradients

    monkeypatch.setattr(learner, "compute_gradients", with_one_infinity)
    before = parameters(learner)
    update(learner, random_rows(8), 8)
    assert_bit_identical(parameters(learner), before)


@pytest.mark.parametrize("num_before", [0, 2])
def test_a_skipped_update_leaves_no_trace_in_later_ones(num_before: int) -> None:
    with_skip, without = make_learner(lagrangian=True), make_learner(lagrangian=True)
    for learner in (with_skip, without):
        if num_before:
            update(learner, random_rows(num_before * 8), 8)
    update(with_skip, bad_rows(), 8)
    without._calql_module.draw_noise(8, torch.device("cpu"))
    for learner in (with_skip, without):
        update(learner, random_rows(3 * 8, seed=1), 8)
    assert_bit_identical(everything(with_skip), everything(without))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 6])
@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_one_element_that_is_not_finite_skips_the_update(tensor: int, position: int, value: float) -> None:
    gradients = [torch.zeros(7), torch.ones(7, 1), torch.full((1, 7), -2.0)]
    gradients[tensor].view(-1)[position] = value
    skipped = SkippedUpdates("cpu")
    skipped.judge(gradients)
    assert skipped.found_inf.item() == 1.0


@pytest.mark.parametrize("size", [3.4e38, 1e-45])
def test_finite_gradients_are_kept_as_they_are_even_if_their_sums_or_squares_overflow(size: float) -> None:
    gradients = [torch.full((1000,), size), torch.full((3, 2), -size)]
    copies = [gradient.clone() for gradient in gradients]
    skipped = SkippedUpdates("cpu")
    skipped.judge(gradients)
    assert skipped.found_inf.item() == 0.0
    assert all(torch.equal(*pair) for pair in zip(gradients, copies, strict=True))
    assert skipped.read() == (0, 0, 0)


def test_skipped_updates_are_counted_over_calls_and_in_a_row() -> None:
    learner, counts = make_learner(), []
    for pattern in ("+--", "-+", "---", "+", ""):
        rows = random_rows(8 * max(1, len(pattern)))
        for number, sign in enumerate(pattern):
            if sign == "-":
                rows[Columns.REWARDS][8 * number] = np.nan
        results = update(learner, rows, 8)
        counts.append((results[keys.NUM_SKIPPED_UPDATES_LIFETIME], results[keys.NUM_SKIPPED_UPDATES_IN_A_ROW]))
    assert counts == [(2, 2), (3, 0), (6, 3), (6, 0), (6, 0)]
    restored = make_learner()
    restored.set_state(learner.get_state())
    assert update(restored, bad_rows(), 8)[keys.NUM_SKIPPED_UPDATES_LIFETIME] == 7


@pytest.mark.parametrize(("rank", "num_warnings"), [(0, 2), (1, 0)])
def test_the_first_learner_warns_once_per_call_that_skips(
    rank: int, num_warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    learner = make_learner()
    learner._learner_index = rank
    with caplog.at_level(logging.WARNING, logger="rllib_calql.learning.learner"):
        for rows in (bad_rows(3 * 8), random_rows(8), bad_rows(8)):
            update(learner, rows, 8)
    messages = [record.message for record in caplog.records if record.name == "rllib_calql.learning.learner"]
    assert len(messages) == num_warnings
    if messages:
        assert messages[0].startswith("3 of 3 gradient updates were skipped because a gradient was NaN or infinite")
        assert "on the first learner: target_q, td_loss_q1, td_loss_q2, qf_loss. Look for" in messages[0]
        assert "1 of 1 gradient updates" in messages[1]
        assert "(4 so far)" in messages[1]


def test_only_skipped_updates_without_end_end_the_run() -> None:
    learner = make_learner()

    def results_of(rows: dict[str, np.ndarray]) -> Any:
        return [learner.update(batch=as_multi_agent_batch(rows), minibatch_size=8, timesteps={})]

    check_updates_are_applied(results_of(bad_rows(8 * (MAX_SKIPPED_UPDATES_IN_A_ROW - 1))))
    with pytest.raises(RuntimeError, match=rf"The last {MAX_SKIPPED_UPDATES_IN_A_ROW} gradient updates were skipped"):
        check_updates_are_applied(results_of(bad_rows(8)))
    check_updates_are_applied(results_of(random_rows(8)))


class OperationNames(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_a_gradient_step_reads_nothing_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner(lagrangian=True)
    learner._calql_module.critic._kernel_activation = None  # As on a GPU: the kernel of CPUs counts rows.
    rows = {name: torch.from_numpy(column) for name, column in random_rows(8).items()}
    readings = []
    for name in ("tolist", "numpy", "cpu"):  # Those that are no operation on a CPU.
        monkeypatch.setattr(Tensor, name, lambda self, *_, name=name: readings.append(name))
    with OperationNames() as operations:
        learner._uncompiled_update({MODULE: rows})
    assert readings == []
    assert "aten._fused_adam_.default" in operations.names
    assert {name for name in operations.names if "_local_scalar_dense" in name or "nonzero" in name} == set()
    with OperationNames() as operations:
        assert learner._skipped.found_inf.item() == 0.0
    assert operations.names == {"aten._local_scalar_dense.default"}


def test_a_learner_leaves_the_state_it_was_restored_from_as_it_is() -> None:
    original = make_learner()
    update(original, random_rows(8), 8)
    state = original.get_state()
    moments = state["optimizer"][f"{MODULE}_critic"]["state"]["state"][0]["exp_avg"]
    before = moments.copy()
    restored = make_learner()
    restored.set_state(state)
    update(restored, random_rows(8, seed=1), 8)
    assert np.array_equal(moments, before)
