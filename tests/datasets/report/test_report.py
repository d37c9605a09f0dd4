"""The report about a data set: its numbers against plain loops, its notes, its text, its storage, its picture."""

from __future__ import annotations

import json
import re
import statistics
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rllib_calql.common.returns import is_failure
from rllib_calql.datasets.episodes.reader import (
    CUT_AT_JUMP,
    DROPPED,
    DROPPED_STEPS,
    REPEATED,
    TRUNCATED,
    DatasetInfo,
    EpisodeBlock,
    EpisodeReader,
)
from rllib_calql.datasets.report.plots import histogram_bins, plot_report
from rllib_calql.datasets.report.report import ReportBuilder
from rllib_calql.datasets.report.summary import DatasetReport, Distribution, format_number, format_share
from rllib_calql.evaluation.history import EvaluationHistory

Episode = tuple[list[float], bool]  # Rewards, and whether it terminated.


class Reader(EpisodeReader):
    """Says something about its data and yields none."""

    def __init__(self, **info: Any) -> None:
        super().__init__()
        space = info.pop("action_space", None)
        actions = info.pop("actions", "environment")
        self.info = DatasetInfo(info.pop("name", "data.npz"), None, space, actions, None, **info)

    def blocks(self) -> Iterator[EpisodeBlock]:
        """Nothing."""
        yield from ()


def block(episodes: list[Episode], actions: Any = None, obs: Any = None) -> EpisodeBlock:
    rewards = [reward for rewards, _ in episodes for reward in rewards]
    terminateds = np.array([terminated for _, terminated in episodes])
    observations = np.zeros((len(rewards), 3), np.float32) if obs is None else obs
    return EpisodeBlock(
        ids=[str(i) for i in range(len(episodes))],
        lengths=np.array([len(rewards) for rewards, _ in episodes]),
        observations=observations,
        final_observations=np.zeros((len(episodes), 3), np.float32),
        actions=np.zeros((len(rewards), 2), np.float32) if actions is None else actions,
        rewards=np.array(rewards),
        terminateds=terminateds,
        truncateds=~terminateds,
        where=lambda row: f"row {row}",
    )


def report_on(*blocks: EpisodeBlock, failure_reward: float | None = None, **info: Any) -> DatasetReport:
    builder = ReportBuilder(failure_reward, keep_distributions=True)
    for each in blocks:
        builder.add(each)
    builder.add_reader(Reader(**info))
    return builder.build()


def notes_of(report: DatasetReport, about: str) -> list[str]:
    return [note for note in report.notes if about in note]


# 3 episodes: returns 3, -2, -3; lengths 2, 2, 3.
THREE: list[Episode] = [([1.0, 2.0], True), ([-1.0, -1.0], False), ([-1.0, -1.0, -1.0], False)]


