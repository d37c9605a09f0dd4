"""The manifest of a checkpoint, `calql.json`: what a person wants to know of it, and what must fit before it is read.

All functions take plain dictionaries as `manifest_of` makes them, which survive JSON unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rllib_calql.checkpoints.versions import versions_here
from rllib_calql.common import metrics as keys
from rllib_calql.common.encoding import flat_size
from rllib_calql.common.spaces import description_of, difference_of, is_flattening
from rllib_calql.environments.sharing import import_folders
from rllib_calql.policy.spaces import described_space

if TYPE_CHECKING:
    import gymnasium as gym

    from rllib_calql.config import CalQLConfig
    from rllib_calql.store.replay import TransitionStore
    from rllib_calql.store.split import Split

# Settings of the module that decide on the shape, or on the meaning, of its parameters.
_NETWORK_SETTINGS = (
    "actor_hiddens",
    "critic_hiddens",
    "activation",
    "layer_norm",
    "num_critics",
    "normalize_observations",
    "conv_filters",
    "image_features",
)
_REWARD_SETTINGS = ("gamma", "reward_scale", "reward_bias", "failure_reward", "truncation", "reference_column")
BEHAVIOUR = "behaviour"  # What was done in which episodes: the same data, however their rewards are read.
_SETTING_OF = {"reference_column": "reference_value"}
_REFERENCE_SETTINGS = ("reference_value", "reference_online", "reference_fit")
# A run does not go on from a checkpoint that was made with other ones. The offline data's content counts as well.
SETTINGS_KEPT = frozenset(
    {
        *(_SETTING_OF.get(name, name) for name in (*_NETWORK_SETTINGS, *_REWARD_SETTINGS)),
        *(
            "env",
            "input_",
            "use_recorded_returns",
            "reference_online",
            "online_capacity",
            "validation_fraction",
            "validation_seed",
        ),
    }
)

Manifest = Mapping[str, Any]

logger = logging.getLogger(__name__)


def manifest_of(
    config: CalQLConfig,
    store: TransitionStore,
    counters: Mapping[str, int],
    *,
    observation_space: gym.Space[Any],
    action_space: gym.spaces.Box,
) -> dict[str, Any]:
    """The manifest of a run as it stands.

    Args:
        config: Its config.
        store: Its data.
        counters: Its lifetime counters.
        observation_space: The environment's, before flattening.
        action_space: The environment's.
    """
    is_offline = counters[keys.NUM_OFFLINE_UPDATES_LIFETIME] < config.num_offline_updates
    networks = {name: config.model_config[name] for name in _NETWORK_SETTINGS}
    return {
        keys.PHASE: keys.OFFLINE if is_offline else keys.ONLINE,
        **counters,
        "online_data": {
            "transitions": store.num_online,
            "mebibytes": round(store.online_nbytes / 2**20, 3),
            "in_checkpoint": config.store_buffer_in_checkpoints,
        },
        "offline_data": {
            "transitions": store.num_offline,
            "fingerprint": store.offline.fingerprint() if store.offline is not None else None,
        },
        "hold_out": None if store.split is None else hold_out_of(store.split),
        BEHAVIOUR: store.offline.behaviour_fingerprint() if store.offline is not None else None,
        "rewards": {name: getattr(config, name) for name in _REWARD_SETTINGS},
        "reference": {
            "is_learned": config.has_reference_network,
            **{name: getattr(config, name) for name in _REFERENCE_SETTINGS},
        },
        "networks": {k: np.asarray(v).tolist() if isinstance(v, (list, tuple)) else v for k, v in networks.items()},
        "lagrangian": config.lagrangian,
        "spaces": _spaces_of(observation_space, action_space),
        "environment": {"import_folders": import_folders(config.env)},
        "versions": versions_here(),
    }


def _spaces_of(observation_space: gym.Space[Any], action_space: gym.spaces.Box) -> Manifest:
    return {
        "observation_space": {
            "size": flat_size(observation_space),
            "structure": description_of(observation_space),
            "exact": _exact(observation_space),
            "space": str(observation_space),
        },
        "action_space": {
            "size": flat_size(action_space),
            "low": np.asarray(action_space.low, dtype=float).reshape(-1).tolist(),
            "high": np.asarray(action_space.high, dtype=float).reshape(-1).tolist(),
            "space": str(action_space),
        },
    }


def _exact(space: gym.Space[Any]) -> Manifest | None:
    """Types and keys as well, for files of the policy; None if they cannot hold such observations."""
    try:
        return described_space(space)
    except ValueError:
        return None


def hold_out_of(split: Split) -> dict[str, Any]:
    """Which episodes are held out, and by which settings."""
    return {
        "validation_fraction": split.fraction,
        "validation_seed": split.seed,
        "episodes": len(split.held_out_episodes),
        "transitions": split.num_held_out_rows,
        "fingerprint": split.fingerprint(),
    }


def check_networks(stored: Manifest, own: Manifest) -> None:
    """Refuses parameters that do not fit the networks or spaces of this run.

    Raises:
        ValueError: Naming the setting or space, both values and the remedy.
    """
    for name, value in stored["networks"].items():
        if own["networks"][name] != value:
            raise ValueError(
                f"The checkpoint was made with `{name}` {value!r}, this run has {own['networks'][name]!r}, so its "
                f"networks do not fit; set `{name}={value!r}`."
            )
    _check_spaces(stored["spaces"], own["spaces"])


def check_environment(stored: Manifest, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
    """Refuses an environment for which the policy of a checkpoint was not made.

    Args:
        stored: The checkpoint's manifest.
        observation_space: The environment's, before flattening.
        action_space: The environment's.

    Raises:
        ValueError: Naming the space, that of the checkpoint and that of the environment.
    """
    from gymnasium.spaces import Box

    if not isinstance(action_space, Box):
        raise ValueError(
            f"The checkpoint was made with the action space {stored['spaces']['action_space']['space']}, the "
            f"environment has {action_space}; use an environment with the spaces of the checkpoint."
        )
    _check_spaces(stored["spaces"], _spaces_of(observation_space, action_space))


def _check_spaces(stored: Manifest, own: Manifest) -> None:
    for name, space in stored.items():
        other = own[name]
        if space["size"] != other["size"] or not all(
            np.allclose(space[bound], other[bound]) for bound in ("low", "high") if bound in space
        ):
            raise ValueError(
                f"The checkpoint was made with the {name.replace('_', ' ')} {space['space']}, the environment has "
                f"{other['space']}; use an environment with the spaces of the checkpoint."
            )
        if "structure" in space:  # Manifests of earlier versions have none.
            _check_structure(space, other)


def _check_structure(stored: Manifest, own: Manifest) -> None:
    """Refuses observations of as many numbers that mean something else."""
    difference = difference_of(stored["structure"], own["structure"])
    if difference is None:
        return
    if not is_flattening(stored["structure"], own["structure"]):
        raise ValueError(
            f"The checkpoint was made with the observation space {stored['space']}, the environment has "
            f"{own['space']}: the former {difference}; use an environment with the spaces of the checkpoint."
        )
    logger.warning(
        "The checkpoint was made with the observation space %s, the environment has %s; one is taken for the other "
        "flattened, parts of a Dict in the order of their keys.",
        stored["space"],
        own["space"],
    )


def check_resumable(stored: Manifest, own: Manifest) -> None:
    """Refuses to go on with a run on other networks, data or rewards than those of its checkpoint.

    Raises:
        ValueError: Naming what differs, both values and the remedy.
    """
    check_networks(stored, own)
    if stored["lagrangian"] and not own["lagrangian"]:
        raise ValueError(
            "The checkpoint was made with `lagrangian=True`, this run has False; restore with True, or begin a new run "
            "from it by `pretrained`."
        )
    if _learns_reference(stored) != _learns_reference(own):
        has = "lacks" if _learns_reference(own) else "has"
        raise ValueError(
            f"The checkpoint {has} the network of a learned reference value: it was made with "
            f"{_reference_settings(stored)}, this run has {_reference_settings(own)}; restore with the former, or "
            "begin a new run from it by `pretrained`."
        )
    for name, before, now in _changed_rewards(stored, own):
        raise ValueError(
            f"The checkpoint was made with `{name}` {before!r}, this run has {now!r}: its online data and Q values are "
            f"in the units of the former; restore with `{name}={before!r}`, or begin a new run from it by `pretrained`."
        )
    _check_same_data(stored["offline_data"], own["offline_data"])
    if (change := _change_of_hold_out(stored, own)) is not None:
        raise ValueError(
            f"The checkpoint was made with {change}, so other episodes would be held out in the midst of a run; "
            f"restore with {_settings_of_hold_out(stored)}, or begin a new run from it by `pretrained`."
        )


def _check_same_data(before: Manifest, now: Manifest) -> None:
    if before == now:
        return
    if before["transitions"] != now["transitions"]:
        difference = f"`input_` now has {now['transitions']}"
    else:
        difference = (
            f"`input_` now has as many with other content (fingerprint {now['fingerprint']}, was "
            f"{before['fingerprint']})"
        )
    raise ValueError(
        f"The checkpoint was made with {before['transitions']} offline transitions, {difference}; restore with the "
        "same data, read by the same settings, or begin a new run from it by `pretrained`."
    )


def is_same_behaviour(stored: Manifest, own: Manifest) -> bool:
    """Whether the offline data are the same recorded episodes, whatever rewards and returns are made of them."""
    if stored.get(BEHAVIOUR) is not None and own.get(BEHAVIOUR) is not None:
        return bool(stored[BEHAVIOUR] == own[BEHAVIOUR])
    before, now = (one["offline_data"].get("fingerprint") for one in (stored, own))  # Of earlier versions.
    return before is not None and bool(before == now)


def remark_on_hold_out(stored: Manifest, own: Manifest) -> str | None:
    """What the networks of the checkpoint have seen of the episodes that this run holds out, in a sentence, or None.

    Nothing is said of other data: whether they share episodes is not known.
    """
    before, now = stored.get("hold_out"), own.get("hold_out")
    change = _change_of_hold_out(stored, own)
    if not now or not is_same_behaviour(stored, own) or change is None:
        return None
    looks_better = "and held-out metrics look better than they are"
    if not before:
        return (
            "It was trained on the same data without a hold-out, so it has seen the episodes that are held out here, "
            f"{looks_better}; pre-train it with {_settings_of_hold_out(own)}"
        )
    if before["validation_seed"] == now["validation_seed"] and before["episodes"] > now["episodes"]:
        return None  # Those that are held out now are some of those that were.
    return (
        f"It was trained on the same data with {change}, so it has seen episodes that are held out here, "
        f"{looks_better}; set {_settings_of_hold_out(stored)}, or pre-train it anew"
    )


def _change_of_hold_out(stored: Manifest, own: Manifest) -> str | None:
    """How other episodes are held out now, of the same data; None if they are the same ones."""
    before, now = stored.get("hold_out"), own.get("hold_out")  # Manifests of earlier versions have none.
    if (before and before["fingerprint"]) == (now and now["fingerprint"]):
        return None
    return f"{_settings_of_hold_out(stored)}, this run has {_settings_of_hold_out(own)}"


def _settings_of_hold_out(manifest: Manifest) -> str:
    held_out = manifest.get("hold_out") or {"validation_fraction": 0.0}
    names = (name for name in ("validation_fraction", "validation_seed") if name in held_out)
    return " and ".join(f"`{name}={held_out[name]}`" for name in names)


def check_reference_is_there(stored: Manifest, own: Manifest) -> None:
    """Refuses networks without the one of a learned reference value where there are no data to fit it to.

    Raises:
        ValueError: Naming the setting and the remedy.
    """
    has_data = own["offline_data"]["transitions"] > 0
    if _learns_reference(own) and not has_data and not _learns_reference(stored):
        raise ValueError(
            f"The checkpoint was made with {_reference_settings(stored)}, so that it lacks the network of a learned "
            "reference value, and there are no offline data to fit one to; set `input_`, or "
            '`reference_value="returns_to_go"`.'
        )


def fits_reference_anew(stored: Manifest, own: Manifest) -> bool:
    """Whether this run has to fit a learned reference value: that of the checkpoint is of other data or settings."""
    names = ("reference", "rewards", "offline_data", "hold_out")
    is_same = all(stored.get(name) == own.get(name) for name in names)
    return _learns_reference(own) and own["offline_data"]["transitions"] > 0 and not is_same


def _learns_reference(manifest: Manifest) -> bool:
    return bool(manifest.get("reference", {}).get("is_learned", False))  # Manifests of earlier versions have none.


def _reference_settings(manifest: Manifest) -> str:
    settings = manifest.get("reference") or {
        "reference_value": manifest["rewards"].get("reference_column") or "returns_to_go"
    }
    names = [name for name in ("reference_value", "reference_online") if settings.get(name) is not None]
    return " and ".join(f"`{name}={settings[name]!r}`" for name in names)


def changes_of_units(stored: Manifest, own: Manifest) -> list[str]:
    """What makes Q values of this run mean something else than those of the checkpoint, as readable parts."""
    return [f"`{name}` was {before!r} and is {now!r}" for name, before, now in _changed_rewards(stored, own)]


def _changed_rewards(stored: Manifest, own: Manifest) -> list[tuple[str, Any, Any]]:
    return [
        (_SETTING_OF.get(name, name), value, own["rewards"][name])
        for name, value in stored["rewards"].items()
        if own["rewards"][name] != value
    ]
