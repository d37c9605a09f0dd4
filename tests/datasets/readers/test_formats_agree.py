"""One data set, PointMaze, in every format that can be read: the columns of the store are the same bit for bit.

What they must be is computed here from Minari's own episodes with plain NumPy and loops. Most files are written by the
libraries of their formats, as other projects write them; the others by this package's writers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import robot_files
import yaml
from pyarrow import fs
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.compression import pack

from rllib_calql import CalQLConfig, EpisodeLog
from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets import convert, generate
from rllib_calql.datasets.episodes.reader import DROPPED_STEPS, REPEATED
from rllib_calql.datasets.writers import file_formats
from rllib_calql.networks.actor_critic import DATA_ACTION_LIMIT
from rllib_calql.store.offline_data import CalQLOfflineData
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo

pytest.importorskip("gymnasium_robotics")
pytest.importorskip("mujoco")

Arrays = dict[str, Any]

DATASET_ID = "formats/maze-v0"
MAZE = f"minari:{DATASET_ID}"
KEYS = ("achieved_goal", "desired_goal", "observation")  # Sorted, as RLlib flattens a Dict.
STEP_COLUMNS = (Columns.OBS, Columns.ACTIONS, Columns.REWARDS, Columns.TERMINATEDS, Columns.RETURNS_TO_GO)
GAMMA, SCALE, BIAS = 0.99, 10.0, -1.0


@pytest.fixture
def episodes() -> list[Any]:
    """Episodes as Minari yields them; the data are made once per session."""
    if DATASET_ID not in minari.list_local_datasets():
        generate("rllib-calql/pointmaze-umaze-play-v0", num_steps=1_200, save_as=DATASET_ID)
    loaded = list(minari.load_dataset(DATASET_ID).iterate_episodes())
    assert {bool(episode.terminations[-1]) for episode in loaded} == {True, False}
    return loaded


# --- What the columns must be -----------------------------------------------------------------------------------------


def flat(observations: Arrays) -> np.ndarray:
    return np.concatenate([observations[key] for key in KEYS], axis=1)


def expected_columns(episodes: list[Any]) -> Arrays:
    """The store's columns by a loop over Minari's episodes."""
    columns: dict[str, list[Any]] = {name: [] for name in (*STEP_COLUMNS, Columns.NEXT_OBS)}
    for episode in episodes:
        obs = flat(episode.observations)
        columns[Columns.OBS] += list(obs[:-1])
        columns[Columns.NEXT_OBS] += list(obs[1:])
        columns[Columns.ACTIONS] += list(np.clip(episode.actions, -DATA_ACTION_LIMIT, DATA_ACTION_LIMIT))
        rewards = [SCALE * float(reward) + BIAS for reward in episode.rewards]
        columns[Columns.REWARDS] += rewards
        columns[Columns.TERMINATEDS] += [float(flag) for flag in episode.terminations]
        returns, following = [], 0.0
        for reward in reversed(rewards):
            following = reward + GAMMA * following
            returns.append(following)
        columns[Columns.RETURNS_TO_GO] += returns[::-1]
    stored_doubles = (Columns.OBS, Columns.NEXT_OBS)
    return {
        name: np.array(values, np.float64 if name in stored_doubles else np.float32) for name, values in columns.items()
    }


def load(input_: Any, action_space: gym.spaces.Box | None = None, **settings: Any) -> tuple[Arrays, CalQLOfflineData]:
    """The store's columns, as training reads them."""
    dataset = minari.load_dataset(DATASET_ID)
    space = dataset.observation_space
    store = TransitionStore(obs_dim=gym.spaces.flatdim(space), action_dim=2, online_capacity=1, seed=0)
    data = CalQLOfflineData(CalQLConfig().offline_data(input_=input_, **settings))
    connector = AddReturnsToGo(RewardSettings(GAMMA, reward_scale=SCALE, reward_bias=BIAS))
    data.load(store, connector, observation_space=space, action_space=action_space or dataset.action_space)
    assert store.offline is not None
    return {name: store.offline.column(name) for name in (*STEP_COLUMNS, Columns.NEXT_OBS)}, data


def assert_bit_identical(columns: Arrays, expected: Arrays) -> None:
    for name, values in columns.items():
        assert (values.dtype, values.shape) == (expected[name].dtype, expected[name].shape), name
        assert values.tobytes() == expected[name].tobytes(), name


