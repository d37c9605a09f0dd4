"""The example of `tuned_examples/external_clients`: the main job's settings, and a client without Ray and torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from client_server import free_port, policy_file
from no_ray import BLOCKED

from rllib_calql.collection.external.episodes import EpisodeSpaces
from rllib_calql.collection.external.server import ClientServer
from rllib_calql.environments.resolving import resolve_env
from rllib_calql.experiments.experiment import read_experiments
from rllib_calql.export.reading import described_actions
from rllib_calql.policy.spaces import described_space

EXAMPLES = Path(__file__).parents[3] / "tuned_examples"
CLIENT = EXAMPLES / "external_clients" / "maze_client.py"


def test_the_example_is_the_main_job_with_clients() -> None:
    (main,) = read_experiments(EXAMPLES / "pointmaze_umaze.yaml")
    (example,) = read_experiments(EXAMPLES / "external_clients" / "maze.yaml")
    assert example.stop == main.stop
    one, other = main.config.to_dict(), example.config.to_dict()
    assert {name for name in one if one[name] != other[name]} == {"external_port"}
    assert example.config.external_port == 5555


def test_the_client_of_the_example_drives_in_the_environment_of_the_run() -> None:
    (example,) = read_experiments(EXAMPLES / "external_clients" / "maze.yaml")
    env = resolve_env(example.config.env).make(example.config.env_config)
    observations, actions = env.observation_space, env.action_space
    assert isinstance(actions, gym.spaces.Box)
    env.close()
    port = free_port()
    server = ClientServer(
        "127.0.0.1",
        port,
        token=None,
        spaces=EpisodeSpaces(observations, actions, 1_000),
        descriptions={
            "observation_space": described_space(observations),
            "action_space": described_actions(actions),
        },
        package="0.1.0",
    )
    server.mailbox.publish("run", policy_file(0, observations, actions), "id", version=7)
    client = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, str(CLIENT), "--address", f"127.0.0.1:{port}", "--episodes", "1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        (episode,) = server.mailbox.collect(1, timeout_s=60.0, idle_timeout_s=60.0)
        server.mailbox.confirm(server.mailbox.num_handovers)
        output, _ = client.communicate(timeout=30.0)
    finally:
        client.kill()
        server.close()
    assert client.returncode == 0
    is_success = episode.get_infos()[-1]["success"] == 1.0
    assert output == f"episode 0, policy of 7 updates: {'goal' if is_success else 'no goal'}\n"
    assert is_success == episode.is_terminated == (episode.get_rewards()[-1] == 1.0)
    assert len(episode) == 300 or is_success
    assert np.abs(episode.get_actions()).max() <= 1.0
    assert episode.get_observations().shape[1:] == (8,)


@pytest.mark.parametrize("name", ["maze_client.py", "maze.yaml"])
def test_the_document_names_the_example(name: str) -> None:
    text = (EXAMPLES.parent / "rllib_calql" / "collection" / "external" / "EXTERNAL.md").read_text()
    assert f"tuned_examples/external_clients/{name}" in text