def test_interventions_are_counted_where_an_input_says_them() -> None:
    actions = np.zeros((7, 1), np.float32)
    assert report_on(block(THREE, actions)).share_interventions is None
    marked = replace(block(THREE, actions), extra_model_outputs={"is_intervention": np.array([1, 0, 0, 0, 1, 1, 0])})
    report = report_on(marked, block(THREE, actions))
    assert report.share_interventions == 3 / 14
    assert re.search(r"interventions +a person acted in 21.43 % of the steps", str(report))
    assert "21.43 % interventions" in report.headline
    none = report_on(replace(marked, extra_model_outputs={"is_intervention": np.zeros(7)}))
    assert "a person acted in 0 % of the steps" in " ".join(str(none).split())
    assert "interventions" not in none.headline


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_three_episodes_are_those_worked_out_by_hand() -> None:
    actions = np.array([[0, 5], [1, 5], [-2, 5], [0, 5], [0, 5], [0, 6], [0, 5]], np.float32)
    report = report_on(block(THREE, actions), failure_reward=-1.0, ignored_columns=("infos",))
    assert (report.num_episodes, report.num_transitions) == (3, 7)
    assert (report.share_terminated, report.share_truncated, report.share_unfinished) == (1 / 3, 2 / 3, 0.0)
    # Sorted returns -3, -2, 3; the 5 % quantile lies at 0.1 of the way from the first to the second.
    assert report.return_distribution == Distribution(
        *map(pytest.approx, (-3.0, -2.9, -2.5, -2.0, 0.5, 2.5, 3.0, -2 / 3, statistics.pstdev([-3, -2, 3])))
    )
    assert report.length_distribution.mean == pytest.approx(7 / 3)
    assert (report.share_failed, report.share_succeeded) == (2 / 3, 1 - 2 / 3)
    assert report.reward_range == (-1.0, 2.0)
    assert report.constant_reward is None
    (info,) = report.actions
    assert (info.path, info.dtype, info.shape, info.low, info.high) == ("", "float32", (2,), (-2.0, 5.0), (1.0, 6.0))
    assert [(info.dtype, info.shape) for info in report.observations] == [("float32", (3,))]
    assert report.ignored_columns == ("infos",)
    np.testing.assert_array_equal(report.returns, [3.0, -2.0, -3.0])
    np.testing.assert_array_equal(report.lengths, [2, 2, 3])


REWARDS = st.sampled_from([-1.0, -1.0, -1.0000005, -1.000005, 0.0, 0.5, 7.25])
EPISODES = st.lists(st.tuples(st.lists(REWARDS, min_size=1, max_size=5), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(episodes=EPISODES, cut=st.integers(1, 11))
def test_the_numbers_equal_a_plain_loop_however_the_episodes_are_cut_into_blocks(
    episodes: list[Episode], cut: int
) -> None:
    parts = [part for part in (episodes[:cut], episodes[cut:]) if part]
    report = report_on(*map(block, parts), failure_reward=-1.0)
    returns = [sum(rewards) for rewards, _ in episodes]
    assert report.returns is not None
    np.testing.assert_allclose(report.returns, returns, rtol=1e-12, atol=1e-12)
    assert report.return_distribution.mean == pytest.approx(statistics.fmean(returns), abs=1e-12)
    assert report.return_distribution.std == pytest.approx(statistics.pstdev(returns), abs=1e-9)
    assert report.length_distribution.median == statistics.median(len(rewards) for rewards, _ in episodes)
    failed = sum(is_failure(np.array(rewards), -1.0) for rewards, _ in episodes)
    assert report.share_failed == failed / len(episodes)
    assert report.share_terminated == sum(terminated for _, terminated in episodes) / len(episodes)
    rewards = {reward for rewards, _ in episodes for reward in rewards}
    assert report.constant_reward == (rewards.pop() if len(rewards) == 1 else None)


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 1000])
def test_action_ranges_are_those_of_every_row(num_rows: int) -> None:
    actions = np.random.default_rng(num_rows).normal(size=(num_rows, 3))
    actions[-1, 0], actions[0, 1] = 9.0, -9.0
    (info,) = report_on(block([([0.0] * num_rows, True)], actions)).actions
    assert info.low == tuple(min(column) for column in actions.T.tolist())
    assert info.high == tuple(max(column) for column in actions.T.tolist())


def test_the_range_of_several_blocks_is_that_of_all_of_them() -> None:
    blocks = [block([([0.0], True)], np.array([row])) for row in ([0.0, 5.0], [2.0, -5.0], [1.0, 0.0])]
    (info,) = report_on(*blocks).actions
    assert (info.low, info.high) == ((0.0, -5.0), (2.0, 5.0))


