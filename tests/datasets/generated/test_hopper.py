"""Hopper data: what is recorded against the environment, and training that goes on where it was killed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from rllib_calql.datasets.generated import catalog, hopper, hopper_training

HOPPER = "rllib-calql/hopper-medium-v0"
TINY = hopper_training.Training(
    min_return=1.0,
    max_return=1.0,
    leg_env_steps=100,
    random_env_steps=100,
    updates_per_env_step=0.1,
    batch_size=16,
    hidden_units=8,
    evaluation_episodes=1,
)

Episode = dict[str, Any]


def _succeeds_after_three_legs(env: Any, policy: Any, *, num_episodes: int, seed: int, leg: int) -> float:
    return float(leg >= 3)


@pytest.fixture(autouse=True)
def _three_legs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations give 0 for two legs, then the target; everything else is as in a real training."""
    monkeypatch.setattr(hopper_training, "_evaluate", _succeeds_after_three_legs)


def _killed_after(num_legs: int) -> Callable[[str], None]:
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == num_legs:
            raise KeyboardInterrupt

    return report


def _collect(work_dir: Path, *, report: Callable[[str], None] = lambda line: None, **changes: Any) -> list[Episode]:
    arguments = {"num_steps": 200, "seed": 3, "training": TINY, **changes}
    return list(hopper.collect(work_dir=work_dir, report=report, **arguments))


def _assert_equal(first: list[Episode], second: list[Episode]) -> None:
    for one, other in zip(first, second, strict=True):
        for name, column in one.items():
            np.testing.assert_array_equal(column, other[name])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Episode]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_training, "_evaluate", _succeeds_after_three_legs)
        return _collect(tmp_path_factory.mktemp("uninterrupted"))


def test_training_killed_after_any_leg_goes_on_to_the_same_data_bit_for_bit(
    tmp_path: Path, uninterrupted: list[Episode]
) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            _collect(tmp_path, report=_killed_after(1))
    legs: list[str] = []
    _assert_equal(_collect(tmp_path, report=legs.append), uninterrupted)
    assert len(legs) == 1


def test_training_killed_in_the_middle_of_a_checkpoint_repeats_that_leg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: list[Episode]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _collect(tmp_path, report=_killed_after(1))
    (tmp_path / ".unfinished-killed" / "leg-000002").mkdir(parents=True)
    legs: list[str] = []
    _assert_equal(_collect(tmp_path, report=legs.append), uninterrupted)
    assert len(legs) == 2


def test_finished_training_is_not_repeated_and_only_its_last_checkpoint_is_kept(tmp_path: Path) -> None:
    first = _collect(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["leg-000003"]
    legs: list[str] = []
    _assert_equal(_collect(tmp_path, report=legs.append), first)
    assert legs == []


def test_checkpoints_of_other_settings_or_another_seed_are_not_used(tmp_path: Path) -> None:
    _collect(tmp_path)
    legs: list[str] = []
    _collect(tmp_path, seed=4, report=legs.append)
    assert len(legs) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["leg-000003"]


def test_data_do_not_depend_on_torchs_state_and_leave_it_alone(tmp_path: Path, uninterrupted: list[Episode]) -> None:
    torch.manual_seed(11)
    expected_draw = torch.rand(1, generator=torch.Generator().manual_seed(11))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)  # It trains on one.
    try:
        _assert_equal(_collect(tmp_path), uninterrupted)
        assert torch.rand(1) == expected_draw
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)


def test_replaying_an_episode_in_the_environment_gives_every_column_bit_for_bit(uninterrupted: list[Episode]) -> None:
    env = gym.make(hopper_training.ENV_ID)
    for episode in uninterrupted:
        obs, _ = env.reset(seed=episode["seed"])
        for step, action in enumerate(episode["actions"]):
            np.testing.assert_array_equal(episode["observations"][step], obs)
            obs, reward, terminated, truncated, _ = env.step(action)
            assert reward == episode["rewards"][step]
            assert terminated == episode["terminations"][step]
            assert (truncated and not terminated) == episode["truncations"][step]
        np.testing.assert_array_equal(episode["observations"][-1], obs)
        assert terminated or truncated


def test_actions_are_float32_draws_of_the_policy_within_the_bounds_of_the_environment(
    uninterrupted: list[Episode],
) -> None:
    actions = np.concatenate([episode["actions"] for episode in uninterrupted])
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1.0
    assert actions.std(axis=0).min() > 0.2
    first_actions = [tuple(episode["actions"][0]) for episode in uninterrupted]
    assert len(set(first_actions)) == len(first_actions)


