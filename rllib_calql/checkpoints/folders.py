"""Checkpoint folders: written beside their place by one writer at a time, and renamed once they are complete.

A checkpoint at PATH is written as `.NAME.writing-<random>` beside it. Complete, it becomes `.NAME.new`; then the
earlier one at PATH becomes `.NAME.old`, the new one PATH, and the earlier one is removed. So at any moment one of the
three names holds a complete checkpoint, and readers look for it under all of them.

Writers hold the lock `.NAME.lock`, readers do not. Each writer also holds a lock on the folder it writes to, which
tells a folder in use from one that a dead writer left.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rllib_calql.system.file_lock import LockedError, held_lock

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

MANIFEST = "calql.json"
MARK = "class_and_ctor_args.pkl"  # RLlib writes it into every folder that an object can be restored from.
STATE_FILES = ("algorithm_state.pkl", "algorithm_state.msgpack")  # Written last by RLlib.
PARTS = frozenset(  # What a checkpoint of an algorithm may hold; anything else in its folder belongs to somebody else.
    {
        MANIFEST,
        MARK,
        *STATE_FILES,
        "rllib_checkpoint.json",
        "rllib_calql_whole.pkl",  # The mark of `run_state.py`.
        "learner_group",
        "env_runner",
        "eval_env_runner",
        "env_to_module_connector",
        "module_to_env_connector",
    }
)
_LOCK_INSIDE = ".rllib_calql.lock"


class CheckpointLockedError(LockedError):
    """Somebody else is writing a checkpoint to the same folder."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(path, holder)
        self.args = (
            f"{holder} is writing a checkpoint to '{path}'; this one was not saved: give another folder, or save again "
            "when that is done.",
        )


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Gives an empty folder to write a checkpoint into, which takes the place of `target` once it is complete.

    Whatever interrupts it, and at any byte, `checked_checkpoint(target)` finds the earlier checkpoint or the new one,
    complete. Files of others in `target` stay. Where nothing can be renamed, because `target` is a mount point or its
    parent is read-only, it is written in place: then an interruption loses the earlier one, and is noticed.

    Of several writers, processes or threads, on this or other machines, one writes and the others are refused. On a
    file system without locks (a warning is logged) they all write, to folders of their own: one of them wins.

    Args:
        target: Folder of the checkpoint; it need not exist.

    Raises:
        CheckpointLockedError: If somebody else is writing to it; the message names them.
        RuntimeError: If what was written is no complete checkpoint; the earlier one stays.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK) or os.path.ismount(target):
        with _only_writer(target, target / _LOCK_INSIDE):
            _remove_parts(target)
            yield target
            _refuse_incomplete(target, target)
        return
    with _only_writer(target, beside(target, "lock")):
        _settle(target)
        with _staged_folder(target) as staged:
            yield staged
            _refuse_incomplete(staged, target)
            if target.is_dir():
                shutil.copymode(target, staged)
            flush(staged)
            complete = staged.rename(beside(target, "new"))
        _install(complete, target)


def beside(target: Path, role: str) -> Path:
    """Where a save keeps what is not at `target` itself."""
    return target.with_name(f".{target.name}.{role}")


def is_complete(folder: Path) -> bool:
    """Whether a local folder holds a checkpoint of an algorithm, to the last file that RLlib writes."""
    return (folder / MARK).is_file() and any((folder / name).is_file() for name in STATE_FILES)


# --- One writer -------------------------------------------------------------------------------------------------------


@contextmanager
def _only_writer(target: Path, lock: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(held_lock(lock))
        except LockedError as err:
            raise CheckpointLockedError(target, err.holder) from None
        yield


@contextmanager
def _staged_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, locked as long as this process writes to it; removed unless it gets renamed."""
    staged = beside(target, f"writing-{secrets.token_hex(4)}")
    staged.mkdir()
    descriptor = os.open(staged, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _is_locked_by_another(descriptor)
        try:
            yield staged
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _is_locked_by_another(descriptor: int) -> bool:
    """Tries to lock a folder. Where that is impossible, nobody else's is taken for abandoned."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        # NFS locks files only, so there the lock of the whole checkpoint has to be enough.
        return err.errno != errno.EBADF
    return False


def _remove_abandoned(target: Path) -> None:
    """Removes the folders that dead writers were writing to."""
    name_of_staged = re.compile(re.escape(f".{target.name}.writing") + r"(-[0-9a-f]{8})?$")
    for name in os.listdir(target.parent):
        if name_of_staged.match(name):
            try:
                descriptor = os.open(target.parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError:  # No folder, so it is none of ours; or it has just been removed.
                continue
            try:
                if not _is_locked_by_another(descriptor):
                    shutil.rmtree(target.parent / name, ignore_errors=True)
            finally:
                os.close(descriptor)


def _refuse_incomplete(folder: Path, target: Path) -> None:
    if not is_complete(folder):
        missing = [name for name in (MARK, STATE_FILES[0]) if not (folder / name).is_file()]
        raise RuntimeError(
            f"The checkpoint for '{target}' was not written whole, {', '.join(map(repr, missing))} is missing; an "
            "earlier one that was complete stays."
        )


# --- Taking the place of the earlier one ------------------------------------------------------------------------------


def _settle(target: Path) -> None:
    """Ends what an interrupted call left."""
    _remove_abandoned(target)
    new, old = (beside(target, role) for role in ("new", "old"))
    if not is_complete(target):
        complete = next((folder for folder in (new, old) if is_complete(folder)), None)
        if complete is not None:
            _install(complete, target)
    for folder in (new, old):
        _remove_checkpoint(folder)


def _install(complete: Path, target: Path) -> None:
    """Moves a complete checkpoint to `target`, whose own is kept until then."""
    old = beside(target, "old")
    entries = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if entries - PARTS - {entry.name for entry in complete.iterdir()}:
        _remove_parts(target)
        state_files = [name for name in STATE_FILES if (complete / name).is_file()]
        shutil.copytree(
            complete,
            target,
            copy_function=_link,
            dirs_exist_ok=True,
            ignore=lambda folder, names: state_files if Path(folder) == complete else [],
        )
        for name in state_files:
            _link(complete / name, target / name)
        flush(target, contents=False)
        _remove_checkpoint(complete)
        return
    if is_complete(target):
        _remove_checkpoint(old)
        target.rename(old)
    elif entries:
        shutil.rmtree(target)
    complete.rename(target)  # Also onto an empty folder.
    flush(target.parent, contents=False)
    _remove_checkpoint(old)


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # Not every file system has hard links.
        shutil.copy2(source, destination)


def _remove_checkpoint(folder: Path) -> None:
    """Removes a folder; interrupted, it does not look complete."""
    _remove_state_files(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_parts(folder: Path) -> None:
    """Removes the checkpoint in a folder, and nothing else there."""
    _remove_state_files(folder)
    for name in PARTS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _remove_state_files(folder: Path) -> None:
    for name in STATE_FILES:
        (folder / name).unlink(missing_ok=True)


def flush(folder: Path, *, contents: bool = True) -> None:
    """Makes a folder, and the files in it, outlive a loss of power."""
    for name, _, files in os.walk(folder) if contents else [(str(folder), [], [])]:
        for path in [*(os.path.join(name, file) for file in files), name]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def clear_remote_checkpoint(filesystem: FileSystem, folder: str) -> None:
    """Makes an earlier checkpoint in a folder that cannot be renamed incomplete, until the new one is whole."""
    from pyarrow.fs import FileType

    for name in STATE_FILES:
        if filesystem.get_file_info(f"{folder}/{name}").type == FileType.File:
            filesystem.delete_file(f"{folder}/{name}")
