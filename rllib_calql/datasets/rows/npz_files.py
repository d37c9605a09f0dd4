"""NumPy archives (`.npz`): their arrays, read in pieces without unpacking the archive or unpickling anything."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rllib_calql.datasets.decoding.safe_decoding import read_npy_header
from rllib_calql.datasets.episodes.files import DataFile
from rllib_calql.datasets.rows.flat import FlatFile, reading
from rllib_calql.datasets.rows.flat_columns import ArrayHeader

_FORMAT = "NumPy `.npz`"
_SUFFIX = ".npy"
_MAX_COMPRESSION = 1032  # What deflate reaches, by which NumPy compresses.


@contextmanager
def open_npz(file: DataFile) -> Iterator[NpzFile]:
    """Opens an archive.

    Raises:
        ValueError: If it is none, or holds something else than arrays.
    """
    with ExitStack() as stack:
        with reading(file, _FORMAT):
            source = stack.enter_context(file.open())
            archive = stack.enter_context(zipfile.ZipFile(source))
        yield NpzFile(file, archive, stack)


class NpzFile(FlatFile):
    """An open archive; made by `open_npz`."""

    def __init__(self, file: DataFile, archive: zipfile.ZipFile, stack: ExitStack) -> None:
        """Reads the headers of the arrays."""
        self._file = file
        self._archive = archive
        self._stack = stack
        self._streams: dict[str, Any] = {}
        self._stored_by_columns: set[str] = set()
        self.arrays = {}
        for info in archive.infolist():
            # Opening compares both copies of the name: a damaged suffix would hide a column.
            with reading(file, _FORMAT), archive.open(info) as stream:
                if not info.filename.endswith(_SUFFIX):
                    continue
                header, is_by_columns = _read_header(stream, info)
            name = info.filename[: -len(_SUFFIX)]
            self.arrays[name] = header
            if is_by_columns:
                self._stored_by_columns.add(name)
        if not self.arrays:
            entries = ", ".join(repr(info.filename) for info in archive.infolist()[:3])
            raise ValueError(
                f"{str(file)!r} is a zip archive without NumPy arrays; it holds {entries or 'nothing'}, so it may be "
                "of another tool, such as `torch.save`: save the arrays by `numpy.savez`."
            )

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """See `FlatFile`."""
        if name in self._stored_by_columns:
            raise ValueError(
                f"`{name}` in {str(self._file)!r} is stored column by column, so its rows cannot be read one after "
                "another; save `numpy.ascontiguousarray(...)` of it."
            )
        with reading(self._file, _FORMAT):
            header = self.arrays[name]
            if start == 0:
                self._streams[name] = self._stack.enter_context(self._archive.open(name + _SUFFIX))
                _read_header(self._streams[name], self._archive.getinfo(name + _SUFFIX))
            row_shape = header.shape[1:]
            num_bytes = (stop - start) * math.prod(row_shape) * header.dtype.itemsize
            content = self._streams[name].read(num_bytes)
            if len(content) != num_bytes:
                raise EOFError(f"`{name}` ends before row {stop}")
            if stop == header.shape[0]:
                # The archive's checksum is compared once the end has been met.
                self._streams[name].read(1)
            rows = np.frombuffer(content, header.dtype).reshape(stop - start, *row_shape)
            return rows.astype(header.dtype.newbyteorder("="), copy=False)

    def single(self, name: str) -> Any:
        """The one number of an array of any shape."""
        with reading(self._file, _FORMAT), self._archive.open(name + _SUFFIX) as stream:
            _read_header(stream, self._archive.getinfo(name + _SUFFIX))
            return np.frombuffer(stream.read(), self.arrays[name].dtype)[0].item()


def _read_header(stream: Any, info: zipfile.ZipInfo) -> tuple[ArrayHeader, bool]:
    """Reads the header of an array and whether it is stored by columns; checks that its size is that of the content."""
    with warnings.catch_warnings():
        # NumPy warns of archives from Python 2, which are read all the same.
        warnings.simplefilter("ignore", UserWarning)
        header = read_npy_header(stream)
    if header is None:
        return ArrayHeader((), np.dtype(object)), False
    shape, dtype, is_fortran = header
    if dtype.hasobject:
        return ArrayHeader(shape, np.dtype(object)), False
    num_bytes = math.prod(shape) * dtype.itemsize
    if stream.tell() + num_bytes != info.file_size:
        raise ValueError(
            f"`{info.filename}` should hold {num_bytes} bytes of an array of shape {shape}, and holds "
            f"{info.file_size - stream.tell()}"
        )
    if num_bytes > 2**30 and num_bytes > _MAX_COMPRESSION * info.compress_size:
        raise ValueError(f"`{info.filename}` claims {num_bytes} bytes and holds {info.compress_size}")
    return ArrayHeader(shape, dtype), bool(is_fortran and len(shape) > 1)
