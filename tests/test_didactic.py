"""The small case: each number worked out by hand, none by the code that is tested."""

from __future__ import annotations

import didactic
import pytest
import torch
from didactic import BAD, DETOUR, GO, GOOD, OFFLINE_UPDATES, greedy_return, run

EXACT = 1e-9
N = OFFLINE_UPDATES

# At s1 the push-down of `bad` is 0.1 w = 0.02 per unit of rate, so 0.01 an update. `good` goes to its return at once,
# since the rate is half, pushed up by w and down by 0.9 w: Q' = Q - (2 (Q - 1) - 0.1 w) / 2 = 1 + 0.01.
Q_GOOD = 1.01


def test_the_values_of_cql_fall_for_ever_and_far_under_the_truth() -> None:
    q = run(-torch.inf).offline[-1]
    q_bad = 3.985 - 0.01 * N
    q_go = 0.9 * Q_GOOD + 0.1 * (q_bad + 0.01) + 0.01  # The target of one update before.
    assert (q_bad, q_go) == (pytest.approx(-36.015), pytest.approx(-2.6815))
    assert q[1].tolist() == pytest.approx([Q_GOOD, q_bad], abs=EXACT)
    assert q[0].tolist() == pytest.approx([q_go, q_bad], abs=EXACT)  # `detour` is pushed down as `bad` is.
    assert greedy_return(q) == 1.0  # The ranking is right, as long as nothing new is tried.


def test_calibrated_values_stop_at_the_floor_and_stay_near_the_truth() -> None:
    offline = run(1.0).offline
    q_bad = 3.985 - 299 * 0.01  # The first one below 1, and there it stays.
    assert q_bad == pytest.approx(0.995)
    assert offline[298, 1, BAD].item() == pytest.approx(1.005, abs=EXACT)
    for after in (299, 300, N):
        assert offline[after, 1, BAD].item() == pytest.approx(q_bad, abs=EXACT)
    q_go = 0.9 * Q_GOOD + 0.1 * q_bad + 0.01
    assert q_go == pytest.approx(1.0185)
    assert offline[-1].flatten().tolist() == pytest.approx([q_go, q_bad, Q_GOOD, q_bad], abs=EXACT)


def test_the_first_new_samples_make_cql_unlearn_and_leave_cal_ql_alone() -> None:
    cql, calql = run(-torch.inf).online, run(1.0).online
    # Every other sample at s0 is a detour now, so its Q closes half of the distance to 0.5, pushed up by w / 2 and down
    # by 0.1 w while `go` looks better: Q' = Q - ((Q - 0.5) - 0.08) / 2 = Q / 2 + 0.29.
    detours = [-36.015, -17.7175, -8.56875, -3.994375, -1.7071875]
    assert cql[:5, 0, DETOUR].tolist() == pytest.approx(detours, abs=EXACT)
    # `go` is pushed up by w / 2 and down by 0.9 w: Q' = Q / 2 + y / 2 - 0.04, and stays between -2.8 and -2.6.
    assert ((cql[:5, 0, GO] > -2.8) & (cql[:5, 0, GO] < -2.6)).all()
    assert [greedy_return(q) for q in cql[:5]] == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert {greedy_return(q) for q in cql[4:]} == {0.5}  # It never comes back.
    # Cal-QL. The floor of the new samples is their own return, 0.5; between that and 1 only they push down:
    # Q' = Q - ((Q - 0.5) - 0.09) / 2 = Q / 2 + 0.295, which ends at 0.59, an over-estimate by less than w / 2.
    detours = [0.995, 0.7925, 0.69125, 0.640625]
    assert calql[:4, 0, DETOUR].tolist() == pytest.approx(detours, abs=EXACT)
    assert calql[-1, 0, DETOUR].item() == pytest.approx(0.59, abs=1e-6)
    # `go` falls from 1.0185 under its floor, and is held there: 1.0185 / 2 + 1.0085 / 2 - 0.04 = 0.9735.
    assert calql[1, 0, GO].item() == pytest.approx(0.9735, abs=EXACT)
    assert ((calql[:, 0, GO] > 0.96) & (calql[:, 0, GO] < 1.02)).all()
    assert {greedy_return(q) for q in calql} == {1.0}


def test_a_floor_above_a_bad_actions_value_over_estimates_it_without_harm() -> None:
    q = run(1.0).offline[-1]
    assert q[1, BAD] > didactic.REWARDS[1, BAD] + 0.9
    assert q[1, GOOD] > q[1, BAD]
    assert greedy_return(q) == 1.0


def test_a_floor_that_is_too_high_turns_the_ranking_round() -> None:
    q = run(3.0).offline[-1]
    # `bad` stops below 3 after 99 updates. `good` is below the floor, so nothing pushes it down: 2 (Q - 1) = w.
    assert q[1].tolist() == pytest.approx([1.1, 3.985 - 99 * 0.01], abs=EXACT)
    assert q[1, BAD] > q[1, GOOD]
    assert greedy_return(torch.stack([torch.tensor([1.0, 0.0]), q[1].float()])) == 0.0


def test_the_policy_explores_a_tenth() -> None:
    q = torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    assert didactic.policy_of(q, greedy=True).flatten().tolist() == pytest.approx([0.1, 0.9, 0.9, 0.1])
    assert didactic.policy_of(q, greedy=False)[:, GO].tolist() == [0.9, 0.9]
