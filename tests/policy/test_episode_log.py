"""`EpisodeLog`: files that the readers of data read as what was logged, whole or absent whatever happens."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rllib_calql import EpisodeLog
from rllib_calql.datasets import open_input
from rllib_calql.datasets.episodes.reader import EpisodeBlock
from rllib_calql.policy import whole_files


def blocks_in(folder: Path) -> list[EpisodeBlock]:
    (reader,) = open_input(str(folder))
    return list(reader.blocks())


def leaf(nested: Any, *keys: Any) -> np.ndarray:
    for key in keys:
        nested = nested[key]
    return np.asarray(nested)


def test_what_was_logged_is_what_the_readers_of_data_read(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path / "episodes")
    rng = np.random.default_rng(0)
    asked, done_instead, rewards, observations = [], [], [], []
    for ends in ((False, False, True), (False, False)):  # A success after three steps, a cut after two.
        obs = {"arm": rng.normal(size=2).astype(np.float32), "grip": (np.uint8(7), 0.5)}
        observations.append(obs["arm"].copy())
        assert log.reset(obs) is None
        for place, is_end in enumerate(ends):
            action = rng.normal(size=1)
            obs["arm"] = rng.normal(size=2).astype(np.float32)
            executed = None if place else action / 2
            is_cut = len(ends) == 2 and place == 1
            file = log.step(action, place - 1, is_end, is_cut, obs, executed, is_intervention=place == 0)
            assert (file is not None) == (is_end or is_cut)
            asked.append(action.copy())
            done_instead.append(action.copy() if executed is None else executed)
            rewards.append(place - 1)
            observations.append(obs["arm"].copy())
            action[:] = np.nan  # The loop may use its arrays again.
            obs["arm"] = obs["arm"].copy()
    assert (log.num_episodes, log.num_steps) == (2, 5)

    (reader,) = open_input(str(log.folder))
    (block,) = blocks_in(log.folder)
    assert block.lengths.tolist() == [3, 2]
    assert block.terminateds.tolist() == [True, False]
    np.testing.assert_array_equal(np.asarray(block.actions), np.stack(done_instead))
    np.testing.assert_array_equal(np.asarray(block.rewards), rewards)
    arm = leaf(block.observations, "arm")
    assert (arm.dtype, leaf(block.observations, "grip", 0).dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(arm, np.stack([observations[place] for place in (0, 1, 2, 4, 5)]))
    after = leaf(block.final_observations, "arm")
    np.testing.assert_array_equal(after, np.stack([observations[place] for place in (3, 6)]))
    np.testing.assert_array_equal(block.extra_model_outputs["is_intervention"], [1, 0, 0, 1, 0])
    assert "actions (`executed_actions` is read in its place)" in reader.info.ignored_columns
    with np.load(sorted(log.folder.iterdir())[0]) as stored:
        np.testing.assert_array_equal(stored["actions"], np.stack(asked[:3]))


def test_an_episode_under_way_ends_as_one_that_was_cut_at_a_reset_and_at_the_end_of_the_log(tmp_path: Path) -> None:
    with EpisodeLog(tmp_path) as log:
        log.reset([0.0])
        assert log.reset([1.0]) is None  # Nothing had been done.
        log.step([0.5], 1.0, False, False, [2.0])
        assert log.reset([3.0]) is not None
        log.step([0.5], 1.0, False, False, [4.0])
        log.step([0.5], 1.0, False, False, [5.0])
    (block,) = blocks_in(tmp_path)
    assert (block.lengths.tolist(), block.terminateds.tolist()) == ([1, 2], [False, False])
    with pytest.raises(RuntimeError, match="call `reset` with its first observation"):
        log.step([0.5], 1.0, False, False, [2.0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"obs": [0.0, 1.0]}, ValueError, r"`obs` has shape \(2,\), the one before it had \(1,\)"),
        ({"obs": {"a": [0.0]}}, ValueError, r"`obs` has the parts 'a', those before it had 'observations'"),
        ({"obs": [np.nan]}, ValueError, r"`obs` holds nan at \[0\]; a log takes finite numbers only"),
        ({"obs": [None]}, TypeError, r"`obs` holds object; a log takes numbers"),
        ({"obs": ["a"]}, TypeError, r"`obs` holds <U1"),
        ({"obs": {"a/b": 1.0}}, ValueError, r"has the key 'a/b'; keys are texts without '/'"),
        ({"action": [0.5, 0.5]}, ValueError, r"`action` has shape \(2,\)"),
        ({"action": np.array([1], np.int64)}, None, ""),  # A whole number is a number.
        ({"action": [1e300]}, ValueError, r"`action` holds inf at \[0\]"),  # As float32, as those before it.
        ({"obs": [1e39]}, ValueError, r"`obs` holds 1e\+39 at \[0\]; .* up to 3\.4e\+38"),  # Training would refuse it.
        ({"obs": [[0.0], [1.0, 2.0]]}, ValueError, r"`obs` must be one array of numbers, got a list"),
        ({"obs": []}, ValueError, r"`obs` is empty"),
        ({"obs": ()}, ValueError, r"`obs` is an empty tuple"),
        ({"obs": np.ma.masked_array([1.0], [True])}, ValueError, r"`obs` has masked numbers; fill them"),
        ({"action": (0.5,)}, TypeError, r"`action` must be one array or number, got a tuple; join its parts"),
        ({"action": 0.5j}, TypeError, r"`action` holds complex128"),
        ({"executed_action": [np.inf]}, ValueError, r"`executed_action` holds inf"),
        ({"executed_action": [[0.5]]}, ValueError, r"`executed_action` has shape \(1, 1\)"),
        ({"reward": np.nan}, ValueError, r"`reward` must be a finite number, got nan"),
        ({"reward": 1e39}, ValueError, r"`reward` must be a finite number, got 1e\+39; float32 holds up to 3\.4e\+38"),
        ({"reward": "1.5"}, ValueError, r"`reward` must be a finite number, got '1\.5'"),
        ({"reward": None}, ValueError, r"`reward` must be a finite number, got None"),
        ({"reward": 10**400}, ValueError, r"`reward` must be a finite number"),
        ({"reward": np.array([1.5])}, None, ""),
        ({"terminated": "yes"}, TypeError, r"`terminated` must be True or False, got 'yes'"),
        ({"is_intervention": 2}, TypeError, r"`is_intervention` must be True or False, got 2"),
        ({"terminated": 1}, None, ""),
    ],
)
def test_a_value_that_does_not_fit_is_refused_and_the_episode_goes_on_without_it(
    tmp_path: Path, change: dict[str, Any], error: type[Exception] | None, message: str
) -> None:
    log = EpisodeLog(tmp_path)
    step: dict[str, Any] = {"action": np.array([0.5], np.float32), "reward": 0, "terminated": False, "truncated": False}
    step |= {"obs": [1.0]}
    log.reset([0.0])
    log.step(**step)
    if error is None:
        log.step(**step | change)
    else:
        with pytest.raises(error, match=message):
            log.step(**step | change)
    log.close()
    (block,) = blocks_in(tmp_path)
    assert block.lengths.tolist() == [1 if error else 2]


def test_a_refused_first_step_leaves_no_mark_on_those_after_it(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path)
    log.reset([0.0])
    with pytest.raises(ValueError, match=r"`executed_action` has shape \(2,\), the one before it had \(3,\)"):
        log.step([1, 2, 3], 0.0, False, False, [1.0], executed_action=[1, 2])
    with pytest.raises(ValueError, match="`reward` must be"):
        log.step([1, 2], np.nan, False, False, [1.0])
    log.step([0.5, 0.25], 0.0, True, False, [1.0])
    (block,) = blocks_in(tmp_path)
    np.testing.assert_array_equal(np.asarray(block.actions), [[0.5, 0.25]])


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (np.int16(5), 70_000, "`obs` holds 70000, which int16 cannot hold"),
        (np.uint8(5), np.uint16(256), "`obs` holds 256, which uint8 cannot hold"),
        (np.int64(5), np.uint64(2**63), "`obs` holds 9223372036854775808, which int64 cannot hold"),
        (5, 0.5, "`obs` holds float64, the one before it held int64"),
    ],
)
def test_a_number_that_the_type_of_the_first_one_cannot_hold_is_refused_with_the_remedy(
    tmp_path: Path, first: Any, then: Any, message: str
) -> None:
    log = EpisodeLog(tmp_path)
    log.reset({"counter": first})
    with pytest.raises(ValueError, match=message.replace("`obs`", "`obs` at 'counter'") + ".*such as `numpy.float64`"):
        log.step([0.5], 0.0, False, False, {"counter": then})


@pytest.mark.parametrize("name", ["file", "file/under"])
def test_a_folder_that_cannot_be_written_to_is_told_before_the_loop_drives(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=f"Episodes cannot be written to '{tmp_path}/{name}': .*; name a folder"):
        EpisodeLog(tmp_path / name)


def test_an_empty_name_is_not_the_present_folder() -> None:
    with pytest.raises(ValueError, match="`folder` is an empty text"):
        EpisodeLog("")


def test_a_folder_that_takes_no_files_is_told_before_the_loop_drives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, *arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(OSError, match=r"Episodes cannot be written to .*: Read-only file system; name") as raised:
        EpisodeLog(tmp_path)
    assert raised.value.errno == errno.EROFS


@pytest.mark.parametrize("is_cut_by_reset", [False, True])
def test_an_episode_that_could_not_be_written_is_kept_as_it_ended_and_written_later(
    is_cut_by_reset: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = EpisodeLog(tmp_path)
    log.reset([0.0])
    with monkeypatch.context() as patched:
        patched.setattr(whole_files.os, "fsync", full)
        message = r"An episode of 1 steps is not saved: .*No space left on device; its steps are kept in memory"
        if is_cut_by_reset:
            log.step([0.5], 1.0, False, False, [1.0])
        with pytest.raises(OSError, match=message) as raised:
            log.reset([7.0]) if is_cut_by_reset else log.step([0.5], 1.0, True, False, [1.0])
        assert raised.value.errno == errno.ENOSPC
        with pytest.raises(RuntimeError, match="has ended and could not be written; call `reset` or `close`"):
            log.step([0.5], 9.0, False, False, [2.0])  # Steps of the next one are none of it.
    assert list(tmp_path.iterdir()) == []
    log.reset([5.0])
    log.step([0.5], 3.0, True, False, [6.0])
    first, second = blocks_in(tmp_path)[0], blocks_in(tmp_path)[-1]
    assert first.terminateds.tolist()[0] is (not is_cut_by_reset)
    assert np.asarray(first.rewards).tolist()[:1] + np.asarray(second.rewards).tolist()[-1:] == [1.0, 3.0]
    assert sum(block.lengths.sum() for block in blocks_in(tmp_path)) == 2


def test_what_a_power_cut_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".episode-a.npz.partial", tmp_path / ".episode-b.npz.partial"
    for path in (old, new):
        path.write_bytes(b"PK")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    EpisodeLog(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


LOOP = """
import sys
for name in ("ray", "torch", "gymnasium", "scipy", "pyarrow"):
    sys.modules[name] = None
import numpy as np
from rllib_calql import EpisodeLog
log = EpisodeLog(sys.argv[1])
number = 0
while True:
    log.reset(np.full(2000, number))
    for step in range(4):
        log.step(np.zeros(1), number, step == 3, False, np.full(2000, number))
    number += 1
    print(number, flush=True)  # After the file is on the disk.
"""


def test_a_killed_loop_without_ray_leaves_whole_episodes_and_each_that_it_had_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", LOOP, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        written = 1 + process.stdout.read().count("\n")
        process.wait(timeout=10)
        rewards = [reward for block in blocks_in(folder) for reward in np.asarray(block.rewards).tolist()]
        number = len(rewards) // 4
        assert rewards == [float(episode) for episode in range(number) for _ in range(4)]
        assert number in (written, written + 1)  # One may be there that was not told yet.