def test_minari_data_are_what_a_loop_over_the_episodes_gives(episodes: list[Any]) -> None:
    columns, _ = load(MAZE)
    expected = expected_columns(episodes)
    # The package sums discounted rewards in another order than the loop.
    np.testing.assert_allclose(columns.pop(Columns.RETURNS_TO_GO), expected[Columns.RETURNS_TO_GO], rtol=1e-6)
    assert_bit_identical(columns, expected)


# --- The same data in other formats -----------------------------------------------------------------------------------


def rows_of(episodes: list[Any]) -> Arrays:
    """One row per step, by RLlib's names, with flat observations."""
    observations = [flat(episode.observations) for episode in episodes]
    lengths = [len(episode.rewards) for episode in episodes]
    return {
        "eps_id": np.repeat(np.arange(len(episodes)), lengths),
        "t": np.concatenate([np.arange(length) for length in lengths]),
        "obs": np.concatenate([obs[:-1] for obs in observations]),
        "actions": np.concatenate([episode.actions for episode in episodes]),
        "rewards": np.concatenate([episode.rewards for episode in episodes]),
        "new_obs": np.concatenate([obs[1:] for obs in observations]),
        "terminateds": np.concatenate([episode.terminations for episode in episodes]),
        "truncateds": np.concatenate([episode.truncations for episode in episodes]),
    }


def nested_observations(episodes: list[Any], *, following: bool) -> Arrays:
    rows = slice(1, None) if following else slice(None, -1)
    return {key: np.concatenate([episode.observations[key][rows] for episode in episodes]) for key in KEYS}


def table_of(rows: Arrays) -> pa.Table:
    columns = {}
    for name, values in rows.items():
        number = pa.from_numpy_dtype(values.dtype)
        columns[name] = pa.array(values.tolist(), pa.list_(number) if values.ndim > 1 else number)
    return pa.table(columns)


def without(rows: Arrays, *names: str) -> Arrays:
    return {name: values for name, values in rows.items() if name not in names}


def d4rl_names(rows: Arrays) -> Arrays:
    names = {"obs": "observations", "new_obs": "next_observations"}
    names |= {"terminateds": "terminals", "truncateds": "timeouts"}
    return {names.get(name, name): values for name, values in without(rows, "eps_id", "t").items()}


def parquet_file(episodes: list[Any], folder: Path) -> Path:
    pq.write_table(table_of(rows_of(episodes)), folder / "rows.parquet", row_group_size=100)
    return folder / "rows.parquet"


def parquet_parts_that_cut_episodes(episodes: list[Any], folder: Path) -> Path:
    table = table_of(rows_of(episodes))
    for part, start in enumerate(range(0, len(table), 97)):  # More than ten, so that part-10 follows part-9.
        pq.write_table(table.slice(start, 97), folder / f"part-{part}.parquet")
    assert (folder / "part-11.parquet").exists()
    return folder


def parquet_in_any_order(episodes: list[Any], folder: Path) -> Path:
    rows = rows_of(episodes)
    order = np.random.default_rng(0).permutation(len(rows["t"]))
    # Episodes are numbered by their first rows, so those come first.
    order = np.concatenate([np.flatnonzero(rows["t"] == 0), order[rows["t"][order] > 0]])
    pq.write_table(table_of(rows).take(order), folder / "rows.parquet")
    return folder


def parquet_without_ids(episodes: list[Any], folder: Path) -> Path:
    pq.write_table(table_of(without(rows_of(episodes), "eps_id", "t")), folder / "rows.parquet")
    return folder


def parquet_with_structs(episodes: list[Any], folder: Path) -> Path:
    columns = table_of(rows_of(episodes))
    for name, following in (("obs", False), ("new_obs", True)):
        nested = nested_observations(episodes, following=following)
        struct = pa.StructArray.from_arrays(
            [pa.FixedSizeListArray.from_arrays(pa.array(v.ravel()), v.shape[1]) for v in nested.values()], list(nested)
        )
        columns = columns.set_column(columns.schema.get_field_index(name), name, struct)
    pq.write_table(columns, folder / "rows.parquet")
    return folder


def parquet_behind_a_uri(episodes: list[Any], folder: Path) -> str:
    return parquet_file(episodes, folder).as_uri()


def hdf5_of_d4rl(episodes: list[Any], folder: Path) -> Path:
    with h5py.File(folder / "maze.hdf5", "w") as file:
        for name, values in d4rl_names(rows_of(episodes)).items():
            file.create_dataset(name, data=values, compression="gzip")
    return folder / "maze.hdf5"


