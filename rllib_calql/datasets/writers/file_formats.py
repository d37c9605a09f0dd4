"""How each format holds whole episodes: functions that take blocks and write one file or folder, block by block.

Every function writes at a path where nothing is yet, keeps the dtypes, and returns the names of what the format has no
place for.

Axes: R rows, E episodes.
"""

from __future__ import annotations

import itertools
import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes import minari_storage
from rllib_calql.datasets.episodes.reader import EpisodeBlock, Nested

REFERENCE_SCORES = ("ref_min_score", "ref_max_score")

# D4RL's names, in HDF5 and NumPy files. Their rows have no episode ids: the flags tell where episodes end.
_D4RL_NAMES = {
    Columns.OBS: "observations",
    Columns.NEXT_OBS: "next_observations",
    Columns.TERMINATEDS: "terminals",
    Columns.TRUNCATEDS: "timeouts",
}
# The oldest layout of HDF5 whose headers and indices carry checksums, as `fletcher32` does for the numbers.
HDF5_VERSIONS = ("v110", "v110")
_PART_BYTES = 512 * 2**20
_CHUNK_BYTES = 2**20
_COPY_BYTES = 2**20

Rows = dict[str, Nested]
"""RLlib's column name -> [R, ...], possibly nested."""


@dataclass(frozen=True)
class DatasetMetadata:
    """What a format may store beside the rows.

    Attributes:
        observation_space: Space of the observations. Minari needs it; None: an unbounded one is derived from the data.
        action_space: The environment's action space. Minari needs it.
        env_spec: Gymnasium's description of the environment, from which Minari makes it again.
        reference_scores: Returns (min, max) that stand for a normalised score of 0 and 1.
        description: One sentence; Minari only.
        algorithm_name: What chose the actions; Minari only.
    """

    observation_space: gym.Space[Any] | None = None
    action_space: gym.Space[Any] | None = None
    env_spec: Any = None
    reference_scores: tuple[float, float] | None = None
    description: str = ""
    algorithm_name: str = ""


