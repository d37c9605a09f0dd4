"""Data files, local or on any file system that PyArrow knows: found, ordered, opened and fingerprinted."""

from __future__ import annotations

import hashlib
import mmap
import re
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from rllib_calql.datasets.episodes.other_tools import found_instead
from rllib_calql.system.similar_words import close_matches

MAGIC_BYTES = {
    b"PAR1": ("Parquet", ".parquet"),
    b"\x89HDF": ("HDF5", ".hdf5"),
    b"PK\x03\x04": ("NumPy", ".npz"),
    b"\x93NUMPY": ("NumPy's `.npy`", ".npy"),
    b"\x1f\x8b": ("compressed", ""),
    b"\x28\xb5\x2f\xfd": ("compressed", ""),
    b"BZh": ("compressed", ""),
    b"\xfd7zXZ": ("compressed", ""),
}
"""First bytes of a file -> what it is, and by which extension it is read; none if it has to be unpacked."""

_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class DataFile:
    """One file.

    Attributes:
        path: Its path on the file system.
        filesystem: PyArrow file system, None for the local one.
    """

    path: str
    filesystem: Any = None

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def folder(self) -> str:
        """The path without its last part."""
        return self.path.rpartition("/")[0]

    @property
    def suffix(self) -> str:
        """Extension in lower case, with its dot."""
        return Path(self.name).suffix.lower()

    @property
    def local_path(self) -> Path | None:
        """The path for libraries that open local files by themselves; None on any other file system."""
        return Path(self.path) if self.filesystem is None else None

    def open(self) -> Any:
        """A seekable PyArrow file for reading.

        Raises:
            FileNotFoundError: If it is gone.
            OSError: If it cannot be opened.
        """
        return (self.filesystem or fs.LocalFileSystem()).open_input_file(self.path)

    def size(self) -> int:
        """Bytes of the file."""
        return int((self.filesystem or fs.LocalFileSystem()).get_file_info(self.path).size)


def find_files(input_: str, suffixes: Sequence[str], filesystem: Any = None) -> list[DataFile]:
    """Returns the file itself, or the data files in a folder and below it in natural order.

    Args:
        input_: Local path, path on `filesystem`, or a URI such as "s3://bucket/folder".
        suffixes: Extensions of data files, in lower case with their dots.
        filesystem: PyArrow file system; None: the local one, or what the URI says.

    Raises:
        FileNotFoundError: If nothing is there; the message names entries of the parent folder that resemble it.
        ValueError: If the folder has no data file, or the URI's scheme is unknown.
    """
    filesystem, path = _resolve(input_, filesystem)
    system = filesystem or fs.LocalFileSystem()
    try:
        info = system.get_file_info(path)
    except OSError as err:
        raise FileNotFoundError(f"`input_` {input_!r} cannot be reached: {err}") from err
    if info.type == fs.FileType.NotFound:
        parent = path.rstrip("/").rpartition("/")[0] or ("." if filesystem is None and not path.startswith("/") else "")
        selector = fs.FileSelector(parent, allow_not_found=True)
        siblings = [entry.base_name for entry in system.get_file_info(selector)] if parent else []
        name = path.rstrip("/").rpartition("/")[2]
        hint = ""
        if filesystem is None and not path.startswith("/"):
            hint = f" It is looked for in the current folder, '{Path.cwd()}'."
        if not set("*?[").isdisjoint(name):
            hint += " Patterns are not resolved: name the folder, or a list of files."
        raise FileNotFoundError(
            f"`input_` {input_!r}: there is no such file or folder.{close_matches(name, siblings)}{hint}"
        )
    if info.type == fs.FileType.File:
        return [DataFile(path, filesystem)]
    entries = system.get_file_info(fs.FileSelector(path, recursive=True))
    files = [
        DataFile(entry.path, filesystem)
        for entry in entries
        if entry.type == fs.FileType.File
        and not entry.base_name.startswith((".", "_"))
        and Path(entry.base_name).suffix.lower() in suffixes
    ]
    if not files:
        patterns = ", ".join(f"`*{suffix}`" for suffix in suffixes)
        others = [entry.path for entry in entries if entry.type == fs.FileType.File]
        folder = f"For all that is read here, folder {input_!r}" if others else f"Folder {input_!r}"
        raise ValueError(f"{folder} is empty: there is no {patterns} file in it or below it.{found_instead(others)}")
    return sorted(files, key=lambda file: _natural_key(file.path))


