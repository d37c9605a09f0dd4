"""Search spaces in experiment files: read, found in nested values, and replaced by values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer

from rllib_calql.experiments.reading.errors import ExperimentError, reported

KeyPath = tuple[Any, ...]
_MAX_COMBINATIONS = 64  # A check takes about 20 ms.
# Name -> (constructor, number of entries of the list; None for any).
_SEARCH_SPACES: dict[str, tuple[Callable[..., Any], int | None]] = {
    "grid_search": (tune.grid_search, None),
    "choice": (tune.choice, None),
    "uniform": (tune.uniform, 2),
    "loguniform": (tune.loguniform, 2),
    "quniform": (tune.quniform, 3),
    "qloguniform": (tune.qloguniform, 3),
    "randint": (tune.randint, 2),
}


def parse_spaces(value: Any, path: KeyPath = ()) -> Any:
    """Replaces `{grid_search: [...]}`, `{uniform: [a, b]}`, ... by Tune's objects, at any depth.

    Raises:
        ExperimentError: Naming the setting, if a space has the wrong number of entries or impossible ones.
    """
    if isinstance(value, list):
        return [parse_spaces(item, (*path, i)) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (kind := next(iter(value))) in _SEARCH_SPACES:
        build, length = _SEARCH_SPACES[kind]
        entries = value[kind]
        where = f"`{'/'.join(map(str, path))}`: `{kind}`"
        if not isinstance(entries, list) or not entries or (length is not None and len(entries) != length):
            raise ExperimentError(f"{where} needs a list of {length or 'one or more'} values, got {entries!r}.")
        with reported(where):
            return build(*entries) if length is not None else build(entries)
    return {key: parse_spaces(item, (*path, key)) for key, item in value.items()}


def is_space(value: Any) -> bool:
    """Whether Tune replaces this value by one of several."""
    return isinstance(value, Domain) or (isinstance(value, dict) and list(value) == ["grid_search"])


def contents(space: Any) -> str:
    """Kind and entries of a space, by which two are compared."""
    return f"{type(space).__name__} {space if isinstance(space, dict) else space.domain_str}"


def find_spaces(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every space inside a value, with the keys and indices that lead to it."""
    if is_space(value):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from find_spaces(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from find_spaces(item, (*path, index))


def foreseeable_choices(spaces: Mapping[KeyPath, Any]) -> Iterator[dict[KeyPath, Any]]:
    """Choices of a value for every space, in which every foreseeable value is there once."""
    first = {path: _foreseeable_values(space)[0] for path, space in spaces.items()}
    yield first
    yield from (first | {path: value} for path, space in spaces.items() for value in _foreseeable_values(space)[1:])


def foreseeable_combinations(spaces: Mapping[KeyPath, Any]) -> Iterator[dict[KeyPath, Any]]:
    """The choices in which every foreseeable value is there with every one of the other spaces.

    Beyond 64 there are none, and none where a function chooses by what the others chose.
    """
    if any(isinstance(space, Function) for space in spaces.values()):
        return
    values = [_foreseeable_values(space) for space in spaces.values()]
    if math.prod(map(len, values)) <= _MAX_COMBINATIONS:
        yield from (dict(zip(spaces, chosen, strict=True)) for chosen in itertools.product(*values))


def _foreseeable_values(space: Any) -> Sequence[Any]:
    if isinstance(space, dict):
        values: Sequence[Any] = space["grid_search"]
        return values
    if isinstance(space, Categorical):
        return list(space.categories)
    if isinstance(space, Integer):
        return [space.lower, space.upper - 1]
    return [space.lower, space.upper] if isinstance(space, Float) else [space.sample()]


def substitute(value: Any, chosen: Mapping[KeyPath, Any], path: KeyPath = ()) -> Any:
    """The value with its spaces replaced by the chosen values."""
    if path in chosen:
        return chosen[path]
    if isinstance(value, dict):
        return {key: substitute(item, chosen, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [substitute(item, chosen, (*path, index)) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value
