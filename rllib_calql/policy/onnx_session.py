"""A policy that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rllib_calql.policy.file_format import ONNX_METADATA, OUTPUTS, check_onnx_seal, observation_names, parsed_metadata
from rllib_calql.policy.policy import ActionSpace, Policy
from rllib_calql.policy.spaces import Array, ObservationSpace


def opened_model(content: bytes, name: str) -> tuple[Any, dict[str, Any]]:
    """A session of ONNX Runtime with the model of a policy file, and the metadata in it.

    Args:
        content: Of the file.
        name: What messages call it.

    Raises:
        ImportError: If ONNX Runtime is missing.
        ValueError: If it is no policy file, a damaged one, or one of a newer version.
    """
    check_onnx_seal(content, name)
    try:
        import onnxruntime
    except ImportError as err:
        raise ImportError(
            f"{name} needs ONNX Runtime: pip install onnxruntime. An exported .npz needs NumPy alone. ({err})"
        ) from err
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # More are slower for such small products.
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map.get(ONNX_METADATA, "")
    except Exception as err:  # ONNX Runtime has a class for each of its errors, with no base but this one.
        raise ValueError(f"{name} is no policy file that ONNX Runtime can use: {err}") from err
    return session, parsed_metadata(text, name)


def onnx_policy(session: Any, metadata: Mapping[str, Any]) -> Policy:
    """The policy in a session; samples are made of its Gaussian as in other policies.

    Raises:
        ValueError: If session and metadata do not belong together.
    """
    observation_space = ObservationSpace(metadata["observation_space"])
    action_space = ActionSpace(metadata["action_space"])
    names = observation_names(observation_space)
    if (found := [one.name for one in session.get_inputs()]) != names:
        raise ValueError(f"the model has the inputs {found}, its observation space {names}")
    if missing := sorted(set(OUTPUTS) - {one.name for one in session.get_outputs()}):
        raise ValueError(f"the model lacks the outputs {missing}")
    free = None if len(action_space.free) == metadata["action_space"]["shape"][0] else action_space.free

    def run(leaves: list[Array], *wanted: str) -> list[Array]:
        feeds = {name: np.ascontiguousarray(leaf) for name, leaf in zip(names, leaves, strict=True)}
        return list(session.run(wanted, feeds))

    def outputs(leaves: list[Array], explore: bool) -> tuple[Array, Array | None]:
        mean, log_std = run(leaves, "mean", "log_std")
        return (mean, log_std) if free is None else (mean[:, free], log_std[:, free])

    def greedy(leaves: list[Array]) -> Array:
        return run(leaves, "action")[0]

    return Policy(
        metadata, observation_space=observation_space, action_space=action_space, outputs=outputs, greedy=greedy
    )