def file_in(input_: str, name: str, filesystem: Any = None) -> DataFile | None:
    """The file of a name in a folder, or in the folder of a file; None if there is none.

    Args:
        input_: The folder or file, as in `find_files`.
        name: Path of the file, relative to the folder.
        filesystem: As in `find_files`.

    Raises:
        ValueError: If the URI's scheme is unknown.
    """
    filesystem, path = _resolve(input_, filesystem)
    system = filesystem or fs.LocalFileSystem()
    try:
        folder = path if system.get_file_info(path).type == fs.FileType.Directory else path.rpartition("/")[0] or "."
        file = f"{folder.rstrip('/')}/{name}"
        is_there = system.get_file_info(file).type == fs.FileType.File
    except OSError:
        return None
    return DataFile(file, filesystem) if is_there else None


def said_of_content(file: DataFile, expected: str) -> str:
    """A sentence about a file whose first bytes are those of another format than its name says; else empty.

    Args:
        file: The file.
        expected: Its format by its name, as in `MAGIC_BYTES`.
    """
    try:
        with file.open() as opened:
            start = opened.read(8)
    except (OSError, pa.ArrowException):
        return ""
    for magic, (format_, suffix) in MAGIC_BYTES.items():
        if start.startswith(magic) and format_ != expected:
            remedy = f"name it `*{suffix}`" if suffix else "unpack it first"
            return f" It begins as {format_} files do; {remedy}."
    return ""


def fingerprint_of(files: Iterable[DataFile], *, mapped: bool = False) -> str:
    """Digest of names (without folders), order and contents of files, in hexadecimal.

    Every byte counts and no file time does. Contents enter as one CRC-32 per 16 MiB: made to notice change, not to
    resist forgery, it is several times faster than a cryptographic hash of everything.

    Args:
        files: The files.
        mapped: Whether local files are mapped instead of read, which saves a copy. Only for files that nobody shortens
            meanwhile: the kernel kills a process that looks behind the end of a file.
    """
    digest = hashlib.sha256()
    crc_of_chunk = _crc_of_mapped_chunk if mapped else _crc_of_chunk
    with ThreadPoolExecutor(max_workers=2) as pool:
        for file in files:
            size = file.size()
            digest.update(f"{file.name}:{size}".encode())
            chunks = ((file, start, min(_CHUNK_BYTES, size - start)) for start in range(0, size, _CHUNK_BYTES))
            for checksum in pool.map(crc_of_chunk, chunks):
                digest.update(checksum.to_bytes(4, "little"))
    return digest.hexdigest()


def _crc_of_chunk(chunk: tuple[DataFile, int, int]) -> int:
    file, start, length = chunk
    with file.open() as opened:
        opened.seek(start)
        return zlib.crc32(opened.read(length))


def _crc_of_mapped_chunk(chunk: tuple[DataFile, int, int]) -> int:
    file, start, length = chunk
    with (
        Path(file.path).open("rb") as opened,
        mmap.mmap(opened.fileno(), length, offset=start, access=mmap.ACCESS_READ) as content,
    ):
        return zlib.crc32(content)


def _resolve(input_: str, filesystem: Any) -> tuple[Any, str]:
    """The file system (None for the local one) and the path on it."""
    if filesystem is not None:
        return filesystem, input_.partition("://")[2] or input_
    if "://" not in input_:
        return None, str(Path(input_).expanduser())
    try:
        found, path = fs.FileSystem.from_uri(input_)
    except (pa.ArrowInvalid, ValueError) as err:
        raise ValueError(
            f"`input_` {input_!r}: {err}. A path, `minari:<dataset id>`, or a URI that PyArrow knows (`s3://`, "
            "`gs://`, `hdfs://`, `file://`) is needed; other file systems are handed over as `input_filesystem`."
        ) from err
    return (None if isinstance(found, fs.LocalFileSystem) else found), path


def _natural_key(path: str) -> list[list[int | str]]:
    # Splitting at digits makes text and numbers alternate, so that two keys never compare a number with text. Other
    # digits, such as that of "m²", are text.
    parts = [re.split(r"([0-9]+)", part) for part in path.split("/")]
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts]
