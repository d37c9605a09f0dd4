"""Updates give the same bits on any number of threads, from run to run, and across a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

from rllib_calql import CalQLConfig
from rllib_calql.networks import critic_kernel, side_by_side

OBS_DIM, ACTION_DIM, BATCH_SIZE = 5, 3, 16


@pytest.fixture(autouse=True)
def _threads_for_small_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of all kinds: critics' blocks, and groups of critics where the rows of one are one block."""
    monkeypatch.setattr(side_by_side, "_num_cpus", lambda: 8)
    monkeypatch.setattr(critic_kernel, "_LEAST_WORK_OF_THREADS", 0)
    monkeypatch.setattr(critic_kernel, "_WORK_OF_A_GROUP", 2**14)
    monkeypatch.setattr(critic_kernel, "_BLOCK_BYTES", 2**12)


@contextmanager
def threads(number: int) -> Iterator[None]:
    found = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
        assert torch.get_num_threads() == number  # As they were found.
    finally:
        torch.set_num_threads(found)


def learner_of(**training: Any) -> Any:
    config = (
        CalQLConfig().debugging(seed=3).training(num_actions=4, train_batch_size_per_learner=BATCH_SIZE, **training)
    )
    config.rl_module(model_config={"critic_hiddens": [32, 32], "actor_hiddens": [32, 32]})
    spaces = (gym.spaces.Box(-9.0, 9.0, (OBS_DIM,), np.float32), gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32))
    return config.build_learner(spaces={"default_policy": spaces})


def rows(num_updates: int) -> MultiAgentBatch:
    rng, num = np.random.default_rng(5), num_updates * BATCH_SIZE
    columns = {
        "obs": rng.normal(size=(num, OBS_DIM)),
        "new_obs": rng.normal(size=(num, OBS_DIM)),
        "actions": rng.uniform(-0.9, 0.9, size=(num, ACTION_DIM)),
        "rewards": rng.normal(size=num),
        "returns_to_go": rng.normal(size=num),
        "terminateds": rng.random(num) < 0.1,
        "is_offline": np.ones(num),
    }
    batch = SampleBatch({name: values.astype(np.float32) for name, values in columns.items()})
    return MultiAgentBatch({"default_policy": batch}, num)


def update(learner: Any, num_updates: int) -> None:
    learner.update(batch=rows(num_updates), minibatch_size=BATCH_SIZE, timesteps={})


def parameters_of(learner: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = learner._calql_module.state_dict()
    return {name: values.clone() for name, values in found.items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, values in one.items() if not torch.equal(values, other[name])] == []


def test_updates_give_the_same_bits_again() -> None:
    found = []
    for _ in range(2):
        learner = learner_of()
        with threads(3):
            update(learner, 200)
        found.append(parameters_of(learner))
    assert all(values.isfinite().all() for values in found[0].values())
    assert_same_bits(*found)


@pytest.mark.parametrize("training", [{}, {"num_critics": 5, "critic_subset": 2}, {"lagrangian": True}], ids=str)
def test_updates_go_on_bit_by_bit_from_a_checkpoint_on_another_number_of_threads(training: dict[str, Any]) -> None:
    whole = learner_of(**training)
    with threads(1):
        update(whole, 5)
        state = whole.get_state()
        update(whole, 7)
    for number in (2, 8):
        resumed = learner_of(**training)
        resumed.set_state(state)
        with threads(number):
            update(resumed, 7)
        assert_same_bits(parameters_of(resumed), parameters_of(whole))
