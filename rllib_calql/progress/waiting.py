"""`SayWaiting`: a line while no trial runs because Ray has no place for one yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray import tune

from rllib_calql.system.ray_resources import autoscales, described, is_waiting_for_places, total

_SECONDS_BETWEEN_LINES = 5.0


class SayWaiting(tune.Callback):
    """Says for what trials wait, and how long they have.

    Args:
        announce: Called with a line for people.
        clock: Seconds that go on.
        is_waiting: Whether Ray has places to give that it has not given.
    """

    def __init__(
        self,
        announce: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        is_waiting: Callable[[], bool] = is_waiting_for_places,
    ) -> None:
        self._announce = announce
        self._clock = clock
        self._is_waiting = is_waiting
        self._since: float | None = None
        self._asked_at = -1e9

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles callbacks, and what they print to belongs to the process."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Asks Ray now and then while trials are pending and none runs."""
        pending = [trial for trial in trials if trial.status == tune.experiment.Trial.PENDING]
        if not pending or any(trial.status == tune.experiment.Trial.RUNNING for trial in trials):
            self._since = None
            return
        now = self._clock()
        self._since = now if self._since is None else self._since
        if now - max(self._since, self._asked_at) < _SECONDS_BETWEEN_LINES:
            return
        self._asked_at = now
        if self._is_waiting():
            seconds = round(now - self._since)
            asked = described(total(pending[0].placement_group_factory.bundles))
            self._announce(f"{seconds // 60}:{seconds % 60:02d} waiting for {asked} in {_cluster()}")


def _cluster() -> str:
    import ray

    if not ray.is_initialized():
        return "the cluster"
    has, free = described(ray.cluster_resources()), described(ray.available_resources())
    grows = "; it starts more nodes by itself" if autoscales() else "; others use the rest"
    return f"the cluster, which has {has}, of which {free} are free{grows}"
