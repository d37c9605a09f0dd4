"""From whole episodes to rows of the store: module actions, scaled rewards, what may be stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.common.returns import RewardSettings
from rllib_calql.common.spaces import fixed_dimensions
from rllib_calql.networks.actor_critic import DATA_ACTION_LIMIT
from rllib_calql.store.returns_connector import TAIL_DISCOUNT

Array = npt.NDArray[Any]
_BOUND_TOLERANCE = 1e-5  # Relative to the width of the bounds: actions recorded in float32 may stand just outside.


class NotFiniteError(ValueError):
    """An episode holds numbers that cannot be stored."""


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
            f"{where(row)}: action {actions[row].tolist()} is outside {allowed}; check their units, "
            "clip the recorded actions, or set `action_space_of_data` to what they are."
        )
    return scaled


def with_executed(
    actions: Array,
    executed: Array,
    is_executed: npt.NDArray[np.bool_],
    space: gym.spaces.Box,
    where: Callable[[int], str],
) -> Array:
    """Module actions with those in their place that the system executed.

    Args:
        actions: Module actions, shape (T, A).
        executed: What was executed, in environment units, shape (T, A).
        is_executed: Of which steps that is known, shape (T,).
        space: The environment's action space.
        where: Says where a row was read, if its action stands outside.

    Returns:
        Module actions, shape (T, A).

    Raises:
        ValueError: Naming the row of the first executed action outside the bounds.
    """
    rows = np.flatnonzero(is_executed)
    replaced = np.array(actions, dtype=np.float64)
    replaced[rows] = to_module_actions(executed[rows], space, lambda row: where(int(rows[row])))
    return replaced


def num_replaced(asked_for: Array, stored: Array, is_executed: npt.NDArray[np.bool_], space: gym.spaces.Box) -> int:
    """Steps whose stored action is another one than was asked for, by more than a rounding.

    Args:
        asked_for: Module actions, shape (T, A).
        stored: Those executed in their place, as they are stored, shape (T, A).
        is_executed: Of which steps an executed action is known, shape (T,).
        space: The environment's action space.
    """
    free = ~fixed_dimensions(space)
    difference = np.abs(clipped_actions(asked_for)[:, free] - stored[:, free])
    return int(np.count_nonzero(is_executed & (difference > 2.0 * _BOUND_TOLERANCE).any(axis=1)))


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
        NotFiniteError: Naming the first such step.
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
        raise NotFiniteError(
            f"Online episode {episode_id}, step {bad[0]}: {what} with NaN or infinity in float32, "
            f"{values[bad[0]].tolist()}; mend it, or let it end the episode before."
        )
