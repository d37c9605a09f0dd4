"""Converts datasets from any format that this package reads to any that it writes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import tree
from numpy.typing import NDArray

from rllib_calql.common.encoding import flatten_observations
from rllib_calql.common.spaces import check_action_space, check_bounds, leaves_of
from rllib_calql.datasets.episodes.reader import EpisodeBlock, EpisodeReader, ReadOptions
from rllib_calql.datasets.readers.opening import open_input
from rllib_calql.datasets.writers.writers import DatasetMetadata, WriteSummary, write_blocks

_TOLERANCE = 1e-5  # Relative to the width of the bounds: actions recorded in float32 may stand just outside.
_REMEDY = "pass `action_space` (`--env`, or `--action-low` and `--action-high`)"


@dataclass(frozen=True)
class ActionBounds:
    """Bounds of an environment's actions in place of its action space.

    Attributes:
        low: Least value of each dimension; one number is that of all dimensions.
        high: Largest value of each dimension; one number is that of all dimensions.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def space(self, actions: Any, name: str) -> gym.spaces.Box:
        """The space of actions [R, A], or [R] of one dimension, of a data set of that name, in their type.

        Raises:
            ValueError: If there is another number of bounds than of dimensions, or they are no bounds.
        """
        if not isinstance(actions, np.ndarray) or actions.ndim not in (1, 2):
            raise ValueError(
                f"The actions in {name!r} are no flat rows of numbers, so no bounds can be given for them."
            )
        size = math.prod(actions.shape[1:])
        for which, bounds in (("low", self.low), ("high", self.high)):
            if len(bounds) not in (1, size):
                raise ValueError(
                    f"The actions in {name!r} have {size} {'dimension' if size == 1 else 'dimensions'}, and "
                    f"`--action-{which}` has {len(bounds)} numbers; give one for each dimension, or one for all."
                )
        low, high = (np.broadcast_to(np.array(bounds), size) for bounds in (self.low, self.high))
        if not (low <= high).all():
            index = int(np.argmin(low <= high))
            raise ValueError(
                f"`--action-low` is {low[index]:g} and `--action-high` is {high[index]:g} in dimension {index}; the "
                "least action must not be above the largest."
            )
        dtype = np.float64 if actions.dtype == np.float64 else np.float32
        space = gym.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype)
        check_action_space(space, "The space of `--action-low` and `--action-high`")
        return space


def bounds_of_text(text: str, name: str) -> tuple[float, ...]:
    """Bounds of actions that a text such as "-2,0" says.

    Args:
        text: What a user wrote.
        name: What it is called in the message.

    Raises:
        ValueError: If they are no finite numbers.
    """
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be a finite number or several, such as -2,0, got {text!r}.")
    return numbers


def convert(
    input_: Any,
    to: str | os.PathLike[str],
    *,
    options: ReadOptions | None = None,
    observation_space: gym.Space[Any] | None = None,
    action_space: gym.Space[Any] | ActionBounds | None = None,
    overwrite: bool = False,
) -> WriteSummary:
    """Reads whole episodes and writes them in another format; several inputs become one dataset.

    Actions are written in the environment's units: what an RLModule put out is clipped to [-1, 1] and scaled to the
    bounds of the action space, as RLlib does on the way to the environment.

    Args:
        input_: As in `open_input`.
        to: As in `write_blocks`.
        options: What is done about incomplete episodes. Default: they are errors.
        observation_space: The environment's observation space where the input does not record it; for Minari. Flat
            rows of a space with parts are written as the flat rows that they are.
        action_space: The environment's action space, or bounds in its place, where the input does not record it; for
            Minari, and for actions of an RLModule. Other actions are checked to be within its bounds.
        overwrite: Whether what stands at the target is replaced; it may be the input itself.

    Returns:
        Numbers of episodes and transitions, and what the format has no place for.

    Raises:
        ValueError: If an action space is needed and unknown, the data do not fit the spaces that are given, the inputs
            differ in their layout, or the data cannot be read or written in these formats.
        OSError: As in `open_input` and `write_blocks`.
    """
    readers = open_input(input_, options or ReadOptions())
    if isinstance(action_space, ActionBounds):
        action_space = action_space.space(_first_block(readers[0]).actions, readers[0].info.name)
    if observation_space is not None:
        observation_space = _written_as_parts(observation_space, readers[0])
    for reader in readers:
        _refuse_another_action_space(action_space, reader)
    observation_spaces = [reader.info.observation_space for reader in readers]
    action_spaces = [reader.info.action_space for reader in readers]
    # Scores of one of several inputs say nothing about all of them, unless they are the same.
    scores = {reader.info.reference_scores for reader in readers}
    env_specs = [reader.info.env_spec for reader in readers]
    return write_blocks(
        _environment_blocks(readers, action_space),
        to,
        metadata=DatasetMetadata(
            observation_space=observation_space or _common(observation_spaces),
            action_space=action_space or _common(action_spaces),
            env_spec=_common(env_specs),
            reference_scores=scores.pop() if len(scores) == 1 else None,
            description=f"Converted from {', '.join(reader.info.name for reader in readers)}.",
        ),
        overwrite=overwrite,
    )


