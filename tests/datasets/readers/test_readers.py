"""Readers give back whole episodes exactly as they were stored, and refuse data that are not whole episodes."""

import gzip
import importlib
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from pyarrow import fs
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.offline.offline_env_runner import OfflineSingleAgentEnvRunner

from rllib_calql.datasets import ReadOptions, open_input
from rllib_calql.datasets.episodes.files import DataFile
from rllib_calql.datasets.episodes.reader import CUT_AT_JUMP, CUT_AT_LENGTH, DROPPED_STEPS, REPEATED, TRUNCATED
from rllib_calql.datasets.generated import catalog
from rllib_calql.datasets.readers.rllib_recorded import drop_repeated_writes

Rows = dict[str, list[Any]]


def episode_rows(id_: Any, length: int, *, terminated: bool = True, seed: int = 0) -> Rows:
    """A random episode of 3 observation and 2 action dimensions as Parquet columns, one list entry per step."""
    rng = np.random.default_rng([seed, length])
    obs = rng.standard_normal((length + 1, 3)).astype(np.float32)
    return {
        "eps_id": [id_] * length,
        "t": list(range(length)),
        "obs": list(obs[:-1]),
        "actions": list(rng.uniform(-1, 1, (length, 2)).astype(np.float32)),
        "rewards": rng.standard_normal(length).tolist(),
        "new_obs": list(obs[1:]),
        "terminateds": [False] * (length - 1) + [terminated],
        "truncateds": [False] * (length - 1) + [not terminated],
    }


def joined(*parts: Rows) -> Rows:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def reordered(rows: Rows, order: Sequence[int]) -> Rows:
    return {name: [column[i] for i in order] for name, column in rows.items()}


def without(rows: Rows, *names: str) -> Rows:
    return {name: column for name, column in rows.items() if name not in names}


def write(file: Path, rows: Rows, **kwargs: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: pa.array([value.tolist() for value in column], pa.list_(pa.from_numpy_dtype(column[0].dtype)))
        if isinstance(column[0], np.ndarray)
        else pa.array(column)
        for name, column in rows.items()
    }
    pq.write_table(pa.table(arrays), file, **kwargs)
    return file


def data_file(file: Path, rows: Rows) -> DataFile:
    return DataFile(str(write(file, rows)))


def read(input_: Any) -> list[SingleAgentEpisode]:
    return [episode for reader in open_input(input_) for episode in reader]


def assert_holds(episode: SingleAgentEpisode, rows: Rows) -> None:
    """The episode is done, NumPy'ized, and bit for bit what the rows say."""
    assert episode.is_numpy
    assert episode.is_done
    assert episode.id_ == str(rows["eps_id"][0])
    obs = np.stack([*rows["obs"], rows["new_obs"][-1]])
    for values, expected in [
        (episode.get_observations(), obs),
        (episode.get_actions(), np.stack(rows["actions"])),
        (episode.get_rewards(), np.array(rows["rewards"])),
    ]:
        np.testing.assert_array_equal(values, expected)
        assert values.dtype == expected.dtype
    assert (episode.is_terminated, episode.is_truncated) == (rows["terminateds"][-1], rows["truncateds"][-1])


def test_episodes_written_one_after_another_are_read_back(tmp_path: Path) -> None:
    episodes = [episode_rows("b", 3), episode_rows("a", 1, terminated=False), episode_rows("c", 5)]
    file = write(tmp_path / "rows.parquet", joined(*episodes))
    for input_ in (file, str(file), [file], tmp_path):
        for episode, rows in zip(read(input_), episodes, strict=True):
            assert_holds(episode, rows)


def test_episodes_longer_and_shorter_than_a_read_block_are_read_back(tmp_path: Path) -> None:
    lengths = [70_000, 1, 2, 40_000, 3]
    episodes = [episode_rows(i, length, terminated=i % 2 == 0) for i, length in enumerate(lengths)]
    file = write(tmp_path / "rows.parquet", joined(*episodes), row_group_size=30_000)
    for episode, rows in zip(read(file), episodes, strict=True):
        assert_holds(episode, rows)


@pytest.mark.parametrize("names", [(), ("t",)], ids=["with t", "without t"])
def test_rows_of_different_episodes_may_alternate(tmp_path: Path, names: tuple[str, ...]) -> None:
    episodes = [without(episode_rows(i, 4, seed=i), *names) for i in range(3)]
    # Row 0 of every episode, then row 1 of every episode, ...
    order = [episode * 4 + row for row in range(4) for episode in range(3)]
    file = write(tmp_path / "rows.parquet", reordered(joined(*episodes), order))
    for episode, rows in zip(read(file), episodes, strict=True):
        assert_holds(episode, rows)


def test_files_follow_each_other_in_natural_order(tmp_path: Path) -> None:
    rows = without(episode_rows(7, 12), "t")
    for part in range(12):
        write(tmp_path / f"part-{part}.parquet", reordered(rows, [part]))
    (tmp_path / "_SUCCESS").touch()
    (episode,) = read(tmp_path)
    assert_holds(episode, rows)


def test_a_file_without_rows_beside_others_changes_nothing(tmp_path: Path) -> None:
    rows = episode_rows(0, 3)
    file = write(tmp_path / "part-1.parquet", rows)
    pq.write_table(pq.read_table(file).slice(0, 0), tmp_path / "part-0.parquet")
    (episode,) = read(tmp_path)
    assert_holds(episode, rows)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), data=st.data())
def test_any_shuffle_of_numbered_rows_is_read_back(tmp_path: Path, lengths: list[int], data: st.DataObject) -> None:
    episodes = [episode_rows(i, n, terminated=i % 2 == 1, seed=i) for i, n in enumerate(lengths)]
    rows = joined(*episodes)
    order = data.draw(st.permutations(range(sum(lengths))))
    file = write(tmp_path / "rows.parquet", reordered(rows, order))
    by_id = {episode.id_: episode for episode in read(file)}
    assert len(by_id) == len(lengths)
    for i, expected in enumerate(episodes):
        assert_holds(by_id[str(i)], expected)


def test_reading_twice_gives_the_same_episodes(tmp_path: Path) -> None:
    rows = episode_rows("a", 3)
    (reader,) = open_input(write(tmp_path / "rows.parquet", rows))
    for _ in range(2):
        (episode,) = reader
        assert_holds(episode, rows)


