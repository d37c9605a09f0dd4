"""Messages between a training run and its clients: their length in 8 bytes, then MessagePack.

They hold numbers, texts, bytes, lists and dicts, and arrays as type, shape and bytes. Nothing in them is ever executed
or unpickled. What is too long, too deep, cut off or of another kind raises `MessageError` before memory is taken for
it.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rllib_calql.policy.spaces import Array

PROTOCOL = 1
DEFAULT_PORT = 5555
MAX_HELLO_BYTES = 8 * 2**10  # Before the other side has shown that it knows the token.
MAX_WELCOME_BYTES = 2**20  # It tells spaces.
MAX_CLIENT_BYTES = 64 * 2**20
MAX_SERVER_BYTES = 512 * 2**20  # Policies that see images.
NONCE_BYTES = 32

_LENGTH = struct.Struct(">Q")
_CHUNK_BYTES = 2**20  # Memory grows with what has come, not with what was announced.
_MAX_DEPTH = 8
_MAX_ITEMS = 4096  # Of a list or dict, whose places MessagePack makes before it has seen them.
_MAX_CONTAINERS = 20_000  # A byte may stand for an empty list, which takes 56 bytes of memory.
_MAX_TEXT_BYTES = 64 * 2**10
_MAX_AXES = 8
_DTYPES = frozenset({"|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"})


class MessageError(ValueError):
    """A message that does not follow the protocol."""


class Channel:
    """Messages over a connected socket. One thread may receive while others send.

    Args:
        connection: The socket, with a timeout.
        max_bytes: Of a message that is received.
    """

    def __init__(self, connection: socket.socket, *, max_bytes: int = MAX_HELLO_BYTES) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self.max_bytes = max_bytes

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message.

        Raises:
            OSError: If the other side is gone.
        """
        content = packed_message(message)
        with self._lock:
            self._socket.sendall(content)

    def receive(self, within_s: float | None = None) -> dict[str, Any]:
        """Waits for the next message.

        Args:
            within_s: Seconds in which all of it has to be here; the socket's timeout is another one after that. None:
                it may take any time, as long as something comes within the socket's timeout.

        Raises:
            MessageError: If it is none; the connection is of no use any more.
            OSError: If the other side is gone, too slow, or silent for longer than the socket's timeout.
        """
        end = None if within_s is None else time.monotonic() + within_s
        (length,) = _LENGTH.unpack(self._bytes(_LENGTH.size, end))
        if length > self.max_bytes:
            raise MessageError(f"A message of {length:,} bytes was announced; at most {self.max_bytes:,} are taken.")
        return unpacked_message(self._bytes(length, end))

    def _bytes(self, number: int, end: float | None) -> bytes:
        content = bytearray()
        while len(content) < number:
            if end is not None:
                left = end - time.monotonic()
                if left <= 0:
                    raise TimeoutError("The other side takes too long to say a message.")
                self._socket.settimeout(left)
            part = self._socket.recv(min(number - len(content), _CHUNK_BYTES))
            if not part:
                raise ConnectionError("The other side has closed the connection.")
            content += part
        return bytes(content)


def msgpack_module() -> Any:
    """The `msgpack` package.

    Raises:
        ImportError: If it is missing, with the command that installs it.
    """
    try:
        import msgpack
    except ImportError as err:
        raise ImportError(
            'Talking to a training run needs the `msgpack` package: pip install msgpack, or "rllib-calql[client]".'
        ) from err
    return msgpack


def packed_message(message: Mapping[str, Any]) -> bytes:
    """The bytes of a message, its length included."""
    body: bytes = msgpack_module().packb(message, use_bin_type=True)
    return _LENGTH.pack(len(body)) + body


def unpacked_message(body: bytes) -> dict[str, Any]:
    """The message in the bytes behind a length.

    Raises:
        MessageError: If they are no message.
    """
    msgpack = msgpack_module()
    limits = {"max_array_len": _MAX_ITEMS, "max_map_len": _MAX_ITEMS, "max_str_len": _MAX_TEXT_BYTES, "max_ext_len": 0}
    num_containers = 0

    def counted(container: Any) -> Any:
        nonlocal num_containers
        num_containers += 1
        if num_containers > _MAX_CONTAINERS:
            raise ValueError(f"more than {_MAX_CONTAINERS:,} lists and dicts")
        return container

    hooks = {"list_hook": counted, "object_hook": counted}
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True, max_bin_len=len(body), **limits, **hooks)
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.exceptions.UnpackException) as err:
        raise MessageError(f"What has come is no message ({type(err).__name__}: {str(err)[:200]}).") from err
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise MessageError("What has come is no message: it is no dict with a `type`.")
    _check_content(message, 0)
    return message


