"""The commands `rllib dataset ...`: look into offline data, convert, list and generate them.

Results go to stdout, progress to stderr. Exit codes are those of `rllib_calql.commands.main`. Readers, and with them
Ray, are imported only once a command runs.
"""

from __future__ import annotations

import dataclasses
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

from rllib_calql.commands.import_path import use_folder_of
from rllib_calql.commands.setup import errors_in_one_line, quiet_warnings

if TYPE_CHECKING:
    from rllib_calql.datasets.episodes.reader import EpisodeReader, ReadOptions
    from rllib_calql.datasets.report.summary import DatasetReport

_DEFAULT_PLOT = Path("dataset_report.png")


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
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help=f"PNG file (default: {_DEFAULT_PLOT}).")
@click.option("--no-plot", is_flag=True, help="Write no picture.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--env", metavar="ID", help="Environment to compare the data with, as `env` in an experiment file.")
@_reading_options
def inspect(
    inputs: tuple[str, ...],
    failure_reward: float | None,
    plot: Path | None,
    no_plot: bool,
    as_json: bool,
    env: str | None,
    options: ReadOptions,
) -> None:
    """Report what data hold and what looks wrong.

    INPUT is a file, a folder, a URI, a column map (.yaml), or minari:<dataset id>; the report covers all inputs
    together. Parquet, HDF5, NumPy, CSV, LeRobot, robomimic, d3rlpy and Stable-Baselines3 are known. A picture shows
    the distributions of returns and episode lengths. With --env the report says whether the data fit the spaces of
    the environment, which is made for it. Nothing in data is run, wherever they come from.
    """
    if failure_reward is not None and not math.isfinite(failure_reward):
        raise click.UsageError(f"`--failure-reward` must be a finite number, got {failure_reward}.")
    file = _plot_file(plot, no_plot)
    use_folder_of()
    spaces = _spaces_of(env)
    with errors_in_one_line():
        report = _report_on(inputs, options, failure_reward, spaces, keep_distributions=file is not None)
    compared = _compared(env, report, *spaces) if env is not None and None not in spaces else {}
    if as_json:
        click.echo(json.dumps(report.to_dict() | compared, indent=2))
    else:
        click.echo(str(_with_note_on(compared, report)))
        for line in _lines_on_environment(compared):
            click.echo(line)
    if file is not None:
        from rllib_calql.datasets.report.plots import plot_report

        with errors_in_one_line():
            plot_report(report, file)
        click.echo(f"Wrote {file}", err=True)


@dataset.command()
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.argument("output")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@_reading_options
def convert(inputs: tuple[str, ...], output: str, overwrite: bool, options: ReadOptions) -> None:
    """Write data in another format.

    Every INPUT is a file, a folder, a URI, or minari:<dataset id>; together they become one data set. OUTPUT is
    minari:<dataset id>, lerobot:<folder>, robomimic:<file>.hdf5, a file *.parquet, *.hdf5 or *.npz, or a folder for
    Parquet files.
    """
    from rllib_calql.datasets.writers.conversion import convert as convert_dataset

    with errors_in_one_line(), Console(stderr=True).status(f"Converting to {output}"):
        summary = convert_dataset(
            inputs[0] if len(inputs) == 1 else list(inputs), output, options=options, overwrite=overwrite
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
        try:
            with errors_in_one_line((ImportError, OSError)):
                minari_storage.new_dataset_path(save_as, "`--save-as`")
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    with errors_in_one_line():
        catalog.generate(dataset_id, seed=seed, num_steps=num_steps, save_as=save_as)
    click.echo(f"minari:{save_as or dataset_id}")


def _plot_file(plot: Path | None, no_plot: bool) -> Path | None:
    """Where the picture goes, checked before hours of reading; None if there will be none."""
    if no_plot:
        if plot is not None:
            raise click.UsageError("`--plot` and `--no-plot` contradict each other; drop one.")
        return None
    if plot is None and importlib.util.find_spec("matplotlib") is None:
        click.echo('No picture: it needs `matplotlib`: pip install "rllib-calql[plots]"', err=True)
        return None
    file = plot or _DEFAULT_PLOT
    if file.suffix.lower() != ".png":
        raise click.UsageError(f"`--plot` must name a .png file, got '{file}'.")
    if not file.absolute().parent.is_dir():
        raise click.UsageError(f"`--plot`: the folder of '{file}' does not exist; create it first.")
    with errors_in_one_line():
        from rllib_calql.datasets.report.plots import require_matplotlib

        require_matplotlib()
    return file


def _spaces_of(env: str | None) -> tuple[Any, Any]:
    """Observation and action space of an environment."""
    if env is None:
        return None, None
    from rllib_calql.common.spaces import check_action_space, check_observation_space
    from rllib_calql.environments.resolving import resolve_env

    try:
        with errors_in_one_line((RuntimeError, OSError)):
            made = resolve_env(env, "`--env`").make()
        spaces = made.observation_space, made.action_space
        made.close()  # type: ignore[no-untyped-call]  # Gymnasium's.
        check_observation_space(spaces[0], f"The observation space of `--env` {env!r}")
        check_action_space(spaces[1], f"The action space of `--env` {env!r}")
    except (ValueError, TypeError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    return spaces


def _compared(env: str, report: DatasetReport, observation_space: Any, action_space: Any) -> dict[str, Any]:
    """What comparing data with an environment shows, for JSON."""
    from rllib_calql.datasets.report.comparison import findings_on_spaces, mismatches

    wrong = mismatches(report, observation_space, action_space)
    content = {
        "id": env,
        "observation_space": str(observation_space),
        "action_space": str(action_space),
        "matches": not wrong,
        "mismatches": wrong,
        "findings": findings_on_spaces(report, observation_space, action_space),
    }
    return {"environment": content}


def _with_note_on(compared: dict[str, Any], report: DatasetReport) -> DatasetReport:
    """The report as it is shown: it does not say that nothing looks wrong where the comparison says otherwise."""
    if not compared or not (compared["environment"]["mismatches"] or compared["environment"]["findings"]):
        return report
    note = f"what does not fit {compared['environment']['id']} is told below"
    return dataclasses.replace(report, notes=(*report.notes, note))


def _lines_on_environment(compared: dict[str, Any]) -> Iterator[str]:
    if not compared:
        return
    content = compared["environment"]
    verdict = "keys and shapes match" if content["matches"] else "the data do not fit"
    yield f"\nCompared with {content['id']}: {verdict}"
    yield f"  observations  {content['observation_space']}"
    yield f"  actions       {content['action_space']}"
    for wrong in content["mismatches"]:
        yield f"  does not fit: {wrong}."
    for finding in content["findings"]:
        yield f"  Warning: {finding}."


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
