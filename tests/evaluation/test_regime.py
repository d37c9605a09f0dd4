"""Whether policy or data are the better prior at the switch: numbers worked by hand, from tables of Student's t.

97.5 % quantiles: 12.706 with 1 degree of freedom, 2.776 with 4, 2.306 with 8, 2.093 with 19, 1.984 with 99.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rllib_calql import CalQLConfig
from rllib_calql.collection.callbacks import RETURN_SQUARE_MEAN
from rllib_calql.common import metrics as keys
from rllib_calql.evaluation.evaluating import known_results
from rllib_calql.evaluation.history import EvaluationHistory
from rllib_calql.evaluation.regime import BOTH, DATA, POLICY, RETURN, SUCCESS, Episodes, Regime, regime_of
from rllib_calql.parts import Parts
from rllib_calql.results import completed_result

MIXED = Episodes(number=100, mean=0.0, std=math.sqrt(0.99))  # A sample's standard deviation of 1, 99 degrees.
FEW = math.sqrt(0.8)  # The same of 5 episodes.


@pytest.mark.parametrize(
    ("policy", "data", "better"),
    [
        # 1.984 sqrt(1/25 + 1/100) = 0.4437.
        (Episodes(25, 0.443, 0.0), MIXED, BOTH),
        (Episodes(25, 0.444, 0.0), MIXED, POLICY),
        (Episodes(25, -0.443, 0.0), MIXED, BOTH),
        (Episodes(25, -0.444, 0.0), MIXED, DATA),
        # The policy spreads more and is seen in 5 episodes: 2.776 sqrt(1/5 + 1/20) = 1.388.
        (Episodes(5, 1.38, FEW), Episodes(20, 0.0, 0.1), BOTH),
        (Episodes(5, 1.39, FEW), Episodes(20, 0.0, 0.1), POLICY),
        # One demonstration, 9 episodes with a sample's standard deviation of 3: 2.306 * 3 sqrt(1/9 + 1) = 7.292.
        (Episodes(9, -7.29, math.sqrt(8.0)), Episodes(1, 0.0, 0.0), BOTH),
        (Episodes(9, -7.30, math.sqrt(8.0)), Episodes(1, 0.0, 0.0), DATA),
        # One evaluated episode: 1.984 sqrt(1 + 1/100) = 1.994.
        (Episodes(1, 1.99, 0.0), MIXED, BOTH),
        (Episodes(1, 2.00, 0.0), MIXED, POLICY),
        # Two episodes tell next to nothing where they differ: 12.706 sqrt(2) sqrt(1/2 + 1/100) = 12.83.
        (Episodes(2, 12.8, 1.0), MIXED, BOTH),
        (Episodes(2, 12.9, 1.0), MIXED, POLICY),
        # Ten successes in a row: nine of ten are what the data do as well.
        (Episodes(10, 1.0, 0.0), Episodes(1000, 0.9, 0.3), BOTH),
        (Episodes(10, 1.0, 0.0), Episodes(1000, 0.4, 0.49), POLICY),
        # Nothing is left to chance.
        (Episodes(2, 1.0, 0.0), Episodes(2, 1.5, 0.0), DATA),
    ],
)
def test_one_is_better_if_the_means_differ_by_more_than_the_spread_explains(
    policy: Episodes, data: Episodes, better: str
) -> None:
    assert regime_of(policy, data) == Regime(better, RETURN, policy.mean, data.mean)


def test_success_decides_where_all_returns_are_one_number() -> None:
    # Of 20 episodes half succeed: 0.513 in the sample; 2.093 * 0.513 sqrt(1/20 + 1/100) = 0.263.
    policy, data = Episodes(20, 7.0, 0.0, 0.5), Episodes(100, 7.0, 0.0, 0.77)
    assert regime_of(policy, data) == Regime(DATA, SUCCESS, 0.5, 0.77)
    assert regime_of(policy, Episodes(100, 7.0, 0.0, 0.76)) == Regime(BOTH, SUCCESS, 0.5, 0.76)
    # Returns that differ at all go before it.
    assert regime_of(Episodes(20, 8.0, 0.0, 0.5), data) == Regime(POLICY, RETURN, 8.0, 7.0)


@pytest.mark.parametrize(
    ("policy", "data"),
    [
        (Episodes(1, 9.0, 0.0), Episodes(1, 0.0, 0.0)),
        (Episodes(10, 7.0, 0.0), Episodes(10, 7.0, 0.0)),
        (Episodes(10, 7.0, 0.0, 0.5), Episodes(10, 7.0, 0.0)),
        (Episodes(10, 7.0, 0.0), Episodes(10, 7.0, 0.0, 0.5)),
        (Episodes(1, 7.0, 0.0, 1.0), Episodes(1, 7.0, 0.0, 0.0)),
    ],
    ids=["one episode each", "one number", "no success of the data", "no success of the policy", "one success each"],
)
def test_what_cannot_be_compared_is_not_guessed(policy: Episodes, data: Episodes) -> None:
    assert regime_of(policy, data) is None


# What results tell of it


def evaluation(mean: float, std: float | None = 0.0, **more: Any) -> dict[str, Any]:
    spread = {} if std is None else {keys.EPISODE_RETURN_STD: std}
    return {"episode_return_mean": mean, "num_episodes": 25, **spread, **more}


def test_the_last_evaluation_before_the_switch_is_compared_and_no_later_one() -> None:
    history = EvaluationHistory(data=MIXED)
    assert history.regime() == {}
    history.add(evaluation(-5.0), online=False)
    history.add(evaluation(5.0), online=False)
    told = {keys.REGIME: POLICY, keys.REGIME_QUANTITY: RETURN, keys.REGIME_POLICY: 5.0, keys.REGIME_DATA: 0.0}
    assert history.regime() == told
    history.add(evaluation(-9.0), online=True)
    assert history.regime() == told


def test_a_run_that_goes_on_from_a_checkpoint_tells_the_same_regime() -> None:
    original = EvaluationHistory(data=MIXED)
    original.add(evaluation(0.1, 2.5, **{keys.SUCCESS_RATE: 0.25}), online=False)
    restored = EvaluationHistory(data=MIXED)
    restored.set_state(original.get_state())
    assert restored.regime() == original.regime()
    assert restored.regime()[keys.REGIME] == BOTH
    assert restored.get_state() == original.get_state()


def test_a_checkpoint_of_an_earlier_version_knows_no_regime() -> None:
    state = EvaluationHistory().get_state()
    del state["policy"]
    history = EvaluationHistory(data=MIXED)
    history.add(evaluation(5.0), online=False)
    history.set_state(state | {"at_switch": 5.0})
    assert history.regime() == {}


@pytest.mark.parametrize(
    ("data", "evaluated"),
    [(None, [evaluation(5.0)]), (MIXED, []), (MIXED, [evaluation(5.0, None)]), (MIXED, [{"episode_return_mean": 5.0}])],
    ids=["no data", "nothing evaluated", "no spread", "own evaluation function"],
)
def test_without_data_or_an_evaluation_before_the_switch_there_is_no_regime(
    data: Episodes | None, evaluated: list[dict[str, Any]]
) -> None:
    history = EvaluationHistory(data=data)
    for one in evaluated:
        history.add(one, online=False)
    history.add(evaluation(5.0), online=True)
    assert history.regime() == {}


def test_no_more_episodes_count_than_the_mean_return_runs_over() -> None:
    # 1.984 sqrt(1/25 + 1/100) = 0.4437 with 25 of 2,500 episodes, 1.984 sqrt(1/2500 + 1/100) = 0.2023 with all.
    for max_episodes, better in ((25, BOTH), (2_500, POLICY)):
        history = EvaluationHistory(data=MIXED, max_episodes=max_episodes)
        history.add(evaluation(0.4, num_episodes=2_500), online=False)
        assert history.regime()[keys.REGIME] == better


@pytest.mark.parametrize(
    ("returns", "std"),
    [([1.0, 2.0, 3.0, 4.0], math.sqrt(1.25)), ([-7.0], 0.0), ([0.1] * 3, 0.0), ([1e4, 1e4 + 2], 1.0)],
)
def test_the_spread_of_returns_comes_from_the_mean_of_their_squares(returns: list[float], std: float) -> None:
    raw = {
        "episode_return_mean": sum(returns) / len(returns),
        "episode_return_min": min(returns),
        "episode_return_max": max(returns),
        RETURN_SQUARE_MEAN: sum(value**2 for value in returns) / len(returns),
    }
    known = known_results(raw)
    assert known[keys.EPISODE_RETURN_STD] == pytest.approx(std, abs=0.0, rel=1e-6)
    assert RETURN_SQUARE_MEAN not in known
    assert known_results(known) == known


def result_after(history: EvaluationHistory, *, phase_now: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The result of an iteration without an evaluation, in which RLlib repeats the last one as it is."""
    parts = SimpleNamespace(
        lifetime=SimpleNamespace(phase=phase_now, counters=dict, num_env_steps_behind=0.0),
        divergence=SimpleNamespace(out_of_range=0.0, warning=None),
        success_key=SimpleNamespace(warning=None),
        pretrained=SimpleNamespace(remark=None),
        keeper=SimpleNamespace(num_discarded=0, results=dict),
        collection=SimpleNamespace(results=dict),
        store=SimpleNamespace(num_offline=0, num_online=0, split=None),
        held_out=None,
        updater=SimpleNamespace(take_speed=lambda: None),
        history=history,
        offline_evaluation=SimpleNamespace(latest=None),
    )
    return completed_result(
        {"evaluation": {"env_runners": raw}},
        None,
        cast("Parts", parts),
        CalQLConfig(),
        phase="offline",
        is_done=False,
        offline_data=None,
    )


def test_results_tell_the_regime_from_the_switch_on() -> None:
    history = EvaluationHistory(data=MIXED)
    history.add(evaluation(5.0), online=False)
    assert keys.FINE_TUNING not in result_after(history, phase_now="offline", raw={})
    assert result_after(history, phase_now="online", raw={})[keys.FINE_TUNING] == history.regime()
    unknown = EvaluationHistory()
    assert keys.FINE_TUNING not in result_after(unknown, phase_now="online", raw={})


def test_an_evaluation_that_rllib_repeats_shows_the_spread_as_the_first_time() -> None:
    raw = {"episode_return_mean": 2.0, "episode_return_min": 1.0, "episode_return_max": 3.0, RETURN_SQUARE_MEAN: 5.0}
    result = result_after(EvaluationHistory(), phase_now="online", raw=raw)
    known = {"episode_return_mean": 2.0, "episode_return_min": 1.0, "episode_return_max": 3.0}
    assert result["evaluation"]["env_runners"] == known | {keys.EPISODE_RETURN_STD: 1.0}
