"""HDF5 files that hold every episode apart: their arrays by path, and the joined columns of all episodes.

Axes: R rows of a file, E episodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.files import DataFile
from rllib_calql.datasets.rows.flat import FlatFile, FlatReader, reading
from rllib_calql.datasets.rows.flat_columns import ArrayHeader, as_flags
from rllib_calql.datasets.rows.hdf5_entries import array_in, dataset_in, group_in

_FORMAT = "HDF5"
_MAX_OPENED = 5_000  # HDF5 keeps some 60 kB of every object that was opened, until its file is closed.

Bools = NDArray[np.bool_]


class Hdf5Arrays:
    """The arrays of an open file by their path; none is followed to another file, or unpickled."""

    def __init__(self, file: DataFile) -> None:
        """Opens nothing yet; made by `open_arrays`."""
        try:
            import h5py
        except ImportError as err:
            raise ImportError('Reading HDF5 files needs the `h5py` package: pip install "rllib-calql[hdf5]"') from err
        self._h5py = h5py
        self._file = file
        self._source: Any = None
        self._root: Any = None
        self._num_opened = 0

    def names(self, path: str) -> list[str]:
        """What a group holds, in natural order of HDF5; nothing if there is no such group."""
        with reading(self._file, _FORMAT):
            group = self._group(path)
            return [] if group is None else [name.decode() for name in group]

    def attribute(self, path: str, name: str) -> Any:
        """An attribute of a group; None if it has none of this name."""
        with reading(self._file, _FORMAT):
            group = self._group(path)
            return None if group is None else self._h5py.Group(group).attrs.get(name)

    def header(self, path: str) -> ArrayHeader | None:
        """Shape and type of an array; None if there is none, or a group, at the path."""
        with reading(self._file, _FORMAT):
            stored = self._dataset(path)
            return None if stored is None else ArrayHeader(tuple(stored.shape), stored.dtype)

    def whole(self, path: str) -> NDArray[Any]:
        """An array, whole."""
        with reading(self._file, _FORMAT):
            folder, _, name = path.rpartition("/")
            group = self._group(folder)
            self._num_opened += 1
            return array_in(self._h5py, group, name.encode())

    def rows(self, path: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of an array, in native byte order."""
        with reading(self._file, _FORMAT):
            rows = np.asarray(self._h5py.Dataset(self._dataset(path))[start:stop])
            if len(rows) != stop - start:
                raise EOFError(f"`{path}` ends after row {start + len(rows)}")
            return rows.astype(rows.dtype.newbyteorder("="), copy=False)

    def open(self) -> None:
        """Opens the file, again if it is open."""
        self.close()
        with reading(self._file, _FORMAT):
            local = self._file.local_path
            self._source = self._file.open() if local is None else None
            self._root = self._h5py.File(self._source or local, "r")

    def close(self) -> None:
        """Closes the file."""
        for opened in (self._root, self._source):
            if opened is not None:
                opened.close()
        self._root = self._source = None
        self._num_opened = 0

    def _group(self, path: str) -> Any:
        if self._num_opened > _MAX_OPENED:
            self.open()
        group = self._h5py.h5g.open(self._root.id, b"/")
        for name in path.split("/") if path else []:
            if not group.links.exists(name.encode()) or not self._is_a(group, name, self._h5py.h5o.TYPE_GROUP):
                return None
            group = group_in(self._h5py, group, name.encode())
            self._num_opened += 1
        return group

    def _dataset(self, path: str) -> Any:
        folder, _, name = path.rpartition("/")
        group = self._group(folder)
        if group is None or not group.links.exists(name.encode()):
            return None
        if not self._is_a(group, name, self._h5py.h5o.TYPE_DATASET):
            return None
        self._num_opened += 1
        return dataset_in(self._h5py, group, name.encode())

    def _is_a(self, group: Any, name: str, type_: int) -> bool:
        link = group.links.get_info(name.encode()).type
        # What other files hold is refused where it is opened.
        return bool(link != self._h5py.h5l.TYPE_HARD or self._h5py.h5o.get_info(group, name.encode()).type == type_)