def scaled_to_environment(actions: NDArray[Any], space: gym.Space[Any] | None, name: str) -> NDArray[Any]:
    """Turns module actions into environment actions; those of a discrete space stay as they are.

    Args:
        actions: [R, A], where [-1, 1] stands for the range of the space.
        space: The environment's action space, None if it is not known.
        name: The input, for the message.

    Returns:
        [R, A] in the same dtype.

    Raises:
        ValueError: If the space is not known, unbounded or as good as that, or of another shape.
    """
    if isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)):
        return actions
    if not isinstance(space, gym.spaces.Box) or not space.is_bounded() or actions.shape[1:] != space.shape:
        raise ValueError(
            f"The actions in {name!r} are those of an RLModule, shape {actions.shape[1:]}; to write them in the "
            f"environment's units a bounded Box of that shape is needed, got {space}; {_REMEDY}."
        )
    check_bounds(space, f"The action space of {name!r}")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    # In double precision and clipped again, so that rounding does not leave the bounds.
    scaled: NDArray[Any] = np.clip(low + (np.clip(actions, -1.0, 1.0) + 1.0) * (0.5 * (high - low)), low, high)
    return scaled.astype(actions.dtype)


def _environment_blocks(
    readers: Sequence[EpisodeReader], action_space: gym.Space[Any] | None
) -> Iterator[EpisodeBlock]:
    for number, reader in enumerate(readers):
        space = action_space or reader.info.action_space
        for stored in reader.blocks():
            block = stored
            changes: dict[str, Any] = {}
            is_one = isinstance(space, gym.spaces.Box) and space.shape == (1,)
            if is_one and isinstance(stored.actions, np.ndarray) and stored.actions.ndim == 1:
                block = replace(stored, actions=stored.actions[:, None])
            if reader.info.actions == "module":
                changes["actions"] = scaled_to_environment(block.actions, space, reader.info.name)
            elif isinstance(action_space, gym.spaces.Box):
                _check_within(block, action_space, reader.info.name)
            if len(readers) > 1:
                changes["ids"] = [f"{number}-{id_}" for id_ in block.ids]
            yield replace(block, **changes)


def _first_block(reader: EpisodeReader) -> EpisodeBlock:
    block = next(iter(reader.blocks()), None)
    if block is None:
        raise ValueError(f"There are no episodes in {reader.info.name!r}.")
    return block


def _written_as_parts(space: gym.Space[Any], reader: EpisodeReader) -> gym.Space[Any] | None:
    """The space if the observations are stored in its parts and shapes; None if they are its flat rows.

    Raises:
        ValueError: If they are neither.
    """
    block = _first_block(reader)
    found = {"/".join(map(str, path)): array for path, array in tree.flatten_with_path(block.observations)}
    first = tree.map_structure(lambda array: array[:1], block.observations)
    try:
        flatten_observations(space, first, keep_dtype=True)
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(
            f"The data in {reader.info.name!r} do not fit the observation space {space} of the environment: {error}; "
            "name the environment that they come from."
        ) from error
    leaves = dict(leaves_of(space))
    is_same = leaves.keys() == found.keys() and all(
        found[path].shape[1:] == leaf.shape for path, leaf in leaves.items()
    )
    return space if is_same else None


def _refuse_another_action_space(given: gym.Space[Any] | None, reader: EpisodeReader) -> None:
    """Refuses a space that contradicts the one that the data record."""
    recorded = reader.info.action_space
    if given is None or recorded is None:
        return
    is_same = given == recorded
    if isinstance(given, gym.spaces.Box) and isinstance(recorded, gym.spaces.Box):
        is_same = given.shape == recorded.shape and all(
            np.allclose(one, other, rtol=1e-5, atol=0.0)
            for one, other in ((given.low, recorded.low), (given.high, recorded.high))
        )
    if not is_same:
        raise ValueError(
            f"The data in {reader.info.name!r} record the action space {recorded}, which is not {given}; leave out "
            "`action_space` (`--env`, `--action-low`, `--action-high`)."
        )


def _check_within(block: EpisodeBlock, space: gym.spaces.Box, name: str) -> None:
    """Refuses actions in the environment's units that have another shape than those of the space, or are outside."""
    actions = block.actions
    if not isinstance(actions, np.ndarray) or actions.shape[1:] != space.shape:
        shape = actions.shape[1:] if isinstance(actions, np.ndarray) else "parts"
        raise ValueError(
            f"The actions in {name!r} have shape {shape}, those of {space} {space.shape}; {_REMEDY} of them."
        )
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    with np.errstate(invalid="ignore"):
        width = np.where(np.isfinite(high - low), np.maximum(high - low, np.abs(high)), 0.0)
    margin = _TOLERANCE * width
    outside = np.flatnonzero(~((actions >= low - margin) & (actions <= high + margin)).all(axis=1))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"Dataset {name!r}, episode {block.id_of(row)!r}, {block.where(row)}: action {actions[row].tolist()} is "
            f"outside the bounds of {space}; check the units, or give the bounds that the data have."
        )


def _common(values: Sequence[Any]) -> Any:
    """What all inputs record; None if one does not, or they differ."""
    first = values[0]
    return first if all(value == first for value in values) else None
