"""`write_whole`: files that are there whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

PARTIAL_ENDING = ".partial"  # Of hidden files, which no reader of folders looks at.


def partial_of(path: Path) -> Path:
    """A new name beside a file, under which it is written until it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_ENDING}")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that appears at once and whole, and outlives a power cut once this returns.

    Raises:
        OSError: If it cannot be written, with its name and the reason.
    """
    partial = partial_of(path)
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        if os.name != "nt":  # Windows opens no folders.
            _flush_folder(path.parent)  # The new name is in the folder.
    except BaseException as err:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(err, OSError):
            raise told(err, f"'{path}' cannot be written") from err
        raise


def told(error: OSError, what: str, remedy: str = "") -> OSError:
    """An error of the same number that says what could not be done, why, and what to do.

    Args:
        error: As the system gave it.
        what: That could not be done, as a part of a sentence.
        remedy: What to do, likewise.
    """
    new = OSError(f"{what}: {error.strerror or str(error).rstrip('.')}{remedy and f'; {remedy}'}.")
    new.errno = error.errno
    return new


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
