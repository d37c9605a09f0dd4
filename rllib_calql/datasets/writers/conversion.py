"""Converts datasets from any format that this package reads to any that it writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rllib_calql.common.spaces import check_bounds
from rllib_calql.datasets.episodes.reader import EpisodeBlock, EpisodeReader, ReadOptions
from rllib_calql.datasets.readers.opening import open_input
from rllib_calql.datasets.writers.writers import DatasetMetadata, WriteSummary, write_blocks


def convert(
    input_: Any,
    to: str | os.PathLike[str],
    *,
    options: ReadOptions | None = None,
    observation_space: gym.Space[Any] | None = None,
    action_space: gym.Space[Any] | None = None,
    overwrite: bool = False,
) -> WriteSummary:
    """Reads whole episodes and writes them in another format; several inputs become one dataset.

    Actions are written in the environment's units: what an RLModule put out is clipped to [-1, 1] and scaled to the
    bounds of the action space, as RLlib does on the way to the environment.

    Args:
        input_: As in `open_input`.
        to: As in `write_blocks`.
        options: What is done about incomplete episodes. Default: they are errors.
        observation_space: Space of the observations where the input does not record it; for Minari.
        action_space: The environment's action space where the input does not record it; for Minari, and for actions
            of an RLModule.
        overwrite: Whether what stands at the target is replaced; it may be the input itself.

    Returns:
        Numbers of episodes and transitions, and what the format has no place for.

    Raises:
        ValueError: If an action space is needed and unknown, the inputs differ in their layout, or the data cannot be
            read or written in these formats.
        OSError: As in `open_input` and `write_blocks`.
    """
    readers = open_input(input_, options or ReadOptions())
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
            f"environment's units a bounded Box of that shape is needed, got {space}; pass `action_space`."
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
        for block in reader.blocks():
            changes: dict[str, Any] = {}
            if reader.info.actions == "module":
                changes["actions"] = scaled_to_environment(block.actions, space, reader.info.name)
            if len(readers) > 1:
                changes["ids"] = [f"{number}-{id_}" for id_ in block.ids]
            yield replace(block, **changes)


def _common(values: Sequence[Any]) -> Any:
    """What all inputs record; None if one does not, or they differ."""
    first = values[0]
    return first if all(value == first for value in values) else None
