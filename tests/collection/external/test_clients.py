"""Clients and their server, in one process: what is stored, what is told, and what an interruption costs."""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from client_server import ACTIONS, free_port, greeted, publish, serve
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql import PolicyClient
from rllib_calql.collection.external.server import ClientServer
from rllib_calql.policy import wire
from rllib_calql.policy.loading import policy_of

TOKEN = "a token of more than sixteen letters"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def started(stack: ExitStack, **settings: Any) -> tuple[ClientServer, str]:
    server, address = serve(**settings)
    stack.callback(server.close)
    return server, address


def connected(stack: ExitStack, address: str, **settings: Any) -> PolicyClient:
    client = PolicyClient(address, **{"seed": 0, **settings})
    stack.callback(client.close, timeout_s=0.0)
    until(lambda: client.policy is not None)
    return client


def until(is_true: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)


def play(client: PolicyClient, num_steps: int, *, start: float = 0.0, ends: bool = True) -> None:
    """An episode whose observations and rewards count its steps."""
    client.reset(np.array([start, 0.0]))
    for t in range(num_steps):
        obs = np.array([start, t + 1.0])
        client.step(np.array([1.0, 5.0]), float(t), ends and t == num_steps - 1, False, obs)


def collect(server: ClientServer, num_episodes: int = 1, timeout_s: float = 10.0) -> list[SingleAgentEpisode]:
    return server.mailbox.collect(num_episodes, timeout_s=timeout_s, idle_timeout_s=timeout_s)


def confirm(server: ClientServer) -> None:
    server.mailbox.confirm(server.mailbox.num_handovers)


# --- Episodes ---------------------------------------------------------------------------------------------------------


def test_an_episode_is_stored_as_it_was(stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address)
    client.reset(np.array([0.5, -0.5]))
    client.step([2.0, 0.0], -1.0, False, False, np.array([1.5, -0.5]), info={"success": False, "pose": "left"})
    client.step([-1.0, 2.5], 0.25, False, False, np.array([2.5, -0.5]), executed_action=[-2.0, 10.0])
    client.step([0.0, 5.0], 3, True, False, np.array([3.5, -0.5]), is_intervention=True, info={"a": {"b": 1}})
    (episode,) = collect(server)
    np.testing.assert_array_equal(episode.get_observations()[:, 0], [0.5, 1.5, 2.5, 3.5])
    assert episode.get_observations().dtype == np.float64
    # Bounds [-2, 2] and [0, 10], mapped to [-1, 1].
    np.testing.assert_allclose(episode.get_actions(), [[1.0, -1.0], [-0.5, -0.5], [0.0, 0.0]], atol=1e-6)
    assert episode.get_rewards().tolist() == [-1.0, 0.25, 3.0]
    assert (episode.is_terminated, episode.is_truncated, len(episode)) == (True, False, 3)
    infos = episode.get_infos()
    assert infos[1] == {"success": 0.0}
    assert infos[2].keys() == {"executed_action"}
    assert infos[2]["executed_action"].tolist() == [-2.0, 10.0]
    assert infos[3] == {"a": {"b": 1.0}, "is_intervention": True}
    assert 0.0 < episode.get_duration_s() < 10.0


def test_infos_of_an_environment_say_what_was_executed(stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address)
    client.reset(np.zeros(2))
    info = {"executed_action": np.array([1.0, 1.0]), "is_intervention": True, "speed": np.float32(0.5)}
    client.step([0.0, 5.0], 0.0, False, True, np.zeros(2), info=info)
    (episode,) = collect(server)
    assert (episode.is_terminated, episode.is_truncated) == (False, True)
    assert episode.get_infos()[1].pop("executed_action").tolist() == [1.0, 1.0]
    assert episode.get_infos()[1] == {"is_intervention": True, "speed": 0.5}


