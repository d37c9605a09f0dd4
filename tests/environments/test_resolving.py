"""The name of an environment: what it leads to, and what is said where it leads to nothing. No Ray is started."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import registry
from ray.tune.registry import ENV_CREATOR, _global_registry

from rllib_calql.environments.resolving import resolve_env

TANK = """
import gymnasium as gym
import numpy as np

class TankEnv(gym.Env):
    observation_space = gym.spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 3.0, (1,), np.float32)

    def __init__(self, config=None):
        self.level = (config or {}).get("level", 0.5)
        if self.level > 1:
            raise ValueError("a level above 1")

def half_full(config):
    return TankEnv({"level": 0.5})

class Pump:
    def __init__(self, config=None):
        pass

class Wired(TankEnv):
    def __init__(self, wire, speed):
        pass

def makes_a_pump(config):
    return Pump()

made = TankEnv()
"""
REGISTERING = """
import gymnasium as gym
gym.register(id="Tank-v3", entry_point="tanks:TankEnv", max_episode_steps=7, kwargs={"config": {"level": 0.25}})
gym.register(id="Leak-v0", entry_point="tanks:LeakEnv")
gym.register(id="Dry-v0", entry_point="tanks_of_nobody:Env")
"""


class OfKeywords(gym.Env):
    """Takes keyword arguments, as Gymnasium's own classes."""

    def __init__(self, render_mode: str | None = None, size: int = 5) -> None:
        self.size = size


