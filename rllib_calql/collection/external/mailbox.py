"""`Mailbox`: what clients of an env runner are told, and what they have sent."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.collection.external.episodes import EpisodeSpaces, Joining, RejectedError, id_in
from rllib_calql.policy import wire

logger = logging.getLogger(__name__)

_MAX_WAITING_BYTES = 512 * 2**20  # Of episodes that wait for the algorithm.
_MAX_IDS = 10_000
_MAX_IDS_OF_MESSAGE = 1_000


@dataclass(frozen=True)
class State:
    """What clients are told.

    Attributes:
        run: The training run; None before it collects.
        is_wanted: Whether an episode is waited for.
        is_random: Whether actions are to be drawn uniformly.
        policy_id: Of the latest policy.
        version: Gradient updates that it has had.
        policy: The file that holds it.
    """

    run: str | None = None
    is_wanted: bool = False
    is_random: bool = False
    policy_id: str | None = None
    version: int = 0
    policy: bytes = b""


@dataclass
class News:
    """What a client is yet to be told. Guarded by the condition of the server."""

    received: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    wants_policy: bool = False
    is_due: bool = True
    is_over: bool = False


class Mailbox:
    """Holds the episodes of all clients of an env runner until the algorithm takes them.

    An episode is handed over by `collect`, and its client is told that it is stored once `confirm` says so. Until then
    the client keeps it and sends it again after an interruption; what is here already is not taken twice.

    Args:
        spaces: Checks what comes.

    Attributes:
        changed: Guards everything, and is notified of every change.
        is_closed: Whether nothing is waited for any more.
    """

    def __init__(self, spaces: EpisodeSpaces) -> None:
        self._spaces = spaces
        self.changed = threading.Condition()
        self.is_closed = False
        self._state = State()
        self._news: dict[int, News] = {}  # By number of the connection.
        self._waiting: OrderedDict[str, SingleAgentEpisode] = OrderedDict()
        self._waiting_bytes = 0
        self._handed: dict[str, int] = {}  # Number of the hand-over.
        self._num_handovers = 0
        self._stored: OrderedDict[str, None] = OrderedDict()
        self._sender: dict[str, int] = {}  # The connection that an episode came by last.
        self._demand = 0

    @property
    def num_clients(self) -> int:
        """Clients that are connected."""
        with self.changed:
            return len(self._news)

    def open(self, number: int) -> News:
        """Begins to keep news for a connection."""
        with self.changed:
            self._news[number] = News()
            self.changed.notify_all()
            return self._news[number]

    def leave(self, number: int) -> None:
        """Notes that a connection has ended."""
        with self.changed:
            if (gone := self._news.pop(number, None)) is not None:
                gone.is_over = True
            self.changed.notify_all()

    def close(self) -> None:
        """Ends all waiting."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def next_messages(self, news: News, timeout_s: float) -> list[dict[str, Any]]:
        """Waits for something that a client is to be told.

        Args:
            news: Of its connection.
            timeout_s: Seconds after which it is told how things stand in any case.

        Returns:
            The messages; none if the connection is over.
        """
        with self.changed:
            self.changed.wait_for(lambda: news.is_due or news.is_over or self.is_closed, timeout_s)
            if news.is_over or self.is_closed:
                return []
            messages = [self._message(news)]
            state = self._state
            if news.wants_policy and state.policy_id is not None:
                news.wants_policy = False
                content = {"id": state.policy_id, "version": state.version, "content": state.policy}
                messages.append({"type": "policy", **content})
            return messages

    def publish(
        self, run: str, policy: bytes | None, policy_id: str | None, *, version: int = 0, is_random: bool = False
    ) -> None:
        """Tells clients of the run, its latest policy, and whether they are to act at random.

        Args:
            run: The training run.
            policy: Content of a policy file; None if it is that of before.
            policy_id: Another one for every other policy.
            version: Gradient updates that it has had.
            is_random: Whether actions are to be drawn uniformly.
        """
        with self.changed:
            state = replace(self._state, run=run, is_random=is_random)
            if policy is not None:
                state = replace(state, policy=policy, policy_id=policy_id, version=version)
            self._tell(state)

    def collect(self, num_episodes: int, *, timeout_s: float, idle_timeout_s: float) -> list[SingleAgentEpisode]:
        """Waits for whole episodes and hands over all that are here.

        Args:
            num_episodes: How many to wait for.
            timeout_s: Seconds to wait at most.
            idle_timeout_s: Seconds to wait at most while no client is connected.

        Returns:
            Whole episodes; none if none came.
        """
        begin = time.monotonic()
        with self.changed:
            self._demand = num_episodes
            self._tell_demand()
            while len(self._waiting) < num_episodes and not self.is_closed:
                limit = timeout_s if self._news else idle_timeout_s
                left = begin + limit - time.monotonic()
                if left <= 0:
                    break
                self.changed.wait(min(left, 0.5))
            self._demand = 0
            self._tell_demand()
            episodes = list(self._waiting.values())
            if episodes:
                self._num_handovers += 1
            for id_ in self._waiting:
                self._handed[id_] = self._num_handovers
            self._waiting.clear()
            self._waiting_bytes = 0
            return episodes

    @property
    def num_handovers(self) -> int:
        """How often `collect` has handed over something."""
        return self._num_handovers

    def confirm(self, num_handovers: int) -> None:
        """Notes that the algorithm has stored what was handed over up to then, and tells the clients."""
        with self.changed:
            stored = [id_ for id_, number in self._handed.items() if number <= num_handovers]
            for id_ in stored:
                del self._handed[id_]
                self._stored[id_] = None
                news = self._news.get(self._sender.pop(id_, -1))
                if news is not None:
                    news.stored.append(id_)
                    news.is_due = True
            while len(self._stored) > _MAX_IDS:
                self._stored.popitem(last=False)
            self.changed.notify_all()

    def take_back(self) -> None:
        """Has clients send again what was handed over and not confirmed: nobody has taken it, as after a restore."""
        with self.changed:
            for id_ in self._handed:
                news = self._news.get(self._sender.pop(id_, -1))
                if news is not None:
                    news.later.append(id_)
                    self._answer(news)
            self._handed.clear()

    def _message(self, news: News) -> dict[str, Any]:
        state = self._state
        received, later, stored = (_taken(ids) for ids in (news.received, news.later, news.stored))
        rejected = {id_: news.rejected.pop(id_) for id_ in list(news.rejected)[:_MAX_IDS_OF_MESSAGE]}
        news.is_due = bool(news.received or news.later or news.stored or news.rejected)
        return {
            "type": "state",
            "run": state.run,
            "is_wanted": state.is_wanted,
            "is_random": state.is_random,
            "is_full": self._is_full,
            "policy": state.policy_id,
            "received": received,
            "later": later,
            "stored": stored,
            "rejected": rejected,
        }

    # --- What clients say --------------------------------------------------------------------------------------------

    def take(self, message: Mapping[str, Any], joining: Joining, number: int, news: News) -> None:
        """Takes a message of a client.

        Args:
            message: What it said.
            joining: Its episodes under way.
            number: Of its connection.
            news: Of its connection.

        Raises:
            MessageError: If it is no message of a client of ours.
        """
        kind = message["type"]
        if kind == "ask_policy":
            with self.changed:
                news.wants_policy = news.is_due = True
                self.changed.notify_all()
        elif kind == "piece":
            self._take_piece(message, joining, number, news)
        elif kind != "alive":
            raise wire.MessageError(f"A client does not send messages of the type {kind[:40]!r}.")

    def _take_piece(self, message: Mapping[str, Any], joining: Joining, number: int, news: News) -> None:
        id_, run = id_in(message), wire.field(message, "run", str)
        with self.changed:
            if self._is_known(id_, number, news):
                return
            own = self._state.run
            if own is not None and run != own:
                news.rejected[id_] = f"it is of the training run {run[:40]}, this is {own}"
                self._answer(news)
                return
            if self._is_full:
                joining.forget(id_)
                news.later.append(id_)
                self._answer(news)
                return
        try:
            episode = joining.add(self._spaces.piece(message))
        except RejectedError as err:
            joining.forget(id_)
            logger.warning("An episode of a client is not taken: %s", err)
            with self.changed:
                news.rejected[id_] = str(err)
                self._answer(news)
            return
        if episode is None:
            return
        with self.changed:
            if self._is_known(id_, number, news):  # By another connection of the same client, which is about to end.
                return
            self._waiting[id_] = episode
            self._waiting_bytes += _num_bytes(episode)
            self._sender[id_] = number
            news.received.append(id_)
            self._tell_demand()
            self._answer(news)

    def _is_known(self, id_: str, number: int, news: News) -> bool:
        """Whether an episode is here or stored already, which the client is told then."""
        if id_ in self._stored:
            news.stored.append(id_)
        elif id_ in self._waiting or id_ in self._handed:
            self._sender[id_] = number
            news.received.append(id_)
        else:
            return False
        self._answer(news)
        return True

    def _answer(self, news: News) -> None:
        news.is_due = True
        self.changed.notify_all()

    @property
    def _is_full(self) -> bool:
        return self._state.run is None or self._waiting_bytes > _MAX_WAITING_BYTES

    def _tell_demand(self) -> None:
        self._tell(replace(self._state, is_wanted=len(self._waiting) < self._demand))

    def _tell(self, state: State) -> None:
        if state != self._state:
            self._state = state
            for news in self._news.values():
                news.is_due = True
            self.changed.notify_all()


def _taken(ids: list[str]) -> list[str]:
    """Removes as many as a message may hold, and returns them."""
    taken = ids[:_MAX_IDS_OF_MESSAGE]
    del ids[:_MAX_IDS_OF_MESSAGE]
    return taken


def _num_bytes(episode: SingleAgentEpisode) -> int:
    return int(episode.get_observations().nbytes) + 300 * len(episode)
