"""What all commands that run Ray share: quiet logs, Ray's start, exit codes, one-line errors."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from rllib_calql.commands.import_path import worker_folders
from rllib_calql.commands.ray_start import cause_of_failed_start
from rllib_calql.system import ray_processes
from rllib_calql.system.ray_resources import UnavailableError, refuse_unavailable, refuse_unavailable_here
from rllib_calql.system.stop_signals import StopSignals

_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # `ProgressCallback` reports instead.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C writes a checkpoint first, see `CheckpointOnInterrupt`.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # Not every result has an evaluation for the scheduler to judge.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",  # After an interrupt, do not wait for the iteration that follows the checkpoint.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # Errors are printed at the end, without Ray's traceback around them.
}
_PRELOADED = "RAY_preload_python_modules"
_OUT_OF_TUNE_LOG = "Trials did not complete"


class FiniteFloat(click.FloatRange):
    """A finite number; click's own range lets NaN pass, which is neither below nor above a bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """click's, and the number is looked at."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


grace_option = click.option(
    "--grace",
    type=FiniteFloat(min=0.0),
    default=30.0,
    show_default=True,
    help="Seconds from SIGTERM or SIGHUP within which checkpoints are written.",
)


class UsageError(click.ClickException):
    """Wrong usage."""

    exit_code = 2


def quiet_warnings() -> None:
    """Hides what Ray, Gymnasium and the simulators warn of, which nobody who gives a command can act on."""
    warnings.filterwarnings("ignore", module=r"(ray|gymnasium|gymnasium_robotics|glfw|optuna)\b")


class _PlainLines(logging.Formatter):
    """What is logged, as commands say their own warnings."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.capitalize()}: {super().format(record)}"


def prepare(verbose: bool) -> None:
    """Sets what Ray reads when it is imported, imports it, and quiets it unless `verbose`."""
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if not verbose:
        quiet_warnings()
        # Before a library does it, with names of modules in front.
        handler = logging.StreamHandler()
        handler.setFormatter(_PlainLines())
        logging.basicConfig(handlers=[handler], level=logging.WARNING)
    import ray.rllib  # noqa: F401 - sets log levels, which the lines below replace.

    if not verbose:
        for logger in ("ray", "ray.rllib", "ray.tune"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        # Tune's copy of its state in the background fails where files change meanwhile; `KeepResumable` has its own.
        logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
        # Said better by our own messages at the end.
        logging.getLogger("ray.tune.tune").addFilter(lambda record: _OUT_OF_TUNE_LOG not in str(record.msg))


def start_ray(
    requests: Sequence[Any], stop: StopSignals, *, num_cpus: int | None, address: str | None, verbose: bool
) -> None:
    """Starts Ray here with at least the CPUs of the largest trial, or joins a cluster; `stop_ray` ends it.

    Args:
        requests: What each trial asks Ray for, as `PlacementGroupFactory`.
        stop: Signals that may come meanwhile.
        num_cpus: CPUs that Ray is told to have; None for those of the machine, or what a trial needs.
        address: Of the cluster; None to start Ray here.
        verbose: Whether the logs of Ray are shown.

    Raises:
        UsageError: If there is no such cluster, `num_cpus` is too small, or a trial asks for what is not there.
        click.ClickException: If Ray does not start.
    """
    import ray
    from ray.job_config import JobConfig

    from rllib_calql.experiments.experiment import num_cpus_of_largest

    needed = num_cpus_of_largest(requests)
    # Modules of the user, such as that of an environment, lie where the driver finds them.
    job = JobConfig(_py_driver_sys_path=worker_folders())
    quiet = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR, "job_config": job}
    if address is not None:
        if num_cpus is not None:
            raise UsageError("`--num-cpus` sizes a Ray that is started here; drop it or `--address`.")
        try:
            with stop.while_starting_ray():
                ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(f"There is no Ray cluster at '{address}': {error}") from error
        with _refused():
            for request in requests:
                refuse_unavailable(request.bundles)
        return
    if num_cpus is not None and num_cpus < needed:
        raise UsageError(
            f"A trial needs {needed} CPUs (one, and one per env runner and learner), `--num-cpus` is {num_cpus}; raise "
            "it or lower `num_env_runners`. It may exceed the CPUs of the machine."
        )
    num_cpus = num_cpus or max(needed, os.cpu_count() or 1)
    with _refused():
        for request in requests:
            refuse_unavailable_here(request.bundles, num_cpus=num_cpus)
    ray_processes.mark()
    stop.before_end = ray_processes.end_marked
    os.environ[_PRELOADED] = "rllib_calql.system.worker_signals"
    try:
        with stop.while_starting_ray():
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    except KeyboardInterrupt:
        stop_ray()
        raise
    except Exception as error:
        stop_ray()
        if verbose:
            raise
        raise click.ClickException(f"Ray could not be started: {cause_of_failed_start(error)}") from error


@contextmanager
def _refused() -> Iterator[None]:
    """Ends the command where a trial asks for what Ray can never give."""
    import ray

    try:
        yield
    except UnavailableError as error:
        if ray.is_initialized():
            stop_ray()
        raise UsageError(str(error)) from error


def stop_ray() -> None:
    """Leaves Ray, and ends the processes that `start_ray` started."""
    import ray

    started = ray_processes.marked()
    node = ray._private.worker._global_node
    for infos in node.all_processes.values() if node is not None and started else ():
        for info in infos:
            # They do not hear SIGTERM, for which Ray would wait a second each; there is nothing left for them to do.
            info.process.terminate = info.process.kill
    try:
        ray.shutdown()
    finally:
        ray_processes.end_marked(started)


def exit_interrupted(stop: StopSignals, message: str) -> NoReturn:
    """Says how to go on, and ends the process with the exit code of the signal."""
    with suppress(OSError):
        click.echo(message, err=True)
    raise click.exceptions.Exit(stop.exit_code)


class StoppableGroup(click.Group):
    """Commands that Ctrl-C, SIGTERM and SIGHUP end in order; they find the `StopSignals` in the context's `obj`."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        with StopSignals() as stop:
            ctx.obj = stop
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                exit_interrupted(stop, f"{stop.name}. {stop.saved}".strip())


@contextmanager
def errors_in_one_line(
    kinds: tuple[type[Exception], ...] = (ImportError, OSError, ValueError),
) -> Iterator[None]:
    """Prints what is wrong with data, files and installation without a traceback, for exit code 1."""
    try:
        yield
    except kinds as error:
        raise click.ClickException(" ".join(str(error).split())) from error


@contextmanager
def usage_errors(kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Prints what is wrong with an option without a traceback, for exit code 2."""
    try:
        yield
    except kinds as error:
        raise UsageError(" ".join(str(error).split())) from error


def root_cause(error: BaseException) -> str:
    """The message of the error that was raised in the trial, without the tracebacks that Ray puts around it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    starts = [i for i, line in enumerate(lines) if re.match(r"(\w+\.)*\w*(Error|Exception)\b(:|$)", line)]
    return "\n".join(lines[starts[-1] :]) if starts else lines[-1]
