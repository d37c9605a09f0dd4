"""`ResultsTable`: `progress.csv` of every trial, with all columns from its first row on."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.logger import CSVLoggerCallback
from ray.tune.result import EXPR_PROGRESS_FILE, TRAINING_ITERATION
from ray.tune.utils import flatten_dict

_TIMESTAMP = "timestamp"  # RLlib's; with the iteration it tells a result from one that was made again.


class ResultsTable(CSVLoggerCallback):  # Of this kind, so that Tune adds no other.
    """Writes the results of trials as Tune's logger does, to the same place.

    Tune's logger takes the columns of the first result for good, where those of evaluations are missing as a rule, and
    after a resume those of another result than the file begins with. Here a new column is added to the rows before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._columns: dict[str, list[str]] = {}  # Of each trial's file, by the trial's id.

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        """Adds a row."""
        row = _row_of(result)
        trial.init_local_path()
        path = Path(trial.local_path, EXPR_PROGRESS_FILE)
        if trial.trial_id not in self._columns:
            self._restore_from_remote(EXPR_PROGRESS_FILE, trial)
            self._columns[trial.trial_id] = _read(path)[0]
            _drop_torn_row(path)
        columns = self._columns[trial.trial_id]
        if new := [name for name in row if name not in columns]:
            columns += new
            _rewrite(path, columns)
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns).writerow(row)

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        """Lets go of the trial."""
        self._columns.pop(trial.trial_id, None)


def with_rows_of(table: bytes, results: Sequence[Mapping[str, Any]]) -> bytes:
    """The content of a trial's file with one row for each of these results, in their order.

    The rows that it has stay as they are, except those of other results and one that was cut off. Those that it lacks,
    because a sudden end came before the file was copied, are made of the results.

    Args:
        table: Content of the file; empty if there is none.
        results: As they were logged.
    """
    reader = csv.DictReader(io.StringIO(table.decode(errors="replace"), newline=""))
    found = [row for row in reader if None not in row and None not in row.values()]
    columns = list(reader.fieldnames or [])
    if columns and TRAINING_ITERATION not in columns:
        return table  # Of whatever else.
    if found and not table.endswith(b"\n"):
        found.pop()
    known = {(row[TRAINING_ITERATION], row.get(_TIMESTAMP) or ""): row for row in found}
    rows = []
    for result in results:
        made = _row_of(result)
        key = (str(result.get(TRAINING_ITERATION, "")), str(result.get(_TIMESTAMP, "")))
        if key not in known:
            columns += [name for name in made if name not in columns]
        rows.append(known.get(key, made))
    if not columns:
        return table
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, columns)
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue().encode()


def _row_of(result: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = flatten_dict({key: value for key, value in result.items() if key != "config"}, delimiter="/")
    return row


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; none of a file that does not exist."""
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row and None not in row.values()]  # Others were cut off.
        return list(reader.fieldnames or []), rows


def _drop_torn_row(path: Path) -> None:
    """A row that was cut off by a sudden end would become one with the next."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        _rewrite(path, _read(path)[0])


def _rewrite(path: Path, columns: list[str]) -> None:
    """Writes the file anew with these columns; it is there whole at any moment."""
    _, rows = _read(path)
    partial = path.with_name(f".rllib_calql_{path.name}")  # A name that a run may leave behind.
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)
