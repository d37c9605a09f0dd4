"""Settings of an experiment file, applied through the typed methods of the algorithm's config.

RLlib's own `update_from_dict` accepts any misspelt key.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.utils.from_config import NotProvided
from ray.tune.search.sample import Categorical

from rllib_calql.experiments.reading.errors import ExperimentError, did_you_mean, reported
from rllib_calql.experiments.reading.spaces import contents, find_spaces, is_space, parse_spaces
from rllib_calql.networks.model_settings import DEFAULT_MODEL_CONFIG


def build_config(config: AlgorithmConfig, settings: Mapping[str, Any], name: str) -> AlgorithmConfig:
    """A config with settings applied.

    Args:
        config: The default one; it stays as it is.
        settings: By name or grouped by method; values may be search spaces.
        name: Of the experiment, for messages.

    Raises:
        ExperimentError: Naming the setting, and what to do.
    """
    parsed = parse_spaces(dict(settings))
    config = config.copy(copy_frozen=False)
    _apply(config, parsed, name)
    # A method that converts its argument loses a space in it; one that copies does not.
    lost = Counter(contents(space) for _, space in find_spaces(parsed))
    lost -= Counter(contents(space) for _, space in find_spaces(vars(config)))
    for path, space in find_spaces(parsed):
        if lost[contents(space)]:
            raise ExperimentError(
                f"`{'/'.join(map(str, path))}` of experiment '{name}' cannot be searched over here; put the space on "
                "single values inside it, or write one experiment per value."
            )
    return config


def settings_by_method(config_class: type) -> dict[str, dict[str, Any]]:
    """The typed methods of a config class and what each accepts.

    A typed method is one with parameters whose default is RLlib's `NotProvided`. The MRO is followed as long as
    methods forward `**kwargs`.

    Returns:
        Method -> setting -> annotation.
    """
    methods: dict[str, dict[str, Any]] = {}
    for method in dir(config_class):
        if method.startswith("_") or not callable(getattr(config_class, method)):
            continue
        accepted: dict[str, Any] = {}
        for cls in config_class.__mro__:
            if method not in vars(cls):
                continue
            if not inspect.isfunction(vars(cls)[method]):
                break
            parameters = inspect.signature(vars(cls)[method]).parameters.values()
            for parameter in parameters:
                if parameter.default is NotProvided:
                    accepted.setdefault(parameter.name, parameter.annotation)
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
        if accepted:
            methods[method] = accepted
    return methods


def _apply(config: AlgorithmConfig, settings: Mapping[str, Any], name: str) -> None:
    methods = settings_by_method(type(config))
    calls: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        is_group = key in methods and isinstance(value, dict) and not is_space(value)
        for setting, setting_value in value.items() if is_group else [(key, value)]:
            method, parameter = _find_setting(methods, config, setting, key if is_group else None, name)
            if parameter in calls.setdefault(method, {}):
                raise ExperimentError(f"The setting `{parameter}` of experiment '{name}' is there twice; drop one.")
            calls[method][parameter] = _as_annotated(setting_value, methods[method][parameter])
    for method, arguments in calls.items():
        listed = ", ".join(f"`{argument}`" for argument in arguments)
        with reported(f"Experiment '{name}', `{method}` ({listed})"):
            getattr(config, method)(**arguments)


def _find_setting(
    methods: Mapping[str, Mapping[str, Any]], config: AlgorithmConfig, key: Any, group: str | None, name: str
) -> tuple[str, str]:
    """The method and the parameter for a key. RLlib's YAML writes `lambda` and `input` for `lambda_` and `input_`."""
    among = {group: methods[group]} if group else methods
    for parameter in (key, f"{key}_"):
        # Some settings moved from `training` to other methods, which then are the better place.
        found = sorted((method for method in among if parameter in among[method]), key=lambda m: m == "training")
        if found:
            return found[0], parameter
    known = [parameter for accepted in among.values() for parameter in accepted] + ([] if group else list(methods))
    place = f"`{group}` of experiment '{name}'" if group else f"`config` of experiment '{name}'"
    if key in DEFAULT_MODEL_CONFIG:
        raise ExperimentError(
            f"Unknown setting `{key}` in {place}: it is one of the networks; write it as "
            f"`model_config: {{{key}: ...}}`."
        )
    if group and (others := [method for method in methods if key in methods[method]]):
        raise ExperimentError(
            f"Unknown setting `{key}` in {place}: it is one of `{others[0]}`; move it there, or beside the groups."
        )
    raise ExperimentError(
        f"Unknown setting `{key}` in {place}{did_you_mean(str(key), known)} "
        f"Settings are those of the methods of {type(config).__name__}."
    )


def _as_annotated(value: Any, annotation: Any) -> Any:
    """`1e4` is a float in YAML; where only whole numbers make sense it becomes one."""
    if isinstance(value, Categorical):
        value.categories = _as_annotated(value.categories, annotation)
    elif is_space(value) and isinstance(value, dict):
        value["grid_search"] = _as_annotated(value["grid_search"], annotation)
    elif isinstance(value, list):
        return [_as_annotated(item, annotation) for item in value]
    text = str(annotation)
    wants_int = re.search(r"\bint\b", text) and not re.search(r"\bfloat\b|\bAny\b|Schedule", text)
    return int(value) if wants_int and isinstance(value, float) and value.is_integer() else value
