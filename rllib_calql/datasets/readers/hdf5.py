"""Reads HDF5 files of flat columns, as D4RL writes them (`observations`, `actions`, `rewards`, `terminals`, ...)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.columns import ALIASES
from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.datasets.rows.flat import FlatFile, FlatReader, reading
from rllib_calql.datasets.rows.flat_columns import ArrayHeader

_NESTED_COLUMNS = frozenset(
    name for column in (Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS) for name in (column, *ALIASES[column])
)
_MAX_DEPTH = 8
_FORMAT = "HDF5"

# Columns may be compressed or sparse, but not at will. Of a view, the file does not tell how much it holds.
_MAX_UNCHECKED_BYTES = 2**30
_MAX_COMPRESSION = 2**17
_MAX_BYTES_OF_VIEW = 2**36

# Decompressed chunks per array that HDF5 keeps. Chunks are rarely aligned with the rows that are read at a time.
_CHUNK_CACHE_BYTES = 8 * 2**20
_MAX_CHUNK_CACHE_BYTES = 512 * 2**20
_CHUNK_CACHE_SLOTS = 10_007


class Hdf5Reader(FlatReader):
    """Episodes from HDF5 files with the columns at the root or in one group.

    Observations and actions may be groups of arrays, which become dicts, or tuples if their names are 0 to n-1. The
    root's attributes `ref_min_score` and `ref_max_score` are the reference scores.
    """

    def fingerprint(self) -> str:
        """Digest of the files, and of those that they show numbers of."""
        files = []
        for file in self._files:
            with self._open(file) as opened:
                files += [file, *opened.viewed_files]
        return fingerprint_of(files)

    @contextmanager
    def _open(self, file: DataFile) -> Iterator[_Hdf5File]:
        try:
            import h5py
        except ImportError as err:
            raise ImportError('Reading HDF5 files needs the `h5py` package: pip install "rllib-calql[hdf5]"') from err
        source = file.local_path
        opened: Any = None
        try:
            with reading(file, _FORMAT):
                opened = file.open() if source is None else source
                root = h5py.File(opened, "r")
                cache_bytes = min(_bytes_of_chunk_rows(h5py, root), _MAX_CHUNK_CACHE_BYTES)
                root.close()
                root = h5py.File(
                    opened,
                    "r",
                    rdcc_nbytes=max(cache_bytes, _CHUNK_CACHE_BYTES),
                    rdcc_nslots=_CHUNK_CACHE_SLOTS,
                )
            with root:
                yield _Hdf5File(file, root, h5py)
        finally:
            if source is None and opened is not None:
                opened.close()


class _Hdf5File(FlatFile):
    def __init__(self, file: DataFile, root: Any, h5py: Any) -> None:
        self._file = file
        _refuse_links_to_files(h5py, file, root)
        with reading(file, _FORMAT):
            names = {name: list(root[name]) for name in root if isinstance(root.get(name), h5py.Group)}
            group_names = [name for name, inner in names.items() if not _NESTED_COLUMNS.isdisjoint(inner)]
            is_flat = not _NESTED_COLUMNS.isdisjoint(root)
        _refuse_groups_of_episodes(file, names)
        if not is_flat and len(group_names) > 1:
            raise ValueError(
                f"{str(file)!r} has columns in {len(group_names)} groups ({', '.join(sorted(group_names)[:5])}, ...); "
                "store one data set per file, its columns at the root or in one group."
            )
        with reading(file, _FORMAT):
            group = root if is_flat or not group_names else root[group_names[0]]
        _refuse_links_to_files(h5py, file, group)
        with reading(file, _FORMAT):
            self.arrays = _arrays_of(h5py, group)
            self._datasets: dict[str, Any] = {name: group[name] for name in self.arrays if not name.endswith("/*")}
            self.reference_scores = _reference_scores(root.attrs)
        self.viewed_files = _viewed_files(file, self._datasets)
        for name, dataset in self._datasets.items():
            _check_content(file, root, name, dataset)

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        with reading(self._file, _FORMAT):
            rows = np.asarray(self._datasets[name][start:stop])
            # Text of any length arrives as Python objects.
            rows = rows.astype("S") if rows.dtype == object else rows
            if len(rows) != stop - start:
                raise EOFError(f"`{name}` ends after row {start + len(rows)}")
            return rows.astype(rows.dtype.newbyteorder("="), copy=False)


def _arrays_of(h5py: Any, group: Any, prefix: str = "") -> dict[str, ArrayHeader]:
    """Shapes and types below a group; groups other than those of columns are named "group/*"."""
    arrays: dict[str, ArrayHeader] = {}
    for name in group:
        entry = group.get(name)
        path = prefix + name
        if isinstance(entry, h5py.Dataset):
            # Text of any length has no NumPy type of its own.
            is_text = h5py.check_string_dtype(entry.dtype) is not None
            arrays[path] = ArrayHeader(entry.shape or (), np.dtype("S") if is_text else entry.dtype)
        elif isinstance(entry, h5py.Group):
            is_column = bool(prefix) or name in _NESTED_COLUMNS
            if is_column and path.count("/") < _MAX_DEPTH:
                arrays.update(_arrays_of(h5py, entry, path + "/"))
            else:
                arrays[path + "/*"] = ArrayHeader((), np.dtype(object))
    return arrays


def _viewed_files(file: DataFile, datasets: Mapping[str, Any]) -> list[DataFile]:
    """Other files that virtual datasets show numbers of.

    Raises:
        ValueError: If one is missing, of which HDF5 would read zeros, without a word; or if it cannot be known.
    """
    found: dict[str, DataFile] = {}
    for name, dataset in datasets.items():
        sources = {source.file_name for source in dataset.virtual_sources()} if dataset.is_virtual else set()
        for source in sorted(sources - {"."}):
            folder = None if file.local_path is None else file.local_path.parent
            if folder is None or "%" in source:
                raise ValueError(
                    f"`{name}` in {str(file)!r} is a view on {source!r}, whose changes would go unnoticed; write the "
                    "numbers into one file."
                )
            path = next((path for path in (folder / source, Path(source)) if path.is_file()), None)
            if path is None:
                raise ValueError(
                    f"`{name}` in {str(file)!r} is a view on {source!r}, which is missing; bring that file back, or "
                    "write the numbers into one file."
                )
            found[source] = DataFile(str(path))
    return list(found.values())


def _refuse_links_to_files(h5py: Any, file: DataFile, group: Any) -> None:
    """Refuses links to other files before they are followed: nothing checks what is there, or notices its change."""
    with reading(file, _FORMAT):
        links = {name: group.get(name, getlink=True) for name in group}
    for name, link in links.items():
        if isinstance(link, h5py.ExternalLink):
            raise ValueError(
                f"`{name}` in {str(file)!r} is a link to another file, {link.filename!r}; write the numbers into one "
                "file."
            )
    for name in _NESTED_COLUMNS.intersection(links):
        with reading(file, _FORMAT):
            entry = group.get(name)
        if isinstance(entry, h5py.Group):
            _refuse_links_to_files(h5py, file, entry)


def _check_content(file: DataFile, root: Any, name: str, dataset: Any) -> None:
    """Refuses numbers that stand in another file, and more of them than a file of this size can hold."""
    if dataset.external or dataset.file.filename != root.filename:
        other = dataset.external[0][0] if dataset.external else dataset.file.filename
        raise ValueError(
            f"The numbers of `{name}` in {str(file)!r} stand in another file, {other!r}; write them into one file."
        )
    num_bytes = math.prod(dataset.shape or ()) * dataset.dtype.itemsize
    size = file.size()
    if num_bytes > (_MAX_BYTES_OF_VIEW if dataset.is_virtual else _MAX_UNCHECKED_BYTES):
        # The size of an array that is stored in one piece is computed from its shape, so it may be damaged as well.
        held = size if dataset.is_virtual else min(dataset.id.get_storage_size(), size)
        if num_bytes > _MAX_COMPRESSION * held:
            raise ValueError(
                f"`{name}` in {str(file)!r} claims {num_bytes} bytes, and holds {held} of the file's {size}; write it "
                "again."
            )


def _refuse_groups_of_episodes(file: DataFile, names: Collection[str]) -> None:
    """Refuses Minari's layout, which has one group per episode."""
    if any(re.fullmatch(r"episode_\d+", name) for name in names):
        raise ValueError(
            f"{str(file)!r} has one group per episode, which is Minari's own layout; give Minari's id of the data "
            "set as `input_`: `minari:<dataset id>`."
        )


def _bytes_of_chunk_rows(h5py: Any, root: Any) -> int:
    """Bytes of the chunks that a row of an array touches, for the array where these are most."""
    most = 0

    def visit(_: str, entry: Any) -> None:
        nonlocal most
        if isinstance(entry, h5py.Dataset) and entry.chunks:
            across = (-(-size // chunk) * chunk for size, chunk in zip(entry.shape[1:], entry.chunks[1:], strict=True))
            most = max(most, entry.chunks[0] * math.prod(across) * entry.dtype.itemsize)

    root.visititems(visit)
    return most


def _reference_scores(attributes: Any) -> tuple[float, float] | None:
    scores = []
    for name in ("ref_min_score", "ref_max_score"):
        value = np.asarray(attributes.get(name, np.nan))
        if value.shape not in ((), (1,)) or value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            return None
        scores.append(float(value.reshape(())))
    return scores[0], scores[1]
