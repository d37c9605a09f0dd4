"""The command `rllib fine-tune`: a checkpoint that goes on learning from episodes in a folder."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rllib_calql.commands.checkpoint_choice import best_option, chosen_checkpoint, existing
from rllib_calql.commands.setup import FiniteFloat, UsageError, root_cause, start_ray, stop_ray
from rllib_calql.system.stop_signals import StopSignals

if TYPE_CHECKING:
    from rllib_calql.collection.intake import ReadEpisode
    from rllib_calql.experiments.fine_tuning import FineTuning
    from rllib_calql.progress.display import Display

_POLL_S = 1.0  # A file is taken once it has not changed from one look to the next.
_RESTLESS_S = 5.0  # A folder that changes at every look, as with short episodes, is read after this.
_SAY_EVERY_S = 4.5


@click.command(
    name="fine-tune", epilog="Example: rllib fine-tune ~/ray_results/pre --episodes logs --export policy.npz"
)
@click.argument("checkpoint", metavar="RUN_OR_CHECKPOINT")
@click.option("--episodes", required=True, metavar="FOLDER", help="Episodes: EpisodeLog's folder, or any other input.")
@click.option("--updates-per-env-step", type=FiniteFloat(min=0, min_open=True), help="Default: that of the checkpoint.")
@click.option("--export", "policy", type=click.Path(path_type=Path), help="Write the policy to this file, each time.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the new checkpoint (default: RUN_OR_CHECKPOINT-fine-tuned).",
)
@best_option
@click.option("--watch", is_flag=True, help="Wait for more episodes until Ctrl-C.")
@click.option("-v", "--verbose", is_flag=True, help="Show RLlib's logs.")
@click.pass_obj
def fine_tune(
    stop: StopSignals,
    checkpoint: str,
    episodes: str,
    updates_per_env_step: float | None,
    policy: Path | None,
    output: Path | None,
    best: bool,
    watch: bool,
    verbose: bool,
) -> None:
    """Go on training RUN_OR_CHECKPOINT with the episodes in FOLDER that are new; its environment is not needed.

    The episodes become online data, the updates that their env steps owe are made, and the new checkpoint goes to
    OUTPUT. RUN_OR_CHECKPOINT stays as it is. The same command given again goes on with OUTPUT and takes only what is
    new; killed at any moment, it counts no episode twice and loses none. Ctrl-C saves what was made.

    RUN_OR_CHECKPOINT is the folder of a checkpoint, or of a run or a trial, whose newest checkpoint is taken; or an
    OUTPUT of before. A checkpoint is code: fine-tune only one that you would run as a program. Episodes are not.
    """
    location = existing(checkpoint)
    if "://" in location and output is None:
        raise UsageError(f"`--output` must name a folder for the new checkpoint where '{location}' is a URI.")
    _check_episodes(episodes, may_come=watch)
    if policy is not None:
        _check_policy_file(policy)
    stop.saved = "Nothing was saved by this command; give it again to begin anew."
    with ExitStack() as stack:
        from rllib_calql.progress.display import Display

        display = stack.enter_context(Display(file=sys.stderr))
        display.stage("loading RLlib")
        chosen = stack.enter_context(chosen_checkpoint(location, best=best, doing="Fine-tuning", verbose=verbose))

        from rllib_calql.checkpoints.reading import CheckpointFiles
        from rllib_calql.experiments import fine_tuning

        with _refused():
            files = CheckpointFiles.find(chosen.path, chosen.filesystem)
            if output is None:
                output = Path(chosen.path) if fine_tuning.is_fine_tuned(files) else fine_tuning.default_output(location)
            output = output.expanduser().absolute()
            stack.enter_context(fine_tuning.only_one(output))
            display.stage("reading the checkpoint")
            tuning = fine_tuning.FineTuning(files, output, updates_per_env_step=updates_per_env_step)
        stack.callback(tuning.close)
        loop = _Rounds(tuning, episodes, policy, stop, display, stack, verbose=verbose)
        stop.on_stop = loop.stop
        stack.callback(setattr, stop, "on_stop", None)
        click.echo(f"begins with       {tuning.start.files.path}")
        if skipped := tuning.num_offline_updates_left_out:
            click.echo(
                f"Warning: its offline phase lacks {skipped:,} updates, which are not made: fine-tuning begins there.",
                err=True,
            )
        loop.first(is_watching=watch)
        while watch and not loop.is_stopped:
            loop.wait()
        left = tuning.updates_owed
    if loop.is_stopped and (left or not watch):
        click.echo(f"{stop.name}. {left:,} updates are left; the same command makes them.", err=True)
        raise click.exceptions.Exit(stop.exit_code)


class _Rounds:
    """The rounds of one command.

    Args:
        tuning: Does the work.
        episodes: What to read.
        policy: The file to write the policy to, or None.
        stop: Signals.
        display: Where progress is shown.
        stack: Ends Ray, if it has to be started.
        verbose: Whether the logs of Ray are shown.
    """

    def __init__(
        self,
        tuning: FineTuning,
        episodes: str,
        policy: Path | None,
        stop: StopSignals,
        display: Display,
        stack: ExitStack,
        *,
        verbose: bool,
    ) -> None:
        self._tuning = tuning
        self._episodes = episodes
        self._policy = policy
        self._stop = stop
        self._display = display
        self._stack = stack
        self._verbose = verbose
        self._has_ray = False
        self._seen = self._latest = _listing(episodes)
        self.is_stopped = False

    def stop(self) -> None:
        """At the first signal."""
        self.is_stopped = True

    def first(self, *, is_watching: bool) -> None:
        """Takes what is there.

        Args:
            is_watching: Whether what cannot be read is told and waited for.

        Raises:
            UsageError: If it cannot be read and is not waited for.
        """
        if is_watching:
            is_there = Path(self._episodes).expanduser().exists()
            self._round(*((self._read_or_told() if is_there else None) or ([], 0)))
            return
        with _refused():
            new, num_known = self._read()
        self._round(new, num_known)

    def wait(self) -> None:
        """Waits for something new and takes it; what cannot be read is told once, and waited for."""
        self._display.stage(f"waiting for episodes in {self._episodes}")
        restless_since: float | None = None
        while not self.is_stopped:
            time.sleep(_POLL_S)
            now = _listing(self._episodes)
            is_settled, self._latest = now == self._latest, now
            if now == self._seen:
                continue
            if not is_settled:
                restless_since = time.monotonic() if restless_since is None else restless_since
                if time.monotonic() - restless_since < _RESTLESS_S:
                    continue
            self._seen, restless_since = now, None
            read = self._read_or_told()
            if read is not None and read[0]:
                self._round(*read)
                return

    def _read_or_told(self) -> tuple[list[ReadEpisode], int] | None:
        """New episodes and how many are known; None if they cannot be read, which is told."""
        try:
            return self._read()
        except (OSError, ValueError, ImportError) as error:
            self._display.print(f"Not added: {root_cause(error)}", timed=True)
            return None

    def _read(self) -> tuple[list[ReadEpisode], int]:
        self._display.stage("reading the episodes")
        if _is_empty(self._episodes):
            return [], 0
        return self._tuning.read(self._episodes)

    def _round(self, new: list[ReadEpisode], num_known: int) -> None:
        tuning = self._tuning
        if new or tuning.updates_owed:
            if tuning.config.num_learners > 1 and not self._has_ray:
                self._start_ray()
            added, made = tuning.round(
                new, say=self._display.stage, on_progress=_progress(self._display), is_stopped=lambda: self.is_stopped
            )
            self._stop.saved = f"The new checkpoint is in '{tuning.output}'."
            if added is not None:
                acted = "" if added.intervention_share is None else f", {added.intervention_share:.0%} interventions"
                click.echo(
                    f"added             {added.num_episodes} episode{'s' if added.num_episodes > 1 else ''}, "
                    f"{added.num_env_steps:,} env steps, return {added.return_mean:.4g}{acted}"
                )
            click.echo(f"updates           {made:,}")
        else:
            known = f"; {num_known} {'was' if num_known == 1 else 'were'} added before" if num_known else ""
            click.echo(f"There is no new episode in '{self._episodes}'{known}.", err=True)
        path, filesystem = tuning.newest()
        if self._policy is not None and not tuning.policy_is_current(self._policy):
            from rllib_calql.export.writing import export_policy

            export_policy(path, self._policy, force=True, filesystem=filesystem)
        click.echo(f"checkpoint        {path}")
        if self._policy is not None:
            click.echo(f"policy            {self._policy}")

    def _start_ray(self) -> None:
        config = self._tuning.config
        request = config.copy(copy_frozen=False).env_runners(num_env_runners=0)
        requests = [config.algo_class.default_resource_request(request)]
        self._display.stage("starting Ray")
        start_ray(requests, self._stop, num_cpus=None, address=None, verbose=self._verbose)
        self._stack.callback(stop_ray)
        self._has_ray = True


@contextmanager
def _refused() -> Iterator[None]:
    """What is wrong with what the user gave."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(root_cause(error)) from error


