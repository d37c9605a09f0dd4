"""Remote learners: one equals the local one, several stay identical and equal one with their joint batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from learner_checks import random_rows
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from small_learners import make_learner
from tiny import ONLINE_SIDE, line_config

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.common import metrics as keys
from rllib_calql.learning.learner import FITS_REFERENCE, ONLINE
from rllib_calql.networks.steps import Noise
from rllib_calql.store.offline_data import as_multi_agent_batch

pytestmark = pytest.mark.usefixtures("ray_session")

MODULE = "default_policy"
BATCH_SIZE = 8
NUM_CRITICS, NUM_ACTIONS = 2, 10
# Every loss has a gradient, and the temperature is part of the target.
SETTINGS = {"lagrangian": True, "deterministic_backup": False, "num_actions": NUM_ACTIONS}

Rows = dict[str, np.ndarray]


# --- Inside a learner -------------------------------------------------------------------------------------------------


def state_of(learner: Any, *_: Any) -> Rows:
    """All that an update changes: networks, targets, temperature, dual variable, moments and steps of every Adam."""
    state = {name: np.array(value) for name, value in learner.module.get_state()[MODULE].items()}
    state["log_alpha"] = learner.curr_log_alpha[MODULE].detach().numpy().copy()
    state["log_alpha_prime"] = learner.log_alpha_prime.detach().numpy().copy()
    for name, optimizer in learner._named_optimizers.items():
        for number, buffers in optimizer.state_dict()["state"].items():
            state |= {f"{name}.{number}.{key}": value.numpy().copy() for key, value in buffers.items()}
    return state


def gradients_of(learner: Any, *_: Any) -> Rows:
    named = [*learner.module[MODULE].unwrapped().named_parameters()]
    named += [("log_alpha", learner.curr_log_alpha[MODULE]), ("log_alpha_prime", learner.log_alpha_prime)]
    return {name: param.grad.numpy().copy() for name, param in named if param.grad is not None}


def draw_of(learner: Any, *_: Any) -> np.ndarray:
    """The noise that the learner would draw next; its generator is put back."""
    state = learner._generator.get_state()
    draw: np.ndarray = learner.module[MODULE].unwrapped().draw_noise(2, torch.device("cpu")).actor.numpy().copy()
    learner._generator.set_state(state)
    return draw


def use_slice_of(noise: Noise, learner: Any, *_: Any) -> None:
    """Makes the learner use its rank's part of one draw for the joint batch, whose second to last axis is the batch."""

    def slice_of_rank(batch_size: int, device: torch.device) -> Noise:
        start = learner._learner_index * batch_size
        return Noise(*(part.narrow(-2, start, batch_size) for part in noise))

    learner.module[MODULE].unwrapped().draw_noise = slice_of_rank


def use_own_noise(learner: Any, *_: Any) -> None:
    del learner.module[MODULE].unwrapped().draw_noise


def record(learner: Any, *_: Any) -> None:
    """Makes the learner keep the observations and the noise of its updates."""
    module = learner.module[MODULE].unwrapped()
    columns_on_device, draw_noise = learner._columns_on_device, module.draw_noise
    learner.seen_obs, learner.seen_noise = [], []

    def recorded_columns(batch: Any) -> Any:
        columns = columns_on_device(batch)
        learner.seen_obs.append(columns[Columns.OBS].numpy())
        return columns

    def recorded_noise(*args: Any) -> Noise:
        noise: Noise = draw_noise(*args)
        learner.seen_noise.append(noise.actor.numpy())
        return noise

    learner._columns_on_device, module.draw_noise = recorded_columns, recorded_noise


