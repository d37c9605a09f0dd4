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

from rllib_calql.datasets import catalog
from rllib_calql.datasets.boundaries import whole_episodes
from rllib_calql.datasets.chunks import Chunk, gather
from rllib_calql.datasets.columns import ALIASES
from rllib_calql.datasets.episodes import DatasetInfo, EpisodeBlock, EpisodeReader, Nested, ReadOptions, close_matches
from rllib_calql.datasets.files import DataFile, fingerprint_of
from rllib_calql.datasets.flat_columns import as_flags
from rllib_calql.plain_names import refuse_unplain_id

SCHEME = "minari:"

# What deflate reaches at most; beyond it, the size in the file is damaged, and allocating it would end the program.
_EPISODES_PER_OPENING = 100  # HDF5 keeps 60 kB of every object that was opened, until its file is closed.
_MAX_COMPRESSION = 1032
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
        episodes = _hdf5_episodes(dataset) if not with_infos and _is_plain_hdf5(dataset) else _minari_episodes(dataset)
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


def _is_plain_hdf5(dataset: Any) -> bool:
    """Whether episodes are stored as plain HDF5 arrays: no images, which Minari may encode, and no text."""
    if dataset.storage.FORMAT != "hdf5":
        return False

    def is_plain(space: gym.Space[Any]) -> bool:
        if isinstance(space, gym.spaces.Dict):
            return all(map(is_plain, space.spaces.values()))
        if isinstance(space, gym.spaces.Tuple):
            return all(map(is_plain, space.spaces))
        if isinstance(space, gym.spaces.Box):
            return space.dtype != np.uint8
        return isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary))

    return is_plain(dataset.observation_space) and is_plain(dataset.action_space)


def _minari_episodes(dataset: Any) -> Iterator[dict[str, Any]]:
    """Minari's `get_episodes`, after a look at the sizes of the arrays that it will make."""
    episodes = iter(dataset.storage.get_episodes(dataset.episode_indices))
    if dataset.storage.FORMAT != "hdf5":
        yield from episodes
        return
    import h5py

    def check(name: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset):
            _check_size(h5py, entry.id, name)

    with h5py.File(Path(dataset.storage.data_path) / "main_data.hdf5", "r") as file:
        for number in dataset.episode_indices:
            file[f"episode_{number}"].visititems(check)
            yield next(episodes)


def _hdf5_episodes(dataset: Any) -> Iterator[dict[str, Any]]:
    """The same as Minari's `get_episodes`, four times as fast for many short episodes."""
    import h5py

    path = Path(dataset.storage.data_path) / "main_data.hdf5"
    numbers = dataset.episode_indices
    for start in range(0, len(numbers), _EPISODES_PER_OPENING):
        with h5py.File(path, "r") as file:
            for number in numbers[start : start + _EPISODES_PER_OPENING]:
                group = h5py.h5g.open(file.id, b"episode_%d" % number)
                flags = ("rewards", "terminations", "truncations")
                yield {
                    "id": number,
                    "observations": _hdf5_values(h5py, group, b"observations", dataset.observation_space),
                    "actions": _hdf5_values(h5py, group, b"actions", dataset.action_space),
                    "infos": None,
                    **{name: _hdf5_array(h5py, group, name.encode()) for name in flags},
                }


def _hdf5_values(h5py: Any, group: Any, name: bytes, space: gym.Space[Any]) -> Nested:
    if isinstance(space, gym.spaces.Dict):
        inner = h5py.h5g.open(group, name)
        return {key: _hdf5_values(h5py, inner, key.encode(), part) for key, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        inner = h5py.h5g.open(group, name)
        return tuple(_hdf5_values(h5py, inner, b"_index_%d" % i, part) for i, part in enumerate(space.spaces))
    return _hdf5_array(h5py, group, name)


def _hdf5_array(h5py: Any, group: Any, name: bytes) -> NDArray[Any]:
    stored = h5py.h5d.open(group, name)
    _check_size(h5py, stored, name.decode())
    values = np.empty(stored.shape, stored.dtype)
    stored.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def _check_size(h5py: Any, stored: Any, name: str) -> None:
    """Refuses an array of more bytes than the file can hold."""
    num_bytes = math.prod(stored.shape) * stored.dtype.itemsize
    if num_bytes > 2**30:
        # The size of an array that is stored in one piece is computed from its shape, so it may be damaged as well.
        held = min(stored.get_storage_size(), h5py.h5i.get_file_id(stored).get_filesize())
        if num_bytes > _MAX_COMPRESSION * held:
            raise ValueError(f"`{name}` claims {num_bytes} bytes and holds {held}")


def _reference_scores(metadata: dict[str, Any]) -> tuple[float, float] | None:
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    are_numbers = all(isinstance(score, (int, float)) and math.isfinite(score) for score in (low, high))
    return (float(low), float(high)) if are_numbers else None  # type: ignore[arg-type]


def _load(dataset_id: str) -> tuple[Any, int]:
    """The data set and the number of its steps."""
    try:
        import minari
    except ImportError as err:
        raise ImportError('Reading Minari data needs the `minari` package: pip install "rllib-calql[minari]"') from err
    try:
        dataset = minari.load_dataset(dataset_id)
        return dataset, int(dataset.total_steps)
    except FileNotFoundError as err:
        known = [*minari.list_local_datasets(), *catalog.generated_dataset_ids()]
        raise FileNotFoundError(
            f"There is no Minari dataset {dataset_id!r} on this machine.{close_matches(dataset_id, known)} "
            f"Datasets that the Minari project hosts are fetched with: minari download {dataset_id}"
        ) from err
    except ImportError:
        raise
    except Exception as err:
        raise ValueError(
            f"Dataset {dataset_id!r} cannot be opened ({type(err).__name__}: {err}); if its id is right, its files are "
            "damaged: delete its folder, then download or generate it again."
        ) from err
