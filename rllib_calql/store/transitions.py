"""From whole episodes to rows of the store: flat observations, module actions, scaled rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.common.returns import RewardSettings
from rllib_calql.common.spaces import fixed_dimensions, is_flat_or_image, reordering, sorted_keys
from rllib_calql.networks.actor_critic import DATA_ACTION_LIMIT
from rllib_calql.store.returns_connector import TAIL_DISCOUNT

Array = npt.NDArray[Any]
_BOUND_TOLERANCE = 1e-5  # Relative to the width of the bounds: actions recorded in float32 may stand just outside.


def flat_size(space: gym.Space[Any]) -> int:
    """Size of one flattened observation of `space`."""
    return gym.spaces.utils.flatdim(space)


def observation_dtype(space: gym.Space[Any]) -> np.dtype[Any]:
    """Type of observations in the online store and in batches: small integers, such as images, stay what they are."""
    dtype = np.dtype(space.dtype) if isinstance(space, gym.spaces.Box) else np.dtype(np.float32)
    return dtype if dtype.kind in "iu" and dtype.itemsize <= 2 else np.dtype(np.float32)


def encoded_space(space: gym.Space[Any]) -> gym.spaces.Box:
    """Space of what the module sees, and episodes of env runners hold, of observations of `space`."""
    if is_flat_or_image(space):
        assert isinstance(space, gym.spaces.Box)
        return space
    return gym.spaces.Box(-np.inf, np.inf, (flat_size(space),), np.float32)


def flatten_observations(space: gym.Space[Any], observations: Any, *, keep_dtype: bool = False) -> Array:
    """Flattens a batch of observations, those of data and those of env runners alike.

    It is `gymnasium.spaces.utils.flatten` of each, float32: parts in order, those of a Dict in sorted order of the
    keys; integers of Discrete and MultiDiscrete become one-hot.

    Args:
        space: Space of one observation. Data that are flat already, of the flattened size, pass.
        observations: Arrays of shape (T, ...) in the structure of `space`.
        keep_dtype: Whether parts that are arrays of one type are left in that type, to be converted when they are
            sampled: images stay uint8.

    Returns:
        Shape (T, flat_size(space)), float32 unless the type is kept.

    Raises:
        ValueError: If structure, shape or integers are not those of the space.
    """
    is_nested = isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple))
    if is_nested and isinstance(observations, np.ndarray):
        if observations.ndim != 2 or observations.shape[1] != flat_size(space):
            raise ValueError(
                f"observations are rows of shape {observations.shape[1:]}; neither the parts of the space nor flat "
                f"rows of {flat_size(space)} numbers"
            )
        return observations if keep_dtype else np.asarray(observations, dtype=np.float32)
    parts = [_flatten_leaf(leaf, np.asarray(part), path) for path, leaf, part in _matched(space, observations, "")]
    dtypes = {part.dtype for part in parts}
    dtype = dtypes.pop() if keep_dtype and len(dtypes) == 1 else np.dtype(np.float32)
    return parts[0].astype(dtype, copy=False) if len(parts) == 1 else np.concatenate(parts, axis=1, dtype=dtype)


def _matched(space: gym.Space[Any], values: Any, path: str) -> Iterator[tuple[str, gym.Space[Any], Any]]:
    """Path, space and values of every leaf, in the order of `leaves_of`."""
    if isinstance(space, gym.spaces.Dict):
        keys: list[Any] = sorted_keys(space)
        if isinstance(values, tuple) and [str(key) for key in keys] == [str(i) for i in range(len(values))]:
            values = dict(zip(keys, values, strict=True))  # Files of columns know no other names of a tuple's entries.
        if not isinstance(values, Mapping):
            raise ValueError(f"{_what(path)} are {_described(values)}; the space has the parts {keys}")
        if values.keys() != space.spaces.keys():
            raise ValueError(f"{_what(path)} have the parts {sorted(map(str, values))}; the space has {keys}")
        for key in keys:
            yield from _matched(space[key], values[key], f"{path}/{key}" if path else str(key))
    elif isinstance(space, gym.spaces.Tuple):
        if not isinstance(values, (tuple, list)) or len(values) != len(space):
            raise ValueError(f"{_what(path)} are {_described(values)}; the space has {len(space)} entries")
        for number, (part, value) in enumerate(zip(space.spaces, values, strict=True)):
            yield from _matched(part, value, f"{path}/{number}" if path else str(number))
    else:
        if isinstance(values, (Mapping, tuple)):
            raise ValueError(f"{_what(path)} are {_described(values)}; the space has {space}")
        yield path, space, values


def _what(path: str) -> str:
    return f"observations {path!r}" if path else "observations"


def _described(values: Any) -> str:
    if isinstance(values, Mapping):
        return f"a dict of {sorted(map(str, values))}"
    return f"a tuple of {len(values)} entries" if isinstance(values, (tuple, list)) else "one array"


def _flatten_leaf(space: gym.Space[Any], values: Array, path: str) -> Array:
    shape, size = values.shape[1:], flat_size(space)
    if isinstance(space, gym.spaces.Discrete) and shape in ((), (1,)):
        return _one_hot(values.reshape(-1), int(space.n), int(space.start), space)
    if isinstance(space, gym.spaces.MultiDiscrete) and shape in (space.nvec.shape, (space.nvec.size,)):
        columns = values.reshape(len(values), -1)
        sizes = np.asarray(space.nvec).reshape(-1).tolist()
        starts = np.broadcast_to(space.start, space.nvec.shape).reshape(-1).tolist()
        parts = [_one_hot(columns[:, i], sizes[i], starts[i], space) for i in range(len(sizes))]
        return np.concatenate(parts, axis=1)
    if isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
        if shape != (size,):
            raise ValueError(f"{_what(path)} are rows of shape {shape}; the space {space} has {space.shape}")
        sizes = (
            [int(space.n)] if isinstance(space, gym.spaces.Discrete) else np.asarray(space.nvec).reshape(-1).tolist()
        )
        return _checked_one_hot(values, sizes, space)
    # A single number means the same in any shape.
    if shape in (space.shape, (size,)) or values.size == len(values) * size == len(values):
        return values.reshape(len(values), size)
    remedy = reordering(shape, space.shape or ())
    if remedy is None:
        raise ValueError(f"{_what(path)} have {math.prod(shape)} numbers, the environment's have {size}")
    raise ValueError(f"{_what(path)} are rows of shape {shape}, the environment's have {space.shape}: {remedy}")


def _one_hot(values: Array, num_values: int, start: int, space: gym.Space[Any]) -> Array:
    numbers = values.astype(np.int64)
    places = numbers - start
    wrong = (numbers != values) | (places < 0) | (places >= num_values)
    if wrong.any():
        raise ValueError(f"{values[wrong][0]} is not one of the {num_values} values of {space}")
    return np.eye(num_values, dtype=np.float32)[places]


def _checked_one_hot(values: Array, sizes: list[int], space: gym.Space[Any]) -> Array:
    """Rows that are one-hot already, one entry 1 in every stretch of `sizes`."""
    begins = np.cumsum([0, *sizes[:-1]])
    wrong = ((values != 0) & (values != 1)).any(axis=1) | (np.add.reduceat(values, begins, axis=1) != 1).any(axis=1)
    if wrong.any():
        raise ValueError(f"{values[wrong][0].tolist()} is not one-hot for {space}")
    return values.astype(np.float32)


def to_module_actions(actions: Array, space: gym.spaces.Box, where: Callable[[int], str]) -> Array:
    """Maps actions within the bounds of `space` to [-1, 1], the inverse of RLlib's unsquashing.

    Args:
        actions: Environment actions, shape (T, A).
        space: Bounded Box.
        where: Says where a row was read, if its action stands outside.

    Returns:
        Module actions, shape (T, A).

    Raises:
        ValueError: Naming the row of the first action outside the bounds.
    """
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    fixed = fixed_dimensions(space)
    if fixed.any():
        # The middle, as good as any number, and far from the ends. What the environment gets is `low` in any case.
        scale = np.maximum(np.abs(low), 1.0)
        scaled = np.where(
            fixed,
            (actions - low) / (_stored_tolerance(actions) * scale),
            2.0 * (actions - low) / np.where(fixed, 1.0, high - low) - 1.0,
        )
        _checked(scaled, actions, f"the bounds of {space}", where)
        return np.where(fixed, 0.0, scaled)
    scaled = 2.0 * (actions.astype(np.float64) - low) / (high - low) - 1.0
    return _checked(scaled, actions, f"the bounds of {space}", where)


def _stored_tolerance(actions: Array) -> float:
    """How far from a bound a recorded action may stand: a few roundings of the type in which it is stored."""
    if actions.dtype.kind != "f":
        return _BOUND_TOLERANCE
    return max(_BOUND_TOLERANCE, 2 * float(np.finfo(actions.dtype).eps))


def check_module_actions(actions: Array, where: Callable[[int], str]) -> Array:
    """Checks that actions lie in [-1, 1], shape (T, A), and returns them.

    Raises:
        ValueError: Naming the row of the first action outside.
    """
    return _checked(actions.astype(np.float64), actions, "[-1, 1], the range of module actions", where)


def _checked(scaled: Array, actions: Array, allowed: str, where: Callable[[int], str]) -> Array:
    # Negated, because NaN compares false with everything.
    outside = np.flatnonzero(~(np.abs(scaled) <= 1.0 + _stored_tolerance(actions)).all(axis=1))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"{where(row)}: action {actions[row].tolist()} is outside {allowed}; clip the recorded actions, or "
            "set `action_space_of_data` to what they are."
        )
    return scaled


def clipped_actions(actions: Array) -> Array:
    """Module actions within the bounds that the policy can produce, float32."""
    return np.clip(actions, -DATA_ACTION_LIMIT, DATA_ACTION_LIMIT).astype(np.float32)


def transitions_from_episode(
    episode: SingleAgentEpisode, *, observations: Array, actions: Array, settings: RewardSettings
) -> dict[str, Array]:
    """Rows of one whole episode that `AddReturnsToGo` has annotated.

    Args:
        episode: Source of rewards, end and returns.
        observations: Flat observations, shape (T + 1, obs_dim).
        actions: Module actions, shape (T, A).
        settings: Scaling of the rewards.

    Returns:
        Columns of T rows. Only the last row can be terminated; a time-out leaves it 0, so that its bootstrap stays.
    """
    rewards = settings.transform(np.asarray(episode.get_rewards()))
    terminateds = np.zeros(len(rewards), dtype=np.float32)
    terminateds[-1] = float(episode.is_terminated)
    rows = {
        Columns.OBS: observations[:-1],
        Columns.NEXT_OBS: observations[1:],
        Columns.ACTIONS: clipped_actions(actions),
        Columns.REWARDS: rewards,
        Columns.TERMINATEDS: terminateds,
    }
    for name in (Columns.RETURNS_TO_GO, TAIL_DISCOUNT):
        if name in episode.extra_model_outputs:
            rows[name] = np.asarray(episode.get_extra_model_outputs(name))
    return rows


def encoded_observations(episode: SingleAgentEpisode, space: gym.spaces.Box) -> Array:
    """Observations of a collected episode, which connectors have encoded, as flat rows.

    Args:
        episode: As env runners hand it out.
        space: Of what the module sees.

    Returns:
        Shape (T + 1, n), in the type of the episode.

    Raises:
        ValueError: If connectors of the user left something else in the episode than the module saw.
    """
    observations = episode.get_observations()
    if not isinstance(observations, np.ndarray) or observations.shape[1:] != space.shape:
        found = observations.shape[1:] if isinstance(observations, np.ndarray) else type(observations).__name__
        raise ValueError(
            f"Episode {episode.id_} holds observations of {found}, the module saw {space.shape}: a connector in "
            "`env_to_module_connector` has to replace the observations of the episodes, as RLlib's "
            "`FlattenObservations` does, for training sees what they hold."
        )
    return observations.reshape(len(observations), -1)


def check_storable(episode: SingleAgentEpisode, observations: Array, rows: dict[str, Array], rule: object) -> None:
    """Refuses numbers of an online episode that are not finite in float32, the type that they are stored in.

    Args:
        episode: Source of the rewards.
        observations: Flat observations in float32, shape (T + 1, obs_dim).
        rows: What is to be stored, see `transitions_from_episode`.
        rule: What training rewards and returns are made by, for the message.

    Raises:
        ValueError: Naming the first such step.
    """
    rewards = np.asarray(episode.get_rewards(), dtype=np.float64).reshape(-1, 1)
    _check_finite(episode.id_, "the environment returned an observation", observations)
    _check_finite(episode.id_, "the environment returned a reward", rewards)
    made = (Columns.ACTIONS, "the policy made an action"), (Columns.REWARDS, f"by {rule} there is a training reward")
    for name, what in (*made, (Columns.RETURNS_TO_GO, f"by {rule} there is a return")):
        _check_finite(episode.id_, what, rows[name].reshape(len(rewards), -1))


def _check_finite(episode_id: str, what: str, values: Array) -> None:
    """Refuses values [T, n] that are not finite in float32."""
    bad = np.flatnonzero(~(np.abs(values) <= np.finfo(np.float32).max).all(axis=1))
    if len(bad):
        raise ValueError(
            f"Online episode {episode_id}, step {bad[0]}: {what} with NaN or infinity in float32, "
            f"{values[bad[0]].tolist()}; mend it, or let it end the episode before."
        )
