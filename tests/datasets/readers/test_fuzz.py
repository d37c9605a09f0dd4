"""500 mutations of valid files: each loads what the file still says, or is refused by a documented error.

Bytes are damaged in files of every format, and rows and columns are changed before a file is written. Everything is
loaded as training loads it, in one process of its own with a deadline for each case, so that a crash or a hang of a
library is a failed test that names its case.

Damaged bytes must not change a column silently where the format has a place for checksums: in Parquet, HDF5 and NumPy
files written here, and in any zip archive. Exempt are files in which nothing is checked: what RLlib records (Parquet
pages without checksums, msgpack) and the HDF5 files that Minari writes.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crafted
import gymnasium as gym
import h5py
import lz4.frame
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import robot_files
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.compression import pack

from rllib_calql import CalQLConfig
from rllib_calql.commands.main import main
from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets.episodes.reader import EpisodeBlock
from rllib_calql.datasets.writers.writers import DatasetMetadata, write_blocks
from rllib_calql.networks.actor_critic import DATA_ACTION_LIMIT
from rllib_calql.store.offline_data import CalQLOfflineData
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo

Table = dict[str, Any]

NUM_DAMAGES = 44  # Of each file.
DEADLINE_S = 60.0  # A damaged size of a page lets Arrow fill 2 GiB, which takes seconds on a busy machine.
START_DEADLINE_S = 120.0
MEMORY_BYTES = 4 * 2**30
DOCUMENTED_ERRORS = {"ValueError", "TypeError", "FileNotFoundError", "OSError", "ImportError"}
GAMMA = 0.9
OBSERVATION_SPACE = gym.spaces.Box(-100.0, 100.0, (3,), np.float32)
ACTION_SPACE = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
LENGTHS = (4, 1, 7, 3, 9, 6)
NAMES = (Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS, Columns.REWARDS, Columns.TERMINATEDS, Columns.RETURNS_TO_GO)


# --- Loading in a process of its own ----------------------------------------------------------------------------------


def load(input_: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The store's columns, and what was remarked about incomplete data."""
    store = TransitionStore(obs_dim=3, action_dim=2, online_capacity=1, seed=0)
    data = CalQLOfflineData(CalQLConfig().offline_data(input_=input_))
    data.load(
        store,
        AddReturnsToGo(RewardSettings(GAMMA)),
        observation_space=OBSERVATION_SPACE,
        action_space=ACTION_SPACE,
    )
    assert store.offline is not None
    assert data.report is not None
    return {name: store.offline.column(name) for name in NAMES}, dict(data.report.remarks)


def serve(connection: Any) -> None:
    """Loads one input after another; answers with columns and remarks, or with the error's type and text."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resource.setrlimit(resource.RLIMIT_AS, (int(status["VmSize"].split()[0]) * 1024 + MEMORY_BYTES, -1))
    warnings.filterwarnings("error", module="rllib_calql")
    connection.send("ready")
    while True:
        input_, minari_root = connection.recv()
        os.environ["MINARI_DATASETS_PATH"] = minari_root
        try:
            answer: Any = load(input_)
        except Exception as err:
            answer = type(err).__name__, str(err)
        connection.send(answer)


class Worker:
    """A process that loads inputs; a new one takes its place after a crash or a hang."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        # Forking would copy the locks of Arrow's and PyTorch's threads, possibly held.
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        assert self._connection.poll(START_DEADLINE_S), "the worker does not start"
        assert self._connection.recv() == "ready"

    def load(self, input_: str, deadline_s: float = DEADLINE_S) -> Any:
        """Answers as `serve`; ("hang", ...) or ("crash", ...) if there is no answer."""
        begin = time.monotonic()
        try:
            self._connection.send((input_, os.environ["MINARI_DATASETS_PATH"]))
            if self._connection.poll(deadline_s):
                return self._connection.recv()
            answer = "hang", f"no answer within {deadline_s} s"
        except (EOFError, OSError):
            self._process.join(10.0)
            answer = "crash", f"exit code {self._process.exitcode} after {time.monotonic() - begin:.1f} s"
        self.stop()
        self._start()
        return answer

    def signal(self, number: int) -> None:
        """Does to the process what a library might do."""
        os.kill(self._process.pid, number)

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join(10.0)
        self._connection.close()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.stop()


