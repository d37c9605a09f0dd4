"""The policy as a program of `torch.export`: from raw observations, by name, to actions of the environment."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from rllib_calql.policy.file_format import observation_names, packed, with_policy
from rllib_calql.policy.network import LOG_STD_BOUNDS
from rllib_calql.policy.policy import ActionSpace
from rllib_calql.policy.spaces import Leaf, ObservationSpace

if TYPE_CHECKING:
    from rllib_calql.export.reading import PolicyData

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "tanh": torch.tanh,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "leaky_relu": functional.leaky_relu,
}


def torch_program(data: PolicyData) -> bytes:
    """The content of a `.pt` file, see `policy/FILES.md`.

    Raises:
        ValueError: If two parts of the observation have the same path.
    """
    program = _Program(data)
    example = {
        name: torch.zeros(2, *leaf.shape, dtype=_dtype(leaf.dtype))
        for name, leaf in zip(program.names, program.leaves, strict=True)
    }
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        exported = torch.export.export(program, (example,), dynamic_shapes=({name: {0: batch} for name in example},))
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    return with_policy(stream.getvalue(), packed(data.metadata, data.arrays))


class _Program(nn.Module):
    """What `policy/` computes with NumPy, in torch's operators.

    Attributes:
        names: Of the parts of an observation.
        leaves: These parts, in the same order.
    """

    def __init__(self, data: PolicyData) -> None:
        super().__init__()
        space = ObservationSpace(data.metadata["observation_space"])
        self.leaves = space.leaves
        self.names = observation_names(space)
        self.settings: Mapping[str, Any] = data.metadata["network"]
        for name, array in data.arrays.items():
            self.register_buffer(name.replace(".", "_"), torch.from_numpy(np.array(array)))
        action_space = data.metadata["action_space"]
        self.register_buffer("low", torch.tensor(action_space["low"], dtype=_dtype(action_space["dtype"])))
        self.register_buffer("high", torch.tensor(action_space["high"], dtype=_dtype(action_space["dtype"])))
        self.register_buffer("free", torch.from_numpy(ActionSpace(action_space).free))
        for number, leaf in enumerate(self.leaves):
            if leaf.sizes:
                columns, values = leaf.one_hot_columns()
                self.register_buffer(f"columns_{number}", torch.from_numpy(columns))
                self.register_buffer(f"values_{number}", torch.from_numpy(values))

    def forward(self, observation: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`action`, `mean` and `log_std`, each of shape (B, A), of the parts of B observations."""
        x = self._policy_input(observation)
        for number in range(len(self.settings["hiddens"])):
            x = self._linear(x, f"hidden_{number}")
            if self.settings["layer_norm"]:
                x = self._layer_norm(x, f"hidden_{number}_norm")
            x = _ACTIVATIONS[self.settings["activation"]](x)
        mean, raw_log_std = self._linear(x, "head").chunk(2, dim=-1)
        multiplier, offset = (self.get_buffer(f"log_std_{name}") for name in ("multiplier", "offset"))
        log_std = (multiplier * raw_log_std + offset).clamp(*LOG_STD_BOUNDS)
        mean, log_std = (self._of_all_dimensions(values) for values in (mean, log_std))
        low, high = self.get_buffer("low"), self.get_buffer("high")
        action = low + (torch.tanh(mean).to(low.dtype) + 1.0) * (high - low) / 2.0
        return {"action": torch.clamp(action, low, high), "mean": mean, "log_std": log_std}

    def _policy_input(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        image = self.settings["image"]
        if image is not None:
            return self._image_features(observation[self.names[0]], image)
        parts = zip(self.names, self.leaves, strict=True)
        x = torch.cat([self._row(observation[name], leaf, number) for number, (name, leaf) in enumerate(parts)], dim=1)
        if self.settings["normalize"]:
            x = (x - self.get_buffer("obs_mean")) / self.get_buffer("obs_std")
        clip = self.settings["clip"]
        return x if clip is None else x.clamp(-clip, clip)

    def _row(self, part: torch.Tensor, leaf: Leaf, number: int) -> torch.Tensor:
        """A part as float32, shape (B, size); integers of known ranges are one-hot."""
        if not leaf.sizes:
            return part.to(torch.float32).flatten(1)
        integers = part.reshape(part.shape[0], len(leaf.sizes)).to(torch.int64)
        repeated = integers.index_select(1, self.get_buffer(f"columns_{number}"))
        return (repeated == self.get_buffer(f"values_{number}")).to(torch.float32)

    def _image_features(self, images: torch.Tensor, image: Mapping[str, Any]) -> torch.Tensor:
        x = (images.to(torch.float32) / 255.0 - 0.5).permute(0, 3, 1, 2)
        for number, (_, _, stride) in enumerate(image["convolutions"]):
            weight, bias = self._parameters_of(f"conv_{number}")
            x = functional.relu(functional.conv2d(x, weight, bias, stride=stride))
        return torch.tanh(self._layer_norm(self._linear(x.flatten(1), "trunk"), "trunk_norm"))

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, *self._parameters_of(name))

    def _layer_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self._parameters_of(name)
        return functional.layer_norm(x, weight.shape, weight, bias)

    def _parameters_of(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.get_buffer(f"{layer}_weight"), self.get_buffer(f"{layer}_bias")

    def _of_all_dimensions(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all dimensions of an action, 0 where the bounds are one number."""
        num_actions, free = len(self.get_buffer("low")), self.get_buffer("free")
        if len(free) == num_actions:
            return values
        return values.new_zeros(values.shape[0], num_actions).index_copy(1, free, values)


def _dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, np.dtype(dtype))).dtype
