"""What a run of Ray Tune leaves on disk so that it can be resumed after a sudden end, and how that is read again.

Tune copies checkpoints and its own state to the run's folder file by file, in any order. After a SIGKILL a checkpoint
may be there in part, or whole but unknown to Tune's last state, and that state may be cut off.
"""

from __future__ import annotations

import io
import json
import logging
import pickletools
import posixpath
import re
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.fs
from ray import cloudpickle, tune
from ray.tune.experiment import Trial

logger = logging.getLogger(__name__)

_MARK = "rllib_calql_whole.pkl"  # In a checkpoint; written last.
_ARCHIVE = "rllib_calql_state.zip"  # In the run's folder: Tune's last state, in one file that is replaced at once.
_STATE = re.compile(r"experiment_state-(.+)\.json$")
_CHECKPOINT = re.compile(r"checkpoint_(\d{6,})$")


class KeepResumable(tune.Callback):
    """Marks every whole checkpoint, and keeps a whole copy of Tune's state.

    `rllib train file` always uses it, for `--resume` after a sudden end.
    """

    def __init__(self) -> None:
        self._kept: tuple[str, int] | None = None

    def on_checkpoint(
        self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: tune.Checkpoint, **info: Any
    ) -> None:
        """Marks a checkpoint that Tune has copied to its place."""
        result = {key: value for key, value in trial.last_result.items() if key != "config"}
        mark_whole(checkpoint.filesystem, checkpoint.path, result)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Copies Tune's state if it was saved in this step."""
        self._keep_state(trials)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Copies Tune's last state."""
        self._keep_state(trials)

    def _keep_state(self, trials: list[Trial]) -> None:
        if not trials:
            return
        # Tune writes there in the loop that calls this, so nothing in it is half written.
        staged = Path(trials[0].storage.experiment_driver_staging_path)
        states = sorted(staged.glob("experiment_state-*.json"))
        if not states or (version := (states[-1].name, states[-1].stat().st_mtime_ns)) == self._kept:
            return
        self._kept = version
        storage = trials[0].storage
        files = {path.name: path.read_bytes() for path in staged.iterdir() if _is_of(path.name, session(version[0]))}
        try:
            _write_archive(storage.storage_filesystem, storage.experiment_fs_path, files)
        except OSError as error:  # Training goes on; the next state may be saved again.
            logger.warning("The run's state could not be saved to '%s': %s", storage.experiment_fs_path, error)


def is_state(name: str) -> bool:
    """Whether this is the name of a file with Tune's state of an experiment."""
    return _STATE.match(name) is not None


def session(state_name: str) -> str:
    """The part of the name of Tune's state that all files of one start of the command share."""
    match = _STATE.match(state_name)
    assert match, state_name
    return match[1]


def _is_of(name: str, of_session: str) -> bool:
    return name.endswith((f"-{of_session}.json", f"-{of_session}.pkl")) and not name.startswith("tmp-")


def write_whole(filesystem: pyarrow.fs.FileSystem, path: str, content: bytes) -> None:
    """Writes a file so that it is there whole or, after a sudden end, as it was."""
    with filesystem.open_output_stream(f"{path}.new") as stream:
        stream.write(content)
    filesystem.move(f"{path}.new", path)


