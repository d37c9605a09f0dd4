"""Reproducibility, checkpoints and restore in the middle of either phase."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.actor import _modify_class
from tiny import ONLINE_SIDE, TINY_NETWORKS, assert_identical, line_config, run_state, write_line_data

from rllib_calql import CalQL
from rllib_calql.store import offline_table
from rllib_calql.store.offline_table import OfflineTable, record_dtype

pytestmark = pytest.mark.usefixtures("ray_session")


def _learner_state(algo: CalQL) -> dict[str, Any]:
    """Weights, targets, optimisers, temperature, multiplier and random state of the learner."""
    state: dict[str, Any] = dict(algo.learner_group.get_state()["learner"])
    for name in ("metrics_logger", "weights_seq_no", "should_module_be_updated"):
        state.pop(name, None)
    return state


def test_runs_resumed_from_ten_random_points_go_on_bit_for_bit_like_the_uninterrupted_one(tmp_path: Path) -> None:
    num_offline_iterations, num_iterations, num_compared = 7, 14, 3
    config = line_config(
        tmp_path, offline_updates=5 * num_offline_iterations, updates_per_iteration=5, updates_per_env_step=0.7
    ).training(lagrangian=True, deterministic_backup=False)
    points = 1 + np.random.default_rng(0).permutation(num_iterations)[:10]
    assert min(points) < num_offline_iterations - num_compared < num_offline_iterations < max(points)
    algo = config.build()
    states = {}
    for iteration in range(1, num_iterations + num_compared + 1):
        algo.train()
        states[iteration] = (_learner_state(algo), run_state(algo))
        if iteration in points:
            algo.save_to_path(str(tmp_path / str(iteration)))
    algo.stop()
    for point in points.tolist():
        restored = CalQL.from_checkpoint(tmp_path / str(point))
        for _ in range(num_compared):
            restored.train()
        assert_identical((_learner_state(restored), run_state(restored)), states[point + num_compared])
        restored.stop()


@pytest.mark.parametrize("conservative_online", [True, False])
def test_a_run_with_every_setting_of_the_online_side_resumes_bit_for_bit(
    tmp_path: Path, conservative_online: bool
) -> None:
    config = line_config(tmp_path, offline_updates=20, updates_per_iteration=5)
    settings = dict(ONLINE_SIDE)
    if not conservative_online:
        del settings["min_q_weight_online"]
    config.update_from_dict(settings | {"conservative_online": conservative_online})
    config.rl_module(model_config={**TINY_NETWORKS, "layer_norm": "critic"})
    algo = config.build()
    states = {}
    for iteration in range(1, 8):
        algo.train()
        states[iteration] = (_learner_state(algo), run_state(algo))
        if iteration in (2, 5):
            algo.save_to_path(str(tmp_path / str(iteration)))
    assert algo.num_online_updates > 20
    algo.stop()
    for point in (2, 5):
        restored = CalQL.from_checkpoint(tmp_path / str(point))
        restored.train()
        restored.train()
        assert_identical((_learner_state(restored), run_state(restored)), states[point + 2])
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


def test_three_hundred_offline_updates_are_bit_reproducible(tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        algo = line_config(tmp_path, offline_updates=300, updates_per_iteration=150).build()
        algo.train()
        algo.train()
        assert algo.num_offline_updates == 300
        states.append(_learner_state(algo))
        algo.stop()
    assert_identical(*states)


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
    assert_identical(*states)


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
    assert_identical(_learner_state(algo), early)
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
    data = tmp_path / "line.parquet"
    table = pq.read_table(data)
    write_line_data(data, num_episodes=5)
    with pytest.raises(
        ValueError, match=r"made with \d+ offline transitions, `input_` now has \d+; restore with the same"
    ):
        CalQL.from_checkpoint(path)
    rewards = table["rewards"].to_pylist()
    rewards[3] = -0.5
    pq.write_table(table.set_column(table.column_names.index("rewards"), "rewards", pa.array(rewards)), data)
    with pytest.raises(ValueError, match=r"now has as many with other content \(fingerprint \w+, was \w+\)"):
        CalQL.from_checkpoint(path)
    pq.write_table(table, tmp_path / "moved.parquet")  # The same data elsewhere are the same.
    restored = CalQL.from_checkpoint(
        path,
        config=line_config(tmp_path, offline_updates=10).offline_data(input_=str(tmp_path / "moved.parquet")),
    )
    assert restored.num_offline_updates == 5
    restored.stop()


def _table(**changes: Any) -> OfflineTable:
    """Three episodes of 2, 3 and 4 steps; `changes` replace single columns."""
    rng = np.random.default_rng(0)
    parts = {
        "obs": rng.normal(size=(9, 2)),
        "actions": rng.normal(size=(9, 1)),
        "rewards": rng.normal(size=9),
        "returns_to_go": rng.normal(size=9),
        "final_observations": rng.normal(size=(3, 2)).astype(np.float32),
        "lengths": np.array([2, 3, 4]),
        "terminateds": np.array([True, False, False]),
        "has_tail": np.array([False, False, True]),
    } | changes
    records = np.empty(9, dtype=record_dtype(parts["final_observations"], 1))
    for name in records.dtype.names or ():
        records[name] = parts.pop(name)
    return OfflineTable(records, parts.pop("final_observations"), gamma=0.9, **parts)


def test_the_fingerprint_of_offline_data_tells_every_column_and_not_where_they_lie(tmp_path: Path) -> None:
    table = _table()
    table.records.tofile(tmp_path / "records")
    mapped = OfflineTable(
        np.memmap(tmp_path / "records", dtype=table.records.dtype, mode="r"),
        table.final_observations,
        lengths=table.lengths,
        terminateds=table.terminateds,
        has_tail=table.has_tail,
        gamma=0.9,
        memory_limit=1,
    )
    assert mapped.is_mapped
    assert mapped.fingerprint() == table.fingerprint() == _table().fingerprint()
    others = [_table(**{name: np.full(9, 0.5)}) for name in ("rewards", "returns_to_go")]
    others += [_table(**{name: np.full((9, 1), 0.5)}) for name in ("obs", "actions")]
    others += [_table(final_observations=np.zeros((3, 2), np.float32)), _table(lengths=np.array([3, 2, 4]))]
    others += [_table(**{name: np.array([False, True, False])}) for name in ("terminateds", "has_tail")]
    assert len({other.fingerprint() for other in [table, *others]}) == 1 + len(others)
    # What was done is the same whatever was seen and paid.
    assert mapped.behaviour_fingerprint() == table.behaviour_fingerprint()
    is_same = [other.behaviour_fingerprint() == table.behaviour_fingerprint() for other in others]
    #          rewards, returns, obs, actions, final observations, lengths, terminateds, has_tail
    assert is_same == [True, True, True, False, True, False, False, True]


def test_the_fingerprint_does_not_depend_on_the_pieces_it_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _table().fingerprint(), _table().behaviour_fingerprint()
    monkeypatch.setattr(offline_table, "_FINGERPRINT_BYTES", 40)
    assert (_table().fingerprint(), _table().behaviour_fingerprint()) == whole


def test_a_checkpoint_of_an_actor_names_its_classes_and_holds_none(tmp_path: Path) -> None:
    # Ray makes a class of its own for an actor, as for a trial of Ray Tune; it cannot be found by name.
    algo = line_config(tmp_path, offline_updates=2).build()
    algo.__class__ = _modify_class(CalQL)
    algo.save_to_path(tmp_path / "checkpoint")
    mark = (tmp_path / "checkpoint" / "class_and_ctor_args.pkl").read_bytes()
    assert pickle.loads(mark)["class"] is CalQL
    assert b"training_step" not in mark  # No method of the class.
    algo.stop()
    CalQL.from_checkpoint(tmp_path / "checkpoint").stop()
