"""`Connection`: a thread of the client that keeps in touch with a training run, whatever becomes of the network."""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rllib_calql.policy import wire
from rllib_calql.policy.episode_pieces import EpisodeOfClient, Spaces
from rllib_calql.policy.loading import policy_of
from rllib_calql.policy.policy import Policy

logger = logging.getLogger(__name__)

_SECONDS_TO_CONNECT = 10.0
_SECONDS_OF_SILENCE = 30.0  # The run says something every 5 s.
_SECONDS_BETWEEN_SIGNS = 5.0
_FIRST_DELAY_S, _LAST_DELAY_S = 0.2, 10.0  # Between attempts to connect; it doubles.
_SECONDS_BETWEEN_POLICIES = 5.0  # While an episode is under way, which keeps the policy that it began with.


class RefusedError(ConnectionError):
    """The run does not take this client, or the client this run; trying again would not help."""


@dataclass
class Known:
    """What the client knows of the run. Guarded by the condition of the connection.

    Attributes:
        run: The training run, None before it collects.
        is_wanted: Whether it waits for an episode.
        is_random: Whether actions are to be drawn uniformly, as in a warm-up.
        is_full: Whether it takes no more episodes at the moment.
        policy_id: Of its latest policy; None before there is one.
        spaces: What it has told of observations and actions.
        max_steps: Steps after which it cuts an episode.
        policy: The latest that is here.
        held_id: Its id.
        version: Gradient updates that it has had.
        is_connected: Whether there is a connection.
        refusal: Why there will be none any more; None if there may be.
        failure: Why there is none now.
    """

    run: str | None = None
    is_wanted: bool = False
    is_random: bool = False
    is_full: bool = False
    policy_id: str | None = None
    spaces: Spaces | None = None
    max_steps: int = 0
    policy: Policy | None = None
    held_id: str | None = None
    version: int = -1
    is_connected: bool = False
    refusal: str | None = None
    failure: str = "no attempt was made yet"


@dataclass
class Outbox:
    """Episodes that are not known to be stored. Guarded by the condition of the connection.

    Attributes:
        episodes: By id, the oldest first; the last one may be under way.
        sent: Steps of each that went over the present connection, and whether its end did.
        received: Ids of ended episodes that the run has received over the present connection.
        num_stored: Episodes that the run has taken in.
        num_rejected: Episodes that it did not take.
        num_dropped: Episodes that were dropped here, because too many were waiting.
        rejection: Why it did not take the last of those.
    """

    episodes: dict[str, EpisodeOfClient] = field(default_factory=dict)
    sent: dict[str, tuple[int, bool]] = field(default_factory=dict)
    received: set[str] = field(default_factory=set)
    num_stored: int = 0
    num_rejected: int = 0
    num_dropped: int = 0
    rejection: str | None = None


