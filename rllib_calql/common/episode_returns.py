"""`EpisodeReturns`: the discounted returns of whole episodes, offline and online, and their quantiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_EPISODE_RETURNS = "online_episode_returns"


class EpisodeReturns:
    """G_0 of whole episodes in units of training rewards: the discounted return from their first step on.

    One number for each episode, however long it is. Online episodes stay in it when their rows give way to newer ones.

    Args:
        offline: G_0 of the offline episodes to train on, shape (E,).
    """

    def __init__(self, offline: npt.NDArray[Any] | Sequence[float] = ()) -> None:
        self._offline = np.asarray(offline, dtype=np.float64)
        self._online: list[float] = []
        self._quantiles: dict[float, float] = {}

    def add(self, episode_return: float) -> None:
        """Takes in an online episode that has ended."""
        self._online.append(float(episode_return))
        self._quantiles.clear()

    def quantile(self, level: float) -> float:
        """The quantile of all episodes so far, between two of them on a straight line.

        Raises:
            ValueError: If there are none.
        """
        if level not in self._quantiles:
            returns = np.concatenate([self._offline, np.asarray(self._online, dtype=np.float64)])
            if len(returns) == 0:
                raise ValueError("There is no episode yet whose return could be the reference value.")
            self._quantiles[level] = float(np.quantile(returns, level))
        return self._quantiles[level]

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint: the online episodes. The offline ones are read again."""
        return {_EPISODE_RETURNS: np.asarray(self._online, dtype=np.float64)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint; nothing is in one of an earlier version."""
        self._online = [float(one) for one in state.get(_EPISODE_RETURNS, ())]
        self._quantiles.clear()
