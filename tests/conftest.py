"""Fixtures: one Ray for the session, small learners, small episodes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch

from rllib_calql import CalQLConfig
from rllib_calql.learner import CalQLTorchLearner

# Networks of these sizes are up to six times slower on two threads, and more so where several tests share the cores.
# Processes that tests start inherit the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with two CPUs, started once."""
    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            # Workers unpickle the environments of these tests.
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
        )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _minari_root(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets of the tests live in one folder of the session, never in the user's."""
    root = tmp_path_factory.getbasetemp() / "minari"
    root.mkdir(exist_ok=True)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))


def make_learner(
    *, obs_dim: int = 3, action_dim: int = 2, hiddens: tuple[int, ...] = (16, 16), seed: int = 0, **settings: Any
) -> CalQLTorchLearner:
    """A learner with small networks, outside any algorithm. `settings` are attributes of the config."""
    config = CalQLConfig()
    config.rl_module(model_config={"actor_hiddens": list(hiddens), "critic_hiddens": list(hiddens)})
    config.debugging(seed=seed)
    for name, value in settings.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    config.validate()
    spaces = {
        "default_policy": (
            gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32),
            gym.spaces.Box(-1.0, 1.0, (action_dim,), np.float32),
        )
    }
    learner: CalQLTorchLearner = config.build_learner(spaces=spaces)
    return learner
