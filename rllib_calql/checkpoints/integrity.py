"""What ties the files of one save together: their checksums, in the manifest, which is written last and checks itself.

A checkpoint whose files are all as the manifest says is one save, whole and undamaged. CRC-32 finds every flipped bit
and every cut, at 3 GB/s; nothing here is against somebody who changes files on purpose.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rllib_calql.checkpoints.folders import MANIFEST, MARK, PARTS, STATE_FILES
from rllib_calql.system.parsed_json import parsed_json

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

FORMAT = 1  # Of the checkpoint; checkpoints without one are of versions before checksums.
_MARK_OF_RUN = "rllib_calql_whole.pkl"
_METADATA = "rllib_checkpoint.json"
_CHUNK_BYTES = 1 << 20
_LEARNER = "learner_group/learner"
# Without these there is no algorithm to go on with. RLlib leaves out parts that are not there, without a word.
_ESSENTIAL = (
    MARK,
    STATE_FILES[0],
    "learner_group/state.pkl",
    f"{_LEARNER}/state.pkl",
    f"{_LEARNER}/rl_module/default_policy/module_state.pkl",
)
# The folders of RLlib's components, and the name of the state in each. A pipeline's folders bear the names of classes.
_STATE_IN = {
    re.compile(r""): "algorithm_state",
    re.compile(r"learner_group(/learner)?|(eval_)?env_runner"): "state",
    re.compile(r"(learner_group/learner|(eval_)?env_runner)/rl_module(/default_policy)?"): "module_state",
    re.compile(r"((eval_)?env_runner/)?(env_to_module|module_to_env)_connector(/\w+)*"): "state",
}


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, content: Mapping[str, Any], *, parts: Iterable[str] = ()) -> None:
    """Writes the manifest of a checkpoint of which all other files are there.

    Args:
        folder: Local folder.
        content: What the manifest says of the run.
        parts: Names of files and folders in it that belong to the checkpoint, besides RLlib's.
    """
    names = sorted(_own_files(folder, PARTS.union(parts)))
    sealed = {
        **content,
        "format": FORMAT,
        "save": uuid.uuid4().hex,
        "files": {name: _measured(os.path.join(folder, name)) for name in names},
    }
    text = json.dumps({**sealed, "digest": _digest(sealed)}, indent=2)
    (folder / MANIFEST).write_text(text)


def upload(folder: Path, filesystem: FileSystem, target: str) -> None:
    """Copies a whole checkpoint to where nothing can be renamed or locked, its manifest last.

    Raises:
        RuntimeError: If somebody else has written to it meanwhile.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    last = [name for name in (*STATE_FILES, MANIFEST) if name in names]
    for name in sorted(set(names) - set(last)) + last:
        filesystem.create_dir(posixpath.dirname(f"{target}/{name}"), recursive=True)
        with (folder / name).open("rb") as source, filesystem.open_output_stream(f"{target}/{name}") as stream:
            shutil.copyfileobj(source, stream, _CHUNK_BYTES)
    sizes = _sizes(filesystem, target)
    is_own = MANIFEST not in names or read_file(filesystem, f"{target}/{MANIFEST}") == (folder / MANIFEST).read_bytes()
    if not is_own or any(sizes.get(name) != (folder / name).stat().st_size for name in names):
        raise RuntimeError(
            f"Another process has written a checkpoint to {target!r} at the same time; save again, each to its own."
        )


