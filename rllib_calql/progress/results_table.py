"""`ResultsTable`: `progress.csv` of every trial, with all columns from its first row on."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.logger import CSVLoggerCallback
from ray.tune.result import EXPR_PROGRESS_FILE
from ray.tune.utils import flatten_dict


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
        row = flatten_dict({key: value for key, value in result.items() if key != "config"}, delimiter="/")
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
