"""`EnvStepBudget`: which env steps may still be taken (`max_online_env_steps`); `EnvStepMeter` counts them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rllib_calql.common.lifetime import Lifetime

_GRANTED = "num_env_steps_granted"


class BudgetSpentError(RuntimeError):
    """Training goes on after `max_online_env_steps` env steps. The environment is not touched."""


class GrantSpentError(RuntimeError):
    """A request would take more env steps than it was granted."""


class EnvStepBudget:
    """Grants env steps to requests before they are made, so that no environment ever takes one too many.

    What a request does not use comes back when it is settled. What a lost env runner was granted counts as taken: it
    may have been. Sub-environments of one runner step together, so the budget is spent when fewer steps are left than
    a runner has of them.

    Args:
        lifetime: Counts what was taken.
        limit: Env steps over the lifetime of the run, or None for no bound.
        num_envs: Sub-environments of each env runner.
    """

    def __init__(self, lifetime: Lifetime, limit: int | None, num_envs: int) -> None:
        self._lifetime = lifetime
        self._limit = limit
        self._num_envs = num_envs
        self._granted = 0

    @property
    def limit(self) -> int | None:
        """Env steps over the lifetime, or None."""
        return self._limit

    @property
    def left(self) -> float:
        """Env steps that were neither taken nor granted; infinity without a bound."""
        if self._limit is None:
            return math.inf
        return max(0, self._limit - self._lifetime.num_online_env_steps_taken - self._granted)

    @property
    def is_spent(self) -> bool:
        """Whether no runner may take another step, and none is at it."""
        return self.left < self._num_envs and not self._granted

    def grant(self, wanted: float) -> float:
        """Env steps that a request may make, at most those `wanted`; 0 if there are too few left for a step."""
        granted = min(wanted, self.left)
        if granted < self._num_envs:
            return 0
        if math.isfinite(granted):
            self._granted += int(granted)
        return granted

    def settle(self, granted: float, taken: int | None) -> None:
        """Counts what a request has taken; None for a lost one, of which nobody knows."""
        if math.isfinite(granted):
            self._granted -= int(granted)
            taken = int(granted) if taken is None else taken
        self._lifetime.count_env_steps_taken(taken or 0)

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint. Requests under way will have been made, and a run that goes on from there lacks them."""
        return {_GRANTED: self._granted}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint, after the lifetime's."""
        self._lifetime.count_env_steps_taken(state.get(_GRANTED, 0))


class EnvStepMeter:
    """Counts the env steps of a request inside an env runner, those that fail included, and lets none pass the grant.

    Args:
        runner: RLlib's `SingleAgentEnvRunner`.
        max_env_steps: Env steps over all sub-environments.
        is_whole_episode: Whether an episode is to end within the request, and so is cut with its last step.
    """

    def __init__(self, runner: Any, max_env_steps: float, *, is_whole_episode: bool) -> None:
        self._runner = runner
        self._max_env_steps = max_env_steps
        self._is_whole_episode = is_whole_episode
        self.num_env_steps = 0

    @property
    def cuts_episode(self) -> bool:
        """Whether the episode has to end here."""
        return self._is_whole_episode and self.num_env_steps >= self._max_env_steps

    def __enter__(self) -> EnvStepMeter:
        step: Callable[[Any], Any] = self._runner._try_env_step

        def metered(actions: Any) -> Any:
            # Where an episode has ended, the sub-environment is reset in place of a step.
            num_steps = sum(bool(episode.is_reset) for episode in self._runner._ongoing_episodes)
            if self.num_env_steps + num_steps > self._max_env_steps:
                raise GrantSpentError  # After a sub-environment was restarted, RLlib makes a request anew.
            self.num_env_steps += num_steps
            return step(actions)

        self._runner._try_env_step = metered
        self._runner._calql_meter = self
        return self

    def __exit__(self, *exception: object) -> None:
        del self._runner._try_env_step, self._runner._calql_meter
