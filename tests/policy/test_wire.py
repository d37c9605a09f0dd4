"""Messages between a run and its clients: what comes back is what went in, and what is no message takes no memory."""

from __future__ import annotations

import pickle
import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_calql.policy import wire


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    one.settimeout(5.0)
    other.settimeout(5.0)
    with one, other:
        yield one, other


def received(ends: tuple[socket.socket, socket.socket], content: bytes, max_bytes: int = 2**20) -> dict[str, Any]:
    """What a channel makes of bytes after which the other side closes."""

    def send() -> None:
        try:
            ends[0].sendall(content)
            ends[0].shutdown(socket.SHUT_WR)
        except OSError:
            pass  # The receiver has refused it.

    threading.Thread(target=send, daemon=True).start()
    return wire.Channel(ends[1], max_bytes=max_bytes).receive()


def test_a_message_comes_as_it_went(ends: tuple[socket.socket, socket.socket]) -> None:
    message = {
        "type": "piece",
        "numbers": [1, -(2**40), 0.5, float("inf")],
        "nested": {"a": [None, True, "Umlaut ü"], "b": {"c": b"\x00\xff"}},
    }
    wire.Channel(ends[0]).send(message)
    assert wire.Channel(ends[1]).receive() == message


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">f4", ">i8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (4, 1, 2)])
def test_arrays_of_numbers_come_as_they_went(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.random.default_rng(0).standard_normal(shape) * 100).astype(dtype)
    body = msgpack.packb({"type": "a", "array": wire.packed_array(array)})
    back = wire.unpacked_array(wire.unpacked_message(body)["array"], "`array`")
    assert back.dtype == np.dtype(dtype).newbyteorder("=")
    assert back.shape == shape
    np.testing.assert_array_equal(back, array)


def test_strided_arrays_are_sent_in_order() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-3].T
    np.testing.assert_array_equal(wire.unpacked_array(wire.packed_array(array), "a"), array)


@pytest.mark.parametrize("array", [np.array([object()]), np.array(["a"]), np.array([1j]), np.zeros(1, "M8[s]")])
def test_arrays_of_anything_else_are_not_sent(array: np.ndarray) -> None:
    with pytest.raises(TypeError, match="numbers of up to 8 bytes"):
        wire.packed_array(array)


GOOD = {"dtype": "<f4", "shape": [2], "data": bytes(8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "|O"}, r"type '\|O'; allowed are"),
        ({"dtype": "O"}, "allowed are"),
        ({"dtype": "<U4"}, "allowed are"),
        ({"dtype": "<M8[s]"}, "allowed are"),
        ({"dtype": "f4,O"}, "allowed are"),
        ({"dtype": [["a", "O"]]}, "allowed are"),
        ({"dtype": ">f4"}, "allowed are"),
        ({"shape": [3]}, "does not hold as many bytes"),
        ({"shape": [2**62, 2**62]}, "does not hold as many bytes"),
        ({"shape": [-1, -2]}, "which is none"),
        ({"shape": [True, 2]}, "which is none"),
        ({"shape": [1] * 9}, "which is none"),
        ({"shape": 2}, "which is none"),
        ({"data": "12345678"}, "does not hold as many bytes"),
        ({"data": bytes(7)}, "does not hold as many bytes"),
        ({"order": "F"}, "must be an array"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(changes: dict[str, Any], message: str) -> None:
    wire.unpacked_array(GOOD, "`a`")
    with pytest.raises(wire.MessageError, match=message):
        wire.unpacked_array({**GOOD, **changes}, "`a`")


def test_bools_of_any_byte_are_true_or_false() -> None:
    array = wire.unpacked_array({"dtype": "|b1", "shape": [4], "data": bytes([0, 1, 2, 255])}, "a")
    assert array.view(np.uint8).tolist() == [0, 1, 1, 1]


def test_ten_gigabytes_are_refused_before_memory_is_taken(ends: tuple[socket.socket, socket.socket]) -> None:
    tracemalloc.start()
    with pytest.raises(wire.MessageError, match=r"10,000,000,000 bytes was announced; at most 67,108,864"):
        received(ends, struct.pack(">Q", 10**10) + b"x" * 1000, max_bytes=wire.MAX_CLIENT_BYTES)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_memory_grows_with_what_has_come_and_not_with_what_was_announced(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    tracemalloc.start()
    with pytest.raises(ConnectionError, match="has closed"):
        received(ends, struct.pack(">Q", 60 * 2**20) + b"x" * 1000, max_bytes=wire.MAX_CLIENT_BYTES)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"\0\0\0", struct.pack(">Q", 100), struct.pack(">Q", 100) + b"\x81"])