def recorded(learner: Any, *_: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return learner.seen_obs, learner.seen_noise


# --- Outside ----------------------------------------------------------------------------------------------------------


def on_every(group: LearnerGroup, func: Any) -> list[Any]:
    return [result.get() for result in group.foreach_learner(func)]


def assert_identical(states: list[Rows]) -> None:
    first, *others = states
    assert all(np.isfinite(value).all() for value in first.values())
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            assert np.array_equal(value, other[name]), name


def rows_of_ranks(num_learners: int, num_updates: int, seed: int = 0) -> list[Rows]:
    return [random_rows(num_updates * BATCH_SIZE, seed=100 * seed + rank) for rank in range(num_learners)]


def update(group: LearnerGroup, rows: list[Rows], *, timesteps: dict[str, Any] | None = None) -> list[dict[str, float]]:
    """One update call, rank r on `rows[r]`; the metrics of every rank."""
    results = group.update(
        batch_refs=[ray.put(as_multi_agent_batch(part)) for part in rows],
        minibatch_size=BATCH_SIZE,
        timesteps=timesteps or {},
    )
    return [{name: value.peek() for name, value in result[MODULE].items()} for result in results]


def built_group(num_learners: int, **settings: Any) -> LearnerGroup:
    config = make_learner(**SETTINGS | settings).config.copy(copy_frozen=False)
    # Without CPUs of their own: the tests of this module share two.
    config.learners(num_learners=num_learners, num_cpus_per_learner=0)
    obs_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    return config.build_learner_group(spaces={MODULE: (obs_space, gym.spaces.Box(-1.0, 1.0, (2,), np.float32))})


@pytest.fixture(scope="module")
def groups(ray_session: None) -> Iterator[dict[int, tuple[LearnerGroup, Any]]]:
    """Groups of two and of four learners, each with its state at the start."""
    built = {num_learners: built_group(num_learners) for num_learners in (2, 4)}
    yield {num_learners: (group, group.get_state()) for num_learners, group in built.items()}
    for group in built.values():
        group.shutdown()


@pytest.fixture
def fresh(groups: dict[int, tuple[LearnerGroup, Any]]) -> dict[int, LearnerGroup]:
    """The same groups, put back to the start."""
    for group, state in groups.values():
        group.set_state(state)
    return {num_learners: group for num_learners, (group, _) in groups.items()}


# --- Through the algorithm --------------------------------------------------------------------------------------------


def trained(config: CalQLConfig, num_iterations: int) -> tuple[CalQL, list[Rows], list[Any]]:
    algo = config.build()
    on_every(algo.learner_group, record)
    for _ in range(num_iterations):
        algo.train()
    states, seen = (on_every(algo.learner_group, func) for func in (state_of, recorded))
    algo.stop()
    return algo, states, seen


def test_one_remote_learner_trains_as_the_local_one(tmp_path: Path) -> None:
    _, (local,), _ = trained(line_config(tmp_path, offline_updates=20), 2)
    _, (remote,), _ = trained(line_config(tmp_path, offline_updates=20).learners(num_learners=1), 2)
    for name, value in local.items():
        np.testing.assert_allclose(remote[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_two_learners_stay_bit_identical_over_200_updates_though_data_and_noise_differ(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=200, updates_per_iteration=100)
    algo, states, seen = trained(config.training(lagrangian=True).learners(num_learners=2), 3)
    assert algo.num_offline_updates == 200
    assert algo.num_online_updates > 0
    assert_identical(states)
    (first_obs, first_noise), (second_obs, second_noise) = seen
    assert len(first_noise) == len(second_noise) == 200 + algo.num_online_updates
    assert all(not np.array_equal(*pair) for pair in zip(first_noise, second_noise, strict=True))
    assert all(not np.array_equal(*pair) for pair in zip(first_obs, second_obs, strict=True))


# --- Skipped updates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_learners", "num_updates"), [(2, 200), (4, 40)])
def test_learners_skip_an_update_together_if_one_of_them_has_a_gradient_that_is_not_finite(
    fresh: dict[int, LearnerGroup], num_learners: int, num_updates: int
) -> None:
    group = fresh[num_learners]
    rows = rows_of_ranks(num_learners, num_updates)
    rows[-1][Columns.REWARDS][5 * BATCH_SIZE + 3] = np.nan  # The sixth update, on the last rank.
    rows[0][Columns.REWARDS][7 * BATCH_SIZE] = np.inf  # The eighth, on the first.
    rows[-1][Columns.REWARDS][7 * BATCH_SIZE] = -np.inf
    results = update(group, rows)
    states = on_every(group, state_of)
    assert_identical(states)
    assert all(state[f"{MODULE}_critic.0.step"] == num_updates - 2 for state in states)
    for result in results:
        assert result[keys.NUM_SKIPPED_UPDATES_LIFETIME] == 2
        assert result[keys.NUM_SKIPPED_UPDATES_IN_A_ROW] == 0
        assert result[keys.NUM_UPDATES_LIFETIME] == num_updates


# --- Restoring --------------------------------------------------------------------------------------------------------


def test_restored_learners_draw_and_train_as_those_that_were_not_interrupted(fresh: dict[int, LearnerGroup]) -> None:
    group = fresh[2]
    update(group, rows_of_ranks(2, 20, seed=1))
    checkpoint = group.get_state()
    update(group, rows_of_ranks(2, 20, seed=2))
    expected = on_every(group, state_of)
    group.set_state(checkpoint)
    first, second = on_every(group, draw_of)
    assert not np.array_equal(first, second)
    update(group, rows_of_ranks(2, 20, seed=2))
    assert_identical(expected + on_every(group, state_of))


def subsets_of(learner: Any, *_: Any) -> list[list[int]]:
    """The critics of the next targets; the generators are put back."""
    module = learner.module[MODULE].unwrapped()
    state = learner._generator_of_subsets.get_state()
    subsets = [module.draw_subset(torch.device("cpu")).tolist() for _ in range(5)]
    learner._generator_of_subsets.set_state(state)
    return subsets


def test_learners_stay_identical_and_resume_with_every_setting_of_the_online_side() -> None:
    group = built_group(
        2, **{**ONLINE_SIDE, "input_": "rows.parquet", "offline_updates": 1, "conservative_online": True}
    )
    try:
        start = on_every(group, state_of)
        assert_identical(start)
        update(group, rows_of_ranks(2, 5, seed=3), timesteps={FITS_REFERENCE: True})
        fitted = on_every(group, state_of)
        assert_identical(fitted)
        changed = {
            name.split(".")[0] for name, value in fitted[0].items() if not np.array_equal(value, start[0].get(name))
        }
        assert changed == {"reference", "target_reference", f"{MODULE}_reference"}
        update(group, rows_of_ranks(2, 7, seed=1))
        first, second = on_every(group, subsets_of)
        assert first == second  # One subset for a gradient step, however many learners make it.
        checkpoint = group.get_state()
        online = {ONLINE: True, NUM_ENV_STEPS_SAMPLED_LIFETIME: 30}
        update(group, rows_of_ranks(2, 7, seed=2), timesteps=online)
        expected = on_every(group, state_of)
        assert_identical(expected)
        group.set_state(checkpoint)
        update(group, rows_of_ranks(2, 7, seed=2), timesteps=online)
        assert_identical(expected + on_every(group, state_of))
    finally:
        group.shutdown()


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_another_number_of_learners_goes_on_from_a_checkpoint(
    fresh: dict[int, LearnerGroup], before: int, after: int
) -> None:
    update(fresh[before], rows_of_ranks(before, 10))
    checkpoint = fresh[before].get_state()
    fresh[after].set_state(checkpoint)
    alone = make_learner(**SETTINGS, seed=3)
    alone.set_state(checkpoint["learner"])
    assert_identical([*on_every(fresh[before], state_of), *on_every(fresh[after], state_of), state_of(alone)])
    draws = on_every(fresh[after], draw_of)
    assert all(not np.array_equal(draws[i], draws[j]) for i in range(after) for j in range(i))
    results = update(fresh[after], rows_of_ranks(after, 10, seed=1))
    assert_identical(on_every(fresh[after], state_of))
    assert all(result[keys.NUM_UPDATES_LIFETIME] == 20 for result in results)


# --- One learner with the joint batch ---------------------------------------------------------------------------------


def relative_differences(actual: Rows, expected: Rows) -> dict[str, float]:
    """||actual - expected|| / ||expected|| of every tensor that is not zero."""
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[name], value) for name, value in expected.items() if not value.any())
    return {
        name: float(np.linalg.norm(actual[name] - value) / np.linalg.norm(value))
        for name, value in expected.items()
        if value.any()
    }


@pytest.mark.parametrize("num_learners", [2, 4])
@pytest.mark.parametrize("num_earlier_updates", [0, 30])
def test_an_update_of_several_learners_equals_that_of_one_with_their_joint_batch(
    fresh: dict[int, LearnerGroup], num_learners: int, num_earlier_updates: int
) -> None:
    group, alone = fresh[num_learners], make_learner(**SETTINGS)
    if num_earlier_updates:
        update(group, rows_of_ranks(num_learners, num_earlier_updates, seed=1))
    alone.set_state(group.get_state()["learner"])
    rows = rows_of_ranks(num_learners, 1, seed=2)
    joint = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    noise = alone.module[MODULE].draw_noise(num_learners * BATCH_SIZE, torch.device("cpu"))
    use_slice_of(noise, alone)
    on_every(group, partial(use_slice_of, noise))
    try:
        update(group, rows)
        alone.update(batch=as_multi_agent_batch(joint), timesteps={})
    finally:
        on_every(group, use_own_noise)
    gradients = on_every(group, gradients_of)
    assert_identical(gradients)
    # Policy and critics, temperature and dual variable.
    assert {"policy.head.weight", "log_alpha", "log_alpha_prime"} < gradients[0].keys()
    assert any(name.startswith("critic.") for name in gradients[0])
    of_gradients = relative_differences(gradients[0], gradients_of(alone))
    assert max(of_gradients.values()) < 1e-5, of_gradients
    of_parameters = relative_differences(on_every(group, state_of)[0], state_of(alone))
    assert max(of_parameters.values()) < 1e-5, of_parameters
