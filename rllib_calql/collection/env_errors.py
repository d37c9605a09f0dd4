"""What went wrong in an environment, told where the user sees it.

RLlib raises a bare `RuntimeError` for a step that failed, and an `IndexError` where no env runner could be started.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_GROUP_LOGGER = "ray.rllib.env.env_runner_group"
_FAILED_VALIDATION = "Validation of EnvRunner failed!"
_NOT_REGISTERED = ("NameNotFound", "NamespaceNotFound", "VersionNotFound", "UnregisteredEnv")
_FIRST_LINE_OF_ERROR = re.compile(r"((\w+\.)+\w+|\w*(Error|Exception|Interrupt|Exit)\w*)(:|$)")


def described(error: BaseException) -> str:
    """Type and message of the error that an env runner's error is about."""
    while type(error) is RuntimeError and not error.args and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns what an env runner of this process raises into a `RuntimeError` that says it.

    Args:
        what: What failed then, "Collecting an episode".

    Raises:
        RuntimeError: With type and message of the original error.
    """
    try:
        yield
    except Exception as error:
        # Ray Tune copies errors with their causes, which fails for those whose constructor takes other arguments.
        cause = error if _can_be_copied(error) else None
        raise RuntimeError(f"{what} failed, {described(error)}") from cause


@contextmanager
def start_failures_told(config: Any) -> Iterator[None]:
    """Turns the error of env runners none of which could be started into one that says why.

    Args:
        config: The algorithm's config.

    Raises:
        RuntimeError: With what the first remote one raised, or if the environment's id is not registered.
    """
    heard: list[str] = []

    def listen(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith(_FAILED_VALIDATION):
            heard.append(message)
        return True

    logger = logging.getLogger(_GROUP_LOGGER)
    logger.addFilter(listen)
    try:
        yield
    except Exception as error:
        if type(error).__name__ in _NOT_REGISTERED:  # Raised in this process.
            cause = described(error)
        elif heard:
            cause = _last_error(heard[0])
        elif isinstance(error, IndexError) and (config.num_env_runners or config.evaluation_num_env_runners):
            cause = "see their logs, in Ray's session folder"
        else:
            raise
        raise RuntimeError(
            f"The env runners could not be started, {cause}{_remedy_of_missing_id(cause, config.env)}"
        ) from error
    finally:
        logger.removeFilter(listen)


def _can_be_copied(error: BaseException) -> bool:
    try:
        copy.copy(error)
    except Exception:
        return False
    return error.__cause__ is None or _can_be_copied(error.__cause__)


def _last_error(text: str) -> str:
    """The error at the end of a text of tracebacks, all its lines."""
    lines = text.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if _FIRST_LINE_OF_ERROR.match(line)]
    return "\n".join(lines[starts[-1] :] if starts else lines[-1:]).strip()


def _remedy_of_missing_id(cause: str, env: Any) -> str:
    if not isinstance(env, str) or not any(name in cause.split(":")[0] for name in _NOT_REGISTERED):
        return ""
    return (
        f" `env` {env!r} has to be registered in the processes of the env runners, where a `gym.register` in another "
        f"process, such as that of a script, has no effect: set `env` to 'MODULE:{env}', of the module that registers "
        f"it, or to the environment's class, or register it by `ray.tune.register_env({env!r}, lambda config: ...)`."
    )
