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
import numpy.typing as npt

from rllib_calql.policy.whole_files import PARTIAL_ENDING, write_whole

Array = npt.NDArray[Any]

_PREFIX = "episode-"
_ABANDONED_AFTER_S = 3600.0  # Writing takes less than a second. Only a power cut leaves one that grows old.
_OBS, _NEXT_OBS, _ACTIONS, _EXECUTED = "observations", "next_observations", "actions", "executed_actions"


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
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_episodes = 0
        self.num_steps = 0
        self._obs: dict[str, Array] | None = None  # After the last step.
        self._steps: list[dict[str, Array]] = []
        self._kinds: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}  # Of the first values of this log.
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
        """
        first = self._checked(_OBS, obs)
        written = self._cut()
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
            RuntimeError: If no episode has begun.
            ValueError: If a value has another structure, shape or type than those before it, or is not finite.
            TypeError: If a value holds anything but numbers, or a flag is none.
            OSError: If the file cannot be written; the episode is kept, and `close` or `reset` tries again.
        """
        if self._obs is None:
            raise RuntimeError("No episode has begun; call `reset` with its first observation.")
        for name, flag in (("terminated", terminated), ("truncated", truncated), ("is_intervention", is_intervention)):
            if not isinstance(flag, (bool, np.bool_, int, np.integer)) or flag not in (0, 1):
                raise TypeError(f"`{name}` must be True or False, got {flag!r}.")
        after = self._checked(_OBS, obs)
        step = {
            **self._obs,
            **{_NEXT_OBS + name[len(_OBS) :]: value for name, value in after.items()},
            **self._checked(_ACTIONS, action),
            **self._executed(action if executed_action is None else executed_action),
            "rewards": self._checked("rewards", float(reward))["rewards"],
            "terminals": np.asarray(bool(terminated)),
            "timeouts": np.asarray(bool(truncated) and not terminated),
            "is_intervention": np.asarray(bool(is_intervention)),
        }
        self._steps.append(step)
        self._obs = after
        return self._write() if terminated or truncated else None

    def close(self) -> Path | None:
        """Ends the log. An episode that is under way ends as one that was cut after its last step, and is written.

        Returns:
            The file of that episode; None if there was none.
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

    def _executed(self, action: Any) -> dict[str, Array]:
        """Checked as the action that it stands for."""
        return {_EXECUTED + name[len(_ACTIONS) :]: value for name, value in self._checked(_ACTIONS, action).items()}

    def _checked(self, column: str, value: Any) -> dict[str, Array]:
        """The arrays in a value by their names, which must be like those before."""
        arrays = dict(_leaves(column, value))
        known = {name for name in self._kinds if name == column or name.startswith(f"{column}/")}
        if known and known != arrays.keys():
            raise ValueError(
                f"{_called(column)} has the parts {_listed(arrays)}, those before it had {_listed(known)}; every step "
                "of a log must have the same."
            )
        for name, array in arrays.items():
            shape, dtype = self._kinds.get(name, (array.shape, array.dtype))
            if array.shape != shape:
                raise ValueError(f"{_called(name)} has shape {array.shape}, the one before it had {shape}.")
            if not np.can_cast(array.dtype, dtype, casting="same_kind"):
                raise ValueError(f"{_called(name)} holds {array.dtype}, the one before it held {dtype}.")
            with np.errstate(over="ignore"):
                array = array.astype(dtype, copy=True)  # The caller may write into its own.
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{_called(name)} holds {_first_not_finite(array)}; a log takes finite numbers only.")
            arrays[name] = array
        self._kinds.update({name: (array.shape, array.dtype) for name, array in arrays.items()})
        return arrays

    def _write(self) -> Path:
        columns = {name: np.stack([step[name] for step in self._steps]) for name in self._steps[0]}
        content = io.BytesIO()
        save: Any = np.savez  # Stubs take the names of arrays for its options.
        save(content, **columns)
        now = datetime.fromtimestamp(time.time(), timezone.utc)
        file = self.folder / f"{_PREFIX}{now:%Y%m%dT%H%M%S}.{now.microsecond:06d}Z-{secrets.token_hex(4)}.npz"
        write_whole(file, content.getvalue())
        self.num_episodes += 1
        self.num_steps += len(self._steps)
        self._steps, self._obs = [], None
        return file

    def _remove_abandoned(self) -> None:
        for path in self.folder.glob(f".{_PREFIX}*{PARTIAL_ENDING}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                    path.unlink()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    if isinstance(value, dict):
        if not value:
            raise ValueError(f"{_called(name)} is an empty dict.")
        for key, part in value.items():
            if not isinstance(key, str) or not key or "/" in key or "\0" in key:
                raise ValueError(f"{_called(name)} has the key {key!r}; keys are texts without '/'.")
            yield from _leaves(f"{name}/{key}", part)
    elif isinstance(value, tuple):
        for place, part in enumerate(value):
            yield from _leaves(f"{name}/{place}", part)
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{_called(name)} holds {array.dtype}; a log takes numbers, and dicts and tuples of them.")
        yield name, array


def _called(name: str) -> str:
    """How messages call a column or a part of it."""
    column, _, part = name.partition("/")
    shown = {_OBS: "`obs`", _ACTIONS: "`action`", "rewards": "`reward`"}.get(column, f"`{column}`")
    return f"{shown} at '{part}'" if part else shown


def _listed(names: Any) -> str:
    return ", ".join(repr(name.partition("/")[2] or name) for name in sorted(names))


def _first_not_finite(array: Array) -> str:
    place = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
    return f"{array[place]}{f' at {list(place)}' if place else ''}"