def test_episodes_own_their_arrays(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", joined(episode_rows("a", 3), episode_rows("b", 3)))
    for episode in read(file):
        for values in (episode.observations.data, episode.actions.data, episode.rewards.data):
            assert values.base is None  # Not a view, which would keep a whole block of rows alive.
            assert values.flags.writeable


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list", "arrow_tensor", "float64"])
def test_every_way_to_store_vectors_gives_the_same_arrays(tmp_path: Path, kind: str) -> None:
    rows = episode_rows("a", 4)
    table = pq.read_table(write(tmp_path / "rows.parquet", rows))
    values = np.stack(rows["obs"]), np.stack(rows["new_obs"])
    for name, array in zip(("obs", "new_obs"), values, strict=True):
        flat = pa.array(array.ravel())
        column = {
            "list": lambda flat=flat: pa.ListArray.from_arrays(pa.array([0, 3, 6, 9, 12], pa.int32()), flat),
            "large_list": lambda flat=flat: pa.LargeListArray.from_arrays(pa.array([0, 3, 6, 9, 12]), flat),
            "fixed_size_list": lambda flat=flat: pa.FixedSizeListArray.from_arrays(flat, 3),
            "arrow_tensor": lambda array=array: pa.FixedShapeTensorArray.from_numpy_ndarray(array),
            "float64": lambda array=array: pa.array(array.astype(np.float64).tolist()),
        }[kind]()
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, tmp_path / "rows.parquet")
    (episode,) = read(tmp_path)
    assert episode.get_observations().dtype == (np.float64 if kind == "float64" else np.float32)
    np.testing.assert_array_equal(episode.get_observations(), np.concatenate([values[0], values[1][-1:]]))


def test_structs_become_dict_observations_and_nested_lists_become_matrices(tmp_path: Path) -> None:
    image = np.arange(3 * 2 * 2, dtype=np.float64).reshape(3, 2, 2)
    goal = np.array([1.0, 2.0, 3.0])
    obs = [{"image": image[i].tolist(), "goal": goal[i]} for i in range(3)]
    table = pa.table({**without(episode_rows("a", 2), "obs", "new_obs", "actions"), "actions": [0.5, -0.5]})
    table = table.append_column("obs", pa.array(obs[:-1])).append_column("new_obs", pa.array(obs[1:]))
    pq.write_table(table, tmp_path / "rows.parquet")
    (episode,) = read(tmp_path)
    np.testing.assert_array_equal(episode.get_observations()["image"], image)
    np.testing.assert_array_equal(episode.get_observations(slice(1, 3))["goal"], goal[1:])
    np.testing.assert_array_equal(episode.get_actions(), [0.5, -0.5])


def test_other_columns_of_numbers_become_extra_model_outputs(tmp_path: Path) -> None:
    rows = episode_rows("a", 3) | {"action_logp": [-1.0, -2.0, -3.0], "comment": ["x", "y", "z"]}
    (episode,) = read(write(tmp_path / "rows.parquet", rows))
    assert set(episode.extra_model_outputs) == {"action_logp"}
    np.testing.assert_array_equal(episode.get_extra_model_outputs("action_logp"), [-1.0, -2.0, -3.0])


def test_info_of_rows_is_known_before_reading(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", joined(episode_rows("a", 3), episode_rows("b", 4)))
    (reader,) = open_input(file)
    assert reader.info.name == str(file)
    assert reader.info.actions == "environment"
    assert reader.info.num_transitions == 7


def changed(rows: Rows, name: str, row: int, value: Any) -> Rows:
    column = list(rows[name])
    column[row] = value
    return rows | {name: column}


GOOD = joined(episode_rows("first", 3), episode_rows("second", 4, terminated=False))
NAN_VECTOR = np.array([0.0, np.nan, 0.0], np.float32)

BAD_ROWS = {
    "nan in obs": (changed(GOOD, "obs", 4, NAN_VECTOR), r"`obs` holds nan in episode 'second', row 4 of '.*rows\.parq"),
    "nan in the final obs": (changed(GOOD, "new_obs", 6, NAN_VECTOR), "`new_obs` holds nan in episode 'second', row 6"),
    "inf in actions": (
        changed(GOOD, "actions", 1, np.array([0, -np.inf], np.float32)),
        "`actions` holds -inf in episode 'first', row 1 of",
    ),
    "nan in rewards": (changed(GOOD, "rewards", 5, float("nan")), "`rewards` holds nan in episode 'second', row 5 of"),
    "swapped rows": (
        without(reordered(GOOD, [0, 1, 2, 3, 5, 4, 6]), "t"),
        "Rows of episode 'second' are out of order or missing: `new_obs` in row 3 .* follows in row 4",
    ),
    "last row in the middle": (
        without(reordered(GOOD, [0, 2, 1, 3, 4, 5, 6]), "t"),
        "Rows of episode 'first' are out of order or missing",
    ),
    "lost row": (
        without(reordered(GOOD, [0, 1, 2, 3, 4, 6]), "t"),
        "Rows of episode 'second' are out of order or missing",
    ),
    "lost numbered row": (
        reordered(GOOD, [0, 1, 2, 3, 4, 6]),
        r"Rows of episode 'second' are out of order or missing: after `t` 1 \(row 4 .*comes 3 \(row 5",
    ),
    "repeated numbered row": (
        reordered(GOOD, [0, 1, 1, 2, 3, 4, 5, 6]),
        r"Rows of episode 'first' are out of order or missing: after `t` 1 .*comes 1",
    ),
    "no end": (
        changed(GOOD, "truncateds", 6, False),
        r"Episode 'second' ends neither terminated nor truncated .*row 6.*return-to-go is unknown; drop it or mark",
    ),
    "end in the middle": (
        changed(GOOD, "terminateds", 1, True),
        "Episode 'first' goes on after its end: `terminateds` is true in row 1",
    ),
    "two episodes under one id": (
        without(GOOD | {"eps_id": ["same"] * 7}, "t"),
        "Episode 'same' goes on after its end: `terminateds` is true in row 2 .*its own `eps_id`",
    ),
    "ragged obs": (changed(GOOD, "obs", 4, np.zeros(2, np.float32)), "`obs` has 2 values in row 4 .* and 3 in row 0"),
    "missing action": (changed(GOOD, "actions", 2, None), "`actions` has no value in row 2"),
    "missing id": (changed(GOOD, "eps_id", 2, None), "`eps_id` has no value in row 2"),
    "two rewards in a row": (
        GOOD | {"rewards": [np.array([r, r]) for r in GOOD["rewards"]]},
        r"`rewards` must hold one number per row, got arrays of shape \(2,\)",
    ),
    "text as actions": (
        GOOD | {"actions": ["left"] * 7},
        "`actions` must hold numbers or lists of numbers, got string",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_that_are_not_whole_finite_episodes_are_refused(tmp_path: Path, case: str) -> None:
    rows, message = BAD_ROWS[case]
    first = next(value for value in rows["actions"] if value is not None)
    columns = {
        name: pa.array([value.tolist() if isinstance(value, np.ndarray) else value for value in column])
        for name, column in rows.items()
    }
    if isinstance(first, np.ndarray):
        columns["obs"] = columns["obs"].cast(pa.list_(pa.float32()))
        columns["new_obs"] = columns["new_obs"].cast(pa.list_(pa.float32()))
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_an_error_in_interleaved_files_names_the_row_of_the_right_file(tmp_path: Path) -> None:
    rows = joined(episode_rows("a", 3), changed(episode_rows("b", 3), "rewards", 1, np.nan))
    write(tmp_path / "part-1.parquet", reordered(rows, [0, 3]))
    write(tmp_path / "part-2.parquet", reordered(rows, [2, 1, 5, 4]))
    with pytest.raises(ValueError, match=r"`rewards` holds nan in episode 'b', row 3 of '.*part-2\.parquet'"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["obs", "actions", "rewards", "terminateds"])
def test_a_missing_column_is_named_with_the_columns_present(tmp_path: Path, name: str) -> None:
    write(tmp_path / "rows.parquet", without(GOOD, name))
    with pytest.raises(ValueError, match=rf"rows\.parquet' has no column `{name}`; its columns are .*`eps_id`"):
        open_input(tmp_path)


def test_files_of_different_observation_size_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "part-1.parquet", episode_rows("a", 3))
    other = episode_rows("b", 3)
    write(tmp_path / "part-2.parquet", other | {name: [v[:2] for v in other[name]] for name in ("obs", "new_obs")})
    with pytest.raises(ValueError, match=r"`obs` has shape \(2,\) from row 0 of '.*part-2.* and \(3,\) before"):
        read(tmp_path)


def test_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "part-1.parquet", episode_rows("a", 3))
    write(tmp_path / "part-2.parquet", without(episode_rows("b", 3), "t"))
    with pytest.raises(ValueError, match=r"part-2\.parquet' has no column `t`"):
        open_input(tmp_path)


def test_a_missing_path_names_close_matches(tmp_path: Path) -> None:
    write(tmp_path / "expert-rows" / "0.parquet", GOOD)
    with pytest.raises(FileNotFoundError, match=r"expert-row'.*Did you mean 'expert-rows'\?"):
        open_input(tmp_path / "expert-row")


def test_a_relative_path_and_a_pattern_are_told_where_nothing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"is looked for in the current folder, '{tmp_path}'\.$"):
        open_input("logs")
    with pytest.raises(FileNotFoundError, match=r"folder\. Patterns are not resolved: name the folder, or a list"):
        open_input(tmp_path / "*.csv")


