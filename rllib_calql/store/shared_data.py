"""`SharedTables`: one copy of the offline data per node in Ray's object store, for all trials that ask for the same.

A registry, one light detached actor, has each table loaded once: by a task, whose result it owns. So a table outlives
every trial that uses it, does not depend on the one that asked first, and Ray loads it again if its node is lost. Users
are known by their heartbeats, as a killed process cannot say goodbye. A table without users is dropped after a grace
period, in which a scheduler's next trial still finds it, and a registry without tables ends itself.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, OwnerDiedError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 60.0  # Starting the registry's process is included.
_CLOSE_TIMEOUT_S = 5.0
_LOSS_TIMEOUT_S = 30.0  # A dead registry has its name until Ray notices: at once, or much later with its node.
_RETRY_AFTER_S = 0.5
_SHARE_OF_STORE = 0.5  # The rest is for batches, weights and Ray Data.


@dataclass(frozen=True)
class SharingSettings:
    """When and for how long tables are shared.

    Attributes:
        name: Of the registry.
        min_nbytes: Bytes of a table from which sharing pays: the registry takes about 120 MB.
        heartbeat_s: Seconds between two signs of life of a user.
        lease_s: Seconds without one after which a user counts as dead.
        grace_s: Seconds for which a table without users, and a registry without tables, stay.
        wait_s: Seconds that a user waits for a table before it loads one of its own.
    """

    name: str = "offline_data"
    min_nbytes: int = 64 * 2**20
    heartbeat_s: float = 5.0
    lease_s: float = 30.0
    grace_s: float = 60.0
    wait_s: float = 3600.0


@dataclass
class _Entry:
    """One table: the reference to it, its size, until when each user counts as alive, since when there is none."""

    table: Any
    nbytes: int
    users: dict[str, float] = field(default_factory=dict)
    unused_since: float = 0.0


class Registry:
    """Which tables there are and who uses them.

    Args:
        settings: Times.
        start: Starts to load a table, given what `acquire` got, and returns a reference to it.
        cancel: Stops loading, given the reference; without effect once it is loaded.
        clock: Seconds.
    """

    def __init__(
        self,
        settings: SharingSettings,
        *,
        start: Callable[[bytes, str], Any],
        cancel: Callable[[Any], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._start = start
        self._cancel = cancel
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._empty_since = clock()

    def acquire(self, key: str, user: str, *, load: bytes, nbytes: int, room: int, node_id: str) -> list[Any] | None:
        """Makes `user` one of the table's.

        Args:
            key: What the table is made from.
            user: Name of the user.
            load: Pickled function that loads the table.
            nbytes: Expected bytes of the table.
            room: Bytes of all tables together that the user's node takes.
            node_id: Where the table is to be loaded, if it is not there.

        Returns:
            The reference to the table, in a list, for Ray would wait for it otherwise. None if there is no room.
        """
        others = sum(entry.nbytes for other, entry in self._entries.items() if other != key)
        known = self._entries[key].nbytes if key in self._entries else nbytes
        if others + known > room:
            return None
        if key not in self._entries:
            self._entries[key] = _Entry(self._start(load, node_id), nbytes)
        self._entries[key].users[user] = self._clock() + self._settings.lease_s
        return [self._entries[key].table]

    def touch(self, key: str, user: str, nbytes: int) -> bool:
        """Takes a sign of life and the table's true size, as far as known; False for a user who counts as dead."""
        entry = self._entries.get(key)
        if entry is None or user not in entry.users:
            return False
        entry.users[user] = self._clock() + self._settings.lease_s
        entry.nbytes = max(entry.nbytes, nbytes)
        return True

    def release(self, key: str, user: str, *, failed: bool = False) -> None:
        """Takes `user` from the table; one that failed to load is dropped at once, so that the next user tries anew."""
        entry = self._entries.get(key)
        if entry is None or entry.users.pop(user, None) is None:
            return
        entry.unused_since = self._clock()
        if failed:
            self._drop(key)

    def expire(self) -> bool:
        """Drops dead users and tables that nobody uses; True if the registry itself is needed no more."""
        now = self._clock()
        for key, entry in list(self._entries.items()):
            for user in [user for user, deadline in entry.users.items() if deadline < now]:
                del entry.users[user]
                entry.unused_since = now
            if not entry.users and now - entry.unused_since > self._settings.grace_s:
                self._drop(key)
        return not self._entries and now - self._empty_since > self._settings.grace_s

    def _drop(self, key: str) -> None:
        self._cancel(self._entries.pop(key).table)
        self._empty_since = self._clock()


@ray.remote(num_cpus=0, max_calls=1)  # The process ends, and its memory is free, as soon as the table is in the store.
def _load(load: bytes) -> Any:
    return cloudpickle.loads(load)()


@ray.remote(num_cpus=0)
class _RegistryActor:
    """`Registry` as an actor, which looks at the clock by itself."""

    def __init__(self, settings: SharingSettings) -> None:
        self._registry = Registry(settings, start=_start_loading, cancel=partial(ray.cancel, force=True))
        period = min(settings.lease_s, settings.grace_s) / 4
        actor = ray.get_runtime_context().current_actor
        threading.Thread(target=_call_periodically, args=(actor.expire, period), daemon=True).start()

    def acquire(self, key: str, user: str, **request: Any) -> list[Any] | None:
        return self._registry.acquire(key, user, **request)

    def touch(self, key: str, user: str, nbytes: int) -> bool:
        return self._registry.touch(key, user, nbytes)

    def release(self, key: str, user: str, *, failed: bool) -> None:
        self._registry.release(key, user, failed=failed)

    def expire(self) -> None:
        if self._registry.expire():
            ray.actor.exit_actor()


