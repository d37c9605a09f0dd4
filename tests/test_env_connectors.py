"""The package's connectors at the environment give the episodes of RLlib's default pipelines, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from tiny import LineEnv

from rllib_calql import CalQLConfig
from rllib_calql.env_connectors import ActionsForEnv, LatestObservations


class StockConfig(CalQLConfig):
    """CalQL with RLlib's pipelines."""

    def build_env_to_module_connector(self, *args: Any, **kwargs: Any) -> Any:
        """RLlib's."""
        return AlgorithmConfig.build_env_to_module_connector(self, *args, **kwargs)

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


def runner_of(config: CalQLConfig, env: type, num_envs: int) -> SingleAgentEnvRunner:
    config.environment(env).env_runners(num_envs_per_env_runner=num_envs).debugging(seed=3)
    torch.manual_seed(0)
    return SingleAgentEnvRunner(config=config)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("env", [LineEnv, WideBoundsEnv])
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
