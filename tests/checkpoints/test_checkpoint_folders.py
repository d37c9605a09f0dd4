"""Folders of checkpoints under interruptions: exceptions and crashes at every operation, SIGKILL at random moments."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_writers import race
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray.rllib.utils import checkpoints
from tiny import line_config

from rllib_calql import CalQL
from rllib_calql.checkpoints import reading as checkpoint
from rllib_calql.checkpoints.reading import checked_checkpoint, replaced_folder
from rllib_calql.system.file_lock import LockedError

FILES = ("class_and_ctor_args.pkl", "calql.json", "learner_group/learner/state.pkl", "algorithm_state.pkl")


class Crash(BaseException):
    """The end of the process: nothing catches it, and nothing works after it."""


class Operations:
    """Counts what changes the file system; from the n-th on, everything crashes."""

    def __init__(self, crash_at: int) -> None:
        self.crash_at = crash_at
        self.count = 0

    def happens(self) -> None:
        """One more operation."""
        self.count += 1
        if self.count >= self.crash_at:
            raise Crash


@contextmanager
def crashing(monkeypatch: pytest.MonkeyPatch, crash_at: int) -> Iterator[Operations]:
    operation = Operations(crash_at)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            operation.happens()
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "unlink", "rmdir", "mkdir", "link"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(os, "fsync", counted(lambda descriptor: None))  # There is no loss of power here; and it is slow.
        yield operation


def write_generation(folder: Path, generation: int, operation: Callable[[], None] = lambda: None) -> None:
    """Writes what stands for a checkpoint: every file says which one it is of."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("w") as file:
            text = f"{generation:08}"
            file.write(text[:4])
            file.flush()
            operation()
            file.write(text[4:])


def write_and_fail(path: Path, error: BaseException) -> None:
    with replaced_folder(path) as folder:
        for name in FILES[:2]:
            (folder / name).write_text("half")
        raise error


def generation_of(path: Path) -> int:
    """The one generation that all files of the checkpoint are of."""
    folder = checked_checkpoint(path)
    (generation,) = {(folder / name).read_text() for name in FILES}
    assert len(generation) == 8
    return int(generation)


@pytest.mark.parametrize("has_notes", [False, True])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_notes: bool
) -> None:
    generations = []
    for crash_at in range(1, 200):
        path = tmp_path / str(crash_at) / "checkpoint"
        with replaced_folder(path) as folder:
            write_generation(folder, 1)
        if has_notes:
            (path / "notes.txt").write_text("mine")
        with crashing(monkeypatch, crash_at) as operation:
            try:
                with replaced_folder(path) as folder:
                    write_generation(folder, 2, operation.happens)
            except Crash:
                pass
        generations.append(generation_of(path))
        if operation.count < crash_at:
            break
        with replaced_folder(path) as folder:  # Whatever was left behind, the next save works and cleans up.
            write_generation(folder, 3)
        assert generation_of(path) == 3
        assert os.listdir(path.parent) == ["checkpoint"]
        assert sorted(entry.name for entry in path.iterdir()) == sorted(
            {name.split("/")[0] for name in FILES} | ({"notes.txt"} if has_notes else set())
        )
    assert operation.count < crash_at
    assert sorted(generations) == generations  # Once the new one is in place, it stays.
    assert {1, 2} == set(generations)


def test_a_second_crash_while_cleaning_up_after_the_first_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    path = tmp_path / "checkpoint"
    with replaced_folder(path) as folder:
        write_generation(folder, 0)
    known = 0
    for generation in range(1, 200):
        if rng.random() < 0.1:
            (path / "notes.txt").write_text("mine") if path.is_dir() else None
        with crashing(monkeypatch, rng.randrange(1, 60)) as operation:
            try:
                with replaced_folder(path) as folder:
                    write_generation(folder, generation, operation.happens)
            except Crash:
                pass
        assert known <= generation_of(path) <= generation
        known = generation_of(path)
    assert known > 100


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exception_while_writing_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "checkpoint"
    with replaced_folder(path) as folder:
        write_generation(folder, 1)
    with pytest.raises(error):
        write_and_fail(path, error())
    assert generation_of(path) == 1
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_an_empty_folder_is_taken_over_with_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir(mode=0o700)
    with replaced_folder(path) as folder:
        write_generation(folder, 1)
    assert generation_of(path) == 1
    assert path.stat().st_mode & 0o777 == 0o700


