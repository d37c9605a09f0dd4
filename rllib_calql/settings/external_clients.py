"""`ClientSettings`: env runners whose environments are control loops elsewhere; and the checks of these settings."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ray.rllib.algorithms.algorithm_config import NotProvided

from rllib_calql.policy.spaces import described_space
from rllib_calql.settings.data_settings import DataSettings, PathLike
from rllib_calql.settings.quantities import is_integer

if TYPE_CHECKING:
    from typing_extensions import Self

    from rllib_calql.config import CalQLConfig

LISTENS = "listens_for_clients"  # Attribute of the env runners that do.
_OF_CLIENTS = ("external_host", "external_token_file")
# Settings of environments, or of what stands between them and the policy. Clients have the former; the policy file that
# they get cannot hold the latter.
_OF_ENVIRONMENTS = {
    "num_envs_per_env_runner": "a client has one environment; connect more of them to a port",
    "gym_env_vectorize_mode": "clients have the environments",
    "restart_failed_sub_environments": "clients have the environments",
    "create_env_on_local_worker": "clients have the environments",
    "episode_lookback_horizon": "episodes of clients come whole",
    "max_online_env_steps": (
        "env steps are taken by the clients, whom the run cannot hold; end it by `num_online_env_steps_lifetime` in "
        "`stop`, and bound the steps in the clients"
    ),
    "_env_to_module_connector": "clients get the policy as a file, which cannot hold its code",
    "_module_to_env_connector": "clients get the policy as a file, which cannot hold its code",
    "add_default_connectors_to_env_to_module_pipeline": "clients get the policy as a file, which cannot follow it",
    "add_default_connectors_to_module_to_env_pipeline": "clients get the policy as a file, which cannot follow it",
}
_CALLBACKS = ("on_environment_created", "on_episode_created", "on_episode_start", "on_episode_step")


class ClientSettings(DataSettings):
    """Holds the settings of `.external_clients(...)`."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)

        self.external_port: int | None = None
        self.external_host = "127.0.0.1"
        self.external_token_file: str | None = None

    def external_clients(
        self,
        *,
        external_port: int | None = NotProvided,
        external_host: str = NotProvided,
        external_token_file: PathLike | None = NotProvided,
    ) -> Self:
        """Sets that episodes come from control loops elsewhere, which act by themselves and send what they did.

        The environment, if there is one, serves evaluations only. How clients are written is told in
        `rllib_calql/collection/external/EXTERNAL.md`.

        Args:
            external_port: Port at which the first env runner listens for clients; the others listen at those after it.
                None: env runners have environments.
            external_host: Address at which they listen. Others than this machine's own, 127.0.0.1, need a token.
            external_token_file: File with the token that clients must know, at least 16 characters. The config, and so
                logs and checkpoints, hold its path alone.

        Returns:
            This config.
        """
        if isinstance(external_token_file, (str, os.PathLike)) and external_token_file:
            external_token_file = os.fspath(external_token_file)
            # As with `cache_dir`: Tune runs each trial in a folder of its own.
            is_of_home = external_token_file.startswith("~")
            external_token_file = external_token_file if is_of_home else os.path.abspath(external_token_file)
        self._set_provided(
            external_port=external_port, external_host=external_host, external_token_file=external_token_file
        )
        return self

    @property
    def has_clients(self) -> bool:
        """Whether episodes come from clients."""
        return self.external_port is not None and not self.in_evaluation


def check_clients(config: CalQLConfig, defaults: CalQLConfig) -> None:
    """Checks them.

    Args:
        config: What to check.
        defaults: A fresh config.

    Raises:
        ValueError: At the first setting that is wrong, or of no use with clients.
    """
    if config.external_port is None:
        _refuse_without_port(config, defaults)
        return
    if config.in_evaluation:
        return
    _check_place(config)
    _refuse_what_clients_have(config, defaults)
    if config.observation_space is not None:
        check_describable(config.observation_space)
    if config.env is None and not config.is_offline:
        missing = [name for name in ("observation_space", "action_space") if getattr(config, name) is None]
        if missing:
            raise ValueError(
                f"`external_port` is {config.external_port}, and nothing says what clients observe and do: set "
                f"{' and '.join(f'`{name}`' for name in missing)} in `.environment(...)`, or `env`, or `input_`."
            )
    if config.env is None and config.evaluation_interval and not config.validation_fraction:
        raise ValueError(
            "`evaluation_interval` is set, but clients are not evaluated; set `.environment(env=...)` for evaluations, "
            "or `.offline_data(validation_fraction=0.1)`, or drop it."
        )


