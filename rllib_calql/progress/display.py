"""`Display`: shows what a command does, from its first moment to its last, and what its trials do."""

from __future__ import annotations

import errno
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TextIO

from rllib_calql.progress.budget import format_duration
from rllib_calql.progress.lines import STARTING, Totals, TrialProgress, format_line, overlaid
from rllib_calql.system.activity import Told
from rllib_calql.system.stop_signals import silence_dead_terminals

_INTERVAL_S = 4.5  # With a tick, at most 5 s between two lines.
_TICK_S = 0.25
_PATIENCE_S = 3.0  # After which it is told how long something has been going on.
_MAX_LINES_IN_LOGS = 5  # Of as many trials at once; of more there is one line together.
_MAX_LINES_ON_TERMINALS = 10
_CLEAR_LINE = "\x1b[2K"


class Channel(Protocol):
    """Where trials tell what they do, see `system.activity.Listener`."""

    def latest(self, name: str) -> Told | None:
        """What one of them told last."""
        ...


@dataclass
class _Trial:
    """A trial that is shown.

    Attributes:
        progress: By its results.
        totals: Where it ends.
        since: When it began to do what it does.
        told: What it does.
        counters: What it has counted since the last result; what it does now may count something else.
        measured: Phase, count and time from which its speed is measured before a result tells it.
        printed_at: When its last line was printed.
        printed_kind: The kind of work that was printed there.
    """

    progress: TrialProgress
    totals: Totals
    since: float
    told: Told | None = None
    counters: Mapping[str, int] = field(default_factory=dict)
    measured: tuple[str, int, float] | None = None
    printed_at: float = -math.inf
    printed_kind: str = ""


