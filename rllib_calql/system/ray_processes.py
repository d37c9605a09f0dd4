"""The processes of the Ray that a command has started, found by a mark in their environment.

The mark is inherited and outlives parents: a worker that the raylet starts while it is being ended is nobody's child
afterwards, and would stay for a minute, until it gives up waiting for the raylet.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from typing import Any

_VARIABLE = "RLLIB_CALQL_RAY"
_TIMEOUT_S = 5.0
_PAUSE_S = 0.02

_own_mark: str | None = None  # Not read from the environment, where it may be that of a command that started this one.


def mark() -> None:
    """Marks what this process starts from now on."""
    global _own_mark
    _own_mark = os.environ[_VARIABLE] = secrets.token_hex(8)


def marked() -> dict[int, Any]:
    """All marked processes by their ids, and what they have started without the mark."""
    import ray  # noqa: F401 - it brings the next one along.
    from psutil import Error, Process, pids

    found: dict[int, Any] = {}
    for pid in pids() if _own_mark is not None else ():
        with suppress(Error):  # It has ended, or is another user's.
            process = Process(pid)
            if process.environ().get(_VARIABLE) == _own_mark:
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
    found.pop(os.getpid(), None)
    return found


def end_marked(known: dict[int, Any] | None = None) -> None:
    """Ends all marked processes without a word to them, and those that they start meanwhile. May run in any thread.

    Args:
        known: What `marked` found earlier.
    """
    _kill(known or {})
    deadline = time.monotonic() + _TIMEOUT_S
    while (found := marked()) and time.monotonic() < deadline:
        _kill(found)
        time.sleep(_PAUSE_S)


def _kill(processes: dict[int, Any]) -> None:
    from psutil import Error

    for process in processes.values():
        with suppress(Error):  # It knows a process by its pid and its start.
            process.kill()
