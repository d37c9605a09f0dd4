"""Policies with random weights, and env runners that act by them in environments of random observations."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from rllib_calql import CalQLConfig
from rllib_calql.export.reading import PolicyData, policy_data
from rllib_calql.networks import rl_module
from rllib_calql.policy.spaces import described_space

Box = gym.spaces.Box
VECTOR = Box(-np.inf, np.inf, (5,), np.float32)
ACTIONS = Box(-1.0, 1.0, (3,), np.float32)
FLOAT64_ACTIONS = Box(np.array([-0.5, -3.0, 0.0]), np.array([2.0, -1.0, 1e-3]), dtype=np.float64)
ASYMMETRIC = Box(np.array([-0.5, 1.0, -7.0, 0.0], np.float32), np.array([2.0, 1.0, 3.0, 1e-3], np.float32))
DICT = gym.spaces.Dict(
    {
        "where": gym.spaces.Dict({"x": VECTOR, "table": Box(-1.0, 1.0, (2, 3), np.float64)}),
        "side": gym.spaces.Discrete(3, start=-1),
        "ahead": gym.spaces.Tuple((gym.spaces.MultiDiscrete([2, 3], start=[1, 0]), gym.spaces.MultiBinary((2, 2)))),
        "action": Box(-1, 1, (2,), np.int32),
    }
)
TUPLE = gym.spaces.Tuple((Box(-1.0, 1.0, (2,), np.float16), gym.spaces.Discrete(4)))
IMAGE = Box(0, 255, (14, 12, 3), np.uint8)
SMALL_IMAGES = {"conv_filters": [[8, 3, 2], [6, 3, 1]], "image_features": 10}


NUM_ENVS = 50  # So that a thousand observations take little time.
_seeds = itertools.count()


@dataclass(frozen=True)
class Case:
    """A kind of policy."""

    observations: gym.Space[Any]
    actions: Box = field(default_factory=lambda: ACTIONS)
    networks: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    trained_in_bf16: bool = False
    num_observations: int = 1000  # That it is tried on.


FEW = 200
CASES = {
    "box": Case(VECTOR),
    "box of float64": Case(Box(-2.0, 2.0, (4,), np.float64), FLOAT64_ACTIONS),
    "dict": Case(DICT),
    "tuple": Case(TUPLE),
    "discrete": Case(gym.spaces.Discrete(6, start=2), num_observations=FEW),
    "multi-discrete": Case(gym.spaces.MultiDiscrete(np.array([[2, 3], [4, 2]])), num_observations=FEW),
    "multi-binary": Case(gym.spaces.MultiBinary(7), num_observations=FEW),
    "image": Case(IMAGE, networks=SMALL_IMAGES),
    "asymmetric bounds, one of them fixed": Case(VECTOR, ASYMMETRIC),
    "normalised": Case(VECTOR, settings={"normalize_observations": True}),
    "normalised without a clip": Case(
        DICT, settings={"normalize_observations": True, "observation_clip": np.inf}, num_observations=FEW
    ),
    "layer norm": Case(VECTOR, networks={"layer_norm": True}),
    "trained in bf16": Case(VECTOR, networks={"layer_norm": "critic"}, trained_in_bf16=True),
    "image trained in bf16": Case(IMAGE, networks=SMALL_IMAGES, trained_in_bf16=True, num_observations=FEW),
    **{
        name: Case(VECTOR, networks={"activation": name}, num_observations=FEW)
        for name in ("tanh", "elu", "gelu", "silu", "leaky_relu")
    },
}


class DrawnObservations(gym.Env):  # type: ignore[type-arg]
    """Whatever is done, the next observation is drawn; what it gave and what it got is kept in `log`."""

    log: tuple[list[Any], list[np.ndarray]] = ([], [])

    def __init__(self, config: dict[str, Any]) -> None:
        self.observation_space, self.action_space = copy.deepcopy(config["observations"]), config["actions"]
        self.observation_space.seed(next(_seeds))

    def _drawn(self) -> Any:
        observation = self.observation_space.sample()
        DrawnObservations.log[0].append(observation)
        return observation

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """A new episode."""
        return self._drawn(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Takes an action; episodes have no end."""
        DrawnObservations.log[1].append(np.array(action))
        return self._drawn(), 0.0, False, False, {}


@dataclass(frozen=True)
class Trained:
    """A policy in an env runner, and as data."""

    case: Case
    runner: SingleAgentEnvRunner
    data: PolicyData

    def acts(self, num_steps: int, *, noise: np.random.Generator | None = None) -> tuple[list[Any], np.ndarray]:
        """Raw observations that the environment gave, and the actions that it got, greedy or sampled by `noise`."""
        DrawnObservations.log[0].clear()
        DrawnObservations.log[1].clear()
        drawn = rl_module.torch.randn_like
        rl_module.torch.randn_like = lambda mean: torch.from_numpy(noise.standard_normal(tuple(mean.shape), np.float32))
        try:
            self.runner.sample(num_timesteps=num_steps, explore=noise is not None, force_reset=True)
        finally:
            rl_module.torch.randn_like = drawn
        observations, actions = DrawnObservations.log
        return observations[:num_steps], np.stack(actions[:num_steps])


def trained(case: Case, *, hiddens: tuple[int, ...] = (32, 32)) -> Trained:
    """A policy of this kind with random weights of usual sizes."""
    config = CalQLConfig().environment(
        DrawnObservations, env_config={"observations": case.observations, "actions": case.actions}
    )
    config.env_runners(num_envs_per_env_runner=NUM_ENVS)
    config.rl_module(model_config={"actor_hiddens": list(hiddens), "critic_hiddens": [4], **case.networks})
    for name, value in case.settings.items():
        setattr(config, name, value)
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    module = runner.module
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 9.0
        drawn = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data.copy_(drawn + (parameter.data if parameter.dim() < 2 else 0.0))
    module.policy.head.weight.data.mul_(0.5)
    module.policy.log_std_multiplier.data.fill_(0.8)
    if module.obs_mean.numel():
        mean = torch.randn(module.obs_mean.shape, generator=generator)
        module.set_observation_statistics(mean.double(), (0.2 + mean.abs()).double())
    of_learner = module
    if case.trained_in_bf16:
        of_learner = RLModuleSpec(
            module_class=rl_module.CalQLTorchRLModule,
            observation_space=module.observation_space,
            action_space=module.action_space,
            model_config=module.model_config,
        ).build()
        of_learner.load_state_dict(module.state_dict(), strict=False)
        of_learner.make_target_networks()
        of_learner.set_product_dtype(torch.bfloat16)
    return Trained(case, runner, policy_data(of_learner, observation_space=described_space(case.observations)))


def assert_same_actions(found: np.ndarray, expected: np.ndarray, space: Box) -> None:
    """Compares actions (B, A), to 1e-6 of the bounds between which they lie, in the type of the space."""
    assert found.dtype == expected.dtype == space.dtype
    assert found.shape == expected.shape
    scale = np.maximum(np.abs(space.low), np.abs(space.high)).astype(np.float64)
    difference = np.abs(found.astype(np.float64) - expected) / np.maximum(scale, 1e-12)
    assert difference.max() <= 1e-6, difference.max()
