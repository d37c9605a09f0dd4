"""Generated datasets: the data against the environment itself, and the way they reach the disk."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from rllib_calql.datasets.generated import catalog, pendulum, pointmaze

pytest.importorskip("minari")
pytest.importorskip("gymnasium_robotics")

UMAZE = "rllib-calql/pointmaze-umaze-play-v0"
PENDULUM = "rllib-calql/pendulum-swingup-v0"
SIZES = ["umaze", "medium", "large"]

Episode = dict[str, Any]


@pytest.fixture(scope="module")
def umaze_episodes() -> list[Episode]:
    return list(pointmaze.collect("umaze", num_steps=30_000, seed=0))


@pytest.fixture(scope="module")
def pendulum_episodes() -> list[Episode]:
    return list(pendulum.collect(num_steps=6_000, seed=0))


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


@pytest.fixture
def small_pendulum(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Makes the default pendulum dataset 400 steps small, and counts how often it is collected."""
    calls = {"collect": 0}

    def collect(*, num_steps: int, seed: int) -> Any:
        calls["collect"] += 1
        return pendulum.collect(num_steps=400, seed=seed)

    _replace(monkeypatch, PENDULUM, collect=collect)
    return calls


def _replace(monkeypatch: pytest.MonkeyPatch, dataset_id: str, **changes: Any) -> None:
    generator = dataclasses.replace(catalog._GENERATORS[dataset_id], **changes)
    monkeypatch.setitem(catalog._GENERATORS, dataset_id, generator)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Path -> array or scalar of a nested dict."""
    if isinstance(value, dict):
        return {p: leaf for key, item in value.items() for p, leaf in _leaves(item, f"{path}/{key}").items()}
    return {path: value}


def _is_bit_identical(first: list[Episode], second: list[Episode]) -> bool:
    if len(first) != len(second):
        return False
    for one, other in zip(first, second, strict=True):
        leaves, other_leaves = _leaves(one), _leaves(other)
        assert leaves.keys() == other_leaves.keys()
        for key, leaf in leaves.items():
            if np.asarray(leaf).tobytes() != np.asarray(other_leaves[key]).tobytes():
                return False
    return True


def _load(dataset_id: str) -> Any:
    import minari

    return minari.load_dataset(dataset_id)


# PointMaze data


@pytest.mark.parametrize("size", SIZES)
def test_maze_maps_are_those_of_gymnasium_robotics_with_one_start_and_one_goal(size: str) -> None:
    from gymnasium_robotics.envs.maze import maps

    default = {"umaze": maps.U_MAZE, "medium": maps.MEDIUM_MAZE, "large": maps.LARGE_MAZE}[size]
    ours = pointmaze.evaluation_env_config(size)["maze_map"]
    assert [[0 if cell in ("r", "g") else cell for cell in row] for row in ours] == default
    marks = [cell for row in ours for cell in row]
    assert marks.count("r") == 1
    assert marks.count("g") == 1


def test_evaluation_env_starts_and_ends_in_its_marked_cells_through_make_vec() -> None:
    envs = gym.make_vec(pointmaze.evaluation_env_id("umaze"), num_envs=8, **pointmaze.evaluation_env_config("umaze"))
    obs, _ = envs.reset(seed=3)
    envs.close()
    start_error = obs["achieved_goal"] - np.array([-1.0, 1.0])  # Centre of row 1, column 1 of the 5 by 5 map.
    goal_error = obs["desired_goal"] - np.array([-1.0, -1.0])  # Row 3, column 1.
    for error in (start_error, goal_error):
        assert np.abs(error).max() <= 0.25
        assert error.std() > 0.05
    np.testing.assert_array_equal(obs["observation"][:, 2:], 0.0)


@pytest.mark.parametrize("size", SIZES)
def test_replaying_an_episode_in_the_environment_gives_every_column_bit_for_bit(size: str) -> None:
    played = pointmaze.collect(size, num_steps=2_500, seed=5)
    episodes = [*played, *pointmaze.collect_demonstrations(size, num_steps=500, seed=5)]
    env = gym.make(pointmaze.evaluation_env_id(size), **pointmaze.evaluation_env_config(size))
    for episode in episodes:
        obs, _ = env.reset(seed=episode["seed"], options=episode["options"])
        for step, action in enumerate(episode["actions"]):
            for key, value in obs.items():
                np.testing.assert_array_equal(episode["observations"][key][step], value)
            obs, reward, terminated, truncated, _ = env.step(action)
            assert reward == episode["rewards"][step]
            assert terminated == episode["terminations"][step]
            assert (truncated and not terminated) == episode["truncations"][step]
        for key, value in obs.items():
            np.testing.assert_array_equal(episode["observations"][key][-1], value)
        assert terminated or truncated
    env.close()


def test_replay_holds_when_the_velocity_limit_acts() -> None:
    env, _ = pointmaze._make_env("large")
    maze = pointmaze.MAZES["large"]
    reset = {"seed": 0, "options": {"reset_cell": [3, 1]}}
    env.reset(**reset)
    pushes = np.tile([1.0, 0.0], (60, 1))
    episode = pointmaze._drive(env, maze, iter([(0.0, 0.0)] * 61), gain=0.0, damping=0.0, noise=pushes)
    assert episode["observations"]["observation"][:, 2].max() > 5.0
    env.reset(**reset)
    replayed = np.array([env.step(action)[0]["observation"] for action in episode["actions"]])
    env.close()
    np.testing.assert_array_equal(episode["observations"]["observation"][1:], replayed)


def test_rewards_are_one_exactly_within_the_success_radius_of_the_goal(umaze_episodes: list[Episode]) -> None:
    for episode in umaze_episodes:
        after = {key: value[1:] for key, value in episode["observations"].items()}
        distance = np.linalg.norm(after["achieved_goal"] - after["desired_goal"], axis=1)
        np.testing.assert_array_equal(episode["rewards"], np.where(distance <= 0.45, 1.0, 0.0))


def test_episodes_end_by_success_or_at_the_time_limit_and_nowhere_else(umaze_episodes: list[Episode]) -> None:
    for episode in umaze_episodes:
        terminated, truncated = episode["terminations"], episode["truncations"]
        assert not terminated[:-1].any()
        assert not truncated[:-1].any()
        assert terminated[-1] == (episode["rewards"][-1] == 1.0)
        assert truncated[-1] == (not terminated[-1])
        assert len(truncated) == 300 if truncated[-1] else len(truncated) <= 300


def test_columns_of_an_episode_fit_together(umaze_episodes: list[Episode]) -> None:
    for episode in umaze_episodes:
        obs, length = episode["observations"], len(episode["rewards"])
        assert {key: value.shape for key, value in obs.items()} == {
            "observation": (length + 1, 4),
            "achieved_goal": (length + 1, 2),
            "desired_goal": (length + 1, 2),
        }
        np.testing.assert_array_equal(obs["achieved_goal"], obs["observation"][:, :2])
        assert np.ptp(obs["desired_goal"], axis=0).max() == 0.0
        # Semi-implicit Euler with dt = 0.01 s: position moves by the new velocity.
        moved = np.diff(obs["observation"][:, :2], axis=0)
        np.testing.assert_allclose(moved, 0.01 * obs["observation"][1:, 2:], atol=1e-12)


def test_actions_are_float32_within_bounds_and_noisy(umaze_episodes: list[Episode]) -> None:
    actions = np.concatenate([episode["actions"] for episode in umaze_episodes])
    assert actions.dtype == np.float32
    assert np.abs(actions).max() == 1.0
    assert (np.abs(actions) == 1.0).mean() < 0.2
    assert np.diff(actions, axis=0).std() > 0.2


def test_starts_cover_every_free_cell_but_the_goal(umaze_episodes: list[Episode]) -> None:
    maze = pointmaze.MAZES["umaze"]
    starts = [tuple(episode["options"]["reset_cell"]) for episode in umaze_episodes]
    assert set(starts) == {(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2)}
    for start, episode in zip(starts, umaze_episodes, strict=True):
        assert maze.cell_at(tuple(episode["observations"]["achieved_goal"][0])) == start


def test_between_thirty_and_fifty_percent_of_umaze_episodes_succeed(umaze_episodes: list[Episode]) -> None:
    num_steps = sum(len(episode["rewards"]) for episode in umaze_episodes)
    assert 30_000 <= num_steps < 30_300
    success_share = np.mean([episode["terminations"][-1] for episode in umaze_episodes])
    assert 0.3 <= success_share <= 0.5


def test_demonstrations_go_from_the_evaluations_start_straight_to_its_goal() -> None:
    episodes = list(pointmaze.collect_demonstrations("umaze", num_steps=12_000, seed=0))
    maze = pointmaze.MAZES["umaze"]
    assert len(episodes) > 40
    for episode in episodes:
        cells = [maze.cell_at((x, y)) for x, y in episode["observations"]["achieved_goal"]]
        visited = [cell for step, cell in enumerate(cells) if step == 0 or cell != cells[step - 1]]
        assert visited[:6] == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2)]
        assert set(visited[6:]) <= {(3, 1)}  # The goal's own cell, unless its radius reaches out of it.
        assert episode["terminations"][-1]
    # From one step to the next it is the noise that changes an action, twice: 0.1 * sqrt(2), measured without outliers.
    changes = np.concatenate([np.diff(episode["actions"], axis=0) for episode in episodes])
    assert np.median(np.abs(changes)) / 0.6745 == pytest.approx(0.1 * np.sqrt(2.0), rel=0.1)


def test_same_seed_gives_the_same_maze_data_and_another_seed_does_not() -> None:
    first, again, other = (list(pointmaze.collect("umaze", num_steps=1_500, seed=seed)) for seed in (7, 7, 8))
    assert _is_bit_identical(first, again)
    assert not _is_bit_identical(first, other)


@pytest.mark.parametrize("size", SIZES)
def test_controller_reaches_the_goal_of_every_maze_and_random_actions_do_not(size: str) -> None:
    assert pointmaze.reference_scores(size, num_episodes=5) == (0.0, 1.0)


@pytest.mark.parametrize("size", SIZES)
def test_routes_are_shortest_paths_through_free_cells(size: str) -> None:
    maze = pointmaze.MAZES[size]
    free = maze.cells()
    for target in free:
        routes = pointmaze.next_cells(maze, target)
        distance = {cell: _route_length(routes, cell, target) for cell in free}
        for row, column in free:
            neighbours = [n for n in ((row + 1, column), (row, column + 1)) if n in distance]
            # A distance that no single step changes by more than 1 is nowhere longer than the shortest path.
            assert all(abs(distance[row, column] - distance[neighbour]) <= 1 for neighbour in neighbours)


def _route_length(routes: dict[pointmaze.Cell, pointmaze.Cell], cell: pointmaze.Cell, target: pointmaze.Cell) -> int:
    length = 0
    while cell != target:
        following = routes[cell]
        assert abs(following[0] - cell[0]) + abs(following[1] - cell[1]) == 1
        cell, length = following, length + 1
        assert length <= len(routes)
    return length


def test_unknown_maze_size_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"`size` must be one of umaze, medium, large, got 'giant'"):
        pointmaze.evaluation_env_config("giant")


# Pendulum data


def test_pendulum_observations_and_rewards_obey_the_equations_of_motion(pendulum_episodes: list[Episode]) -> None:
    for episode in pendulum_episodes:
        cos, sin, speed = episode["observations"].astype(np.float64).T
        torque = episode["actions"][:, 0].astype(np.float64)
        angle = np.arctan2(sin, cos)
        np.testing.assert_allclose(
            episode["rewards"], -(angle[:-1] ** 2 + 0.1 * speed[:-1] ** 2 + 0.001 * torque**2), rtol=1e-4, atol=1e-4
        )
        next_speed = np.clip(speed[:-1] + 0.05 * (15.0 * sin[:-1] + 3.0 * torque), -8.0, 8.0)
        np.testing.assert_allclose(speed[1:], next_speed, atol=1e-4)


def test_pendulum_episodes_are_cut_at_200_steps_with_actions_in_environment_bounds(
    pendulum_episodes: list[Episode],
) -> None:
    assert len(pendulum_episodes) == 30
    for episode in pendulum_episodes:
        assert len(episode["rewards"]) == 200
        assert not episode["terminations"].any()
        np.testing.assert_array_equal(np.flatnonzero(episode["truncations"]), [199])
    actions = np.concatenate([episode["actions"] for episode in pendulum_episodes])
    assert actions.min() == -2.0
    assert actions.max() == 2.0


def test_pendulum_data_reach_from_near_expert_to_random(pendulum_episodes: list[Episode]) -> None:
    returns = [episode["rewards"].sum() for episode in pendulum_episodes]
    assert max(returns) > -400.0
    assert min(returns) < -900.0


def test_pendulum_controller_swings_up_and_random_actions_do_not() -> None:
    random_score, controller_score = pendulum.reference_scores(num_episodes=10)
    assert -1400.0 < random_score < -1000.0
    assert -250.0 < controller_score < -100.0


def test_same_seed_gives_the_same_pendulum_data_and_another_seed_does_not() -> None:
    first, again, other = (list(pendulum.collect(num_steps=400, seed=seed)) for seed in (7, 7, 8))
    assert _is_bit_identical(first, again)
    assert not _is_bit_identical(first, other)


# Catalog


def test_catalog_knows_its_own_ids_only() -> None:
    assert catalog.generated_dataset_ids() == [
        "rllib-calql/pointmaze-umaze-play-v0",
        "rllib-calql/pointmaze-medium-play-v0",
        "rllib-calql/pointmaze-large-play-v0",
        "rllib-calql/pointmaze-umaze-demos-v0",
        "rllib-calql/pointmaze-medium-demos-v0",
        "rllib-calql/pendulum-swingup-v0",
        "rllib-calql/pixel-reach-v0",
        "rllib-calql/cube-single-narrow-v0",
        "rllib-calql/hopper-medium-v0",
    ]
    assert all(catalog.is_generated(dataset_id) for dataset_id in catalog.generated_dataset_ids())
    assert not catalog.is_generated("D4RL/pointmaze/umaze-v2")


def test_stored_dataset_holds_the_collected_columns_and_its_provenance(minari_root: Path) -> None:
    catalog.generate(UMAZE, seed=3, num_steps=1_000, progress=False, save_as="try/umaze-v1")
    dataset = _load("try/umaze-v1")
    collected = list(pointmaze.collect("umaze", num_steps=1_000, seed=3))
    stored = [
        {key: getattr(episode, key) for key in ("observations", "actions", "rewards", "terminations", "truncations")}
        for episode in dataset.iterate_episodes()
    ]
    expected = [{key: episode[key] for key in stored[0]} for episode in collected]
    assert _is_bit_identical(stored, expected)
    metadata = dataset.storage.metadata
    success_share = np.mean([episode["terminations"][-1] for episode in collected])
    assert {
        "dataset_id": "try/umaze-v1",
        "generator": UMAZE,
        "seed": 3,
        "ref_min_score": 0.0,
        "ref_max_score": 1.0,
        "success_share": success_share,
        "total_episodes": len(collected),
        "total_steps": sum(len(episode["rewards"]) for episode in collected),
    }.items() <= metadata.items()
    assert "code_permalink" not in metadata


def test_environment_recovered_from_the_dataset_is_the_evaluation_environment(minari_root: Path) -> None:
    import minari

    catalog.generate(UMAZE, num_steps=300, progress=False)
    dataset = minari.load_dataset(UMAZE)
    expected = gym.make(pointmaze.evaluation_env_id("umaze"), **pointmaze.evaluation_env_config("umaze"))
    for env in (dataset.recover_environment(eval_env=True), dataset.recover_environment()):
        assert env.spec == expected.spec
        assert env.spec.max_episode_steps == 300
        assert env.observation_space == dataset.observation_space
        assert env.action_space == dataset.action_space
    assert list(minari.list_local_datasets()) == [UMAZE]
    np.testing.assert_array_equal(minari.get_normalized_score(dataset, np.array([0.0, 1.0])), [0.0, 1.0])


def test_dataset_is_built_once_and_then_left_alone(minari_root: Path, small_pendulum: dict[str, int]) -> None:
    catalog.ensure_dataset(PENDULUM, seed=1, progress=False)
    file = minari_root / PENDULUM / "data" / "main_data.hdf5"
    written_ns = file.stat().st_mtime_ns
    catalog.ensure_dataset(PENDULUM, seed=2, progress=False)
    assert small_pendulum["collect"] == 1
    assert file.stat().st_mtime_ns == written_ns
    assert _load(PENDULUM).storage.metadata["seed"] == 1


def test_minari_folder_is_the_one_set_at_the_time_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pendulum: dict[str, int]
) -> None:
    for name in ("one", "two"):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / name))
        catalog.ensure_dataset(PENDULUM, progress=False)
        assert (tmp_path / name / PENDULUM / "data" / "metadata.json").is_file()
    assert small_pendulum["collect"] == 2


def test_generating_over_an_existing_dataset_is_refused(minari_root: Path) -> None:
    catalog.generate(PENDULUM, num_steps=200, progress=False)
    with pytest.raises(FileExistsError, match=r"already; delete it .* or choose another id with `save_as`"):
        catalog.generate(PENDULUM, num_steps=200, progress=False)


@pytest.mark.parametrize("step", ["collect", "reference_scores"])
def test_interrupted_build_leaves_nothing_behind_and_the_next_one_works(
    minari_root: Path, monkeypatch: pytest.MonkeyPatch, small_pendulum: dict[str, int], step: str
) -> None:
    def interrupted(**arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        _replace(broken, PENDULUM, **{step: interrupted})
        with pytest.raises(KeyboardInterrupt):
            catalog.ensure_dataset(PENDULUM, progress=False)
    assert list(minari_root.iterdir()) == []
    catalog.ensure_dataset(PENDULUM, progress=False)
    assert _load(PENDULUM).total_steps == 400


def test_build_interrupted_while_writing_episodes_leaves_nothing_behind(
    minari_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minari.dataset._storages.hdf5_storage import HDF5Storage

    update_episodes = HDF5Storage.update_episodes

    def interrupted(self: Any, episodes: Any) -> None:
        update_episodes(self, list(episodes)[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(HDF5Storage, "update_episodes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        catalog.generate(PENDULUM, num_steps=400, progress=False)
    assert list(minari_root.iterdir()) == []


def test_of_two_builds_at_once_one_whole_dataset_remains(
    minari_root: Path, monkeypatch: pytest.MonkeyPatch, small_pendulum: dict[str, int]
) -> None:
    both_have_scores = threading.Barrier(2, timeout=30)

    def reference_scores(*, num_episodes: int) -> tuple[float, float]:
        both_have_scores.wait()
        return -1200.0, -150.0

    _replace(monkeypatch, PENDULUM, reference_scores=reference_scores)
    errors: list[BaseException] = []

    def build(seed: int) -> None:
        try:
            catalog.ensure_dataset(PENDULUM, seed=seed, progress=False)
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=build, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    assert small_pendulum["collect"] == 2
    dataset = _load(PENDULUM)
    seed = dataset.storage.metadata["seed"]
    collected = list(pendulum.collect(num_steps=400, seed=seed))
    for episode, expected in zip(dataset.iterate_episodes(), collected, strict=True):
        np.testing.assert_array_equal(episode.observations, expected["observations"])
    assert [path.name for path in minari_root.iterdir()] == ["rllib-calql"]


def test_folder_of_a_killed_build_is_removed_once_it_is_old(minari_root: Path) -> None:
    old, fresh = minari_root / f"{catalog._BUILD_PREFIX}old", minari_root / f"{catalog._BUILD_PREFIX}fresh"
    for folder in (old, fresh):
        (folder / "dataset").mkdir(parents=True)
    two_hours_ago_s = time.time() - 7200.0
    os.utime(old, (two_hours_ago_s, two_hours_ago_s))
    catalog.generate(PENDULUM, num_steps=200, progress=False)
    assert not old.exists()
    assert fresh.exists()


def test_foreign_folder_in_the_datasets_place_is_reported_and_kept(
    minari_root: Path, small_pendulum: dict[str, int]
) -> None:
    foreign = minari_root / PENDULUM / "notes.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds no Minari dataset .*move it away or delete it"):
        catalog.ensure_dataset(PENDULUM, progress=False)
    assert foreign.read_text() == "mine"


@pytest.mark.parametrize("package", ["minari", "gymnasium_robotics", "mujoco"])
def test_missing_package_is_named_with_the_command_that_installs_it(
    minari_root: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to make an import fail.
    with pytest.raises(ImportError, match=rf'needs the `{package}` package: pip install "rllib-calql\[examples\]"'):
        catalog.ensure_dataset(UMAZE, progress=False)


def test_existing_maze_data_need_no_simulator(minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.generate(UMAZE, num_steps=300, progress=False)
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    catalog.ensure_dataset(UMAZE, progress=False)
    assert _load(UMAZE).total_steps >= 300


def test_unknown_dataset_is_refused_with_the_closest_match() -> None:
    with pytest.raises(ValueError, match=r"got 'rllib-calql/pendulum-swing-v0'\. Did you mean '.*swingup-v0'\?"):
        catalog.ensure_dataset("rllib-calql/pendulum-swing-v0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"seed": -1}, "`seed` must be at least 0, got -1"), ({"num_steps": 0}, "`num_steps` must be at least 1, got 0")],
)
def test_arguments_out_of_range_are_refused(minari_root: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        catalog.generate(PENDULUM, progress=False, **arguments)


def test_progress_is_two_plain_lines_when_stderr_is_no_terminal(
    minari_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog.generate(PENDULUM, num_steps=400)
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first == f"Generating {PENDULUM} (400 steps) ..."
    assert second.startswith(f"Generated {PENDULUM} in ")


def test_progress_is_a_bar_on_request_and_silent_when_off(
    minari_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog.generate(PENDULUM, num_steps=400, progress=True, save_as="try/bar-v0")
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err
    catalog.generate(PENDULUM, num_steps=400, progress=False, save_as="try/silent-v0")
    assert capsys.readouterr() == ("", "")


def test_importing_the_catalog_imports_neither_minari_nor_a_simulator() -> None:
    code = (
        "import sys; sys.modules['dm_control'] = None; "  # RLlib itself imports that where it is installed.
        "from rllib_calql.datasets.generated import catalog; "
        "print([name for name in ('minari', 'gymnasium_robotics', 'mujoco', 'h5py') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"
