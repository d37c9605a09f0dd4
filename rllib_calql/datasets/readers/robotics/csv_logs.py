"""Reads CSV logs, by a map that says what their columns are: a file per episode, or many with a column of ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.datasets.episodes.reader import ReadOptions
from rllib_calql.datasets.readers.robotics.column_map import FILE_NAME, ColumnMap
from rllib_calql.datasets.readers.robotics.csv_files import CsvFile, as_truths, example_map
from rllib_calql.datasets.rows.flat import FlatFile, FlatReader
from rllib_calql.datasets.rows.flat_columns import ArrayHeader

_KEYS = (
    *("obs", "next_obs", "actions", "rewards", "t", "episode", "terminated", "truncated", "further"),
    *("delimiter", "decimal"),
)
_TEXTS = (Columns.EPS_ID, Columns.TERMINATEDS, Columns.TRUNCATEDS)
_NEEDED = {"obs": Columns.OBS, "actions": Columns.ACTIONS, "rewards": Columns.REWARDS}
_NUMBER = np.dtype(np.float64)
_GAP = 1.5  # Usual steps between two times from which on a row is missing between them.


@dataclass(frozen=True)
class _Layout:
    """What a first look at a file tells.

    Attributes:
        num_rows: Number of its rows.
        usual_step: Median difference of the times of two rows that follow each other; None without times.
    """

    num_rows: int
    usual_step: float | None


class CsvReader(FlatReader):
    """Episodes from CSV files.

    All numbers are read as float64. With a column of episode ids, the rows of an episode stand together in one file;
    without, an episode ends where a flag says so, where the time goes back, and with its file.
    """

    def __init__(self, name: str, files: Sequence[DataFile], options: ReadOptions, column_map: ColumnMap) -> None:
        """Reads headers and times; see `FlatReader`.

        Args:
            name: The input as the user wrote it.
            files: Files in the order in which their rows follow each other.
            options: How incomplete data are read.
            column_map: What the columns are.

        Raises:
            ValueError: If the map lacks a key, or a file lacks a column, is damaged, or has no rows.
        """
        column_map.refuse_keys(_KEYS, "CSV files")
        missing = [key for key, column in _NEEDED.items() if not column_map.of(column)]
        if missing:
            raise ValueError(
                f"The column map {str(column_map.file)!r} has no key {', '.join(f'`{key}`' for key in missing)}; "
                "`obs`, `actions` and `rewards` must be there. Without rewards there is nothing to learn from: log "
                "them, or compute them into a column of their own."
            )
        self._map = column_map
        self._layouts: dict[DataFile, _Layout] = {}
        self._opened: dict[DataFile, CsvFile] = {}
        super().__init__(name, files, options)
        unread = (column for file in self._files for column in self._csv(file).names if column not in column_map.names)
        self.info = replace(
            self.info,
            ignored_columns=tuple(
                dict.fromkeys(
                    [
                        *(f"{column or 'a column without a name'} (not in the column map)" for column in unread),
                        *self.info.ignored_columns,
                    ]
                )
            ),
        )

    def fingerprint(self) -> str:
        """Digest of the files and of the map."""
        return fingerprint_of([*self._files, self._map.file])

    @contextmanager
    def _open(self, file: DataFile) -> Iterator[FlatFile]:
        opened = self._csv(file)
        opened.check_has(self._map.names, str(self._map.file))
        if file not in self._layouts:
            self._layouts[file] = self._layout(opened)
        yield _CsvColumns(opened, self._map, self._layouts[file])

    def _csv(self, file: DataFile) -> CsvFile:
        if file not in self._opened:
            self._opened[file] = CsvFile(
                file, delimiter=self._map.texts.get("delimiter"), decimal=self._map.texts.get("decimal", ".")
            )
        return self._opened[file]

    def _layout(self, opened: CsvFile) -> _Layout:
        times = [joined.names[0] for joined in self._map.of(Columns.T).values()]
        rewards = [joined.names[0] for joined in self._map.of(Columns.REWARDS).values()]  # Any column counts rows.
        changes, num_rows, last = [], 0, np.empty(0)
        for piece in opened.pieces(times, [] if times else rewards):
            (values,) = piece.values()
            num_rows += len(values)
            if times:
                change = np.diff(np.concatenate([last, values]))
                changes.append(change[change > 0])
                last = values[-1:]
        steps = np.concatenate(changes) if changes else np.empty(0)
        return _Layout(num_rows, (float(np.median(steps)) if len(steps) else 0.0) if times else None)


def without_map(files: Sequence[DataFile]) -> ValueError:
    """The error about CSV files of which no map says what their columns are."""
    example = example_map(CsvFile(files[0]).names)
    return ValueError(
        f"{str(files[0])!r} is a table of text, and nothing says what its columns are; write `{FILE_NAME}` beside it, "
        f"a line for each of (here separated by semicolons): {example}. Without rewards in the file, compute them "
        "first."
    )


class _CsvColumns(FlatFile):
    """A file in the columns of its map; each piece is parsed once for all columns."""

    def __init__(self, opened: CsvFile, column_map: ColumnMap, layout: _Layout) -> None:
        self._opened = opened
        self._map = column_map
        self._layout = layout
        self._columns = dict(column_map.leaves)
        self._is_numbered = Columns.T in self._columns and Columns.EPS_ID not in self._columns
        rows = (layout.num_rows,)
        self.arrays = {}
        for leaf, joined in self._columns.items():
            if leaf == Columns.EPS_ID:
                self.arrays[leaf] = ArrayHeader(rows, np.dtype(np.str_))
            elif leaf in _TEXTS:
                self.arrays[leaf] = ArrayHeader(rows, np.dtype(bool))
            elif leaf != Columns.T:
                self.arrays[leaf] = ArrayHeader((*rows, len(joined.names)) if joined.is_vector else rows, _NUMBER)
        self.arrays |= {name: ArrayHeader(rows, _NUMBER) for name in column_map.further}
        self.arrays.setdefault(Columns.TERMINATEDS, ArrayHeader(rows, np.dtype(bool)))
        if self._is_numbered:
            self.arrays[Columns.T] = ArrayHeader(rows, np.dtype(np.int64))
        self._pieces: Iterator[dict[str, NDArray[Any]]] = iter(())
        self._held: dict[str, NDArray[Any]] = {}
        self._range = (0, 0)
        self._last: dict[str, NDArray[Any]] = {}
        self._rest: dict[str, NDArray[Any]] = {}

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if (start, stop) != self._range:
            self._held = self._table(self._advance(start, stop), start)
            self._range = (start, stop)
        return self._held[name]

    def _advance(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """The columns of the file in the next rows."""
        texts = [self._columns[name].names[0] for name in _TEXTS if name in self._columns]
        numbers = [name for name in self._map.names if name not in texts]
        if start == 0:
            self._pieces, self._rest, self._last = self._opened.pieces(numbers, texts), {}, {}
        held = [self._rest] if self._rest else []
        num_rows = sum(len(next(iter(piece.values()))) for piece in held)
        while num_rows < stop - start:
            piece = next(self._pieces, None)
            if piece is None:
                raise ValueError(f"{self._opened.where(start)} is missing, which was there at first; read it again.")
            held.append(piece)
            num_rows += len(next(iter(piece.values())))
        joined = {name: np.concatenate([piece[name] for piece in held]) for name in held[0]}
        self._rest = {name: array[stop - start :] for name, array in joined.items()} if num_rows > stop - start else {}
        return {name: array[: stop - start] for name, array in joined.items()}

    def _table(self, columns: dict[str, NDArray[Any]], start: int) -> dict[str, NDArray[Any]]:
        def where(row: int) -> str:
            return self._opened.where(start + row)

        flags = [self._columns[leaf].names[0] for leaf in _TEXTS[1:] if leaf in self._columns]
        decimal = self._map.texts.get("decimal", ".")
        truths = {name: as_truths(name, columns[name], where, decimal) for name in flags}
        # A flag may serve as a number as well, such as that of a success as reward.
        numbers = columns | {name: values.astype(_NUMBER) for name, values in truths.items()}
        table: dict[str, NDArray[Any]] = {name: numbers[name] for name in self._map.further}
        for leaf, joined in self._columns.items():
            first = joined.names[0]
            if leaf == Columns.EPS_ID:
                table[leaf] = columns[first].astype(np.str_)
            elif leaf in _TEXTS:
                table[leaf] = truths[first]
            elif joined.is_vector:
                table[leaf] = np.stack([numbers[name] for name in joined.names], axis=1)
            else:
                table[leaf] = numbers[first]
        num_rows = len(table[Columns.REWARDS])
        table.setdefault(Columns.TERMINATEDS, np.zeros(num_rows, dtype=bool))
        if Columns.T in table:
            table[Columns.T] = self._steps(table, where)
        return table

    def _steps(self, table: dict[str, NDArray[Any]], where: Any) -> NDArray[np.int64]:
        """Times as steps that count up by 1 within an episode.

        Raises:
            ValueError: If rows of an episode are missing or out of order.
        """
        names = [name for name in (Columns.T, *_TEXTS) if name in table]
        last = self._last or {name: table[name][:1] for name in names}
        times = np.concatenate([last[Columns.T], table[Columns.T]])
        change = np.diff(times)
        is_same = np.ones(len(change), dtype=bool)
        if Columns.EPS_ID in table:
            ids = np.concatenate([last[Columns.EPS_ID], table[Columns.EPS_ID]])
            is_same = ids[1:] == ids[:-1]
        else:
            for flag in _TEXTS[1:]:
                is_same &= ~np.concatenate([last[flag], table[flag]])[:-1] if flag in table else True
        if not self._last:
            is_same[0] = False
        time = self._columns[Columns.T].names[0]
        usual_step = self._layout.usual_step or 0.0
        # Without ids, going back in time begins an episode.
        is_back = change <= 0 if Columns.EPS_ID in table else change == 0
        is_bad = is_same & (is_back | (change > _GAP * usual_step))
        if is_bad.any():
            row = int(np.argmax(is_bad))
            raise ValueError(
                f"Rows of an episode are out of order or missing: `{time}` goes from {times[row]:.10g} to "
                f"{times[row + 1]:.10g} in {where(row)}, where a step usually takes {usual_step:.6g}; store the rows "
                "of an episode in order of time and without gaps, or leave `t` out of the column map "
                f"{str(self._map.file)!r}."
            )
        starts = ~is_same | (change <= 0)
        before = int(self._last["steps"][0]) if self._last else -1
        rows = np.arange(len(change))
        last_start = np.maximum.accumulate(np.where(starts, rows, -1))
        steps = np.where(last_start >= 0, rows - last_start, rows + before + 1)
        self._last = {name: table[name][-1:] for name in names} | {"steps": steps[-1:]}
        return steps
