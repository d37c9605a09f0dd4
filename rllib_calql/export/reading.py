"""What of a checkpoint stands between a raw observation and an action of the environment, as plain data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rllib_calql.checkpoints.reading import CheckpointFiles
from rllib_calql.checkpoints.versions import versions_here
from rllib_calql.common import metrics as keys
from rllib_calql.common.spaces import is_flat_or_image, is_image
from rllib_calql.policy.network import array_shapes
from rllib_calql.policy.policy import ActionSpace
from rllib_calql.policy.spaces import ObservationSpace, described_space

if TYPE_CHECKING:
    import gymnasium as gym

    from rllib_calql.networks.rl_module import CalQLTorchRLModule

Array = npt.NDArray[Any]

_LEARNER_MODULE = "learner_group/learner/rl_module"
# Settings that put code of the user between observation and network, or between network and action.
_CONNECTORS = {
    "_env_to_module_connector": "env_to_module_connector",
    "_module_to_env_connector": "module_to_env_connector",
}
_DEFAULT_PIPELINES = (
    "add_default_connectors_to_env_to_module_pipeline",
    "add_default_connectors_to_module_to_env_pipeline",
)
_COUNTERS = (
    keys.NUM_OFFLINE_UPDATES_LIFETIME,
    keys.NUM_ONLINE_UPDATES_LIFETIME,
    keys.NUM_ONLINE_ENV_STEPS_LIFETIME,
)


@dataclass(frozen=True)
class PolicyData:
    """A policy as data, from which files of every kind are written.

    Attributes:
        metadata: JSON-safe, see `policy/README.md`.
        arrays: Of float32, named as `policy.network.array_shapes` says.
    """

    metadata: dict[str, Any]
    arrays: dict[str, Array]


def read_policy_data(files: CheckpointFiles, scores: Mapping[str, float] | None = None) -> PolicyData:
    """The policy of a checkpoint.

    Args:
        files: Local ones, checked.
        scores: Of its evaluations, besides those that the checkpoint holds.

    Raises:
        ValueError: If it is of another algorithm, cannot be read, or has what no policy file can hold, by its name.
    """
    from ray.rllib.core import DEFAULT_MODULE_ID
    from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule

    manifest, config = files.manifest(), files.config()
    _refuse_connectors(config)
    module = MultiRLModule.from_checkpoint(Path(files.path) / _LEARNER_MODULE)[DEFAULT_MODULE_ID]
    state = files.read("algorithm_state.pkl")
    own = state.get("calql", {}) if isinstance(state, Mapping) else {}
    known = {**_scores_of(own.get("history", {})), **(scores or {})}
    raw = files.raw_manifest() or b""
    return policy_data(
        module,
        observation_space=_observation_space(manifest["spaces"]["observation_space"], module.observation_space),
        about={
            "checkpoint": {
                "fingerprint": f"sha256:{hashlib.sha256(raw).hexdigest()}",
                **{name: manifest[name] for name in (keys.PHASE, *_COUNTERS) if name in manifest},
            },
            "scores": {name: float(score) for name, score in known.items() if math.isfinite(score)},
            "versions": {**versions_here(), "checkpoint": manifest.get("versions", {})},
        },
    )


def policy_data(
    module: CalQLTorchRLModule, *, observation_space: Mapping[str, Any], about: Mapping[str, Any] | None = None
) -> PolicyData:
    """The policy of a module.

    Args:
        module: In any place and of any precision; its parameters are what env runners act by.
        observation_space: The environment's, as `policy.spaces` describes it.
        about: More metadata.

    Raises:
        ValueError: If the module has a class of its own, parameters that are not finite, or other observations.
    """
    from rllib_calql.networks.model_settings import has_layer_norm
    from rllib_calql.networks.rl_module import CalQLTorchRLModule

    if type(module) is not CalQLTorchRLModule:
        raise ValueError(
            f"The module is a {type(module).__name__} (`rl_module_spec`), whose own code no policy file can hold; only "
            "`CalQLTorchRLModule` can be exported."
        )
    model = module.model_config
    sees_images = is_image(module.observation_space)
    normalizes, clip = bool(model["normalize_observations"]), model.get("observation_clip")
    settings: dict[str, Any] = {
        "normalize": normalizes,
        "clip": None if clip is None or math.isinf(clip) or not normalizes else float(clip),
        "hiddens": [int(width) for width in model["actor_hiddens"]],
        "layer_norm": has_layer_norm(model, "actor"),
        "activation": model["activation"],
        "image": None,
    }
    if sees_images:
        settings["image"] = {
            "shape": [int(edge) for edge in module.observation_space.shape],
            "convolutions": [[int(number) for number in layer] for layer in model["conv_filters"]],
            "features": int(model["image_features"]),
        }
    action_space = described_actions(module.action_space)
    num_actions = len(ActionSpace(action_space).free)
    num_numbers = sum(leaf.size for leaf in ObservationSpace(observation_space).leaves)
    arrays = _arrays_of(module, settings)
    shapes = array_shapes(settings, num_numbers=num_numbers, num_actions=num_actions)
    if shapes != {name: array.shape for name, array in arrays.items()}:
        raise ValueError(
            f"The observation space of the checkpoint, {observation_space}, has {num_numbers} numbers, its networks "
            f"see {module.observation_space}; it cannot be exported."
        )
    if wrong := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"The policy has diverged: {wrong[0]!r} is not finite. Export an earlier checkpoint.")
    metadata = {
        "observation_space": dict(observation_space),
        "action_space": action_space,
        "network": settings,
        **(about or {}),
    }
    return PolicyData(metadata, arrays)


def _refuse_connectors(config: Any) -> None:
    for attribute, setting in _CONNECTORS.items():
        if getattr(config, attribute, None) is not None:
            raise ValueError(
                f"The checkpoint's config sets `{setting}`, whose code no policy file can hold; do what it does in the "
                "environment, where the policy file will see it as well."
            )
    for setting in _DEFAULT_PIPELINES:
        if not getattr(config, setting, True):
            raise ValueError(
                f"The checkpoint's config sets `{setting}=False`, which no policy file can follow; drop it."
            )


def described_actions(space: gym.Space[Any]) -> dict[str, Any]:
    """An action space as policy files describe it."""
    bounds = {name: [float(bound) for bound in getattr(space, name)] for name in ("low", "high")}
    return {"kind": "Box", "shape": list(space.shape or ()), "dtype": str(space.dtype), **bounds}


def _observation_space(stored: Mapping[str, Any], seen: gym.Space[Any]) -> dict[str, Any]:
    """The environment's observation space, by what the manifest says of it or, of vectors and images, the module."""
    if stored.get("exact") is not None:
        return dict(stored["exact"])
    if "exact" in stored:
        raise ValueError(
            f"Observations of {stored['space']} have keys that no policy file can hold; use strings or integers."
        )
    structure = stored.get("structure")
    if structure is None or (is_flat_or_image(seen) and structure["kind"] in ("Box", "image")):
        return described_space(seen)  # Manifests of earlier versions say no more.
    return _typed(structure)


