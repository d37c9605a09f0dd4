"""Every reader meets every fault: it is refused with its place and the remedy, and nothing is left behind."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import msgpack
import msgpack_numpy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import robot_faults
import robot_files
from minari.dataset.minari_storage import MinariStorage
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils import compression

from rllib_calql import CalQLConfig
from rllib_calql.common.encoding import flat_size, observation_dtype
from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets import open_input
from rllib_calql.datasets.episodes import chunks
from rllib_calql.datasets.rows import arrow_rows, flat, parquet_files
from rllib_calql.store.offline_data import CalQLOfflineData
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo

pytestmark = pytest.mark.usefixtures("ray_session", "_episode_by_episode")

Rows = dict[str, Any]
"""RLlib's column -> an array, or a list of ragged rows."""
Spoil = Callable[[list[Rows]], list[Rows]]

SPACE = gym.spaces.Box(-10.0, 10.0, (2,), np.float32)
ACTIONS = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)
UNBOUNDED = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
LENGTH = 20
COLUMNS = ("obs", "new_obs", "actions", "rewards", "terminateds", "returns_to_go")
MINARI_ID = "bad/data-v0"
REFUSALS = (ValueError, TypeError, FileNotFoundError, OSError, ImportError)


def two_episodes(first: str = "first", second: str = "second", seed: int = 0) -> Rows:
    """Rows 0 to 19 are an episode that terminates, rows 20 to 39 one that times out."""
    rng = np.random.default_rng(seed)
    obs = rng.uniform(-5, 5, (2, LENGTH + 1, 2)).astype(np.float32)
    is_last = np.arange(LENGTH) == LENGTH - 1
    return {
        "eps_id": np.repeat([first, second], LENGTH),
        "obs": obs[:, :-1].reshape(-1, 2),
        "new_obs": obs[:, 1:].reshape(-1, 2),
        "actions": rng.uniform(-2, 2, (2 * LENGTH, 1)).astype(np.float32),
        "rewards": rng.normal(size=2 * LENGTH),
        "terminateds": np.concatenate([is_last, np.zeros(LENGTH, bool)]),
        "truncateds": np.concatenate([np.zeros(LENGTH, bool), is_last]),
    }


@pytest.fixture
def _episode_by_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers pass on each episode at once, so that the first is in the cache when the second proves faulty."""
    for module in (arrow_rows, parquet_files):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    monkeypatch.setattr(chunks, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(flat, "_MAX_PIECE_ROWS", 8)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


# --- Formats ----------------------------------------------------------------------------------------------------------

_D4RL = {"obs": "observations", "new_obs": "next_observations", "terminateds": "terminals", "truncateds": "timeouts"}
_MINARI = {"actions": "actions", "rewards": "rewards", "terminateds": "terminations", "truncateds": "truncations"}
_STATE = {"obs": "observations", "actions": "actions", "rewards": "rewards"}


def without(rows: Rows, *names: str) -> Rows:
    return {name: column for name, column in rows.items() if name not in names}


def cut_at_ids(rows: Rows) -> list[Rows]:
    ids = rows["eps_id"]
    stops = [*(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
    pairs = zip([0, *stops[:-1]], stops, strict=True)
    return [{name: column[start:stop] for name, column in rows.items()} for start, stop in pairs if stop > start]


def arrow_table(rows: Rows) -> pa.Table:
    def column(values: Any) -> Any:
        is_plain = isinstance(values, np.ndarray) and values.dtype.kind in "fiub" and values.ndim == 2
        if not is_plain:
            return pa.array(values.tolist() if isinstance(values, np.ndarray) and values.ndim > 1 else values)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    return pa.table({name: column(values) for name, values in rows.items()})


def in_files(suffix: str, write: Callable[[Path, Rows], Any]) -> Callable[[Path, list[Rows]], Path]:
    """A writer of one file per part."""

    def write_all(root: Path, parts: list[Rows]) -> Path:
        (root / "data").mkdir()
        for number, part in enumerate(parts):
            write(root / "data" / f"part-{number}{suffix}", part)
        return root / "data"

    return write_all


def write_parquet(file: Path, rows: Rows) -> None:
    pq.write_table(arrow_table(rows), file)


def write_hdf5(file: Path, rows: Rows) -> None:
    with h5py.File(file, "w") as opened:
        for name, values in without(rows, "eps_id").items():
            if isinstance(values, list):
                ragged = opened.create_dataset(_D4RL.get(name, name), (len(values),), h5py.vlen_dtype(np.float32))
                for row, value in enumerate(values):
                    ragged[row] = value
            else:
                opened[_D4RL.get(name, name)] = values.astype("S") if values.dtype.kind == "U" else values


def write_npz(file: Path, rows: Rows, save: Callable[..., Any] = np.savez) -> None:
    def array(values: Any) -> np.ndarray:
        if isinstance(values, np.ndarray):
            return values
        objects = np.empty(len(values), object)
        objects[:] = values
        return objects

    save(file, **{_D4RL.get(name, name): array(values) for name, values in without(rows, "eps_id").items()})


def write_recorded_rows(file: Path, rows: Rows) -> None:
    packed = {name: [compression.pack(row) for row in rows[name]] for name in ("obs", "new_obs") if name in rows}
    nothing = [None] * len(next(iter(rows.values())))
    write_parquet(file, {**rows, **packed, "agent_id": nothing, "module_id": nothing})


def episode(rows: Rows) -> SingleAgentEpisode:
    observations = [*rows["obs"], rows["new_obs"][-1]]
    return SingleAgentEpisode(
        id_=str(rows["eps_id"][0]),
        observations=observations,
        infos=[{}] * len(observations),
        actions=list(rows["actions"]),
        rewards=list(rows["rewards"]),
        terminated=rows["terminateds"][-1].item(),
        truncated=rows["truncateds"][-1].item(),
        len_lookback_buffer=0,
    )


def write_recorded_episodes(file: Path, rows: Rows) -> None:
    complete = two_episodes() | rows
    states = [episode(part).get_state() for part in cut_at_ids(complete)]
    kept = [without(state, *(_STATE[name] for name in _STATE if name not in rows)) for state in states]
    items = [msgpack.packb(state, default=msgpack_numpy.encode) for state in kept]
    pq.write_table(pa.table({"item": pa.array(items, pa.binary())}), file)


def write_minari(root: Path, parts: list[Rows]) -> str:
    """Written past Minari's own checks."""
    folder = Path(os.environ["MINARI_DATASETS_PATH"]) / MINARI_ID / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    storage = MinariStorage.new(folder, SPACE, ACTIONS, env_spec=None, data_format="hdf5")
    episodes = [rows for part in parts for rows in cut_at_ids(part)]
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        for number, rows in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            group.attrs.update({"id": number, "seed": 0, "total_steps": len(rows["eps_id"])})
            columns = {stored: rows[name] for name, stored in _MINARI.items() if name in rows}
            if "obs" in rows:
                columns["observations"] = np.concatenate([rows["obs"], rows["new_obs"][-1:]])
            for name, values in columns.items():
                group[name] = values.astype("S") if values.dtype.kind == "U" else values
    num_steps = sum(len(rows["eps_id"]) for rows in episodes)
    counts = {"total_episodes": len(episodes), "total_steps": num_steps}
    storage.update_metadata({"dataset_id": MINARI_ID, "minari_version": minari.__version__, **counts})
    return f"minari:{MINARI_ID}"


