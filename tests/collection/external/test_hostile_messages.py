"""What a client may send that is no episode: it is refused with the reason, and the server serves the others."""

from __future__ import annotations

import contextlib
import pickle
import random
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from client_server import ACTIONS, OBSERVATIONS, greeted, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_calql import PolicyClient
from rllib_calql.collection.external.episodes import EpisodeSpaces, Joining, RejectedError
from rllib_calql.collection.external.server import ClientServer
from rllib_calql.policy import wire


def array(*rows: Any, dtype: str = "<f8") -> dict[str, Any]:
    return wire.packed_array(np.array(rows, dtype))


def piece(**changes: Any) -> dict[str, Any]:
    """The message of a good episode of two steps, with some entries changed; None removes one."""
    good = {
        "type": "piece",
        "run": "run-a",
        "episode": "0" * 32,
        "start": 0,
        "observations": [array([0, 0], [1, 1], [2, 2])],
        "actions": array([1, 5], [-2, 10], dtype="<f4"),
        "executed": None,
        "has_executed": None,
        "rewards": array(0, 1),
        "interventions": array(False, True, dtype="|b1"),
        "infos": {"success": array(float("nan"), 1.0)},
        "is_last": True,
        "terminated": True,
        "seconds": 0.5,
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


# --- Pieces of episodes -----------------------------------------------------------------------------------------------

SPACES = EpisodeSpaces(OBSERVATIONS, ACTIONS, 4)
REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "longer than the run's": ({"start": 3}, r"more than 4 steps.*`max_episode_env_steps`"),
    "from before its beginning": ({"start": -1}, "more than 4 steps"),
    "another number of parts": ({"observations": []}, "observations of 0 parts, not 1"),
    "other observations": ({"observations": [array([0], [1], [2])]}, r"shape \(3, 1\); the run has float64"),
    "a step too few": ({"observations": [array([0, 0], [1, 1])]}, r"shape \(2, 2\)"),
    "another type": ({"observations": [array([0, 0], [1, 1], [2, 2], dtype="<f4")]}, "type float32"),
    "an observation of NaN": ({"observations": [array([0, 0], [1, np.nan], [2, 2])]}, "holds nan"),
    "other actions": ({"actions": array([1], [2])}, r"`actions` of shape \(2, 1\)"),
    "an action of NaN": ({"actions": array([1, np.nan], [0, 0])}, "`actions` that are not finite"),
    "an action outside of the bounds": ({"actions": array([1, 5], [0, 99])}, r"\[0\.0, 99\.0\] is outside the bounds"),
    "an infinite reward": ({"rewards": array(0, np.inf)}, "a reward that is not finite"),
    "a reward of NaN": ({"rewards": array(0, np.nan)}, "a reward that is not finite"),
    "a reward beyond float32": ({"rewards": array(0, -1e39)}, "a reward that is not finite as float32"),
    "an executed action of NaN": (
        {"executed": array([np.nan, 1], [0, 0]), "has_executed": array(True, False, dtype="|b1")},
        "`executed` that are not finite",
    ),
    "an executed action outside of the bounds": (
        {"executed": array([1, 1], [0, -1]), "has_executed": array(False, True, dtype="|b1")},
        r"\[0\.0, -1\.0\] is outside the bounds",
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no id": ({"episode": None}, "`episode` of a message of the type 'piece' must be str, got nothing"),
    "an id that is a path": ({"episode": "../../../etc/passwd"}, "32 hexadecimal digits"),
    "a start that is no number": ({"start": "0"}, "`start` of a message of the type 'piece' must be int, got a str"),
    "a start that is a truth value": ({"start": True}, "must be int, got a bool"),
    "no rewards": ({"rewards": None}, "`rewards` must be an array"),
    "rewards of no step": ({"rewards": array()}, "at least one step"),
    "rewards of two axes": ({"rewards": array([0], [1])}, "at least one step"),
    "rewards of another type": ({"rewards": array(0, 1, dtype="<i8")}, "`rewards` must be of the type <f8"),
    "observations that are no list": ({"observations": {}}, "must be list"),
    "observations of objects": (
        {"observations": [{"dtype": "|O", "shape": [3, 2], "data": bytes(48)}]},
        r"type '\|O'; allowed are",
    ),
    "observations that are a pickle": ({"observations": [pickle.dumps(np.zeros((3, 2)))]}, "must be an array"),
    "actions of integers": ({"actions": array([1, 5], [0, 0], dtype="<i4")}, "`actions` must be of the type <f4 or"),
    "flags of numbers": ({"interventions": array(0, 1)}, r"`interventions` must be of the type \|b1"),
    "too few flags": ({"interventions": array(True, dtype="|b1")}, "one truth value for each of 2 steps"),
    "executed actions without flags": ({"executed": array([0, 1], [0, 1])}, "`has_executed` must be an array"),
    "infos that are none": ({"infos": [1]}, "`infos` of a message of the type 'piece' must be dict"),
    "infos of texts": ({"infos": {"a": "b"}}, "`infos` must be an array"),
    "too few infos": ({"infos": {"a": array(1)}}, "one number for each of 2 steps"),
    "too many infos": ({"infos": {str(n): array(0, 0) for n in range(40)}}, "at most 32 names, got 40"),
    "an info without a name": ({"infos": {"": array(0, 0)}}, "`infos` must have names of at most 64 characters"),
    "infos in thousands of infos": ({"infos": {"a/" * 1000: array(0, 0)}}, "`infos` must have names of at most 64"),
    "an executed action as an info": (
        {"infos": {"executed_action": array(0, 0)}},
        "which stand for nothing else, got 'executed_action'",
    ),
    "an intervention in an info": ({"infos": {"is_intervention/a": array(0, 0)}}, "stand for nothing else"),
    "an end that is no truth value": (
        {"is_last": 1},
        "`is_last` of a message of the type 'piece' must be bool, got a int",
    ),
}


def test_the_good_piece_is_taken() -> None:
    episode = Joining(SPACES).add(SPACES.piece(piece()))
    assert episode is not None
    assert (len(episode), episode.is_terminated) == (2, True)


@pytest.mark.parametrize("name", REJECTED)
def test_an_episode_that_cannot_be_stored_is_rejected_with_the_reason(name: str) -> None:
    changes, message = REJECTED[name]
    with pytest.raises(RejectedError, match=message):
        SPACES.piece(piece(**changes))


@pytest.mark.parametrize("name", REFUSED)
def test_a_piece_that_no_client_of_ours_sends_is_refused(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(wire.MessageError, match=message):
        SPACES.piece(piece(**changes))


def test_pieces_that_do_not_follow_each_other_cost_their_episode() -> None:
    joining = Joining(SPACES)
    assert joining.add(SPACES.piece(piece(is_last=False))) is None
    with pytest.raises(RejectedError, match="its steps before 1 are missing"):
        joining.add(SPACES.piece(piece(start=1)))
    assert joining.num_bytes == 0
    assert joining.add(SPACES.piece(piece())) is not None


def test_a_client_cannot_begin_any_number_of_episodes() -> None:
    joining = Joining(SPACES)
    for number in range(8):
        joining.add(SPACES.piece(piece(episode=f"{number:032x}", is_last=False)))
    with pytest.raises(wire.MessageError, match="More than 8 episodes of one client"):
        joining.add(SPACES.piece(piece(episode="f" * 32, is_last=False)))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=64),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from([*sorted(piece()), "executed", "has_executed"])
ARRAYS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["<f4", "<f8", "|b1", "<i8", "|O", "<U1", "|V8"]),
        "shape": st.lists(st.integers(-1, 4), max_size=4),
        "data": st.binary(max_size=48),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, VALUES | ARRAYS | st.lists(ARRAYS, max_size=2), min_size=1, max_size=3))
