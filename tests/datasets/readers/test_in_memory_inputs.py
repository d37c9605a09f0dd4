"""Episodes and data sets that are handed over as Python objects are read like files of the same rows."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data
from ray.rllib.core.columns import Columns
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.common.held_data import with_handles
from rllib_calql.datasets import InMemoryDataset, InMemoryEpisodes, ReadOptions, open_input
from rllib_calql.datasets.episodes.reader import TRUNCATED


def make_episode(length: int, *, id_: str = "a", start: int = 0, end: str = "terminated", lookback: int = 0) -> Any:
    """Steps `start` to `start + length` of a count: observation [t, -t], action [t / 8], reward t."""
    times = np.arange(start - lookback, start + length + 1)
    return SingleAgentEpisode(
        id_=id_,
        observations=[np.array([t, -t], np.float32) for t in times],
        actions=[np.array([t / 8], np.float32) for t in times[:-1]],
        rewards=[float(t) for t in times[:-1]],
        infos=[{} for _ in times],
        extra_model_outputs={"vf_preds": [0.5 * t for t in times[:-1]], "state": [{"h": t} for t in times[:-1]]},
        terminated=end == "terminated",
        truncated=end == "truncated",
        t_started=start,
        len_lookback_buffer=lookback,
    )


class LostWithItsSession:
    """Can be pickled and never unpickled."""

    def __reduce__(self) -> Any:
        return fail, ()


def fail() -> None:
    raise OSError("gone")


def read(input_: Any, **options: Any) -> list[SingleAgentEpisode]:
    return [episode for reader in open_input(input_, ReadOptions(**options)) for episode in reader]


def assert_counts(episode: SingleAgentEpisode, length: int) -> None:
    times = np.arange(length + 1)
    np.testing.assert_array_equal(episode.get_observations(), np.stack([times, -times], axis=1).astype(np.float32))
    np.testing.assert_array_equal(episode.get_actions(), times[:-1, None].astype(np.float32) / 8)
    np.testing.assert_array_equal(episode.get_rewards(), times[:-1])
    assert episode.get_observations().dtype == np.float32
    assert episode.get_rewards().dtype == np.float64


# --- Episodes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_numpy", [False, True], ids=["lists", "arrays"])
@pytest.mark.parametrize("lookback", [0, 2])
def test_episodes_of_lists_and_of_arrays_are_read_without_their_lookback(is_numpy: bool, lookback: int) -> None:
    episode = make_episode(5, lookback=lookback)
    if is_numpy:
        episode = episode.to_numpy()
    (read_back,) = read(episode)
    assert_counts(read_back, 5)
    assert (read_back.is_terminated, read_back.is_truncated) == (True, False)
    np.testing.assert_array_equal(read_back.get_extra_model_outputs("vf_preds"), 0.5 * np.arange(5))


def test_reading_leaves_the_episodes_as_they_were() -> None:
    episode = make_episode(3)
    read([episode])
    assert not episode.is_numpy


@pytest.mark.parametrize("lookback", [0, 1])
def test_chunks_of_episodes_are_joined_even_if_they_alternate(lookback: int) -> None:
    chunks = [
        make_episode(2, id_="a", end=""),
        make_episode(3, id_="b", end=""),
        make_episode(2, id_="b", start=3, end="truncated", lookback=lookback),
        make_episode(4, id_="a", start=2, lookback=lookback).to_numpy(),
    ]
    first, second = read(chunks)
    assert (first.id_, second.id_) == ("b", "a")  # In the order of their ends.
    assert_counts(first, 5)
    assert_counts(second, 6)
    assert (first.is_truncated, second.is_terminated) == (True, True)


def test_a_cut_of_a_running_episode_is_joined_with_what_follows() -> None:
    episode = SingleAgentEpisode(observations=[np.zeros(2, np.float32)], observation_space=gym.spaces.Box(-9, 9, (2,)))
    chunks = []
    for t in range(7):
        if t in (3, 5):
            chunks.append(episode)
            episode = episode.cut(len_lookback_buffer=2)
        episode.add_env_step(
            np.array([t + 1, -t - 1], np.float32), np.array([t / 8], np.float32), float(t), terminated=t == 6
        )
    (joined,) = read([*chunks, episode])
    assert_counts(joined, 7)


def test_a_missing_chunk_is_named() -> None:
    chunks = [make_episode(2, end=""), make_episode(2, start=3)]
    with pytest.raises(
        ValueError, match=r"'a' are out of order or missing: its chunk in entry 1 .* step 3, expected 2"
    ):
        read(chunks)


def test_an_id_that_occurs_twice_is_named_with_both_places() -> None:
    with pytest.raises(ValueError, match=r"'a' goes on after its end, or occurs twice: it ended in entry 0 .*entry 1"):
        read([make_episode(2), make_episode(3)])


def test_unfinished_episodes_follow_the_options() -> None:
    episodes = [make_episode(3, id_="open", end=""), make_episode(2, id_="whole")]
    with pytest.raises(
        ValueError, match=r"'open' ends neither .*step 2 of entry 0.*`unfinished_episodes=\"truncate\"`"
    ):
        read(episodes)
    assert [episode.id_ for episode in read(episodes, unfinished_episodes="drop")] == ["whole"]
    (reader,) = open_input(episodes, ReadOptions(unfinished_episodes="truncate"))
    assert {episode.id_: episode.is_truncated for episode in reader} == {"open": True, "whole": False}
    assert reader.remarks == {TRUNCATED: 1}


def test_dict_observations_keep_their_structure() -> None:
    obs = [{"b": np.array([t, 1.0]), "a": np.array([t], np.uint8)} for t in range(4)]
    episode = SingleAgentEpisode(
        observations=obs,
        actions=[0, 2, 1],
        rewards=[0, 0, 1],
        terminated=True,
        infos=[{}] * 4,
        len_lookback_buffer=0,
    )
    (read_back,) = read(episode)
    np.testing.assert_array_equal(read_back.get_observations()["a"], [[0], [1], [2], [3]])
    np.testing.assert_array_equal(read_back.get_observations()["b"], [[t, 1.0] for t in range(4)])
    assert read_back.get_observations()["a"].dtype == np.uint8
    np.testing.assert_array_equal(read_back.get_actions(), [0, 2, 1])


def test_infos_of_episode_lists_say_what_is_known_before_reading() -> None:
    (reader,) = open_input([make_episode(3), make_episode(4, id_="b")])
    assert reader.info.name == "SingleAgentEpisodes"
    assert reader.info.actions == "environment"
    assert reader.info.num_transitions == 7
    assert reader.info.ignored_columns == ("state",)
    assert reader.fingerprint() is None
    (reader,) = open_input(make_episode(3), ReadOptions(columns=frozenset()))
    assert reader.info.ignored_columns == ("vf_preds", "state")
    assert next(reader.blocks()).extra_model_outputs == {}


def test_an_extra_column_that_only_some_episodes_have_is_kept_where_it_is() -> None:
    bare = make_episode(2, id_="b")
    bare.extra_model_outputs.clear()
    first, second = read([make_episode(2), bare])
    assert (list(first.extra_model_outputs), list(second.extra_model_outputs)) == (["vf_preds"], [])


def with_changed_step(**values: Any) -> SingleAgentEpisode:
    columns = {
        "observations": [np.zeros(2, np.float32) for _ in range(4)],
        "actions": [np.zeros(1, np.float32) for _ in range(3)],
        "rewards": [0.0, 0.0, 0.0],
    }
    for name, value in values.items():
        columns[name][1] = value
    return SingleAgentEpisode(id_="bad", **columns, infos=[{}] * 4, terminated=True, len_lookback_buffer=0)


BAD_EPISODES = {
    "nan": (with_changed_step(rewards=np.nan), "`rewards` holds nan in episode 'bad', step 1 of entry 1"),
    "ragged": (
        with_changed_step(observations=np.zeros(3, np.float32)),
        "`obs` of episode 'bad' .*entry 1.* differs in",
    ),
    "missing": (
        with_changed_step(rewards=None),
        "`rewards` must hold numbers, got object in .* entry 1|`rewards` holds",
    ),
    "text": (with_changed_step(actions="left"), "`actions`.*entry 1"),
}


@pytest.mark.parametrize("case", BAD_EPISODES)
def test_episodes_with_bad_steps_are_refused_with_their_place(case: str) -> None:
    episode, message = BAD_EPISODES[case]
    with pytest.raises(ValueError, match=message):
        read([make_episode(2), episode])


def test_episodes_of_different_shape_or_type_are_refused() -> None:
    wide = SingleAgentEpisode(
        id_="wide",
        observations=np.zeros((3, 5), np.float32),
        actions=np.zeros((2, 1), np.float32),
        rewards=np.zeros(2),
        terminated=True,
        infos=[{}] * 3,
        len_lookback_buffer=0,
    )
    message = r"`obs` holds float32 of shape \(5,\) in episode 'wide' .* and float32 of shape \(2,\) in episode 'a'"
    with pytest.raises(ValueError, match=message):
        read([make_episode(2), wide])


def test_an_episode_whose_steps_all_went_into_the_lookback_buffer_is_refused() -> None:
    lost = SingleAgentEpisode(id_="lost", observations=[1.0, 2.0], actions=[0], rewards=[1.0], terminated=True)
    with pytest.raises(ValueError, match=r"'lost' \(entry 1 of .*has no steps.*make it with `len_lookback_buffer=0`"):
        open_input([make_episode(2), lost])


def test_other_objects_and_nothing_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must hold `SingleAgentEpisode`s only, got MultiAgentEpisode as entry 0"):
        InMemoryEpisodes([MultiAgentEpisode()])
    with pytest.raises(TypeError, match=r"`input_` must be one of .*got MultiAgentEpisode"):
        open_input([MultiAgentEpisode()])
    with pytest.raises(ValueError, match="empty list of episodes"):
        InMemoryEpisodes([])
    with pytest.raises(ValueError, match="its episodes have no steps"):
        open_input(SingleAgentEpisode(observations=[np.zeros(1)]))


def test_holders_are_shared_by_copies_of_a_config_and_print_shortly() -> None:
    held = InMemoryEpisodes([make_episode(2)])
    assert copy.deepcopy({"input_": [held]})["input_"][0] is held
    assert repr(held) == "<1 SingleAgentEpisodes>"
    (episode,) = read(held)
    assert_counts(episode, 2)


def test_actions_beside_the_outputs_of_a_module_are_a_modules() -> None:
    played, played_too, made = make_episode(2), make_episode(3, id_="b"), make_episode(2, id_="c")
    for episode in (played, played_too):
        outputs = InfiniteLookbackBuffer([np.zeros(2, np.float32)] * len(episode))
        episode.extra_model_outputs[Columns.ACTION_DIST_INPUTS] = outputs
    assert open_input([played, played_too])[0].info.actions == "module"
    assert open_input([made])[0].info.actions == "environment"
    with pytest.raises(ValueError, match=r"Entry 1 .* has `action_dist_inputs`.*; entry 0 has not.* as two lists"):
        open_input([made, played])


def test_a_data_set_stays_packed_until_it_is_used() -> None:
    held = pickle.loads(pickle.dumps(InMemoryDataset(LostWithItsSession())))
    again = pickle.loads(pickle.dumps(held))
    assert repr(again) == "<ray.data.Dataset>"
    with pytest.raises(ValueError, match=r"cannot be read in another Ray session \(gone\); hand it over again: `algo"):
        _ = again.dataset


def test_thousands_of_short_episodes_become_a_few_blocks() -> None:
    episodes = [make_episode(2, id_=str(i)).to_numpy() for i in range(2_000)]
    (reader,) = open_input(episodes)
    blocks = list(reader.blocks())
    assert len(blocks) < 3
    assert [id_ for block in blocks for id_ in block.ids] == [str(i) for i in range(2_000)]


# --- ray.data.Dataset -------------------------------------------------------------------------------------------------


def rows_of(*lengths: int) -> pa.Table:
    """Episodes that count, as `make_episode`, as rows."""
    times = np.concatenate([np.arange(length) for length in lengths]).astype(np.float32)
    is_last = np.concatenate([np.arange(length) == length - 1 for length in lengths])

    def vectors(values: np.ndarray) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32).ravel()), values.shape[1])

    return pa.table(
        {
            "eps_id": pa.array(np.repeat([f"e{i}" for i in range(len(lengths))], lengths)),
            "obs": vectors(np.stack([times, -times], axis=1)),
            "new_obs": vectors(np.stack([times + 1, -times - 1], axis=1)),
            "actions": vectors(times[:, None] / 8),
            "rewards": pa.array(times.astype(np.float64)),
            "terminateds": pa.array(is_last),
            "truncateds": pa.array(np.zeros(len(times), bool)),
            "note": pa.array(["x"] * len(times)),
            "value": pa.array(times * 2),
        }
    )


def slices_of(table: pa.Table, num_blocks: int) -> Any:
    stops = np.linspace(0, table.num_rows, num_blocks + 1).astype(int)
    parts = [table.slice(start, stop - start) for start, stop in itertools.pairwise(stops)]
    return ray.data.from_arrow(parts)


@pytest.mark.usefixtures("ray_session")
def test_rows_that_rllib_recorded_are_to_be_named_by_their_folder() -> None:
    recorded = rows_of(2)
    for name in ("agent_id", "module_id"):
        recorded = recorded.append_column(name, pa.nulls(len(recorded)))
    with pytest.raises(ValueError, match=r"columns `agent_id` and `module_id` .* give the recorded folder itself"):
        open_input(ray.data.from_arrow(recorded))


@pytest.mark.usefixtures("ray_session")
def test_a_pickled_dataset_is_the_same_in_its_session() -> None:
    held = pickle.loads(pickle.dumps(InMemoryDataset(ray.data.from_arrow(rows_of(3)))))
    (episode,) = read(held)
    assert_counts(episode, 3)


@pytest.mark.usefixtures("ray_session")
def test_rows_of_a_dataset_are_read_in_order_over_its_blocks() -> None:
    lengths = [3, 1, 6, 2]
    (reader,) = open_input(InMemoryDataset(slices_of(rows_of(*lengths), 5)), ReadOptions(columns=frozenset({"value"})))
    assert reader.info.name == "ray.data.Dataset"
    assert reader.info.actions == "environment"
    assert reader.info.ignored_columns == ("note (string)",)
    assert reader.fingerprint() is None
    for _ in range(2):
        episodes = list(reader)
        assert [episode.id_ for episode in episodes] == ["e0", "e1", "e2", "e3"]
        for episode, length in zip(episodes, lengths, strict=True):
            assert_counts(episode, length)
            np.testing.assert_array_equal(episode.get_extra_model_outputs("value"), 2.0 * np.arange(length))


@pytest.mark.usefixtures("ray_session")
def test_order_is_kept_through_parallel_maps_and_the_users_context_is_left_alone() -> None:
    def slow_first(batch: dict[str, Any]) -> dict[str, Any]:
        import time

        time.sleep(0.5 if batch["eps_id"][0] == "e0" else 0.0)
        return batch

    dataset = slices_of(rows_of(4, 4), 2).map_batches(slow_first, batch_size=None)
    assert not dataset.context.execution_options.preserve_order
    episodes = read(dataset)
    assert [episode.id_ for episode in episodes] == ["e0", "e1"]
    for episode in episodes:
        assert_counts(episode, 4)
    assert not dataset.context.execution_options.preserve_order
    assert not ray.data.DataContext.get_current().execution_options.preserve_order


@pytest.mark.usefixtures("ray_session")
def test_columns_of_tensors_and_of_other_names_are_read() -> None:
    times = np.arange(3, dtype=np.float32)
    dataset = ray.data.from_numpy(np.zeros((3, 1))).zip(
        ray.data.from_items(
            [
                {
                    "observation": np.array([[t, -t]], np.float32),
                    "action": np.array([t / 8], np.float32),
                    "reward": float(t),
                    "terminated": bool(t == 2),
                }
                for t in times
            ]
        )
    )
    (episode,) = read(dataset.drop_columns(["data"]))
    # Neither ids nor next observations: the terminated row ends the episode, and its own observation stands for both.
    np.testing.assert_array_equal(episode.get_observations()[:, 0], [[0, 0], [1, -1], [2, -2], [2, -2]])
    np.testing.assert_array_equal(episode.get_rewards(), times)
    assert episode.is_terminated


@pytest.mark.usefixtures("ray_session")
def test_a_dataset_that_changes_between_readings_is_refused() -> None:
    (reader,) = open_input(slices_of(rows_of(2, 3, 4), 1))
    source = reader._source  # type: ignore[attr-defined]
    list(source.batches(["eps_id"]))
    source._dataset = slices_of(rows_of(3, 2, 4), 1)
    with pytest.raises(ValueError, match=r"another order.*row 0 .*`dataset.materialize\(\)`"):
        list(source.batches(["rewards"]))


@pytest.mark.usefixtures("ray_session")
def test_bad_rows_of_a_dataset_are_named() -> None:
    table = rows_of(3, 2)
    rewards = pa.array([0.0, 1.0, 2.0, np.nan, 1.0])
    bad = table.set_column(table.schema.get_field_index("rewards"), "rewards", rewards)
    with pytest.raises(ValueError, match=r"`rewards` holds nan in episode 'e1', row 3 of ray\.data\.Dataset"):
        read(slices_of(bad, 2))
    with pytest.raises(ValueError, match=r"ray\.data\.Dataset has no column `obs`"):
        open_input(ray.data.from_items([{"x": 1}]))
    with pytest.raises(ValueError, match=r"is empty: it has no rows"):
        open_input(ray.data.from_arrow(table.slice(0, 0)))


# --- In an algorithm --------------------------------------------------------------------------------------------------


def test_data_of_this_process_are_in_a_checkpoint_once_and_come_back(tmp_path: Path) -> None:
    held = InMemoryEpisodes([make_episode(5_000, id_=str(i), end="truncated").to_numpy() for i in range(2)])
    data_bytes = len(pickle.dumps(held))
    spaces = {
        "observation_space": gym.spaces.Box(-1e4, 1e4, (2,)),
        "action_space": gym.spaces.Box(-1e3, 1e3, (1,)),
    }
    config = CalQLConfig().environment(**spaces).offline_data(input_=held).fine_tuning(offline_updates=10)
    config.rl_module(model_config={"actor_hiddens": [8], "critic_hiddens": [8]})
    algo = config.build()
    path = algo.save_to_path(tmp_path / "checkpoint")
    assert algo.config.input_ is held
    algo.stop()
    sizes = [file.stat().st_size for file in Path(path).rglob("*.pkl")]
    assert sum(size > data_bytes / 2 for size in sizes) == 1
    restored = CalQL.from_checkpoint(path)
    assert restored.store.num_offline == 10_000
    restored.stop()


def test_a_handle_means_nothing_in_another_process() -> None:
    held = InMemoryEpisodes([make_episode(3)])
    handle = with_handles(held)
    assert handle.resolve() is held
    del held
    gc.collect()
    with pytest.raises(ValueError, match="`input_` holds data of another process; hand them over again"):
        open_input(handle)
