"""`TransitionStore` against plain lists: exact ratios, uniform draws, the ring, renewed returns, state."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from scipy import stats

from rllib_calql.common.returns import RewardSettings
from rllib_calql.store.offline_table import EpisodeColumns, OfflineTable, OfflineTableBuilder
from rllib_calql.store.replay import IS_OFFLINE, TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.transitions import transitions_from_episode

OBS_DIM, ACTION_DIM = 3, 2


def rows_of(*ids: int) -> dict[str, np.ndarray]:
    """Rows whose every column tells which row it belongs to."""
    row = np.asarray(ids, dtype=np.float32)
    return {
        Columns.OBS: row[:, None] + [0.0, 0.25, 0.5],
        Columns.NEXT_OBS: -row[:, None] - [0.0, 0.25, 0.5],
        Columns.ACTIONS: 2.0 * row[:, None] + [0.0, 1.0],
        Columns.REWARDS: 3.0 * row,
        Columns.TERMINATEDS: row % 2,
        Columns.RETURNS_TO_GO: 5.0 * row,
    }


def ids_of(columns: dict[str, np.ndarray]) -> list[int]:
    """The ids of rows, having checked that each row's columns belong together."""
    ids = columns[Columns.OBS][:, 0]
    for name, expected in rows_of(*ids.astype(int)).items():
        np.testing.assert_array_equal(columns[name], expected, err_msg=name)
    return [int(i) for i in ids]


def table_of(*ids: int) -> OfflineTable:
    """The same rows as offline episodes of one step each."""
    rows = rows_of(*ids)
    columns = EpisodeColumns(
        lengths=np.ones(len(ids), np.int64),
        observations=rows[Columns.OBS].astype(np.float32),
        final_observations=rows[Columns.NEXT_OBS].astype(np.float32),
        actions=rows[Columns.ACTIONS],
        rewards=rows[Columns.REWARDS],
        returns_to_go=rows[Columns.RETURNS_TO_GO],
        terminateds=rows[Columns.TERMINATEDS] == 1.0,
        has_tail=np.zeros(len(ids), bool),
    )
    builder = OfflineTableBuilder(action_dim=ACTION_DIM)
    builder.add(columns)
    return builder.build(gamma=0.9)


def make_store(num_offline: int = 0, num_online: int = 0, *, seed: int = 0, **settings: Any) -> TransitionStore:
    """Offline rows are 0, 1, ...; online rows 1000, 1001, ..."""
    sizes = {"obs_dim": OBS_DIM, "action_dim": ACTION_DIM, "online_capacity": 10_000}
    store = TransitionStore(seed=seed, **(sizes | settings))
    if num_offline:
        store.offline = table_of(*range(num_offline))
    if num_online:
        store.add_online(rows_of(*range(1000, 1000 + num_online)))
    return store


def online_ids(store: TransitionStore) -> list[int]:
    """Ids of the online rows in storage order."""
    return ids_of({name: store.online_column(name) for name in rows_of(0)})


def offline_ids(store: TransitionStore) -> list[int]:
    return ids_of({name: store.offline_column(name) for name in rows_of(0)})


def sample(store: TransitionStore, num_batches: int, batch_size: int, num_offline_rows: int) -> dict[str, np.ndarray]:
    return store.sample(num_batches=num_batches, batch_size=batch_size, num_offline_rows=num_offline_rows)


# Sampling


@pytest.mark.parametrize("num_offline_rows", [0, 1, 5, 8])
def test_every_single_batch_holds_exactly_the_offline_rows_asked_for(num_offline_rows: int) -> None:
    store = make_store(50, 30)
    for _ in range(10):
        columns = sample(store, 40, 8, num_offline_rows)
        is_offline = np.asarray(ids_of(columns)).reshape(40, 8) < 1000
        assert is_offline.sum(axis=1).tolist() == [num_offline_rows] * 40
        np.testing.assert_array_equal(columns[IS_OFFLINE].reshape(40, 8), is_offline)


def test_sampled_columns_are_float32_of_one_row_each() -> None:
    columns = sample(make_store(50, 30), 4, 8, 3)
    shapes = {name: column.shape for name, column in columns.items()}
    assert shapes == {
        Columns.OBS: (32, OBS_DIM),
        Columns.NEXT_OBS: (32, OBS_DIM),
        Columns.ACTIONS: (32, ACTION_DIM),
        Columns.REWARDS: (32,),
        Columns.TERMINATEDS: (32,),
        Columns.RETURNS_TO_GO: (32,),
        IS_OFFLINE: (32,),
    }
    assert {column.dtype for column in columns.values()} == {np.dtype(np.float32)}


def test_the_bytes_of_a_row_are_those_of_the_columns_sampled() -> None:
    for track_tails in (False, True):
        # 3 + 3 + 2 + 1 + 1 + 1 floats.
        assert make_store(track_tails=track_tails).row_nbytes == 11 * 4


