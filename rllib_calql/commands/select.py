"""The command `rllib select`: a few real episodes spent on the checkpoints that the data think best."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from rllib_calql.commands.evaluate import env_options
from rllib_calql.commands.score import best_first, data_option, entry_of, finite, judge, shown_names, updates_option

if TYPE_CHECKING:
    from rllib_calql.evaluation.checkpoint_episodes import OtherEnv
    from rllib_calql.evaluation.fqe.judging import Judged
    from rllib_calql.evaluation.selection import Candidate, Selection
    from rllib_calql.progress.display import Display

_SEEDS_OF_A_ROUND = 1_000  # So that no round repeats the episodes of another one.
_MOST_SEED = 2**31  # Environments take seeds below 2**32.


@click.command(epilog="Example: rllib select ~/ray_results/pointmaze-umaze --episodes 40")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("--episodes", type=click.IntRange(min=1), required=True, help="Real episodes that may be spent in all.")
@data_option
@updates_option
@click.option(
    "--seed", type=click.IntRange(0, _MOST_SEED), default=0, show_default=True, help="Seed of the environment."
)
@env_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
@click.option("-v", "--verbose", is_flag=True, help="Show RLlib's logs.")
def select(
    checkpoints: tuple[str, ...],
    episodes: int,
    data: str | None,
    updates: int | None,
    seed: int,
    env: OtherEnv | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Choose from CHECKPOINT... by recorded data and then by real episodes in the environment.

    The data rank the checkpoints, as `rllib score` does. The episodes are then spent by sequential halving: each round
    the better half goes on, by success rate, mean return, and the ranking, in that order. CHECKPOINT is as for
    `rllib score`. A checkpoint is code: select only from those that you would run as programs. Data files are not.
    """
    has_env = env is not None and env.name is not None
    judged, filesystems = judge(checkpoints, data=data, updates=updates, verbose=verbose, needs_environment=not has_env)
    ranked = best_first(judged)
    for one in judged:
        if one.score is None:
            click.echo(f"Error: '{one.checkpoint}' was not judged: {one.error}", err=True)
    if not ranked:
        raise click.ClickException("No checkpoint could be judged, so no episode was run.")
    from rllib_calql.evaluation.selection import select_by_episodes
    from rllib_calql.progress.display import Display

    names = shown_names([one.checkpoint for one in judged])
    with Display(file=sys.stderr) as display:
        runner = Episodes(names, filesystems, seed, env, display)
        ranking = [one.checkpoint for one in ranked]
        try:
            selection = select_by_episodes(ranking, episodes, runner.run, num_begun=lambda: runner.num_begun)
        except KeyboardInterrupt:
            display.close()
            click.echo(runner.spent, err=True)
            raise
    for warning in runner.warnings:
        click.echo(f"Warning: {warning}.", err=True)
    for candidate in selection.candidates:
        if candidate.error:
            click.echo(f"Error: '{candidate.name}' could not be run: {candidate.error}", err=True)
    if as_json:
        click.echo(json.dumps(_as_json(selection, judged), indent=2))
    else:
        click.echo(_as_text(selection, judged, names))
    if selection.winner is None:
        raise click.ClickException("No checkpoint could be run in its environment.")
    if any(one.score is None for one in judged) or any(candidate.error for candidate in selection.candidates):
        click.get_current_context().exit(1)