def test_nested_observations_and_actions_are_told_apart_by_their_paths() -> None:
    obs = {"image": np.zeros((2, 4, 4), np.uint8), "speed": (np.zeros(2), np.zeros((2, 1)))}
    report = report_on(block([([0.0, 1.0], True)], {"a": np.zeros(2, np.int64), "b": np.ones((2, 2))}, obs))
    assert [(info.path, info.dtype, info.shape) for info in report.observations] == [
        ("image", "uint8", (4, 4)),
        ("speed/0", "float64", ()),
        ("speed/1", "float64", (1,)),
    ]
    assert [(info.path, info.low, info.high) for info in report.actions] == [
        ("a", (0.0,), (0.0,)),
        ("b", (1.0, 1.0), (1.0, 1.0)),
    ]


def test_unfinished_episodes_are_counted_with_those_that_were_dropped() -> None:
    builder = ReportBuilder()
    builder.add(block(THREE))
    reader = Reader()
    reader.remarks.update({TRUNCATED: 1, DROPPED: 1, CUT_AT_JUMP: 0})
    builder.add_reader(reader)
    report = builder.build()
    assert report.share_unfinished == 2 / 4  # Three that are left, one of them without an end, and one dropped.
    assert report.remarks == {TRUNCATED: 1, DROPPED: 1}


def test_normalised_scores_are_on_the_scale_of_evaluations() -> None:
    report = report_on(block(THREE), reference_scores=(-3.0, 9.0))
    assert report.normalized_scores == pytest.approx((0.0, 100 * (-2 / 3 + 3) / 12, 50.0))
    assert report.normalized_scores[2] == EvaluationHistory((-3.0, 9.0)).normalized_score(3.0)


def test_inputs_with_different_reference_scores_have_no_normalised_score() -> None:
    builder = ReportBuilder()
    builder.add(block(THREE))
    builder.add_reader(Reader(reference_scores=(0.0, 1.0)))
    builder.add_reader(Reader(reference_scores=(0.0, 2.0)))
    assert builder.build().normalized_scores is None


def test_a_report_keeps_no_distributions_unless_they_are_asked_for() -> None:
    builder = ReportBuilder()
    builder.add(block(THREE))
    report = builder.build()
    assert (report.returns, report.lengths) == (None, None)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_blocks_of_different_shapes_are_refused_with_both_shapes() -> None:
    builder = ReportBuilder()
    builder.add(block(THREE))
    with pytest.raises(ValueError, match=r"`obs` of row 0 has shape \(4,\), the data before it shape \(3,\)"):
        builder.add(block(THREE, obs=np.zeros((7, 4))))


def test_nothing_to_report_on_is_said_with_what_became_of_the_episodes() -> None:
    builder = ReportBuilder()
    reader = Reader(name="log.parquet")
    reader.remarks[DROPPED] = 3
    builder.add_reader(reader)
    with pytest.raises(ValueError, match=r"'log.parquet' has no whole episode .*\(3 unfinished episodes dropped\)"):
        builder.build()


def test_lost_last_steps_are_what_nothing_to_report_on_is_put_down_to() -> None:
    builder = ReportBuilder()
    reader = Reader(name="log.parquet")
    reader.remarks.update({REPEATED: 0, DROPPED_STEPS: 2})
    builder.add_reader(reader)
    message = r"report on \(2 last steps dropped, .*\); keep last steps by `missing_final_observation=\"repeat\"`"
    with pytest.raises(ValueError, match=message):
        builder.build()


def test_a_return_beyond_float32_is_refused_with_its_episode() -> None:
    with pytest.raises(ValueError, match="episode '1', from row 2 on, sum to inf"):
        report_on(block([([0.0, 0.0], True), ([1e308, 1e308], True)]))


def test_a_failure_reward_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="`failure_reward` must be a finite number or None, got nan"):
        ReportBuilder(float("nan"))


# --- Notes ------------------------------------------------------------------------------------------------------------


def sound() -> tuple[EpisodeBlock, dict[str, Any]]:
    """Episodes that no note is due for."""
    actions = np.array([[-1, 1], [1, -1], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]], np.float32)
    episodes = [([1.0, 2.0], True), ([-1.0, 0.5], False), ([-1.0, 2.0, -1.0], False)]
    return block(episodes, actions), {"action_space": gym.spaces.Box(-1.0, 1.0, (2,))}


