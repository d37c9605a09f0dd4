"""Data of this process as values of a config: episodes, and data sets of Ray Data.

They travel with the config between processes and into checkpoints, as its other values do, and with a data set goes the
user's own program that makes it. Nothing here reads data.
"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from ray import cloudpickle
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

if TYPE_CHECKING:
    import ray.data

EPISODES_NAME = "SingleAgentEpisodes"
DATASET_NAME = "ray.data.Dataset"


class InMemoryEpisodes:
    """Episodes as a value of a config: copies of the config share them, and printing it does not print them.

    Attributes:
        episodes: Whole episodes, or their chunks in order of time.
    """

    def __init__(self, episodes: Sequence[SingleAgentEpisode]) -> None:
        """Keeps the episodes.

        Raises:
            TypeError: If an entry is anything else.
            ValueError: If there is none.
        """
        self.episodes = list(episodes)
        for number, episode in enumerate(self.episodes):
            if not isinstance(episode, SingleAgentEpisode):
                raise TypeError(
                    f"A list of episodes in `input_` must hold `SingleAgentEpisode`s only, got "
                    f"{type(episode).__name__} as entry {number}."
                )
        if not self.episodes:
            raise ValueError("`input_` holds an empty list of episodes; hand over at least one.")

    def __deepcopy__(self, memo: dict[int, Any]) -> InMemoryEpisodes:
        return self

    def __repr__(self) -> str:
        return f"<{len(self.episodes)} SingleAgentEpisodes>"


class InMemoryDataset:
    """A `ray.data.Dataset` as a value of a config: copies of the config share it.

    Unpickling leaves the data set packed until it is used: a checkpoint then needs no Ray session to be opened, nor the
    one in which the data were.
    """

    def __init__(self, dataset: ray.data.Dataset | None, packed: bytes = b"") -> None:
        """Keeps the data set.

        Args:
            dataset: Rows with the columns of Parquet files.
            packed: In place of a data set, the same pickled.
        """
        self._dataset = dataset
        self._packed = packed

    @property
    def dataset(self) -> ray.data.Dataset:
        """Rows with the columns of Parquet files.

        Raises:
            ValueError: If they went with the Ray session in which they were.
        """
        if self._dataset is None:
            try:
                self._dataset = pickle.loads(self._packed)
            # Ray and Ray Data raise what the loss of a session happens to cause.
            except Exception as err:
                raise ValueError(
                    f"The `{DATASET_NAME}` of this config cannot be read in another Ray session ({err}); hand it over "
                    "again: `algo = config.build()`, then `algo.restore_from_path(path)`; or keep such data in files."
                ) from err
        return self._dataset

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, self._packed if self._dataset is None else cloudpickle.dumps(self._dataset))

    def __deepcopy__(self, memo: dict[int, Any]) -> InMemoryDataset:
        return self

    def __repr__(self) -> str:
        return f"<{DATASET_NAME}>"


class DataHandle:
    """Stands for data of this process where they are not needed themselves: it is pickled without them."""

    def __init__(self, key: str) -> None:
        self._key = key

    def resolve(self) -> InMemoryEpisodes | InMemoryDataset:
        """The data.

        Raises:
            ValueError: In another process than the one that has them.
        """
        if self._key not in _HELD:
            raise ValueError("`input_` holds data of another process; hand them over again, or keep them in files.")
        return _HELD[self._key]


_HELD: WeakValueDictionary[str, InMemoryEpisodes | InMemoryDataset] = WeakValueDictionary()


def with_handles(input_: Any) -> Any:
    """`input_` of a config with handles in place of data."""
    if isinstance(input_, list):
        return [with_handles(part) for part in input_]
    if not isinstance(input_, (InMemoryEpisodes, InMemoryDataset)):
        return input_
    key = uuid.uuid4().hex
    _HELD[key] = input_
    return DataHandle(key)
