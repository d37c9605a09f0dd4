"""Which checkpoint RUN_OR_CHECKPOINT stands for, and what goes wrong with it, for the commands that take one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rllib_calql.commands.import_path import use_folder_of, use_folders_of_checkpoint
from rllib_calql.commands.setup import UsageError, prepare, root_cause

if TYPE_CHECKING:
    from rllib_calql.experiments.run_checkpoints import Chosen

best_option = click.option(
    "--best", is_flag=True, help="Of a run or a trial, take the best checkpoint; without it, the newest."
)


def existing(location: str) -> str:
    """The folder or URI that a user wrote, with the home folder in place of `~`. Ray is not loaded for it.

    Raises:
        UsageError: If there is no such folder; URIs are not looked for.
    """
    if not location:  # As of a variable that is not set; it would be the present folder.
        raise UsageError("The name of the run or checkpoint is empty; give its folder, `.` for the present one.")
    if "://" in location:
        return location
    path = Path(location).expanduser()
    if not path.exists():
        raise UsageError(f"'{path}' does not exist; give the folder of a run, of a trial or of a checkpoint.")
    return str(path)


@contextmanager
def chosen_checkpoint(location: str, *, best: bool, doing: str, verbose: bool) -> Iterator[Chosen]:
    """The checkpoint; what fails inside is told in one line, or raised as it is if `verbose`.

    Args:
        location: As `existing` gives it.
        best: Whether the best checkpoint of a run or a trial is taken; else the newest.
        doing: What is done with it, "Evaluating".
        verbose: Whether RLlib's logs are shown.

    Raises:
        UsageError: If there is no checkpoint.
        click.ClickException: With the cause of what fails inside.
    """
    use_folder_of()
    prepare(verbose)

    from rllib_calql.checkpoints.reading import CheckpointFiles
    from rllib_calql.experiments.run_checkpoints import choose_checkpoint

    try:
        chosen = choose_checkpoint(location, best=best)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    remedy = use_folders_of_checkpoint(CheckpointFiles(chosen.filesystem, chosen.path).raw_manifest())
    try:
        yield chosen
    except (click.ClickException, click.exceptions.Exit):  # What is said already.
        raise
    except Exception as error:
        if verbose:
            raise
        hint = f" {remedy}" if isinstance(error, ImportError) else ""
        raise click.ClickException(f"{doing} '{chosen.path}' failed: {root_cause(error)}{hint}") from error


def say_choice(chosen: Chosen) -> None:
    """Says which checkpoint of a run was taken, and why; nothing where the user named the checkpoint itself."""
    if chosen.reason:
        click.echo(f"checkpoint        {chosen.path}")
        click.echo(f"                  {chosen.reason}")
