"""Reads local Minari data sets: `minari:<dataset id>`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tree
from numpy.typing import NDArray

from rllib_calql.common.spaces import leaves_of
from rllib_calql.datasets.episodes.boundaries import whole_episodes
from rllib_calql.datasets.episodes.chunks import Chunk, gather
from rllib_calql.datasets.episodes.columns import ALIASES
from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.datasets.episodes.reader import DatasetInfo, EpisodeBlock, EpisodeReader, ReadOptions
from rllib_calql.datasets.generated import catalog
from rllib_calql.datasets.readers.minari_episodes import stored_episodes
from rllib_calql.datasets.rows.flat_columns import as_flags
from rllib_calql.system.parsed_json import parsed_json
from rllib_calql.system.plain_names import refuse_unplain_id
from rllib_calql.system.similar_words import close_matches

SCHEME = "minari:"

_SPACES_OF_NUMBERS = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)

_UNFINISHED_REMEDY = "drop it or mark its last step"
_DAMAGED_REMEDY = "write or download the data set again."


class MinariReader(EpisodeReader):
    """Episodes of one local Minari data set, with environment actions and the observations' structure kept.

    A data set that this package generates is made on first use. Nothing is downloaded.

    Wanted entries of `infos` become `extra_model_outputs` if they are numbers, one per step. Minari stores one entry
    more, that of the reset, which is left out.
    """

    def __init__(self, dataset_id: str, options: ReadOptions) -> None:
        """Opens the data set.

        Args:
            dataset_id: Minari's id, without the scheme, e.g. "mujoco/pen/human-v0".
            options: How incomplete data are read.

        Raises:
            ImportError: If Minari is not installed.
            FileNotFoundError: If there is no such data set on this machine.
            ValueError: If it has no episodes, or cannot be read.
        """
        super().__init__()
        refuse_unplain_id(dataset_id, "The id of a Minari dataset")
        if catalog.is_generated(dataset_id):
            catalog.ensure_dataset(dataset_id)
        self._dataset, self._num_steps = _load(dataset_id)
        self._name = SCHEME + dataset_id
        self._options = options
        if self._dataset.total_episodes == 0 or self._num_steps == 0:
            raise ValueError(f"Dataset {dataset_id!r} is empty: it has no transitions; name one that has.")
        _refuse_spaces_without_numbers(self._dataset, self._name)
        self._infos, ignored = self._divide_infos()
        self.info = DatasetInfo(
            name=self._name,
            observation_space=self._dataset.observation_space,
            action_space=self._dataset.action_space,
            actions="environment",
            num_transitions=self._num_steps,
            reference_scores=_reference_scores(self._dataset.storage.metadata),
            ignored_columns=tuple(ignored),
            env_spec=self._dataset.env_spec,
        )

    def blocks(self) -> Iterator[EpisodeBlock]:
        """Yields the episodes by their number in the data set.

        Raises:
            ValueError: If an episode is not whole or holds numbers that are not finite, or steps are missing.
        """
        self.remarks.clear()
        num_steps = 0
        chunks = ([chunk] for episode in self._episodes() if (chunk := self._chunk(episode)) is not None)
        for rows in gather(chunks, unfinished_remedy=_UNFINISHED_REMEDY):
            num_steps += len(rows.rewards)
            block = whole_episodes(rows, self._options, self.remarks)
            if block is not None:
                yield block
        if num_steps != self._num_steps:
            raise ValueError(
                f"{self._name!r} has {num_steps} steps in {self._dataset.total_episodes} episodes, and "
                f"{self._num_steps} by its metadata; its files in {str(self._dataset.storage.data_path)!r} are "
                "damaged: delete the folder, then download or generate the data set again."
            )

    def fingerprint(self) -> str:
        """Digest of all files of the data set."""
        folder = Path(self._dataset.storage.data_path)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return fingerprint_of(DataFile(str(path)) for path in files)

    def _divide_infos(self) -> tuple[list[str], list[str]]:
        """Names of the infos that are read and that are not, judged by the first episode."""
        for episode in self._episodes(with_infos=True):
            num_steps = len(episode["rewards"])
            infos = dict(_flattened(episode["infos"] or {}))
            taken = [
                name
                for name, values in infos.items()
                if name not in ALIASES and self._options.wants(name) and _is_per_step(values, num_steps)
            ]
            return taken, [f"infos/{name}" for name in infos if name not in taken]
        return [], []

    def _episodes(self, *, with_infos: bool | None = None) -> Iterator[dict[str, Any]]:
        """Yields what Minari's storage yields; infos only where they are needed.

        Raises:
            ValueError: If the files are broken.
        """
        dataset = self._dataset
        with_infos = bool(self._infos) if with_infos is None else with_infos
        episodes = stored_episodes(dataset, with_infos=with_infos)
        for number in dataset.episode_indices:
            try:
                episode = next(episodes)
            except (ImportError, MemoryError):
                raise
            # Storage libraries report broken files by errors of every kind.
            except Exception as err:
                raise ValueError(
                    f"Episode {str(number)!r} of {self._name!r} cannot be read ({type(err).__name__}: {err}); its "
                    f"files in {str(dataset.storage.data_path)!r} are damaged: delete the folder, then download or "
                    "generate the data set again."
                ) from err
            yield episode

    def _chunk(self, episode: dict[str, Any]) -> Chunk | None:
        """What an episode holds; None if it has no step."""
        id_ = str(episode["id"])
        rewards = np.asarray(episode["rewards"])
        actions = tree.map_structure(np.asarray, episode["actions"])
        if not rewards.ndim or (not len(rewards) and any(array.size for array in tree.flatten(actions))):
            raise ValueError(
                f"Episode {id_!r} of {self._name!r} has actions, and no `rewards` of the same number; {_DAMAGED_REMEDY}"
            )
        num_steps = len(rewards)
        if not num_steps:
            return None
        infos = dict(_flattened(episode["infos"] or {})) if self._infos else {}
        for name in self._infos:
            if name not in infos or not _is_per_step(infos[name], num_steps):
                raise ValueError(
                    f"Episode {id_!r} of {self._name!r} has no `{name}` for every step among its infos, as the first "
                    "episode has; leave the column out."
                )
        return Chunk(
            id_=id_,
            observations=tree.map_structure(np.asarray, episode["observations"]),
            actions=actions,
            rewards=rewards,
            terminateds=self._flags(episode, "terminations", num_steps),
            truncateds=self._flags(episode, "truncations", num_steps),
            where=lambda step: f"step {step} of {self._name!r}",
            extra_model_outputs={name: np.asarray(infos[name])[-num_steps:] for name in self._infos},
        )

    def _flags(self, episode: dict[str, Any], name: str, num_steps: int) -> NDArray[np.bool_]:
        where = f"episode {str(episode['id'])!r} of {self._name!r}"
        values = np.asarray(episode[name])
        if values.shape not in ((num_steps,), (num_steps, 1)) or values.dtype.kind not in "biuf":
            raise ValueError(
                f"`{name}` of {where} must be {num_steps} booleans, one per reward, got {values.dtype} of shape "
                f"{values.shape}; {_DAMAGED_REMEDY}"
            )
        return as_flags(name, values, lambda step: f"step {step} of {where}")


def _flattened(infos: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, values in infos.items():
        if isinstance(values, dict):
            yield from _flattened(values, f"{prefix}{name}/")
        else:
            yield prefix + name, values


def _is_per_step(values: Any, num_steps: int) -> bool:
    return (
        isinstance(values, np.ndarray)
        and values.dtype.kind in "fiub"
        and values.ndim > 0
        and len(values) in (num_steps, num_steps + 1)
    )


def _refuse_spaces_without_numbers(dataset: Any, name: str) -> None:
    for what, space in (("observations", dataset.observation_space), ("actions", dataset.action_space)):
        for path, leaf in leaves_of(space):
            if not isinstance(leaf, _SPACES_OF_NUMBERS):
                part = f", part {path!r}," if path else ""
                raise ValueError(
                    f"Dataset {name!r}: its {what}{part} are of the space {leaf}, which is no vector of numbers of a "
                    "fixed length; write a data set without it, or with numbers in its place."
                )


def _reference_scores(metadata: dict[str, Any]) -> tuple[float, float] | None:
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return None
    try:
        scores = float(low), float(high)
    except OverflowError:  # JSON holds whole numbers of any size.
        return None
    return scores if all(map(math.isfinite, scores)) else None


def _check_metadata(file: Path) -> None:
    """Refuses a data set without spaces: Minari would make the environment that the file names, whatever that runs."""
    if not file.is_file():
        return
    metadata = parsed_json(file.read_bytes())
    missing = [name for name in ("observation_space", "action_space") if not isinstance(metadata.get(name), str)]
    if missing:
        raise ValueError(
            f"{file} does not state the {' and '.join(missing)}, and the environment that it names is not made, since "
            "that would run what a data file says; write the data set again with Minari 0.5 or newer"
        )


def check_dataset(dataset_id: str) -> None:
    """Checks that a data set is on this machine or can be generated here.

    Raises:
        ImportError: If a package is missing.
        FileNotFoundError: If there is no such data set on this machine.
        ValueError: If the id is none, or the data set cannot be opened.
    """
    refuse_unplain_id(dataset_id, "The id of a Minari dataset")
    if catalog.is_generated(dataset_id):
        catalog.check_packages(dataset_id)
    else:
        _load(dataset_id)


def _load(dataset_id: str) -> tuple[Any, int]:
    """The data set and the number of its steps."""
    try:
        import minari
    except ImportError as err:
        raise ImportError('Reading Minari data needs the `minari` package: pip install "rllib-calql[minari]"') from err
    try:
        _check_metadata(minari.storage.get_dataset_path(dataset_id) / "data" / "metadata.json")
        dataset = minari.load_dataset(dataset_id)
        return dataset, int(dataset.total_steps)
    except FileNotFoundError as err:
        known = [*minari.list_local_datasets(), *catalog.generated_dataset_ids()]
        raise FileNotFoundError(
            f"There is no Minari dataset {dataset_id!r} on this machine.{close_matches(dataset_id, known)} "
            "`rllib dataset list` shows those that are here or can be generated; those that the Minari project hosts "
            f"are fetched with: minari download {dataset_id}"
        ) from err
    except ImportError:
        raise
    except Exception as err:
        raise ValueError(
            f"Dataset {dataset_id!r} cannot be opened ({type(err).__name__}: {err}); if its id is right, its files are "
            "damaged: delete its folder, then download or generate it again."
        ) from err
