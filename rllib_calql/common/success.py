"""What an episode's infos say about its success: the keys, and how the success of an episode is made of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SUCCESS_KEYS = ("success", "is_success")  # Gymnasium-Robotics and PointMaze; Stable-Baselines3's convention.
SUCCESS_RULES = ("any", "last", "fraction")

_SEPARATOR = "/"  # Between the levels of nested infos.
_MAX_KEYS_NAMED = 20


def reports_in(info: Any, key: str | None) -> list[tuple[str, Any]]:
    """Pairs of key and value that a step's info has under a success key.

    Args:
        info: Of one step; anything but a mapping has no keys.
        key: A key, with "/" between the levels of nested infos; None for those of `SUCCESS_KEYS`.
    """
    if not isinstance(info, Mapping):
        return []
    if key is None:
        return [(name, info[name]) for name in SUCCESS_KEYS if name in info]
    if key in info:
        return [(key, info[key])]
    outer, separator, inner = key.partition(_SEPARATOR)
    return [(key, value) for _, value in reports_in(info.get(outer), inner)] if separator else []


def success_of(outcomes: Sequence[bool | None], rule: str) -> float | None:
    """The success of an episode, from 0 to 1, or None where no step says.

    Args:
        outcomes: Of the steps, in order of time; None where a step leaves it open.
        rule: "any" step succeeds, the "last" step that says, or the "fraction" of the steps that say.
    """
    known = [outcome for outcome in outcomes if outcome is not None]
    if not known:
        return None
    if rule == "fraction":
        return sum(known) / len(known)
    return float(known[-1] if rule == "last" else any(known))


def keys_in(infos: Iterable[Any]) -> set[str]:
    """All keys of infos, nested ones with "/" between the levels."""
    found: set[str] = set()
    for info in infos:
        if isinstance(info, Mapping):
            for name, value in info.items():
                inner = keys_in([value])
                found |= {f"{name}{_SEPARATOR}{below}" for below in inner} or {str(name)}
    return found


def unseen_key_message(key: str, num_episodes: int, found: Iterable[str]) -> str:
    """What to say of a `success_key` that no info of these episodes has.

    Args:
        key: The setting.
        num_episodes: Episodes that have ended.
        found: The keys that their infos have.
    """
    names = sorted(found)
    shown = ", ".join(f"`{name}`" for name in names[:_MAX_KEYS_NAMED]) or "no keys at all"
    more = f" and {len(names) - _MAX_KEYS_NAMED} more" if len(names) > _MAX_KEYS_NAMED else ""
    episodes = "the first episode" if num_episodes == 1 else f"the first {num_episodes} episodes"
    return (
        f"`success_key` is {key!r}, which no info of {episodes} has, so the success rate is unknown; the infos have "
        f"{shown}{more}"
    )
