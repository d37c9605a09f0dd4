"""The policy as an ONNX model: from raw observations, one input for each part, to actions of the environment.

Operators of opset 17, as few as there can be: for one observation each takes longer to begin than to compute.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rllib_calql.policy.file_format import FORMAT, ONNX_METADATA, observation_names, sealed_onnx
from rllib_calql.policy.network import LOG_STD_BOUNDS
from rllib_calql.policy.policy import ActionSpace
from rllib_calql.policy.spaces import Leaf, ObservationSpace

if TYPE_CHECKING:
    from rllib_calql.export.reading import PolicyData

Array = npt.NDArray[Any]

_OPSET, _IR_VERSION = 17, 8  # Both of 2022, so that runtimes of other makers and years know them.
_OPERATORS = {"relu": "Relu", "tanh": "Tanh", "elu": "Elu", "leaky_relu": "LeakyRelu"}  # With torch's defaults.
_BATCH = "batch"


class _Graph:
    """Nodes and constants in the order in which they are added."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        from onnx import numpy_helper

        name = f"/constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = output or f"/{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def cast(self, value: str, dtype: Any) -> str:
        from onnx import helper

        return self.add("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def onnx_model(data: PolicyData) -> bytes:
    """The content of a `.onnx` file, see `policy/FILES.md`.

    Raises:
        ValueError: If two parts of the observation have the same path.
    """
    from onnx import TensorProto, helper

    observation_space = ObservationSpace(data.metadata["observation_space"])
    action_space = data.metadata["action_space"]
    settings = data.metadata["network"]
    graph = _Graph()
    names = observation_names(observation_space)
    if settings["image"] is not None:
        seen = _image_features(graph, names[0], settings["image"], data.arrays)
    else:
        rows = [_row(graph, leaf, name) for leaf, name in zip(observation_space.leaves, names, strict=True)]
        seen = rows[0] if len(rows) == 1 else graph.add("Concat", *rows, axis=1)
        if settings["normalize"]:
            seen = graph.add("Sub", seen, graph.constant(data.arrays["obs_mean"]))
            seen = graph.add("Div", seen, graph.constant(data.arrays["obs_std"]))
        if settings["clip"] is not None:
            seen = graph.add("Clip", seen, graph.constant(-settings["clip"]), graph.constant(settings["clip"]))
    _add_policy(graph, seen, settings, data.arrays, action_space)
    float_type = helper.np_dtype_to_tensor_dtype
    num_actions = action_space["shape"][0]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "policy",
            [
                helper.make_tensor_value_info(name, float_type(leaf.dtype), [_BATCH, *leaf.shape])
                for leaf, name in zip(observation_space.leaves, names, strict=True)
            ],
            [
                helper.make_tensor_value_info(
                    "action", float_type(np.dtype(action_space["dtype"])), [_BATCH, num_actions]
                ),
                helper.make_tensor_value_info("mean", TensorProto.FLOAT, [_BATCH, num_actions]),
                helper.make_tensor_value_info("log_std", TensorProto.FLOAT, [_BATCH, num_actions]),
            ],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="rllib-calql",
    )
    helper.set_model_props(model, {ONNX_METADATA: json.dumps({"format": FORMAT, **data.metadata}, allow_nan=False)})
    content: bytes = model.SerializeToString(deterministic=True)
    return sealed_onnx(content)


def _row(graph: _Graph, leaf: Leaf, name: str) -> str:
    """One leaf as float32, shape (B, size)."""
    if not leaf.sizes:
        numbers = name if leaf.dtype == np.float32 else graph.cast(name, np.float32)
        if len(leaf.shape) == 1:
            return numbers
        return graph.add("Reshape", numbers, graph.constant([0, leaf.size], np.int64))  # 0 is the size that is there.
    columns = graph.add("Reshape", name, graph.constant([0, len(leaf.sizes)], np.int64))
    number_of, values = leaf.one_hot_columns()
    repeated = graph.add("Gather", columns, graph.constant(number_of, np.int64), axis=1)
    return graph.cast(graph.add("Equal", repeated, graph.constant(values, np.int64)), np.float32)


def _image_features(graph: _Graph, name: str, image: Mapping[str, Any], arrays: Mapping[str, Array]) -> str:
    x = graph.add("Div", graph.cast(name, np.float32), graph.constant(255.0))
    x = graph.add("Transpose", graph.add("Sub", x, graph.constant(0.5)), perm=[0, 3, 1, 2])
    for number, (_, _, stride) in enumerate(image["convolutions"]):
        weights = [graph.constant(arrays[f"conv_{number}.{kind}"]) for kind in ("weight", "bias")]
        x = graph.add("Relu", graph.add("Conv", x, *weights, strides=[stride, stride]))
    x = _layer_norm(graph, _linear(graph, graph.add("Flatten", x, axis=1), arrays, "trunk"), arrays, "trunk_norm")
    return graph.add("Tanh", x)


def _linear(graph: _Graph, x: str, arrays: Mapping[str, Array], name: str) -> str:
    weights = [graph.constant(arrays[f"{name}.{kind}"]) for kind in ("weight", "bias")]
    return graph.add("Gemm", x, *weights, transB=1)


def _layer_norm(graph: _Graph, x: str, arrays: Mapping[str, Array], name: str) -> str:
    weights = [graph.constant(arrays[f"{name}.{kind}"]) for kind in ("weight", "bias")]
    return graph.add("LayerNormalization", x, *weights, axis=-1, epsilon=1e-5)


def _activation(graph: _Graph, x: str, name: str) -> str:
    if name == "silu":
        return graph.add("Mul", x, graph.add("Sigmoid", x))
    if name == "gelu":
        erf = graph.add("Erf", graph.add("Mul", x, graph.constant(math.sqrt(0.5))))
        halved = graph.add("Mul", x, graph.constant(0.5))
        return graph.add("Mul", halved, graph.add("Add", erf, graph.constant(1.0)))
    return graph.add(_OPERATORS[name], x)


def _add_policy(
    graph: _Graph, x: str, settings: Mapping[str, Any], arrays: Mapping[str, Array], action_space: Mapping[str, Any]
) -> None:
    """From what the policy sees to `action`, `mean` and `log_std`."""
    for number in range(len(settings["hiddens"])):
        x = _linear(graph, x, arrays, f"hidden_{number}")
        if settings["layer_norm"]:
            x = _layer_norm(graph, x, arrays, f"hidden_{number}_norm")
        x = _activation(graph, x, settings["activation"])
    free = ActionSpace(action_space).free
    head = {"mean": slice(0, len(free)), "log_std": slice(len(free), None)}
    weights = {name: _of_all_dimensions(arrays["head.weight"][part], free, action_space) for name, part in head.items()}
    biases = {name: _of_all_dimensions(arrays["head.bias"][part], free, action_space) for name, part in head.items()}
    multiplier, offset = arrays["log_std_multiplier"], arrays["log_std_offset"]
    weights["log_std"] = multiplier * weights["log_std"]
    biases["log_std"] = multiplier * biases["log_std"] + offset
    parameters = {name: (graph.constant(weights[name]), graph.constant(biases[name])) for name in head}
    mean = graph.add("Gemm", x, *parameters["mean"], transB=1, output="mean")
    log_std = graph.add("Gemm", x, *parameters["log_std"], transB=1)
    graph.add("Clip", log_std, *(graph.constant(bound) for bound in LOG_STD_BOUNDS), output="log_std")
    dtype = np.dtype(action_space["dtype"])
    low, high = (np.array(action_space[bound]) for bound in ("low", "high"))
    if dtype == np.float32 and (low == -1.0).all() and (high == 1.0).all():
        graph.add("Tanh", mean, output="action")
        return
    squashed = graph.add("Tanh", mean)
    if dtype != np.float32:
        squashed = graph.cast(squashed, dtype)
    mapped = graph.add("Mul", squashed, graph.constant((high - low) / 2.0, dtype))
    mapped = graph.add("Add", mapped, graph.constant((high + low) / 2.0, dtype))
    mapped = graph.add("Max", mapped, graph.constant(low, dtype))
    graph.add("Min", mapped, graph.constant(high, dtype), output="action")


def _of_all_dimensions(rows: Array, free: Array, action_space: Mapping[str, Any]) -> Array:
    """Rows of all dimensions of an action, 0 where the bounds are one number: there the middle is the action."""
    whole = np.zeros((*action_space["shape"], *rows.shape[1:]), np.float32)
    whole[free] = rows
    return whole
