"""Bounds of actions: what cannot be resolved is refused, a dimension without choice takes part in nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from ray.rllib.core.columns import Columns

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.common.spaces import check_action_space
from rllib_calql.datasets.writers.conversion import convert, scaled_to_environment
from rllib_calql.datasets.writers.recording import record
from rllib_calql.learning.losses import SampledValues
from rllib_calql.networks.rl_module import CalQLTorchRLModule
from rllib_calql.store.transitions import to_module_actions

LARGEST32, LARGEST64 = float(np.finfo(np.float32).max), float(np.finfo(np.float64).max)
# The second of three joints is fixed, not at 0 and not at a number of few digits.
JOINTS = Box(np.array([-1.0, 0.3, -2.0]), np.array([1.0, 0.3, 4.0]), dtype=np.float64)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "message"),
    [
        (-LARGEST32, LARGEST32, np.float32, "as good as unbounded"),
        (-LARGEST64, LARGEST64, np.float64, "as good as unbounded"),
        (-LARGEST32, LARGEST32, np.float64, "as good as unbounded"),
        (-1.0, LARGEST32, np.float32, "as good as unbounded"),
        (-1e38, 1e38, np.float32, "as good as unbounded"),
        (-1e20, 0.0, np.float32, "as good as unbounded"),
        (-np.inf, np.inf, np.float32, "must be bounded"),
        (-1.0, np.inf, np.float32, "must be bounded"),
        (-np.inf, 1.0, np.float64, "must be bounded"),
        (1e7, 1e7 + 4, np.float32, "fewer than 1000 numbers"),
        (1e16, 1e16 + 64, np.float64, "as good as unbounded"),
        (1e11, 1e11 + 1e-3, np.float64, "fewer than 1000 numbers"),
        (-1.0, 1.0, np.float16, "must be of float32 or float64"),
        (2.0, 2.0, np.float32, "leaves no choice"),
    ],
)
def test_bounds_that_cannot_be_resolved_are_refused(low: float, high: float, dtype: Any, message: str) -> None:
    with np.errstate(over="ignore"):
        space = Box(low, high, (2,), dtype)
    config = CalQLConfig().environment(observation_space=Box(-1, 1, (2,)), action_space=space)
    with pytest.raises(ValueError, match=f"^`action_space` .*{message}"):
        config.validate()


@pytest.mark.parametrize("change", [("low", np.nan), ("high", np.nan), ("low", 2.0)])
def test_bounds_that_were_spoilt_after_the_space_was_made_are_refused(change: tuple[str, float]) -> None:
    space = Box(-1.0, 1.0, (2,))
    getattr(space, change[0])[1] = change[1]
    with pytest.raises(ValueError, match="low <= high in every dimension"):
        check_action_space(space, "`action_space`")


@pytest.mark.parametrize(
    "space",
    [Box(-1e9, 1e9, (1,)), Box(1e7, 1.1e7, (1,)), Box(1e8, 1e8 + 1, (1,), np.float64), Box(0, 1e-30, (1,)), JOINTS],
)
def test_bounds_of_any_ordinary_size_are_taken(space: Box) -> None:
    check_action_space(space, "The action space")


def test_converted_actions_need_bounds_that_can_be_resolved() -> None:
    space = Box(-LARGEST32, LARGEST32, (1,))
    with pytest.raises(ValueError, match=r"The action space of 'data' is bounded by \[-3.40282e\+38, 3.40282e\+38\]"):
        scaled_to_environment(np.zeros((1, 1), np.float32), space, "data")
    fixed = scaled_to_environment(np.array([[0.5, 0.7, -1.0]]), JOINTS, "data")
    np.testing.assert_array_equal(fixed, [[0.5, 0.3, -2.0]])


# A dimension whose bounds are one number


def test_recorded_actions_of_a_fixed_dimension_are_taken_up_to_rounding_and_become_0() -> None:
    actions = np.array([[1.0, 0.3, 4.0], [0.0, np.float32(0.3), -2.0]])
    np.testing.assert_allclose(to_module_actions(actions, JOINTS, str), [[1.0, 0.0, 1.0], [0.0, 0.0, -1.0]], atol=1e-12)
    for wrong in (0.31, 0.29, np.nan):
        with pytest.raises(ValueError, match=r"^1: action .* is outside the bounds"):
            to_module_actions(np.array([[0.0, 0.3, 0.0], [0.0, wrong, 0.0]]), JOINTS, str)


def module_of(action_space: Box) -> CalQLTorchRLModule:
    config = CalQLConfig().training(num_actions=3).rl_module(model_config={"actor_hiddens": [5], "critic_hiddens": [5]})
    learner = config.build_learner(spaces={"default_policy": (Box(-1, 1, (2,)), action_space)})
    module: CalQLTorchRLModule = learner._calql_module
    return module


def test_densities_and_critics_know_the_free_dimensions_alone() -> None:
    whole, free = module_of(JOINTS), module_of(Box(JOINTS.low[[0, 2]], JOINTS.high[[0, 2]], dtype=np.float64))
    free.load_state_dict(whole.state_dict())  # The same networks.
    rng = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(4, 2, generator=rng) for name in (Columns.OBS, Columns.NEXT_OBS)}
    actions = torch.rand(4, 2, generator=rng) * 1.8 - 0.9
    outputs = []
    for module in (whole, free):
        rows = torch.stack([actions[:, 0], torch.zeros(4), actions[:, 1]], 1) if module is whole else actions
        module.generator = torch.Generator().manual_seed(1)
        torch.manual_seed(2)
        given = {**batch, Columns.ACTIONS: rows}
        explored = module.forward_exploration(batch)
        outputs.append(
            {**module.forward_train(given), **module.compute_q_values(given), **module.forward_target(given)}
        )
        outputs[-1] |= {"logp": explored[Columns.ACTION_LOGP], "value": module.estimate_values(batch[Columns.OBS])}
        if module is whole:
            assert (explored[Columns.ACTIONS][:, 1] == 0).all()
            assert (module.forward_inference(batch)[Columns.ACTIONS][:, 1] == 0).all()
    assert outputs[0].keys() == outputs[1].keys()
    for name, values in outputs[0].items():
        torch.testing.assert_close(values, outputs[1][name], rtol=0, atol=0)


def test_entropy_and_uniform_density_count_the_free_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CalQLConfig().training(num_actions=2).rl_module(model_config={"actor_hiddens": [5], "critic_hiddens": [5]})
    learner = config.build_learner(spaces={"default_policy": (Box(-1, 1, (2,)), JOINTS)})
    assert float(learner.target_entropy["default_policy"]) == -2.0
    seen: list[int] = []

    class Spy(SampledValues):
        def __new__(cls, **values: Any) -> Any:
            seen.append(values["action_dim"])
            return SampledValues(**values)

    monkeypatch.setattr("rllib_calql.learning.losses.SampledValues", Spy)
    rows = {name: torch.rand(4, 2) for name in (Columns.OBS, Columns.NEXT_OBS)} | {Columns.ACTIONS: torch.zeros(4, 3)}
    rows |= {name: torch.zeros(4) for name in ("rewards", "terminateds", "returns_to_go", "is_offline")}
    learner._uncompiled_update({"default_policy": rows})
    assert seen == [2]
    config = config.copy(copy_frozen=False).training(target_entropy=-7.0)
    learner = config.build_learner(spaces={"default_policy": (Box(-1, 1, (2,)), JOINTS)})
    assert float(learner.target_entropy["default_policy"]) == -7.0


class Arm(gym.Env):  # type: ignore[type-arg]
    """Keeps the actions that it gets."""

    observation_space, action_space = Box(-1, 1, (2,)), JOINTS
    received: list[np.ndarray] = []  # noqa: RUF012

    def __init__(self, config: Any = None) -> None:
        self.t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Zeros."""
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Zeros; the reward is the action's first number."""
        self.t += 1
        self.received.append(np.array(action))
        return np.zeros(2, np.float32), float(action[0]), False, self.t == 5, {}