def _check_content(value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise MessageError(f"A message is nested more than {_MAX_DEPTH} levels deep.")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise MessageError("A message has a dict with keys that are no texts.")
        for part in value.values():
            _check_content(part, depth + 1)
    elif isinstance(value, list):
        for part in value:
            _check_content(part, depth + 1)
    elif not (value is None or isinstance(value, (bool, int, float, str, bytes))):
        raise MessageError(f"A message holds a {type(value).__name__}.")


def field(message: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """An entry of a message.

    Raises:
        MessageError: If it is missing or of another kind.
    """
    value = message.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("nothing" if one is type(None) else one.__name__ for one in kinds)
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise MessageError(
            f"`{name}` of a message of the type {message.get('type')!r} must be {expected}, got {found}."
        )
    return value


def texts(message: Mapping[str, Any], name: str) -> list[str]:
    """A list of texts in a message.

    Raises:
        MessageError: If it is none.
    """
    values = field(message, name, list)
    if not all(isinstance(value, str) for value in values):
        raise MessageError(f"`{name}` of a message must hold texts only.")
    return list(values)


# --- Arrays -----------------------------------------------------------------------------------------------------------


def packed_array(array: Array) -> dict[str, Any]:
    """An array as a message holds it.

    Raises:
        TypeError: If it holds anything but numbers of up to 8 bytes.
    """
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise TypeError(f"Messages hold numbers of up to 8 bytes, got an array of {array.dtype}.")
    array = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}


def unpacked_array(value: Any, what: str) -> Array:
    """The array in a message, read-only.

    Args:
        value: As `packed_array` makes it.
        what: What messages call it.

    Raises:
        MessageError: If it is none, its type is not allowed, or its bytes are not those of its shape.
    """
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data"}:
        raise MessageError(f"{what} must be an array: a dict of `dtype`, `shape` and `data`.")
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise MessageError(f"{what} has the type {str(dtype)[:40]!r}; allowed are {', '.join(sorted(_DTYPES))}.")
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise MessageError(f"{what} has the shape {str(shape)[:100]}, which is none.")
    if not isinstance(data, bytes) or math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise MessageError(f"{what} of the type {dtype} and shape {tuple(shape)} does not hold as many bytes.")
    if dtype == "|b1":
        data = bytes(data.translate(_AS_BOOL))
    return np.frombuffer(data, dtype).reshape(shape)


_AS_BOOL = bytes([0, *[1] * 255])  # A bool of any other byte would be neither of the two.


# --- The token --------------------------------------------------------------------------------------------------------


def proof_of(token: str | None, role: str, nonces: Sequence[bytes]) -> bytes:
    """Shows that a side knows the token, without telling it to somebody who listens.

    Args:
        token: None where there is none.
        role: "client" or "server", so that one's proof is of no use to the other.
        nonces: What server and client have drawn for this connection.
    """
    return hmac.new((token or "").encode(), role.encode() + b"".join(nonces), hashlib.sha256).digest()


def is_proof(given: bytes, expected: bytes) -> bool:
    """Whether two proofs are the same, in a time that does not tell where they differ."""
    return hmac.compare_digest(given, expected)


def parsed_address(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT", "HOST" or "[IPv6]:PORT"; by default port 5555.

    Raises:
        ValueError: If it is none.
        TypeError: If it is no text.
    """
    if not isinstance(address, str):
        raise TypeError(f'`address` must be a text such as "127.0.0.1:{DEFAULT_PORT}", got {address!r}.')
    if address.startswith("["):
        host, _, rest = address[1:].partition("]")
        port = rest[1:] if rest.startswith(":") else rest
    elif address.count(":") > 1:  # A bare IPv6 address.
        host, port = address, ""
    else:
        host, _, port = address.partition(":")
    port = port or str(DEFAULT_PORT)
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f'`address` must be "HOST:PORT", such as "127.0.0.1:{DEFAULT_PORT}", got {address!r}.')
    return host, int(port)
