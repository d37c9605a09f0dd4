"""`progress.csv`: every column in every row, also of a run that was killed and goes on."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest

from rllib_calql.progress.results_table import ResultsTable, with_rows_of

FIRST = {"training_iteration": 1, "phase": "offline", "config": {"lr": 1.0}, "learners": {"loss": 0.5}}
EVALUATED = {"training_iteration": 2, "phase": "online", "evaluation": {"return": -3.0}, "learners": {"loss": 0.25}}


def trial_in(folder: Path, *, has_checkpoint: bool = False) -> Any:
    stored = folder / "stored"
    storage = SimpleNamespace(trial_fs_path=str(stored), storage_filesystem=pyarrow.fs.LocalFileSystem())
    local = folder / "local"

    def init_local_path() -> None:
        local.mkdir(exist_ok=True)

    checkpoint = "some" if has_checkpoint else None
    return SimpleNamespace(
        trial_id="t", local_path=str(local), storage=storage, checkpoint=checkpoint, init_local_path=init_local_path
    )


def rows_of(trial: Any) -> list[dict[str, str]]:
    with Path(trial.local_path, "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_column_that_comes_later_is_in_every_row(tmp_path: Path) -> None:
    trial, table = trial_in(tmp_path), ResultsTable()
    for result in (FIRST, EVALUATED, FIRST | {"training_iteration": 3}):
        table.on_trial_result(iteration=0, trials=[trial], trial=trial, result=result)
    assert [list(row.items()) for row in rows_of(trial)] == [
        [("training_iteration", "1"), ("phase", "offline"), ("learners/loss", "0.5"), ("evaluation/return", "")],
        [("training_iteration", "2"), ("phase", "online"), ("learners/loss", "0.25"), ("evaluation/return", "-3.0")],
        [("training_iteration", "3"), ("phase", "offline"), ("learners/loss", "0.5"), ("evaluation/return", "")],
    ]


def test_a_resumed_run_keeps_the_columns_of_the_file_and_drops_a_row_that_was_cut_off(tmp_path: Path) -> None:
    trial = trial_in(tmp_path, has_checkpoint=True)
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "progress.csv").write_text("phase,training_iteration,dip\noffline,1,\nonline,2")
    ResultsTable().on_trial_result(iteration=0, trials=[trial], trial=trial, result=EVALUATED)
    assert [(row["phase"], row["training_iteration"], row["evaluation/return"]) for row in rows_of(trial)] == [
        ("offline", "1", ""),
        ("online", "2", "-3.0"),
    ]


def test_a_rewrite_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, table = trial_in(tmp_path), ResultsTable()
    table.on_trial_result(iteration=0, trials=[trial], trial=trial, result=FIRST)
    before = Path(trial.local_path, "progress.csv").read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError("killed here")

    monkeypatch.setattr("rllib_calql.progress.results_table.os.replace", fail)
    with pytest.raises(OSError, match="killed here"):
        table.on_trial_result(iteration=0, trials=[trial], trial=trial, result=EVALUATED)
    assert Path(trial.local_path, "progress.csv").read_bytes() == before


def test_rows_that_were_not_copied_before_a_sudden_end_are_made_of_the_results(tmp_path: Path) -> None:
    trial, table = trial_in(tmp_path), ResultsTable()
    results = [FIRST | {"timestamp": 10}, EVALUATED | {"timestamp": 20}, FIRST | {"training_iteration": 3}]
    for result in results:
        table.on_trial_result(iteration=0, trials=[trial], trial=trial, result=result)
    whole = Path(trial.local_path, "progress.csv").read_bytes()
    assert with_rows_of(whole, results) == whole
    assert with_rows_of(whole[:-3], results) == whole  # Torn.
    lines = whole.splitlines(keepends=True)
    for rest in (lines[:1], lines[:2], [lines[0], lines[3]], lines[:1] + lines[2:]):
        assert with_rows_of(b"".join(rest), results) == whole
    assert list(csv.DictReader(with_rows_of(b"", results).decode().splitlines())) == rows_of(trial)
    assert with_rows_of(whole, results[:1]) == b"".join(lines[:2])


def test_a_result_that_was_made_again_after_a_failure_keeps_a_row_of_its_own() -> None:
    results = [{"training_iteration": 1, "timestamp": stamp, "loss": loss} for stamp, loss in ((10, 0.5), (20, 0.25))]
    table = b"training_iteration,timestamp,loss\r\n1,10,0.5\r\n1,20,0.25\r\n"
    assert with_rows_of(table, results) == table
    assert with_rows_of(b"", []) == b""
    assert with_rows_of(b"a,b\n1,2\n", results) == b"a,b\n1,2\n"
