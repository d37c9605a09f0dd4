"""`ExperimentError` and what experiment files are checked with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rllib_calql.system.similar_words import similar_words


class ExperimentError(ValueError):
    """An experiment file that cannot be run as it is. The message says what to change."""


@contextmanager
def reported(where: str) -> Iterator[None]:
    """Says where an error comes from. RLlib raises exceptions of many types for bad values."""
    try:
        yield
    except Exception as error:
        raise ExperimentError(f"{where}: {error or type(error).__name__}") from error


def refuse_unknown(entry: Any, known: Sequence[str], where: str) -> None:
    """Raises unless `entry` is a mapping with known keys.

    Raises:
        ExperimentError: Naming the key and the most similar known ones.
    """
    if not isinstance(entry, dict):
        raise ExperimentError(f"The {where} must be a mapping with keys of {', '.join(known)}; got {entry!r}.")
    for key in entry:
        if key not in known:
            listed = ", ".join(known)
            raise ExperimentError(f"Unknown key `{key}` in {where}{did_you_mean(str(key), known)} Known: {listed}.")


def did_you_mean(word: str, known: Any) -> str:
    """`; did you mean ...?` with similar known words, or a full stop."""
    similar = similar_words(word, map(str, known))
    return f"; did you mean {' or '.join(f'`{match}`' for match in similar)}?" if similar else "."
