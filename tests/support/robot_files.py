"""Rows of episodes as files of robots and of other libraries, in the layouts that these document."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Rows = dict[str, Any]
"""RLlib's column -> an array, or a list of ragged rows; with `eps_id`."""

_CSV_KEYS = {
    "obs": "obs",
    "new_obs": "next_obs",
    "actions": "actions",
    "rewards": "rewards",
    "terminateds": "terminated",
    "truncateds": "truncated",
    "eps_id": "episode",
}


_VECTORS = ("obs", "new_obs", "actions")


def csv_names(name: str, values: Any) -> list[str]:
    """`obs_0`, `obs_1` and so on; the name itself for one reward, flag or id per row."""
    width = int(np.prod(np.shape(values)[1:])) if isinstance(values, np.ndarray) else len(np.ravel(values[0]))
    return [f"{name}_{i}" for i in range(width)] if width > 1 or name in _VECTORS else [name]


def write_csv(file: Path, rows: Rows) -> None:
    """Every number in a column of its own, none at all for `None`."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow([each for name, values in rows.items() for each in csv_names(name, values)])
        for row in zip(*rows.values(), strict=True):
            cells = [each for value in row for each in (np.ravel(value).tolist() if value is not None else [None])]
            writer.writerow(repr(cell) if isinstance(cell, float) else cell for cell in cells)


def csv_map(rows: Rows) -> dict[str, Any]:
    """The map of what `write_csv` writes."""
    entries = {}
    for name, values in rows.items():
        names = csv_names(name, values)
        entries[_CSV_KEYS[name]] = names if name in _VECTORS else names[0]
    return entries


def write_csv_folder(root: Path, parts: list[Rows], columns: dict[str, Any]) -> Path:
    """A file per part, and the map of all."""
    (root / "data").mkdir()
    (root / "data" / "columns.yaml").write_text(yaml.safe_dump(columns))
    for number, part in enumerate(parts):
        write_csv(root / "data" / f"part-{number}.csv", part)
    return root / "data"


def episodes_in(rows: Rows) -> list[Rows]:
    """Stretches of one id."""
    ids = rows["eps_id"]
    stops = [*(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
    pairs = zip([0, *stops[:-1]], stops, strict=True)
    return [{name: column[start:stop] for name, column in rows.items()} for start, stop in pairs if stop > start]


def stored(values: Any) -> np.ndarray:
    """Text as bytes, which HDF5 can hold."""
    return values.astype("S") if values.dtype.kind == "U" else values


def write_robomimic(file: Path, rows: Rows, *, has_flags: bool = True) -> None:
    """One group per episode, with the flags that this package writes beside `dones`, or with `dones` alone."""
    places = {"obs": "obs/state", "new_obs": "next_obs/state"}
    with h5py.File(file, "w") as opened:
        opened.create_group("data")
        for number, episode in enumerate(episodes_in(rows)):
            for name, values in episode.items():
                if name == "eps_id":
                    continue
                if name in ("terminateds", "truncateds") and not has_flags:
                    continue
                opened[f"data/demo_{number}/{places.get(name, name)}"] = stored(values)
            if not has_flags:
                opened[f"data/demo_{number}/dones"] = episode["terminateds"].astype(np.int64)


def write_d3rlpy(file: Path, rows: Rows) -> None:
    """One array per episode and column."""
    names = {"obs": "observations", "actions": "actions", "rewards": "rewards"}
    with h5py.File(file, "w") as opened:
        episodes = episodes_in(rows)
        opened["columns"], opened["num_episodes"], opened["version"] = (
            [*names.values(), "terminated"],
            len(episodes),
            "2.1",
        )
        for number, episode in enumerate(episodes):
            for name in names.keys() & episode.keys():
                values = stored(episode[name])
                opened[f"{names[name]}_{number}"] = values[:, None] if values.ndim == 1 else values
            if "terminateds" in episode:
                opened[f"terminated_{number}"] = stored(episode["terminateds"])[-1]


def write_stable_baselines3(file: Path, rows: Rows) -> None:
    """An environment per episode, all of one length."""
    episodes = episodes_in(rows) if len(rows["eps_id"]) else [rows, rows]
    names = {"obs": "observations", "new_obs": "next_observations", "actions": "actions", "rewards": "rewards"}
    arrays = {
        names[name]: np.stack([episode[name] for episode in episodes], axis=1) for name in names.keys() & rows.keys()
    }
    if "actions" in arrays and arrays["actions"].ndim == 2:
        arrays["actions"] = arrays["actions"][:, :, None]
    if "terminateds" in rows:
        terminateds, truncateds = (
            np.stack([episode[name] for episode in episodes], axis=1) for name in ("terminateds", "truncateds")
        )
        if terminateds.dtype.kind != "U":
            terminateds, truncateds = terminateds.astype(np.float32), truncateds.astype(np.float32)
            arrays |= {"dones": np.maximum(terminateds, truncateds), "timeouts": truncateds * (1 - terminateds)}
        else:
            arrays |= {"dones": terminateds, "timeouts": truncateds}
    np.savez(file, **arrays)


_LEROBOT = {
    "obs": "observation.state",
    "actions": "action",
    "rewards": "next.reward",
    "terminateds": "next.terminated",
    "truncateds": "next.truncated",
}


def write_lerobot(root: Path, parts: list[Rows], **features: str | None) -> Path:
    """A data set with a Parquet file per part; LeRobot has no next observations.

    Args:
        root: Where its folder `data` is made.
        parts: Rows of each file.
        features: RLlib's column -> another feature that is written for it, or None.
    """
    names = {name: feature for name, feature in (_LEROBOT | features).items() if feature is not None}
    folder = root / "data"
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    described = {name: {"dtype": "float32", "shape": [1], "names": None} for name in names.values()}
    (folder / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0", "features": described}))
    numbers: dict[Any, int] = {}
    for part, rows in enumerate(parts):
        episodes = episodes_in(rows)
        lengths = [len(episode["eps_id"]) for episode in episodes]
        ids = [numbers.setdefault(episode["eps_id"][0], len(numbers)) for episode in episodes]
        columns = {
            "episode_index": np.repeat(ids, lengths).astype(np.int64),
            "frame_index": np.concatenate([[], *map(np.arange, lengths)]).astype(np.int64),
        }
        for name in names.keys() & rows.keys():
            values = rows[name]
            columns[names[name]] = pa.array(list(values)) if isinstance(values, list) or values.ndim > 1 else values
            if isinstance(values, np.ndarray) and values.ndim == 2 and values.dtype.kind in "fiub":
                columns[names[name]] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        pq.write_table(pa.table(columns), folder / "data" / "chunk-000" / f"part-{part}.parquet")
    return folder
