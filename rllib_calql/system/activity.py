"""What a process is doing: said by whoever works in it, told to the command that waits, on whatever machine that is.

`say` and `count` note it, in less than a microsecond, and nothing else happens. After `speak_as` a thread writes the
latest to Ray's key-value store about once a second, provided that a `Listener` of the same job has asked for it. The
store holds one small entry per speaker, and the listener removes them.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

_NAMESPACE = "rllib_calql"
_PREFIX = "rllib_calql/activity/"
_INTERVAL_S = 1.0  # Between two looks at what is done; an entry is written only where that has changed.
_RENEWAL_S = 60.0
_ABANDONED_S = 24 * 3600.0  # A listener that has not renewed its entry for so long was killed.
_MAX_SPEAKERS = 200  # That one listener follows; it asks for one after the other.


@dataclass
class Work:
    """What a process is doing.

    Attributes:
        text: For people; `{done}` stands for what has been counted.
        unit: What `count` counts, "" for nothing.
        done: How much of it.
        total: What `done` is not shown to exceed.
        counter: Name of a counter that the work moves, "" for none.
        base: Its value when nothing of the work was done.
    """

    text: str
    unit: str = ""
    done: int = 0
    total: int | None = None
    counter: str = ""
    base: int = 0

    def told(self) -> Told:
        """As it stands now."""
        done = self.done if self.total is None else min(self.done, self.total)
        counters = {self.counter: self.base + done} if self.counter else {}
        return Told(self.text.replace("{done}", f"{done:,}"), counters)


@dataclass(frozen=True)
class Told:
    """What is told of the work of a process.

    Attributes:
        text: For people.
        counters: Name of a counter -> its value.
    """

    text: str
    counters: Mapping[str, int] = field(default_factory=dict)


_work: Work | None = None
_speaker: _Speaker | None = None


def say(
    text: str, *, unit: str = "", done: int = 0, total: int | None = None, counter: str = "", base: int = 0
) -> Work:
    """Notes what this process does from now on; the arguments are the attributes of `Work`."""
    global _work
    _work = Work(text, unit, done, total, counter, base)
    return _work


def count(unit: str, number: int = 1) -> None:
    """Counts something as done, if that is what the present work counts."""
    if _work is not None and _work.unit == unit:
        _work.done += number


def current() -> Told | None:
    """What this process does."""
    return None if _work is None else _work.told()


def speak_as(name: str) -> None:
    """Tells from now on what this process does, if somebody listens.

    Args:
        name: By which the listener knows this process.
    """
    global _speaker
    stop_speaking()
    _speaker = _Speaker(name)
    _speaker.start()


def stop_speaking() -> None:
    """Ends what `speak_as` began."""
    global _speaker
    if _speaker is not None:
        _speaker.ended.set()
        _speaker = None


class _Speaker(threading.Thread):
    """Writes what the process does. A thread, so that a store that does not answer holds nobody up."""

    def __init__(self, name: str) -> None:
        super().__init__(name="activity", daemon=True)
        self.ended = threading.Event()
        self._name = name

    def run(self) -> None:
        """Until `ended`, or until the store is gone."""
        try:
            store, job = _store_and_job()
            if not store._internal_kv_exists(_key(job), namespace=_NAMESPACE):
                return
            last: Told | None = None
            while True:
                now = current()
                if now is not None and now != last:
                    content = json.dumps([now.text, dict(now.counters)])
                    store._internal_kv_put(_key(job, self._name), content, namespace=_NAMESPACE)
                    last = now
                if self.ended.wait(_INTERVAL_S):
                    return
        except Exception as error:  # Of any kind where Ray goes away; the work goes on.
            logger.debug("What this process does is not told any more: %s", error)


class Listener:
    """Hears what the processes of this job do. Ray must have been started."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._latest: dict[str, Told] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    def start(self) -> None:
        """Asks those that speak to do so."""
        with suppress(Exception):  # Without a store nothing is heard.
            store, job = _store_and_job()
            _remove_abandoned(store)
            store._internal_kv_put(_key(job), str(time.time()), namespace=_NAMESPACE)
            self._thread.start()

    def stop(self) -> None:
        """Removes all entries of this job."""
        self._ended.set()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout=5.0)
        with suppress(Exception):
            store, job = _store_and_job()
            store._internal_kv_del(_key(job), del_by_prefix=True, namespace=_NAMESPACE)

    def follow(self, names: Iterable[str]) -> None:
        """Sets whom to hear."""
        self._names = tuple(names)[:_MAX_SPEAKERS]

    def latest(self, name: str) -> Told | None:
        """What one of them told last."""
        return self._latest.get(name)

    def _run(self) -> None:
        try:
            store, job = _store_and_job()
            renewed_at = time.monotonic()
            while not self._ended.wait(_INTERVAL_S):
                for name in self._names:
                    content = store._internal_kv_get(_key(job, name), namespace=_NAMESPACE)
                    if content is not None:
                        text, counters = json.loads(content)
                        self._latest[name] = Told(text, counters)
                if time.monotonic() - renewed_at > _RENEWAL_S:
                    store._internal_kv_put(_key(job), str(time.time()), namespace=_NAMESPACE)
                    renewed_at = time.monotonic()
        except Exception as error:
            logger.debug("What the trials do is not heard any more: %s", error)


def _store_and_job() -> tuple[Any, str]:
    import ray
    from ray.experimental import internal_kv

    return internal_kv, ray.get_runtime_context().get_job_id()


def _key(job: str, name: str = "") -> str:
    return f"{_PREFIX}{job}/{name}"


def _remove_abandoned(store: Any) -> None:
    """Removes what commands on this cluster that were killed long ago, and those that spoke to them, left behind."""
    entries = store._internal_kv_list(_PREFIX, namespace=_NAMESPACE)
    for listener in {entry[: entry.rindex(b"/") + 1] for entry in entries}:
        renewed = float(store._internal_kv_get(listener, namespace=_NAMESPACE) or 0.0)
        if time.time() - renewed > _ABANDONED_S:
            store._internal_kv_del(listener, del_by_prefix=True, namespace=_NAMESPACE)
