"""The command `rllib study`. Ray is imported only once trials are run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from rllib_calql.commands.import_path import use_folder_of
from rllib_calql.commands.report import report_on_studies
from rllib_calql.commands.setup import (
    UsageError,
    errors_in_one_line,
    exit_interrupted,
    grace_option,
    prepare,
    root_cause,
    start_ray,
    stop_ray,
)
from rllib_calql.system.stop_signals import StopSignals, outliving_terminal

_DEFAULT_FOLDER = "~/ray_results/studies"


@click.command(epilog="Example: rllib study tuned_examples/studies/pointmaze_umaze.yaml")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), help="Results (default: ~/ray_results/studies/NAME)."
)
@click.option("--num-cpus", type=click.IntRange(min=1), help="CPUs for Ray (default: all, or what a trial needs).")
@click.option("--address", help="Address of an existing Ray cluster (default: start Ray here).")
@grace_option
@click.option("-v", "--verbose", is_flag=True, help="Show the logs of Ray and of its workers.")
@click.pass_obj
def study(
    stop: StopSignals,
    file: Path,
    output: Path | None,
    num_cpus: int | None,
    address: str | None,
    grace: float,
    verbose: bool,
) -> None:
    """Compare algorithms on tasks over seeds, as FILE says, and report on it.

    As many trials run at once as there are CPUs. The same command again continues: finished trials are kept, begun ones
    go on from their last checkpoint. Ctrl-C, SIGTERM and SIGHUP let the running trials write one and end the command.
    Checkpoints, also those that `pretrained` in FILE names, are code: use only those that you would run as programs.
    """
    stop.grace_s, stop.saved = grace, "No trial was begun."
    use_folder_of(file)
    prepare(verbose)

    from rllib_calql.datasets.report.plots import require_matplotlib
    from rllib_calql.experiments.reading.errors import ExperimentError
    from rllib_calql.study.folder import claimed, mark, new_tune_folder
    from rllib_calql.study.plan import read_study
    from rllib_calql.study.runner import requests, run_study, unfinished_trials
    from rllib_calql.system.file_lock import LockedError

    try:
        plan = read_study(file)
    except ExperimentError as error:
        raise UsageError(str(error)) from error
    with errors_in_one_line():
        require_matplotlib()  # The report needs it, after hours of trials.
    folder = (output or Path(_DEFAULT_FOLDER, plan.name)).expanduser().resolve()
    with ExitStack() as stack:
        try:
            stack.enter_context(claimed(folder, plan.name))
            waiting = unfinished_trials(plan, folder)
            mark(folder, plan.name)
            if waiting:
                new_tune_folder(folder, plan.name)
        except LockedError as error:
            raise UsageError(
                f"A study is still going on in '{folder}': {error.holder}. Wait for its end, or give another "
                "`--output`."
            ) from error
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error
        if waiting:
            start_ray(requests(plan), stop, num_cpus=num_cpus, address=address, verbose=verbose)
            stop.saved = f"What the trials wrote before is in '{folder}'; give the same command to continue."
        try:
            outcome = run_study(plan, waiting, folder, _say, stop)
        finally:
            if waiting:
                stop_ray()
        stop.saved = (
            f"{outcome.num_finished} of {len(plan.trials)} trials are finished, results are in '{folder}'; give "
            "the same command to continue."
        )
        if outcome.is_interrupted:
            exit_interrupted(stop, stop.saved)
        for name, cause in outcome.errors:
            click.echo(f"Error in '{name}': {cause if verbose else root_cause(cause)}", err=True)
        if outcome.num_finished:
            click.echo(f"Wrote {report_on_studies([folder], folder)}")
        if outcome.errors:
            raise click.ClickException(f"{len(outcome.errors)} of {len(plan.trials)} trials failed.")


def _say(line: str) -> None:
    with outliving_terminal():
        click.echo(line, err=True)
