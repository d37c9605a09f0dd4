"""Clients as the collection sees them: what a request tells them, and that each of their episodes is stored once."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ray.rllib.env.single_agent_episode import SingleAgentEpisode

_RUN, _IDS = "clients_run", "clients_episodes"
_MAX_IDS = 100_000  # Of 32 bytes. A client sends an episode again within moments.


@dataclass(frozen=True)
class RunNotes:
    """What clients of an env runner are to know of the run.

    Attributes:
        run: Its id, the same over restarts and checkpoints.
        num_updates: Gradient updates that its policy has had.
        receipt: The runner's own receipt of what has been taken of it, `Collected.receipt`.
    """

    run: str
    num_updates: int = 0
    receipt: tuple[str, int] | None = None


class ClientEpisodes:
    """Ids of the run and of the episodes that are stored.

    Attributes:
        num_connected: Clients that were connected when env runners answered last.
        receipt: Of a local env runner; the collector keeps those of remote ones.
    """

    def __init__(self) -> None:
        self._run = uuid.uuid4().hex
        self._stored: dict[str, None] = {}
        self.num_connected = 0
        self.receipt: tuple[str, int] | None = None

    def notes(self, num_updates: int) -> RunNotes:
        """For a request.

        Args:
            num_updates: Gradient updates so far.
        """
        return RunNotes(self._run, num_updates, self.receipt)

    @property
    def told(self) -> str:
        """How many clients there are."""
        return {0: "no client", 1: "1 client"}.get(self.num_connected, f"{self.num_connected} clients")

    def new(self, episodes: Sequence[SingleAgentEpisode]) -> list[SingleAgentEpisode]:
        """Those episodes that are not stored yet; they are noted as stored."""
        found = {episode.id_: episode for episode in episodes if episode.id_ not in self._stored}
        self._stored.update(dict.fromkeys(found))
        for id_ in list(islice(self._stored, max(0, len(self._stored) - _MAX_IDS))):
            del self._stored[id_]
        return list(found.values())

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {_RUN: self._run, _IDS: list(self._stored)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint; it has nothing of clients if the run had none then."""
        self._run = state.get(_RUN, self._run)
        self._stored = dict.fromkeys(state.get(_IDS, ()))
