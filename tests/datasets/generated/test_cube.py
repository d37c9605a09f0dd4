"""Cube data: the environment against OGBench's own, the data against the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from rllib_calql.datasets.generated import catalog, cube

CUBE = "rllib-calql/cube-single-narrow-v0"

Episode = dict[str, Any]


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    """Three demonstrations and three noisy attempts."""
    episodes = []
    for episode in cube.collect(num_steps=10_000, seed=0):
        episodes.append(episode)
        if len(episodes) == 6:
            return episodes
    raise AssertionError


def _make() -> Any:
    return gym.make(cube.evaluation_env_id())


def _actions(num_steps: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1.0, 1.0, (num_steps, 5)).astype(np.float32)


def test_environment_has_the_spaces_and_the_time_limit_of_ogbench() -> None:
    import ogbench.manipspace  # noqa: F401 - Registers the environments.

    ours, theirs = _make(), gym.make("cube-single-singletask-v0")
    assert ours.spec.max_episode_steps == theirs.spec.max_episode_steps == 200
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space


def test_registered_arguments_of_ogbench_are_ours() -> None:
    import ogbench.manipspace  # noqa: F401 - Registers the environments.

    kwargs = gym.spec("cube-single-singletask-v0").kwargs
    assert kwargs == {"env_type": "single", "permute_blocks": False, "success_timing": "pre", "reward_task_id": 0}
    default_task = gym.make("cube-single-singletask-v0")
    default_task.reset(seed=0)
    ours = cube.CubeSingle()
    ours.reset(seed=0)
    theirs = default_task.unwrapped
    assert theirs.cur_task_id == ours.cube.cur_task_id == cube.TASK_ID  # type: ignore[attr-defined]
    np.testing.assert_array_equal(ours.cube.cur_task_info["goal_xyzs"], [[0.50, 0.0, 0.02]])


def test_first_states_are_those_of_ogbench_up_to_what_its_unseeded_visit_to_the_goal_leaves() -> None:
    import ogbench.manipspace  # noqa: F401 - Registers the environments.

    ours, theirs = _make(), gym.make("cube-single-singletask-v0")
    for seed in range(3):
        obs, theirs_obs = ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0]
        np.testing.assert_allclose(np.delete(obs, 18), np.delete(theirs_obs, 18), atol=1e-9)
        assert obs[18] == 0.0  # Contact force of the gripper: nothing is touched at the start.


def test_reset_depends_on_the_seed_alone_bit_for_bit() -> None:
    fresh, used = _make(), _make()
    used.reset(seed=99)
    for action in _actions(30):
        used.step(action)
    rollouts = [[env.reset(seed=5)[0], *(env.step(action)[0] for action in _actions(30))] for env in (fresh, used)]
    np.testing.assert_array_equal(np.stack(rollouts[0]), np.stack(rollouts[1]))


def test_resets_without_a_seed_differ_and_options_are_refused() -> None:
    env = cube.CubeSingle()
    first, second = env.reset(seed=0)[0], env.reset()[0]
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match=r"`options` of CubeSingle must be empty, got \{'task_id': 3\}"):
        env.reset(options={"task_id": 3})


def test_reward_is_zero_exactly_where_the_cube_lies_within_four_centimetres_of_its_target(
    episodes: list[Episode],
) -> None:
    for episode in episodes:
        # Observed in units of 0.1 m from (0.425, 0, 0); the target is (0.5, 0, 0.02).
        position = episode["observations"][:-1, 19:22] / 10.0 + [0.425, 0.0, 0.0]
        distance = np.linalg.norm(position - [0.50, 0.0, 0.02], axis=1)
        np.testing.assert_array_equal(episode["rewards"], np.where(distance <= 0.04, 0.0, -1.0))


def test_episodes_end_by_success_or_at_the_time_limit_and_nowhere_else(episodes: list[Episode]) -> None:
    for episode in episodes:
        terminated, truncated = episode["terminations"], episode["truncations"]
        assert not terminated[:-1].any()
        assert not truncated[:-1].any()
        assert terminated[-1] == (episode["rewards"][-1] == 0.0)
        assert truncated[-1] == (not terminated[-1])
        assert len(truncated) == 200 if truncated[-1] else len(truncated) <= 200


def test_demonstrations_succeed_and_noisy_attempts_take_longer(episodes: list[Episode]) -> None:
    demonstrations, attempts = episodes[::2], episodes[1::2]
    assert all(episode["terminations"][-1] for episode in demonstrations)
    assert max(len(episode["rewards"]) for episode in demonstrations) < 80
    assert np.mean([len(episode["rewards"]) for episode in attempts]) > 80


def test_replaying_an_episode_in_the_environment_gives_every_column_bit_for_bit(episodes: list[Episode]) -> None:
    env = _make()
    for episode in episodes[:2]:
        obs, _ = env.reset(seed=episode["seed"])
        for step, action in enumerate(episode["actions"]):
            np.testing.assert_array_equal(episode["observations"][step], obs)
            obs, reward, terminated, truncated, info = env.step(action)
            assert reward == episode["rewards"][step]
            assert terminated == episode["terminations"][step] == info["success"]
            assert (truncated and not terminated) == episode["truncations"][step]
        np.testing.assert_array_equal(episode["observations"][-1], obs)


def test_actions_are_float32_within_bounds_and_columns_fit_together(episodes: list[Episode]) -> None:
    for episode in episodes:
        length = len(episode["rewards"])
        assert episode["observations"].shape == (length + 1, 28)
        assert episode["actions"].shape == (length, 5)
        assert episode["actions"].dtype == np.float32
        assert np.abs(episode["actions"]).max() <= 1.0


def test_same_seed_gives_the_same_data_whatever_numpys_global_state_and_leaves_that_alone(
    episodes: list[Episode],
) -> None:
    np.random.seed(123)
    expected_draw = np.random.RandomState(123).rand()
    again = next(iter(cube.collect(num_steps=1, seed=0)))
    assert np.random.rand() == expected_draw
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(again[name], episodes[0][name])
    other = next(iter(cube.collect(num_steps=1, seed=1)))
    assert not np.array_equal(other["actions"][:20], again["actions"][:20])


def test_random_actions_score_the_worst_return_and_the_oracle_a_good_one() -> None:
    random_return, oracle_return = cube.reference_scores(num_episodes=2)
    assert random_return == -200.0
    assert -60.0 < oracle_return < -30.0


def test_dataset_names_its_environment_and_its_share_of_successes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(catalog, "_REFERENCE_EPISODES", 1)
    catalog.generate(CUBE, num_steps=60, progress=False)
    dataset = minari.load_dataset(CUBE)
    assert dataset.total_episodes == 2
    stored = [episode.terminations[-1] for episode in dataset.iterate_episodes()]
    assert dataset.storage.metadata["success_share"] == np.mean(stored)
    assert dataset.storage.metadata["ref_min_score"] == -200.0
    env = dataset.recover_environment(eval_env=True)
    assert env.spec.max_episode_steps == 200
    assert env.observation_space == dataset.observation_space
    assert env.action_space == dataset.action_space


def test_missing_ogbench_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ogbench", None)  # Python's own way to make an import fail.
    message = r'needs the `ogbench` package: pip install "rllib-calql\[ogbench\]"'
    with pytest.raises(ImportError, match=message):
        catalog.ensure_dataset(CUBE, progress=False)
    monkeypatch.setitem(sys.modules, "ogbench.manipspace.envs.cube_env", None)
    with pytest.raises(ImportError, match=message):
        cube.CubeSingle()


def test_importing_the_module_imports_no_simulator() -> None:
    code = (
        "import sys; sys.modules['dm_control'] = None; "  # RLlib itself imports that where it is installed.
        "from rllib_calql.datasets.generated import cube; "
        "print([name for name in ('ogbench', 'mujoco') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"
