"""`parsed_json`: JSON from files that may be damaged or somebody else's."""

from __future__ import annotations

import json
from typing import Any


def parsed_json(content: bytes | str) -> Any:
    """What JSON says, of any type.

    Raises:
        ValueError: If it is no JSON, not in UTF-8, nested too deep, or holds numbers of thousands of digits.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
