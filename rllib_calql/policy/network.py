"""The network of a policy in NumPy: from rows of numbers, or images, to mean and log standard deviation.

Every function takes a batch, axis 0. Numbers are float32 throughout, as they are in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Settings = Mapping[str, Any]
Layer = Callable[[Array], Array]

LOG_STD_BOUNDS = (-20.0, 2.0)
_EPSILON = np.float32(1e-5)  # Of torch's layer norm.
_LEAKY_SLOPE = np.float32(0.01)  # Of torch's leaky_relu.
_LARGEST_EXPONENT = np.float32(80.0)  # exp of more overflows in float32.
_IMAGES_AT_ONCE = 16
_ZERO = np.zeros(1, np.float32)  # An array, because NumPy is slower with a number.


def _relu(x: Array) -> Array:
    return np.maximum(x, _ZERO, out=x)


def _elu(x: Array) -> Array:
    return np.where(x > 0.0, x, np.expm1(np.minimum(x, 0.0)))


def _gelu(x: Array) -> Array:
    # NumPy has no error function.
    scaled = (x * np.float32(math.sqrt(0.5))).ravel().tolist()
    erf = np.fromiter(map(math.erf, scaled), np.float64, len(scaled)).reshape(x.shape)
    halved: Array = x * (0.5 * (1.0 + erf)).astype(np.float32)
    return halved


def _silu(x: Array) -> Array:
    silu: Array = x / (1.0 + np.exp(np.minimum(-x, _LARGEST_EXPONENT)))
    return silu


def _leaky_relu(x: Array) -> Array:
    leaky: Array = np.maximum(x, _LEAKY_SLOPE * x)
    return leaky


ACTIVATIONS: dict[str, Layer] = {
    "relu": _relu,
    "tanh": np.tanh,
    "elu": _elu,
    "gelu": _gelu,
    "silu": _silu,
    "leaky_relu": _leaky_relu,
}


def array_shapes(settings: Settings, *, num_numbers: int, num_actions: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array that a network of these settings has; those of layers as torch lays them out.

    Args:
        settings: `normalize`, whether rows are normalised by `obs_mean` and `obs_std`, and `clip`, at how many standard
            deviations, or None; `hiddens`, widths; `layer_norm`; `activation`; `image`, None or `shape` (height, width,
            channels), `convolutions`, a list of [channels, kernel, stride], and `features`.
        num_numbers: Of an encoded observation.
        num_actions: Dimensions of an action that leave a choice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if settings["normalize"]:
        shapes |= {"obs_mean": (num_numbers,), "obs_std": (num_numbers,)}
    width = num_numbers
    image = settings["image"]
    if image is not None:
        height, length, channels = image["shape"]
        for number, (out, kernel, stride) in enumerate(image["convolutions"]):
            shapes |= {f"conv_{number}.weight": (out, channels, kernel, kernel), f"conv_{number}.bias": (out,)}
            height, length, channels = (height - kernel) // stride + 1, (length - kernel) // stride + 1, out
        width = image["features"]
        shapes |= {"trunk.weight": (width, height * length * channels), "trunk.bias": (width,)}
        shapes |= {"trunk_norm.weight": (width,), "trunk_norm.bias": (width,)}
    for number, hidden in enumerate(settings["hiddens"]):
        shapes |= {f"hidden_{number}.weight": (hidden, width), f"hidden_{number}.bias": (hidden,)}
        if settings["layer_norm"]:
            shapes |= {f"hidden_{number}_norm.weight": (hidden,), f"hidden_{number}_norm.bias": (hidden,)}
        width = hidden
    shapes |= {"head.weight": (2 * num_actions, width), "head.bias": (2 * num_actions,)}
    return shapes | {"log_std_multiplier": (), "log_std_offset": ()}


class PolicyNetwork:
    """Mean and log standard deviation of the Gaussian whose tanh is the action in [-1, 1]^A.

    Args:
        settings: See `array_shapes`.
        arrays: As it says.

    Raises:
        ValueError: If the activation is unknown.
    """

    def __init__(self, settings: Settings, arrays: Mapping[str, Array]) -> None:
        if settings["activation"] not in ACTIVATIONS:
            raise ValueError(f"the activation {settings['activation']!r} is not known")
        activation = ACTIVATIONS[settings["activation"]]
        self._layers: list[Layer] = []
        if settings["normalize"]:
            self._layers.append(_normalisation(arrays["obs_mean"], arrays["obs_std"], settings["clip"]))
        if settings["image"] is not None:
            self._layers += _image_layers(settings["image"], arrays)
        for number in range(len(settings["hiddens"])):
            self._layers.append(_linear(arrays, f"hidden_{number}"))
            if settings["layer_norm"]:
                self._layers.append(_layer_norm(arrays, f"hidden_{number}_norm"))
            self._layers.append(activation)
        self._layers.append(_linear(arrays, "head"))
        self._multiplier, self._offset = arrays["log_std_multiplier"][()], arrays["log_std_offset"][()]
        self._num_actions = len(arrays["head.bias"]) // 2

    def __call__(self, rows: Array) -> tuple[Array, Array]:
        """Mean and log standard deviation, each of shape (B, A), of rows (B, n) or images (B, H, W, C)."""
        x = rows
        for layer in self._layers:
            x = layer(x)
        return x[:, : self._num_actions], x[:, self._num_actions :]

    def log_std(self, raw: Array) -> Array:
        """The log standard deviation of what the network says of it."""
        log_std: Array = self._multiplier * raw + self._offset
        clipped: Array = np.clip(log_std, np.float32(LOG_STD_BOUNDS[0]), np.float32(LOG_STD_BOUNDS[1]))
        return clipped


def _normalisation(mean: Array, std: Array, clip: float | None) -> Layer:
    if clip is None:
        return lambda x: (x - mean) / std
    low, high = np.float32(-clip), np.float32(clip)
    return lambda x: np.minimum(np.maximum((x - mean) / std, low), high)


def _linear(arrays: Mapping[str, Array], name: str) -> Layer:
    transposed, bias = np.ascontiguousarray(arrays[f"{name}.weight"].T), arrays[f"{name}.bias"]

    def linear(x: Array) -> Array:
        y: Array = x.dot(transposed)
        y += bias
        return y

    return linear


def _layer_norm(arrays: Mapping[str, Array], name: str) -> Layer:
    scale, shift = arrays[f"{name}.weight"], arrays[f"{name}.bias"]
    share = np.float32(1.0 / len(scale))

    def layer_norm(x: Array) -> Array:
        centred = x - np.add.reduce(x, axis=-1, keepdims=True) * share
        variance = np.add.reduce(centred * centred, axis=-1, keepdims=True) * share
        normalised: Array = centred / np.sqrt(variance + _EPSILON) * scale + shift
        return normalised

    return layer_norm


def _image_layers(image: Settings, arrays: Mapping[str, Array]) -> list[Layer]:
    height, width, channels = image["shape"]
    kernels, strides = [], []
    for number, (out, kernel, stride) in enumerate(image["convolutions"]):
        weight = arrays[f"conv_{number}.weight"].transpose(2, 3, 1, 0).reshape(-1, out)
        kernels.append((kernel, np.ascontiguousarray(weight), arrays[f"conv_{number}.bias"]))
        strides.append(stride)
        height, width, channels = (height - kernel) // stride + 1, (width - kernel) // stride + 1, out
    # Codes are laid out height, width, channels here, and channels first in torch.
    trunk = arrays["trunk.weight"].reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    own = {"trunk.weight": trunk.reshape(len(trunk), -1), "trunk.bias": arrays["trunk.bias"]}

    def codes(images: Array) -> Array:
        x: Array = images.astype(np.float32) / np.float32(255.0) - np.float32(0.5)
        for (kernel, weight, bias), stride in zip(kernels, strides, strict=True):
            x = _convolution(x, kernel, stride, weight, bias)
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def all_codes(images: Array) -> Array:
        pieces = range(0, max(len(images), 1), _IMAGES_AT_ONCE)
        together: Array = np.concatenate([codes(images[at : at + _IMAGES_AT_ONCE]) for at in pieces])
        return together

    return [all_codes, _linear(own, "trunk"), _layer_norm(arrays, "trunk_norm"), np.tanh]


def _convolution(x: Array, kernel: int, stride: int, weight: Array, bias: Array) -> Array:
    """Convolution with ReLU, x of shape (B, H, W, C), as one product of all patches."""
    every: Array = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))
    windows = every[:, ::stride, ::stride]
    batch, height, width = windows.shape[:3]
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(batch * height * width, len(weight))
    y: Array = patches.dot(weight)
    y += bias
    convolved: Array = np.maximum(y, _ZERO, out=y).reshape(batch, height, width, len(bias))
    return convolved
