"""Held-out episodes: which they are, and that nothing that trains ever sees one of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.rllib.core.columns import Columns
from ray.rllib.policy.sample_batch import MultiAgentBatch
from test_replay import OBS_DIM, make_store, rows_of
from tiny import line_config

from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets.report.report import DatasetReport
from rllib_calql.store.offline_data import CalQLOfflineData
from rllib_calql.store.offline_table import EpisodeColumns, OfflineTable, OfflineTableBuilder
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.resident_store import ResidentStore
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.split import Split, split_episodes

LENGTHS = [1, 4, 2, 3, 1, 5, 2]
HELD_OUT = {  # Where the first, the last, adjacent and single-step episodes are held out.
    "first": [0],
    "last": [6],
    "in the middle": [3],
    "adjacent": [1, 2, 3],
    "both ends": [0, 1, 5, 6],
    "all but one": [0, 1, 2, 4, 5, 6],
}
EACH = pytest.mark.parametrize("held_out", HELD_OUT.values(), ids=HELD_OUT)


def split_of(held_out: list[int], lengths: list[int] = LENGTHS) -> Split:
    return Split(np.array(lengths), np.array(held_out), fraction=0.5, seed=0)


def rows_by_hand(held_out: list[int], lengths: list[int] = LENGTHS) -> tuple[list[int], list[int]]:
    """Training rows and held-out rows, episode by episode."""
    parts: tuple[list[int], list[int]] = ([], [])
    row = 0
    for episode, length in enumerate(lengths):
        parts[episode in held_out].extend(range(row, row + length))
        row += length
    return parts


def table_of_episodes(lengths: list[int] = LENGTHS) -> OfflineTable:
    """Episodes whose every observation tells its row: row r is (r, r + 0.25, r + 0.5)."""
    num_rows = sum(lengths)
    rows = rows_of(*range(num_rows))
    builder = OfflineTableBuilder(action_dim=2)
    builder.add(
        EpisodeColumns(
            lengths=np.array(lengths),
            observations=rows[Columns.OBS].astype(np.float32),
            final_observations=np.full((len(lengths), OBS_DIM), -1.0, np.float32),
            actions=rows[Columns.ACTIONS],
            rewards=rows[Columns.REWARDS],
            returns_to_go=rows[Columns.RETURNS_TO_GO],
            terminateds=np.ones(len(lengths), bool),
            has_tail=np.zeros(len(lengths), bool),
        )
    )
    return builder.build(gamma=0.9)


def store_with(held_out: list[int] | None, num_online: int = 0, **settings: Any) -> TransitionStore:
    store = make_store(0, num_online, **settings)
    store.offline = table_of_episodes()
    store.split = None if held_out is None else split_of(held_out)
    return store


# Which episodes


@pytest.mark.parametrize(("fraction", "number"), [(0.1, 1), (0.2, 2), (0.249, 2), (0.25, 2), (0.26, 3), (0.9, 9)])
def test_the_share_of_the_episodes_is_rounded(fraction: float, number: int) -> None:
    split = split_episodes(np.full(10, 3), fraction=fraction, seed=0)
    assert split is not None
    assert len(split.held_out_episodes) == number
    assert split.num_training_rows == 30 - 3 * number
    assert split.num_held_out_rows == 3 * number


def test_without_a_fraction_there_is_no_split() -> None:
    assert split_episodes(np.full(10, 3), fraction=0.0, seed=0) is None


def test_episodes_are_drawn_by_the_seed_alone_and_each_as_often_as_the_others() -> None:
    counts = np.zeros(10)
    for seed in range(400):
        split = split_episodes(np.full(10, 3), fraction=0.3, seed=seed)
        again = split_episodes(np.arange(1, 11), fraction=0.3, seed=seed)  # Of other lengths.
        assert split is not None
        assert again is not None
        np.testing.assert_array_equal(split.held_out_episodes, again.held_out_episodes)
        counts[split.held_out_episodes] += 1
    assert counts.sum() == 1200
    assert abs(counts - 120).max() < 4.5 * np.sqrt(400 * 0.3 * 0.7)


def test_a_larger_share_holds_out_the_same_episodes_and_some_more() -> None:
    parts = [split_episodes(np.full(50, 2), fraction=share, seed=3) for share in (0.1, 0.2, 0.5)]
    sets = [set(part.held_out_episodes.tolist()) for part in parts if part is not None]
    assert sets[0] < sets[1] < sets[2]


def test_the_drawn_episodes_are_the_same_in_every_version() -> None:
    split = split_episodes(np.full(20, 3), fraction=0.2, seed=7)
    assert split is not None
    # The least of 20 outputs of PCG64, seeded by 7.
    outputs = [np.random.PCG64(7).random_raw(20)[k] for k in range(20)]
    expected = sorted(range(20), key=lambda k: int(outputs[k]))[:4]
    assert split.held_out_episodes.tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("num_episodes", "fraction", "message"),
    [
        (1, 0.5, r"`validation_fraction` is 0\.5, but the data hold 1 episode, .*; give more data"),
        (12, 0.04, r"`validation_fraction` 0\.04 of 12 episodes is none, .*; set it to at least 0\.083"),
        (3, 0.9, r"`validation_fraction` 0\.9 of 3 episodes is all of them, .* lower it"),
    ],
)
def test_a_side_without_an_episode_is_refused(num_episodes: int, fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_episodes(np.full(num_episodes, 4), fraction=fraction, seed=0)


# Their rows


@EACH
def test_rows_of_both_sides_are_those_counted_episode_by_episode(held_out: list[int]) -> None:
    training, held_out_rows = rows_by_hand(held_out)
    store = store_with(held_out)
    assert store.training_rows().tolist() == training
    assert store.held_out_rows().tolist() == held_out_rows
    assert store.held_out_episodes().tolist() == held_out
    assert store.num_training_rows == len(training)
    assert store.num_offline == sum(LENGTHS)
    split = split_of(held_out)
    assert split.is_training_row(np.arange(sum(LENGTHS))).tolist() == [r in training for r in range(sum(LENGTHS))]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_training_rows_of_any_split_are_numbered_without_gaps(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=12))
    held_out = data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1, max_size=len(lengths) - 1))
    split = split_of(sorted(held_out), lengths)
    numbers = np.arange(split.num_training_rows).reshape(1, -1)
    assert split.rows_of(numbers)[0].tolist() == rows_by_hand(sorted(held_out), lengths)[0]


@EACH
def test_no_batch_holds_a_held_out_row_and_every_other_row_is_drawn_as_often(held_out: list[int]) -> None:
    training, _ = rows_by_hand(held_out)
    store = store_with(held_out, num_online=5)
    num_draws = 400 * len(training)
    columns = store.sample(num_batches=num_draws // 4, batch_size=5, num_offline_rows=4)
    ids = columns[Columns.OBS][:, 0].astype(int).reshape(-1, 5)
    assert set(ids[:, 4].tolist()) <= set(range(1000, 1005))
    drawn, counts = np.unique(ids[:, :4], return_counts=True)
    assert drawn.tolist() == training
    assert abs(counts - 400).max() < 5 * np.sqrt(400)


@EACH
def test_a_copy_on_a_device_is_asked_for_the_rows_that_batches_hold(held_out: list[int]) -> None:
    plain, copied = store_with(held_out, num_online=5), store_with(held_out, num_online=5)
    resident = ResidentStore(copied, torch.device("cpu"))
    expected = plain.sample(num_batches=50, batch_size=8, num_offline_rows=6)
    rows = copied.draw(num_batches=50, batch_size=8, num_offline_rows=6)
    batch = resident.look_up(torch.from_numpy(rows.reshape(-1)))
    for name, column in batch.items():
        np.testing.assert_array_equal(column.numpy(), expected[name], err_msg=name)
    assert set(rows[:, :6].ravel().tolist()) == set(rows_by_hand(held_out)[0])


def test_without_a_split_draws_are_those_of_the_generator_itself() -> None:
    rows = store_with(None, seed=5).draw(num_batches=3, batch_size=4, num_offline_rows=4)
    np.testing.assert_array_equal(rows, np.random.default_rng(5).integers(sum(LENGTHS), size=(3, 4)))


@EACH
def test_observation_statistics_are_those_of_the_training_rows(held_out: list[int]) -> None:
    training, _ = rows_by_hand(held_out)
    mean, std = store_with(held_out).observation_statistics()
    np.testing.assert_allclose(mean, np.mean(training) + np.array([0.0, 0.25, 0.5]), rtol=1e-12)
    np.testing.assert_allclose(std, np.full(OBS_DIM, np.std(training)), rtol=1e-12, atol=1e-12)


def test_the_proportional_mixture_counts_training_rows() -> None:
    held_out = [1, 5]  # 9 of 18 rows.
    assert store_with(held_out, num_online=9).num_offline_rows(100, "proportional") == 50
    assert store_with(None, num_online=9).num_offline_rows(100, "proportional") == 67


# From the settings to the store


def loaded(tmp_path: Path, *, seed: int = 0, n_step: int = 1, **settings: Any) -> CalQLOfflineData:
    """12 episodes of `LineEnv`, read with these settings."""
    config = line_config(tmp_path, offline_updates=1).offline_data(**settings).training(n_step=n_step)
    data = CalQLOfflineData(config.debugging(seed=seed))
    data.load(
        TransitionStore(obs_dim=1, action_dim=1, online_capacity=10, seed=seed),
        AddReturnsToGo(RewardSettings(gamma=0.99)),
        observation_space=gym.spaces.Box(-10.0, 10.0, (1,), np.float32),
        action_space=gym.spaces.Box(-2.0, 2.0, (1,), np.float32),
    )
    return data


def store_of(data: CalQLOfflineData) -> TransitionStore:
    assert data.store is not None
    return data.store


def test_the_run_s_seed_changes_nothing_and_the_validation_seed_does(tmp_path: Path) -> None:
    def held_out(seed: int, validation_seed: int) -> list[int]:
        data = loaded(tmp_path, seed=seed, validation_fraction=0.25, validation_seed=validation_seed)
        return store_of(data).held_out_episodes().tolist()

    assert held_out(0, 0) == held_out(1, 0)
    assert len(held_out(0, 0)) == 3
    assert held_out(0, 0) != held_out(0, 1)


def test_the_report_counts_both_parts_and_stays_what_is_stored(tmp_path: Path) -> None:
    data, plain = loaded(tmp_path, validation_fraction=0.25), loaded(tmp_path).report
    assert data.report is not None
    assert plain is not None
    rows, held_out = store_of(data).num_offline, len(store_of(data).held_out_rows())
    lines = str(data.report).splitlines()
    assert lines[1].split(maxsplit=1)[1] == "12, 3 of them held out and 9 to train on"
    assert lines[2].split(maxsplit=1)[1] == f"{rows}, {held_out} of them held out and {rows - held_out} to train on"
    assert f"12 episodes, {rows} transitions (held out 3 and {held_out})," in data.report.headline
    assert DatasetReport.from_dict(data.report.to_dict()) == plain
    assert "held out" not in str(plain) + plain.headline


def test_rllib_s_sample_gives_training_rows(tmp_path: Path) -> None:
    data = loaded(tmp_path, validation_fraction=0.5)
    store = store_of(data)
    batch = data.sample(num_samples=2_000)
    assert isinstance(batch, MultiAgentBatch)
    seen = set(batch.policy_batches["default_policy"][Columns.OBS][:, 0].tolist())
    everything = store.offline_rows(np.arange(store.num_offline))[Columns.OBS][:, 0]
    assert seen == set(everything[store.training_rows()].tolist())
    assert not seen & set(everything[store.held_out_rows()].tolist())


def test_targets_of_more_steps_than_any_episode_to_train_on_are_refused(tmp_path: Path) -> None:
    store = store_of(loaded(tmp_path))
    assert store.offline is not None
    longest = store.offline.lengths.max()
    seed = next(  # Holds out all episodes of that length.
        seed
        for seed in range(1_000)
        if (split := split_episodes(store.offline.lengths, fraction=0.75, seed=seed)) is not None
        and np.delete(store.offline.lengths, split.held_out_episodes).max() < longest
    )
    with pytest.raises(ValueError, match=r"`n_step` must be at most \d+, .* that is not held out; got"):
        loaded(tmp_path, n_step=int(longest), validation_fraction=0.75, validation_seed=seed)
