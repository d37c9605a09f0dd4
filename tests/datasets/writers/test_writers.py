"""What is written comes back bit for bit, whatever the format, and a writer that fails leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pyarrow.parquet as pq
import pytest
import tree

from rllib_calql.datasets import open_input
from rllib_calql.datasets.episodes.reader import EpisodeBlock
from rllib_calql.datasets.writers import file_formats, staging, writers
from rllib_calql.datasets.writers.conversion import ActionBounds, convert, scaled_to_environment
from rllib_calql.datasets.writers.writers import DatasetMetadata, WriteSummary, write_blocks

ACTION_SPACE = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)
LENGTHS = (3, 1, 5, 2)
TARGETS = ("rows.parquet", "folder/", "data.hdf5", "data.h5", "data.npz", "minari:test/written-v0")
FILES = [target for target in TARGETS if not target.startswith("minari:")]


def flat(rng: np.random.Generator, rows: int) -> Any:
    return rng.normal(size=(rows, 3))


def maze(rng: np.random.Generator, rows: int) -> Any:
    return {
        "observation": rng.normal(size=(rows, 4)),
        "achieved_goal": rng.normal(size=(rows, 2)).astype(np.float32),
        "desired_goal": rng.normal(size=(rows, 2)).astype(np.float16),
    }


def camera(rng: np.random.Generator, rows: int) -> Any:
    return {
        "image": rng.integers(0, 256, size=(rows, 4, 5, 3), dtype=np.uint8),
        "joints": (rng.normal(size=(rows, 2)), rng.integers(-9, 9, size=rows)),
    }


def blocks_of(make: Any, lengths: tuple[int, ...] = LENGTHS, *, extra: bool = False) -> list[EpisodeBlock]:
    """Two episodes per block, ended in turn by termination, by a time-out and by both."""
    rng = np.random.default_rng(0)
    blocks = []
    for first in range(0, len(lengths), 2):
        part = lengths[first : first + 2]
        rows, ids = sum(part), [f"episode {first + i}" for i in range(len(part))]
        blocks.append(
            EpisodeBlock(
                ids=ids,
                lengths=np.array(part),
                observations=make(rng, rows),
                final_observations=make(rng, len(part)),
                actions=rng.uniform(-2.0, 2.0, size=(rows, 2)).astype(np.float32),
                rewards=rng.normal(size=rows).astype(np.float32),
                terminateds=np.array([first % 4 == 0, True])[: len(part)],
                truncateds=np.array([first % 4 != 0, first % 4 == 0])[: len(part)],
                where=lambda row: f"row {row}",
                extra_model_outputs={"action_logp": rng.normal(size=rows)} if extra else {},
            )
        )
    return blocks


def write(blocks: list[EpisodeBlock], tmp_path: Path, target: str, **settings: Any) -> tuple[str, WriteSummary]:
    to = target if target.startswith("minari:") else f"{tmp_path}/{target}"
    metadata = DatasetMetadata(action_space=ACTION_SPACE)
    return to, write_blocks(iter(blocks), to, metadata=metadata, overwrite=True, **settings)


def episodes_in(blocks: Any) -> list[dict[str, Any]]:
    """A plain loop over blocks: every episode as its own arrays."""
    episodes = []
    for block in blocks:
        row = 0
        for i, length in enumerate(block.lengths):
            here = slice(row, row + int(length))
            episodes.append(
                {
                    "obs": tree.map_structure(
                        lambda rows, final, here=here, i=i: np.concatenate([rows[here], final[i : i + 1]]),
                        block.observations,
                        block.final_observations,
                    ),
                    "actions": block.actions[here],
                    "rewards": block.rewards[here],
                    "ends": (bool(block.terminateds[i]), bool(block.truncateds[i])),
                    **{name: column[here] for name, column in block.extra_model_outputs.items()},
                }
            )
            row += int(length)
    return episodes


def assert_identical(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        tree.assert_same_structure(one, other)
        for (path, array), want in zip(tree.flatten_with_path(one), tree.flatten(other), strict=True):
            assert np.asarray(array).dtype == np.asarray(want).dtype, path
            np.testing.assert_array_equal(array, want, err_msg=str(path))


def read(to: str) -> list[dict[str, Any]]:
    (reader,) = open_input(to)
    return episodes_in(reader.blocks())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", [flat, maze])
def test_every_format_returns_every_column_bit_for_bit(tmp_path: Path, target: str, make: Any) -> None:
    blocks = blocks_of(make)
    to, summary = write(blocks, tmp_path, target)
    assert summary == WriteSummary(to, num_episodes=4, num_transitions=11)
    assert_identical(read(to), episodes_in(blocks))


@pytest.mark.parametrize("target", ["data.hdf5", "data.npz", "minari:test/camera-v0"])
def test_images_integers_and_tuples_come_back_as_they_were(tmp_path: Path, target: str) -> None:
    blocks = blocks_of(camera)
    to, _ = write(blocks, tmp_path, target)
    assert_identical(read(to), episodes_in(blocks))


def test_parquet_holds_images_as_nested_lists_of_one_shape(tmp_path: Path) -> None:
    blocks = blocks_of(lambda rng, rows: camera(rng, rows)["image"])
    to, _ = write(blocks, tmp_path, "rows.parquet")
    assert_identical(read(to), episodes_in(blocks))


@pytest.mark.parametrize("target", FILES)
def test_further_columns_are_kept_in_files(tmp_path: Path, target: str) -> None:
    blocks = blocks_of(flat, extra=True)
    to, summary = write(blocks, tmp_path, target)
    assert summary.left_out == ()
    assert_identical(read(to), episodes_in(blocks))


def test_minari_reports_the_columns_that_it_has_no_place_for(tmp_path: Path) -> None:
    _, summary = write(blocks_of(flat, extra=True), tmp_path, "minari:test/extra-v0")
    assert summary.left_out == ("action_logp",)


def test_hdf5_and_npz_have_the_names_and_flags_of_d4rl(tmp_path: Path) -> None:
    blocks = blocks_of(maze)
    write(blocks, tmp_path, "data.hdf5")
    write(blocks, tmp_path, "data.npz")
    expected = np.concatenate([block.observations["observation"] for block in blocks])
    ends = np.cumsum(LENGTHS) - 1
    with h5py.File(tmp_path / "data.hdf5") as hdf5, np.load(tmp_path / "data.npz") as npz:
        for source in (hdf5, npz):
            np.testing.assert_array_equal(source["observations/observation"][:], expected)
            assert np.flatnonzero(source["terminals"][:] | source["timeouts"][:]).tolist() == ends.tolist()
            assert source["terminals"][:][ends].tolist() == [True, True, False, True]
            assert source["timeouts"][:][ends].tolist() == [False, True, True, False]
            # The observation after a last row is the final one, elsewhere that of the row below.
            np.testing.assert_array_equal(
                source["next_observations/observation"][:][ends[1]], blocks[0].final_observations["observation"][1]
            )
            np.testing.assert_array_equal(source["next_observations/observation"][:][0], expected[1])
        assert sorted(npz.files) == sorted(
            ["actions", "rewards", "terminals", "timeouts"]
            + [f"{name}/{key}" for name in ("observations", "next_observations") for key in blocks[0].observations]
        )


def test_parquet_rows_count_the_steps_of_each_episode(tmp_path: Path) -> None:
    to, _ = write(blocks_of(flat), tmp_path, "rows.parquet")
    table = pq.read_table(to)
    assert table["t"].to_pylist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1]
    assert table["eps_id"].to_pylist() == [f"episode {i}" for i, n in enumerate(LENGTHS) for _ in range(n)]


@pytest.mark.parametrize("target", TARGETS)
def test_the_size_of_the_blocks_does_not_show_in_the_result(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "_PIECE_BYTES", 1)
    monkeypatch.setattr(file_formats, "_PART_BYTES", 1)
    blocks = blocks_of(maze, (1,) * 7)
    to, _ = write(blocks, tmp_path, target)
    assert_identical(read(to), episodes_in(blocks))
    if target == "folder/":
        assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [f"part-{i}.parquet" for i in range(4)]


def test_the_reference_scores_come_back_where_the_format_keeps_them(tmp_path: Path) -> None:
    metadata = DatasetMetadata(action_space=ACTION_SPACE, reference_scores=(-3.5, 7.25))
    for to in (f"{tmp_path}/scores.hdf5", "minari:test/scores-v0"):
        assert write_blocks(blocks_of(flat), to, metadata=metadata).left_out == ()
        assert open_input(to)[0].info.reference_scores == (-3.5, 7.25)
    for to in (f"{tmp_path}/scores.npz", f"{tmp_path}/scores.parquet"):
        assert write_blocks(blocks_of(flat), to, metadata=metadata).left_out == ("ref_min_score", "ref_max_score")


def test_a_minari_dataset_can_recover_its_environment(tmp_path: Path) -> None:
    env = gym.make("Pendulum-v1", max_episode_steps=7)
    metadata = DatasetMetadata(env.observation_space, env.action_space, env.spec)
    block = blocks_of(lambda rng, rows: rng.normal(size=(rows, 3)).astype(np.float32))[0]
    write_blocks([replace(block, actions=block.actions[:, :1])], "minari:test/recover-v0", metadata=metadata)
    assert minari.load_dataset("test/recover-v0").recover_environment().spec.max_episode_steps == 7


# --- Nothing is left behind, nothing is replaced unasked --------------------------------------------------------------


def failing(blocks: list[EpisodeBlock], error: BaseException) -> Iterator[EpisodeBlock]:
    yield from blocks
    raise error


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("error", [RuntimeError("cut"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_nothing_behind(
    tmp_path: Path, target: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    to = target if target.startswith("minari:") else f"{tmp_path}/{target}"
    metadata = DatasetMetadata(action_space=ACTION_SPACE)
    with pytest.raises(type(error)):
        write_blocks(failing(blocks_of(maze), error), to, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_writer_that_fails_leaves_the_old_data_as_they_were(tmp_path: Path, target: str) -> None:
    blocks = blocks_of(flat)
    to, _ = write(blocks, tmp_path, target)
    with pytest.raises(RuntimeError, match="cut"):
        write_blocks(
            failing(blocks_of(maze), RuntimeError("cut")),
            to,
            metadata=DatasetMetadata(action_space=ACTION_SPACE),
            overwrite=True,
        )
    assert_identical(read(to), episodes_in(blocks))


@pytest.mark.parametrize("target", TARGETS)
def test_existing_data_are_replaced_only_on_request(tmp_path: Path, target: str) -> None:
    to, _ = write(blocks_of(flat), tmp_path, target)

    def never() -> Iterator[EpisodeBlock]:
        raise AssertionError("Something was read before the target was known to be free.")
        yield

    with pytest.raises(FileExistsError, match="`overwrite=True`"):
        write_blocks(never(), to)
    blocks = blocks_of(maze)
    write(blocks, tmp_path, target)
    assert_identical(read(to), episodes_in(blocks))


def test_a_folder_that_holds_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("months of work")
    with pytest.raises(FileExistsError, match="something else"):
        write_blocks(blocks_of(flat), f"{tmp_path}/home/", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "months of work"


def test_an_hdf5_file_is_no_longer_than_its_contents(tmp_path: Path) -> None:
    blocks = blocks_of(flat)
    write(blocks, tmp_path, "data.hdf5")
    assert (tmp_path / "data.hdf5").stat().st_size < 20_000


@pytest.mark.parametrize("target", ["rows.parquet", "folder/", "data.hdf5", "data.npz"])
def test_a_full_disk_names_the_target_and_leaves_nothing(tmp_path: Path, target: str) -> None:
    big = blocks_of(lambda rng, rows: rng.normal(size=(rows, 50)), (400,) * 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=f"{target.rstrip('/')}' was not written, nothing is left") as caught:
            write_blocks(big, f"{tmp_path}/{target}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    script = (
        "import os, runpy, signal, sys; from pathlib import Path\n"
        "staged = runpy.run_path(sys.argv[1])['staged']; target = Path(sys.argv[2])\n"
        "with staged(target, target.parent, overwrite=False) as path:\n"
        "    path.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, staging.__file__, str(tmp_path / "data.npz")], timeout=60, check=False
    )
    (left,) = tmp_path.iterdir()
    long_ago = time.time() - 3600
    os.utime(left, (long_ago, long_ago))
    write(blocks_of(flat), tmp_path, "data.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_the_folder_of_a_writer_at_work_is_not_removed(tmp_path: Path) -> None:
    with staging.staged(tmp_path / "slow.txt", tmp_path, overwrite=False) as path:
        path.write_text("complete")
        long_ago = time.time() - 3600
        os.utime(path.parent, (long_ago, long_ago))
        write(blocks_of(flat), tmp_path, "data.npz")
    assert (tmp_path / "slow.txt").read_text() == "complete"


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        ("data.csv", ValueError, r"`to` must be .*`\*\.parquet`.*got .*data\.csv"),
        ("s3://bucket/rows.parquet", ValueError, "only local paths"),
        ("minari:no-version", ValueError, r"minari:mine/hopper-v0"),
        ("nowhere/rows.parquet", FileNotFoundError, "There is no folder .*nowhere.*create it"),
    ],
)
def test_targets_that_cannot_be_written_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        write_blocks(blocks_of(flat), to)
    assert list(tmp_path.iterdir()) == []


def test_data_without_episodes_are_refused(tmp_path: Path) -> None:
    for target in TARGETS:
        with pytest.raises(ValueError, match="no episodes to write"):
            write([], tmp_path, target.replace("written", "empty"))


def test_blocks_of_different_layout_are_refused_by_column(tmp_path: Path) -> None:
    first, second = blocks_of(flat)
    other = replace(second, rewards=second.rewards.astype(np.float64))
    with pytest.raises(ValueError, match=r"`rewards` is float64 .* from episode 'episode 2' .* float32"):
        write_blocks([first, other], tmp_path / "rows.parquet")


def test_two_episodes_of_one_id_are_refused_where_ids_tell_them_apart(tmp_path: Path) -> None:
    first, second = blocks_of(flat)
    with pytest.raises(ValueError, match="Two episodes have the id 'episode 1'"):
        write_blocks([first, replace(second, ids=["episode 1", "new"])], tmp_path / "rows.parquet")


def test_a_further_column_must_not_take_the_name_of_a_transition_column(tmp_path: Path) -> None:
    block = replace(blocks_of(flat)[0], extra_model_outputs={"timeouts": np.zeros(4)})
    with pytest.raises(ValueError, match="`timeouts` has the name"):
        write_blocks([block], tmp_path / "data.hdf5")


def test_keys_that_are_no_part_of_a_path_are_refused(tmp_path: Path) -> None:
    blocks = blocks_of(lambda rng, rows: {"a/b": flat(rng, rows)})
    with pytest.raises(ValueError, match="key 'a/b'"):
        write_blocks(blocks, tmp_path / "data.npz")


def test_minari_needs_an_action_space(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass `action_space`"):
        write_blocks(blocks_of(flat), "minari:test/no-space-v0")


# --- Conversion -------------------------------------------------------------------------------------------------------


def test_a_dataset_goes_through_all_formats_unchanged(tmp_path: Path) -> None:
    blocks = blocks_of(maze)
    at, _ = write(blocks, tmp_path, "start.parquet")
    for number, target in enumerate(TARGETS):
        to = "minari:test/chain-v0" if target.startswith("minari:") else f"{tmp_path}/{number}-{target}"
        assert convert(at, to, action_space=ACTION_SPACE).num_transitions == sum(LENGTHS)
        at = to
    assert_identical(read(at), episodes_in(blocks))
    space = open_input("minari:test/chain-v0")[0].info.action_space
    assert space == ACTION_SPACE


def test_a_dataset_can_be_converted_onto_itself(tmp_path: Path) -> None:
    blocks = blocks_of(flat)
    to, _ = write(blocks, tmp_path, "data.hdf5")
    convert(to, to, overwrite=True)
    assert_identical(read(to), episodes_in(blocks))


def test_inputs_with_equal_episode_ids_become_one_dataset(tmp_path: Path) -> None:
    first, second = blocks_of(flat)
    one, _ = write([first], tmp_path, "one.parquet")
    two, _ = write([replace(second, ids=first.ids)], tmp_path, "two.parquet")
    summary = convert([one, two], tmp_path / "both.parquet")
    assert (summary.num_episodes, summary.num_transitions) == (4, 11)
    assert_identical(read(f"{tmp_path}/both.parquet"), episodes_in([first, second]))


@pytest.mark.parametrize("space", [ActionBounds((-2.0,), (2.0,)), gym.spaces.Box(-2.0, 2.0, (1,), np.float64)])
def test_single_numbers_are_actions_of_one_dimension(space: Any, tmp_path: Path) -> None:
    actions = np.array([-2.0, 0.5, 2.0])
    ends = np.array([0, 0, 1])
    np.savez(tmp_path / "a.npz", obs=np.eye(3), actions=actions, rewards=ends, terminals=ends)
    convert(tmp_path / "a.npz", tmp_path / "b.npz", action_space=space)
    (episode,) = open_input(tmp_path / "b.npz")[0]
    np.testing.assert_array_equal(episode.get_actions(), actions[:, None])
    with pytest.raises(ValueError, match=r"action \[2\.0\] is outside the bounds"):
        convert(tmp_path / "a.npz", tmp_path / "c.npz", action_space=ActionBounds((-2.0,), (1.5,)))


def test_module_actions_are_clipped_and_scaled_to_the_bounds_per_dimension() -> None:
    space = gym.spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 10.0]), dtype=np.float64)
    actions = np.array([[-1.0, -1.0], [0.0, 0.5], [1.0, 1.0], [-3.0, 7.0]], np.float32)
    scaled = scaled_to_environment(actions, space, "data")
    assert scaled.dtype == np.float32
    assert scaled.tolist() == [[-2.0, 0.0], [0.0, 7.5], [2.0, 10.0], [-2.0, 10.0]]


@pytest.mark.parametrize("space", [None, gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Box(-1.0, 1.0, (3,))])
def test_module_actions_without_fitting_bounds_are_refused(space: gym.Space[Any] | None) -> None:
    with pytest.raises(ValueError, match=r"bounded Box of that shape.*pass `action_space`"):
        scaled_to_environment(np.zeros((1, 2)), space, "data")


def test_metadata_of_minari_is_json_with_the_numbers_of_the_data(tmp_path: Path) -> None:
    write(blocks_of(flat), tmp_path, "minari:test/numbers-v0")
    folder = Path(os.environ["MINARI_DATASETS_PATH"]) / "test" / "numbers-v0"
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    assert (metadata["total_episodes"], metadata["total_steps"]) == (4, 11)
    assert metadata["dataset_id"] == "test/numbers-v0"
