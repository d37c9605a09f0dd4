"""`EpisodeOfClient`: what one episode of a client consists of, and the messages that carry it."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rllib_calql.policy.policy import ActionSpace
from rllib_calql.policy.spaces import Array, ObservationSpace
from rllib_calql.policy.step_values import as_number, checked_flag, checked_reward
from rllib_calql.policy.wire import packed_array

_EXECUTED, _INTERVENTION = "executed_action", "is_intervention"  # In infos of environments as well.
_MAX_INFOS = 32
_MAX_INFO_NAME = 64
_MAX_PIECE_BYTES = 8 * 2**20  # So that news of the run come in between.


class Spaces:
    """The spaces of a training run, by which everything that goes to it is checked first.

    Args:
        observation_space: As `policy.spaces` describes it.
        action_space: As policy files describe it.

    Raises:
        ValueError: If they are of kinds that are not known.
    """

    def __init__(self, observation_space: Mapping[str, Any], action_space: Mapping[str, Any]) -> None:
        self.description = {"observation_space": dict(observation_space), "action_space": dict(action_space)}
        self.observations = ObservationSpace(observation_space)
        self.actions = ActionSpace(action_space)


class EpisodeOfClient:
    """Takes the steps of one episode, and cuts them into pieces that fit into messages.

    Args:
        spaces: Of the training run.
        obs: The first observation.
        run: The training run that it is for.

    Attributes:
        id: 32 hexadecimal digits, drawn at random.
        run: The training run.
        is_ended: Whether no step follows.
        num_steps: Steps so far.
        num_bytes: Of what is kept, about.

    Raises:
        ValueError: If the observation is not one of the space, or a number of it is NaN or infinite.
    """

    def __init__(self, spaces: Spaces, obs: Any, run: str) -> None:
        self._spaces = spaces
        self.id = secrets.token_hex(16)
        self.run = run
        self.is_ended = False
        self._terminated = False
        self._begin = time.monotonic()
        self._seconds = 0.0
        self._observations = [self._checked(obs)]
        self._actions: list[Array] = []
        self._executed: list[Array | None] = []
        self._rewards: list[float] = []
        self._interventions: list[bool] = []
        self._infos: list[dict[str, float]] = []
        self._last = obs

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        return len(self._actions)

    @property
    def num_bytes(self) -> int:
        """Of what is kept, about."""
        return (self.num_steps + 1) * self._bytes_per_step

    @property
    def last_observation(self) -> Any:
        """As the environment gave it."""
        return self._last

    @property
    def _bytes_per_step(self) -> int:
        return sum(leaf.nbytes for leaf in self._observations[0]) + 200

    def add(
        self,
        action: Any,
        reward: Any,
        terminated: Any,
        truncated: Any,
        obs: Any,
        *,
        executed_action: Any = None,
        is_intervention: Any = False,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Notes one step. The arguments are those of `PolicyClient.step`; `info` may hold two of them.

        Raises:
            ValueError: If a value is of another shape or kind than the run has, or is not finite; nothing is noted.
            TypeError: If a flag is none, or `info` no dict.
        """
        infos = _checked_infos(info)
        if info is not None:
            executed_action = info.get(_EXECUTED) if executed_action is None else executed_action
            is_intervention = is_intervention or info.get(_INTERVENTION, False)
        is_terminated, is_truncated = checked_flag("terminated", terminated), checked_flag("truncated", truncated)
        is_marked = checked_flag("is_intervention", is_intervention)
        checked = self._spaces.actions.checked(action, "action")
        executed = None
        if executed_action is not None:
            executed = self._spaces.actions.checked(executed_action, "executed_action")
        number = checked_reward(reward)
        leaves = self._checked(obs)
        self._observations.append(leaves)
        self._actions.append(checked)
        self._executed.append(executed)
        self._rewards.append(number)
        self._interventions.append(is_marked)
        self._infos.append(infos)
        self._last = obs
        if is_terminated or is_truncated:
            self.end(terminated=is_terminated)

    def end(self, *, terminated: bool = False) -> None:
        """Ends the episode after its last step: in itself, or as one that was cut."""
        self.is_ended = True
        self._terminated = terminated
        self._seconds = time.monotonic() - self._begin

    def end_of_piece(self, start: int) -> int:
        """The number behind the last step that fits into a message with those from `start` on."""
        return min(self.num_steps, start + max(1, _MAX_PIECE_BYTES // self._bytes_per_step))

    def piece(self, start: int, stop: int, is_last: bool) -> dict[str, Any]:
        """The message of some steps.

        Args:
            start: Number of the first one.
            stop: Number behind the last one.
            is_last: Whether the episode ends there.
        """
        steps = slice(start, stop)
        observations = [np.concatenate(leaves) for leaves in zip(*self._observations[start : stop + 1], strict=True)]
        actions = np.stack(self._actions[steps])
        executed = self._executed[steps]
        has_executed = [one is not None for one in executed]
        filled = [asked if one is None else one for one, asked in zip(executed, actions, strict=True)]
        infos = self._infos[steps]
        names = sorted({name for info in infos for name in info})
        return {
            "type": "piece",
            "run": self.run,
            "episode": self.id,
            "start": start,
            "observations": [packed_array(leaf) for leaf in observations],
            "actions": packed_array(actions),
            "executed": packed_array(np.stack(filled)) if any(has_executed) else None,
            "has_executed": packed_array(np.array(has_executed)) if any(has_executed) else None,
            "rewards": packed_array(np.array(self._rewards[steps], np.float64)),
            "interventions": packed_array(np.array(self._interventions[steps], np.bool_)),
            "infos": {
                name: packed_array(np.array([info.get(name, math.nan) for info in infos], np.float64)) for name in names
            },
            "is_last": is_last,
            "terminated": is_last and self._terminated,
            "seconds": self._seconds,
        }

    def _checked(self, obs: Any) -> list[Array]:
        leaves = self._spaces.observations.checked(obs, is_batch=False)
        return [leaf.copy() for leaf in leaves]  # The caller may write into its own.


def _checked_infos(info: Mapping[str, Any] | None) -> dict[str, float]:
    """The numbers in an info, of nested ones as well, by their paths."""
    if info is None:
        return {}
    if not isinstance(info, Mapping):
        raise TypeError(f"`info` must be None or a dict, got {type(info).__name__}.")
    numbers = dict(_numbers_in({name: info[name] for name in info if name not in (_EXECUTED, _INTERVENTION)}, ""))
    if len(numbers) > _MAX_INFOS:
        raise ValueError(f"`info` must hold at most {_MAX_INFOS} numbers, got {len(numbers)}; hand over what counts.")
    return numbers


def _numbers_in(info: Mapping[Any, Any], path: str) -> Iterator[tuple[str, float]]:
    for key, value in info.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from _numbers_in(value, name)
        elif (number := as_number(value)) is not None and len(name) <= _MAX_INFO_NAME:
            yield name, number
