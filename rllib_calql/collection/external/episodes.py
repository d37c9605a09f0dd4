"""What clients send, checked and joined to whole episodes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer

from rllib_calql.common.spaces import is_flat_or_image
from rllib_calql.datasets.episodes.columns import IS_INTERVENTION
from rllib_calql.datasets.episodes.step_infos import EXECUTED_ACTION
from rllib_calql.policy.spaces import Leaf, ObservationSpace, described_space
from rllib_calql.policy.step_values import LARGEST
from rllib_calql.policy.wire import MessageError, field, unpacked_array
from rllib_calql.store.transitions import to_module_actions

Array = npt.NDArray[Any]

_ID = re.compile(r"[0-9a-f]{32}")
_MAX_INFOS = 32
_MAX_INFO_NAME = 64  # A name is a path; each `/` in it is a dict in a dict.
_MAX_UNDER_WAY = 8  # Of one client, whose control loop has one.
_FLOATS = ("<f4", "<f8")


class RejectedError(ValueError):
    """An episode that cannot be stored. The client is told why, and sends no more of it."""


@dataclass(frozen=True)
class Piece:
    """Steps of an episode, checked.

    Attributes:
        episode: Id of the episode.
        start: Number of the first step.
        observations: One array per leaf, (n + 1, ...).
        actions: Those asked for, (n, A), environment units.
        executed: What was done instead, (n, A), in the rows of `has_executed`.
        has_executed: Shape (n,).
        rewards: Shape (n,).
        interventions: Shape (n,).
        infos: By name, (n,), NaN where a step has none.
        is_last: Whether the episode ends with it.
        terminated: Whether it ends in itself.
        seconds: That the whole episode took.
    """

    episode: str
    start: int
    observations: list[Array]
    actions: Array
    executed: Array
    has_executed: Array
    rewards: Array
    interventions: Array
    infos: Mapping[str, Array]
    is_last: bool
    terminated: bool
    seconds: float

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        return sum(array.nbytes for array in (*self.observations, self.actions, self.executed)) + 100 * len(self)


class EpisodeSpaces:
    """Checks pieces by the spaces of the run, and makes whole episodes of them.

    Args:
        observation_space: Of the environment.
        action_space: Of the environment.
        max_env_steps: Of an episode.

    Raises:
        ValueError: If observations have keys that no message can hold.
    """

    def __init__(self, observation_space: gym.Space[Any], action_space: gym.spaces.Box, max_env_steps: int) -> None:
        self._space = observation_space
        self._action_space = action_space
        self._max_env_steps = max_env_steps
        self._observations = ObservationSpace(described_space(observation_space))

    @property
    def max_env_steps(self) -> int:
        """Of an episode."""
        return self._max_env_steps

    def piece(self, message: Mapping[str, Any]) -> Piece:
        """The piece in a message.

        Raises:
            MessageError: If the message is none of a client of ours.
            RejectedError: If the episode cannot be stored.
        """
        episode = id_in(message)
        start, leaves = field(message, "start", int), field(message, "observations", list)
        rewards = _of_type(message.get("rewards"), "`rewards`", ("<f8",))
        num_steps = len(rewards) if rewards.ndim == 1 else 0
        if num_steps < 1:
            raise MessageError("`rewards` must hold one number for each of at least one step.")
        if start < 0 or start + num_steps > self._max_env_steps:
            raise RejectedError(
                f"it has more than {self._max_env_steps} steps, after which the run cuts one (`max_episode_env_steps`)"
            )
        if len(leaves) != len(self._observations.leaves):
            raise RejectedError(f"it has observations of {len(leaves)} parts, not {len(self._observations.leaves)}")
        observations = [
            self._leaf(value, leaf, num_steps + 1)
            for value, leaf in zip(leaves, self._observations.leaves, strict=True)
        ]
        actions = self._actions(message.get("actions"), "`actions`", num_steps)
        self._module_actions(actions, episode)  # So that a client hears of wrong units at once.
        executed, has_executed = actions, np.zeros(num_steps, np.bool_)
        if message.get("executed") is not None:
            executed = self._actions(message["executed"], "`executed`", num_steps)
            has_executed = _flags(message.get("has_executed"), "`has_executed`", num_steps)
            self._module_actions(executed[has_executed], episode)
        if not (np.abs(rewards) <= LARGEST).all():  # NaN is not either.
            raise RejectedError("it has a reward that is not finite as float32")
        seconds = float(field(message, "seconds", (int, float)))
        return Piece(
            episode=episode,
            start=start,
            observations=observations,
            actions=actions,
            executed=executed,
            has_executed=has_executed,
            rewards=rewards,
            interventions=_flags(message.get("interventions"), "`interventions`", num_steps),
            infos=_infos(field(message, "infos", dict), num_steps),
            is_last=field(message, "is_last", bool),
            terminated=field(message, "terminated", bool),
            seconds=seconds if 0.0 <= seconds < math.inf else 0.0,
        )

    def episode(self, pieces: list[Piece]) -> SingleAgentEpisode:
        """The whole episode of its pieces, as env runners hand them out: encoded, with actions in [-1, 1]."""
        leaves = [
            np.concatenate(
                [*(piece.observations[number][:-1] for piece in pieces), pieces[-1].observations[number][-1:]]
            )
            for number in range(len(self._observations.leaves))
        ]
        observations = leaves[0] if is_flat_or_image(self._space) else self._observations.encoded(leaves)
        last = pieces[-1]
        actions = np.concatenate([piece.actions for piece in pieces])
        episode = SingleAgentEpisode(
            last.episode,
            observations=InfiniteLookbackBuffer(observations, lookback=0),
            actions=InfiniteLookbackBuffer(
                np.clip(self._module_actions(actions, last.episode), -1.0, 1.0).astype(np.float32), lookback=0
            ),
            rewards=InfiniteLookbackBuffer(np.concatenate([piece.rewards for piece in pieces]), lookback=0),
            infos=[{}, *(info for piece in pieces for info in _infos_of_steps(piece))],
            terminated=last.terminated,
            truncated=not last.terminated,
            t_started=0,
            len_lookback_buffer=0,
        )
        # What RLlib's `get_duration_s` is the difference of; it would be the time since the line above.
        episode._start_time, episode._last_step_time = 0.0, last.seconds
        return episode

    def _leaf(self, value: Any, leaf: Leaf, num_rows: int) -> Array:
        what = f"the observations' part {leaf.path!r}" if leaf.path else "`observations`"
        array = unpacked_array(value, what)
        if array.dtype != leaf.dtype or array.shape != (num_rows, *leaf.shape):
            raise RejectedError(
                f"it has {what} of type {array.dtype} and shape {array.shape}; the run has {leaf.dtype} and "
                f"{(num_rows, *leaf.shape)}"
            )
        try:
            return leaf.checked(array, is_batch=True)
        except ValueError as err:
            raise RejectedError(str(err)) from err

    def _actions(self, value: Any, what: str, num_steps: int) -> Array:
        array = _of_type(value, what, _FLOATS)
        if array.shape != (num_steps, *self._action_space.shape):
            raise RejectedError(f"it has {what} of shape {array.shape}; the run has {self._action_space.shape} a step")
        if not np.isfinite(array).all():
            raise RejectedError(f"it has {what} that are not finite")
        return array

    def _module_actions(self, actions: Array, episode: str) -> Array:
        try:
            return to_module_actions(actions, self._action_space, lambda row: f"step {row} of episode {episode}")
        except ValueError as err:
            raise RejectedError(str(err)) from err


class Joining:
    """Joins the pieces of one client. An episode whose client is gone goes with it.

    Args:
        spaces: Checks pieces, and makes episodes of them.
    """

    def __init__(self, spaces: EpisodeSpaces) -> None:
        self._spaces = spaces
        self._pieces: dict[str, list[Piece]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the episodes under way, about."""
        return sum(piece.num_bytes for pieces in self._pieces.values() for piece in pieces)

    def add(self, piece: Piece) -> SingleAgentEpisode | None:
        """Takes the next piece of an episode.

        Returns:
            The episode, if it has ended.

        Raises:
            RejectedError: If pieces before it are missing.
        """
        pieces = self._pieces.setdefault(piece.episode, [])
        if piece.start != sum(map(len, pieces)):
            self.forget(piece.episode)
            raise RejectedError(f"its steps before {piece.start} are missing")
        pieces.append(piece)
        if piece.is_last:
            return self._spaces.episode(self._pieces.pop(piece.episode))
        if len(self._pieces) > _MAX_UNDER_WAY:
            raise MessageError(f"More than {_MAX_UNDER_WAY} episodes of one client are under way.")
        return None

    def forget(self, episode: str) -> None:
        """Forgets an episode under way."""
        self._pieces.pop(episode, None)


