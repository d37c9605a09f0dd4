"""Reads robomimic's HDF5 files: `data/demo_0/obs/...`, `actions`, `rewards`, `dones` and, if there, `next_obs`.

What its files say, and how that is understood here:

* `dones` is written in three ways (`--done_mode` of `dataset_states_to_obs.py`): 0, true wherever the next state is a
  success; 1, true in the last row; 2, both. An episode ends with its first `dones`, as in robomimic's own losses, which
  let no value flow back across it; what follows is left out, and counted.
* If one demonstration's last row is not `dones`, the mode is 0, and every `dones` a termination. Else `dones` before
  the last row is a success, and one in the last row alone is a termination where the reward there is that of a success:
  the larger of the two numbers that all rewards are. Otherwise the demonstration was cut.
* `mask/<name>` lists demonstrations, such as those for training: `demos: <name>` in a column map takes these alone.

Source: robomimic 0.3, `scripts/dataset_states_to_obs.py`, `utils/dataset.py`, and its documentation on datasets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.columns import NAMES
from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.datasets.episodes.reader import AFTER_END, ENDS_UNTOLD, EpisodeBlock, ReadOptions
from rllib_calql.datasets.readers.robotics.column_map import ColumnMap, Joined
from rllib_calql.datasets.readers.robotics.hdf5_parts import (
    Bools,
    Episodes,
    EpisodesReader,
    Hdf5Arrays,
    flags_of,
    lengths_of,
    open_arrays,
)
from rllib_calql.system.similar_words import close_matches

_KEYS = ("obs", "actions", "rewards", "terminated", "truncated", "demos")
_DEMO = re.compile(r"demo_(\d+)")
_FLAGS = {Columns.TERMINATEDS: "terminateds", Columns.TRUNCATEDS: "truncateds"}
_TO_OBS = "robomimic's `dataset_states_to_obs.py --done_mode 0` computes observations, rewards and `dones` from states"


def is_robomimic(file: DataFile) -> bool:
    """Whether an HDF5 file has demonstrations in a group `data`.

    Raises:
        ValueError: If it is no HDF5 file, or has groups of other names that hold actions.
    """
    with open_arrays(file) as arrays:
        names = arrays.names("data") if "data" in arrays.names("") else None
        if names is None:
            return False
        others = [name for name in names if not _DEMO.fullmatch(name)]
        if others and "actions" in arrays.names(f"data/{others[0]}"):
            raise ValueError(
                f"`data` in {str(file)!r} holds the group {others[0]!r} with actions, and groups of demonstrations "
                "are called `demo_0`, `demo_1` and so on in robomimic's files; rename or remove it."
            )
        return not others


class RobomimicReader(EpisodesReader):
    """Episodes from robomimic's files; every demonstration is one.

    Observations are a Dict of all arrays in `obs`, or that array if there is one, or what a column map says. Columns
    `terminateds` and `truncateds`, which this package writes, or those of the map, are preferred to `dones`.
    """

    def __init__(
        self, name: str, files: Sequence[DataFile], options: ReadOptions, column_map: ColumnMap | None = None
    ) -> None:
        """Checks columns, types and lengths, and reads where episodes end; see `FlatReader`.

        Args:
            name: The input as the user wrote it.
            files: Files in the order in which their episodes follow each other.
            options: How incomplete data are read.
            column_map: Which arrays are observations, and which demonstrations are read.

        Raises:
            ImportError: If `h5py` is not installed.
            ValueError: If something is missing or damaged; the message names file and demonstration.
        """
        if column_map is not None:
            column_map.refuse_keys(_KEYS, "robomimic's files")
        self._map = column_map
        self._layouts = {}
        self._num_after_end = self._num_untold = 0
        self._options = options
        super().__init__(name, self._filled(name, files), options)

    def fingerprint(self) -> str:
        """Digest of the files and of the map."""
        return fingerprint_of([*self._files, *([self._map.file] if self._map is not None else [])])

    def blocks(self) -> Iterator[EpisodeBlock]:
        """Yields blocks of whole episodes; see `FlatReader`."""
        yield from super().blocks()
        for what, count in ((AFTER_END, self._num_after_end), (ENDS_UNTOLD, self._num_untold)):
            if count:
                self.remarks[what] += count

    def _episodes(self, file: DataFile, arrays: Hdf5Arrays) -> Episodes:
        demos = self._demos(file, arrays)
        groups = [f"data/{demo}" for demo in demos]
        leaves = self._leaves(file, arrays, groups)
        actions = next(joined for leaf, joined in leaves.items() if leaf.partition("/")[0] == Columns.ACTIONS)
        lengths = lengths_of(file, arrays, [f"{group}/{actions.names[0]}" for group in groups])
        stops, flags = self._ends(file, arrays, groups, lengths, leaves[Columns.REWARDS].names[0])
        return Episodes(
            ids=[self._id(file, demo) for demo in demos],
            sizes=lengths,
            lengths=stops,
            paths={
                leaf: [[f"{group}/{name}" for name in joined.names] for group in groups]
                for leaf, joined in leaves.items()
            },
            flags=flags,
        )

    def _count(self, file: DataFile, arrays: Hdf5Arrays) -> int:
        return len(self._demos(file, arrays))

    def _demos(self, file: DataFile, arrays: Hdf5Arrays) -> list[str]:
        demos = sorted(filter(_DEMO.fullmatch, arrays.names("data")), key=lambda demo: int(demo[len("demo_") :]))
        mask = None if self._map is None else self._map.texts.get("demos")
        if mask is not None:
            masks = arrays.names("mask")
            if mask not in masks:
                raise ValueError(
                    f"{str(file)!r} has no list of demonstrations `mask/{mask}`, which `demos` in the column map names."
                    f"{close_matches(mask, masks)} It has {', '.join(masks) or 'none'}."
                )
            listed = np.ravel(arrays.whole(f"mask/{mask}"))
            if not all(isinstance(name, (bytes, str)) for name in listed.tolist()):
                raise ValueError(
                    f"`mask/{mask}` in {str(file)!r} must list names of demonstrations, such as `demo_0`, got "
                    f"{listed.dtype}; write it again."
                )
            wanted = {name if isinstance(name, str) else name.decode(errors="replace") for name in listed.tolist()}
            if missing := sorted(wanted - set(demos)):
                raise ValueError(
                    f"`mask/{mask}` in {str(file)!r} names {missing[0]!r}, which is missing in `data`; write the file "
                    "again."
                )
            demos = [demo for demo in demos if demo in wanted]
            if not demos:
                raise ValueError(f"`mask/{mask}` in {str(file)!r} lists no demonstrations; name another by `demos`.")
        return demos

    def _leaves(self, file: DataFile, arrays: Hdf5Arrays, groups: list[str]) -> dict[str, Joined]:
        """Leaf -> arrays in the group of a demonstration; `next_obs` has the parts of `obs`."""
        names = arrays.names(groups[0])
        mapped = {} if self._map is None else self._map.leaves
        leaves: dict[str, Joined] = {
            leaf: replace(joined, names=tuple(f"obs/{name}" for name in joined.names))
            for leaf, joined in mapped.items()
            if leaf.partition("/")[0] == Columns.OBS
        }
        if not leaves:
            keys = sorted(arrays.names(f"{groups[0]}/obs"))
            for group in groups[1:]:
                if further := sorted(set(arrays.names(f"{group}/obs")) - set(keys)):
                    raise ValueError(
                        f"`{group}/obs` in {str(file)!r} has {further[0]!r}, which `{groups[0]}/obs` has not; write it "
                        "for all demonstrations, or name what are observations by a column map."
                    )
            leaves = {
                Columns.OBS if len(keys) == 1 else f"{Columns.OBS}/{key}": Joined((f"obs/{key}",), False)
                for key in keys
            }
        for column, name in ((Columns.ACTIONS, "actions"), (Columns.REWARDS, "rewards")):
            of_map = {} if self._map is None else self._map.of(column)
            leaves |= of_map or {column: Joined((name,), False)}
        for leaf, joined in leaves.items():
            for name in joined.names:
                if arrays.header(f"{groups[0]}/{name}") is None:
                    raise self._missing(file, arrays, groups[0], leaf, name)
        if not any(leaf.partition("/")[0] == Columns.OBS for leaf in leaves):
            raise self._missing(file, arrays, groups[0], Columns.OBS, "obs")
        if "next_obs" in names:
            leaves |= {
                Columns.NEXT_OBS + leaf[len(Columns.OBS) :]: replace(
                    joined, names=tuple(f"next_{name}" for name in joined.names)
                )
                for leaf, joined in list(leaves.items())
                if leaf.partition("/")[0] == Columns.OBS
            }
        used = {name for joined in leaves.values() for name in joined.names}
        shared = set(names).intersection(*(arrays.names(group) for group in groups[1:]))
        further = sorted(shared - used - {"dones", *NAMES})
        return leaves | {
            name: Joined((name,), False)
            for name in further
            if (header := arrays.header(f"{groups[0]}/{name}")) is not None
            and header.dtype.kind in "fiub"
            and self._options.wants(name)
        }

    def _missing(self, file: DataFile, arrays: Hdf5Arrays, group: str, leaf: str, name: str) -> ValueError:
        there = [*arrays.names(group), *(f"obs/{key}" for key in arrays.names(f"{group}/obs"))]
        what = f"no array {name!r}, but a group," if name in there and arrays.header(f"{group}/{name}") is None else ""
        return ValueError(
            f"`{group}` in {str(file)!r} has {what or f'no {name!r}'} for `{leaf.partition('/')[0]}`; it has "
            f"{', '.join(f'`{other}`' for other in there)}. {_TO_OBS}; a column map names other arrays."
        )

    def _ends(
        self, file: DataFile, arrays: Hdf5Arrays, groups: list[str], lengths: NDArray[np.int64], rewards: str
    ) -> tuple[NDArray[np.int64], dict[str, Bools]]:
        """Rows of each demonstration until its end, and the flags of all of them."""
        named = {} if self._map is None else {c: j.names[0] for c in _FLAGS for j in self._map.of(c).values()}
        if not named and _FLAGS[Columns.TERMINATEDS] in arrays.names(groups[0]):
            named = {column: name for column, name in _FLAGS.items() if name in arrays.names(groups[0])}
        sized = list(zip(groups, lengths.tolist(), strict=True))
        if named:
            flags = {
                column: np.concatenate([flags_of(file, arrays, f"{group}/{name}", size) for group, size in sized])
                for column, name in named.items()
            }
            terminateds = flags.setdefault(Columns.TERMINATEDS, np.zeros(int(lengths.sum()), dtype=bool))
            if Columns.TRUNCATEDS not in flags:
                cut = np.zeros(len(terminateds), dtype=bool)
                cut[np.cumsum(lengths)[lengths > 0] - 1] = True
                flags[Columns.TRUNCATEDS] = cut & ~terminateds
            return lengths, flags
        if arrays.header(f"{groups[0]}/dones") is None:
            raise self._missing(file, arrays, groups[0], Columns.TERMINATEDS, "dones")
        dones = [flags_of(file, arrays, f"{group}/dones", size) for group, size in sized]
        stops = np.array([int(np.argmax(done)) + 1 if done.any() else len(done) for done in dones], dtype=np.int64)
        is_terminated = np.array([bool(done.any()) for done in dones])
        if all(done[-1] for done in dones if len(done)):
            is_early = np.array([bool(done[:-1].any()) for done in dones])
            is_success = self._successes([arrays.whole(f"{group}/{rewards}").reshape(-1) for group in groups])
            self._num_untold += int((~is_early & ~is_success & (lengths > 0)).sum())
            is_terminated = is_early | is_success
        self._num_after_end += int((lengths - stops).sum())
        ends = np.zeros((2, int(stops.sum())), dtype=bool)
        last_rows = np.cumsum(stops)[stops > 0] - 1
        ends[0, last_rows] = is_terminated[stops > 0]
        ends[1, last_rows] = ~is_terminated[stops > 0]
        return stops, {Columns.TERMINATEDS: ends[0], Columns.TRUNCATEDS: ends[1]}

    @staticmethod
    def _successes(rewards: list[NDArray[Any]]) -> Bools:
        """Whether the last reward of each demonstration is the larger of the two numbers that all rewards are."""
        values = np.unique(np.concatenate(rewards))
        if len(values) != 2:
            return np.zeros(len(rewards), dtype=bool)
        return np.array([bool(len(of_demo) and of_demo[-1] == values[1]) for of_demo in rewards])
