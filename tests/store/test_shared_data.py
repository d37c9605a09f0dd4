"""Sharing: trials see the same memory, hold the same numbers, and nothing is left behind or waited for in vain."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from test_loading import BLOCKS, Reader, block_of, conversion
from tiny import line_config

from rllib_calql.common.returns import RewardSettings
from rllib_calql.store import offline_data, shared_data
from rllib_calql.store.loading import Sharing, StorageSettings, load_parts, load_table
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.shared_data import Registry, SharedTables, SharingSettings, is_in_actor, namespace_of_job

WAIT_S = 60.0
LEASE_S, GRACE_S = 30.0, 60.0


# --- The registry's book, without Ray ---------------------------------------------------------------------------------


class Book:
    """A registry whose clock is set by hand and whose tables are numbers."""

    def __init__(self) -> None:
        self.now = 0.0
        self.started: list[tuple[bytes, str]] = []
        self.cancelled: list[int] = []
        self.registry = Registry(
            SharingSettings(lease_s=LEASE_S, grace_s=GRACE_S),
            start=self._start,
            cancel=self.cancelled.append,
            clock=lambda: self.now,
        )

    def _start(self, load: bytes, node_id: str) -> int:
        self.started.append((load, node_id))
        return len(self.started)

    def acquire(self, key: str, user: str, *, nbytes: int = 10, room: int = 100, node_id: str = "node") -> Any:
        """By default a table of 10 in a room of 100."""
        return self.registry.acquire(key, user, load=key.encode(), nbytes=nbytes, room=room, node_id=node_id)


def test_a_table_is_loaded_once_where_it_was_asked_for_first() -> None:
    book = Book()
    assert book.acquire("a", "one", node_id="here") == [1]
    assert book.acquire("a", "two", node_id="there") == [1]
    assert book.acquire("b", "three", node_id="there") == [2]
    assert book.started == [(b"a", "here"), (b"b", "there")]


def test_tables_together_take_no_more_than_the_room() -> None:
    book = Book()
    assert book.acquire("a", "one", nbytes=60) == [1]
    assert book.acquire("b", "two", nbytes=41) is None
    assert book.acquire("b", "two", nbytes=40) == [2]
    assert book.acquire("a", "three", nbytes=60, room=99) is None  # A node with a smaller store.
    assert book.acquire("a", "four", nbytes=1) == [1]  # What is there takes no more room.


def test_the_true_size_of_a_table_counts_once_it_is_known() -> None:
    book = Book()
    book.acquire("a", "one", nbytes=10)
    assert book.registry.touch("a", "one", 95)
    assert book.acquire("b", "two", nbytes=10) is None


def test_signs_of_life_keep_a_table_and_their_end_drops_it_after_lease_and_grace() -> None:
    book = Book()
    book.acquire("a", "one")
    for _ in range(20):
        book.now += LEASE_S - 1
        assert book.registry.touch("a", "one", 0)
        assert not book.registry.expire()
    book.now += LEASE_S + 1
    assert not book.registry.expire()  # The user is dead from here on,
    assert not book.registry.touch("a", "one", 0)
    book.now += GRACE_S - 1
    assert not book.registry.expire()
    assert book.cancelled == []
    book.now += 2
    assert not book.registry.expire()  # the table is dropped here,
    assert book.cancelled == [1]
    book.now += GRACE_S + 1
    assert book.registry.expire()  # and the registry is needed no more.


def test_a_successor_within_the_grace_period_finds_the_table() -> None:
    book = Book()
    book.acquire("a", "one")
    book.registry.release("a", "one")
    book.now += GRACE_S - 1
    book.registry.expire()
    assert book.acquire("a", "two") == [1]
    book.now += LEASE_S - 1
    book.registry.expire()
    assert book.acquire("a", "three") == [1]
    assert len(book.started) == 1


def test_what_failed_is_tried_anew_by_the_next_and_not_dropped_by_a_late_report_of_the_old_failure() -> None:
    book = Book()
    book.acquire("a", "one")
    book.acquire("a", "two")
    book.registry.release("a", "one", failed=True)
    assert book.cancelled == [1]
    assert book.acquire("a", "three") == [2]
    book.registry.release("a", "two", failed=True)
    assert book.cancelled == [1]
    assert book.acquire("a", "four") == [2]


def test_a_registry_that_nobody_asks_is_needed_no_more_after_the_grace_period() -> None:
    book = Book()
    assert not book.registry.expire()
    book.now = GRACE_S + 1
    assert book.registry.expire()


# --- On Ray -----------------------------------------------------------------------------------------------------------


SETTINGS = SharingSettings(
    name="tests", min_nbytes=1, heartbeat_s=0.2, lease_s=2.0, grace_s=0.5, wait_s=WAIT_S
)  # Long enough for a busy machine.


@pytest.fixture(scope="module")
def settings(ray_session: None) -> Iterator[SharingSettings]:
    """One registry for most of the tests, which must be gone soon after the last one."""
    yield SETTINGS
    wait_until(lambda: not has_registry(SETTINGS))


def has_registry(settings: SharingSettings) -> bool:
    return settings.name in [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def table_maker(folder: Path, *, seconds: float = 0.0, deaths: int = 0, error: str = "") -> Any:
    """A function that makes 4,000 records and leaves a file per call; local, so that it is pickled as a whole."""

    def make(max_nbytes: int) -> dict[str, Any] | None:
        calls = len(list(folder.iterdir()))
        (folder / str(calls)).touch()
        time.sleep(seconds)
        if error:
            raise ValueError(error)
        if calls < deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        records = np.zeros(4000, np.dtype([("obs", np.float32, (7,)), ("rewards", np.float32)]))
        records["rewards"] = np.arange(4000)
        return {"columns": {"records": records}} if records.nbytes <= max_nbytes else None

    return make


def user_class() -> Any:
    """An actor that uses a table, local for the same reason."""

    class User:
        def get(self, settings: SharingSettings, make: Any) -> None:
            self.tables = SharedTables(settings)
            table = self.tables.get("key", make, nbytes=128_000)
            assert table is not None
            self.records = table["columns"]["records"]

        def place(self) -> tuple[str, int, bool]:
            """Mapped file, offset in it, and whether it can be written to."""
            address = self.records.__array_interface__["data"][0]
            for line in Path("/proc/self/maps").read_text().splitlines():
                addresses, _, offset, _, inode, *_ = line.split()
                low, high = (int(number, 16) for number in addresses.split("-"))
                if low <= address < high:
                    return inode, int(offset, 16) + address - low, self.records.flags.writeable
            raise AssertionError

        def total(self) -> float:
            return float(self.records["rewards"].sum(dtype=np.float64))

        def is_in_actor(self) -> bool:
            return is_in_actor()

    return ray.remote(num_cpus=0)(User)


def test_two_users_see_the_same_memory_also_after_the_registry_is_lost(ray_session: None, tmp_path: Path) -> None:
    settings = replace(SETTINGS, name="lost")
    users = [user_class().remote() for _ in range(2)]
    ray.get([user.get.remote(settings, table_maker(tmp_path)) for user in users], timeout=WAIT_S)
    places = ray.get([user.place.remote() for user in users])
    assert places[0] == places[1]
    assert places[0][0] != "0"  # A file, not memory of the process itself,
    assert not places[0][2]  # which nobody changes for the others.
    assert len(list(tmp_path.iterdir())) == 1
    assert ray.get(users[0].is_in_actor.remote())
    assert not is_in_actor()
    ray.kill(ray.get_actor(settings.name, namespace=namespace_of_job()))
    wait_until(lambda: not has_registry(settings))
    fill = [ray.put(np.ones(2**20, np.uint8)) for _ in range(8)]
    assert ray.get([user.total.remote() for user in users]) == [4000 * 3999 / 2] * 2
    del fill


def test_a_table_outlives_the_killed_trial_that_asked_first_and_the_registry_its_placement_group(
    ray_session: None, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, name="orphaned")
    group = placement_group([{"CPU": 0.1}])
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    first = user_class().options(num_cpus=0.1, scheduling_strategy=strategy).remote()
    second = user_class().remote()
    ray.get(second.is_in_actor.remote())  # Its process is there.
    make = table_maker(tmp_path, seconds=1.0)
    first.get.remote(settings, make)
    wait_until(lambda: any(tmp_path.iterdir()))
    remove_placement_group(group)  # Kills the first user while its table is loaded.
    ray.get(second.get.remote(settings, make), timeout=WAIT_S)
    assert ray.get(second.total.remote()) == 4000 * 3999 / 2
    assert len(list(tmp_path.iterdir())) == 1
    time.sleep(settings.lease_s + settings.grace_s + 0.6)  # It looks at the clock in between.
    assert has_registry(settings)  # The second one's signs of life keep it,
    ray.kill(second)
    wait_until(lambda: not has_registry(settings))  # and it ends by itself after them.


def test_a_killed_loading_process_is_replaced(settings: SharingSettings, tmp_path: Path) -> None:
    tables = SharedTables(settings)
    table = tables.get("killed", table_maker(tmp_path, deaths=1), nbytes=1)
    assert table is not None
    assert table["columns"]["records"]["rewards"][-1] == 3999
    assert len(list(tmp_path.iterdir())) == 2
    tables.close()


def test_a_failed_load_sends_every_user_to_its_own_data_and_the_next_one_tries_anew(
    settings: SharingSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = SharedTables(settings)
    assert tables.get("failed", table_maker(tmp_path, error="row 7 is broken"), nbytes=1) is None
    assert "this process loads a copy of its own: row 7 is broken." in caplog.text
    assert tables.get("failed", table_maker(tmp_path), nbytes=1) is not None
    assert len(list(tmp_path.iterdir())) == 2
    del tables  # A user that is forgotten is not waited for.


def test_a_user_waits_no_longer_than_it_may(
    settings: SharingSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    impatient = replace(settings, wait_s=0.5)
    begin = time.monotonic()
    assert SharedTables(impatient).get("slow", table_maker(tmp_path, seconds=600.0), nbytes=1) is None
    assert time.monotonic() - begin < WAIT_S
    assert "did not come within 0.5 s" in caplog.text


def test_what_does_not_fit_is_not_shared_and_the_remedy_is_named(
    settings: SharingSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_data, "_object_store_nbytes", lambda node_id: 200_000)
    tables = SharedTables(settings)
    for nbytes in (100_001, 1):  # Known before loading, and found out by it: the table takes 128,000.
        caplog.clear()
        assert tables.get("large", table_maker(tmp_path), nbytes=nbytes) is None
        assert "start Ray with a larger `object_store_memory`, or lower `store_memory_limit`" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1


# --- Loading ----------------------------------------------------------------------------------------------------------


class Absent(SharedTables):
    """Has nothing, and remembers who asked."""

    def __init__(self, min_nbytes: int = 1) -> None:
        super().__init__(SharingSettings(min_nbytes=min_nbytes))
        self.asked: list[tuple[str, int]] = []

    def get(self, key: str, load: Any, *, nbytes: int) -> None:
        """Remembers."""
        self.asked.append((key, nbytes))


def load_beside(tables: Absent, folder: Path, *blocks: Any, memory_limit: int = 2**30, **reader: Any) -> None:
    """Loads records of 28 bytes."""
    loaded = load_table(
        [Reader(*blocks, **reader)],
        conversion().columns,
        StorageSettings(memory_limit, folder, 0.9, "settings"),
        action_dim=2,
        failure_reward=None,
        sharing=Sharing(tables, 28, lambda max_nbytes: None),
    )
    assert loaded is not None
    assert len(loaded[0]) == sum(block.num_rows for block in blocks)


def test_only_what_has_the_size_is_in_memory_and_is_known_by_its_contents_is_shared(tmp_path: Path) -> None:
    nbytes = 28 * 27
    for tables, settings, is_asked in (
        (Absent(nbytes), {}, True),
        (Absent(nbytes + 1), {}, False),
        (Absent(), {"memory_limit": nbytes - 1}, False),
        (Absent(), {"fingerprint": None}, False),
    ):
        load_beside(tables, tmp_path, *BLOCKS, **settings)
        assert [asked for _, asked in tables.asked] == [nbytes] * is_asked


def test_a_table_of_unknown_size_is_asked_for_once_it_has_the_size(tmp_path: Path) -> None:
    first, second, _ = (block.num_rows * 28 for block in BLOCKS)
    tables = Absent(first + 1)
    load_beside(tables, tmp_path, *BLOCKS, known=False)
    assert [asked for _, asked in tables.asked] == [first + second]


def test_the_key_changes_with_the_contents_only(tmp_path: Path) -> None:
    tables = Absent()
    for fingerprint in ("f", "g", "f"):
        load_beside(tables, tmp_path, *BLOCKS, fingerprint=fingerprint)
    one, two, three = (key for key, _ in tables.asked)
    assert one == three != two


def test_broken_data_give_every_trial_its_own_error(tmp_path: Path) -> None:
    broken = block_of([3], seed=3, observations=np.full((3, 3), 1e300))
    for _ in range(2):
        tables = Absent()
        with pytest.raises(ValueError, match=r"row 0 of the block.*holds 1e\+300"):
            load_beside(tables, tmp_path, *BLOCKS, broken)
        assert len(tables.asked) == 1


def test_parts_that_are_too_large_are_not_made() -> None:
    kwargs: dict[str, Any] = {"action_dim": 2, "failure_reward": None}
    nbytes = 28 * 27 + 12 * 6  # Records, and the last observations of six episodes.
    assert load_parts([Reader(*BLOCKS)], conversion().columns, nbytes - 1, **kwargs) is None
    parts = load_parts([Reader(*BLOCKS)], conversion().columns, nbytes, **kwargs)
    assert parts is not None
    assert sum(parts["columns"][name].nbytes for name in ("records", "final_observations")) == nbytes


def test_shared_and_private_data_give_the_same_batches_and_report(
    settings: SharingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = line_config(tmp_path, offline_updates=1).offline_data(reward_scale=3.0, truncation="bootstrap")
    monkeypatch.setattr(offline_data, "is_in_actor", lambda: True)
    stores, reports = [], []
    for is_shared in (True, False):
        data = offline_data.CalQLOfflineData(config.offline_data(share_offline_data=is_shared))
        data.sharing_settings = settings
        store = TransitionStore(obs_dim=1, action_dim=1, online_capacity=1, seed=7, track_tails=True)
        with caplog.at_level(logging.INFO):
            data.load(
                store,
                AddReturnsToGo(RewardSettings(0.9, reward_scale=3.0, truncation="bootstrap")),
                observation_space=gym.spaces.Box(-10.0, 10.0, (1,), np.float32),
                action_space=gym.spaces.Box(-2.0, 2.0, (1,), np.float32),
            )
        store.refresh_returns(lambda observations: observations[:, 0] * 2.0)
        assert store.offline is not None
        assert store.offline.records.flags.writeable is not is_shared
        data.close()
        stores.append(store)
        reports.append(data.report)
    assert not stores[0].offline.is_mapped
    assert "not shared" not in caplog.text
    assert reports[0] == reports[1]
    batches = [store.sample(num_batches=4, batch_size=32, num_offline_rows=32) for store in stores]
    for name, column in batches[0].items():
        assert column.dtype == batches[1][name].dtype
        np.testing.assert_array_equal(column, batches[1][name], err_msg=name)
    for one, other in zip(*(store.observation_statistics() for store in stores), strict=True):
        np.testing.assert_array_equal(one, other)
