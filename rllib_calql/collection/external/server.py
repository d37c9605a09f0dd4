"""`ClientServer`: listens for clients, and speaks with each of them in threads of their own."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rllib_calql.collection.external.episodes import EpisodeSpaces, Joining
from rllib_calql.collection.external.mailbox import Mailbox, News
from rllib_calql.policy import wire

logger = logging.getLogger(__name__)

MAX_CLIENTS = 64
_SECONDS_TO_GREET = 10.0
_SECONDS_OF_SILENCE = 30.0  # A client says something every 5 s.
_SECONDS_BETWEEN_SIGNS = 5.0
_SECONDS_TO_BIND = 5.0  # The process of a lost env runner may hold the port for a moment.


class ClientServer:
    """Serves clients by two threads each, and never waits for one of them.

    Args:
        host: To listen at.
        port: To listen at.
        token: That clients have to know; None without.
        spaces: Checks what comes.
        descriptions: Of `observation_space` and `action_space`, for clients.
        package: Version of this package, for messages of clients.

    Attributes:
        mailbox: What clients are told, and what they have sent.

    Raises:
        OSError: If nothing can listen there, with the setting to change.
        ValueError: If the spaces have too many parts to be told.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        token: str | None,
        spaces: EpisodeSpaces,
        descriptions: Mapping[str, Any],
        package: str,
    ) -> None:
        self._token = token
        self._spaces = spaces
        self._descriptions = json.dumps(dict(descriptions)).encode()
        if len(self._descriptions) > wire.MAX_WELCOME_BYTES // 2:
            raise ValueError("The spaces have too many parts to be told to clients (`external_port`).")
        self._package = package
        self.mailbox = Mailbox(spaces)
        self._num_accepted = 0
        self._lock = threading.Lock()
        self._sockets: dict[int, socket.socket] = {}
        self._strangers: dict[int, socket.socket] = {}  # Those of them that have not shown the token yet.
        self._is_closed = False
        self._listener = _listening(host, port)
        threading.Thread(target=self._accept, name="clients", daemon=True).start()

    def close(self) -> None:
        """Ends all connections and frees the port."""
        self._is_closed = True
        self.mailbox.close()
        _shut(self._listener)
        with self._lock:
            connections = list(self._sockets.values())
        for connection in connections:
            _shut(connection)

    # --- Threads -----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, address = self._listener.accept()
            except OSError:
                if self._is_closed:
                    return
                time.sleep(0.1)  # Out of file descriptors, which passes.
                continue
            with self._lock:
                self._num_accepted += 1
                number = self._num_accepted
                is_full = len(self._sockets) - len(self._strangers) >= MAX_CLIENTS
                if not is_full:
                    if len(self._strangers) >= MAX_CLIENTS:  # Whoever says nothing keeps no client out.
                        _shut(self._strangers.pop(next(iter(self._strangers))))
                    self._sockets[number] = self._strangers[number] = connection
            if is_full:
                with suppress(OSError):
                    connection.settimeout(1.0)
                    wire.Channel(connection).send({"type": "refused", "reason": f"{MAX_CLIENTS} clients are connected"})
                _shut(connection)
                continue
            name = f"client-{number}"
            threading.Thread(target=self._serve, args=(number, connection, address), name=name, daemon=True).start()

    def _serve(self, number: int, connection: socket.socket, address: Any) -> None:
        channel = wire.Channel(connection)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(_SECONDS_TO_GREET)
            self._greet(channel, number)
            channel.max_bytes = wire.MAX_CLIENT_BYTES
            connection.settimeout(_SECONDS_OF_SILENCE)
            news = self.mailbox.open(number)
            threading.Thread(
                target=self._talk, args=(channel, news, connection), name=f"to-client-{number}", daemon=True
            ).start()
            joining = Joining(self._spaces)
            while not self._is_closed:
                self.mailbox.take(channel.receive(), joining, number, news)
        except (wire.MessageError, PermissionError) as err:
            logger.warning("The client at %s is refused: %s", address, err)
            with suppress(OSError):
                connection.settimeout(1.0)
                channel.send({"type": "refused", "reason": str(err)})
        except OSError as err:
            logger.info("The client at %s is gone: %s", address, err)
        except Exception:
            logger.exception("The client at %s is given up.", address)
        finally:
            self.mailbox.leave(number)
            with self._lock:
                self._sockets.pop(number, None)
                self._strangers.pop(number, None)
            _shut(connection)

    def _greet(self, channel: wire.Channel, number: int) -> None:
        nonce = os.urandom(wire.NONCE_BYTES)
        needs_token = self._token is not None
        greeting = {"protocol": wire.PROTOCOL, "package": self._package, "needs_token": needs_token, "nonce": nonce}
        channel.send({"type": "hello", **greeting})
        hello = channel.receive(_SECONDS_TO_GREET)
        if wire.field(hello, "protocol", int) != wire.PROTOCOL:
            raise wire.MessageError(
                f"the client speaks version {hello['protocol']} of the protocol, the run {wire.PROTOCOL}; install the "
                "same rllib-calql on both"
            )
        nonces = [nonce, wire.field(hello, "nonce", bytes)]
        expected = wire.proof_of(self._token, "client", nonces)
        if len(nonces[1]) != wire.NONCE_BYTES or not wire.is_proof(wire.field(hello, "proof", bytes), expected):
            raise PermissionError("the token is not that of the run, which its `external_token_file` holds")
        with self._lock:
            self._strangers.pop(number, None)
        channel.send(
            {
                "type": "welcome",
                "proof": wire.proof_of(self._token, "server", nonces),
                "spaces": self._descriptions,
                "max_episode_env_steps": self._spaces.max_env_steps,
            }
        )

    def _talk(self, channel: wire.Channel, news: News, connection: socket.socket) -> None:
        """Tells a client what is new, in a thread of its own: a slow one holds nobody up."""
        try:
            while messages := self.mailbox.next_messages(news, _SECONDS_BETWEEN_SIGNS):
                for message in messages:
                    channel.send(message)
        except OSError as err:
            logger.info("A client does not listen any more: %s", err)
            _shut(connection)


def _listening(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + _SECONDS_TO_BIND
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        listener = socket.socket(family, socket.SOCK_STREAM)
        if os.name != "nt":  # There it would let two programs listen at one port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(MAX_CLIENTS)
            return listener
        except OSError as err:
            listener.close()
            if time.monotonic() > deadline or err.errno != errno.EADDRINUSE:
                raise OSError(
                    f"Nothing can listen at {host}:{port} ({err.strerror or err}); another run may do so: set another "
                    "`external_port`, or the `external_host` of this machine."
                ) from err
            time.sleep(0.5)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
