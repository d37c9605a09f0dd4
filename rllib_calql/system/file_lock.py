"""`held_lock`: a lock on a file, so that one process at a time writes to a place and the others learn who does.

The kernel holds the lock (`flock`), so it ends with its holder, however that dies. The file says who the holder is, for
messages only; it is removed when the lock is given back.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rllib_calql.system.parsed_json import parsed_json

logger = logging.getLogger(__name__)

_MARK = "rllib_calql lock"
_MAX_BYTES = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # File systems without `flock` answer these.


class LockedError(RuntimeError):
    """Somebody else holds the lock. The message names the holder.

    Attributes:
        holder: Who it is, as text.
    """

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{holder} holds the lock '{path}'.")
        self.path = path
        self.holder = holder

    def __reduce__(self) -> tuple[type[LockedError], tuple[Path, str]]:
        """Ray carries errors between processes."""
        return type(self), (self.path, self.holder)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock now; the file stays as it is."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # There is no such file, or no lock can be had there.
        return False
    return False


@contextmanager
def held_lock(path: Path, *, wait: bool = False, waiting: str | None = None) -> Iterator[None]:
    """Holds the lock at `path` against other processes, and against other threads of this one.

    Nothing but a lock's own file is ever opened, written or removed: neither what a symbolic link points to, nor a file
    of other content. Where the file system has no locks, a warning is logged and nothing is locked.

    Args:
        path: The lock's file, in a folder that exists and can be written to.
        wait: Wait for the holder to give it back, instead of raising `LockedError`.
        waiting: Logged as a warning before it waits.

    Raises:
        LockedError: If it is held, and `wait` is False.
        FileExistsError: If there is a file at `path` that is no lock.
        OSError: If the file cannot be made.
    """
    descriptor = _acquired(path, wait=wait, waiting=waiting)
    if descriptor is None:
        yield
        return
    try:
        yield
    finally:
        try:
            # Removed while it is held: whoever waits for this file sees that it is not the one at `path` any more.
            if _is_at(path, descriptor):
                path.unlink(missing_ok=True)
        finally:
            # Closing is not enough where a child of a fork has the descriptor as well.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _acquired(path: Path, *, wait: bool, waiting: str | None) -> int | None:
    """Descriptor of the locked file, or None where there are no locks."""
    while True:
        descriptor = _opened(path)
        try:
            if not _locked(path, descriptor, wait=wait, waiting=waiting):
                os.close(descriptor)
                return None
            if _is_at(path, descriptor):
                _write_holder(path, descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # Removed by its holder just before it was ours.


def _opened(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as err:
        if err.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_lock(path) from err
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _no_lock(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _locked(path: Path, descriptor: int, *, wait: bool, waiting: str | None) -> bool:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise LockedError(path, _holder(descriptor)) from None
            if waiting is not None:
                logger.warning("%s", waiting)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as err:
        if err.errno not in _NO_LOCKS:
            raise
        logger.warning("The file system of '%s' has no locks (%s); see to it that one process writes.", path, err)
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _write_holder(path: Path, descriptor: int) -> None:
    content = os.pread(descriptor, _MAX_BYTES, 0)
    if content and _parsed(content) is None:
        raise _no_lock(path)
    entry = {
        "what": _MARK,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join(sys.argv)[:200],
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    with suppress(OSError):  # A full disk costs the holder's name; the lock holds without it.
        os.pwrite(descriptor, json.dumps(entry).encode(), 0)


def _holder(descriptor: int) -> str:
    entry = _parsed(os.pread(descriptor, _MAX_BYTES, 0))
    if entry is None:  # It has just been locked.
        return "Another process"
    return f"Process {entry.get('pid')} on {entry.get('host')} ({entry.get('command')}, since {entry.get('since')})"


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        entry = parsed_json(content)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and entry.get("what") == _MARK else None


def _no_lock(path: Path) -> FileExistsError:
    return FileExistsError(f"'{path}' is no lock of this package; it is left as it is: move it away.")
