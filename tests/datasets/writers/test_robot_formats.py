"""What is written for robomimic and LeRobot has their layout, is read back, and is refused where it has no place.

That the tools themselves open such files was checked with robomimic 0.3.0 (`SequenceDataset`) and LeRobot 0.4.4
(`LeRobotDataset`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from rllib_calql.datasets import open_input
from rllib_calql.datasets.episodes.reader import EpisodeBlock
from rllib_calql.datasets.writers import robot_formats
from rllib_calql.datasets.writers.writers import write_blocks

LENGTHS = np.array([3, 2])


def block(**changes: Any) -> EpisodeBlock:
    """An episode that terminated and one that was cut."""
    images = np.arange(5 * 2 * 3 * 3, dtype=np.uint8).reshape(5, 2, 3, 3)
    fields: dict[str, Any] = {
        "ids": ["a", "b"],
        "lengths": LENGTHS,
        "observations": {"camera": images, "joints": np.arange(10.0).reshape(5, 2)},
        "final_observations": {"camera": images[:2] + 100, "joints": np.array([[-1.0, -2.0], [-3.0, -4.0]])},
        "actions": np.arange(5, dtype=np.float32)[:, None],
        "rewards": np.array([0.0, 0.0, 1.0, 0.5, 0.25]),
        "terminateds": np.array([True, False]),
        "truncateds": np.array([False, True]),
        "where": str,
    }
    return EpisodeBlock(**(fields | changes))


def test_demonstrations_have_robomimic_s_layout_and_come_back(tmp_path: Path) -> None:
    summary = write_blocks([block()], f"robomimic:{tmp_path}/demos.hdf5")
    assert (summary.num_episodes, summary.num_transitions) == (2, 5)
    with h5py.File(tmp_path / "demos.hdf5") as file:
        assert file["data"].attrs["total"] == 5
        assert sorted(json.loads(file["data"].attrs["env_args"])) == ["env_kwargs", "env_name", "type"]
        assert [file[f"data/demo_{i}"].attrs["num_samples"] for i in range(2)] == [3, 2]
        assert [file[f"data/demo_{i}/dones"][:].tolist() for i in range(2)] == [[0, 0, 1], [0, 0]]
        np.testing.assert_array_equal(file["data/demo_1/next_obs/joints"], [[8, 9], [-3, -4]])
    (reader,) = open_input(tmp_path / "demos.hdf5")
    first, second = reader
    np.testing.assert_array_equal(second.get_observations()["joints"], [[6, 7], [8, 9], [-3, -4]])
    np.testing.assert_array_equal(first.get_observations()["camera"][3], block().final_observations["camera"][0])
    assert (first.is_terminated, second.is_truncated) == (True, True)


def test_frames_have_lerobot_s_layout_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robot_formats, "_FILE_BYTES", 1)  # A file per block.
    monkeypatch.setattr("rllib_calql.datasets.writers.writers._PIECE_BYTES", 1)
    summary = write_blocks([block(), block(ids=["c", "d"])], f"lerobot:{tmp_path}/reach")
    assert summary.left_out == ("ids of episodes", "observations after the last steps")
    info = json.loads((tmp_path / "reach" / "meta" / "info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["codebase_version"]) == (4, 10, "v3.0")
    camera = {"dtype": "image", "shape": [2, 3, 3], "names": ["height", "width", "channels"]}
    assert info["features"]["observation.camera"] == camera
    episodes = pq.read_table(tmp_path / "reach" / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pydict()
    assert episodes["dataset_from_index"] == [0, 3, 5, 8]
    assert episodes["dataset_to_index"] == [3, 5, 8, 10]
    assert episodes["data/file_index"] == [0, 0, 1, 1]
    statistics = json.loads((tmp_path / "reach" / "meta" / "stats.json").read_text())
    assert statistics["observation.joints"]["mean"] == [4.0, 5.0]
    np.testing.assert_allclose(statistics["observation.joints"]["std"], [8**0.5] * 2)
    assert np.shape(statistics["observation.camera"]["max"]) == (3, 1, 1)
    rows = pq.read_table(tmp_path / "reach" / "data" / "chunk-000" / "file-001.parquet").to_pydict()
    assert rows["episode_index"] == [2, 2, 2, 3, 3]
    assert rows["index"] == [5, 6, 7, 8, 9]
    assert rows["next.done"] == [False, False, True, False, True]
    (reader,) = open_input(tmp_path / "reach")
    read = list(reader)
    assert [len(episode) for episode in read] == [3, 1, 3, 1]
    np.testing.assert_array_equal(read[2].get_observations()["camera"][:3], block().observations["camera"][:3])
    assert read[2].is_terminated
    np.testing.assert_array_equal(read[2].get_actions(), block().actions[:3])  # An array of one in each row stays one.


@pytest.mark.parametrize("to", ["robomimic:{}/a.hdf5", "lerobot:{}/a"])
def test_what_has_no_place_is_refused_and_leaves_nothing(to: str, tmp_path: Path) -> None:
    pair = (np.zeros((5, 1)), np.zeros((5, 1)))
    last = (np.zeros((2, 1)), np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"`obs` is nested in another way than a Dict of arrays.*write Parquet, HDF5"):
        write_blocks([block(observations=pair, final_observations=last)], to.format(tmp_path))
    with pytest.raises(ValueError, match=r"`actions` must be one array per step in this format; write Parquet, HDF5"):
        write_blocks([block(actions={"a": np.zeros((5, 1))})], to.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        ("robomimic:{}/a.npz", ValueError, r"must name a file `\*\.hdf5` or `\*\.h5` behind `robomimic:`"),
        ("lerobot:{}/a.parquet", ValueError, "must name a folder behind `lerobot:`"),
        ("robomimik:{}/a.xyz", ValueError, r"`to` must be .*`lerobot:<folder>`, `robomimic:<file>\.hdf5`"),
        (
            "Robomimic:a.hdf5",
            ValueError,
            r"`Robomimic:` is none of these\. A file of this very name is '\./Robomimic",
        ),
        ("d3rlpy:a.h5", ValueError, "`d3rlpy:` is none of these"),
        ("lerobott:reach", ValueError, "`lerobott:` is none of these"),
        ("lerobot:{}", FileExistsError, "is no LeRobot data set, so it is not replaced"),
        ("lerobot:{}/none/a", FileNotFoundError, "There is no folder"),
    ],
)
def test_targets_that_cannot_be_are_refused(to: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(error, match=message):
        write_blocks([block()], to.format(tmp_path), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
