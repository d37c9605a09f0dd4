"""A place to write files in that become visible all at once, or not at all.

What is written stands in a hidden folder beside its target and is moved there in one rename when it is complete and on
the disk. An error removes the folder. A killed process cannot, so the folder holds a locked file: the lock ends with
the process, and the next writer removes folders whose lock is free.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_PREFIX = ".rllib-calql-write-"  # Neither Minari nor this package's readers look into hidden folders.
_LOCK = "lock"
_REPLACED = "replaced"  # What stood at the target, until what replaces it stands there.
_GRACE_S = 60.0  # Between the making of a folder and the locking of its file.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staged(target: Path, beside: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a path to write a file or a folder at; moves it to `target` if the block ends without an error.

    Args:
        target: Final place. Its parent folder is made if it lies below `beside`.
        beside: An existing folder on the file system of `target`, which holds the hidden folder meanwhile.
        overwrite: Whether what stands at `target` is replaced.

    Raises:
        FileExistsError: If `target` exists and is not to be replaced.
        OSError: If the disk is full; the message names `target`.
    """
    _refuse_existing(target, overwrite)
    _remove_abandoned(beside)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=beside))
    try:
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            built = folder / target.name
            yield built
            _flush_to_disk(built)
            _refuse_existing(target, overwrite)
            target.parent.mkdir(parents=True, exist_ok=True)
            _move(built, target, aside=folder / _REPLACED)
            _flush_to_disk(target.parent, deep=False)
    except OSError as err:
        # HDF5 reports the number in its text only.
        full = err.errno in _NO_SPACE or any(f"errno = {number}," in str(err) for number in _NO_SPACE)
        if not full:
            raise
        raise OSError(
            err.errno or errno.ENOSPC,
            f"'{target}' was not written, nothing is left of it: {err.strerror or err}; free space, or write elsewhere",
        ) from err
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(f"'{target}' exists already; choose another target, or replace it with `overwrite=True`.")


def _move(built: Path, target: Path, *, aside: Path) -> None:
    if not target.is_dir():
        os.replace(built, target)
        return
    # A rename cannot replace a folder that is not empty.
    os.rename(target, aside)
    try:
        os.rename(built, target)
    except BaseException:  # Also an interrupt: what was moved aside would be removed.
        if not os.path.lexists(target):
            os.rename(aside, target)
        raise


def _flush_to_disk(path: Path, *, deep: bool = True) -> None:
    for entry in [path, *(path.rglob("*") if deep and path.is_dir() else [])]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_abandoned(beside: Path) -> None:
    for folder in beside.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime < _GRACE_S:
                continue
            with os.fdopen(os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW), "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                inside = set(os.listdir(folder))
                if _REPLACED in inside and inside - {_REPLACED, _LOCK}:
                    logger.warning(
                        "'%s' holds data that a killed command was replacing, and the new ones beside them; move both "
                        "to their place.",
                        folder,
                    )
                    continue
                shutil.rmtree(folder, ignore_errors=True)
