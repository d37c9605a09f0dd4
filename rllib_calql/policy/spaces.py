"""Observations of the environment, checked against their space, as the rows of numbers that networks see.

A space is described by plain dictionaries, which JSON takes, so that Gymnasium is not needed to run a policy:

* `{"kind": "Box", "shape": [3], "dtype": "float32"}`, the same for `MultiBinary`
* `{"kind": "Discrete", "n": 4, "start": 0}`, `{"kind": "MultiDiscrete", "n": [2, 3], "start": [0, 0]}`
* `{"kind": "Dict", "keys": ["a", "b"], "parts": [...]}`, keys in sorted order; `{"kind": "Tuple", "parts": [...]}`
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Description = Mapping[str, Any]


def described_space(space: Any) -> dict[str, Any]:
    """The description of an observation space of Gymnasium.

    Raises:
        ValueError: If keys of a Dict are neither strings nor integers, or if the kind of a space is another one.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        keys = sorted(space.spaces)
        if not all(isinstance(key, (str, int)) for key in keys):
            raise ValueError(f"keys of a Dict must be strings or integers, got {keys}")
        return {"kind": "Dict", "keys": keys, "parts": [described_space(space[key]) for key in keys]}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "parts": [described_space(part) for part in space.spaces]}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        start = np.broadcast_to(space.start, space.nvec.shape)
        return {"kind": "MultiDiscrete", "n": space.nvec.tolist(), "start": start.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "shape": list(space.shape), "dtype": "int8"}
    if isinstance(space, spaces.Box):
        return {"kind": "Box", "shape": list(space.shape), "dtype": str(np.dtype(space.dtype))}
    raise ValueError(f"observations of the kind {type(space).__name__} have no fixed size")


