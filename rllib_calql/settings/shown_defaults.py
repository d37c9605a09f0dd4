"""Signatures of a config's typed methods that show the settings' defaults, as in `help(CalQLConfig.training)`.

The default of every parameter is RLlib's `NotProvided`, "leave it as it is", and stays so: only its text is another.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any, TypeVar

from ray.rllib.algorithms.algorithm_config import NotProvided

_Config = TypeVar("_Config", bound=type)


class _Unknown:
    """Stands where a parameter sets nothing that a config keeps."""

    def __repr__(self) -> str:
        return "NotProvided"


class ShownParameter(inspect.Parameter):
    """A parameter whose text has the default of the setting; its default stays `NotProvided`."""

    __slots__ = ("_config_class",)
    _config_class: type

    @classmethod
    def of(cls, parameter: inspect.Parameter, config_class: type) -> ShownParameter:
        """The same parameter with another text.

        Args:
            parameter: What to show.
            config_class: Has the setting. A new config is made whenever the text is asked for, not before: making one
                imports the algorithm.
        """
        shown = cls(parameter.name, parameter.kind, default=parameter.default, annotation=parameter.annotation)
        shown._config_class = config_class
        return shown

    def __str__(self) -> str:
        return str(self._as_shown())

    def _format(self, **options: Any) -> str:
        """What Python 3.14 asks for in place of `str`."""
        return self._as_shown()._format(**options)  # type: ignore[attr-defined, no-any-return]

    def _as_shown(self) -> inspect.Parameter:
        default = self.default
        if default is NotProvided and hasattr(self, "_config_class"):  # Missing in a changed copy, by `replace`.
            default = _default_of(self._config_class(), self.name)
        return inspect.Parameter(self.name, self.kind, default=default, annotation=self.annotation)


def _default_of(config: Any, name: str) -> Any:
    """The setting of a parameter. RLlib keeps a few under another name."""
    kept = vars(config)
    names = (name, f"_{name}", f"{name}_str", name.removeprefix("custom_"))
    return next((kept[attribute] for attribute in names if attribute in kept), _Unknown())


def with_shown_defaults(config_class: _Config) -> _Config:
    """A class decorator: signatures of typed methods show the defaults of this class.

    Methods that are inherited are copied first, so that those of the parents stay as they are.

    Args:
        config_class: RLlib's config class, or one derived from it.
    """
    for name, method in list(_typed_methods(config_class)):
        own: Any = method if vars(config_class).get(name) is method else _copy_of(method)
        signature = inspect.signature(method)
        parameters = [
            ShownParameter.of(parameter, config_class) if parameter.default is NotProvided else parameter
            for parameter in signature.parameters.values()
        ]
        own.__signature__ = signature.replace(parameters=parameters)
        setattr(config_class, name, own)
    return config_class


def _typed_methods(config_class: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Public methods with a parameter that may be left out."""
    for name in dir(config_class):
        method = inspect.getattr_static(config_class, name)
        if not name.startswith("_") and isinstance(method, types.FunctionType):
            parameters = inspect.signature(method).parameters.values()
            if any(parameter.default is NotProvided for parameter in parameters):
                yield name, method


def _copy_of(method: types.FunctionType) -> Any:
    copied = types.FunctionType(
        method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )
    copied.__kwdefaults__ = method.__kwdefaults__
    return functools.update_wrapper(copied, method, updated=("__dict__",))