def rows_of(block: EpisodeBlock) -> Rows:
    """Every column with one entry per row."""
    last_rows = np.cumsum(block.lengths) - 1

    def following(observations: NDArray[Any], final: NDArray[Any]) -> NDArray[Any]:
        following = np.empty_like(observations)
        following[:-1] = observations[1:]
        following[last_rows] = final
        return following

    def at_ends(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        rows = np.zeros(block.num_rows, dtype=bool)
        rows[last_rows] = flags
        return rows

    return {
        Columns.OBS: block.observations,
        Columns.ACTIONS: block.actions,
        Columns.REWARDS: block.rewards,
        Columns.NEXT_OBS: tree.map_structure(following, block.observations, block.final_observations),
        Columns.TERMINATEDS: at_ends(block.terminateds),
        Columns.TRUNCATEDS: at_ends(block.truncateds),
        **block.extra_model_outputs,
    }


def leaves(name: str, values: Nested) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields ("name/key/key", array) for each array of a nested column."""
    for path, array in tree.flatten_with_path(values):
        for key in path:
            if str(key) in ("", ".", "..") or "/" in str(key):
                raise ValueError(f"`{name}` has the key {key!r}, which cannot be part of a path; rename it.")
        yield "/".join([name, *map(str, path)]), array


def _d4rl_leaves(block: EpisodeBlock) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, values in rows_of(block).items():
        yield from leaves(_D4RL_NAMES.get(name, name), values)


def write_hdf5(blocks: Iterator[EpisodeBlock], path: Path, metadata: DatasetMetadata) -> tuple[str, ...]:
    """Writes D4RL's layout: the columns as arrays at the root, nested ones as groups."""
    try:
        import h5py
    except ImportError as err:
        raise ImportError('Writing HDF5 files needs the `h5py` package: pip install "rllib-calql[hdf5]"') from err
    with h5py.File(path, "w", libver=HDF5_VERSIONS) as file:
        for name, score in zip(REFERENCE_SCORES, metadata.reference_scores or (), strict=False):
            file.attrs[name] = score
        for block in blocks:
            columns = list(_d4rl_leaves(block))
            num_bytes = sum(array.nbytes for _, array in columns)
            # Last chunks that are not full, and the index of chunks.
            reserve(file, path, num_bytes + (2 * len(columns) + 2) * _CHUNK_BYTES)
            for name, array in columns:
                _append(file, name, array)
            file.flush()
        size = file.id.get_filesize()
    os.truncate(path, size)
    return ()


def reserve(file: Any, path: Path, num_bytes: int) -> None:
    """Makes sure that there is room for so many bytes more before HDF5 begins to write them.

    HDF5 does not survive a disk that fills while it writes: the file cannot be closed, and the process crashes at some
    later use of the library.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.id.get_filesize() + num_bytes)


def _append(file: Any, name: str, array: NDArray[Any]) -> None:
    if name in file:
        dataset = file[name]
        dataset.resize(len(dataset) + len(array), axis=0)
        dataset[-len(array) :] = array
        return
    row_bytes = max(array[0].nbytes, 1)
    chunk_rows = max(1, min(len(array), _CHUNK_BYTES // row_bytes))
    shape = array.shape[1:]
    file.create_dataset(name, data=array, maxshape=(None, *shape), chunks=(chunk_rows, *shape), fletcher32=True)


def write_npz(blocks: Iterator[EpisodeBlock], path: Path, metadata: DatasetMetadata) -> tuple[str, ...]:
    """Every column goes to a file of its own first, since the header of an array in the archive tells its length."""
    columns: dict[str, tuple[Path, np.dtype[Any], list[int]]] = {}
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for block in blocks:
            for name, array in _d4rl_leaves(block):
                if name not in opened:
                    raw = path.parent / f"column-{len(columns)}.raw"
                    columns[name] = (raw, array.dtype, [0, *array.shape[1:]])
                    opened[name] = stack.enter_context(raw.open("wb"))
                opened[name].write(np.ascontiguousarray(array).data)
                columns[name][2][0] += len(array)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, (raw, dtype, shape) in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member, raw.open("rb") as content:
                np.lib.format.write_array_header_1_0(
                    member,
                    {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)},
                )
                while chunk := content.read(_COPY_BYTES):
                    member.write(chunk)
            raw.unlink()
    return () if metadata.reference_scores is None else REFERENCE_SCORES


def write_parquet(blocks: Iterator[EpisodeBlock], path: Path, metadata: DatasetMetadata) -> tuple[str, ...]:
    """Writes one file of rows, under RLlib's names."""
    _write_tables(_with_own_ids(blocks), path)
    return _without_scores(metadata)


def write_parquet_folder(blocks: Iterator[EpisodeBlock], path: Path, metadata: DatasetMetadata) -> tuple[str, ...]:
    """Writes `part-0.parquet` and so on, whole episodes each."""
    path.mkdir()
    blocks = _with_own_ids(blocks)
    for part in itertools.count():
        first = next(blocks, None)
        if first is None:
            break
        _write_tables(_up_to(first, blocks, _PART_BYTES), path / f"part-{part}.parquet")
    return _without_scores(metadata)


def write_minari(
    blocks: Iterator[EpisodeBlock], path: Path, metadata: DatasetMetadata, dataset_id: str
) -> tuple[str, ...]:
    """Writes a Minari dataset; further columns are left out."""
    first = next(blocks)
    observation_space = metadata.observation_space or _unbounded(first.observations)
    if metadata.action_space is None:
        raise ValueError(
            f"Minari stores the environment's action space with the data, and that of {dataset_id!r} is unknown; pass "
            "`action_space` (`--env`, or `--action-low` and `--action-high`)."
        )
    spec = metadata.env_spec if _is_json(metadata.env_spec) else None
    scores = dict(zip(REFERENCE_SCORES, map(float, metadata.reference_scores or ()), strict=False))
    texts = {"description": metadata.description, "algorithm_name": metadata.algorithm_name}
    minari_storage.write_dataset(
        path,
        (episode for block in itertools.chain([first], blocks) for episode in _minari_episodes(block)),
        dataset_id=dataset_id,
        observation_space=observation_space,
        action_space=metadata.action_space,
        env_spec=spec,
        metadata={**scores, **{name: text for name, text in texts.items() if text}},
    )
    return (*first.extra_model_outputs, *(("env_spec",) if spec is not metadata.env_spec else ()))


def _write_tables(blocks: Iterator[EpisodeBlock], path: Path) -> None:
    first = _table(next(blocks))
    with closing(pq.ParquetWriter(path, first.schema, write_page_checksum=True)) as writer:
        writer.write_table(first)
        for block in blocks:
            writer.write_table(_table(block))


def _with_own_ids(blocks: Iterator[EpisodeBlock]) -> Iterator[EpisodeBlock]:
    """Passes blocks on; rows of two episodes under one id would be read as one episode."""
    seen: set[str] = set()
    for block in blocks:
        for id_ in block.ids:
            if id_ in seen:
                raise ValueError(f"Two episodes have the id {id_!r}; give every episode its own.")
            seen.add(id_)
        yield block


def _without_scores(metadata: DatasetMetadata) -> tuple[str, ...]:
    return () if metadata.reference_scores is None else REFERENCE_SCORES


def _up_to(first: EpisodeBlock, blocks: Iterator[EpisodeBlock], num_bytes: int) -> Iterator[EpisodeBlock]:
    yield first
    written = size_of(first)
    while written < num_bytes and (block := next(blocks, None)) is not None:
        yield block
        written += size_of(block)


def size_of(block: EpisodeBlock) -> int:
    """Bytes of the observations and actions."""
    return sum(array.nbytes for array in tree.flatten([block.observations, block.actions]))


def _table(block: EpisodeBlock) -> Any:
    starts = np.cumsum(block.lengths) - block.lengths
    columns = {
        Columns.EPS_ID: pa.array(np.repeat(np.asarray(block.ids, dtype=object), block.lengths), pa.string()),
        Columns.T: pa.array(np.arange(block.num_rows) - np.repeat(starts, block.lengths)),
        **{name: arrow_column(values) for name, values in rows_of(block).items()},
    }
    return pa.table(columns)


def arrow_column(values: Nested) -> Any:
    """A column: numbers as they are, further axes as fixed-size lists, dicts and tuples as structs."""
    if isinstance(values, tuple):
        values = {str(i): value for i, value in enumerate(values)}
    if isinstance(values, dict):
        return pa.StructArray.from_arrays(
            [arrow_column(value) for value in values.values()], [str(key) for key in values]
        )
    native = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
    array = pa.array(native.reshape(-1))
    for size in reversed(native.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _minari_episodes(block: EpisodeBlock) -> Iterator[dict[str, Any]]:
    """Yields the fields of a Minari `EpisodeBuffer` for each episode."""
    stops = np.cumsum(block.lengths).tolist()
    for episode, (stop, length) in enumerate(zip(stops, block.lengths.tolist(), strict=True)):
        rows = slice(stop - length, stop)
        final = slice(episode, episode + 1)
        ends = np.arange(length) == length - 1
        yield {
            "observations": tree.map_structure(
                lambda array, last, rows=rows, final=final: np.concatenate([array[rows], last[final]]),
                block.observations,
                block.final_observations,
            ),
            "actions": tree.map_structure(lambda array, rows=rows: array[rows], block.actions),
            "rewards": block.rewards[rows],
            "terminations": ends & block.terminateds[episode],
            "truncations": ends & block.truncateds[episode],
        }


def _unbounded(values: Nested) -> gym.Space[Any]:
    """The widest space of observations like these."""
    if isinstance(values, dict):
        return gym.spaces.Dict({key: _unbounded(value) for key, value in values.items()})
    if isinstance(values, tuple):
        return gym.spaces.Tuple([_unbounded(value) for value in values])
    if values.dtype.kind == "b":
        return gym.spaces.MultiBinary(values.shape[1:] or 1)
    low, high = -np.inf, np.inf
    if values.dtype.kind != "f":
        limits = np.iinfo(values.dtype)
        low, high = limits.min, limits.max
    return gym.spaces.Box(low, high, values.shape[1:], values.dtype.type)


def _is_json(spec: Any) -> bool:
    """Whether an environment can be made from its stored description; one made by a function cannot."""
    try:
        return spec is not None and bool(spec.to_json())
    except (TypeError, ValueError):
        return False
