"""The cluster example on three Ray nodes on this machine, one of which is lost and replaced during the run.

Run as a script, this file is the side of the test that owns the cluster, so that pytest's own Ray is left alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from rllib_calql.common import metrics as keys
from rllib_calql.experiments.experiment import read_experiments

EXAMPLE = Path(__file__).parents[2] / "tuned_examples" / "pointmaze_umaze_cluster.yaml"
NAME = "pointmaze-umaze-cluster"
ENV_STEPS = 2400
OFFLINE_UPDATES = 4
UPDATES_PER_ENV_STEP = 0.1
EPISODE_LIMIT = 20
TIMEOUT_S = 240
# Sizes are cut for the test. The commented line of the example keeps env runners on the nodes that may be lost.
_SHORTER = [
    (r"env: gymnasium_robotics:PointMaze_UMaze-v3", "env: test_cluster:PacedPointMaze-v0"),
    (r"num_online_env_steps_lifetime: \d+", f"num_online_env_steps_lifetime: {ENV_STEPS}"),
    (r"offline_updates: \d+", f"offline_updates: {OFFLINE_UPDATES}"),
    (r"updates_per_iteration: \d+", "updates_per_iteration: 2"),
    (r"updates_per_env_step: 1\b", f"updates_per_env_step: {UPDATES_PER_ENV_STEP}"),
    (r"evaluation_duration: \d+", "evaluation_duration: 1"),
    (r"num_env_runners: \d+", "num_env_runners: 2"),
    (r"# (custom_resources_per_env_runner:)", r"\1"),
]
# By default a lost node is noticed after half a minute.
_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}
_FLAG = "FILE_THAT_LETS_ENVIRONMENTS_RUN_FREELY"
_SECONDS_PER_STEP = 0.03  # With one env runner left, the run then lasts another minute at least without the flag.


class Paced(gym.Wrapper):  # type: ignore[type-arg]
    """Steps slowly until the flag is there, so that the run cannot end before the test has done its part."""

    def step(self, action: Any) -> Any:
        """Steps."""
        if _FLAG in os.environ and not Path(os.environ[_FLAG]).exists():
            time.sleep(_SECONDS_PER_STEP)
        return super().step(action)


gym.register(
    "PacedPointMaze-v0",
    entry_point=lambda **kwargs: Paced(gym.make("gymnasium_robotics:PointMaze_UMaze-v3", **kwargs)),
    max_episode_steps=EPISODE_LIMIT,
)


def test_the_cluster_example_is_the_main_job_on_more_machines() -> None:
    (cluster,) = read_experiments(EXAMPLE)
    (main_job,) = read_experiments(EXAMPLE.with_name("pointmaze_umaze.yaml"))
    theirs = main_job.config.to_dict()
    different = {key: value for key, value in cluster.config.to_dict().items() if theirs[key] != value}
    assert different == {
        "sample_async": True,
        "num_env_runners": 8,
        "num_envs_per_env_runner": 2,
        "num_learners": 1,
        "num_cpus_for_main_process": 1,  # The learner has a process of its own.
    }
    assert cluster.num_cpus_of_largest_trial == 10  # What the comments in the file say.
    assert cluster.max_failures == 3
    assert cluster.checkpoint_config["checkpoint_frequency"] == 1


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_the_cluster_example_goes_on_without_a_lost_node_and_uses_its_replacement(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    for pattern, shorter in _SHORTER:
        text, count = re.subn(pattern, shorter, text)
        assert count == 1, pattern
    (tmp_path / "short.yaml").write_text(text)
    told = _in_own_process(tmp_path)
    assert told["exit_code"] == 0
    # One env runner on each of the two nodes, the rest of the trial on the head.
    assert sorted(told["runners_before"]) == sorted(told["first_nodes"])
    assert sorted(told["runners_after"]) == sorted([told["first_nodes"][0], told["new_node"]])
    assert told["trial_and_learner"] == [told["head"]] * 2

    results = _results(tmp_path / "results")
    assert [result["training_iteration"] for result in results] == list(range(1, len(results) + 1))
    for result in results:
        num_env_steps, collection = result[keys.NUM_ONLINE_ENV_STEPS_LIFETIME], result[keys.COLLECTION]
        trained = num_env_steps - collection[keys.NUM_ENV_STEPS_BEHIND]
        assert result[keys.NUM_ONLINE_UPDATES_LIFETIME] == pytest.approx(UPDATES_PER_ENV_STEP * trained)
        assert result[keys.STORE][keys.NUM_ONLINE_TRANSITIONS] == num_env_steps
        assert num_env_steps <= EPISODE_LIMIT * result[keys.NUM_ONLINE_EPISODES_LIFETIME]
    last = results[-1]
    assert last[keys.NUM_OFFLINE_UPDATES_LIFETIME] == OFFLINE_UPDATES
    assert results[-2][keys.NUM_ONLINE_ENV_STEPS_LIFETIME] < ENV_STEPS <= last[keys.NUM_ONLINE_ENV_STEPS_LIFETIME]
    assert last[keys.COLLECTION][keys.NUM_ENV_RUNNER_FAILURES_LIFETIME] >= 1
    assert last[keys.COLLECTION][keys.NUM_HEALTHY_ENV_RUNNERS] == 2


def _in_own_process(folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), _FLAG: str(folder / "flag")}
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return told


def _results(storage: Path) -> list[dict[str, Any]]:
    """The results that are there whole."""
    files = list(storage.glob(f"{NAME}/*/result.json"))
    lines = files[0].read_text().split("\n")[:-1] if files else []
    return [json.loads(line) for line in lines]


# --- The side that owns the cluster ----------------------------------------------------------------------------------


def _wait_for(condition: Callable[[], Any], train: subprocess.Popen[bytes], what: str) -> Any:
    deadline = time.monotonic() + TIMEOUT_S / 3
    while not (found := condition()):
        assert train.poll() is None, f"The run ended before {what}."
        assert time.monotonic() < deadline, f"No {what} within {TIMEOUT_S / 3:g} s."
        time.sleep(0.1)
    return found


def _nodes_of(cluster: Any, *class_names: str) -> list[str]:
    """The nodes of all living actors of some classes."""
    return [
        actor["Address"]["NodeID"]
        for actor in cluster.global_state.actor_table(None).values()
        if actor["State"] == "ALIVE" and actor["ActorClassName"].rpartition(".")[2] in class_names
    ]


def _lose_and_replace_a_node(folder: Path) -> dict[str, Any]:
    """Runs the command on a cluster and, in the online phase, kills a node and later adds another."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": _HEALTH_CHECKS}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    head_id = cluster.head_node.node_id
    command = [sys.executable, "-c", "from rllib_calql.commands.main import main; main()", "train", "file"]
    command += [str(folder / "short.yaml"), "--address", "auto", "--storage-path", str(folder / "results")]
    # Other tests may have a Ray on this machine; without them "auto" finds the cluster by itself. The trial waits for
    # the nodes, which start while the command does.
    train = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": cluster.address})

    def results(num_healthy: int, *, after: int = 0) -> list[dict[str, Any]]:
        return [
            result
            for result in _results(folder / "results")
            if result[keys.NUM_ONLINE_EPISODES_LIFETIME] > after
            and result[keys.COLLECTION][keys.NUM_HEALTHY_ENV_RUNNERS] == num_healthy
        ]

    try:
        first, second = (cluster.add_node(num_cpus=1, resources={"env_runner": 1}) for _ in range(2))
        _wait_for(lambda: results(2), train, "online result")
        told = {
            "head": head_id,
            "first_nodes": [first.node_id, second.node_id],
            "runners_before": _nodes_of(cluster, "SingleAgentEnvRunner"),
            "trial_and_learner": _nodes_of(cluster, "CalQL", "_WrappedExecutable"),
        }
        cluster.remove_node(second, allow_graceful=False)
        noticed = _wait_for(lambda: results(1), train, "notice of the loss")
        num_episodes = noticed[-1][keys.NUM_ONLINE_EPISODES_LIFETIME]
        _wait_for(lambda: results(1, after=num_episodes), train, "progress without the node")
        told["new_node"] = cluster.add_node(num_cpus=1, resources={"env_runner": 1}).node_id
        _wait_for(lambda: results(2, after=num_episodes), train, "use of the new node")
        told["runners_after"] = _nodes_of(cluster, "SingleAgentEnvRunner")
        Path(os.environ[_FLAG]).touch()
        told["exit_code"] = train.wait(timeout=TIMEOUT_S / 3)
    finally:
        train.kill()
        cluster.shutdown()
    return told


if __name__ == "__main__":
    _told = _lose_and_replace_a_node(Path(sys.argv[1]))
    (Path(sys.argv[1]) / "told.json").write_text(json.dumps(_told))
