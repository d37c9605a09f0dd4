"""Settings of the networks, `.rl_module(model_config={...})`: defaults with provenance, and their checks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from rllib_calql.networks.actor_critic import ACTIVATIONS

_OF_VECTORS_AND_IMAGES: dict[str, Any] = {
    "actor_hiddens": [256, 256],  # Authors.
    "critic_hiddens": [256, 256],  # Authors' default; AntMaze 4 layers of 256, Adroit 3 of 512.
    "activation": "relu",  # Authors.
    "layer_norm": False,  # Authors; "critic" is RLPD (Ball et al. 2023, arXiv:2302.02948).
    "orthogonal_init": True,  # Authors.
}
# Kostrikov et al. 2020, arXiv:2004.13649, appendix C.
IMAGE_SETTINGS: dict[str, Any] = {
    "conv_filters": [[32, 3, 2], [32, 3, 1], [32, 3, 1], [32, 3, 1]],  # Channels, kernel, stride.
    "image_features": 50,
    "random_shift": 4,  # Pixels.
}
# Of RLlib's `DefaultModelConfig`. What is not here has no counterpart.
_IN_PLACE_OF = {
    **dict.fromkeys(
        ("fcnet_hiddens", "head_fcnet_hiddens", "post_fcnet_hiddens", "hiddens"),
        "set `actor_hiddens` and `critic_hiddens`",
    ),
    **dict.fromkeys(
        ("fcnet_activation", "head_fcnet_activation", "post_fcnet_activation", "conv_activation"), "set `activation`"
    ),
    "fcnet_use_layernorm": "set `layer_norm`",
    "head_fcnet_use_layernorm": "set `layer_norm`",
    **dict.fromkeys(("fcnet_kernel_initializer", "fcnet_bias_initializer"), "set `orthogonal_init`"),
    **dict.fromkeys(("head_fcnet_kernel_initializer", "head_fcnet_bias_initializer"), "set `orthogonal_init`"),
    "conv_filters": "set it in a dict, as a list of [channels, kernel, stride]",
}
DEFAULT_MODEL_CONFIG: dict[str, Any] = _OF_VECTORS_AND_IMAGES | IMAGE_SETTINGS


def check_model_config(settings: Mapping[str, Any]) -> None:
    """Checks types and ranges of all settings of the module.

    Raises:
        ValueError: At the first that is wrong.
    """
    for name in ("actor_hiddens", "critic_hiddens"):
        if not _is_list_of(settings[name], _is_positive):
            raise ValueError(f"`{name}` must be a list of positive layer widths, got {settings[name]!r}.")
    if not (isinstance(settings["activation"], str) and settings["activation"] in ACTIVATIONS):
        raise ValueError(f"`activation` must be one of {sorted(ACTIVATIONS)}, got {settings['activation']!r}.")
    layer_norm = settings["layer_norm"]
    if not (isinstance(layer_norm, bool) or (isinstance(layer_norm, str) and layer_norm in ("actor", "critic"))):
        raise ValueError(
            f'`layer_norm` must be True or False, which are for both networks, or "actor" or "critic", got '
            f"{layer_norm!r}."
        )
    if not isinstance(settings["orthogonal_init"], bool):
        raise ValueError(f"`orthogonal_init` must be True or False, got {settings['orthogonal_init']!r}.")
    if not _is_list_of(settings["conv_filters"], lambda one: _is_list_of(one, _is_positive) and len(one) == 3):
        raise ValueError(
            f"`conv_filters` must be a list of [channels, kernel, stride], got {settings['conv_filters']!r}."
        )
    if not _is_positive(settings["image_features"]):
        raise ValueError(f"`image_features` must be a positive integer, got {settings['image_features']!r}.")
    if not (_is_positive(settings["random_shift"]) or settings["random_shift"] == 0):
        raise ValueError(f"`random_shift` must be an integer of at least 0, got {settings['random_shift']!r}.")


def has_layer_norm(settings: Mapping[str, Any], network: Literal["actor", "critic"]) -> bool:
    """Whether hidden layers of that network are normalised."""
    return settings["layer_norm"] in (True, network)


def check_module_spec(spec: Any, own_class: type) -> None:
    """Checks what a user gives RLlib's learners and env runners as the module itself, by `rl_module_spec`.

    Args:
        spec: RLlib's specification, or None.
        own_class: Class of the modules that can be trained.

    Raises:
        ValueError: If it is of another kind, names another class or holds settings that are not used.
    """
    if spec is None:
        return
    if not hasattr(spec, "module_class") or not hasattr(spec, "model_config"):
        raise ValueError(
            f"`rl_module_spec` must be an `RLModuleSpec`, got {type(spec).__name__}: CalQL trains one agent; drop it."
        )
    kind = spec.module_class or own_class
    if not (isinstance(kind, type) and issubclass(kind, own_class)):
        raise ValueError(
            f"`module_class` of `rl_module_spec` must be a subclass of `{own_class.__name__}`, got {kind!r}: the "
            "losses need its outputs. Drop it, and set the networks by `.rl_module(model_config={...})`."
        )
    if kind is own_class and spec.model_config:
        check_names(spec.model_config)


def check_names(own: Any) -> None:
    """Refuses settings of a user that are not read, and RLlib's class of them.

    Raises:
        ValueError: Naming all of them, and what to set in their place.
    """
    known = sorted(DEFAULT_MODEL_CONFIG)
    if is_dataclass(own) and not isinstance(own, type):
        defaults = type(own)()
        changed = [one.name for one in fields(own) if getattr(own, one.name) != getattr(defaults, one.name)]
        told = "; ".join(map(_remedy, changed)) or "it sets nothing"
        raise ValueError(f"`model_config` must be a dict of {known}, got a `{type(own).__name__}`: {told}.")
    if not isinstance(own, Mapping):
        raise ValueError(f"`model_config` must be a dict of {known}, got {own!r}.")
    unknown = sorted(map(str, set(own) - set(DEFAULT_MODEL_CONFIG)))
    if unknown:
        told = "; ".join(map(_remedy, unknown))
        raise ValueError(f"`model_config` may hold {known}, got the unknown {unknown}: {told}.")


def _remedy(name: str) -> str:
    """What to do in place of a setting that is not used."""
    instead = _IN_PLACE_OF.get(name)
    if instead is None and (close := difflib.get_close_matches(name, DEFAULT_MODEL_CONFIG, n=1)):
        instead = f"did you mean `{close[0]}`?"
    return f"`{name}` is not used; {instead or 'drop it'}"


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
