"""Which spaces can be learned on, and what makes two of them the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

Description = Mapping[str, Any]

_BYTE = 255
_FEW_PIXELS = 1024  # The largest boards of games have fewer fields.
_LONGEST_EDGE = 4  # Times the shorter edge of a picture.
_FEW_CHANNELS = 4  # A last axis of so many is one of channels, whatever the first one is.
WIDEST = 1e12  # Action bounds beyond it are a way to say that there are none.
_LEAST_STEPS = 1000  # Numbers of the space's type that bounds must have between them.
_MAX_AXES = 5  # 120 orders are tried.


def is_flat(space: gym.Space[Any]) -> bool:
    """Whether observations of this space are one vector of real numbers already."""
    return isinstance(space, gym.spaces.Box) and len(space.shape) == 1


def is_image(space: gym.Space[Any]) -> bool:
    """Whether observations of this space are images, height x width x channels of bytes."""
    return isinstance(space, gym.spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8


def is_flat_or_image(space: gym.Space[Any]) -> bool:
    """Whether env runners hand observations of this space to the module as they are, others being flattened first."""
    return is_flat(space) or is_image(space)


# --- Observations -----------------------------------------------------------------------------------------------------


def check_observation_space(space: gym.Space[Any], name: str) -> None:
    """Refuses observations that cannot be learned from as they are.

    Args:
        space: The environment's observation space, before flattening.
        name: What it is called in the message.

    Raises:
        ValueError: If a part is of no fixed size or empty, or holds images where none are expected or with the channels
            first.
    """
    for path, leaf in leaves_of(space):
        part = name if path == "" else f"{name}, part {path!r},"
        if isinstance(leaf, (gym.spaces.Dict, gym.spaces.Tuple)) or (leaf.shape is not None and 0 in leaf.shape):
            raise ValueError(f"{part} holds no number, {leaf}; drop it, for it says nothing.")
        if isinstance(leaf, gym.spaces.Box):
            _check_box(leaf, part, is_part=path != "")
        elif not isinstance(leaf, (gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)):
            raise ValueError(
                f"{part} is a {type(leaf).__name__} space, {leaf}, which is no vector of a fixed length; encode it as "
                "a Box, for example with `gymnasium.wrappers.TransformObservation`."
            )


def leaves_of(space: gym.Space[Any], path: str = "") -> Iterator[tuple[str, gym.Space[Any]]]:
    """Path and space of every part that has none itself, in the order in which they are flattened.

    Raises:
        ValueError: If keys of a Dict have no order.
    """
    if isinstance(space, gym.spaces.Dict) and space.spaces:
        for key in sorted_keys(space):
            yield from leaves_of(space[key], f"{path}/{key}" if path else str(key))
    elif isinstance(space, gym.spaces.Tuple) and space.spaces:
        for number, part in enumerate(space.spaces):
            yield from leaves_of(part, f"{path}/{number}" if path else str(number))
    else:
        yield path, space


def sorted_keys(space: gym.spaces.Dict) -> list[Any]:
    """Keys in the order in which RLlib and this package flatten them, whatever the order of the space is."""
    try:
        return sorted(space.spaces)
    except TypeError as err:
        raise ValueError(
            f"The keys {list(space.spaces)!r} of a Dict space have no order ({err}); use strings."
        ) from err


def _check_box(space: gym.spaces.Box, name: str, *, is_part: bool) -> None:
    shape = space.shape
    # Bytes of a smaller range are counts or flags, unless they are many in rows and columns. 255 is what pictures and
    # memory dumps reach.
    is_picture = len(shape) >= 2 and space.high.size >= _FEW_PIXELS
    if space.dtype != np.uint8 or space.high.size == 0 or (space.high.max() < _BYTE and not is_picture):
        return
    if is_part:
        remedy = "give the environment the images alone, Box(H, W, C), or scaled numbers of a float type"
        raise ValueError(
            f"{name} holds bytes, {space}; images are encoded only where they are the whole observation, "
            f"and raw bytes are no input of a network of vectors: {remedy}."
        )
    if len(shape) == 3:
        # Channels are far fewer than pixels along an edge; a last axis of 1 to 4 settles it. The edges of a picture are
        # of similar length, those of a strip of sensors with many channels are not.
        edges = shape[1:]
        if shape[2] > _FEW_CHANNELS and 2 * shape[0] <= min(edges) and max(edges) <= _LONGEST_EDGE * min(edges):
            raise ValueError(
                f"{name} has the channels first, as its shape {shape} shows; images are (height, width, channels): "
                "wrap the environment with `gymnasium.wrappers.TransformObservation` and "
                f"`numpy.transpose(obs, (1, 2, 0))`, which gives {(*shape[1:], shape[0])}. "
                "If the last axis is that of channels, scale the numbers to a float type, such as `obs / 255`, in the "
                "environment and the data."
            )
        return
    remedies = {
        2: f"add the axis of channels, `obs[:, :, None]`, which gives {(*shape, 1)}",
        4: "merge the frames into the channels, (height, width, frames * channels), by `numpy.concatenate(obs, -1)`",
    }
    remedy = remedies.get(
        len(shape), "scale them to a float type, such as `obs / 255`, in the environment and the data"
    )
    raise ValueError(
        f"{name} holds bytes of shape {shape}; images are (height, width, channels), and raw bytes are "
        f"no input of a network of vectors: {remedy}; `gymnasium.wrappers.TransformObservation` does it."
    )


def reordering(shape: tuple[int, ...], expected: tuple[int, ...]) -> str | None:
    """What turns rows of one shape into those of another that has as many numbers; None if it has not.

    Args:
        shape: Shape of a row in the data.
        expected: Shape of a row by the space.
    """
    if math.prod(shape) != math.prod(expected):
        return None
    if sorted(shape) == sorted(expected) and len(shape) <= _MAX_AXES:
        orders = itertools.permutations(range(len(shape)))
        # Channels moved from one end to the other keep the order of the picture's axes, which is meant most often.
        ends = [(*range(1, len(shape)), 0), (len(shape) - 1, *range(len(shape) - 1))]
        order = next(o for o in (*ends, *orders) if tuple(shape[axis] for axis in o) == expected)
        return f"transpose them, `array.transpose{(0, *(axis + 1 for axis in order))}`, all rows at once"
    if [n for n in shape if n != 1] == [n for n in expected if n != 1]:
        return f"reshape them to {expected}, an axis of 1 is the only difference"
    return f"bring them into the shape {expected} by what their axes mean, or store flat rows of {math.prod(shape)}"


# --- Comparison -------------------------------------------------------------------------------------------------------


def description_of(space: gym.Space[Any]) -> dict[str, Any]:
    """Kind, structure and shape of a space, JSON-safe. Bounds and types of numbers are left out, they may differ."""
    if isinstance(space, gym.spaces.Dict):
        return {"kind": "Dict", "parts": {str(key): description_of(space[key]) for key in sorted_keys(space)}}
    if isinstance(space, gym.spaces.Tuple):
        return {"kind": "Tuple", "parts": {str(i): description_of(part) for i, part in enumerate(space.spaces)}}
    if isinstance(space, gym.spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, gym.spaces.MultiDiscrete):
        start = np.broadcast_to(space.start, space.nvec.shape)
        return {"kind": "MultiDiscrete", "n": space.nvec.tolist(), "start": start.tolist()}
    kind = "image" if is_image(space) else type(space).__name__
    return {"kind": kind, "shape": list(space.shape or ())}


def space_of_description(description: Description) -> gym.Space[Any]:
    """A space of which `description_of` says the same; bounds of numbers are infinite."""
    kind = description["kind"]
    if kind == "Dict":
        return gym.spaces.Dict({key: space_of_description(part) for key, part in description["parts"].items()})
    if kind == "Tuple":
        return gym.spaces.Tuple([space_of_description(part) for part in description["parts"].values()])
    if kind == "Discrete":
        return gym.spaces.Discrete(description["n"], start=description["start"])
    if kind == "MultiDiscrete":
        return gym.spaces.MultiDiscrete(np.array(description["n"]), start=np.array(description["start"]))
    shape = tuple(description["shape"])
    if kind == "image":
        return gym.spaces.Box(0, 255, shape, np.uint8)
    if kind == "MultiBinary":
        return gym.spaces.MultiBinary(shape)
    return gym.spaces.Box(-np.inf, np.inf, shape, np.float32)


def difference_of(one: Description, other: Description, path: str = "") -> str | None:
    """What is different in two descriptions, None if nothing is.

    The text goes on after the name of the first one: "in its part 'pos' has shape [2] against [3]".
    """
    what = f"in its part {path!r} " if path else ""
    if one["kind"] != other["kind"]:
        return f"{what}is {one['kind']} against {other['kind']}"
    if "parts" not in one:
        wrong = [name for name in one if one[name] != other[name]]
        return f"{what}has {wrong[0]} {one[wrong[0]]} against {other[wrong[0]]}" if wrong else None
    for key in sorted(one["parts"].keys() ^ other["parts"].keys()):
        return what + (
            f"has the part {key!r}, which the latter lacks" if key in one["parts"] else f"lacks the part {key!r}"
        )
    found = (
        difference_of(one["parts"][key], other["parts"][key], f"{path}/{key}" if path else key) for key in one["parts"]
    )
    return next((difference for difference in found if difference is not None), None)


def is_flattening(one: Description, other: Description) -> bool:
    """Whether one of two descriptions of as many numbers is that of a flat vector, the other of a Dict or Tuple."""
    kinds = {description["kind"]: description for description in (one, other)}
    return "Box" in kinds and len(kinds["Box"]["shape"]) == 1 and not {"Dict", "Tuple"}.isdisjoint(kinds)


# --- Actions ----------------------------------------------------------------------------------------------------------


def check_action_space(space: gym.Space[Any], name: str) -> None:
    """Refuses action spaces that [-1, 1]^A can't be mapped to.

    Args:
        space: Action space.
        name: What it is called in the message.

    Raises:
        ValueError: If the space is not a bounded, one-dimensional Box of real numbers whose bounds can be resolved.
    """
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
        raise ValueError(f"{name} must be a Box(n,) of real numbers, got {space}; use an algorithm for such actions.")
    if space.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"{name} must be of float32 or float64, got {space}: RLlib maps actions to the bounds of these types only."
        )
    if not space.is_bounded():
        raise ValueError(f"{name} must be bounded, got {space}; wrap the environment so that its actions are.")
    check_bounds(space, name)
    if fixed_dimensions(space).all():
        raise ValueError(f"{name} leaves no choice, got {space}; at least one dimension needs low < high.")


def check_bounds(space: gym.spaces.Box, name: str) -> None:
    """Refuses bounds between which [-1, 1] cannot be told apart, because they are too far from each other or too near.

    Raises:
        ValueError: Naming the first such dimension.
    """
    low, high = space.low.astype(np.float64).reshape(-1), space.high.astype(np.float64).reshape(-1)
    if not (low <= high).all():  # NaN as well. Gymnasium refuses them, but arrays can be changed later.
        raise ValueError(f"{name} must have low <= high in every dimension, got {space}; mend the bounds.")
    remedy = (
        "give the environment the bounds that its actuators have, for example by "
        "`gymnasium.wrappers.TransformAction(env, lambda action: action, Box(low, high))`"
    )
    too_wide = (low < -WIDEST) | (high > WIDEST)
    if too_wide.any():
        index = int(np.argmax(too_wide))
        raise ValueError(
            f"{name} is bounded by [{low[index]:g}, {high[index]:g}] in dimension {index}, as good as unbounded: the "
            f"policy spreads over all of it, and bounds beyond {WIDEST:g} leave nothing of ordinary actions; {remedy}."
        )
    steps = np.spacing(np.maximum(np.abs(low), np.abs(high)).astype(space.dtype)).astype(np.float64)
    too_narrow = (high > low) & (high - low < _LEAST_STEPS * steps)
    if too_narrow.any():
        index = int(np.argmax(too_narrow))
        raise ValueError(
            f"{name} is bounded by [{float(low[index])}, {float(high[index])}] in dimension {index}, between which "
            f"{space.dtype} has fewer than {_LEAST_STEPS} numbers; subtract an offset in the environment, for example "
            "with `gymnasium.wrappers.TransformAction`, or give the space float64."
        )


def fixed_dimensions(space: gym.spaces.Box) -> npt.NDArray[np.bool_]:
    """Dimensions of a flat action space with low == high, which leave no choice, shape (A,)."""
    fixed: npt.NDArray[np.bool_] = np.equal(space.low, space.high).reshape(-1)
    return fixed
