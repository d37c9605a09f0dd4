"""OGBench's compact layout gives the episodes of its plain one, in every format of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ogbench.utils import load_dataset

from rllib_calql.datasets import ReadOptions, open_input
from rllib_calql.datasets.rows import arrow_rows, flat

Rows = dict[str, np.ndarray]
LENGTHS = (7, 2, 5)  # Of trajectories, in states.


def relabelled(tmp_path: Path, *, compact: bool) -> Rows:
    """What OGBench loads, with a task's rewards and masks, which depend on the observation of the row."""
    num_rows = sum(LENGTHS)
    ends = np.zeros(num_rows)
    ends[np.cumsum(LENGTHS) - 1] = 1.0
    rng = np.random.default_rng(0)
    obs = np.stack([np.arange(num_rows), rng.normal(size=num_rows)], axis=1).astype(np.float32)
    actions = rng.uniform(-1, 1, (num_rows, 2)).astype(np.float32)
    np.savez(tmp_path / "raw.npz", observations=obs, actions=actions, terminals=ends)
    rows: Rows = dict(load_dataset(str(tmp_path / "raw.npz"), compact_dataset=compact))
    success = np.isin(rows["observations"][:, 0], [2.0, 3.0, 12.0])  # In the midst, and before the last state.
    rows["rewards"], rows["masks"] = (success - 1.0).astype(np.float32), (1.0 - success).astype(np.float32)
    return rows


def trajectory_ids(rows: Rows) -> np.ndarray:
    ends = 1.0 - rows["valids"] if "valids" in rows else rows["terminals"]
    return np.cumsum(ends) - ends


def write_npz(path: Path, rows: Rows) -> Path:
    np.savez(path / "data.npz", **rows)
    return path / "data.npz"


def write_hdf5(path: Path, rows: Rows) -> Path:
    with h5py.File(path / "data.hdf5", "w") as file:
        for name, values in rows.items():
            if name in ("observations", "next_observations"):
                file[f"{name}/position"], file[f"{name}/noise"] = values[:, :1], values[:, 1:]
            else:
                file[name] = values
    return path / "data.hdf5"


def write_parquet(path: Path, rows: Rows) -> Path:
    table = pa.table({name: list(values) if values.ndim > 1 else values for name, values in rows.items()})
    pq.write_table(table, path / "data.parquet")
    return path / "data.parquet"


def episodes_of(input_: Any, **options: Any) -> list[tuple[Any, ...]]:
    (reader,) = open_input(input_, ReadOptions(columns=frozenset(), **options))
    read = []
    for episode in reader:
        obs = episode.get_observations()
        obs = np.concatenate([obs["position"], obs["noise"]], axis=1) if isinstance(obs, dict) else obs
        ends = episode.is_terminated, episode.is_truncated
        read.append((obs.tolist(), episode.get_actions().tolist(), episode.get_rewards().tolist(), ends))
    assert not reader.remarks
    return read


FORMATS: dict[str, Callable[[Path, Rows], Any]] = {"npz": write_npz, "hdf5": write_hdf5, "parquet": write_parquet}


@pytest.mark.parametrize("piece_rows", [1, 3, 1000])
@pytest.mark.parametrize("format_", FORMATS)
def test_both_layouts_of_ogbench_give_the_same_episodes(
    format_: str, piece_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "_PIECE_BYTES", piece_rows * 40)
    monkeypatch.setattr(arrow_rows, "BLOCK_BYTES", piece_rows * 40)
    plain = episodes_of(write_npz(tmp_path, relabelled(tmp_path, compact=False)))
    assert [len(episode[1]) for episode in plain] == [3, 1, 2, 1, 4]
    assert [episode[3] for episode in plain] == [(True, False)] * 2 + [(False, True)] * 2 + [(True, False)]
    assert episodes_of(FORMATS[format_](tmp_path, relabelled(tmp_path, compact=True))) == plain


@pytest.mark.parametrize("shuffle", [False, True])
def test_trajectories_with_ids_and_times_give_the_same_episodes(shuffle: bool, tmp_path: Path) -> None:
    rows = relabelled(tmp_path, compact=True)
    rows["masks"] = np.ones_like(rows["masks"])  # With ids, an episode ends where its rows do.
    rows["episode_id"] = trajectory_ids(rows).astype(np.int64)
    rows["t"] = np.concatenate([np.arange(length) for length in LENGTHS])
    rng = np.random.default_rng(1)
    order = rng.permutation(sum(LENGTHS)) if shuffle else np.arange(sum(LENGTHS))
    read = episodes_of(write_parquet(tmp_path, {name: values[order] for name, values in rows.items()}))
    plain = relabelled(tmp_path, compact=False)
    plain["masks"] = np.ones_like(plain["masks"])
    assert sorted(read) == sorted(episodes_of(write_npz(tmp_path, plain)))


def test_a_mask_in_the_last_row_terminates_the_transition_into_it(tmp_path: Path) -> None:
    rows = relabelled(tmp_path, compact=True)
    rows["masks"] = np.where(rows["observations"][:, 0] == sum(LENGTHS) - 1, 0.0, 1.0)
    ends = [episode[3] for episode in episodes_of(write_npz(tmp_path, rows))]
    assert ends == [(False, True), (False, True), (True, False)]


def test_terminals_and_timeouts_tell_the_ends_as_well(tmp_path: Path) -> None:
    rows = relabelled(tmp_path, compact=True)
    is_last = rows["terminals"] == 1
    del rows["masks"]
    rows["terminals"], rows["timeouts"] = is_last & (trajectory_ids(rows) == 1), is_last & (trajectory_ids(rows) != 1)
    ends = [episode[3] for episode in episodes_of(write_npz(tmp_path, rows))]
    assert ends == [(False, True), (True, False), (False, True)]


def changed(rows: Rows, name: str, row: int, value: float) -> Rows:
    values = rows[name].copy()
    values[row] = value
    return rows | {name: values}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: changed(rows, "valids", 3, 0.0), "`valids` is 0 in row 3 of .*no flag ends the trajectory"),
        (lambda rows: changed(rows, "valids", 5, 0.0), "`valids` is 0 in row [56] of .*trajectory"),
        (lambda rows: changed(rows, "valids", 0, 0.0), "`valids` is 0 in row 0 of .*not the last of several rows"),
        (lambda rows: changed(rows, "valids", 6, 1.0), "`valids` is 1 in row [67] of "),
        (
            lambda rows: changed(rows, "valids", -1, 1.0),
            "`valids` is 1 in row 13 of .*, after a trajectory that",
        ),
        (
            lambda rows: {name: rows[name][:-1] for name in rows},
            "`valids` is 1 in row 12 of .*, the last row",
        ),
        (lambda rows: changed(rows, "valids", 2, 0.5), "`valids` must be 0 or 1 in every row, got 0.5 in row 2"),
        (lambda rows: rows | {"valids": np.ones((14, 2))}, r"`valids` (has shape \(14, 2\)|holds double) in "),
        (
            lambda rows: {name: rows[name] for name in rows if name != "masks"},
            "`terminals` marks the ends of traj.*`mas",
        ),
    ],
)
@pytest.mark.parametrize("format_", FORMATS)
def test_valids_of_another_meaning_are_refused(
    format_: str, change: Callable[[Rows], Rows], message: str, tmp_path: Path
) -> None:
    rows = relabelled(tmp_path, compact=True)
    rows["masks"] = np.ones_like(rows["masks"])
    file = FORMATS[format_](tmp_path, change(rows))
    with pytest.raises(ValueError, match=message) as caught:
        episodes_of(file)
    assert file.name in str(caught.value)
