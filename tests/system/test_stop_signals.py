"""SIGTERM, SIGHUP and Ctrl-C: each ends a command in order, a second one and the end of the grace period at once."""

from __future__ import annotations

import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from click.testing import CliRunner

from rllib_calql.commands import dataset as dataset_cli
from rllib_calql.commands.main import main
from rllib_calql.experiments.run_state import numbered_checkpoints, result_of_whole
from rllib_calql.system.stop_signals import StopSignals

LOCAL = pyarrow.fs.LocalFileSystem()
TIMEOUT_S = 120
# As in a terminal, whatever the process that runs the tests ignores.
RESET = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
COMMAND = [sys.executable, "-c", f"{RESET}from rllib_calql.commands.main import main; main(prog_name='rllib')"]


@pytest.fixture(autouse=True)
def _default_handlers() -> Any:
    previous = {signum: signal.signal(signum, signal.SIG_DFL) for signum in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in previous.items():
        signal.signal(signum, handler)


def signal_self(signum: int) -> None:
    os.kill(os.getpid(), signum)
    wait_for_interrupt()


def wait_for_interrupt() -> None:
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        time.sleep(0.01)
    raise AssertionError("no interrupt")


@pytest.mark.parametrize(
    ("signum", "name", "code"),
    [
        (signal.SIGTERM, "Stopped by SIGTERM", 143),
        (signal.SIGHUP, "Stopped by SIGHUP", 129),
        (signal.SIGINT, "Interrupted", 130),
    ],
)
def test_the_first_signal_interrupts_and_handlers_come_back(signum: int, name: str, code: int) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with StopSignals() as stop:
        with pytest.raises(KeyboardInterrupt):
            signal_self(signum)
        assert (stop.signum, stop.name, stop.exit_code) == (signum, name, code)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_training_is_asked_instead_of_interrupted() -> None:
    asked: list[int] = []
    with StopSignals() as stop:
        stop.on_stop = lambda: asked.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 20.0
        while not asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert asked == [1]
        with pytest.raises(KeyboardInterrupt):  # Ctrl-C after it does not wait.
            signal_self(signal.SIGINT)
        assert stop.exit_code == 143


def test_what_the_parent_process_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As `nohup` does.
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            signal_self(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM


def test_a_forked_process_is_ended_by_sigterm_and_its_parent_goes_on() -> None:
    with StopSignals() as stop:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60.0,))
        child.start()
        child.terminate()
        child.join(20.0)
        assert child.exitcode == -signal.SIGTERM
        time.sleep(0.05)
        assert stop.signum is None


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_commands_without_ray_end_with_the_code_of_the_signal(
    monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    def report_on(*args: Any, **kwargs: Any) -> None:
        signal_self(signum)

    monkeypatch.setattr(dataset_cli, "_report_on", report_on)
    outcome = CliRunner().invoke(main, ["dataset", "inspect", "rows.parquet", "--no-plot"])
    assert outcome.exit_code == code
    assert "Traceback" not in outcome.output


STUBBORN = """
    import time
    from rllib_calql.system.stop_signals import StopSignals
    with StopSignals(grace_s=%s) as stop:
        stop.saved = "Earlier checkpoints are in 'r'."
        stop.before_end = lambda: print("ended Ray", flush=True)
        word = "entered"
        while True:
            try:
                print(word, flush=True)  # In here, for the signal may come at once.
                time.sleep(60)
            except KeyboardInterrupt:
                word = "interrupted"
"""


@pytest.mark.parametrize("is_second", [True, False])
def test_a_second_signal_and_the_end_of_the_grace_period_end_the_process_whatever_it_does(is_second: bool) -> None:
    script = RESET + textwrap.dedent(STUBBORN % (60.0 if is_second else 0.2))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "entered\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "interrupted\n"
        if is_second:
            process.send_signal(signal.SIGHUP)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 143
    reason = ", then by another signal" if is_second else ", and the grace period of 0.2 s is over"
    assert errors.strip() == f"Stopped by SIGTERM{reason}: stopped at once. Earlier checkpoints are in 'r'."
    assert output == "ended Ray\n"


def test_what_a_worker_starts_is_ended_by_sigterm_and_the_worker_is_not() -> None:
    script = """
        import os, signal, subprocess, sys
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # As the command leaves it to Ray's processes.
        sys.argv[0] = "default_worker.py"
        import rllib_calql.system.worker_signals
        import ray._private.utils
        ray._private.utils.set_sigterm_handler(lambda *_: os._exit(1))  # As the worker's main loop does.
        os.kill(os.getpid(), signal.SIGTERM)
        child = subprocess.Popen(["sleep", "60"])
        child.terminate()
        print(child.wait(timeout=20))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "-15\n", done.stderr


# --- With Ray ---------------------------------------------------------------------------------------------------------

EXPERIMENT = """
    pendulum:
      run: CalQL
      env: Pendulum-v1
      stop: {num_online_env_steps_lifetime: %d}
      config: {warmup_env_steps: 0, num_actions: 1, train_batch_size_per_learner: 8, updates_per_env_step: 0.1,
               num_env_runners: 1, model_config: {actor_hiddens: [8], critic_hiddens: [8]}}
"""


def descendants(pid: int) -> set[int]:
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in listed.splitlines())}
    found: set[int] = set()
    level = {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level} - found
        found |= level
    return found


def train_in_terminal(folder: Path, *options: str) -> tuple[int, int]:
    """Starts the command in a terminal of its own; returns its process and the terminal."""
    (folder / "e.yaml").write_text(EXPERIMENT % 10_000_000)
    arguments = ["train", "file", f"{folder}/e.yaml", "--storage-path", f"{folder}/r", "--num-cpus", "2", *options]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*COMMAND, *arguments], os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"})
    return pid, terminal


def read_until(terminal: int, text: str) -> str:
    output = ""
    deadline = time.monotonic() + TIMEOUT_S
    while text not in output:
        assert time.monotonic() < deadline, output
        output += os.read(terminal, 65536).decode(errors="replace")
    return output


def checkpoint_in(folder: Path) -> dict[str, Any]:
    """The result of the newest checkpoint, which has to be whole."""
    (trial,) = (path for path in (folder / "r" / "pendulum").iterdir() if path.is_dir())
    result = result_of_whole(LOCAL, numbered_checkpoints(LOCAL, str(trial))[-1][1])
    assert result is not None
    return result


@pytest.mark.slow
def test_a_closed_terminal_and_sigterm_to_all_processes_leave_checkpoints_that_are_resumed(tmp_path: Path) -> None:
    pid, terminal = train_in_terminal(tmp_path)
    try:
        read_until(terminal, "  online  ")
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    assert os.waitstatus_to_exitcode(status) == 129
    first = checkpoint_in(tmp_path)
    assert first["num_online_env_steps_lifetime"] > 0

    # As Slurm and systemd do.
    pid, terminal = train_in_terminal(tmp_path, "--resume")
    try:
        output = read_until(terminal, "  online  ")
        started = descendants(pid)
        assert len(started) > 4  # Ray's.
        for process in (*started, pid):
            os.kill(process, signal.SIGTERM)
        output += read_until(terminal, "to continue.")
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 143
    assert f"Checkpoints are in '{tmp_path}/r/pendulum'" in output
    assert not [sign for sign in ("Traceback", "***", "@  ", "SIGTERM received") if sign in output], output
    second = checkpoint_in(tmp_path)
    assert second["training_iteration"] > first["training_iteration"]
    assert second["num_online_env_steps_lifetime"] > first["num_online_env_steps_lifetime"]
    for result in (first, second):  # An episode has 200 steps.
        assert result["num_online_env_steps_lifetime"] == 200 * result["num_online_episodes_lifetime"]
    deadline = time.monotonic() + 20.0
    while left := [one for one in started if Path(f"/proc/{one}/cmdline").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
