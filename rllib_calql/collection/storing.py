"""`EpisodeKeeper`: what becomes of a finished episode: returns, checks, rows of the store, and the debt of updates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.util import log_once

from rllib_calql.common import metrics as keys
from rllib_calql.common.episode_returns import EpisodeReturns
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.common.returns import possible_returns
from rllib_calql.learning.divergence import DivergenceWatch
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.resolution import REMEDY, remark_on_resolution
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.transitions import check_storable, encoded_observations, transitions_from_episode

logger = logging.getLogger(__name__)

_MAX_DISCARDED_IN_A_ROW = 10


class EpisodeKeeper:
    """Stores whole episodes, and discards those with numbers that cannot be stored.

    Args:
        store: Gets the transitions.
        lifetime: Counts what is stored.
        divergence: Learns which returns are possible.
        episode_returns: Gets the return of each episode.
        add_returns: Attaches returns-to-go.
        space: Of observations as the module sees them.
        episode_limit_env_steps: Env steps after which episodes are cut.
    """

    def __init__(
        self,
        store: TransitionStore,
        lifetime: Lifetime,
        divergence: DivergenceWatch,
        episode_returns: EpisodeReturns,
        *,
        add_returns: AddReturnsToGo,
        space: gym.spaces.Box,
        episode_limit_env_steps: int,
    ) -> None:
        self._store = store
        self._lifetime = lifetime
        self._divergence = divergence
        self._episode_returns = episode_returns
        self._add_returns = add_returns
        self._space = space
        self._episode_limit_env_steps = episode_limit_env_steps
        self._num_discarded = self._num_discarded_in_a_row = 0

    @property
    def num_discarded(self) -> int:
        """Episodes discarded over the lifetime."""
        return self._num_discarded

    def keep(self, episodes: Sequence[SingleAgentEpisode]) -> None:
        """Stores episodes that have ended.

        Raises:
            ValueError: If none of the last ten could be stored.
        """
        for episode in episodes:
            self._keep(episode)

    def _keep(self, episode: SingleAgentEpisode) -> None:
        settings = self._add_returns.settings
        self._add_returns(batch={}, episodes=[episode])
        with np.errstate(over="ignore", invalid="ignore"):  # What overflows is found below.
            emitted = encoded_observations(episode, self._space)
            observations = emitted.astype(self._store.obs_dtype, copy=False)
            actions = np.asarray(episode.get_actions()).reshape(len(episode), -1)
            rows = transitions_from_episode(episode, observations=observations, actions=actions, settings=settings)
        try:
            check_storable(episode, observations, rows, settings)
        except ValueError as error:
            self._discard(error)
            return
        if (remark := remark_on_resolution(emitted)) and log_once("calql_resolution"):
            logger.warning("%s; if that matters, %s. Said once.", remark, REMEDY)
        self._num_discarded_in_a_row = 0
        self._store.add_online(rows)
        self._episode_returns.add(rows[Columns.RETURNS_TO_GO][0])
        self._divergence.include(*_returns_of(episode, rows, settings.gamma))
        self._lifetime.count_episode(len(episode))
        if len(episode) >= self._episode_limit_env_steps and episode.is_truncated and log_once("calql_cut"):
            logger.warning(
                "An episode was cut after %d env steps and stored as a truncated one; raise `max_episode_env_steps` if "
                "episodes are that long. Said once.",
                len(episode),
            )

    def _discard(self, error: ValueError) -> None:
        """A broken sensor costs an episode. An environment that is broken for good ends the run."""
        self._num_discarded += 1
        self._num_discarded_in_a_row += 1
        if self._num_discarded_in_a_row == _MAX_DISCARDED_IN_A_ROW:
            raise error
        logger.warning("An episode is discarded: %s", error)

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {keys.NUM_DISCARDED_EPISODES_LIFETIME: self._num_discarded}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint; empty in one of an earlier version."""
        self._num_discarded = state.get(keys.NUM_DISCARDED_EPISODES_LIFETIME, 0)


def _returns_of(episode: SingleAgentEpisode, rows: dict[str, Any], gamma: float) -> tuple[float, float]:
    lengths, terminateds = np.array([len(episode)]), np.array([episode.is_terminated])
    return possible_returns(rows[Columns.RETURNS_TO_GO], rows[Columns.REWARDS], lengths, terminateds, gamma)
