"""What counts as a success: what an environment's infos say of it, and what they leave open."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch

from rllib_calql import CalQLConfig
from rllib_calql.collection import callbacks
from rllib_calql.collection.callbacks import EpisodeOutcomeCallback, _outcome
from rllib_calql.common.metrics import SUCCESS_RATE

NAN = float("nan")
YES = [True, 1, 1.0, np.True_, np.float32(1), np.int64(1), np.array(True), np.array([1.0]), torch.tensor([True])]
NO = [False, 0, 0.0, np.False_, np.float64(0), np.array(0), np.array([[False]]), torch.tensor(0.0)]
UNKNOWN = [None, NAN, np.nan, np.float32("nan"), np.array([NAN]), pd.NA, pd.NaT, "unknown", "", "NaN"]
OTHER = [0.5, 2, -1, np.array([True, False]), "yes", {"a": 1}, float("inf")]


@pytest.mark.parametrize("key", ["success", "is_success"])
@pytest.mark.parametrize(
    ("reported", "outcome"),
    [*((value, True) for value in YES), *((value, False) for value in NO), *((value, None) for value in UNKNOWN)],
    ids=repr,
)
def test_an_info_says_yes_no_or_nothing(
    key: str, reported: Any, outcome: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        assert _outcome(key, reported) is outcome
    assert caplog.records == []


@pytest.mark.parametrize("reported", OTHER, ids=repr)
def test_what_says_neither_is_left_out_and_named(
    reported: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: set[str] = set()
    monkeypatch.setattr(callbacks, "log_once", lambda key: not (key in said or said.add(key)))  # type: ignore[func-returns-value]
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        assert [_outcome("success", reported) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert "`success` in an environment's infos is" in caplog.text


class Episode:
    """Some infos."""

    def __init__(self, *reports: Any) -> None:
        self.infos = [{"success": report} for report in reports]

    def get_infos(self) -> list[dict[str, Any]]:
        """All of them."""
        return self.infos

    def get_return(self) -> float:
        """Nothing was rewarded."""
        return 0.0


@pytest.mark.parametrize(
    ("reports", "logged"),
    [
        ((NAN, NAN, 1.0), [1.0]),
        ((NAN, 0.0, NAN), [0.0]),
        ((False, True, False), [1.0]),
        ((None, NAN), []),
        ((), []),
    ],
)
def test_an_episode_succeeds_if_a_step_says_yes_and_fails_if_some_say_no(
    reports: tuple[Any, ...], logged: list[float]
) -> None:
    values: list[float] = []

    class Logger:
        def log_value(self, key: str, value: float, **_: Any) -> None:
            if key == SUCCESS_RATE:
                values.append(value)

    half = len(reports) // 2
    EpisodeOutcomeCallback().on_episode_end(
        episode=Episode(*reports[half:]), prev_episode_chunks=[Episode(*reports[:half])], metrics_logger=Logger()
    )
    assert values == logged


class ReportingEnv(gym.Env):  # type: ignore[type-arg]
    """Episodes of three steps that report what `reports` holds, in turn."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.reports, self.number = config["reports"], -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins."""
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Reports."""
        self.t += 1
        self.number += self.t == 1
        report = self.reports[self.number % len(self.reports)]
        return np.zeros(2, np.float32), 0.5, False, self.t == 3, {"success": report}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("num_envs", [1, 2])
def test_episodes_that_leave_it_open_do_not_count(num_envs: int) -> None:
    reports = [NAN, True, False, NAN, np.array([1.0]), 1]
    evaluation = {"env_config": {"reports": [None, 1.0, NAN, 0.0]}}
    algo = (
        CalQLConfig()
        .environment(ReportingEnv, env_config={"reports": reports})
        .env_runners(num_envs_per_env_runner=num_envs)
        .training(train_batch_size_per_learner=4, num_actions=2)
        .rl_module(model_config={"actor_hiddens": [8], "critic_hiddens": [8]})
        .fine_tuning(warmup_env_steps=1000, updates_per_iteration=3 * num_envs)
        .evaluation(evaluation_interval=1, evaluation_duration=4, evaluation_config=evaluation)
        .build()
    )
    try:
        results = [algo.train() for _ in reports]
    finally:
        algo.stop()
    rates = [result["env_runners"].get(SUCCESS_RATE) for result in results]
    assert rates == [None, 1.0, 0.0, None, 1.0, 1.0]
    if num_envs == 1:
        assert results[0]["evaluation"]["env_runners"][SUCCESS_RATE] == 0.5
