"""Diagnostics of a gradient step, their means, and the history of evaluations, all against hand-worked numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rllib_calql import CalQLConfig
from rllib_calql.common import metrics as keys
from rllib_calql.evaluation.history import EvaluationHistory
from rllib_calql.learning.diagnostics import MeanAccumulator, critic_diagnostics, without_what_is_not_evaluated
from rllib_calql.learning.losses import CriticLoss, SampledValues

# C = 2 critics, N = 2 actions per source, B = 2 states.
Q_DATA = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
VALUES = SampledValues(
    q_uniform=torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[4.0, 4.0], [4.0, 8.0]]]),
    q_current=torch.tensor([[[4.0, 1.0], [6.0, 1.0]], [[0.0, 0.0], [0.0, 4.0]]]),
    q_next=torch.tensor([[[8.0, 1.0], [10.0, 1.0]], [[2.0, 2.0], [2.0, 2.0]]]),
    log_prob_current=torch.zeros(2, 2),
    log_prob_next=torch.zeros(2, 2),
    action_dim=1,
)
TERMS = CriticLoss(
    td=torch.tensor([[1.0, 9.0], [0.0, 4.0]]),
    gap=torch.tensor([[-1.0, 2.0], [3.0, 5.0]]),
    bound_current=torch.tensor([[[True, False], [False, False]], [[True, True], [True, True]]]),
    bound_next=torch.tensor([[[True, True], [False, False]], [[False, False], [False, False]]]),
)
RETURNS = torch.tensor([2.0, -4.0])


def diagnose(is_offline: list[float]) -> dict[str, float]:
    scalars = critic_diagnostics(Q_DATA, VALUES, TERMS, RETURNS, torch.tensor(is_offline))
    assert all(value.shape == () and not value.requires_grad for value in scalars.values())
    return {name: value.item() for name, value in scalars.items()}


def test_each_critic_has_its_own_statistics_counted_from_one() -> None:
    actual = diagnose([1.0, 0.0])
    # State 0 of critic 1 holds Q = 0, 2, 4, 6, 8, 10: population variance 35 / 3; state 1 holds ones. State 0 of critic
    # 2 holds 4, 4, 0, 0, 2, 2: variance 8 / 3; state 1 holds 4, 8, 0, 4, 2, 2: mean 10 / 3, variance 104 / 6 - 100 / 9.
    expected = {
        keys.TD_LOSS_OF_CRITIC: (5.0, 2.0),
        keys.GAP_OF_CRITIC: (0.5, 4.0),
        keys.Q_DATA_OF_CRITIC: (2.0, 6.0),
        keys.Q_UNIFORM_OF_CRITIC: (1.0, 5.0),
        keys.Q_CURRENT_OF_CRITIC: (3.0, 1.0),
        keys.Q_NEXT_OF_CRITIC: (5.0, 2.0),
        keys.Q_STD_OF_CRITIC: (math.sqrt(35 / 3) / 2, (math.sqrt(8 / 3) + math.sqrt(104 / 6 - 100 / 9)) / 2),
        keys.BOUND_RATE_CURRENT_OF_CRITIC: (0.25, 1.0),
        keys.BOUND_RATE_NEXT_OF_CRITIC: (0.5, 0.0),
    }
    for template, (first, second) in expected.items():
        assert actual.pop(template.format(c=1)) == pytest.approx(first, rel=1e-6), template
        assert actual.pop(template.format(c=2)) == pytest.approx(second, rel=1e-6), template
    assert not [name for name in actual if "1" in name or "2" in name]


def test_the_calibration_gap_is_q_minus_return_by_part_of_the_batch() -> None:
    actual = diagnose([1.0, 0.0])  # Mean Q of both critics 3 and 5.
    assert actual[keys.CALIBRATION_GAP_OFFLINE] == pytest.approx(3.0 - 2.0)
    assert actual[keys.CALIBRATION_GAP_ONLINE] == pytest.approx(5.0 + 4.0)
    assert actual[keys.CALIBRATION_GAP] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("is_offline", "empty", "full"),
    [
        ([1.0, 1.0], keys.CALIBRATION_GAP_ONLINE, keys.CALIBRATION_GAP_OFFLINE),
        ([0.0, 0.0], keys.CALIBRATION_GAP_OFFLINE, keys.CALIBRATION_GAP_ONLINE),
    ],
)
def test_an_empty_part_of_the_batch_has_no_calibration_gap(is_offline: list[float], empty: str, full: str) -> None:
    accumulator = MeanAccumulator()
    accumulator.add(critic_diagnostics(Q_DATA, VALUES, TERMS, RETURNS, torch.tensor(is_offline)))
    means = accumulator.pop()
    assert empty not in means
    assert means[full] == pytest.approx(5.0)


def test_the_accumulator_divides_each_sum_by_its_own_count_and_starts_anew() -> None:
    accumulator = MeanAccumulator()
    assert accumulator.pop() == {}
    accumulator.add({"a": torch.tensor(1.0), "b": torch.tensor(10.0)})
    accumulator.add({"a": torch.tensor(2.0)})
    accumulator.add({"a": torch.tensor(6.0), "b": torch.tensor(-4.0)})
    assert accumulator.pop() == {"a": 3.0, "b": 3.0}
    assert accumulator.pop() == {}
    accumulator.add({"a": torch.tensor(5.0)})
    assert accumulator.pop() == {"a": 5.0}


def test_a_nan_that_is_no_empty_part_stays_visible() -> None:
    accumulator = MeanAccumulator()
    accumulator.add({keys.QF_LOSS: torch.tensor(math.nan)})
    assert math.isnan(accumulator.pop()[keys.QF_LOSS])


def test_the_accumulator_keeps_no_graph_and_sums_in_double_precision() -> None:
    accumulator = MeanAccumulator()
    parameter = torch.tensor(2.0**24, requires_grad=True)
    accumulator.add({"a": parameter * 1.0})
    for _ in range(3):
        accumulator.add({"a": torch.tensor(1.0)})
    assert not any(sums.requires_grad for sums in accumulator._sums.values())
    assert accumulator.pop() == {"a": (2.0**24 + 3.0) / 4.0}


# Evaluations since the switch


def history_of(
    offline: list[float], online: list[float], scores: tuple[float, float] | None = None
) -> EvaluationHistory:
    history = EvaluationHistory(scores)
    for value in offline:
        history.add({"episode_return_mean": value}, online=False)
    for value in online:
        history.add({"episode_return_mean": value}, online=True)
    return history


def test_the_dip_is_the_worst_online_evaluation_against_the_last_offline_one() -> None:
    assert history_of([90.0, 50.0], [60.0, 20.0, 80.0]).summary() == {keys.DIP: -30.0}


def test_the_dip_is_zero_where_fine_tuning_never_fell_below_the_switch() -> None:
    assert history_of([50.0], [60.0, 55.0]).summary() == {keys.DIP: 0.0}


def test_the_dip_needs_an_evaluation_on_both_sides() -> None:
    assert history_of([50.0], []).summary() == {}
    assert history_of([], [50.0]).summary() == {}


def test_the_normalised_score_is_0_for_the_random_and_100_for_the_reference_policy() -> None:
    history = EvaluationHistory((-20.0, 60.0))
    assert [history.normalized_score(value) for value in (-20.0, 60.0, 0.0, 100.0)] == [0.0, 100.0, 25.0, 150.0]


@pytest.mark.parametrize("scores", [None, (5.0, 5.0)])
def test_without_two_distinct_reference_scores_there_is_no_normalised_score(
    scores: tuple[float, float] | None,
) -> None:
    assert EvaluationHistory(scores).normalized_score(5.0) is None


def test_the_regret_is_the_mean_shortfall_of_the_success_rate_online() -> None:
    history = EvaluationHistory((0.0, 1000.0))  # The success rate goes before the normalised score.
    history.add({"episode_return_mean": 0.0, keys.SUCCESS_RATE: 0.0}, online=False)
    for rate in (0.25, 0.75, 1.0):
        history.add({"episode_return_mean": 1.0, keys.SUCCESS_RATE: rate}, online=True)
    assert history.summary()[keys.REGRET] == pytest.approx((0.75 + 0.25 + 0.0) / 3)


def test_without_success_the_regret_is_that_of_the_normalised_score() -> None:
    assert history_of([], [0.0, 30.0], (-20.0, 80.0)).summary() == {keys.REGRET: pytest.approx((0.8 + 0.5) / 2)}


def test_a_restored_history_goes_on_and_a_saved_state_stands_still() -> None:
    original = history_of([50.0], [40.0], (0.0, 100.0))
    state = original.get_state()
    original.add({"episode_return_mean": 10.0}, online=True)
    restored = EvaluationHistory((0.0, 100.0))
    restored.set_state(state)
    assert restored.summary() == {keys.DIP: -10.0, keys.REGRET: pytest.approx(0.6)}
    restored.add({"episode_return_mean": 10.0}, online=True)
    assert restored.summary() == original.summary() == {keys.DIP: -40.0, keys.REGRET: pytest.approx(0.75)}


def test_what_was_reported_before_the_switch_alone_is_left_out_and_other_nan_stays() -> None:
    nan = math.nan
    of_term = {keys.CQL_LOSS: nan, keys.GAP_OF_CRITIC.format(c=2): nan, keys.BOUND_RATE_NEXT_OF_CRITIC.format(c=1): nan}
    of_actor = {keys.POLICY_LOSS: nan, keys.LOG_PROB: nan}
    others = {keys.QF_LOSS: nan, keys.Q_DATA_OF_CRITIC.format(c=1): 2.0, "weights_seq_no": 3}
    reported = {**of_term, **of_actor, **others, keys.CALIBRATION_GAP_OFFLINE: nan}

    def left(*, online: bool, **settings: Any) -> dict[str, Any]:
        config = CalQLConfig()
        for name, value in settings.items():
            setattr(config, name, value)
        return without_what_is_not_evaluated(reported, config, online=online)

    assert left(online=True) == {**of_term, **of_actor, **others}
    assert left(online=False, conservative_online=False) == {**of_term, **of_actor, **others}
    assert left(online=True, conservative_online=False) == {**of_actor, **others}
    assert left(online=True, actor_update_period_online=4) == {**of_term, **others}
    assert left(online=True, conservative_online=False, actor_update_period=20) == others