class Episodes:
    """Runs episodes of checkpoints, one environment at a time, as a real system needs it.

    Attributes:
        num_begun: Episodes so far, those included that failed or were interrupted.
    """

    def __init__(
        self, names: dict[str, str], filesystems: dict[str, Any], seed: int, env: OtherEnv | None, display: Display
    ) -> None:
        self.num_begun = 0
        self.warnings: dict[str, None] = {}
        self._names, self._filesystems, self._seed, self._env = names, filesystems, seed, env
        self._display = display
        self._returns: dict[str, list[float]] = {}

    @property
    def spent(self) -> str:
        """What has been spent so far, and what it showed, as a sentence."""
        shown = [
            f"'{self._names[name]}' {len(returns)} whole ones, mean return {fmean(returns):.4g}"
            for name, returns in self._returns.items()
            if returns
        ]
        return f"Spent {_counted(self.num_begun, 'episode')}{': ' if shown else ''}{'; '.join(shown)}."

    def run(self, checkpoint: str, count: int, number: int) -> tuple[Sequence[float], float | None]:
        """Runs `count` episodes in round `number`; all candidates of a round meet the same seeds."""
        from rllib_calql.evaluation.checkpoint_episodes import run_episodes

        self._display.stage(
            f"round {number + 1}, {_counted(count, 'episode')} of '{self._names[checkpoint]}', "
            f"{self.num_begun} done before"
        )

        def begin() -> None:
            self.num_begun += 1

        done = run_episodes(
            checkpoint,
            self._filesystems[checkpoint],
            num_episodes=count,
            seed=self._seed + number * _SEEDS_OF_A_ROUND,
            env=self._env,
            on_begin=begin,
            on_end=self._returns.setdefault(checkpoint, []).append,
        )
        if done.warning is not None:
            self.warnings[done.warning] = None
        return done.returns, done.success_rate


def _interval_of(candidate: Candidate) -> dict[str, Any]:
    """What the episodes of a candidate say, each mean with its 95 % interval; None where one episode gives none."""
    import numpy as np

    from rllib_calql.evaluation.fqe.scoring import mean_interval
    from rllib_calql.evaluation.selection import success_interval

    number, rate = len(candidate.returns), candidate.success_rate
    returns: dict[str, float | None]
    if number > 1:
        interval = mean_interval(np.asarray(candidate.returns))
        returns = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    else:
        returns = {"mean": candidate.returns[0] if number else None, "low": None, "high": None}
    success = None
    if rate is not None:
        low, high = success_interval(rate, number)
        success = {"mean": rate, "low": low, "high": high}
    return {"episodes": candidate.attempted, "episode_return": returns, "success_rate": success}


def _as_json(selection: Selection, judged: Sequence[Judged]) -> dict[str, Any]:
    run = {one.name: _interval_of(one) | {"run_error": one.error or None} for one in selection.candidates}
    nothing = {"episodes": 0}
    return {
        "winner": None if selection.winner is None else selection.winner.name,
        "episodes_spent": selection.episodes_spent,
        "checkpoints": [entry_of(one) | finite(run.get(one.checkpoint, nothing)) for one in judged],
    }


def _as_text(selection: Selection, judged: Sequence[Judged], names: dict[str, str]) -> str:
    from rllib_calql.evaluation.selection import MIN_EPISODES, Candidate

    scores = {one.checkpoint: one.score for one in judged if one.score is not None}
    header = ["checkpoint", "episodes", "success [95 %]", "return [95 %]", "value by data [95 %]", "warnings"]
    lines = [header]
    candidates = {one.name: one for one in selection.candidates}
    for name in (*candidates, *selection.left_out):
        said = _interval_of(candidates.get(name, Candidate(name)))
        of_episodes = [str(said["episodes"]), _bracketed(said["success_rate"]), _bracketed(said["episode_return"])]
        lines.append([names[name], *of_episodes, str(scores[name].value), str(len(scores[name].warnings))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    gamma = next(iter(scores.values())).gamma
    text.append(f"Returns are sums of rewards, values are discounted by {gamma}; `rllib score` tells their warnings.")
    text.append(f"Spent {_counted(selection.episodes_spent, 'episode')}.")
    if selection.left_out:
        text.append(
            f"{_counted(len(selection.left_out), 'checkpoint')} got none: the data rank them lower, and a first round "
            f"needs {MIN_EPISODES} episodes for each; raise `--episodes` to try more."
        )
    if selection.winner is not None:
        said = _interval_of(selection.winner)
        kind, shown = (
            ("success rate", said["success_rate"]) if said["success_rate"] else ("return", said["episode_return"])
        )
        text.append(
            f"Winner: {selection.winner.name}, {kind} {_bracketed(shown)} in "
            f"{_counted(said['episodes'], 'episode')}, which also chose it and so flatter it."
        )
    return "\n".join(text)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _bracketed(interval: dict[str, float | None] | None) -> str:
    if interval is None or interval["mean"] is None:
        return ""
    if interval["low"] is None:
        return f"{interval['mean']:.4g} [one episode]"
    return f"{interval['mean']:.4g} [{interval['low']:.4g}, {interval['high']:.4g}]"
