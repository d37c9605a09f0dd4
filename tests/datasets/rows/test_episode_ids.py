"""Ids of episodes have one text, in whatever format and type they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rllib_calql.datasets import ReadOptions, open_input

FORMATS = ("npz", "hdf5", "parquet")


def write(file: Path, ids: np.ndarray) -> None:
    """Two episodes of two steps, in the format of the file's suffix."""
    rows: dict[str, Any] = {
        "obs": np.arange(8.0).reshape(4, 2),
        "actions": np.zeros((4, 1)),
        "rewards": np.ones(4),
        "terminateds": np.array([0.0, 1.0, 0.0, 1.0]),
        "eps_id": ids,
    }
    if file.suffix == ".npz":
        np.savez(file, **rows)
    elif file.suffix == ".parquet":
        pq.write_table(pa.table({name: list(v) if v.ndim > 1 else v for name, v in rows.items()}), file)
    else:
        with h5py.File(file, "w") as opened:
            for name, v in rows.items():
                opened[name] = v.astype(h5py.string_dtype()) if v.dtype.kind == "U" else v


def ids_in(file: Path) -> list[str]:
    (reader,) = open_input(file, ReadOptions(missing_final_observation="repeat"))
    return [id_ for block in reader.blocks() for id_ in block.ids]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("type_", [np.int64, np.uint8, np.float32, np.float64, np.str_, np.bytes_])
def test_an_id_is_named_the_same_whatever_its_type(format_: str, type_: type, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{format_}"
    write(file, np.array([3, 3, 12, 12]).astype(type_))
    assert ids_in(file) == ["3", "12"]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    "ids", [np.array([0.5, 0.5, 1, 1]), np.array([False, False, True, True])], ids=["half", "bool"]
)
def test_an_id_is_a_whole_number_or_text(format_: str, ids: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{format_}"
    write(file, ids)
    with pytest.raises(ValueError, match=r"`eps_id` must .*whole numbers? or text, got (0\.5|bool) in row 0 of"):
        ids_in(file)