def test_a_missing_parent_folder_is_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_input(tmp_path / "nowhere" / "rows.parquet")


def test_empty_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder' is empty: there is no `\*\.parquet`.* file"):
        open_input(tmp_path / "folder")
    file = write(tmp_path / "rows.parquet", GOOD)
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(ValueError, match="is empty: its Parquet files have no rows"):
        open_input(file)
    with pytest.raises(ValueError, match="`input_` is an empty list"):
        open_input([])


@pytest.mark.parametrize("suffix", [".hdf5", ".npz", ".parquet", ".csv"])
def test_a_file_of_another_format_than_its_name_says_is_told_apart_from_a_damaged_one(
    suffix: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", obs=np.zeros(300))
    np.save(tmp_path / "a.npy", np.zeros(300))
    pq.write_table(pa.table({"obs": np.zeros(300)}), tmp_path / "a.parquet")
    with h5py.File(tmp_path / "a.hdf5", "w") as h5_file:
        h5_file["obs"] = np.zeros(300)
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"obs\n" * 300))
    file = tmp_path / "logs" / f"log{suffix}"
    file.parent.mkdir()
    (file.parent / "columns.yaml").write_text("obs: obs\nactions: obs\nrewards: obs\n")
    for other in (".hdf5", ".npz", ".parquet", ".npy", ".gz"):
        if other != suffix:
            shutil.copy((tmp_path / "a").with_suffix(other), file)
            remedy = "unpack it first" if other == ".gz" else rf"name it `\*{other}`"
            with pytest.raises(ValueError, match=rf"log{suffix}' is not .* It begins as .* files do; {remedy}\.$"):
                open_input(file)


def test_digits_that_are_no_ascii_are_text_in_names_of_files(tmp_path: Path) -> None:
    for name in ("m\u00b2", "\u00b2", "\u0663", "2", "10"):
        (tmp_path / "logs" / name).mkdir(parents=True)
        write(tmp_path / "logs" / name / "rows.parquet", GOOD | {"eps_id": [f"{name}-{id_}" for id_ in GOOD["eps_id"]]})
    (reader,) = open_input(tmp_path / "logs")
    names = list(dict.fromkeys(episode.id_.split("-")[0] for episode in reader))
    assert names == ["2", "10", "m\u00b2", "\u00b2", "\u0663"]


def test_observations_without_numbers_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", without(GOOD, "new_obs") | {"obs": [obs[:0] for obs in GOOD["obs"]]})
    with pytest.raises(ValueError, match=r"`obs` has rows of shape \(0,\) in row 0 of .*must hold at least one number"):
        list(open_input(file)[0])


def test_other_formats_and_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.hdf5").write_bytes(b"\x89HDF not really")
    with pytest.raises(ValueError, match=r"data\.hdf5' is not a readable HDF5 file"):
        open_input(tmp_path / "data.hdf5")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt' is of no format that can be read; `input_` takes `minari:.*npz"):
        open_input(tmp_path / "notes.txt")
    with pytest.raises(TypeError, match=r"`input_` must be .* got int"):
        open_input([3])
    with pytest.raises(ValueError, match=r"`input_` 'nosuch://bucket/rows': .*`s3://`"):
        open_input("nosuch://bucket/rows")


# --- Columns under other names, missing ones, ignored ones ------------------------------------------------------------


def test_columns_may_have_the_names_of_other_projects(tmp_path: Path) -> None:
    rows = episode_rows("a", 3)
    names = {"obs": "observations", "new_obs": "next_observations", "rewards": "reward", "terminateds": "terminals"}
    (episode,) = read(write(tmp_path / "rows.parquet", {names.get(name, name): rows[name] for name in rows}))
    assert_holds(episode, rows)


def test_one_column_under_two_names_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet", GOOD | {"terminals": GOOD["terminateds"]})
    with pytest.raises(ValueError, match=r"rows\.parquet' has the columns `terminateds`, `terminals`, which mean the"):
        open_input(tmp_path)


