"""From whole episodes to rows of the store: flat observations, module actions, scaled rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import tree
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.connectors import TAIL_DISCOUNT
from rllib_calql.networks import DATA_ACTION_LIMIT
from rllib_calql.returns import RewardSettings

Array = npt.NDArray[Any]
_BOUND_TOLERANCE = 1e-5  # Relative to the width of the bounds: actions recorded in float32 may stand just outside.


def is_flat(space: gym.Space[Any]) -> bool:
    """Whether observations of this space are one vector of real numbers already."""
    return isinstance(space, gym.spaces.Box) and len(space.shape) == 1


def is_image(space: gym.Space[Any]) -> bool:
    """Whether observations of this space are images, height x width x channels of bytes."""
    return isinstance(space, gym.spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8


def is_flat_or_image(space: gym.Space[Any]) -> bool:
    """Whether env runners hand observations of this space to the module as they are, others being flattened first."""
    return is_flat(space) or is_image(space)


def flat_size(space: gym.Space[Any]) -> int:
    """Size of one flattened observation of `space`."""
    return gym.spaces.utils.flatdim(space)


def observation_dtype(space: gym.Space[Any]) -> np.dtype[Any]:
    """Type of observations in the online store and in batches: small integers, such as images, stay what they are."""
    dtype = np.dtype(space.dtype) if isinstance(space, gym.spaces.Box) else np.dtype(np.float32)
    return dtype if dtype.kind in "iu" and dtype.itemsize <= 2 else np.dtype(np.float32)


def flatten_observations(space: gym.Space[Any], observations: Any, *, keep_dtype: bool = False) -> Array:
    """Flattens a batch of observations as RLlib's `FlattenObservations` does on env runners.

    Dict keys are taken in sorted order, Discrete parts become one-hot, everything becomes float32.

    Args:
        space: Space of one observation. Data that are flat already, of the flattened size, pass.
        observations: Arrays of shape (T, ...) in the structure of `space`.
        keep_dtype: Whether parts that are arrays of one type are left in that type, to be converted when they are
            sampled: images stay uint8.

    Returns:
        Shape (T, flat_size(space)), float32 unless the type is kept.
    """
    is_integer = isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete))
    is_array = isinstance(observations, np.ndarray) and observations.ndim == 2
    if is_array and not is_integer and observations.shape[1] == flat_size(space):
        return observations if keep_dtype else np.asarray(observations, dtype=np.float32)
    leaves = tree.flatten_up_to(_structure(space), observations)
    parts = [_flatten_leaf(leaf, np.asarray(part)) for leaf, part in zip(_leaf_spaces(space), leaves, strict=True)]
    dtypes = {part.dtype for part in parts}
    dtype = dtypes.pop() if keep_dtype and len(dtypes) == 1 else np.dtype(np.float32)
    return parts[0].astype(dtype, copy=False) if len(parts) == 1 else np.concatenate(parts, axis=1, dtype=dtype)


def _structure(space: gym.Space[Any]) -> Any:
    """`space` as nested dicts and tuples whose leaves are spaces."""
    if isinstance(space, gym.spaces.Dict):
        return {key: _structure(part) for key, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_structure(part) for part in space.spaces)
    return space


def _leaf_spaces(space: gym.Space[Any]) -> list[gym.Space[Any]]:
    leaves: list[gym.Space[Any]] = tree.flatten(_structure(space))
    for leaf in leaves:
        is_integer = isinstance(leaf, (gym.spaces.Discrete, gym.spaces.MultiDiscrete))
        if is_integer and (np.any(getattr(leaf, "start", 0)) or np.ndim(getattr(leaf, "nvec", 0)) > 1):
            raise ValueError(
                f"Observation space {leaf}: RLlib's `FlattenObservations` encodes one row of integers that start at 0 "
                "only; shift or reshape the observations."
            )
    return leaves


def _flatten_leaf(space: gym.Space[Any], values: Array) -> Array:
    if isinstance(space, gym.spaces.Discrete):
        return _one_hot(values.reshape(-1), int(space.n), space)
    if isinstance(space, gym.spaces.MultiDiscrete):
        columns = values.reshape(len(values), -1)
        sizes = np.asarray(space.nvec).reshape(-1).tolist()
        return np.concatenate([_one_hot(columns[:, i], n, space) for i, n in enumerate(sizes)], axis=1)
    return values.reshape(len(values), -1)


def _one_hot(values: Array, num_values: int, space: gym.Space[Any]) -> Array:
    numbers = values.astype(np.int64)
    wrong = (numbers != values) | (numbers < 0) | (numbers >= num_values)
    if wrong.any():
        raise ValueError(f"{values[wrong][0]} is not one of the {num_values} values of {space}")
    return np.eye(num_values, dtype=np.float32)[numbers]


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
    width = space.high.astype(np.float64) - space.low
    scaled = 2.0 * (actions.astype(np.float64) - space.low) / width - 1.0
    return _checked(scaled, actions, f"the bounds of {space}", where)


def check_module_actions(actions: Array, where: Callable[[int], str]) -> Array:
    """Checks that actions lie in [-1, 1], shape (T, A), and returns them.

    Raises:
        ValueError: Naming the row of the first action outside.
    """
    return _checked(actions.astype(np.float64), actions, "[-1, 1], the range of module actions", where)


def _checked(scaled: Array, actions: Array, allowed: str, where: Callable[[int], str]) -> Array:
    # Negated, because NaN compares false with everything.
    outside = np.flatnonzero(~(np.abs(scaled) <= 1.0 + _BOUND_TOLERANCE).all(axis=1))
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