@pytest.mark.parametrize("piece_steps", [None, 1, 3])
def test_pieces_are_joined_to_whole_episodes(piece_steps: int | None, stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address, piece_steps=piece_steps)
    for start in (1.0, 2.0):
        play(client, 7, start=start)
    episodes = collect(server, 2)
    assert [episode.get_observations()[0, 0] for episode in episodes] == [1.0, 2.0]
    for episode in episodes:
        assert episode.get_observations()[:, 1].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        assert episode.get_rewards().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_observations_with_parts_are_encoded_as_data_are(stack: ExitStack) -> None:
    space = gym.spaces.Dict(
        {
            "pos": gym.spaces.Box(-1.0, 1.0, (2, 2), np.float32),
            "gear": gym.spaces.Discrete(3, start=-1),
            "more": gym.spaces.Tuple([gym.spaces.MultiBinary(2), gym.spaces.MultiDiscrete([2, 3])]),
        }
    )
    server, address = started(stack, observations=space)
    client = connected(stack, address)
    space.seed(0)
    samples = [space.sample() for _ in range(4)]
    client.reset(samples[0])
    for number, sample in enumerate(samples[1:]):
        client.step(client.act(samples[number]), 0.0, False, number == 2, sample)
    (episode,) = collect(server)
    np.testing.assert_allclose(
        episode.get_observations(), [gym.spaces.utils.flatten(space, sample) for sample in samples], rtol=1e-6
    )


def test_an_episode_is_cut_where_the_run_cuts_them_and_goes_on_in_the_next(stack: ExitStack) -> None:
    server, address = started(stack, max_env_steps=4)
    client = connected(stack, address)
    play(client, 10)
    episodes = collect(server, 3)
    assert [episode.get_observations()[:, 1].tolist() for episode in episodes] == [
        [0.0, 1.0, 2.0, 3.0, 4.0],
        [4.0, 5.0, 6.0, 7.0, 8.0],
        [8.0, 9.0, 10.0],
    ]
    assert [episode.is_terminated for episode in episodes] == [False, False, True]


def test_reset_and_close_end_an_episode_that_is_under_way(stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address)
    play(client, 2, start=1.0, ends=False)
    play(client, 3, start=2.0, ends=False)
    client.reset(np.zeros(2))  # Without a step there is nothing to store.
    unknown: list[int] = []
    closing = threading.Thread(target=lambda: unknown.append(client.close(10.0)))
    closing.start()
    episodes = collect(server, 2)
    assert [(len(episode), episode.is_truncated) for episode in episodes] == [(2, True), (3, True)]
    assert collect(server, timeout_s=0.05) == []
    confirm(server)
    closing.join()
    assert unknown == [0]


# --- The policy -------------------------------------------------------------------------------------------------------


