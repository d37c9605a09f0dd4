"""What all commands that run Ray share: quiet logs, Ray's start, exit codes, one-line errors."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # `ProgressCallback` reports instead.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C writes a checkpoint first, see `CheckpointOnInterrupt`.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # Not every result has an evaluation for the scheduler to judge.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",  # After an interrupt, do not wait for the iteration that follows the checkpoint.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # Errors are printed at the end, without Ray's traceback around them.
}
INTERRUPTED = 130  # Exit code.
_OUT_OF_TUNE_LOG = "Trials did not complete"


class UsageError(click.ClickException):
    """Wrong usage."""

    exit_code = 2


def prepare(verbose: bool) -> None:
    """Sets what Ray reads when it is imported, imports it, and quiets it unless `verbose`."""
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import ray.rllib  # noqa: F401 - sets log levels, which the lines below replace.

    if not verbose:
        for logger in ("ray", "ray.rllib", "ray.tune"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"(ray|gymnasium|gymnasium_robotics)\b")
        # Tune's copy of its state in the background fails where files change meanwhile; `KeepResumable` has its own.
        logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
        # Said better by our own messages at the end.
        logging.getLogger("ray.tune.tune").addFilter(lambda record: _OUT_OF_TUNE_LOG not in str(record.msg))


def start_ray(needed: int, *, num_cpus: int | None, address: str | None, verbose: bool) -> None:
    """Starts Ray here with at least the `needed` CPUs, or joins the cluster at `address`.

    Raises:
        UsageError: If there is no such cluster, or `num_cpus` is too small.
    """
    import ray

    quiet = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if address is not None:
        if num_cpus is not None:
            raise UsageError("`--num-cpus` sizes a Ray that is started here; drop it or `--address`.")
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(f"There is no Ray cluster at '{address}': {error}") from error
        return
    if num_cpus is not None and num_cpus < needed:
        raise UsageError(
            f"A trial needs {needed} CPUs (one, and one per env runner and learner), `--num-cpus` is {num_cpus}; raise "
            "it or lower `num_env_runners`. It may exceed the CPUs of the machine."
        )
    ray.init(address="local", num_cpus=num_cpus or max(needed, os.cpu_count() or 1), include_dashboard=False, **quiet)


def exit_interrupted(message: str) -> NoReturn:
    """Says how to go on, and ends the process with the exit code of an interrupt."""
    click.echo(message, err=True)
    raise click.exceptions.Exit(INTERRUPTED)


@contextmanager
def errors_in_one_line(
    kinds: tuple[type[Exception], ...] = (ImportError, OSError, ValueError),
) -> Iterator[None]:
    """Prints what is wrong with data, files and installation without a traceback, for exit code 1."""
    try:
        yield
    except kinds as error:
        raise click.ClickException(" ".join(str(error).split())) from error
    except KeyboardInterrupt:
        raise click.exceptions.Exit(INTERRUPTED) from None


def root_cause(error: BaseException) -> str:
    """The message of the error that was raised in the trial, without the tracebacks that Ray puts around it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    starts = [i for i, line in enumerate(lines) if re.match(r"(\w+\.)*\w*(Error|Exception)\b(:|$)", line)]
    return "\n".join(lines[starts[-1] :]) if starts else lines[-1]