FORMATS: dict[str, Callable[[Path, list[Rows]], Any]] = {
    "minari": write_minari,
    "parquet": in_files(".parquet", write_parquet),
    "parquet without ids": in_files(".parquet", lambda file, rows: write_parquet(file, without(rows, "eps_id"))),
    "hdf5": in_files(".hdf5", write_hdf5),
    "hdf5 without next": in_files(".hdf5", lambda file, rows: write_hdf5(file, without(rows, "new_obs"))),
    "npz": in_files(".npz", write_npz),
    "compressed npz": in_files(".npz", lambda file, rows: write_npz(file, rows, np.savez_compressed)),
    "rllib rows": in_files(".parquet", write_recorded_rows),
    "rllib episodes": in_files(".parquet", write_recorded_episodes),
    "csv": lambda root, parts: robot_files.write_csv_folder(root, parts, robot_files.csv_map(two_episodes())),
    "robomimic": in_files(".hdf5", robot_files.write_robomimic),
    "d3rlpy": in_files(".h5", robot_files.write_d3rlpy),
    "sb3": in_files(".npz", robot_files.write_stable_baselines3),
    "lerobot": robot_files.write_lerobot,
    "ray data": lambda root, parts: ray.data.from_arrow([arrow_table(rows) for rows in parts]),
    "episodes": lambda root, parts: [episode(rows) for part in parts for rows in cut_at_ids(part)],
}
FLAT = ("hdf5", "hdf5 without next", "npz", "compressed npz")
WITHOUT_IDS = ("parquet without ids", *FLAT)
WITHOUT_NEXT = ("hdf5 without next", "d3rlpy", "lerobot")
ARROW = ("parquet", "parquet without ids", "ray data")
IN_MEMORY = ("ray data", "episodes")
OF_EPISODES = ("minari", "rllib episodes", "episodes")
MANY_FILES = tuple(name for name in FORMATS if name not in ("minari", "lerobot", *IN_MEMORY))


def place(format_: str, row: int, part: int = 0) -> str:
    """Pattern of what messages call a row of the second episode of a part."""
    suffix = {"hdf5": "hdf5", "npz": "npz", "csv": "csv"}.get(
        format_.split()[-1] if "npz" in format_ else format_.split()[0], "parquet"
    )
    file = rf"'\S*part-{part}\.{suffix}'"
    step = f"step {row - LENGTH} of "
    return {
        "minari": rf"step {row - LENGTH} of .*'minari:{MINARI_ID}'",
        "ray data": rf"row {row} of ray\.data\.Dataset",
        "episodes": step + "entry 1 of SingleAgentEpisodes",
        "rllib episodes": step + f"row 1 of {file}",
        **{name: text.format(row=row, step=row - LENGTH, part=part) for name, text in robot_faults.PLACES.items()},
    }.get(format_, f"row {row} of {file}")


def load(input_: Any, root: Path, **settings: Any) -> TransitionStore:
    """Loads through the cache unless `store_memory_limit` says otherwise."""
    spaces = {name: settings.pop(name, space) for name, space in SPACES.items()}
    store = TransitionStore(
        obs_dim=flat_size(spaces["observation_space"]),
        action_dim=flat_size(spaces["action_space"]),
        online_capacity=1,
        seed=0,
        obs_dtype=observation_dtype(spaces["observation_space"]),
    )
    config = CalQLConfig().offline_data(input_=input_, **({"store_memory_limit": 1} | cache_of(root) | settings))
    CalQLOfflineData(config).load(store, AddReturnsToGo(RewardSettings(0.9)), **spaces)
    return store


SPACES: dict[str, gym.Space[Any]] = {"observation_space": SPACE, "action_space": ACTIONS}


def cache_of(root: Path) -> dict[str, str]:
    return {"cache_dir": str(root / "cache")}


def refusal(attempt: Callable[[], Any]) -> tuple[type[Exception], str] | None:
    """Type and text of the error. The error itself would keep alive, and open, what its traceback holds."""
    try:
        attempt()
    except Exception as error:
        return type(error), str(error)
    return None


def left_behind(root: Path) -> list[str]:
    """Files of the cache other than locks, and whatever below `root` is still open."""
    in_cache = [str(path) for path in (root / "cache").glob("*") if path.suffix != ".lock"]
    if open_files(root):
        gc.collect()
    return in_cache + open_files(root)


