"""The commands `rllib dataset ...`: look into offline data, convert, list and generate them.

Results go to stdout, progress to stderr. Exit codes are those of `rllib_calql.commands.main`. Readers, and with them
Ray, are imported only once a command runs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress

from rllib_calql.commands.checkpoint_choice import chosen_checkpoint, existing, say_choice
from rllib_calql.commands.evaluate import parsed_env_config
from rllib_calql.commands.import_path import use_folder_of
from rllib_calql.commands.setup import FiniteFloat, errors_in_one_line, quiet_warnings, usage_errors

if TYPE_CHECKING:
    from rllib_calql.datasets.episodes.reader import EpisodeReader, ReadOptions
    from rllib_calql.datasets.report.summary import DatasetReport
    from rllib_calql.datasets.writers.conversion import ActionBounds

_DEFAULT_PLOT = Path("dataset_report.png")
_DEFAULT_EPISODE_PLOT = Path("dataset_episode.html")
_GAMMA = 0.99  # The default of the setting.


def _refuse_lone_env_config(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and context.params["env"] is None:
        raise click.UsageError("`--env-config` is that of an environment; name it with `--env`.")
    return value


# Of the commands with an option `--env`, which must be eager to be known before.
_env_config_option = click.option(
    "--env-config",
    metavar="YAML",
    callback=_refuse_lone_env_config,
    help="Its `env_config`, a mapping in YAML or JSON.",
)


@click.group(epilog="Example: rllib dataset inspect minari:rllib-calql/pointmaze-umaze-play-v0")
def dataset() -> None:
    """Inspect, convert, list and generate offline data."""
    quiet_warnings()


def _reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options about incomplete data, which reach the command as one `options`."""

    @click.option(
        "--unfinished-episodes",
        type=click.Choice(["error", "truncate", "drop"]),
        default="error",
        show_default=True,
        help="What becomes of episodes that end neither terminated nor truncated.",
    )
    @click.option(
        "--missing-final-observation",
        type=click.Choice(["drop_step", "repeat"]),
        default="drop_step",
        show_default=True,
        help="What becomes of the last step if the observation after it is not stored.",
    )
    @click.option(
        "--max-episode-steps",
        type=click.IntRange(min=1),
        help="In rows without episode ids, an episode ends after this many steps at the latest.",
    )
    @functools.wraps(command)
    def with_options(
        *,
        unfinished_episodes: Any,
        missing_final_observation: Any,
        max_episode_steps: int | None,
        **arguments: Any,
    ) -> None:
        from rllib_calql.datasets.episodes.reader import ReadOptions

        options = ReadOptions(
            unfinished_episodes=unfinished_episodes,
            missing_final_observation=missing_final_observation,
            max_episode_steps=max_episode_steps,
        )
        command(options=options, **arguments)

    return with_options


