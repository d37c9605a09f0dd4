"""Files of other tools, times in place of steps, and policies of other libraries: what the message says and advises."""

from __future__ import annotations

import json
import pickle
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch

from rllib_calql import CalQLConfig
from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets import ReadOptions, open_input, record
from rllib_calql.store.offline_data import CalQLOfflineData
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo

# --- Files ------------------------------------------------------------------------------------------------------------


def touch(file: Path, content: bytes = b"\x00\x01\x02\x03") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def write_sample_batch(file: Path) -> None:
    touch(file, json.dumps({"type": "SampleBatch", "obs": "", "rewards": []}).encode())


def write_lerobot(file: Path) -> None:
    columns = {"observation.state": [[0.0]], "action": [[0.0]], "episode_index": [0], "frame_index": [0]}
    pq.write_table(pa.table({**columns, "timestamp": [0.0]}), file)


def write_zip_of_text(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.csv", "obs\n1\n")


def write_zarr(folder: Path) -> None:
    touch(folder / "data" / "action" / ".zarray", b"{}")
    touch(folder / ".zgroup", b"{}")


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "buffer.pt": (lambda f: torch.save({"rewards": torch.zeros(3)}, f), r"PyTorch's.*weights_only=True.*numpy\.savez"),
    "old.pth": (lambda f: torch.save([1], f, _use_new_zipfile_serialization=False), r"PyTorch's.*numpy\.savez"),
    "buffer.pkl": (lambda f: f.write_bytes(pickle.dumps([1])), r"a pickle, which runs code.*numpy\.savez"),
    "log.csv": (
        lambda f: f.write_text("obs_0,reward\n0,0\n"),
        r"table of text.*`columns\.yaml` beside it.*obs: \[obs_0\]",
    ),
    "log.txt": (lambda f: f.write_text("obs_0,reward\n0,0\n"), r"table of text; name it `\*\.csv`.*to_parquet"),
    "log.tsv": (
        lambda f: f.write_text("obs_0\treward\n"),
        r"table of text.*`columns\.yaml` beside it.*rewards: reward",
    ),
    "log.jsonl": (lambda f: f.write_text("{}\n"), r"lines of JSON.*lines=True.*to_parquet"),
    "output-1.json": (write_sample_batch, r"JSON.*old API stack.*JsonReader.*numpy\.savez"),
    "rows.mat": (touch, r"MATLAB.*scipy\.io\.loadmat.*numpy\.savez"),
    "obs.npy": (lambda f: np.save(f, np.zeros(3)), r"one array, and a data set is several.*numpy\.savez"),
    "run.mcap": (touch, r"recording of ROS.*rosbags.*numpy\.savez"),
    "run.bag": (touch, r"recording of ROS"),
    "x.tfrecord-00000-of-00002": (touch, r"TensorFlow.*RLDS.*tensorflow_datasets.*numpy\.savez"),
    "rows.feather": (lambda f: pa.feather.write_feather(pa.table({"a": [1]}), f), r"Arrow's.*read_feather.*to_parquet"),
    "rows.sqlite": (lambda f: sqlite3.connect(f).close() or touch(f), r"a database.*read_sql"),
    "rows.csv.gz": (touch, r"compressed file; unpack it first"),
    "frames.mp4": (touch, r"a video; decode"),
    "rows.zip": (write_zip_of_text, r"an archive or compressed file; unpack it first"),
    "no-suffix": (write_zip_of_text, r"a zip archive without NumPy arrays; it holds 'rows\.csv'.*numpy\.savez"),
    "really-torch.npz": (lambda f: torch.save([1], f), r"a zip archive without NumPy arrays; it holds '.*torch\.save"),
    "lerobot.parquet": (
        write_lerobot,
        r"LeRobot's columns; give the folder of the data set, with `meta/info\.json`",
    ),
}
IN_FOLDERS = [name for name in FILES if Path(name).suffix not in (".h5", ".parquet", ".npz", "")]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_tool_is_named_with_a_way_out(name: str, tmp_path: Path) -> None:
    write, message = FILES[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        open_input(tmp_path / name)
    assert name in str(caught.value)
    assert "OGBench" not in str(caught.value)


def test_play_data_of_ogbench_are_told_by_what_they_lack(tmp_path: Path) -> None:
    play = {"observations": np.zeros((3, 1)), "actions": np.zeros((3, 1)), "terminals": np.array([0, 0, 1])}
    np.savez(tmp_path / "play.npz", **play)
    with pytest.raises(ValueError, match=r"no column `rewards`.* OGBench's play data .*load the task's `-singletask`"):
        open_input(tmp_path / "play.npz")
    np.savez(tmp_path / "own.npz", **play, timeouts=np.zeros(3))
    with pytest.raises(ValueError, match=r"no column `rewards`; its columns are .*; rename the column, or add it\.$"):
        open_input(tmp_path / "own.npz")


@pytest.mark.parametrize("name", IN_FOLDERS)
def test_a_folder_of_another_tool_is_named_with_a_way_out(name: str, tmp_path: Path) -> None:
    write, message = FILES[name]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / name)
    with pytest.raises(ValueError, match=message) as caught:
        open_input(tmp_path / "data")
    assert name in str(caught.value)


