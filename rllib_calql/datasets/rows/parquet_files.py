"""Parquet files: opened in small pieces and without what would unpickle, and their rows, one file after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rllib_calql.datasets.episodes.files import DataFile, said_of_content
from rllib_calql.datasets.rows.arrow import describe_type
from rllib_calql.datasets.rows.arrow_rows import BLOCK_BYTES

_UNPICKLING_OPTIONS_OF_RAY = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
)
_READ_BUFFER_BYTES = 2**20
_REMOTE_READ_BUFFER_BYTES = 8 * 2**20


@contextmanager
def readable(file: DataFile) -> Iterator[None]:
    """Turns what PyArrow raises about the content of a file into a ValueError that names the file."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    # PyArrow reports broken files as `ArrowException`s, as OSErrors, as text that is no UTF-8, and, where a broken
    # length asks for terabytes, as a MemoryError.
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as err:
        if isinstance(err, MemoryError) and not isinstance(err, pa.ArrowException):
            raise
        other = said_of_content(file, "Parquet")
        remedy = f".{other}" if other else "; copy or write it again."
        raise ValueError(f"{str(file)!r} is not a readable Parquet file ({err}){remedy}") from err


def open_parquet(file: DataFile) -> Any:
    """Opens a Parquet file so that it is read in small pieces.

    Raises:
        ValueError: If it is not a Parquet file, or Ray Data would unpickle what its schema holds.
    """
    _refuse_unpickling(file)
    is_local = file.local_path is not None
    with readable(file):
        return pq.ParquetFile(
            file.local_path if is_local else file.open(),
            # Without a buffer size, pyarrow loads the column chunks of a whole row group, often the whole file.
            buffer_size=_READ_BUFFER_BYTES if is_local else _REMOTE_READ_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )


def _refuse_unpickling(file: DataFile) -> None:
    """Refuses to open a file while Ray Data, if it is loaded, has been told to unpickle the types in its schema."""
    for name in _UNPICKLING_OPTIONS_OF_RAY:
        if os.environ.get(name, "0") not in ("0", "", "false", "False"):
            raise ValueError(
                f"{str(file)!r} is not opened: the environment variable `{name}` has Ray Data unpickle what Parquet "
                "files hold, which runs whatever stands there; unset it for this program."
            )


class ParquetSource:
    """The rows of Parquet files, one file after the other."""

    def __init__(self, name: str, files: Sequence[DataFile], columns_of: Callable[[Any, str], Collection[str]]) -> None:
        """Reads the footers, and checks that all files have the same columns.

        Args:
            name: The input as the user wrote it.
            files: Files in the order in which their rows follow each other.
            columns_of: (Arrow schema, name of the file) -> names of the columns that are read.

        Raises:
            ValueError: If files differ in their columns, one is broken, or there are no rows.
        """
        self._files = list(files)
        num_rows, num_bytes = [], 0
        first: tuple[DataFile, Any] | None = None
        for file in self._files:
            with open_parquet(file) as parquet_file, readable(file):
                schema, metadata = parquet_file.schema_arrow, parquet_file.metadata
            num_rows.append(metadata.num_rows)
            num_bytes += sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            if metadata.num_rows and first is None:
                first = file, schema
                self.label, self.schema = repr(str(file)), schema
            elif metadata.num_rows and first is not None:
                _check_same_columns(*first, file, schema, columns_of)
        self.num_rows: int | None = sum(num_rows)
        if not self.num_rows:
            raise ValueError(f"`input_` {name!r} is empty: its Parquet files have no rows; name files that have.")
        self._first_rows = np.concatenate([[0], np.cumsum(num_rows, dtype=np.int64)])
        self._batch_rows = int(np.clip(BLOCK_BYTES // max(num_bytes // self.num_rows, 1), 16, 2**16))

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Yields record batches of the columns."""
        # Ids alone are small, and short batches of them would cost more than their content.
        batch_rows = self._batch_rows if len(columns) > 1 else 2**16
        for number, file in enumerate(self._files):
            expected = int(self._first_rows[number + 1] - self._first_rows[number])
            if not expected:
                continue
            with open_parquet(file) as parquet_file:
                batches = parquet_file.iter_batches(batch_rows, columns=columns)
                num_rows = 0
                while True:
                    with readable(file):
                        batch = next(batches, None)
                        if batch is not None and batch.num_columns == 1:
                            batch.validate(full=True)  # Ids are text that is decoded later.
                    if batch is None:
                        break
                    num_rows += len(batch)
                    yield batch
            if num_rows != expected:
                raise ValueError(
                    f"{str(file)!r} is not a readable Parquet file (it has {num_rows} rows, its footer says "
                    f"{expected}); copy or write it again."
                )

    def where(self, row: int) -> str:
        """Names file and row (from 0) of a row counted over all files."""
        part = self.part_of(row)
        return f"row {row - self._first_rows[part]} of {str(self._files[part])!r}"

    def part_of(self, row: int) -> int:
        """Number of the file that holds the row."""
        return int(np.searchsorted(self._first_rows, row, side="right")) - 1


def _check_same_columns(
    first: DataFile, first_schema: Any, file: DataFile, schema: Any, columns_of: Callable[[Any, str], Collection[str]]
) -> None:
    columns = columns_of(first_schema, repr(str(first)))
    for name in columns:
        if name not in schema.names:
            raise ValueError(
                f"{str(file)!r} has no column `{name}`; its columns are "
                f"{', '.join(f'`{other}`' for other in schema.names)}, and {str(first)!r} has `{name}`; all files "
                "must have the same columns: rename the column, or add it."
            )
        types = [describe_type(each.field(name).type) for each in (first_schema, schema)]
        if types[0] != types[1]:
            raise ValueError(
                f"`{name}` holds {types[0]} in {str(first)!r} and {types[1]} in {str(file)!r}; store it in one type."
            )
    for name in columns_of(schema, repr(str(file))):
        if name not in columns:
            raise ValueError(
                f"{str(first)!r} has no column `{name}`, and {str(file)!r} has one; all files must have the same "
                "columns: drop the column, or add it."
            )