def test_a_piece_with_any_entries_is_taken_or_refused(changes: dict[str, Any]) -> None:
    joining = Joining(SPACES)
    with contextlib.suppress(wire.MessageError, RejectedError):
        joining.add(SPACES.piece({**piece(), **changes}))


# --- Connections ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ClientServer, str]]:
    monkeypatch.setattr("rllib_calql.collection.external.server._SECONDS_TO_GREET", 1.0)
    server, address = serve(token="the token of sixteen letters")
    yield server, address
    server.close()


class _Trap:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> Any:
        return (_TRAPPED.append, ("unpickled",))


_TRAPPED: list[str] = []
CRAFTED = {
    "a pickle": pickle.dumps(_Trap()),
    "a framed pickle": struct.pack(">Q", len(pickle.dumps(_Trap()))) + pickle.dumps(_Trap()),
    "ten gigabytes": struct.pack(">Q", 10**10) + bytes(1000),
    "more than a greeting": struct.pack(">Q", wire.MAX_HELLO_BYTES + 1) + bytes(1000),
    "RLlib's own header": b"00000020" + msgpack.packb({"type": "PING"}),
    "a browser": b"GET / HTTP/1.1\r\nHost: robot\r\n\r\n",
    "another message": wire.packed_message({"type": "piece"}),
    "nothing": b"",
}


