"""A server for clients, on a free port of this machine, with a policy of random numbers."""

from __future__ import annotations

import hashlib
import socket
from typing import Any

import gymnasium as gym
import numpy as np

from rllib_calql.collection.external.episodes import EpisodeSpaces
from rllib_calql.collection.external.server import ClientServer
from rllib_calql.export.reading import described_actions
from rllib_calql.policy import wire
from rllib_calql.policy.file_format import packed
from rllib_calql.policy.network import array_shapes
from rllib_calql.policy.policy import ActionSpace
from rllib_calql.policy.spaces import ObservationSpace, described_space

OBSERVATIONS = gym.spaces.Box(-10.0, 10.0, (2,), np.float64)
ACTIONS = gym.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def policy_file(seed: int, observations: gym.Space[Any] = OBSERVATIONS, actions: gym.spaces.Box = ACTIONS) -> bytes:
    """The content of a policy file."""
    settings = {"normalize": False, "clip": None, "hiddens": [4], "layer_norm": False, "activation": "relu"}
    settings["image"] = None
    spaces = {"observation_space": described_space(observations), "action_space": described_actions(actions)}
    num_numbers = sum(leaf.size for leaf in ObservationSpace(spaces["observation_space"]).leaves)
    shapes = array_shapes(settings, num_numbers=num_numbers, num_actions=len(ActionSpace(spaces["action_space"]).free))
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return packed({**spaces, "network": settings}, arrays)


def serve(
    *,
    port: int | None = None,
    token: str | None = None,
    max_env_steps: int = 100,
    run: str | None = "run-a",
    observations: gym.Space[Any] = OBSERVATIONS,
) -> tuple[ClientServer, str]:
    """A server, and its address. It has published a policy unless `run` is None."""
    port = port or free_port()
    server = ClientServer(
        "127.0.0.1",
        port,
        token=token,
        spaces=EpisodeSpaces(observations, ACTIONS, max_env_steps),
        descriptions={
            "observation_space": described_space(observations),
            "action_space": described_actions(ACTIONS),
        },
        package="0.1.0",
    )
    if run is not None:
        publish(server, seed=0, run=run, observations=observations)
    return server, f"127.0.0.1:{port}"


def publish(
    server: ClientServer,
    *,
    seed: int,
    run: str = "run-a",
    is_random: bool = False,
    observations: gym.Space[Any] = OBSERVATIONS,
) -> bytes:
    """Publishes the policy of a seed, and returns its file."""
    content = policy_file(seed, observations)
    id_ = hashlib.sha256(content).hexdigest()
    server.mailbox.publish(run, content, id_, version=100 + seed, is_random=is_random)
    return content


def greeted(address: str, token: str | None = None, **changes: Any) -> tuple[socket.socket, wire.Channel]:
    """A connection that speaks the protocol by hand, after its greeting, in which entries can be changed."""
    connection = socket.create_connection(wire.parsed_address(address), 5.0)
    connection.settimeout(5.0)
    channel = wire.Channel(connection, max_bytes=wire.MAX_SERVER_BYTES)
    hello = channel.receive()
    nonces = [hello["nonce"], bytes(wire.NONCE_BYTES)]
    greeting = {"type": "hello", "protocol": wire.PROTOCOL, "nonce": nonces[1], "client": "c"}
    channel.send({**greeting, "proof": wire.proof_of(token, "client", nonces), **changes})
    return connection, channel
