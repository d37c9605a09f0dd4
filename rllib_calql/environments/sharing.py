"""Environments in other processes: what a name needs there, shipped with the config, and where its modules lie.

A `gymnasium.register` holds for the process that calls it. Env runners, trials of Ray Tune and whoever opens a
checkpoint later are other ones.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gymnasium.envs import registration
from gymnasium.envs.registration import EnvSpec

from rllib_calql.environments.imported import attribute_of
from rllib_calql.environments.resolving import EnvOfName, is_known_id, resolve_env

_OFFERED = "rllib_calql/offered/"  # Before the name, in Ray's registry of environments.

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedEnv:
    """The registration of one environment, for processes that lack it.

    Attributes:
        name: The name.
        registry: Whose registration it is.
        content: What is registered, pickled; classes of a script that was run are in it, those of modules by name.
    """

    name: str
    registry: Literal["gymnasium", "ray"]
    content: bytes

    def restore(self) -> None:
        """Registers the environment in this process, unless something has that name here."""
        if self.registry == "ray":
            if not _is_ray_name(self.name):
                _register_with_ray(self.name, self._loaded())
        elif not is_known_id(self.name):
            found = self._loaded()
            spec = found if isinstance(found, EnvSpec) else EnvSpec(self.name, entry_point=found)
            registration.registry[self.name] = spec

    def _loaded(self) -> Any:
        from ray import cloudpickle

        try:
            return cloudpickle.loads(self.content)
        except Exception as error:  # It may not be needed here at all.
            return _Unavailable(self.name, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class _Unavailable:
    """Stands for an environment whose classes cannot be imported here, until somebody makes it."""

    name: str
    reason: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(
            f"`env` {self.name!r} needs what cannot be imported in this process: {self.reason}. Put its module into a "
            "folder of PYTHONPATH, or install it, on every machine."
        )


def shared_env(env: Any) -> SharedEnv | None:
    """The registration of an environment's name that other processes may lack; None if they need none.

    Args:
        env: The setting `env`.
    """
    if not isinstance(env, str):
        return None
    content: Any
    registry: Literal["gymnasium", "ray"]
    if _is_ray_name(env):
        from ray.tune.registry import ENV_CREATOR, _global_registry

        registry, content = "ray", _global_registry.get(ENV_CREATOR, env)
        if isinstance(content, (EnvOfName, _Unavailable)):
            return None
    else:
        registry, content = "gymnasium", registration.registry.get(env)
        if content is None or _is_known_everywhere(content):
            return None
        content = _without_main(content)
    from ray import cloudpickle

    try:
        return SharedEnv(env, registry, cloudpickle.dumps(content))
    except Exception as error:
        logger.warning(
            "`env` %r works in this process alone, since its registration cannot be sent to others: %s. Env runners "
            "and checkpoints need 'MODULE:%s' of the module that registers it.",
            env,
            error,
            env,
        )
        return None


def provide(env: Any) -> None:
    """Makes sure that RLlib, which knows less forms of a name, makes this environment here and on its env runners.

    Args:
        env: The setting `env`. Nothing is done for one that cannot be found; who needs it says so.
    """
    if not isinstance(env, str) or _is_ray_name(env):
        return
    if _is_ray_name(_OFFERED + env) and not is_known_id(env):
        from ray.tune.registry import ENV_CREATOR, _global_registry

        _global_registry.get(ENV_CREATOR, _OFFERED + env).restore()
    if is_known_id(env):
        return
    try:
        is_path = resolve_env(env).kind == "class path"
    except (ValueError, ImportError, TypeError):
        return
    if is_path:
        _register_with_ray(env, EnvOfName(env))


def offer(env: Any) -> None:
    """Makes an environment of this process known to the trials of Ray Tune, which run in others.

    Args:
        env: The setting `env`.
    """
    provide(env)
    if (shared := shared_env(env)) is not None and shared.registry == "gymnasium":
        _register_with_ray(_OFFERED + shared.name, shared)


def import_folders(env: Any) -> list[str]:
    """Folders from which the modules of an environment were imported, installed ones left out.

    Args:
        env: The setting `env`.
    """
    try:
        resolved = resolve_env(env)
    except (ValueError, ImportError, TypeError):
        return []
    modules = [resolved.module, getattr(resolved.creator, "__module__", None)]
    spec = registration.registry.get(env.rpartition(":")[2]) if isinstance(env, str) else None
    if spec is not None:
        entry = spec.entry_point
        modules.append(entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", None))
    folders = (_import_folder(name) for name in modules if name)
    return list(dict.fromkeys(folder for folder in folders if folder is not None))


def _import_folder(module_name: str) -> str | None:
    top = sys.modules.get(module_name.split(".")[0])
    file = getattr(top, "__file__", None)
    if file is None:
        return None
    path = Path(file).absolute()
    folder = path.parent.parent if path.name == "__init__.py" else path.parent
    is_installed = any(part in ("site-packages", "dist-packages") for part in folder.parts)
    own = Path(__file__).absolute().parents[2]
    return None if is_installed or folder == own or folder.is_relative_to(_standard_library()) else str(folder)


def _standard_library() -> Path:
    return Path(os.__file__).parent


def _without_main(spec: EnvSpec) -> EnvSpec:
    """A script that is run is a module of its process alone."""
    entry = spec.entry_point
    if isinstance(entry, str) and entry.startswith("__main__:"):
        entry = attribute_of(sys.modules["__main__"], entry.partition(":")[2])
    return replace(spec, entry_point=entry)


def _is_known_everywhere(spec: EnvSpec) -> bool:
    return isinstance(spec.entry_point, str) and spec.entry_point.split(".")[0] == "gymnasium"


def _is_ray_name(name: str) -> bool:
    from ray.tune.registry import ENV_CREATOR, _global_registry

    return bool(_global_registry.contains(ENV_CREATOR, name))


def _register_with_ray(name: str, creator: Any) -> None:
    from ray.tune.registry import ENV_CREATOR, _global_registry

    _global_registry.register(ENV_CREATOR, name, creator)
