"""`SuccessKeyWatch`: notices a `success_key` that no episode shows, which is most often a misspelt one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rllib_calql.common.success import keys_in, reports_in, unseen_key_message

logger = logging.getLogger(__name__)


class InfosSeen(NamedTuple):
    """What the infos of ended episodes had.

    Attributes:
        has_key: Whether one of them had the success key.
        num_episodes: Episodes.
        names: Keys that they had, as long as `has_key` is False.
    """

    has_key: bool = False
    num_episodes: int = 0
    names: frozenset[str] = frozenset()

    def including(self, key: str, infos: Sequence[Any]) -> InfosSeen:
        """The same with one more episode.

        Args:
            key: The success key.
            infos: Of all its steps.
        """
        if self.has_key or any(reports_in(info, key) for info in infos):
            return InfosSeen(has_key=True)
        return InfosSeen(False, self.num_episodes + 1, self.names | keys_in(infos))


class SuccessKeyWatch:
    """Warns once, when episodes have ended and none has shown the key.

    Args:
        key: The setting `success_key`; None: nothing is watched.

    Attributes:
        warning: What was warned of, or None.
    """

    def __init__(self, key: str | None) -> None:
        self._key = key
        self._seen = InfosSeen()
        self.warning: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to find out."""
        return self._key is None or self._seen.has_key or self.warning is not None

    def include(self, episodes: Iterable[Any]) -> None:
        """Takes in episodes that have been collected, and warns if it has to."""
        for episode in episodes:
            if self._key is not None and not self.is_over:
                self._seen = self._seen.including(self._key, episode.get_infos())
        self._warn_if_unseen()

    def include_seen(self, seen: Iterable[InfosSeen]) -> None:
        """Takes in what the env runners of an evaluation have seen, and warns if it has to."""
        for one in seen:
            merged = InfosSeen(False, self._seen.num_episodes + one.num_episodes, self._seen.names | one.names)
            self._seen = InfosSeen(has_key=True) if one.has_key or self._seen.has_key else merged
        self._warn_if_unseen()

    def _warn_if_unseen(self) -> None:
        if self._key is not None and not self.is_over and self._seen.num_episodes:
            self.warning = unseen_key_message(self._key, self._seen.num_episodes, self._seen.names)
            logger.warning("%s. Said once.", self.warning)


def infos_seen_by(runner: Any) -> InfosSeen:
    """Runs inside an env runner: what its episodes have shown, see `EpisodeOutcomeCallback`."""
    seen: InfosSeen = getattr(runner, "_calql_infos_seen", InfosSeen())
    return seen
