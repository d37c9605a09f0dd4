"""Places that Ray can never give are refused at once, with what there is; for others, waiting is told."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from click.testing import CliRunner
from ray.tune import PlacementGroupFactory

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.commands.main import main
from rllib_calql.commands.ray_start import cause_of_failed_start
from rllib_calql.progress import waiting
from rllib_calql.progress.waiting import SayWaiting
from rllib_calql.system import ray_resources
from rllib_calql.system.ray_resources import described, refuse_unavailable, refuse_unavailable_here

NODES = [{"CPU": 4.0, "memory": 1e9}, {"CPU": 2.0, "GPU": 1.0, "robot": 1.0}]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running Ray of two nodes, and a third that is dead."""
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [dead, *({"Alive": True, "Resources": node} for node in NODES)])
    monkeypatch.setattr(ray_resources, "autoscales", lambda: False)


@pytest.mark.parametrize(
    "bundles",
    [
        [{"CPU": 1}] * 6,
        [{"CPU": 4}, {"CPU": 2, "GPU": 1}],
        [{"robot": 0.5}, {"robot": 0.5, "CPU": 0}],
        [{"memory": 1e15}],
    ],
)
def test_what_the_cluster_has_in_all_is_not_refused(cluster: None, bundles: list[dict[str, float]]) -> None:
    refuse_unavailable(bundles)


@pytest.mark.parametrize(
    ("bundles", "message"),
    [
        ([{"CPU": 1}] * 7, r"A trial asks for 7 CPUs, but the cluster has 6 CPUs, 1 GPU and 1 robot on 2 nodes: lower"),
        (
            [{"CPU": 1, "GPU": 2}],
            r"asks for 1 CPU and 2 GPUs, .*set `num_gpus_per_learner` and `num_gpus_per_env_runner`",
        ),
        ([{"CPU": 5}], r"5 CPUs on one node, but no node has that"),
        ([{"CPU": 3, "GPU": 1}], r"on one node, but no node has that"),
        (
            [{"arm": 1}],
            r"asks for 1 arm, .*`ray start --resources='\{\"arm\": 1\}'`.*`custom_resources_per_env_runner`",
        ),
    ],
)
def test_what_can_never_be_given_is_refused(cluster: None, bundles: list[dict[str, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_unavailable(bundles)


def test_a_cluster_that_grows_may_get_what_it_has_not_yet(monkeypatch: pytest.MonkeyPatch, cluster: None) -> None:
    monkeypatch.setattr(ray_resources, "autoscales", lambda: True)
    monkeypatch.setattr(ray_resources, "_cluster_config", lambda: None)
    refuse_unavailable([{"GPU": 9}])
    group = SimpleNamespace(resources={"CPU": 8, "GPU": 2}, max_count=2)
    monkeypatch.setattr(ray_resources, "_cluster_config", lambda: SimpleNamespace(node_group_configs=[group]))
    refuse_unavailable([{"CPU": 8, "GPU": 2}] * 2)
    with pytest.raises(ValueError, match=r"6 GPUs, but the cluster has 22 CPUs, 5 GPUs and 1 robot on 4 nodes"):
        refuse_unavailable([{"GPU": 2}] * 3)


def test_this_machine_has_its_cpus_its_gpus_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_resources, "num_gpus_here", lambda: 1)
    refuse_unavailable_here([{"CPU": 3, "GPU": 1}], num_cpus=3)
    for bundle in ({"CPU": 4}, {"GPU": 2}, {"robot": 1}):
        with pytest.raises(ValueError, match=r"Ray on this machine has 3 CPUs and 1 GPU"):
            refuse_unavailable_here([bundle], num_cpus=3)
    assert described({"GPU": 0.0, "CPU": 0.5}) == "0.5 CPUs and no GPU"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("num_gpus_per_learner: 1", r"asks for 1 CPU and 1 GPU, but Ray on this machine has \d+ CPUs? and no GPU"),
        (
            "num_learners: 1, num_gpus_per_learner: 1",
            r"1 GPU, but Ray on this machine has .*no GPU: set `num_gpus_per_",
        ),
        ("num_env_runners: 1, custom_resources_per_env_runner: {robot: 1}", r"1 robot, .*`ray start --resources"),
        ("num_env_runners: {grid_search: [0, 1]}, num_gpus_per_env_runner: 0.5", r"0\.5 GPUs, .*no GPU"),
    ],
)
def test_the_command_refuses_before_ray_is_started(
    settings: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_resources, "num_gpus_here", lambda: 0)
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was started"))
    (tmp_path / "e.yaml").write_text(f"a: {{run: CalQL, env: Pendulum-v1, stop: {{}}, config: {{{settings}}}}}")
    outcome = CliRunner().invoke(main, ["train", "file", f"{tmp_path}/e.yaml", "--storage-path", f"{tmp_path}/r"])
    assert outcome.exit_code == 2, outcome.output
    assert re.search(message, " ".join(outcome.output.split()))


