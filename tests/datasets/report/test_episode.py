"""One episode: found by id or number, and what is shown of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets.episodes.reader import DatasetInfo, EpisodeBlock, EpisodeReader
from rllib_calql.datasets.report.episode import find_episode, places_of_text, view_of


class Blocks(EpisodeReader):
    """A reader of blocks that lie in memory."""

    def __init__(self, *blocks: EpisodeBlock) -> None:
        super().__init__()
        self._blocks = blocks
        self.info = DatasetInfo("logs", None, None, "environment", None)

    def blocks(self) -> Iterator[EpisodeBlock]:
        """Those given."""
        yield from self._blocks


def block(ids: list[str], rewards: list[list[float]], *, terminated: list[bool], **extra: Any) -> EpisodeBlock:
    """Observations count the rows in `pos`; actions are their negatives."""
    lengths = np.array([len(one) for one in rewards])
    count = np.arange(lengths.sum(), dtype=np.float64)
    ends = np.array(terminated)
    return EpisodeBlock(
        ids=ids,
        lengths=lengths,
        observations={"pos": np.stack([count, 10 * count], axis=1), "goal": count[:, None]},
        final_observations={"pos": np.zeros((len(ids), 2)), "goal": np.zeros((len(ids), 1))},
        actions=-count[:, None],
        rewards=np.concatenate([np.array(one) for one in rewards]),
        terminateds=ends,
        truncateds=~ends,
        where=lambda row: f"row {row}",
        extra_model_outputs=extra,
    )


def two_readers() -> list[EpisodeReader]:
    first = block(["a", "1"], [[-1.0, 0.0, 2.0], [5.0]], terminated=[False, True])
    second = block(["b", "a"], [[7.0, 8.0], [9.0]], terminated=[True, True])
    return [Blocks(first), Blocks(second)]


@pytest.mark.parametrize(
    ("wanted", "id_", "index", "rewards"),
    [
        ("a", "a", 0, [-1.0, 0.0, 2.0]),  # The first of two.
        ("b", "b", 2, [7.0, 8.0]),
        ("1", "1", 1, [5.0]),
        ("3", "a", 3, [9.0]),  # No id, so a number over all inputs.
        ("0", "a", 0, [-1.0, 0.0, 2.0]),
    ],
)
def test_an_episode_is_found_by_its_id_and_else_by_its_number(
    wanted: str, id_: str, index: int, rewards: list[float]
) -> None:
    found = find_episode(two_readers(), wanted)
    assert (found.block.ids, found.index, found.block.rewards.tolist()) == ([id_], index, rewards)


def test_an_id_comes_before_a_number() -> None:
    reader = Blocks(block(["1", "0"], [[1.0], [2.0]], terminated=[True, True]))
    assert find_episode([reader], "0").block.rewards.tolist() == [2.0]


def test_an_episode_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(
        ValueError, match=r"no episode '4' in 'logs', 'logs'\. There are 4: 'a', '1', 'b', 'a'; .* 0 to 3"
    ):
        find_episode(two_readers(), "4")
    ids = [f"run-{number}" for number in range(2000)]
    many = Blocks(block(ids, [[0.0]] * 2000, terminated=[True] * 2000))
    with pytest.raises(ValueError, match=r"Did you mean 'run-19.*2,000: 'run-0', 'run-1', 'run-2', \.\.\., 'run-1997'"):
        find_episode([many], "run-19999")


def test_all_of_an_episode_is_cut_out_of_its_block() -> None:
    extra = {
        "is_intervention": np.array([0, 0, 1, 0]),
        "executed_actions": np.array([[np.nan], [8.0], [np.nan], [9.0]]),
    }
    both = block(["a", "b"], [[1.0, 2.0], [3.0, 4.0]], terminated=[True, False], **extra)
    found = find_episode([Blocks(both)], "b")
    assert found.block.where(1) == "row 3"
    view = view_of(found, RewardSettings(gamma=1.0))
    assert [(name, values.tolist()) for name, values in view.observations] == [
        ("'goal'[0]", [2.0, 3.0]),
        ("'pos'[0]", [2.0, 3.0]),
        ("'pos'[1]", [20.0, 30.0]),
    ]
    assert [(name, values.tolist()) for name, values in view.actions] == [("[0]", [-2.0, -3.0])]
    np.testing.assert_array_equal(view.executed[0][1], [np.nan, 9.0])
    assert view.is_intervention is not None
    assert (view.is_intervention.tolist(), view.is_terminated) == ([True, False], False)


# Rewards -1, 0, 2, then 10 r - 5: -15, -5, 15.
@pytest.mark.parametrize(
    ("settings", "terminated", "last_value", "returns"),
    [
        (RewardSettings(0.5), True, None, [-0.5, 1.0, 2.0]),
        (RewardSettings(0.5), False, None, [-0.5, 1.0, 2.0]),
        (RewardSettings(0.5, 10.0, -5.0), True, None, [-13.75, 2.5, 15.0]),
        # 15 for ever is 30: -5 + 0.5 * 30 = 10, -15 + 0.5 * 10 = -10.
        (RewardSettings(0.5, 10.0, -5.0, truncation="steady"), False, None, [-10.0, 10.0, 30.0]),
        (RewardSettings(0.5, 10.0, -5.0, truncation="steady"), True, None, [-13.75, 2.5, 15.0]),
        # 15 + 0.5 * 4 = 17, -5 + 0.5 * 17 = 3.5, -15 + 0.5 * 3.5 = -13.25.
        (RewardSettings(0.5, 10.0, -5.0, truncation="bootstrap"), False, 4.0, [-13.25, 3.5, 17.0]),
        (RewardSettings(0.5, 10.0, -5.0, truncation="bootstrap"), True, 4.0, [-13.75, 2.5, 15.0]),
    ],
)
def test_returns_to_go_are_those_of_training(
    settings: RewardSettings, terminated: bool, last_value: float | None, returns: list[float]
) -> None:
    found = find_episode([Blocks(block(["a"], [[-1.0, 0.0, 2.0]], terminated=[terminated]))], "a")
    view = view_of(found, settings, last_value=last_value)
    assert view.returns_to_go.tolist() == returns
    assert view.rewards.tolist() == [-1.0, 0.0, 2.0]


def test_a_failed_episode_fails_for_ever() -> None:
    found = find_episode([Blocks(block(["a"], [[-1.0, -1.0]], terminated=[False]))], "a")
    assert view_of(found, RewardSettings(0.5, failure_reward=-1.0)).returns_to_go.tolist() == [-2.0, -2.0]


def test_numbers_of_the_observations_are_chosen_by_their_places() -> None:
    found = find_episode(two_readers(), "a")
    view = view_of(found, RewardSettings(0.5), dimensions=places_of_text("2, 0-1", "`--dimensions`"))
    assert [name for name, _ in view.observations] == ["'pos'[1]", "'goal'[0]", "'pos'[0]"]
    with pytest.raises(ValueError, match=r"`--dimensions` names the number 3 .* have 3 numbers, from 0 to 2"):
        view_of(found, RewardSettings(0.5), dimensions=[1, 3])
    images = replace(found.block, observations=np.zeros((3, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="which are images alone; drop it"):
        view_of(replace(found, block=images), RewardSettings(0.5), dimensions=[0])


@pytest.mark.parametrize("text", ["", "x", "-1", "3-1", "1,,2", "1.5", "1-2-3", "²"])
def test_places_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`--dimensions` must be numbers from 0, such as 0,3-5"):
        places_of_text(text, "`--dimensions`")
