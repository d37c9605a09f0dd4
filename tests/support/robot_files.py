"""Rows of episodes as files of robots and of other libraries, in the layouts that these document."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
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