def test_parts_that_the_new_checkpoint_lacks_do_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with replaced_folder(path) as folder:
        write_generation(folder, 1)
        (folder / "env_runner").mkdir()
    with replaced_folder(path) as folder:
        write_generation(folder, 2)
    assert not (path / "env_runner").exists()


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoint").symlink_to(tmp_path / "disk")
    for generation in (1, 2):
        with replaced_folder(tmp_path / "checkpoint") as folder:
            write_generation(folder, generation)
    assert (tmp_path / "checkpoint").is_symlink()
    assert generation_of(tmp_path / "disk") == 2


def test_files_are_copied_where_they_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "notes.txt").write_text("mine")
    with replaced_folder(tmp_path) as folder:
        write_generation(folder, 1)
    assert generation_of(tmp_path) == 1


def test_a_checkpoint_in_place_is_noticed_when_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: True)  # Nothing can be renamed to a mount point.
    for generation in (1, 2):
        with replaced_folder(tmp_path) as folder:
            write_generation(folder, generation)
        assert generation_of(tmp_path) == generation
    with pytest.raises(OSError, match="disk full"):
        write_and_fail(tmp_path, OSError("disk full"))
    with pytest.raises(ValueError, match="is incomplete: saving it was interrupted"):
        checked_checkpoint(tmp_path)


def test_sigkill_at_random_moments_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    program = f"""
import itertools, sys, types
from pathlib import Path
package = sys.modules["rllib_calql"] = types.ModuleType("rllib_calql")  # Without Ray, which takes seconds to import.
package.__path__ = [{str(Path(checkpoint.__file__).parents[1])!r}]
from rllib_calql.checkpoints import reading as checkpoint
path, first = Path(sys.argv[1]), int(sys.argv[2])
for generation in itertools.count(first):
    with checkpoint.replaced_folder(path) as folder:
        for name in {FILES!r}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{{generation:08}}")
    if generation == first:
        print("saved", flush=True)
"""
    rng = random.Random(0)
    path = tmp_path / "checkpoint"
    known = 0
    for _ in range(12):
        command = [sys.executable, "-c", program, str(path), str(known + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"saved\n"
            time.sleep(rng.uniform(0.0, 0.03))
            process.send_signal(signal.SIGKILL)
        assert generation_of(path) > known
        known = generation_of(path)


# --- Several writers --------------------------------------------------------------------------------------------------


def test_two_live_writers_leave_a_whole_checkpoint_of_one_of_them_after_every_round(tmp_path: Path) -> None:
    outcome = race(tmp_path / "checkpoint", rounds=15)
    assert outcome.wrong == []
    assert outcome.num_saved + len(outcome.refusals) == 30
    assert outcome.num_saved >= 15
    assert os.listdir(tmp_path) == ["checkpoint"]


def spellings(tmp_path: Path) -> dict[str, Path]:
    """Other names of `tmp_path / "checkpoint"`."""
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint")
    (tmp_path / "folder").symlink_to(tmp_path)
    names = ("checkpoint", "link", "folder/checkpoint", "folder/../" + tmp_path.name + "/link")
    return {name: tmp_path / name for name in names}


@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_second_writer_is_told_of_the_first_which_goes_on_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_in_place: bool
) -> None:
    path = tmp_path / "checkpoint"
    with replaced_folder(path) as folder:
        write_generation(folder, 1)
    if is_in_place:
        monkeypatch.setattr(os.path, "ismount", lambda path: True)
    holder = (
        rf"^Process {os.getpid()} on .*since 20.* is writing a checkpoint to '{path}'; this one was not saved: give"
    )
    with replaced_folder(path) as folder:
        write_generation(folder, 2)
        for spelling in spellings(tmp_path).values():
            with pytest.raises(LockedError, match=holder), replaced_folder(spelling):
                pass
            with ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError, match=holder):
                thread.submit(write_and_fail, spelling, OSError()).result()
    assert generation_of(path) == 2
    with replaced_folder(path) as folder:  # Nothing is left of the lock.
        write_generation(folder, 3)
    assert generation_of(path) == 3
    assert sorted(os.listdir(path)) == sorted({name.split("/")[0] for name in FILES})