@contextmanager
def open_arrays(file: DataFile) -> Iterator[Hdf5Arrays]:
    """Opens a file.

    Raises:
        ImportError: If `h5py` is not installed.
        ValueError: If it is no HDF5 file.
    """
    arrays = Hdf5Arrays(file)
    try:
        arrays.open()
        yield arrays
    finally:
        arrays.close()


@dataclass(frozen=True)
class Episodes:
    """What a file holds.

    Attributes:
        ids: [E]
        sizes: [E] Rows of each in the file.
        lengths: [E] Rows of each that are read, from its first one on.
        paths: Leaf -> the arrays of every episode, [E] lists; the rows of several are joined to one vector.
        flags: Leaf -> [R]
    """

    ids: list[str]
    sizes: NDArray[np.int64]
    lengths: NDArray[np.int64]
    paths: dict[str, list[list[str]]]
    flags: dict[str, Bools]


class EpisodesFile(FlatFile):
    """The episodes of a file as columns, one episode behind the other, with their ids."""

    def __init__(self, file: DataFile, arrays: Hdf5Arrays, episodes: Episodes, headers: dict[str, ArrayHeader]) -> None:
        """Takes what `headers_of` has checked."""
        self._arrays = arrays
        self._episodes = episodes
        self._starts = np.concatenate([[0], np.cumsum(episodes.lengths)])
        num_rows = int(self._starts[-1])
        self.arrays = {
            **headers,
            Columns.EPS_ID: ArrayHeader((num_rows,), np.dtype(np.str_)),
            **{name: ArrayHeader((num_rows,), np.dtype(bool)) for name in episodes.flags},
        }

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """See `FlatFile`."""
        if name in self._episodes.flags:
            return self._episodes.flags[name][start:stop]
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        for episode in range(first, len(self._episodes.ids)):
            begin = int(self._starts[episode])
            if begin >= stop:
                break
            rows = slice(max(start - begin, 0), min(stop - begin, int(self._episodes.lengths[episode])))
            if rows.stop > rows.start:
                pieces.append(self._rows(name, episode, rows))
        return np.concatenate(pieces)

    def _rows(self, name: str, episode: int, rows: slice) -> NDArray[Any]:
        if name == Columns.EPS_ID:
            return np.full(rows.stop - rows.start, self._episodes.ids[episode])
        parts = [self._arrays.rows(path, rows.start, rows.stop) for path in self._episodes.paths[name][episode]]
        return parts[0] if len(parts) == 1 else np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


class EpisodesReader(FlatReader):
    """Episodes from HDF5 files that hold every episode apart; `where` names episode, step and file."""

    _layouts: dict[DataFile, tuple[Episodes, dict[str, ArrayHeader]]]

    @property
    def records_ids(self) -> bool:
        """Episodes are numbered within their file."""
        return False

    @contextmanager
    def _open(self, file: DataFile) -> Iterator[FlatFile]:
        with open_arrays(file) as arrays:
            if file not in self._layouts:
                episodes = self._episodes(file, arrays)
                self._layouts[file] = episodes, headers_of(file, arrays, episodes)
            yield EpisodesFile(file, arrays, *self._layouts[file])

    def _filled(self, name: str, files: Sequence[DataFile]) -> Sequence[DataFile]:
        """The files that hold an episode; ids tell whose episode it is if there are several.

        Raises:
            ValueError: If none does.
        """
        counts = []
        for file in files:
            with open_arrays(file) as arrays:
                counts.append(self._count(file, arrays))
        self._files = tuple(file for file, count in zip(files, counts, strict=True) if count)
        if not self._files:
            raise ValueError(f"`input_` {name!r} is empty: its files have no episodes; name files that have.")
        return self._files

    def _count(self, file: DataFile, arrays: Hdf5Arrays) -> int:
        """Number of episodes in a file that are asked for."""
        raise NotImplementedError

    def _episodes(self, file: DataFile, arrays: Hdf5Arrays) -> Episodes:
        """What a file holds.

        Raises:
            ValueError: If it is not in the format.
        """
        raise NotImplementedError

    def _id(self, file: DataFile, name: str) -> str:
        """Id of an episode; its name alone if there is one file."""
        return name if len(self._files) == 1 else f"{file.name}/{name}"

    def _where(self, row: int) -> str:
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        file = self._files[number]
        episodes = self._layouts[file][0]
        stops = np.cumsum(episodes.lengths)
        inner = row - int(self._first_rows[number])
        episode = int(np.searchsorted(stops, inner, side="right"))
        step = inner - int(stops[episode] - episodes.lengths[episode])
        return f"step {step} of {episodes.ids[episode].rpartition('/')[2]!r} in {str(file)!r}"


