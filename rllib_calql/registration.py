"""Makes "CalQL" a name that Ray Tune and RLlib resolve, on the driver and on workers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ALGORITHM_NAME = "CalQL"
_RAY = "ray._private.worker"
_TUNE = "ray.tune.registry"


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
    from ray.tune.registry import TRAINABLE_CLASS, _global_registry

    _register_after_init()
    _global_registry.register(TRAINABLE_CLASS, ALGORITHM_NAME, _ClassReference())
    rllib_registry = sys.modules.get("ray.rllib.algorithms.registry")
    if rllib_registry is not None:
        rllib_registry.ALGORITHMS[ALGORITHM_NAME] = _class_and_default_config


def _register_after_init() -> None:
    from ray._private.worker import _post_init_hooks

    if register not in _post_init_hooks:
        _post_init_hooks.append(register)


def register_once_loaded() -> None:
    """Registers now if Ray Tune is loaded, else when it is, or when Ray is started: loading it takes a second or two.

    So the package is there at once, and the `rllib` command can say what it does before Ray is loaded.
    """
    if _TUNE in sys.modules:
        register()
        return
    if _RAY in sys.modules:
        _register_after_init()
    sys.meta_path.insert(0, _Waiting({_RAY: _register_after_init, _TUNE: register}))


class _Waiting(MetaPathFinder):
    """Calls functions after the modules that they wait for have been loaded.

    Args:
        functions: By the names of the modules.
    """

    def __init__(self, functions: dict[str, Callable[[], None]]) -> None:
        self._functions = functions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, with the function after it; None for modules that nobody waits for."""
        function = self._functions.pop(fullname, None)
        if function is None:
            return None
        if not self._functions:
            with suppress(ValueError):
                sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _append(spec.loader, function)
                return spec
        return None


def _append(loader: Any, function: Callable[[], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        function()

    loader.exec_module = exec_module
