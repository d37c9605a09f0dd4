"""Episodes as Minari's storages yield them, after a look at what is stored: numbers and text, in the data set's files.

Whatever is refused raises an error that says why; the caller names the episode and the data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rllib_calql.datasets.episodes.reader import Nested
from rllib_calql.datasets.rows.hdf5_entries import (
    array_in,
    check_stored,
    group_in,
    refuse_link_to_file,
    refuse_other_file,
)

_EPISODES_PER_OPENING = 100  # HDF5 keeps 60 kB of every object that was opened, until its file is closed.


def stored_episodes(dataset: Any, *, with_infos: bool) -> Iterator[dict[str, Any]]:
    """Yields what the `get_episodes` of a data set's storage yields; without infos unless they are wanted.

    Raises:
        ValueError: If something else than numbers and text is stored, or elsewhere than in the data set's files.
        Exception: Whatever the storage's libraries make of damaged files.
    """
    return _hdf5_episodes(dataset) if not with_infos and _is_plain_hdf5(dataset) else _minari_episodes(dataset)


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
    if dataset.storage.FORMAT != "hdf5":
        _check_plain_columns(dataset)
        yield from dataset.storage.get_episodes(dataset.episode_indices)
        return
    import h5py

    episodes = iter(dataset.storage.get_episodes(dataset.episode_indices))
    with h5py.File(Path(dataset.storage.data_path) / "main_data.hdf5", "r") as file:
        for number in dataset.episode_indices:
            _check_entry(h5py, file, f"episode_{number}")
            yield next(episodes)


def _check_entry(h5py: Any, group: Any, name: str) -> None:
    """Checks what stands under a name of a group, and all below it."""
    refuse_link_to_file(h5py, group.id, name.encode())
    entry = group[name]
    refuse_other_file(h5py, group.id, entry.id, name)
    if isinstance(entry, h5py.Group):
        for inner in entry:
            _check_entry(h5py, entry, inner)
    else:
        check_stored(h5py, entry.id, name)


def _check_plain_columns(dataset: Any) -> None:
    """Refuses types that others have registered with Arrow, which may unpickle what is stored."""
    import pyarrow as pa
    import pyarrow.dataset

    def is_plain(type_: Any) -> bool:
        if isinstance(type_, pa.BaseExtensionType):
            return False
        if pa.types.is_dictionary(type_):
            return is_plain(type_.value_type)
        return all(is_plain(type_.field(i).type) for i in range(type_.num_fields))

    folder = Path(dataset.storage.data_path)
    for number in dataset.episode_indices:
        part = pyarrow.dataset.dataset(
            str(folder / str(number)), format=dataset.storage.FORMAT, ignore_prefixes=["_", ".", "metadata.json"]
        )
        for field in part.schema:
            if not is_plain(field.type):
                raise ValueError(f"`{field.name}` holds {field.type}, where only numbers and text are read")


def _hdf5_episodes(dataset: Any) -> Iterator[dict[str, Any]]:
    """The same as Minari's `get_episodes`, four times as fast for many short episodes."""
    import h5py

    path = Path(dataset.storage.data_path) / "main_data.hdf5"
    numbers = dataset.episode_indices
    for start in range(0, len(numbers), _EPISODES_PER_OPENING):
        with h5py.File(path, "r") as file:
            for number in numbers[start : start + _EPISODES_PER_OPENING]:
                group = group_in(h5py, file.id, b"episode_%d" % number)
                flags = ("rewards", "terminations", "truncations")
                yield {
                    "id": number,
                    "observations": _hdf5_values(h5py, group, b"observations", dataset.observation_space),
                    "actions": _hdf5_values(h5py, group, b"actions", dataset.action_space),
                    "infos": None,
                    **{name: array_in(h5py, group, name.encode()) for name in flags},
                }


def _hdf5_values(h5py: Any, group: Any, name: bytes, space: gym.Space[Any]) -> Nested:
    if isinstance(space, gym.spaces.Dict):
        inner = group_in(h5py, group, name)
        return {key: _hdf5_values(h5py, inner, key.encode(), part) for key, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        inner = group_in(h5py, group, name)
        return tuple(_hdf5_values(h5py, inner, b"_index_%d" % i, part) for i, part in enumerate(space.spaces))
    return array_in(h5py, group, name)