def headers_of(file: DataFile, arrays: Hdf5Arrays, episodes: Episodes) -> dict[str, ArrayHeader]:
    """Shapes and types of the columns.

    Raises:
        ValueError: If an array is missing or holds too few rows, or episodes differ in shape or kind of numbers.
    """
    headers: dict[str, ArrayHeader] = {}
    num_rows = int(episodes.lengths.sum())
    for leaf, paths in episodes.paths.items():
        first: tuple[tuple[int, ...], str, str] | None = None
        dtypes = []
        for id_, size, parts in zip(episodes.ids, episodes.sizes.tolist(), paths, strict=True):
            found = [(path, _header(file, arrays, path, size)) for path in parts]
            shapes = [header.shape[1:] for _, header in found]
            shape = shapes[0] if len(shapes) == 1 else (sum(map(math.prod, shapes)),)
            dtype = np.result_type(*(header.dtype for _, header in found))
            dtypes.append(dtype)
            first = first or (shape, dtype.kind, id_)
            if (shape, dtype.kind) != first[:2]:
                raise ValueError(
                    f"`{parts[0]}` in {str(file)!r} holds {dtype} rows of shape {shape}, and those of episode "
                    f"{first[2]!r} are of shape {first[0]} and kind {first[1]!r}; every episode must have the same "
                    "types and shapes."
                )
        headers[leaf] = ArrayHeader((num_rows, *(first[0] if first else ())), np.result_type(*set(dtypes)))
    return headers


def _header(file: DataFile, arrays: Hdf5Arrays, path: str, num_rows: int) -> ArrayHeader:
    header = arrays.header(path)
    if header is None:
        raise ValueError(f"{str(file)!r} has no array `{path}`, which other episodes have; write the file again.")
    if header.dtype.kind not in "fiub":
        raise ValueError(f"`{path}` must hold numbers, got {header.dtype.name} in {str(file)!r}; convert the column.")
    if not header.shape or header.shape[0] != num_rows:
        count = header.shape[0] if header.shape else "no"
        raise ValueError(
            f"`{path}` in {str(file)!r} has {count} rows, and the actions of its episode {num_rows}; all columns need "
            "one row per time step: write the file again."
        )
    return header


def lengths_of(file: DataFile, arrays: Hdf5Arrays, paths: Sequence[str]) -> NDArray[np.int64]:
    """Rows of one array of every episode.

    Raises:
        ValueError: If one is missing.
    """
    lengths = []
    for path in paths:
        header = arrays.header(path)
        if header is None or not header.shape:
            raise ValueError(f"{str(file)!r} has no array `{path}` with one row per step; write the file again.")
        lengths.append(header.shape[0])
    return np.array(lengths, dtype=np.int64)


def flags_of(file: DataFile, arrays: Hdf5Arrays, path: str, num_rows: int) -> Bools:
    """A column of 0 and 1, whole.

    Raises:
        ValueError: If it has another number of rows, or other values.
    """
    header = _header(file, arrays, path, num_rows)
    if math.prod(header.shape) != num_rows:
        raise ValueError(
            f"`{path}` in {str(file)!r} has shape {header.shape}, where its episode has {num_rows} steps; store one "
            "value per step."
        )
    return as_flags(path, arrays.whole(path).reshape(num_rows), lambda row: f"row {row} of {str(file)!r}")
