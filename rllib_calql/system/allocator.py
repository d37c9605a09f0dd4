"""glibc's allocator, told to keep memory that an update frees for the next update."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # Parameters of mallopt(3).
_SETTINGS = {
    _MMAP_THRESHOLD: 32 * 2**20,  # The most that glibc takes. Larger blocks come from the kernel as before.
    _TRIM_THRESHOLD: 512 * 2**20,
    _TOP_PAD: 64 * 2**20,
}
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Makes this process reuse freed blocks of up to 32 MiB, and up to 512 MiB of them, instead of returning them.

    By default every large tensor is new memory of the kernel, which it clears page by page: a fifth of an update's
    time at the sizes of the paper.

    Returns:
        Whether it did: not without glibc, nor where the user has set the allocator by an environment variable.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none.
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items())
