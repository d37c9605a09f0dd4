"""CSV files: their header, and their rows as arrays, some megabytes at a time."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from rllib_calql.datasets.episodes.files import DataFile, said_of_content
from rllib_calql.datasets.rows.arrow import first_null

SUFFIXES = (".csv", ".tsv")

_BLOCK_BYTES = 2**20
_DELIMITERS = ",;\t"
_TRUTHS = {"true": True, "false": False}
_TIME = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}|\d{1,2}:\d{2}")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(e[+-]?\d+)?", re.IGNORECASE)
_BAD_LENGTH = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_BAD_VALUE = re.compile(r"In CSV column #(\d+): Row #(\d+): .*invalid value '(.*)'", re.DOTALL)


class CsvFile:
    """The header of a file, and the way to its rows.

    Attributes:
        names: Names of the columns, without spaces around them.
    """

    def __init__(self, file: DataFile, *, delimiter: str | None = None, decimal: str = ".") -> None:
        """Reads the header.

        Args:
            file: The file.
            delimiter: What separates columns; None: the comma, semicolon or tab that the header has most of.
            decimal: The decimal point.

        Raises:
            ValueError: If there is no header, or it is no text.
        """
        self._file = file
        self._decimal = decimal
        with file.open() as opened:
            start = opened.read(_BLOCK_BYTES)
        self._num_bytes = len(start)
        try:
            header = start.decode("utf-8-sig", "strict" if len(start) < _BLOCK_BYTES else "ignore").splitlines()
        except UnicodeDecodeError as err:
            other = said_of_content(file, "CSV")
            raise ValueError(
                f"{str(file)!r} is not text in UTF-8 ({err.reason} at byte {err.start})"
                f"{f'.{other}' if other else '; save it as CSV in UTF-8.'}"
            ) from err
        if not header or not header[0].strip():
            raise ValueError(f"{str(file)!r} has no header; its first line must name the columns.")
        self._delimiter = delimiter or max(_DELIMITERS, key=header[0].count)
        self.names = [name.strip() for name in next(csv.reader([header[0]], delimiter=self._delimiter))]
        first_row = next((line for line in header[1:] if line.strip()), None)
        self._has_rows = first_row is not None
        values = next(csv.reader([first_row or ""], delimiter=self._delimiter), [])
        self._truths = {
            name for name, value in zip(self.names, values, strict=False) if value.strip().lower() in _TRUTHS
        }
        if all(_is_number(name) for name in self.names):
            raise ValueError(
                f"{str(file)!r} begins with numbers ({header[0][:40]!r}); its first line must name the columns."
            )

    def check_has(self, names: Collection[str], map_file: str) -> None:
        """Refuses a file without some of the columns.

        Raises:
            ValueError: Naming the column, and those that are there.
        """
        for name in names:
            if self.names.count(name) != 1:
                what = "no" if name not in self.names else "more than one"
                delimiter = ", or say by `delimiter` what separates the columns" if len(self.names) == 1 else ""
                raise ValueError(
                    f"{str(self._file)!r} has {what} column `{name}`, which the column map {map_file!r} names; its "
                    f"columns are {', '.join(f'`{other}`' for other in self.names)}; correct the map, or the "
                    f"header{delimiter}."
                )

    def pieces(self, numbers: Sequence[str], texts: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
        """Yields columns as float64, and as text where asked for, some megabytes of rows at a time.

        Columns whose first value is True or False, in any case, are 1 and 0.

        Raises:
            ValueError: If a value is missing or no number; the message names column and row.
        """
        if not self._has_rows:
            return
        first_row = 0
        with self._reading(), self._file.open() as opened:
            types = {name: pa.bool_() if name in self._truths else pa.float64() for name in numbers}
            types |= {name: pa.string() for name in texts}
            names = [name if name in types else f"{name}\0{i}" for i, name in enumerate(self.names)]
            reader = pyarrow.csv.open_csv(
                opened,
                read_options=pyarrow.csv.ReadOptions(
                    use_threads=False, block_size=_BLOCK_BYTES, column_names=names, skip_rows=1
                ),
                parse_options=pyarrow.csv.ParseOptions(delimiter=self._delimiter),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=types,
                    include_columns=list(types),
                    null_values=[""],
                    strings_can_be_null=True,
                    decimal_point=self._decimal,
                ),
            )
            with closing(reader):
                for batch in reader:
                    if len(batch):
                        yield self._decoded(batch, numbers, first_row)
                    first_row += len(batch)

    def where(self, row: int) -> str:
        """Names a row, counted from 0 behind the header."""
        return f"row {row} of {str(self._file)!r}"

    def _decoded(self, batch: Any, numbers: Sequence[str], first_row: int) -> dict[str, NDArray[Any]]:
        piece: dict[str, NDArray[Any]] = {}
        for name, array in zip(batch.schema.names, batch.columns, strict=True):
            if array.null_count:
                raise ValueError(
                    f"`{name}` has no value in {self.where(first_row + first_null(array))}; fill it in, or drop the "
                    "row's episode."
                )
            values = array.to_numpy(zero_copy_only=False)
            if pa.types.is_boolean(array.type):
                values = values.astype(np.float64)
            if name in numbers and not np.isfinite(values).all():
                row = int(np.argmin(np.isfinite(values)))
                raise ValueError(
                    f"`{name}` holds {values[row]} in {self.where(first_row + row)}; observations, actions and rewards "
                    "must be finite: repair the value or drop the episode."
                )
            piece[name] = values
        return piece

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns what PyArrow raises about the content into a ValueError that names column and row."""
        try:
            yield
        except pa.ArrowException as err:
            found = _BAD_VALUE.search(str(err))
            if found is not None:
                column, line, value = found.groups()
                row = int(line) - 2
                raise ValueError(
                    f"`{self.names[int(column)]}` must hold numbers, got {value!r} in {self.where(row)}; "
                    f"{self._remedy(value.strip(), row)}."
                ) from err
            found = _BAD_LENGTH.search(str(err))
            if found is not None:
                line, expected, count = map(int, found.groups())
                raise ValueError(
                    f"There are {count} values in {self.where(line - 2)}, and {expected} columns in the header; the "
                    "file may be incomplete or damaged: copy or write it again."
                ) from err
            raise ValueError(
                f"{str(self._file)!r} is not a readable CSV file ({err}); it may be incomplete or damaged: copy or "
                "write it again."
            ) from err

    def _remedy(self, value: str, row: int) -> str:
        """What to do about a value that is no number."""
        if self._decimal == "." and _DECIMAL_COMMA.fullmatch(value):
            return "say `decimal: ','` in the column map"
        if _TIME.search(value):
            return "write times as numbers, such as seconds, or leave the column out of the map"
        if row == 0:
            return "repair the value, delete the row if it is one of units, or name another column in the map"
        return "repair the value, or name another column in the map"


