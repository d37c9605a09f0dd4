"""Reproducibility, checkpoints and restore in the middle of either phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tree
from ray.rllib.core.columns import Columns
from tiny import line_config, write_line_data

from rllib_calql import CalQL
from rllib_calql import metrics as keys

pytestmark = pytest.mark.usefixtures("ray_session")


def _learner_state(algo: CalQL) -> dict[str, Any]:
    """Weights, targets, optimisers, temperature, multiplier and random state of the learner."""
    state: dict[str, Any] = dict(algo.learner_group.get_state()["learner"])
    for name in ("metrics_logger", "weights_seq_no", "should_module_be_updated"):
        state.pop(name, None)
    return state


def _assert_identical(one: Any, other: Any) -> None:
    tree.assert_same_structure(one, other)
    for (path, a), (_, b) in zip(tree.flatten_with_path(one), tree.flatten_with_path(other), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b)), path


def _assert_same_run(one: CalQL, other: CalQL) -> None:
    _assert_identical(_learner_state(one), _learner_state(other))
    for name in (Columns.OBS, Columns.ACTIONS, Columns.REWARDS, Columns.RETURNS_TO_GO, Columns.TERMINATEDS):
        assert np.array_equal(one.store.online_column(name), other.store.online_column(name)), name
    _assert_identical(one._counters_of_phases(), other._counters_of_phases())
    assert one.store.draw_seed() == other.store.draw_seed()


@pytest.mark.parametrize(
    ("phase", "num_iterations"), [(keys.OFFLINE, 1), (keys.OFFLINE, 2), (keys.ONLINE, 3), (keys.ONLINE, 5)]
)
@pytest.mark.parametrize("settings", [{}, {"lagrangian": True, "deterministic_backup": False}])
def test_a_restored_run_goes_on_bit_for_bit_like_the_uninterrupted_one(
    tmp_path: Path, phase: str, num_iterations: int, settings: dict[str, Any]
) -> None:
    algo = line_config(tmp_path, offline_updates=21, updates_per_iteration=7).training(**settings).build()
    for _ in range(num_iterations):
        algo.train()
    assert algo.phase == phase
    begin = algo.num_offline_updates + algo.num_online_updates
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    restored = CalQL.from_checkpoint(path)
    _assert_same_run(algo, restored)
    while algo.num_offline_updates + algo.num_online_updates < begin + 20:
        algo.train()
        restored.train()
    _assert_same_run(algo, restored)
    algo.stop()
    restored.stop()


def test_temperature_and_multiplier_are_in_the_checkpoint(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=200, updates_per_iteration=100)
    algo = config.training(lagrangian=True, alpha_lr=1e-2, critic_lr=1e-2).build()
    algo.train()
    learner = algo.learner_group._learner
    alpha, alpha_prime = learner.curr_log_alpha["default_policy"].item(), learner.log_alpha_prime.item()
    restored = CalQL.from_checkpoint(algo.save_to_path(str(tmp_path / "checkpoint"))).learner_group._learner
    algo.stop()
    assert alpha != 0.0
    assert alpha_prime != 1.0
    assert restored.curr_log_alpha["default_policy"].item() == alpha
    assert restored.log_alpha_prime.item() == alpha_prime
    optimised = [p for o in restored._named_optimizers.values() for g in o.param_groups for p in g["params"]]
    assert any(p is restored.log_alpha_prime for p in optimised)  # Restored in place, not replaced.
    assert any(p is restored.curr_log_alpha["default_policy"] for p in optimised)


def test_a_thousand_offline_updates_are_bit_reproducible(tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        algo = line_config(tmp_path, offline_updates=1_000, updates_per_iteration=500).build()
        algo.train()
        algo.train()
        assert algo.num_offline_updates == 1_000
        states.append(_learner_state(algo))
        algo.stop()
    _assert_identical(*states)


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    weights = []
    for seed in (0, 1):
        algo = line_config(tmp_path, offline_updates=5).debugging(seed=seed).build()
        algo.train()
        weights.append(_learner_state(algo)["rl_module"]["default_policy"]["policy.head.weight"])
        algo.stop()
    assert not np.array_equal(*weights)


def test_evaluation_does_not_change_training(tmp_path: Path) -> None:
    states = []
    for interval in (None, 1):
        config = line_config(tmp_path, offline_updates=5, updates_per_iteration=5)
        config.evaluation(evaluation_interval=interval, evaluation_duration=2)
        algo = config.build()
        for _ in range(3):
            algo.train()
        states.append(_learner_state(algo))
        algo.stop()
    _assert_identical(*states)


def test_a_changed_learning_rate_counts_from_the_first_update_after_restore(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=50).build()
    algo.train()
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    algo.stop()
    changed = line_config(tmp_path, offline_updates=50).training(actor_lr=0.0123).build()
    changed.restore_from_path(path)
    optimizer = changed.learner_group._learner.get_optimizer("default_policy", "policy")
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.0123])
    changed.stop()


def test_an_older_checkpoint_restores_into_a_later_run(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=10, updates_per_iteration=5).build()
    algo.train()
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    early = _learner_state(algo)
    for _ in range(3):
        algo.train()
    algo.restore_from_path(path)
    _assert_identical(_learner_state(algo), early)
    runner = algo.env_runner.module.get_state()
    algo.stop()
    np.testing.assert_array_equal(
        runner["policy.head.weight"], early["rl_module"]["default_policy"]["policy.head.weight"]
    )


def test_other_offline_data_are_refused_at_restore(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=10, updates_per_iteration=5).build()
    algo.train()
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    algo.stop()
    write_line_data(tmp_path / "line.parquet", num_episodes=5)
    with pytest.raises(ValueError, match=r"made with \d+ offline transitions, `input_` now has \d+"):
        CalQL.from_checkpoint(path)


def test_remote_runners_have_the_restored_weights_at_once(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=5, updates_per_iteration=5)
    algo = config.env_runners(num_env_runners=1).build()
    for _ in range(2):
        algo.train()
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    expected = _learner_state(algo)["rl_module"]["default_policy"]["policy.head.weight"]
    algo.stop()
    restored = CalQL.from_checkpoint(path)
    (weights,) = restored.env_runner_group.foreach_env_runner(
        lambda runner: runner.module.get_state(), local_env_runner=False
    )
    restored.stop()
    np.testing.assert_array_equal(weights["policy.head.weight"], expected)
