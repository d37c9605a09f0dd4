"""Episodes that RLlib packed with msgpack, restored without what would unpickle: arrays of objects and of spaces."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import msgpack
import numpy as np
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.datasets.decoding.safe_decoding import npy_from_text, number_or_text_type

_MAX_SPACE_BYTES = 2**28  # Of all arrays of the spaces of one episode.
_BUFFERS = ("observations", "actions", "rewards", "infos")
_SPACES = ("_observation_space", "_action_space")


def unpacked_episode(packed: bytes) -> SingleAgentEpisode:
    """The episode in what `msgpack.packb(episode.get_state(), default=msgpack_numpy.encode)` made.

    Raises:
        ValueError: If it holds Python objects.
        Exception: Whatever the damage of the bytes causes in msgpack and RLlib.
    """
    state = dict(msgpack.unpackb(packed, object_hook=_decoded, strict_map_key=False))
    room = _Room(_MAX_SPACE_BYTES)
    spaces = [_space_or_none(state[name], room) for name in _SPACES]
    # RLlib reads the arrays of spaces by `numpy.load(..., allow_pickle=True)`, so it gets none to read.
    state.update(dict.fromkeys(_SPACES))
    state.update({name: _without_space(state[name]) for name in _BUFFERS})
    for name, space in zip(("observations", "actions"), spaces, strict=True):
        is_steps = not state[name]["finalized"]
        state[name]["data"] = _with_tuples(state[name]["data"], space, is_steps=is_steps)
        if not is_steps and _holds_lists(state[name]["data"]):
            raise ValueError(
                f"its `{name}` are a list of parts, and no Tuple space is recorded with them that says what the parts "
                "are: record the episode with its spaces, or before `to_numpy()`"
            )
    outputs = state["extra_model_outputs"] or {}
    state["extra_model_outputs"] = {name: _without_space(buffer) for name, buffer in outputs.items()}
    episode = SingleAgentEpisode.from_state(state)
    episode.observation_space, episode.action_space = spaces
    return episode.to_numpy()


def _decoded(fields: dict[Any, Any]) -> Any:
    """Restores what `msgpack_numpy.encode` made a dict of; its own `decode` unpickles arrays of objects."""
    if b"nd" in fields and b"type" in fields and b"data" in fields:
        if fields.get(b"kind", b"") != b"":
            raise ValueError("it holds an array of Python objects or structures, where only numbers and text are read")
        dtype = number_or_text_type(fields[b"type"])
        if fields[b"nd"] is not True:
            return np.frombuffer(fields[b"data"], dtype)[0]
        return np.ndarray(fields[b"shape"], dtype, fields[b"data"])
    if b"complex" in fields and b"data" in fields:
        text = fields[b"data"]
        return complex(text.decode() if isinstance(text, bytes) else text)
    return fields


def _without_space(buffer: Any) -> dict[str, Any]:
    return {**buffer, "space": None}


def _holds_lists(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_lists, value.values()))
    return any(map(_holds_lists, value)) if isinstance(value, tuple) else isinstance(value, list)


def _with_tuples(value: Any, space: gym.Space[Any] | None, *, is_steps: bool) -> Any:
    """Makes lists of parts the tuples again that they were before msgpack, which knows lists only.

    Args:
        value: What a buffer holds.
        space: The recorded space, which alone tells a list of parts from a list of steps.
        is_steps: Whether the value is a list of steps rather than the arrays of all steps.
    """
    if is_steps:
        return [_with_tuples(step, space, is_steps=False) for step in value]
    if isinstance(space, gym.spaces.Tuple) and isinstance(value, list):
        if len(value) != len(space.spaces):
            raise ValueError(f"it holds {len(value)} parts where its Tuple space has {len(space.spaces)}")
        return tuple(_with_tuples(part, of, is_steps=False) for part, of in zip(value, space.spaces, strict=True))
    if isinstance(space, gym.spaces.Dict) and isinstance(value, dict):
        return {key: _with_tuples(part, space.spaces.get(key), is_steps=False) for key, part in value.items()}
    return value


class _Room:
    """What is left of the bytes that the arrays of an episode's spaces may take."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes

    def array(self, text: Any) -> np.ndarray[Any, Any]:
        """The array in a text of RLlib's."""
        array = npy_from_text(text, self._num_bytes)
        self._num_bytes -= array.nbytes
        return array


def _space_or_none(fields: Any, room: _Room) -> gym.Space[Any] | None:
    """The space; None if none was recorded, or one of RLlib's own, which hold no plain numbers."""
    try:
        return _space_of(fields, room) if fields else None
    except NotImplementedError:
        return None


def _space_of(fields: Any, room: _Room) -> gym.Space[Any]:
    """What RLlib's `gym_space_to_dict` made a dict of."""
    match fields["space"]:
        case "box":
            low, high = room.array(fields["low"]), room.array(fields["high"])
            if not low.shape == high.shape == tuple(fields["shape"]):
                raise ValueError(f"the bounds of a space have the shapes {low.shape} and {high.shape}")
            return gym.spaces.Box(low, high, dtype=number_or_text_type(fields["dtype"]).type)
        case "discrete":
            return gym.spaces.Discrete(int(fields["n"]), start=int(fields.get("start", 0)))
        case "multi-binary":
            return gym.spaces.MultiBinary(fields["n"])
        case "multi-discrete":
            nvec = room.array(fields["nvec"])
            return gym.spaces.MultiDiscrete(nvec, dtype=number_or_text_type(fields["dtype"]).type)
        case "tuple":
            return gym.spaces.Tuple([_space_of(part, room) for part in fields["spaces"]])
        case "dict":
            # Pairs keep the order of the keys, which gymnasium sorts otherwise.
            return gym.spaces.Dict([(name, _space_of(part, room)) for name, part in fields["spaces"].items()])
        case "text":
            lengths = {name: int(fields[name]) for name in ("min_length", "max_length")}
            return gym.spaces.Text(**lengths, charset=fields["charset"])
        case "simplex" | "repeated" | "flex_dict":
            raise NotImplementedError
        case kind:
            raise ValueError(f"there is no space {kind!r}")
