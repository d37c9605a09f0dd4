"""Reads arrays of Stable-Baselines3's `ReplayBuffer` from `.npz`: (steps, environments, ...).

What these arrays say, and how that is understood here:

* Environments run side by side; the column of each is read by itself, as if it were a file of its own.
* `dones` is true for both kinds of end, and `timeouts` where it was a time-out: `dones` without `timeouts` is a
  termination.
* `actions` of a Box are what the policy put out, scaled to [-1, 1], not the environment's.
* A buffer that has wrapped round holds its oldest step at `pos` (with `full` true); one that is not full holds nothing
  from `pos` on. Save both beside the arrays. Without them, an observation that does not follow ends an episode, as in
  all rows without ids.

Source: Stable-Baselines3 2.9, `common/buffers.py` (`ReplayBuffer`) and `common/off_policy_algorithm.py`
(`_sample_action`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.datasets.episodes.reader import ReadOptions
from rllib_calql.datasets.rows.flat import FlatFile, FlatReader
from rllib_calql.datasets.rows.flat_columns import ArrayHeader, as_flags
from rllib_calql.datasets.rows.npz_files import NpzFile, open_npz

_OBS = "observations"
_NEEDED = (_OBS, "next_observations", "actions", "rewards", "dones", "timeouts")
_READ_BYTES = 4 * 2**20


def is_stable_baselines3(arrays: Mapping[str, ArrayHeader]) -> bool:
    """Whether an archive's arrays have an axis of environments behind that of steps."""
    rewards, actions = arrays.get("rewards"), arrays.get("actions")
    if rewards is None or actions is None or "dones" not in arrays:
        return False
    is_scalar = len(rewards.shape) >= 2 and math.prod(rewards.shape[2:]) == 1
    return is_scalar and len(actions.shape) >= 3 and actions.shape[:2] == rewards.shape[:2]


@dataclass(frozen=True)
class _Environment(DataFile):
    """The part of a file that belongs to one environment."""

    number: int = 0

    def __str__(self) -> str:
        return f"{self.path} (environment {self.number})"

    @property
    def file(self) -> DataFile:
        """The file."""
        return DataFile(self.path, self.filesystem)


class StableBaselines3Reader(FlatReader):
    """Episodes from replay buffers; those of one environment follow each other."""

    def __init__(self, name: str, files: Sequence[DataFile], options: ReadOptions) -> None:
        """Checks columns, types and lengths; see `FlatReader`.

        Raises:
            ValueError: If something is missing or damaged; the message names file and array.
        """
        self._bounds: dict[DataFile, tuple[int, int]] = {}
        environments: list[DataFile] = []
        for file in files:
            with open_npz(file) as opened:
                num_environments = _checked(file, opened)
                self._bounds[file] = _bounds(file, opened)
            environments += [_Environment(file.path, file.filesystem, number) for number in range(num_environments)]
        super().__init__(name, environments, options)
        # Those of discrete spaces are not scaled, which holds for both kinds.
        self.info = replace(self.info, actions="module")

    def fingerprint(self) -> str:
        """Digest of the files."""
        return fingerprint_of(self._bounds)

    @contextmanager
    def _open(self, file: DataFile) -> Iterator[FlatFile]:
        assert isinstance(file, _Environment)
        with open_npz(file.file) as opened:
            yield _EnvironmentColumns(file, opened, *self._bounds[file.file])


