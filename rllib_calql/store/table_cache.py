"""`TableCache`: offline tables that are larger than memory, as files that the next start maps again.

An entry is a folder named by a digest of everything it was made from. It is written under another name and renamed
when it is whole, and it holds a digest of its own files: an entry is found whole, or it is made anew. A lock per entry,
which the kernel releases when its holder dies, lets one process build while others wait for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.store.offline_table import FINAL_OBSERVATIONS, RECORDS, OfflineTable
from rllib_calql.system.file_lock import held_lock
from rllib_calql.system.parsed_json import parsed_json

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
_VERSION = 2
_EPISODES = "episodes.npz"
_META = "meta.json"
_BUILDING = ".building-"
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_DATA_FILES = (f"{RECORDS}.bin", f"{FINAL_OBSERVATIONS}.bin", _EPISODES)


def default_cache_dir() -> Path:
    """`rllib_calql` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rllib_calql"


def default_memory_limit() -> int:
    """Half of the memory that this machine, or the control group that the process runs in, has."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit_file in _CGROUP_LIMITS:
        try:
            limit = limit_file.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total // 2


def cache_key(parts: Any) -> str:
    """Name of the entry made from `parts`, anything that JSON can hold."""
    text = json.dumps([_VERSION, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class TableCache:
    """Tables in a folder.

    Args:
        folder: Made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: str, *, gamma: float, memory_limit: int) -> tuple[OfflineTable, dict[str, Any]] | None:
        """The table of an entry and what was stored with it; None if there is no whole entry of that key."""
        try:
            return _open_entry(self.folder / key, gamma=gamma, memory_limit=memory_limit)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as err:
            logger.warning("The cached data in %s are damaged and are made anew: %s", self.folder / key, err)
            return None

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Waits until no other process builds this entry, and keeps others from it."""
        self._make_folder()
        waiting = f"Waiting for another process that writes the same data to {self.folder}."
        with held_lock(self.folder / f"{key}.lock", wait=True, waiting=waiting):
            yield

    @contextmanager
    def build(self, key: str | None) -> Iterator[TableWriter]:
        """Yields the writer of a new entry; whatever is not finished is removed.

        Args:
            key: Name of the entry, whose lock is held; None for a table that is gone with the process.

        Raises:
            OSError: If the disk is full, with the remedy.
        """
        self._make_folder()
        prefix = f"{_BUILDING}{key or 'unnamed'}-"
        if key is not None:
            # The lock is ours: whoever left these is dead, and an entry that is there is a damaged one.
            for stale in (*self.folder.glob(f"{prefix}*"), self.folder / key):
                shutil.rmtree(stale, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder))
        writer = TableWriter(path, None if key is None else self.folder / key)
        try:
            yield writer
        except OSError as err:
            if err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                err.errno,
                f"There is no room for the offline data in {self.folder} ({err.strerror}); set `cache_dir` to a folder "
                "on a larger disk, or raise `store_memory_limit` to keep them in memory",
            ) from err
        finally:
            # Closing writes what is still buffered, which a full disk refuses once more.
            with suppress(OSError):
                writer.close()
            shutil.rmtree(path, ignore_errors=True)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise OSError(
                err.errno, f"`cache_dir` {str(self.folder)!r} cannot be made ({err.strerror}); set another one"
            ) from err


class TableWriter:
    """Writes one entry; a `RecordSink`.

    Args:
        path: Folder to write to.
        target: Folder to be renamed to, or None: the files are then removed once they are mapped.
    """

    def __init__(self, path: Path, target: Path | None) -> None:
        self._path = path
        self._target = target
        self._files: dict[str, BinaryIO] = {}

    def write(self, name: str, array: Array) -> None:
        """Appends the rows of an array to the file of that name."""
        if name not in self._files:
            self._files[name] = (self._path / f"{name}.bin").open("wb")
        # As bytes, because memoryviews know no structured types.
        self._files[name].write(np.ascontiguousarray(array).view(np.uint8).data)

    def finish(
        self,
        *,
        dtype: np.dtype[Any],
        episodes: Mapping[str, Any],
        stored_with: Mapping[str, Any],
        gamma: float,
        memory_limit: int,
    ) -> OfflineTable:
        """Completes the entry, puts it in its place and maps it.

        Args:
            dtype: Layout of a record.
            episodes: `lengths`, `terminateds` and `has_tail`.
            stored_with: JSON-safe; given back by `TableCache.load`.
            gamma: Discount of the table.
            memory_limit: Of the table, in bytes.
        """
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        with (self._path / _EPISODES).open("wb") as episodes_file:
            np.savez(episodes_file, **episodes)
            episodes_file.flush()
            os.fsync(episodes_file.fileno())
        meta = {
            "version": _VERSION,
            "dtype": _descr_of(dtype),
            "fingerprint": _fingerprint(self._path),
            "stored_with": dict(stored_with),
        }
        with (self._path / _META).open("w") as meta_file:
            json.dump(meta, meta_file)
            meta_file.flush()
            os.fsync(meta_file.fileno())
        # Mapped before it is renamed: the map then stays, whatever another process does to the entry.
        table = _map_entry(self._path, meta, gamma=gamma, memory_limit=memory_limit)
        if self._target is not None:
            self._path.rename(self._target)
        return table

    def close(self) -> None:
        """Closes the files, all of them even if one fails."""
        with ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.close)


def _open_entry(path: Path, *, gamma: float, memory_limit: int) -> tuple[OfflineTable, dict[str, Any]]:
    meta = parsed_json((path / _META).read_bytes())
    if meta["version"] != _VERSION:
        raise ValueError(f"version {meta['version']}, expected {_VERSION}")
    if _fingerprint(path) != meta["fingerprint"]:
        raise ValueError("the files are not as they were written")
    return _map_entry(path, meta, gamma=gamma, memory_limit=memory_limit), meta["stored_with"]


def _map_entry(path: Path, meta: Mapping[str, Any], *, gamma: float, memory_limit: int) -> OfflineTable:
    dtype = np.dtype([(name, base, tuple(shape)) for name, base, shape in meta["dtype"]])
    obs = dtype[0]
    with np.load(path / _EPISODES) as episodes:
        columns = {name: episodes[name] for name in episodes.files}
    num_episodes = len(columns["lengths"])
    records = np.memmap(path / f"{RECORDS}.bin", dtype=dtype, mode="r")
    final = np.memmap(path / f"{FINAL_OBSERVATIONS}.bin", dtype=obs.base, mode="r", shape=(num_episodes, *obs.shape))
    return OfflineTable(records, final, gamma=gamma, memory_limit=memory_limit, **columns)


def _fingerprint(path: Path) -> str:
    return fingerprint_of((DataFile(str(path / name)) for name in _DATA_FILES), mapped=True)


def _descr_of(dtype: np.dtype[Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    assert dtype.names is not None
    return [(name, dtype[name].base.str, dtype[name].shape) for name in dtype.names]
