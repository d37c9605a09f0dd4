"""`loggers` of an experiment file: where results go besides the run's folder, by Ray's own callbacks."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ray.tune.logger import LoggerCallback

from rllib_calql.experiments.reading.errors import ExperimentError, refuse_unknown, reported


@dataclass(frozen=True)
class _Kind:
    """A service, or a format, that Ray logs to.

    Attributes:
        callback: Ray's class, as "module:name".
        module: That it needs.
        package: That installs the module.
        passes_on: What gets the options that the callback does not know, as "module:name"; None if it has no others.
    """

    callback: str
    module: str
    package: str
    passes_on: str | None = None


_KINDS = {
    "wandb": _Kind("ray.air.integrations.wandb:WandbLoggerCallback", "wandb", "wandb", "wandb:init"),
    "mlflow": _Kind("ray.air.integrations.mlflow:MLflowLoggerCallback", "mlflow", "mlflow"),
    "comet": _Kind("ray.air.integrations.comet:CometLoggerCallback", "comet_ml", "comet-ml", "comet_ml:Experiment"),
    "aim": _Kind("ray.tune.logger.aim:AimLoggerCallback", "aim", "aim", "aim:Run"),
}


@dataclass(frozen=True)
class Logger:
    """One of them with its settings; every run makes its callback anew.

    Attributes:
        kind: Name in the file.
        options: Arguments of Ray's callback.
    """

    kind: str
    options: Mapping[str, Any]

    def build(self) -> LoggerCallback:
        """Ray's callback."""
        callback: LoggerCallback = _named(_KINDS[self.kind].callback)(**self.options)
        return callback


def parse_loggers(entry: Any, name: str) -> tuple[Logger, ...]:
    """The loggers of an experiment.

    Args:
        entry: A list of names and of `{name: {option: value}}`, a mapping of names to options, or None.
        name: The experiment's name.

    Raises:
        ExperimentError: Naming the logger, the option or the package, if there is no such logger, if it is not
            installed, or if it cannot be built like this.
    """
    where = f"`loggers` of experiment '{name}'"
    found: dict[str, Logger] = {}
    for kind, options in _listed(entry, where):
        if kind in found:
            raise ExperimentError(f"{where} has `{kind}` twice; drop one.")
        found[kind] = _checked(kind, options, f"`{kind}` in {where}")
    return tuple(found.values())


def _listed(entry: Any, where: str) -> list[tuple[str, Any]]:
    if entry is None:
        return []
    items: list[tuple[Any, Any]] = []
    for one in [entry] if isinstance(entry, dict) else entry if isinstance(entry, list) else [entry]:
        items += one.items() if isinstance(one, dict) else [(one, {})]
    if not isinstance(entry, (dict, list)) or any(not isinstance(kind, str) or kind not in _KINDS for kind, _ in items):
        raise ExperimentError(
            f"{where} must list some of {', '.join(_KINDS)}, each alone or with its settings, like [mlflow, {{wandb: "
            f"{{project: robots}}}}]; got {entry!r}."
        )
    return items


def _checked(kind: str, options: Any, where: str) -> Logger:
    options = {} if options is None else options
    if not isinstance(options, dict) or not all(isinstance(option, str) for option in options):
        raise ExperimentError(f"{where} must map its settings to values, got {options!r}.")
    described = _KINDS[kind]
    if importlib.util.find_spec(described.module) is None:
        raise ExperimentError(f"{where} needs the `{described.package}` package: pip install {described.package}")
    with reported(where):
        known = _parameters(_named(described.callback))
        if described.passes_on is not None:
            known += _parameters(_named(described.passes_on))
    refuse_unknown(options, known, where)
    if kind == "wandb" and not (options.get("project") or os.environ.get("WANDB_PROJECT_NAME")):
        raise ExperimentError(f"{where} has no `project`; set the one at Weights & Biases that gets the results.")
    logger = Logger(kind, options)
    with reported(where):
        logger.build()
    return logger


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _parameters(function: Any) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
