"""`ColumnMap`: which columns of a log are observations, actions and the rest, said in YAML beside the data.

For instance `obs: [q1, q2]`, `actions: [u]`, `rewards: r`, `t: time`, `episode: id`, `terminated: done`. A list is
joined to one vector, a mapping of names makes a Dict, and one name is that column as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.columns import NAMES
from rllib_calql.datasets.episodes.files import DataFile
from rllib_calql.system.similar_words import close_matches

FILE_NAME = "columns.yaml"
FILE_NAMES = (FILE_NAME, "columns.yml")
"""Names under which a map is found in the folder of the data."""

SUFFIXES = (".yaml", ".yml")

COLUMNS = {
    "obs": Columns.OBS,
    "next_obs": Columns.NEXT_OBS,
    "actions": Columns.ACTIONS,
    "rewards": Columns.REWARDS,
    "t": Columns.T,
    "episode": Columns.EPS_ID,
    "terminated": Columns.TERMINATEDS,
    "truncated": Columns.TRUNCATEDS,
}
"""Key of the map -> RLlib's name of the column."""

_NESTED = ("obs", "next_obs", "actions")
_TEXTS = ("data", "delimiter", "decimal", "demos")
_FURTHER = "further"
_MAX_BYTES = 2**20
_MAX_DEPTH = 8  # Of mappings in mappings; YAML can hold a mapping that contains itself.


@dataclass(frozen=True)
class Joined:
    """One array of a column.

    Attributes:
        names: Columns of the log that it is made of.
        is_vector: Whether they are joined to one vector; else there is one, taken as it is.
    """

    names: tuple[str, ...]
    is_vector: bool


@dataclass(frozen=True)
class ColumnMap:
    """What a map says.

    Attributes:
        file: Where it stands.
        leaves: Leaf, such as "obs" or "obs/arm", by RLlib's names -> what it is made of.
        further: Further columns of numbers.
        texts: Other settings by key: `data`, `delimiter`, `decimal`, `demos`.
    """

    file: DataFile
    leaves: dict[str, Joined]
    further: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)

    def of(self, column: str) -> dict[str, Joined]:
        """The leaves of one column, by RLlib's name of it."""
        return {leaf: joined for leaf, joined in self.leaves.items() if leaf.partition("/")[0] == column}

    @property
    def names(self) -> list[str]:
        """All columns of the log that it names, each once."""
        names = (name for joined in self.leaves.values() for name in joined.names)
        return list(dict.fromkeys([*names, *self.further]))

    def refuse_keys(self, allowed: Sequence[str], format_: str) -> None:
        """Refuses what a format has no use for.

        Raises:
            ValueError: Naming the key.
        """
        given = [key for key, column in COLUMNS.items() if self.of(column)]
        given += [key for key in self.texts if key != "data"] + ([_FURTHER] if self.further else [])
        for key in given:
            if key not in allowed:
                raise ValueError(
                    f"The column map {str(self.file)!r} has the key `{key}`, which means nothing for {format_}; remove "
                    f"it. Allowed are {', '.join(f'`{name}`' for name in allowed)}."
                )


def read_map(file: DataFile) -> ColumnMap:
    """Reads a map.

    Raises:
        ValueError: If it is no YAML, or says something else than what columns are; the message names the key.
    """
    content = _parsed(file)
    leaves: dict[str, Joined] = {}
    for key, column in COLUMNS.items():
        if key in content:
            leaves |= dict(_leaves(file, key, column, content[key]))
    texts = {key: content[key] for key in _TEXTS if key in content}
    for key, value in texts.items():
        if not isinstance(value, str) or not value:
            raise _bad(file, key, "must be a text", value)
    if any(len(texts.get(key, ",")) != 1 for key in ("delimiter", "decimal")):
        key = next(key for key in ("delimiter", "decimal") if len(texts.get(key, ",")) != 1)
        raise _bad(file, key, "must be one character", texts[key])
    further = content.get(_FURTHER, [])
    if not isinstance(further, list) or not all(isinstance(name, str) for name in further):
        raise _bad(file, _FURTHER, "must be a list of columns", further)
    for name in further:
        if name in NAMES or "/" in name:
            raise _bad(file, _FURTHER, "must name columns without slashes that mean nothing else", name)
    return ColumnMap(file, leaves, tuple(further), texts)


def _parsed(file: DataFile) -> dict[str, Any]:
    with file.open() as opened:
        text = opened.read(_MAX_BYTES + 1)
    try:
        if len(text) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        content = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        reason = " ".join(str(err).split()) or "it is nested too deep"
        raise ValueError(f"The column map {str(file)!r} cannot be read: {reason}; repair it.") from err
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"The column map {str(file)!r} must map `obs`, `actions`, `rewards` and so on to columns, got {content!r}; "
            "for instance `obs: [q1, q2]`."
        )
    known = [*COLUMNS, *_TEXTS, _FURTHER]
    for key in content:
        if key not in known:
            raise ValueError(
                f"The column map {str(file)!r} has the unknown key {key!r}.{close_matches(str(key), known)} Allowed "
                f"are {', '.join(f'`{name}`' for name in known)}."
            )
    return content


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen:
                problem = f"the key '{name}' is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _leaves(file: DataFile, key: str, leaf: str, value: Any) -> Iterator[tuple[str, Joined]]:
    is_nested = key in _NESTED and leaf.count("/") < _MAX_DEPTH
    if isinstance(value, str) and value:
        yield leaf, Joined((value,), is_vector=False)
    elif is_nested and isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        if len(set(value)) < len(value):
            raise _bad(file, key, "must name each column once", value)
        yield leaf, Joined(tuple(value), is_vector=True)
    elif is_nested and isinstance(value, dict) and value:
        for name, part in value.items():
            if "/" in str(name) or str(name) in ("", ".", ".."):
                raise _bad(file, key, "must have names of parts without slashes", name)
            yield from _leaves(file, key, f"{leaf}/{name}", part)
    else:
        more = ", a list of columns, or a mapping of names to these" if key in _NESTED else ""
        raise _bad(file, key, f"must be a column{more}", value)


def _bad(file: DataFile, key: str, rule: str, value: Any) -> ValueError:
    parts = value if isinstance(value, list) else [value]
    other = next((part for part in parts if isinstance(part, (bool, int, float))), None)
    remedy = "correct it"
    if other is not None:
        remedy = "names are text, so write those that YAML takes for something else in quotes, such as '1' and 'on'"
    return ValueError(f"`{key}` in the column map {str(file)!r} {rule}, got {value!r}; {remedy}.")