def names_in(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[str]:
    """Names of files and folders, sorted; none if there is no such folder."""
    if filesystem.get_file_info(folder).type != pyarrow.fs.FileType.Directory:
        return []
    return sorted(info.base_name for info in filesystem.get_file_info(pyarrow.fs.FileSelector(folder)))


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def mark_whole(filesystem: pyarrow.fs.FileSystem, checkpoint: str, result: dict[str, Any]) -> None:
    """Marks a checkpoint as whole: writes the sizes of its files, and the result it belongs to."""
    content = {"sizes": _sizes(filesystem, checkpoint), "result": result}
    write_whole(filesystem, posixpath.join(checkpoint, _MARK), cloudpickle.dumps(content))


def is_marked(filesystem: pyarrow.fs.FileSystem, checkpoint: str) -> bool:
    """Whether a mark is there, of a checkpoint that may have lost files since."""
    return _exists(filesystem, posixpath.join(checkpoint, _MARK))


def result_of_whole(filesystem: pyarrow.fs.FileSystem, checkpoint: str) -> dict[str, Any] | None:
    """The result a marked checkpoint belongs to, or None if it is not marked or not all its files are there."""
    if not is_marked(filesystem, checkpoint):
        return None
    with filesystem.open_input_stream(posixpath.join(checkpoint, _MARK)) as stream:
        content = cloudpickle.loads(stream.readall())
    sizes = _sizes(filesystem, checkpoint)
    is_whole = all(sizes.get(name) == size for name, size in content["sizes"].items())
    result: dict[str, Any] = content["result"]
    return result if is_whole else None


def numbered_checkpoints(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[tuple[int, str]]:
    """Number and path of the checkpoints in the folder of a trial, whole or not, in order."""
    found = ((match, name) for name in names_in(filesystem, folder) if (match := _CHECKPOINT.match(name)))
    return sorted((int(match[1]), posixpath.join(folder, name)) for match, name in found)


def _sizes(filesystem: pyarrow.fs.FileSystem, folder: str) -> dict[str, int]:
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(folder, recursive=True))
    files = {posixpath.relpath(info.path, folder): info.size for info in infos if info.is_file}
    return {name: size for name, size in files.items() if not name.startswith(_MARK)}


def _exists(filesystem: pyarrow.fs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type != pyarrow.fs.FileType.NotFound)


# --- Tune's state ----------------------------------------------------------------------------------------------------


def has_archive(filesystem: pyarrow.fs.FileSystem, folder: str) -> bool:
    """Whether `KeepResumable` took part in the run in this folder."""
    return _exists(filesystem, posixpath.join(folder, _ARCHIVE))


def read_newest_state(filesystem: pyarrow.fs.FileSystem, folder: str) -> dict[str, bytes]:
    """Tune's newest state of which all files are whole: the name of each and its content; empty if there is none."""
    candidates: list[tuple[str, bool, dict[str, bytes]]] = []
    names = names_in(filesystem, folder)
    for name in names:
        if match := _STATE.match(name):
            of_session = [other for other in names if _is_of(other, match[1])]
            files = {other: _read(filesystem, posixpath.join(folder, other)) for other in of_session}
            candidates.append((match[1], False, files))
    if _ARCHIVE in names:
        content = io.BytesIO(_read(filesystem, posixpath.join(folder, _ARCHIVE)))
        with zipfile.ZipFile(content) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        # Tune's own copy is made in the background, so the archive is never older.
        candidates += [(match[1], True, files) for name in files if (match := _STATE.match(name))]
    whole = [candidate for candidate in candidates if all(map(_is_whole, candidate[2].values()))]
    return max(whole, key=lambda candidate: candidate[:2])[2] if whole else {}


def write_state(filesystem: pyarrow.fs.FileSystem, folder: str, files: dict[str, bytes]) -> None:
    """Makes these files Tune's newest state. Their names end in a session later than any in the folder."""
    # The experiment's state, with which Tune begins to read, comes last.
    for name in sorted(files, key=is_state):
        write_whole(filesystem, posixpath.join(folder, name), files[name])
    _write_archive(filesystem, folder, files)


def drop_torn_lines(filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    """Removes from a file of JSON lines those that are not whole, before more are appended."""
    if not _exists(filesystem, path):
        return
    lines = _read(filesystem, path).splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n") and _is_whole(line)]
    if whole != lines:
        write_whole(filesystem, path, b"".join(whole))


def _write_archive(filesystem: pyarrow.fs.FileSystem, folder: str, files: dict[str, bytes]) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    write_whole(filesystem, posixpath.join(folder, _ARCHIVE), content.getvalue())


def _read(filesystem: pyarrow.fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        content: bytes = stream.readall()
    return content


def _is_whole(content: bytes) -> bool:
    """Whether JSON or a pickle is not cut off. Nothing is unpickled for that, so a missing module does not matter."""
    try:
        if content[:1] in (b"{", b"["):
            json.loads(content)
        else:
            for _ in pickletools.genops(content):
                pass
    except ValueError:
        return False
    return True
