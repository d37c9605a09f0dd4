"""Makes "CalQL" a name that Ray Tune and RLlib resolve, on the driver and on workers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

ALGORITHM_NAME = "CalQL"


def _load_class() -> type:
    cls: type = import_module("rllib_calql.algorithm").CalQL
    return cls


class _ClassReference:
    """Unpickles to the class itself, so that registering does not load RLlib and workers need no import of theirs."""

    def __reduce__(self) -> tuple[Callable[[], type], tuple[()]]:
        return _load_class, ()


def _class_and_default_config() -> tuple[type, Any]:
    cls: Any = _load_class()
    return cls, cls.get_default_config()


def register() -> None:
    """Registers the name "CalQL" with Ray Tune and, once RLlib is loaded, with RLlib's list of algorithms.

    May be called any number of times. Tune's registry is emptied by `ray.shutdown()`, so it's done again after every
    `ray.init()`.
    """
    from ray._private.worker import _post_init_hooks
    from ray.tune.registry import TRAINABLE_CLASS, _global_registry

    if register not in _post_init_hooks:
        _post_init_hooks.append(register)
    _global_registry.register(TRAINABLE_CLASS, ALGORITHM_NAME, _ClassReference())
    rllib_registry = sys.modules.get("ray.rllib.algorithms.registry")
    if rllib_registry is not None:
        rllib_registry.ALGORITHMS[ALGORITHM_NAME] = _class_and_default_config
