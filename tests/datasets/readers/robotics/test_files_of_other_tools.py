"""Files that d3rlpy, robomimic, Stable-Baselines3 and LeRobot wrote themselves are read to the numbers put into them.

How they were made is told in `files/README.md`. The numbers are computed here from their description there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import robot_files
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.datasets import ReadOptions, open_input
from rllib_calql.datasets.episodes.reader import AFTER_END, DROPPED_STEPS, ENDS_UNTOLD, REPEATED, TRUNCATED
from rllib_calql.datasets.readers.robotics import hdf5_parts
from rllib_calql.datasets.rows import flat

FILES = Path(__file__).parent / "files"
LENGTHS = (4, 3, 5)


def read(input_: Path, **options: Any) -> tuple[list[SingleAgentEpisode], dict[str, int]]:
    (reader,) = open_input(input_, ReadOptions(**options))
    return list(reader), dict(reader.remarks)


def observations(episode: int, num_steps: int) -> np.ndarray:
    return np.array([[100 * episode + t, t / 4] for t in range(num_steps)])


def actions(episode: int, num_steps: int) -> np.ndarray:
    return np.array([[(t % 3 - 1) / 2, episode / 4] for t in range(num_steps)])


def pixels(episode: int, num_steps: int) -> np.ndarray:
    images = np.zeros((num_steps, 6, 8, 3), np.uint8)
    for t in range(num_steps):
        images[t] = (40 * episode + t, 7, 255 - t)
    return images


# --- d3rlpy -----------------------------------------------------------------------------------------------------------


def test_episodes_of_d3rlpy_end_as_it_says() -> None:
    episodes, remarks = read(FILES / "d3rlpy.h5")
    assert [episode.id_ for episode in episodes] == ["0", "1", "2"]
    assert [episode.is_terminated for episode in episodes] == [True, False, True]
    # As in d3rlpy's own count of transitions, the last step of a cut episode is none.
    assert [len(episode) for episode in episodes] == [4, 2, 5]
    for number, episode in enumerate(episodes):
        expected = observations(number, LENGTHS[number])
        expected = np.concatenate([expected, expected[-1:]]) if episode.is_terminated else expected
        np.testing.assert_array_equal(episode.get_observations(), expected)
        np.testing.assert_array_equal(episode.get_actions(), actions(number, len(episode)))
        assert np.ravel(episode.get_rewards()).tolist() == [0.0] * (len(episode) - 1) + [float(episode.is_terminated)]
    assert remarks == {REPEATED: 2, DROPPED_STEPS: 1}


def test_tuples_of_observations_of_d3rlpy_stay_tuples() -> None:
    episodes, _ = read(FILES / "d3rlpy_tuple.h5")
    vectors, images = episodes[2].get_observations(slice(0, 5))
    np.testing.assert_array_equal(vectors, observations(2, 5))
    np.testing.assert_array_equal(images, pixels(2, 5).transpose(0, 3, 1, 2))
    assert images.dtype == np.uint8


def test_d3rlpy_files_that_lack_an_episode_are_refused(tmp_path: Path) -> None:
    shutil.copy(FILES / "d3rlpy.h5", tmp_path / "buffer.h5")
    with h5py.File(tmp_path / "buffer.h5", "a") as file:
        del file["actions_1"]
    with pytest.raises(
        ValueError, match=r"buffer\.h5' holds 2 episodes and 3 by its `num_episodes`; `actions_1` is mi"
    ):
        open_input(tmp_path / "buffer.h5")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_episodes", np.array([2, 3]), r"`num_episodes` in .* must be one whole number, got int64 of shape \(2,\)"),
        ("num_episodes", b"three", r"`num_episodes` in .* must be one whole number, got object of shape \(\)"),
        ("observations_0_0", None, r"has no array `observations_0_0`, and `observations_0_1`"),
    ],
)
def test_a_damaged_buffer_of_d3rlpy_is_named(name: str, value: Any, message: str, tmp_path: Path) -> None:
    shutil.copy(FILES / "d3rlpy_tuple.h5", tmp_path / "buffer.h5")
    with h5py.File(tmp_path / "buffer.h5", "a") as file:
        del file[name]
        if value is not None:
            file[name] = value
    with pytest.raises(ValueError, match=message) as caught:
        open_input(tmp_path / "buffer.h5")
    assert "buffer.h5" in str(caught.value)


# --- robomimic --------------------------------------------------------------------------------------------------------

DEMOS = {"demo_0": 2, "demo_2": 0, "demo_10": 1}
"""Name -> number of the episode; in order of their numbers, not of their names."""


def check_demos(episodes: list[SingleAgentEpisode], lengths: dict[str, int], with_last: bool) -> None:
    assert [episode.id_ for episode in episodes] == list(lengths)
    for episode in episodes:
        number, num_steps = DEMOS[episode.id_], lengths[episode.id_]
        assert len(episode) == num_steps
        found = episode.get_observations(slice(0, num_steps + 1 if with_last else num_steps))
        expected = observations(number, num_steps + with_last)
        assert sorted(found) == ["agentview_image", "object", "robot0_eef_pos"]
        np.testing.assert_array_equal(found["robot0_eef_pos"], expected[:, :1])
        np.testing.assert_array_equal(found["object"], expected[:, 1:])
        np.testing.assert_array_equal(found["agentview_image"], pixels(number, num_steps + with_last))
        np.testing.assert_array_equal(episode.get_actions(), actions(number, num_steps))
        assert episode.is_terminated == (number != 1)


@pytest.mark.parametrize(
    ("mode", "remarks"), [(0, {AFTER_END: 2}), (2, {AFTER_END: 2, ENDS_UNTOLD: 1})], ids=["mode 0", "mode 2"]
)
def test_a_demonstration_ends_with_its_first_success(mode: int, remarks: dict[str, int]) -> None:
    """The demonstrations reach their goal one step before they end."""
    episodes, found = read(FILES / f"robomimic_done_{mode}.hdf5")
    check_demos(episodes, {"demo_0": 4, "demo_2": 3, "demo_10": 3}, with_last=True)
    assert [list(episode.get_rewards()) for episode in episodes] == [[0, 0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert found == remarks


def test_ends_of_trajectories_alone_are_told_apart_by_the_reward() -> None:
    """`--done_mode 1 --exclude_next_obs`: all last rows are `dones`."""
    episodes, found = read(FILES / "robomimic_done_1.hdf5")
    check_demos(episodes, {"demo_0": 5, "demo_2": 4, "demo_10": 2}, with_last=False)
    assert found == {ENDS_UNTOLD: 1, REPEATED: 2, DROPPED_STEPS: 1}


def test_an_observation_that_the_first_demonstration_lacks_is_not_left_out_silently(tmp_path: Path) -> None:
    shutil.copy(FILES / "robomimic_done_0.hdf5", tmp_path / "low_dim.hdf5")
    with h5py.File(tmp_path / "low_dim.hdf5", "a") as file:
        file["data/demo_2/obs/force"] = np.ones((len(file["data/demo_2/actions"]), 3))
    with pytest.raises(
        ValueError, match=r"`data/demo_2/obs` in '.*low_dim\.hdf5' has 'force', which `data/demo_0/obs`"
    ):
        read(tmp_path)
    (tmp_path / "columns.yaml").write_text("obs: [object, robot0_eef_pos]\n")
    assert len(read(tmp_path)[0]) == 3


def test_a_map_chooses_observations_in_order_and_demonstrations(tmp_path: Path) -> None:
    shutil.copy(FILES / "robomimic_done_0.hdf5", tmp_path / "low_dim.hdf5")
    (tmp_path / "columns.yaml").write_text("obs: [object, robot0_eef_pos]\ndemos: train\n")
    episodes, _ = read(tmp_path)
    assert [episode.id_ for episode in episodes] == ["demo_2", "demo_10"]
    np.testing.assert_array_equal(episodes[0].get_observations(), observations(0, 4)[:, ::-1])
    (tmp_path / "columns.yaml").write_text("obs: object\ndemos: valid\nrewards: states\n")
    with pytest.raises(ValueError, match=r"`states` must hold one value per row|`rewards`.* rows of shape \(2,\)"):
        read(tmp_path)
    (tmp_path / "columns.yaml").write_text("obs: object\ndemos: test\n")
    with pytest.raises(ValueError, match=r"has no list of demonstrations `mask/test`.* It has train, valid"):
        read(tmp_path)
    for values, said in (([True, False], "must list names of demonstrations, .* got bool"), ([], "lists no demonst")):
        with h5py.File(tmp_path / "low_dim.hdf5", "a") as file:
            file.pop("mask/test", None)
            file["mask/test"] = np.array(values, bool if values else "S6")
        with pytest.raises(ValueError, match=rf"`mask/test` in '.*low_dim\.hdf5' {said}"):
            read(tmp_path)
    (tmp_path / "columns.yaml").write_text("obs: objekt\n")
    with pytest.raises(ValueError, match=r"has no 'obs/objekt' for `obs`; it has .*`obs/object`"):
        read(tmp_path)
    (tmp_path / "columns.yaml").write_text("t: states\n")
    with pytest.raises(ValueError, match="has the key `t`, which means nothing for robomimic's files"):
        read(tmp_path)


def test_demonstrations_without_observations_are_refused_with_robomimic_s_remedy() -> None:
    with pytest.raises(ValueError, match=r"robomimic_states\.hdf5' has no 'rewards' .*`dataset_states_to_obs\.py"):
        open_input(FILES / "robomimic_states.hdf5")


def test_pieces_and_files_opened_again_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = read(FILES / "robomimic_done_0.hdf5")
    monkeypatch.setattr(flat, "_MAX_PIECE_ROWS", 2)
    monkeypatch.setattr(hdf5_parts, "_MAX_OPENED", 3)
    for one, other in zip(whole, read(FILES / "robomimic_done_0.hdf5")[0], strict=True):
        np.testing.assert_array_equal(one.get_observations()["object"], other.get_observations()["object"])
        np.testing.assert_array_equal(one.get_actions(), other.get_actions())


def linked(file: h5py.File) -> None:
    file["data/demo_2/extra"] = h5py.ExternalLink("/etc/hostname", "/")
    del file["data/demo_2/actions"]
    file["data/demo_2/actions"] = h5py.ExternalLink("elsewhere.hdf5", "/actions")


def grouped(file: h5py.File) -> None:
    values = file["data/demo_0/obs/object"][:]
    del file["data/demo_0/obs/object"]
    file["data/demo_0/obs/object/position"] = values


def shorter(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        values = file[name][1:]
        del file[name]
        file[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (linked, "is a link to another file"),
        (shorter("data/demo_2/obs/object"), r"`data/demo_2/obs/object` in .* has 3 rows, and the actions .* 4"),
        (lambda file: file.move("data/demo_2", "data/try_2"), r"holds the group 'try_2' with actions, .*`demo_0`"),
        (grouped, "has no array 'obs/object', but a group, for `obs`"),
        (shorter("data/demo_10/dones"), r"`data/demo_10/dones` in .* has 2 rows, and the actions .* 3"),
        (lambda file: file["data/demo_2/obs"].pop("object"), r"has no array `data/demo_2/obs/object`, which other ep"),
        (lambda file: file["data/demo_10"].pop("rewards"), r"has no array `data/demo_10/rewards`"),
        (lambda file: file["data/demo_2/dones"].write_direct(np.array([0, 0, 3, 1])), r"must be 0 or 1 .*, got 3"),
        (lambda file: file["data/demo_2/rewards"].write_direct(np.array([0.0, np.nan, 0, 0])),
         r"`rewards` holds nan in episode 'demo_2', step 1 of 'demo_2' in '.*demos\.hdf5'"),
    ],
)  # fmt: skip
def test_a_damaged_demonstration_is_named(change: Callable[[h5py.File], Any], message: str, tmp_path: Path) -> None:
    shutil.copy(FILES / "robomimic_done_0.hdf5", tmp_path / "demos.hdf5")
    with h5py.File(tmp_path / "demos.hdf5", "a") as file:
        change(file)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "demos.hdf5")
    assert "demos.hdf5" in str(caught.value)


# --- Stable-Baselines3 ------------------------------------------------------------------------------------------------

# Two environments, begun with episodes 0 and 1, and 11 steps each; what is unfinished then counts as cut.
SEEN = [[(0, 0, 4), (1, 0, 3), (2, 0, 4)], [(1, 0, 3), (2, 0, 5), (0, 0, 3)]]
"""Of each environment: (episode, first step, stop)."""
LAST_EIGHT = [[(0, 3, 4), (1, 0, 3), (2, 0, 4)], [(2, 0, 5), (0, 0, 3)]]


@pytest.mark.parametrize(("name", "seen"), [("sb3_partly_filled.npz", SEEN), ("sb3_wrapped.npz", LAST_EIGHT)])
@pytest.mark.parametrize("piece_rows", [2**17, 3])
def test_environments_side_by_side_are_read_one_after_the_other(
    name: str, seen: list[list[tuple[int, int, int]]], piece_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "_MAX_PIECE_ROWS", piece_rows)
    episodes, remarks = read(FILES / name, unfinished_episodes="truncate")
    assert len(episodes) == sum(map(len, seen))
    for episode, (number, start, stop) in zip(episodes, [*seen[0], *seen[1]], strict=True):
        np.testing.assert_array_equal(episode.get_observations(), observations(number, stop + 1)[start:])
        np.testing.assert_array_equal(episode.get_actions(), actions(number, stop)[start:])
        is_success = number != 1 and stop == LENGTHS[number]
        assert (episode.is_terminated, episode.is_truncated) == (is_success, not is_success)
        assert episode.get_rewards()[-1] == is_success
    assert remarks == {TRUNCATED: 2}
    (reader,) = open_input(FILES / name)
    assert reader.info.actions == "module"  # Scaled to [-1, 1] by the library.
    with pytest.raises(ValueError, match=r"ends neither terminated nor truncated .*\.npz \(environment 0\)'"):
        list(reader)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"timeouts": None},
            r"no array `timeouts`; without it `dones` does not tell terminations from time-outs; save",
        ),
        ({"next_observations": None}, r"no array `next_observations`; it does not exist with `optimize_memory_usage"),
        ({"pos": 99}, r"`pos` in '.*buffer\.npz' must be in \[0, 8\], got 99"),
        ({"full": np.zeros(3)}, r"`full` in .* must be one number, got float64 of shape \(3,\)"),
        ({"observations": np.zeros((7, 2, 2))}, r"`observations` in .* has shape \(7, 2, 2\), and `rewards` \(8, 2\)"),
    ],
)
def test_a_buffer_that_lacks_something_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with np.load(FILES / "sb3_wrapped.npz") as buffer:
        arrays = {name: value for name, value in (dict(buffer) | changes).items() if value is not None}
    np.savez(tmp_path / "buffer.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "buffer.npz")


def test_a_wrapped_buffer_without_its_position_is_cut_where_it_wraps(tmp_path: Path) -> None:
    with np.load(FILES / "sb3_wrapped.npz") as buffer:
        arrays = {name: value for name, value in buffer.items() if name not in ("pos", "full")}
    np.savez(tmp_path / "buffer.npz", **arrays)
    episodes, remarks = read(tmp_path / "buffer.npz", unfinished_episodes="truncate")
    assert sum(map(len, episodes)) == 16
    assert remarks == {"episodes ended by a jump of the observation": 2, TRUNCATED: 1}


# --- LeRobot ----------------------------------------------------------------------------------------------------------

TOP = "observation.images.top"
VERSIONS = ["lerobot_v21", "lerobot_v30"]


@pytest.mark.parametrize("version", VERSIONS)
def test_frames_and_images_of_lerobot_are_read(version: str) -> None:
    episodes, remarks = read(FILES / version)
    assert [episode.id_ for episode in episodes] == ["0", "1", "2"]
    assert [episode.is_terminated for episode in episodes] == [True, False, True]
    for number, episode in enumerate(episodes):
        num_steps = LENGTHS[number] - (number == 1)  # No observation follows the last frame.
        assert len(episode) == num_steps
        found = episode.get_observations(slice(0, num_steps))
        assert sorted(found) == ["images.top", "state"]
        np.testing.assert_array_equal(found["state"], observations(number, num_steps))
        np.testing.assert_array_equal(found["images.top"], pixels(number, num_steps))
        assert found["images.top"].dtype == np.uint8
        np.testing.assert_array_equal(episode.get_actions(), actions(number, num_steps))
        assert episode.get_rewards()[-1] == episode.is_terminated
    assert remarks == {REPEATED: 2, DROPPED_STEPS: 1}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_map_of_lerobot_s_features_is_followed(version: str, tmp_path: Path) -> None:
    shutil.copytree(FILES / version, tmp_path / "reach")
    columns = "obs: [action, observation.state]\nrewards: next.success\nterminated: next.success\n"
    (tmp_path / "reach" / "columns.yaml").write_text(columns)
    episodes, _ = read(tmp_path / "reach")
    expected = np.concatenate([actions(2, 5), observations(2, 5)], axis=1)
    np.testing.assert_array_equal(episodes[2].get_observations()[:-1], expected)
    assert list(episodes[2].get_rewards()) == [0, 0, 0, 0, 1]
    assert list(episodes[2].get_extra_model_outputs("index")) == [7, 8, 9, 10, 11]


def described(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "meta" / "info.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def replaced_column(folder: Path, name: str, values: pa.Array | None) -> None:
    (file,) = folder.glob("data/*/*.parquet")
    table = pq.read_table(file)
    index = table.schema.get_field_index(name)
    pq.write_table(table.remove_column(index) if values is None else table.set_column(index, name, values), file)


def encoded(*contents: bytes | None) -> pa.Array:
    return pa.array([{"bytes": content, "path": "frame.png"} for content in contents])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: described(folder, lambda info: info["features"].pop("next.reward")),
         r"has no rewards \(`next\.reward`\), as data for imitation .*`rewards: next\.success`"),
        (lambda folder: described(folder, lambda info: [info["features"].pop(name) for name in list(info["features"])
                                                        if name.startswith("next.")]),
         r"has no rewards .*add a feature `next\.reward`"),
        (lambda folder: described(folder, lambda info: info["features"][TOP].update(dtype="video")),
         r"`observation\.images\.top` .* is a video, which .*`obs: \[observation\.state\]`.*`use_videos=False`"),
        (lambda folder: described(folder, lambda info: info.update(codebase_version="v1.6")),
         r"says `codebase_version` 'v1\.6'; v2\.0, v2\.1, v3\.0 are read"),
        (lambda folder: described(folder, lambda info: info.update(total_frames=99)),
         r"tells of 99 frames, and the files of `data` hold 12; the data set is incomplete"),
        (lambda folder: described(folder, lambda info: info.update(total_episodes=4)),
         r"tells of 4 episodes, and the files of `data` hold 3"),
        (lambda folder: described(folder, lambda info: info["features"].pop("next.success") and
                                  info["features"].pop("next.reward")), r"add a feature `next\.reward`"),
        (lambda folder: replaced_column(folder, TOP, pa.array([{"path": "frame.png"}] * 12)),
         r"`observation\.images\.top` holds struct<path: string> in row 0 of .*, where images have a field `bytes`"),
        (lambda folder: shutil.rmtree(folder / "data") or (folder / "data").mkdir(),
         r"has `meta/info\.json` and no frames \(.*Download or write it again"),
        (lambda folder: (folder / "meta" / "info.json").write_text("{"), r"info\.json' is no JSON"),
        (lambda folder: (folder / "meta" / "info.json").write_text("[]"), "it has no `features`"),
        (lambda folder: (folder / "columns.yaml").write_text("obs: observation.stat"),
         r"has no `observation\.stat`; its features are `observation\.state`"),
        (lambda folder: (folder / "columns.yaml").write_text("episode: index"), "has the key `episode`, which means"),
        (lambda folder: replaced_column(folder, "observation.state", None), r"has no column `observation\.state`"),
        (lambda folder: replaced_column(folder, TOP, encoded(*[None] * 12)),
         r"`observation\.images\.top` holds no image in row 0 of .*, but at most the path"),
        (lambda folder: replaced_column(folder, TOP, encoded(*[b"no image"] * 12)),
         r"holds an image that cannot be read in row 0 of"),
        (lambda folder: described(folder, lambda info: info["features"][TOP].update(shape=[3, 9, 9])),
         r"cannot be read in row 0 of .*it has the shape \(6, 8, 3\) and should have \[3, 9, 9\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_lerobot_data_set_is_named(
    change: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(FILES / "lerobot_v30", tmp_path / "reach")
    change(tmp_path / "reach")
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "reach")
    assert str(tmp_path / "reach") in str(caught.value)


def of_dones(folder: Path, dones: list[int], rewards: list[float]) -> Path:
    rows = {
        "eps_id": np.repeat(["a", "b"], 3),
        "obs": np.arange(6.0)[:, None],
        "actions": np.zeros((6, 1)),
        "rewards": np.array(rewards),
        "terminateds": np.array(dones),
    }
    return robot_files.write_lerobot(folder, [rows], terminateds="next.done", truncateds=None)


@pytest.mark.parametrize(
    ("dones", "rewards", "terminated", "untold"),
    [
        ([0, 0, 1, 0, 0, 0], [0, 0, 5, 0, 0, 5], [True, False], 0),  # Not always in the last frame: terminations.
        ([0, 0, 1, 0, 0, 1], [0, 0, 5, 0, 0, 0], [True, False], 1),  # Ends alone: the reward tells.
        ([0, 0, 1, 0, 0, 1], [1, 2, 3, 4, 5, 6], [False, False], 2),
        ([0, 0, 1, 0, 0, 1], [-1, -1, 0, -1, -1, 0], [True, True], 0),
    ],
)
def test_dones_alone_are_terminations_only_where_that_is_told(
    dones: list[int], rewards: list[float], terminated: list[bool], untold: int, tmp_path: Path
) -> None:
    episodes, remarks = read(of_dones(tmp_path, dones, rewards), missing_final_observation="repeat")
    assert [episode.is_terminated for episode in episodes] == terminated
    assert [list(episode.get_rewards()) for episode in episodes] == [rewards[:3], rewards[3:]]
    assert remarks.get(ENDS_UNTOLD, 0) == untold


def test_frames_without_any_sign_of_an_end_are_unfinished(tmp_path: Path) -> None:
    folder = of_dones(tmp_path, [0] * 6, [0] * 6)
    described(folder, lambda info: info["features"].pop("next.done"))
    replaced_column(folder, "next.done", None)
    with pytest.raises(ValueError, match=r"ends neither terminated nor truncated .*`terminated: FEATURE`"):
        read(folder)
    assert len(read(folder, unfinished_episodes="truncate")[0]) == 2