def test_a_program_refuses_what_its_workers_would_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_resources, "num_gpus_here", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = CalQLConfig().environment("Pendulum-v1").training(num_actions=1)
    with pytest.raises(ValueError, match=r"The algorithm asks for 1 GPU, but Ray on this machine has .*no GPU"):
        config.copy().learners(num_gpus_per_learner=1).build()
    with pytest.raises(ValueError, match=r"The algorithm asks for 2 CPUs and 2 robot, but"):
        config.copy().env_runners(num_env_runners=2, custom_resources_per_env_runner={"robot": 1}).build()
    with pytest.raises(ValueError, match=r"The algorithm asks for 5000 CPUs, but"):
        config.copy().env_runners(num_env_runners=5_000).build()


def test_ray_tune_refuses_a_trial_that_could_never_begin(monkeypatch: pytest.MonkeyPatch, cluster: None) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match=r"A trial asks for 8 CPUs, but the cluster has 6 CPUs"):
        CalQL.default_resource_request({"env": "Pendulum-v1", "num_env_runners": 7})


def test_waiting_for_a_place_is_told_every_few_seconds_until_a_trial_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_cluster", lambda: "the cluster")
    now, lines = [0.0], list[str]()
    callback = SayWaiting(lines.append, clock=lambda: now[0], is_waiting=lambda: True)
    trial: Any = SimpleNamespace(
        status="PENDING", placement_group_factory=PlacementGroupFactory([{"CPU": 1}, {"CPU": 1, "GPU": 1}])
    )
    for second in range(71):
        now[0] = float(second)
        if second == 40:
            trial.status = "RUNNING"
        if second == 50:
            trial.status = "PENDING"
        callback.on_step_begin(0, [trial])
    assert lines[0] == "0:05 waiting for 2 CPUs and 1 GPU in the cluster"
    assert [line.split()[0] for line in lines] == [
        *("0:05", "0:10", "0:15", "0:20", "0:25", "0:30", "0:35"),
        *("0:05", "0:10", "0:15", "0:20"),
    ]


def test_a_job_that_holds_a_place_waits_for_its_own_trials_not_for_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups: dict[str, dict[str, str]] = {}
    job = SimpleNamespace(get_job_id=lambda: "02000000")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: job)
    monkeypatch.setattr(ray.util, "placement_group_table", lambda: groups)
    assert not ray_resources.is_waiting_for_places()
    groups["a" * 28 + "01000000"] = {"state": "CREATED"}  # Of another job.
    groups["b" * 28 + "02000000"] = {"state": "PENDING"}
    assert ray_resources.is_waiting_for_places()
    groups["c" * 28 + "02000000"] = {"state": "CREATED"}  # Its trial is being started.
    assert not ray_resources.is_waiting_for_places()
    groups["c" * 28 + "02000000"] = {"state": "REMOVED"}
    assert ray_resources.is_waiting_for_places()


def test_what_placement_groups_hold_is_not_told_once_more() -> None:
    group = "020c36c14cdeb2145ce5de9935fd01000000"
    names = ("CPU_group_", "CPU_group_0_", "bundle_group_", "bundle_group_0_", "robot_group_")
    assert described({"CPU": 2.0, "pick_group_": 1.0, **{f"{name}{group}": 1000.0 for name in names}}) == (
        "2 CPUs and 1 pick_group_"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError("AF_UNIX path length cannot exceed 107 bytes: /very/long"),
            r"too long for sockets .*set RAY_TMPDIR to a",
        ),
        (PermissionError(13, "Permission denied", "/srv/ray"), r"may not write to its folder .*RAY_TMPDIR"),
        (OSError(28, "No space left on device"), r"the disk of its folder .* is full"),
        (ValueError("Attempting to cap object store memory usage at 5 bytes, but at least 75MB"), r"too little memory"),
        (OSError(98, "Address already in use"), r"a port that it wants is taken.*ss -ltnp"),
        (RuntimeError("The current node timed out during startup."), r"did not come up in time.*-v to see Ray's logs"),
        (RuntimeError("odd"), r"^RuntimeError: odd\. Give -v"),
    ],
)
def test_a_failed_start_of_ray_is_one_sentence_with_the_way_out(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.search(message, cause_of_failed_start(error))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    (tmp_path / "e.yaml").write_text("a: {run: CalQL, env: Pendulum-v1, stop: {}}")
    outcome = CliRunner().invoke(main, ["train", "file", f"{tmp_path}/e.yaml", "--storage-path", f"{tmp_path}/r"])
    assert outcome.exit_code == 1, outcome.output
    assert "Ray could not be started: " in outcome.output
    assert "Traceback" not in outcome.output
