"""`open_input`: from what `input_` names to the readers that read it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pyarrow import fs
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.common.held_data import DataHandle, InMemoryDataset, InMemoryEpisodes
from rllib_calql.datasets.episodes.files import MAGIC_BYTES, DataFile, file_in, find_files
from rllib_calql.datasets.episodes.other_tools import what_it_is
from rllib_calql.datasets.episodes.reader import EpisodeReader, ReadOptions
from rllib_calql.datasets.readers import parquet
from rllib_calql.datasets.readers.in_memory import DatasetReader, EpisodesReader
from rllib_calql.datasets.readers.minari import SCHEME, MinariReader, check_dataset
from rllib_calql.datasets.readers.rllib_recorded import (
    RecordedEpisodesReader,
    RecordedRowsReader,
    holds_episodes,
    holds_recorded_rows,
)
from rllib_calql.datasets.readers.robotics import column_map as column_maps
from rllib_calql.datasets.readers.robotics import lerobot_features
from rllib_calql.datasets.readers.robotics.column_map import ColumnMap
from rllib_calql.datasets.readers.robotics.csv_files import SUFFIXES as CSV_SUFFIXES
from rllib_calql.datasets.rows.parquet_files import open_parquet, readable

if TYPE_CHECKING:
    import ray.data

_FORMATS = {
    **dict.fromkeys(parquet.SUFFIXES, "Parquet"),
    ".hdf5": "HDF5",
    ".h5": "HDF5",
    ".npz": "NumPy",
    **dict.fromkeys(CSV_SUFFIXES, "CSV"),
}
_MAPPED_FORMATS = ("CSV", "HDF5")
_READABLE = (
    f"`{SCHEME}<dataset id>`, Parquet, HDF5, NumPy (`.npz`) or CSV files, folders of one of these, LeRobot data sets, "
    "folders recorded by RLlib, column maps (`.yaml`), a `ray.data.Dataset`, `SingleAgentEpisode`s"
)

InputPart: TypeAlias = (
    "str | os.PathLike[str] | SingleAgentEpisode | InMemoryEpisodes | InMemoryDataset | ray.data.Dataset"
)


@dataclass(frozen=True)
class _Located:
    files: list[DataFile]
    format: str
    column_map: ColumnMap | None
    path: str


def open_input(input_: InputPart | Sequence[InputPart], options: ReadOptions | None = None) -> list[EpisodeReader]:
    """Opens every part of `input_` and checks all that can be known without reading the rows.

    Args:
        input_: `minari:<dataset id>`; a file of Parquet, HDF5, NumPy or CSV rows, a folder of such files of one format,
            a LeRobot data set, what RLlib recorded, or a column map (`.yaml`) that names its data, each as a path or
            URI; a `ray.data.Dataset` of rows; an RLlib episode; or a sequence of these. The episodes of a sequence are
            one part.
        options: How incomplete data are read, and on which file system.

    Returns:
        One reader per part, in the order given.

    Raises:
        TypeError: If a part is none of these.
        FileNotFoundError: If a file, folder or data set is missing; the message names what resembles it.
        ValueError: If a part is empty, broken, lacks a column, or is of an unknown format.
        ImportError: If the format needs a package that is not installed.
    """
    options = options or ReadOptions()
    parts = list(input_) if isinstance(input_, (list, tuple)) else [input_]
    if not parts:
        raise ValueError("`input_` is an empty list; name at least one data set, file or folder.")
    return [_open(part, options) for part in _with_episodes_joined(parts)]


def check_input(input_: Any, options: ReadOptions | None = None) -> None:
    """Checks that the files, folders and data sets of `input_` are there, without reading or generating any.

    Data behind URIs and on other file systems are not looked for, since that takes time.

    Args:
        input_: As in `open_input`.
        options: As in `open_input`.

    Raises:
        FileNotFoundError: If a file, folder or data set is missing; the message names what resembles it.
        ValueError: If a folder is empty, or its files are of no format that can be read, or of several.
        ImportError: If a package is missing.
    """
    is_local = options is None or options.filesystem is None
    for part in input_ if isinstance(input_, (list, tuple)) else [input_]:
        if not isinstance(part, (str, os.PathLike)):
            continue
        name = os.fspath(part)
        if name.startswith(SCHEME):
            check_dataset(name[len(SCHEME) :])
        elif is_local and "://" not in name:
            _located(name, None)


def _with_episodes_joined(parts: Sequence[Any]) -> list[Any]:
    """The parts, with all episodes among them as one part in the place of the first."""
    episodes = [part for part in parts if isinstance(part, SingleAgentEpisode)]
    joined: list[Any] = []
    for part in parts:
        if not isinstance(part, SingleAgentEpisode):
            joined.append(part)
        elif part is episodes[0]:
            joined.append(InMemoryEpisodes(episodes))
    return joined


def _open(part: Any, options: ReadOptions) -> EpisodeReader:
    if isinstance(part, DataHandle):
        part = part.resolve()
    if isinstance(part, InMemoryEpisodes):
        return EpisodesReader(part, options)
    if isinstance(part, InMemoryDataset):
        return DatasetReader(part, options)
    if _is_ray_dataset(part):
        return DatasetReader(InMemoryDataset(part), options)
    if not isinstance(part, (str, os.PathLike)):
        raise TypeError(f"`input_` must be one of {_READABLE}, or a list of these, got {type(part).__name__}.")
    name = os.fspath(part)
    if name.startswith(SCHEME):
        return MinariReader(name[len(SCHEME) :], options)
    located = _located(name, _arrow_filesystem(options.filesystem))
    files, column_map = located.files, located.column_map
    if located.format == "CSV":
        from rllib_calql.datasets.readers.robotics.csv_logs import CsvReader, without_map

        if column_map is None:
            raise without_map(files)
        return CsvReader(name, files, options, column_map)
    if located.format == "LeRobot":
        from rllib_calql.datasets.readers.robotics.lerobot import LeRobotReader

        info_file = lerobot_features.info_file(located.path, _arrow_filesystem(options.filesystem))
        assert info_file is not None
        return LeRobotReader(name, info_file, files, options, column_map)
    if located.format == "HDF5":
        return _open_hdf5(name, located, options)
    if located.format == "NumPy":
        return _open_npz(name, files, options)
    with open_parquet(files[0]) as parquet_file, readable(files[0]):
        schema = parquet_file.schema_arrow
    if holds_episodes(schema):
        return RecordedEpisodesReader(name, files, options)
    if holds_recorded_rows(schema):
        return RecordedRowsReader(name, files, options)
    return parquet.ParquetReader(name, files, options)


def _open_hdf5(name: str, located: _Located, options: ReadOptions) -> EpisodeReader:
    """By the layout of the first file."""
    from rllib_calql.datasets.readers.hdf5 import Hdf5Reader
    from rllib_calql.datasets.readers.robotics import d3rlpy, robomimic

    files, column_map = located.files, located.column_map
    if robomimic.is_robomimic(files[0]):
        if column_map is None:
            column_map = _map_beside(name, files[0].filesystem)
        return robomimic.RobomimicReader(name, files, options, column_map)
    if column_map is not None:
        raise _map_for_nothing(column_map, str(files[0]), located.format)
    if d3rlpy.is_d3rlpy(files[0]):
        return d3rlpy.D3rlpyReader(name, files, options)
    return Hdf5Reader(name, files, options)


def _open_npz(name: str, files: Sequence[DataFile], options: ReadOptions) -> EpisodeReader:
    """By the layout of the first file."""
    from rllib_calql.datasets.readers.npz import NpzReader
    from rllib_calql.datasets.readers.robotics import stable_baselines3
    from rllib_calql.datasets.rows.npz_files import open_npz

    with open_npz(files[0]) as opened:
        is_stable_baselines3 = stable_baselines3.is_stable_baselines3(opened.arrays)
    reader = stable_baselines3.StableBaselines3Reader if is_stable_baselines3 else NpzReader
    return reader(name, files, options)


def _map_for_nothing(column_map: ColumnMap, name: str, format_: str) -> ValueError:
    return ValueError(
        f"The column map {str(column_map.file)!r} names {name!r}, {format_} whose columns have names of their own; "
        "rename them there, and give the data themselves as `input_`. Maps are for CSV, LeRobot and robomimic."
    )


def _located(name: str, filesystem: Any) -> _Located:
    """Finds the files of an input, their format, and the map of their columns where the format takes one.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If there are no data, or they are of no format that can be read, or of several; if a map is broken.
    """
    column_map = None
    if not name:
        raise ValueError("`input_` is an empty text; name a file or a folder, `.` for the present one.")
    if name.lower().endswith(column_maps.SUFFIXES):
        (map_file,) = find_files(name, (), filesystem)
        column_map = column_maps.read_map(map_file)
        data = column_map.texts.get("data", ".")
        name = data if data.startswith(("/", "~")) or "://" in data else f"{name.rpartition('/')[0] or '.'}/{data}"
    if lerobot_features.info_file(name, filesystem) is not None:
        try:
            files = find_files(f"{name.rstrip('/')}/data", parquet.SUFFIXES, filesystem)
        except (FileNotFoundError, ValueError) as err:
            raise type(err)(
                f"The LeRobot data set {name!r} has `meta/info.json` and no frames ({err}) Download or write it again."
            ) from err
        return _Located(files, "LeRobot", column_map or _map_beside(name, filesystem), name)
    files = find_files(name, tuple(_FORMATS), filesystem)
    format_ = _format_of(name, files)
    # A table beside data of another format is a summary of a run, or the like.
    files = [file for file in files if len(files) == 1 or _FORMATS.get(file.suffix, format_) == format_]
    if column_map is not None and format_ not in _MAPPED_FORMATS:
        raise _map_for_nothing(column_map, name, format_)
    if column_map is None and format_ == "CSV":
        column_map = _map_beside(name, filesystem)
    return _Located(files, format_, column_map, name)


def _map_beside(name: str, filesystem: Any) -> ColumnMap | None:
    """The map in the folder of the data, if there is one."""
    file = _map_file(name, filesystem)
    if file is None:
        return None
    column_map = column_maps.read_map(file)
    if "data" in column_map.texts:
        raise ValueError(
            f"The column map {str(file)!r} names data of its own, `data: {column_map.texts['data']}`; give the map as "
            "`input_`, or remove `data`."
        )
    return column_map


def _map_file(name: str, filesystem: Any) -> DataFile | None:
    """The file `columns.yaml`, or `columns.yml`, beside data.

    Raises:
        ValueError: If both are there.
    """
    found = [file for each in column_maps.FILE_NAMES if (file := file_in(name, each, filesystem)) is not None]
    if len(found) > 1:
        raise ValueError(f"There are two column maps, {str(found[0])!r} and {str(found[1])!r}; keep one.")
    return found[0] if found else None


def _is_ray_dataset(part: Any) -> bool:
    # By name, since `ray.data` takes a second to import, and whoever holds a data set has done so.
    return any(f"{cls.__module__}.{cls.__name__}" == "ray.data.dataset.Dataset" for cls in type(part).__mro__)


def _arrow_filesystem(filesystem: Any) -> Any:
    """The file system as PyArrow's: its own, or one that follows fsspec."""
    if filesystem is None or isinstance(filesystem, fs.FileSystem):
        return filesystem
    if not all(hasattr(filesystem, name) for name in ("open", "info", "find", "protocol")):
        raise TypeError(
            "`input_filesystem` must be a `pyarrow.fs.FileSystem` or an fsspec file system, got "
            f"{type(filesystem).__name__}."
        )
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem))


