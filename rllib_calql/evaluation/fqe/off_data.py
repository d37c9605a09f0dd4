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
    features, actions = _Scaling(known[0][kept]), _Scaling(known[1][kept])
    points = np.concatenate([features(known[0][kept]), actions(known[1][kept])], axis=1)
    states = features(held_out[0][asked])
    own, of_policy = (np.concatenate([states, actions(a[asked])], axis=1) for a in (held_out[1], policy_actions))
    return _share_beyond(points, own, of_policy)


def share_beyond(known: Array, own: Array, asked: Array, *, rng: np.random.Generator) -> float:
    """Share of the `asked` rows that are farther from `known` ones than 99 % of their `own` are, each (rows, n)."""
    kept, few_own = sample_of(len(known), MAX_KNOWN, rng), sample_of(len(own), MAX_ASKED, rng)
    scale = _Scaling(known[kept])
    return _share_beyond(scale(known[kept]), scale(own[few_own]), scale(asked[sample_of(len(asked), MAX_ASKED, rng)]))


class _Scaling:
    """Standardises a part of the points, such that all of its numbers together count 1."""

    def __init__(self, known: Array) -> None:
        self._mean = known.mean(axis=0, dtype=np.float64)
        std = known.std(axis=0, dtype=np.float64)
        self._is_free = std > _MIN_STD * max(float(std.max()), 1e-30)
        self._divisor = std[self._is_free] * np.sqrt(max(1, int(self._is_free.sum())))

    def __call__(self, rows: Array) -> Array:
        scaled: Array = (np.asarray(rows, np.float64) - self._mean)[:, self._is_free] / self._divisor
        return scaled


def _share_beyond(known: Array, own: Array, asked: Array) -> float:
    from scipy.spatial import cKDTree  # Takes a while to import.

    tree = cKDTree(known)
    limit = np.quantile(tree.query(own)[0], QUANTILE)
    return float(np.mean(tree.query(asked)[0] > limit))


def sample_of(number: int, most: int, rng: np.random.Generator) -> Array:
    """At most so many of the numbers from 0 on, drawn without replacement; all of them, if they are no more."""
    return np.arange(number) if number <= most else rng.choice(number, most, replace=False)