@dataset.command()
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--failure-reward", type=float, help="Reward of every step of a failed episode; tells the success rate.")
@click.option(
    "--plot",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"PNG file (default: {_DEFAULT_PLOT}); of an episode .png or .html (default: {_DEFAULT_EPISODE_PLOT}).",
)
@click.option("--no-plot", is_flag=True, help="Write no picture.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option(
    "--env", metavar="ID", is_eager=True, help="Environment to compare the data with, as `env` in an experiment file."
)
@_env_config_option
@click.option("--episode", metavar="ID", help="Show this one episode instead, by its id, or its number from 0.")
@click.option("--checkpoint", metavar="RUN_OR_CHECKPOINT", help="With --episode: show Q and V of a checkpoint as well.")
@click.option("--gamma", type=FiniteFloat(0, 1), help=f"With --episode: discount of returns (default: {_GAMMA}).")
@click.option("--dimensions", metavar="NUMBERS", help="With --episode: draw these observations, 0,3-5 (default: all).")
@_reading_options
def inspect(
    inputs: tuple[str, ...],
    failure_reward: float | None,
    plot: Path | None,
    no_plot: bool,
    as_json: bool,
    env: str | None,
    env_config: str | None,
    episode: str | None,
    checkpoint: str | None,
    gamma: float | None,
    dimensions: str | None,
    options: ReadOptions,
) -> None:
    """Report what data hold and what looks wrong.

    INPUT is a file, a folder, a URI, a column map (.yaml), or minari:<dataset id>; the report covers all inputs
    together. Parquet, HDF5, NumPy, CSV, LeRobot, robomimic, d3rlpy and Stable-Baselines3 are known. A picture shows
    the distributions of returns and episode lengths. With --env the report says whether the data fit the spaces of
    the environment, which is made for it; if they do not, the exit code is 1. Nothing in data is run, wherever they
    come from.

    With --episode one episode is drawn over its steps: observations, actions, rewards and discounted returns-to-go, in
    the environment's units. With --checkpoint as well, returns are computed by the settings of its training, in
    training rewards, and beside them stand Q of the recorded actions and V. A checkpoint is code: give only one that
    you would run as a program.
    """
    if failure_reward is not None and not math.isfinite(failure_reward):
        raise click.UsageError(f"`--failure-reward` must be a finite number, got {failure_reward}.")
    file = _plot_file(plot, no_plot, of_episode=episode is not None)
    use_folder_of()
    if episode is not None:
        if env is not None:
            raise click.UsageError("`--env` compares all data with an environment; drop it, or `--episode`.")
        if checkpoint is not None and (gamma is not None or failure_reward is not None):
            raise click.UsageError("`--gamma` and `--failure-reward` are those of the `--checkpoint`; drop them.")
        rewards = _GAMMA if gamma is None else gamma, failure_reward
        _show_episode(inputs, episode, checkpoint, rewards, dimensions, file, as_json, options)
        return
    for name, value in (("--checkpoint", checkpoint), ("--gamma", gamma), ("--dimensions", dimensions)):
        if value is not None:
            raise click.UsageError(f"`{name}` is about one episode; name it with `--episode`.")
    spaces = _spaces_of(env, env_config)
    with errors_in_one_line():
        report = _report_on(inputs, options, failure_reward, spaces, keep_distributions=file is not None)
    compared = None
    if env is not None:
        from rllib_calql.datasets.report.comparison import compare

        compared = compare(report, env, *spaces)
    if as_json:
        click.echo(json.dumps(report.to_dict() | (compared.to_dict() if compared is not None else {}), indent=2))
    else:
        click.echo(str(report if compared is None else compared.noted(report)))
        if compared is not None:
            click.echo(f"\n{compared}")
    if file is not None:
        from rllib_calql.datasets.report.plots import plot_report

        with errors_in_one_line():
            plot_report(report, file)
        click.echo(f"Wrote {file}", err=True)
    if compared is not None and compared.mismatches:
        raise click.exceptions.Exit(1)


@dataset.command()
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.argument("output")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@click.option(
    "--env", metavar="ID", is_eager=True, help="Environment that the data come from, as `env` in an experiment file."
)
@_env_config_option
@click.option("--action-low", metavar="NUMBERS", help="Least action, without --env: -2, or -2,0 for each dimension.")
@click.option("--action-high", metavar="NUMBERS", help="Largest action, in the same way.")
@_reading_options
def convert(
    inputs: tuple[str, ...],
    output: str,
    overwrite: bool,
    env: str | None,
    env_config: str | None,
    action_low: str | None,
    action_high: str | None,
    options: ReadOptions,
) -> None:
    """Write data in another format.

    Every INPUT is a file, a folder, a URI, or minari:<dataset id>; together they become one data set. OUTPUT is
    minari:<dataset id>, lerobot:<folder>, robomimic:<file>.hdf5, a file *.parquet, *.hdf5 or *.npz, or a folder for
    Parquet files.

    Actions in [-1, 1], as Stable-Baselines3 stores them and RLlib records them, are scaled to the bounds of the
    environment, and Minari stores these with the data. Where the data do not record them, --env takes them from an
    environment, which is made for it, or --action-low and --action-high say them.
    """
    bounds = _action_bounds(action_low, action_high)
    if env is not None and bounds is not None:
        raise click.UsageError(
            "`--env` tells the bounds of the actions; drop it, or `--action-low` and `--action-high`."
        )
    use_folder_of()
    observation_space, action_space = _spaces_of(env, env_config)
    from rllib_calql.datasets.writers.conversion import convert as convert_dataset

    with errors_in_one_line(), Console(stderr=True).status(f"Converting to {output}"):
        summary = convert_dataset(
            inputs[0] if len(inputs) == 1 else list(inputs),
            output,
            options=options,
            observation_space=observation_space,
            action_space=bounds or action_space,
            overwrite=overwrite,
        )
    if summary.left_out:
        click.echo(f"The format has no place for {', '.join(summary.left_out)}.", err=True)
    click.echo(f"{output}: {summary.num_episodes:,} episodes, {summary.num_transitions:,} transitions")