def test_rows_are_drawn_uniformly_from_the_first_to_the_last() -> None:
    drawn = ids_of(sample(make_store(20, 10), 2000, 15, 10))
    offline = np.bincount([i for i in drawn if i < 1000], minlength=20)
    online = np.bincount([i - 1000 for i in drawn if i >= 1000], minlength=10)
    assert (len(offline), len(online)) == (20, 10)
    assert stats.chisquare(offline).pvalue > 1e-3
    assert stats.chisquare(online).pvalue > 1e-3


def test_batches_and_rows_of_a_batch_are_drawn_independently() -> None:
    drawn = np.asarray(ids_of(sample(make_store(4), 4000, 2, 2))).reshape(4000, 2)
    # 16 equally likely pairs within a batch, and of one batch with the next.
    within = np.bincount(4 * drawn[:, 0] + drawn[:, 1], minlength=16)
    across = np.bincount(4 * drawn[:-1:2, 0] + drawn[1::2, 0], minlength=16)
    assert stats.chisquare(within).pvalue > 1e-3
    assert stats.chisquare(across).pvalue > 1e-3


def test_one_seed_gives_one_sequence_of_batches_and_another_seed_another() -> None:
    first, same, other = (make_store(50, 30, seed=seed) for seed in (3, 3, 4))
    draws = [[ids_of(sample(store, 2, 8, 4)) for _ in range(3)] for store in (first, same, other)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0][0] != draws[0][1]
    assert first.draw_seed() == same.draw_seed()
    assert first.draw_seed() != first.draw_seed()


@pytest.mark.parametrize(("num_offline", "num_online", "missing"), [(0, 5, "4 offline"), (5, 0, "3 online")])
def test_a_batch_with_rows_of_an_empty_part_is_refused(num_offline: int, num_online: int, missing: str) -> None:
    with pytest.raises(ValueError, match=f"A batch needs {missing} rows, but the store holds none"):
        sample(make_store(num_offline, num_online), 1, 7, 4)


def test_a_part_that_is_not_asked_for_may_be_empty() -> None:
    assert all(i < 1000 for i in ids_of(sample(make_store(5, 0), 1, 4, 4)))
    assert all(i >= 1000 for i in ids_of(sample(make_store(0, 5), 1, 4, 0)))


@pytest.mark.parametrize(
    ("mixing_ratio", "num_offline", "num_online", "expected"),
    [
        (0.5, 10, 10, 128),
        (0.0, 10, 10, 0),
        (1.0, 10, 10, 256),
        (0.3, 10, 10, 77),  # 76.8
        (0.5, 0, 10, 0),  # Without offline data there is nothing to mix in.
        ("proportional", 0, 10, 0),
        ("proportional", 10, 0, 256),
        ("proportional", 30, 10, 192),
        ("proportional", 10, 30, 64),
        ("proportional", 999, 1, 256),  # 255.7
    ],
)
def test_the_mixing_ratio_gives_a_rounded_number_of_offline_rows(
    mixing_ratio: float | str, num_offline: int, num_online: int, expected: int
) -> None:
    assert make_store(num_offline, num_online).num_offline_rows(256, mixing_ratio) == expected


# Storage


def test_the_ring_overwrites_the_oldest_rows() -> None:
    store = make_store(online_capacity=5)
    store.add_online(rows_of(1, 2, 3))
    store.add_online(rows_of(4))
    assert (store.num_online, online_ids(store)) == (4, [1, 2, 3, 4])
    store.add_online(rows_of(5, 6, 7))
    assert (store.num_online, online_ids(store)) == (5, [6, 7, 3, 4, 5])
    store.add_online(rows_of(8, 9, 10, 11, 12))
    assert (store.num_online, online_ids(store)) == (5, [11, 12, 8, 9, 10])
    assert store.num_offline == 0


def test_an_episode_longer_than_the_ring_is_refused() -> None:
    store = make_store(online_capacity=3)
    with pytest.raises(ValueError, match="episode of 4 steps does not fit into `online_capacity` 3; raise"):
        store.add_online(rows_of(1, 2, 3, 4))
    store.add_online(rows_of(1, 2, 3))
    assert online_ids(store) == [1, 2, 3]


EPISODE_LENGTHS = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 700), st.just(1024)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths=EPISODE_LENGTHS, capacity=st.integers(1024, 4000))
def test_the_ring_holds_the_newest_rows_of_a_plain_list_while_it_grows(lengths: list[int], capacity: int) -> None:
    store = make_store(online_capacity=capacity)
    model: list[int] = []
    for length in lengths:
        new = range(len(model), len(model) + length)
        store.add_online(rows_of(*new))
        model.extend(new)
        assert sorted(online_ids(store)) == model[-capacity:]
        assert store.num_online == min(len(model), capacity)


