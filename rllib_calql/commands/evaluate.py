"""The command `rllib evaluate`: the greedy policy of a checkpoint in its environment or in another one."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rllib_calql.checkpoints.reading import read_of_one_save
from rllib_calql.commands.checkpoint_choice import best_option, chosen_checkpoint, existing, say_choice
from rllib_calql.commands.import_path import use_folder_of
from rllib_calql.commands.setup import UsageError, errors_in_one_line, prepare, quiet_warnings, usage_errors

if TYPE_CHECKING:
    from rllib_calql.evaluation.checkpoint_episodes import OtherEnv
    from rllib_calql.evaluation.video import Video


def env_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command with `--verbose` the options `--env` and `--env-config`; it gets both as one argument, `env`."""

    @click.option("--env", metavar="ID", help="Environment, as `env` in an experiment file (default: the training's).")
    @click.option("--env-config", metavar="YAML", help="Its `env_config`, a mapping in YAML or JSON.")
    @functools.wraps(command)
    def with_options(*, env: str | None, env_config: str | None, verbose: bool, **arguments: Any) -> None:
        other = _other_env(env, env_config, verbose) if env is not None or env_config is not None else None
        command(env=other, verbose=verbose, **arguments)

    return with_options


def _other_env(name: str | None, config: str | None, verbose: bool) -> OtherEnv:
    """What the options say.

    Raises:
        UsageError: If there is no such environment, or if its config is no mapping.
    """
    use_folder_of()
    prepare(verbose)
    from rllib_calql.environments.resolving import resolve_env
    from rllib_calql.evaluation.checkpoint_episodes import OtherEnv

    try:
        if name is not None:
            resolve_env(name, "`--env`")
    except (ValueError, ImportError, TypeError) as error:
        raise UsageError(str(error)) from error
    return OtherEnv(name, None if config is None else parsed_env_config(config))


def parsed_env_config(text: str) -> dict[str, Any]:
    """The mapping that `--env-config` says.

    Raises:
        UsageError: If it is none.
    """
    from rllib_calql.experiments.reading.errors import ExperimentError
    from rllib_calql.experiments.reading.yaml_files import parsed_yaml

    try:
        content = parsed_yaml(text, "`--env-config`")
    except (ExperimentError, ValueError) as error:
        raise UsageError(str(error)) from error
    if not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
        raise UsageError(f"`--env-config` must be a mapping, for example '{{continuing_task: false}}', got {text!r}.")
    return content