def test_actions_are_those_of_the_policy_that_an_episode_began_with(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rllib_calql.policy.connection._SECONDS_BETWEEN_POLICIES", 0.05)
    server, address = started(stack)
    client = connected(stack, address)
    obs = np.array([0.3, -0.7])
    first, second = (policy_of(publish(server, seed=seed), "p") for seed in (0, 1))
    publish(server, seed=0)
    client.reset(obs)
    np.testing.assert_array_equal(client.act(obs, explore=False), first(obs))
    publish(server, seed=1)
    until(lambda: client.policy_version == 101)
    np.testing.assert_array_equal(client.act(obs, explore=False), first(obs))
    client.reset(obs)
    np.testing.assert_array_equal(client.act(obs, explore=False), second(obs))
    assert not np.array_equal(first(obs), second(obs))
    assert not np.array_equal(client.act(obs), client.act(obs))


def test_a_warm_up_draws_actions_uniformly_within_the_bounds(stack: ExitStack) -> None:
    server, address = started(stack)
    publish(server, seed=0, is_random=True)
    client = connected(stack, address)
    until(lambda: client.is_warm_up)
    client.reset(np.zeros(2))
    actions = np.array([client.act(np.zeros(2)) for _ in range(4000)])
    low, high = ACTIONS.low, ACTIONS.high
    assert (actions >= low).all()
    assert (actions <= high).all()
    np.testing.assert_allclose(actions.mean(axis=0), (low + high) / 2, atol=0.03 * (high - low).max())
    np.testing.assert_allclose(actions.std(axis=0), (high - low) / np.sqrt(12), rtol=0.05)
    np.testing.assert_array_equal(
        client.act(np.zeros(2), explore=False), policy_of(publish(server, seed=0), "p")(np.zeros(2))
    )


def test_wait_returns_where_an_episode_is_wanted_with_the_latest_policy(stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address)
    assert not client.wait(0.2)  # Nobody asks for episodes.
    publish(server, seed=3)
    server.mailbox._demand = 1
    with server.mailbox.changed:
        server.mailbox._tell_demand()
    assert client.wait(10.0)
    assert client.policy_version == 103
    play(client, 2)
    assert not client.wait(0.2)  # The one that was wanted is there.


# --- Interruptions ----------------------------------------------------------------------------------------------------


def test_an_episode_whose_acknowledgement_is_lost_is_handed_over_once(stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address)
    play(client, 3)
    assert len(collect(server)) == 1
    for _ in range(2):  # Once while it is not known to be stored, once when it is.
        for connection in list(server._sockets.values()):
            connection.shutdown(socket.SHUT_RDWR)
        until(lambda: not client.is_connected)
        until(lambda: client.is_connected)
        assert collect(server, timeout_s=0.3) == []
        confirm(server)
    until(lambda: client.num_stored == 1)
    assert client.num_waiting == 0


def test_an_episode_that_nobody_has_taken_is_sent_again(stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address)
    play(client, 3)
    (first,) = collect(server)
    server.mailbox.take_back()
    (again,) = collect(server)
    assert again.id_ == first.id_
    confirm(server)
    server.mailbox.take_back()
    assert collect(server, timeout_s=0.2) == []
    assert client.flush(10.0)


def test_episodes_outlive_a_restart_of_the_run(stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address)
    play(client, 2, start=1.0)
    until(lambda: server.mailbox._waiting)  # Received, and lost with the process.
    server.close()
    until(lambda: not client.is_connected)
    play(client, 3, start=2.0)  # A control loop goes on with the policy that it has.
    assert client.num_waiting == 2
    again, _ = started(stack, port=int(address.split(":")[1]), run=None)
    until(lambda: client.is_connected)
    assert collect(again, timeout_s=0.2) == []  # Not before the run is known to be the same.
    publish(again, seed=0)
    assert [episode.get_observations()[0, 0] for episode in collect(again, 2)] == [1.0, 2.0]
    confirm(again)
    assert client.flush(10.0)
    assert client.num_stored == 2


def test_a_client_that_vanishes_costs_its_unfinished_episode_alone(stack: ExitStack) -> None:
    server, address = started(stack)
    other = connected(stack, address)
    client = connected(stack, address, piece_steps=1)
    play(client, 3, start=1.0)
    play(client, 5, start=2.0, ends=False)
    until(lambda: server.mailbox.num_clients == 2 and client._connection.outbox.sent)
    time.sleep(0.1)
    client._connection._is_closed = True  # Nothing more is sent, as if it had been killed.
    until(lambda: server.mailbox.num_clients == 1)
    play(other, 2, start=3.0)
    assert [episode.get_observations()[0, 0] for episode in collect(server, 2)] == [1.0, 3.0]


def test_nothing_is_collected_for_a_bounded_time_without_a_client(stack: ExitStack) -> None:
    server, _ = started(stack)
    begin = time.monotonic()
    assert server.mailbox.collect(1, timeout_s=20.0, idle_timeout_s=0.1) == []
    assert time.monotonic() - begin < 5.0


def test_the_oldest_episodes_are_dropped_where_too_many_wait(stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address, max_unsent_mebibytes=0.01)
    server.close()
    until(lambda: not client.is_connected)
    for start in range(20):
        play(client, 10, start=float(start))
    kept = list(client._connection.outbox.episodes)
    assert client.num_dropped == 20 - len(kept) > 0
    assert client.num_waiting == len(kept)
    again, _ = started(stack, port=int(address.split(":")[1]))
    starts = [episode.get_observations()[0, 0] for episode in collect(again, len(kept))]
    assert starts == list(range(20 - len(kept), 20))


# --- Who may be a client ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_run", "of_client", "message"),
    [
        (TOKEN, TOKEN + "x", "refuses: the token is not that of the run, which its `external_token_file` holds"),
        (TOKEN, None, "needs a token: pass `token`"),
        (None, TOKEN, "has no token, so that nobody knows whether it is the right one; set its `external_token_file`"),
    ],
)
def test_a_wrong_token_is_told_to_the_client(
    of_run: str | None, of_client: str | None, message: str, stack: ExitStack
) -> None:
    server, address = started(stack, token=of_run)
    client = PolicyClient(address, token=of_client)
    stack.callback(client.close)
    with pytest.raises(ConnectionError, match=message):
        client.wait(10.0)
    with pytest.raises(ConnectionError, match=message):
        client.reset(np.zeros(2))
    assert server.mailbox.num_clients == 0