def test_a_folder_of_zarr_is_named(tmp_path: Path) -> None:
    write_zarr(tmp_path / "replay.zarr")
    with pytest.raises(ValueError, match=r"an array store of Zarr's.*numpy\.savez"):
        open_input(tmp_path / "replay.zarr")


# --- Times ------------------------------------------------------------------------------------------------------------

STEPS = np.arange(10) % 5
TIMES = {
    "seconds": STEPS * 0.05,
    "nanoseconds": STEPS * 50_000_000 + 1_700_000_000_000_000_000,
    "stride": STEPS * 4,
    "wall clock": 1.7e9 + np.arange(10) * 0.02,
    "wall clock in ms": 1_700_000_000_000 + np.arange(10) * 20,
    "constant": np.zeros(10),
    "whole seconds": STEPS // 3,
    "irregular": np.cumsum([3, 7, 2, 9, 4, 3, 8, 5, 6, 2]),
    "datetime": np.datetime64("2026-01-01", "ns") + np.arange(10) * np.timedelta64(50, "ms"),
}


def with_times(times: np.ndarray, *, has_ids: bool) -> dict[str, Any]:
    obs = np.random.default_rng(0).random((10, 2))
    rows = {
        "observations": obs,
        "actions": np.zeros((10, 1)),
        "rewards": np.arange(10.0),
        "terminals": np.zeros(10),
        "timeouts": (STEPS == 4).astype(float),
        "t": times,
    }
    return rows | ({"episode_id": np.arange(10) // 5} if has_ids else {})


def write_table(file: Path, rows: dict[str, Any]) -> None:
    pq.write_table(pa.table({name: list(v) if v.ndim > 1 else v for name, v in rows.items()}), file)


@pytest.mark.parametrize("what", ["error", "truncate", "drop"])
@pytest.mark.parametrize("has_ids", [False, True])
@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_times_are_not_taken_for_steps(suffix: str, name: str, has_ids: bool, what: Any, tmp_path: Path) -> None:
    rows, file = with_times(TIMES[name], has_ids=has_ids), tmp_path / f"rows.{suffix}"
    if suffix == "npz":
        np.savez(file, **rows)
    else:
        write_table(file, rows)
    with pytest.raises(ValueError, match=r"`t` holds times, not steps: it .*another name, such as `time`") as caught:
        list(open_input(file, ReadOptions(unfinished_episodes=what))[0])
    assert file.name in str(caught.value)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize("t", [4 - STEPS, 10 - np.arange(10), 8 - 2 * STEPS], ids=["to go", "backwards", "by 2"])
def test_a_countdown_without_ids_is_not_taken_for_steps(suffix: str, t: np.ndarray, tmp_path: Path) -> None:
    rows, file = with_times(t, has_ids=False), tmp_path / f"rows.{suffix}"
    if suffix == "npz":
        np.savez(file, **rows)
    else:
        write_table(file, rows)
    with pytest.raises(ValueError, match=r"`t` holds times, not steps: it goes from \d+ to \d+ in row 1 of"):
        list(open_input(file, ReadOptions(unfinished_episodes="truncate"))[0])


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize("has_ids", [False, True])
def test_a_time_that_is_missing_is_named(suffix: str, has_ids: bool, tmp_path: Path) -> None:
    rows, file = with_times(np.where(STEPS == 2, np.nan, STEPS), has_ids=has_ids), tmp_path / f"rows.{suffix}"
    if suffix == "npz":
        np.savez(file, **rows)
    else:
        write_table(file, rows)
    with pytest.raises(ValueError, match=r"`t` .*row 2 of"):
        list(open_input(file, ReadOptions())[0])


@pytest.mark.parametrize("name", ["seconds", "wall clock", "nanoseconds"])
@pytest.mark.parametrize("has_ids", [False, True])
def test_the_advice_about_times_works(name: str, has_ids: bool, tmp_path: Path) -> None:
    rows = with_times(TIMES[name], has_ids=has_ids)
    write_table(tmp_path / "rows.parquet", {("time" if key == "t" else key): values for key, values in rows.items()})
    read = list(open_input(tmp_path / "rows.parquet", ReadOptions(missing_final_observation="repeat"))[0])
    assert [len(episode) for episode in read] == [5, 5]


def test_whole_steps_stay_steps_whatever_their_type_and_start(tmp_path: Path) -> None:
    for t in (STEPS, STEPS.astype(float) + 3, np.arange(10) + (np.arange(10) >= 5) * 100):
        np.savez(tmp_path / "rows.npz", **with_times(t, has_ids=False))
        (reader,) = open_input(tmp_path / "rows.npz", ReadOptions(missing_final_observation="repeat"))
        assert [len(episode) for episode in reader] == [5, 5]


# --- Policies and rewards ---------------------------------------------------------------------------------------------


class _OneStep(gym.Env[Any, Any]):
    """Every episode has one step; what it emits is given."""

    observation_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(
        self, action_space: gym.Space[Any] | None = None, reward: Any = 0.5, flags: Any = (True, False)
    ) -> None:
        self.action_space = action_space or gym.spaces.Box(-1, 1, (2,))
        self.reward, self.flags, self.received = reward, flags, None

    def reset(self, **_: Any) -> Any:
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.received = action
        return np.zeros(2, np.float32), self.reward, *self.flags, {}


def recorded(tmp_path: Path, env: _OneStep, policy: Any = None) -> dict[str, Any]:
    policy = policy or (lambda obs: np.array([0.25, 0.5], np.float32))
    record(policy, env, 1, tmp_path / "rows.parquet", overwrite=True)
    return pq.read_table(tmp_path / "rows.parquet").to_pydict()


@pytest.mark.parametrize("reward", [[0.5], np.array([0.5]), np.array([[0.5]]), torch.tensor([0.5]), np.float32(0.5)])
def test_a_reward_in_an_array_of_one_is_unwrapped(reward: Any, tmp_path: Path) -> None:
    flags = np.array([True]), np.array([False])
    rows = recorded(tmp_path, _OneStep(reward=reward, flags=flags))
    assert (rows["rewards"], rows["terminateds"], rows["truncateds"]) == ([0.5], [True], [False])


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (_OneStep(reward=np.array([0.5, 1.0])), r"ndarray of shape \(2,\) as reward, which must be one number"),
        (_OneStep(reward=None), r"None as reward"),
        (_OneStep(reward="1"), r"str 1 as reward"),
        (_OneStep(reward={"a": 1.0}), r"dict .* as reward"),
        (_OneStep(flags=(np.array([True, False]), False)), r"ndarray of shape \(2,\) as termination flag"),
    ],
)
def test_what_is_no_number_is_named(env: _OneStep, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        recorded(tmp_path, env)


@pytest.mark.parametrize(
    "action",
    [np.array([0.25, 0.5], np.float32), torch.tensor([0.25, 0.5], requires_grad=True), [0.25, 0.5], (0.25, 0.5)],
)
@pytest.mark.parametrize("with_state", [False, True])
def test_actions_of_other_libraries_are_taken(action: Any, with_state: bool, tmp_path: Path) -> None:
    env = _OneStep()
    rows = recorded(tmp_path, env, lambda obs: (action, None) if with_state else action)
    assert rows["actions"] == [[0.25, 0.5]]
    assert not isinstance(env.received, torch.Tensor)


@pytest.mark.parametrize(
    ("returned", "space", "message"),
    [
        ((np.zeros(2), np.zeros((1, 4))), None, r"two values.*recurrent.*Stable-Baselines3.*lambda obs: policy\(obs\)"),
        (None, None, r"returned None, which is no action of Box"),
        (np.zeros(3), None, r"ndarray of shape \(3,\), which is no action of Box.*\(2,\)"),
        (np.zeros((1, 2)), None, r"axis for a batch: return its first entry"),
        ("left", None, r"str left, which is no action"),
        ([[0.0], [0.0, 1.0]], None, r"list .*, which is no action"),
        ((np.zeros(2), None, {}), None, r"which is no action.*return the action alone"),
        (np.zeros(2), gym.spaces.Discrete(3), r"ndarray of shape \(2,\), which is no action of Discrete\(3\)"),
        ({"b": 0.0}, gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (1,))), r"dict .*, which is no action of Dict"),
        (np.zeros(2), gym.spaces.Tuple([gym.spaces.Discrete(2)] * 2), r"ndarray .*, which is no action of Tuple"),
    ],
)
def test_what_is_no_action_is_named(returned: Any, space: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        recorded(tmp_path, _OneStep(space), lambda obs: returned)


# --- Groups and tensors -----------------------------------------------------------------------------------------------


def test_groups_for_a_vector_are_named_with_the_way_to_join_them(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "groups.h5", "w") as file:
        file["observations/qpos"], file["observations/qvel"] = np.zeros((4, 2)), np.zeros((4, 3))
        file["actions"], file["rewards"], file["terminals"] = np.zeros((4, 1)), np.arange(4.0), np.ones(4)
    box = gym.spaces.Box(-1, 1, (5,))
    data = CalQLOfflineData(CalQLConfig().offline_data(input_=str(tmp_path / "groups.h5")))
    store = TransitionStore(obs_dim=5, action_dim=1, online_capacity=1, seed=0)
    with pytest.raises(
        ValueError, match=r"groups\.h5.*\['qpos', 'qvel'\].*numpy\.concatenate\(\[qpos, qvel\], axis=1\)"
    ):
        data.load(
            store,
            AddReturnsToGo(RewardSettings(0.9)),
            observation_space=box,
            action_space=gym.spaces.Box(-1, 1, (1,)),
        )


def test_a_tensor_shape_in_a_pickle_is_refused_and_so_is_opening_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for metadata, message in (
        (pickle.dumps((2,)), r"`obs` is a column of tensors that does not tell their shape in row 0.*fixed-size lists"),
        (b"[3]", r"`obs` holds 2 numbers in row 0 .*, and tensors of shape \(3,\)"),
    ):
        field = pa.field(
            "obs",
            pa.list_(pa.float32()),
            metadata={
                b"ARROW:extension:name": b"ray.data.arrow_tensor_of_another_version",
                b"ARROW:extension:metadata": metadata,
            },
        )
        rows = {"actions": [[0.0]] * 2, "rewards": [0.0, 1.0], "terminateds": [False, True]}
        table = pa.table(rows).append_column(field, pa.array([[0.0, 1.0]] * 2, pa.list_(pa.float32())))
        pq.write_table(table, tmp_path / "rows.parquet")
        with pytest.raises(ValueError, match=message):
            list(open_input(tmp_path / "rows.parquet")[0])
    monkeypatch.setenv("RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA", "1")
    with pytest.raises(ValueError, match=r"rows\.parquet' is not opened: .*`RAY_DATA_AUTOLOAD_CLOUD.*unset it"):
        open_input(tmp_path / "rows.parquet")