def test_sound_data_get_no_note() -> None:
    episodes, info = sound()
    report = report_on(episodes, **info)
    assert report.notes == ()
    assert "nothing looks wrong" in str(report)


@pytest.mark.parametrize(
    ("episodes", "failure_reward", "note"),
    [
        ([([0.0, 1.0], False)], None, "no episode terminated"),
        ([([0.0, 1.0], True), ([2.0, 1.0], True)], None, "every episode terminated after exactly 2 steps"),
        ([([0.0], True), ([1.0], True)], None, "every episode has a single step"),
        ([([0.0], True), ([1.0, 1.0], True)], None, "1 of the episodes have a single step"),
        ([([-1.0, -1.0], True), ([-1.0], False)], None, "all rewards are -1"),
        ([([1.0, 2.0], True), ([3.0], False)], None, "all returns are equal"),
        ([([-1.0, -1.0], True), ([-1.0], False)], -1.0, "all episodes failed"),
        ([([-1.0, 0.0], True), ([-1.0, 2.0], False)], -1.0, "no episode failed, though `failure_reward` is -1.0"),
        (THREE, None, "66.67 % of the episodes have the lowest reward at every step: if they failed, set"),
    ],
)
def test_what_looks_wrong_about_ends_and_rewards_is_noted(
    episodes: list[Episode], failure_reward: float | None, note: str
) -> None:
    report = report_on(block(episodes), failure_reward=failure_reward)
    assert len(notes_of(report, note)) == 1
    assert note in " ".join(str(report).split())


def test_no_failure_reward_is_suggested_where_one_is_given() -> None:
    assert notes_of(report_on(block(THREE), failure_reward=-1.0), "lowest reward") == []


def test_no_failure_reward_is_suggested_by_single_steps() -> None:
    assert notes_of(report_on(block([([-1.0], True), ([-1.0], True), ([0.0, 1.0], True)])), "lowest reward") == []


BOX = gym.spaces.Box(np.array([-1.0, -10.0]), np.array([1.0, 10.0]), dtype=np.float64)


@pytest.mark.parametrize(
    ("extremes", "info", "note"),
    [
        ([[-1, -1], [1, 0.9]], {"action_space": BOX}, "less than 10 % of the range of the action space in dimension 1"),
        ([[-1.5, -9], [1, 9]], {"action_space": BOX}, "leave the bounds of the action space in dimension 0"),
        ([[-1, 3], [1, 3]], {"action_space": BOX}, "actions are constant in dimension 1"),
        ([[-1, -9], [1, 9]], {}, "exceed [-1, 1] only in dimension 1"),
    ],
)
def test_what_looks_wrong_about_actions_is_noted(extremes: list[Any], info: dict[str, Any], note: str) -> None:
    report = report_on(block([([0.0, 1.0], True)], np.array(extremes, np.float64)), **info)
    assert len(notes_of(report, "actions")) == 1
    assert notes_of(report, note)


@pytest.mark.parametrize(
    "info", [{"actions": "module"}, {"actions": "module", "action_space": BOX}, {"action_space": BOX}]
)
def test_actions_of_an_rl_module_are_not_measured_by_the_bounds_of_the_environment(info: dict[str, Any]) -> None:
    actions = np.array([[-1.0, -3.0], [1.0, 3.0]])
    assert notes_of(report_on(block([([0.0, 1.0], True)], actions), **info), "actions") == []


def test_parts_that_differ_in_type_are_noted() -> None:
    report = report_on(block(THREE), block(THREE, obs=np.zeros((7, 3), np.float64)))
    assert notes_of(report, "float32 and float64")


# --- Text and storage -------------------------------------------------------------------------------------------------