def _of_type(value: Any, what: str, dtypes: tuple[str, ...]) -> Array:
    array = unpacked_array(value, what)
    if array.dtype.str not in dtypes:
        raise MessageError(f"{what} must be of the type {' or '.join(dtypes)}, got {array.dtype.str}.")
    return array


def _flags(value: Any, what: str, num_steps: int) -> Array:
    array = _of_type(value, what, ("|b1",))
    if array.shape != (num_steps,):
        raise MessageError(f"{what} must hold one truth value for each of {num_steps} steps, got {array.shape}.")
    return array


def id_in(message: Mapping[str, Any]) -> str:
    """The id of the episode that a message is of.

    Raises:
        MessageError: If it is none.
    """
    id_: str = field(message, "episode", str)
    if not _ID.fullmatch(id_):
        raise MessageError("`episode` must be 32 hexadecimal digits.")
    return id_


def _infos(infos: Mapping[str, Any], num_steps: int) -> dict[str, Array]:
    if len(infos) > _MAX_INFOS:
        raise MessageError(f"`infos` must hold at most {_MAX_INFOS} names, got {len(infos)}.")
    for name in infos:
        if not 0 < len(name) <= _MAX_INFO_NAME or name.split("/")[0] in (EXECUTED_ACTION, IS_INTERVENTION):
            raise MessageError(
                f"`infos` must have names of at most {_MAX_INFO_NAME} characters, which stand for nothing else, got "
                f"{name[:_MAX_INFO_NAME]!r}."
            )
    arrays = {name: _of_type(value, "`infos`", ("<f8",)) for name, value in infos.items()}
    if any(array.shape != (num_steps,) for array in arrays.values()):
        raise MessageError(f"`infos` must hold one number for each of {num_steps} steps.")
    return arrays


def _infos_of_steps(piece: Piece) -> list[dict[str, Any]]:
    infos: list[dict[str, Any]] = [{} for _ in range(len(piece))]
    for name, numbers in piece.infos.items():
        *levels, key = name.split("/")
        for info, number in zip(infos, numbers.tolist(), strict=True):
            if number == number:  # Not NaN, which stands for none.
                place = info
                for level in levels:
                    inner = place.setdefault(level, {})
                    place = inner if isinstance(inner, dict) else {}
                place[key] = number
    for step, info in enumerate(infos):
        if piece.has_executed[step]:
            info[EXECUTED_ACTION] = piece.executed[step]
        if piece.interventions[step]:
            info[IS_INTERVENTION] = True
    return infos