@pytest.mark.parametrize("n_step", [1, 3, 500])
def test_replay_holds_every_transition_with_discounted_and_scaled_sums_of_rewards(n_step: int) -> None:
    env = gym.make(hopper_training.ENV_ID)
    episodes = [hopper_training.play(env, None, seed=seed) for seed in (0, 1)]
    replay: dict[str, Any] = {}
    for episode in episodes:
        replay = hopper_training._extended(replay, hopper_training.transitions(episode, n_step=n_step))
    row = 0
    for episode in episodes:
        length = len(episode["rewards"])
        for step in range(length):
            following = list(range(step, min(step + n_step, length)))
            expected = 0.1 * sum(0.99 ** (later - step) * episode["rewards"][later] for later in following)
            obs = episode["observations"].astype(np.float32)
            np.testing.assert_array_equal(replay["obs"][row], obs[step])
            np.testing.assert_array_equal(replay["new_obs"][row], obs[following[-1] + 1])
            np.testing.assert_array_equal(replay["actions"][row], episode["actions"][step])
            assert replay["rewards"][row] == pytest.approx(expected, rel=1e-6)
            assert replay["terminateds"][row] == any(episode["terminations"][following])
            assert replay["n_step"][row] == len(following)
            row += 1
    assert all(len(column) == row for column in replay.values())


def test_time_limit_is_no_termination_in_the_replay() -> None:
    episode = {
        "observations": np.zeros((3, 11)),
        "actions": np.zeros((2, 3), np.float32),
        "rewards": np.ones(2),
        "terminations": np.array([False, False]),
        "truncations": np.array([False, True]),
    }
    assert not hopper_training.transitions(episode, n_step=2)["terminateds"].any()
    ended = {**episode, "terminations": np.array([False, True])}
    assert hopper_training.transitions(ended, n_step=2)["terminateds"].all()


def test_an_update_moves_every_network_and_the_entropy_temperature() -> None:
    env = gym.make(hopper_training.ENV_ID)
    with hopper_training._own_torch(seed=0):
        learner = hopper_training._new_learner(TINY)
        before = {name: value.clone() for name, value in learner.module["default_policy"].state_dict().items()}
        replay = hopper_training.transitions(hopper_training.play(env, None, seed=0), n_step=2)
        hopper_training._update(learner, replay, np.random.default_rng(0), num_updates=8, batch_size=16)
        after = learner.module["default_policy"].state_dict()
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert all(name.endswith("_const") for name in unmoved)
    assert learner.curr_log_alpha["default_policy"].item() != np.log(0.1)


def test_training_that_does_not_get_there_says_so(tmp_path: Path) -> None:
    hopeless = hopper_training.Training(**{**vars(TINY), "min_return": 9.0, "max_return": 10.0, "max_env_steps": 100})
    with pytest.raises(RuntimeError, match=r"seed 3 had no return from 9 to 10 within 100 .*; choose another `seed`"):
        _collect(tmp_path, training=hopeless)


def test_random_actions_score_little_and_the_expert_is_that_of_d4rl() -> None:
    random_return, expert_return = hopper.reference_scores(num_episodes=5)
    assert 5.0 < random_return < 40.0
    assert expert_return == 3234.3


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    small = partial(hopper.collect, training=TINY)
    generator = catalog._GENERATORS[HOPPER]
    monkeypatch.setitem(catalog._GENERATORS, HOPPER, dataclasses.replace(generator, collect=small))
    return tmp_path


def test_dataset_is_built_from_the_killed_training_and_the_training_then_removed(
    minari_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import minari

    with monkeypatch.context() as killed:
        killed.setattr(catalog, "_reporter", lambda show: _killed_after(2))
        with pytest.raises(KeyboardInterrupt):
            catalog.generate(HOPPER, num_steps=100, seed=3, progress=False)
    training = minari_root / ".rllib-calql-training-rllib-calql-hopper-medium-v0-seed3"
    assert [path.name for path in minari_root.iterdir()] == [training.name]
    assert [path.name for path in training.iterdir()] == ["leg-000002"]
    assert list(minari.list_local_datasets()) == []
    catalog.generate(HOPPER, num_steps=100, seed=3)
    assert capsys.readouterr().err.count("SAC on Hopper-v5: return") == 1
    assert not training.exists()
    dataset = minari.load_dataset(HOPPER)
    assert dataset.total_steps >= 100
    assert dataset.storage.metadata["ref_max_score"] == 3234.3
    assert "success_share" not in dataset.storage.metadata


def test_importing_the_module_imports_neither_ray_nor_a_simulator() -> None:
    code = (
        "import sys; sys.modules['dm_control'] = None; "  # RLlib itself imports that where it is installed.
        "from rllib_calql.datasets.generated import catalog, hopper; "
        "print([name for name in ('mujoco', 'ray.rllib.algorithms.sac') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"
