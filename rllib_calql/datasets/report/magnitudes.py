"""How large the numbers of a stream are and how many stand out, in bounded memory and a few milliseconds a million."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

OUTLIER_FACTOR = 1_000  # Rewards of one task seldom span more: a goal worth 1,000 steps of cost 1 is no outlier.

_ROWS_AT_ONCE = 2**16
_FIRST_NORMAL = 0x0080  # Bucket of the least number that is not denormal; those below count as 0.
_NUM_BUCKETS = 0x7F80 + 1  # The last one is that of infinity.
_MOST_LEFT_OUT = 3  # Of few numbers. One glitch in twenty must not be the measure of itself.


class Magnitudes:
    """Histogram of |x| whose buckets are 0.8 % wide: the upper half of the bits of a float32.

    The 99.9 % quantile is taken over what is not 0, since in sparse tasks nearly everything is. Of fewer than 3,000
    numbers it leaves out the largest three, but at most one in ten.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_NUM_BUCKETS, dtype=np.int64)
        self._pending: list[NDArray[np.float32]] = []
        self._num_pending = 0

    def add(self, values: NDArray[np.float64]) -> None:
        """Adds some numbers, shape (n,); what exceeds float32 counts as infinite."""
        with np.errstate(over="ignore"):
            self._pending.append(np.abs(values).astype(np.float32))
        self._num_pending += len(values)
        if self._num_pending >= _ROWS_AT_ONCE:
            self._flush()

    def summary(self) -> tuple[float, float]:
        """The 99.9 % quantile of what is not 0, and the share of all numbers beyond `OUTLIER_FACTOR` times it.

        Both are exact to within 0.8 % of the quantile; (0.0, 0.0) if every number is 0.
        """
        self._flush()
        counts = self._counts[_FIRST_NORMAL:]
        num_larger = np.cumsum(counts[::-1])[::-1] - counts
        total = int(counts.sum())
        if not total:
            return 0.0, 0.0
        num_left_out = max(total // 1000, min(_MOST_LEFT_OUT, total // 10))
        lowest = _lower_edges()
        bucket = _FIRST_NORMAL + int(np.argmax(num_larger <= num_left_out))
        is_outlying = lowest > OUTLIER_FACTOR * lowest[min(bucket + 1, _NUM_BUCKETS - 1)]
        return float(lowest[bucket]), int(self._counts[is_outlying].sum()) / int(self._counts.sum())

    def _flush(self) -> None:
        if self._pending:
            buckets = np.concatenate(self._pending).view(np.uint32) >> 16
            self._counts += np.bincount(buckets, minlength=_NUM_BUCKETS)
            self._pending, self._num_pending = [], 0


def _lower_edges() -> NDArray[np.float64]:
    """The least number of every bucket."""
    return (np.arange(_NUM_BUCKETS, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
