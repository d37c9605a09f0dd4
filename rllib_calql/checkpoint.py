"""Checkpoint folders: written beside their place and renamed, checked before they are read, and read.

A checkpoint at PATH is written as `.NAME.writing` beside it. Complete, it becomes `.NAME.new`; then the earlier one at
PATH becomes `.NAME.old`, the new one PATH, and the earlier one is removed. So at any moment one of the three names
holds a complete checkpoint, and readers look for it under all of them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

logger = logging.getLogger(__name__)

MANIFEST = "calql.json"

_MARK = "class_and_ctor_args.pkl"  # RLlib writes it into every folder that an object can be restored from.
_STATE_FILES = ("algorithm_state.pkl", "algorithm_state.msgpack")  # Written last.
_PARTS = frozenset(  # What a checkpoint of an algorithm may hold; anything else in its folder belongs to somebody else.
    {
        MANIFEST,
        _MARK,
        *_STATE_FILES,
        "rllib_checkpoint.json",
        "rllib_calql_whole.pkl",  # The mark of `run_state.py`.
        "learner_group",
        "env_runner",
        "eval_env_runner",
        "env_to_module_connector",
        "module_to_env_connector",
    }
)
_LEARNER = "learner_group/learner"
_MODULE = f"{_LEARNER}/rl_module/default_policy"
_REMEDY = "give the folder that `algo.save_to_path()` or Ray Tune wrote"


# --- Writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Gives an empty folder to write a checkpoint into, which takes the place of `target` once it is complete.

    Whatever interrupts it, and at any byte, `checked_checkpoint(target)` finds the earlier checkpoint or the new one,
    complete. Files of others in `target` stay. Where nothing can be renamed, because `target` is a mount point or its
    parent is read-only, it is written in place: then an interruption loses the earlier one, and is noticed.

    Args:
        target: Folder of the checkpoint; it need not exist.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK) or os.path.ismount(target):
        _remove_parts(target)
        yield target
        return
    _settle(target)
    staged = _beside(target, "writing")
    staged.mkdir()
    try:
        yield staged
        if target.is_dir():
            shutil.copymode(target, staged)
        _flush(staged)
        complete = staged.rename(_beside(target, "new"))
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _install(complete, target)


def _beside(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}")


def is_complete(folder: Path) -> bool:
    """Whether a local folder holds a checkpoint of an algorithm, to its last file."""
    return (folder / _MARK).is_file() and any((folder / name).is_file() for name in _STATE_FILES)


def _settle(target: Path) -> None:
    """Ends what an interrupted call left."""
    staged, new, old = (_beside(target, role) for role in ("writing", "new", "old"))
    shutil.rmtree(staged, ignore_errors=True)
    if not is_complete(target):
        complete = next((folder for folder in (new, old) if is_complete(folder)), None)
        if complete is not None:
            _install(complete, target)
    for folder in (new, old):
        _remove_checkpoint(folder)


def _install(complete: Path, target: Path) -> None:
    """Moves a complete checkpoint to `target`, whose own is kept until then."""
    old = _beside(target, "old")
    entries = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if entries - _PARTS - {entry.name for entry in complete.iterdir()}:
        _remove_parts(target)
        state_files = [name for name in _STATE_FILES if (complete / name).is_file()]
        shutil.copytree(
            complete,
            target,
            copy_function=_link,
            dirs_exist_ok=True,
            ignore=lambda folder, names: state_files if Path(folder) == complete else [],
        )
        for name in state_files:
            _link(complete / name, target / name)
        _flush(target, contents=False)
        _remove_checkpoint(complete)
        return
    if is_complete(target):
        _remove_checkpoint(old)
        target.rename(old)
    elif entries:
        shutil.rmtree(target)
    complete.rename(target)  # Also onto an empty folder.
    _flush(target.parent, contents=False)
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
    for name in _PARTS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _remove_state_files(folder: Path) -> None:
    for name in _STATE_FILES:
        (folder / name).unlink(missing_ok=True)


def _flush(folder: Path, *, contents: bool = True) -> None:
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

    for name in _STATE_FILES:
        if filesystem.get_file_info(f"{folder}/{name}").type == FileType.File:
            filesystem.delete_file(f"{folder}/{name}")


# --- Reading ----------------------------------------------------------------------------------------------------------


def checked_checkpoint(path: Path) -> Path:
    """Returns the absolute path of a complete checkpoint of a whole algorithm.

    It is another one than `path` only after an interrupted save, which may have left the checkpoint beside it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is a file, or a folder that holds no complete checkpoint; the message names one inside it, if
            any.
    """
    path = path.expanduser().absolute()
    target = path.resolve()
    # A save that is under way may rename between two looks, hence `path` twice.
    for candidate in (path, _beside(target, "new"), path, _beside(target, "old")):
        if is_complete(candidate):
            if candidate != path:
                logger.warning("Saving to '%s' was interrupted; the checkpoint is taken from '%s'.", path, candidate)
            return candidate
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {str(path)!r}: no such folder; {_REMEDY}.")
    if (path / MANIFEST).is_file():
        raise ValueError(f"The checkpoint at {str(path)!r} is incomplete: saving it was interrupted; {_REMEDY}.")
    inside = sorted(mark.parent for mark in path.glob(f"[!.]*/{_MARK}")) if path.is_dir() else []
    hint = f" Did you mean {str(inside[-1])!r}?" if inside else ""
    raise ValueError(f"{str(path)!r} is no checkpoint of an algorithm; {_REMEDY}.{hint}")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint of an algorithm, on any file system.

    Unpickling runs code: read checkpoints only from where you would run programs from.

    Attributes:
        filesystem: PyArrow file system.
        path: Folder in it.
    """

    filesystem: FileSystem
    path: str

    @classmethod
    def find(cls, path: Any, filesystem: FileSystem | None = None) -> CheckpointFiles:
        """The checkpoint at a path, URI or Ray Train `Checkpoint`.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it holds no complete checkpoint.
        """
        from pyarrow.fs import FileSystem, FileType, LocalFileSystem

        if hasattr(path, "to_directory"):
            path, filesystem = path.path, path.filesystem
        if filesystem is None and "://" in str(path):
            filesystem, path = FileSystem.from_uri(str(path))
        if filesystem is None or isinstance(filesystem, LocalFileSystem):
            return cls(LocalFileSystem(), str(checked_checkpoint(Path(path))))
        folder = str(path).rstrip("/")
        infos = filesystem.get_file_info([folder, *(f"{folder}/{name}" for name in (_MARK, *_STATE_FILES))])
        if infos[0].type == FileType.NotFound:
            raise FileNotFoundError(f"There is no checkpoint at {folder!r}: no such folder; {_REMEDY}.")
        if infos[1].type != FileType.File or all(info.type != FileType.File for info in infos[2:]):
            raise ValueError(f"{folder!r} is no complete checkpoint of an algorithm; {_REMEDY}.")
        return cls(filesystem, folder)

    def read(self, name: str) -> Any:
        """The object in a pickled file."""
        from ray import cloudpickle

        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stored:
            return cloudpickle.load(stored)

    def manifest(self) -> dict[str, Any]:
        """What `manifest.py` says about the run.

        Raises:
            ValueError: If the checkpoint is of another algorithm.
        """
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{MANIFEST}") as stored:
                content: dict[str, Any] = json.loads(stored.read())
        except FileNotFoundError as err:
            algorithm = self.read(_MARK)["class"].__name__
            raise ValueError(f"The checkpoint at {self.path!r} is of {algorithm}, not of Cal-QL.") from err
        return content

    def class_and_config_state(self) -> tuple[Any, Any]:
        """The algorithm's class, and what its constructor takes as config."""
        content = self.read(_MARK)
        (state,), _ = content["ctor_args_and_kwargs"]
        return content["class"], state

    def learner_state(self) -> dict[str, Any]:
        """State of the first learner with its networks."""
        state: dict[str, Any] = self.read(f"{_LEARNER}/state.pkl")
        state["rl_module"] = {"default_policy": self.read(f"{_MODULE}/module_state.pkl")}
        return state


def config_of(checkpoint: Path) -> Any:
    """The config in the checkpoint of an algorithm, any of RLlib's, free to be changed.

    Unpickling runs code: read checkpoints only from where you would run programs from.
    """
    algorithm_class, state = CheckpointFiles.find(checkpoint).class_and_config_state()
    return algorithm_class.get_default_config().from_state(state).copy(copy_frozen=False)