def _own_files(folder: Path, parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        if part in (MANIFEST, _MARK_OF_RUN):
            continue
        top = os.path.join(folder, part)
        if os.path.isfile(top):
            yield part
        for name, _, files in os.walk(top):
            inside = part + name[len(top) :]
            yield from (f"{inside}/{file}" for file in files)


def _measured(path: str | Path) -> dict[str, int]:
    """Size and checksum of a file that was just written, and which goes to the disk meanwhile if it is large."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size <= _CHUNK_BYTES:
            return {"bytes": size, "crc32": _crc(descriptor)}
        with ThreadPoolExecutor(1) as flusher:
            flushing = flusher.submit(os.fsync, descriptor)
            crc = _crc(descriptor)
            flushing.result()
        return {"bytes": size, "crc32": crc}
    finally:
        os.close(descriptor)


def _crc(descriptor: int) -> int:
    crc = 0
    while chunk := os.read(descriptor, _CHUNK_BYTES):
        crc = zlib.crc32(chunk, crc)
    return crc


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- Reading ----------------------------------------------------------------------------------------------------------


def parsed_manifest(raw: bytes) -> dict[str, Any]:
    """The manifest in these bytes; without `files`, it is of a version before checksums.

    Raises:
        ValueError: If it is damaged; the message is to go behind the name of the file.
    """
    if not raw:
        raise ValueError("is empty")
    try:
        content = parsed_json(raw)
    except ValueError as err:
        raise ValueError(f"is cut off or damaged ({err})") from err
    if not isinstance(content, dict):
        raise ValueError("is damaged (it holds no mapping)")
    if not isinstance(content.get("versions", {}), dict) or not isinstance(content.get("format", FORMAT), int):
        raise ValueError("is damaged (`versions` is no mapping, or `format` no whole number)")
    stored = content.pop("digest", None)
    if (stored is not None or "files" in content) and stored != _digest(content):
        raise ValueError("has other content than was saved")
    return content


def faults(filesystem: FileSystem, folder: str, *, below: str = "") -> list[str]:
    """What is missing or damaged in a checkpoint, one readable part for each file; nothing is unpickled.

    In checkpoints without checksums only what is missing or cut off is found.

    Args:
        filesystem: PyArrow file system.
        folder: Folder of the whole checkpoint in it.
        below: Looks only at what is in this folder of the checkpoint.
    """
    sizes = _sizes(filesystem, folder)
    if MANIFEST not in sizes:
        # Checkpoints of other algorithms have none.
        own = sizes.keys() & {MARK} and is_of_cal_ql(read_file(filesystem, posixpath.join(folder, MARK)))
        return [f"'{MANIFEST}' is missing"] if own else _cut_off(filesystem, folder, sizes, below)
    try:
        manifest = parsed_manifest(read_file(filesystem, posixpath.join(folder, MANIFEST)))
    except (ValueError, OSError) as err:
        return [f"'{MANIFEST}' {err}"]
    listed = manifest.get("files")
    if listed is None:
        missing = [f"'{name}' is missing" for name in _ESSENTIAL if name not in sizes and name.startswith(below)]
        return missing + _cut_off(filesystem, folder, sizes, below)
    found = [
        f"'{name}' {fault}"
        for name, measured in listed.items()
        if name.startswith(below) and (fault := _fault(filesystem, folder, name, measured, sizes.get(name)))
    ]
    # RLlib would read these as well.
    strange = [name for name in sizes if name not in listed and name.startswith(below) and is_read_by_rllib(name)]
    return found + [f"'{name}' is not of this save" for name in strange]


def check_component(path: str | Path, filesystem: FileSystem | None) -> None:
    """Refuses one damaged part of a checkpoint, if it lies in one.

    Args:
        path: Folder or URI of the part.
        filesystem: PyArrow file system of `path`; by default what the URI says.

    Raises:
        ValueError: Naming every file that is missing or damaged.
    """
    from pyarrow.fs import FileSystem, FileType, LocalFileSystem

    folder = str(path)
    if filesystem is None and "://" in folder:
        filesystem, folder = FileSystem.from_uri(folder)
    if filesystem is None:
        filesystem, folder = LocalFileSystem(), str(Path(folder).expanduser().absolute())
    folder = folder.rstrip("/")
    above = folder
    while posixpath.dirname(above) not in ("", "/", above):
        above = posixpath.dirname(above)
        if filesystem.get_file_info(f"{above}/{MANIFEST}").type == FileType.File:
            below = posixpath.relpath(folder, above) + "/"
            if found := faults(filesystem, above, below=below):
                raise ValueError(f"The checkpoint at {above!r} is damaged: {', '.join(found)}; use another one.")
            return


def _fault(filesystem: FileSystem, folder: str, name: str, measured: Mapping[str, int], size: int | None) -> str | None:
    if size is None:
        return "is missing"
    if size != measured["bytes"]:
        return f"has {size} bytes instead of {measured['bytes']}" if size else "is empty"
    try:
        crc = 0
        with filesystem.open_input_stream(posixpath.join(folder, name)) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
    except OSError as err:
        return f"cannot be read ({err})"
    return None if crc == measured["crc32"] else "has other content than was saved"


def _cut_off(filesystem: FileSystem, folder: str, sizes: Mapping[str, int], below: str) -> list[str]:
    found = []
    for name, size in sizes.items():
        if name.startswith(below) and is_read_by_rllib(name) and name.endswith(".pkl"):
            try:
                is_whole = size > 0 and is_whole_pickle(read_file(filesystem, posixpath.join(folder, name)))
            except OSError as err:
                found.append(f"'{name}' cannot be read ({err})")
                continue
            if not is_whole:
                found.append(f"'{name}' is cut off or damaged" if size else f"'{name}' is empty")
    return found


def is_read_by_rllib(name: str) -> bool:
    """Whether RLlib reads a file of this name: of every component its state and its class, and its own metadata.

    Anything else beside them, such as what macOS, Windows or people leave there, is read by nobody.

    Args:
        name: Path in a checkpoint.

    Source: Ray 2.60, `Checkpointable.restore_from_path`, `Checkpointable.from_checkpoint`, `get_checkpoint_info`.
    """
    folder, _, file = name.rpartition("/")
    states = [state for pattern, state in _STATE_IN.items() if pattern.fullmatch(folder)]
    return name == _METADATA or any(file in (MARK, f"{state}.pkl", f"{state}.msgpack") for state in states)


def _sizes(filesystem: FileSystem, folder: str) -> dict[str, int]:
    from pyarrow.fs import FileSelector

    infos = filesystem.get_file_info(FileSelector(folder, recursive=True))
    return {posixpath.relpath(info.path, folder): info.size for info in infos if info.is_file}


def read_file(filesystem: FileSystem, path: str) -> bytes:
    """The content of a file."""
    with filesystem.open_input_stream(path) as stream:
        content: bytes = stream.readall()
    return content


def has_checksums(filesystem: FileSystem, folder: str) -> bool:
    """Whether a checkpoint has a manifest with checksums, undamaged."""
    try:
        return "files" in parsed_manifest(read_file(filesystem, posixpath.join(folder, MANIFEST)))
    except (OSError, ValueError):
        return False


def is_whole_pickle(content: bytes) -> bool:
    """Whether a pickle is not cut off. Nothing is unpickled for that, so a missing module does not matter."""
    import pickletools

    try:
        for _ in pickletools.genops(content):
            pass
    except Exception:  # Damaged opcodes end in errors of any kind.
        return False
    return True


def is_of_cal_ql(mark: bytes) -> bool:
    """Whether the class and config in a pickled `class_and_ctor_args.pkl` are those of Cal-QL; it is not unpickled."""
    return b"rllib_calql.algorithm" in mark or b"rllib_calql.config" in mark
