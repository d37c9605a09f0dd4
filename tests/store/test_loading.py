"""Loading: the same columns in memory and in files, a cache that is used when nothing changed, bounded memory."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import oracle
import pytest
from ray.rllib.core.columns import Columns

from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets.episodes.reader import TRUNCATED, DatasetInfo, EpisodeBlock, EpisodeReader
from rllib_calql.store.ingestion import Conversion
from rllib_calql.store.loading import StorageSettings, load_table
from rllib_calql.store.offline_table import OfflineTable
from rllib_calql.store.returns_connector import AddReturnsToGo

SPACE = gym.spaces.Box(-10.0, 10.0, (3,))
ACTIONS = gym.spaces.Box(np.float32([-2.0, 0.0]), np.float32([2.0, 4.0]))
NAMES = (Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS, Columns.REWARDS, Columns.TERMINATEDS, Columns.RETURNS_TO_GO)


def block_of(lengths: list[int], *, seed: int = 0, **changes: Any) -> EpisodeBlock:
    rng = np.random.default_rng(seed)
    num_rows = sum(lengths)
    block = EpisodeBlock(
        ids=[f"{seed}-{i}" for i in range(len(lengths))],
        lengths=np.array(lengths),
        observations=rng.normal(size=(num_rows, 3)).astype(np.float32),
        final_observations=rng.normal(size=(len(lengths), 3)).astype(np.float32),
        actions=rng.uniform([-1.9, 0.1], [1.9, 3.9], size=(num_rows, 2)),
        rewards=rng.normal(size=num_rows),
        terminateds=np.arange(len(lengths)) % 2 == 0,
        truncateds=np.arange(len(lengths)) % 2 == 1,
        where=lambda row: f"row {row} of the block",
        extra_model_outputs={"value": rng.normal(size=num_rows)},
    )
    return replace(block, **changes)


class Reader(EpisodeReader):
    """Blocks out of memory, which may only be read as often as the test allows."""

    def __init__(
        self, *blocks: EpisodeBlock, fingerprint: str | None = "f", known: bool = True, reads: int = 1
    ) -> None:
        super().__init__()
        self._blocks = blocks
        self._fingerprint = fingerprint
        self.reads_left = reads
        num_rows = sum(block.num_rows for block in blocks) if known else None
        self.info = DatasetInfo("data", None, None, "environment", num_rows)

    def fingerprint(self) -> str | None:
        """What the test says."""
        return self._fingerprint

    def blocks(self) -> Iterator[EpisodeBlock]:
        """Counts down and remarks one thing."""
        self.reads_left -= 1
        assert self.reads_left >= 0, "read once more than allowed"
        self.remarks.clear()
        self.remarks[TRUNCATED] += 1
        yield from self._blocks


BLOCKS = (block_of([4, 1, 7]), block_of([3, 3], seed=1), block_of([9], seed=2))


def conversion(space: gym.Space[Any] = SPACE, **changes: Any) -> Conversion:
    settings: dict[str, Any] = {
        "observation_space": space,
        "action_space": ACTIONS,
        "connector": AddReturnsToGo(RewardSettings(0.9, reward_scale=2.0, reward_bias=-1.0)),
        "actions_without_metadata": "environment",
        "reference_column": None,
        "obs_dtype": np.dtype(np.float32),
    }
    return Conversion(**(settings | changes))


def load(*readers: Reader, folder: Path, limit: int = 2**30, key_parts: Any = "settings") -> OfflineTable:
    settings = StorageSettings(memory_limit=limit, cache_dir=folder, gamma=0.9, key_parts=key_parts)
    loaded = load_table(readers, conversion().columns, settings, action_dim=2, failure_reward=None)
    assert loaded is not None
    return loaded[0]


def assert_equal(table: OfflineTable, other: OfflineTable) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(table.column(name), other.column(name), err_msg=name)


# What is kept


def test_columns_are_those_of_plain_loops_over_the_episodes(tmp_path: Path) -> None:
    table = load(Reader(*BLOCKS), folder=tmp_path)
    obs, next_obs, actions, rewards, terminateds, returns = [], [], [], [], [], []
    for block in BLOCKS:
        row = 0
        for episode, length in enumerate(block.lengths.tolist()):
            rows = slice(row, row + length)
            scaled = [2.0 * reward - 1.0 for reward in block.rewards[rows].tolist()]
            ends = bool(block.terminateds[episode])
            obs += block.observations[rows].tolist()
            next_obs += [*block.observations[rows][1:].tolist(), block.final_observations[episode].tolist()]
            actions += [[a / 2.0, b / 2.0 - 1.0] for a, b in block.actions[rows].tolist()]
            rewards += scaled
            terminateds += [0.0] * (length - 1) + [float(ends)]
            returns += list(oracle.returns_to_go(scaled, 0.9, terminated=ends, truncated=not ends, truncation="none"))
            row += length
    expected = (obs, next_obs, actions, rewards, terminateds, returns)
    for name, values in zip(NAMES, expected, strict=True):
        np.testing.assert_allclose(table.column(name), values, rtol=1e-6, atol=1e-7, err_msg=name)


def test_no_episode_at_all_is_no_table(tmp_path: Path) -> None:
    settings = StorageSettings(memory_limit=1, cache_dir=tmp_path, gamma=0.9, key_parts=None)
    assert load_table([Reader()], conversion().columns, settings, action_dim=2, failure_reward=None) is None


@pytest.mark.parametrize("column", ["value", "returns_to_go"])
def test_a_column_of_the_data_may_be_the_reference_value(column: str) -> None:
    values = np.arange(12.0)
    block = block_of([4, 1, 7], extra_model_outputs={column: values})
    columns = conversion(reference_column=column).columns(Reader(block), block)
    np.testing.assert_array_equal(columns.returns_to_go, values)
    assert not columns.has_tail.any()
    column_of_ones = block_of([4, 1, 7], extra_model_outputs={column: values[:, None]})
    np.testing.assert_array_equal(
        conversion(reference_column=column).columns(Reader(block), column_of_ones).returns_to_go, values
    )


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({}, "there is no column of numbers `value`"),
        ({"value": np.array([0.0, np.nan, 0.0, 0.0])}, "row 1 of the block: `value` holds nan; it must be finite"),
        ({"value": np.array([0.0, 0.0, -np.inf, 0.0])}, "row 2 of the block: `value` holds -inf"),
        ({"value": np.zeros((4, 2))}, r"`value` must hold one number per row, got shape \(2,\)"),
    ],
)
def test_a_reference_column_that_cannot_serve_is_refused(extras: dict[str, Any], message: str) -> None:
    block = block_of([4], extra_model_outputs=extras)
    with pytest.raises(ValueError, match=message):
        conversion(reference_column="value").columns(Reader(block), block)


def test_a_misspelt_reference_value_is_told_the_words_that_need_no_column() -> None:
    block = block_of([4])
    with pytest.raises(ValueError, match=r"did you mean 'learned'\?.* one of 'returns_to_go', 'learned', 'quantile'"):
        conversion(reference_column="learnt").columns(Reader(block), block)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros((4, 2), np.float32)}, "observations have 2 numbers, the environment's have 3"),
        ({"observations": {"a": np.zeros((4, 3))}}, "observations do not fit the observation space"),
        ({"actions": np.zeros((4, 3))}, "actions have 3 numbers, the environment's have 2"),
        ({"actions": {"a": np.zeros((4, 2))}}, "actions are nested"),
        (
            {"actions": np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 4.1], [0.0, 0.0]])},
            r"Dataset 'data', episode '0-0', row 2 of the block: action \[0.0, 4.1\] is outside the bounds",
        ),
    ],
)
def test_rows_that_do_not_fit_the_spaces_are_refused(changes: dict[str, Any], message: str) -> None:
    block = block_of([4], **changes)
    with pytest.raises(ValueError, match=message):
        conversion().columns(Reader(block), block)


def test_integers_are_taken_for_pixels_only_if_they_are_pixels() -> None:
    space = gym.spaces.Box(0, 255, (3,), np.uint8)
    pixels = conversion(space, obs_dtype=np.dtype(np.uint8))
    block = block_of([4], observations=np.full((4, 3), 200.0), final_observations=np.full((1, 3), 7.0))
    assert pixels.columns(Reader(block), block).observations.dtype == np.uint8
    broken = block_of([4], observations=np.full((4, 3), 200.5), final_observations=np.full((1, 3), 7.0))
    with pytest.raises(ValueError, match="observations are not the uint8 numbers of the observation space"):
        pixels.columns(Reader(broken), broken)


@pytest.mark.parametrize("first", [np.int64, np.float16, np.bool_])
def test_an_input_is_not_rounded_to_the_type_of_the_one_before(tmp_path: Path, first: Any) -> None:
    reals = np.array([[0.3, 70_000.0, -1.5], [0.0, 1.0, 2.0]], dtype=np.float32)
    zeros = np.zeros((2, 3), dtype=first)
    before = block_of([2], observations=zeros, final_observations=zeros[:1])
    after = block_of([2], observations=reals, final_observations=reals[:1])
    with pytest.raises(ValueError, match=rf"row 0 of the block: observations are not the {np.dtype(first)} numbers"):
        load(Reader(before), Reader(after), folder=tmp_path)
    table = load(Reader(after), Reader(before), folder=tmp_path)
    np.testing.assert_array_equal(table.column(Columns.OBS), np.concatenate([reals, zeros]))
    whole = block_of([2], observations=np.eye(2, 3), final_observations=np.zeros((1, 3)))
    np.testing.assert_array_equal(
        load(Reader(before), Reader(whole), folder=tmp_path).column(Columns.OBS)[2:], np.eye(2, 3)
    )


@pytest.mark.parametrize(
    ("column", "row"), [("observations", 2), ("final_observations", 4), ("rewards", 2)], ids=["obs", "final", "reward"]
)
def test_a_number_that_float32_cannot_hold_is_refused_with_its_row(tmp_path: Path, column: str, row: int) -> None:
    block = block_of([2, 3])
    values = np.array(getattr(block, column), dtype=np.float64)
    values[2 if column != "final_observations" else 1] = -1e39
    if column == "rewards":
        values[3] = 1e39  # The return is finite.
    with pytest.raises(ValueError, match=rf"row {row} of the block: `\w+` holds -\de\+39, but training stores float32"):
        load(Reader(replace(block, **{column: values})), folder=tmp_path)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("limit", [1, 200, 700, 2**30])
def test_the_table_is_the_same_wherever_it_lies(tmp_path: Path, known: bool, limit: int) -> None:
    expected = load(Reader(*BLOCKS), folder=tmp_path)
    table = load(Reader(*BLOCKS, known=known), folder=tmp_path, limit=limit)
    assert table.is_mapped == (limit < 2**30)
    assert_equal(table, expected)


def test_the_second_start_reads_nothing_but_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = load(Reader(*BLOCKS), Reader(BLOCKS[0], fingerprint="g"), folder=tmp_path, limit=1)
    with caplog.at_level(logging.INFO):
        second = load(Reader(*BLOCKS, reads=1), Reader(BLOCKS[0], fingerprint="g", reads=0), folder=tmp_path, limit=1)
    assert_equal(first, second)
    assert "Found" in caplog.text


def test_the_report_of_the_second_start_is_that_of_the_first(tmp_path: Path) -> None:
    settings = StorageSettings(memory_limit=1, cache_dir=tmp_path, gamma=0.9, key_parts=None)
    reports = [
        load_table([Reader(*BLOCKS)], conversion().columns, settings, action_dim=2, failure_reward=0.0)
        for _ in range(2)
    ]
    assert reports[0] is not None
    assert reports[1] is not None
    assert reports[0][1] == reports[1][1]
    assert reports[1][1].num_transitions == 27
    assert reports[1][1].remarks == {TRUNCATED: 1}


@pytest.mark.parametrize("change", ["fingerprint", "order", "settings"])
def test_the_cache_is_not_used_for_anything_else(tmp_path: Path, change: str) -> None:
    one, other = Reader(BLOCKS[0], fingerprint="a"), Reader(BLOCKS[1], fingerprint="b")
    load(one, other, folder=tmp_path, limit=1)
    one.reads_left = other.reads_left = 1
    if change == "fingerprint":
        one = Reader(BLOCKS[2], fingerprint="c")
    readers = (other, one) if change == "order" else (one, other)
    table = load(*readers, folder=tmp_path, limit=1, key_parts="new" if change == "settings" else "settings")
    assert [reader.reads_left for reader in readers] == [0, 0]
    assert len(table) == one.info.num_transitions + other.info.num_transitions  # type: ignore[operator]


def test_data_without_a_fingerprint_leave_no_file(tmp_path: Path) -> None:
    table = load(Reader(*BLOCKS, fingerprint=None), folder=tmp_path, limit=1)
    assert table.is_mapped
    assert list(tmp_path.iterdir()) == []
    assert_equal(table, load(Reader(*BLOCKS), folder=tmp_path))


def test_data_that_turn_out_broken_leave_no_file(tmp_path: Path) -> None:
    broken = block_of([2], seed=5, actions=np.full((2, 2), 99.0))
    with pytest.raises(ValueError, match="outside the bounds"):
        load(Reader(*BLOCKS, broken), folder=tmp_path, limit=1)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


_MEMORY_TEST = """
import gymnasium as gym, numpy as np, sys
from pathlib import Path
from rllib_calql import CalQLConfig
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.offline_data import CalQLOfflineData
from rllib_calql.store.replay import TransitionStore
from rllib_calql.common.returns import RewardSettings

