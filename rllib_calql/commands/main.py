"""The `rllib` command: arguments, runs through Ray Tune, exit codes.

Exit codes: 0 success, 1 a run failed, 2 wrong usage, 130 interrupted, 129 and 143 ended by SIGHUP and SIGTERM. Ray is
imported only once a command needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import rllib_calql
from rllib_calql.commands.dataset import dataset
from rllib_calql.commands.evaluate import evaluate
from rllib_calql.commands.export import export
from rllib_calql.commands.fine_tune import fine_tune
from rllib_calql.commands.import_path import use_folder_of
from rllib_calql.commands.report import report
from rllib_calql.commands.score import score
from rllib_calql.commands.select import select
from rllib_calql.commands.setup import (
    StoppableGroup,
    UsageError,
    exit_interrupted,
    grace_option,
    prepare,
    root_cause,
    start_ray,
    stop_ray,
)
from rllib_calql.commands.study import study
from rllib_calql.progress.display import Display
from rllib_calql.system.plain_names import refuse_unplain_name
from rllib_calql.system.stop_signals import StopSignals, outliving_terminal

if TYPE_CHECKING:
    from rllib_calql.experiments.experiment import Experiment


@click.group(cls=StoppableGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rllib_calql.__version__, "--version", prog_name="rllib-calql")
def main() -> None:
    """Train and evaluate RLlib algorithms, Cal-QL among them."""


for command in (dataset, evaluate, study, report, score, select, export, fine_tune):
    main.add_command(command)


@main.group(epilog="Example: rllib train file tuned_examples/pointmaze_umaze.yaml")
def train() -> None:
    """Train algorithms."""


@train.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--num-samples", type=click.IntRange(min=1), help="Trials per point of the grid; replaces the file's.")
@click.option("--checkpoint-freq", type=click.IntRange(min=0), help="Iterations between checkpoints; 0: none between.")
@click.option("--checkpoint-at-end/--no-checkpoint-at-end", default=None, help="Checkpoint at the end (default: yes).")
@click.option("--storage-path", default="~/ray_results", show_default=True, help="Folder or cloud URI for results.")
@click.option("--name", help="Name of the run's folder (default: the experiment's name).")
@click.option("--resume", is_flag=True, help="Continue the run of this name from its checkpoints.")
@click.option("--overwrite", is_flag=True, help="Remove the run of this name, if there is one, and begin anew.")
@click.option("--seed", type=int, help="Seed of every trial; replaces the file's.")
@click.option("--num-cpus", type=click.IntRange(min=1), help="CPUs for Ray (default: all, or what a trial needs).")
@click.option("--address", help="Address of an existing Ray cluster (default: start Ray here).")
@grace_option
@click.option("-v", "--verbose", is_flag=True, help="Show the logs of Ray and of its workers.")
@click.pass_obj
def file(
    stop: StopSignals,
    file: Path,
    num_samples: int | None,
    checkpoint_freq: int | None,
    checkpoint_at_end: bool | None,
    storage_path: str,
    name: str | None,
    resume: bool,
    overwrite: bool,
    seed: int | None,
    num_cpus: int | None,
    address: str | None,
    grace: float,
    verbose: bool,
) -> None:
    """Run the experiments of FILE, a .yaml or a .py file.

    Ctrl-C, SIGTERM and SIGHUP write a checkpoint after the current iteration and end the run; --resume continues it.
    Checkpoints, which `pretrained` in FILE and --resume open, are code: use only those that you would run as programs.
    Data files are not.
    """
    stop.grace_s, stop.saved = grace, "Nothing was trained by this command."
    if resume and overwrite:
        raise UsageError("`--resume` continues a run and `--overwrite` removes it; drop one.")
    display = click.get_current_context().with_resource(Display())
    display.stage("loading RLlib")
    use_folder_of(file)
    prepare(verbose)

    from rllib_calql.experiments.experiment import read_experiments
    from rllib_calql.experiments.reading.errors import ExperimentError
    from rllib_calql.sources import check_checkpoints

    try:
        experiments = read_experiments(file)
    except ExperimentError as error:
        raise UsageError(str(error)) from error
    if name is not None and len(experiments) > 1:
        raise UsageError(f"`--name` needs a file with one experiment; '{file}' has {len(experiments)}. Drop `--name`.")
    if "://" not in storage_path:
        storage_path = str(Path(storage_path).expanduser().resolve())
    overrides = {"checkpoint_frequency": checkpoint_freq, "checkpoint_at_end": checkpoint_at_end}
    if name is not None:
        try:
            refuse_unplain_name(name, "`--name`")
        except ValueError as error:
            raise UsageError(str(error)) from error
    runs = [
        _with_options(experiment, name=name, num_samples=num_samples, seed=seed, checkpoint_config=overrides)
        for experiment in experiments
    ]
    if not resume:
        try:
            check_checkpoints(example for run in runs for example in run.examples)
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error
    with _run_folders(runs, storage_path, resume=resume, overwrite=overwrite):
        needed = [request for run in runs for request in run.requests]
        display.stage("starting Ray" if address is None else f"joining the Ray cluster at {address}")
        start_ray(needed, stop, num_cpus=num_cpus, address=address, verbose=verbose)
        try:
            failed = [
                run.name for run in runs if not _run(run, storage_path, stop, display, resume=resume, verbose=verbose)
            ]
        finally:
            display.stage("ending Ray")
            stop_ray()
    if failed:
        raise click.ClickException(f"Failed: {', '.join(failed)}.")


def _with_options(
    experiment: Experiment,
    *,
    name: str | None,
    num_samples: int | None,
    seed: int | None,
    checkpoint_config: dict[str, Any],
) -> Experiment:
    given = {key: value for key, value in checkpoint_config.items() if value is not None}
    return replace(
        experiment if seed is None else experiment.with_seed(seed),
        name=experiment.name if name is None else name,
        num_samples=num_samples or experiment.num_samples,
        checkpoint_config={"checkpoint_at_end": True} | experiment.checkpoint_config | given,
    )


@contextmanager
def _run_folders(runs: list[Experiment], storage_path: str, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Keeps the folders of the runs for this process, in the state that the options ask for.

    Raises:
        UsageError: If another process runs one of them, if there is none to resume, or if one has begun and is neither
            to be resumed nor replaced.
    """
    from rllib_calql.experiments.run_folders import RunFolder, shown
    from rllib_calql.system.file_lock import LockedError

    with ExitStack() as stack:
        try:
            folders = [RunFolder(storage_path, run.name) for run in runs]
            for folder in folders:
                stack.enter_context(folder.locked())
        except LockedError as error:
            raise UsageError(
                f"The run in '{error.path.parent}' is still going on: {error.holder}. Wait for its end, or choose "
                "another `--name`."
            ) from error
        except (OSError, ValueError) as error:
            raise UsageError(f"`--storage-path` '{storage_path}' cannot be used: {error}") from error
        begun = [folder for folder in folders if folder.has_begun()]
        # One of several experiments in a file may not have begun yet when the command was stopped.
        if resume and not begun and not any(folder.was_killed for folder in folders):
            raise UsageError(
                f"There is nothing to resume at '{folders[0].path}'; check `--name` and `--storage-path`, or drop "
                "`--resume`."
            )
        for folder in [] if resume else begun:
            if foreign := folder.foreign():
                raise UsageError(
                    f"'{folder.path}' holds {shown(foreign)}, which no run made, so no run begins there and nothing is "
                    "removed; choose another `--name` or `--storage-path`."
                )
            if not overwrite:
                raise UsageError(
                    f"There is a run in '{folder.path}' already. Continue it with `--resume`, begin another with "
                    "`--name NAME`, or replace it with `--overwrite`."
                )
        if overwrite:
            for folder in begun:
                folder.remove_run()
        yield