def good_client_is_served(server: ClientServer, address: str) -> None:
    with PolicyClient(address, token="the token of sixteen letters") as client:
        end = time.monotonic() + 10.0
        while client.policy is None:
            assert time.monotonic() < end
            time.sleep(0.005)
        client.reset(np.zeros(2))
        client.step([0.0, 5.0], 1.0, True, False, np.ones(2))
        assert len(server.mailbox.collect(1, timeout_s=10.0, idle_timeout_s=10.0)) == 1
        server.mailbox.confirm(server.mailbox.num_handovers)
        assert client.flush(10.0)


def test_crafted_greetings_run_no_code_and_hurt_no_other_client(served: tuple[ClientServer, str]) -> None:
    server, address = served
    for content in CRAFTED.values():
        with socket.create_connection(wire.parsed_address(address), 5.0) as connection:
            connection.settimeout(5.0)
            with contextlib.suppress(OSError):
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while connection.recv(4096):
                    pass
    assert _TRAPPED == []
    assert server.mailbox.num_clients == 0
    good_client_is_served(server, address)


def test_a_greeting_that_comes_byte_by_byte_ends_in_time(served: tuple[ClientServer, str]) -> None:
    _, address = served  # It takes a greeting within a second.
    with socket.create_connection(wire.parsed_address(address), 5.0) as connection:
        connection.settimeout(0.05)
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):  # The other side is gone.
            connection.sendall(struct.pack(">Q", wire.MAX_HELLO_BYTES))
            while time.monotonic() - begin < 8.0:
                connection.sendall(b"\0")  # Each byte alone comes in time.
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(4096):
                        break
        assert time.monotonic() - begin < 5.0


def test_strangers_who_say_nothing_keep_no_client_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rllib_calql.collection.external.server.MAX_CLIENTS", 3)
    server, address = serve(token="the token of sixteen letters")  # It waits ten seconds for a greeting.
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        for _ in range(5):
            stack.enter_context(socket.create_connection(wire.parsed_address(address), 5.0))
        begin = time.monotonic()
        good_client_is_served(server, address)
        assert time.monotonic() - begin < 8.0


def test_a_piece_of_no_episode_is_refused_before_anything_is_kept_of_it(served: tuple[ClientServer, str]) -> None:
    _, address = served
    connection, channel = greeted(address, "the token of sixteen letters")
    with connection:
        channel.send(piece(episode="x" * 50_000, run="run-b"))
        assert "32 hexadecimal digits" in next(answers(channel, "refused"))["reason"]


