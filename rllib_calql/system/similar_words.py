"""What a misspelt word may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def similar_words(word: str, known: Iterable[str]) -> list[str]:
    """At most three of the known words that resemble a word whatever its case, the most similar first."""
    by_lowered = {name.lower(): name for name in sorted(known)}
    return [by_lowered[match] for match in difflib.get_close_matches(word.lower(), by_lowered, n=3)]


def close_matches(word: str, known: Iterable[str], mark: str = "'") -> str:
    """` Did you mean 'a' or 'b'?` for the known words that resemble `word`, or nothing.

    Args:
        word: What was given.
        known: What could have been given.
        mark: What stands around each of them.
    """
    similar = similar_words(word, known)
    return f" Did you mean {' or '.join(f'{mark}{match}{mark}' for match in similar)}?" if similar else ""