@dataset.command(name="list")
def list_() -> None:
    """List local Minari data, and what can be generated."""
    from rllib_calql.datasets.generated.catalog import generated_dataset_ids

    with errors_in_one_line():
        local = _local_datasets()
    rows = [
        (f"minari:{id_}", f"{metadata['total_episodes']:,} episodes, {metadata['total_steps']:,} transitions")
        for id_, metadata in local.items()
    ]
    rows += [(f"minari:{id_}", "generated on first use") for id_ in generated_dataset_ids() if id_ not in local]
    width = max(len(name) for name, _ in rows)
    for name, state in sorted(rows):
        click.echo(f"{name.ljust(width)}  {state}")


@dataset.command()
@click.argument("dataset_id", metavar="ID")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the data.")
@click.option("--num-steps", type=click.IntRange(min=1), help="Least number of steps (default: the data set's own).")
@click.option("--save-as", help="Minari id to save the data under (default: ID).")
def generate(dataset_id: str, seed: int, num_steps: int | None, save_as: str | None) -> None:
    """Generate one of the data sets that `list` names."""
    from rllib_calql.datasets.episodes import minari_storage
    from rllib_calql.datasets.generated import catalog

    dataset_id = dataset_id.removeprefix("minari:")
    if not catalog.is_generated(dataset_id):
        known = ", ".join(catalog.generated_dataset_ids())
        raise click.UsageError(f"`ID` must be one of {known}; got {dataset_id!r}.")
    if save_as is not None:
        save_as = save_as.removeprefix("minari:")
        with usage_errors(), errors_in_one_line((ImportError, OSError)):
            minari_storage.new_dataset_path(save_as, "`--save-as`")
    with errors_in_one_line():
        catalog.generate(dataset_id, seed=seed, num_steps=num_steps, save_as=save_as)
    click.echo(f"minari:{save_as or dataset_id}")


def _show_episode(
    inputs: Iterable[str],
    episode: str,
    checkpoint: str | None,
    rewards: tuple[float, float | None],
    dimensions: str | None,
    file: Path | None,
    as_json: bool,
    options: ReadOptions,
) -> None:
    """Prints and draws one episode; `rewards` are discount and failure reward where no checkpoint has them."""
    from rllib_calql.common.returns import RewardSettings
    from rllib_calql.datasets.readers.opening import open_input
    from rllib_calql.datasets.report.episode import find_episode, places_of_text, view_of
    from rllib_calql.progress import episode as shown

    with usage_errors():
        places = None if dimensions is None else places_of_text(dimensions, "`--dimensions`")
    location, values = None if checkpoint is None else existing(checkpoint), None
    with errors_in_one_line():
        found = find_episode(open_input(list(inputs), options), episode)
    if location is not None:
        with chosen_checkpoint(location, best=False, doing="Evaluating", verbose=False) as chosen:
            from rllib_calql.checkpoints.reading import read_of_one_save
            from rllib_calql.evaluation.episode_values import values_along

            values = read_of_one_save(chosen.path, chosen.filesystem, lambda files: values_along(files, found))
        if not as_json:
            say_choice(chosen)
    with errors_in_one_line():
        settings = values.settings if values is not None else RewardSettings(rewards[0], failure_reward=rewards[1])
        last_value = None if values is None else values.last_value
        view = view_of(found, settings, last_value=last_value, dimensions=places)
    click.echo(shown.as_json(view, values) if as_json else shown.as_text(view, values))
    if file is not None:
        with errors_in_one_line():
            picture = shown.draw(view, values)
            is_page = file.suffix.lower() == ".html"
            file.write_bytes(shown.page(view, values, picture).encode() if is_page else picture)
        click.echo(f"Wrote {file}", err=True)