def resident():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}

path, cache, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = CalQLConfig().offline_data(input_=path, store_memory_limit=limit, cache_dir=cache)
def load():
    store = TransitionStore(obs_dim=29, action_dim=8, online_capacity=1, seed=0)
    CalQLOfflineData(config).load(
        store, AddReturnsToGo(RewardSettings(0.99)),
        observation_space=gym.spaces.Box(-10, 10, (29,)), action_space=gym.spaces.Box(-1, 1, (8,)))
    return store
import scipy.signal, h5py
before = resident()
store = load()
store.observation_statistics()
for _ in range(20):
    store.sample(num_batches=50, batch_size=256, num_offline_rows=256)
after = resident()
print(store.num_offline, store.offline.nbytes, *(after[name] - before[name] for name in after))
"""


def test_a_dataset_larger_than_the_limit_is_sampled_within_the_limit(tmp_path: Path) -> None:
    import h5py

    # Nothing but the flags is written: the file is sparse, the 1,200,000 rows of zeros are made by reading it.
    num_rows = 1_200_000
    path = tmp_path / "sparse.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("observations", (num_rows, 29), "f4", chunks=(4096, 29))
        file.create_dataset("actions", (num_rows, 8), "f4", chunks=(4096, 8))
        file.create_dataset("rewards", (num_rows,), "f4", chunks=(4096,))
        file["terminals"] = np.arange(num_rows) % 1000 == 999
    assert path.stat().st_size < 2 * num_rows
    limit = 16 * 2**20
    command = [sys.executable, "-c", _MEMORY_TEST, str(path), str(tmp_path / "cache"), str(limit)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout.split()
    rows, nbytes, anonymous, mapped = (int(number) for number in output[-4:])
    assert rows == num_rows
    assert nbytes > 11 * limit
    assert mapped < limit
    assert anonymous < nbytes / 2  # Blocks and files under way, and libraries that reading has loaded.
