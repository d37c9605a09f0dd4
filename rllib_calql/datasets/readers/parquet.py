"""Reads Parquet rows, one transition per row, file after file in natural order (part-2 before part-10)."""

from __future__ import annotations

from collections.abc import Sequence

from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.datasets.episodes.reader import ActionsKind, ReadOptions
from rllib_calql.datasets.rows.arrow import decode_numbers
from rllib_calql.datasets.rows.arrow_columns import ColumnDecoder, find_row_columns
from rllib_calql.datasets.rows.arrow_rows import ArrowRowsReader
from rllib_calql.datasets.rows.parquet_files import ParquetSource

SUFFIXES = (".parquet", ".pq")


class ParquetReader(ArrowRowsReader):
    """Episodes from Parquet rows; see `ArrowRowsReader` for the columns."""

    def __init__(
        self,
        name: str,
        files: Sequence[DataFile],
        options: ReadOptions,
        *,
        actions: ActionsKind = "environment",
        decode: ColumnDecoder = decode_numbers,
        unfinished_remedy: str = "drop it or mark its last step",
    ) -> None:
        """Checks columns and sizes; no row is read yet.

        Args:
            name: The input as the user wrote it.
            files: Parquet files in the order in which their rows follow each other.
            options: How incomplete data are read.
            actions: What the actions in the files are.
            decode: Turns observations and actions into arrays.
            unfinished_remedy: What an error recommends for an episode that ends neither terminated nor truncated.

        Raises:
            ValueError: If a column is missing, files differ in their columns, or there are no rows.
        """
        self._files = list(files)
        source = ParquetSource(
            name, self._files, lambda schema, where: find_row_columns(schema, options, where).in_table.values()
        )
        super().__init__(name, source, options, actions=actions, decode=decode, unfinished_remedy=unfinished_remedy)

    def fingerprint(self) -> str:
        """Digest of the files."""
        return fingerprint_of(self._files)