def hdf5_of_groups_and_other_names(episodes: list[Any], folder: Path) -> Path:
    rows = rows_of(episodes)
    with h5py.File(folder / "maze.h5", "w") as file:
        for name, following in (("observation", False), ("next_observation", True)):
            for key, values in nested_observations(episodes, following=following).items():
                file[f"{name}/{key}"] = values
        for name, column in {
            "action": rows["actions"],
            "reward": rows["rewards"][:, None],
            "terminations": rows["terminateds"].astype(np.int64),
            "truncations": rows["truncateds"].astype(np.float32),
            "episode_ids": rows["eps_id"].astype(np.float64),
        }.items():
            file[name] = column
    return folder / "maze.h5"


def npz(episodes: list[Any], folder: Path) -> Path:
    np.savez(folder / "maze.npz", **d4rl_names(rows_of(episodes)))
    return folder / "maze.npz"


def npz_compressed(episodes: list[Any], folder: Path) -> Path:
    np.savez_compressed(folder / "maze.npz", **d4rl_names(rows_of(episodes)))
    return folder / "maze.npz"


def npz_of_ogbench(episodes: list[Any], folder: Path) -> Path:
    """There `terminals` are the ends of trajectories, and `masks` tell terminations."""
    columns = d4rl_names(rows_of(episodes))
    terminated, cut = columns.pop("terminals"), columns.pop("timeouts")
    np.savez(folder / "maze.npz", **columns, terminals=(terminated | cut).astype(np.float32), masks=1.0 - terminated)
    return folder / "maze.npz"


def csv_with_ids(episodes: list[Any], folder: Path) -> Path:
    rows = without(rows_of(episodes), "t")
    return robot_files.write_csv_folder(folder, [rows], robot_files.csv_map(rows))


def csv_file_per_episode_with_a_dict(episodes: list[Any], folder: Path) -> Path:
    """Semicolons and decimal commas, times in seconds, and a map elsewhere than the data."""
    (folder / "logs").mkdir()
    rows = rows_of(episodes)
    columns = {"time": rows["t"] * 0.1}
    for prefix, following in (("", False), ("next ", True)):
        for key, values in nested_observations(episodes, following=following).items():
            columns |= {f"{prefix}{key}/{i}": values[:, i] for i in range(values.shape[1])}
    columns |= {f"force {i}": rows["actions"][:, i] for i in range(2)}
    columns |= {"r": rows["rewards"], "success": rows["terminateds"], "cut": rows["truncateds"], "note": rows["t"]}
    for id_ in range(len(episodes)):
        of_episode = np.flatnonzero(rows["eps_id"] == id_)
        cells = [[repr(values[row].item()).replace(".", ",") for values in columns.values()] for row in of_episode]
        lines = [";".join(row) for row in [list(columns), *cells]]
        (folder / "logs" / f"run-{id_}.csv").write_text("\n".join(lines))
    widths = {key: episodes[0].observations[key].shape[1] for key in KEYS}
    described: Arrays = {
        key: {name: [f"{prefix}{name}/{i}" for i in range(width)] for name, width in widths.items()}
        for key, prefix in (("obs", ""), ("next_obs", "next "))
    }
    described |= {"actions": ["force 0", "force 1"], "rewards": "r", "t": "time", "decimal": ",", "data": "logs"}
    described |= {"terminated": "success", "truncated": "cut"}
    (folder / "map.yaml").write_text(yaml.safe_dump(described))
    return folder / "map.yaml"


def robomimic_with_dones(episodes: list[Any], folder: Path) -> Path:
    robot_files.write_robomimic(folder / "maze.hdf5", without(rows_of(episodes), "t"), has_flags=False)
    return folder


def robomimic_of_parts_and_flags(episodes: list[Any], folder: Path) -> Path:
    robot_files.write_robomimic(folder / "maze.hdf5", without(rows_of(episodes), "t"))
    with h5py.File(folder / "maze.hdf5", "a") as file:
        for number, episode in enumerate(episodes):
            for group, rows in (("obs", slice(None, -1)), ("next_obs", slice(1, None))):
                del file[f"data/demo_{number}/{group}/state"]
                for key in KEYS:
                    file[f"data/demo_{number}/{group}/{key}"] = episode.observations[key][rows]
    return folder / "maze.hdf5"


