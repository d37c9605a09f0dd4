"""Data compared with the spaces that they are to be trained in, number by number: what looks like a mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rllib_calql.common.encoding import flat_names, flat_places, flat_size, leaf_name, observation_dtype
from rllib_calql.common.spaces import WIDEST, leaves_of, reordering
from rllib_calql.datasets.report.summary import ArrayInfo, DatasetReport, format_number, format_share

Floats = NDArray[np.float64]
Bounds = tuple[Floats, Floats]

_SMALL_PART = 0.1  # Of the width of the bounds.
_REMARKABLE_SHARE = 1e-3  # Of the values: environments overstep their own bounds now and then.
_FEW = 3  # Numbers of one array that are told one by one.
_ENOUGH = 100  # Transitions by which it is no accident that actions reach from -1 to 1.


def bounds_of(space: gym.Space[Any] | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Bounds]:
    """What the numbers of arrays may be by a space, flat.

    Args:
        space: Of one observation or action, or None.
        shapes: Shape of the rows of each array of data, by path. Flat rows of a space with parts count as one array.

    Returns:
        Least and largest value of each number of an array, for those arrays that the space has.
    """
    if space is None:
        return {}
    leaves = dict(leaves_of(space))
    if list(shapes) == [""] and "" not in leaves:
        if np.prod(shapes[""]) != flat_size(space):
            return {}
        parts = [_flat_bounds(leaf) for leaf in leaves.values()]
        return {"": (np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts]))}
    found = {path: _bounds(leaves[path], shape) for path, shape in shapes.items() if path in leaves}
    return {path: bounds for path, bounds in found.items() if bounds is not None}


def _bounds(leaf: gym.Space[Any], shape: tuple[int, ...]) -> Bounds | None:
    """Bounds of an array, which holds what the environment gives, or that flattened."""
    size = int(np.prod(shape))
    if isinstance(leaf, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
        counts = np.ravel(leaf.n if isinstance(leaf, gym.spaces.Discrete) else leaf.nvec)
        start = np.broadcast_to(np.ravel(leaf.start), counts.shape).astype(np.float64)
        if size == counts.size:
            return start, start + counts - 1
    return _flat_bounds(leaf) if size == flat_size(leaf) else None


def _flat_bounds(leaf: gym.Space[Any]) -> Bounds:
    if isinstance(leaf, gym.spaces.Box):
        low, high = (np.ravel(bound).astype(np.float64) for bound in (leaf.low, leaf.high))
        # Bounds such as the largest float32 are none.
        return np.where(low < -WIDEST, -np.inf, low), np.where(high > WIDEST, np.inf, high)
    size = flat_size(leaf)
    return np.zeros(size), np.ones(size)


@dataclass(frozen=True)
class Comparison:
    """Data beside an environment's spaces, for a person and as JSON.

    Attributes:
        env: Name of the environment.
        observation_space: Its space, as text.
        action_space: Its space, as text.
        mismatches: Why the data cannot be trained on in these spaces, a sentence without its end each.
        findings: What looks like a mistake, likewise.
    """

    env: str
    observation_space: str
    action_space: str
    mismatches: tuple[str, ...]
    findings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content."""
        content = {
            "id": self.env,
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "matches": not self.mismatches,
            "mismatches": list(self.mismatches),
            "findings": list(self.findings),
        }
        return {"environment": content}

    def noted(self, report: DatasetReport) -> DatasetReport:
        """The report as it is shown: it does not say that nothing looks wrong where the comparison says otherwise."""
        if not self.mismatches and not self.findings:
            return report
        return replace(report, notes=(*report.notes, f"what does not fit {self.env} is told below"))

    def __str__(self) -> str:
        verdict = "the data do not fit" if self.mismatches else "keys and shapes match"
        lines = [
            f"Compared with {self.env}: {verdict}",
            f"  observations  {self.observation_space}",
            f"  actions       {self.action_space}",
            *(f"  does not fit: {wrong}." for wrong in self.mismatches),
            *(f"  Warning: {finding}." for finding in self.findings),
        ]
        return "\n".join(lines)


def compare(
    report: DatasetReport, env: str, observation_space: gym.Space[Any], action_space: gym.Space[Any]
) -> Comparison:
    """What comparing data with an environment shows.

    Args:
        report: Built with these spaces.
        env: Name of the environment.
        observation_space: The environment's, before flattening.
        action_space: The environment's.
    """
    return Comparison(
        env,
        str(observation_space),
        str(action_space),
        tuple(mismatches(report, observation_space, action_space)),
        tuple(findings_on_spaces(report, observation_space, action_space)),
    )


