"""Reads NumPy archives (`.npz`) of flat columns, OGBench's among them, without unpacking them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.columns import ALIASES, MASKS
from rllib_calql.datasets.episodes.files import DataFile
from rllib_calql.datasets.rows.flat import FlatFile, FlatReader
from rllib_calql.datasets.rows.flat_columns import ArrayHeader
from rllib_calql.datasets.rows.npz_files import open_npz


class NpzReader(FlatReader):
    """Episodes from archives that `numpy.savez` or `numpy.savez_compressed` wrote; nothing is ever unpickled.

    The names of nested observations and actions are paths, such as "observations/camera".

    In OGBench's archives `terminals` marks the last row of every trajectory, and `masks` is 0 where an episode
    terminates: with `masks`, a row is terminated if that is 0, and truncated if `terminals` is 1 and it is not
    terminated. Its compact layout (`valids`) is read as the plain one; see `rllib_calql.datasets.episodes.final_rows`.
    Source: Park et al. (2024), arXiv:2410.20092, and its code, `ogbench/utils.py` (`load_dataset`) and
    `ogbench/relabel_utils.py` (`relabel_dataset`).
    """

    @contextmanager
    def _open(self, file: DataFile) -> Iterator[FlatFile]:
        with open_npz(file) as opened:
            _refuse_ends_for_terminations(file, opened.arrays)
            yield opened


def _refuse_ends_for_terminations(file: DataFile, arrays: Mapping[str, ArrayHeader]) -> None:
    """Refuses OGBench's archives as they are downloaded: without rewards, and with ends in place of terminations."""
    has_trajectories = {"observations", "actions", "terminals"} <= set(arrays)
    # Those of OGBench have neither of these.
    is_of_others = {"next_observations", "timeouts"} & set(arrays)
    if has_trajectories and not is_of_others and {Columns.REWARDS, *ALIASES[Columns.REWARDS]}.isdisjoint(arrays):
        raise ValueError(
            f"{str(file)!r} has no column `{Columns.REWARDS}`; its columns are "
            f"{', '.join(f'`{name}`' for name in sorted(arrays))}. OGBench's play data have no rewards until a task "
            "relabels them: load the task's `-singletask` data set with `ogbench` and save its `rewards` and `masks` "
            "too."
        )
    is_told = MASKS in arrays or not {Columns.TRUNCATEDS, *ALIASES[Columns.TRUNCATEDS]}.isdisjoint(arrays)
    if {"qpos", "qvel"} <= set(arrays) and not is_told:
        raise ValueError(
            f"{str(file)!r} has the columns `qpos` and `qvel`, as OGBench's archives have, where `terminals` marks the "
            "ends of trajectories and not terminations; add `masks` (0 where an episode terminates), or `timeouts` if "
            "`terminals` are terminations."
        )