def test_columns_are_handed_out_read_only() -> None:
    store = make_store(3, 3)
    for column in (store.offline_column(Columns.OBS), store.online_column(Columns.OBS)):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 0.0
    store.add_online(rows_of(1003))  # The store itself still writes.
    assert online_ids(store) == [1000, 1001, 1002, 1003]


@pytest.mark.parametrize("num_offline_rows", [0, 3, 8])
def test_images_stay_bytes_in_the_ring_and_in_batches(num_offline_rows: int) -> None:
    store = make_store(obs_dtype=np.uint8)
    pixels = np.arange(250 - 12, 250, dtype=np.uint8).reshape(4, 3)
    rows = rows_of(0, 1, 2, 3) | {Columns.OBS: pixels, Columns.NEXT_OBS: pixels + 1}
    store.add_online(rows)
    columns = EpisodeColumns(
        lengths=np.array([4]),
        observations=pixels,
        final_observations=pixels[:1],
        actions=rows[Columns.ACTIONS],
        rewards=rows[Columns.REWARDS],
        returns_to_go=rows[Columns.RETURNS_TO_GO],
        terminateds=np.array([True]),
        has_tail=np.array([False]),
    )
    builder = OfflineTableBuilder(action_dim=ACTION_DIM)
    builder.add(columns)
    store.offline = builder.build(gamma=0.9)
    assert store.offline_column(Columns.OBS).dtype == store.online_column(Columns.OBS).dtype == np.uint8
    batch = sample(store, 5, 8, num_offline_rows)
    assert batch[Columns.OBS].dtype == batch[Columns.NEXT_OBS].dtype == np.uint8
    assert {tuple(row) for row in batch[Columns.OBS].tolist()} <= {tuple(row) for row in pixels.tolist()}
    assert store.row_nbytes == 2 * 3 + 4 * (2 + 1 + 1 + 1)


def test_a_store_without_offline_data_has_no_offline_columns() -> None:
    with pytest.raises(ValueError, match="holds no offline data"):
        make_store(0, 2).offline_column(Columns.OBS)
    with pytest.raises(ValueError, match="holds no offline data"):
        make_store(0, 2).observation_statistics()


# Returns with the value of the last observation


def add_cut_episodes(
    store: TransitionStore, lengths: list[int], rules: RewardSettings, *, seed: int = 0
) -> list[tuple[list[float], np.ndarray, bool]]:
    """Adds random online episodes, every third one terminated; returns rewards, last obs, terminated."""
    rng = np.random.default_rng(seed)
    added = []
    for index, length in enumerate(lengths):
        observations = rng.normal(size=(length + 1, OBS_DIM)).astype(np.float32)
        rewards, terminated = rng.normal(size=length).tolist(), index % 3 == 2
        episode = SingleAgentEpisode(
            observations=list(observations),
            actions=list(np.zeros((length, ACTION_DIM), np.float32)),
            rewards=rewards,
            terminated=terminated,
            truncated=not terminated,
            len_lookback_buffer=0,
        ).to_numpy()
        AddReturnsToGo(rules)(batch={}, episodes=[episode])
        rows = transitions_from_episode(
            episode, observations=observations, actions=np.zeros((length, ACTION_DIM)), settings=rules
        )
        store.add_online(rows)
        added.append((rewards, observations[-1], terminated))
    return added


def directly(episodes: list[tuple[list[float], np.ndarray, bool]], gamma: float, scale: float) -> np.ndarray:
    """Returns of all episodes one after the other, the last observation being worth `scale` times its sum."""
    return np.concatenate(
        [
            oracle.returns_to_go(
                rewards,
                gamma,
                terminated=terminated,
                truncated=not terminated,
                truncation="bootstrap",
                bootstrap_value=scale * float(last_obs.sum()),
            )
            for rewards, last_obs, terminated in episodes
        ]
    )


def test_renewed_returns_hold_the_latest_value_of_each_episodes_last_observation() -> None:
    rules = RewardSettings(0.9, truncation="bootstrap")
    store = make_store(track_tails=True)
    episodes = add_cut_episodes(store, [4, 1, 6, 3, 5], rules)
    np.testing.assert_allclose(store.online_column(Columns.RETURNS_TO_GO), directly(episodes, 0.9, 0.0), rtol=1e-5)
    for scale in (10.0, -3.0):  # The second call replaces the first one's values and does not add to them.
        store.refresh_returns(lambda obs, scale=scale: scale * obs.sum(axis=1))
        expected = directly(episodes, 0.9, scale)
        np.testing.assert_allclose(store.online_column(Columns.RETURNS_TO_GO), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[4, 3, 2, 5], [7, 6, 8], [10, 1], [3, 3, 3, 3, 3, 3, 3]])
