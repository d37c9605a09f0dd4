"""`write_whole`: files that are there whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

PARTIAL_ENDING = ".partial"  # Of hidden files, which no reader of folders looks at.


def partial_of(path: Path) -> Path:
    """A new name beside a file, under which it is written until it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_ENDING}")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that appears at once and whole, and outlives a power cut once this returns.

    Raises:
        OSError: If it cannot be written.
    """
    partial = partial_of(path)
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "nt":  # Windows opens no folders.
        return
    folder = os.open(path.parent, os.O_RDONLY)  # The new name is in the folder.
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
