"""Numbers that are finite and still spoil training: what float32 and Adam make of them, offline and online."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_checks import MODULE, assert_bit_identical, everything, random_rows, update
from pendulum_data import FaultyEnv, offline_config, small_config, two_episodes, write
from ray.rllib.core.columns import Columns
from small_learners import make_learner

from rllib_calql import CalQLConfig
from rllib_calql.common import metrics as keys
from rllib_calql.learning.skipped_updates import SkippedUpdates

pytestmark = pytest.mark.usefixtures("ray_session")
FLOAT32_MAX = float(np.finfo(np.float32).max)


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [1e25, -1e25, 1e20, 3e38])
@pytest.mark.parametrize("precision", ["fp32", "medium"])
def test_a_reward_whose_gradient_adam_cannot_square_changes_nothing(reward: float, precision: str) -> None:
    learner = make_learner(lagrangian=True, precision=precision)
    update(learner, random_rows(2 * 8), 8)
    before = everything(learner)
    rows = random_rows(8)
    rows[Columns.REWARDS][3] = reward
    assert update(learner, rows, 8)[keys.NUM_SKIPPED_UPDATES_LIFETIME] == 1
    assert_bit_identical(everything(learner), before)


def test_no_element_of_the_critics_is_frozen_after_a_glitch() -> None:
    learner, unspoilt = make_learner(), make_learner()
    rows = random_rows(20 * 8)
    spoilt = {name: column.copy() for name, column in rows.items()}
    spoilt[Columns.REWARDS][0] = 1e25
    update(unspoilt, rows, 8)
    update(learner, spoilt, 8)
    for one in (learner, unspoilt):
        before = everything(one)
        update(one, random_rows(20 * 8, seed=1), 8)
        one.moved = {  # type: ignore[attr-defined]
            name: (value - before[name]).abs() for name, value in everything(one).items() if name.startswith("critic.")
        }
    for name, expected in unspoilt.moved.items():  # type: ignore[attr-defined]
        moved = learner.moved[name]  # type: ignore[attr-defined]
        assert torch.isfinite(moved).all(), name
        assert (moved > 0.01 * expected).float().mean() > 0.95, name


def test_every_gradient_that_is_let_through_has_finite_moments() -> None:
    # Adam by hand: v is a mean of squares, so the largest gradient that passes must have a square that float32 holds.
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=1e-3, fused=True)
    for size in (1e19, 1.8e19, 1.85e19, 1e20, FLOAT32_MAX):
        skipped = SkippedUpdates("cpu")
        gradient = torch.full((1,), size)
        skipped.judge([gradient])
        skipped.judge_squares([gradient])
        parameter.grad = gradient
        optimizer.found_inf = skipped.found_inf  # type: ignore[attr-defined]
        for _ in range(50):
            optimizer.step()
        assert bool(skipped.found_inf) == (size > 1.84e19)
        assert torch.isfinite(optimizer.state[parameter]["exp_avg_sq"]).all()


def test_a_large_gradient_that_clipping_makes_small_is_applied() -> None:
    learner = make_learner(grad_clip=1.0, grad_clip_by="value")
    rows = random_rows(8)
    rows[Columns.REWARDS][3] = 1e21
    before = everything(learner)
    assert update(learner, rows, 8)[keys.NUM_SKIPPED_UPDATES_LIFETIME] == 0
    name = next(name for name in before if name.startswith("critic."))
    assert not torch.equal(everything(learner)[name], before[name])
    assert all(torch.isfinite(value).all() for value in everything(learner).values())
    assert learner.module[MODULE] is not None


# --- Settings and offline data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "offline_data",
            {"failure_reward": -1e37},
            r"`failure_reward` -1e\+37 for ever is a return of -1e\+39 by",
        ),
        (
            "offline_data",
            {"failure_reward": 1.0, "reward_scale": 1e37},
            r"`failure_reward` 1\.0 for ever .*1e\+39 by `reward_scale` 1e\+37, `reward_bias` 0\.0, `gamma` 0\.99",
        ),
        ("offline_data", {"failure_reward": 0.0, "reward_bias": 1e38}, r"`failure_reward` 0\.0 for ever .* 1e\+40"),
        ("offline_data", {"reward_scale": 1e39}, r"`reward_scale` must be 0 or between 1\.2e-38 and 3\.4e\+38 in size"),
        ("offline_data", {"reward_scale": 1e-50}, r"`reward_scale` must be 0 or between .*; got 1e-50"),
        ("offline_data", {"reward_bias": -1e300}, r"`reward_bias` must be 0 or between"),
        ("training", {"initial_alpha": 1e60}, r"`initial_alpha` must be 0 or between"),
        ("training", {"temperature": 1e-60}, r"`temperature` must be 0 or between"),
        ("training", {"min_q_weight": 1e39}, r"`min_q_weight` must be 0 or between"),
        ("training", {"critic_lr": 1e-46}, r"`critic_lr` must be 0 or between"),
        ("fine_tuning", {"min_q_weight_online": 1e39}, r"`min_q_weight_online` must be 0 or between"),
    ],
    ids=str,
)
def test_settings_that_float32_makes_infinite_or_zero_are_refused(
    method: str, settings: dict[str, Any], message: str
) -> None:
    config = getattr(CalQLConfig(), method)(**settings)
    with pytest.raises(ValueError, match=message):
        config.validate()


@pytest.mark.parametrize("settings", [{"truncation": "steady"}, {"failure_reward": -1.0}], ids=str)
def test_a_gamma_that_cannot_be_told_from_one_has_no_endless_sums(settings: dict[str, Any]) -> None:
    config = CalQLConfig().training(gamma=1 - 1e-12).offline_data(**settings)
    with pytest.raises(ValueError, match=r"`gamma` must be below 1 with .*got 0\.99999"):
        config.validate()


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        (
            {4: 1e20},
            {"reward_scale": 1e20},
            r"episode 'second', row 4 of .*: a reward of 1e\+20 becomes 1e\+40 by `reward_scale` 1e\+20.*lower",
        ),
        ({4: 3e38}, {"reward_bias": 3e38}, r"row 4 of .*: a reward of 3e\+38 becomes 6e\+38 by .*`reward_bias` 3e\+38"),
        (
            {3: 2e36, 4: 2e36},
            {"reward_scale": 1e2},
            r"row 3 of .*: the return from there on is more than float32",
        ),
        ({6: 1e37}, {"truncation": "steady"}, r"row 3 of .*: the return from there on .*`truncation` 'steady'"),
    ],
    ids=["scale", "bias", "return", "steady"],
)
def test_rewards_that_the_settings_lift_over_float32_are_refused_with_the_row(
    tmp_path: Path, rewards: dict[int, float], settings: dict[str, Any], message: str
) -> None:
    rows = two_episodes()
    rows["rewards"] = [rewards.get(i, reward) for i, reward in enumerate(rows["rewards"])]
    with pytest.raises(ValueError, match=message):
        offline_config(write(tmp_path / "rows.parquet", rows), **settings).build()


def test_a_reference_column_beyond_float32_is_refused_with_the_row(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", two_episodes() | {"values": [0.0] * 5 + [1e39, 0.0]})
    config = offline_config(file).training(reference_value="values")
    with pytest.raises(ValueError, match=r"row 5 of .*: `values` holds 1e\+39, but training stores float32"):
        config.build()


# --- Online -----------------------------------------------------------------------------------------------------------


class GlitchEnv(FaultyEnv):
    """Its third step is faulty in the first episodes only, and numbers are handed out in float64."""

    num_episodes = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Counts the episodes."""
        type(self).num_episodes += 1
        obs, infos = super().reset(seed=seed, options=options)
        return obs.astype(np.float64), infos

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Stays at zero, but for the fault."""
        obs, reward, *rest = super().step(action)
        obs = obs.astype(np.float64)
        if self.t == 3 and self.num_episodes <= 2:
            obs[0], reward = self.fault.get("number", 0.0), self.fault.get("number_of_reward", 0.0)
        else:
            reward = 0.0
        return obs, reward, *rest


@pytest.mark.parametrize(
    ("fault", "settings"),
    [
        ({"number_of_reward": 1e300}, {}),
        ({"number_of_reward": 1e30}, {"reward_scale": 1e30}),
        ({"number": 1e300}, {}),
        ({"number": -1e39}, {}),
    ],
    ids=str,
)
def test_online_numbers_beyond_float32_cost_their_episode_and_are_not_stored(
    monkeypatch: pytest.MonkeyPatch, fault: dict[str, float], settings: dict[str, float]
) -> None:
    monkeypatch.setattr(GlitchEnv, "num_episodes", 0)
    config = small_config(GlitchEnv).environment(env_config=fault, disable_env_checking=True)
    algo = config.offline_data(**settings).fine_tuning(warmup_env_steps=0).build()
    try:
        for _ in range(4):
            result = algo.train()
        assert result["collection"]["num_discarded_episodes_lifetime"] == 2
        assert algo.store.num_online == 10
        for column in (Columns.OBS, Columns.NEXT_OBS, Columns.REWARDS, Columns.RETURNS_TO_GO):
            assert not algo.store.online_column(column).any()
    finally:
        algo.stop()
