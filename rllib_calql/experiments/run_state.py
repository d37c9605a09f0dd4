"""What a run of Ray Tune leaves on disk so that it can be resumed after a sudden end, and how that is read again.

Tune copies checkpoints and its own state to the run's folder file by file, in any order. After a SIGKILL a checkpoint
may be there in part, or whole but unknown to Tune's last state, and that state may be cut off. After years on a disk,
any of these files may be damaged.
"""

from __future__ import annotations

import io
import logging
import posixpath
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
from ray import cloudpickle, tune
from ray.tune.experiment import Trial

from rllib_calql.checkpoints.folders import MANIFEST, flush
from rllib_calql.checkpoints.integrity import faults, has_checksums, is_whole_pickle, read_file
from rllib_calql.system.parsed_json import parsed_json

logger = logging.getLogger(__name__)

_MARK = "rllib_calql_whole.pkl"  # In a checkpoint; written last.
_ARCHIVE = "rllib_calql_state.zip"  # In the run's folder: Tune's last state, in one file that is replaced at once.
_SUM = b"\nrllib_calql crc32 "  # At the end of mark and archive, with eight hexadecimal digits.
_TUNER = "tuner.pkl"  # Tune's, with what the run was started with.
_TUNER_SUM = f"{_TUNER}.crc32"  # In the archive.
_STATE = re.compile(r"experiment_state-(.+)\.json$")
_CHECKPOINT = re.compile(r"checkpoint_(\d{6,})$")


class KeepResumable(tune.Callback):
    """Marks every whole checkpoint, and keeps a whole copy of Tune's state.

    `rllib train file` always uses it, for `--resume` after a sudden end.
    """

    def __init__(self) -> None:
        self._kept: tuple[str, int] | None = None
        self._tuner_sum: bytes | None = None

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
            if self._tuner_sum is None:
                self._tuner_sum = _tuner_sum(storage.storage_filesystem, storage.experiment_fs_path)
            _write_archive(storage.storage_filesystem, storage.experiment_fs_path, files, self._tuner_sum)
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
    """Writes a file so that it is there whole or, after a sudden end or a loss of power, as it was."""
    with filesystem.open_output_stream(f"{path}.new") as stream:
        stream.write(content)
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        set_aside(filesystem, path)
    is_local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    if is_local:
        flush(Path(f"{path}.new"), contents=False)
    filesystem.move(f"{path}.new", path)
    if is_local:
        flush(Path(path).parent, contents=False)


def set_aside(filesystem: pyarrow.fs.FileSystem, path: str) -> str:
    """Gives what is in the way of something new another name in its folder, and returns its path."""
    folder, name = posixpath.split(path)
    number = 1
    while _exists(filesystem, aside := posixpath.join(folder, f"damaged_{number}_{name}")):
        number += 1
    filesystem.move(path, aside)
    return aside


