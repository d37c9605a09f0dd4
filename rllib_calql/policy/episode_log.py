"""`EpisodeLog`: what a control loop did, one file for each episode, whole on disk or absent."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rllib_calql.policy.spaces import Array, refuse_masked
from rllib_calql.policy.step_values import LARGEST, checked_flag, checked_reward
from rllib_calql.policy.whole_files import PARTIAL_ENDING, partial_of, told, write_whole

_PREFIX = "episode-"
_ABANDONED_AFTER_S = 3600.0  # Writing takes less than a second. Only a power cut leaves one that grows old.
_OBS, _NEXT_OBS, _ACTIONS, _EXECUTED = "observations", "next_observations", "actions", "executed_actions"

Kinds = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


class EpisodeLog:
    """Writes the episodes of a control loop to a folder. It needs NumPy alone.

    ```python
    log = EpisodeLog("episodes")
    obs = robot.reset()
    log.reset(obs)
    while not (terminated or truncated):
        action = policy(obs)
        obs, reward, terminated, truncated = robot.step(action)
        log.step(action, reward, terminated, truncated, obs)
    ```

    Steps are kept in memory until their episode ends, so that a step costs no time on disk. The file of an episode then
    appears at once and whole: it is written beside its place, flushed to the disk and renamed. A power cut before that
    leaves nothing of the episode. Every file is an `.npz` of columns with one row per step, which the package reads as
    any other data, so the folder is also an `input_`.

    One log serves one control loop. Several logs may write to one folder.

    Args:
        folder: Where to; made if it is missing.

    Attributes:
        folder: The same, absolute.
        num_episodes: Episodes that this object has written.
        num_steps: Steps in them.

    Raises:
        OSError: If no file can be made in the folder.
        ValueError: If its name is empty.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not os.fspath(folder):
            raise ValueError("`folder` is an empty text; name one, `.` for the present one.")
        self.folder = Path(folder).expanduser().absolute()
        self._check_folder()
        self.num_episodes = 0
        self.num_steps = 0
        self._obs: dict[str, Array] | None = None  # After the last step.
        self._steps: list[dict[str, Array]] = []
        self._has_ended = False  # And could not be written.
        self._kinds: Kinds = {}  # Of the first values that were noted.
        self._remove_abandoned()

    def reset(self, obs: Any) -> Path | None:
        """Begins an episode.

        An episode that is under way ends as one that was cut after its last step, and is written.

        Args:
            obs: The first observation: an array or a number, or dicts and tuples of them.

        Returns:
            The file of the episode that was under way; None if there was none.

        Raises:
            ValueError: If the observation has another structure, shape or type than those before it, or is not finite.
            TypeError: If it holds anything but numbers.
            OSError: If the episode under way cannot be written; it is kept, and no other one begins.
        """
        kinds = dict(self._kinds)
        first = _checked(_OBS, obs, kinds, "`obs`")
        written = self._cut()
        self._kinds = kinds
        self._obs = first
        return written

    def step(
        self,
        action: Any,
        reward: float,
        terminated: bool,
        truncated: bool,
        obs: Any,
        executed_action: Any = None,
        is_intervention: bool = False,
    ) -> Path | None:
        """Notes one step, and writes the episode if it ends with it.

        Args:
            action: What the policy asked for, in the environment's units.
            reward: Of the step.
            terminated: Whether the task ended by itself, in success or failure, so that nothing would follow.
            truncated: Whether the episode was cut, by a time limit or by somebody.
            obs: The observation after the step.
            executed_action: What the system did in place of `action`, if it is known; training learns from it.
            is_intervention: Whether a person chose what was done.

        Returns:
            The file of the episode if it ended, None otherwise.

        Raises:
            RuntimeError: If no episode has begun, or if the one before has ended and could not be written.
            ValueError: If a value has another structure, shape or type than those before it, is no number where one is
                needed, or is not finite in float32. The step is not noted then.
            TypeError: If a value holds anything but numbers, or a flag is none.
            OSError: If the file cannot be written; the episode is kept, and `close` or `reset` tries again.
        """
        if self._has_ended:
            raise RuntimeError(
                "The episode before has ended and could not be written; call `reset` or `close`, which try it again."
            )
        if self._obs is None:
            raise RuntimeError("No episode has begun; call `reset` with its first observation.")
        is_terminated, is_truncated = checked_flag("terminated", terminated), checked_flag("truncated", truncated)
        kinds = dict(self._kinds)
        after = _checked(_OBS, obs, kinds, "`obs`")
        asked_for = _checked(_ACTIONS, action, kinds, "`action`")
        executed = asked_for
        if executed_action is not None:
            executed = _checked(_ACTIONS, executed_action, kinds, "`executed_action`")
        step = {
            **self._obs,
            **{_NEXT_OBS + name[len(_OBS) :]: value for name, value in after.items()},
            **asked_for,
            _EXECUTED: executed[_ACTIONS],
            "rewards": np.asarray(checked_reward(reward)),
            "terminals": np.asarray(is_terminated),
            "timeouts": np.asarray(is_truncated and not is_terminated),
            "is_intervention": np.asarray(checked_flag("is_intervention", is_intervention)),
        }
        self._steps.append(step)
        self._obs = after
        self._kinds = kinds
        return self._write() if is_terminated or is_truncated else None

    def close(self) -> Path | None:
        """Ends the log. An episode that is under way ends as one that was cut after its last step, and is written.

        Returns:
            The file of that episode; None if there was none.

        Raises:
            OSError: If the file cannot be written; the episode is kept, and `close` tries again.
        """
        return self._cut()

    def __enter__(self) -> EpisodeLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut(self) -> Path | None:
        if not self._steps:
            self._obs = None
            return None
        last = self._steps[-1]
        last["timeouts"] = ~last["terminals"]
        return self._write()

    def _write(self) -> Path:
        columns = {name: np.stack([step[name] for step in self._steps]) for name in self._steps[0]}
        content = io.BytesIO()
        save: Any = np.savez  # Stubs take the names of arrays for its options.
        save(content, **columns)
        now = datetime.fromtimestamp(time.time(), timezone.utc)
        file = self.folder / f"{_PREFIX}{now:%Y%m%dT%H%M%S}.{now.microsecond:06d}Z-{secrets.token_hex(4)}.npz"
        self._has_ended = True
        try:
            write_whole(file, content.getvalue())
        except OSError as err:
            remedy = "its steps are kept in memory, and the next `reset` or `close` tries again"
            raise told(err, f"An episode of {len(self._steps)} steps is not saved", remedy) from err
        self._has_ended = False
        self.num_episodes += 1
        self.num_steps += len(self._steps)
        self._steps, self._obs = [], None
        return file

    def _check_folder(self) -> None:
        """Makes the folder, and a file in it, so that a loop hears before it drives that it cannot log."""
        probe = partial_of(self.folder / f"{_PREFIX}probe")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as err:
            what = f"Episodes cannot be written to '{self.folder}'"
            raise told(err, what, "name a folder that this program can write to") from err

    def _remove_abandoned(self) -> None:
        for path in self.folder.glob(f".{_PREFIX}*{PARTIAL_ENDING}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                    path.unlink()


def _checked(column: str, value: Any, kinds: Kinds, shown: str) -> dict[str, Array]:
    """The arrays in a value by their names, copies, which must be of the kinds before them.

    Args:
        column: That the value is of.
        value: As the caller gave it.
        kinds: Of values before, by name; those that are new are added.
        shown: What messages call the value.
    """
    arrays = dict(_leaves(column, value, shown))
    known = {name for name in kinds if name == column or name.startswith(f"{column}/")}
    if known and known != arrays.keys():
        raise ValueError(
            f"{shown} has the parts {_listed(arrays)}, those before it had {_listed(known)}; every step of a log must "
            "have the same."
        )
    for name, array in arrays.items():
        shape, dtype = kinds.setdefault(name, (array.shape, array.dtype))
        arrays[name] = _of_kind(array, shape, dtype, _part_of(name, shown))
    return arrays


def _of_kind(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any], part: str) -> Array:
    """A copy in a type, since the caller may write into its own."""
    if array.shape != shape:
        raise ValueError(f"{part} has shape {array.shape}, the one before it had {shape}.")
    wider = "the first one of a log says the type: give it in one that holds all, such as `numpy.float64`"
    if not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise ValueError(f"{part} holds {array.dtype}, the one before it held {dtype}; {wider}.")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype, copy=True)
        is_storable = np.isfinite(converted.astype(np.float32) if dtype.kind == "f" else converted)
    if not is_storable.all():
        place = tuple(np.argwhere(~is_storable)[0].tolist())
        where = f" at {list(place)}" if place else ""
        raise ValueError(
            f"{part} holds {converted[place]}{where}; a log takes finite numbers only, up to {LARGEST:.2g} as float32 "
            "does."
        )
    if dtype.kind in "iu" and (wrong := converted != array).any():
        raise ValueError(f"{part} holds {array[wrong][0]}, which {dtype} cannot hold; {wider}.")
    return converted