@dataclass(frozen=True)
class _Number:
    """One number of the observations, as far as it is compared."""

    name: str
    low: float
    high: float
    share_outside: float
    bounds: tuple[float, float]

    @property
    def is_bounded(self) -> bool:
        return bool(np.isfinite(self.bounds).all())

    def fits(self, other: _Number) -> bool:
        """Whether all its values lie within the bounds of another one."""
        return other.bounds[0] <= self.low and self.high <= other.bounds[1]

    @property
    def is_remarkable(self) -> bool:
        """Whether more leaves the bounds than environments let happen."""
        low, high = self.bounds
        width = high - low if self.is_bounded else np.inf
        far = max(low - self.low, self.high - high) > max(width, 1e-300)
        return self.share_outside >= _REMARKABLE_SHARE or (self.share_outside > 0.0 and far)


def findings_on_spaces(
    report: DatasetReport,
    observation_space: gym.Space[Any] | None,
    action_space: gym.Space[Any] | None,
) -> list[str]:
    """What looks like wrong units, swapped columns or a wrong environment, a sentence without its end each.

    Args:
        report: Built with these spaces.
        observation_space: The environment's, before flattening; None: not compared.
        action_space: What the data's actions are to be in; None: not compared.
    """
    return [*_on_observations(report, observation_space), *_on_actions(report, action_space)]


def _on_observations(report: DatasetReport, space: gym.Space[Any] | None) -> Iterator[str]:
    if space is None:
        return
    arrays = [_numbers(info, bounds, space) for info, bounds in _bounded(report.observations, space)]
    all_numbers = [number for numbers in arrays for number in numbers]
    for numbers in arrays:
        remarkable = [number for number in numbers if number.is_remarkable]
        remarkable.sort(key=lambda number: -number.share_outside)
        told = remarkable if len(remarkable) <= _FEW else remarkable[:1]
        for number in told:
            others = (
                "" if len(told) == len(remarkable) else f" (and {len(remarkable) - 1} more of its numbers likewise)"
            )
            yield (
                f"{_of('observations', number.name)}: {format_share(number.share_outside)} of the values lie outside "
                f"[{format_number(number.bounds[0])}, {format_number(number.bounds[1])}], the bounds of the "
                f"observation space; they go from {format_number(number.low)} to {format_number(number.high)}{others}; "
                f"{_reason(number, all_numbers)}"
            )


def _reason(number: _Number, others: list[_Number]) -> str:
    """What may be behind values outside the bounds."""
    if number.is_bounded:
        # Of two that were swapped, the other one is most often out of its bounds as well.
        for other in sorted(others, key=lambda other: not other.is_remarkable):
            if other is not number and other.is_bounded and number.fits(other) and other.fits(number):
                return (
                    f"check the order of the columns: {number.name} and {other.name} would fit each other's bounds, as "
                    "if they were swapped"
                )
    return "check the units, the order of the columns, and the bounds of the space"


def _on_actions(report: DatasetReport, space: gym.Space[Any] | None) -> Iterator[str]:
    for info, (low, high) in _bounded(report.actions, space):
        least, largest = np.array(info.low), np.array(info.high)
        names = [_of("actions", f"{leaf_name(info.path)}{place}") for place in flat_places(info.shape, len(least))]
        width, free = high - low, (high > low) & np.isfinite(high - low)
        for place in np.flatnonzero(np.array(info.share_outside) > 0.0).tolist():
            yield (
                f"{names[place]}: {format_share(info.share_outside[place])} of the values lie outside "
                f"{_interval(low[place], high[place])}, the bounds of the action space; they go from "
                f"{format_number(least[place])} to {format_number(largest[place])}; "
                f"{_reason_on_action(place, names, (least, largest), (low, high))}"
            )
        part = np.divide(largest - least, width, out=np.ones_like(width), where=free)
        small = part <= _SMALL_PART + 1e-6
        for place in np.flatnonzero(small & free).tolist():
            if info.constant[place]:
                yield (
                    f"{names[place]} is {format_number(least[place])} at every step, of the action space's "
                    f"{_interval(low[place], high[place])}: nothing is learned about other values; check the column"
                )
            else:
                yield (
                    f"{names[place]}: the values use {format_share(float(part[place]))} of the action space's range "
                    f"{_interval(low[place], high[place])}, from {format_number(least[place])} to "
                    f"{format_number(largest[place])}; check the units, as shares of 1 for percent"
                )
        reaches = (np.abs(least + 1.0) < 1e-3) & (np.abs(largest - 1.0) < 1e-3)
        differs = (np.abs(low + 1.0) > 1e-2) | (np.abs(high - 1.0) > 1e-2)
        if (reaches & differs & ~small)[free].all() and free.any() and report.num_transitions >= _ENOUGH:
            yield (
                f"{_of('actions', leaf_name(info.path))}: all values reach exactly from -1 to 1, the action space is "
                f"{_interval(low[free][0], high[free][0])}; if they are scaled to [-1, 1], set "
                '`action_space_of_data="module"`'
            )


