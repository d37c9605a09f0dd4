"""What a study finds in its folder and leaves there: others' files, damaged files, names of every kind."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from run_folder_files import HOLDER, OF_A_RUN, files_in, write
from test_study import all_rows, rows_of, study_file, study_of

from rllib_calql.commands import study as study_cli
from rllib_calql.commands.main import main
from rllib_calql.experiments.reading.errors import ExperimentError
from rllib_calql.study.evaluations import write_results
from rllib_calql.study.report import write_report


class ReachedRay(click.ClickException):
    """Ends the command where it would start Ray."""

    exit_code = 77


def run_study(study: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """The command up to the start of Ray, for which the exit code is 77."""

    def start_ray(*args: object, **kwargs: object) -> None:
        raise ReachedRay("start")

    monkeypatch.setattr(study_cli, "start_ray", start_ray)
    return CliRunner().invoke(main, ["study", str(study), "--output", str(folder)])


def write_finished(tmp_path: Path, folder: Path, *, num_left: int = 0) -> list[Path]:
    """Trials of the study as earlier versions left them; returns their files."""
    files = []
    for trial in study_of(tmp_path).trials[num_left:]:
        rows = [dataclasses.asdict(row) for row in rows_of(trial.algorithm, trial.seed, [0.0, 1.0, 1.0], trial.task)]
        files.append(folder / trial.folder / "evaluations.json")
        files[-1].parent.mkdir(parents=True)
        files[-1].write_text(json.dumps({"fingerprint": trial.fingerprint, "evaluations": rows}))
    return files


# --- Others' files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "foreign", ["tune/results.csv", "trials/notes.txt", "trials/a/b/c/d.txt", "src/model.py", "a.txt"]
)
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: str
) -> None:
    folder = tmp_path / "project"
    write(folder, foreign)
    outcome = run_study(study_file(tmp_path), folder, monkeypatch)
    assert outcome.exit_code == 2, outcome.output
    assert "which no study made" in outcome.output
    assert files_in(folder) == {foreign}


def test_a_tune_folder_that_the_study_did_not_make_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, folder = study_file(tmp_path), tmp_path / "results"
    assert run_study(study, folder, monkeypatch).exit_code == 77
    assert run_study(study, folder, monkeypatch).exit_code == 77  # It replaces its own.
    write(folder, "notes.txt")
    assert run_study(study, folder, monkeypatch).exit_code == 77
    (folder / "tune" / ".rllib_calql_study.json").unlink()
    write(folder, "tune/mine.txt")
    outcome = run_study(study, folder, monkeypatch)
    assert outcome.exit_code == 2
    assert "was not made by the study 'lines'" in outcome.output
    assert (folder / "tune" / "mine.txt").is_file()
    (folder / "tune" / "mine.txt").unlink()
    (folder / "tune").rmdir()
    write(tmp_path / "elsewhere", "tuner.pkl")
    (folder / "tune").symlink_to(tmp_path / "elsewhere")
    assert run_study(study, folder, monkeypatch).exit_code == 2
    assert files_in(tmp_path / "elsewhere") == {"tuner.pkl"}


def test_a_folder_of_an_earlier_version_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, folder = study_file(tmp_path), tmp_path / "results"
    write_finished(tmp_path, folder, num_left=1)
    write(folder, *(f"tune/{name}" for name in OF_A_RUN))
    assert run_study(study, folder, monkeypatch).exit_code == 77
    assert files_in(folder / "tune") == {".rllib_calql_study.json"}
    write_results(tmp_path / "reported", all_rows(), {"name": "lines"})
    write_finished(tmp_path, tmp_path / "reported", num_left=1)
    assert run_study(study, tmp_path / "reported", monkeypatch).exit_code == 77


def test_two_studies_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results"
    assert run_study(study_file(tmp_path), folder, monkeypatch).exit_code == 77
    outcome = run_study(study_file(tmp_path, name="others"), folder, monkeypatch)
    assert outcome.exit_code == 2
    assert "holds the results of the study 'lines', this one is called 'others'" in outcome.output
    write_results(tmp_path / "reported", all_rows(), {"name": "lines"})
    assert run_study(study_file(tmp_path, name="others"), tmp_path / "reported", monkeypatch).exit_code == 2


def test_a_study_that_another_process_runs_is_refused_until_that_one_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, folder = study_file(tmp_path), tmp_path / "results"
    folder.mkdir()
    command = [sys.executable, "-c", HOLDER, str(folder / ".rllib_calql_study.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        outcome = run_study(study, folder, monkeypatch)
        assert outcome.exit_code == 2
        assert f"A study is still going on in '{folder}': Process {holder.pid} on" in outcome.output
        holder.kill()
    assert run_study(study, folder, monkeypatch).exit_code == 77


@pytest.mark.parametrize("name", ["../evil", "/evil", "..", "a/b", "", ["a"], False])
def test_the_name_of_a_study_is_a_plain_one(tmp_path: Path, name: Any) -> None:
    message = (
        "must be a plain name" if isinstance(name, str) else r"is (\['a'\]|False) in YAML, no text; write it in quotes"
    )
    with pytest.raises(ExperimentError, match=rf"name` of the study file '.*study\.yaml' {message}"):
        study_of(tmp_path, name=name)


def test_trials_folders_lie_in_the_study_whatever_their_names(tmp_path: Path) -> None:
    names = ["../../evil", "/evil/x", "..", "a" * 1000, "a" * 1001, "\u2603"]
    study = study_of(tmp_path, algorithms={name: {} for name in names[:2] + names[3:]})
    for trial in study.trials:
        assert trial.folder.parts[0] == "trials"
        assert len(trial.folder.parts) == 4
        assert all(re.fullmatch(r"[a-z0-9_]{1,150}", part) for part in trial.folder.parts)
    assert len({trial.folder for trial in study.trials}) == len(study.trials)


# --- Damaged files ----------------------------------------------------------------------------------------------------

DAMAGED = ["", "{", '{"fingerprint": "x", "evalua', "[]", "null", "{}", '{"fingerprint": 1, "evaluations": []}', "\x00"]
DAMAGED += ['{"fingerprint": "x", "evaluations": [{"task": "Line"}]}', '{"fingerprint": "x", "evaluations": 3}']
DAMAGED += ['{"fingerprint": "x", "evaluations": [{"another": "schema"}]}', "[" * 100_000, "9" * 5000]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_evaluations_of_a_trial_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    study, folder = study_file(tmp_path), tmp_path / "results"
    file = write_finished(tmp_path, folder)[1]
    file.write_text(content)
    outcome = run_study(study, folder, monkeypatch)
    assert outcome.exit_code == 2
    assert f"'{file}' is damaged" in outcome.output
    assert "Delete it to run 'Line | CQL | seed 0' again." in outcome.output
    assert file.read_text() == content


@pytest.mark.parametrize("column", ["num_episodes", "return_mean"])
def test_evaluations_with_numbers_that_no_table_holds_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    study, folder = study_file(tmp_path), tmp_path / "results"
    file = write_finished(tmp_path, folder)[1]
    content = json.loads(file.read_text())
    content["evaluations"][0][column] = 10**400
    file.write_text(json.dumps(content))
    outcome = run_study(study, folder, monkeypatch)
    assert outcome.exit_code == 2
    assert f"'{file}' is damaged, or not of a trial: TypeError: `{column}` has more than 64 bits." in outcome.output


def test_damaged_evaluations_beside_a_checkpoint_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, folder = study_file(tmp_path), tmp_path / "results"
    file = folder / study_of(tmp_path).trials[0].folder / "checkpoint" / "evaluations.json"
    write(file.parent, file.name)
    outcome = run_study(study, folder, monkeypatch)
    assert outcome.exit_code == 2
    assert f"'{file}' is damaged" in outcome.output


@pytest.mark.parametrize("file", ["evaluations.parquet", "study.json"])
@pytest.mark.parametrize("damage", ["empty", "half", "other", "missing"])
def test_damaged_results_are_named(tmp_path: Path, file: str, damage: str) -> None:
    write_results(tmp_path, all_rows(), {"name": "mazes", "seeds": [0, 1]})
    path = tmp_path / file
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other" and file == "study.json":
        path.write_text('["a list"]')
    elif damage == "other":
        pq.write_table(pa.table({"task": ["Maze"], "score": [1.0]}), path)
    else:
        path.write_bytes(whole[: len(whole) // 2 if damage == "half" else 0])
    outcome = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert outcome.exit_code == 1
    assert str(outcome.exception) == "1"  # The exit, and no error of a library.
    assert file in outcome.output
    assert str(tmp_path) in outcome.output


def test_without_matplotlib_a_study_is_refused_before_its_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = run_study(study_file(tmp_path), tmp_path / "results", monkeypatch)
    assert outcome.exit_code == 1
    assert 'pip install "rllib-calql[plots]"' in outcome.output
    assert not (tmp_path / "results").exists()


# --- Reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.html", "summary.md", "dip.png"])
def test_a_report_replaces_no_files_of_others(tmp_path: Path, name: str) -> None:
    write_results(tmp_path / "results", all_rows(), {"name": "mazes"})
    write(tmp_path / "mine", name)
    outcome = CliRunner().invoke(main, ["report", str(tmp_path / "results"), "--output", str(tmp_path / "mine")])
    assert outcome.exit_code == 1
    assert f"'{tmp_path}/mine/{name}' is of no report" in outcome.output
    assert (tmp_path / "mine" / name).read_text() == "x"


def test_a_report_is_replaced_by_the_next_and_links_are_not_followed(tmp_path: Path) -> None:
    write_results(tmp_path / "results", all_rows(), {"name": "mazes"})
    write_report([tmp_path / "results"], tmp_path / "report")
    write(tmp_path, "victim.md")
    (tmp_path / "report" / "summary.md").unlink()
    (tmp_path / "report" / "summary.md").symlink_to(tmp_path / "victim.md")
    write_report([tmp_path / "results"], tmp_path / "report")
    assert (tmp_path / "victim.md").read_text() == "x"
    assert (tmp_path / "report" / "summary.md").read_text().startswith("### Maze")


class Cells(html.parser.HTMLParser):
    """Texts of the cells and headings of a page, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self._is_open = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Begins a text."""
        self.tags.add(tag)
        self._is_open = tag in ("td", "th", "h1", "h2")
        if self._is_open:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        """Ends it."""
        self._is_open = False

    def handle_data(self, data: str) -> None:
        """Goes on with it."""
        if self._is_open:
            self.texts[-1] += data


NAMES = [
    *(
        r"$\foo$",
        r"$\frac{$",
        "$",
        "a|b",
        r"a\|b",
        "<script>alert(1)</script>",
        "</td>",
        "a & b",
        "&lt;",
        "\"quotes'",
        "`code`",
    ),
    *("two\nlines", "[a](b)", "*a*", "_hidden", "# a", "\U0001f600", "算法", "n" * 400, "<!-- ", "a_b", "~~a~~", "---"),
]


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table, by GitHub's rules: a bar is one of the text behind a backslash."""
    return [re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.filterwarnings("error")
def test_names_of_every_kind_come_out_in_reports_as_they_are(tmp_path: Path) -> None:
    half = len(NAMES) // 2
    for number, some in enumerate((NAMES[:half], NAMES[half:])):
        rows = [row for name in some for seed in (0, 1) for row in rows_of(name, seed, [0.0, 0.5, 1.0], task=some[0])]
        write_results(tmp_path / str(number), rows, {"name": "<study> & more", "tasks": some})
    page = write_report([tmp_path / "0", tmp_path / "1"], tmp_path / "report")
    parser = Cells()
    parser.feed(page.read_text(encoding="utf-8"))
    assert set(NAMES) | {"<study> & more, <study> & more"} <= set(parser.texts)
    tags = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "img", "pre"}
    assert parser.tags <= tags
    lines = (tmp_path / "report" / "summary.md").read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert {len(cells_of(line)) for line in tables} == {8}
    shown = {cells_of(line)[0] for line in tables}
    assert {" ".join(html.escape(name, quote=False).split()) for name in NAMES} <= shown
    assert not [line for line in lines if re.search(r"<(?!-)", line)]
    assert len([line for line in lines if line.startswith("#")]) == 2
