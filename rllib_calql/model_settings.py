"""Settings of the networks, `.rl_module(model_config={...})`: defaults with provenance, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rllib_calql.networks import ACTIVATIONS

_OF_VECTORS_AND_IMAGES: dict[str, Any] = {
    "actor_hiddens": [256, 256],  # Authors.
    "critic_hiddens": [256, 256],  # Authors' default; AntMaze 4 layers of 256, Adroit 3 of 512.
    "activation": "relu",  # Authors.
    "layer_norm": False,  # Authors.
    "orthogonal_init": True,  # Authors.
}
# Kostrikov et al. 2020, arXiv:2004.13649, appendix C.
IMAGE_SETTINGS: dict[str, Any] = {
    "conv_filters": [[32, 3, 2], [32, 3, 1], [32, 3, 1], [32, 3, 1]],  # Channels, kernel, stride.
    "image_features": 50,
    "random_shift": 4,  # Pixels.
}
DEFAULT_MODEL_CONFIG: dict[str, Any] = _OF_VECTORS_AND_IMAGES | IMAGE_SETTINGS


def check_model_config(settings: Mapping[str, Any], own: Any) -> None:
    """Checks names, types and ranges.

    Args:
        settings: All settings of the module.
        own: What the user set.

    Raises:
        ValueError: At the first that is wrong.
    """
    unknown = sorted(set(own) - set(DEFAULT_MODEL_CONFIG)) if isinstance(own, dict) else []
    if unknown:
        raise ValueError(f"`model_config` may hold {sorted(DEFAULT_MODEL_CONFIG)}, got the unknown {unknown}.")
    for name in ("actor_hiddens", "critic_hiddens"):
        if not _is_list_of(settings[name], _is_positive):
            raise ValueError(f"`{name}` must be a list of positive layer widths, got {settings[name]!r}.")
    if settings["activation"] not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {sorted(ACTIVATIONS)}, got {settings['activation']!r}.")
    for name in ("layer_norm", "orthogonal_init"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"`{name}` must be True or False, got {settings[name]!r}.")
    if not _is_list_of(settings["conv_filters"], lambda one: _is_list_of(one, _is_positive) and len(one) == 3):
        raise ValueError(
            f"`conv_filters` must be a list of [channels, kernel, stride], got {settings['conv_filters']!r}."
        )
    if not _is_positive(settings["image_features"]):
        raise ValueError(f"`image_features` must be a positive integer, got {settings['image_features']!r}.")
    if not (_is_positive(settings["random_shift"]) or settings["random_shift"] == 0):
        raise ValueError(f"`random_shift` must be an integer of at least 0, got {settings['random_shift']!r}.")


def check_image_settings_are_used(settings: Mapping[str, Any], *, sees_images: bool) -> None:
    """Refuses settings of images where there are none, and of vectors where there are images.

    Raises:
        ValueError: Naming the setting.
    """
    if sees_images and settings["normalize_observations"]:
        raise ValueError("`normalize_observations` is for vectors; images are scaled to [-0.5, 0.5] in any case.")
    for name, default in IMAGE_SETTINGS.items():
        if not sees_images and _plain(settings[name]) != default:
            raise ValueError(f"`{name}` is for images, Box(H, W, C) of uint8; these observations are vectors. Drop it.")


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _is_list_of(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(check(entry) for entry in value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