def fuzzed(num_examples: int) -> Callable[[Any], Any]:
    """The same examples in every run; the first that fails is reported as it is, since cases are small."""
    return settings(
        max_examples=num_examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# --- A valid file of every format -------------------------------------------------------------------------------------


def valid_rows() -> Table:
    """Episodes that end in turn by termination and by a time-out, one row per step, by RLlib's names."""
    rng = np.random.default_rng(0)
    obs = [rng.normal(size=(length + 1, 3)).astype(np.float32) for length in LENGTHS]
    num_rows = sum(LENGTHS)
    ends = np.zeros((2, num_rows), dtype=bool)
    for episode, last in enumerate(np.cumsum(LENGTHS) - 1):
        ends[episode % 2, last] = True
    return {
        Columns.EPS_ID: np.repeat(np.arange(len(LENGTHS)), LENGTHS),
        Columns.T: np.concatenate([np.arange(length) for length in LENGTHS]),
        Columns.OBS: np.concatenate([values[:-1] for values in obs]),
        Columns.ACTIONS: rng.uniform(-0.9, 0.9, (num_rows, 2)).astype(np.float32),
        Columns.REWARDS: rng.normal(size=num_rows),
        Columns.NEXT_OBS: np.concatenate([values[1:] for values in obs]),
        Columns.TERMINATEDS: ends[0],
        Columns.TRUNCATEDS: ends[1],
    }


def valid_block() -> EpisodeBlock:
    rows = valid_rows()
    last = np.cumsum(LENGTHS) - 1
    return EpisodeBlock(
        ids=[f"episode {i}" for i in range(len(LENGTHS))],
        lengths=np.array(LENGTHS),
        observations=rows[Columns.OBS],
        final_observations=rows[Columns.NEXT_OBS][last],
        actions=rows[Columns.ACTIONS],
        rewards=rows[Columns.REWARDS],
        terminateds=rows[Columns.TERMINATEDS][last],
        truncateds=rows[Columns.TRUNCATEDS][last],
        where=str,
    )


def write_here(path: Path) -> None:
    write_blocks([valid_block()], path)


def write_npz_compressed(path: Path) -> None:
    np.savez_compressed(path, **with_d4rl_names(valid_rows()))


def write_recorded_rows(path: Path) -> None:
    rows = {name: list(values) for name, values in valid_rows().items() if name != Columns.T}
    for name in (Columns.OBS, Columns.NEXT_OBS):
        rows[name] = [pack(value) for value in rows[name]]
    nothing = [None] * len(rows[Columns.OBS])
    pq.write_table(pa.table({**rows, Columns.AGENT_ID: nothing, Columns.MODULE_ID: nothing}), path)


def write_recorded_episodes(path: Path) -> None:
    msgpack, msgpack_numpy = pytest.importorskip("msgpack"), pytest.importorskip("msgpack_numpy")
    rows, items = valid_rows(), []
    for stop, length in zip(np.cumsum(LENGTHS).tolist(), LENGTHS, strict=True):
        here = slice(stop - length, stop)
        episode = SingleAgentEpisode(
            id_=f"episode {stop}",
            observations=[*rows[Columns.OBS][here], rows[Columns.NEXT_OBS][stop - 1]],
            infos=[{}] * (length + 1),
            actions=list(rows[Columns.ACTIONS][here]),
            rewards=rows[Columns.REWARDS][here].tolist(),
            terminated=bool(rows[Columns.TERMINATEDS][stop - 1]),
            truncated=bool(rows[Columns.TRUNCATEDS][stop - 1]),
            observation_space=OBSERVATION_SPACE,
            action_space=ACTION_SPACE,
            len_lookback_buffer=0,
        )
        items.append(msgpack.packb(episode.get_state(), default=msgpack_numpy.encode))
    pq.write_table(pa.table({"item": pa.array(items, pa.binary())}), path)


def of_robots(write: Callable[[Path, Table], Any]) -> Callable[[Path], None]:
    """A writer of the valid rows in a format of `robot_files`."""

    def write_file(path: Path) -> None:
        rows = {name: values for name, values in valid_rows().items() if name != Columns.T}
        if path.suffix == ".csv":
            (path.parent / "columns.yaml").write_text(json.dumps(robot_files.csv_map(rows)))
        if path.suffix == ".npz":  # One environment, whose episodes follow each other.
            rows[Columns.EPS_ID] = np.zeros_like(rows[Columns.EPS_ID])
        write(path, rows)

    return write_file


MINARI = "fuzz/rows-v0"
CHECKSUMMED = {  # Files all of whose columns are protected by checksums, and what writes them.
    "rows.parquet": write_here,
    "data.hdf5": write_here,
    "stored.npz": write_here,
    "compressed.npz": write_npz_compressed,
}
UNCHECKED = {
    "000001_000000-0.parquet": write_recorded_rows,
    "000002_000000-0.parquet": write_recorded_episodes,
    "log.csv": of_robots(robot_files.write_csv),
    "demos.hdf5": of_robots(robot_files.write_robomimic),
    "buffer.npz": of_robots(robot_files.write_stable_baselines3),
}
OF_MINARI = ("metadata.json", "main_data.hdf5")  # The former describes the columns, and must not change them either.


def write_valid(name: str, folder: Path) -> tuple[Path, str]:
    """Writes one valid file; returns its path and what to load."""
    if name in OF_MINARI:
        os.environ["MINARI_DATASETS_PATH"] = str(folder)
        metadata = DatasetMetadata(OBSERVATION_SPACE, ACTION_SPACE)
        write_blocks([valid_block()], f"minari:{MINARI}", metadata=metadata, overwrite=True)
        return folder / MINARI / "data" / name, f"minari:{MINARI}"
    path = folder / name
    (CHECKSUMMED | UNCHECKED)[name](path)
    return path, str(path)


# --- Damaged bytes ----------------------------------------------------------------------------------------------------


def damages() -> st.SearchStrategy[list[tuple[Any, ...]]]:
    """One or two damages; places are fractions of the file, so that they do not depend on its size."""
    place = st.integers(0, 2**20 - 1)
    one = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("delete"), place, st.integers(1, 64)),
        st.tuples(st.just("truncate"), place),
        st.tuples(st.just("swap"), place, place, st.integers(1, 64)),
        st.tuples(st.just("append"), st.binary(min_size=1, max_size=64)),
    )
    return st.lists(one, min_size=1, max_size=2)


