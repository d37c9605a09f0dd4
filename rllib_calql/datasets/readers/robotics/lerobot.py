"""Reads LeRobot data sets (v2.0, v2.1, v3.0): `meta/info.json`, and frames in the Parquet files of `data`.

What their frames say, and how that is understood here:

* A frame holds the observation before the action, and `next.*` what followed it. No observation follows the last frame
  of an episode.
* `next.done` is true in the last frame, whatever the end was, unless some episode's last frame says otherwise: then it
  is a termination wherever it is true. `next.success` in the last frame is a termination. With `next.done` alone, the
  reward of a success is one as well: the larger of the two numbers that all rewards are. Other episodes were cut.
* Columns `next.terminated` and `next.truncated`, which this package writes, or those of a column map, are preferred.
* Images are PNG or JPEG in the Parquet files, and become uint8 arrays (height, width, channels).

Source: LeRobot 0.3.3 and 0.4.4, `datasets/lerobot_dataset.py`, `datasets/utils.py`, `rl/gym_manipulator.py`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.columns import NAMES
from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.datasets.episodes.reader import ENDS_UNTOLD, EpisodeBlock, Nested, ReadOptions
from rllib_calql.datasets.readers.robotics.column_map import ColumnMap
from rllib_calql.datasets.readers.robotics.lerobot_features import DONE, SUCCESS, LeRobotInfo, read_info
from rllib_calql.datasets.rows.arrow import Where, decode_numbers, is_numeric
from rllib_calql.datasets.rows.arrow_rows import ArrowRowsReader
from rllib_calql.datasets.rows.flat_columns import as_flags, nested
from rllib_calql.datasets.rows.parquet_files import ParquetSource

_EPISODE, _FRAME = "episode_index", "frame_index"
_VECTORS = (Columns.OBS, Columns.ACTIONS)
_MAX_DECODED_BYTES = 8 * 2**20
_REMEDY = "say by `terminated: FEATURE` or `truncated: FEATURE` in a column map how it ended"

Bools = NDArray[np.bool_]


class LeRobotReader(ArrowRowsReader):
    """Episodes from the frames of one data set.

    Observations are a Dict of all features `observation.*`, without that beginning of their names, or the array itself
    if there is one feature, or what a column map says.
    """

    def __init__(
        self,
        name: str,
        info_file: DataFile,
        files: Sequence[DataFile],
        options: ReadOptions,
        column_map: ColumnMap | None = None,
    ) -> None:
        """Checks features and sizes, and reads where episodes end; see `ArrowRowsReader`.

        Args:
            name: The input as the user wrote it.
            info_file: `meta/info.json`.
            files: Parquet files of `data`.
            options: How incomplete data are read.
            column_map: Which features are observations, actions, rewards and flags.

        Raises:
            ValueError: If a feature is missing or cannot be read, or frames or episodes are missing.
        """
        self._map = column_map
        self._info = read_info(info_file, column_map)
        self._data_files = list(files)
        frames = _Frames(name, files, self._info, options)
        self._num_untold = frames.num_untold
        super().__init__(name, frames, options, decode=self._decoded, unfinished_remedy=_REMEDY)

    def fingerprint(self) -> str:
        """Digest of the files, of `meta/info.json` and of the map."""
        maps = [self._map.file] if self._map is not None else []
        return fingerprint_of([*self._data_files, self._info.file, *maps])

    @property
    def records_ids(self) -> bool:
        """Episodes are numbered within their data set."""
        return False

    def blocks(self) -> Iterator[EpisodeBlock]:
        """Yields blocks of whole episodes; see `ArrowRowsReader`."""
        yield from super().blocks()
        if self._num_untold:
            self.remarks[ENDS_UNTOLD] += self._num_untold

    def _decoded(self, field: Any, array: Any, where: Where) -> Nested:
        """The leaves of a column, from a struct of its features."""
        columns = dict(zip((part.name for part in array.type), array.flatten(), strict=True))
        table: dict[str, NDArray[Any]] = {}
        for leaf, joined in self._info.leaves.items():
            if leaf.partition("/")[0] != field.name:
                continue
            parts = [self._feature(name, columns[name], where) for name in joined.names]
            if joined.is_vector:
                table[leaf] = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
            else:
                table[leaf] = parts[0]
        return nested(table, field.name)

    def _feature(self, name: str, array: Any, where: Where) -> NDArray[Any]:
        if self._info.is_image(name):
            return _images(name, array, self._info.features[name].get("shape"), where)
        values = decode_numbers(pa.field(name, array.type), array, where)
        if not isinstance(values, np.ndarray):
            raise ValueError(f"`{name}` must hold numbers or lists of numbers, got {array.type} in {where(0)}.")
        # LeRobot stores an array of one number as the number.
        is_one = values.ndim == 1 and self._info.features[name].get("shape") == [1]
        return values[:, None] if is_one else values


class _Frames:
    """The frames as rows: features gathered into structs, and the flags of both ends."""

    def __init__(self, name: str, files: Sequence[DataFile], info: LeRobotInfo, options: ReadOptions) -> None:
        self._info = info
        leaves = {column: self._names(column) for column in (*_VECTORS, Columns.REWARDS)}
        self._structs = {column: leaves[column] for column in _VECTORS}
        self._rewards = leaves[Columns.REWARDS][0]
        used = {each for names in leaves.values() for each in names} | {_EPISODE, _FRAME}

        def columns_of(schema: Any, where: str) -> list[str]:
            for each in sorted(used | set(info.flags.values())):
                if each not in schema.names:
                    raise ValueError(
                        f"{where} has no column `{each}`; its columns are "
                        f"{', '.join(f'`{other}`' for other in schema.names)}; download or write the data set again."
                    )
            return sorted(used)

        self._source = ParquetSource(name, files, columns_of)
        self.label, self.num_rows = self._source.label, self._source.num_rows
        raw = self._source.schema
        columns_of(raw, self.label)
        self._further = [
            field.name
            for field in raw
            if field.name not in used | NAMES and is_numeric(field.type) and options.wants(field.name)
        ]
        ignored = [field for field in raw if field.name not in {*used, *self._further}]
        self.schema = pa.schema(
            [
                pa.field(Columns.EPS_ID, raw.field(_EPISODE).type),
                pa.field(Columns.T, raw.field(_FRAME).type),
                *(
                    pa.field(column, pa.struct([raw.field(each) for each in self._structs[column]]))
                    for column in _VECTORS
                ),
                pa.field(
                    Columns.REWARDS,
                    pa.float64() if raw.field(self._rewards).type == pa.bool_() else raw.field(self._rewards).type,
                ),
                pa.field(Columns.TERMINATEDS, pa.bool_()),
                pa.field(Columns.TRUNCATEDS, pa.bool_()),
                *(raw.field(each) for each in self._further),
                *(field for field in ignored if field.name not in NAMES),
            ]
        )
        self._check_counts()
        self.num_untold = 0
        self._terminateds, self._truncateds = self._ends()
        row_bytes = sum(info.size(each) * 4 for each in self._structs[Columns.OBS])
        self._decoded_rows = max(_MAX_DECODED_BYTES // max(row_bytes, 1), 1)

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """See `RowSource`."""
        stored = {Columns.EPS_ID: _EPISODE, Columns.T: _FRAME, Columns.REWARDS: self._rewards}
        flags = {Columns.TERMINATEDS: self._terminateds, Columns.TRUNCATEDS: self._truncateds}
        raw = [each for column in columns for each in self._structs.get(column, [stored.get(column, column)])]
        names = list(dict.fromkeys(each for each in raw if each not in flags))
        row = 0
        for whole in self._source.batches(names):
            for start in range(0, len(whole), self._decoded_rows if len(names) > 1 else len(whole)):
                batch = whole.slice(start, self._decoded_rows if len(names) > 1 else None)
                arrays = []
                for column in columns:
                    if column in flags:
                        arrays.append(pa.array(flags[column][row : row + len(batch)]))
                    elif column in self._structs:
                        parts = [batch.column(each) for each in self._structs[column]]
                        fields = [batch.schema.field(each) for each in self._structs[column]]
                        arrays.append(pa.StructArray.from_arrays(parts, fields=fields))
                    else:
                        arrays.append(batch.column(stored.get(column, column)))
                    if column == Columns.REWARDS and arrays[-1].type == pa.bool_():
                        arrays[-1] = pc.cast(arrays[-1], pa.float64())
                yield pa.RecordBatch.from_arrays(arrays, names=columns)
                row += len(batch)

    def where(self, row: int) -> str:
        """See `RowSource`."""
        return self._source.where(row)

    def part_of(self, row: int) -> int:
        """See `RowSource`."""
        return self._source.part_of(row)

    def _names(self, column: str) -> list[str]:
        joined = [each for leaf, each in self._info.leaves.items() if leaf.partition("/")[0] == column]
        return list(dict.fromkeys(name for each in joined for name in each.names))

    def _check_counts(self) -> None:
        if self._info.num_frames not in (None, self.num_rows):
            raise ValueError(
                f"{str(self._info.file)!r} tells of {self._info.num_frames} frames, and the files of `data` hold "
                f"{self.num_rows}; the data set is incomplete: download or write it again."
            )

    def _column(self, name: str) -> NDArray[Any]:
        """A column of one number per frame, whole."""
        pieces, row = [], 0
        for batch in self._source.batches([name]):
            values = decode_numbers(batch.schema.field(0), batch.column(0), self._where_from(row))
            if not isinstance(values, np.ndarray) or values.size != len(batch):
                raise ValueError(
                    f"`{name}` must hold one number per row, got more in {self.where(row)}; store a scalar."
                )
            pieces.append(values.reshape(-1))
            row += len(batch)
        return np.concatenate(pieces)

    def _where_from(self, first_row: int) -> Where:
        return lambda row: self.where(first_row + row)

    def _flags(self, name: str) -> Bools:
        return as_flags(name, self._column(name), self.where)

    def _ends(self) -> tuple[Bools, Bools]:
        """Terminations and truncations, [R] each."""
        episodes = self._column(_EPISODE)
        frames = self._column(_FRAME)
        order = np.lexsort((frames, episodes))
        is_last = np.zeros(len(episodes), dtype=bool)
        is_last[order[np.append(np.diff(episodes[order]) != 0, True)]] = True
        count = int(is_last.sum())
        if self._info.num_episodes not in (None, count):
            raise ValueError(
                f"{str(self._info.file)!r} tells of {self._info.num_episodes} episodes, and the files of `data` hold "
                f"{count}; the data set is incomplete: download or write it again."
            )
        nothing = np.zeros(len(episodes), dtype=bool)
        if self._info.flags:
            found = {column: self._flags(name) for column, name in self._info.flags.items()}
            terminateds = found.get(Columns.TERMINATEDS, nothing)
            return terminateds, found.get(Columns.TRUNCATEDS, is_last & ~terminateds)
        names = self._source.schema.names
        dones = self._flags(DONE) if DONE in names else None
        if SUCCESS in names:
            successes = self._flags(SUCCESS)
            terminateds = successes & (is_last if dones is None else is_last | dones)
            return terminateds, is_last & ~terminateds
        if dones is None:
            return nothing, nothing.copy()
        if not dones[is_last].all():
            return dones, is_last & ~dones
        rewards = self._column(self._rewards)
        values = np.unique(rewards)
        terminateds = (dones & ~is_last) | (is_last & (rewards == values[-1]) if len(values) == 2 else nothing)
        self.num_untold = int((is_last & ~terminateds).sum())
        return terminateds, is_last & ~terminateds


def _images(name: str, array: Any, shape: Any, where: Where) -> NDArray[np.uint8]:
    """[R, height, width, channels] of encoded images.

    Raises:
        ValueError: If one is missing or damaged, or of another size than the others.
    """
    try:
        from PIL import Image
    except ImportError as err:
        raise ImportError('Reading images of LeRobot data sets needs Pillow: pip install "pillow"') from err
    images: list[NDArray[np.uint8]] = []
    sizes = sorted(shape) if isinstance(shape, list) else None
    is_struct = pa.types.is_struct(array.type)
    if is_struct and array.type.get_field_index("bytes") < 0:
        raise ValueError(
            f"`{name}` holds {array.type} in {where(0)}, where images have a field `bytes`; write the data set again "
            "with images in its Parquet files."
        )
    for row, stored in enumerate(array.field("bytes") if is_struct else array):
        content = stored.as_py()
        if not isinstance(content, bytes):
            raise ValueError(
                f"`{name}` holds no image in {where(row)}, but at most the path of a file; write the data set again "
                "with images in its Parquet files."
            )
        try:
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
                mode = image.mode if image.mode in ("L", "RGB", "RGBA") else "RGB"
                found = (image.height, image.width, len(mode))
                if sizes is not None and sorted(found) != sizes and sorted(found[:2]) != sizes:
                    raise ValueError(f"it has the shape {found} and should have {shape}")
                pixels = np.asarray(image.convert(mode), dtype=np.uint8)
        # Pillow raises errors of many kinds for damaged bytes.
        except Exception as err:
            raise ValueError(
                f"`{name}` holds an image that cannot be read in {where(row)} ({err}); write the data set again."
            ) from err
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if images and pixels.shape != images[0].shape:
            raise ValueError(
                f"`{name}` has shape {pixels.shape} in {where(row)} and {images[0].shape} in {where(0)}; every row "
                "must have the same shape."
            )
        images.append(pixels)
    return np.stack(images) if images else np.zeros((0, 1, 1, 1), np.uint8)