def _reason_on_action(place: int, names: list[str], found: Bounds, bounds: Bounds) -> str:
    """What may be behind values of an action outside its bounds."""
    for other in range(len(names)):
        pair, reversed_pair = [place, other], [other, place]
        fits = (bounds[0][reversed_pair] <= found[0][pair]) & (found[1][pair] <= bounds[1][reversed_pair])
        if other != place and fits.all() and np.isfinite([bounds[0][pair], bounds[1][pair]]).all():
            return (
                f"check the order of the columns: {names[place]} and {names[other]} would fit each other's bounds, as "
                "if they were swapped"
            )
    return "check the units, or clip them"


def mismatches(report: DatasetReport, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> list[str]:
    """Why data cannot be trained on in these spaces: other parts, shapes or types, a sentence without its end each."""
    return [
        *_structure("observations", report.observations, observation_space),
        *_structure("actions", report.actions, action_space),
    ]


def _structure(column: str, infos: tuple[ArrayInfo, ...], space: gym.Space[Any]) -> Iterator[str]:
    leaves, found = dict(leaves_of(space)), {info.path: info for info in infos}
    if list(found) == [""] and "" not in leaves:
        if (size := int(np.prod(found[""].shape))) != flat_size(space):
            yield f"{column} are rows of {size} numbers, the environment's have {flat_size(space)} in {sorted(leaves)}"
        return
    for path in sorted(leaves.keys() - found.keys()):
        yield f"{column} lack {leaf_name(path) or 'plain rows'}, which the environment has"
    for path in sorted(found.keys() - leaves.keys()):
        yield f"{column} have {leaf_name(path) or 'plain rows'}, which the environment lacks"
    for path in sorted(found.keys() & leaves.keys()):
        info, leaf = found[path], leaves[path]
        size, shape = int(np.prod(info.shape)), leaf.shape or ()
        if size not in (flat_size(leaf), int(np.prod(shape))):
            yield f"{_of(column, leaf_name(path))} have shape {info.shape}, the environment's {shape}"
        elif info.shape not in (shape, (flat_size(leaf),)) and size != 1 and isinstance(leaf, gym.spaces.Box):
            yield (
                f"{_of(column, leaf_name(path))} have shape {info.shape}, the environment's {shape}: "
                f"{reordering(info.shape, shape)}"
            )
        is_small_integer = observation_dtype(leaf).kind in "iu"
        if column == "observations" and is_small_integer and any(name[0] == "f" for name in info.dtype.split(" and ")):
            yield (
                f"{_of(column, leaf_name(path))} hold {info.dtype}, the environment's {leaf.dtype}: whole numbers of "
                "its range are converted, others are refused"
            )


def _bounded(infos: tuple[ArrayInfo, ...], space: gym.Space[Any] | None) -> Iterator[tuple[ArrayInfo, Bounds]]:
    """Arrays that were measured one number at a time and compared with bounds, and these."""
    bounds = bounds_of(space, {info.path: info.shape for info in infos})
    for info in infos:
        if info.path in bounds and len(info.share_outside) == len(bounds[info.path][0]) == len(info.low):
            yield info, bounds[info.path]


def _numbers(info: ArrayInfo, bounds: Bounds, space: gym.Space[Any]) -> list[_Number]:
    names = [f"{leaf_name(info.path)}{place}" for place in flat_places(info.shape, len(info.low))]
    if info.path == "" and len(flat := flat_names(space)) == len(names):
        names = flat  # Flat rows of a space with parts.
    values = zip(names, info.low, info.high, info.share_outside, *map(np.ndarray.tolist, bounds), strict=True)
    return [_Number(name, low, high, share, (least, largest)) for name, low, high, share, least, largest in values]


def _of(column: str, name: str) -> str:
    return f"{column} {name}" if name.startswith("'") else f"{column}{name}"


def _interval(low: float, high: float) -> str:
    return f"[{format_number(float(low))}, {format_number(float(high))}]"