def open_files(root: Path) -> list[str]:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    return [target for target in targets if target.startswith(str(root)) and not target.endswith(".lock")]


# --- Faults -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What is wrong, and what each format's reader says about it.

    Attributes:
        message: Pattern of the error. `EPISODE` stands for the second episode's id, `ROW<n>` for the place of a row,
            `FILE<n>` for a file.
        spoil: Changes the rows before they are written, file by file.
        damage: Changes the last file afterwards.
        ask_for: Changes what is asked for.
        settings: Of the config, and the environment's spaces.
        other: Patterns of formats that say something else.
        left_out: Formats of which the fault is none, and why.
    """

    message: str
    spoil: Spoil = list
    damage: Callable[[Path], Any] | None = None
    ask_for: Callable[[Any], Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def at(name: str, row: int, value: Any, dtype: Any = None) -> Spoil:
    """One value of the last file becomes another one."""

    def spoil(parts: list[Rows]) -> list[Rows]:
        column = np.array(parts[-1][name], dtype=dtype)
        column[row] = value
        return [*parts[:-1], parts[-1] | {name: column}]

    return spoil


def whole(names: Sequence[str], change: Callable[[Any], Any]) -> Spoil:
    """Columns of the last file become others."""
    return lambda parts: [*parts[:-1], parts[-1] | {name: change(parts[-1][name]) for name in names}]


def in_turn(*spoils: Spoil) -> Spoil:
    def spoil(parts: list[Rows]) -> list[Rows]:
        for each in spoils:
            parts = each(parts)
        return parts

    return spoil


def rows_in_order(order: Sequence[int]) -> Spoil:
    return lambda parts: [{name: column[list(order)] for name, column in rows.items()} for rows in parts]


def lacking(name: str) -> Spoil:
    return lambda parts: [*parts[:-1], without(parts[-1], name)]


def second_file(parts: list[Rows]) -> list[Rows]:
    return [*parts, two_episodes("third", "fourth", seed=1)]


def ragged(values: np.ndarray) -> list[np.ndarray]:
    return [np.concatenate([row, row]) if number == 30 else row for number, row in enumerate(values)]


def half_of(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def each(formats: Sequence[str], text: str) -> dict[str, str]:
    return dict.fromkeys(formats, text)


OBSERVATIONS = ("obs", "new_obs")
FINITE = "holds {} in episode EPISODE, ROW30; .*must be finite: repair the value or drop the episode"
NO_SUCH_PART = each(OF_EPISODES, "an episode holds one array of observations, and not the next ones beside them")
NO_FILE = each(IN_MEMORY, "no file")
ONE_OBJECT = each(("rllib episodes", "episodes"), "RLlib does not make such an episode")
NO_FLAGS_BY_ROW = each(("rllib episodes", "episodes"), "an episode object has one end, not a flag per row")
NO_COMPLEX = each((*ARROW, "rllib rows"), "Arrow has no complex numbers")
NO_COLUMN = r"has no column `{0}`; its columns are .*; rename the column, or add it"
NOT_PACKED = "There is no episode that RLlib packed in row {0} of FILE0 .*; copy or record the file again"
DAMAGED = rf"Episode '\d' of 'minari:{MINARI_ID}' cannot be read .*damaged: delete the folder, then download"
UNREADABLE = "FILE1 is not a readable .*write it again"
ONE_TYPE = "every episode must have the same types and shapes"
SAME_COLUMNS = "FILE0 has a column `truncateds` and FILE1 has not; .*remove or add it"

FAULTS: dict[str, Fault] = {
    "missing": Fault(
        r"`input_` '.*/dat': there is no such file or folder\. Did you mean 'data'\?",
        ask_for=lambda input_: input_.replace("v0", "v1") if isinstance(input_, str) else input_.with_name("dat"),
        other={"minari": rf"no Minari dataset 'bad/data-v1' .*Did you mean '{MINARI_ID}'.*minari download bad/data-v1"},
        left_out=NO_FILE,
    ),
    "empty": Fault(
        "is empty: .* no rows; name files that have",
        spoil=rows_in_order([]),
        other={
            "minari": f"Dataset '{MINARI_ID}' is empty: it has no transitions; name one that has",
            "rllib episodes": "is empty: its Parquet files have no episodes; name files that have",
            "ray data": r"ray\.data\.Dataset is empty: it has no rows; hand over one that has",
            "episodes": "`input_` must be a string, a path, .* or a non-empty list of these, got ",
        },
    ),
    "nan in obs": Fault("`obs` " + FINITE.format("nan"), at("obs", 30, np.nan)),
    "nan in new_obs": Fault(
        "`new_obs` holds nan in episode EPISODE, ROW30; .*repair the value",
        at("new_obs", 30, np.nan),
        left_out={**NO_SUCH_PART, "hdf5 without next": "no such column"},
    ),
    "infinity in the last observation": Fault(
        "`new_obs` holds inf in episode EPISODE, ROW39; .*repair the value",
        at("new_obs", 39, np.inf),
        left_out={"hdf5 without next": "no such column"},
    ),
    "nan in actions": Fault("`actions` " + FINITE.format("nan"), at("actions", 30, np.nan)),
    "infinity in rewards": Fault("`rewards` " + FINITE.format("-inf"), at("rewards", 30, -np.inf)),
    "observation beyond float32": Fault(
        r"`obs` holds 1e\+300 in episode EPISODE, ROW30; .*must fit into float32, up to 3.4e\+38: repair the value",
        in_turn(
            whole(OBSERVATIONS, lambda values: values.astype(np.float64)),
            at("obs", 30, 1e300),
            at("new_obs", 29, 1e300),
        ),
    ),
    "reward beyond float32": Fault(
        r"`rewards` holds -1e\+39 in episode EPISODE, ROW30; .*must fit into float32", at("rewards", 30, -1e39)
    ),
    "never finished": Fault(
        r"Episode EPISODE ends neither terminated nor truncated \(its last step is ROW39\).*"
        'or set `unfinished_episodes="truncate"`',
        at("truncateds", 39, False),
    ),
    "goes on after its end": Fault(
        "Episode EPISODE goes on after its end: `terminateds` is true in ROW30, .*set the flag on the last row only",
        at("terminateds", 30, True),
        left_out=each(WITHOUT_IDS, "without ids the flag is where the episode ends") | NO_FLAGS_BY_ROW,
    ),
    "swapped rows": Fault(
        "Rows of episode EPISODE are out of order or missing: `new_obs` in ROW29 .*store the rows of an episode in",
        rows_in_order([*range(30), 31, 30, *range(32, 40)]),
        left_out=each(WITHOUT_IDS, "a jump ends an episode, which is remarked") | NO_SUCH_PART,
    ),
    "a lost row": Fault(
        "Rows of episode EPISODE are out of order or missing: `new_obs` in ROW29 .*store the rows of an episode in",
        rows_in_order([*range(30), *range(31, 40)]),
        left_out=each(WITHOUT_IDS, "a jump ends an episode, which is remarked") | NO_SUCH_PART,
    ),
    "action out of bounds": Fault(
        r"episode EPISODE, ROW30: action \[2\.5\] is outside the bounds of Box.*units, clip the recorded actions, or",
        at("actions", 30, 2.5),
        left_out=each(("rllib rows", "rllib episodes"), "RLlib clips module actions only behind the recorder"),
    ),
    "observations of another size": Fault(
        "episode '.*: observations have 2 numbers, the environment's have 3; use the environment the data come from",
        settings={"observation_space": gym.spaces.Box(-10.0, 10.0, (3,), np.float32)},
        other={"minari": r"has observation space Box\(.*2,.*, the environment has Box\(.*3,.*; use the environment"},
    ),
    "actions of another size": Fault(
        "episode '.*: actions have 1 numbers, the environment's have 2; use the environment the data come from",
        settings={"action_space": gym.spaces.Box(-2.0, 2.0, (2,), np.float32)},
        other={"minari": r"has action space Box\(.*1,.*, the environment has Box\(.*2,.*; use the environment"},
    ),
    "actions without bounds": Fault(
        "The action space must be bounded, got Box.*; wrap the environment so that its actions are",
        settings={"action_space": UNBOUNDED},
    ),
    **{
        f"no {name}": Fault(
            NO_COLUMN.format(name),
            lacking(name),
            other=({} if name == "terminateds" else {"rllib episodes": NOT_PACKED.format(0)}) | {"minari": DAMAGED},
            left_out={"episodes": "an object always has it"}
            | ({"rllib episodes": "an object always has it"} if name == "terminateds" else {}),
        )
        for name in ("obs", "actions", "rewards", "terminateds")
    },
    "two rewards a row": Fault(
        "`rewards` must hold one .* per row, got .* shape .2,. in .*; store a scalar",
        whole(["rewards"], lambda values: np.stack([values, values], axis=1)),
    ),
    "strings as observations": Fault(
        r"`obs\w*` must hold .*numbers.*, got .*; (convert the column|record flat)",
        whole(OBSERVATIONS, lambda values: values.astype(str)),
    ),
    "strings as actions": Fault(
        "`actions` must hold numbers.*, got .*; convert the column",
        whole(["actions"], lambda values: values.astype(str)),
    ),
    "strings as rewards": Fault(
        "`rewards` must hold numbers.*, got .*; convert the column",
        whole(["rewards"], lambda values: values.astype(str)),
    ),
    "strings as flags": Fault(
        "`term.*` must hold numbers.*, got .*; convert the column",
        whole(["terminateds"], lambda values: values.astype(str)),
        other={
            "minari": r"`terminations` of episode '0' .*must be 20 booleans.*, got \|S.*; write or download the data"
        }
        | each(
            ("rllib episodes", "episodes"), r"`is_terminated` of episode 'first' .*must be True or False, got 'True'"
        ),
    ),
    "complex observations": Fault(
        r"`obs\w*` must hold .*numbers, got complex128 .*; (convert the column|record flat)",
        whole(OBSERVATIONS, lambda values: values.astype(complex)),
        left_out=each(ARROW, "Arrow has no complex numbers"),
    ),
    "complex rewards": Fault(
        "`rewards` must hold numbers, got complex128 .*; convert the column",
        whole(["rewards"], lambda values: values.astype(complex)),
        left_out=NO_COMPLEX,
    ),
    "objects as rewards": Fault(
        "`rewards` has no value in ROW30; fill it in, or drop the row's episode",
        at("rewards", 30, None, dtype=object),
        other=each(("npz", "compressed npz"), "`rewards` must hold numbers, got object in FILE0; convert the column")
        | each(("rllib episodes", "episodes"), f"`rewards` holds object .* in episode EPISODE .*{ONE_TYPE}"),
        left_out=each(("minari", "hdf5", "hdf5 without next"), "HDF5 holds no objects"),
    ),
    "ragged observations": Fault(
        "`obs` has 4 values in ROW30 and 2 in .*; every row must have the same shape",
        whole(["obs"], ragged),
        other=each(FLAT, "`observations` must hold numbers, got object in FILE0; convert the column")
        | {
            "rllib rows": "`obs` has rows of different shapes, .* at or after row 16 of FILE0; every row must have",
            "rllib episodes": NOT_PACKED.format(1),
            "episodes": "`obs` of episode 'second' .*entry 1 .* differs in shape .*every step must have the same",
        },
        left_out={"minari": "an array; episodes of different shapes are a fault of their own"},
    ),
    "ragged actions": Fault(
        "`actions` has 2 values in ROW30 and 1 in .*; every row must have the same shape",
        whole(["actions"], ragged),
        other=each(FLAT, "`actions` must hold numbers, got object in FILE0; convert the column")
        | {
            "rllib episodes": NOT_PACKED.format(1),
            "episodes": "`actions` of episode 'second' .*entry 1 .* differs in shape .*every step must have the same",
        },
        left_out={"minari": "an array; episodes of different shapes are a fault of their own"},
    ),
    **{
        f"the flag {value}": Fault(
            f"`t.*` must be 0 or 1 in every row, got {value} in ROW39; repair the value",
            at("truncateds", 39, value, dtype=np.float64),
            other=each(
                ("rllib episodes", "episodes"),
                f"`is_truncated` of episode 'second' .*must be True or False, got {value}; repair it",
            ),
        )
        for value in (0.5, 2.0, -1.0, np.nan)
    },
    "an action less than rewards": Fault(
        "FILE0 has 40 rows of `observations` and 39 of `actions`; all columns need one row per time step: write the",
        whole(["actions"], lambda values: values[:-1]),
        other={"minari": "Episode '1' .*has 20 rewards and 19 `actions`; there must be as many as rewards"},
        left_out=each((*ARROW, "rllib rows"), "Arrow makes no such table") | ONE_OBJECT,
    ),
    "a flag less than rewards": Fault(
        "FILE0 has 40 rows of `observations` and 39 of `terminals`; all columns need one row per time step: write the",
        whole(["terminateds"], lambda values: values[:-1]),
        other={"minari": r"`terminations` of episode '1' .*must be 20 booleans, .*shape \(19,\); write or download"},
        left_out=each((*ARROW, "rllib rows"), "Arrow makes no such table") | ONE_OBJECT,
    ),
    "an id of another file's episode": Fault(
        "Two files use the episode id 'first' for different episodes: .*FILE0 and .*FILE1 .*give every episode its own",
        lambda parts: [*parts, two_episodes(seed=1)],
        other={
            "rllib episodes": "Episode 'first' .*occurs twice: it ended in row 0 of FILE0, .*row 0 of FILE1; give",
            "episodes": "Episode 'first' .*occurs twice: it ended in entry 0 .*again in entry 2 .*; give every",
            "ray data": "Episode 'first' goes on after its end: .*row 19 .*; .*or give every episode its own `eps_id`",
        },
        left_out={"minari": "its ids are numbers of its own"} | each(WITHOUT_IDS, "no ids"),
    ),
    "a column that another file lacks": Fault(
        SAME_COLUMNS,
        in_turn(second_file, lacking("truncateds")),
        other=each(
            ("parquet", "parquet without ids", "rllib rows"),
            "FILE1 has no column `truncateds`; .*FILE0 has `truncateds`; .*rename the column, or add it",
        )
        | {
            "minari": DAMAGED,
            "ray data": r"ray\.data\.Dataset cannot be read \(.*all its blocks must have the same columns",
        },
        left_out=each(("rllib episodes", "episodes"), "an object always has it"),
    ),
    "wider observations in another file": Fault(
        "`observations` holds .* in FILE0, and .* in FILE1; the files of one data set must agree",
        in_turn(second_file, whole(OBSERVATIONS, lambda values: np.repeat(values, 2, axis=1))),
        other=each(
            ("parquet", "parquet without ids", "rllib rows", "ray data"),
            r"`obs` has shape \(4,\) from row (0 of FILE1|40 of ray\.data\.Dataset) on .*; every row must have the",
        )
        | each(OF_EPISODES, rf"`obs` holds float32 of shape \(4,\) in episode '(2|third)' .*{ONE_TYPE}"),
    ),
    "integers in another file": Fault(
        "`observations` holds .* in FILE0, and .* in FILE1; the files of one data set must agree",
        in_turn(second_file, whole(OBSERVATIONS, lambda values: values.astype(np.int64))),
        other=each(("parquet", "parquet without ids"), "`obs` holds float in FILE0 and int64 in FILE1; store it in one")
        | each(
            ("rllib rows", "ray data"), "`obs` holds .*(row 0 of FILE1 on|from row 40 of .* on).*; store it in one type"
        )
        | each(OF_EPISODES, f"`obs` holds int64 .* in episode '(2|third)' .*{ONE_TYPE}"),
    ),
    "strings in another file": Fault(
        "`rewards` .*FILE1; (convert the column|store it in one type)",
        in_turn(second_file, whole(["rewards"], lambda values: values.astype(str))),
        other={"ray data": r"ray\.data\.Dataset cannot be read \(.*all its blocks must have the same columns and types"}
        | each(OF_EPISODES, f"`rewards` holds .* in episode '(2|third)' .*{ONE_TYPE}"),
    ),
    "all failed": Fault(
        "Every reward in .* is -1.0 and no episode terminates, .*set `failure_reward=-1.0`, else relabel the rewards",
        in_turn(
            whole(["rewards"], lambda values: 0 * values - 1),
            at("terminateds", 19, False),
            at("truncateds", 19, True),
        ),
        # Whole data are cached before they are judged.
        settings={"store_memory_limit": 2**30},
    ),
    "half a file": Fault(UNREADABLE, second_file, half_of, other={"minari": DAMAGED}, left_out=NO_FILE),
    "a file of nothing": Fault(
        UNREADABLE, second_file, lambda file: os.truncate(file, 0), other={"minari": DAMAGED}, left_out=NO_FILE
    ),
    "another kind of file": Fault(
        UNREADABLE,
        second_file,
        lambda file: file.write_bytes(b"no such format " * 99),
        other={"minari": DAMAGED},
        left_out=NO_FILE,
    ),
    "a file without its end": Fault(
        UNREADABLE,
        second_file,
        lambda file: os.truncate(file, file.stat().st_size - 7),
        other={"minari": DAMAGED},
        left_out=NO_FILE,
    ),
}

for name, fault in FAULTS.items():
    FAULTS[name] = replace(
        fault,
        other=fault.other | {format_: said[name] for format_, said in robot_faults.OTHER.items() if name in said},
        left_out=fault.left_out | {format_: why[name] for format_, why in robot_faults.LEFT_OUT.items() if name in why},
    )

CASES = [(format_, name) for name, fault in FAULTS.items() for format_ in FORMATS if format_ not in fault.left_out]


def pattern(fault: Fault, format_: str) -> str:
    text = fault.other.get(format_, fault.message)
    text = re.sub(r"ROW(\d+)", lambda found: place(format_, int(found[1])), text)
    text = re.sub(r"FILE(\d)", lambda found: rf"'\S*part-{found[1]}\.\w+'", text)
    if format_ in robot_faults.SECOND:
        return text.replace("EPISODE", robot_faults.SECOND[format_])
    has_ids = format_ not in (*WITHOUT_IDS, "minari")
    return text.replace("EPISODE", "'second'" if has_ids else r"'\d'")


def written(root: Path, format_: str, fault: Fault) -> Any:
    """Writes spoilt data, and returns what is asked for."""
    input_ = FORMATS[format_](root, fault.spoil([two_episodes()]))
    if fault.damage is not None:
        file = (
            root / "minari" / MINARI_ID / "data" / "main_data.hdf5"
            if format_ == "minari"
            else max(input_.rglob("part-*"))
        )
        fault.damage(file)
    return input_ if fault.ask_for is None else fault.ask_for(input_)


@pytest.mark.parametrize(("format_", "name"), CASES, ids=[f"{name}-{format_}" for format_, name in CASES])
def test_a_fault_is_refused_with_its_place_and_remedy_and_leaves_nothing(
    tmp_path: Path, format_: str, name: str
) -> None:
    fault = FAULTS[name]
    input_ = written(tmp_path, format_, fault)
    found = refusal(lambda: load(input_, tmp_path, **fault.settings))
    assert found is not None, "loaded without a word"
    error, message = found
    assert error in REFUSALS, f"{error.__name__}: {message}"
    assert re.search(pattern(fault, format_), message), message
    assert left_behind(tmp_path) == []


def test_the_table_of_faults_says_of_every_format_what_it_says_or_why_nothing() -> None:
    for name, fault in FAULTS.items():
        assert not fault.other.keys() & fault.left_out.keys(), name
        assert (fault.other.keys() | fault.left_out.keys()) <= FORMATS.keys(), name
    assert {format_ for format_, _ in CASES} == FORMATS.keys()


# --- What is no fault -------------------------------------------------------------------------------------------------


def columns(store: TransitionStore) -> dict[str, np.ndarray]:
    assert store.offline is not None
    return {name: store.offline.column(name) for name in COLUMNS}


def loaded(root: Path, format_: str, spoil: Spoil = list, **settings: Any) -> dict[str, np.ndarray]:
    root.mkdir()
    return columns(load(FORMATS[format_](root, spoil([two_episodes()])), root, **settings))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("limit", [1, 2**30], ids=["cached", "in memory"])
def test_the_data_that_the_table_spoils_are_in_order(tmp_path: Path, format_: str, limit: int) -> None:
    found = loaded(tmp_path / "root", format_, store_memory_limit=limit)
    rows = two_episodes()
    # Without next observations, nothing is known of what follows the last step before a time-out.
    num_rows = 39 if format_ in WITHOUT_NEXT else 40
    for name in ("obs", "new_obs", "rewards"):
        expected = rows[name][:num_rows].astype(np.float32)
        if name == "new_obs" and num_rows == 39:
            expected[19] = rows["obs"][19]  # Never bootstrapped from, since the episode has terminated.
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    assert np.flatnonzero(found["terminateds"]).tolist() == [19]


@pytest.mark.parametrize("format_", FORMATS)
def test_other_ways_to_write_the_same_data_change_nothing(tmp_path: Path, format_: str) -> None:
    expected = loaded(tmp_path / "expected", format_)
    ways: dict[str, Spoil] = {
        "rewards in a column of their own": whole(["rewards"], lambda values: values[:, None]),
        "flags as real numbers": whole(["terminateds", "truncateds"], lambda values: values.astype(np.float32)),
        "flags as integers": whole(["terminateds", "truncateds"], lambda values: values.astype(np.int64)),
        "actions as numbers": whole(["actions"], lambda values: values[:, 0]),
    }
    for way, spoil in ways.items():
        found = loaded(tmp_path / way, format_, spoil)
        for name in COLUMNS:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{way}, {name}")


@pytest.mark.parametrize("format_", FORMATS)
def test_an_episode_both_terminated_and_truncated_counts_as_terminated(tmp_path: Path, format_: str) -> None:
    found = loaded(tmp_path / "root", format_, at("terminateds", 39, True))
    assert np.flatnonzero(found["terminateds"]).tolist() == [19, 39]


@pytest.mark.parametrize("format_", MANY_FILES)
@pytest.mark.parametrize("empty_first", [False, True], ids=["after", "before"])
def test_a_file_without_rows_beside_others_changes_nothing(tmp_path: Path, format_: str, empty_first: bool) -> None:
    def beside_nothing(parts: list[Rows]) -> list[Rows]:
        empty = rows_in_order([])(parts)
        return empty + parts if empty_first else parts + empty

    expected, found = loaded(tmp_path / "expected", format_), loaded(tmp_path / "found", format_, beside_nothing)
    for name in COLUMNS:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("format_", [name for name in FORMATS if name != "minari"])
def test_pixels_stay_bytes_and_other_numbers_are_no_pixels(tmp_path: Path, format_: str) -> None:
    pixels = gym.spaces.Box(0, 255, (2,), np.uint8)
    as_bytes = whole(OBSERVATIONS, lambda values: (25 * values + 127).astype(np.uint8))
    expected = (25 * two_episodes()["obs"] + 127).astype(np.uint8)
    found = loaded(tmp_path / "bytes", format_, as_bytes, observation_space=pixels)
    assert found["obs"].dtype == np.uint8
    np.testing.assert_array_equal(found["obs"], expected[: len(found["obs"])])
    message = refusal(lambda: loaded(tmp_path / "reals", format_, observation_space=pixels))
    assert message is not None
    assert "observations are not the uint8 numbers of the observation space" in message[1]


# --- Faults of single formats, and of the way -------------------------------------------------------------------------


def edited_metadata(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def replaced(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            group = file["episode_1"]
            values = change(group[name][...])
            del group[name]
            group[name] = values

    return replace


BAD_MINARI: dict[str, tuple[Callable[[Path], None], str]] = {
    "no metadata": (
        lambda folder: (folder / "metadata.json").unlink(),
        "'bad/data-v0' cannot be opened .*damaged: del",
    ),
    "half the metadata": (lambda folder: half_of(folder / "metadata.json"), "'bad/data-v0' cannot be opened .*damaged"),
    "no data": (
        lambda folder: (folder / "main_data.hdf5").unlink(),
        "'bad/data-v0' cannot be opened .*damaged: delete",
    ),
    "steps that are no number": (
        edited_metadata(total_steps="many"),
        "'bad/data-v0' cannot be opened .*damaged: delete",
    ),
    "an episode too many": (edited_metadata(total_episodes=3), "Episode '2' of .* cannot be read .*damaged: delete"),
    "an episode too few": (edited_metadata(total_episodes=1), "20 steps in 1 episodes, and 40 by .*damaged: delete"),
    "no rewards at all": (
        replaced("rewards", lambda values: values[:0]),
        "Episode '1' .*has actions, and no `rewards`",
    ),
    "one reward": (replaced("rewards", lambda values: 1.0), "Episode '1' .*has actions, and no `rewards` of the same"),
    "no last observation": (
        replaced("observations", lambda values: values[:-1]),
        "Episode '1' .*has 20 rewards and 20 observations; there must be one observation more",
    ),
    "a flag too many": (
        replaced("truncations", lambda values: np.append(values, True)),
        r"`truncations` of episode '1' .*must be 20 booleans, one per reward, got bool of shape \(21,\); write or",
    ),
}


@pytest.mark.parametrize("name", BAD_MINARI)
def test_a_damaged_minari_dataset_is_refused(tmp_path: Path, name: str) -> None:
    damage, message = BAD_MINARI[name]
    input_ = write_minari(tmp_path, [two_episodes()])
    damage(tmp_path / "minari" / MINARI_ID / "data")
    found = refusal(lambda: load(input_, tmp_path))
    assert found is not None
    assert found[0] is ValueError
    assert re.search(message, found[1]), found[1]
    assert left_behind(tmp_path) == []


def test_a_view_on_a_missing_hdf5_file_is_refused_rather_than_read_as_zeros(tmp_path: Path) -> None:
    folder = FORMATS["hdf5"](tmp_path, [without(two_episodes(), "rewards")])
    layout = h5py.VirtualLayout((40,), "f8")
    layout[:] = h5py.VirtualSource("../rewards.hdf5", "rewards", (40,))
    with h5py.File(folder / "part-0.hdf5", "a") as file:
        file.create_virtual_dataset("rewards", layout)
    with pytest.raises(
        ValueError, match=r"`rewards` in .* is a view on '\.\./rewards\.hdf5', which is missing; bring that"
    ):
        load(folder, tmp_path)
    with h5py.File(tmp_path / "rewards.hdf5", "w") as file:
        file["rewards"] = two_episodes()["rewards"]
    np.testing.assert_array_equal(
        columns(load(folder, tmp_path))["rewards"], two_episodes()["rewards"].astype(np.float32)
    )


def test_numbers_that_change_behind_a_view_change_the_fingerprint(tmp_path: Path) -> None:
    folder = FORMATS["hdf5"](tmp_path, [without(two_episodes(), "rewards")])
    layout = h5py.VirtualLayout((40,), "f8")
    layout[:] = h5py.VirtualSource("../rewards.hdf5", "rewards", (40,))
    with h5py.File(folder / "part-0.hdf5", "a") as file:
        file.create_virtual_dataset("rewards", layout)
    fingerprints = set()
    for reward in (1.0, 2.0):
        with h5py.File(tmp_path / "rewards.hdf5", "w") as file:
            file["rewards"] = np.full(40, reward)
        fingerprints.add(open_input(str(folder))[0].fingerprint())
    assert len(fingerprints) == 2


def set_column(file: Path, name: str, values: list[Any], type_: Any = None) -> None:
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, pa.array(values, type_)), file)


@pytest.mark.parametrize(
    ("format_", "column", "change", "message"),
    [
        (
            "parquet",
            "eps_id",
            lambda ids: [*ids[:-1], None],
            "`eps_id` has no value in row 39 .*; give every row an id",
        ),
        (
            "parquet",
            "eps_id",
            lambda ids: [*([0.0] * 39), np.nan],
            "`eps_id` must be a whole number.*got nan in row 39",
        ),
        (
            "parquet",
            "actions",
            lambda rows: [*rows[:30], [None], *rows[31:]],
            "`actions` has a list with a missing .*30",
        ),
        ("rllib rows", "obs", lambda rows: [*rows[:-1], "text"], "`obs` holds text that RLlib's recorder did not pack"),
        (
            "rllib rows",
            "obs",
            lambda rows: [compression.pack({"a": np.zeros(2)})] * len(rows),
            "`obs` must hold arrays of numbers, got object .*record flat observations, with .*`FlattenObservations`",
        ),
        (
            "rllib rows",
            "obs",
            lambda rows: [*rows[:-1], compression.pack(np.zeros(2, np.int64))],
            "`obs` has rows of the types float32 and int64, at or after row 32 .*; store it in one type",
        ),
        (
            "rllib episodes",
            "item",
            lambda items: [items[0], None],
            r"no episode that RLlib packed in row 1 .*record the",
        ),
        (
            "rllib episodes",
            "item",
            lambda items: [items[0], b"\xc1"],
            r"no episode that RLlib packed in row 1 .*record",
        ),
        (
            "rllib episodes",
            "item",
            lambda items: [items[0], items[1][:99]],
            r"no episode that RLlib packed in row 1 .*re",
        ),
    ],
)
def test_values_that_mean_nothing_are_refused(
    tmp_path: Path, format_: str, column: str, change: Callable[[list[Any]], list[Any]], message: str
) -> None:
    folder = FORMATS[format_](tmp_path, [two_episodes()])
    file = folder / "part-0.parquet"
    set_column(file, column, change(pq.read_table(file)[column].to_pylist()))
    found = refusal(lambda: load(folder, tmp_path))
    assert found is not None
    assert found[0] is ValueError
    assert re.search(message, found[1]), found[1]
    assert left_behind(tmp_path) == []


def test_a_step_of_the_user_s_pipeline_that_fails_is_reported_with_its_reason(tmp_path: Path) -> None:
    def fail(batch: Any) -> Any:
        raise RuntimeError("no such joint")

    dataset = ray.data.from_arrow(arrow_table(two_episodes())).map_batches(fail)
    with pytest.raises(ValueError, match=r"ray\.data\.Dataset cannot be read .*try `dataset\.materialize\(\)`"):
        load(dataset, tmp_path)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("obs,actions")
    with pytest.raises(ValueError, match=r"rows\.txt' is of no format that can be read; `input_` takes `minari:"):
        load(tmp_path / "rows.txt", tmp_path)
    with pytest.raises(ValueError, match=r"is empty: there is no `\*\.parquet`, "):
        load(tmp_path, tmp_path)
    with pytest.raises(TypeError, match=r"`input_` must be a string, a path, .* got 7"):
        load(7, tmp_path)


@pytest.mark.parametrize("format_", MANY_FILES)
def test_a_file_that_vanishes_after_it_was_opened_is_named(tmp_path: Path, format_: str) -> None:
    folder = FORMATS[format_](tmp_path, [two_episodes()])
    data = CalQLOfflineData(CalQLConfig().offline_data(input_=folder, store_memory_limit=1, **cache_of(tmp_path)))
    for file in folder.iterdir():
        file.unlink()
    store = TransitionStore(obs_dim=2, action_dim=1, online_capacity=1, seed=0)
    with pytest.raises(FileNotFoundError, match="part-0"):
        data.load(store, AddReturnsToGo(RewardSettings(0.9)), **SPACES)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("bad", ["npz", "minari", "ray data"])
def test_the_bad_one_of_several_inputs_is_named_and_the_good_one_leaves_nothing(tmp_path: Path, bad: str) -> None:
    good = FORMATS["parquet"](tmp_path, [two_episodes()])
    (tmp_path / "other").mkdir()
    fault = FAULTS["nan in actions"]
    bad_input = FORMATS[bad](tmp_path if bad == "minari" else tmp_path / "other", fault.spoil([two_episodes()]))
    found = refusal(lambda: load([good, bad_input], tmp_path))
    assert found is not None
    assert found[0] is ValueError
    assert re.search(pattern(fault, bad), found[1]), found[1]
    assert left_behind(tmp_path) == []


def _load_on_a_full_disk(input_: Any, root: Path, max_bytes: int, answer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    answer.send(refusal(lambda: load(input_, root)))


@pytest.mark.parametrize(
    ("format_", "max_bytes"),
    [*((name, 64) for name in FORMATS if name != "ray data"), ("parquet", 0), ("parquet", 512), ("parquet", 900)],
)
def test_a_disk_that_fills_while_the_cache_is_written_is_reported_and_left_clean(
    tmp_path: Path, format_: str, max_bytes: int
) -> None:
    input_ = FORMATS[format_](tmp_path, [two_episodes()])
    CalQLConfig()  # Registers the algorithm with Ray, which a forked process cannot do.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_load_on_a_full_disk, args=(input_, tmp_path, max_bytes, sender))
    process.start()
    assert receiver.poll(30)
    found = receiver.recv()
    process.join(30)
    assert found is not None
    assert found[0] is OSError
    message = "There is no room for the offline data in .*cache .*set `cache_dir` to a folder on a larger disk"
    assert re.search(message, found[1]), found[1]
    assert left_behind(tmp_path) == []
    assert load(input_, tmp_path).num_offline == (39 if format_ in WITHOUT_NEXT else 40)


# --- At build ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format_", "name"),
    [
        ("minari", "missing"),
        ("hdf5", "half a file"),
        ("npz", "the flag 0.5"),
        ("parquet", "an id of another file's episode"),
        ("rllib episodes", "ragged observations"),
        ("episodes", "action out of bounds"),
        ("ray data", "a column that another file lacks"),
    ],
)
def test_the_algorithm_is_not_built_on_faulty_data(tmp_path: Path, format_: str, name: str) -> None:
    fault = FAULTS[name]
    config = (
        CalQLConfig()
        .environment(observation_space=SPACE, action_space=ACTIONS)
        .offline_data(input_=written(tmp_path, format_, fault), store_memory_limit=1, **cache_of(tmp_path))
        .fine_tuning(offline_updates=1)
        .rl_module(model_config={"actor_hiddens": [8], "critic_hiddens": [8]})
    )
    found = refusal(config.build)
    assert found is not None
    assert found[0] in REFUSALS, found
    assert re.search(pattern(fault, format_), found[1]), found[1]
    assert left_behind(tmp_path) == []
