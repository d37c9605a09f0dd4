"""`Split`: which offline episodes are held out, and where the rows lie that are left to train on."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class Split:
    """Whole episodes that training never sees, and the rows of all others.

    Args:
        lengths: [E] Steps of each episode.
        held_out_episodes: Numbers of the held-out episodes; some are held out, and some are not.
        fraction: The `validation_fraction` that they are.
        seed: The `validation_seed` that they were drawn by.

    Attributes:
        fraction: As given.
        seed: As given.
        held_out_episodes: Their numbers, ascending.
        num_training_rows: Rows of the other episodes.
    """

    def __init__(self, lengths: Integers, held_out_episodes: Integers, *, fraction: float, seed: int) -> None:
        self.fraction = fraction
        self.seed = seed
        self.held_out_episodes = np.sort(np.asarray(held_out_episodes, dtype=np.int64))
        self._stops = np.cumsum(lengths, dtype=np.int64)
        self._is_held_out = np.zeros(len(lengths), dtype=bool)
        self._is_held_out[self.held_out_episodes] = True
        held_out_lengths = np.asarray(lengths, dtype=np.int64)[self.held_out_episodes]
        self.num_training_rows = int(self._stops[-1] - held_out_lengths.sum())
        # Training rows are numbered without gaps. Behind each held-out episode a row is further on than its number by
        # all that was held out so far.
        self._shifts = np.concatenate([[0], np.cumsum(held_out_lengths)])
        starts = self._stops[self.held_out_episodes] - held_out_lengths
        self._numbers_of_shifts = starts - self._shifts[:-1]
        self._held_out_lengths = held_out_lengths

    @property
    def num_held_out_rows(self) -> int:
        """Rows of the held-out episodes."""
        return int(self._stops[-1]) - self.num_training_rows

    def rows_of(self, numbers: Integers) -> Integers:
        """The rows, of any shape, of training rows that are numbered from 0 to `num_training_rows` - 1."""
        rows: Integers = numbers + self._shifts[np.searchsorted(self._numbers_of_shifts, numbers, side="right")]
        return rows

    def is_training_row(self, rows: Integers) -> npt.NDArray[np.bool_]:
        """Whether rows are of episodes that are not held out."""
        is_training: npt.NDArray[np.bool_] = ~self._is_held_out[np.searchsorted(self._stops, rows, side="right")]
        return is_training

    def training_rows(self) -> Integers:
        """All rows to train on, ascending."""
        return self.rows_of(np.arange(self.num_training_rows))

    def held_out_rows(self) -> Integers:
        """All rows of the held-out episodes, ascending."""
        rows: Integers = np.arange(self.num_held_out_rows) + np.repeat(self._numbers_of_shifts, self._held_out_lengths)
        return rows

    def fingerprint(self) -> str:
        """Digest of the held-out episodes' numbers."""
        return hashlib.blake2b(self.held_out_episodes.astype("<i8").tobytes(), digest_size=16).hexdigest()


def split_episodes(lengths: Integers, *, fraction: float, seed: int) -> Split | None:
    """Draws the episodes to hold out, `round(fraction * E)` of them.

    They depend on fraction, seed and E alone. A larger fraction holds out the same episodes and some more. The numbers
    are drawn by PCG64 itself: NumPy keeps what that gives, while the ways to shuffle may change between versions.

    Args:
        lengths: [E] Steps of each episode.
        fraction: `validation_fraction`, in [0, 1).
        seed: `validation_seed`.

    Returns:
        None if the fraction is 0.

    Raises:
        ValueError: If there are fewer than two episodes, or a side would have none.

    Source:
        NEP 19, "Random number generator policy", of NumPy (streams of bit generators are stable).
    """
    if fraction == 0.0:
        return None
    num_episodes = len(lengths)
    if num_episodes < 2:
        raise ValueError(
            f"`validation_fraction` is {fraction}, but the data hold {num_episodes} episode, and whole episodes are "
            "held out; give more data, cut it into episodes, or set `validation_fraction=0`."
        )
    number = round(fraction * num_episodes)
    if number == 0:
        raise ValueError(
            f"`validation_fraction` {fraction} of {num_episodes} episodes is none, and whole episodes are held out; "
            f"set it to at least {1.0 / num_episodes:.2g}, for one of them, or to 0 for no hold-out."
        )
    if number == num_episodes:
        raise ValueError(
            f"`validation_fraction` {fraction} of {num_episodes} episodes is all of them, which leaves none to train "
            "on; lower it, 0.1 is usual."
        )
    order = np.argsort(np.random.PCG64(seed).random_raw(num_episodes), kind="stable")
    return Split(np.asarray(lengths), order[:number], fraction=fraction, seed=seed)
