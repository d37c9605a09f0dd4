"""`load_policy`: the policy in a file, ready to act."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rllib_calql.policy.file_format import policy_within, unpacked
from rllib_calql.policy.network import PolicyNetwork, array_shapes
from rllib_calql.policy.onnx_session import onnx_policy, opened_model
from rllib_calql.policy.policy import ActionSpace, Policy
from rllib_calql.policy.spaces import Array, ObservationSpace

_ENDINGS = (".npz", ".onnx", ".pt")


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy that `rllib export` wrote to a file. Whatever is in the file, no code of it is run.

    Args:
        path: Of a `.npz` file or a `.pt` file, which need NumPy alone, or of a `.onnx` file, which needs ONNX Runtime.

    Returns:
        A function from observations to actions, see `Policy`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If it is a `.onnx` file and ONNX Runtime is missing, with the command that installs it.
        TypeError: If `path` is none.
        ValueError: If it is no policy file, a damaged one, or one of a newer version.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`path` must be the path of a policy file, got {type(path).__name__}.")
    file = Path(path).expanduser()
    name = f"'{file}'"
    if file.is_dir():
        raise ValueError(
            f"{name} is a folder; if it is a checkpoint, `rllib export {file} policy.npz` writes its policy."
        )
    if file.suffix.lower() not in _ENDINGS:
        raise ValueError(
            f"{name} must end in {', '.join(_ENDINGS[:-1])} or {_ENDINGS[-1]}, as the files that `rllib export` writes."
        )
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no policy file {name}; `rllib export CHECKPOINT {file}` writes it."
        ) from None
    if file.suffix.lower() == ".onnx":
        return _made(partial(onnx_policy, *opened_model(content, name)), name)
    return policy_of(policy_within(content, name) if file.suffix.lower() == ".pt" else content, name)


def policy_of(content: bytes, name: str) -> Policy:
    """The policy in the content of a `.npz` file.

    Args:
        content: Of the file.
        name: What messages call it.

    Raises:
        ValueError: If it is no policy file, a damaged one, or one of a newer version.
    """
    return _made(partial(numpy_policy, *unpacked(content, name)), name)


def _made(make: Callable[[], Policy], name: str) -> Policy:
    try:
        return make()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as err:
        raise ValueError(f"{name} is no policy file that this version can use: {_said(err)}.") from err


def numpy_policy(metadata: Mapping[str, Any], arrays: Mapping[str, Array]) -> Policy:
    """The policy of metadata and arrays, run by NumPy.

    Raises:
        ValueError: If they do not belong together.
    """
    observation_space = ObservationSpace(metadata["observation_space"])
    action_space = ActionSpace(metadata["action_space"])
    settings = metadata["network"]
    sees_images = settings["image"] is not None
    if sees_images and [list(leaf.shape) for leaf in observation_space.leaves] != [list(settings["image"]["shape"])]:
        raise ValueError("the network sees other images than the observation space has")
    num_numbers = sum(leaf.size for leaf in observation_space.leaves)
    expected = array_shapes(settings, num_numbers=num_numbers, num_actions=len(action_space.free))
    found = {key: array.shape for key, array in arrays.items()}
    if found != expected:
        wrong = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        raise ValueError(f"its arrays {wrong} are not those of its network")
    network = PolicyNetwork(settings, arrays)

    def outputs(leaves: list[Array], explore: bool) -> tuple[Array, Array | None]:
        mean, raw_log_std = network(leaves[0] if sees_images else observation_space.encoded(leaves))
        return mean, network.log_std(raw_log_std) if explore else None

    return Policy(metadata, observation_space=observation_space, action_space=action_space, outputs=outputs)


def _said(err: Exception) -> str:
    return f"its metadata lack {err}" if isinstance(err, KeyError) else str(err)