class OfASize(gym.Env):
    """Its first argument is a number."""

    def __init__(self, size: int = 5) -> None:
        self.size = size


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of a user in a folder on the import path, forgotten afterwards."""
    (tmp_path / "tanks.py").write_text(TANK)
    (tmp_path / "plant").mkdir()
    (tmp_path / "plant" / "__init__.py").write_text("")
    (tmp_path / "plant" / "tanks.py").write_text(TANK)
    (tmp_path / "plant_ids.py").write_text(REGISTERING)
    (tmp_path / "needs_more.py").write_text("x = 1\nimport nothing_of_this_name\n")
    (tmp_path / "broken.py").write_text("import gymnasium\n\ndef f():\n    return 1 / 0\n\nLEVEL = f()\n")
    (tmp_path / "unfinished.py").write_text("x = 1\nclass A(:\n")
    (tmp_path / "outdated.py").write_text("import gym\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules), dict(registry)
    yield
    for name in set(sys.modules) - before[0]:
        if name.split(".")[0] in ("tanks", "plant", "plant_ids", "needs_more", "broken", "unfinished", "outdated"):
            del sys.modules[name]
    registry.clear()
    registry.update(before[1])


@pytest.mark.parametrize("name", ["tanks:TankEnv", "tanks.TankEnv", "plant.tanks:TankEnv", "plant.tanks.TankEnv"])
def test_a_class_is_found_by_its_module(name: str) -> None:
    found = resolve_env(name)
    assert (found.kind, found.module) == ("class path", name.replace(":", ".").rpartition(".")[0])
    env: Any = found.make({"level": 0.75})
    assert (type(env).__name__, env.level) == ("TankEnv", 0.75)


def test_a_function_of_a_module_makes_the_environment() -> None:
    env: Any = resolve_env("tanks:half_full").make({"level": 0.9})
    assert env.level == 0.5


def test_an_id_is_found_by_the_module_that_registers_it() -> None:
    found = resolve_env("plant_ids:Tank-v3")
    assert (found.kind, found.module) == ("gymnasium id", "plant_ids")
    env: Any = found.make()
    assert env.unwrapped.level == 0.25  # By the registration's arguments.
    assert env.spec.max_episode_steps == 7
    assert resolve_env("Tank-v3").kind == "gymnasium id"  # The module has been imported.
    assert resolve_env("Tank").kind == "gymnasium id"  # The highest version, as Gymnasium has it.


def test_ids_of_gymnasium_and_of_ray_are_found() -> None:
    assert resolve_env("Pendulum-v1").make({"g": 5.0}).unwrapped.g == 5.0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'tank-of-ray' is not registered"):
        resolve_env("tank-of-ray")
    import tanks  # type: ignore[import-not-found]

    _global_registry.register(ENV_CREATOR, "tank-of-ray", lambda config: tanks.TankEnv(config))
    try:
        env: Any = resolve_env("tank-of-ray").make({"level": 0.125})
        assert env.level == 0.125
        with pytest.raises(ValueError, match=r"Did you mean 'tank-of-ray'\?"):
            resolve_env("tank_of_ray")
    finally:
        _global_registry.unregister(ENV_CREATOR, "tank-of-ray")


def test_a_class_and_a_function_stand_for_themselves() -> None:
    import tanks

    assert resolve_env(tanks.TankEnv).make({"level": 0.25}).level == 0.25  # type: ignore[attr-defined]
    assert resolve_env(lambda config: tanks.TankEnv({"level": config["start"]})).make({"start": 1}).level == 1  # type: ignore[attr-defined]


def test_a_class_is_found_though_another_module_has_registered_an_id_of_its_name() -> None:
    gym.register("TankEnv-v7", entry_point="somewhere_else:Pool")
    try:
        found = resolve_env("tanks:TankEnv")
    finally:
        del gym.registry["TankEnv-v7"]
    assert found.kind == "class path"


def test_an_id_without_version_that_the_module_registers_wins_over_its_class() -> None:
    gym.register("TankEnv-v7", entry_point="tanks:TankEnv", max_episode_steps=5)
    try:
        found = resolve_env("tanks:TankEnv")
    finally:
        del gym.registry["TankEnv-v7"]
    assert found.kind == "gymnasium id"  # With its time limit.


def test_finding_makes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import tanks

    monkeypatch.setattr(tanks.TankEnv, "__init__", lambda self, config=None: pytest.fail("made"))
    monkeypatch.setattr(tanks, "half_full", lambda config: pytest.fail("made"))
    for env in ("tanks:TankEnv", "plant_ids:Tank-v3", "tanks:half_full", tanks.TankEnv):
        resolve_env(env)


WRONG: list[tuple[Any, type[Exception], str]] = [
    ("Pendullum-v1", ValueError, r"`env` 'Pendullum-v1' is not registered\. Did you mean 'Pendulum-v1'.*'MODULE:ID'.*"),
    ("Silo-v0", ValueError, r"'Silo-v0' is not registered.*'MODULE:CLASS' or 'MODULE\.CLASS'.*register_env"),
    ("", ValueError, r"'' is not registered"),
    (
        "tanksy:TankEnv",
        ImportError,
        r"there is no module 'tanksy'\. Did you mean 'tanks'.*that Python imports",
    ),
    ("plant.tank.TankEnv", ImportError, r"there is no module 'plant\.tank'\. Did you mean 'plant\.tanks'\?"),
    ("tanks:TankEn", ValueError, r"has no 'TankEn'.*Did you mean 'TankEnv'\? It has the classes TankEnv, Wired\."),
    ("tanks.tankenv", ValueError, r"has no 'tankenv'\. Did you mean 'TankEnv'"),
    ("plant_ids:Tank-v4", ValueError, r"registers no such id\. Did you mean 'Tank-v3'.*the ids .*Tank-v3"),
    (
        "needs_more:Env",
        ImportError,
        r"ModuleNotFoundError: No module named 'nothing_.*line 2: import nothing_of",
    ),
    ("broken:Env", ImportError, r"ZeroDivisionError: division by zero .*broken\.py', line 4: return 1 / 0\)"),
    ("unfinished.Env", ImportError, r"SyntaxError.*unfinished\.py', line 2: class A\(:"),
    ("outdated:Env", ImportError, r"No module named 'gym'.*write `import gymnasium as gym`"),
    ("tanks:Pump", TypeError, r"is a class tanks\.Pump, which is no `gymnasium\.Env`; derive it"),
    ("tanks:made", TypeError, r"is an object of the class tanks\.TankEnv, .*not a class or a function; name the class"),
    ("tanks:Wired", TypeError, r"must take one argument.*\(wire, speed\).*`def __init__\(self, config=None\)`"),
    ("plant_ids:Leak-v0", ValueError, r"entry point 'tanks:LeakEnv', but the module 'tanks' has no 'LeakEnv'"),
    ("plant_ids:Dry-v0", ImportError, r"entry point 'tanks_of_nobody:Env' of .* there is no module 'tanks_of_nobody'"),
    ("not a name:Env", ImportError, r"'not a name', which is no name of a module; write it as behind `import`"),
    ("tanks.py:TankEnv", ImportError, r"there is no module 'tanks\.py'\. Write it without `\.py`\."),
    (7, TypeError, r"`env` must be the name of an environment, a class or a function, got 7"),
    (gym.make("Pendulum-v1"), TypeError, r"has been made.*give its class"),
    (
        OfKeywords,
        TypeError,
        r"signature \(render_mode.*, .* would be its `render_mode`\. Write `def __init__",
    ),
    (
        OfASize,
        TypeError,
        r"signature \(size.*, and is called with one arg.* would be its `size`\. .*gymnasium\.reg",
    ),
    (np.ndarray, TypeError, r"`env` ndarray is a class numpy\.ndarray, which is no `gymnasium\.Env`"),
]


@pytest.mark.parametrize(("env", "kind", "message"), WRONG, ids=[str(env)[:30] for env, _, _ in WRONG])
def test_a_name_that_leads_to_no_environment_is_refused_with_the_way_out(
    env: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"(?s){message}"):
        resolve_env(env)


def test_an_environment_of_the_old_gym_package_is_told_what_has_changed() -> None:
    base = type("Env", (), {"__module__": "gym.core", "__init__": lambda self, config: None})
    old = type("Tank", (base,), {"__module__": "tanks"})
    with pytest.raises(TypeError, match=r"old `gym` package: derive it from `gymnasium\.Env`"):
        resolve_env(old)
    with pytest.raises(TypeError, match=r"makes an object .*old `gym` package"):
        resolve_env(lambda config: old(config)).make()


def test_a_constructor_that_raises_is_told_with_its_line() -> None:
    with pytest.raises(
        RuntimeError, match=r"with `env_config` \{'level': 2\} failed: ValueError: a level above 1.*line"
    ):
        resolve_env("tanks:TankEnv").make({"level": 2})
    with pytest.raises(TypeError, match=r"'tanks:makes_a_pump' makes an object of the class tanks\.Pump"):
        resolve_env("tanks:makes_a_pump").make()