def test_a_message_that_is_cut_off_ends_the_connection(
    content: bytes, ends: tuple[socket.socket, socket.socket]
) -> None:
    with pytest.raises(ConnectionError, match="has closed"):
        received(ends, content)


class _Trap:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> Any:
        return (_TRAPPED.append, ("unpickled",))


_TRAPPED: list[str] = []

DEEP = b"\x81\xa4type\x91" + b"\x91" * 500 + b"\x01"
BODIES = {
    "a pickle": pickle.dumps(_Trap()),
    "a pickle in an extension": msgpack.packb({"type": "a", "x": msgpack.ExtType(5, pickle.dumps(_Trap()))}),
    "a time": msgpack.packb({"type": "a", "x": msgpack.Timestamp(1, 1)}),
    "deep": DEEP,
    "very deep": b"\x91" * 100_000,
    "a list that announces four billion entries": b"\x81\xa4type\xdd\xff\xff\xff\xff",
    "a dict that announces four billion entries": b"\xdf\xff\xff\xff\xff",
    "a text that announces four gigabytes": b"\x81\xa4type\xdb\xff\xff\xff\xff",
    "many empty lists": msgpack.packb({"type": "a", "x": [[[]] * 4000] * 20}),
    "keys that are no texts": msgpack.packb({1: 2, "type": "a"}),
    "no dict": msgpack.packb(["type"]),
    "no type": msgpack.packb({"kind": "a"}),
    "a type that is no text": msgpack.packb({"type": 3}),
    "no UTF-8": b"\x81\xa4type\xa2\xff\xfe",
    "more than one": msgpack.packb({"type": "a"}) * 2,
    "nothing": b"",
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_message_is_refused_and_runs_no_code(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(wire.MessageError, match=r"no message|nested|keys|holds a"):
        wire.unpacked_message(BODIES[name])
    assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    tracemalloc.stop()
    assert _TRAPPED == []


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(body: bytes) -> None:
    for content in (body, b"\x81\xa4type" + body, b"\x82\xa4type\xa1a\xa1x" + body):
        try:
            message = wire.unpacked_message(content)
        except wire.MessageError:
            continue
        assert isinstance(message["type"], str)


def test_a_proof_holds_for_its_token_role_and_connection_alone() -> None:
    nonces = [b"s" * 32, b"c" * 32]
    proof = wire.proof_of("secret", "client", nonces)
    assert wire.is_proof(proof, wire.proof_of("secret", "client", nonces))
    others = [("Secret", "client", nonces), ("secret", "server", nonces), ("secret", "client", nonces[::-1])]
    for other in [*others, (None, "client", nonces)]:
        assert not wire.is_proof(proof, wire.proof_of(*other))  # type: ignore[arg-type]
    assert b"secret" not in proof


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("127.0.0.1:6000", ("127.0.0.1", 6000)),
        ("robot", ("robot", 5555)),
        ("[::1]:7", ("::1", 7)),
        ("::1", ("::1", 5555)),
        ("[::1]", ("::1", 5555)),
    ],
)
def test_addresses_are_read(address: str, place: tuple[str, int]) -> None:
    assert wire.parsed_address(address) == place


@pytest.mark.parametrize("address", ["", ":5555", "host:0", "host:70000", "host:x", "host:-1", "host:٣"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r'`address` must be "HOST:PORT"'):
        wire.parsed_address(address)