def _format_of(name: str, files: Sequence[DataFile]) -> str:
    """The format that all files have.

    Raises:
        ValueError: If they have several, or one that cannot be read.
    """
    first_of: dict[str, DataFile] = {}
    for file in files:
        first_of.setdefault(_FORMATS.get(file.suffix) or _format_by_content(file), file)
    if len(first_of) == 2 and "CSV" in first_of and _map_file(name, files[0].filesystem) is None:
        del first_of["CSV"]
    if len(first_of) > 1:
        examples = ", ".join(f"{format_} ({str(file)!r})" for format_, file in first_of.items())
        raise ValueError(
            f"Folder {name!r} holds files of several formats: {examples}; name those to read one by one, as a list, or "
            "put each format into a folder of its own."
        )
    return next(iter(first_of))


def _format_by_content(file: DataFile) -> str:
    with file.open() as opened:
        start = opened.read(4)
    known, _ = MAGIC_BYTES.get(start, (None, ""))
    kind = what_it_is(file.name)
    # Of the files that are zip archives, many are no NumPy archives.
    if known not in _FORMATS.values() or (known == "NumPy" and kind is not None):
        described = f" The file is {kind}." if kind is not None else ""
        raise ValueError(f"{str(file)!r} is of no format that can be read; `input_` takes {_READABLE}.{described}")
    assert known is not None
    return known
