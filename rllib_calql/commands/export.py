"""The command `rllib export`: the policy of a checkpoint as a file that runs without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rllib_calql.commands.checkpoint_choice import best_option, chosen_checkpoint, existing, say_choice
from rllib_calql.commands.setup import UsageError


@click.command(epilog="Example: rllib export ~/ray_results/pointmaze-umaze policy.npz --best")
@click.argument("checkpoint", metavar="RUN_OR_CHECKPOINT")
@click.argument("output", type=click.Path(path_type=Path))
@best_option
@click.option("--force", is_flag=True, help="Replace OUTPUT if it is there.")
@click.option("-v", "--verbose", is_flag=True, help="Show RLlib's logs.")
def export(checkpoint: str, output: Path, best: bool, force: bool, verbose: bool) -> None:
    """Write the policy of RUN_OR_CHECKPOINT to OUTPUT, for `rllib_calql.load_policy`.

    The ending of OUTPUT says the format: .npz needs NumPy alone to run, .onnx ONNX Runtime alone, .pt torch alone.
    RUN_OR_CHECKPOINT is the folder or the URI of a checkpoint, or of a run or a trial, whose newest checkpoint is
    taken. A checkpoint is code: export only one that you would run as a program. OUTPUT is not code for `load_policy`.
    """
    location = existing(checkpoint)
    from rllib_calql.export.writing import checked_output, export_policy

    try:
        checked_output(output, force=force)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    with chosen_checkpoint(location, best=best, doing="Exporting", verbose=verbose) as chosen:
        scores = _scores(chosen.filesystem, chosen.path)
        export_policy(chosen.path, output, force=force, filesystem=chosen.filesystem, scores=scores)
    say_choice(chosen)
    for name, score in scores.items():
        click.echo(f"{name:<17} {score:.4g}")
    click.echo(f"policy            {output} ({output.stat().st_size:,} bytes)")


def _scores(filesystem: Any, checkpoint: str) -> dict[str, float]:
    """What the evaluation said in whose iteration Ray Tune wrote the checkpoint; nothing of other checkpoints."""
    from rllib_calql.common import metrics as keys
    from rllib_calql.experiments.run_state import result_of_whole

    result = result_of_whole(filesystem, checkpoint) or {}
    runners = (result.get("evaluation") or {}).get("env_runners") or {}
    names = ("episode_return_mean", keys.SUCCESS_RATE, keys.NORMALIZED_SCORE)
    return {name: float(runners[name]) for name in names if isinstance(runners.get(name), (int, float))}
