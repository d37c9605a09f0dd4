"""What tests of learners do again and again: random rows, an update, all parameters bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from torch import Tensor

from rllib_calql.learning.learner import ONLINE, CalQLTorchLearner
from rllib_calql.store.offline_data import as_multi_agent_batch
from rllib_calql.store.replay import IS_OFFLINE

MODULE = "default_policy"


def random_rows(num_rows: int, seed: int = 0, *, obs_dim: int = 3, action_dim: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        Columns.OBS: rng.normal(size=(num_rows, obs_dim)).astype(np.float32),
        Columns.NEXT_OBS: rng.normal(size=(num_rows, obs_dim)).astype(np.float32),
        Columns.ACTIONS: rng.uniform(-0.9, 0.9, size=(num_rows, action_dim)).astype(np.float32),
        Columns.REWARDS: rng.normal(size=num_rows).astype(np.float32),
        Columns.TERMINATEDS: (rng.random(num_rows) < 0.2).astype(np.float32),
        Columns.RETURNS_TO_GO: rng.normal(size=num_rows).astype(np.float32),
        IS_OFFLINE: (np.arange(num_rows) % 2).astype(np.float32),
    }


def update(
    learner: CalQLTorchLearner, rows: dict[str, np.ndarray], size: int, *, online: bool = False
) -> dict[str, float]:
    """One update call, its metrics as numbers."""
    batch = as_multi_agent_batch(rows)
    results = learner.update(batch=batch, minibatch_size=size, timesteps={ONLINE: online})[MODULE]
    return {name: float(value.peek() if hasattr(value, "peek") else value) for name, value in results.items()}


def parameters(learner: CalQLTorchLearner, prefix: str = "") -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in learner.module[MODULE].named_parameters() if k.startswith(prefix)}


def assert_bit_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert len(actual) > 0
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def everything(learner: CalQLTorchLearner) -> dict[str, Tensor]:
    """Parameters, targets, temperature, dual variable, moments and step counts."""
    tensors = parameters(learner)
    tensors["log_alpha"] = learner.curr_log_alpha[MODULE].detach().clone()
    tensors["log_alpha_prime"] = learner.log_alpha_prime.detach().clone()
    for name, optimizer in learner._named_optimizers.items():
        for number, buffers in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{number}.{key}": value.clone() for key, value in buffers.items()}
    return tensors
