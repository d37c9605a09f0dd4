"""Parts of a computation side by side, on threads that never wait for each other within an operation.

torch divides every large operation among OpenMP's threads, which meet at its end, and spin while they wait. Where other
programs run on the same cores, the one that is scheduled spins for the one that is not, at each of hundreds of
operations of an update. Here each thread computes whole parts with one OpenMP thread, takes the next one that is left,
and all meet once, at the end. What is computed does not depend on how many threads there are.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache

import torch

Part = Callable[[], None]

_here = threading.local()  # Has `num_threads` where torch's operations have been given one thread.


@contextmanager
def one_thread_an_operation() -> Iterator[None]:
    """Within it torch computes with one thread, but for what `compute` is given, which gets as many as torch had.

    Torch's number is that of the thread that sets it, and of all threads that begin later and do not set it. Those
    whose first work for torch falls into another one's update compute with one thread.
    """
    if hasattr(_here, "num_threads"):
        yield
        return
    found = torch.get_num_threads()
    try:
        _here.num_threads = min(found, _num_cpus())
        if found > 1:
            torch.set_num_threads(1)
        yield
    finally:
        vars(_here).pop("num_threads", None)
        if found > 1:  # Else it may come from another's update, and would be set for all later threads.
            torch.set_num_threads(found)


def compute(parts: Sequence[Part]) -> None:
    """Calls all parts, none of which may need another's result, and returns when all have ended.

    They are taken in their order. Gradient is off in all of them.

    Args:
        parts: Functions of no arguments.
    """
    with one_thread_an_operation():
        left = deque(parts)
        num_helpers = min(_here.num_threads, len(parts)) - 1
        if num_helpers < 1:
            _take(left)
            return
        helpers: list[Future[None]] = []
        try:
            # No thread is to be had where a program's main thread has ended, or at a limit: then without helpers.
            with suppress(RuntimeError):
                helpers.extend(_pool(os.getpid()).submit(_take, left) for _ in range(num_helpers))
            _take(left)
        finally:
            left.clear()  # Of parts only if one failed.
            errors = [error for helper in helpers if (error := helper.exception()) is not None]  # Waits for each.
    if errors:
        raise errors[0]


@torch.no_grad()
def _take(left: deque[Part]) -> None:
    while left:
        try:
            part = left.popleft()
        except IndexError:  # Another thread has taken the last one.
            return
        part()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process; a process that was forked has none of its parent's."""
    return ThreadPoolExecutor(max_workers=_num_cpus(), thread_name_prefix="rllib_calql", initializer=_begin_thread)


def _begin_thread() -> None:
    torch.get_num_threads()  # Torch would set a new thread's number at its first operation, over the one set here.
    torch.set_num_threads(1)


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