class Connection:
    """Connects, and connects again with growing pauses; sends episodes, and asks for policies.

    Args:
        host: Of the run.
        port: Of the run.
        token: What both sides know; None without.
        piece_steps: Steps of an episode under way after which they are sent; None: whole episodes.

    Attributes:
        changed: Guards `known` and `outbox`, and is notified of every change.
        known: What is known of the run.
        outbox: What goes to it.
    """

    def __init__(self, host: str, port: int, token: str | None, piece_steps: int | None) -> None:
        wire.msgpack_module()
        self.address = f"{host}:{port}"
        self._place = (host, port)
        self._token = token
        self._piece_steps = piece_steps
        self._client = secrets.token_hex(16)
        self.changed = threading.Condition()
        self.known = Known()
        self.outbox = Outbox()
        self._is_closed = False
        self._told: str | None = None  # Why there was no connection.
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="policy-client", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tells the thread that there is something to send."""
        with suppress(OSError):  # Full: it will wake up.
            self._waker.send(b"\0")

    def close(self) -> None:
        """Ends the connection and the thread."""
        self._is_closed = True
        self.wake()
        self._thread.join(_SECONDS_TO_CONNECT + 1.0)
        self._waker.close()
        self._woken.close()

    # --- The thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        delay = _FIRST_DELAY_S
        while not self._is_closed:
            begin = time.monotonic()
            try:
                self._talk()
            except RefusedError as err:
                self._note(is_connected=False, refusal=str(err))
                logger.error("%s", err)
                return
            except (OSError, wire.MessageError) as err:
                was_connected = self.known.is_connected
                self._note(is_connected=False, failure=str(err) or type(err).__name__)
                if was_connected:
                    logger.warning("The connection to %s is lost (%s); trying again.", self.address, err)
                    delay = _FIRST_DELAY_S if time.monotonic() - begin > delay else delay
                elif self.known.failure != self._told:
                    self._told = self.known.failure
                    logger.warning(
                        "No training run answers at %s (%s); trying again until one does.", self.address, self._told
                    )
            except Exception as err:  # Whoever waits is to hear of it.
                logger.exception("The thread of the client has failed.")
                self._note(is_connected=False, refusal=f"The thread of the client has failed: {err!r}")
                return
            if not self._is_closed:
                self._pause(delay * random.uniform(0.5, 1.0))
                delay = min(2.0 * delay, _LAST_DELAY_S)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._is_closed and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _note(self, **changes: Any) -> None:
        with self.changed:
            for name, value in changes.items():
                setattr(self.known, name, value)
            self.changed.notify_all()

    def _talk(self) -> None:
        """One connection, from its beginning to its end.

        Raises:
            OSError: As it ends.
            MessageError: If the run does not follow the protocol.
            RefusedError: If it will not be another time.
        """
        with (
            socket.create_connection(self._place, _SECONDS_TO_CONNECT) as connection,
            selectors.DefaultSelector() as selector,
        ):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(_SECONDS_TO_CONNECT)
            channel = wire.Channel(connection)
            self._greet(channel)
            channel.max_bytes = wire.MAX_SERVER_BYTES
            connection.settimeout(_SECONDS_OF_SILENCE)
            with self.changed:
                self.outbox.sent, self.outbox.received = {}, set()
                self.known.is_connected = True
                self.known.is_wanted = False
                self.changed.notify_all()
            self._exchange(connection, channel, selector)

    def _greet(self, channel: wire.Channel) -> None:
        hello = channel.receive(_SECONDS_TO_CONNECT)
        if hello["type"] == "refused":
            raise ConnectionError(str(hello.get("reason"))[:500])  # It is full, which passes.
        protocol = wire.field(hello, "protocol", int)
        if protocol != wire.PROTOCOL:
            raise RefusedError(
                f"The training run at {self.address} speaks version {protocol} of the protocol (rllib-calql "
                f"{str(hello.get('package'))[:40]}), this client {wire.PROTOCOL}; install the same rllib-calql on both."
            )
        has_token = wire.field(hello, "needs_token", bool)
        if has_token != (self._token is not None):
            raise RefusedError(
                f"The training run at {self.address} "
                + (
                    "needs a token: pass `token`, what the file in its `external_token_file` holds."
                    if has_token
                    else "has no token, so that nobody knows whether it is the right one; set its "
                    "`external_token_file`, or drop `token`."
                )
            )
        nonces = [wire.field(hello, "nonce", bytes), os.urandom(wire.NONCE_BYTES)]
        if len(nonces[0]) != wire.NONCE_BYTES:
            raise wire.MessageError("The run has drawn a nonce of another length.")
        channel.send(
            {
                "type": "hello",
                "protocol": wire.PROTOCOL,
                "nonce": nonces[1],
                "proof": wire.proof_of(self._token, "client", nonces),
                "client": self._client,
            }
        )
        channel.max_bytes = wire.MAX_WELCOME_BYTES
        welcome = channel.receive(_SECONDS_TO_CONNECT)
        if welcome["type"] == "refused":
            raise RefusedError(f"The training run at {self.address} refuses: {str(welcome.get('reason'))[:500]}")
        expected = wire.proof_of(self._token, "server", nonces)
        if not wire.is_proof(wire.field(welcome, "proof", bytes), expected):
            raise RefusedError(f"What answers at {self.address} does not know the token; it is no run of yours.")
        self._take_spaces(welcome)

    def _take_spaces(self, welcome: Mapping[str, Any]) -> None:
        before = self.known.spaces
        try:
            told = json.loads(wire.field(welcome, "spaces", bytes))
            spaces = Spaces(told["observation_space"], told["action_space"])
        except (ValueError, KeyError, TypeError, RecursionError) as err:
            raise RefusedError(f"The spaces of the run at {self.address} are not known here ({err}).") from err
        if before is not None and before.description != spaces.description:
            raise RefusedError(
                f"The training run at {self.address} has other spaces than before: {spaces.description}, not "
                f"{before.description}. Start the client anew to work for it."
            )
        with self.changed:
            self.known.spaces = before or spaces
            self.known.max_steps = wire.field(welcome, "max_episode_env_steps", int)

    def _exchange(self, connection: socket.socket, channel: wire.Channel, selector: selectors.BaseSelector) -> None:
        last_heard = last_said = time.monotonic()
        asked_at, asked_for = float("-inf"), None
        selector.register(connection, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        while not self._is_closed:
            message = self._next_piece()
            if message is not None:
                channel.send(message)
                last_said = time.monotonic()
            readable = [key.fileobj for key, _ in selector.select(0.0 if message else 0.5)]
            now = time.monotonic()
            if self._woken in readable:
                with suppress(OSError):
                    self._woken.recv(4096)
            if connection in readable:
                self._take(channel.receive())
                last_heard = time.monotonic()
            elif now - last_heard > _SECONDS_OF_SILENCE:
                raise ConnectionError(f"nothing was heard for {_SECONDS_OF_SILENCE:g} s")
            wanted = self._policy_to_ask_for(now - asked_at)
            if wanted is not None and (wanted != asked_for or now - asked_at > _SECONDS_OF_SILENCE):
                channel.send({"type": "ask_policy"})
                asked_at, asked_for, last_said = now, wanted, now
            if now - last_said > _SECONDS_BETWEEN_SIGNS:
                channel.send({"type": "alive"})
                last_said = now

    def _policy_to_ask_for(self, seconds_since: float) -> str | None:
        with self.changed:
            known = self.known
            if known.policy_id in (None, known.held_id):
                return None
            is_acting = any(not episode.is_ended for episode in self.outbox.episodes.values())
            return None if is_acting and seconds_since < _SECONDS_BETWEEN_POLICIES else known.policy_id

    def _next_piece(self) -> dict[str, Any] | None:
        with self.changed:
            found = self._next_steps()
        # Without the lock, which a control loop would wait for. What an episode has, it keeps.
        return None if found is None else found[0].piece(*found[1:])

    def _next_steps(self) -> tuple[EpisodeOfClient, int, int, bool] | None:
        """An episode with steps to send, the first of them, the one behind the last, and whether it ends there."""
        outbox, known = self.outbox, self.known
        for id_, episode in outbox.episodes.items():
            start, is_end_sent = outbox.sent.get(id_, (0, False))
            if is_end_sent or known.run is None or (known.is_full and start == 0):
                continue
            if episode.is_ended or (self._piece_steps is not None and episode.num_steps - start >= self._piece_steps):
                stop = episode.end_of_piece(start)
                is_last = episode.is_ended and stop == episode.num_steps
                outbox.sent[id_] = (stop, is_last)
                return episode, start, stop, is_last
        return None

    def _take(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "state":
            self._take_state(message)
        elif message["type"] == "policy":
            self._take_policy(message)
        elif message["type"] == "refused":
            raise RefusedError(f"The training run at {self.address} refuses: {str(message.get('reason'))[:500]}")
        else:
            raise wire.MessageError(f"The run has sent a message of the type {message['type'][:40]!r}.")

    def _take_state(self, message: Mapping[str, Any]) -> None:
        run = wire.field(message, "run", (str, type(None)))
        with self.changed:
            known, outbox = self.known, self.outbox
            if known.run is not None and run is not None and run != known.run:
                raise RefusedError(
                    f"At {self.address} another training run ({run[:40]}) has taken the place of the one that this "
                    f"client works for ({known.run}); {len(outbox.episodes)} episodes of it are not stored. Start the "
                    "client anew to work for the other one."
                )
            known.run = run or known.run
            known.is_wanted = wire.field(message, "is_wanted", bool)
            known.is_random = wire.field(message, "is_random", bool)
            known.is_full = wire.field(message, "is_full", bool)
            known.policy_id = wire.field(message, "policy", (str, type(None)))
            outbox.received.update(id_ for id_ in wire.texts(message, "received") if id_ in outbox.episodes)
            for id_ in wire.texts(message, "later"):
                outbox.sent.pop(id_, None)
                outbox.received.discard(id_)
            for id_ in wire.texts(message, "stored"):
                if outbox.episodes.pop(id_, None) is not None:
                    outbox.num_stored += 1
                outbox.received.discard(id_)
            for id_, reason in wire.field(message, "rejected", dict).items():
                if outbox.episodes.pop(id_, None) is not None:
                    outbox.num_rejected += 1
                    outbox.rejection = str(reason)[:500]
                    logger.warning("The training run does not take an episode: %s", outbox.rejection)
            self.changed.notify_all()

    def _take_policy(self, message: Mapping[str, Any]) -> None:
        content = wire.field(message, "content", bytes)
        try:
            policy = policy_of(content, f"The policy of the run at {self.address}")
        except ValueError as err:
            raise RefusedError(str(err)) from err
        metadata = policy.metadata
        own = self.known.spaces
        assert own is not None
        if any(metadata[name] != description for name, description in own.description.items()):
            raise RefusedError(f"The policy of the run at {self.address} is made for other spaces than it has told.")
        self._note(policy=policy, held_id=wire.field(message, "id", str), version=wire.field(message, "version", int))