def _run(
    experiment: Experiment, storage_path: str, stop: StopSignals, display: Display, *, resume: bool, verbose: bool
) -> bool:
    """Runs one experiment to its end. Returns whether no trial failed; exits if interrupted."""
    from rllib_calql.experiments.resuming import ResumeError
    from rllib_calql.experiments.run_checkpoints import has_checkpoint
    from rllib_calql.experiments.tune_runs import run_experiment

    stop.check()
    folder = f"{storage_path}/{experiment.name}"
    saved = f"Checkpoints are in '{folder}'; add `--resume` to the command to continue."
    nothing = "Nothing was saved, since no checkpoint was written yet; `--resume` or `--overwrite` begins anew."
    stop.saved = saved if has_checkpoint(folder) else nothing

    def on_saved() -> None:
        stop.saved = saved

    try:
        outcome = run_experiment(
            experiment, storage_path, resume=resume, announce=_say, stop=stop, display=display, on_saved=on_saved
        )
    except ResumeError as error:
        raise UsageError(str(error)) from error
    if outcome.is_interrupted:
        stop.saved = saved if has_checkpoint(folder) else nothing
        exit_interrupted(stop, f"Stopped at once. {stop.saved}" if outcome.is_at_once else stop.saved)
    stop.saved = f"'{experiment.name}' has ended, its results are in '{folder}'."
    for cause in outcome.errors:
        click.echo(f"Error in '{experiment.name}': {cause if verbose else root_cause(cause)}", err=True)
    return not outcome.errors


def _say(message: str) -> None:
    with outliving_terminal():
        click.echo(message, err=True)
