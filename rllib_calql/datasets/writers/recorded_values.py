"""What policies return and environments emit, as the numbers and arrays that are recorded."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch


def one_number(value: Any, what: str) -> float:
    """A reward or flag as one number; arrays of one number are unwrapped.

    Args:
        value: What an environment's `step` returned.
        what: Its name, for the message.

    Raises:
        TypeError: If it is anything else.
    """
    array = _array(value)
    if array is None or array.size != 1 or array.dtype.kind not in "fiub":
        raise TypeError(
            f"The environment's `step` returned {_described(value)} as {what}, which must be one number; wrap the "
            "environment."
        )
    return float(array.reshape(()))


def action_of(returned: Any, space: gym.Space[Any]) -> Any:
    """The action in what a callable policy returned: tensors become arrays.

    Stable-Baselines3's `predict` returns an action and the state of a recurrent policy, None for all others.

    Args:
        returned: What the policy returned.
        space: The environment's action space.

    Raises:
        TypeError: If it is no action of the space's structure and shape.
    """
    is_pair = isinstance(returned, tuple) and len(returned) == 2 and not isinstance(space, gym.spaces.Tuple)
    if is_pair and returned[1] is None:
        return _action(returned[0], space)
    try:
        return _action(returned, space)
    except TypeError as err:
        if not is_pair:
            raise
        raise TypeError(
            f"The policy returned two values, {_described(returned[0])} and {_described(returned[1])}, where an action "
            f"of {space} is expected; if these are an action and the state of a recurrent policy, as "
            "Stable-Baselines3's `predict` returns them, pass a callable that keeps the state and returns the action "
            "alone; otherwise `lambda obs: policy(obs)[0]`."
        ) from err


def _action(value: Any, space: gym.Space[Any]) -> Any:
    if isinstance(space, gym.spaces.Dict):
        if not isinstance(value, dict) or value.keys() != space.spaces.keys():
            raise _no_action(value, space)
        return {key: _action(value[key], inner) for key, inner in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        if not isinstance(value, (tuple, list)) or len(value) != len(space.spaces):
            raise _no_action(value, space)
        return tuple(_action(part, inner) for part, inner in zip(value, space.spaces, strict=True))
    array = _array(value)
    if array is None or array.dtype.kind not in "fiub" or not _fits(array.shape, space.shape):
        raise _no_action(value, space)
    return array if isinstance(value, torch.Tensor) else value


def _fits(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> bool:
    # Environments with one action take it as a number, too.
    return expected is None or shape == expected or (shape == () and np.prod(expected) == 1)


def _no_action(value: Any, space: gym.Space[Any]) -> TypeError:
    array = _array(value)
    remedy = "return an array of that shape"
    if array is not None and space.shape is not None and array.shape == (1, *space.shape):
        remedy = "it has an axis for a batch: return its first entry"
    elif isinstance(value, tuple) and value:
        remedy = "return the action alone: `lambda obs: policy(obs)[0]`"
    return TypeError(f"The policy returned {_described(value)}, which is no action of {space}; {remedy}.")


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    """The value as an array; None if it is not regular."""
    if isinstance(value, torch.Tensor):
        return np.asarray(value.detach().cpu())
    try:
        return np.asarray(value)
    except (ValueError, TypeError):
        return None


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    return "None" if value is None else f"{type(value).__name__} {str(value)[:60]}"