def replay_buffer_of_stable_baselines3(episodes: list[Any], folder: Path) -> Path:
    """One environment, whose episodes follow each other; the buffer has wrapped round within an episode."""
    rows = rows_of(episodes) | {"eps_id": np.zeros(sum(len(episode.rewards) for episode in episodes), dtype=int)}
    robot_files.write_stable_baselines3(folder / "buffer.npz", rows)
    with np.load(folder / "buffer.npz") as buffer:
        wrapped = {name: np.roll(values, 7, axis=0) for name, values in buffer.items()}
    np.savez(folder / "buffer.npz", **wrapped, pos=7, full=True)
    return folder / "buffer.npz"


def d3rlpy(episodes: list[Any], folder: Path) -> Path:
    robot_files.write_d3rlpy(folder / "maze.h5", rows_of(episodes))
    return folder / "maze.h5"


def lerobot(episodes: list[Any], folder: Path) -> Path:
    return robot_files.write_lerobot(folder, [without(rows_of(episodes), "t")])


def recorded_rows(episodes: list[Any], folder: Path, packed: Callable[[Any], Any] = list) -> Path:
    """Rows as RLlib's recorder writes them, behind `FlattenObservations` but for the conversion to float32."""
    rows = without(rows_of(episodes), "t")
    columns = {name: list(values) for name, values in rows.items()}
    for name in ("obs", "new_obs"):
        columns[name] = [packed(value) for value in columns[name]]
    columns |= {"eps_id": [f"{id_:032x}" for id_ in rows["eps_id"]]}
    columns |= {name: [None] * len(rows["obs"]) for name in ("agent_id", "module_id")}
    pq.write_table(pa.table(columns), folder / "000001_000000-0.parquet")
    return folder


def recorded_rows_packed(episodes: list[Any], folder: Path) -> Path:
    return recorded_rows(episodes, folder, packed=pack)


def recorded_episodes(episodes: list[Any], folder: Path, action_space: gym.Space[Any] | None = None) -> Path:
    """Episodes as RLlib's recorder packs them, with dict observations."""
    msgpack, msgpack_numpy = pytest.importorskip("msgpack"), pytest.importorskip("msgpack_numpy")
    items = [
        msgpack.packb(episode.get_state(), default=msgpack_numpy.encode)
        for episode in single_agent_episodes(episodes, action_space=action_space)
    ]
    pq.write_table(pa.table({"item": pa.array(items, pa.binary())}), folder / "000001_000000-0.parquet")
    return folder


def single_agent_episodes(
    episodes: list[Any], _: Any = None, action_space: gym.Space[Any] | None = None
) -> list[SingleAgentEpisode]:
    """Episodes of lists, as an env runner makes them."""
    dataset = minari.load_dataset(DATASET_ID)
    made = []
    for episode in episodes:
        length = len(episode.rewards)
        made.append(
            SingleAgentEpisode(
                observations=[{key: episode.observations[key][t] for key in KEYS} for t in range(length + 1)],
                observation_space=dataset.observation_space,
                infos=[{}] * (length + 1),
                actions=list(episode.actions),
                action_space=action_space or dataset.action_space,
                rewards=episode.rewards.tolist(),
                terminated=bool(episode.terminations[-1]),
                truncated=bool(episode.truncations[-1]),
                len_lookback_buffer=0,
            )
        )
    return made


