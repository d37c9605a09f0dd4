"""When a run is said to overfit, and when no more."""

from __future__ import annotations

import math

import pytest

from rllib_calql.evaluation.overfitting import NUM_RISES, NUM_SMOOTHED, Losses, OverfittingWatch


def watched(held_out: list[float], training: list[float], *, online_from: int = 1_000) -> list[bool]:
    """Whether there is a warning after each evaluation."""
    watch, warned = OverfittingWatch(), []
    for number, losses in enumerate(zip(held_out, training, strict=True)):
        watch.observe(Losses(100 * number, *losses), online=number >= online_from)
        warned.append(watch.warning is not None)
    return warned


NUMBERS = [float(number) for number in range(10)]
RISING, FALLING = [1.0 + number for number in NUMBERS], [20.0 - number for number in NUMBERS]


def test_it_overfits_after_as_many_rises_in_a_row_of_the_mean_and_not_before() -> None:
    assert (NUM_SMOOTHED, NUM_RISES) == (3, 4)
    assert watched(RISING, FALLING) == [False] * 6 + [True] * 4


def test_single_evaluations_may_fall_as_long_as_the_mean_of_three_rises() -> None:
    held_out = [1.0, 2.0, 0.0, 3.0, 4.0, 1.0, 5.0, 6.0, 7.0, 8.0]
    # Means of three: 1, 5/3, 7/3, 8/3, 10/3, ...
    assert watched(held_out, FALLING) == [False] * 6 + [True] * 4


@pytest.mark.parametrize(
    ("held_out", "training"),
    [
        (RISING, RISING),
        (FALLING, FALLING),
        (FALLING, RISING),
        ([1.0] * 10, FALLING),
        (RISING, [1.0] * 10),
        ([*RISING[:6], 4.0, 5.0, 6.0, 7.0], FALLING),  # The mean of the 7th is that of the 6th.
        (RISING, [*FALLING[:6], 17.0, 16.0, 15.0, 14.0]),
        ([*RISING[:5], math.nan, *RISING[6:]], FALLING),
    ],
)
def test_anything_else_is_no_overfitting(held_out: list[float], training: list[float]) -> None:
    assert watched(held_out, training) == [False] * 10


def test_the_warning_stays_until_the_held_out_loss_is_back_where_it_rose_from() -> None:
    held_out = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 2.0, 2.0, 2.0, 9.0]  # It rose from a mean of 2.
    assert watched(held_out, [20.0 - number for number in range(11)])[6:] == [True, True, True, False, False]


def test_evaluations_of_the_same_networks_count_once_and_phases_apart() -> None:
    watch = OverfittingWatch()
    for number, losses in enumerate(zip(RISING, FALLING, strict=True)):
        watch.observe(Losses(number // 2, *losses), online=False)
    assert watch.warning is None
    assert watched(RISING, FALLING, online_from=5) == [False] * 10
    assert watched(RISING, FALLING, online_from=7)[6:8] == [True, False]


def test_counting_goes_on_in_a_resumed_run() -> None:
    watch, resumed = OverfittingWatch(), OverfittingWatch()
    for number in range(6):
        watch.observe(Losses(number, RISING[number], FALLING[number]), online=False)
    resumed.set_state(watch.get_state())
    resumed.observe(Losses(6, RISING[6], FALLING[6]), online=False)
    expected = "from update 2 to 6 the TD loss of held-out rows has risen at each of 4 evaluations, from 2 to 6, while"
    assert expected in (resumed.warning or "")
    again = OverfittingWatch()
    again.set_state(resumed.get_state())
    assert again.warning == resumed.warning
