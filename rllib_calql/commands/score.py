"""The command `rllib score`: checkpoints judged by recorded data, without an environment and without Ray's start."""

from __future__ import annotations

import json
import math
import posixpath
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from rllib_calql.commands.checkpoint_choice import existing
from rllib_calql.commands.import_path import use_folder_of, use_folders_of_checkpoint
from rllib_calql.commands.setup import UsageError, errors_in_one_line, prepare

if TYPE_CHECKING:
    from rllib_calql.evaluation.fqe.judging import Judged
    from rllib_calql.evaluation.fqe.scoring import Score
    from rllib_calql.progress.display import Display

_SAY_EVERY_S = 4.5

data_option = click.option(
    "--data", metavar="INPUT", help="Data to judge by, as `input_` names them (default: those of the training)."
)
updates_option = click.option(
    "--updates", type=click.IntRange(min=1), help="Gradient updates of each fit (default: 4000)."
)


@click.command(epilog="Example: rllib score ~/ray_results/pointmaze-umaze --json")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@data_option
@updates_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
@click.option("-v", "--verbose", is_flag=True, help="Show RLlib's logs.")
def score(checkpoints: tuple[str, ...], data: str | None, updates: int | None, as_json: bool, verbose: bool) -> None:
    """Judge the greedy policy of each CHECKPOINT by recorded data alone, by fitted Q evaluation.

    CHECKPOINT is the folder or the URI of a checkpoint, or of a run or a trial, of which all checkpoints are judged. No
    environment is made. A checkpoint is code: judge only one that you would run as a program. Data files are not.
    """
    judged, _ = judge(checkpoints, data=data, updates=updates, verbose=verbose)
    if as_json:
        click.echo(json.dumps({"checkpoints": [entry_of(one) for one in judged]}, indent=2))
    else:
        click.echo(table_of(judged))
    failed = [one for one in judged if one.score is None]
    for one in failed:
        click.echo(f"Error: '{one.checkpoint}' was not judged: {one.error}", err=True)
    if failed:
        click.get_current_context().exit(1)


def judge(
    checkpoints: Sequence[str],
    *,
    data: str | None,
    updates: int | None,
    verbose: bool,
    needs_environment: bool = False,
) -> tuple[list[Judged], dict[str, Any]]:
    """Scores of all checkpoints that the arguments name, and the file system of each; with progress on stderr.

    Raises:
        UsageError: If an argument names no checkpoint.
        click.ClickException: If the data cannot be used.
    """
    from rllib_calql.progress.display import Display

    use_folder_of()
    with Display(file=sys.stderr) as display:
        display.stage("loading RLlib")
        prepare(verbose)

        from rllib_calql.checkpoints.reading import CheckpointFiles
        from rllib_calql.evaluation.fqe.judging import score_checkpoints
        from rllib_calql.experiments.run_checkpoints import all_checkpoints

        found: dict[str, Any] = {}
        try:
            for location in checkpoints:
                found |= {one.path: one.filesystem for one in all_checkpoints(existing(location))}
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error

        def use_folders(filesystem: Any, path: str) -> None:
            use_folders_of_checkpoint(CheckpointFiles(filesystem, path).raw_manifest())

        with errors_in_one_line():
            judged = score_checkpoints(
                [(filesystem, path) for path, filesystem in found.items()],
                input_=data,
                updates=updates,
                needs_environment=needs_environment,
                say=display.stage,
                on_progress=_progress(display),
                before_reading=use_folders,
            )
    return judged, found


def _progress(display: Display, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """Shows how far the fits are, and how long they will take; in a log not more often than other commands do."""
    from rllib_calql.progress.budget import format_duration

    begin, said = clock(), -math.inf

    def show(done: int, total: int) -> None:
        nonlocal said
        if clock() - said < _SAY_EVERY_S:
            return
        said = clock()
        left = f"  ETA {format_duration((said - begin) * (total - done) / done)}" if done else ""
        display.stage(f"fitting values  {done:,}/{total:,} updates{left}")

    return show


def entry_of(one: Judged) -> dict[str, Any]:
    """A checkpoint's score as JSON takes it; what is not finite is null."""
    if one.score is None:
        return {"checkpoint": one.checkpoint, "error": one.error}
    content: dict[str, Any] = finite({"checkpoint": one.checkpoint, **one.score.to_dict()})
    return content


def best_first(judged: Sequence[Judged]) -> list[Judged]:
    """Those that have a score, the highest value first; those of fits that diverged come last."""

    def value(one: Judged) -> float:
        assert one.score is not None
        mean = one.score.value.mean
        return mean if one.score.is_possible and math.isfinite(mean) else -math.inf

    return sorted((one for one in judged if one.score is not None), key=value, reverse=True)


def table_of(judged: Sequence[Judged]) -> str:
    """The scores as text, the best first, each with its warnings."""
    scored = best_first(judged)
    if not scored:
        return "No checkpoint could be judged."
    names = shown_names([one.checkpoint for one in judged])
    header = ["checkpoint", "value [95 %]", "behaviour [95 %]", "TD error", "off the data", "warnings"]
    lines = [header]
    for one in scored:
        score = one.score
        assert score is not None
        lines.append(
            [
                names[one.checkpoint],
                str(score.value),
                str(score.behaviour),
                f"{score.held_out_td_error:.3g}",
                f"{score.share_off_data:.1%}",
                str(len(score.warnings)),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    first = scored[0].score
    assert first is not None
    text.append(
        f"Discounted by {first.gamma} in environment rewards, at the first observations of "
        f"{first.num_held_out_episodes} held-out episodes."
    )
    text.extend(_warnings_of({names[one.checkpoint]: one.score for one in scored if one.score is not None}))
    return "\n".join(text)


def _warnings_of(scores: Mapping[str, Score]) -> list[str]:
    """A line for each warning, with the checkpoints that it is of: what is true of the data is said once."""
    warned: dict[str, list[str]] = {}
    for name, score in scores.items():
        for warning in score.warnings:
            warned.setdefault(warning, []).append(name)
    return [
        f"Warning: {'all' if 1 < len(names) == len(scores) else ', '.join(map(repr, names))}: {warning}."
        for warning, names in warned.items()
    ]


def shown_names(paths: Sequence[str]) -> dict[str, str]:
    """Paths without the folders that all of them have in common; whole ones where some lie in a bucket."""
    if len({posixpath.isabs(path) for path in paths}) > 1:
        return {path: path for path in paths}
    common = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return {path: posixpath.relpath(path, common) for path in paths}


def finite(value: Any) -> Any:
    """As JSON takes it: what is not finite is None."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