def _plot_file(plot: Path | None, no_plot: bool, *, of_episode: bool = False) -> Path | None:
    """Where the picture goes, checked before hours of reading; None if there will be none."""
    if no_plot:
        if plot is not None:
            raise click.UsageError("`--plot` and `--no-plot` contradict each other; drop one.")
        return None
    if plot is None and importlib.util.find_spec("matplotlib") is None:
        click.echo('No picture: it needs `matplotlib`: pip install "rllib-calql[plots]"', err=True)
        return None
    file = plot or (_DEFAULT_EPISODE_PLOT if of_episode else _DEFAULT_PLOT)
    endings = (".png", ".html") if of_episode else (".png",)
    if file.suffix.lower() not in endings:
        raise click.UsageError(f"`--plot` must name a {' or '.join(endings)} file, got '{file}'.")
    if not file.absolute().parent.is_dir():
        raise click.UsageError(f"`--plot`: the folder of '{file}' does not exist; create it first.")
    with errors_in_one_line():
        from rllib_calql.datasets.report.plots import require_matplotlib

        require_matplotlib()
    return file


def _action_bounds(low: str | None, high: str | None) -> ActionBounds | None:
    """What `--action-low` and `--action-high` say; None without them."""
    if low is None and high is None:
        return None
    if low is None or high is None:
        given, missing = ("--action-high", "--action-low") if low is None else ("--action-low", "--action-high")
        raise click.UsageError(f"`{given}` needs `{missing}` beside it.")
    from rllib_calql.datasets.writers.conversion import ActionBounds, bounds_of_text

    with usage_errors():
        return ActionBounds(bounds_of_text(low, "`--action-low`"), bounds_of_text(high, "`--action-high`"))


def _spaces_of(env: str | None, env_config: str | None = None) -> tuple[Any, Any]:
    """Observation and action space of an environment."""
    if env is None:
        return None, None
    content = None if env_config is None else parsed_env_config(env_config)
    from rllib_calql.common.spaces import check_action_space, check_observation_space
    from rllib_calql.environments.resolving import resolve_env

    try:
        with errors_in_one_line((RuntimeError, OSError)):
            made = resolve_env(env, "`--env`").make(content)
        spaces = made.observation_space, made.action_space
        made.close()  # type: ignore[no-untyped-call]  # Gymnasium's.
        check_observation_space(spaces[0], f"The observation space of `--env` {env!r}")
        check_action_space(spaces[1], f"The action space of `--env` {env!r}")
    except (ValueError, TypeError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    return spaces


def _report_on(
    inputs: Iterable[str],
    options: ReadOptions,
    failure_reward: float | None,
    spaces: tuple[Any, Any],
    *,
    keep_distributions: bool,
) -> DatasetReport:
    from rllib_calql.datasets.readers.opening import open_input
    from rllib_calql.datasets.report.report import ReportBuilder

    readers = open_input(list(inputs), options)
    # What an RLModule put out is clipped on the way to the environment only.
    is_module = any(reader.info.actions == "module" for reader in readers)
    builder = ReportBuilder(
        failure_reward,
        keep_distributions=keep_distributions,
        observation_space=spaces[0],
        action_space=None if is_module else spaces[1],
        measures_images=True,
    )
    with _progress(readers) as advance:
        for reader in readers:
            for block in reader.blocks():
                builder.add(block)
                advance(block.num_rows)
            builder.add_reader(reader)
    return builder.build()


@contextmanager
def _progress(readers: list[EpisodeReader]) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of transitions just read; the bar shows on a terminal only."""
    known = [reader.info.num_transitions for reader in readers]
    total = None if None in known else sum(num for num in known if num is not None)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Reading", total=total)
        yield lambda num_transitions: bar.advance(task, num_transitions)


def _local_datasets() -> dict[str, Any]:
    try:
        import minari
    except ImportError as err:
        raise ImportError('Minari data need the `minari` package: pip install "rllib-calql[minari]"') from err
    with warnings.catch_warnings(record=True) as broken:
        warnings.simplefilter("always")
        local: dict[str, Any] = minari.list_local_datasets()
    for warning in broken:
        click.echo(" ".join(str(warning.message).split()), err=True)
    return local