def config_of() -> CalQLConfig:
    config = CalQLConfig().environment(Arm).training(num_actions=2, train_batch_size_per_learner=4)
    config.rl_module(model_config={"actor_hiddens": [4], "critic_hiddens": [4]}).debugging(seed=0)
    return config.fine_tuning(warmup_env_steps=5, updates_per_env_step=0.2, updates_per_iteration=1)


def test_the_environment_gets_the_fixed_number_and_recorded_actions_come_back(
    tmp_path: Path, ray_session: None
) -> None:
    Arm.received.clear()
    algo: CalQL = config_of().evaluation(evaluation_duration=1).build()
    for _ in range(3):
        algo.train()
    algo.evaluate()
    online = algo.store.online_column(Columns.ACTIONS)
    assert (online[:, 1] == 0).all()
    assert len(np.unique(online[:, 0])) > 5
    record(algo, None, 2, tmp_path / "arm.npz", seed=0)
    algo.stop()
    received = np.stack(Arm.received)
    assert (received[:, 1] == 0.3).all()  # Exactly, in training, evaluation and while recording.
    convert(tmp_path / "arm.npz", tmp_path / "arm.parquet", action_space=JOINTS)
    for name in ("arm.npz", "arm.parquet"):
        offline = config_of().offline_data(input_=tmp_path / name).fine_tuning(offline_updates=1).build()
        stored = offline.store.offline_column(Columns.ACTIONS)
        expected = np.clip((received[-10:] - JOINTS.low) / [1.0, 1.0, 3.0] - 1.0, -0.99999, 0.99999)
        np.testing.assert_allclose(stored[:, [0, 2]], expected[:, [0, 2]], atol=1e-6)
        assert (stored[:, 1] == 0).all()
        offline.train()
        offline.stop()