class _EnvironmentColumns(FlatFile):
    """One environment's rows, from the oldest on."""

    def __init__(self, file: _Environment, opened: NpzFile, oldest: int, num_rows: int) -> None:
        self._file = file
        self._opened = opened
        self._oldest = oldest
        self._num_rows = num_rows
        self._next_row: dict[str, int] = {}
        flags = {name: _flags(file, opened, name)[:, file.number] for name in ("dones", "timeouts")}
        rows = np.concatenate([np.arange(oldest, len(flags["dones"])), np.arange(oldest)])[:num_rows]
        dones, timeouts = flags["dones"][rows], flags["timeouts"][rows]
        self._flags: dict[str, NDArray[Any]] = {
            Columns.TERMINATEDS: dones & ~timeouts,
            Columns.TRUNCATEDS: dones & timeouts,
        }
        names = [name for name in opened.arrays if name.partition("/")[0] in (_OBS, "next_observations")]
        headers = {
            name: ArrayHeader((num_rows, *header.shape[2:]), header.dtype)
            for name in [*names, "actions", "rewards"]
            if (header := opened.arrays[name])
        }
        self.arrays = headers | {name: ArrayHeader((num_rows,), np.dtype(bool)) for name in self._flags}

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if name in self._flags:
            flags: NDArray[Any] = self._flags[name][start:stop]
            return flags
        # By their age: rows before the oldest one in the array are the youngest, and come last.
        size = self._opened.arrays[name].shape[0]
        first, last = start + self._oldest, stop + self._oldest
        pieces = [self._stored(name, first, min(last, size))] if first < size else []
        if last > size:
            pieces.append(self._stored(name, max(first - size, 0), last - size))
        return np.concatenate(pieces)

    def _stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """This environment's part of rows; an array is read in order, some megabytes of all environments at a time."""
        header = self._opened.arrays[name]
        size = max(_READ_BYTES // max(math.prod(header.shape[1:]) * header.dtype.itemsize, 1), 1)
        row = self._next_row.get(name, 0)
        row = row if row <= start else 0
        pieces = []
        while row < stop:
            end = min(row + size, start if row < start else stop)
            rows = self._opened.read(name, row, end)
            if row >= start:
                pieces.append(rows[:, self._file.number].copy())
            row = end
        self._next_row[name] = row
        return np.concatenate(pieces)


def _flags(file: DataFile, opened: NpzFile, name: str) -> NDArray[np.bool_]:
    """`dones` or `timeouts` of all environments, whole."""
    header = opened.arrays[name]
    if math.prod(header.shape) != math.prod(header.shape[:2]):
        raise ValueError(
            f"`{name}` in {str(file)!r} must hold one number per step and environment, got {header.dtype} of shape "
            f"{header.shape}; save that of the buffer."
        )
    size, count = header.shape[:2]
    values = opened.read(name, 0, size).reshape(-1)
    flags = as_flags(name, values, lambda place: f"row {place // count} of '{file.path} (environment {place % count})'")
    return flags.reshape(size, count)


def _checked(file: DataFile, opened: NpzFile) -> int:
    """Number of environments.

    Raises:
        ValueError: If an array is missing, or of another number of steps or environments.
    """
    arrays = opened.arrays
    tops = {name.partition("/")[0] for name in arrays}
    missing = [name for name in _NEEDED if name not in tops]
    if missing:
        why = {
            "timeouts": "; without it `dones` does not tell terminations from time-outs",
            "next_observations": "; it does not exist with `optimize_memory_usage=True`, whose last steps are lost",
        }.get(missing[0], "")
        raise ValueError(
            f"{str(file)!r} has `rewards` of shape {arrays['rewards'].shape}, steps by environments as in "
            f"Stable-Baselines3's replay buffers, and no array {', '.join(f'`{name}`' for name in missing)}{why}; save "
            f"{', '.join(f'`{name}`' for name in _NEEDED)} of the buffer, and `pos` and `full`."
        )
    expected = arrays["rewards"].shape[:2]
    for name, header in arrays.items():
        if header.dtype.kind not in "fiub" and name.partition("/")[0] in _NEEDED:
            raise ValueError(
                f"`{name}` must hold numbers, got {header.dtype.name} in {str(file)!r}; save numbers, as `.numpy()`."
            )
        if name.partition("/")[0] in _NEEDED and header.shape[:2] != expected:
            raise ValueError(
                f"`{name}` in {str(file)!r} has shape {header.shape}, and `rewards` {expected}, steps by environments; "
                "all arrays begin with these two axes: write the file again."
            )
    return expected[1]


def _bounds(file: DataFile, opened: NpzFile) -> tuple[int, int]:
    """The oldest row, and the number of rows that are filled."""
    size = opened.arrays["rewards"].shape[0]
    values = {}
    for name in ("pos", "full"):
        header = opened.arrays.get(name)
        if header is None:
            return 0, size
        if math.prod(header.shape) != 1 or header.dtype.kind not in "iub":
            raise ValueError(
                f"`{name}` in {str(file)!r} must be one number, got {header.dtype} of shape {header.shape}; save that "
                "of the buffer, or leave it out."
            )
        values[name] = int(opened.single(name))
    if not 0 <= values["pos"] <= size:
        raise ValueError(
            f"`pos` in {str(file)!r} must be in [0, {size}], got {values['pos']}; save that of the buffer."
        )
    return (values["pos"] % max(size, 1), size) if values["full"] else (0, values["pos"])
