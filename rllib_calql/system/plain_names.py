"""Names that become parts of paths: what is admitted, so that a name never leads out of the folder it belongs in."""

from __future__ import annotations

import unicodedata

_MAX_BYTES = 255  # Of one part of a path, on all common file systems.
_RULE = (
    "a plain name: not empty, no `/` or `\\`, no control characters, no `.` or `-` at its begin, at most "
    f"{_MAX_BYTES} bytes"
)


def refuse_unplain_name(name: object, what: str) -> None:
    """Checks a name that becomes one part of a path.

    Args:
        name: The name.
        what: What it is the name of, for the message.

    Raises:
        ValueError: If it is no plain name, with the rule.
    """
    if not isinstance(name, str) or not _is_plain(name):
        raise ValueError(f"{what} must be {_RULE}; got {_shown(name)}.")


def refuse_unplain_id(name: object, what: str) -> None:
    """Checks an id of plain names with slashes between them, as those of Minari's data sets.

    Raises:
        ValueError: If a part is no plain name, with the rule.
    """
    if not isinstance(name, str) or not all(map(_is_plain, name.split("/"))):
        raise ValueError(f"{what} must be plain names with `/` between them, each {_RULE}; got {_shown(name)}.")


def _is_plain(name: str) -> bool:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # Half of a surrogate pair.
        return False
    forbidden = any(sign in "/\\" or unicodedata.category(sign) in ("Cc", "Zl", "Zp") for sign in name)
    return 0 < size <= _MAX_BYTES and bool(name.strip()) and name[0] not in ".-" and not forbidden


def _shown(name: object) -> str:
    text = ascii(name) if isinstance(name, str) and not name.isprintable() else repr(name)
    return text if len(text) <= 100 else f"{text[:100]}..."
