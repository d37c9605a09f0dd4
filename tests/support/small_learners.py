"""Small learners outside any algorithm."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from rllib_calql import CalQLConfig
from rllib_calql.learning.learner import CalQLTorchLearner


def make_learner(
    *,
    obs_dim: int = 3,
    action_dim: int = 2,
    hiddens: tuple[int, ...] = (16, 16),
    activation: str = "relu",
    layer_norm: bool | str = False,
    seed: int = 0,
    **settings: Any,
) -> CalQLTorchLearner:
    """A learner with small networks, outside any algorithm. `settings` are attributes of the config."""
    config = CalQLConfig()
    widths = {"actor_hiddens": list(hiddens), "critic_hiddens": list(hiddens)}
    config.rl_module(model_config={**widths, "activation": activation, "layer_norm": layer_norm})
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
