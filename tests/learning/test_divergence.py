"""Whether mean Q is a return that the data make possible: the range by hand, and what is said where Q leaves it."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import line_config

from rllib_calql import CalQL
from rllib_calql.common import metrics as keys
from rllib_calql.common.returns import RewardSettings, possible_returns, returns_of_episodes
from rllib_calql.experiments.experiment import parse_experiment
from rllib_calql.experiments.reading.errors import ExperimentError
from rllib_calql.learning.divergence import OUT_OF_RANGE, DivergenceWatch
from rllib_calql.progress.display import Display
from rllib_calql.progress.tune_display import ProgressCallback


def results_of(*q: float, alpha: float = 0.0, log_prob: float = 0.0) -> list[dict[str, Any]]:
    logged = {keys.Q_DATA_OF_CRITIC.format(c=c + 1): value for c, value in enumerate(q)}
    return [{"default_policy": logged | {keys.ALPHA_VALUE: alpha, keys.LOG_PROB: log_prob}}]


def watch(low: float, high: float, **settings: Any) -> DivergenceWatch:
    watched = DivergenceWatch(**{"gamma": 0.9, "has_entropy_term": False, **settings})
    watched.include(low, high)
    return watched


# --- The range --------------------------------------------------------------------------------------------------------


def test_the_possible_returns_of_two_episodes_are_those_worked_out_by_hand() -> None:
    # gamma 0.5: returns 1 + 0.5 * 4 = 3 and 4; then -1 - 0.5 * 2 = -2 and -2, cut: -1.5 a step for ever is -3.
    rewards, lengths, terminateds = np.array([1.0, 4.0, -1.0, -2.0]), np.array([2, 2]), np.array([True, False])
    returns, _ = returns_of_episodes(rewards, lengths, terminateds=terminateds, settings=RewardSettings(gamma=0.5))
    assert possible_returns(returns, rewards, lengths, terminateds, 0.5) == (-3.0, 4.0)
    assert possible_returns(returns, rewards, lengths, np.array([True, True]), 0.5) == (-2.0, 4.0)


@pytest.mark.parametrize(
    ("q", "low", "high", "widths"),
    [
        ((5.0, 3.0), 1.0, 9.0, 0.0),
        ((132.0, 5.0), 1.0, 9.0, 123 / 9),  # 0 is possible, too.
        ((132.0, 5.0), -50.0, 9.0, 123 / 59),
        ((-3.0, -30.0), -10.0, -2.0, 2.0),
        ((0.0, 0.0), 80.0, 100.0, 0.0),
        ((np.inf, 0.0), 0.0, 1.0, np.inf),
        ((np.nan, 4.0), 0.0, 2.0, 1.0),
        ((7.0, 7.0), 0.0, 0.0, 0.0),  # Nothing is known of a task without rewards.
    ],
)
def test_the_metric_is_the_distance_of_the_worst_critic_in_widths_of_the_range(
    q: tuple[float, float], low: float, high: float, widths: float
) -> None:
    watched = watch(low, high)
    watched.observe(results_of(*q), online=False, num_updates=1)
    assert watched.out_of_range == pytest.approx(widths)


def test_an_entropy_term_in_the_target_widens_the_range_by_what_it_may_add() -> None:
    # alpha 2, entropy 3, ten steps: 60 on top.
    for has_entropy_term, expected in ((False, 61.0), (True, 2 / 61)):
        watched = watch(0.0, 1.0, has_entropy_term=has_entropy_term)
        watched.observe(results_of(62.0 + has_entropy_term, alpha=2.0, log_prob=-3.0), online=False, num_updates=1)
        assert watched.out_of_range == pytest.approx(expected)


def test_before_any_return_is_known_nothing_is_out_of_range() -> None:
    watched = DivergenceWatch(gamma=0.99, has_entropy_term=False)
    watched.observe(results_of(1e9), online=True, num_updates=1)
    assert (watched.out_of_range, watched.warning) == (0.0, None)


def test_updates_that_were_skipped_leave_the_metric_as_it_was() -> None:
    watched = watch(0.0, 1.0)
    for q in (3.0, np.nan):
        watched.observe(results_of(q), online=False, num_updates=1)
    assert watched.out_of_range == 2.0


# --- The warning ------------------------------------------------------------------------------------------------------


def test_the_warning_comes_once_per_phase_and_not_by_a_single_call(caplog: pytest.LogCaptureFixture) -> None:
    watched = watch(0.0, 9.0)
    calls = [(False, 132.0), (False, 5.0), *[(False, 132.0)] * 5, *[(True, -40.0)] * 5]
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        said = []
        for number, (online, q) in enumerate(calls):
            watched.observe(results_of(q, q), online=online, num_updates=1000 * number)
            said.append(len(caplog.records))
    assert said == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    first, second = (record.getMessage() for record in caplog.records)
    assert "Mean Q is 132 after 3,000 offline updates, where returns between 0 and 9 are possible" in first
    assert "`max_target_backup=False`" in first
    assert "Mean Q is -40 after 8,000 online updates" in second
    assert "Lower `min_q_weight`" in second


@pytest.mark.usefixtures("ray_session")
def test_critics_that_diverge_are_told_by_result_and_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    algo = line_config(tmp_path, offline_updates=40).training(gamma=0.9, critic_lr=1e-9).build()
    try:
        # -1 a step, cut after 20 steps: -1 for ever is -10.
        assert algo._parts.divergence.possible_returns == pytest.approx((-10.0, 0.0))
        assert algo.train()[keys.Q_OUT_OF_RANGE] < 0.1
        with torch.no_grad():
            for bias in algo.learner_group._learner._calql_module.critic.parameters():
                if bias.shape[-1] == 1 and bias.numel() == 2:
                    bias.fill_(132.0)  # Of the last layers.
        with caplog.at_level(logging.WARNING, logger="rllib_calql.learning.divergence"):
            results = [algo.train() for _ in range(3)]
        path = algo.save_to_path(tmp_path / "checkpoint")
    finally:
        algo.stop()
    assert all(result[keys.Q_OUT_OF_RANGE] == pytest.approx(13.2, abs=0.5) for result in results)
    assert [keys.Q_WARNING in result for result in results] == [False, True, True]
    assert len([record for record in caplog.records if "diverge" in record.getMessage()]) == 1
    restored = CalQL.from_checkpoint(path)
    try:
        assert restored.train()[keys.Q_OUT_OF_RANGE] >= 0.0
    finally:
        restored.stop()


@pytest.mark.usefixtures("ray_session")
def test_returns_of_online_episodes_widen_the_range_and_last_over_a_restore(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=0).training(gamma=0.9).build()
    try:
        algo._parts.divergence.include(-3.0, 77.0)
        algo.train()
        low, high = algo._parts.divergence.possible_returns
        path = algo.save_to_path(tmp_path / "checkpoint")
    finally:
        algo.stop()
    assert (low, high) == (pytest.approx(-10.0), 77.0)
    restored = CalQL.from_checkpoint(path)
    assert restored._parts.divergence.possible_returns == (low, high)
    restored.stop()


def test_rllib_train_prints_the_warning_once_per_trial_and_phase() -> None:
    output = io.StringIO()
    callback = ProgressCallback({}, Display(output, clock=lambda: 0.0))

    class Trial:
        trial_id = "a"
        config: dict[str, Any] = {}  # noqa: RUF012
        storage = SimpleNamespace(trial_dir_name="a")

        def __str__(self) -> str:
            return "CalQL_a"

    for number, phase in enumerate(["offline", "offline", "online", "online"]):
        warning = {} if number == 0 else {keys.Q_WARNING: f"Mean Q is 132 {phase}"}
        result = {keys.PHASE: phase, "training_iteration": number + 1, "time_total_s": 1.0, **warning}
        callback.on_trial_result(number, [], Trial(), result)  # type: ignore[arg-type]
    warnings = [line for line in output.getvalue().splitlines() if "Warning" in line]
    assert warnings == ["Warning, CalQL_a: Mean Q is 132 offline.", "Warning, CalQL_a: Mean Q is 132 online."]


def test_a_run_can_stop_by_it_and_a_misspelt_one_is_refused() -> None:
    entry = {"run": "CalQL", "env": "Pendulum-v1", "stop": {"q_out_of_range": OUT_OF_RANGE, "time_total_s": 60}}
    assert parse_experiment("mine", entry).stop == {keys.Q_OUT_OF_RANGE: OUT_OF_RANGE, "time_total_s": 60}
    with pytest.raises(ExperimentError, match="did you mean `q_out_of_range`"):
        parse_experiment("mine", entry | {"stop": {"q_out_of_rnge": 1.0}})
