"""Writes whole episodes as Minari, Parquet, HDF5 or NumPy data, a block at a time, in the dtypes they come in.

Axes: R rows, E episodes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tree
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes import minari_storage
from rllib_calql.datasets.episodes.columns import ALIASES
from rllib_calql.datasets.episodes.reader import EpisodeBlock
from rllib_calql.datasets.readers.minari import SCHEME
from rllib_calql.datasets.writers import file_formats, robot_formats
from rllib_calql.datasets.writers.file_formats import DatasetMetadata, leaves, size_of
from rllib_calql.datasets.writers.staging import staged

__all__ = ["DatasetMetadata", "WriteSummary", "write_blocks"]

_PIECE_BYTES = 16 * 2**20  # Blocks are gathered to at least this size: a Minari reader yields one per episode.

_WRITERS = {
    ".parquet": file_formats.write_parquet,
    ".hdf5": file_formats.write_hdf5,
    ".h5": file_formats.write_hdf5,
    ".npz": file_formats.write_npz,
}
_LEROBOT, _ROBOMIMIC = "lerobot:", "robomimic:"
_SCHEME = re.compile(r"[A-Za-z][\w-]+:")
_TARGETS = (
    f"`{SCHEME}<dataset id>`, `{_LEROBOT}<folder>`, `{_ROBOMIMIC}<file>.hdf5`, a file "
    f"{', '.join(f'`*{suffix}`' for suffix in _WRITERS)}, or a folder of Parquet files (with a slash at the end)"
)
_Write = Callable[[Iterator[EpisodeBlock], Path, DatasetMetadata], tuple[str, ...]]


@dataclass(frozen=True)
class WriteSummary:
    """What was written.

    Attributes:
        target: Where, as the user wrote it.
        num_episodes: Number of episodes.
        num_transitions: Number of transitions.
        left_out: Names of what the format has no place for.
    """

    target: str
    num_episodes: int
    num_transitions: int
    left_out: tuple[str, ...] = ()


@dataclass
class _Tally:
    """What went through so far."""

    num_episodes: int = 0
    num_transitions: int = 0


def write_blocks(
    blocks: Iterable[EpisodeBlock],
    to: str | os.PathLike[str],
    *,
    metadata: DatasetMetadata | None = None,
    overwrite: bool = False,
) -> WriteSummary:
    """Writes episodes; the target appears when it is complete, and not at all after an error.

    Args:
        blocks: Whole episodes. Nothing is taken before the target is known to be free, and a few blocks at a time are
            held in memory.
        to: `minari:<dataset id>`; `lerobot:<folder>`; `robomimic:<file>.hdf5`; a file `*.parquet`, `*.hdf5`, `*.h5` or
            `*.npz`; or, with a slash at the end or no extension, a folder of Parquet files.
        metadata: What is stored beside the rows where the format has a place for it.
        overwrite: Whether what stands at the target is replaced.

    Returns:
        Numbers of episodes and transitions, and what was left out.

    Raises:
        FileExistsError: If the target exists and `overwrite` is False.
        FileNotFoundError: If the folder of the target does not exist.
        ValueError: If the format is unknown or cannot hold the data, or there are no episodes.
        ImportError: If the format needs a package that is not installed.
        OSError: If the disk is full.
    """
    metadata = metadata or DatasetMetadata()
    target, beside, write = _destination(to, overwrite)
    if not beside.is_dir():
        raise FileNotFoundError(f"There is no folder '{beside}' to write '{target.name}' into; create it.")
    tally = _Tally()
    pieces = _gathered(_checked(blocks, tally))
    with staged(target, beside, overwrite=overwrite) as path:
        left_out = write(pieces, path, metadata)
    return WriteSummary(os.fspath(to), tally.num_episodes, tally.num_transitions, left_out)


def _destination(to: str | os.PathLike[str], overwrite: bool) -> tuple[Path, Path, _Write]:
    """Where the target will be, the existing folder beside it, and what writes it."""
    name = os.fspath(to)
    if name.startswith(SCHEME):
        dataset_id = name[len(SCHEME) :]
        path = minari_storage.new_dataset_path(dataset_id, "`to`", SCHEME)
        _refuse_foreign_folder(path, minari_storage.is_dataset, "is no Minari dataset", overwrite)
        return path, minari_storage.dataset_path(""), partial(file_formats.write_minari, dataset_id=dataset_id)
    if "://" in name:
        raise ValueError(f"`to` {name!r}: only local paths and `{SCHEME}<dataset id>` can be written.")
    if name.startswith((_LEROBOT, _ROBOMIMIC)):
        return _robot_destination(name, overwrite)
    scheme = _SCHEME.match(name)
    if scheme is not None:
        raise ValueError(
            f"`to` must be {_TARGETS}, got {name!r}; `{scheme[0]}` is none of these. A file of this very name is "
            f"'./{name}'."
        )
    path = Path(name).expanduser()
    if name.endswith("/") or not path.suffix:
        _refuse_foreign_folder(path, _holds_only_parquet, "holds something else than Parquet files", overwrite)
        return path, path.parent, file_formats.write_parquet_folder
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"`to` must be {_TARGETS}, got {name!r}.")
    if path.is_dir():
        raise FileExistsError(f"'{path}' is a folder; choose another target.")
    return path, path.parent, _WRITERS[path.suffix.lower()]


def _robot_destination(name: str, overwrite: bool) -> tuple[Path, Path, _Write]:
    scheme, _, rest = name.partition(":")
    path = Path(rest).expanduser()
    if scheme == "lerobot":
        if not path.name or path.suffix.lower() in _WRITERS:
            raise ValueError(f"`to` must name a folder behind `{_LEROBOT}`, got {name!r}.")
        _refuse_foreign_folder(path, _is_lerobot, "is no LeRobot data set", overwrite)
        return path, path.parent, robot_formats.write_lerobot
    if path.suffix.lower() not in (".hdf5", ".h5") or path.is_dir():
        raise ValueError(f"`to` must name a file `*.hdf5` or `*.h5` behind `{_ROBOMIMIC}`, got {name!r}.")
    return path, path.parent, robot_formats.write_robomimic


def _is_lerobot(folder: Path) -> bool:
    return (folder / "meta" / "info.json").is_file()


def _refuse_foreign_folder(target: Path, is_ours: Callable[[Path], bool], what: str, overwrite: bool) -> None:
    """`overwrite=True` must not delete a folder that was never a data set."""
    if overwrite and target.is_dir() and not is_ours(target):
        raise FileExistsError(f"'{target}' {what}, so it is not replaced; delete it yourself or choose another target.")


def _holds_only_parquet(folder: Path) -> bool:
    return all(entry.is_file() and entry.suffix == ".parquet" for entry in folder.iterdir())


def _checked(blocks: Iterable[EpisodeBlock], tally: _Tally) -> Iterator[EpisodeBlock]:
    """Passes blocks on; all must agree in columns, dtypes and shapes."""
    expected: dict[str, str] | None = None
    for block in blocks:
        layout = _layout(block)
        if expected is None:
            expected = layout
        if layout != expected:
            name = next(name for name in sorted({*layout, *expected}) if layout.get(name) != expected.get(name))
            raise ValueError(
                f"Column `{name}` is {layout.get(name, 'missing')} from episode {block.ids[0]!r} on "
                f"({block.where(0)}) and {expected.get(name, 'missing')} before; one data set has one layout: write "
                "these data separately."
            )
        tally.num_episodes += len(block.lengths)
        tally.num_transitions += block.num_rows
        yield block
    if not tally.num_transitions:
        raise ValueError("There are no episodes to write.")


def _layout(block: EpisodeBlock) -> dict[str, str]:
    """Column -> dtype and shape, for every leaf."""
    taken = {name for names in ALIASES.items() for name in (names[0], *names[1])}
    for name in block.extra_model_outputs:
        if name in taken:
            raise ValueError(f"The further column `{name}` has the name of a column of transitions; rename it.")
    columns = {
        Columns.OBS: block.observations,
        Columns.ACTIONS: block.actions,
        Columns.REWARDS: block.rewards,
        **block.extra_model_outputs,
    }
    arrays = [leaf for name, values in columns.items() for leaf in leaves(name, values)]
    return {name: f"{array.dtype} of shape {array.shape[1:]}" for name, array in arrays}


def _gathered(blocks: Iterator[EpisodeBlock]) -> Iterator[EpisodeBlock]:
    """Joins small blocks to fewer, larger ones."""
    held: list[EpisodeBlock] = []
    held_bytes = 0
    for block in blocks:
        held.append(block)
        held_bytes += size_of(block)
        if held_bytes >= _PIECE_BYTES:
            yield _joined(held)
            held, held_bytes = [], 0
    if held:
        yield _joined(held)


def _joined(blocks: list[EpisodeBlock]) -> EpisodeBlock:
    if len(blocks) == 1:
        return blocks[0]

    joined: dict[str, Any] = {
        column.name: tree.map_structure(
            lambda *arrays: np.concatenate(arrays), *[getattr(block, column.name) for block in blocks]
        )
        for column in fields(EpisodeBlock)
        if column.name not in ("ids", "where")
    }
    return EpisodeBlock(
        ids=[id_ for block in blocks for id_ in block.ids],
        **joined,
        where=lambda row: f"row {row}",
    )