@dataclass(frozen=True)
class Leaf:
    """A part of an observation that has no parts itself.

    Attributes:
        path: Keys and numbers that lead to it, "/" between them; empty if it is the whole observation.
        kind: `Box`, `Discrete`, `MultiDiscrete` or `MultiBinary`.
        shape: Of one observation.
        dtype: In which the environment gives it.
        sizes: Number of values of each integer, for `Discrete` and `MultiDiscrete`; else empty.
        starts: The least value of each.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sizes: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How many numbers it becomes."""
        return sum(self.sizes) if self.sizes else math.prod(self.shape)

    def one_hot_columns(self) -> tuple[Array, Array]:
        """For each column of the one-hot form, which integer of the part it is of and which value it stands for.

        Both of shape (size,), int64; for parts with `sizes`.
        """
        integers = np.repeat(np.arange(len(self.sizes)), self.sizes)
        values = [np.arange(size) + start for size, start in zip(self.sizes, self.starts, strict=True)]
        return integers, np.concatenate(values)

    @property
    def told(self) -> str:
        """The kind, as messages say it."""
        if self.kind == "Discrete":
            return f"Discrete({self.sizes[0]}, start={self.starts[0]})"
        if self.kind == "MultiDiscrete":
            return f"MultiDiscrete(n={list(self.sizes)}, start={list(self.starts)})"
        return f"{self.kind}({self.shape}, {self.dtype})"

    def checked(self, value: Any, *, is_batch: bool) -> Array:
        """The values as an array of shape (B, ...) in the environment's type, B = 1 for one observation.

        Raises:
            ValueError: If shape or type are others, or if a number is not finite or not one of the space.
        """
        what = f"The observation's part {self.path!r}" if self.path else "The observation"
        if self._is_as_expected(value, is_batch):  # What control loops give, so it is to take no time.
            array: Array = value if is_batch else value[None]
            if self.dtype.kind == "f":
                refuse_non_finite(array, what, is_batch=is_batch)
            return array
        if isinstance(value, (Mapping, tuple)):
            raise ValueError(f"{what} must be one array for {self.told}, got a {type(value).__name__}.")
        try:
            array = np.asarray(value)
        except (ValueError, TypeError) as err:
            raise ValueError(f"{what} must be one array for {self.told}, got {type(value).__name__}: {err}.") from err
        refuse_masked(value, what)
        kinds = self._kinds()
        if array.dtype.kind not in kinds:
            numbers = "numbers" if "f" in kinds else "integers"
            raise ValueError(f"{what} must hold {numbers} for {self.told}, got values of type {array.dtype}.")
        shape = array.shape[1:] if is_batch and array.ndim else array.shape
        if shape != self.shape or (is_batch and not array.ndim):
            expected = f"(B, {', '.join(map(str, self.shape))})" if is_batch else str(self.shape)
            raise ValueError(f"{what} must have the shape {expected} for {self.told}, got {array.shape}.")
        array = array if is_batch else array[None]
        self._check_values(array, what)
        with np.errstate(over="ignore"):
            converted = array.astype(self.dtype, copy=False)
        if self.dtype.kind == "f":
            refuse_non_finite(converted, what, is_batch=is_batch)
        return converted

    def _is_as_expected(self, value: Any, is_batch: bool) -> bool:
        return (
            type(value) is np.ndarray
            and self.kind == "Box"
            and value.dtype == self.dtype
            and value.ndim == len(self.shape) + is_batch
            and value.shape[is_batch:] == self.shape
        )

    def _kinds(self) -> str:
        if self.kind == "MultiBinary":
            return "iub"
        return "fiu" if self.kind == "Box" and self.dtype.kind == "f" else "iu"

    def _check_values(self, array: Array, what: str) -> None:
        if self.dtype.kind == "f":
            return
        if self.sizes:
            values = array.reshape(len(array), len(self.sizes))
            starts = np.array(self.starts)
            wrong = (values < starts) | (values >= starts + np.array(self.sizes))
        elif self.kind == "MultiBinary":
            values = array
            wrong = (values != 0) & (values != 1)
        else:
            values, limits = array, np.iinfo(self.dtype)
            wrong = (values < limits.min) | (values > limits.max)
        if wrong.any():
            raise ValueError(f"{what} holds {values[wrong][0]}, which is no value of {self.told}.")

    def encoded(self, array: Array) -> Array:
        """What networks see of checked values, shape (B, size), float32; integers of classes are one-hot."""
        if not self.sizes:
            return array.reshape(len(array), self.size).astype(np.float32, copy=False)
        places = array.reshape(len(array), len(self.sizes)).astype(np.int64) - np.array(self.starts)
        begins = np.cumsum([0, *self.sizes[:-1]])
        rows = np.zeros((len(array), self.size), np.float32)
        rows[np.arange(len(array))[:, None], begins + places] = 1.0
        return rows


