"""From readers to an `OfflineTable`: in memory if it fits, maybe shared, else in mapped files for the next start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

from rllib_calql.datasets.episodes.reader import EpisodeBlock, EpisodeReader
from rllib_calql.datasets.report.report import DatasetReport, ReportBuilder
from rllib_calql.store.offline_table import (
    FINAL_OBSERVATIONS,
    RECORDS,
    EpisodeColumns,
    OfflineTable,
    OfflineTableBuilder,
)
from rllib_calql.store.shared_data import SharedTables
from rllib_calql.store.table_cache import TableCache, TableWriter, cache_key
from rllib_calql.system import activity

logger = logging.getLogger(__name__)

Spaces = tuple[gym.Space[Any] | None, gym.Space[Any] | None]
ToColumns = Callable[[EpisodeReader, EpisodeBlock], EpisodeColumns]


@dataclass(frozen=True)
class StorageSettings:
    """Where the table may lie.

    Attributes:
        memory_limit: Bytes that its records may take in memory; a larger table goes to files.
        cache_dir: Folder for these files.
        gamma: Discount of the table.
        key_parts: All settings that the records depend on, JSON-safe; with the fingerprints of the inputs they name
            the entry in the cache.
    """

    memory_limit: int
    cache_dir: Path
    gamma: float
    key_parts: Any


@dataclass(frozen=True)
class Sharing:
    """How the table is shared with other processes.

    Attributes:
        tables: Where it is found.
        row_nbytes: Bytes of a row, as far as known before the first one is read.
        load: Makes the parts of the same table in another process, as `load_parts` does, given the bytes they may take.
    """

    tables: SharedTables
    row_nbytes: int
    load: Callable[[int], dict[str, Any] | None]


def load_table(
    readers: Sequence[EpisodeReader],
    to_columns: ToColumns,
    settings: StorageSettings,
    *,
    action_dim: int,
    failure_reward: float | None,
    spaces: Spaces = (None, None),
    check: Callable[[DatasetReport], None] = lambda report: None,
    sharing: Sharing | None = None,
) -> tuple[OfflineTable, DatasetReport] | None:
    """Reads all episodes.

    Args:
        readers: The inputs, in order.
        to_columns: Turns a block of one reader into what the table keeps.
        settings: Where the table may lie.
        action_dim: Size of an action.
        failure_reward: Tells the report which episodes failed.
        spaces: Observation and action space that the report compares the data with; None: not compared.
        check: Raises a ValueError if the data are not to be used; called before they are put into the cache.
        sharing: Used where it pays: for a table of some size that fits into memory. None: the table is not shared.

    Returns:
        The table and the report about the data; None if there is no transition.

    Raises:
        ValueError: If the data are broken.
        OSError: If they cannot be read, or the cache cannot be written.
    """
    num_rows = _num_rows_of(readers)
    if sharing is not None and num_rows is not None:
        if shared := _find_shared(sharing, readers, settings, num_rows * sharing.row_nbytes, check):
            return shared
        sharing = None
    builder = OfflineTableBuilder(action_dim=action_dim, num_rows=num_rows)
    report = _report_builder(failure_reward, spaces)
    cache = TableCache(settings.cache_dir)
    key: str | None = None
    writer: TableWriter | None = None
    with ExitStack() as stack:
        for columns in _columns(readers, to_columns, report):
            nbytes = builder.nbytes_with(columns)
            if sharing is not None and nbytes >= sharing.tables.settings.min_nbytes:
                if shared := _find_shared(sharing, readers, settings, nbytes, check):
                    return shared
                sharing = None
            if writer is None and nbytes > settings.memory_limit:
                key = _key_of(readers, settings)
                if found := _find(cache, key, settings, stack):
                    return found
                writer = stack.enter_context(cache.build(key))
                builder.move_to(writer)
            builder.add(columns)
        if builder.num_rows == 0:
            return None
        built = report.build()
        check(built)
        if writer is None:
            return builder.build(gamma=settings.gamma), built
        assert builder.dtype is not None
        table = writer.finish(
            dtype=builder.dtype,
            episodes=builder.episodes(),
            stored_with=built.to_dict(),
            gamma=settings.gamma,
            memory_limit=settings.memory_limit,
        )
        logger.info("Wrote %.1f GB of offline data to %s.", table.nbytes / 1e9, settings.cache_dir)
        return table, built


def load_parts(
    readers: Sequence[EpisodeReader],
    to_columns: ToColumns,
    max_nbytes: int,
    *,
    action_dim: int,
    failure_reward: float | None,
    spaces: Spaces = (None, None),
) -> dict[str, Any] | None:
    """Reads all episodes in memory, into a form that goes through the object store without a copy.

    Args:
        readers: The inputs, in order.
        to_columns: Turns a block of one reader into what the table keeps.
        max_nbytes: Bytes that they may take.
        action_dim: Size of an action.
        failure_reward: Tells the report which episodes failed.
        spaces: Observation and action space that the report compares the data with; None: not compared.

    Returns:
        The arrays of an `OfflineTable` and the report about the data; None if they are too large.

    Raises:
        ValueError: If the data are broken.
        OSError: If they cannot be read.
    """
    builder = OfflineTableBuilder(action_dim=action_dim, num_rows=_num_rows_of(readers))
    report = _report_builder(failure_reward, spaces)
    for columns in _columns(readers, to_columns, report):
        if builder.nbytes_with(columns) > max_nbytes:
            return None
        builder.add(columns)
    table = builder.build(gamma=1.0)
    if table.nbytes > max_nbytes:
        return None
    return {
        "columns": {RECORDS: table.records, FINAL_OBSERVATIONS: table.final_observations, **builder.episodes()},
        "report": report.build().to_dict(),
    }


def _report_builder(failure_reward: float | None, spaces: Spaces) -> ReportBuilder:
    return ReportBuilder(failure_reward, observation_space=spaces[0], action_space=spaces[1])


def _find_shared(
    sharing: Sharing,
    readers: Sequence[EpisodeReader],
    settings: StorageSettings,
    nbytes: int,
    check: Callable[[DatasetReport], None],
) -> tuple[OfflineTable, DatasetReport] | None:
    """The shared table of about `nbytes`; None if sharing it does not pay or this process is to load it itself."""
    if not sharing.tables.settings.min_nbytes <= nbytes <= settings.memory_limit:
        return None
    key = _key_of(readers, settings)
    activity.say(f"reading data, for all trials ({', '.join(reader.info.name for reader in readers)})")
    parts = None if key is None else sharing.tables.get(key, sharing.load, nbytes=nbytes)
    if parts is None:
        return None
    report = DatasetReport.from_dict(parts["report"])
    check(report)
    table = OfflineTable(**parts["columns"], gamma=settings.gamma)
    sharing.tables.set_size(table.nbytes)
    logger.info("Using %.1f GB of offline data in Ray's object store.", table.nbytes / 1e9)
    return table, report


def _num_rows_of(readers: Sequence[EpisodeReader]) -> int | None:
    """Rows to expect, if all inputs know theirs."""
    known = [reader.info.num_transitions for reader in readers]
    return None if None in known else sum(count or 0 for count in known)


def _columns(
    readers: Sequence[EpisodeReader], to_columns: ToColumns, report: ReportBuilder
) -> Iterator[EpisodeColumns]:
    num_rows, num_read = _num_rows_of(readers), 0
    for reader in readers:
        _say_reading(reader, num_read, num_rows)
        for block in reader.blocks():
            report.add(block)
            yield to_columns(reader, block)
            num_read += block.num_rows
            _say_reading(reader, num_read, num_rows)
        report.add_reader(reader)


def _say_reading(reader: EpisodeReader, num_read: int, num_rows: int | None) -> None:
    read = f" {min(100, 100 * num_read // num_rows)} %" if num_rows else f", {num_read:,} transitions"
    activity.say(f"reading data{read} ({reader.info.name})")


def _key_of(readers: Sequence[EpisodeReader], settings: StorageSettings) -> str | None:
    """The cache's key, or None if an input has no fingerprint, such as objects handed over in Python."""
    fingerprints = [reader.fingerprint() for reader in readers]
    return None if None in fingerprints else cache_key([fingerprints, settings.key_parts])


def _find(
    cache: TableCache, key: str | None, settings: StorageSettings, stack: ExitStack
) -> tuple[OfflineTable, DatasetReport] | None:
    """The entry of that key; if there is none, its lock is taken until `stack` is left."""
    if key is None:
        return None
    for is_locked in (False, True):
        if is_locked:
            stack.enter_context(cache.lock(key))
        found = cache.load(key, gamma=settings.gamma, memory_limit=settings.memory_limit)
        if found is not None:
            table, stored = found
            try:
                report = DatasetReport.from_dict(stored)
            except (ValueError, TypeError, KeyError, AttributeError) as err:
                logger.warning("The cached report in %s is damaged; the data are read anew: %s", cache.folder, err)
                continue
            logger.info("Found %.1f GB of offline data in %s.", table.nbytes / 1e9, settings.cache_dir)
            return table, report
    return None