def _start_loading(load: bytes, node_id: str) -> Any:
    # On the node of the user, which has the files; elsewhere only if that node is lost.
    return _load.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=True)).remote(load)


def _call_periodically(method: Any, period_s: float) -> None:
    """Calls an actor's method until the actor is dead."""
    while True:
        time.sleep(period_s)
        try:
            ray.get(method.remote())
        except RayError:
            return


@dataclass
class _Lease:
    """What a user's heartbeat needs. It does not refer to the user, who can be collected meanwhile."""

    registry: Any
    key: str
    user: str
    nbytes: int = 0
    failed: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


def _keep(lease: _Lease, heartbeat_s: float) -> None:
    """Gives signs of life until the lease ends or the registry is lost, which leaves tables in use as they are."""
    # Calls after Ray's end would start it anew.
    with suppress(RayError):
        while not lease.ended.wait(heartbeat_s) and ray.is_initialized():
            with suppress(GetTimeoutError):
                touched = lease.registry.touch.remote(lease.key, lease.user, lease.nbytes)
                if not ray.get(touched, timeout=_CALL_TIMEOUT_S):
                    return
        if ray.is_initialized():
            released = lease.registry.release.remote(lease.key, lease.user, failed=lease.failed)
            ray.get(released, timeout=_CLOSE_TIMEOUT_S)


class SharedTables:
    """One user of shared tables: it holds one at a time.

    Args:
        settings: When and for how long.
    """

    def __init__(self, settings: SharingSettings) -> None:
        self.settings = settings
        self._lease: _Lease | None = None
        self._heartbeat: threading.Thread | None = None

    def get(self, key: str, load: Callable[[int], dict[str, Any] | None], *, nbytes: int) -> dict[str, Any] | None:
        """The table of that key, which is loaded if nobody has asked for it before.

        Args:
            key: Digest of everything that the table is made from.
            load: Makes the table, in another process, to which it is pickled; it gets the bytes that the table may
                take at most, and returns None if it takes more.
            nbytes: Expected bytes of the table.

        Returns:
            The table, its arrays read-only views of the object store; None if the caller has to load one of its own.
            A warning then says why.
        """
        self.close()
        node_id = ray.get_runtime_context().get_node_id()
        room = int(_object_store_nbytes(node_id) * _SHARE_OF_STORE)
        request = {"load": cloudpickle.dumps(partial(load, room)), "nbytes": nbytes, "room": room, "node_id": node_id}
        deadline = time.monotonic() + _LOSS_TIMEOUT_S
        while True:
            try:
                found = self._acquire(key, request)
                table = None if found is None else ray.get(found[0], timeout=self.settings.wait_s)
            except (RayActorError, OwnerDiedError) as err:
                self.close()
                if time.monotonic() < deadline:
                    time.sleep(_RETRY_AFTER_S)
                    continue
                reason = f"their registry was lost ({str(err).splitlines()[0]})"
            except GetTimeoutError:
                reason = f"they did not come within {self.settings.wait_s:g} s"
            except (RayError, ValueError) as err:
                self.close(failed=True)
                reason = str(getattr(err, "cause", None) or err).strip().splitlines()[-1]
            else:
                if table is not None:
                    return dict(table)
                reason = (
                    f"they take {nbytes / 1e9:.1f} GB or more, and all shared data together may take {room / 1e9:.1f} "
                    "GB, half of this node's object store; start Ray with a larger `object_store_memory`, or lower "
                    "`store_memory_limit`: larger data go to memory-mapped files, which trials share, too"
                )
            break
        self.close()
        logger.warning("The offline data are not shared, this process loads a copy of its own: %s.", reason)
        return None

    def _acquire(self, key: str, request: dict[str, Any]) -> list[Any] | None:
        # Without a strategy the actor would be placed into the placement group of the trial, and end with it.
        registry = _RegistryActor.options(  # type: ignore[attr-defined]
            name=self.settings.name,
            namespace=namespace_of_job(),
            lifetime="detached",
            get_if_exists=True,
            scheduling_strategy="DEFAULT",
        ).remote(self.settings)
        lease = _Lease(registry, key, uuid.uuid4().hex)
        found: list[Any] | None = ray.get(registry.acquire.remote(key, lease.user, **request), timeout=_CALL_TIMEOUT_S)
        if found is not None:
            self._lease = lease
            self._heartbeat = threading.Thread(target=_keep, args=(lease, self.settings.heartbeat_s), daemon=True)
            self._heartbeat.start()
            weakref.finalize(self, lease.ended.set)
        return found

    def set_size(self, nbytes: int) -> None:
        """Tells how large the table is, once that is known."""
        if self._lease is not None:
            self._lease.nbytes = nbytes

    def close(self, *, failed: bool = False) -> None:
        """Gives the table back. Views of it stay valid, but others may no longer find it.

        Args:
            failed: Whether it is of no use to others either.
        """
        if self._lease is None or self._heartbeat is None:
            return
        self._lease.failed = failed
        self._lease.ended.set()
        self._heartbeat.join(timeout=_CLOSE_TIMEOUT_S)
        self._lease = self._heartbeat = None


def is_in_actor() -> bool:
    """Whether this process is an actor of Ray, as a trial of Tune is: others like it may need the same data."""
    return bool(ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None)


def namespace_of_job() -> str:
    """Namespace of the registry. Other jobs of the cluster may run other code, which would make other tables."""
    return f"rllib_calql-{ray.get_runtime_context().get_job_id()}"


def _object_store_nbytes(node_id: str) -> int:
    node = next((node for node in ray.nodes() if node["NodeID"] == node_id), None)
    return int(node["Resources"].get("object_store_memory", 0)) if node else 0