def test_what_a_live_writer_writes_to_is_never_removed_and_what_a_dead_one_left_is(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    (tmp_path / ".checkpoint.writing").mkdir()  # Of an earlier version.
    (tmp_path / ".checkpoint.writing-notes").mkdir()  # Of somebody else, as is the next one.
    (tmp_path / ".checkpoint.writing-0123abcd.writing-0123abcd").mkdir()
    with replaced_folder(path) as slow:
        write_generation(slow, 1)
        (tmp_path / ".checkpoint.lock").unlink()  # By hand, or by a tool that cleans up.
        with replaced_folder(path) as fast:
            write_generation(fast, 2)
        assert generation_of(path) == 2
        assert slow.is_dir()
    assert generation_of(path) == 1
    program = f"""
import os, signal, sys
from pathlib import Path
from rllib_calql.checkpoints.reading import replaced_folder
with replaced_folder(Path({str(path)!r})) as folder:
    (folder / "algorithm_state.pkl").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert [name for name in os.listdir(tmp_path) if name.endswith("lock") or re.search("writing-[0-9a-f]{8}$", name)]
    with replaced_folder(path) as folder:
        write_generation(folder, 3)
    assert generation_of(path) == 3
    others = [".checkpoint.writing-0123abcd.writing-0123abcd", ".checkpoint.writing-notes"]
    assert sorted(os.listdir(tmp_path)) == [*others, "checkpoint"]


@pytest.mark.parametrize("lost", [FILES[0], FILES[-1]])
def test_what_is_not_complete_does_not_take_the_place_of_what_is(tmp_path: Path, lost: str) -> None:
    path = tmp_path / "checkpoint"
    with replaced_folder(path) as folder:
        write_generation(folder, 1)

    def write_and_lose() -> None:
        with replaced_folder(path) as folder:
            write_generation(folder, 2)
            (folder / lost).unlink()

    with pytest.raises(RuntimeError, match=rf"'{path}' was not written whole, '{lost}' is missing"):
        write_and_lose()
    assert generation_of(path) == 1
    assert os.listdir(tmp_path) == ["checkpoint"]


# --- The algorithm ----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.usefixtures("ray_session")
def test_a_failure_in_any_file_that_rllib_writes_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algo = line_config(tmp_path, offline_updates=10, updates_per_iteration=5).build()
    path = tmp_path / "checkpoint"
    algo.save_to_path(path)
    old = contents(path)
    algo.train()
    real = checkpoints.pickle
    for fail_at in range(1, 100):
        count = 0

        def dump(content: Any, file: Any, fail_at: int = fail_at) -> None:
            nonlocal count
            count += 1
            packed = real.dumps(content)
            file.write(packed if count != fail_at else packed[: len(packed) // 2])
            if count == fail_at:
                raise OSError("No space left on device")

        monkeypatch.setattr(checkpoints, "pickle", SimpleNamespace(dump=dump, load=real.load))
        try:
            algo.save_to_path(path)
        except OSError:
            assert contents(path) == old
        else:
            break
    algo.stop()
    assert fail_at > 8
    assert contents(path).keys() == old.keys()
    assert contents(path)["algorithm_state.pkl"] != old["algorithm_state.pkl"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "line.parquet"]


@pytest.mark.usefixtures("ray_session")
def test_on_a_file_system_without_renaming_an_interrupted_checkpoint_is_refused(tmp_path: Path) -> None:
    remote = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    algo = line_config(tmp_path, offline_updates=10, updates_per_iteration=5).build()
    for updates in (5, 10):
        algo.train()
        assert algo.save_to_path("run/checkpoint", filesystem=remote) == "run/checkpoint"
        restored = CalQL.from_checkpoint("run/checkpoint", remote)
        assert restored.num_offline_updates == updates
        restored.stop()
    algo.get_metadata = lambda: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        algo.save_to_path("run/checkpoint", filesystem=remote)
    algo.stop()
    with pytest.raises(ValueError, match="'run/checkpoint' is no complete checkpoint"):
        CalQL.from_checkpoint("run/checkpoint", remote)
    with pytest.raises(FileNotFoundError, match="no checkpoint at 'run/other'"):
        CalQL.from_checkpoint("run/other", remote)
    shutil.rmtree(tmp_path / "run")
