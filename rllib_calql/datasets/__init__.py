"""Readers of offline data: one per format, all of them sources of whole RLlib episodes."""

import os
from collections.abc import Sequence
from pathlib import Path

from rllib_calql.datasets.episodes import DatasetInfo, EpisodeReader
from rllib_calql.datasets.minari import SCHEME, MinariReader
from rllib_calql.datasets.parquet import ParquetReader, find_parquet_files, open_parquet
from rllib_calql.datasets.rllib_recorded import (
    RecordedEpisodesReader,
    RecordedRowsReader,
    holds_episodes,
    holds_recorded_rows,
)

__all__ = ["DatasetInfo", "EpisodeReader", "open_input"]


def open_input(input_: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[EpisodeReader]:
    """Opens every part of `input_` and checks all that can be known without reading the rows.

    Args:
        input_: `minari:<dataset id>`, a Parquet file, a folder of Parquet files (rows, or what RLlib recorded; their
            columns tell which), or a sequence of these.

    Returns:
        One reader per part, in the order given.

    Raises:
        TypeError: If a part is neither a string nor a path.
        FileNotFoundError: If a file, folder or data set is missing; the message names what resembles it.
        ValueError: If a part is empty, lacks a column, or is of an unknown format.
        ImportError: If the format needs a package that is not installed.
    """
    parts = [input_] if isinstance(input_, (str, os.PathLike)) else list(input_)
    if not parts:
        raise ValueError("`input_` is an empty list; name at least one data set, file or folder.")
    return [_open(part) for part in parts]


def _open(part: str | os.PathLike[str]) -> EpisodeReader:
    if not isinstance(part, (str, os.PathLike)):
        raise TypeError(
            f"`input_` must be `{SCHEME}<dataset id>`, a path, or a list of these, got {type(part).__name__}."
        )
    name = os.fspath(part)
    if name.startswith(SCHEME):
        return MinariReader(name[len(SCHEME) :])
    if "://" in name:
        raise ValueError(f"`input_` {name!r}: only local paths and `{SCHEME}<dataset id>` can be read; copy the data.")
    files = find_parquet_files(Path(name).expanduser())
    with open_parquet(files[0]) as parquet_file:
        schema = parquet_file.schema_arrow
    if holds_episodes(schema):
        return RecordedEpisodesReader(name, files)
    if holds_recorded_rows(schema):
        return RecordedRowsReader(name, files)
    return ParquetReader(name, files)
