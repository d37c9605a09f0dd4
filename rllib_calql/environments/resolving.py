"""`resolve_env`: what the setting `env` stands for, found without making the environment."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
from gymnasium.envs import registration

from rllib_calql.environments.imported import (
    attribute_of,
    environments_in,
    imported_module,
    place_of,
)
from rllib_calql.system.similar_words import close_matches

Kind = Literal["gymnasium id", "ray name", "class path", "callable"]
_WAYS = (
    "An environment is named by an id that Gymnasium knows ('Pendulum-v1'), by 'MODULE:ID' of a module that registers "
    "the id, by 'MODULE:CLASS' or 'MODULE.CLASS', by a name of `ray.tune.register_env`, or in Python by its class."
)
_REMEDY_FOR_KEYWORDS = (
    "Write `def __init__(self, config=None)`, or register it by `gymnasium.register` and set `env` to the id; entries "
    "of `env_config` are then keyword arguments."
)
_VERSION = re.compile(r"-v\d+$")


@dataclass(frozen=True)
class ResolvedEnv:
    """An environment that was found and not made.

    Attributes:
        name: What the user wrote.
        kind: How it was found.
        creator: Called with `env_config`, a mapping; returns the environment.
        module: Module that has to be imported for it, as the user named it; None without.
    """

    name: str
    kind: Kind
    creator: Callable[[Any], Any]
    module: str | None = None

    def make(self, env_config: Mapping[str, Any] | None = None) -> gym.Env[Any, Any]:
        """Makes the environment.

        Args:
            env_config: For an id, the keyword arguments of its constructor; otherwise its one argument.

        Raises:
            RuntimeError: If its constructor raises; with the error and its line.
            TypeError: If what it makes is no Gymnasium environment.
        """
        from ray.rllib.env.env_context import EnvContext

        try:
            made = self.creator(EnvContext(dict(env_config or {}), worker_index=0))
        except Exception as error:
            place = place_of(error)
            raise RuntimeError(
                f"Making the environment {self.name!r} with `env_config` {dict(env_config or {})} failed: "
                f"{type(error).__name__}: {error}{f' ({place})' if place else ''}."
            ) from error
        if not isinstance(made, gym.Env):
            raise TypeError(f"`env` {self.name!r} makes {_described(type(made))}{_remedy_for(type(made))}")
        return made


@dataclass(frozen=True)
class EnvOfName:
    """Stands in Ray's registry for "module:Class" and "module.Class", and finds the class where it is called.

    Attributes:
        name: The name.
    """

    name: str

    def __call__(self, config: Any) -> Any:
        """Makes the environment."""
        return resolve_env(self.name).creator(config)


def resolve_env(env: Any, setting: str = "`env`") -> ResolvedEnv:
    """Finds an environment. Modules that its name leads to are imported; nothing is made.

    Args:
        env: An id that Gymnasium knows, "module:id", "module:Class", "module.Class", a name of
            `ray.tune.register_env`, a class, or a function. Classes and functions take `env_config` as one argument.
        setting: What the user set, for messages.

    Raises:
        ValueError: If nothing has that name; with names that are similar and the ways that work.
        ImportError: If a module that it names does not exist or raises; with the line.
        TypeError: If it leads to something that is no environment.
    """
    if isinstance(env, str):
        return _resolve_name(env, setting)
    if isinstance(env, gym.Env):
        raise TypeError(f"{setting} is an environment that has been made, {env}; give its class, or a function.")
    if not callable(env):
        raise TypeError(f"{setting} must be the name of an environment, a class or a function, got {env!r}. {_WAYS}")
    name = getattr(env, "__name__", type(env).__name__)
    _check_creator(env, f"{setting} {name}")
    return ResolvedEnv(name, "callable", env)


def _resolve_name(name: str, setting: str) -> ResolvedEnv:
    what = f"{setting} {name!r}"
    if creator := _registered_with_ray(name):
        return ResolvedEnv(name, "ray name", creator)
    if ":" in name:
        module, _, attribute = name.partition(":")
        return _resolve_in_module(module, attribute, name, what)
    if is_known_id(name):
        _check_entry_point(name, what)
        return ResolvedEnv(name, "gymnasium id", lambda config: gym.make(name, **config))
    module, _, attribute = name.rpartition(".")
    if module and attribute.isidentifier() and "/" not in name and not _VERSION.search(name):
        return _resolve_in_module(module, attribute, name, what)
    raise ValueError(f"{what} is not registered.{close_matches(name, _known_names())} {_WAYS}")


def is_known_id(name: str) -> bool:
    """Whether Gymnasium makes an environment of this id in this process. An id without version takes the highest."""
    if name in registration.registry:
        return True
    try:
        namespace, base, version = registration.parse_env_id(name)
    except gym.error.Error:
        return False
    return version is None and registration.find_highest_version(namespace, base) is not None


def time_limit_of(env: Any, env_config: Mapping[str, Any] | None = None) -> int | None:
    """Steps after which an environment that Gymnasium makes by an id ends an episode; None if that is not known.

    Args:
        env: As in `resolve_env`.
        env_config: Keyword arguments of `gymnasium.make`, which has one that sets the limit.
    """
    if not isinstance(env, str) or _registered_with_ray(env) is not None:
        return None
    name = env.rpartition(":")[2]
    if not is_known_id(name):
        return None
    limit = (env_config or {}).get("max_episode_steps")
    if limit is None:
        limit = gym.spec(name).max_episode_steps
    return limit if isinstance(limit, int) and limit > 0 else None  # Gymnasium takes -1 for no limit.


def _resolve_in_module(module_name: str, attribute: str, name: str, what: str) -> ResolvedEnv:
    before = set(registration.registry)
    module = imported_module(module_name, what)
    is_id = is_known_id(attribute) and not (hasattr(module, attribute) and _is_id_of_another(attribute, module_name))
    if is_id:
        _check_entry_point(attribute, what)
        return ResolvedEnv(name, "gymnasium id", lambda config: gym.make(attribute, **config), module_name)
    try:
        found = attribute_of(module, attribute)
    except AttributeError:
        ids = sorted(set(registration.registry) - before)
        classes = environments_in(module)
        there = [f"the classes {', '.join(classes)}"] if classes else []
        there += [f"the ids {', '.join(ids)}"] if ids else []
        listed = f" It has {' and '.join(there)}." if there else " It defines no environment and registers no id."
        raise ValueError(
            f"{what}: the module {module_name!r} was imported, but it has no {attribute!r}"
            f"{' and registers no such id' if ':' in name else ''}.{close_matches(attribute, [*classes, *ids])}{listed}"
        ) from None
    _check_creator(found, what)
    return ResolvedEnv(name, "class path", found, module_name)


def _is_id_of_another(attribute: str, module_name: str) -> bool:
    """Whether an id without version, which Gymnasium completes, was registered for another module's environment."""
    if attribute in registration.registry:
        return False
    namespace, base, _ = registration.parse_env_id(attribute)
    version = registration.find_highest_version(namespace, base)
    entry_point = registration.registry[registration.get_env_id(namespace, base, version)].entry_point
    owner = entry_point.partition(":")[0] if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
    return owner != module_name


