"""The folder of a run of Ray Tune: whether one has begun there, who writes to it, and what of it a run has made."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.fs
from ray.train._internal.storage import get_fs_and_path

from rllib_calql.progress.runs import RUN_LOCK
from rllib_calql.system.file_lock import held_lock

_LOCK = RUN_LOCK
# What Tune, its schedulers and this package write to the folder of a run.
_OF_RUN = re.compile(
    r"(tmp-)?(experiment_state|basic-variant-state|searcher-state|search_gen_state|callback-states)-.+\.(json|pkl)"
    r"|tuner\.pkl|trainable\.pkl|\.validate_storage_marker|pb[t2]_(global|policy_.+)\.txt|\.?rllib_calql_.+"
    r"|(progress|comparison)\.(html|png)(\.new)?"
)
# Tune names the folder of a trial so, and it and its loggers write this there.
_TRIAL = re.compile(r".+_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")
_OF_TRIAL = re.compile(
    r"checkpoint_\d{6,}|params\.(json|pkl)|result\.json|progress\.csv|error\.(txt|pkl)|events\.out\.tfevents\..+"
    r"|pb[t2]_(global|policy_.+)\.txt|\.validate_storage_marker|\.?rllib_calql_.+"
)
_DIRECTORY, _FILE = pyarrow.fs.FileType.Directory, pyarrow.fs.FileType.File


class RunFolder:
    """The folder of the run called `name`.

    Args:
        storage_path: Folder or URI of all runs.
        name: Name of the run, a plain one.

    Attributes:
        filesystem: Of the folder.
        path: Of the folder there.
        was_killed: Whether the last command that locked it was killed, perhaps before anything else was written.
    """

    def __init__(self, storage_path: str, name: str) -> None:
        self.filesystem, root = get_fs_and_path(storage_path)
        self.path = posixpath.join(root, name)
        self.was_killed = False

    def has_begun(self) -> bool:
        """Whether anything is there, be it of a run or not."""
        return any(info.base_name != _LOCK for info in _infos_in(self.filesystem, self.path))

    def foreign(self) -> list[str]:
        """Paths in the folder that no run has made."""
        return foreign_entries(self.filesystem, self.path)

    def remove_run(self) -> None:
        """Removes what a run has made there; the folder stays.

        Raises:
            FileExistsError: If the folder holds anything else. Nothing is removed then.
        """
        if foreign := self.foreign():
            raise FileExistsError(f"'{self.path}' holds {shown(foreign)}, which no run made.")
        for info in sorted(_infos_in(self.filesystem, self.path), key=lambda info: info.type == _FILE):
            if info.base_name == _LOCK:
                continue
            if info.type == _DIRECTORY:
                self.filesystem.delete_dir(info.path)
            else:
                self.filesystem.delete_file(info.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from the run; on the local file system only, since object stores have no locks.

        Raises:
            LockedError: If another process runs it.
        """
        if not isinstance(self.filesystem, pyarrow.fs.LocalFileSystem):
            yield
            return
        path = Path(self.path)
        path.mkdir(parents=True, exist_ok=True)
        self.was_killed = (path / _LOCK).exists()
        try:
            with held_lock(path / _LOCK):
                yield
        finally:
            with suppress(OSError):  # Not empty, as a rule; one that stayed so is taken back.
                path.rmdir()


def foreign_entries(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[str]:
    """Paths in a folder that no run of Ray Tune has made. The content of checkpoints is not looked into."""
    infos = _infos_in(filesystem, folder)
    if not any(info.type == _FILE and _is_of_run(info.base_name) for info in infos):
        return [info.path for info in infos if info.base_name != _LOCK]  # Trials stand beside the state of their run.
    foreign = []
    for info in infos:
        if _is_link(filesystem, info.path):
            foreign.append(info.path)
        elif info.type != _DIRECTORY:
            foreign += [] if _is_of_run(info.base_name) or info.base_name == _LOCK else [info.path]
        elif _TRIAL.fullmatch(info.base_name):
            inside = _infos_in(filesystem, info.path)
            foreign += [i.path for i in inside if not _OF_TRIAL.fullmatch(i.base_name) or _is_link(filesystem, i.path)]
        else:
            foreign.append(info.path)
    return foreign


def shown(paths: list[str]) -> str:
    """A path or two, and how many there are."""
    more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
    return ", ".join(f"'{path}'" for path in paths[:2]) + more


def _is_of_run(name: str) -> bool:
    return name != _LOCK and _OF_RUN.fullmatch(name) is not None


def _is_link(filesystem: pyarrow.fs.FileSystem, path: str) -> bool:
    """A run makes no links, and what they lead to is not the run's."""
    return isinstance(filesystem, pyarrow.fs.LocalFileSystem) and os.path.islink(path)


def _infos_in(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[pyarrow.fs.FileInfo]:
    found = filesystem.get_file_info(folder)
    if found.type == pyarrow.fs.FileType.NotFound:
        return []
    if found.type != _DIRECTORY:
        return [found]
    infos: list[pyarrow.fs.FileInfo] = filesystem.get_file_info(pyarrow.fs.FileSelector(folder))
    return infos
