"""Episodes spent on candidates: counted exactly, the better half goes on, the ranking decides between equals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest

from rllib_calql.evaluation.selection import num_taking_part, select_by_episodes, success_interval

NAMES = ["a", "b", "c", "d"]


class Field:
    """Candidates whose every episode is as good as their name says."""

    def __init__(self, **quality: float) -> None:
        self.quality = quality
        self.spent: Counter[str] = Counter()
        self.rounds: list[tuple[int, str]] = []

    def run(self, name: str, count: int, number: int) -> tuple[Sequence[float], float | None]:
        """Success of that quality, returns ten times it."""
        self.spent[name] += count
        self.rounds.append((number, name))
        return [10.0 * self.quality[name]] * count, self.quality[name]


def test_the_best_by_episodes_wins_though_the_data_rank_it_last() -> None:
    field = Field(a=0.1, b=0.2, c=0.3, d=0.9)
    selection = select_by_episodes(NAMES, 40, field.run)
    assert selection.winner is not None
    assert selection.winner.name == "d"
    assert [one.name for one in selection.candidates] == ["d", "c", "b", "a"]


def test_exactly_the_episodes_that_were_given_are_spent_and_counted() -> None:
    for number in (1, 2, 7, 12, 40, 41, 43):
        field = Field(a=0.1, b=0.2, c=0.3, d=0.9)
        selection = select_by_episodes(NAMES, number, field.run)
        assert selection.episodes_spent == sum(field.spent.values()) == number
        assert sum(len(one.returns) for one in selection.candidates) == number


def test_the_better_half_gets_the_second_half_of_the_episodes() -> None:
    field = Field(a=0.1, b=0.8, c=0.3, d=0.9)
    select_by_episodes(NAMES, 40, field.run)
    assert field.spent == {"a": 5, "b": 15, "c": 5, "d": 15}
    assert field.rounds == [(0, "a"), (0, "b"), (0, "c"), (0, "d"), (1, "b"), (1, "d")]


def test_of_three_the_better_two_go_on() -> None:
    field = Field(a=0.1, b=0.8, c=0.3)
    select_by_episodes(["a", "b", "c"], 18, field.run)
    assert field.rounds == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c")]


def test_a_success_rate_is_that_of_all_episodes_of_all_rounds() -> None:
    # Of 40 episodes a candidate gets 5, and then 10: a success rate of the first round counts half as much.
    rates = {("a", 0): 1.0, ("a", 1): 0.1, ("b", 0): 0.4, ("b", 1): 0.4}
    selection = select_by_episodes(
        NAMES, 40, lambda name, count, number: ([0.0] * count, rates.get((name, number), 0.0))
    )
    assert selection.winner is not None
    assert selection.winner.success_rate == pytest.approx((5 * 1.0 + 10 * 0.1) / 15)
    assert selection.winner.name == "a"  # By the ranking: both have 0.4, while the last rounds alone say b.


def test_between_equals_the_ranking_decides() -> None:
    selection = select_by_episodes(["c", "a", "b"], 30, Field(a=1.0, b=1.0, c=1.0).run)
    assert selection.winner is not None
    assert [one.name for one in selection.candidates] == ["c", "a", "b"]


def test_returns_decide_where_success_is_not_known_or_the_same() -> None:
    returns = {"a": -30.0, "b": -10.0, "c": -20.0}
    for success in (None, 1.0):
        selection = select_by_episodes(list("abc"), 30, lambda name, count, _: ([returns[name]] * count, success))  # noqa: B023
        assert selection.winner is not None
        assert selection.winner.name == "b"


def test_with_few_episodes_those_that_the_data_rank_highest_take_part() -> None:
    field = Field(**dict.fromkeys("abcdefgh", 0.5))
    selection = select_by_episodes(list("abcdefgh"), 12, field.run)
    assert set(field.spent) == {"a", "b"}
    assert selection.left_out == list("cdefgh")


@pytest.mark.parametrize(("candidates", "episodes", "part"), [(12, 40, 4), (4, 40, 4), (3, 3, 1), (5, 1, 1), (2, 6, 2)])
def test_as_many_take_part_as_three_episodes_in_the_first_round_allow(
    candidates: int, episodes: int, part: int
) -> None:
    assert num_taking_part(candidates, episodes) == part


def test_a_candidate_that_fails_goes_out_and_its_episodes_count_as_spent() -> None:
    field = Field(a=0.9, b=0.2, c=0.3, d=0.1)

    def run(name: str, count: int, number: int) -> tuple[Sequence[float], float | None]:
        if name == "a":
            raise RuntimeError("The arm is\nstuck.")
        return field.run(name, count, number)

    selection = select_by_episodes(NAMES, 40, run)
    assert selection.winner is not None
    assert selection.winner.name == "c"
    assert selection.candidates[-1].error == "The arm is stuck."
    assert selection.candidates[-1].attempted == 5
    assert selection.episodes_spent == sum(one.attempted for one in selection.candidates) == 40
    every = select_by_episodes(["a"], 4, run)
    assert every.winner is None


def test_episodes_that_a_failed_candidate_never_began_are_left_for_the_others() -> None:
    field = Field(a=0.9, b=0.2, c=0.3, d=0.1)
    begun = 0

    def run(name: str, count: int, number: int) -> tuple[Sequence[float], float | None]:
        nonlocal begun
        if name == "a":
            begun += 2  # Of five.
            raise RuntimeError("The arm is stuck.")
        begun += count
        return field.run(name, count, number)

    selection = select_by_episodes(NAMES, 40, run, num_begun=lambda: begun)
    assert selection.candidates[-1].attempted == 2
    assert field.spent == {"b": 5 + 12, "c": 5 + 11, "d": 5}
    assert selection.episodes_spent == begun == 40


def test_a_return_that_is_no_number_is_the_worst() -> None:
    returns = {"a": math.nan, "b": -10.0, "c": math.nan, "d": -20.0}
    for order in ("abcd", "bacd", "dcba"):
        selection = select_by_episodes(list(order), 40, lambda name, count, _: ([returns[name]] * count, None))
        assert selection.winner is not None
        assert selection.winner.name == "b"
        assert {one.name for one in selection.candidates[2:]} == {"a", "c"}


def test_the_interval_of_a_success_rate_is_wilson_s() -> None:
    low, high = success_interval(1.0, 10)  # Ten of ten: Wilson's is [0.722, 1].
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-3)
    low, high = success_interval(0.5, 20)
    assert (low, high) == pytest.approx((0.2993, 0.7007), abs=1e-3)


@pytest.mark.parametrize("number", [1, 2, 5, 7, 40])
def test_where_none_or_all_succeed_the_interval_ends_exactly_there(number: int) -> None:
    z_squared = 1.959964**2
    low, high = success_interval(0.0, number)
    assert low == 0.0
    assert high == pytest.approx(z_squared / (number + z_squared))  # Wilson's upper end at 0, worked by hand.
    low, high = success_interval(1.0, number)
    assert high == 1.0
    assert low == pytest.approx(number / (number + z_squared))