class Display:
    """Shows what is going on, at least every five seconds, and how long it has been going on.

    On a terminal the lines stay in place and are rewritten. Elsewhere lines are printed: one for everything new, and
    for each trial at most one in `interval_s`. A thread sees to it while the caller is busy.

    Args:
        file: Where to print; by default standard output.
        is_terminal: Whether lines can be rewritten there; by default asked.
        interval_s: Seconds between plain lines of one trial.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        is_terminal: bool | None = None,
        interval_s: float = _INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = sys.stdout if file is None else file
        self._is_terminal = self._file.isatty() if is_terminal is None else is_terminal
        self._interval_s = interval_s
        self._clock = clock
        self._begin = clock()
        self._stage, self._stage_since = "", self._begin
        self._trials: dict[str, _Trial] = {}
        self._num_ended = 0
        self._printed_at = -math.inf
        self._channel: Channel | None = None
        self._live: Any = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._ended.set()
        with self._lock:
            self._stop_live()

    # --- What is shown -----------------------------------------------------------------------------------------------

    def stage(self, text: str) -> None:
        """Says what the command does from now on, as long as no trial runs."""
        with self._lock:
            self._stage, self._stage_since = text, self._clock()
            if self._live is not None:
                self._refresh()
            elif self._is_terminal:  # Until the thread has loaded what rewrites lines.
                self._overwrite(self._timed(text))
            else:
                self._write(self._timed(text))

    def hear(self, channel: Channel | None) -> None:
        """Sets where trials tell what they do."""
        with self._lock:
            self._channel = channel

    def show(self, name: str, progress: TrialProgress, totals: Totals, *, always: bool = False) -> None:
        """Shows a trial after one more result, or before its first one.

        Args:
            name: By which the trial tells what it does.
            progress: What its results say.
            totals: Where it ends.
            always: Prints a line, whenever the last one was printed.
        """
        with self._lock:
            now = self._clock()
            trial = self._trials.setdefault(name, _Trial(progress, totals, now))
            trial.progress, trial.totals, trial.since = progress, totals, now
            trial.counters = {}
            self._listen(name, trial)
            if self._is_terminal:
                self._refresh()
            elif always or (not self._are_many() and now - trial.printed_at >= self._interval_s):
                is_starting = progress.phase == STARTING
                self._print_line(trial, self._line(trial) if is_starting else format_line(progress))

    def end(self, name: str, *, then: str = "finishing") -> None:
        """Shows a trial no more; `then` is what the command does if it was the last one that is shown."""
        with self._lock:
            self._num_ended += self._trials.pop(name, None) is not None
            if not self._trials:
                self._stage, self._stage_since = then, self._clock()

    def forget_trials(self) -> None:
        """Shows no trial any more, as after a run."""
        with self._lock:
            self._trials.clear()
            self._num_ended = 0

    def print(self, text: str, *, timed: bool = False) -> None:
        """Prints something that stays.

        Args:
            text: One line or several.
            timed: Puts the time since the command began before it.
        """
        with self._lock:
            self._write(self._timed(text) if timed else text)

    def tick(self) -> None:
        """Shows how things are now. The thread calls this; without it, somebody else has to."""
        with self._lock:
            for name, trial in self._trials.items():
                self._listen(name, trial)
            if self._is_terminal:
                self._refresh()
            elif not self._trials or self._are_many():
                if self._clock() - self._printed_at >= self._interval_s and (self._stage or self._trials):
                    self._write(self._timed(self._summary() if self._trials else self._lasting(self._stage)))
            else:
                for trial in self._trials.values():
                    is_starting = trial.progress.phase == STARTING and trial.measured is None
                    is_new = is_starting and _kind(trial.told) != trial.printed_kind
                    if is_new or self._clock() - trial.printed_at >= self._interval_s:
                        self._print_line(trial, self._line(trial))

    # --- Lines -------------------------------------------------------------------------------------------------------

    def _print_line(self, trial: _Trial, line: str) -> None:
        trial.printed_at, trial.printed_kind = self._clock(), _kind(trial.told)
        self._write(self._timed(line))

    def _listen(self, name: str, trial: _Trial) -> None:
        told = self._channel.latest(name) if self._channel is not None else None
        if told is not None and told != trial.told:
            trial.told, trial.since = told, self._clock()
            trial.counters = {**trial.counters, **told.counters}

    def _line(self, trial: _Trial) -> str:
        """The trial's line with what it does now."""
        progress = overlaid(trial.progress, trial.counters, trial.totals)
        now = self._clock()
        if progress.unit and (trial.measured is None or trial.measured[0] != progress.phase):
            trial.measured = progress.phase, progress.done, now
        if progress.per_s is None and trial.measured is not None and now - trial.measured[2] > _PATIENCE_S:
            per_s = (progress.done - trial.measured[1]) / (now - trial.measured[2])
            progress = replace(progress, per_s=per_s or None)
        if trial.told is not None:
            activity = trial.told.text
        else:
            activity = "its process" if progress.phase == STARTING else "working"
        return format_line(replace(progress, activity=self._lasting(activity, trial.since)))

    def _lasting(self, text: str, since: float | None = None) -> str:
        seconds = self._clock() - (self._stage_since if since is None else since)
        return f"{text}, {seconds:.0f} s" if seconds >= _PATIENCE_S else text

    def _summary(self) -> str:
        """One line for many trials."""
        phases = Counter(
            overlaid(trial.progress, trial.counters, trial.totals).phase for trial in self._trials.values()
        )
        parts = [f"{len(self._trials)} trials: " + ", ".join(f"{number} {phase}" for phase, number in phases.items())]
        if self._num_ended:
            parts.append(f"{self._num_ended} ended")
        for name, attribute in (("return", "episode_return"), ("success", "success_rate")):
            known = [getattr(trial.progress.best, attribute) for trial in self._trials.values()]
            best = max((value for value in known if value is not None), default=None)
            if best is not None:
                parts.append(f"best {name} {best:.2f}")
        return "  ".join(parts)

    def _timed(self, text: str) -> str:
        return f"{format_duration(math.floor(self._clock() - self._begin))}  {text}"

    def _are_many(self) -> bool:
        return len(self._trials) > _MAX_LINES_IN_LOGS

    # --- Printing ----------------------------------------------------------------------------------------------------

    def _write(self, text: str) -> None:
        self._printed_at = self._clock()
        with _outliving_readers():
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self._file, flush=True)

    def _overwrite(self, text: str) -> None:
        """Puts a line where the next one will replace it."""
        with _outliving_readers():
            self._file.write(f"\r{_CLEAR_LINE}{text}\r")
            self._file.flush()

    def _refresh(self) -> None:
        """Rewrites the lines on a terminal."""
        from rich.console import Console, Group
        from rich.live import Live
        from rich.text import Text

        with _outliving_readers():
            if self._live is None:
                if self._ended.is_set():
                    return
                self._overwrite("")
                console = Console(file=self._file, force_terminal=True)
                self._live = Live(console=console, auto_refresh=False, transient=True)
                self._live.start()
            most = max(1, min(_MAX_LINES_ON_TERMINALS, self._live.console.size.height - 3))
            lines = [self._line(trial) for trial in list(self._trials.values())[:most]]
            if len(self._trials) > most:
                lines.append(self._summary())
            shown = [self._timed(line) for line in lines or [self._lasting(self._stage)]]
            group = Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in shown))
            self._live.update(group, refresh=True)

    def _stop_live(self) -> None:
        if self._live is not None:
            with _outliving_readers():
                self._live.stop()
            self._live = None
        elif self._is_terminal:
            self._overwrite("")

    def _run(self) -> None:
        # The main thread takes them.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        while not self._ended.wait(_TICK_S):
            self.tick()


def _kind(told: Told | None) -> str:
    """Of work: what is printed at once during the start of a trial, where percentages are not."""
    return told.text.split()[0] if told is not None else ""


@contextmanager
def _outliving_readers() -> Iterator[None]:
    """A closed terminal, the end of a pipe or a full disk does not end the run; what is written there is lost."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            silence_dead_terminals()