def test_dones_alone_are_refused_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet", without(GOOD, "terminateds") | {"dones": GOOD["terminateds"]})
    with pytest.raises(ValueError, match=r"has no column `terminateds`.*`dones` does not tell terminations"):
        open_input(tmp_path)


def test_only_wanted_columns_are_read_and_the_others_are_listed(tmp_path: Path) -> None:
    rows = episode_rows("a", 3) | {"value": [1.0, 2.0, 3.0], "other": [1, 2, 3], "comment": ["x", "y", "z"]}
    write(tmp_path / "rows.parquet", rows)
    (reader,) = open_input(tmp_path, ReadOptions(columns=frozenset({"value"})))
    (block,) = reader.blocks()
    assert list(block.extra_model_outputs) == ["value"]
    assert reader.info.ignored_columns == ("other", "comment (string)")


def test_without_truncateds_only_terminations_end_episodes(tmp_path: Path) -> None:
    rows = joined(episode_rows("a", 3), episode_rows("b", 2))
    first, second = read(write(tmp_path / "rows.parquet", without(rows, "truncateds")))
    assert_holds(first, episode_rows("a", 3))
    assert_holds(second, episode_rows("b", 2))


@pytest.mark.parametrize(("rule", "num_steps"), [("drop_step", 3), ("repeat", 4)])
def test_without_next_observations_the_last_step_of_a_cut_episode_follows_the_option(
    tmp_path: Path, rule: Any, num_steps: int
) -> None:
    terminated, cut = episode_rows("a", 3), episode_rows("b", 4, terminated=False)
    file = write(tmp_path / "rows.parquet", without(joined(terminated, cut), "new_obs"))
    (reader,) = open_input(file, ReadOptions(missing_final_observation=rule))
    first, second = reader
    np.testing.assert_array_equal(first.get_observations(), [*terminated["obs"], terminated["obs"][-1]])
    np.testing.assert_array_equal(second.get_observations(), [*cut["obs"], cut["obs"][-1]][: num_steps + 1])
    np.testing.assert_array_equal(second.get_rewards(), cut["rewards"][:num_steps])
    assert (first.is_terminated, second.is_truncated) == (True, True)
    assert reader.remarks[DROPPED_STEPS] == (rule == "drop_step")
    assert reader.remarks[REPEATED] == (1 if rule == "drop_step" else 2)


def test_next_observations_of_another_kind_of_number_are_refused(tmp_path: Path) -> None:
    rows = GOOD | {name: [value.astype(int) for value in GOOD[name]] for name in ("obs", "actions")}
    write(tmp_path / "rows.parquet", rows)
    with pytest.raises(ValueError, match=r"`obs` holds int64 and `new_obs` holds float32 in row 0 of .*one type"):
        read(tmp_path)


@pytest.mark.parametrize("flags", [[0, 0, 1], [0.0, 0.0, 1.0]])
def test_flags_may_be_numbers(tmp_path: Path, flags: list[float]) -> None:
    (episode,) = read(write(tmp_path / "rows.parquet", episode_rows("a", 3) | {"terminateds": flags}))
    assert episode.is_terminated


def test_flags_that_are_neither_true_nor_false_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet", episode_rows("a", 3) | {"terminateds": [0.0, 0.5, 1.0]})
    with pytest.raises(ValueError, match=r"`terminateds`.*0\.5.*row 1 of"):
        read(tmp_path)


# --- Rows without ids -------------------------------------------------------------------------------------------------


def slowly_divided(rows: Rows, max_steps: int | None) -> list[tuple[int, int, bool, bool]]:
    """(first row, stop row, terminated, truncated) of every episode, found row by row."""
    episodes = []
    start = 0
    for i in range(len(rows["rewards"])):
        is_last = i + 1 == len(rows["rewards"])
        done = rows["terminateds"][i] or rows["truncateds"][i]
        jump = not is_last and not np.array_equal(rows["new_obs"][i], rows["obs"][i + 1])
        if done or jump or i + 1 - start == max_steps or is_last:
            episodes.append((start, i + 1, rows["terminateds"][i], not rows["terminateds"][i]))
            start = i + 1
    return episodes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.booleans()), min_size=1, max_size=6),
    max_steps=st.none() | st.integers(1, 5),
    row_group_size=st.integers(1, 7),
    cut=st.integers(0, 6),
)
def test_rows_without_ids_are_divided_as_a_plain_loop_divides_them(
    tmp_path: Path, lengths: list[Any], max_steps: int | None, row_group_size: int, cut: int
) -> None:
    parts = [
        episode_rows(i, length, terminated=terminated, seed=i) for i, (length, terminated, _) in enumerate(lengths)
    ]
    for part, (_, _, has_flag) in zip(parts, lengths, strict=True):
        if not has_flag:
            part["truncateds"][-1] = False
    rows = without(joined(*parts), "eps_id", "t")
    # An episode may go on in the next file.
    num_rows = len(rows["rewards"])
    cut = min(cut, num_rows)
    for number, part in enumerate([range(cut), range(cut, num_rows)]):
        file = tmp_path / f"part-{number}.parquet"
        file.unlink(missing_ok=True)
        if part:
            write(file, reordered(rows, part), row_group_size=row_group_size)
    options = ReadOptions(max_episode_steps=max_steps, unfinished_episodes="truncate")
    (reader,) = open_input(tmp_path, options)
    expected = slowly_divided(rows, max_steps)
    for episode, (start, stop, terminated, truncated) in zip(reader, expected, strict=True):
        part = reordered(rows, range(start, stop))
        np.testing.assert_array_equal(episode.get_observations(), [*part["obs"], part["new_obs"][-1]])
        np.testing.assert_array_equal(episode.get_rewards(), part["rewards"])
        assert (episode.is_terminated, episode.is_truncated) == (terminated, truncated)
    num_flagged = sum(rows["terminateds"]) + sum(rows["truncateds"])
    assert sum(reader.remarks[name] for name in (CUT_AT_JUMP, CUT_AT_LENGTH, TRUNCATED)) == len(expected) - num_flagged


def test_many_rows_without_ids_are_divided_across_read_blocks(tmp_path: Path) -> None:
    parts = [episode_rows(i, 9_000 + i, seed=i, terminated=i % 3 == 0) for i in range(20)]
    rows = without(joined(*parts), "eps_id", "t")
    table = pa.table(
        {
            name: pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(column)), len(column[0]))
            if isinstance(column[0], np.ndarray)
            else pa.array(column)
            for name, column in rows.items()
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    (reader,) = open_input(tmp_path)
    blocks = list(reader.blocks())
    assert len(blocks) > 1
    assert [length for block in blocks for length in block.lengths] == [9_000 + i for i in range(20)]
    np.testing.assert_array_equal(np.concatenate([block.rewards for block in blocks]), rows["rewards"])


