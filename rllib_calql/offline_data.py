"""`CalQLOfflineData`: from `input_` to the store's offline columns, by way of whole episodes and `AddReturnsToGo`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.offline.offline_data import OfflineData
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.annotations import override

from rllib_calql.config import CalQLConfig
from rllib_calql.config_checks import check_action_space
from rllib_calql.connectors import AddReturnsToGo
from rllib_calql.datasets import DatasetInfo, EpisodeReader, open_input
from rllib_calql.replay import TransitionStore
from rllib_calql.transitions import (
    check_module_actions,
    flat_size,
    flatten_observations,
    is_flat,
    to_module_actions,
    transitions_from_episode,
)

logger = logging.getLogger(__name__)


class CalQLOfflineData(OfflineData):
    """Reads `config.input_` into a `TransitionStore`.

    RLlib's own pipeline is not used: it turns every row into an episode of one step, which has no return-to-go, and
    serves the same rows in the same order in every epoch.

    Args:
        config: The algorithm's config.

    Raises:
        FileNotFoundError: If an input does not exist; the message names close matches.
        ValueError: If inputs disagree on spaces, or no spaces are known.
    """

    def __init__(self, config: CalQLConfig) -> None:
        # RLlib's constructor would start reading with Ray Data; only what `Algorithm.setup` sets is declared here.
        self.config = config
        self.locality_hints: list[str] | None = None
        self.learner_handles: list[Any] | None = None
        self.module_spec: Any = None
        self.spaces: dict[str, Any] | None = None
        self.store: TransitionStore | None = None
        self.readers: list[EpisodeReader] = open_input(config.input_)

    @property
    def observation_space(self) -> gym.Space[Any] | None:
        """Observation space that the data's metadata state, or None."""
        return next((r.info.observation_space for r in self.readers if r.info.observation_space is not None), None)

    @property
    def action_space(self) -> gym.Space[Any] | None:
        """Action space that the data's metadata state, or None."""
        return next((r.info.action_space for r in self.readers if r.info.action_space is not None), None)

    @property
    def reference_scores(self) -> tuple[float, float] | None:
        """Returns of a random and of a reference policy in the data's metadata, for the normalised score."""
        return next((r.info.reference_scores for r in self.readers if r.info.reference_scores is not None), None)

    def load(
        self,
        store: TransitionStore,
        connector: AddReturnsToGo,
        *,
        observation_space: gym.Space[Any],
        action_space: gym.spaces.Box,
    ) -> None:
        """Reads everything into `store`.

        Args:
            store: Receives the offline rows.
            connector: Attaches returns.
            observation_space: The environment's (or configured) observation space, before flattening.
            action_space: The environment's (or configured) action space.

        Raises:
            ValueError: If the data's spaces differ, an action is out of bounds, or there is nothing to read.
        """
        check_action_space(action_space, "The action space")
        for reader in self.readers:
            _check_spaces(reader.info, observation_space, action_space)
        known = [reader.info.num_transitions for reader in self.readers]
        if all(count is not None for count in known):
            store.reserve_offline(sum(count or 0 for count in known))
        for reader in self.readers:
            for episode in reader:
                connector(batch={}, episodes=[episode])
                store.add_offline(self._rows(reader.info, episode, observation_space, action_space, connector))
        if store.num_offline == 0:
            raise ValueError(f"`input_` {self.config.input_!r} holds no transition.")
        self.store = store
        logger.info("Loaded %d offline transitions from %s.", store.num_offline, self.config.input_)

    def _rows(
        self,
        info: DatasetInfo,
        episode: SingleAgentEpisode,
        observation_space: gym.Space[Any],
        action_space: gym.spaces.Box,
        connector: AddReturnsToGo,
    ) -> dict[str, Any]:
        where = f"Dataset {info.name!r}, episode {episode.id_}"
        try:
            observations = flatten_observations(observation_space, episode.get_observations())
        except (ValueError, TypeError, IndexError, KeyError) as err:
            raise ValueError(
                f"{where}: observations do not fit the observation space {observation_space}: {err}"
            ) from err
        _check_size(where, "observations", observations.shape[1], flat_size(observation_space))
        actions = np.asarray(episode.get_actions()).reshape(len(episode), -1)
        _check_size(where, "actions", actions.shape[1], flat_size(action_space))
        if info.actions == "module":
            # RLlib clips what a policy without bounds proposes only on the way to the environment, after recording.
            actions = np.clip(actions, -1.0, 1.0)
        elif self.config.action_space_of_data == "module":
            actions = check_module_actions(actions, where)
        else:
            actions = to_module_actions(actions, action_space, where)
        return transitions_from_episode(
            episode, observations=observations, actions=actions, settings=connector.settings
        )

    @override(OfflineData)
    def sample(
        self, num_samples: int, return_iterator: bool = False, num_shards: int = 1, module_state: Any = None
    ) -> MultiAgentBatch | Iterator[MultiAgentBatch]:
        """Draws offline rows uniformly, by RLlib's signature.

        Args:
            num_samples: Rows of one batch.
            return_iterator: Whether to return an endless iterator over batches instead of one batch.
            num_shards: Accepted for RLlib's signature; every learner draws its own rows.
            module_state: Accepted for RLlib's signature.

        Returns:
            A batch, or the iterator.
        """
        return self._batches(num_samples) if return_iterator else next(self._batches(num_samples))

    def _batches(self, num_samples: int) -> Iterator[MultiAgentBatch]:
        if self.store is None:
            raise RuntimeError("The offline data have not been loaded; build the algorithm first.")
        while True:
            columns = self.store.sample(num_batches=1, batch_size=num_samples, num_offline_rows=num_samples)
            yield as_multi_agent_batch(columns)


