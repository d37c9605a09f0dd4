"""Misspelt settings: refused with the one that was meant, in typed methods and in dictionaries alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from ray.rllib.algorithms.algorithm_config import NotProvided

from rllib_calql.networks.model_settings import DEFAULT_MODEL_CONFIG
from rllib_calql.system.similar_words import close_matches, similar_words

_Config = TypeVar("_Config", bound=type)

# Keys of dictionaries that RLlib and Ray Tune hand to a config beside its settings.
_KEYS_OF_RLLIB = frozenset({"__trial_info__", "multiagent", "_enable_new_api_stack", "class", "model_config"})


def with_checked_keywords(config_class: _Config) -> _Config:
    """A class decorator: typed methods say which setting was meant by an unknown keyword. Signatures stay.

    Args:
        config_class: RLlib's config class, or one derived from it.
    """
    for name in _accepted_by_method(config_class):
        setattr(config_class, name, _checked(getattr(config_class, name), name))
    return config_class


def check_keys(config: Any, settings: Mapping[str, Any]) -> None:
    """Refuses keys of a dictionary that RLlib would add to a config as settings that nobody reads.

    Args:
        config: To be changed.
        settings: By their names, as in `config.to_dict()`.

    Raises:
        TypeError: Naming the key and the settings that are similar.
    """
    for key in settings.keys():  # noqa: SIM118 - RLlib hands whole configs over, too.
        name = config._translate_special_keys(key, warn_deprecated=False)
        if name in vars(config) or _is_set_through(config, name) or key in _KEYS_OF_RLLIB or str(key).startswith("_"):
            continue
        if callable(getattr(type(config), str(name), None)):
            raise TypeError(
                f"`{key}` is a method of {type(config).__name__} and no setting; name the settings themselves."
            )
        if key in DEFAULT_MODEL_CONFIG:
            raise TypeError(
                f"{type(config).__name__} has no setting `{key}`: it is one of the networks; write "
                f'`"model_config": {{"{key}": ...}}`.'
            )
        similar = close_matches(str(key), _public(config), "`")
        raise TypeError(f"{type(config).__name__} has no setting `{key}`.{similar}")


def _is_set_through(config: Any, name: str) -> bool:
    """Whether a property takes the setting, as RLlib's for `train_batch_size_per_learner`."""
    found = getattr(type(config), name, None)
    return isinstance(found, property) and found.fset is not None


def _public(config: Any) -> list[str]:
    return [name for name in vars(config) if not name.startswith("_")]


def _checked(method: Any, name: str) -> Any:
    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        accepted = _accepted_by_method(self.__class__)
        for keyword in kwargs.keys() - accepted.get(name, kwargs.keys()):
            raise TypeError(_told(keyword, name, accepted))
        return method(self, *args, **kwargs)

    return checked


def _told(keyword: str, method: str, accepted: Mapping[str, frozenset[str]]) -> str:
    for other in sorted(accepted, key=lambda other: other == "training"):
        if keyword in accepted[other]:
            return (
                f"`{keyword}` is a setting of `.{other}(...)`, not of `.{method}(...)`; write "
                f"`.{other}({keyword}=...)`."
            )
    message = f"`.{method}(...)` has no setting `{keyword}`."
    if keyword in DEFAULT_MODEL_CONFIG:
        return f"{message} It is one of the networks; write `.rl_module(model_config={{{keyword!r}: ...}})`."
    if similar := close_matches(keyword, accepted[method], "`"):
        return message + similar
    places = {setting: other for other in accepted for setting in accepted[other]}
    similar = close_matches(keyword, places, "`")
    found = sorted({f"`.{places[setting]}(...)`" for setting in similar_words(keyword, places)})
    return f"{message}{similar[:-1]} of {' or '.join(found)}?" if similar else f"{message} See `help({method})`."


@functools.cache
def _accepted_by_method(config_class: Any) -> dict[str, frozenset[str]]:
    """The keywords of each typed method, with those that it hands on to its parents."""
    accepted = {}
    for name in dir(config_class):
        if name.startswith("_"):
            continue
        names: set[str] = set()
        is_typed, is_open = False, False
        for cls in config_class.__mro__:
            own = vars(cls).get(name)
            if own is None:
                continue
            if not inspect.isfunction(own):
                break
            parameters = inspect.signature(own).parameters.values()
            names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
            is_typed |= any(parameter.default is NotProvided for parameter in parameters)
            is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
            if not is_open:
                break
        if is_typed and not is_open:
            accepted[name] = frozenset(names - {"self"})
    return accepted
