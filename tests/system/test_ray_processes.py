"""The end of Ray leaves none of its processes, also of those that are started meanwhile, and ends no others."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Iterator

import psutil
import pytest
import ray
from ray.tune import PlacementGroupFactory

from rllib_calql.commands import setup as command_setup
from rllib_calql.system import ray_processes
from rllib_calql.system.stop_signals import StopSignals

TIMEOUT_S = 20.0


@pytest.fixture
def token() -> Iterator[str]:
    """Stands in the command line of every process of a test; none of them outlives it."""
    name = f"of-{uuid.uuid4().hex}"
    yield name
    for process in [inner for one in running(name) for inner in (one, *one.children(recursive=True))]:
        process.kill()


def running(token: str) -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline", "status"])
    return [one for one in processes if token in (one.info["cmdline"] or ()) and one.info["status"] != "zombie"]


def roles(token: str) -> set[str]:
    return {process.info["cmdline"][-1] for process in running(token)}


def wait_for(token: str, role: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while role not in roles(token):
        assert time.monotonic() < deadline, roles(token)
        time.sleep(0.01)


def start(token: str, role: str, script: str = "sleep 300", **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(["sh", "-c", f"{script}\nwait", token, role], text=True, **options)  # type: ignore[call-overload,no-any-return]


def worker(role: str, prefix: str = "setsid") -> str:
    """A line of a shell script: starts a process in a session of its own."""
    return f'{prefix} sh -c "sleep 300; true" "$0" {role} & '


class FakeRay:
    """A raylet that starts another worker, in vain, at the moment in which it is ended."""

    def __init__(self, token: str) -> None:
        self.token = token

    def init(self, **options: object) -> None:
        """Starts a raylet with two workers, one of which runs a simulator without an environment."""
        script = worker("worker") + worker("simulator", "env -i PATH=$PATH setsid") + "read line; " + worker("late")
        self.raylet = start(self.token, "raylet", script, stdin=subprocess.PIPE)
        for role in ("worker", "simulator"):
            wait_for(self.token, role)

    def shutdown(self) -> None:
        """Ends the raylet alone."""
        assert self.raylet.stdin is not None
        self.raylet.stdin.write("\n")
        self.raylet.stdin.flush()
        wait_for(self.token, "late")
        self.raylet.kill()
        self.raylet.wait()


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_what_ray_starts_while_it_is_ended_is_ended_too(
    monkeypatch: pytest.MonkeyPatch, token: str, is_interrupted: bool
) -> None:
    monkeypatch.setenv("RLLIB_CALQL_RAY", "of another command")  # Which has started this one.
    others = start(token, "another Ray")
    fake = FakeRay(token)
    monkeypatch.setattr(ray, "init", fake.init)
    monkeypatch.setattr(ray, "shutdown", fake.shutdown)
    command_setup.start_ray(
        [PlacementGroupFactory([{"CPU": 1}])], StopSignals(), num_cpus=1, address=None, verbose=False
    )
    assert roles(token) == {"another Ray", "raylet", "worker", "simulator"}
    if is_interrupted:

        def shutdown() -> None:
            fake.shutdown()
            raise KeyboardInterrupt

        monkeypatch.setattr(ray, "shutdown", shutdown)
        with pytest.raises(KeyboardInterrupt):
            command_setup.stop_ray()
    else:
        command_setup.stop_ray()
    assert roles(token) == {"another Ray"}
    assert others.poll() is None


def test_the_end_at_once_waits_for_no_process_and_leaves_none(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    ray_processes.mark()
    # Starts a worker every 10 ms for some seconds.
    start(token, "raylet", f"for i in $(seq 300); do {worker('worker')} sleep 0.01; done")
    wait_for(token, "worker")
    begin = time.monotonic()
    ray_processes.end_marked()
    assert time.monotonic() - begin < 2 * ray_processes._TIMEOUT_S
    assert roles(token) == set()


def test_a_joined_cluster_is_left_alone(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setattr(ray_processes, "_own_mark", None)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("RLLIB_CALQL_RAY", "of another command")
    process = start(token, "of the cluster")
    command_setup.start_ray([], StopSignals(), num_cpus=None, address="auto", verbose=False)
    command_setup.stop_ray()
    assert process.poll() is None
