"""`OfflineTable` against plain lists of transitions: in memory and in files, whole columns and draws, tails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.rllib.core.columns import Columns

from rllib_calql.store.offline_table import EpisodeColumns, OfflineTable, OfflineTableBuilder
from rllib_calql.store.table_cache import TableCache

OBS_DIM, ACTION_DIM, GAMMA = 3, 2, 0.9
NAMES = (
    Columns.OBS,
    Columns.NEXT_OBS,
    Columns.ACTIONS,
    Columns.REWARDS,
    Columns.TERMINATEDS,
    Columns.RETURNS_TO_GO,
)


def episodes_of(lengths: list[int], *, dtype: Any = np.float32, seed: int = 0, tails: bool = False) -> EpisodeColumns:
    """Random episodes, every third one terminated, the returns without tails being those of the oracle."""
    rng = np.random.default_rng(seed)
    num_rows = sum(lengths)
    terminateds = np.arange(len(lengths)) % 3 == 2
    rewards = rng.normal(size=num_rows)
    stops = np.cumsum(lengths)
    returns = [
        oracle.returns_to_go(
            rewards[stop - length : stop].tolist(), GAMMA, terminated=bool(end), truncated=not end, truncation="none"
        )
        for length, stop, end in zip(lengths, stops, terminateds, strict=True)
    ]
    return EpisodeColumns(
        lengths=np.array(lengths),
        observations=rng.integers(0, 255, size=(num_rows, OBS_DIM)).astype(dtype),
        final_observations=rng.integers(0, 255, size=(len(lengths), OBS_DIM)).astype(dtype),
        actions=rng.uniform(-1, 1, size=(num_rows, ACTION_DIM)).astype(np.float32),
        rewards=rewards,
        returns_to_go=np.concatenate(returns),
        terminateds=terminateds,
        has_tail=~terminateds & tails,
    )


def plain(columns: EpisodeColumns) -> dict[str, np.ndarray]:
    """The transitions one by one."""
    rows: dict[str, list[Any]] = {name: [] for name in NAMES}
    row = 0
    for episode, length in enumerate(columns.lengths.tolist()):
        for step in range(length):
            is_last = step == length - 1
            rows[Columns.OBS].append(columns.observations[row])
            rows[Columns.NEXT_OBS].append(
                columns.final_observations[episode] if is_last else columns.observations[row + 1]
            )
            rows[Columns.ACTIONS].append(columns.actions[row])
            rows[Columns.REWARDS].append(columns.rewards[row])
            rows[Columns.TERMINATEDS].append(float(is_last and columns.terminateds[episode]))
            rows[Columns.RETURNS_TO_GO].append(columns.returns_to_go[row])
            row += 1
    return {name: np.array(values) for name, values in rows.items()}


def in_memory(*parts: EpisodeColumns, num_rows: int | None = None) -> OfflineTable:
    builder = OfflineTableBuilder(action_dim=ACTION_DIM, num_rows=num_rows)
    for part in parts:
        builder.add(part)
    return builder.build(gamma=GAMMA)


def in_files(folder: Path, *parts: EpisodeColumns, after: int = 0, memory_limit: int = 2**30) -> OfflineTable:
    """The same table written to files, the first `after` parts having been held in memory before."""
    builder = OfflineTableBuilder(action_dim=ACTION_DIM)
    with TableCache(folder).build(None) as writer:
        for number, part in enumerate(parts):
            if number == after:
                builder.move_to(writer)
            builder.add(part)
        assert builder.dtype is not None
        return writer.finish(
            dtype=builder.dtype,
            episodes=builder.episodes(),
            stored_with={},
            gamma=GAMMA,
            memory_limit=memory_limit,
        )


def assert_holds(table: OfflineTable, columns: EpisodeColumns) -> None:
    expected = plain(columns)
    assert len(table) == len(expected[Columns.REWARDS])
    for name in NAMES:
        column = table.column(name)
        np.testing.assert_array_equal(column, expected[name].astype(column.dtype), err_msg=name)


LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, dtype=st.sampled_from([np.float32, np.float64, np.uint8]), expected=st.integers(0, 100))
def test_a_table_holds_the_transitions_of_a_plain_list_whatever_was_expected(
    lengths: list[int], dtype: Any, expected: int
) -> None:
    columns = episodes_of(lengths, dtype=dtype)
    table = in_memory(columns, num_rows=expected)
    assert_holds(table, columns)
    assert table.column(Columns.OBS).dtype == dtype


def joined(parts: list[EpisodeColumns]) -> EpisodeColumns:
    return EpisodeColumns(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


@pytest.mark.parametrize("after", [0, 1, 3])
def test_parts_are_joined_in_memory_and_in_files_alike(tmp_path: Path, after: int) -> None:
    parts = [episodes_of([n, 2, n + 1], seed=n) for n in range(1, 8)]
    assert_holds(in_memory(*parts), joined(parts))
    table = in_files(tmp_path, *parts, after=after)
    assert table.is_mapped
    assert_holds(table, joined(parts))


@pytest.mark.parametrize("kind", ["memory", "files", "files in small pieces"])
def test_drawn_rows_are_those_asked_for_in_their_order(tmp_path: Path, kind: str) -> None:
    columns = episodes_of([3, 1, 700, 5, 1, 290])
    limit = 1 if kind.endswith("pieces") else 2**30
    table = in_memory(columns) if kind == "memory" else in_files(tmp_path, columns, memory_limit=limit)
    expected = plain(columns)
    rows = np.random.default_rng(0).integers(1000, size=3000)
    out = {name: np.empty((3000, *expected[name].shape[1:]), np.float32) for name in NAMES}
    table.gather(rows, out)
    for name in NAMES:
        np.testing.assert_array_equal(out[name], expected[name][rows].astype(np.float32), err_msg=name)


def test_a_transition_takes_one_observation_of_its_own_type_and_no_more() -> None:
    table = in_memory(episodes_of([1000], dtype=np.uint8))
    assert table.nbytes == 1000 * (OBS_DIM + 4 * (ACTION_DIM + 1 + 1)) + OBS_DIM


def test_later_observations_take_the_type_of_the_first() -> None:
    first, second = episodes_of([4], dtype=np.float64), episodes_of([3], dtype=np.float32, seed=1)
    table = in_memory(first, second)
    assert table.column(Columns.OBS).dtype == np.float64
    np.testing.assert_array_equal(table.column(Columns.OBS)[4:], second.observations)


@pytest.mark.parametrize("mapped", [False, True])
def test_observation_statistics_are_those_of_double_precision(tmp_path: Path, mapped: bool) -> None:
    columns = episodes_of([70] * 1_000)
    shifted = columns.observations + np.float32([1e4, 0.0, 0.0])
    columns = EpisodeColumns(**{**vars(columns), "observations": shifted})
    table = in_files(tmp_path, columns) if mapped else in_memory(columns)
    mean, std = table.observation_statistics()
    np.testing.assert_allclose(mean, shifted.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, shifted.astype(np.float64).std(axis=0), rtol=1e-9)


@pytest.mark.parametrize("mapped", [False, True])
def test_renewed_returns_hold_the_latest_value_of_each_cut_episodes_last_observation(
    tmp_path: Path, mapped: bool
) -> None:
    lengths = [4, 1, 6, 3, 5]
    columns = episodes_of(lengths, tails=True)
    table = in_files(tmp_path, columns) if mapped else in_memory(columns)
    np.testing.assert_allclose(table.column(Columns.RETURNS_TO_GO), columns.returns_to_go, rtol=1e-6)
    asked = []

    for scale in (10.0, -3.0):  # The second call replaces the first one's values and does not add to them.

        def estimate(obs: np.ndarray, scale: float = scale) -> np.ndarray:
            asked.append(obs.copy())
            return scale * obs.sum(axis=1)

        table.refresh_tails(estimate)
        stops = np.cumsum(lengths)
        expected = np.concatenate(
            [
                oracle.returns_to_go(
                    columns.rewards[stop - length : stop].tolist(),
                    GAMMA,
                    terminated=bool(terminated),
                    truncated=not terminated,
                    truncation="bootstrap",
                    bootstrap_value=scale * float(final.sum()),
                )
                for length, stop, terminated, final in zip(
                    lengths, stops, columns.terminateds, columns.final_observations, strict=True
                )
            ]
        )
        np.testing.assert_allclose(table.column(Columns.RETURNS_TO_GO), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(asked[0], columns.final_observations[[0, 1, 3, 4]])


def test_nothing_is_estimated_where_no_episode_has_a_tail() -> None:
    table = in_memory(episodes_of([2, 3]))

    def estimate(obs: np.ndarray) -> np.ndarray:
        raise AssertionError("There is nothing to estimate.")

    table.refresh_tails(estimate)