def _is_elsewhere(episodes: str) -> bool:
    """Whether episodes are in no folder of this machine."""
    return "://" in episodes or episodes.startswith("minari:")


def _check_episodes(episodes: str, *, may_come: bool) -> None:
    """Refuses a path that is not there, before RLlib is loaded.

    Args:
        episodes: As the user gave it.
        may_come: Whether it is waited for.
    """
    if not episodes:
        raise UsageError("`--episodes` is empty; name the folder that `EpisodeLog` writes to, `.` for the present one.")
    if _is_elsewhere(episodes):
        if may_come:
            raise UsageError(
                f"`--watch` looks at a folder of this machine, and `--episodes` '{episodes}' is none; drop `--watch` "
                "and give the command now and then."
            )
        return
    if Path(episodes).expanduser().exists():
        return
    if not may_come:
        raise UsageError(f"`--episodes` '{episodes}' does not exist; name the folder that `EpisodeLog` writes to.")
    click.echo(f"`--episodes` '{episodes}' does not exist yet; it is waited for.", err=True)


def _check_policy_file(policy: Path) -> None:
    from rllib_calql.export.writing import checked_output
    from rllib_calql.policy.loading import load_policy

    try:
        file = checked_output(policy, force=True)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"`--export`: {error}") from error
    if not file.exists():
        return
    try:
        load_policy(file)
    except ImportError:  # What runs it is not needed to write it.
        return
    except (OSError, ValueError) as error:
        raise UsageError(f"`--export` replaces policy files only, and {error} Choose another name.") from error


def _listing(episodes: str) -> Any:
    """What a folder holds, by names, sizes and times; hidden files are those that are being written."""
    path = Path(episodes).expanduser()
    found = []
    for folder, _, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
        for name in names:
            if not name.startswith((".", "_")):
                try:
                    about = os.stat(os.path.join(folder, name))
                except OSError:
                    continue
                found.append((folder, name, about.st_size, about.st_mtime_ns))
    return sorted(found)


def _is_empty(episodes: str) -> bool:
    return Path(episodes).expanduser().is_dir() and not _listing(episodes)


def _progress(display: Display, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """Shows how many updates are made, and how long the others will take."""
    from rllib_calql.progress.budget import format_duration

    begin, said = clock(), -math.inf

    def show(done: int, total: int) -> None:
        nonlocal said
        if clock() - said >= _SAY_EVERY_S:
            said = clock()
            left = format_duration((said - begin) * (total - done) / done)
            display.stage(f"{done:,}/{total:,} updates  {done / (said - begin):.3g}/s  ETA {left}")

    return show