def test_the_text_is_aligned_and_holds_every_number_that_matters() -> None:
    episodes, info = sound()
    report = report_on(episodes, failure_reward=-1.0, reference_scores=(0.0, 6.0), ignored_columns=("infos",), **info)
    lines = str(report).splitlines()
    assert lines[0] == "dataset           data.npz"
    assert "ended             terminated 33.33 %, truncated 66.67 %; without an end in the data 0 %" in lines
    header, returns, lengths = lines[4:7]
    assert header.split() == ["min", "5", "%", "25", "%", "median", "75", "%", "95", "%", "max", "mean", "std"]
    assert len({len(header), len(returns), len(lengths)}) == 1
    # Returns 3, -0.5, 0: the median is 0, at a score of 0 of 6.
    assert returns.split()[:5] == ["return", "-0.5", "-0.45", "-0.25", "0"]
    assert "normalised score  min -8.33, mean 13.89, max 50.00" in lines
    assert "action range      [-1, 1] in each of 2 dimensions" in lines
    assert "ignored columns   infos" in lines
    assert all(len(line) <= 110 for line in lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "3"), (-1234.0, "-1,234"), (0.123456, "0.1235"), (1e9, "1e+09"), (2.5, "2.5"), (-0.0, "0")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (1e-6, "< 0.01 %"), (0.5, "50 %"), (0.999_999, "> 99.99 %"), (1.0, "100 %")]
)
def test_a_share_of_0_or_100_percent_is_none_or_all(share: float, text: str) -> None:
    assert format_share(share) == text


@settings(max_examples=50, deadline=None)
@given(episodes=EPISODES, failure_reward=st.sampled_from([None, -1.0]))
def test_a_stored_report_is_the_same_report(episodes: list[Episode], failure_reward: float | None) -> None:
    report = report_on(
        block(episodes), failure_reward=failure_reward, reference_scores=(0.1, 0.7), ignored_columns=("a", "b")
    )
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    restored = DatasetReport.from_dict(stored)
    assert restored == report
    assert str(restored) == str(report)
    assert repr(restored) == repr(report)


def test_a_report_of_another_version_is_refused() -> None:
    content = report_on(block(THREE)).to_dict()
    del content["notes"]
    with pytest.raises(ValueError, match="lacks or has in excess `notes`"):
        DatasetReport.from_dict(content)


# --- The picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "episodes",
    [
        THREE,
        [([1.0], True)],
        [([0.1] * 10, True)] * 5,
        [([-1e9], True), *[([0.5], True)] * 500],
        [([3e38], True), ([-3e38], True)],
        [([1e16], True), ([1e16 + 2], True)],
        [([0.0] * 5000, True), ([0.0], True)],
    ],
    ids=["usual", "one episode", "equal returns", "outlier", "huge", "beyond resolution", "lengths"],
)
def test_a_picture_is_drawn_of_any_distribution(episodes: list[Episode], tmp_path: Path) -> None:
    file = tmp_path / "report.png"
    has_pyplot = "matplotlib.pyplot" in sys.modules
    plot_report(report_on(block(episodes), name="a/$x_^y.npz"), file)
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1320, 528)  # 11 x 4.4 inches of 120 dots.
    assert ("matplotlib.pyplot" in sys.modules) == has_pyplot


def test_a_report_without_distributions_cannot_be_drawn(tmp_path: Path) -> None:
    builder = ReportBuilder()
    builder.add(block(THREE))
    with pytest.raises(ValueError, match="keep_distributions=True"):
        plot_report(builder.build(), tmp_path / "report.png")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "rllib-calql\[plots\]"'):
        plot_report(report_on(block(THREE)), tmp_path / "report.png")


@settings(max_examples=300, deadline=None)
@example([5e-324])
@example([0.0, 5e-324])
@example([1e9, 1e9 + 1e-7])
@given(st.lists(st.floats(-3e38, 3e38) | st.integers(-200, 200).map(float), min_size=1, max_size=30))
def test_bins_hold_every_value_and_are_few(values: list[float]) -> None:
    array = np.array(values)
    edges = histogram_bins(array)
    assert 2 <= len(edges) <= 51
    assert (np.diff(edges) > 0).all()
    assert np.histogram(array, edges)[0].sum() == len(values)


