"""What a process does reaches the command that waits, through a store that stands for Ray's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rllib_calql.system import activity
from rllib_calql.system.activity import Listener, Told


class Store:
    """Ray's key-value store, as far as it is used."""

    def __init__(self) -> None:
        self.content: dict[bytes, bytes] = {}
        self.num_puts = 0

    def _internal_kv_put(self, key: str, value: str, namespace: str) -> None:
        self.num_puts += 1
        self.content[key.encode()] = value.encode()

    def _internal_kv_get(self, key: str | bytes, namespace: str) -> bytes | None:
        return self.content.get(key if isinstance(key, bytes) else key.encode())

    def _internal_kv_exists(self, key: str, namespace: str) -> bool:
        return key.encode() in self.content

    def _internal_kv_list(self, prefix: str, namespace: str) -> list[bytes]:
        return [key for key in self.content if key.startswith(prefix.encode())]

    def _internal_kv_del(self, key: str | bytes, del_by_prefix: bool, namespace: str) -> None:
        prefix = key if isinstance(key, bytes) else key.encode()
        self.content = {key: value for key, value in self.content.items() if not key.startswith(prefix)}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store()
    monkeypatch.setattr(activity, "_store_and_job", lambda: (store, "01000000"))
    monkeypatch.setattr(activity, "_INTERVAL_S", 0.01)
    yield store
    activity.stop_speaking()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_only_what_the_present_work_counts_is_counted() -> None:
    activity.say("collecting: {done} of ~200 env steps", unit="env steps", counter="steps", base=1_000)
    activity.count("env steps", 120)
    activity.count("episodes")
    assert activity.current() == Told("collecting: 120 of ~200 env steps", {"steps": 1_120})
    activity.say("evaluating, episode {done} of 10", unit="episodes", done=1, total=10)
    activity.count("env steps")
    activity.count("episodes", 12)
    assert activity.current() == Told("evaluating, episode 10 of 10", {})


def test_nothing_is_written_where_nobody_listens(store: Store) -> None:
    activity.say("updating")
    activity.speak_as("trial")
    speaker = activity._speaker
    assert speaker is not None
    speaker.join(timeout=10.0)
    assert not speaker.is_alive()
    assert store.num_puts == 0


def test_a_listener_hears_the_latest_and_leaves_nothing_behind(store: Store) -> None:
    listener = Listener()
    listener.start()
    listener.follow(["trial"])
    activity.say("updating", unit="updates", counter="made", base=10)
    activity.speak_as("trial")
    wait_for(lambda: listener.latest("trial") == Told("updating", {"made": 10}))
    activity.count("updates", 5)
    wait_for(lambda: listener.latest("trial") == Told("updating", {"made": 15}))
    num_puts = store.num_puts
    time.sleep(0.1)
    assert store.num_puts == num_puts  # Nothing is written again that has not changed.
    activity.stop_speaking()
    listener.stop()
    assert store.content == {}


def test_what_a_killed_command_left_behind_is_removed_by_the_next_one(store: Store) -> None:
    prefix = "rllib_calql/activity"
    day_and_hour = 25 * 3600.0
    for job, renewed in (("02000000", time.time() - day_and_hour), ("03000000", time.time() - 60.0)):
        store._internal_kv_put(f"{prefix}/{job}/", str(renewed), namespace="")
        store._internal_kv_put(f"{prefix}/{job}/trial", "[]", namespace="")
    store._internal_kv_put(f"{prefix}/04000000/late", "[]", namespace="")  # Written after its listener had gone.
    listener = Listener()
    listener.start()
    listener.stop()
    assert sorted(store.content) == [f"{prefix}/03000000/".encode(), f"{prefix}/03000000/trial".encode()]


def test_a_note_costs_little() -> None:
    activity.say("updating", unit="updates")
    begin = time.perf_counter()
    for _ in range(10_000):
        activity.count("updates")
    assert time.perf_counter() - begin < 0.1  # 10 us each at most; an update takes milliseconds.