def test_bytes_at_random_after_the_greeting_hurt_no_other_client(served: tuple[ClientServer, str]) -> None:
    server, address = served
    rng = random.Random(0)
    for number in range(25):
        connection, _ = greeted(address, "the token of sixteen letters")
        with connection, contextlib.suppress(OSError):
            body = rng.randbytes(rng.randrange(1, 300))
            connection.sendall((struct.pack(">Q", len(body)) if number % 2 else b"") + body)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    good_client_is_served(server, address)


def answers(channel: wire.Channel, *kinds: str) -> Iterator[dict[str, Any]]:
    """The messages that come, of these types."""
    while True:
        message = channel.receive()
        if message["type"] in kinds:
            yield message


def test_a_client_is_told_what_is_not_taken_and_why(served: tuple[ClientServer, str]) -> None:
    server, address = served
    connection, channel = greeted(address, "the token of sixteen letters")
    with connection:
        channel.send(piece(episode="1" * 32, rewards=array(0, np.inf)))
        channel.send(piece(episode="2" * 32, run="run-b"))
        channel.send(piece(episode="3" * 32))
        rejected: dict[str, str] = {}
        received: list[str] = []
        for message in answers(channel, "state"):
            rejected |= message["rejected"]
            received += message["received"]
            if received:
                break
        assert rejected["1" * 32] == "it has a reward that is not finite as float32"
        assert rejected["2" * 32] == "it is of the training run run-b, this is run-a"
        assert received == ["3" * 32]
        connection.sendall(struct.pack(">Q", 10**10))
        (refused,) = [next(answers(channel, "refused"))]
        assert "10,000,000,000 bytes" in refused["reason"]
    assert len(server.mailbox.collect(1, timeout_s=1.0, idle_timeout_s=1.0)) == 1


def test_an_episode_that_is_sent_twice_is_taken_once(served: tuple[ClientServer, str]) -> None:
    server, address = served
    ids: list[str] = []
    for _ in range(2):
        for _ in range(2):
            connection, channel = greeted(address, "the token of sixteen letters")
            with connection:
                channel.send(piece())
                next(message for message in answers(channel, "state") if message["received"] or message["stored"])
        ids += [episode.id_ for episode in server.mailbox.collect(1, timeout_s=0.1, idle_timeout_s=0.1)]
        server.mailbox.confirm(server.mailbox.num_handovers)
    assert ids == ["0" * 32]


def test_a_client_too_many_is_told_to_come_back(
    served: tuple[ClientServer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address = served
    monkeypatch.setattr("rllib_calql.collection.external.server.MAX_CLIENTS", 1)
    first, channel = greeted(address, "the token of sixteen letters")
    assert channel.receive()["type"] == "welcome"
    with PolicyClient(address, token="the token of sixteen letters") as client:
        assert not client.wait(0.3)
        assert not client.is_connected
        first.close()
        end = time.monotonic() + 10.0
        while not client.is_connected:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert server.mailbox.num_clients <= 1


def test_a_server_keeps_no_more_than_it_has_room_for(
    served: tuple[ClientServer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address = served
    monkeypatch.setattr("rllib_calql.collection.external.mailbox._MAX_WAITING_BYTES", 1)
    with PolicyClient(address, token="the token of sixteen letters") as client:
        end = time.monotonic() + 10.0
        while client.policy is None:
            assert time.monotonic() < end
            time.sleep(0.005)
        for _ in range(3):
            client.reset(np.zeros(2))
            client.step([0.0, 5.0], 1.0, True, False, np.ones(2))
        lengths = [len(server.mailbox.collect(1, timeout_s=5.0, idle_timeout_s=5.0)) for _ in range(3)]
        assert lengths == [1, 1, 1]
        server.mailbox.confirm(server.mailbox.num_handovers)
        assert client.flush(10.0)
        assert client.num_stored == 3
