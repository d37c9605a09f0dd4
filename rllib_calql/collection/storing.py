"""`EpisodeKeeper`: what becomes of a finished episode: returns, checks, rows of the store, and the debt of updates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.util import log_once

from rllib_calql.common import metrics as keys
from rllib_calql.common.episode_returns import EpisodeReturns
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.common.returns import possible_returns
from rllib_calql.datasets.episodes.columns import IS_INTERVENTION
from rllib_calql.datasets.episodes.step_infos import EXECUTED_ACTION, StepReports, not_finite, step_reports
from rllib_calql.learning.divergence import DivergenceWatch
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.resolution import REMEDY, remark_on_resolution
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.transitions import (
    NotFiniteError,
    check_storable,
    encoded_observations,
    num_replaced,
    transitions_from_episode,
    with_executed,
)

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

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
        action_space: The environment's.
        episode_limit_env_steps: Env steps after which episodes are cut.
        env: What messages call the environment.
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
        action_space: gym.spaces.Box,
        episode_limit_env_steps: int,
        env: str = "",
    ) -> None:
        self._store = store
        self._lifetime = lifetime
        self._divergence = divergence
        self._episode_returns = episode_returns
        self._add_returns = add_returns
        self._space = space
        self._action_space = action_space
        self._episode_limit_env_steps = episode_limit_env_steps
        self._env = f"Environment {env}" if env else "The environment"
        self._num_discarded = self._num_discarded_in_a_row = 0
        self._num_interventions = self._num_replaced = 0

    @property
    def num_discarded(self) -> int:
        """Episodes discarded over the lifetime."""
        return self._num_discarded

    def results(self) -> dict[str, Any]:
        """What a result says of the episodes, over the lifetime."""
        num_env_steps = self._lifetime.num_online_env_steps
        return {
            keys.NUM_DISCARDED_EPISODES_LIFETIME: self._num_discarded,
            keys.NUM_INTERVENTION_ENV_STEPS_LIFETIME: self._num_interventions,
            keys.NUM_REPLACED_ACTIONS_LIFETIME: self._num_replaced,
            keys.INTERVENTION_SHARE: self._num_interventions / num_env_steps if num_env_steps else 0.0,
        }

    def keep(self, episodes: Sequence[SingleAgentEpisode]) -> None:
        """Stores episodes that have ended.

        Raises:
            ValueError: If none of the last ten could be stored, or an executed action in the infos is of another shape
                than an action, or outside the bounds.
            TypeError: If an executed action is no array of numbers.
        """
        for episode in episodes:
            self._keep(episode)

    def _keep(self, episode: SingleAgentEpisode) -> None:
        settings = self._add_returns.settings
        reports = step_reports(
            episode.get_infos(), len(episode), self._action_space.shape, lambda step: self._where(episode, step)
        )
        self._add_returns(batch={}, episodes=[episode])
        asked_for = np.asarray(episode.get_actions()).reshape(len(episode), -1)
        try:
            actions = self._executed(episode, asked_for, reports)
            with np.errstate(over="ignore", invalid="ignore"):  # What overflows is found below.
                emitted = encoded_observations(episode, self._space)
                observations = emitted.astype(self._store.obs_dtype, copy=False)
                rows = transitions_from_episode(episode, observations=observations, actions=actions, settings=settings)
            check_storable(episode, observations, rows, settings)
        except NotFiniteError as error:
            self._discard(error)
            return
        if reports.is_intervention is not None:
            rows[IS_INTERVENTION] = reports.is_intervention
        if (remark := remark_on_resolution(emitted)) and log_once("calql_resolution"):
            logger.warning("%s; if that matters, %s. Said once.", remark, REMEDY)
        self._num_discarded_in_a_row = 0
        self._num_replaced += num_replaced(asked_for, rows[Columns.ACTIONS], reports.is_executed, self._action_space)
        self.keep_rows(rows, is_terminated=bool(episode.is_terminated))
        if len(episode) >= self._episode_limit_env_steps and episode.is_truncated and log_once("calql_cut"):
            logger.warning(
                "An episode was cut after %d env steps and stored as a truncated one; raise `max_episode_env_steps` if "
                "episodes are that long. Said once.",
                len(episode),
            )

    def keep_rows(self, rows: Mapping[str, Array], *, is_terminated: bool) -> None:
        """Stores the rows of one whole episode that have been checked.

        Args:
            rows: As `OnlineRing.append` takes them.
            is_terminated: Whether the episode ended by termination.
        """
        self._num_interventions += int(np.sum(rows.get(IS_INTERVENTION, 0)))
        self._store.add_online(rows)
        self._episode_returns.add(rows[Columns.RETURNS_TO_GO][0])
        returns, rewards, gamma = rows[Columns.RETURNS_TO_GO], rows[Columns.REWARDS], self._add_returns.settings.gamma
        lengths, terminateds = np.array([len(rewards)]), np.array([is_terminated])
        self._divergence.include(*possible_returns(returns, rewards, lengths, terminateds, gamma))
        self._lifetime.count_episode(len(rewards))

    def _executed(self, episode: SingleAgentEpisode, asked_for: Array, reports: StepReports) -> Array:
        """Module actions, both [T, A], with those in their place that the infos say were executed."""
        if reports.executed is None:
            return asked_for
        if (step := reports.first_not_finite()) is not None:
            raise NotFiniteError(f"{self._where(episode, step)}: {not_finite(reports.executed[step])}")
        return with_executed(
            asked_for,
            reports.executed,
            reports.is_executed,
            self._action_space,
            lambda step: f"{self._where(episode, step)}, `infos[{EXECUTED_ACTION!r}]`",
        )

    def _where(self, episode: SingleAgentEpisode, step: int) -> str:
        return f"{self._env}, episode {episode.id_}, step {step}"

    def _discard(self, error: ValueError) -> None:
        """A broken sensor costs an episode. An environment that is broken for good ends the run."""
        self._num_discarded += 1
        self._num_discarded_in_a_row += 1
        if self._num_discarded_in_a_row == _MAX_DISCARDED_IN_A_ROW:
            raise error
        logger.warning("An episode is discarded: %s", error)

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            keys.NUM_DISCARDED_EPISODES_LIFETIME: self._num_discarded,
            keys.NUM_INTERVENTION_ENV_STEPS_LIFETIME: self._num_interventions,
            keys.NUM_REPLACED_ACTIONS_LIFETIME: self._num_replaced,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint; empty in one of an earlier version."""
        self._num_discarded = state.get(keys.NUM_DISCARDED_EPISODES_LIFETIME, 0)
        self._num_interventions = state.get(keys.NUM_INTERVENTION_ENV_STEPS_LIFETIME, 0)
        self._num_replaced = state.get(keys.NUM_REPLACED_ACTIONS_LIFETIME, 0)
