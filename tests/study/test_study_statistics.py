"""A study's statistics against hand-worked numbers and against the bootstrap spelt out in loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from rllib_calql.study.evaluations import Evaluation
from rllib_calql.study.statistics import (
    NUM_RESAMPLES,
    curve_interval,
    fate_of,
    interquartile_mean,
    interval,
    mean,
    on_grid,
)


def evaluations(*points: tuple[int, int, float | None], score: str = "success_rate") -> list[Evaluation]:
    """Rows of one trial: offline updates, online env steps, score."""
    return [
        Evaluation("t", "a", 0, updates, 0, steps, 10, return_mean=-1.0, **{score: value})  # type: ignore[arg-type]
        for updates, steps, value in points
    ]


def test_the_interquartile_mean_leaves_out_a_quarter_on_either_side_over_all_tasks_together() -> None:
    assert interquartile_mean(np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0])) == pytest.approx(3.5)
    assert interquartile_mean(np.array([9.0, 0.0]), np.array([4.0, 6.0])) == pytest.approx(5.0)
    assert mean(np.array([9.0, 0.0]), np.array([4.0, 7.0])) == pytest.approx(5.0)


def test_the_score_is_success_else_the_normalised_score_else_the_return() -> None:
    both = Evaluation("t", "a", 0, 0, 0, 0, 1, return_mean=-7.0, success_rate=0.25, normalized_score=80.0)
    assert both.score == 0.25
    assert evaluations((0, 0, 80.0), score="normalized_score")[0].score == 0.8
    assert evaluations((0, 0, None))[0].score == -1.0


def test_an_interval_is_that_of_a_bootstrap_within_each_task() -> None:
    strata = [[0.137, 0.529, 0.211, 0.903, 0.418], [0.617, 0.731, 0.964]]
    rng = np.random.default_rng(5)
    resampled = []
    for _ in range(20_000):
        drawn = [task[i] for task in strata for i in rng.integers(len(task), size=len(task))]
        resampled.append(sum(drawn) / len(drawn))
    low, high = np.quantile(resampled, [0.025, 0.975])
    found = interval(strata, mean)
    assert found.value == pytest.approx(4.51 / 8)
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    assert found == interval(strata, mean)  # The same numbers every time.


def test_equal_seeds_give_a_point_and_a_single_seed_no_interval() -> None:
    assert interval([[0.5, 0.5, 0.5]]) == (0.5, 0.5, 0.5)
    one = interval([[0.5]])
    assert one.value == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_the_interval_of_a_curve_is_that_of_each_of_its_points() -> None:
    rng = np.random.default_rng(0)
    curves = list(rng.random((5, 3)))
    middle, low, high = curve_interval(curves)
    assert NUM_RESAMPLES >= 1_000
    for point in range(3):
        values = [float(curve[point]) for curve in curves]
        expected = interval([values], mean)
        assert middle[point] == pytest.approx(expected.value)
        assert low[point] == pytest.approx(expected.low, abs=0.02)
        assert high[point] == pytest.approx(expected.high, abs=0.02)


def test_the_regret_is_the_area_above_the_curve_since_the_switch() -> None:
    # From 0.8 to 0.4 over 100 steps, then to 1.0 over 300: areas 60 and 210 of 400.
    fate = fate_of(evaluations((0, 0, 0.1), (50, 0, 0.8), (50, 100, 0.4), (50, 400, 1.0)))
    assert fate.regret == pytest.approx(1.0 - 270.0 / 400.0)
    assert (fate.at_switch, fate.final) == (0.8, 1.0)
    assert fate.dip == pytest.approx(0.4)
    assert fate.recovered_after == 400.0


def test_recovery_counts_from_the_lowest_point_and_may_never_come() -> None:
    later = fate_of(evaluations((50, 0, 0.8), (50, 100, 0.9), (50, 200, 0.3), (50, 300, 0.5), (50, 400, 0.8)))
    assert later.recovered_after == 400.0
    never = fate_of(evaluations((50, 0, 0.8), (50, 100, 0.3), (50, 200, 0.7)))
    assert never.recovered_after == math.inf
    without = fate_of(evaluations((50, 0, 0.8), (50, 100, 0.8), (50, 200, 1.0)))
    assert (without.dip, without.recovered_after) == (0.0, 0.0)


def test_without_pre_training_there_is_regret_and_no_dip() -> None:
    fate = fate_of(evaluations((0, 0, 0.0), (0, 100, 0.5), (0, 200, 0.5)))
    assert (fate.at_switch, fate.dip, fate.recovered_after) == (None, None, None)
    assert fate.regret == pytest.approx(1.0 - 75.0 / 200.0)


def test_returns_without_scale_have_no_regret() -> None:
    assert fate_of(evaluations((50, 0, None), (50, 100, None))).regret is None


@pytest.mark.parametrize(
    ("online", "grid", "expected"),
    [
        (False, [0, 5, 10, 20], [0.0, 0.25, 0.5, 0.8]),
        (True, [0, 50, 100, 200, 250], [0.8, 0.6, 0.4, 0.8, 1.0]),  # The switch belongs to both phases.
    ],
)
def test_curves_are_linear_between_the_evaluations_of_a_phase(
    online: bool, grid: Sequence[float], expected: Sequence[float]
) -> None:
    trial = evaluations((0, 0, 0.0), (10, 0, 0.5), (20, 0, 0.8), (20, 100, 0.4), (20, 250, 1.0))
    assert on_grid(trial, np.array(grid, float), online=online).tolist() == pytest.approx(expected)


def test_before_the_first_value_a_curve_is_unknown() -> None:
    trial = [
        Evaluation("t", "a", 0, 0, 0, 0, 1, return_mean=0.0),
        Evaluation("t", "a", 0, 10, 0, 0, 1, return_mean=0.0, q_data=2.0),
        Evaluation("t", "a", 0, 20, 0, 0, 1, return_mean=0.0, q_data=4.0),
    ]
    values = on_grid(trial, np.array([0.0, 10.0, 15.0]), online=False, quantity="q_data")
    assert math.isnan(values[0])
    assert values[1:].tolist() == [2.0, 3.0]
    assert np.isnan(on_grid(trial, np.array([0.0]), online=False, quantity="bound_rate")).all()
