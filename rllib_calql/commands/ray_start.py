"""Why Ray did not start, in a sentence that says what to do."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

_SOCKET_PATH_BYTES = 107  # Of the sockets in Ray's folder for temporary files, on Linux.
_LEAST_SHARED_MIB = 80  # Ray's own least size of an object store.


def cause_of_failed_start(error: BaseException) -> str:
    """The cause of an error of `ray.init`, and the way out.

    Args:
        error: What was raised.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if "AF_UNIX" in text or "socket path" in text.lower():
        return (
            f"the path of its folder for temporary files, '{folder}', is too long for sockets (at most "
            f"{_SOCKET_PATH_BYTES} bytes with Ray's own part); set RAY_TMPDIR to a folder with a short path. ({text})"
        )
    if isinstance(error, PermissionError) or "Permission denied" in text or "Read-only file system" in text:
        return f"it may not write to its folder '{folder}'; set RAY_TMPDIR to one that you may write to. ({text})"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not _is_writable(folder):
        return f"its folder for temporary files, '{folder}', is not there; set RAY_TMPDIR to one that is. ({text})"
    if "No space left" in text or _free_mib(folder) < _LEAST_SHARED_MIB:
        return (
            f"the disk of its folder '{folder}' is full; free some space, or set RAY_TMPDIR to a folder on another. "
            f"({text})"
        )
    if re.search(r"object.store.memory|at least 75|shm", text, re.IGNORECASE) or _free_mib("/dev/shm") < (
        _LEAST_SHARED_MIB
    ):
        return (
            f"there is too little memory for its object store ({_free_mib('/dev/shm'):,.0f} MiB free in /dev/shm); end "
            f"other programs, or give a container more, as in `docker run --shm-size=2g`. ({text})"
        )
    if re.search(r"port|address already in use|bind", text, re.IGNORECASE):
        return (
            "a port that it wants is taken; see which programs use ports by `ss -ltnp`, and drop RAY_* variables that "
            f"set ports. ({text})"
        )
    if re.search(r"timed out|did not|failed to start|node_ip_address|gcs|raylet|connect", text, re.IGNORECASE):
        return (
            "its processes did not come up in time; the machine may be too busy or short of memory, or another program "
            f"may have ended them. Give the command again, with -v to see Ray's logs, which are in '{folder}/ray'. "
            f"({text})"
        )
    return f"{type(error).__name__}: {text}. Give -v to see Ray's logs."


def _free_mib(folder: str) -> float:
    try:
        return shutil.disk_usage(folder).free / 2**20
    except OSError:
        return float("inf")


def _is_writable(folder: str) -> bool:
    try:
        with tempfile.TemporaryDirectory(dir=Path(folder)):
            return True
    except OSError:
        return False