def test_whole_numbers_lie_in_the_middle_of_bins_of_equally_many() -> None:
    np.testing.assert_array_equal(histogram_bins(np.arange(5, 17)), np.arange(4.5, 17.0))
    edges = histogram_bins(np.arange(1, 1001))
    assert set(np.diff(edges)) == {20.0}
    assert set(np.histogram(np.arange(1, 1001), edges)[0].tolist()) == {20}


def test_the_headline_says_sizes_ends_returns_and_what_was_decided() -> None:
    builder = ReportBuilder(-1.0)
    builder.add(block(THREE))
    reader = Reader()
    reader.remarks["unfinished episodes dropped"] = 2
    builder.add_reader(reader)
    assert builder.build().headline == (
        "3 episodes, 7 transitions, 33.33 % terminated, mean return -0.6667, 66.67 % failed; "
        "2 unfinished episodes dropped"
    )


# --- Rewards that stand out -------------------------------------------------------------------------------------------


def _blocks_of(rewards: np.ndarray, num_blocks: int) -> list[EpisodeBlock]:
    return [block([(part.tolist(), True)]) for part in np.array_split(rewards, num_blocks)]


@pytest.mark.parametrize("num_blocks", [1, 7])
@pytest.mark.parametrize("num_rewards", [20, 500, 100_000])
@pytest.mark.parametrize("kind", ["normal", "sparse", "lognormal", "small", "glitches", "negative glitch"])
def test_the_share_of_outlying_rewards_is_that_of_a_sorted_copy(kind: str, num_rewards: int, num_blocks: int) -> None:
    rng = np.random.default_rng(0)
    rewards = {
        "sparse": (rng.random(num_rewards) < 0.01).astype(np.float64),
        "lognormal": rng.lognormal(0.0, 1.0, num_rewards),
        "small": 1e-9 * rng.normal(size=num_rewards),
    }.get(kind, rng.normal(size=num_rewards))
    if "glitch" in kind:
        rewards[3] = -1e25 if kind.startswith("negative") else 1e25
    report = report_on(*_blocks_of(rewards, num_blocks))
    sizes = np.sort(np.abs(rewards[rewards != 0]))
    left_out = max(len(sizes) // 1000, min(3, len(sizes) // 10))
    usual = sizes[len(sizes) - 1 - left_out] if len(sizes) else 0.0
    assert report.usual_reward == pytest.approx(usual, rel=0.01)
    assert report.share_outlying_rewards == (np.abs(rewards) > 1000 * usual).mean()
    assert (report.share_outlying_rewards > 0) == ("glitch" in kind)


def test_rewards_that_stand_out_are_noted_in_report_headline_and_dictionary() -> None:
    report = report_on(block([([1.0] * 999 + [1e25], True)]))
    assert report.share_outlying_rewards == 0.001
    assert notes_of(report, "0.1 % of the rewards are over 1,000 times the usual size, 1: unless the task has such")
    assert "outlying rewards  0.1 % over 1,000 times the usual size, 1 (99.9 % quantile" in str(report)
    assert report.headline.endswith("0.1 % of the rewards over 1,000 x usual")
    assert DatasetReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(
    "rewards",
    [[0.0] * 50, [-1.0] * 50, [0.0] * 999 + [100.0], [-1.0] * 5000 + [1000.0], [1e-40] * 9 + [1.0], [5.0]],
    ids=["zeros", "constant", "one goal", "a goal worth 1,000 steps", "denormal", "one step"],
)
def test_rewards_of_usual_tasks_do_not_stand_out(rewards: list[float]) -> None:
    report = report_on(block([(rewards, True)]))
    assert report.share_outlying_rewards == 0.0
    assert notes_of(report, "usual size") == []