def test_renewed_returns_are_right_where_the_ring_has_overwritten_the_start_of_an_episode(lengths: list[int]) -> None:
    rules = RewardSettings(0.9, truncation="bootstrap")
    store = make_store(track_tails=True, online_capacity=10)
    episodes = add_cut_episodes(store, lengths, rules)
    assert sum(lengths) > 10
    store.refresh_returns(lambda obs: 10.0 * obs.sum(axis=1))
    expected = np.empty(10)
    for position, value in enumerate(directly(episodes, 0.9, 10.0)):
        expected[position % 10] = value
    np.testing.assert_allclose(store.online_column(Columns.RETURNS_TO_GO), expected, rtol=1e-4, atol=1e-5)


def test_each_last_observation_is_valued_once_and_terminated_episodes_not_at_all() -> None:
    store = make_store(track_tails=True)
    episodes = add_cut_episodes(store, [4, 2, 6], RewardSettings(0.9, truncation="bootstrap"))
    asked: list[np.ndarray] = []

    def estimate(obs: np.ndarray) -> np.ndarray:
        asked.append(obs.copy())
        return np.zeros(len(obs))

    store.refresh_returns(estimate)
    np.testing.assert_array_equal(np.concatenate(asked), np.stack([episodes[0][1], episodes[1][1]]))


# State


@pytest.mark.parametrize("num_online", [0, 4, 9, 23])
def test_a_restored_store_goes_on_as_the_original_would(num_online: int) -> None:
    def fill(store: TransitionStore, first: int, count: int) -> None:
        for start in range(first, first + count, 3):
            store.add_online(rows_of(*range(start, min(start + 3, first + count))))

    original = make_store(20, online_capacity=9, seed=1)
    fill(original, 1000, num_online)
    sample(original, 1, 6, 6)
    state = original.get_state()
    restored = make_store(20, 2, online_capacity=9, seed=99)
    restored.set_state(state)
    assert online_ids(restored) == online_ids(original)
    for store in (original, restored):
        fill(store, 5000, 7)
    assert online_ids(restored) == online_ids(original)
    for _ in range(3):
        actual, expected = (sample(store, 2, 6, 3) for store in (restored, original))
        for name, column in expected.items():
            np.testing.assert_array_equal(actual[name], column, err_msg=name)
    assert restored.draw_seed() == original.draw_seed()


def test_a_saved_state_does_not_change_with_the_store() -> None:
    store = make_store(5, online_capacity=4)
    store.add_online(rows_of(1, 2, 3, 4))
    state = store.get_state()
    store.add_online(rows_of(7, 8))
    draws = [ids_of(sample(store, 1, 6, 3))]
    for _ in range(2):
        restored = make_store(5, online_capacity=4)
        restored.set_state(state)
        assert online_ids(restored) == [1, 2, 3, 4]
        restored.add_online(rows_of(7, 8))  # Writing to a restored store must not reach the state either.
        draws.append(ids_of(sample(restored, 1, 6, 3)))
    assert draws[0] == draws[1] == draws[2]


def test_renewed_returns_survive_a_restore() -> None:
    rules = RewardSettings(0.9, truncation="bootstrap")
    original = make_store(track_tails=True, online_capacity=10)
    add_cut_episodes(original, [4, 5, 3], rules)
    restored = make_store(track_tails=True, online_capacity=10)
    restored.set_state(original.get_state())
    for store in (original, restored):
        store.refresh_returns(lambda obs: obs.sum(axis=1))
    np.testing.assert_array_equal(
        restored.online_column(Columns.RETURNS_TO_GO), original.online_column(Columns.RETURNS_TO_GO)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"online_capacity": 8}, "made with `online_capacity` 10000, the config has 8; restore with the same capacity"),
        ({"track_tails": True}, "online data have other columns; restore with the config it was made with"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    state = make_store(5, 3).get_state()
    store = make_store(**({"num_offline": 0 if "track_tails" in changes else 5} | changes))
    with pytest.raises(ValueError, match=message):
        store.set_state(state)


def test_a_state_without_online_data_says_how_many_are_missing_and_drops_those_of_before() -> None:
    original, restored = make_store(5, 3), make_store(5, 4)
    assert restored.set_state(original.get_state(with_online=False)) == 3
    assert restored.num_online == restored.online_nbytes == 0
    assert restored.draw_seed() == original.draw_seed()
    assert restored.set_state(original.get_state()) == 0
    assert restored.num_online == 3


def test_a_state_with_observations_of_another_size_is_refused() -> None:
    state = make_store(0, 3).get_state()
    with pytest.raises(ValueError, match="online data have other columns"):
        make_store(obs_dim=4).set_state(state)
