"""`load_yaml`: YAML as experiment files and study files are written, read strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from rllib_calql.experiments.reading.errors import ExperimentError, reported

_MAX_DEPTH = 50  # Of collections in collections.


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 floats (PyYAML reads `3e-4` as a string), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen and name != "<<":
                problem = f"the key '{name}' is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


# PyYAML tries resolvers in the order of registration, so integers stay integers.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def load_yaml(path: Path) -> Any:
    """Content of a YAML file.

    Raises:
        ExperimentError: If it is not valid YAML, has a key twice, or holds what cannot be a setting: whole numbers of
            more than 64 bits, and collections that are nested too deep or hold themselves.
    """
    with reported(f"'{path}' is not valid YAML"):
        text = path.read_text(encoding="utf-8")
    return parsed_yaml(text, f"'{path}'")


def parsed_yaml(text: str, source: str) -> Any:
    """What YAML says, and JSON, which is a part of it.

    Args:
        text: The YAML.
        source: Where it stands, for messages.

    Raises:
        ExperimentError: As `load_yaml`.
    """
    with reported(f"{source} is not valid YAML"):
        content = yaml.load(text, Loader=_StrictLoader)
    with reported(f"{source} cannot be read"):
        _refuse_boundless(content, _MAX_DEPTH)
    return content


def name_in_yaml(name: Any, what: str) -> str:
    """A name as text; numbers are names as well.

    Args:
        name: What YAML made of it.
        what: What the message calls it.

    Raises:
        ExperimentError: If YAML took it for something else, such as `off` for False.
    """
    if isinstance(name, bool) or not isinstance(name, (str, int, float)):
        raise ExperimentError(f"{what} is {name!r} in YAML, no text; write it in quotes, such as 'off'.")
    return str(name)


def _refuse_boundless(content: Any, depth: int) -> None:
    """Refuses what ends in errors of Python wherever it is copied, compared or printed."""
    if depth == 0:
        raise ValueError(f"its collections are nested deeper than {_MAX_DEPTH} levels, or hold themselves; drop that.")
    if isinstance(content, int) and abs(content) >> 64:
        raise ValueError(f"a whole number has {content.bit_length()} bits, at most 64 can be used; set a smaller one.")
    if isinstance(content, (dict, list, set)):
        for inner in (*content, *content.values()) if isinstance(content, dict) else content:
            _refuse_boundless(inner, depth - 1)
