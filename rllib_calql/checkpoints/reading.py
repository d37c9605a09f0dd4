"""Checkpoints as they are read: found, checked before anything in them is unpickled, and read from one save."""

from __future__ import annotations

import io
import logging
import os
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rllib_calql.checkpoints.folders import (
    MANIFEST,
    MARK,
    STATE_FILES,
    beside,
    clear_remote_checkpoint,
    is_complete,
    replaced_folder,
)
from rllib_calql.checkpoints.integrity import FORMAT, faults, is_of_cal_ql, is_read_by_rllib, parsed_manifest, read_file
from rllib_calql.checkpoints.versions import completed_settings, difference, incompatible

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

__all__ = [
    "MANIFEST",
    "CheckpointFiles",
    "checked_checkpoint",
    "clear_remote_checkpoint",
    "config_of",
    "damage_of",
    "is_complete",
    "read_of_one_save",
    "replaced_folder",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LEARNER = "learner_group/learner"
_MODULE = f"{_LEARNER}/rl_module/default_policy"
_REMEDY = "give the folder that `algo.save_to_path()` or Ray Tune wrote"
# While another process saves again and again, a reader may have to begin anew.
_PATIENCE_S = 30.0
_SWAP_S = 0.02  # Between two renames of a save.


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
    lock, deadline = beside(target, "lock"), time.monotonic() + _SWAP_S
    while True:
        # A save that is under way may rename between two looks, hence `path` twice.
        found = next((c for c in (path, beside(target, "new"), path, beside(target, "old")) if is_complete(c)), None)
        if found == path:
            return path
        # In a save that is alive, the checkpoint is soon at its place.
        if not lock.exists() or time.monotonic() > deadline:
            break
    if found is not None:
        logger.warning("Saving to '%s' was interrupted; the checkpoint is taken from '%s'.", path, found)
        return found
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {str(path)!r}: no such folder; {_REMEDY}.")
    if (path / MANIFEST).is_file() or any((path / name).is_file() for name in STATE_FILES):
        missing = [name for name in (MARK, STATE_FILES[0]) if not (path / name).is_file()]
        raise ValueError(
            f"The checkpoint at {str(path)!r} is incomplete: saving it was interrupted or files were lost, "
            f"{' and '.join(map(repr, missing))} is missing; {_REMEDY}."
        )
    inside = sorted(mark.parent for mark in path.glob(f"[!.]*/{MARK}")) if path.is_dir() else []
    hint = f" Did you mean {str(inside[-1])!r}?" if inside else ""
    raise ValueError(f"{str(path)!r} is no checkpoint of an algorithm; {_REMEDY}.{hint}")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint of an algorithm, on any file system.

    Unpickling runs code: read checkpoints only from where you would run programs from.

    Attributes:
        filesystem: PyArrow file system.
        path: Folder in it.
        source: What messages call the checkpoint; by default `path`.
    """

    filesystem: FileSystem
    path: str
    source: str = ""

    @classmethod
    def find(cls, path: Any, filesystem: FileSystem | None = None) -> CheckpointFiles:
        """The checkpoint at a path, URI or Ray Train `Checkpoint`.

        Raises:
            FileNotFoundError: If there is no such folder.
            TypeError: If it is neither of these.
            ValueError: If it holds no complete checkpoint.
        """
        if not isinstance(path, (str, os.PathLike)) and not hasattr(path, "to_directory"):
            raise TypeError(f"A checkpoint is a folder, a URI or a `Checkpoint`, got {type(path).__name__}; {_REMEDY}.")
        from pyarrow.fs import FileSystem, FileType, LocalFileSystem

        if hasattr(path, "to_directory"):
            path, filesystem = path.path, path.filesystem
        if filesystem is None and "://" in str(path):
            filesystem, path = FileSystem.from_uri(str(path))
        if filesystem is None or isinstance(filesystem, LocalFileSystem):
            return cls(LocalFileSystem(), str(checked_checkpoint(Path(path))))
        folder = str(path).rstrip("/")
        infos = filesystem.get_file_info([folder, *(f"{folder}/{name}" for name in (MARK, *STATE_FILES))])
        if infos[0].type == FileType.NotFound:
            raise FileNotFoundError(f"There is no checkpoint at {folder!r}: no such folder; {_REMEDY}.")
        if infos[1].type != FileType.File or all(info.type != FileType.File for info in infos[2:]):
            raise ValueError(f"{folder!r} is no complete checkpoint of an algorithm; {_REMEDY}.")
        return cls(filesystem, folder)

    def check(self) -> None:
        """Refuses a checkpoint that is damaged or that cannot be read here, before anything of it is unpickled.

        Raises:
            ValueError: Naming every file that is missing or damaged, or the versions.
        """
        if found := faults(self.filesystem, self.path):
            raise ValueError(f"The checkpoint at {self._shown!r} is damaged: {', '.join(found)}; use another one.")
        raw = self.raw_manifest()
        content = {} if raw is None else parsed_manifest(raw)
        if content.get("format", FORMAT) > FORMAT:
            newer = content["versions"]["rllib-calql"]
            raise ValueError(f"The checkpoint at {self._shown!r} is of a newer rllib-calql, {newer}; install that.")
        if reason := incompatible(content.get("versions", {})):
            raise ValueError(f"The checkpoint at {self._shown!r} cannot be read: {reason}.")
        if raw is not None and ("files" not in content or difference(content["versions"])):
            # RLlib does not name the file at which it fails.
            for name in self._state_files():
                self.read(name)

    def raw_manifest(self) -> bytes | None:
        """What tells one save from another; None if it cannot be read, as in checkpoints of other algorithms."""
        try:
            return read_file(self.filesystem, f"{self.path}/{MANIFEST}")
        except OSError:
            return None

    def read(self, name: str) -> Any:
        """The object in a pickled file.

        Raises:
            ImportError: If something it needs cannot be imported here.
            ValueError: If it cannot be read.
        """
        from ray import cloudpickle

        try:
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as stored:
                return cloudpickle.load(stored)
        except Exception as err:
            if isinstance(err, OSError) and not isinstance(err, io.UnsupportedOperation):  # Of a damaged pickle.
                raise
            raw = self.raw_manifest()
            versions = difference(parsed_manifest(raw)["versions"]) if raw else ""
            kind = ImportError if isinstance(err, ImportError) else ValueError
            reason = str(err) or type(err).__name__
            raise kind(f"'{name}' in the checkpoint at {self._shown!r} cannot be read: {reason}.{versions}") from err

    def manifest(self) -> dict[str, Any]:
        """What `manifest.py` says about the run.

        Raises:
            ValueError: If the checkpoint is of another algorithm, or its manifest damaged.
        """
        raw = self.raw_manifest()
        if raw is None:
            if is_of_cal_ql(read_file(self.filesystem, f"{self.path}/{MARK}")):
                raise ValueError(f"The checkpoint at {self._shown!r} is damaged: '{MANIFEST}' is missing.")
            algorithm = self.read(MARK)["class"].__name__
            raise ValueError(f"The checkpoint at {self._shown!r} is of {algorithm}, not of Cal-QL.")
        try:
            return parsed_manifest(raw)
        except ValueError as err:
            raise ValueError(f"The checkpoint at {self._shown!r} is damaged: '{MANIFEST}' {err}.") from err

    def class_and_config_state(self) -> tuple[Any, Any]:
        """The algorithm's class, and what its constructor takes as config."""
        content = self.read(MARK)
        (state,), _ = content["ctor_args_and_kwargs"]
        return content["class"], completed_settings(state) if isinstance(state, dict) else state

    def config(self) -> Any:
        """The algorithm's config, free to be changed."""
        algorithm_class, state = self.class_and_config_state()
        return algorithm_class.get_default_config().from_state(state).copy(copy_frozen=False)

    def learner_state(self) -> dict[str, Any]:
        """State of the first learner with its networks."""
        state: dict[str, Any] = self.read(f"{_LEARNER}/state.pkl")
        state["rl_module"] = {"default_policy": self.read(f"{_MODULE}/module_state.pkl")}
        return state

    def restore_env_runner(self, runner: Any) -> None:
        """Gives an env runner the states of the connectors and the latest weights."""
        from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule

        folder = Path(self.path)
        if (folder / "env_runner").is_dir():  # Connectors with a state, for example running means.
            runner.restore_from_path(folder / "env_runner")
        weights = MultiRLModule.from_checkpoint(folder / _LEARNER / "rl_module")
        # Without a sequence number the weights are taken in any case.
        runner.set_state({"rl_module": weights.get_state(inference_only=True)})

    @property
    def _shown(self) -> str:
        return self.source or self.path

    def _state_files(self) -> list[str]:
        from pyarrow.fs import FileSelector

        infos = self.filesystem.get_file_info(FileSelector(self.path, recursive=True))
        names = [posixpath.relpath(info.path, self.path) for info in infos if info.base_name.endswith("state.pkl")]
        return [name for name in names if is_read_by_rllib(name)]


def read_of_one_save(
    path: Any,
    filesystem: FileSystem | None,
    read: Callable[[CheckpointFiles], T],
    discard: Callable[[T], None] = lambda result: None,
) -> T:
    """Checks a checkpoint and reads it, anew where another save has replaced it meanwhile.

    Args:
        path: Path, URI or Ray Train `Checkpoint`.
        filesystem: PyArrow file system of `path`; by default what the URI says.
        read: Called with the local files, those of a remote checkpoint in a temporary folder; more than once if they
            changed under it.
        discard: Called with what `read` returned in vain.

    Returns:
        What `read` returned, all of it from one save.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no complete checkpoint, or a damaged one.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        found = CheckpointFiles.find(path, filesystem)
        save = found.raw_manifest()
        try:
            with _local(found) as files:
                files.check()
                result = read(files)
        except Exception:
            if _is_still(found, save) or time.monotonic() > deadline:
                raise
            continue
        if _is_still(found, save):
            return result
        discard(result)
        if time.monotonic() > deadline:
            raise RuntimeError(f"Other processes save to {found.path!r} so often that it cannot be read meanwhile.")


def _is_still(files: CheckpointFiles, save: bytes | None) -> bool:
    return files.raw_manifest() == save


@contextmanager
def _local(files: CheckpointFiles) -> Iterator[CheckpointFiles]:
    """The files where RLlib reads them fast, and where nobody else writes."""
    from pyarrow.fs import LocalFileSystem, copy_files

    if isinstance(files.filesystem, LocalFileSystem):
        yield files
        return
    with tempfile.TemporaryDirectory(prefix="rllib_calql_checkpoint_") as folder:
        copy_files(files.path, folder, source_filesystem=files.filesystem, destination_filesystem=LocalFileSystem())
        yield CheckpointFiles(LocalFileSystem(), folder, source=files.path)


def damage_of(path: Any) -> str | None:
    """What is wrong with a checkpoint, as a sentence that names its files; None if nothing is."""
    try:
        found = CheckpointFiles.find(path)
    except (FileNotFoundError, ValueError) as err:
        return str(err)
    wrong = faults(found.filesystem, found.path)
    return f"The checkpoint at {found.path!r} is damaged: {', '.join(wrong)}." if wrong else None


def config_of(checkpoint: Path) -> Any:
    """The config in the checkpoint of an algorithm, any of RLlib's, free to be changed.

    Unpickling runs code: read checkpoints only from where you would run programs from.
    """
    return read_of_one_save(checkpoint, None, CheckpointFiles.config)