def _check_creator(creator: Any, what: str) -> None:
    """Refuses what is not made to be called with `env_config`, and classes of something else."""
    if not callable(creator):
        raise TypeError(f"{what} is {_described(type(creator))}, not a class or a function; name the class.")
    if isinstance(creator, type) and not issubclass(creator, gym.Env):
        raise TypeError(f"{what} is {_described(creator, is_class=True)}{_remedy_for(creator)}")
    try:
        signature = inspect.signature(creator)
    except (TypeError, ValueError):  # Of some that are written in C.
        return
    try:
        signature.bind({})
    except TypeError as error:
        raise TypeError(
            f"{what} must take one argument, the mapping `env_config`, and has the signature {signature}: {error}. "
            f"{_REMEDY_FOR_KEYWORDS}"
        ) from None
    first = next(iter(signature.parameters.values()), None)
    if first is not None and _is_no_mapping(first):
        raise TypeError(
            f"{what} has the signature {signature}, and is called with one argument, the mapping `env_config`, which "
            f"would be its `{first.name}`. {_REMEDY_FOR_KEYWORDS}"
        )


def _is_no_mapping(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is meant for something else than `env_config`, as those of Gymnasium's own classes."""
    if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
        return False
    default = parameter.default
    return parameter.name == "render_mode" or isinstance(default, (bool, int, float, str, tuple, list))


def _check_entry_point(name: str, what: str) -> None:
    """Imports the module of an id's class, so that what is missing shows before anything is started."""
    spec = registration.registry.get(name)
    if spec is None or not isinstance(spec.entry_point, str):
        return
    module_name, _, attribute = spec.entry_point.partition(":")
    module = imported_module(module_name, f"The entry point '{spec.entry_point}' of {what}")
    try:
        attribute_of(module, attribute)
    except AttributeError:
        raise ValueError(
            f"{what} is registered with the entry point '{spec.entry_point}', but the module {module_name!r} has no "
            f"{attribute!r}.{close_matches(attribute, environments_in(module))}"
        ) from None


def _registered_with_ray(name: str) -> Callable[[Any], Any] | None:
    from ray.tune.registry import ENV_CREATOR, _global_registry

    if not _global_registry.contains(ENV_CREATOR, name):
        return None
    creator: Callable[[Any], Any] = _global_registry.get(ENV_CREATOR, name)
    return None if isinstance(creator, EnvOfName) else creator


def _known_names() -> list[str]:
    from ray.tune.registry import ENV_CREATOR, _global_registry

    names = {key for category, key in _global_registry._to_flush if category == ENV_CREATOR}
    names |= {key for category, key in _global_registry._registered if category == ENV_CREATOR}
    return [*registration.registry, *sorted(names)]


def _described(kind: type, *, is_class: bool = False) -> str:
    article = "a class" if is_class else "an object of the class"
    return f"{article} {kind.__module__}.{kind.__qualname__}, which is no `gymnasium.Env`"


def _remedy_for(kind: type) -> str:
    if any(base.__module__.split(".")[0] == "gym" for base in kind.__mro__):
        return (
            " but one of the old `gym` package: derive it from `gymnasium.Env` and take spaces from "
            "`gymnasium.spaces`; `reset(seed, options)` then returns (obs, info), and `step` returns (obs, reward, "
            "terminated, truncated, info)."
        )
    return "; derive it from `gymnasium.Env`."
