"""Flat columns in HDF5 files and NumPy archives: values read back, boundaries where they belong, faults named."""

from __future__ import annotations

import builtins
import io
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs

from rllib_calql.datasets import open_input
from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.datasets.episodes.reader import (
    CUT_AT_JUMP,
    CUT_AT_LENGTH,
    DROPPED_STEPS,
    LOST_REWARDS,
    REPEATED,
    TRUNCATED,
    EpisodeBlock,
    EpisodeReader,
    ReadOptions,
)
from rllib_calql.datasets.readers.hdf5 import Hdf5Reader
from rllib_calql.datasets.readers.npz import NpzReader
from rllib_calql.datasets.rows import flat
from rllib_calql.datasets.rows.flat import FlatReader

Columns = dict[str, Any]
TRUNCATE = ReadOptions(unfinished_episodes="truncate")
slow_fixtures = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_hdf5(path: Path, columns: Columns, **kwargs: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, **kwargs)
    return path


def write_npz(path: Path, columns: Columns) -> Path:
    np.savez(path, **columns)
    return path


def write_compressed_npz(path: Path, columns: Columns) -> Path:
    np.savez_compressed(path, **columns)
    return path


FORMATS: dict[str, tuple[type[FlatReader], str, Callable[[Path, Columns], Path]]] = {
    "hdf5": (Hdf5Reader, ".hdf5", write_hdf5),
    "npz": (NpzReader, ".npz", write_npz),
    "compressed npz": (NpzReader, ".npz", write_compressed_npz),
}
BOTH = pytest.mark.parametrize("format_", ["hdf5", "npz"])


def open_written(format_: str, folder: Path, *files: Columns, options: ReadOptions = ReadOptions()) -> FlatReader:  # noqa: B008
    """Writes files of columns and opens them."""
    reader, suffix, write = FORMATS[format_]
    paths = [write(folder / f"part-{number}{suffix}", columns) for number, columns in enumerate(files)]
    return reader("the-input", [DataFile(str(path)) for path in paths], options)