def as_truths(name: str, texts: NDArray[Any], where: Any, decimal: str = ".") -> NDArray[np.bool_]:
    """Booleans from texts such as "1", "0.0" and "True".

    Args:
        name: The column, for the message.
        texts: [R]
        where: Says where an entry was read.
        decimal: The decimal point.

    Raises:
        ValueError: If a text means something else.
    """
    values, places = np.unique(texts.astype(str), return_inverse=True)
    truths = [_truth(value.strip().lower().replace(decimal, ".")) for value in values.tolist()]
    if None in truths:
        number = truths.index(None)
        raise ValueError(
            f"`{name}` must be 0 or 1 in every row, got {values[number]} in {where(int(np.argmax(places == number)))}; "
            "repair the value."
        )
    return np.array(truths, dtype=bool)[places]


def _truth(text: str) -> bool | None:
    """What a text says, in any notation of 0 and 1; None if it says something else."""
    if text in _TRUTHS:
        return _TRUTHS[text]
    try:
        return {0.0: False, 1.0: True}.get(float(text))
    except ValueError:
        return None


def example_map(names: Sequence[str]) -> str:
    """A map of these columns to begin with, as text of one line."""
    kinds: Mapping[str, str] = {"rewards": r"rew|^r$", "actions": r"^(a|u|act|cmd|action|control)", "t": r"^(t|time)\b"}
    found: dict[str, list[str]] = {kind: [] for kind in (*kinds, "obs")}
    for name in names:
        kind = next((kind for kind, pattern in kinds.items() if re.search(pattern, name.lower())), "obs")
        found[kind].append(name)
    rewards = found["rewards"][0] if found["rewards"] else "..."
    return (
        f"obs: [{', '.join(found['obs'][:3]) or '...'}{', ...' if len(found['obs']) > 3 else ''}]; actions: "
        f"[{', '.join(found['actions'][:3]) or '...'}]; rewards: {rewards}; terminated: ...; truncated: ...; "
        "episode: ..."
    )


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True
