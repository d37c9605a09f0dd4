"""Targets of several steps, as offline table, ring and GPU copy hold them, against numbers worked by hand and sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.rllib.core.columns import Columns

from rllib_calql.networks.steps import BOOTSTRAP_DISCOUNT, BOOTSTRAP_OBS
from rllib_calql.store.offline_table import EpisodeColumns, OfflineTableBuilder
from rllib_calql.store.replay import IS_OFFLINE, TransitionStore
from rllib_calql.store.resident_store import ResidentStore
from rllib_calql.store.returns_connector import TAIL_DISCOUNT

CPU = torch.device("cpu")
TARGET_COLUMNS = (Columns.REWARDS, Columns.TERMINATEDS, BOOTSTRAP_DISCOUNT, BOOTSTRAP_OBS)
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Episode:
    """Observations are numbers that occur once: `first`, `first` + 1, ..."""

    first: int
    rewards: tuple[float, ...]
    terminated: bool

    def __len__(self) -> int:
        return len(self.rewards)

    def observation(self, step: int) -> list[float]:
        """Observation before that step."""
        return [float(self.first + step), -float(self.first + step)]


def episodes_of(kinds: Sequence[tuple[Sequence[float], bool]], first: int = 0) -> list[Episode]:
    """Episodes of these rewards and ends, whose observations have no number in common."""
    episodes = []
    for rewards, terminated in kinds:
        episodes.append(Episode(first, tuple(rewards), terminated))
        first += len(rewards) + 1
    return episodes


def rows_of(episode: Episode) -> Batch:
    observations = np.array([episode.observation(step) for step in range(len(episode) + 1)], np.float32)
    terminateds = np.zeros(len(episode), np.float32)
    terminateds[-1] = episode.terminated
    return {
        Columns.OBS: observations[:-1],
        Columns.NEXT_OBS: observations[1:],
        Columns.ACTIONS: observations[:-1, :1] / 1e6,
        Columns.REWARDS: np.array(episode.rewards, np.float32),
        Columns.TERMINATEDS: terminateds,
        Columns.RETURNS_TO_GO: 7.0 + observations[:-1, 0],
    }


def columns_of(episodes: Sequence[Episode]) -> EpisodeColumns:
    rows = [rows_of(episode) for episode in episodes]
    joined = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    return EpisodeColumns(
        lengths=np.array([len(episode) for episode in episodes]),
        observations=joined[Columns.OBS],
        final_observations=np.stack([part[Columns.NEXT_OBS][-1] for part in rows]),
        actions=joined[Columns.ACTIONS],
        rewards=joined[Columns.REWARDS],
        returns_to_go=joined[Columns.RETURNS_TO_GO],
        terminateds=np.array([episode.terminated for episode in episodes]),
        has_tail=np.zeros(len(episodes), bool),
    )


def store_of(
    n_step: int, gamma: float, offline: Sequence[Episode] = (), online: Sequence[Episode] = (), **changes: Any
) -> TransitionStore:
    sizes = {"obs_dim": 2, "action_dim": 1, "online_capacity": 1_000, "seed": 0}
    store = TransitionStore(n_step=n_step, gamma=gamma, **(sizes | changes))
    if offline:
        builder = OfflineTableBuilder(action_dim=1)
        builder.add(columns_of(offline))
        store.offline = builder.build(gamma=gamma)
    for episode in online:
        store.add_online(rows_of(episode))
    return store


def gathered(store: TransitionStore) -> Iterator[Batch]:
    """All rows that the store holds, its offline and its online part."""
    for start, size in ((0, store.num_offline), (store.num_offline, store.num_online)):
        if size:
            columns = store.empty_columns(size)
            store.gather(np.arange(start, start + size), columns)
            yield columns


def looked_up(store: TransitionStore) -> Batch:
    resident = ResidentStore(store, CPU)
    rows = torch.arange(store.num_offline + store.num_online)
    return {name: column.numpy() for name, column in resident.look_up(rows).items()}


def targets(episode: Episode, step: int, n_step: int, gamma: float) -> tuple[float, float, float, list[float]]:
    """Sum of rewards, termination, discount and observation of the bootstrap, from their definition, in float64."""
    window = [float(np.float32(reward)) for reward in episode.rewards[step : step + n_step]]
    is_over = episode.terminated and step + len(window) == len(episode)
    total = sum(gamma**k * reward for k, reward in enumerate(window))
    return total, float(is_over), gamma ** len(window), episode.observation(step + len(window))


def assert_right(batch: Batch, episodes: Sequence[Episode], n_step: int, gamma: float) -> None:
    """Every row of a batch, which its observation tells apart, has the target of its episode, and its own columns."""
    place = {episode.first + step: (episode, step) for episode in episodes for step in range(len(episode))}
    found = [place[int(number)] for number in batch[Columns.OBS][:, 0]]
    expected = [targets(episode, step, n_step, gamma) for episode, step in found]
    for name, values in zip(TARGET_COLUMNS, zip(*expected, strict=True), strict=True):
        assert batch[name].dtype == np.float32
        np.testing.assert_array_equal(batch[name], np.array(values).astype(np.float32), err_msg=name)
    for name in (Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS, Columns.RETURNS_TO_GO):
        own = np.stack([rows_of(episode)[name][step] for episode, step in found])
        np.testing.assert_array_equal(batch[name], own, err_msg=name)


# --- Worked by hand: gamma 0.5, n 3, episodes of 1, n - 1, n and n + 1 steps ------------------------------------------

# Rewards 1, 2, 4, 8 and so on: each discounted reward of a row counts as much as the row's own.
WORKED: dict[int, list[tuple[float, float, int]]] = {  # Length: (sum, discount, steps to the bootstrap) of each row.
    1: [(1.0, 0.5, 1)],
    2: [(2.0, 0.25, 2), (2.0, 0.5, 1)],
    3: [(3.0, 0.125, 3), (4.0, 0.25, 2), (4.0, 0.5, 1)],
    4: [(3.0, 0.125, 3), (6.0, 0.125, 3), (8.0, 0.25, 2), (8.0, 0.5, 1)],
}
TERMINATED: dict[int, list[float]] = {1: [1.0], 2: [1.0, 1.0], 3: [1.0, 1.0, 1.0], 4: [0.0, 1.0, 1.0, 1.0]}


@pytest.mark.parametrize("terminated", [True, False], ids=["terminated", "cut"])
@pytest.mark.parametrize("length", WORKED)
@pytest.mark.parametrize("part", ["offline", "online"])
def test_targets_of_three_steps_are_those_worked_by_hand(part: str, length: int, terminated: bool) -> None:
    # Between two others, whose rewards would show.
    other = [100.0] * 5
    kinds = [(other, False), ([2.0**step for step in range(length)], terminated), (other, True)]
    store = store_of(3, 0.5, **{part: episodes_of(kinds)})
    (batch,) = gathered(store)
    rows = slice(5, 5 + length)
    sums, discounts, steps = (list(column) for column in zip(*WORKED[length], strict=True))
    assert batch[Columns.REWARDS][rows].tolist() == sums
    assert batch[BOOTSTRAP_DISCOUNT][rows].tolist() == discounts
    assert batch[Columns.TERMINATEDS][rows].tolist() == (TERMINATED[length] if terminated else [0.0] * length)
    # The first observation of this episode is 6; its last one, where it ends, 6 + length.
    assert batch[BOOTSTRAP_OBS][rows, 0].tolist() == [6.0 + row + ahead for row, ahead in enumerate(steps)]
    assert batch[Columns.NEXT_OBS][rows, 0].tolist() == [7.0 + row for row in range(length)]


# --- Random episodes --------------------------------------------------------------------------------------------------

KINDS = st.lists(
    st.tuples(st.lists(st.floats(-100.0, 100.0, width=32), min_size=1, max_size=9), st.booleans()),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(offline=KINDS, online=KINDS, n_step=st.integers(2, 12), gamma=st.floats(0.0, 1.0), room=st.integers(9, 40))
def test_every_row_of_table_ring_and_copy_has_the_target_of_its_definition(
    offline: Any, online: Any, n_step: int, gamma: float, room: int
) -> None:
    in_table, in_ring = episodes_of(offline), episodes_of(online, first=1_000)
    store = store_of(n_step, gamma, in_table, in_ring, online_capacity=room)
    for batch in [*gathered(store), looked_up(store)]:
        assert_right(batch, [*in_table, *in_ring], n_step, gamma)


@pytest.mark.parametrize("position", range(9))
@pytest.mark.parametrize("n_step", [2, 3, 9])
def test_an_episode_may_begin_anywhere_in_the_ring_and_go_round_it(position: int, n_step: int) -> None:
    kinds = [([1.0], True)] * (9 + position) + [([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], False), ([5.0, 6.0], True)]
    episodes = episodes_of(kinds)
    store = store_of(n_step, 0.9, online=episodes, online_capacity=9)
    (batch,) = gathered(store)
    assert sorted(batch[Columns.OBS][:, 0]) == [2.0 * (8 + position) + row for row in (0, *range(2, 8), 9, 10)]
    assert_right(batch, episodes, n_step, 0.9)


def test_a_copy_that_follows_the_ring_has_the_targets_of_rows_that_were_added_since() -> None:
    episodes = episodes_of([([1.0 + length] * length, length % 2 == 0) for length in (3, 7, 5, 1, 8, 6, 2, 8)])
    store = store_of(4, 0.9, episodes_of([([1.0, 2.0], False)], first=500), online_capacity=11)
    resident = ResidentStore(store, CPU)
    for episode in episodes:
        store.add_online(rows_of(episode))
        resident.follow()
        rows = torch.arange(2, 2 + store.num_online)
        batch = {name: column.numpy() for name, column in resident.look_up(rows).items()}
        assert_right(batch, episodes, 4, 0.9)


def test_a_copy_keeps_no_second_observation_of_its_rows() -> None:
    store = store_of(4, 0.9, online=episodes_of([([1.0] * 5, True)]), obs_dim=2, online_capacity=10)
    resident = ResidentStore(store, CPU)
    nbytes = sum(column.nbytes for column in resident._columns.values())
    # Two observations of 2 floats, 1 action, reward, end, return and discount, and the number of a row.
    assert nbytes == 10 * (4 * (2 + 2 + 1 + 1 + 1 + 1 + 1) + 8)


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_sampled_batches_hold_the_rows_of_one_step_with_the_targets_of_several() -> None:
    offline = episodes_of([([1.0, 2.0, 3.0, 4.0], False), ([5.0, 6.0], True)])
    online = episodes_of([([7.0, 8.0, 9.0], True), ([1.0], False)], first=100)
    batches = [
        store_of(n_step, 0.9, offline, online).sample(num_batches=50, batch_size=6, num_offline_rows=4)
        for n_step in (1, 3)
    ]
    assert_right(batches[1], [*offline, *online], 3, 0.9)
    assert set(batches[1]) - set(batches[0]) == {BOOTSTRAP_OBS, BOOTSTRAP_DISCOUNT}
    for name in (Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS, Columns.RETURNS_TO_GO, IS_OFFLINE):
        np.testing.assert_array_equal(batches[0][name], batches[1][name])


def test_a_batch_of_one_step_has_the_columns_and_bytes_that_it_had() -> None:
    one, several = store_of(1, 0.9), store_of(2, 0.9)
    names = {
        *(Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS),
        *(Columns.REWARDS, Columns.TERMINATEDS, Columns.RETURNS_TO_GO),
    }
    assert set(one.empty_columns(1)) == names
    assert one.row_nbytes == 4 * (2 + 2 + 1 + 1 + 1 + 1)
    assert several.row_nbytes == one.row_nbytes + 4 * (2 + 1)


@pytest.mark.parametrize("num_offline_rows", [0, 2, 4])
def test_pictures_stay_bytes(num_offline_rows: int) -> None:
    episodes = episodes_of([([1.0, 2.0, 3.0], False), ([4.0], True)])

    def as_bytes(episode: Episode) -> Batch:
        rows = rows_of(episode)
        return rows | {name: np.abs(rows[name]).astype(np.uint8) for name in (Columns.OBS, Columns.NEXT_OBS)}

    store = store_of(2, 0.5, episodes, obs_dtype=np.uint8)
    for episode in episodes:
        store.add_online(as_bytes(episode))
    batch = store.sample(num_batches=20, batch_size=4, num_offline_rows=num_offline_rows)
    assert batch[BOOTSTRAP_OBS].dtype == np.uint8
    ahead = {0: 2, 1: 3, 2: 3, 4: 5}  # By the number of the row's observation.
    assert batch[BOOTSTRAP_OBS][:, 0].tolist() == [ahead[int(number)] for number in batch[Columns.OBS][:, 0]]


@pytest.mark.parametrize("n_step", [1, 3])
def test_returns_that_are_renewed_do_not_depend_on_the_steps_of_targets(n_step: int) -> None:
    episode = Episode(0, (1.0, 2.0, 3.0), terminated=False)
    store = store_of(n_step, 0.5, track_tails=True)
    store.add_online(rows_of(episode) | {TAIL_DISCOUNT: np.array([0.125, 0.25, 0.5], np.float32)})
    store.refresh_returns(lambda obs: 8.0 * obs[:, 0])  # The last observation is 3, so it is worth 24.
    (batch,) = gathered(store)
    np.testing.assert_allclose(batch[Columns.RETURNS_TO_GO], [7 + 3, 8 + 6, 9 + 12])
    if n_step > 1:
        assert_targets_alone(batch, episode)


def assert_targets_alone(batch: Batch, episode: Episode) -> None:
    for name, values in zip(
        TARGET_COLUMNS, zip(*(targets(episode, step, 3, 0.5) for step in range(3)), strict=True), strict=True
    ):
        np.testing.assert_array_equal(batch[name], np.array(values, np.float32), err_msg=name)


# --- Data in files ----------------------------------------------------------------------------------------------------


def test_a_mapped_table_has_the_same_targets_however_few_rows_fit_into_memory(tmp_path: Any) -> None:
    episodes = episodes_of([([float(row) for row in range(length)], length % 3 == 0) for length in range(1, 40)])
    in_memory = store_of(5, 0.9, episodes)
    mapped = store_of(5, 0.9, episodes)
    table = mapped.offline
    assert table is not None
    for name in ("records", "final_observations"):
        getattr(table, name).tofile(tmp_path / name)
    parts = {
        name: np.memmap(tmp_path / name, dtype=array.dtype, mode="r", shape=array.shape)
        for name, array in (("records", table.records), ("final_observations", table.final_observations))
    }
    ends = {"lengths": table.lengths, "terminateds": table.terminateds, "has_tail": table.has_tail}
    mapped.offline = type(table)(**parts, **ends, gamma=0.9, memory_limit=1)  # 256 rows at a time of 780.
    assert mapped.offline.is_mapped
    (expected,), (actual,) = gathered(in_memory), gathered(mapped)
    assert_right(actual, episodes, 5, 0.9)
    for name, column in expected.items():
        np.testing.assert_array_equal(actual[name], column, err_msg=name)


def test_the_data_that_trials_share_do_not_depend_on_the_steps_of_targets() -> None:
    episodes = episodes_of([([1.0, 2.0, 3.0], True)])
    one, several = (store_of(n_step, 0.9, episodes).offline for n_step in (1, 3))
    assert one is not None
    assert several is not None
    assert one.fingerprint() == several.fingerprint()
    assert one.records.tobytes() == several.records.tobytes()


# --- State ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_with", [1, 2, 5])
@pytest.mark.parametrize("lengths", [[3, 2], [5, 4, 3, 6, 2]], ids=["half full", "gone round"])
def test_a_run_goes_on_with_targets_of_another_number_of_steps(saved_with: int, lengths: list[int]) -> None:
    episodes = episodes_of([([1.0 + row for row in range(length)], length % 2 == 0) for length in lengths])
    restored = store_of(4, 0.9, online_capacity=10)
    restored.set_state(store_of(saved_with, 0.9, online=episodes, online_capacity=10).get_state())
    later = episodes_of([([9.0, 8.0, 7.0], True), ([6.0], False)], first=500)
    for episode in [None, *later]:
        if episode is not None:
            restored.add_online(rows_of(episode))
        (batch,) = gathered(restored)
        assert_right(batch, [*episodes, *later], 4, 0.9)
        assert_right(looked_up(restored), [*episodes, *later], 4, 0.9)


def test_rows_of_a_checkpoint_that_does_not_tell_where_episodes_end_keep_targets_of_one_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    old = episodes_of([([1.0, 2.0, 3.0], False), ([4.0, 5.0], True)])
    state = store_of(1, 0.9, online=old, online_capacity=8).get_state()
    del state["online"]["steps_left"]  # As earlier versions wrote it.
    restored = store_of(3, 0.9, online_capacity=8)
    restored.set_state(state)
    assert "its 5 online transitions have targets of one step, new ones of `n_step` 3" in caplog.text
    (batch,) = gathered(restored)
    assert_right(batch, old, 1, 0.9)
    new = episodes_of([([1.0, 2.0, 3.0, 4.0], True)], first=100)
    restored.add_online(rows_of(new[0]))
    (batch,) = gathered(restored)
    is_new = batch[Columns.OBS][:, 0] >= 100
    assert is_new.sum() == 4
    assert_right({name: column[is_new] for name, column in batch.items()}, new, 3, 0.9)
    assert_right({name: column[~is_new] for name, column in batch.items()}, old, 1, 0.9)


def test_a_checkpoint_of_an_earlier_version_is_restored_without_a_word_where_targets_have_one_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = store_of(1, 0.9, online=episodes_of([([1.0, 2.0], True)])).get_state()
    del state["online"]["steps_left"]
    restored = store_of(1, 0.9)
    restored.set_state(state)
    (batch,) = gathered(restored)
    assert batch[Columns.REWARDS].tolist() == [1.0, 2.0]
    assert caplog.text == ""