def refuse_masked(value: Any, what: str) -> None:
    """Raises ValueError for an array of NumPy's with masked numbers, which stand for none."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(f"{what} has masked numbers; fill them: `numpy.ma.filled(value, number)`.")


def refuse_non_finite(array: Array, what: str, *, is_batch: bool) -> None:
    """Raises ValueError for NaN and infinity, or what is infinite in float32, with the place of the first.

    Args:
        array: Shape (B, ...).
        what: What messages call one of the B.
        is_batch: Whether messages say which of them it is.
    """
    if array.dtype.itemsize > 4:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    # Twice as fast for few numbers as to look at each; large ones overflow, of which `dot` would warn.
    if math.isfinite(np.vdot(array, array)):
        return
    finite = np.isfinite(array)
    if not finite.all():
        row, *place = (int(axis[0]) for axis in np.nonzero(~finite))
        where = f" at {tuple(place) if len(place) > 1 else place[0]}" if place else ""
        of_batch = f" in row {row} of the batch" if is_batch else ""
        raise ValueError(f"{what} holds {array[~finite][0]}{where}{of_batch}; all numbers must be finite.")


class ObservationSpace:
    """Checks observations of one space and tells their leaves.

    Args:
        description: As `described_space` makes it.

    Attributes:
        leaves: In the order in which networks see them.
    """

    def __init__(self, description: Description) -> None:
        self._description = description
        self.leaves = tuple(_leaves(description, ""))
        # What most systems have, and what is to take no time.
        self._is_vector = len(self.leaves) == 1 and self.leaves[0].kind == "Box" and len(self.leaves[0].shape) == 1

    def checked(self, observation: Any, *, is_batch: bool) -> list[Array]:
        """The leaves' values, each of shape (B, ...); B = 1 for one observation.

        Args:
            observation: In the structure of the space; every leaf of a batch has a first axis for its B observations.
            is_batch: Whether it is a batch.

        Raises:
            ValueError: Naming the part, what is expected and what it got.
        """
        values = list(_matched(self._description, observation, ""))
        arrays = [leaf.checked(value, is_batch=is_batch) for leaf, value in zip(self.leaves, values, strict=True)]
        if len({len(array) for array in arrays}) > 1:
            lengths = {leaf.path: len(array) for leaf, array in zip(self.leaves, arrays, strict=True)}
            raise ValueError(f"The observation's parts must hold as many observations each, got {lengths}.")
        return arrays

    def encoded(self, arrays: list[Array]) -> Array:
        """Rows of float32, shape (B, number of numbers), of checked leaves."""
        if self._is_vector:
            return arrays[0].astype(np.float32, copy=False)
        rows = [leaf.encoded(array) for leaf, array in zip(self.leaves, arrays, strict=True)]
        return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)


def _leaves(space: Description, path: str) -> Iterator[Leaf]:
    kind = space["kind"]
    if kind in ("Dict", "Tuple"):
        names = space["keys"] if kind == "Dict" else range(len(space["parts"]))
        for name, part in zip(names, space["parts"], strict=True):
            yield from _leaves(part, f"{path}/{name}" if path else str(name))
    elif kind in ("Discrete", "MultiDiscrete"):
        n, start = np.array(space["n"], np.int64), np.array(space["start"], np.int64)
        sizes, starts = tuple(map(int, n.reshape(-1))), tuple(map(int, start.reshape(-1)))
        yield Leaf(path, kind, n.shape, np.dtype(np.int64), sizes, starts)
    elif kind in ("Box", "MultiBinary"):
        dtype = np.dtype(space["dtype"])
        if dtype.kind not in "fiu":
            raise ValueError(f"numbers of the type {dtype} are not known")
        yield Leaf(path, kind, tuple(map(int, space["shape"])), dtype)
    else:
        raise ValueError(f"observations of the kind {kind!r} are not known")


def _matched(space: Description, value: Any, path: str) -> Iterator[Any]:
    """The value of every leaf, in the order of `_leaves`."""
    what = f"The observation's part {path!r}" if path else "The observation"
    if space["kind"] == "Dict":
        keys = space["keys"]
        if not isinstance(value, Mapping):
            raise ValueError(f"{what} must be a dict with the keys {keys}, got {_told(value)}.")
        missing, unknown = [key for key in keys if key not in value], [key for key in value if key not in keys]
        if missing or unknown:
            parts = [f"{word} {wrong}" for word, wrong in (("lacks", missing), ("has the unknown", unknown)) if wrong]
            raise ValueError(f"{what} must be a dict with the keys {keys}; it {' and '.join(parts)}.")
        for key, part in zip(keys, space["parts"], strict=True):
            yield from _matched(part, value[key], f"{path}/{key}" if path else str(key))
    elif space["kind"] == "Tuple":
        parts = space["parts"]
        if not isinstance(value, (tuple, list)) or len(value) != len(parts):
            raise ValueError(f"{what} must be a tuple of {len(parts)} parts, got {_told(value)}.")
        for number, (part, one) in enumerate(zip(parts, value, strict=True)):
            yield from _matched(part, one, f"{path}/{number}" if path else str(number))
    else:
        yield value


def _told(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")
