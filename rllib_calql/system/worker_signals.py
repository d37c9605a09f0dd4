"""Imported by Ray's workers at their start: SIGTERM does not end them, and ends the processes that they start.

The command has started them with SIGTERM blocked, see `StopSignals.while_starting_ray`. What they start themselves,
such as a simulator, would inherit that and could not be ended any more.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType


def _outlive(signum: int, frame: FrameType | None) -> None:
    """The command ends its workers when the checkpoint is written."""


def install() -> None:
    """Takes SIGTERM from the worker, where the command has blocked it."""
    import ray._private.utils

    if threading.current_thread() is not threading.main_thread():
        return
    if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return
    signal.signal(signal.SIGTERM, _outlive)
    # The worker's main loop would set a handler that raises SystemExit.
    ray._private.utils.set_sigterm_handler = lambda handler: None
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


if os.path.basename(sys.argv[0] if sys.argv else "") == "default_worker.py":
    install()
