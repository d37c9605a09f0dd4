"""The command `rllib report`: what came out of runs or of studies, without running anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rllib_calql.commands.setup import UsageError, errors_in_one_line

if TYPE_CHECKING:
    from rllib_calql.progress.runs import RunRecord

_REMEDY = "give the folder of a run, as `rllib train file` names it, or of a study, as `rllib study` does."
_STUDY, _RUN = "study", "run"
_STUDY_FILES = ("study.json", "evaluations.parquet", ".rllib_calql_study.json")
_CHECKPOINT_FILES = ("class_and_ctor_args.pkl", "calql.json")


@click.command(epilog="Example: rllib report ~/ray_results/pendulum ~/ray_results/pendulum-2 --output comparison")
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the report (default: the first RESULTS).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the table of runs as JSON, and write nothing.")
def report(results: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    """Report on RESULTS, folders of `rllib train file` or of `rllib study`, without running anything.

    Runs, also those that go on, were interrupted or failed, are compared in one table and one picture. Studies make one
    report over all their tasks.
    """
    kinds = {result: _kind_of(result) for result in results}
    if len(set(kinds.values())) > 1:
        named = [next(result for result in results if kinds[result] == kind) for kind in (_RUN, _STUDY)]
        raise UsageError(
            f"One report is on runs or on studies, got the run '{named[0]}' and the study '{named[1]}'; give the "
            "command once for each kind."
        )
    if _STUDY in kinds.values():
        if as_json:
            raise UsageError("`--json` is for runs; the results of a study are in its `evaluations.parquet`. Drop it.")
        folders = [Path(result) for result in results]
        click.echo(f"Wrote {report_on_studies(folders, output or folders[0])}")
        return
    with errors_in_one_line():
        _report_on_runs(list(dict.fromkeys(results)), output, as_json)


def report_on_studies(results: list[Path], folder: Path) -> Path:
    """Writes the report on studies, and returns its page."""
    from rllib_calql.study.report import write_report

    with errors_in_one_line():
        return write_report(results, folder)


def _report_on_runs(results: list[str], output: Path | None, as_json: bool) -> None:
    from rllib_calql.progress import report

    runs = [_read(result) for result in results]
    trials = report.named_trials(runs)
    if empty := [run for run in runs if not any(trial.points for trial in run.trials)]:
        failed = any(trial.status == "failed" for run in empty for trial in run.trials)
        why = "; a trial failed before its first, its `error.txt` there says why" if failed else ""
        raise click.ClickException(f"There is no result yet in {', '.join(repr(run.path) for run in empty)}{why}.")
    if as_json:
        click.echo(report.as_json(trials))
        return
    click.echo(report.as_text(trials))
    if output is None and "://" in results[0]:
        return  # Nothing is written where nobody has asked for it.
    is_one = len(runs) == 1
    folder = (Path(results[0]) if output is None else output).expanduser()
    page = folder / (report.PAGE if is_one else report.COMPARISON_PAGE)
    picture_file = folder / (report.PICTURE if is_one else report.COMPARISON_PICTURE)
    former = page.read_text(encoding="utf-8", errors="replace") if page.exists() else ""
    if page.exists() and not report.is_own_page(former):
        raise click.ClickException(f"'{page}' is of no report; move it away, or give another `--output`.")
    title = ", ".join(run.name for run in runs)
    picture = None
    try:
        picture = report.draw(trials, title)
    except ImportError as error:
        click.echo(f"The page has no curves. {error}", err=True)
    folder.mkdir(parents=True, exist_ok=True)
    if picture is not None:
        picture_file.write_bytes(picture)
    # In a folder of the user's choice there may be the page of another run.
    former = former if is_one and output is None else ""
    page.write_text(report.page(title, trials, picture, former=former), encoding="utf-8")
    click.echo(f"Wrote {page}")


def _read(result: str) -> RunRecord:
    from pyarrow.fs import FileSystem, LocalFileSystem

    from rllib_calql.progress.runs import read_run

    if "://" in result:
        filesystem, path = FileSystem.from_uri(result)
        return read_run(filesystem, path)
    return read_run(LocalFileSystem(), str(Path(result).expanduser().resolve()))


def _kind_of(result: str) -> str:
    """Whether a folder is of a run or of a study.

    Raises:
        UsageError: If it is neither; the message says what it is.
    """
    from pyarrow.fs import LocalFileSystem

    from rllib_calql.progress.runs import is_run

    if "://" in result:
        return _RUN
    folder = Path(result).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"'{result}' {what}; {_REMEDY}")
    if any((folder / name).exists() for name in _STUDY_FILES):
        return _STUDY
    if is_run(LocalFileSystem(), str(folder.resolve())):
        return _RUN
    if any((folder / name).exists() for name in _CHECKPOINT_FILES):
        raise UsageError(f"'{result}' is a checkpoint; give the folder of its run, '{folder.resolve().parents[1]}'.")
    inside = [one for one in sorted(folder.iterdir()) if one.is_dir() and is_run(LocalFileSystem(), str(one.resolve()))]
    hint = f" There are runs in it: {', '.join(map(repr, map(str, inside[:3])))}." if inside else ""
    raise UsageError(f"'{result}' is neither the folder of a run nor of a study; {_REMEDY}{hint}")