def check_describable(observation_space: Any) -> None:
    """Refuses observations that clients cannot be told of.

    Raises:
        ValueError: With the reason.
    """
    try:
        described_space(observation_space)
    except ValueError as error:
        raise ValueError(f"`external_port` is set, but clients cannot send such observations: {error}.") from error


def _refuse_without_port(config: CalQLConfig, defaults: CalQLConfig) -> None:
    for name in _OF_CLIENTS:
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}, but `external_port` is not set, so that nobody listens for "
                "clients; set it, or drop the former."
            )
    if getattr(config.env_runner_cls, LISTENS, False) and not config.in_evaluation:
        raise ValueError(
            f"`env_runner_cls` is {config.env_runner_cls.__name__}, which listens for clients; set "
            "`.external_clients(external_port=5555)`."
        )


def _check_place(config: CalQLConfig) -> None:
    num_ports = max(1, config.num_env_runners)
    last = 2**16 - num_ports
    if not is_integer(config.external_port, 1) or int(config.external_port or 0) > last:
        raise ValueError(
            f"`external_port` must be None or a port from 1 to {last}, since {num_ports} env runners listen at as many "
            f"ports from there on, got {config.external_port!r}."
        )
    host, file = config.external_host, config.external_token_file
    if not (isinstance(host, str) and host.strip()):
        raise ValueError(f'`external_host` must be an address such as "127.0.0.1", got {host!r}.')
    if not (file is None or (isinstance(file, str) and file)):
        raise ValueError(f"`external_token_file` must be None or the path of a file, got {file!r}.")
    if file is None and not _is_this_machine(host):
        raise ValueError(
            f"`external_host` is {host!r}, which others can reach; set `external_token_file` to a file with a token "
            'that clients must know, or let `external_host` be "127.0.0.1".'
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_what_clients_have(config: CalQLConfig, defaults: CalQLConfig) -> None:
    for name, reason in _OF_ENVIRONMENTS.items():
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(
                f"`{name.removeprefix('_')}` is set, and so is `external_port`: {reason}. Drop one of them."
            )
    module = getattr(config._rl_module_spec, "module_class", None)
    if module is not None and module is not config.get_default_rl_module_spec().module_class:
        raise ValueError(
            f"`rl_module_spec` is one of {module.__name__}, and `external_port` is set: clients get the policy as a "
            "file, which cannot hold its code. Drop one of them."
        )
    for name in _CALLBACKS:
        if getattr(config, f"callbacks_{name}") is not None or _is_overridden(name, config.callbacks_class):
            raise ValueError(
                f"The callback `{name}` is set, and so is `external_port`: episodes begin and go on in the clients, "
                "which call none. Drop one of them; `on_episode_end` and `on_sample_end` are called."
            )
    if config.env_runner_cls is not None and not getattr(config.env_runner_cls, LISTENS, False):
        raise ValueError(
            f"`env_runner_cls` must be a subclass of `ExternalEnvRunner` where `external_port` is set, got "
            f"{config.env_runner_cls!r}; drop it."
        )


def _is_overridden(name: str, classes: Any) -> bool:
    from ray.rllib.callbacks.callbacks import RLlibCallback

    listed: Iterable[Any] = classes if isinstance(classes, (list, tuple)) else [classes]
    of_user = [one for one in listed if isinstance(one, type) and not one.__module__.startswith("rllib_calql.")]
    return any(getattr(one, name, None) is not getattr(RLlibCallback, name) for one in of_user)
