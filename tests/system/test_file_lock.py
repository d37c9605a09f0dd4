"""Locks: one holder at a time, named to the others, ended by its death; nothing else is ever touched."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rllib_calql.system.file_lock import LockedError, held_lock

HOLDER = """
import sys, time
from pathlib import Path
from rllib_calql.system.file_lock import held_lock
with held_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_holds_it_and_gets_it_once_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    first = _holder(path)
    try:
        with pytest.raises(LockedError, match=rf"Process {first.pid} on .* holds the lock"), held_lock(path):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=10)
    with held_lock(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with held_lock(path), pytest.raises(LockedError, match=f"Process {os.getpid()}"), held_lock(path):
        pass


def _count(path: Path, counter: Path, rounds: int) -> None:
    for _ in range(rounds):
        with held_lock(path, wait=True):
            value = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(value + 1))


def test_waiting_processes_lose_no_round(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(tmp_path / "a.lock", counter, 100)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.read_text() == "300"


def test_waiting_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.lock"
    first = _holder(path)
    timer = threading.Timer(0.3, first.kill)
    timer.start()
    with held_lock(path, wait=True, waiting="Waiting for the other one."):
        pass
    first.communicate(timeout=10)
    assert caplog.messages == ["Waiting for the other one."]


@pytest.mark.parametrize("what", ["link", "dangling", "file", "folder", "fifo"])
def test_whatever_is_no_lock_is_left_alone(tmp_path: Path, what: str) -> None:
    path, target = tmp_path / "a.lock", tmp_path / "target"
    if what == "link":
        target.write_text("precious")
        path.symlink_to(target)
    elif what == "dangling":
        path.symlink_to(target)
    elif what == "file":
        path.write_text("precious")
    elif what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(FileExistsError, match="no lock of this package"), held_lock(path, wait=True):
        pass
    assert target.exists() == (what == "link")
    assert what != "link" or target.read_text() == "precious"
    assert what != "file" or path.read_text() == "precious"
    assert os.path.lexists(path)


def test_the_lock_of_a_dead_holder_is_taken_over(tmp_path: Path) -> None:
    first = _holder(tmp_path / "a.lock")
    first.kill()
    first.communicate(timeout=10)
    assert (tmp_path / "a.lock").is_file()
    with held_lock(tmp_path / "a.lock"):
        pass


def test_an_empty_file_of_a_holder_that_died_at_once_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "a.lock").touch()
    with held_lock(tmp_path / "a.lock"):
        pass


def test_a_full_disk_costs_the_name_of_the_holder_and_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.lock"
    monkeypatch.setattr(os, "pwrite", refuse)
    with held_lock(path), pytest.raises(LockedError, match="Another process holds the lock"), held_lock(path):
        pass


def test_the_error_survives_the_way_between_processes(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(LockedError(tmp_path / "a.lock", "Process 1")))
    assert str(error) == f"Process 1 holds the lock '{tmp_path / 'a.lock'}'."