def names_in(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[str]:
    """Names of files and folders, sorted; none if there is no such folder."""
    if filesystem.get_file_info(folder).type != pyarrow.fs.FileType.Directory:
        return []
    return sorted(info.base_name for info in filesystem.get_file_info(pyarrow.fs.FileSelector(folder)))


# --- Checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk.

    Attributes:
        result: The result it belongs to, as its mark says; None without a readable mark.
        is_finished: Whether there is a mark, readable or not.
        is_summed: Whether it has checksums, and they were compared.
        lost: Files that the mark names and that are not there.
        damage: What is wrong with its other files, readable; empty if nothing is.
        mark_damage: Why the mark cannot be read; empty if it can, or if there is none.
    """

    result: dict[str, Any] | None = None
    is_finished: bool = False
    is_summed: bool = False
    lost: tuple[str, ...] = ()
    damage: str = ""
    mark_damage: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether all files of a marked checkpoint are as they were."""
        return self.result is not None and not self.lost and not self.damage

    @property
    def faults(self) -> str:
        """All that is wrong, readable; empty if it was removed or never finished."""
        return ", ".join(part for part in (self.damage, self.mark_damage) if part)


def mark_whole(filesystem: pyarrow.fs.FileSystem, checkpoint: str, result: dict[str, Any]) -> None:
    """Marks a checkpoint as whole: writes the sizes of its files, and the result it belongs to.

    On a local file system its files, and the folders above, outlive a loss of power from then on.
    """
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        flush(Path(checkpoint))
        for folder in list(Path(checkpoint).parents)[:3]:  # Of the trial, of the run, of all runs.
            flush(folder, contents=False)
    content = cloudpickle.dumps({"sizes": _sizes(filesystem, checkpoint), "result": result})
    write_whole(filesystem, posixpath.join(checkpoint, _MARK), _with_sum(content))


def remove_checkpoint(filesystem: pyarrow.fs.FileSystem, checkpoint: str) -> None:
    """Removes a checkpoint, if that can be done. Its mark goes first, so one that is there in part looks unfinished."""
    try:
        if is_marked(filesystem, checkpoint):
            filesystem.delete_file(posixpath.join(checkpoint, _MARK))
        filesystem.delete_dir(checkpoint)
    except OSError as error:  # Training goes on.
        logger.warning("The checkpoint '%s' could not be removed: %s", checkpoint, error)


def is_marked(filesystem: pyarrow.fs.FileSystem, checkpoint: str) -> bool:
    """Whether a mark is there, of a checkpoint that may have lost files since."""
    return _exists(filesystem, posixpath.join(checkpoint, _MARK))


def result_of_whole(filesystem: pyarrow.fs.FileSystem, checkpoint: str) -> dict[str, Any] | None:
    """The result a marked checkpoint belongs to, or None if it is not marked or not all its files are as they were."""
    found = examine(filesystem, checkpoint)
    return found.result if found.is_whole else None


def examine(filesystem: pyarrow.fs.FileSystem, checkpoint: str, *, reads_files: bool = True) -> Found:
    """What is known of a checkpoint.

    Args:
        filesystem: PyArrow file system.
        checkpoint: Folder in it.
        reads_files: Compares checksums, where the checkpoint has them; otherwise sizes only.
    """
    if not _exists(filesystem, checkpoint):
        return Found()
    sizes = _sizes(filesystem, checkpoint)
    is_finished, mark_damage = is_marked(filesystem, checkpoint), ""
    content: dict[str, Any] = {"sizes": {}, "result": None}
    if is_finished:
        try:
            content = _read_mark(filesystem, checkpoint)
        except Exception as error:  # A damaged pickle ends in errors of any kind.
            mark_damage = f"'{_MARK}' cannot be read ({error or type(error).__name__})"
    wrong = [name for name, size in content["sizes"].items() if name in sizes and sizes[name] != size]
    damage = [f"'{name}' has {sizes[name]} bytes instead of {content['sizes'][name]}" for name in wrong]
    lost = tuple(name for name in content["sizes"] if name not in sizes)
    if reads_files and not damage and MANIFEST in sizes:
        damage = faults(filesystem, checkpoint)
    elif MANIFEST in lost:
        damage += [f"'{MANIFEST}' is missing"]
    return Found(
        result=content["result"],
        is_finished=is_finished,
        is_summed=reads_files and not damage and has_checksums(filesystem, checkpoint),
        lost=lost,
        damage=", ".join(damage),
        mark_damage=mark_damage,
    )


def _read_mark(filesystem: pyarrow.fs.FileSystem, checkpoint: str) -> dict[str, Any]:
    content = _without_sum(read_file(filesystem, posixpath.join(checkpoint, _MARK)))
    mark: dict[str, Any] = cloudpickle.loads(content)
    if not isinstance(mark["sizes"], dict) or not isinstance(mark["result"], dict):
        raise TypeError("other content than was saved")
    return mark


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


def read_newest_state(
    filesystem: pyarrow.fs.FileSystem, folder: str, announce: Callable[[str], None] = logger.warning
) -> dict[str, bytes]:
    """Tune's newest state of which all files are whole: the name of each and its content; empty if there is none."""
    return next(whole_states(filesystem, folder, announce), {})


def whole_states(
    filesystem: pyarrow.fs.FileSystem, folder: str, announce: Callable[[str], None] = logger.warning
) -> Iterator[dict[str, bytes]]:
    """Tune's states of which all files are whole, the newest first.

    Args:
        filesystem: PyArrow file system.
        folder: Of the run.
        announce: Called with what is skipped for the state that comes next.
    """
    candidates: list[tuple[str, bool, dict[str, bytes] | None]] = []
    names = names_in(filesystem, folder)
    for name in names:
        if match := _STATE.match(name):
            of_session = [other for other in names if _is_of(other, match[1])]
            candidates.append((match[1], False, _read_whole(filesystem, folder, of_session)))
    archive = _read_archive(filesystem, folder, announce)
    archive.pop(_TUNER_SUM, None)
    # Tune's own copy is made in the background, so the archive is never older.
    candidates += [(match[1], True, archive) for name in archive if (match := _STATE.match(name))]
    skipped = []
    for name, is_archive, files in sorted(candidates, key=lambda candidate: candidate[:2], reverse=True):
        if files is None or not all(map(_is_whole, files.values())):
            skipped.append(f"{_ARCHIVE if is_archive else f'experiment_state-{name}.json and its like'}")
            continue
        if skipped:
            announce(
                f"Skipped damaged files of the run's state in '{folder}': {', '.join(skipped)}; an older state is used."
            )
        yield files


def _read_archive(filesystem: pyarrow.fs.FileSystem, folder: str, announce: Callable[[str], None]) -> dict[str, bytes]:
    """Names and content of the files in the archive, which holds a checksum of each; empty if it is not whole."""
    path = posixpath.join(folder, _ARCHIVE)
    if not _exists(filesystem, path):
        return {}
    try:
        content = read_file(filesystem, path)
        _without_sum(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except Exception as error:  # A damaged archive ends in errors of any kind.
        announce(
            f"Skipped '{path}', which is damaged ({error or type(error).__name__}); Ray Tune's own files beside it are "
            "used, which may be some seconds older."
        )
        return {}


def _read_whole(filesystem: pyarrow.fs.FileSystem, folder: str, names: list[str]) -> dict[str, bytes] | None:
    try:
        return {name: read_file(filesystem, posixpath.join(folder, name)) for name in names}
    except OSError:
        return None


def is_tuner_whole(filesystem: pyarrow.fs.FileSystem, folder: str) -> bool:
    """Whether Tune's `tuner.pkl`, with what the run was started with, is there as it was written."""
    stored = _read_archive(filesystem, folder, logger.debug).get(_TUNER_SUM)
    now = _tuner_sum(filesystem, folder)
    if stored is not None:
        return stored == now
    try:
        return is_whole_pickle(read_file(filesystem, posixpath.join(folder, _TUNER)))
    except OSError:
        return False


def _tuner_sum(filesystem: pyarrow.fs.FileSystem, folder: str) -> bytes | None:
    try:
        return b"%08x" % zlib.crc32(read_file(filesystem, posixpath.join(folder, _TUNER)))
    except OSError:
        return None


def write_state(filesystem: pyarrow.fs.FileSystem, folder: str, files: dict[str, bytes]) -> None:
    """Makes these files Tune's newest state. Their names end in a session later than any in the folder."""
    # The experiment's state, with which Tune begins to read, comes last.
    for name in sorted(files, key=is_state):
        write_whole(filesystem, posixpath.join(folder, name), files[name])
    _write_archive(filesystem, folder, files, _tuner_sum(filesystem, folder))


def drop_torn_lines(filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    """Removes from a file of JSON lines those that are not whole, before more are appended."""
    if not _exists(filesystem, path):
        return
    lines = read_file(filesystem, path).splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n") and _is_whole(line)]
    if whole != lines:
        write_whole(filesystem, path, b"".join(whole))


def _write_archive(
    filesystem: pyarrow.fs.FileSystem, folder: str, files: dict[str, bytes], tuner_sum: bytes | None
) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        if tuner_sum is not None:
            archive.writestr(_TUNER_SUM, tuner_sum)
        # The checksums of an archive do not cover its table of contents. A comment stands at the end.
        archive.comment = bytes(len(_SUM) + 8)
    packed = content.getvalue()[: -len(_SUM) - 8]
    write_whole(filesystem, posixpath.join(folder, _ARCHIVE), _with_sum(packed))


def _with_sum(content: bytes) -> bytes:
    return content + _SUM + b"%08x" % zlib.crc32(content)


def _without_sum(stored: bytes) -> bytes:
    """The content, checked; what earlier versions wrote has no sum."""
    content, found, crc = stored.rpartition(_SUM)
    if not found:
        return stored
    if crc != b"%08x" % zlib.crc32(content):
        raise ValueError("it has other content than was saved")
    return content


def _is_whole(content: bytes) -> bool:
    """Whether JSON or a pickle is not cut off. Nothing is unpickled for that, so a missing module does not matter."""
    if content[:1] not in (b"{", b"["):
        return is_whole_pickle(content)
    try:
        parsed_json(content)
    except ValueError:
        return False
    return True