def test_rows_without_ids_and_without_an_end_name_the_settings_that_help(tmp_path: Path) -> None:
    rows = without(changed(GOOD, "truncateds", 6, False), "eps_id", "t")
    message = "Episode '1' ends neither .*row 6 of.*`max_episode_steps_in_data`.*`unfinished_episodes="
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "rows.parquet", rows))


# --- Several files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("t",)], ids=["with t", "without t"])
def test_an_id_that_two_files_use_is_named_with_both_rows(tmp_path: Path, names: tuple[str, ...]) -> None:
    write(tmp_path / "part-1.parquet", without(episode_rows("same", 3), *names))
    write(tmp_path / "part-2.parquet", without(episode_rows("same", 4, seed=1), *names))
    message = r"Two files use the episode id 'same'.*row [02] of '.*part-1.* and row 0 of '.*part-2.*give every episode"
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_files_that_store_a_column_in_different_types_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "part-1.parquet", episode_rows("a", 3))
    other = episode_rows("b", 3)
    write(tmp_path / "part-2.parquet", other | {"actions": [value.astype(np.float64) for value in other["actions"]]})
    message = r"`actions` holds float in '.*part-1\.parquet' and double in '.*part-2\.parquet'; store it in one type"
    with pytest.raises(ValueError, match=message):
        open_input(tmp_path)


def test_a_column_that_only_a_later_file_has_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "part-1.parquet", episode_rows("a", 3))
    write(tmp_path / "part-2.parquet", episode_rows("b", 3) | {"value": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match=r"part-1\.parquet' has no column `value`, and '.*part-2\.parquet' has one"):
        open_input(tmp_path)
    assert len(read_with(tmp_path, ReadOptions(columns=frozenset()))) == 2  # Nobody wants it.


def test_a_folder_of_several_formats_is_refused_with_one_file_of_each(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", GOOD)
    (tmp_path / "b.npz").touch()
    with pytest.raises(ValueError, match=r"several formats: Parquet \('.*a\.parquet'\), NumPy \('.*b\.npz'\); name"):
        open_input(tmp_path)


def test_a_file_of_an_unknown_suffix_is_recognised_by_its_content(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", episode_rows("a", 3)).rename(tmp_path / "rows.data")
    (episode,) = read(file)
    assert_holds(episode, episode_rows("a", 3))


def test_any_file_system_of_pyarrow_or_fsspec_can_be_read(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    rows = episode_rows("a", 3)
    content = write(tmp_path / "folder" / "rows.parquet", rows).read_bytes()
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/folder/rows.parquet", content)
    for input_, filesystem in [
        ("folder", fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())),
        ("memory://bucket/folder", memory),
        (f"file://{tmp_path}/folder", None),
    ]:
        (reader,) = open_input(input_, ReadOptions(filesystem=filesystem))
        (episode,) = reader
        assert_holds(episode, rows)
        assert reader.fingerprint() == open_input(tmp_path)[0].fingerprint()
    with pytest.raises(TypeError, match=r"`input_filesystem` must be a `pyarrow\.fs\.FileSystem` or an fsspec"):
        open_input("folder", ReadOptions(filesystem=3))


def test_the_fingerprint_follows_the_content_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", episode_rows("a", 3))
    (reader,) = open_input(file)
    before = reader.fingerprint()
    file.touch()
    assert reader.fingerprint() == before
    write(file, episode_rows("a", 3, seed=1))
    assert reader.fingerprint() != before


# --- Damaged files ----------------------------------------------------------------------------------------------------


def read_with(input_: Any, options: ReadOptions) -> list[SingleAgentEpisode]:
    return [episode for reader in open_input(input_, options) for episode in reader]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.95, 0.999])
def test_a_truncated_parquet_file_is_refused_by_name(tmp_path: Path, share: float) -> None:
    file = write(tmp_path / "rows.parquet", GOOD)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ValueError, match=r"rows\.parquet' is not a readable Parquet file \(.*\); copy or write it again"
    ):
        read(file)


