"""`StopSignals`: what SIGTERM, SIGHUP and Ctrl-C do to a command, from its first line to its last.

The first of them lets the command end in order, and a thread of its own sees to it that it does: where Python is busy
elsewhere, and where Ray would print a stack dump. A second one, and the end of the grace period, end the process.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_WATCHED = (signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = b"\x1b[?25h"


class StopSignals:
    """Handles signals as long as it is entered, in the main thread. One that the parent process ignores stays ignored.

    Attributes:
        signum: The first signal that arrived, or None.
        grace_s: Seconds from SIGTERM or SIGHUP to the end of the process, whatever it does.
        saved: What is there for the user if the command ends now, as a sentence.
        on_stop: Called at the first signal in place of raising `KeyboardInterrupt`, while set. It must return soon.
        before_end: Called before the process is ended at once.
    """

    def __init__(self, grace_s: float = 30.0) -> None:
        self.signum: int | None = None
        self.grace_s = grace_s
        self.saved = ""
        self.on_stop: Callable[[], None] | None = None
        self.before_end: Callable[[], None] | None = None
        self._watched: list[signal.Signals] = []
        self._previous: dict[int, Any] = {}
        self._is_ours = False  # Whether the next SIGINT comes from the watching thread.
        self._ignores_sigint = False
        self._timer: threading.Timer | None = None

    @property
    def name(self) -> str:
        """What stopped the command."""
        return "Interrupted" if self.signum in (None, signal.SIGINT) else f"Stopped by {self._signal_name()}"

    @property
    def exit_code(self) -> int:
        """Of the process, by the convention of shells."""
        return 128 + (self.signum or signal.SIGINT)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Only the main thread may set handlers.
        self._ignores_sigint = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        self._watched = [signum for signum in _WATCHED if signal.getsignal(signum) is not signal.SIG_IGN]
        self._previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, *self._watched)}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # The kernel's handler writes there at once, also while the main thread is in a library.
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._reader,), name="stop signals", daemon=True).start()
        signal.signal(signal.SIGINT, self._on_sigint)
        self._handle()
        _entered.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._previous:
            return
        _entered.remove(self)
        if self._timer is not None:
            self._timer.cancel()
        signal.set_wakeup_fd(self._previous_fd)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        os.close(self._writer)  # Ends the thread.

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if a signal has arrived; a library may have swallowed the first one."""
        if self.signum is not None:
            raise KeyboardInterrupt

    @contextmanager
    def while_starting_ray(self) -> Iterator[None]:
        """Keeps the signals from the processes that are started meanwhile, and Ray's handlers from this one.

        A process group, a container or a job of Slurm may be signalled as a whole. Ray's processes have to outlive that
        until the checkpoint is written, so they inherit these signals blocked.
        """
        if not self._previous:
            yield
            return
        import ray._private.utils

        set_handler = ray._private.utils.set_sigterm_handler
        ray._private.utils.set_sigterm_handler = lambda handler: None
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        try:
            yield
        finally:
            ray._private.utils.set_sigterm_handler = set_handler
            self._handle()  # In place of that which prints a stack dump.
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.check()

    def end_at_once(self, reason: str) -> None:
        """Ends the process from any thread, with what is known about the results."""
        silence_dead_terminals()
        message = f"\n{reason}: stopped at once. {self.saved}".rstrip() + "\n"
        with suppress(OSError):
            os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + message.encode())
        try:
            if self.before_end is not None:
                self.before_end()
        finally:
            os._exit(self.exit_code)

    def _handle(self) -> None:
        for signum in self._watched:
            signal.signal(signum, _noted_by_the_thread)

    def _watch(self, reader: int) -> None:
        # Another thread takes them, which `while_starting_ray` may keep from doing so.
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        while received := os.read(reader, 1):
            if received[0] in self._watched:
                self._receive(received[0])
        os.close(reader)

    def _receive(self, signum: int) -> None:
        if signum == signal.SIGHUP:
            silence_dead_terminals()
        if self.signum is not None:
            self.end_at_once(f"{self.name}, then by another signal")
        self.signum = signum
        sys.unraisablehook = lambda unraisable: None  # An interrupt inside a destructor.
        self._timer = threading.Timer(
            self.grace_s, self.end_at_once, [f"{self.name}, and the grace period of {self.grace_s:g} s is over"]
        )
        self._timer.daemon = True
        self._timer.start()
        self._is_ours = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _on_sigint(self, signum: int, frame: FrameType | None) -> None:
        if self._is_ours:
            self._is_ours = False
        elif self.signum is not None:
            raise KeyboardInterrupt
        elif self._ignores_sigint and self.on_stop is None:
            return
        else:
            self.signum = signum
        if self.on_stop is None:
            raise KeyboardInterrupt
        self.on_stop()

    def _signal_name(self) -> str:
        assert self.signum is not None
        return signal.Signals(self.signum).name


def silence_dead_terminals() -> None:
    """Sends to nowhere what would be written to a terminal that is gone; otherwise every line is an error."""
    for descriptor in filter(_is_dead_terminal, (1, 2)):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _is_dead_terminal(descriptor: int) -> bool:
    try:
        termios.tcgetattr(descriptor)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)
    return False


@contextmanager
def outliving_terminal() -> Iterator[None]:
    """A closed terminal does not end the run; what is written to it is lost."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        silence_dead_terminals()


_entered: list[StopSignals] = []


def _noted_by_the_thread(signum: int, frame: FrameType | None) -> None:
    """Python writes the signal to the descriptor that the thread reads."""


# A forked process, such as a worker of `multiprocessing`, is ended by SIGTERM, and its parent is not told.


def _before_fork() -> None:
    if _entered:
        _mask_before.of_thread = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)


def _after_in_parent() -> None:
    if hasattr(_mask_before, "of_thread"):
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask_before.of_thread)
        del _mask_before.of_thread


def _after_in_child() -> None:
    if _entered and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        for signum, handler in _entered[0]._previous.items():
            signal.signal(signum, handler)
        _entered.clear()
    _after_in_parent()


_mask_before = threading.local()
os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
