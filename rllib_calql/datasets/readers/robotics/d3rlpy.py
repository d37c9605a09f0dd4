"""Reads what d3rlpy's `ReplayBuffer.dump` writes: HDF5 with `observations_0`, `actions_0`, `rewards_0`, `terminated_0`.

An episode holds as many observations as actions, so that none follows its last action. An episode that was not
terminated was cut; d3rlpy has no transition for its last step either (`Episode.transition_count`).

Source: d3rlpy 2.8, `dataset/io.py` and `dataset/components.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.files import DataFile
from rllib_calql.datasets.episodes.reader import ReadOptions
from rllib_calql.datasets.readers.robotics.hdf5_parts import (
    Episodes,
    EpisodesReader,
    Hdf5Arrays,
    lengths_of,
    open_arrays,
)
from rllib_calql.datasets.rows.flat_columns import as_flags

_ACTIONS = re.compile(r"actions_(\d+)")
_COUNT = "num_episodes"


def is_d3rlpy(file: DataFile) -> bool:
    """Whether an HDF5 file holds one array of actions per episode at its root.

    Raises:
        ValueError: If it is no HDF5 file.
    """
    with open_arrays(file) as arrays:
        names = arrays.names("")
    return "actions" not in names and (any(map(_ACTIONS.fullmatch, names)) or {"columns", _COUNT} <= set(names))


class D3rlpyReader(EpisodesReader):
    """Episodes from d3rlpy's files; tuples of observations stay tuples."""

    def __init__(self, name: str, files: Sequence[DataFile], options: ReadOptions) -> None:
        """Checks columns, types and lengths, and reads where episodes end; see `FlatReader`.

        Raises:
            ImportError: If `h5py` is not installed.
            ValueError: If something is missing or damaged; the message names file and array.
        """
        self._layouts = {}
        super().__init__(name, self._filled(name, files), options)

    def _count(self, file: DataFile, arrays: Hdf5Arrays) -> int:
        return sum(_ACTIONS.fullmatch(name) is not None for name in arrays.names(""))

    def _episodes(self, file: DataFile, arrays: Hdf5Arrays) -> Episodes:
        names = set(arrays.names(""))
        count = self._count(file, arrays)
        told = _told_count(file, arrays) if _COUNT in names else count
        missing = [f"actions_{i}" for i in range(max(count, told)) if f"actions_{i}" not in names]
        if missing or told != count:
            raise ValueError(
                f"{str(file)!r} holds {count} episodes and {told} by its `{_COUNT}`"
                f"{f'; `{missing[0]}` is missing' if missing else ''}; write it again."
            )
        lengths = lengths_of(file, arrays, [f"actions_{i}" for i in range(count)])
        terminated = np.concatenate([_flag(file, arrays, f"terminated_{i}") for i in range(count)])
        paths: dict[str, list[list[str]]] = {}
        for column, stored in (
            (Columns.OBS, "observations"),
            (Columns.ACTIONS, "actions"),
            (Columns.REWARDS, "rewards"),
        ):
            parts = sorted(
                (int(found[1]) for name in names if (found := re.fullmatch(rf"{stored}_0_(\d+)", name))),
            )
            if parts != list(range(len(parts))):
                lacking = min(set(range(len(parts))) - set(parts))
                raise ValueError(
                    f"{str(file)!r} has no array `{stored}_0_{lacking}`, and `{stored}_0_{parts[-1]}`; write it again."
                )
            if parts:
                paths |= {f"{column}/{j}": [[f"{stored}_{i}_{j}"] for i in range(count)] for j in parts}
            else:
                paths[column] = [[f"{stored}_{i}"] for i in range(count)]
        ends = np.zeros((2, int(lengths.sum())), dtype=bool)
        has_rows = lengths > 0
        last_rows = np.cumsum(lengths)[has_rows] - 1
        ends[0, last_rows], ends[1, last_rows] = terminated[has_rows], ~terminated[has_rows]
        return Episodes(
            ids=[self._id(file, str(i)) for i in range(count)],
            sizes=lengths,
            lengths=lengths,
            paths=paths,
            flags={Columns.TERMINATEDS: ends[0], Columns.TRUNCATEDS: ends[1]},
        )


def _told_count(file: DataFile, arrays: Hdf5Arrays) -> int:
    header = arrays.header(_COUNT)
    if header is None or header.dtype.kind not in "iu" or math.prod(header.shape) != 1:
        found = "a group" if header is None else f"{header.dtype.name} of shape {header.shape}"
        raise ValueError(f"`{_COUNT}` in {str(file)!r} must be one whole number, got {found}; write the file again.")
    return int(arrays.whole(_COUNT).reshape(-1)[0])


def _flag(file: DataFile, arrays: Hdf5Arrays, path: str) -> NDArray[np.bool_]:
    """One flag, as an array of one."""
    header = arrays.header(path)
    if header is None or header.dtype.kind not in "fiub" or math.prod(header.shape) != 1:
        found = "none" if header is None else f"{header.dtype.name} of shape {header.shape}"
        raise ValueError(f"`{path}` in {str(file)!r} must hold numbers, one flag, got {found}; write the file again.")
    return as_flags(path, arrays.whole(path).reshape(1), lambda _: repr(str(file)))