def chunks_of_episodes(episodes: list[Any], _: Any) -> list[SingleAgentEpisode]:
    """Each episode in two parts, as `sample(num_timesteps=...)` gives them."""
    chunks = []
    for episode in single_agent_episodes(episodes):
        first = episode[: len(episode) // 2]
        chunks += [first, episode[len(first) :]]
    return chunks


def ray_dataset(episodes: list[Any], _: Path) -> Any:
    return ray.data.from_arrow(table_of(rows_of(episodes)))


def episode_log(episodes: list[Any], folder: Path) -> Path:
    """As a control loop logs them: the system did something else than it was asked for."""
    with EpisodeLog(folder / "log") as log:
        for episode in episodes:
            states = [{key: episode.observations[key][t] for key in KEYS} for t in range(len(episode.rewards) + 1)]
            log.reset(states[0])
            for t, executed in enumerate(episode.actions):
                ends = bool(episode.terminations[t]), bool(episode.truncations[t])
                log.step(executed * 0.5, float(episode.rewards[t]), *ends, states[t + 1], executed_action=executed)
    return folder / "log"


def executed_actions_in_parquet(episodes: list[Any], folder: Path) -> Path:
    rows = rows_of(episodes)
    rows |= {"executed_actions": rows["actions"], "actions": rows["actions"] * np.float32(0.5)}
    pq.write_table(table_of(rows), folder / "rows.parquet")
    return folder


def written_here(target: str) -> Callable[[list[Any], Path], str]:
    def write(_: list[Any], folder: Path) -> str:
        scheme, _, name = target.rpartition(":")
        to = target if scheme == "minari" else f"{scheme}{':' if scheme else ''}{folder}/{name}"
        convert(MAZE, to, overwrite=True)
        return to if scheme == "minari" else f"{folder}/{name}"

    write.__name__ = f"written here as {target}"
    return write


FORMATS = [
    *map(written_here, ("rows.parquet", "data.hdf5", "data.npz", "minari:formats/converted-v0", "robomimic:a.h5")),
    parquet_file,
    parquet_parts_that_cut_episodes,
    parquet_in_any_order,
    parquet_without_ids,
    parquet_with_structs,
    parquet_behind_a_uri,
    hdf5_of_d4rl,
    hdf5_of_groups_and_other_names,
    npz,
    npz_compressed,
    npz_of_ogbench,
    csv_with_ids,
    csv_file_per_episode_with_a_dict,
    robomimic_with_dones,
    robomimic_of_parts_and_flags,
    replay_buffer_of_stable_baselines3,
    recorded_rows,
    recorded_rows_packed,
    recorded_episodes,
    single_agent_episodes,
    chunks_of_episodes,
    episode_log,
    executed_actions_in_parquet,
]


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__.replace("_", " "))
def test_every_format_gives_the_columns_of_minari_bit_for_bit(
    tmp_path: Path, episodes: list[Any], write: Callable[[list[Any], Path], Any]
) -> None:
    columns, data = load(write(episodes, tmp_path))
    assert_bit_identical(columns, load(MAZE)[0])
    assert data.report is not None
    assert data.report.remarks == {}


def test_a_ray_dataset_gives_the_columns_of_minari_bit_for_bit(
    ray_session: None, tmp_path: Path, episodes: list[Any]
) -> None:
    assert_bit_identical(load(ray_dataset(episodes, tmp_path))[0], load(MAZE)[0])