def damaged(content: bytes, damage: tuple[Any, ...]) -> bytes:
    if damage[0] == "append":
        return content + damage[1]
    at = damage[1] * len(content) // 2**20
    match damage:
        case ("flip", _, bit):
            change = bytes([content[at] ^ (1 << bit)]) if content else b""
            return content[:at] + change + content[at + 1 :]
        case ("set", _, values):
            return content[:at] + values + content[at + len(values) :]
        case ("insert", _, values):
            return content[:at] + values + content[at:]
        case ("delete", _, size):
            return content[:at] + content[at + size :]
        case ("swap", _, other, size):
            first, second = sorted((at, other * len(content) // 2**20))
            size = min(size, second - first, len(content) - second)
            one, two = content[first : first + size], content[second : second + size]
            return content[:first] + two + content[first + size : second] + one + content[second + size :]
    return content[:at]


def is_bit_identical(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(
        (one[name].dtype, one[name].shape, one[name].tobytes())
        == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name in NAMES
    )


def problem_of(name: str, input_: str, answer: Any, valid: Any) -> str | None:
    """What is wrong with the answer to a file with damaged bytes."""
    if isinstance(answer[0], str):
        kind, message = answer
        if kind not in DOCUMENTED_ERRORS:
            return f"{kind}: {message}"
        file = MINARI if name in OF_MINARI else Path(input_).name
        return None if file in message else f"the error does not name {file}: {kind}: {message}"
    if name in UNCHECKED or name == "main_data.hdf5":
        return None
    # Nothing checks Parquet's footer. If it loses `new_obs`, it is remarked that last steps had to be dropped.
    is_told = name == "rows.parquet" and answer[1] != valid[1]
    return None if is_told or is_bit_identical(answer[0], valid[0]) else "the columns changed silently"


@pytest.mark.parametrize("name", [*CHECKSUMMED, *UNCHECKED, *OF_MINARI])
def test_damaged_bytes_are_harmless_or_refused(
    name: str, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path, input_ = write_valid(name, tmp_path)
    content, valid = path.read_bytes(), worker.load(input_)
    assert len(valid[0][Columns.REWARDS]) == sum(LENGTHS), valid

    @fuzzed(NUM_DAMAGES)
    @given(damages())
    def check(case: list[tuple[Any, ...]]) -> None:
        mutated = content
        for damage in case:
            mutated = damaged(mutated, damage)
        path.write_bytes(mutated)
        answer = worker.load(input_)
        assert problem_of(name, input_, answer, valid) is None, answer

    check()


@pytest.mark.parametrize("name", ["rows.parquet", "data.hdf5", "stored.npz"])
def test_a_flipped_bit_of_a_number_is_noticed_in_files_written_here(name: str, tmp_path: Path) -> None:
    path, input_ = write_valid(name, tmp_path)
    content, row = path.read_bytes(), valid_rows()[Columns.ACTIONS][7].tobytes()
    at = content.index(row)
    for place in range(at, at + len(row)):
        path.write_bytes(damaged(content, ("flip", math.ceil(place * 2**20 / len(content)), 0)))
        assert sum(a != b for a, b in zip(path.read_bytes(), content, strict=True)) == 1
        with pytest.raises(ValueError, match=name):
            load(input_)


# --- Changed rows and columns -----------------------------------------------------------------------------------------

D4RL_NAMES = {
    Columns.OBS: "observations",
    Columns.NEXT_OBS: "next_observations",
    Columns.TERMINATEDS: "terminals",
    Columns.TRUNCATEDS: "timeouts",
}


def with_d4rl_names(rows: Table) -> Table:
    """Columns as D4RL has them: without ids and times."""
    return {
        D4RL_NAMES.get(name, name): values for name, values in rows.items() if name not in (Columns.EPS_ID, Columns.T)
    }


def ends_of_episodes(rows: Table, *, has_ids: bool) -> list[list[int]] | None:
    """Row numbers of each episode in order of time; None if the rows are not whole episodes."""
    count = len(rows[Columns.REWARDS])
    flags = [np.asarray(rows.get(name, np.zeros(count))) for name in (Columns.TERMINATEDS, Columns.TRUNCATEDS)]
    if not all(np.isin(flag, (0, 1)).all() for flag in flags):
        return None
    done = (flags[0] == 1) | (flags[1] == 1)
    next_obs = rows.get(Columns.NEXT_OBS)

    def is_followed(row: int, following: int) -> bool:
        return next_obs is None or np.array_equal(next_obs[row], rows[Columns.OBS][following])

    if not has_ids:
        episodes: list[list[int]] = [[]]
        for row in range(count):
            episodes[-1].append(row)
            if row + 1 < count and (done[row] or not is_followed(row, row + 1)):
                episodes.append([])
        return episodes if done[-1] else None
    by_id: dict[Any, list[int]] = {}
    for row in range(count):
        by_id.setdefault(rows[Columns.EPS_ID][row], []).append(row)
    for episode in by_id.values():
        if Columns.T in rows:
            episode.sort(key=lambda row: rows[Columns.T][row])
            if any(rows[Columns.T][b] - rows[Columns.T][a] != 1 for a, b in itertools.pairwise(episode)):
                return None
        if not all(is_followed(a, b) for a, b in itertools.pairwise(episode)):
            return None
        if done[episode[:-1]].any() or not done[episode[-1]]:
            return None
    return list(by_id.values())


def meaning(rows: Table, *, has_ids: bool) -> dict[str, np.ndarray] | None:
    """The columns that these rows stand for, by plain loops; None if they must be refused."""
    needed = (Columns.OBS, Columns.ACTIONS, Columns.REWARDS, Columns.TERMINATEDS)
    numbers = [rows[name] for name in (*needed[:3], Columns.NEXT_OBS) if name in rows]
    if not all(name in rows for name in needed) or not all(values.dtype.kind in "fiub" for values in numbers):
        return None
    if any(values.dtype == object for values in rows.values()):
        return None
    if len({len(values) for values in rows.values()}) > 1 or not all(np.isfinite(values).all() for values in numbers):
        return None
    episodes = ends_of_episodes(rows, has_ids=has_ids and Columns.EPS_ID in rows)
    if episodes is None or np.abs(rows[Columns.ACTIONS]).max() > 1.0:
        return None
    obs, steps, next_obs, returns, terminateds = rows[Columns.OBS], [], [], [], []
    for episode in episodes:
        is_terminated = rows[Columns.TERMINATEDS][episode[-1]] == 1
        if Columns.NEXT_OBS in rows:
            next_obs += [rows[Columns.NEXT_OBS][row] for row in episode]
        elif is_terminated:
            next_obs += [obs[row] for row in (*episode[1:], episode[-1])]
        else:  # The last row only tells the observation after the row before it.
            next_obs += [obs[row] for row in episode[1:]]
            episode = episode[:-1]
        steps += episode
        terminateds += [0.0] * (len(episode) - 1) + [float(is_terminated)] if episode else []
        discounted = 0.0
        reversed_returns = []
        for row in reversed(episode):
            discounted = float(rows[Columns.REWARDS][row]) + GAMMA * discounted
            reversed_returns.append(discounted)
        returns += reversed_returns[::-1]
    actions = np.clip(rows[Columns.ACTIONS][steps].astype(np.float64), -DATA_ACTION_LIMIT, DATA_ACTION_LIMIT)
    return {
        Columns.OBS: obs[steps],
        Columns.NEXT_OBS: np.array(next_obs),
        Columns.ACTIONS: actions.astype(np.float32),
        Columns.REWARDS: rows[Columns.REWARDS][steps].astype(np.float32),
        Columns.TERMINATEDS: np.array(terminateds, np.float32),
        Columns.RETURNS_TO_GO: np.array(returns, np.float32),
    }


def taken(rows: Table, order: Any) -> Table:
    return {name: values[np.asarray(order)] for name, values in rows.items()}


def with_value(rows: Table, name: str, row: int, value: Any) -> Table:
    values = rows[name].astype(np.result_type(rows[name], np.asarray(value)))
    values[row] = value
    return rows | {name: values}


def renamed(rows: Table, name: str, other: str | None) -> Table:
    kept = {key: values for key, values in rows.items() if key != name}
    return kept if other is None else kept | {other: rows[name]}


NUMBERS = (Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS, Columns.REWARDS)
FLAGS = (Columns.TERMINATEDS, Columns.TRUNCATEDS)
# How often each kind of change is tried. An Arrow table has one length, arrays in files have no missing values.
KINDS = {"shuffle": 3, "swap": 3, "drop row": 6, "drop last rows": 3, "duplicate": 3, "number": 16, "type": 8}
KINDS |= {"rename": 10, "flag": 12, "other end": 6}
KINDS_BY_FORMAT = {
    "Parquet": {**KINDS, "time": 6, "missing": 4, "ragged": 4},
    "HDF5": {**KINDS, "length": 4},
    "npz": {**KINDS, "length": 4},
}


@st.composite
def changes(draw: st.DrawFn, format_: str, kind: str) -> tuple[str, Table]:
    """A change in words, and the rows after it."""
    rows = valid_rows()
    if format_ != "Parquet":
        rows = {name: values for name, values in rows.items() if name not in (Columns.EPS_ID, Columns.T)}
    count = sum(LENGTHS)
    row = draw(st.integers(0, count - 1))
    match kind:
        case "shuffle":
            return kind, taken(rows, draw(st.permutations(range(count))))
        case "swap":
            order = list(range(count))
            other = draw(st.integers(0, count - 1))
            order[row], order[other] = order[other], order[row]
            return f"{kind} rows {row} and {other}", taken(rows, order)
        case "drop row" | "drop last rows":
            gone = [row] if kind == "drop row" else range(max(row, 1), count)
            return f"{kind} {row}", taken(rows, [r for r in range(count) if r not in gone])
        case "duplicate":
            return f"{kind} row {row}", taken(rows, sorted([*range(count), row]))
        case "number":
            name = draw(st.sampled_from(NUMBERS))
            value = draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.25, -1.0, 1.5]))
            return f"{name} of row {row} is {value}", with_value(rows, name, row, np.float32(value))
        case "type":
            name = draw(st.sampled_from((*NUMBERS, *FLAGS)))
            dtype = draw(st.sampled_from(("i1", "f4", "u8") if name in FLAGS else ("f2", "f8", "i4", "S3")))
            also = [Columns.OBS, Columns.NEXT_OBS] if name in (Columns.OBS, Columns.NEXT_OBS) else [name]
            return f"{name} is {dtype}", rows | {each: rows[each].astype(dtype) for each in also}
        case "rename":
            name = draw(st.sampled_from(sorted(rows)))
            other = draw(st.sampled_from(["other", None, name.upper()]))
            return f"{name} is called {other}", renamed(rows, name, other)
        case "flag":
            name = draw(st.sampled_from(FLAGS))
            value = draw(
                st.sampled_from([not rows[name][row], np.int8(2), np.int8(-1), np.float32(0.5), np.float32("nan")])
            )
            return f"{name} of row {row} is {value}", with_value(rows, name, row, value)
        case "other end":
            last = int(np.cumsum(LENGTHS)[draw(st.integers(0, len(LENGTHS) - 1))] - 1)
            both = {name: rows[name].copy() for name in FLAGS}
            both[FLAGS[0]][last], both[FLAGS[1]][last] = draw(st.tuples(st.booleans(), st.booleans()))
            return f"row {last} ends as {both[FLAGS[0]][last]}, {both[FLAGS[1]][last]}", rows | both
        case "length":
            name = draw(st.sampled_from(sorted(rows)))
            return f"{name} ends after row {row}", rows | {name: rows[name][: row + 1]}
        case "missing" | "ragged":
            name = draw(st.sampled_from(sorted(rows) if kind == "missing" else NUMBERS[:3]))
            values = np.empty(count, dtype=object)
            values[:] = list(rows[name])
            values[row] = None if kind == "missing" else values[row][:-1]
            return f"{name} is {kind} in row {row}", rows | {name: values}
    change = draw(st.sampled_from([-1, -30, 1, 1000]))
    rows_changed = [row] if draw(st.booleans()) else slice(None)
    times = rows[Columns.T].copy()
    times[rows_changed] += change
    return f"times of {rows_changed} differ by {change}", rows | {Columns.T: times}


def write_parquet(path: Path, rows: Table) -> None:
    is_plain = {name: values.ndim == 1 and values.dtype != object for name, values in rows.items()}
    pq.write_table(pa.table({name: v if is_plain[name] else list(v) for name, v in rows.items()}), path)


def write_hdf5(path: Path, rows: Table) -> None:
    with h5py.File(path, "w") as file:
        for name, values in with_d4rl_names(rows).items():
            file[name] = values


def write_npz(path: Path, rows: Table) -> None:
    np.savez(path, **with_d4rl_names(rows))


@pytest.mark.parametrize(
    ("format_", "file", "write"),
    [("Parquet", "rows.parquet", write_parquet), ("HDF5", "rows.hdf5", write_hdf5), ("npz", "rows.npz", write_npz)],
    ids=["Parquet", "HDF5", "npz"],
)
def test_changed_rows_are_refused_or_loaded_as_what_they_now_mean(
    format_: str, file: str, write: Callable[[Path, Table], None], worker: Worker, tmp_path: Path
) -> None:
    has_ids = format_ == "Parquet"
    num_loaded = num_refused = 0

    def check(case: tuple[str, Table]) -> None:
        nonlocal num_loaded, num_refused
        change, rows = case
        write(tmp_path / file, rows)
        answer = worker.load(str(tmp_path / file))
        expected = meaning(rows, has_ids=has_ids)
        if expected is None:
            num_refused += 1
            assert answer[0] in DOCUMENTED_ERRORS, (change, answer)
            assert file in answer[1], (change, answer)
            return
        num_loaded += 1
        assert isinstance(answer[0], dict), (change, answer)
        for name in NAMES:
            # Returns are summed in another order.
            tolerance = 1e-5 if name == Columns.RETURNS_TO_GO else 0.0
            np.testing.assert_allclose(
                answer[0][name], expected[name], rtol=tolerance, atol=tolerance, err_msg=f"{change}: {name}"
            )

    for kind, num_examples in KINDS_BY_FORMAT[format_].items():
        fuzzed(num_examples)(given(changes(format_, kind))(check))()
    assert min(num_loaded, num_refused) >= 20


@pytest.mark.parametrize("entry", ["total_steps", "total_episodes"])
@pytest.mark.parametrize("number", [-1, 0, 4, 7, 31])
def test_minari_data_that_contradict_their_metadata_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, number: int
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path, input_ = write_valid("metadata.json", tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: number}))
    with pytest.raises(ValueError, match=MINARI):
        load(input_)


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, "[]", "null", "NaN", "{}"])
def test_minari_data_whose_metadata_are_damaged_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path, input_ = write_valid("metadata.json", tmp_path)
    path.write_text(content)
    with pytest.raises(ValueError, match=MINARI):
        load(input_)