@settings(max_examples=150, deadline=2_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_ends_in_the_same_shapes_or_a_named_error(tmp_path: Path, data: st.DataObject) -> None:
    file = write(tmp_path / "rows.parquet", GOOD, write_page_checksum=True)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        episodes = read(file)
    except ValueError as err:
        if isinstance(err, pa.ArrowException | UnicodeError):
            raise
        return
    # The footer has no checksum: with a damaged name there is no column of next observations, and a cut episode's last
    # row only gives its final observation.
    lengths = (3, 4) if "new_obs" in pq.read_schema(file).names else (3, 3)
    for episode, length in zip(episodes, lengths, strict=True):
        assert len(episode) == length
        assert np.isfinite(episode.get_rewards()).all()


def test_a_page_whose_checksum_is_wrong_is_refused(tmp_path: Path) -> None:
    rewards = np.arange(1000, dtype=np.float64)
    rows = episode_rows("a", 1000) | {"rewards": rewards.tolist()}
    kwargs = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    file = write(tmp_path / "rows.parquet", rows, **kwargs)
    content = file.read_bytes()
    place = content.index(rewards[500:502].tobytes())
    file.write_bytes(content[:place] + rewards[7:8].tobytes() + content[place + 8 :])
    with pytest.raises(ValueError, match=r"rows\.parquet' is not a readable Parquet file .*CRC"):
        read(file)


# --- Minari -----------------------------------------------------------------------------------------------------------

DICT_SPACE = gym.spaces.Dict(
    {"achieved_goal": gym.spaces.Box(-9, 9, (2,), np.float64), "observation": gym.spaces.Box(-9, 9, (3,), np.float32)}
)
ACTION_SPACE = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def minari_episode(length: int, *, terminated: bool, seed: int = 0) -> EpisodeBuffer:
    DICT_SPACE.seed(seed)
    rng = np.random.default_rng(seed)
    samples = [DICT_SPACE.sample() for _ in range(length + 1)]
    return EpisodeBuffer(
        observations={name: np.stack([sample[name] for sample in samples]) for name in DICT_SPACE.spaces},
        actions=rng.uniform(-2, 2, (length, 1)).astype(np.float32),
        rewards=rng.standard_normal(length),
        terminations=np.arange(length) == (length - 1 if terminated else -1),
        truncations=np.arange(length) == (-1 if terminated else length - 1),
    )


def create_minari(dataset_id: str, episodes: list[EpisodeBuffer]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an author, a permalink, ...
        minari.create_dataset_from_buffers(
            dataset_id,
            episodes,
            observation_space=DICT_SPACE,
            action_space=ACTION_SPACE,
        )


def test_minari_episodes_are_read_back_with_nested_observations(minari_root: Path) -> None:
    stored = [minari_episode(3, terminated=True), minari_episode(5, terminated=False, seed=1)]
    create_minari("test/nested-v0", stored)
    minari.load_dataset("test/nested-v0").storage.update_metadata({"ref_min_score": -1.5, "ref_max_score": 2.5})
    (reader,) = open_input("minari:test/nested-v0")
    assert reader.info.name == "minari:test/nested-v0"
    assert reader.info.observation_space == DICT_SPACE
    assert reader.info.action_space == ACTION_SPACE
    assert reader.info.actions == "environment"
    assert reader.info.num_transitions == 8
    assert reader.info.reference_scores == (-1.5, 2.5)
    for episode, expected in zip(reader, stored, strict=True):
        assert episode.is_numpy
        assert len(episode) == len(expected.rewards)
        for name, values in expected.observations.items():
            np.testing.assert_array_equal(episode.get_observations()[name], values)
            np.testing.assert_array_equal(episode.get_observations(slice(1, 3))[name], values[1:3])
            np.testing.assert_array_equal(episode.get_observations(-1)[name], values[-1])
            assert episode.get_observations()[name].dtype == values.dtype
        np.testing.assert_array_equal(episode.get_actions(), expected.actions)
        np.testing.assert_array_equal(episode.get_rewards(), expected.rewards)
        assert episode.is_terminated == expected.terminations[-1]
        assert episode.is_truncated == expected.truncations[-1]


def test_a_missing_minari_dataset_names_close_matches_and_the_download(minari_root: Path) -> None:
    create_minari("test/nested-v0", [minari_episode(3, terminated=True)])
    message = r"'test/nestde-v0'.*Did you mean 'test/nested-v0'\? .*minari download test/nestde-v0"
    with pytest.raises(FileNotFoundError, match=message):
        open_input("minari:test/nestde-v0")


def test_a_misspelt_generated_dataset_names_the_generated_one(minari_root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*'rllib-calql/pointmaze-umaze-play-v0'"):
        open_input("minari:rllib-calql/pointmaze-umaze-plya-v0")


def test_a_generated_dataset_is_made_before_it_is_read(minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(dataset_id: str) -> None:
        create_minari(dataset_id, [minari_episode(3, terminated=True)])

    monkeypatch.setattr(catalog, "ensure_dataset", make)
    (episode,) = read("minari:rllib-calql/pointmaze-umaze-play-v0")
    assert len(episode) == 3


def test_an_unfinished_minari_episode_is_refused(minari_root: Path) -> None:
    cut = replace(minari_episode(3, terminated=True), terminations=np.zeros(3, dtype=bool))
    create_minari("test/cut-v0", [minari_episode(4, terminated=True), cut])
    with pytest.raises(ValueError, match=r"Episode '1' ends neither terminated nor truncated .*minari:test/cut-v0"):
        read("minari:test/cut-v0")


def test_infinite_minari_values_are_refused(minari_root: Path) -> None:
    episode = minari_episode(3, terminated=True)
    episode.rewards[1] = np.inf
    create_minari("test/inf-v0", [episode])
    with pytest.raises(ValueError, match="`rewards` holds inf in episode '0', step 1 of 'minari:test/inf-v0'"):
        read("minari:test/inf-v0")


def test_numbers_per_step_among_the_infos_are_read_if_wanted(minari_root: Path) -> None:
    infos = {
        "success": np.arange(4) > 2,  # One entry more than steps: the first is that of the reset.
        "cost": np.array([0.5, 1.5, 2.5]),
        "nested": {"speed": np.arange(8.0).reshape(4, 2)},
        "constants": np.arange(7),
    }
    create_minari("test/infos-v0", [replace(minari_episode(3, terminated=True), infos=infos)])
    (reader,) = open_input("minari:test/infos-v0")
    (episode,) = reader
    outputs = {name: episode.get_extra_model_outputs(name).tolist() for name in episode.extra_model_outputs}
    assert outputs == {
        "success": [False, False, True],
        "cost": [0.5, 1.5, 2.5],
        "nested/speed": [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]],
    }
    assert reader.info.ignored_columns == ("infos/constants",)
    (reader,) = open_input("minari:test/infos-v0", ReadOptions(columns=frozenset()))
    assert next(reader.blocks()).extra_model_outputs == {}
    assert sorted(reader.info.ignored_columns) == [
        "infos/constants",
        "infos/cost",
        "infos/nested/speed",
        "infos/success",
    ]


def test_an_info_that_a_later_episode_lacks_is_named(minari_root: Path) -> None:
    first = replace(minari_episode(3, terminated=True), infos={"cost": np.zeros(3)})
    create_minari("test/infos-v0", [first, minari_episode(2, terminated=True)])
    with pytest.raises(ValueError, match=r"Episode '1' of 'minari:test/infos-v0' has no `cost` for every step"):
        read("minari:test/infos-v0")


@pytest.mark.parametrize("format_", ["hdf5", "arrow"])
def test_all_formats_and_spaces_of_minari_are_read(minari_root: Path, format_: str) -> None:
    space = gym.spaces.Tuple([gym.spaces.Box(-9, 9, (2,), np.float64), gym.spaces.Discrete(9)])
    obs = (np.arange(8.0).reshape(4, 2), np.array([3, 1, 4, 1]))
    episode = replace(minari_episode(3, terminated=True), observations=obs, actions=np.array([2, 0, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "test/tuple-v0",
            [episode],
            observation_space=space,
            action_space=gym.spaces.Discrete(3),
            data_format=format_,
        )
    (read_back,) = read("minari:test/tuple-v0")
    for values, expected in zip(read_back.get_observations(), obs, strict=True):
        np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(read_back.get_actions(), [2, 0, 1])


def test_text_in_minari_observations_is_named(minari_root: Path) -> None:
    space = gym.spaces.Dict({"a": gym.spaces.Box(-9, 9, (2,), np.float64), "instruction": gym.spaces.Text(8)})
    obs = {"a": np.arange(8.0).reshape(4, 2), "instruction": ["go"] * 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "test/text-v0",
            [replace(minari_episode(3, terminated=True), observations=obs)],
            observation_space=space,
            action_space=ACTION_SPACE,
        )
    with pytest.raises(
        ValueError, match=r"'minari:test/text-v0': its observations, part 'instruction', are of the .*Te"
    ):
        read("minari:test/text-v0")


def test_images_in_minari_stay_bytes(minari_root: Path) -> None:
    image = np.tile(np.arange(4, dtype=np.uint8)[:, None, None, None] * 60, (1, 8, 8, 3))
    episode = replace(minari_episode(3, terminated=True), observations=image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "test/image-v0",
            [episode],
            observation_space=gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
            action_space=ACTION_SPACE,
        )
    (read_back,) = read("minari:test/image-v0")
    assert read_back.get_observations().dtype == np.uint8
    np.testing.assert_array_equal(read_back.get_observations(), image)  # Minari's JPEG keeps even surfaces exactly.


def test_damaged_minari_data_are_refused_by_name(minari_root: Path) -> None:
    create_minari("test/damaged-v0", [minari_episode(3, terminated=True), minari_episode(50, terminated=True)])
    (reader,) = open_input("minari:test/damaged-v0")
    before = reader.fingerprint()
    file = minari_root / "test" / "damaged-v0" / "data" / "main_data.hdf5"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert reader.fingerprint() != before
    with pytest.raises(ValueError, match=r"'minari:test/damaged-v0' cannot be read .*damaged: delete the folder"):
        list(reader.blocks())
    (file.parent / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match=r"'test/damaged-v0' cannot be opened .*its files are damaged"):
        open_input("minari:test/damaged-v0")


def test_unfinished_minari_episodes_can_be_cut_or_dropped(minari_root: Path) -> None:
    cut = replace(minari_episode(3, terminated=True), terminations=np.zeros(3, dtype=bool))
    create_minari("test/cut-v0", [minari_episode(4, terminated=True), cut])
    (whole,) = read_with("minari:test/cut-v0", ReadOptions(unfinished_episodes="drop"))
    assert len(whole) == 4
    _, second = read_with("minari:test/cut-v0", ReadOptions(unfinished_episodes="truncate"))
    assert (len(second), second.is_truncated) == (3, True)


def test_without_minari_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r'pip install "rllib-calql\[minari\]"'):
        open_input("minari:test/any-v0")


# --- What RLlib records -----------------------------------------------------------------------------------------------


class DictEnv(gym.Env[dict[str, Any], Any]):
    """Three steps of a counter, as a dict."""

    observation_space = gym.spaces.Dict(
        {"b": gym.spaces.Box(-9, 9, (2,), np.float32), "a": gym.spaces.Box(-9, 9, (1,), np.float32)}
    )
    action_space = ACTION_SPACE

    def __init__(self, config: Any = None) -> None:
        self.t = 0

    def _obs(self) -> dict[str, Any]:
        return {"b": np.array([self.t, 7], np.float32), "a": np.array([-self.t], np.float32)}

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        """Sets the counter to 0."""
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        """Counts up; the reward is the action."""
        self.t += 1
        return self._obs(), float(action[0]), self.t == 3, False, {}


@pytest.fixture
def few_files(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that cuts each write of the recorder into 3 files instead of 200."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "read_op_min_num_blocks", 3)


def recorder(config: Any, output: Path, **offline: Any) -> OfflineSingleAgentEnvRunner:
    config = config.env_runners(num_env_runners=0).offline_data(output=str(output), **offline).debugging(seed=0)
    return OfflineSingleAgentEnvRunner(config=config, worker_index=0)


def whole_episodes(chunks: list[SingleAgentEpisode]) -> dict[str, SingleAgentEpisode]:
    episodes: dict[str, SingleAgentEpisode] = {}
    for chunk in chunks:
        if chunk.id_ in episodes:
            episodes[chunk.id_].concat_episode(chunk)
        else:
            episodes[chunk.id_] = chunk
    return episodes


def assert_same(episode: SingleAgentEpisode, sampled: SingleAgentEpisode) -> None:
    sampled = sampled.to_numpy()
    assert episode.is_numpy
    assert episode.id_ == sampled.id_
    assert (episode.is_terminated, episode.is_truncated) == (sampled.is_terminated, sampled.is_truncated)
    for values, expected in [
        (episode.get_observations(), sampled.get_observations()),
        (episode.get_actions(), sampled.get_actions()),
        (episode.get_rewards(), sampled.get_rewards()),
        (episode.get_extra_model_outputs("action_logp"), sampled.get_extra_model_outputs("action_logp")),
    ]:
        np.testing.assert_array_equal(values, expected)
        assert values.dtype == expected.dtype


def assert_module_actions_of_pendulum(episode: SingleAgentEpisode) -> None:
    """Pendulum's reward is -(angle^2 + 0.1 speed^2 + 0.001 torque^2), with a torque of twice the module action."""
    cos, sin, speed = episode.get_observations(slice(0, len(episode))).astype(np.float64).T
    torque = 2.0 * np.clip(episode.get_actions()[:, 0], -1.0, 1.0)
    expected = -(np.arctan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * torque**2)
    np.testing.assert_allclose(episode.get_rewards(), expected, atol=1e-5)


@pytest.mark.usefixtures("few_files")
@pytest.mark.parametrize("compress", [["obs", "new_obs"], []], ids=["packed", "tensors"])
def test_rows_that_rllib_records_in_several_writes_are_read_back_once(tmp_path: Path, compress: list[str]) -> None:
    config = PPOConfig().environment("Pendulum-v1").env_runners(num_envs_per_env_runner=2)
    runner = recorder(config, tmp_path, output_write_episodes=False, output_compress_columns=compress)
    # Two environments side by side: each episode of 200 steps is cut in two and its parts are apart in the file.
    chunks = [chunk for _ in range(2) for chunk in runner.sample(num_timesteps=200)]
    runner.stop()
    sampled = whole_episodes(chunks)
    num_rows = sum(pq.read_metadata(file).num_rows for file in tmp_path.rglob("*.parquet"))
    assert num_rows > sum(map(len, sampled.values())), "RLlib no longer repeats earlier rows in later writes"

    (reader,) = open_input(tmp_path)
    assert reader.info.actions == "module"
    assert reader.info.num_transitions == sum(map(len, sampled.values()))
    episodes = list(reader)
    assert [len(episode) for episode in episodes] == [200, 200]
    for episode in episodes:
        assert_same(episode, sampled[episode.id_])
        assert_module_actions_of_pendulum(episode)
        assert np.abs(episode.get_actions()).max() > 1.0  # PPO's Gaussian; RLlib clips on the way to the environment.


@pytest.mark.usefixtures("few_files")
def test_rows_of_an_unfinished_recording_are_refused_with_the_remedy(tmp_path: Path) -> None:
    runner = recorder(PPOConfig().environment("Pendulum-v1"), tmp_path, output_write_episodes=False)
    runner.sample(num_timesteps=20)
    runner.stop()
    with pytest.raises(ValueError, match=r'ends neither terminated nor truncated.*batch_mode="complete_episodes"'):
        read(tmp_path)


@pytest.mark.usefixtures("few_files")
def test_episodes_that_rllib_records_are_read_back_once(tmp_path: Path) -> None:
    pytest.importorskip("msgpack_numpy")
    config = SACConfig().environment("Pendulum-v1").env_runners(batch_mode="complete_episodes")
    runner = recorder(config, tmp_path, output_write_episodes=True)
    sampled = [episode for _ in range(2) for episode in runner.sample(num_episodes=1)]
    runner.stop()
    (reader,) = open_input(str(tmp_path))
    assert reader.info.actions == "module"
    assert reader.info.action_space == ACTION_SPACE
    assert reader.info.observation_space.shape == (3,)
    for episode, expected in zip(reader, sampled, strict=True):
        assert_same(episode, expected)
        assert_module_actions_of_pendulum(episode)
        assert np.abs(episode.get_actions()).max() <= 1.0


@pytest.mark.usefixtures("few_files")
def test_recorded_chunks_of_one_episode_are_joined(tmp_path: Path) -> None:
    pytest.importorskip("msgpack_numpy")
    runner = recorder(PPOConfig().environment("Pendulum-v1"), tmp_path, output_write_episodes=True)
    chunks = [chunk for _ in range(2) for chunk in runner.sample(num_timesteps=100)]
    runner.stop()
    assert len(chunks) == 2
    (episode,) = read(tmp_path)
    (expected,) = whole_episodes(chunks).values()
    assert_same(episode, expected)


@pytest.mark.usefixtures("few_files")
def test_an_unfinished_recorded_episode_is_refused_with_the_remedy(tmp_path: Path) -> None:
    pytest.importorskip("msgpack_numpy")
    runner = recorder(PPOConfig().environment("Pendulum-v1"), tmp_path, output_write_episodes=True)
    runner.sample(num_timesteps=5)
    runner.stop()
    with pytest.raises(ValueError, match=r'neither terminated nor truncated \(.*step 4 of row 0.*"complete_episodes"'):
        read(tmp_path)


@pytest.mark.usefixtures("few_files")
@pytest.mark.parametrize("write_episodes", [False, True], ids=["rows", "episodes"])
def test_flattened_observations_are_recorded_flat(tmp_path: Path, write_episodes: bool) -> None:
    if write_episodes:
        pytest.importorskip("msgpack_numpy")
    config = (
        PPOConfig()
        .environment(DictEnv)
        .env_runners(
            batch_mode="complete_episodes",
            env_to_module_connector=lambda env, spaces, device: FlattenObservations(),
        )
    )
    runner = recorder(config, tmp_path, output_write_episodes=write_episodes)
    runner.sample(num_episodes=1)
    runner.stop()
    (reader,) = open_input(tmp_path)
    (episode,) = reader
    # Keys in sorted order: a, then b.
    np.testing.assert_array_equal(episode.get_observations(), [[-t, t, 7] for t in range(4)])
    if write_episodes:
        assert reader.info.observation_space.shape == (3,)


def test_only_writes_that_a_longer_write_repeats_are_left_out(tmp_path: Path) -> None:
    rows = episode_rows("a", 6)
    writes = {"first": [0, 1], "repeats": [0, 1, 2], "other-end": [0, 5], "other-start": [4, 1]}
    files = [data_file(tmp_path / f"{name}_000000-0.parquet", reordered(rows, order)) for name, order in writes.items()]
    assert drop_repeated_writes(files, "eps_id") == files[1:]
    # One write in several files is left out as a whole.
    parts = [data_file(tmp_path / f"parts_00000{i}-0.parquet", reordered(rows, [i])) for i in range(2)]
    assert drop_repeated_writes([*parts, files[1]], "eps_id") == [files[1]]


def test_recorded_episodes_are_read_without_msgpack_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    msgpack, msgpack_numpy = pytest.importorskip("msgpack"), pytest.importorskip("msgpack_numpy")
    episode = SingleAgentEpisode(
        id_="one",
        observations=[np.array([0.0, 1.5]), np.array([1.0, 2.5])],
        infos=[{}, {"steps": np.int64(3), "text": "done"}],
        actions=[np.array([0.25], np.float32)],
        rewards=[1.0],
        terminated=True,
        observation_space=gym.spaces.Dict(b=gym.spaces.Discrete(3, start=1), a=gym.spaces.MultiDiscrete([2, 4])),
        action_space=gym.spaces.Box(np.float32([-1]), np.float32([2])),
        len_lookback_buffer=0,
    )
    item = msgpack.packb(episode.get_state(), default=msgpack_numpy.encode)
    pq.write_table(pa.table({"item": [item]}), tmp_path / "episodes.parquet")
    monkeypatch.setitem(sys.modules, "msgpack_numpy", None)
    (reader,) = open_input(tmp_path)
    assert reader.info.action_space == episode.action_space
    (read_back,) = reader
    np.testing.assert_array_equal(read_back.get_observations(), [[0.0, 1.5], [1.0, 2.5]])
    np.testing.assert_array_equal(read_back.get_actions(), episode.get_actions())


def test_bytes_that_are_no_episode_are_refused_with_their_row(tmp_path: Path) -> None:
    pytest.importorskip("msgpack_numpy")
    file = tmp_path / "episodes.parquet"
    pq.write_table(pa.table({"item": pa.array([b"\x81\xa1a\x01"])}), file)
    with pytest.raises(ValueError, match=r"no episode that RLlib packed in row 0 of '.*episodes\.parquet'"):
        open_input(tmp_path)


@pytest.mark.usefixtures("few_files")
def test_unfinished_recordings_can_be_truncated(tmp_path: Path) -> None:
    runner = recorder(PPOConfig().environment("Pendulum-v1"), tmp_path, output_write_episodes=False)
    runner.sample(num_timesteps=20)
    runner.stop()
    (episode,) = read_with(tmp_path, ReadOptions(unfinished_episodes="truncate"))
    assert (len(episode), episode.is_truncated) == (20, True)


def test_importing_the_readers_does_not_import_minari(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    importlib.reload(importlib.import_module("rllib_calql.datasets.readers.minari"))


def test_a_missing_file_in_the_current_folder_is_named_with_what_resembles_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "play.parquet", episode_rows(0, 3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'play\.parquet'"):
        open_input("play.parquett")
