"""How far a policy leaves the data: distances to their nearest neighbours.

Source:
    The measure is that of outlier detection by nearest neighbours (Knorr and Ng 1998); what counts as outside is set by
    the data themselves, the 99 % quantile of the distances of held-out rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

QUANTILE = 0.99
MAX_KNOWN = 20_000  # Rows that neighbours are looked for among.
MAX_ASKED = 2_000  # Rows whose neighbours are looked for.
_STD_OF_STILL_ACTION = 0.02  # A hundredth of the range of module actions.
_MIN_STD = 1e-6  # Of the largest one of a part; what varies less is taken for constant.


def share_off_data(
    known: tuple[Array, Array],
    held_out: tuple[Array, Array],
    policy_actions: Array,
    *,
    rng: np.random.Generator,
) -> float:
    """Share of held-out states in which the policy's action is farther from the data than 99 % of the data's own are.

    States and actions are standardised, and each of the two counts as much as the other, however many numbers it has.
    Of states, numbers that never vary are left out. Of actions they count: a policy that moves what never moved in the
    data leaves them.

    Args:
        known: Features (R, n) and actions (R, A) of training rows.
        held_out: Features (V, n) and actions (V, A) of held-out rows.
        policy_actions: What the policy does in the latter, shape (V, A).
        rng: Draws the rows, where there are many.

    Returns:
        In [0, 1]; about 0.01 for the policy that made the data.
    """
    asked = sample_of(len(held_out[0]), MAX_ASKED, rng)
    kept = sample_of(len(known[0]), MAX_KNOWN, rng)
    features, actions = _Scaling(known[0][kept]), _Scaling(known[1][kept], least_std=_STD_OF_STILL_ACTION)
    points = np.concatenate([features(known[0][kept]), actions(known[1][kept])], axis=1)
    states = features(held_out[0][asked])
    own, of_policy = (np.concatenate([states, actions(a[asked])], axis=1) for a in (held_out[1], policy_actions))
    return float(np.mean(_distances(points, of_policy) > np.quantile(_distances(points, own), QUANTILE)))


def shares_beyond(
    known: Array, own: Array, others: Array, asked: Array, *, rng: np.random.Generator
) -> tuple[float, float]:
    """How many of the `asked` rows are far from the `known` ones, each (rows, n).

    Args:
        known: Rows whose neighbourhood is known.
        own: Rows that say how near is near.
        others: Known rows of the same kind as those asked for; they say how far from each other such are.
        asked: Rows to judge.
        rng: Draws the rows, where there are many.

    Returns:
        The share that is farther from `known` than 99 % of `own` are, and the share of which that is true and which is
        also farther from it than 99 % of `others` are from each other.
    """
    kept, few_own = sample_of(len(known), MAX_KNOWN, rng), sample_of(len(own), MAX_ASKED, rng)
    scale = _Scaling(known[kept])
    few_others = scale(others[sample_of(len(others), MAX_ASKED, rng)])
    distances = _distances(scale(known[kept]), scale(asked[sample_of(len(asked), MAX_ASKED, rng)]))
    near = np.quantile(_distances(scale(known[kept]), scale(own[few_own])), QUANTILE)
    apart = np.quantile(_distances(few_others, few_others, rank=2), QUANTILE) if len(few_others) > 1 else 0.0
    return float(np.mean(distances > near)), float(np.mean(distances > max(near, apart)))


class _Scaling:
    """Standardises a part of the points, such that all of its numbers together count 1.

    Args:
        known: The rows that it is made by.
        least_std: What the deviation of a number that does not vary in them is taken for; None: such numbers are left
            out.
    """

    def __init__(self, known: Array, *, least_std: float | None = None) -> None:
        self._mean = known.mean(axis=0, dtype=np.float64)
        std = known.std(axis=0, dtype=np.float64)
        is_free = std > _MIN_STD * max(float(std.max()), 1e-30)
        self._is_kept = is_free if least_std is None else np.ones_like(is_free)
        std = np.where(is_free, std, least_std or 1.0)
        self._divisor = std[self._is_kept] * np.sqrt(max(1, int(self._is_kept.sum())))

    def __call__(self, rows: Array) -> Array:
        scaled: Array = (np.asarray(rows, np.float64) - self._mean)[:, self._is_kept] / self._divisor
        return scaled


def _distances(known: Array, asked: Array, rank: int = 1) -> Array:
    """Of each row to the nearest known one, or to the one of that rank."""
    from scipy.spatial import cKDTree  # Takes a while to import.

    if known.shape[1] == 0:  # Nothing varies, so that all rows are one; the tree would read beyond its end.
        return np.zeros(len(asked))
    found: Array = cKDTree(known).query(asked, k=[rank])[0][:, 0]
    return found


def sample_of(number: int, most: int, rng: np.random.Generator) -> Array:
    """At most so many of the numbers from 0 on, drawn without replacement; all of them, if they are no more."""
    return np.arange(number) if number <= most else rng.choice(number, most, replace=False)