def test_minari_reference_scores_beyond_floats_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path, input_ = write_valid("metadata.json", tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ref_min_score": 0, "ref_max_score": 10**400}))
    assert CalQLOfflineData(CalQLConfig().offline_data(input_=input_)).reference_scores is None


def test_a_damaged_shape_in_minari_data_is_refused_before_memory_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path, input_ = write_valid("main_data.hdf5", tmp_path)
    content, shape = path.read_bytes(), struct.pack("<QQ", LENGTHS[0] + 1, 3)
    assert shape in content
    path.write_bytes(content.replace(shape, struct.pack("<QQ", LENGTHS[0] + 1 + 2**37, 3), 1))
    with pytest.raises(
        ValueError, match=rf"Episode '0' of '{input_}' cannot be read .*claims {12 * (2**37 + 5)} bytes"
    ):
        load(input_)


def test_five_hundred_mutations_are_tried() -> None:
    num_files = len([*CHECKSUMMED, *UNCHECKED, *OF_MINARI])
    num_changes = sum(sum(kinds.values()) for kinds in KINDS_BY_FORMAT.values())
    assert num_files * NUM_DAMAGES + num_changes >= 500


def test_crashes_and_hangs_are_noticed_and_survived(worker: Worker, tmp_path: Path) -> None:
    write_here(tmp_path / "rows.parquet")
    worker.signal(signal.SIGSEGV)
    kind, message = worker.load(str(tmp_path / "rows.parquet"))
    assert (kind, message.split(" after")[0]) == ("crash", f"exit code {-signal.SIGSEGV}")
    worker.signal(signal.SIGSTOP)
    assert worker.load(str(tmp_path / "rows.parquet"), deadline_s=0.5)[0] == "hang"
    columns, _ = worker.load(str(tmp_path / "rows.parquet"))
    assert len(columns[Columns.REWARDS]) == sum(LENGTHS)


# --- Files that would run code ----------------------------------------------------------------------------------------


def check_is_refused(answer: Any, name: str, case: str, marker: Path) -> None:
    assert not marker.exists(), f"{case} ran"
    assert answer[0] in DOCUMENTED_ERRORS, (case, answer)
    assert name in answer[1], (case, answer)
    if name in crafted.ROW_IS_KNOWN:
        assert re.search(r"\brow \d+ of ", answer[1]), (case, answer)
    assert "\n" not in answer[1].strip(), (case, answer)


@pytest.mark.parametrize("name", crafted.FILES)
def test_no_pickle_in_a_data_file_is_run(name: str, worker: Worker, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for number, (case, payload) in enumerate(crafted.running_pickles(marker).items()):
        (tmp_path / str(number)).mkdir()
        crafted.FILES[name](tmp_path / str(number) / name, payload)
        marker.unlink(missing_ok=True)
        answer = worker.load(str(tmp_path / str(number) / name))
        check_is_refused(answer, name, case, marker)


@pytest.mark.parametrize("name", ["recorded-obs.parquet", "recorded-actions.parquet"])
def test_no_pickle_in_a_data_file_takes_all_memory(name: str, worker: Worker, tmp_path: Path) -> None:
    begin = time.monotonic()
    for case, payload in crafted.greedy_pickles().items():
        crafted.FILES[name](tmp_path / name, payload)
        check_is_refused(worker.load(str(tmp_path / name)), name, case, tmp_path / "ran")
    assert time.monotonic() - begin < DEADLINE_S / 2


def test_a_command_refuses_a_file_that_would_run_code_in_one_line(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = crafted.running_pickles(marker)["os.system"]
    for name, write in crafted.FILES.items():
        write(tmp_path / name, payload)
        marker.unlink(missing_ok=True)
        result = CliRunner().invoke(main, ["dataset", "inspect", "--no-plot", str(tmp_path / name)])
        assert result.exit_code == 1, (name, result.output)
        (line,) = result.stderr.strip().splitlines()
        check_is_refused(("ValueError", line), name, name, marker)


def test_the_environment_that_minari_data_name_is_not_made(
    tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path, input_ = write_valid("metadata.json", tmp_path)
    crafted.name_environment(path, tmp_path / "ran")
    check_is_refused(worker.load(input_), MINARI, "env_spec", tmp_path / "ran")


def test_addresses_in_minari_data_are_not_followed(
    tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path, input_ = write_valid("main_data.hdf5", tmp_path)
    with h5py.File(path, "a") as file:
        del file["episode_0/observations"]
        type_ = h5py.h5t.create(h5py.h5t.OPAQUE, 8)
        type_.set_tag(b"NUMPY:O")
        stored = h5py.h5d.create(
            file["episode_0"].id, b"observations", type_, h5py.h5s.create_simple((LENGTHS[0] + 1,))
        )
        stored.write(h5py.h5s.ALL, h5py.h5s.ALL, np.full(LENGTHS[0] + 1, b"\x10" * 8, "V8"), mtype=type_)
    check_is_refused(worker.load(input_), MINARI, "addresses", tmp_path / "ran")


@pytest.mark.parametrize("how", ["view", "soft link through a link"])
def test_minari_episodes_do_not_show_numbers_of_other_files(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path, input_ = write_valid("main_data.hdf5", tmp_path)
    with h5py.File(tmp_path / "other.hdf5", "w") as other, h5py.File(path, "a") as file:
        observations = file["episode_0/observations"][:]
        other["observations"] = np.full_like(observations, 777.0)
        del file["episode_0/observations"]
        if how == "view":
            layout = h5py.VirtualLayout(observations.shape, observations.dtype)
            layout[:] = h5py.VirtualSource(other["observations"])
            file["episode_0"].create_virtual_dataset("observations", layout)
        else:
            file["other"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "/")
            file["episode_0/observations"] = h5py.SoftLink("/other/observations")
    with pytest.raises(ValueError, match=r"Episode '0' of .* `observations` (is a view on|stands in another file)"):
        load(input_)


@pytest.mark.parametrize("shape", [(10, 2**28), (10**10,)], ids=["wide", "long"])
def test_columns_that_were_never_written_are_refused_before_memory_is_asked_for(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file.create_dataset("observations", shape, "f4", chunks=(1, 2**20)[-len(shape) :], compression="gzip")
        for name in ("actions", "rewards", "terminals", "timeouts"):
            file.create_dataset(name, shape[:1], "f4", chunks=(min(shape[0], 2**16),), compression="gzip")
    assert (tmp_path / "data.hdf5").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"`\w+` in '.*data\.hdf5' claims \d+ bytes, and holds 0 of the file's \d+"):
        load(str(tmp_path / "data.hdf5"))


@pytest.mark.parametrize("how", ["link", "raw file"])
def test_numbers_in_other_files_are_not_read(how: str, tmp_path: Path, worker: Worker) -> None:
    write_here(tmp_path / "data.hdf5")
    os.mkfifo(tmp_path / "pipe")  # Nobody writes to it: whoever opens it waits for ever.
    with h5py.File(tmp_path / "data.hdf5", "a") as file:
        shape = file["actions"].shape
        del file["actions"]
        if how == "link":
            file["actions"] = h5py.ExternalLink(str(tmp_path / "pipe"), "actions")
        else:
            file.create_dataset("actions", shape, "f4", external=[(str(tmp_path / "pipe"), 0, h5py.h5f.UNLIMITED)])
    answer = worker.load(str(tmp_path / "data.hdf5"), deadline_s=10.0)
    check_is_refused(answer, "data.hdf5", how, tmp_path / "ran")


def test_a_frame_that_claims_more_than_memory_is_refused(worker: Worker, tmp_path: Path) -> None:
    write_recorded_rows(tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    frame = lz4.frame.compress(pickle.dumps(np.zeros(100_000_000)))
    claim = lz4.frame.compress(b"short")
    for packed in (frame, claim[:6] + (2**40).to_bytes(8, "little") + claim[14:]):
        texts = table["obs"].to_pylist()
        texts[3] = base64.b64encode(packed).decode()
        changed = table.set_column(table.schema.get_field_index("obs"), "obs", pa.array(texts))
        pq.write_table(changed, tmp_path / "rows.parquet")
        answer = worker.load(str(tmp_path / "rows.parquet"), deadline_s=20.0)
        assert answer[0] == "ValueError"
        assert "row 3 of" in answer[1]


def test_the_crafted_pickles_run_where_nothing_keeps_them_from_it(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    harmless = []
    for case, payload in crafted.running_pickles(marker).items():
        marker.unlink(missing_ok=True)
        with contextlib.suppress(Exception):
            pickle.loads(payload)
        if not marker.exists():
            harmless.append(case)
    assert harmless == []
