"""What is kept of remote learners so that training goes on after one of them is lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.rllib.core import COMPONENT_LEARNER

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_SNAPSHOTS = 10.0
_MAX_LOSSES = 5  # In a row, without a snapshot in between.
_PING_TIMEOUT_S = 10.0
_COMMUNICATION = ("gloo", "NCCL")  # In the errors of learners that wait for one that is gone.


class LearnerRecovery:
    """Keeps the last state that all learners shared, and rebuilds their group from it.

    One lost learner makes the others fail as well: they wait for it in the all-reduce, in the middle of a step. So all
    of them are given up and built anew with the state of the last snapshot.

    Args:
        timeout_s: Seconds that rebuilding may take, resources for it included.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._state: Any = None
        self._counters: dict[str, Any] = {}
        self._taken_at = 0.0
        self._num_losses = 0

    def is_due(self) -> bool:
        """Whether the last snapshot is old."""
        return time.monotonic() - self._taken_at > _SECONDS_BETWEEN_SNAPSHOTS

    def take_snapshot(self, group: Any, counters: dict[str, Any]) -> None:
        """Fetches the whole state of the first learner, equal to that of all, into this process.

        Args:
            group: RLlib's `LearnerGroup`.
            counters: What belongs to this state; given back by `rebuild`.
        """
        self._state = group.get_state(components=COMPONENT_LEARNER)
        self._counters = dict(counters)
        self._taken_at = time.monotonic()
        self._num_losses = 0

    def rebuild(self, group: Any, build: Callable[[], Any], cause: BaseException) -> tuple[Any, dict[str, Any]]:
        """Replaces a group of which a learner is lost.

        Args:
            group: The old group.
            build: Builds a new one.
            cause: The error that showed the loss.

        Returns:
            The new group and the counters of its state.

        Raises:
            RuntimeError: If it cannot be built within the time, or learners are lost again and again.
        """
        self._num_losses += 1
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        if self._num_losses > _MAX_LOSSES:
            raise RuntimeError(
                f"Learners were lost {self._num_losses} times without progress, the last time with: {reason}. See the "
                "learners' log; the run can be resumed from its last checkpoint."
            ) from cause
        logger.warning("A learner is lost; all are built anew from the state of their last snapshot. %s", reason)
        _shut_down(group)
        group = self._built_in_time(build, cause)
        group.set_state(self._state)
        return group, dict(self._counters)

    def _built_in_time(self, build: Callable[[], Any], cause: BaseException) -> Any:
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(build())
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True, name="rebuild learners").start()
        in_time = wait([future], self._timeout_s).done
        error = future.exception() if in_time else None
        if in_time and error is None:
            return future.result()
        future.add_done_callback(_discard)  # Learners that come too late would hold their resources.
        what = f"failed: {error}" if error else f"took over {self._timeout_s:g} s; are there resources?"
        raise RuntimeError(
            f"A learner was lost and building the learners anew {what} The run can be resumed from its last "
            "checkpoint, also with fewer learners."
        ) from cause


def is_loss(error: RayError, group: Any) -> bool:
    """Whether an error of a remote update tells of a lost learner, rather than of a fault in the update itself."""
    if isinstance(error, (RayActorError, WorkerCrashedError)):
        return True
    if not isinstance(error, RayTaskError):
        return False
    return any(word in str(error) for word in _COMMUNICATION) or not all(_answers(w) for w in group._workers or [])


def _answers(worker: Any) -> bool:
    try:
        ray.get(worker.__ray_ready__.remote(), timeout=_PING_TIMEOUT_S)
    except (RayActorError, GetTimeoutError):
        return False
    return True


def _discard(future: Future[Any]) -> None:
    if future.exception() is None:
        _shut_down(future.result())


def _shut_down(group: Any) -> None:
    """Ends all learners, also those that wait for a dead one."""
    for worker in group._workers or []:
        with suppress(Exception):
            ray.kill(worker, no_restart=True)
    with suppress(Exception):
        group.shutdown()
    group._is_shut_down = True
