"""Ranges, means and deviations of every number of observations and actions, collected while blocks pass by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tree
from numpy.typing import NDArray

from rllib_calql.datasets.episodes.reader import EpisodeBlock, Nested
from rllib_calql.datasets.report.summary import ArrayInfo

Floats = NDArray[np.float64]
Bounds = tuple[Floats, Floats]

_ROWS_AT_ONCE = 64
_CHUNK = 2**16  # Rows.
_MOST_MEASURED = 4096  # Numbers of a row that are measured one by one.
_NUMBERS_AT_ONCE = 2**22  # Of pictures.


class ArrayCollector:
    """What is known of the arrays of one column.

    Args:
        column: Its name in messages.
        bounds_of: Bounds of each array, flat, by the shapes of their rows by path; those without bounds are left out.
        measures_images: Whether bytes of pictures, and rows of very many numbers, are measured, all as one.
    """

    def __init__(
        self,
        column: str,
        bounds_of: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Bounds]],
        *,
        measures_images: bool,
    ) -> None:
        self._column = column
        self._bounds_of = bounds_of
        self._measures_images = measures_images
        self._infos: dict[str, ArrayInfo] = {}
        self._statistics: dict[str, _Statistics] = {}

    def add(self, values: Nested, block: EpisodeBlock) -> None:
        """Adds the rows of a block.

        Raises:
            ValueError: If they have another structure or shape than those before.
        """
        arrays = {"/".join(map(str, keys)): array for keys, array in tree.flatten_with_path(values)}
        new = {path: ArrayInfo(path, str(array.dtype), tuple(array.shape[1:])) for path, array in arrays.items()}
        if not self._infos:
            self._infos = new
            bounds = self._bounds_of({path: info.shape for path, info in new.items()})
            self._statistics = {path: _Statistics(bounds.get(path)) for path in arrays}
        else:
            self._infos = _merged(self._column, self._infos, new, block)
        for path, array in arrays.items():
            rows = array.reshape(len(array), -1)
            if rows.shape[1] <= _MOST_MEASURED and not (array.ndim == 4 and array.dtype == np.uint8):
                for start in range(0, len(rows), _CHUNK):
                    self._statistics[path].add(rows[start : start + _CHUNK])
            elif self._measures_images:
                for start in range(0, rows.size, _NUMBERS_AT_ONCE):
                    self._statistics[path].add(array.reshape(-1, 1)[start : start + _NUMBERS_AT_ONCE])

    def build(self) -> tuple[ArrayInfo, ...]:
        """The arrays, with what was measured."""
        return tuple(
            replace(info, **statistics.summary())
            for info, statistics in zip(self._infos.values(), self._statistics.values(), strict=True)
        )


class _Statistics:
    """Of each column of rows [R, n]: least and largest, sums, and how many lie outside bounds."""

    def __init__(self, bounds: Bounds | None) -> None:
        self._bounds = None if bounds is None else _with_tolerance(*bounds)
        self._num_rows = 0

    def add(self, rows: NDArray[Any]) -> None:
        low, high = _folded(np.min, rows).astype(np.float64), _folded(np.max, rows).astype(np.float64)
        if not self._num_rows:
            # Distances from the first row: squares of numbers that lie far from 0 would leave nothing of a deviation.
            self._reference = rows[0].astype(np.float64)
            self._low, self._high, self._eps = low, high, 0.0
            self._sum, self._squares, self._num_outside = (np.zeros(rows.shape[1]) for _ in range(3))
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)
        self._eps = max(self._eps, float(np.finfo(rows.dtype).eps) if rows.dtype.kind == "f" else 0.0)
        with np.errstate(over="ignore", invalid="ignore"):  # Of numbers that training refuses.
            distances = rows - self._reference
            self._sum += _folded(np.sum, distances)
            self._squares += _folded(np.sum, np.square(distances, out=distances))
        self._num_rows += len(rows)
        if self._bounds is not None and len(self._bounds[0]) == rows.shape[1]:
            for place in np.flatnonzero((low < self._bounds[0]) | (high > self._bounds[1])):
                column = rows[:, place]
                outside = (column < self._bounds[0][place]) | (column > self._bounds[1][place])
                self._num_outside[place] += np.count_nonzero(outside)

    def summary(self) -> dict[str, Any]:
        if not self._num_rows:
            return {}
        mean = self._sum / self._num_rows
        # What computing a constant in different ways leaves is no spread.
        with np.errstate(over="ignore"):
            spread = self._high - self._low
        constant = spread <= 4 * self._eps * np.maximum(np.abs(self._low), np.abs(self._high))
        with np.errstate(over="ignore", invalid="ignore"):
            variance = np.where(self._high == self._low, 0.0, self._squares / self._num_rows - mean**2)
        is_bounded = self._bounds is not None and len(self._bounds[0]) == len(mean)
        return {
            "low": tuple(self._low.tolist()),
            "high": tuple(self._high.tolist()),
            "mean": tuple((self._reference + mean).tolist()),
            "std": tuple(np.sqrt(np.maximum(variance, 0.0)).tolist()),
            "constant": tuple(constant.tolist()),
            "share_outside": tuple((self._num_outside / self._num_rows).tolist()) if is_bounded else (),
        }


def _with_tolerance(low: Floats, high: Floats) -> Bounds:
    """Bounds a little wider: numbers that were on a bound may be stored just outside of it."""
    with np.errstate(invalid="ignore", over="ignore"):
        margins = [
            1e-6 * np.abs(bound) + 1e-5 * np.where(np.isfinite(high - low), high - low, 0.0) for bound in (low, high)
        ]
    return low - margins[0], high + margins[1]


def _folded(reduce: Callable[..., Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Reduces rows along their first axis; long rows are 15 times faster than the same numbers in rows of 8."""
    num_long = len(rows) // _ROWS_AT_ONCE
    if not num_long:
        return np.asarray(reduce(rows, axis=0))
    split = num_long * _ROWS_AT_ONCE
    folded = reduce(rows[:split].reshape(num_long, -1), axis=0).reshape(_ROWS_AT_ONCE, -1)
    return np.asarray(reduce(np.concatenate([folded, rows[split:]]), axis=0))


def _merged(
    column: str, known: dict[str, ArrayInfo], new: dict[str, ArrayInfo], block: EpisodeBlock
) -> dict[str, ArrayInfo]:
    """Unites what is known of a column's arrays with those of one more block."""
    shapes, new_shapes = ({path: info.shape for path, info in infos.items()} for infos in (known, new))
    if shapes != new_shapes:
        raise ValueError(
            f"`{column}` of {block.where(0)} has {_described(new_shapes)}, the data before it {_described(shapes)}; "
            "inspect data sets of different environments one by one."
        )
    return {path: replace(info, dtype=" and ".join(_dtypes(info, new[path]))) for path, info in known.items()}


def _dtypes(one: ArrayInfo, other: ArrayInfo) -> Iterator[str]:
    yield from dict.fromkeys([*one.dtype.split(" and "), other.dtype])


def _described(shapes: dict[str, tuple[int, ...]]) -> str:
    if list(shapes) == [""]:
        return f"shape {shapes['']}"
    return "shapes " + ", ".join(f"{path} {shape}" for path, shape in shapes.items())
