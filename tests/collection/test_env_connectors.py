"""The package's connectors at the environment give the episodes of RLlib's default pipelines, bit for bit."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from tiny import LineEnv

from rllib_calql import CalQLConfig
from rllib_calql.collection.connectors import ActionsForEnv, FlatObservations, LatestObservations


class StockConfig(CalQLConfig):
    """CalQL with RLlib's pipelines."""

    def build_env_to_module_connector(self, *args: Any, **kwargs: Any) -> Any:
        """RLlib's, behind its flattening where that is needed."""
        config = self
        if self.env in (NestedEnv, TableEnv):
            config = self.copy(copy_frozen=False)
            config._env_to_module_connector = lambda *_: FlattenObservations()
        return AlgorithmConfig.build_env_to_module_connector(config, *args, **kwargs)

    def build_module_to_env_connector(self, *args: Any, **kwargs: Any) -> Any:
        """RLlib's."""
        return AlgorithmConfig.build_module_to_env_connector(self, *args, **kwargs)


class WideBoundsEnv(LineEnv):
    """Observations in float64, actions in unequal bounds."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.action_space = type(self.action_space)(-0.5, 2.0, (1,), np.float64)
        self.observation_space = type(self.observation_space)(-10.0, 10.0, (1,), np.float64)

    def reset(self, **kwargs: Any) -> Any:
        """In float64."""
        obs, info = super().reset(**kwargs)
        return obs.astype(np.float64), info

    def step(self, action: np.ndarray) -> Any:
        """In float64."""
        obs, *rest = super().step(action)
        return obs.astype(np.float64), *rest


class NestedEnv(LineEnv):
    """Observations of nested parts of several kinds, one of them read-only."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self._space = self.observation_space
        self.observation_space = gym.spaces.Dict(
            {
                "where": gym.spaces.Dict({"x": self._space, "table": gym.spaces.Box(-9.0, 9.0, (2, 3), np.float64)}),
                "side": gym.spaces.Discrete(2),
                "ahead": gym.spaces.Tuple((gym.spaces.MultiDiscrete([2, 3]), gym.spaces.MultiBinary(2))),
            }
        )

    def _nested(self, obs: np.ndarray) -> dict[str, Any]:
        side = int(obs[0] > 0)
        parts = {"x": obs, "table": np.arange(6.0).reshape(2, 3) * obs}
        ahead = (np.array([side, 2 - side]), np.array([1, side], np.int8))
        return {"where": parts, "side": side, "ahead": ahead}

    def reset(self, **kwargs: Any) -> Any:
        """Nested."""
        obs, info = super().reset(**kwargs)
        return self._nested(obs), info

    def step(self, action: np.ndarray) -> Any:
        """Nested."""
        obs, *rest = super().step(action)
        return self._nested(obs), *rest


class TableEnv(LineEnv):
    """Observations in a table, which is no image."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.observation_space = gym.spaces.Box(-99.0, 99.0, (2, 2), np.float64)

    def reset(self, **kwargs: Any) -> Any:
        """As a table."""
        obs, info = super().reset(**kwargs)
        return np.outer([1.0, 2.0], [obs[0], 3.0]), info

    def step(self, action: np.ndarray) -> Any:
        """As a table."""
        obs, *rest = super().step(action)
        return np.outer([1.0, 2.0], [obs[0], 3.0]), *rest


def runner_of(config: CalQLConfig, env: type, num_envs: int) -> SingleAgentEnvRunner:
    config.environment(env).env_runners(num_envs_per_env_runner=num_envs).debugging(seed=3)
    torch.manual_seed(0)
    return SingleAgentEnvRunner(config=config)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("env", [LineEnv, WideBoundsEnv, NestedEnv, TableEnv])
@pytest.mark.parametrize("explore", [True, False])
def test_episodes_equal_those_of_rllibs_pipelines(env: type, num_envs: int, explore: bool) -> None:
    sampled = []
    for config in (CalQLConfig(), StockConfig()):
        runner = runner_of(config, env, num_envs)
        env.log.clear()
        torch.manual_seed(1)
        episodes = runner.sample(num_timesteps=60, explore=explore)
        sampled.append((episodes, list(env.log)))
        runner.stop()
    (ours, our_steps), (stock, stock_steps) = sampled
    assert our_steps == stock_steps  # What the environment got.
    assert len(ours) == len(stock) >= num_envs
    for one, other in zip(ours, stock, strict=True):
        for name in ("observations", "actions", "rewards"):
            np.testing.assert_array_equal(getattr(one, name).data, getattr(other, name).data)
        assert one.actions.data.dtype == other.actions.data.dtype
        assert set(one.extra_model_outputs) == set(other.extra_model_outputs)
        for name, values in one.extra_model_outputs.items():
            np.testing.assert_array_equal(values.data, other.extra_model_outputs[name].data)


def test_the_lean_pipelines_are_used_unless_the_user_sets_connectors() -> None:
    runner = runner_of(CalQLConfig(), LineEnv, 1)
    assert any(isinstance(piece, LatestObservations) for piece in runner._env_to_module)
    assert any(isinstance(piece, ActionsForEnv) for piece in runner._module_to_env)
    runner.stop()
    runner = runner_of(CalQLConfig(), NestedEnv, 1)
    assert any(isinstance(piece, FlatObservations) for piece in runner._env_to_module)
    assert runner.module.observation_space.shape == (1 + 6 + 2 + 5 + 2,)
    runner.stop()
    seen: list[int] = []

    class Spy(ActionsForEnv):
        def __call__(self, *, batch: Any, **kwargs: Any) -> Any:
            seen.append(len(batch))
            return batch

    own = CalQLConfig().env_runners(module_to_env_connector=lambda *_: Spy())
    runner = runner_of(own, LineEnv, 1)
    runner.sample(num_timesteps=5, explore=True)
    assert len(seen) == 5
    runner.stop()
