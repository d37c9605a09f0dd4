"""The public names: what the package exports, that Tune and RLlib find "CalQL", and the signatures users type."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.rllib.algorithms.algorithm_config import NotProvided
from ray.rllib.algorithms.cql import CQL, CQLConfig
from ray.tune.registry import get_trainable_cls

import rllib_calql
from rllib_calql import CalQL, CalQLConfig


def run(code: str, timeout_s: float = 120.0) -> str:
    """Runs code in a fresh interpreter, from no folder of ours, and returns its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, check=False, cwd=Path.home()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_exports_its_names() -> None:
    of_training = ["BudgetSpentError", "CalQL", "CalQLConfig", "__version__", "register"]
    of_policies = ["EpisodeLog", "Policy", "PolicyClient", "export_policy", "load_policy"]
    assert sorted(rllib_calql.__all__) == sorted([*of_training, *of_policies])
    assert dir(rllib_calql) == sorted(rllib_calql.__all__)
    assert all(hasattr(rllib_calql, name) for name in rllib_calql.__all__)


def test_the_exported_classes_are_those_of_the_modules() -> None:
    from rllib_calql import algorithm, config

    assert rllib_calql.CalQL is algorithm.CalQL
    assert rllib_calql.CalQLConfig is config.CalQLConfig


def test_the_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([abrc.]\w+)?", rllib_calql.__version__)


@pytest.mark.parametrize("name", ["CQL", "calql", "CalQLAlgorithm"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'rllib_calql' has no attribute '{name}'"):
        getattr(rllib_calql, name)
    with pytest.raises(ImportError, match=name):
        exec(f"from rllib_calql import {name}")


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(rllib_calql.__file__).parent / "py.typed").is_file()


def test_the_classes_extend_rllib_s_cql() -> None:
    assert issubclass(CalQL, CQL)
    assert issubclass(CalQLConfig, CQLConfig)


def test_the_classes_travel_by_reference() -> None:
    for cls in (CalQL, CalQLConfig):
        assert pickle.loads(pickle.dumps(cls)) is cls


# --- Registration -----------------------------------------------------------------------------------------------------


def test_registering_again_changes_nothing() -> None:
    before = get_trainable_cls("CalQL")
    for _ in range(3):
        rllib_calql.register()
    assert get_trainable_cls("CalQL") is before is CalQL


def test_the_name_resolves_after_nothing_but_the_import() -> None:
    code = """
import sys
import rllib_calql
from ray.tune.registry import get_trainable_cls
assert "ray.rllib" not in sys.modules
print(get_trainable_cls("CalQL").__module__, get_trainable_cls("CalQL").__name__)
"""
    assert run(code) == "rllib_calql.algorithm CalQL\n"


def test_the_name_outlives_a_restart_of_ray_and_is_known_to_workers() -> None:
    # `ray.shutdown()` empties Tune's registry, here before the name was ever used. Workers import nothing themselves.
    code = """
import ray
import rllib_calql

def resolve():
    from ray.tune.registry import get_trainable_cls
    return get_trainable_cls("CalQL").__name__

def start():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)

start()
ray.shutdown()
start()
print(resolve(), ray.get(ray.remote(resolve).remote(), timeout=60))
ray.shutdown()
"""
    assert run(code) == "CalQL CalQL\n"


def test_rllib_s_list_of_algorithms_knows_the_name_once_it_is_loaded() -> None:
    from ray.rllib.algorithms.registry import ALGORITHMS

    cls, config = ALGORITHMS["CalQL"]()
    assert cls is CalQL
    assert type(config) is CalQLConfig


# --- Signatures -------------------------------------------------------------------------------------------------------

SIGNATURES = {
    "training": [
        "calibrate",
        "reference_value",
        "reference_updates",
        "reference_fit",
        "reference_online",
        "calibration_quantile",
        "calibration_form",
        "bound_uniform_actions",
        "min_q_weight",
        "num_actions",
        "temperature",
        "importance_sampling",
        "lagrangian",
        "lagrangian_thresh",
        "max_target_backup",
        "deterministic_backup",
        "n_step",
        "conservative_gap_clip",
        "num_critics",
        "critic_subset",
        "actor_q",
        "actor_update_period",
        "actor_lr",
        "critic_lr",
        "alpha_lr",
        "tau",
        "target_update_period",
        "bc_updates",
        "bc_weight",
        "precision",
        "store_buffer_in_checkpoints",
        "kwargs",
    ],
    "offline_data": [
        "input_",
        "reward_scale",
        "reward_bias",
        "failure_reward",
        "truncation",
        "action_space_of_data",
        "normalize_observations",
        "observation_clip",
        "use_recorded_returns",
        "unfinished_episodes",
        "missing_final_observation",
        "max_episode_steps_in_data",
        "observation_jump_tolerance",
        "store_memory_limit",
        "cache_dir",
        "share_offline_data",
        "validation_fraction",
        "validation_seed",
        "kwargs",
    ],
    "fine_tuning": [
        "offline_updates",
        "updates_per_iteration",
        "mixing_ratio",
        "updates_per_env_step",
        "min_q_weight_online",
        "conservative_online",
        "max_target_backup_online",
        "deterministic_backup_online",
        "actor_update_period_online",
        "calibrate_online",
        "warmup_env_steps",
        "online_capacity",
        "sample_async",
        "max_staleness_env_steps",
        "max_episode_env_steps",
        "max_online_env_steps",
        "pretrained",
    ],
    "evaluation": [
        "success_key",
        "success_rule",
        "offline_evaluation_type",
        "offline_evaluation_duration",
        "kwargs",
    ],
    "rl_module": ["model_config", "kwargs"],
}


def parameters(method: str) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(getattr(CalQLConfig, method)).parameters)
    found.pop("self")
    return found


@pytest.mark.parametrize("method", SIGNATURES)
def test_a_typed_method_has_the_documented_signature(method: str) -> None:
    found = parameters(method)
    assert list(found) == SIGNATURES[method]
    for name, parameter in found.items():
        if name == "kwargs":
            assert parameter.kind is inspect.Parameter.VAR_KEYWORD
        else:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert parameter.default is NotProvided
            assert parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("method", SIGNATURES)
def test_every_argument_is_documented(method: str) -> None:
    docstring = inspect.getdoc(getattr(CalQLConfig, method))
    assert docstring is not None
    for name in parameters(method):
        documented = r"\*\*kwargs" if name == "kwargs" else name
        assert re.search(rf"^    {documented}: \S", docstring, re.MULTILINE), name


@pytest.mark.parametrize("method", SIGNATURES)
def test_a_typed_method_takes_keywords_only_and_returns_the_config(method: str) -> None:
    config = CalQLConfig()
    assert getattr(config, method)() is config
    with pytest.raises(TypeError):
        getattr(config, method)(1)


def test_build_and_build_algo_take_the_same_arguments() -> None:
    def positional(method: Any) -> list[str]:
        return [p.name for p in inspect.signature(method).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(CalQLConfig.build) == ["self", "env", "use_copy"]
    assert positional(CalQLConfig.build_algo)[:3] == ["self", "env", "use_copy"]
