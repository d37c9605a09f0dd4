"""Policies that are judged: of a checkpoint, read without Ray's start, and of learners that go on training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from rllib_calql.checkpoints.reading import CheckpointFiles
from rllib_calql.common.spaces import is_image, space_of_description

Array = npt.NDArray[Any]

_BLOCK_ROWS = 4096
LEARNER_MODULE = "learner_group/learner/rl_module"


@dataclass(frozen=True)
class ModulePolicy:
    """The greedy policy of a module, which lies here or in a learner.

    Attributes:
        outputs: From raw observations (r, obs_dim) and whether features are wanted, else actions.
        sees_images: Whether features are those of the policy's encoder; else they are the observations themselves.
    """

    outputs: Callable[[Array, bool], Array]
    sees_images: bool

    def features(self, observations: Array) -> Array:
        """The observations; of images what the policy's frozen encoder makes of them."""
        return self._in_blocks(observations, True) if self.sees_images else observations

    def actions(self, observations: Array) -> Array:
        """Greedy module actions."""
        return self._in_blocks(observations, False)

    def _in_blocks(self, observations: Array, wants_features: bool) -> Array:
        pieces = range(0, len(observations), _BLOCK_ROWS)
        return np.concatenate([self.outputs(observations[at : at + _BLOCK_ROWS], wants_features) for at in pieces])


def policy_of_module(module: Any) -> ModulePolicy:
    """That of a module in this process."""
    return ModulePolicy(partial(module_outputs, module), is_image(module.observation_space))


@torch.no_grad()
def module_outputs(module: Any, observations: Array, wants_features: bool) -> Array:
    """What `ModulePolicy` asks a module for, shape (r, ...)."""
    parameter = next(module.parameters())
    rows = torch.as_tensor(np.ascontiguousarray(observations)).to(parameter.device)
    if is_image(module.observation_space):
        rows = rows.view(-1, *module.observation_space.shape)
        if wants_features:
            features: Array = module.policy_trunk(module.encoder(rows)).float().cpu().numpy()
            return features
    actions: Array = module.forward_inference({Columns.OBS: rows})[Columns.ACTIONS].float().cpu().numpy()
    return actions


def learner_outputs(learner: Any, observations: Array, wants_features: bool) -> Array:
    """The same, of a learner's module."""
    module = learner.module[DEFAULT_MODULE_ID]
    return module_outputs(getattr(module, "unwrapped", lambda: module)(), observations, wants_features)


@dataclass(frozen=True)
class CheckpointPolicy:
    """What is read of a checkpoint to judge its policy.

    Attributes:
        config: The algorithm's config, free to be changed.
        manifest: What the checkpoint says of itself.
        policy: The greedy policy.
        observation_space: Of the environment, before flattening; bounds may be missing.
        action_space: Of the environment.
    """

    config: Any
    manifest: Mapping[str, Any]
    policy: ModulePolicy
    observation_space: gym.Space[Any]
    action_space: gym.spaces.Box


def read_policy(files: CheckpointFiles) -> CheckpointPolicy:
    """Reads a checkpoint of Cal-QL; neither its environment nor Ray is needed.

    Raises:
        ValueError: If it is of another algorithm, or cannot be read.
    """
    manifest, config = files.manifest(), files.config()
    module, observation_space = read_module(files, manifest)
    return CheckpointPolicy(config, manifest, policy_of_module(module), observation_space, module.action_space)


def read_module(files: CheckpointFiles, manifest: Mapping[str, Any]) -> tuple[Any, gym.Space[Any]]:
    """The networks of a learner, without targets, and the environment's observation space."""
    from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule

    module = MultiRLModule.from_checkpoint(Path(files.path) / LEARNER_MODULE)[DEFAULT_MODULE_ID]
    structure = manifest["spaces"]["observation_space"].get("structure")
    # What the module sees is flattened; manifests of earlier versions say no more.
    return module, module.observation_space if structure is None else space_of_description(structure)
