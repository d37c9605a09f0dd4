"""How robomimic and LeRobot hold whole episodes: functions that take blocks and write one file or folder.

Both name observations on one level, so that Dicts of Dicts and tuples have no place. A vector that has no name is
`flat` in robomimic and `observation.state` in LeRobot, as these call it themselves.

Source: robomimic 0.3, `scripts/conversion/convert_d4rl.py`; LeRobot 0.4.4, `datasets/utils.py`.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.reader import EpisodeBlock, Nested
from rllib_calql.datasets.writers.file_formats import (
    HDF5_VERSIONS,
    REFERENCE_SCORES,
    DatasetMetadata,
    arrow_column,
    reserve,
    rows_of,
    size_of,
)

_GYM_TYPE = 2  # Of robomimic's `EnvType`.
_BYTES_PER_ARRAY = 4096  # More than HDF5 needs to describe one.
_FILE_BYTES = 100 * 2**20  # LeRobot's own default.
_FPS = 30  # Data for learning do not tell; LeRobot wants to know.
_TASK = "task"
_IMAGE_CHANNELS = (1, 3, 4)
FINAL_OBSERVATIONS = "observations after the last steps"


def write_robomimic(blocks: Iterator[EpisodeBlock], path: Path, metadata: DatasetMetadata) -> tuple[str, ...]:
    """Writes `data/demo_0` and so on; `dones` are terminations (mode 0), beside columns of both ends."""
    try:
        import h5py
    except ImportError as err:
        raise ImportError('Writing HDF5 files needs the `h5py` package: pip install "rllib-calql[hdf5]"') from err
    number = num_rows = 0
    with h5py.File(path, "w", libver=HDF5_VERSIONS) as file:
        data = file.create_group("data")
        for block in blocks:
            rows = rows_of(block)
            columns = dict(_named_leaves(rows, {Columns.OBS: "obs", Columns.NEXT_OBS: "next_obs"}, "flat"))
            columns["dones"] = rows[Columns.TERMINATEDS].astype(np.int64)
            num_bytes = sum(array.nbytes for array in columns.values())
            reserve(file, path, num_bytes + len(block.lengths) * (len(columns) + 4) * _BYTES_PER_ARRAY)
            stops = np.cumsum(block.lengths).tolist()
            for stop, length in zip(stops, block.lengths.tolist(), strict=True):
                demo = data.create_group(f"demo_{number}")
                for name, array in columns.items():
                    demo.create_dataset(name, data=array[stop - length : stop])
                demo.attrs["num_samples"] = length
                number += 1
            num_rows += block.num_rows
            file.flush()
        data.attrs["total"] = num_rows
        env_name = getattr(metadata.env_spec, "id", "unknown")
        data.attrs["env_args"] = json.dumps({"env_name": env_name, "type": _GYM_TYPE, "env_kwargs": {}})
        size = file.id.get_filesize()
    os.truncate(path, size)
    return ("ids of episodes", *(() if metadata.reference_scores is None else REFERENCE_SCORES))


def write_lerobot(blocks: Iterator[EpisodeBlock], path: Path, metadata: DatasetMetadata) -> tuple[str, ...]:
    """Writes a data set of version v3.0, with images in its Parquet files and one task."""
    (path / "data" / "chunk-000").mkdir(parents=True)
    (path / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    features: dict[str, dict[str, Any]] = {}
    statistics: dict[str, _Statistics] = {}
    episodes: list[dict[str, Any]] = []
    first = next(blocks)
    pending: EpisodeBlock | None = first
    number = 0
    while pending is not None:
        columns = _frames(pending, episodes, number)
        features = features or {name: _feature(name, array) for name, array in columns.items()}
        with closing(
            pq.ParquetWriter(
                path / "data" / "chunk-000" / f"file-{number:03d}.parquet",
                pa.schema([(name, _arrow(array[:1], features[name]).type) for name, array in columns.items()]),
                write_page_checksum=True,
            )
        ) as writer:
            written = 0
            while pending is not None and written < _FILE_BYTES:
                for name, array in columns.items():
                    statistics.setdefault(name, _Statistics()).add(array, is_image=features[name]["dtype"] == "image")
                arrays = {name: _arrow(array, features[name]) for name, array in columns.items()}
                writer.write_table(pa.table(arrays))
                written += size_of(pending)
                pending = next(blocks, None)
                columns = {} if pending is None else _frames(pending, episodes, number)
        if pending is not None:
            # Its rows were counted for the file that is full.
            del episodes[-len(pending.lengths) :]
        number += 1
    _write_lerobot_meta(path, features, statistics, episodes)
    scores = () if metadata.reference_scores is None else REFERENCE_SCORES
    return ("ids of episodes", FINAL_OBSERVATIONS, *scores)


def _named_leaves(rows: dict[str, Nested], names: dict[str, str], flat: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields (path, array) of all columns; observations under the path of their column."""
    for column, values in rows.items():
        name = names.get(column)
        if name is None:
            if not isinstance(values, np.ndarray):
                raise ValueError(
                    f"`{column}` must be one array per step in this format; write Parquet, HDF5 or Minari."
                )
            yield column, values
        elif isinstance(values, np.ndarray):
            yield f"{name}/{flat}", values
        else:
            parts = values if isinstance(values, dict) else {}
            if not parts or not all(isinstance(part, np.ndarray) for part in parts.values()):
                raise ValueError(
                    f"`{column}` is nested in another way than a Dict of arrays, which this format cannot hold; write "
                    "Parquet, HDF5 or Minari."
                )
            for key, part in parts.items():
                if "/" in str(key) or str(key) in ("", ".", ".."):
                    raise ValueError(f"`{column}` has the key {key!r}, which cannot be part of a path; rename it.")
                yield f"{name}/{key}", part


