"""Reads local Minari data sets: `minari:<dataset id>`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tree
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.datasets import catalog
from rllib_calql.datasets.episodes import DatasetInfo, EpisodeBlock, Nested, close_matches, episodes_of

SCHEME = "minari:"


class MinariReader:
    """Episodes of one local Minari data set, with environment actions and the observations' structure kept.

    A data set that this package generates is made on first use. Nothing is downloaded.
    """

    def __init__(self, dataset_id: str) -> None:
        """Opens the data set.

        Args:
            dataset_id: Minari's id, without the scheme, e.g. "mujoco/pen/human-v0".

        Raises:
            ImportError: If Minari is not installed.
            FileNotFoundError: If there is no such data set on this machine.
            ValueError: If it has no episodes.
        """
        if catalog.is_generated(dataset_id):
            catalog.ensure_dataset(dataset_id)
        self._dataset = _load(dataset_id)
        self.info = DatasetInfo(
            name=SCHEME + dataset_id,
            observation_space=self._dataset.observation_space,
            action_space=self._dataset.action_space,
            actions="environment",
            num_transitions=self._dataset.total_steps,
            reference_scores=_reference_scores(self._dataset.storage.metadata),
        )
        if self._dataset.total_episodes == 0 or self._dataset.total_steps == 0:
            raise ValueError(f"Dataset {dataset_id!r} is empty: it has no transitions.")

    def __iter__(self) -> Iterator[SingleAgentEpisode]:
        """Yields the episodes by their number in the data set.

        Raises:
            ValueError: If an episode is not whole or holds numbers that are not finite.
        """
        for episode in self._dataset.iterate_episodes():
            if len(episode.rewards):
                yield from episodes_of(self._block(episode))

    def _block(self, episode: Any) -> EpisodeBlock:
        id_ = str(episode.id)
        num_steps = len(episode.rewards)
        for array in tree.flatten(episode.observations):
            if len(array) != num_steps + 1:
                raise ValueError(
                    f"Episode {id_!r} of {self.info.name!r} has {num_steps} rewards and {len(array)} observations; "
                    "there must be one observation more than rewards."
                )
        return EpisodeBlock(
            ids=[id_],
            lengths=np.array([num_steps]),
            observations=_rows(episode.observations, slice(None, -1)),
            next_observations=_rows(episode.observations, slice(1, None)),
            actions=_rows(episode.actions, slice(None)),
            rewards=np.asarray(episode.rewards),
            terminateds=np.asarray(episode.terminations, dtype=bool),
            truncateds=np.asarray(episode.truncations, dtype=bool),
            where=lambda row: f"step {row} of {self.info.name!r}",
        )


def _rows(values: Nested, rows: slice) -> Nested:
    return tree.map_structure(lambda array: np.asarray(array)[rows], values)


def _reference_scores(metadata: dict[str, Any]) -> tuple[float, float] | None:
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return None if low is None or high is None else (float(low), float(high))


def _load(dataset_id: str) -> Any:
    try:
        import minari
    except ImportError as err:
        raise ImportError(
            'Reading Minari data needs the `minari` package: pip install "rllib-calql[examples]"'
        ) from err
    try:
        return minari.load_dataset(dataset_id)
    except FileNotFoundError as err:
        known = [*minari.list_local_datasets(), *catalog.generated_dataset_ids()]
        raise FileNotFoundError(
            f"There is no Minari dataset {dataset_id!r} on this machine.{close_matches(dataset_id, known)} "
            f"Datasets that the Minari project hosts are fetched with: minari download {dataset_id}"
        ) from err
