"""How observations become the flat rows that networks see, those of data and those of env runners alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from rllib_calql.common.spaces import is_flat_or_image, leaves_of, reordering, sorted_keys

Array = npt.NDArray[Any]


def flat_size(space: gym.Space[Any]) -> int:
    """Size of one flattened observation of `space`."""
    return gym.spaces.utils.flatdim(space)


def flat_names(space: gym.Space[Any]) -> list[str]:
    """What to call each number of a flattened observation: `'setpoint'[0]` in a Dict, `[3]` in a vector."""
    return [
        f"{leaf_name(path)}{place}"
        for path, leaf in leaves_of(space)
        for place in flat_places(leaf.shape, flat_size(leaf))
    ]


def leaf_name(path: str) -> str:
    """The name of a part in messages; empty for an observation without parts."""
    return repr(path) if path else ""


def flat_places(shape: tuple[int, ...] | None, size: int) -> list[str]:
    """The index of each of `size` numbers: by the axes of `shape` where it has as many, else (one-hot) in a row."""
    if shape is None or math.prod(shape) != size:
        shape = (size,)
    if shape == ():
        return [""]
    return [f"[{', '.join(map(str, index))}]" for index in np.ndindex(*shape)]


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