def _leaves(name: str, value: Any, shown: str) -> Iterator[tuple[str, Array]]:
    part_of_value = _part_of(name, shown)
    if isinstance(value, (dict, tuple)) and name == _ACTIONS:
        raise TypeError(f"{shown} must be one array or number, got a {type(value).__name__}; join its parts.")
    if isinstance(value, (dict, tuple)) and not value:
        raise ValueError(f"{part_of_value} is an empty {type(value).__name__}; leave it out.")
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str) or not key or "/" in key or "\0" in key:
                raise ValueError(f"{part_of_value} has the key {key!r}; keys are texts without '/'.")
            yield from _leaves(f"{name}/{key}", part, shown)
    elif isinstance(value, tuple):
        for place, part in enumerate(value):
            yield from _leaves(f"{name}/{place}", part, shown)
    else:
        yield name, _array(value, part_of_value)


def _array(value: Any, part: str) -> Array:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as err:
        raise ValueError(f"{part} must be one array of numbers, got a {type(value).__name__}: {err}.") from err
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{part} holds {array.dtype}; a log takes numbers, and dicts and tuples of them.")
    if not array.size:
        raise ValueError(f"{part} is empty, of shape {array.shape}; leave it out.")
    refuse_masked(value, part)
    return array


def _part_of(name: str, shown: str) -> str:
    """How messages call a part of a value."""
    part = name.partition("/")[2]
    return f"{shown} at '{part}'" if part else shown


def _listed(names: Any) -> str:
    return ", ".join(repr(name.partition("/")[2] or name) for name in sorted(names))
