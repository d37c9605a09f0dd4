"""Environments and data that configs name: looked for before Ray is started, without making or reading them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rllib_calql.checkpoints.pretrained import check_pretrained
from rllib_calql.collection.external.runner import read_token
from rllib_calql.config import CalQLConfig
from rllib_calql.environments.resolving import resolve_env
from rllib_calql.environments.sharing import offer


def check_sources(configs: Iterable[AlgorithmConfig]) -> None:
    """Looks for every environment and data set that trials name.

    Args:
        configs: Configs without search spaces.

    Raises:
        ValueError: If an environment is not registered, or data are of no format that can be read.
        ImportError: If a module cannot be imported, or a package is missing.
        TypeError: If something is no environment.
        FileNotFoundError: If data are not there, or the token of clients.
    """
    seen: list[tuple[Any, ...]] = []
    for config in configs:
        overrides = config.evaluation_config
        of_evaluation = overrides.get("env") if isinstance(overrides, Mapping) else None
        for setting, env in (("`env`", config.env), ("`env` in `evaluation_config`", of_evaluation)):
            # RLlib's own environments of several agents and its old ones are for its own algorithms to judge.
            if (setting, env) not in seen and (isinstance(config, CalQLConfig) or isinstance(env, str)) and env:
                resolve_env(env, setting)
                offer(env)
                seen.append((setting, env))
        if isinstance(config, CalQLConfig) and config.has_clients:
            read_token(config.external_token_file)
        if isinstance(config, CalQLConfig) and config.is_offline:
            source = ("`input_`", config.input_, config.read_options)
            if source not in seen:
                _check_input(config)
                seen.append(source)


def check_checkpoints(configs: Iterable[AlgorithmConfig]) -> None:
    """Looks for every checkpoint that trials would begin with. A run that is resumed needs none of them any more.

    Args:
        configs: Configs without search spaces.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no complete checkpoint.
    """
    for path in dict.fromkeys(config.pretrained for config in configs if isinstance(config, CalQLConfig)):
        check_pretrained(path)


def _check_input(config: CalQLConfig) -> None:
    from rllib_calql.datasets.readers.opening import check_input

    try:
        check_input(config.input_, config.read_options)
    except (ValueError, ImportError, FileNotFoundError) as error:
        message = str(error)
        raise type(error)(message if "`input_`" in message else f"`input_`: {message}") from error
