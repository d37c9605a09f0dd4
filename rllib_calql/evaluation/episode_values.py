"""`values_along`: what a checkpoint thinks of a recorded episode, step by step.

Axes: `T` steps of the episode, `C` critics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from rllib_calql.checkpoints.reading import CheckpointFiles
from rllib_calql.common.encoding import encoded_space, observation_dtype
from rllib_calql.common.references import RETURNS_TO_GO
from rllib_calql.common.returns import RewardSettings, reward_settings
from rllib_calql.common.spaces import is_image
from rllib_calql.datasets.report.episode import FoundEpisode
from rllib_calql.evaluation.fqe.policies import LEARNER_MODULE, read_module
from rllib_calql.store.ingestion import Conversion
from rllib_calql.store.offline_data import check_spaces
from rllib_calql.store.returns_connector import AddReturnsToGo

Array = npt.NDArray[Any]
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class EpisodeValues:
    """Values along an episode, all in units of training rewards.

    Attributes:
        settings: How the checkpoint's training makes rewards and returns.
        q: Of each critic at the recorded (executed) actions, shape (C, T).
        value: V(s) of the policy: the least target critic at its greedy action, shape (T,).
        last_value: The same at the observation after the last step.
        reference: The value that bounds Q where it is not the return-to-go, shape (T,); None if it is, or is unknown.
        reference_name: What that is.
    """

    settings: RewardSettings
    q: Array
    value: Array
    last_value: float
    reference: Array | None
    reference_name: str


def values_along(files: CheckpointFiles, found: FoundEpisode) -> EpisodeValues:
    """Evaluates the networks of a checkpoint along an episode, in float32; neither environment nor Ray is needed.

    Args:
        files: A checkpoint of Cal-QL.
        found: The episode.

    Raises:
        ValueError: If the checkpoint is of another algorithm or cannot be read, or the episode does not fit its spaces.
    """
    manifest, config = files.manifest(), files.config()
    module, observation_space = read_module(files, manifest)
    # RLlib's learners make the targets, and only then there is a place for their state.
    module.make_target_networks()
    module.set_state(files.read(f"{LEARNER_MODULE}/{DEFAULT_MODULE_ID}/module_state.pkl"))
    settings = reward_settings(config)
    observations, last_observation, actions = _rows(found, config, observation_space, module.action_space)
    name, column = config.reference_value, None
    if config.reference_column is not None:
        name, column = config.reference_column, found.block.extra_model_outputs.get(config.reference_column)
    reference = None if column is None else np.asarray(column, dtype=np.float64).reshape(len(observations), -1)[:, 0]
    if config.has_reference_network:
        reference = _in_blocks(module.estimate_reference, module, observations)
    return EpisodeValues(
        settings=settings,
        q=_in_blocks(_q_values(module), module, observations, actions),
        value=_in_blocks(module.estimate_values, module, observations),
        last_value=float(_in_blocks(module.estimate_values, module, last_observation)[0]),
        reference=reference,
        reference_name=name if name != RETURNS_TO_GO else "",
    )


def _rows(
    found: FoundEpisode, config: Any, observation_space: gym.Space[Any], action_space: gym.spaces.Box
) -> tuple[Array, Array, Array]:
    """Flat observations (T, n), the last one (1, n) and module actions (T, A), as training has them."""
    check_spaces(found.reader.info, observation_space, action_space)
    conversion = Conversion(
        observation_space=observation_space,
        action_space=action_space,
        connector=AddReturnsToGo(replace(reward_settings(config), truncation="none")),
        actions_without_metadata=config.action_space_of_data,
        reference_column=None,
        obs_dtype=observation_dtype(encoded_space(observation_space)),
    )
    columns = conversion.columns(found.reader, found.block)
    return columns.observations, columns.final_observations, columns.actions


def _q_values(module: Any) -> Callable[..., torch.Tensor]:
    def q_values(observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        q: torch.Tensor = module.compute_q_values({Columns.OBS: observations, Columns.ACTIONS: actions})["qf_preds"]
        return q

    return q_values


@torch.no_grad()
def _in_blocks(of_rows: Callable[..., torch.Tensor], module: Any, observations: Array, *more: Array) -> Array:
    """Values (..., T) of rows of observations, and of what goes with them, some thousand rows at a time."""
    pieces = []
    for start in range(0, len(observations), _ROWS_AT_ONCE):
        rows = [
            torch.from_numpy(np.ascontiguousarray(column[start : start + _ROWS_AT_ONCE]))
            for column in (observations, *more)
        ]
        if is_image(module.observation_space):
            rows[0] = rows[0].view(-1, *module.observation_space.shape)
        pieces.append(of_rows(*rows).double().numpy())
    return np.concatenate(pieces, axis=-1)