def with_spaces_of_data(config: CalQLConfig) -> CalQLConfig:
    """Completes a config without an environment: its spaces are those set, else those of the data's metadata.

    Raises:
        ValueError: If neither states them.
    """
    if config.observation_space is not None and config.action_space is not None:
        return config
    data = CalQLOfflineData(config)
    completed: CalQLConfig = config.copy(copy_frozen=False)
    completed.observation_space = config.observation_space or data.observation_space
    completed.action_space = config.action_space or data.action_space
    missing = [name for name in ("observation_space", "action_space") if getattr(completed, name) is None]
    if missing:
        raise ValueError(
            f"There is no environment and the data do not state their {' and '.join(missing)}; set "
            "`.environment(observation_space=..., action_space=...)`."
        )
    completed.freeze()
    return completed


def as_multi_agent_batch(columns: dict[str, Any]) -> MultiAgentBatch:
    """Columns of the default module as the container that RLlib's learner group takes."""
    from ray.rllib.core import DEFAULT_MODULE_ID

    return MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(columns)}, len(next(iter(columns.values()))))


def _check_size(where: str, what: str, size: int, expected: int) -> None:
    if size != expected:
        raise ValueError(
            f"{where}: {what} have {size} numbers, the environment's have {expected}; use the environment the data "
            "come from, or convert the data."
        )


def _check_spaces(info: DatasetInfo, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
    """Compares the spaces in the metadata with the environment's: structure and sizes, for actions also bounds."""
    for kind, recorded, actual in (
        ("observation", info.observation_space, observation_space),
        ("action", info.action_space, action_space),
    ):
        if recorded is not None and not _is_compatible(recorded, actual, with_bounds=kind == "action"):
            raise ValueError(
                f"Dataset {info.name!r} has {kind} space {recorded}, the environment has {actual}; "
                "use the environment the data come from, or convert the data."
            )


def _is_compatible(recorded: gym.Space[Any], actual: gym.Space[Any], *, with_bounds: bool) -> bool:
    if not with_bounds and is_flat(recorded) and recorded.shape == (flat_size(actual),):
        return True  # Recorded behind RLlib's `FlattenObservations`.
    if isinstance(actual, gym.spaces.Dict):
        return (
            isinstance(recorded, gym.spaces.Dict)
            and recorded.spaces.keys() == actual.spaces.keys()
            and all(_is_compatible(recorded[key], actual[key], with_bounds=with_bounds) for key in actual.spaces)
        )
    if isinstance(actual, gym.spaces.Tuple):
        return (
            isinstance(recorded, gym.spaces.Tuple)
            and len(recorded) == len(actual)
            and all(_is_compatible(a, b, with_bounds=with_bounds) for a, b in zip(recorded, actual, strict=True))
        )
    if isinstance(actual, gym.spaces.Box):
        if not isinstance(recorded, gym.spaces.Box) or recorded.shape != actual.shape:
            return False
        return not with_bounds or (np.allclose(recorded.low, actual.low) and np.allclose(recorded.high, actual.high))
    return bool(recorded == actual)
