"""How env runners get the learners' weights: published for those that collect, or set on every runner at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

_SECONDS_TO_SET = 60.0


@dataclass(frozen=True)
class Weights:
    """Weights for env runners, on their way through the object store.

    Attributes:
        version: Grows with every change.
        reference: Reference to the state for the runner's `set_state`.
    """

    version: int
    reference: Any


class WeightPublisher:
    """Gives the local runner new weights, and keeps those that remote runners take with their next request.

    Args:
        env_runner_group: RLlib's `EnvRunnerGroup`, or None without an environment.
        has_remote_runners: Whether there are remote runners that collect.
    """

    def __init__(self, env_runner_group: Any, *, has_remote_runners: bool) -> None:
        self._group = env_runner_group
        self._has_remote_runners = has_remote_runners
        self._latest: Weights | None = None

    @property
    def latest(self) -> Weights | None:
        """What remote runners take; None before the first, and without any."""
        return self._latest

    @property
    def is_needed(self) -> bool:
        """Whether there is a runner at all."""
        return self._group is not None

    def publish(self, state: Mapping[str, Any]) -> None:
        """Publishes a runner's state, if `is_needed`."""
        if self._group.local_env_runner is not None:
            self._group.local_env_runner.set_state(state)
        if self._has_remote_runners:
            version = 0 if self._latest is None else self._latest.version + 1
            self._latest = Weights(version, ray.put(state))


def set_weights(group: Any, state: Mapping[str, Any]) -> None:
    """Sets a runner's state on every runner of a group and waits.

    RLlib's `sync_weights` does not wait and drops the call silently while an earlier one is under way, so that restored
    runners kept their initial weights.
    """
    # Without a sequence number runners always take the weights, also older ones out of a checkpoint.
    weights = ray.put(state)
    group.foreach_env_runner(lambda runner: runner.set_state(ray.get(weights)), timeout_seconds=_SECONDS_TO_SET)
