"""`max_online_env_steps`: no environment ever takes one step more, in any way of collecting."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import TINY_NETWORKS, LineEnv

from rllib_calql import BudgetSpentError, CalQL, CalQLConfig
from rllib_calql.collection.budget import EnvStepBudget
from rllib_calql.common.lifetime import Lifetime


class CountedEnv(LineEnv):
    """Appends a byte to a file at every step of any process, and raises at the step that `raises_at` names."""

    TIME_LIMIT = 7

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        assert config is not None
        self.file = Path(config["file"])
        self.raises_at = config.get("raises_at")
        self.seconds = config.get("seconds", 0.0)

    def step(self, action: np.ndarray) -> Any:
        """Counts first: the step is taken even if it fails."""
        with self.file.open("ab") as file:
            file.write(b".")
        if self.raises_at and steps_in(self.file) == self.raises_at:
            raise ValueError("The arm is stuck.")
        time.sleep(self.seconds)
        return super().step(action)


def steps_in(file: Path) -> int:
    return os.path.getsize(file) if file.exists() else 0


def config_of(tmp_path: Path, limit: int | None, **env_config: Any) -> CalQLConfig:
    config: CalQLConfig = (
        CalQLConfig()
        .environment(CountedEnv, env_config={"file": str(tmp_path / "steps"), **env_config})
        .training(num_actions=1, train_batch_size_per_learner=4)
        .rl_module(model_config=TINY_NETWORKS)
        .fine_tuning(max_online_env_steps=limit, warmup_env_steps=5, updates_per_env_step=0.5)
        .debugging(seed=0)
    )
    return config


def train_to_the_end(algo: CalQL) -> list[dict[str, Any]]:
    results = []
    while not results or not results[-1]["done"]:
        results.append(algo.train())
        assert len(results) < 100
    return results


# Settings, and the most steps of the 40 that remain because sub-environments step together.
MODES: dict[str, tuple[dict[str, Any], int]] = {
    "local": ({}, 0),
    "vectorised": ({"num_envs_per_env_runner": 3}, 2),
    "remote in turns": ({"num_env_runners": 2, "sample_async": False}, 0),
    "remote and vectorised": ({"num_env_runners": 2, "num_envs_per_env_runner": 2}, 1),
}


@pytest.mark.parametrize(("settings", "most_left"), MODES.values(), ids=MODES)
def test_no_environment_takes_a_step_beyond_the_budget(
    tmp_path: Path, ray_session: None, settings: dict[str, Any], most_left: int
) -> None:
    settings = dict(settings)
    config = config_of(tmp_path, 40)
    if "sample_async" in settings:
        config.fine_tuning(sample_async=settings.pop("sample_async"))
    algo = config.env_runners(**settings).build()
    try:
        last = train_to_the_end(algo)[-1]
        taken = steps_in(tmp_path / "steps")
        assert 40 - most_left <= taken <= 40
        assert last["num_online_env_steps_taken_lifetime"] == taken
        # Episodes under way are cut and stored, and all updates made that the steps after the warm-up owe.
        assert last["num_online_env_steps_lifetime"] == taken
        assert last["num_online_updates_lifetime"] == int((taken - 5) * 0.5)
        with pytest.raises(BudgetSpentError, match=rf"`max_online_env_steps` is 40, and {taken} env steps have been"):
            algo.train()
        time.sleep(0.2)
        assert steps_in(tmp_path / "steps") == taken
    finally:
        algo.stop()


def test_a_restored_run_keeps_the_count_and_a_raised_budget_goes_on(tmp_path: Path, ray_session: None) -> None:
    algo = config_of(tmp_path, 20).build()
    algo.train()
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    taken = steps_in(tmp_path / "steps")
    algo.stop()
    assert 0 < taken < 20
    algo = CalQL.from_checkpoint(path)
    train_to_the_end(algo)
    assert steps_in(tmp_path / "steps") == 20
    path = algo.save_to_path(str(tmp_path / "end"))
    algo.stop()
    algo = CalQL.from_checkpoint(path)
    with pytest.raises(BudgetSpentError):
        algo.train()
    algo.stop()
    algo = CalQL.from_checkpoint(path, config=config_of(tmp_path, 26))
    assert train_to_the_end(algo)[-1]["num_online_env_steps_taken_lifetime"] == 26
    algo.evaluate()  # Its steps do not count.
    assert algo.lifetime.num_online_env_steps_taken == 26
    algo.stop()
    assert steps_in(tmp_path / "steps") > 26


def test_steps_that_fail_count_and_a_restarted_environment_gets_no_more(tmp_path: Path, ray_session: None) -> None:
    config = config_of(tmp_path, 30, raises_at=9).fault_tolerance(restart_failed_sub_environments=True)
    algo = config.env_runners(num_envs_per_env_runner=2, gym_env_vectorize_mode="sync").build()
    last = train_to_the_end(algo)[-1]
    algo.stop()
    assert 26 <= steps_in(tmp_path / "steps") <= 30
    assert last["num_online_env_steps_taken_lifetime"] in (29, 30)  # Both sub-environments of the failed step.
    assert last["num_online_env_steps_lifetime"] < last["num_online_env_steps_taken_lifetime"]


def test_what_a_lost_runner_was_granted_counts_as_taken_and_what_is_not_used_comes_back() -> None:
    lifetime = Lifetime(offline_updates=0, updates_per_env_step=1, warmup_env_steps=0)
    budget = EnvStepBudget(lifetime, 10, num_envs=2)
    assert [budget.grant(4), budget.grant(100), budget.grant(2)] == [4, 6, 0]
    assert not budget.is_spent  # Two requests are under way.
    budget.settle(6, 3)
    assert (budget.left, lifetime.num_online_env_steps_taken) == (3, 3)
    state = SimpleNamespace(budget=budget.get_state(), lifetime=lifetime.get_state())
    budget.settle(4, None)
    assert (budget.left, lifetime.num_online_env_steps_taken) == (3, 7)
    assert budget.grant(5) == 3
    budget.settle(3, 2)
    assert budget.is_spent  # One step is left, and two sub-environments step together.
    # A run that goes on from the state before has lost the request of 4 steps that was under way.
    lifetime.set_state(state.lifetime)
    other = EnvStepBudget(lifetime, 10, num_envs=2)
    other.set_state(state.budget)
    assert (other.left, lifetime.num_online_env_steps_taken) == (3, 7)
    unbounded = EnvStepBudget(lifetime, None, num_envs=2)
    assert (unbounded.grant(float("inf")), unbounded.is_spent) == (float("inf"), False)