def test_the_right_token_lets_a_client_in(stack: ExitStack) -> None:
    server, address = started(stack, token=TOKEN)
    play(connected(stack, address, token=f"{TOKEN}\n"), 2)
    assert len(collect(server)) == 1


def serve_by_hand(stack: ExitStack, *messages: dict[str, Any]) -> str:
    """A server that sends these messages, one for everything that it gets, and takes whatever comes. Its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    stack.enter_context(listener)

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            channel = wire.Channel(connection)
            for number, message in enumerate(messages):
                if number:
                    channel.receive()
                channel.send(message)
            time.sleep(0.2)

    threading.Thread(target=run, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


HELLO = {"type": "hello", "protocol": 1, "package": "9.0", "needs_token": True, "nonce": bytes(32)}


def test_a_server_that_does_not_know_the_token_gets_nothing(stack: ExitStack) -> None:
    welcome = {"type": "welcome", "proof": wire.proof_of("a guess", "server", [bytes(32)] * 2)}
    client = PolicyClient(serve_by_hand(stack, HELLO, welcome), token=TOKEN)
    stack.callback(client.close)
    with pytest.raises(ConnectionError, match="does not know the token; it is no run of yours"):
        client.wait(10.0)


def test_a_client_of_another_version_is_refused_on_both_sides(stack: ExitStack) -> None:
    _, address = started(stack)
    connection, channel = greeted(address, protocol=2)
    with connection:
        assert "version 2 of the protocol, the run 1; install the same" in channel.receive()["reason"]
    client = PolicyClient(serve_by_hand(stack, {**HELLO, "protocol": 7}))
    stack.callback(client.close)
    with pytest.raises(ConnectionError, match=r"speaks version 7 .*rllib-calql 9\.0.* this client 1; install the same"):
        client.wait(10.0)


def test_another_run_in_the_place_of_the_former_is_refused(stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address)
    play(client, 2)
    server.close()
    other, _ = started(stack, port=int(address.split(":")[1]), run="run-b")
    with pytest.raises(
        ConnectionError, match=r"another training run \(run-b\) has taken the place.*\(run-a\); 1 episode"
    ):
        client.wait(10.0)
    assert collect(other, timeout_s=0.1) == []


def test_other_spaces_in_the_place_of_the_former_are_refused(stack: ExitStack) -> None:
    server, address = started(stack)
    client = connected(stack, address)
    server.close()
    space = gym.spaces.Box(-1.0, 1.0, (3,), np.float64)
    started(stack, port=int(address.split(":")[1]), observations=space)
    with pytest.raises(ConnectionError, match="other spaces than before"):
        client.wait(10.0)


def test_a_client_without_a_run_waits_and_says_so(stack: ExitStack) -> None:
    client = PolicyClient(f"127.0.0.1:{free_port()}")
    stack.callback(client.close, timeout_s=0.0)
    assert not client.wait(0.3)
    assert not client.is_connected
    with pytest.raises(RuntimeError, match=r"has not sent a policy yet; call `wait\(\)`"):
        client.reset(np.zeros(2))
    with pytest.raises(RuntimeError, match="No episode has begun"):
        client.act(np.zeros(2))
    with pytest.raises(RuntimeError, match="No episode has begun"):
        client.step([0.0, 0.0], 0.0, False, False, np.zeros(2))


def test_a_client_says_once_that_nobody_answers_and_again_when_the_reason_is_another_one(
    stack: ExitStack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rllib_calql.policy.connection._FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("rllib_calql.policy.connection._LAST_DELAY_S", 0.01)
    port = free_port()
    client = PolicyClient(f"127.0.0.1:{port}")
    stack.callback(client.close, timeout_s=0.0)
    assert not client.wait(0.5)
    (told,) = [record.getMessage() for record in caplog.records]
    assert re.match(
        rf"No training run answers at 127\.0\.0\.1:{port} \(.*refused.*\); trying again until one does", told
    )
    monkeypatch.setattr("rllib_calql.collection.external.server.MAX_CLIENTS", 0)
    started(stack, port=port)
    until(lambda: len(caplog.records) > 1)
    assert "0 clients are connected" in caplog.records[1].getMessage()


# --- Mistakes in the control loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"obs": np.zeros(3)}, ValueError, r"The observation must have the shape \(2,\)"),
        ({"obs": np.array([0.0, np.nan])}, ValueError, "The observation holds nan at 1"),
        ({"action": [0.0]}, ValueError, r"`action` must have the shape \(2,\), got \(1,\)"),
        ({"action": [0.0, 11.0]}, ValueError, r"`action` is \[0\.0, 11\.0\], outside of the bounds"),
        ({"action": [np.nan, 1.0]}, ValueError, "`action` is .* must be finite"),
        ({"action": "left"}, ValueError, "`action` must be an array of"),
        ({"action": ["0.5", "1.0"]}, ValueError, "`action` must be an array of"),
        ({"action": [0.5j, 1.0]}, ValueError, "`action` must be an array of"),
        ({"action": np.ma.masked_array([0.0, 1.0], [1, 0])}, ValueError, "`action` has masked numbers"),
        ({"executed_action": [np.inf, 1.0]}, ValueError, "`executed_action` is"),
        ({"executed_action": [0.0, -1.0]}, ValueError, r"`executed_action` is \[0\.0, -1\.0\], outside of the bounds"),
        ({"reward": float("nan")}, ValueError, "`reward` must be a finite number, got nan"),
        ({"reward": 1e39}, ValueError, r"`reward` must be a finite number, got 1e\+39"),
        ({"reward": 10**400}, ValueError, "`reward` must be a finite number"),
        ({"reward": None}, ValueError, "`reward` must be a finite number, got None"),
        ({"terminated": 2}, TypeError, "`terminated` must be True or False, got 2"),
        ({"truncated": "no"}, TypeError, "`truncated` must be True or False"),
        ({"is_intervention": 0.5}, TypeError, "`is_intervention` must be True or False"),
        ({"info": [1]}, TypeError, "`info` must be None or a dict"),
        ({"info": {str(n): n for n in range(40)}}, ValueError, "`info` must hold at most 32 numbers, got 40"),
    ],
)
def test_a_wrong_step_is_refused_and_not_noted(
    changes: dict[str, Any], error: type[Exception], message: str, stack: ExitStack
) -> None:
    server, address = started(stack)
    client = connected(stack, address)
    client.reset(np.zeros(2))
    step: dict[str, Any] = {"action": [0.0, 1.0], "reward": 0.0, "terminated": False, "truncated": False}
    step["obs"] = np.ones(2)
    client.step(**step)
    with pytest.raises(error, match=message):
        client.step(**{**step, **changes})
    client.step(**{**step, "terminated": True})
    (episode,) = collect(server)
    assert len(episode) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"address": 5555}, TypeError, "`address` must be a text"),
        ({"address": "host:port"}, ValueError, '`address` must be "HOST:PORT"'),
        ({"token": b"secret"}, TypeError, "`token` must be a text or None"),
        ({"token": " "}, ValueError, "`token` is empty"),
        ({"piece_steps": 0}, ValueError, "`piece_steps` must be None or a positive integer"),
        ({"piece_steps": True}, ValueError, "`piece_steps` must be None or a positive integer"),
        ({"max_unsent_mebibytes": "256"}, ValueError, "`max_unsent_mebibytes` must be positive"),
        ({"max_unsent_mebibytes": -1}, ValueError, "`max_unsent_mebibytes` must be positive"),
    ],
)
def test_wrong_arguments_of_a_client_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PolicyClient(**{"address": "127.0.0.1:5555", **arguments})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ImportError, match=r'needs the `msgpack` package: .* or "rllib-calql\[client\]"'):
        PolicyClient("127.0.0.1:5555")


def test_a_closed_client_says_so(stack: ExitStack) -> None:
    _, address = started(stack)
    client = connected(stack, address)
    assert client.close() == 0
    with pytest.raises(RuntimeError, match="The client is closed"):
        client.wait()
    with pytest.raises(RuntimeError, match="The client is closed"):
        client.reset(np.zeros(2))