def _typed(structure: Mapping[str, Any]) -> dict[str, Any]:
    """A description with the types that are usual, of one in a manifest without types."""
    kind = structure["kind"]
    if kind in ("Dict", "Tuple"):
        parts = [_typed(part) for part in structure["parts"].values()]
        return {"kind": kind, "parts": parts} | ({"keys": list(structure["parts"])} if kind == "Dict" else {})
    if kind in ("Discrete", "MultiDiscrete"):
        return dict(structure)
    return {"kind": kind, "shape": structure["shape"], "dtype": "int8" if kind == "MultiBinary" else "float32"}


def _arrays_of(module: Any, settings: Mapping[str, Any]) -> dict[str, Array]:
    policy = module.policy
    parts: dict[str, Any] = {"head": policy.head}
    for number, layer in enumerate(policy.layers):
        parts[f"hidden_{number}"] = layer
        if policy.norms is not None:
            parts[f"hidden_{number}_norm"] = policy.norms[number]
    if settings["image"] is not None:
        parts |= {f"conv_{number}": layer for number, layer in enumerate(list(module.encoder.layers)[::2])}
        parts |= {"trunk": module.policy_trunk[0], "trunk_norm": module.policy_trunk[1]}
    tensors = {f"{name}.{kind}": getattr(layer, kind) for name, layer in parts.items() for kind in ("weight", "bias")}
    tensors |= {name: getattr(policy, name) for name in ("log_std_multiplier", "log_std_offset")}
    if settings["normalize"]:
        tensors |= {name: getattr(module, name) for name in ("obs_mean", "obs_std")}
    return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in tensors.items()}


def _scores_of(history: Mapping[str, Any]) -> dict[str, float]:
    """What the latest evaluation before the checkpoint said."""
    returns = [one for one in (history.get("at_switch"), *history.get("online_returns", ())) if one is not None]
    return {"episode_return_mean": float(returns[-1])} if returns else {}