def d4rl(lengths: Sequence[int], *, seed: int = 0, terminated: bool = True) -> Columns:
    """Episodes of these lengths with 3 observations and 2 actions; every other one times out."""
    rng = np.random.default_rng([seed, *lengths])
    episodes = [rng.standard_normal((length + 1, 3)).astype(np.float32) for length in lengths]
    rows = sum(lengths)
    last_rows = np.cumsum(lengths) - 1
    terminals, timeouts = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
    terminals[last_rows[::2]] = terminated
    timeouts[last_rows[1::2] if terminated else last_rows] = True
    return {
        "observations": np.concatenate([episode[:-1] for episode in episodes]),
        "next_observations": np.concatenate([episode[1:] for episode in episodes]),
        "actions": rng.uniform(-1, 1, (rows, 2)),
        "rewards": rng.standard_normal(rows).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def without(columns: Columns, *names: str) -> Columns:
    return {name: column for name, column in columns.items() if name not in names}


def take(columns: Columns, rows: slice) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def joined(blocks: Sequence[EpisodeBlock]) -> Columns:
    """Rows and episodes of all blocks."""
    return {
        "ids": [id_ for block in blocks for id_ in block.ids],
        **{
            name: np.concatenate([getattr(block, name) for block in blocks])
            for name in ("lengths", "observations", "final_observations", "actions", "rewards")
        },
        **{name: np.concatenate([getattr(block, name) for block in blocks]) for name in ("terminateds", "truncateds")},
    }


@pytest.fixture
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers read 3 rows at a time, so that every boundary falls between pieces somewhere."""
    monkeypatch.setattr(flat, "_MAX_PIECE_ROWS", 3)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", FORMATS)
def test_every_value_and_type_is_read_back(tmp_path: Path, format_: str) -> None:
    lengths = [4, 1, 7]
    columns = d4rl(lengths)
    reader = open_written(format_, tmp_path, columns)
    rows = joined(list(reader.blocks()))
    np.testing.assert_array_equal(rows["lengths"], lengths)
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(rows[name], columns[name])
        assert rows[name].dtype == columns[name].dtype
    np.testing.assert_array_equal(rows["final_observations"], columns["next_observations"][[3, 4, 11]])
    assert rows["terminateds"].tolist() == [True, False, True]
    assert rows["truncateds"].tolist() == [False, True, False]
    assert reader.info.num_transitions == 12
    assert reader.info.actions == "environment"
    assert reader.remarks == {}


@pytest.mark.parametrize("format_", FORMATS)
def test_a_million_bytes_in_pieces_are_the_same_rows(tmp_path: Path, format_: str) -> None:
    columns = d4rl([30_000, 2, 50_000, 100_000, 1])
    reader = open_written(format_, tmp_path, columns)
    blocks = list(reader.blocks())
    assert len(blocks) > 1
    rows = joined(blocks)
    assert rows["lengths"].tolist() == [30_000, 2, 50_000, 100_000, 1]
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(rows[name], columns[name])


@BOTH
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float64, ">f4"])
def test_the_type_of_observations_is_kept_in_native_byte_order(tmp_path: Path, format_: str, dtype: Any) -> None:
    columns = without(d4rl([5]), "next_observations")
    columns["observations"] = np.arange(30).reshape(5, 2, 3).astype(dtype)
    (block,) = open_written(format_, tmp_path, columns).blocks()
    np.testing.assert_array_equal(block.observations, columns["observations"])
    assert block.observations.dtype == np.dtype(dtype).newbyteorder("=")


@BOTH
def test_paths_become_dicts_and_numbered_entries_tuples(tmp_path: Path, format_: str) -> None:
    columns = without(d4rl([4]), "observations", "next_observations")
    camera = np.arange(4 * 6, dtype=np.uint8).reshape(4, 2, 3)
    joints = np.arange(8.0).reshape(4, 2)
    for name, shift in (("observations", 0), ("next_observations", 1)):
        columns[f"{name}/camera"] = camera + np.uint8(6 * shift)
        columns[f"{name}/robot/0"] = joints + 2 * shift
        columns[f"{name}/robot/1"] = joints[:, 0] + 2 * shift
    (block,) = open_written(format_, tmp_path, columns).blocks()
    assert set(block.observations) == {"camera", "robot"}
    assert isinstance(block.observations["robot"], tuple)
    np.testing.assert_array_equal(block.observations["camera"], camera)
    np.testing.assert_array_equal(block.observations["robot"][0], joints)
    np.testing.assert_array_equal(block.final_observations["robot"][1], [8.0])
    tree.assert_same_structure(block.observations, block.final_observations)


@BOTH
def test_rewards_and_flags_may_have_a_trailing_axis_and_be_numbers(tmp_path: Path, format_: str) -> None:
    columns = d4rl([3, 2])
    plain = joined(list(open_written(format_, tmp_path, columns).blocks()))
    columns["rewards"] = columns["rewards"][:, None]
    columns["terminals"] = columns["terminals"][:, None].astype(np.float32)
    columns["timeouts"] = columns["timeouts"].astype(np.uint8)
    (block,) = open_written(format_, tmp_path, columns).blocks()
    assert block.rewards.shape == (5,)
    np.testing.assert_array_equal(block.rewards, plain["rewards"])
    np.testing.assert_array_equal(block.terminateds, plain["terminateds"])
    np.testing.assert_array_equal(block.truncateds, plain["truncateds"])


def test_both_flags_of_a_row_are_kept(tmp_path: Path) -> None:
    columns = d4rl([3])
    columns["timeouts"][-1] = True
    (block,) = open_written("hdf5", tmp_path, columns).blocks()
    assert block.terminateds.tolist() == [True]
    assert block.truncateds.tolist() == [True]


@BOTH
def test_further_columns_are_read_if_wanted_and_named_if_not(tmp_path: Path, format_: str) -> None:
    columns = {
        **d4rl([3]),
        "values": np.arange(3.0),
        "costs": np.arange(3),
        "goal": np.zeros(2),
        "names": np.array([b"a", b"b", b"c"]),
        "infos/qpos": np.zeros((3, 2)),
        "metadata/algorithm": np.array(b"SAC"),
    }
    options = ReadOptions(columns=frozenset({"values"}))
    reader = open_written(format_, tmp_path, columns, options=options)
    (block,) = reader.blocks()
    assert set(block.extra_model_outputs) == {"values"}
    np.testing.assert_array_equal(block.extra_model_outputs["values"], [0.0, 1.0, 2.0])
    assert reader.info.ignored_columns == (
        "costs (not asked for)",
        "goal (shape (2,), not one row per step)",
        "infos/*",
        "metadata/*",
        "names (holds no numbers)",
    )
    (block,) = open_written(format_, tmp_path, columns).blocks()
    assert set(block.extra_model_outputs) == {"values", "costs"}


def test_columns_may_stand_in_one_group_beside_others(tmp_path: Path) -> None:
    columns = d4rl([4, 3])
    path = write_hdf5(tmp_path / "a.hdf5", {f"train/{name}": column for name, column in columns.items()})
    with h5py.File(path, "a") as file:
        file["about/version"] = 3
        file.attrs["ref_min_score"], file.attrs["ref_max_score"] = -20.0, np.float32(3234.5)
    reader = Hdf5Reader("a", [DataFile(str(path))], ReadOptions())
    np.testing.assert_array_equal(joined(list(reader.blocks()))["rewards"], columns["rewards"])
    assert reader.info.reference_scores == (-20.0, 3234.5)


@pytest.mark.parametrize("chunks", [(7, 1), (100, 3)])
def test_hdf5_chunks_and_filters_change_nothing(tmp_path: Path, chunks: tuple[int, int]) -> None:
    columns = d4rl([60, 40])
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, column in columns.items():
            own_chunks = chunks if name.endswith("observations") else True
            file.create_dataset(name, data=column, chunks=own_chunks, compression="gzip", shuffle=True)
    (block,) = Hdf5Reader("a", [DataFile(str(tmp_path / "a.hdf5"))], ReadOptions()).blocks()
    np.testing.assert_array_equal(block.observations, columns["observations"])


@BOTH
def test_files_are_read_from_any_file_system(tmp_path: Path, format_: str) -> None:
    columns = d4rl([4, 3])
    open_written(format_, tmp_path, columns)
    reader, suffix, _ = FORMATS[format_]
    system = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    (block,) = reader("a", [DataFile(f"part-0{suffix}", system)], ReadOptions()).blocks()
    np.testing.assert_array_equal(block.actions, columns["actions"])


@BOTH
def test_reading_twice_gives_the_same_blocks_and_remarks(tmp_path: Path, format_: str) -> None:
    reader = open_written(format_, tmp_path, without(d4rl([4, 3, 2]), "next_observations"))
    first, remarks = joined(list(reader.blocks())), dict(reader.remarks)
    second = joined(list(reader.blocks()))
    np.testing.assert_array_equal(first["observations"], second["observations"])
    assert dict(reader.remarks) == remarks
    assert reader.fingerprint() == fingerprint_of([DataFile(str(next(iter(tmp_path.iterdir()))))])


@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_far_larger_than_a_block_is_never_held_whole(tmp_path: Path, format_: str) -> None:
    rows = 500_000
    columns = d4rl([1000] * (rows // 1000))
    columns["observations"] = np.zeros((rows, 20), np.float32)
    columns["next_observations"] = columns["observations"]
    reader = open_written(format_, tmp_path, columns)
    num_bytes = sum(column.nbytes for column in columns.values())
    del columns
    tracemalloc.start()
    try:
        assert sum(block.num_rows for block in reader.blocks()) == rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_bytes > 85 * 2**20
    assert peak < 40 * 2**20


# --- Boundaries -------------------------------------------------------------------------------------------------------


def plain_division(files: Sequence[Columns], limit: int | None) -> tuple[list[tuple[int, bool, bool]], dict[str, int]]:
    """Row by row: (number of rows, terminated, truncated) of each episode, and the count of each cut."""
    episodes = []
    remarks = {CUT_AT_JUMP: 0, CUT_AT_LENGTH: 0, TRUNCATED: 0}
    for columns in files:
        steps = 0
        last_row = len(columns["rewards"]) - 1
        for row in range(last_row + 1):
            steps += 1
            terminated, truncated = bool(columns["terminals"][row]), bool(columns["timeouts"][row])
            cut = None
            if (row == last_row) or ("t" in columns and columns["t"][row + 1] != columns["t"][row] + 1):
                cut = TRUNCATED
            if steps == limit:
                cut = CUT_AT_LENGTH
            next_obs = columns.get("next_observations")
            if next_obs is not None and row < last_row and next_obs[row] != columns["observations"][row + 1]:
                cut = CUT_AT_JUMP
            if terminated or truncated:
                episodes.append((steps, terminated, truncated))
                steps = 0
            elif cut:
                remarks[cut] += 1
                episodes.append((steps, False, True))
                steps = 0
    return episodes, remarks


@st.composite
def rows_without_ids(draw: st.DrawFn) -> Columns:
    rows = draw(st.integers(1, 14))
    flag = st.lists(st.sampled_from([False, False, False, True]), min_size=rows, max_size=rows)
    obs = np.arange(rows, dtype=np.float64)[:, None]
    columns: Columns = {
        "observations": obs,
        "actions": np.zeros((rows, 1)),
        "rewards": np.arange(rows, dtype=np.float64),
        "terminals": np.array(draw(flag)),
        "timeouts": np.array(draw(flag)),
    }
    if draw(st.booleans()):
        columns["next_observations"] = obs + 1 + 5 * np.array(draw(flag))[:, None]
    if draw(st.booleans()):
        t = np.cumsum(1 - 3 * np.array(draw(flag), dtype=np.int64))
        # Numbers that never count up within an episode are no steps.
        is_inside = ~(columns["terminals"] | columns["timeouts"])[:-1]
        if ((np.diff(t) == 1) & is_inside).any():
            columns["t"] = t
    return columns


@pytest.mark.usefixtures("few_rows_at_a_time")
@slow_fixtures
@given(first=rows_without_ids(), second=rows_without_ids(), limit=st.none() | st.integers(1, 5))
def test_episodes_end_where_a_loop_over_rows_ends_them(
    tmp_path: Path, first: Columns, second: Columns, limit: int | None
) -> None:
    files = [first, second] if first.keys() == second.keys() else [first]
    options = ReadOptions(unfinished_episodes="truncate", missing_final_observation="repeat", max_episode_steps=limit)
    reader = open_written("npz", tmp_path, *files, options=options)
    rows = joined(list(reader.blocks()))
    expected, remarks = plain_division(files, limit)
    found = list(zip(rows["lengths"].tolist(), rows["terminateds"].tolist(), rows["truncateds"].tolist(), strict=True))
    assert found == expected
    assert {remark: reader.remarks[remark] for remark in remarks} == remarks
    assert rows["ids"] == [str(number) for number in range(len(expected))]
    np.testing.assert_array_equal(rows["rewards"], np.concatenate([columns["rewards"] for columns in files]))


@BOTH
@pytest.mark.usefixtures("few_rows_at_a_time")
def test_jumps_and_the_maximum_length_are_counted(tmp_path: Path, format_: str) -> None:
    columns = d4rl([7, 4, 5])
    columns["terminals"][:] = columns["timeouts"][:] = False
    options = ReadOptions(max_episode_steps=4)
    reader = open_written(format_, tmp_path, take(columns, slice(0, 15)), options=options)
    rows = joined(list(reader.blocks()))
    # 7 rows are cut after 4 and jump after 3 more; 4 rows end with a jump; the last 4 are full.
    assert rows["lengths"].tolist() == [4, 3, 4, 4]
    assert rows["truncateds"].all()
    assert reader.remarks == {CUT_AT_JUMP: 2, CUT_AT_LENGTH: 2}
    np.testing.assert_array_equal(rows["final_observations"], columns["next_observations"][[3, 6, 10, 14]])


def test_a_difference_by_rounding_is_no_jump(tmp_path: Path) -> None:
    columns = d4rl([6])
    columns["next_observations"] = (columns["next_observations"] * np.float32(1 + 1e-7)).astype(np.float32)
    reader = open_written("hdf5", tmp_path, columns)
    assert joined(list(reader.blocks()))["lengths"].tolist() == [6]
    assert CUT_AT_JUMP not in reader.remarks


@BOTH
@pytest.mark.usefixtures("few_rows_at_a_time")
def test_an_unfinished_last_episode_follows_the_options(tmp_path: Path, format_: str) -> None:
    columns = take(d4rl([4, 4]), slice(0, 6))
    with pytest.raises(ValueError, match=r"Episode '1' ends neither .*row 5 of '.*part-0.*max_episode_steps_in_data"):
        list(open_written(format_, tmp_path, columns).blocks())
    reader = open_written(format_, tmp_path, columns, options=TRUNCATE)
    assert joined(list(reader.blocks()))["truncateds"].tolist() == [False, True]
    assert reader.remarks == {TRUNCATED: 1}


def test_without_next_observations_the_last_step_before_a_time_out_is_dropped(tmp_path: Path) -> None:
    columns = without(d4rl([3, 4]), "next_observations")
    reader = open_written("hdf5", tmp_path, columns)
    rows = joined(list(reader.blocks()))
    assert rows["lengths"].tolist() == [3, 3]
    np.testing.assert_array_equal(rows["final_observations"], columns["observations"][[2, 6]])
    assert reader.remarks == {DROPPED_STEPS: 1, REPEATED: 1}


@pytest.mark.parametrize(
    ("rewards", "num_lost"), [([0, 0, 0, 1], 1), ([0, 0, 0, 0], 0), ([0, 0, 1, 1], 0), ([0, 1, 0, 1], 0)], ids=str
)
def test_a_success_that_is_dropped_with_its_step_is_remarked(tmp_path: Path, rewards: list[int], num_lost: int) -> None:
    columns = without(d4rl([4, 4]), "next_observations")
    columns["rewards"] = np.array([*rewards, 0, 0, 0, 0], dtype=np.float32)
    columns["terminals"][:], columns["timeouts"][[3, 7]] = False, True
    reader = open_written("hdf5", tmp_path, columns)
    assert joined(list(reader.blocks()))["lengths"].tolist() == [3, 3]
    assert reader.remarks[LOST_REWARDS] == num_lost
    kept = open_written("hdf5", tmp_path, columns, options=ReadOptions(missing_final_observation="repeat"))
    assert joined(list(kept.blocks()))["rewards"].tolist() == [*rewards, 0, 0, 0, 0]
    assert LOST_REWARDS not in kept.remarks


def test_time_outs_need_no_column(tmp_path: Path) -> None:
    columns = without(d4rl([3, 5]), "timeouts")
    columns["terminals"][-1] = True
    rows = joined(list(open_written("npz", tmp_path, columns).blocks()))
    assert rows["lengths"].tolist() == [3, 5]
    assert not rows["truncateds"].any()


@BOTH
@pytest.mark.parametrize("dtype", [np.int64, np.float32, "S9"])
@pytest.mark.usefixtures("few_rows_at_a_time")
def test_ids_divide_episodes_and_name_them(tmp_path: Path, format_: str, dtype: Any) -> None:
    lengths = [4, 1, 3, 3]
    columns = {**d4rl(lengths), "episode_ids": np.repeat([7, 12345, 3, 0], lengths).astype(dtype)}
    columns["t"] = np.concatenate([np.arange(length) for length in lengths])
    reader = open_written(format_, tmp_path, columns, options=ReadOptions(max_episode_steps=2))
    rows = joined(list(reader.blocks()))
    assert rows["ids"] == ["7", "12345", "3", "0"]
    assert rows["lengths"].tolist() == lengths
    assert reader.remarks == {}


def test_ids_may_be_text_of_any_length_in_hdf5(tmp_path: Path) -> None:
    columns = d4rl([2, 3])
    path = write_hdf5(tmp_path / "a.hdf5", columns)
    with h5py.File(path, "a") as file:
        file["episode_ids"] = ["ä"] * 2 + ["run-17"] * 3
    (block,) = Hdf5Reader("a", [DataFile(str(path))], ReadOptions()).blocks()
    assert block.ids == ["ä", "run-17"]


@BOTH
@pytest.mark.usefixtures("few_rows_at_a_time")
def test_an_id_that_comes_back_is_refused_within_and_across_files(tmp_path: Path, format_: str) -> None:
    columns = {**d4rl([4, 4, 4]), "episode_ids": np.repeat([1, 2, 1], 4)}
    with pytest.raises(ValueError, match=r"Episode '1' begins in row 0 of .*part-0.* comes back in row 8 of .*part-0"):
        list(open_written(format_, tmp_path, columns).blocks())
    first, second = ({**d4rl([4, 4]), "episode_ids": np.repeat(ids, 4)} for ids in ([1, 2], [2, 3]))
    with pytest.raises(ValueError, match=r"'2' begins in row 4 of .*part-0.* comes back in row 0 of .*part-1"):
        list(open_written(format_, tmp_path, first, second).blocks())


@pytest.mark.usefixtures("few_rows_at_a_time")
def test_times_and_observations_must_follow_each_other_within_an_id(tmp_path: Path) -> None:
    columns = {**d4rl([8]), "episode_ids": np.zeros(8, int), "t": np.array([0, 1, 2, 4, 5, 6, 7, 8])}
    with pytest.raises(ValueError, match=r"episode '0' are out of order.*from row 2 of .* to row 3 of"):
        list(open_written("npz", tmp_path, columns).blocks())
    columns = {**d4rl([4, 4]), "episode_ids": np.zeros(8, int)}
    columns["terminals"][3] = False
    with pytest.raises(ValueError, match=r"episode '0' are out of order.*row 3 of .*row 4 of"):
        list(open_written("npz", tmp_path, columns).blocks())


def test_a_file_without_rows_beside_others_changes_nothing(tmp_path: Path) -> None:
    columns = d4rl([3, 2])
    empty = {**take(columns, slice(0, 0)), "observations": np.array([])}
    reader = open_written("hdf5", tmp_path, empty, columns, empty, d4rl([4]))
    assert joined(list(reader.blocks()))["lengths"].tolist() == [3, 2, 4]
    assert reader.info.num_transitions == 9


def test_files_of_one_kind_of_numbers_are_read_in_the_larger_type(tmp_path: Path) -> None:
    first, second = d4rl([2]), d4rl([3])
    second["rewards"] = second["rewards"].astype(np.float64) + 1e-12
    rows = joined(list(open_written("npz", tmp_path, first, second).blocks()))
    np.testing.assert_array_equal(rows["rewards"], np.concatenate([first["rewards"], second["rewards"]]))


# --- OGBench ----------------------------------------------------------------------------------------------------------


def ogbench() -> Columns:
    """Two trajectories of 5 rows, the last of which only holds the final state; rows 2 and 9 reach the goal."""
    return {
        "observations": np.arange(10, dtype=np.float32)[:, None],
        "actions": np.zeros((10, 2), np.float32),
        "rewards": np.array([-1, -1, 0, -1, -1, -1, -1, -1, -1, 0], np.float32),
        "terminals": np.array([0, 0, 0, 0, 1] * 2, np.float32),
        "masks": np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 0], np.float32),
        "qpos": np.zeros((10, 2), np.float32),
        "qvel": np.zeros((10, 2), np.float32),
    }


@BOTH
def test_masks_tell_terminations_from_the_ends_of_trajectories(tmp_path: Path, format_: str) -> None:
    rows = joined(list(open_written(format_, tmp_path, ogbench()).blocks()))
    # Row 4 is no step: nothing follows it. Row 9 is one, since it ends in a termination.
    assert rows["lengths"].tolist() == [3, 1, 5]
    assert rows["terminateds"].tolist() == [True, False, True]
    assert rows["truncateds"].tolist() == [False, True, False]
    assert rows["final_observations"][1, 0] == 4.0


def test_ogbench_archives_as_downloaded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="play data have no rewards until a task relabels them"):
        open_written("npz", tmp_path, without(ogbench(), "rewards", "masks"))
    with pytest.raises(ValueError, match=r"`terminals` marks the ends of trajectories.*add `masks`.*or `timeouts`"):
        open_written("npz", tmp_path, without(ogbench(), "masks"))
    columns = {**without(ogbench(), "masks"), "timeouts": np.zeros(10)}
    assert joined(list(open_written("npz", tmp_path, columns).blocks()))["terminateds"].all()


# --- Faults -----------------------------------------------------------------------------------------------------------


def with_value(name: str, value: Any) -> Callable[[Columns], Columns]:
    def change(columns: Columns) -> Columns:
        changed = columns[name].astype(np.float32)
        changed[5] = value
        return {**columns, name: changed}

    return change


FAULTS: dict[str, tuple[Callable[[Columns], Columns], str]] = {
    "no terminals": (lambda c: without(c, "terminals"), r"part-0.* has no column `terminateds`"),
    "dones only": (
        lambda c: {**without(c, "terminals", "timeouts"), "dones": c["terminals"]},
        "`dones` does not tell terminations",
    ),
    "two names": (lambda c: {**c, "obs": c["observations"]}, "`obs`, `observations`, which mean the same"),
    "length": (lambda c: {**c, "actions": c["actions"][:-1]}, "7 rows of `observations` and 6 of `actions`"),
    "scalar": (lambda c: {**c, "rewards": np.float32(1)}, "`rewards` in .*part-0.* is a single value"),
    "text": (lambda c: {**c, "actions": np.array([b"a"] * 7)}, r"`actions` must hold numbers, got bytes.* in .*part-0"),
    "complex": (lambda c: {**c, "observations": c["observations"] + 1j}, "`observations` must hold numbers"),
    "rewards of 2": (
        lambda c: {**c, "rewards": np.zeros((7, 2))},
        r"`rewards` must hold one value .*\(2,\) in .*part-0",
    ),
    "flag": (with_value("terminals", 0.5), r"`terminals` must be 0 or 1 in every row, got 0.5 in row 5 of .*part-0"),
    "flag nan": (with_value("timeouts", np.nan), r"`timeouts` must be 0 or 1 .* got nan in row 5 of"),
    "observation": (with_value("observations", np.nan), r"`obs` holds nan in episode '.', row 5 of .*part-0"),
    "reward": (with_value("rewards", np.inf), r"`rewards` holds inf in episode '1', row 5 of .*part-0"),
    "no numbers": (lambda c: {**c, "actions": np.zeros((7, 0))}, r"`actions` in .*part-0.* has rows of shape \(0,\)"),
    "next shape": (
        lambda c: {**c, "next_observations": c["next_observations"][:, :2]},
        r"`next_observations` in .*part-0.* rows of shape \(2,\), `observations` has .* \(3,\)",
    ),
    "next entries": (
        lambda c: {**without(c, "next_observations"), "next_observations/a": c["next_observations"]},
        "differ in the entry",
    ),
    "no rows": (lambda c: take(c, slice(0, 0)), "'the-input' is empty: its files have no rows"),
    "id": (
        lambda c: {**c, "episode_ids": np.full(7, 0.5)},
        r"`eps_id` must be a whole number or text, got 0.5 in row 0",
    ),
}


@BOTH
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_columns_is_named(tmp_path: Path, format_: str, fault: str) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        list(open_written(format_, tmp_path, change(d4rl([3, 4]))).blocks())


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: without(c, "timeouts"), r"part-0.* has a column `truncateds` and .*part-1.* has not"),
        (lambda c: {**c, "actions": c["actions"][:, :1]}, r"`actions` .*\(2,\) in .*part-0.*\(1,\) in .*part-1"),
        (lambda c: {**c, "actions": c["actions"].astype(int)}, "`actions` holds float64 .*part-0.*int64 .*part-1"),
    ],
    ids=["columns", "shape", "kind"],
)
def test_files_that_disagree_are_refused(tmp_path: Path, format_: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_written(format_, tmp_path, d4rl([3]), change(d4rl([3])))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"episode_0/observations": [1], "episode_1/observations": [1]}, "Minari's own layout.*`minari:<dataset id>`"),
        ({"a/observations": [1], "b/observations": [1]}, "columns in 2 groups .*one data set per file"),
        ({"x": [1]}, "has no column `obs`, `actions`, `rewards`, `terminateds`; its columns are `x`"),
    ],
    ids=["minari", "two groups", "something else"],
)
def test_other_layouts_of_hdf5_are_refused_with_the_remedy(tmp_path: Path, columns: Columns, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_written("hdf5", tmp_path, columns)


def test_arrays_of_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("was unpickled",))

    columns = {**d4rl([3]), "actions": np.array([Trap(), Trap(), Trap()], dtype=object)}
    with pytest.raises(ValueError, match="`actions` must hold numbers, got object"):
        open_written("npz", tmp_path, columns)


def test_arrays_stored_by_columns_are_refused_with_the_remedy(tmp_path: Path) -> None:
    columns = {**d4rl([3]), "actions": np.asfortranarray(np.ones((3, 2)))}
    with pytest.raises(ValueError, match=r"`actions` in .*part-0.*column by column.*ascontiguousarray"):
        list(open_written("npz", tmp_path, columns).blocks())


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("content", ["nothing", "text", "half", "all but the end"])
def test_files_that_are_incomplete_or_something_else_are_named(tmp_path: Path, format_: str, content: str) -> None:
    reader, suffix, write = FORMATS[format_]
    path = write(tmp_path / f"a{suffix}", d4rl([300]))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "nothing": b"",
            "text": b"obs,actions\n" * 100,
            "half": whole[: len(whole) // 2],
            "all but the end": whole[:-1],
        }[content]
    )
    with pytest.raises(ValueError, match=rf"a\{suffix}' is not a readable .*copy or write it again"):
        list(reader("a", [DataFile(str(path))], ReadOptions()).blocks())


@slow_fixtures
@given(format_=st.sampled_from(["npz", "compressed npz"]), data=st.data())
def test_a_changed_byte_of_an_archive_is_noticed_or_changes_nothing(
    tmp_path: Path, format_: str, data: st.DataObject
) -> None:
    reader, suffix, write = FORMATS[format_]
    columns = d4rl([5, 4])
    path = write(tmp_path / f"a{suffix}", columns)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        rows = joined(list(reader("a", [DataFile(str(path))], ReadOptions()).blocks()))
    except ValueError as err:
        assert "a.npz" in str(err)  # noqa: PT017
        return
    np.testing.assert_array_equal(rows["actions"], columns["actions"])
    np.testing.assert_array_equal(rows["rewards"], columns["rewards"])


@pytest.mark.parametrize("format_", ["npz", "compressed npz"])
def test_a_changed_number_that_unpacks_well_fails_the_checksum(tmp_path: Path, format_: str) -> None:
    reader, suffix, write = FORMATS[format_]
    path = write(tmp_path / f"a{suffix}", d4rl([20_000]))
    content = bytearray(path.read_bytes())
    # Random numbers do not compress well, so that most bits of the file stand for themselves.
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz' is not a readable"):
        list(reader("a", [DataFile(str(path))], ReadOptions()).blocks())


def test_an_archive_that_claims_more_rows_than_it_has_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", without(d4rl([3]), "rewards"))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("rewards.npy", header.getvalue() + b"\0" * 12)
    with pytest.raises(
        ValueError, match=r"a\.npz' is not a readable .*`rewards\.npy` should hold 4000000000000000 bytes"
    ):
        NpzReader("a", [DataFile(str(path))], ReadOptions())


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    for reader in (Hdf5Reader, NpzReader):
        with pytest.raises(FileNotFoundError, match="gone"):
            reader("a", [DataFile(str(tmp_path / "gone"))], ReadOptions())


def test_without_h5py_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_hdf5(tmp_path / "a.hdf5", d4rl([3]))
    original = builtins.__import__

    def without_h5py(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "h5py":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_h5py)
    with pytest.raises(ImportError, match=r'pip install "rllib-calql\[hdf5\]"'):
        Hdf5Reader("a", [DataFile(str(path))], ReadOptions())


@pytest.mark.parametrize("format_", ["hdf5", "npz", "parquet"])
def test_a_next_observation_that_the_type_of_observations_cannot_hold_is_refused(format_: str, tmp_path: Path) -> None:
    columns = d4rl([3])
    columns["observations"] = np.arange(9, dtype=np.int16).reshape(3, 3)
    columns["next_observations"] = columns["observations"].astype(np.int64) + 3
    columns["next_observations"][2, 1] = 70_000  # 4,464 as int16.
    reader: EpisodeReader
    if format_ == "parquet":
        table = pa.table({name: list(column) for name, column in columns.items()})
        pq.write_table(table, tmp_path / "a.parquet")
        (reader,) = open_input(str(tmp_path))
    else:
        reader = open_written(format_, tmp_path, columns)
    with pytest.raises(ValueError, match=r"`next_observations` holds 70000 in row 2 of .*, which int16.*in one type"):
        list(reader.blocks())
    columns["next_observations"][2, 1] = 10
    (block,) = open_written("npz", tmp_path, columns).blocks()
    np.testing.assert_array_equal(np.asarray(block.final_observations), [[9, 10, 11]])