def _frames(block: EpisodeBlock, episodes: list[dict[str, Any]], file_number: int) -> dict[str, NDArray[Any]]:
    """Columns of LeRobot's frames, and the description of their episodes behind those that are there."""
    first_row = episodes[-1]["dataset_to_index"] if episodes else 0
    starts = np.cumsum(block.lengths) - block.lengths
    frames = np.arange(block.num_rows) - np.repeat(starts, block.lengths)
    rows = rows_of(block)
    del rows[Columns.NEXT_OBS]
    known = {
        Columns.ACTIONS: "action",
        Columns.REWARDS: "next.reward",
        Columns.TERMINATEDS: "next.terminated",
        Columns.TRUNCATEDS: "next.truncated",
    }
    columns = {
        f"observation.{name[len('obs/') :]}" if name.startswith("obs/") else known.get(name, name): array
        for name, array in _named_leaves(rows, {Columns.OBS: "obs"}, "state")
    }
    columns["next.done"] = rows[Columns.TERMINATEDS] | rows[Columns.TRUNCATEDS]
    columns |= {
        "timestamp": (frames / _FPS).astype(np.float32),
        "frame_index": frames,
        "episode_index": len(episodes) + np.repeat(np.arange(len(block.lengths)), block.lengths),
        "index": first_row + np.arange(block.num_rows),
        "task_index": np.zeros(block.num_rows, dtype=np.int64),
    }
    for start, length in zip(starts.tolist(), block.lengths.tolist(), strict=True):
        episodes.append(
            {
                "episode_index": len(episodes),
                "tasks": [_TASK],
                "length": length,
                "data/chunk_index": 0,
                "data/file_index": file_number,
                "dataset_from_index": first_row + start,
                "dataset_to_index": first_row + start + length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
    return columns


def _feature(name: str, array: NDArray[Any]) -> dict[str, Any]:
    is_image = (
        name.startswith("observation.")
        and array.dtype == np.uint8
        and array.ndim == 4
        and array.shape[3] in _IMAGE_CHANNELS
    )
    if is_image:
        return {"dtype": "image", "shape": list(array.shape[1:]), "names": ["height", "width", "channels"]}
    return {"dtype": str(array.dtype), "shape": list(array.shape[1:]) or [1], "names": None}


def _arrow(array: NDArray[Any], feature: dict[str, Any]) -> Any:
    if feature["dtype"] != "image":
        # One number in an array of one is one number, as LeRobot stores it.
        return arrow_column(array.reshape(len(array)) if feature["shape"] == [1] else array)
    try:
        from PIL import Image
    except ImportError as err:
        raise ImportError('Writing images of LeRobot data sets needs Pillow: pip install "pillow"') from err
    contents = []
    for pixels in array:
        content = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(content, format="PNG")
        contents.append({"bytes": content.getvalue(), "path": None})
    return pa.array(contents, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


class _Statistics:
    """Least, largest, mean and deviation of the numbers of a feature; of an image, of each channel in [0, 1]."""

    def __init__(self) -> None:
        self._count = 0
        self._num_rows = 0
        self._sums: list[Any] = []

    def add(self, array: NDArray[Any], *, is_image: bool) -> None:
        values = array.astype(np.float64).reshape(len(array), -1)
        if is_image:
            values = array.reshape(-1, array.shape[-1]).astype(np.float64) / 255
        found = [values.min(axis=0), values.max(axis=0), values.sum(axis=0), np.square(values).sum(axis=0)]
        if self._sums:
            low, high, total, squares = self._sums
            found = [np.minimum(low, found[0]), np.maximum(high, found[1]), total + found[2], squares + found[3]]
        self._sums = found
        self._count += len(values)
        self._num_rows += len(array)
        self._shape = (array.shape[-1], 1, 1) if is_image else (array.shape[1:] or (1,))

    def to_dict(self) -> dict[str, Any]:
        low, high, total, squares = self._sums
        mean = total / self._count
        deviation = np.sqrt(np.maximum(squares / self._count - np.square(mean), 0.0))
        named = {"min": low, "max": high, "mean": mean, "std": deviation}
        return {name: values.reshape(self._shape).tolist() for name, values in named.items()} | {
            "count": [self._num_rows]
        }


def _write_lerobot_meta(
    path: Path,
    features: dict[str, dict[str, Any]],
    statistics: dict[str, _Statistics],
    episodes: list[dict[str, Any]],
) -> None:
    meta = path / "meta"
    info = {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": len(episodes),
        "total_frames": episodes[-1]["dataset_to_index"],
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": math.ceil(_FILE_BYTES / 2**20),
        "video_files_size_in_mb": 200,
        "fps": _FPS,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": features,
    }
    (meta / "info.json").write_text(json.dumps(info, indent=4))
    found = {name: of_feature.to_dict() for name, of_feature in statistics.items()}
    (meta / "stats.json").write_text(json.dumps(found, indent=4))
    pq.write_table(pa.Table.from_pylist(episodes), meta / "episodes" / "chunk-000" / "file-000.parquet")
    tasks = pa.table({"task_index": [0], "__index_level_0__": [_TASK]})
    pandas = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [],
        "columns": [
            {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
                "metadata": None,
            },
            {
                "name": None,
                "field_name": "__index_level_0__",
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": None,
            },
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
    }
    pq.write_table(tasks.replace_schema_metadata({b"pandas": json.dumps(pandas).encode()}), meta / "tasks.parquet")