def _checked_video(context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """`--video`, checked before anything is loaded: environments that are imported need to know how to draw."""
    if file is None:
        return None
    quiet_warnings()  # Gymnasium is loaded before anything else is.
    from rllib_calql.evaluation.video import check_video_file, require_moviepy
    from rllib_calql.system.offscreen import prepare_offscreen

    with usage_errors():
        check_video_file(file, "`--video`")
    with errors_in_one_line((ImportError,)):
        require_moviepy()
    prepare_offscreen()
    return file


@click.command()
@click.argument("checkpoint", metavar="RUN_OR_CHECKPOINT")
@best_option
@click.option("--episodes", type=click.IntRange(min=1), default=10, show_default=True, help="Episodes to run.")
@click.option("--seed", type=int, help="Seed of the environment.")
@click.option(
    "--video",
    metavar="FILE",
    type=click.Path(path_type=Path),
    callback=_checked_video,
    help="Record the episodes, one after the other in one .mp4 file; an existing one is replaced.",
)
@click.option("--video-episodes", type=click.IntRange(min=1), help="Record the first so many (default: all of them).")
@env_options
@click.option("-v", "--verbose", is_flag=True, help="Show RLlib's logs.")
def evaluate(
    checkpoint: str,
    best: bool,
    episodes: int,
    seed: int | None,
    video: Path | None,
    video_episodes: int | None,
    env: OtherEnv | None,
    verbose: bool,
) -> None:
    """Run the greedy policy of RUN_OR_CHECKPOINT in its environment; without one, judge it by held-out episodes.

    RUN_OR_CHECKPOINT is the folder or the URI of a checkpoint, or of a run or a trial, whose newest checkpoint is
    taken. --env names an environment for a policy that was trained on data alone, or another one with the same spaces.
    A checkpoint is code: evaluate only one that you would run as a program. Data files are not.

    --video shows the episodes that the numbers are of. The environment has to give pictures (its render mode
    rgb_array); MuJoCo draws without a display by EGL, or else OSMesa, unless MUJOCO_GL says otherwise.
    """
    location = existing(checkpoint)
    if video_episodes is not None and video is None:
        raise UsageError("`--video-episodes` is about a video; name its file with `--video`.")
    if video_episodes is not None and video_episodes > episodes:
        raise UsageError(f"`--video-episodes` is {video_episodes}, but only {episodes} are run; raise `--episodes`.")
    with chosen_checkpoint(location, best=best, doing="Evaluating", verbose=verbose) as chosen:
        from rllib_calql.evaluation.checkpoint_episodes import run_episodes
        from rllib_calql.evaluation.video import Video

        recorded = None if video is None else Video(video, video_episodes or episodes)
        judged = _judged_by_held_out(chosen.path, chosen.filesystem, recorded) if env is None else None
        if judged is None:
            run = run_episodes(
                chosen.path, chosen.filesystem, num_episodes=episodes, seed=seed, env=env, video=recorded
            )
            normalized = _normalized_score(run.config, run.returns)
    say_choice(chosen)
    if judged is not None:
        click.echo("There is no environment (`--env` names one); the policy is judged by held-out episodes.", err=True)
        for name, value in judged.items():
            click.echo(f"{name:<18}{value:.4g}")
        return
    if run.warning is not None:
        click.echo(f"Warning: {run.warning}.", err=True)
    click.echo(f"episodes          {len(run.returns)}")
    click.echo(f"return            {statistics.fmean(run.returns):.2f} (std {statistics.pstdev(run.returns):.2f})")
    if run.success_rate is not None:
        click.echo(f"success rate      {run.success_rate:.2f}")
    if normalized is not None:
        click.echo(f"normalised score  {normalized:.2f}")
    if video is not None:
        click.echo(f"Wrote {video}", err=True)


def _judged_by_held_out(checkpoint: str, filesystem: Any, video: Video | None) -> dict[str, float] | None:
    """What held-out episodes say of a checkpoint without an environment; None for one with an environment.

    Raises:
        ValueError: If nothing is held out, or a video is wanted.
    """
    from rllib_calql.common import metrics as keys
    from rllib_calql.config import CalQLConfig

    config = read_of_one_save(checkpoint, filesystem, lambda files: files.config())
    if config.env is not None:
        return None
    if video is not None:
        raise ValueError("The checkpoint's config has no environment, and a video needs one; name it with `--env`.")
    if not isinstance(config, CalQLConfig) or not config.validation_fraction:
        raise ValueError(
            "The checkpoint's config has no environment and holds no episodes out (`validation_fraction`), so there is "
            "nothing to evaluate by. Name an environment with `--env`."
        )
    config.learners(num_learners=0, num_gpus_per_learner=0)
    config.external_clients(external_port=None, external_host="127.0.0.1", external_token_file=None)
    config.env_runner_cls = None
    algorithm = config.algo_class.from_checkpoint(checkpoint, filesystem, config=config)
    try:
        judged: dict[str, float] = algorithm.evaluate()[keys.HELD_OUT]
    finally:
        algorithm.stop()
    return judged


def _normalized_score(config: Any, returns: Sequence[float]) -> float | None:
    from rllib_calql.config import CalQLConfig
    from rllib_calql.evaluation.history import EvaluationHistory
    from rllib_calql.store.offline_data import CalQLOfflineData

    if not isinstance(config, CalQLConfig) or not config.is_offline:
        return None
    try:
        scores = CalQLOfflineData(config).reference_scores
    except (OSError, ValueError, ImportError):  # The data need not be on the machine that evaluates.
        return None
    return EvaluationHistory(scores).normalized_score(statistics.fmean(returns))
