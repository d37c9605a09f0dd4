"""A store copied to a device gives the batches that the store itself would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_replay import make_store, rows_of
from tiny import assert_identical, line_config, run_state

from rllib_calql import CalQL
from rllib_calql.learning import updater as updating
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.resident_store import ROW_NUMBERS, ResidentStore, resident_store

CPU = torch.device("cpu")


def stores(num_offline: int = 0, num_online: int = 0, **settings: Any) -> tuple[TransitionStore, TransitionStore]:
    """The same store twice: one to draw from, one to copy."""
    return make_store(num_offline, num_online, **settings), make_store(num_offline, num_online, **settings)


def assert_same_batches(plain: TransitionStore, copied: TransitionStore, resident: ResidentStore, num: int) -> None:
    """Both stores draw the same; each batch has `num` offline rows of 8."""
    resident.follow()
    expected = plain.sample(num_batches=5, batch_size=8, num_offline_rows=num)
    rows = copied.draw(num_batches=5, batch_size=8, num_offline_rows=num)
    batch = resident.look_up(torch.from_numpy(rows.reshape(-1)))
    assert set(batch) == set(expected)
    for name, column in batch.items():
        np.testing.assert_array_equal(column.numpy(), expected[name], err_msg=name)
        assert column.numpy().dtype == expected[name].dtype


@pytest.mark.parametrize("num_offline_rows", [0, 3, 8])
def test_looked_up_batches_are_the_sampled_ones(num_offline_rows: int) -> None:
    plain, copied = stores(20, 30)
    assert_same_batches(plain, copied, ResidentStore(copied, CPU), num_offline_rows)


def test_a_copy_follows_the_ring_through_growth_and_wrap_around_and_episodes_longer_than_half_of_it() -> None:
    plain, copied = stores(5, online_capacity=1_500)
    resident = ResidentStore(copied, CPU)
    next_id = 1_000
    for num_rows in (1, 700, 600, 500, 1_400, 3):
        for store in (plain, copied):
            store.add_online(rows_of(*range(next_id, next_id + num_rows)))
        next_id += num_rows
        assert_same_batches(plain, copied, resident, 2)


def test_several_episodes_between_two_calls_are_all_followed_also_if_they_overwrite_each_other() -> None:
    plain, copied = stores(5, 10, online_capacity=40)
    resident = ResidentStore(copied, CPU)
    for first in range(2_000, 2_100, 20):
        for store in (plain, copied):
            store.add_online(rows_of(*range(first, first + 20)))
    assert_same_batches(plain, copied, resident, 0)


def test_a_copy_follows_a_restored_store() -> None:
    plain, copied = stores(5, 30)
    resident = ResidentStore(copied, CPU)
    other = make_store(5, seed=7)
    other.add_online(rows_of(*range(5_000, 5_030)))  # As many rows as before.
    for store in (plain, copied):
        store.set_state(other.get_state())
    assert_same_batches(plain, copied, resident, 4)


def test_only_gpus_get_a_copy_and_only_of_returns_that_stay() -> None:
    assert resident_store(make_store(5), CPU) is None
    assert resident_store(make_store(5, track_tails=True), torch.device("cuda")) is None


@pytest.mark.parametrize(("free", "fits"), [(2 * 105 * 44, True), (2 * 105 * 44 - 1, False)])
def test_a_copy_takes_at_most_half_of_the_free_memory(free: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(5, online_capacity=100)
    assert store.row_nbytes == 44
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    monkeypatch.setattr("rllib_calql.store.resident_store.ResidentStore", lambda store, device: "copy")
    assert (resident_store(store, torch.device("cuda")) == "copy") == fits


@pytest.fixture
def resident_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The algorithm keeps its store on its device, also if that is a CPU."""
    monkeypatch.setattr(updating, "resident_store", ResidentStore)


def _trained(config: Any, tmp_path: Path) -> tuple[Any, ...]:
    """Learner and run after both phases and a restore in between."""
    algo = config.build()
    for _ in range(4):
        algo.train()
    restored = CalQL.from_checkpoint(algo.save_to_path(str(tmp_path / "checkpoint")))
    algo.stop()
    for _ in range(2):
        restored.train()
    is_resident = restored.learner_group._learner.resident_store is not None
    learner_state = {
        key: value
        for key, value in restored.learner_group.get_state()["learner"].items()
        if key not in ("metrics_logger", "weights_seq_no", "should_module_be_updated")
    }
    state = (learner_state, run_state(restored))
    assert restored.phase == "online"
    restored.stop()
    return is_resident, state


@pytest.mark.usefixtures("ray_session")
def test_training_is_the_same_bit_for_bit_wherever_the_store_lies(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = line_config(tmp_path, offline_updates=10, updates_per_iteration=5)
    is_resident, plain = _trained(config, tmp_path / "plain")
    assert not is_resident
    request.getfixturevalue("resident_everywhere")
    is_resident, resident = _trained(config, tmp_path / "resident")
    assert is_resident
    assert_identical(plain, resident)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("ray_session")
def test_on_a_gpu_the_whole_update_is_one_replayed_graph(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=20, updates_per_iteration=10)
    algo = config.learners(num_gpus_per_learner=1).build()
    for _ in range(4):
        algo.train()
    learner = algo.learner_group._learner
    assert learner.resident_store is not None
    assert set(learner._graphed._buffers) == {ROW_NUMBERS}
    assert learner._graphed._replays
    algo.stop()
