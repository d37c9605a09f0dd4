"""Divides rows of flat columns into episodes: by their ids, or else by flags, jumps, times and a maximum length.

Axes: R rows of a piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.boundaries import Bools, jumps
from rllib_calql.datasets.episodes.columns import VALIDS, bad_valids, check_whole_steps, times_for_steps
from rllib_calql.datasets.episodes.final_rows import check_followed
from rllib_calql.datasets.episodes.reader import CUT_AT_JUMP, CUT_AT_LENGTH, ReadOptions
from rllib_calql.datasets.rows.flat_columns import Table, as_texts, leaves_of

_ENDS = (Columns.TERMINATEDS, Columns.TRUNCATEDS)


class EpisodeDivider:
    """Finds where episodes start in rows that come in pieces; what it must know of the row before a piece, it keeps."""

    def __init__(self, options: ReadOptions, remarks: Counter[str], *, has_next_obs: bool = True) -> None:
        """Begins before the first row.

        Args:
            options: Maximum length and what counts as a jump.
            remarks: Counts the cuts.
            has_next_obs: Whether next observations, if there are any, are stored; else they are those of the next rows.
        """
        self._has_next_obs = has_next_obs
        self._max_steps = options.max_episode_steps
        self._tolerance = options.observation_jump
        self._remarks = remarks
        self._last: Table | None = None
        self._where_last = ""
        self._num_ups = self._num_stills = 0  # How often `t` has counted up by 1 within an episode, and stayed.
        # Where `t` first goes back. Without ids, an episode begins there, unless `t` only ever goes back.
        self._step_back = ""
        # Rows of the current episode up to `_last`, which a cut at the maximum length does not reset.
        self._num_steps = 0

    def divide(self, table: Table, where: Callable[[int], str]) -> tuple[Bools, Bools]:
        """Whether an episode starts at a row, and whether the row before it is thereby cut off, [R] each.

        Raises:
            ValueError: If an episode with an id skips or repeats a time.
        """
        last, self._last = self._last, {name: array[-1:] for name, array in table.items()}
        num_rows = len(table[Columns.REWARDS])
        self._where_last = where(num_rows - 1)
        cuts = np.zeros(num_rows, dtype=bool)
        is_late = _differs_after(table, last, Columns.T, 1)
        if Columns.EPS_ID in table:
            starts = _differs_after(table, last, Columns.EPS_ID, 0)
            if last is None:
                starts[0] = True
            self._check_steps(table, last, starts, where)
            disordered = is_late & ~starts
            if disordered.any():
                row = int(np.argmax(disordered))
                raise ValueError(
                    f"Rows of episode {as_texts(table[Columns.EPS_ID][row : row + 1], lambda _: where(row))[0]!r} are "
                    f"out of order or missing: `{Columns.T}` does not count up by 1 from {where(row - 1)} to "
                    f"{where(row)}; store the rows of an episode in order of time."
                )
            return starts, cuts
        done = table[Columns.TERMINATEDS] | table[Columns.TRUNCATEDS]
        last_done = False if last is None else bool(last[Columns.TERMINATEDS][0] | last[Columns.TRUNCATEDS][0])
        after_end = np.concatenate([[last_done], done[:-1]])
        is_final = np.zeros(num_rows, dtype=bool)
        if VALIDS in table:
            after_end, is_final = self._with_final_rows(table, last, after_end, where)
        self._check_steps(table, last, after_end, where)
        cuts |= self._jumps(table, last) & ~after_end
        self._remark(CUT_AT_JUMP, cuts)
        starts = (after_end | cuts | is_late) & ~is_final
        if last is None:
            starts[0] = True
        at_limit = self._after_limit(starts) & ~after_end & ~cuts & ~is_final
        self._remark(CUT_AT_LENGTH, at_limit)
        return starts | at_limit, cuts | at_limit

    def end_file(self) -> bool:
        """Forgets the last row, and returns whether the maximum length cuts it off.

        Raises:
            ValueError: If the file ends within a trajectory, or `t` has never counted up but gone back.
        """
        if self._step_back and not self._num_ups:
            raise times_for_steps(self._step_back)
        last, self._last = self._last, None
        num_steps, self._num_steps = self._num_steps, 0
        if last is not None and VALIDS in last and last[VALIDS][0] and not last[Columns.TERMINATEDS][0]:
            raise bad_valids(f"is 1 in {self._where_last}, the last row of a file")
        if last is None or not num_steps or self._max_steps is None or num_steps % self._max_steps:
            return False
        is_cut: Bools = ~(last[Columns.TERMINATEDS] | last[Columns.TRUNCATEDS])
        self._remark(CUT_AT_LENGTH, is_cut)
        return bool(is_cut[0])

    def _check_steps(self, table: Table, last: Table | None, starts: Bools, where: Callable[[int], str]) -> None:
        """Refuses times in place of steps, by which every row would be an episode.

        Args:
            table: Rows.
            last: The row before them.
            starts: Whether an episode starts at a row, whatever its time is.
            where: Says where a row was read.
        """
        if Columns.T not in table:
            return
        t = table[Columns.T].astype(np.float64)
        check_whole_steps(t, where)
        is_inside = ~starts
        is_inside[0] &= last is not None
        change = np.diff(t, prepend=t[:1] if last is None else last[Columns.T].astype(np.float64))
        self._num_ups += int(np.count_nonzero((change == 1) & is_inside))
        is_still = (change == 0) & is_inside
        self._num_stills += int(np.count_nonzero(is_still))
        if is_still.any() and self._num_stills >= self._num_ups:
            row = int(np.argmax(is_still))
            raise times_for_steps(f"it stays at {t[row]:.17g} in {where(row)}")
        is_odd = (change > 1) & is_inside
        if not self._num_ups and is_odd.any():
            row = int(np.argmax(is_odd))
            raise times_for_steps(f"it goes from {t[row] - change[row]:.17g} to {t[row]:.17g} in {where(row)}")
        is_odd = (change < 0) & is_inside
        if not self._step_back and is_odd.any():
            row = int(np.argmax(is_odd))
            self._step_back = f"it goes from {t[row] - change[row]:.17g} to {t[row]:.17g} in {where(row)}"

    def _with_final_rows(
        self, table: Table, last: Table | None, after_end: Bools, where: Callable[[int], str]
    ) -> tuple[Bools, Bools]:
        """Whether a row follows the end of an episode, and whether it holds nothing but a last observation."""
        valids = table[VALIDS]
        check_followed({name: table[name][:-1] for name in _ENDS}, valids, where)
        last_valid = np.ones(1, dtype=bool)
        if last is not None:
            last_valid = last[VALIDS]
            check_followed(
                {name: last[name] for name in _ENDS}, np.append(last_valid, valids[:1]), lambda i: where(i - 1)
            )
        return after_end | ~np.concatenate([last_valid, valids[:-1]]), ~valids

    def _remark(self, what: str, rows: Bools) -> None:
        if rows.any():
            self._remarks[what] += int(rows.sum())

    def _jumps(self, table: Table, last: Table | None) -> Bools:
        """Whether the observation of a row is not the one that the row before it led to."""
        next_obs = [table[leaf] for leaf in leaves_of(table, Columns.NEXT_OBS)]
        obs = [table[leaf] for leaf in leaves_of(table, Columns.OBS)]
        if not next_obs or not self._has_next_obs:
            return np.zeros(len(obs[0]), dtype=bool)
        at_first = np.zeros(1, dtype=bool)
        if last is not None:
            # The first row of each pair only fills its place: it is not looked at.
            pair = [np.concatenate([array[:1], array[:1]]) for array in obs]
            next_pair = [
                np.concatenate([last[leaf], array[:1]])
                for leaf, array in zip(leaves_of(table, Columns.NEXT_OBS), next_obs, strict=True)
            ]
            at_first = jumps(pair, next_pair, self._tolerance)
        return np.concatenate([at_first, jumps(obs, next_obs, self._tolerance)])

    def _after_limit(self, starts: Bools) -> Bools:
        """Whether the episode of the row before has reached a multiple of the maximum length with it."""
        rows = np.arange(len(starts))
        first_rows = np.maximum.accumulate(np.where(starts, rows, -self._num_steps))
        num_steps = np.concatenate([[self._num_steps], rows - first_rows + 1])
        self._num_steps = int(num_steps[-1])
        if self._max_steps is None:
            return np.zeros(len(starts), dtype=bool)
        after_limit: Bools = (num_steps[:-1] > 0) & (num_steps[:-1] % self._max_steps == 0)
        return after_limit


def _differs_after(table: Table, last: Table | None, name: str, step: int) -> Bools:
    """Whether a column of a row is not that of the row before plus `step`; False at the first row of all."""
    differs = np.zeros(len(table[Columns.REWARDS]), dtype=bool)
    if name not in table:
        return differs
    values, before = table[name], table[name][:-1]
    if last is not None:
        before = np.concatenate([last[name], before])
    if step:
        values, before = values.astype(np.float64), before.astype(np.float64) + step
    first = len(values) - len(before)
    differs[first:] = values[first:] != before
    return differs