def test_a_folder_of_several_parts_written_here_gives_the_columns_of_minari(
    tmp_path: Path, episodes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rllib_calql.datasets.episodes.chunks._BLOCK_BYTES", 1)
    monkeypatch.setattr("rllib_calql.datasets.writers.writers._PIECE_BYTES", 1)
    monkeypatch.setattr(file_formats, "_PART_BYTES", 1)
    convert(MAZE, f"{tmp_path}/parts/")
    assert len(list((tmp_path / "parts").iterdir())) == len(episodes) > 1
    assert_bit_identical(load(tmp_path / "parts")[0], load(MAZE)[0])


@pytest.mark.parametrize("write", [parquet_file, hdf5_of_d4rl, npz], ids=["Parquet", "HDF5", "npz"])
def test_a_file_system_handed_over_gives_the_columns_of_minari(
    tmp_path: Path, episodes: list[Any], write: Callable[[list[Any], Path], Path]
) -> None:
    name = write(episodes, tmp_path).name
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    assert_bit_identical(load(name, input_filesystem=filesystem)[0], load(MAZE)[0])


@pytest.mark.parametrize("input_", [MAZE, "parquet"])
def test_columns_in_mapped_files_are_those_in_memory(tmp_path: Path, episodes: list[Any], input_: str) -> None:
    source = parquet_file(episodes, tmp_path) if input_ == "parquet" else input_
    for _ in range(2):  # Built, then found in the cache.
        columns, data = load(source, store_memory_limit=1, cache_dir=tmp_path / "cache")
        assert data.store is not None
        assert data.store.offline is not None
        assert data.store.offline.is_mapped
        assert_bit_identical(columns, load(MAZE)[0])


# --- Where a format cannot hold the same ------------------------------------------------------------------------------


def hdf5_without_next_observations(episodes: list[Any], folder: Path) -> Path:
    with h5py.File(folder / "maze.hdf5", "w") as file:
        for name, values in without(d4rl_names(rows_of(episodes)), "next_observations").items():
            file[name] = values
    return folder / "maze.hdf5"


def parquet_without_next_observations(episodes: list[Any], folder: Path) -> Path:
    pq.write_table(table_of(without(rows_of(episodes), "new_obs")), folder / "rows.parquet")
    return folder


def written_here_as_lerobot(_: list[Any], folder: Path) -> str:
    convert(MAZE, f"lerobot:{folder}/maze")
    return f"{folder}/maze"


WITHOUT_NEXT_OBSERVATIONS = [
    hdf5_without_next_observations,
    parquet_without_next_observations,
    d3rlpy,
    lerobot,
    written_here_as_lerobot,
]


@pytest.mark.parametrize(
    "write", WITHOUT_NEXT_OBSERVATIONS, ids=["HDF5", "Parquet", "d3rlpy", "LeRobot", "LeRobot here"]
)
def test_without_next_observations_only_those_after_the_ends_differ_if_they_are_repeated(
    tmp_path: Path, episodes: list[Any], write: Callable[[list[Any], Path], Path]
) -> None:
    columns, data = load(write(episodes, tmp_path), missing_final_observation="repeat")
    expected = load(MAZE)[0]
    ends = np.cumsum([len(episode.rewards) for episode in episodes]) - 1
    next_obs = expected[Columns.NEXT_OBS].copy()
    next_obs[ends] = expected[Columns.OBS][ends]
    assert_bit_identical(columns, expected | {Columns.NEXT_OBS: next_obs})
    assert data.report is not None
    assert data.report.remarks == {REPEATED: len(episodes)}


@pytest.mark.parametrize(
    "write", WITHOUT_NEXT_OBSERVATIONS, ids=["HDF5", "Parquet", "d3rlpy", "LeRobot", "LeRobot here"]
)
def test_without_next_observations_the_last_steps_before_time_outs_are_missing_if_they_are_dropped(
    tmp_path: Path, episodes: list[Any], write: Callable[[list[Any], Path], Path]
) -> None:
    columns, data = load(write(episodes, tmp_path))
    expected = load(MAZE)[0]
    ends = np.cumsum([len(episode.rewards) for episode in episodes]) - 1
    was_terminated = np.array([bool(episode.terminations[-1]) for episode in episodes])
    kept = np.delete(np.arange(ends[-1] + 1), ends[~was_terminated])
    next_obs = expected[Columns.NEXT_OBS].copy()
    next_obs[ends[was_terminated]] = expected[Columns.OBS][ends[was_terminated]]
    # The dropped reward is missing from the returns of its episode, so these are those of a loop over the rest.
    del columns[Columns.RETURNS_TO_GO]
    expected = expected | {Columns.NEXT_OBS: next_obs}
    assert_bit_identical(columns, {name: values[kept] for name, values in expected.items()})
    assert data.report is not None
    assert data.report.remarks == {
        DROPPED_STEPS: int((~was_terminated).sum()),
        REPEATED: int(was_terminated.sum()),
    }


@pytest.mark.parametrize("kind", ["rows", "episodes"])
def test_module_actions_are_those_of_the_environment_up_to_rounding(
    tmp_path: Path, episodes: list[Any], kind: str
) -> None:
    """In PointMaze's bounds, [-1, 1], both are one. For others the mapping is computed, and rounded to float32."""
    space = gym.spaces.Box(np.float32([-3.0, 0.0]), np.float32([1.0, 0.5]))
    rows = d4rl_names(rows_of(episodes))
    rows["actions"] = (space.low + (rows["actions"] + 1.0) * (space.high - space.low) / 2.0).astype(np.float32)
    np.savez(tmp_path / "environment.npz", **rows)
    from_environment = load(tmp_path / "environment.npz", space)[0]
    (tmp_path / "recorded").mkdir()
    if kind == "episodes":
        recorded = recorded_episodes(episodes, tmp_path / "recorded", action_space=space)
    else:
        recorded = recorded_rows_packed(episodes, tmp_path / "recorded")
    from_module = load(recorded, space)[0]
    rounding = 4 * np.finfo(np.float32).eps  # Of actions in [-3, 1], mapped to [-1, 1].
    np.testing.assert_allclose(
        from_environment.pop(Columns.ACTIONS), from_module.pop(Columns.ACTIONS), rtol=0, atol=rounding
    )
    assert_bit_identical(from_environment, from_module)


def test_observations_that_rllib_flattened_are_the_same_rounded_to_float32(tmp_path: Path, episodes: list[Any]) -> None:
    columns = load(recorded_rows(episodes, tmp_path, packed=lambda obs: pack(obs.astype(np.float32))))[0]
    expected = load(MAZE)[0]
    rounded = {name: expected[name].astype(np.float32) for name in (Columns.OBS, Columns.NEXT_OBS)}
    assert_bit_identical(columns, expected | rounded)
