"""Numbers far from 0: refused or warned of where float32 cannot tell them apart, left alone where it can."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

from rllib_calql import CalQLConfig
from rllib_calql.store.resolution import remark_on_constants, remark_on_resolution, remark_on_rewards

ACTIONS = Box(-1.0, 1.0, (1,))
# First value and step of a series of 150.
FAR = {
    "clock": (1.7e9, 0.1),
    "clock in ms": (1.7e12, 100.0),
    "northing": (5.8e6, 0.05),
    "latitude": (52.1234567, 1e-6),
    "south": (-33.9, 1e-6),
    "pressure": (101_325.0, 1e-3),
}
NEAR = {
    "northing in a large area": (5.8e6, 50.0),
    "latitude of a country": (52.0, 0.01),
    "small": (0.0, 0.5),
    "seconds": (1e4, 1.0),
}


def series(first: float, step: float) -> np.ndarray:
    return first + np.arange(151) * step


def config_of(path: Path, space: gym.Space[Any], **settings: Any) -> CalQLConfig:
    config = CalQLConfig().environment(observation_space=space, action_space=ACTIONS)
    config.training(num_actions=2, train_batch_size_per_learner=4)
    config.rl_module(model_config={"actor_hiddens": [4], "critic_hiddens": [4]})
    return config.offline_data(input_=path, **settings).fine_tuning(offline_updates=1)


def rest_of_columns() -> dict[str, np.ndarray]:
    return {"actions": np.zeros((150, 1)), "rewards": np.arange(150) % 7.0, "terminals": np.arange(150) % 50 == 49}


def write_npz(path: Path, x: np.ndarray) -> Path:
    """`x` behind a number of another kind."""
    obs = np.stack([np.arange(151) % 2, x], axis=1)
    np.savez(path, observations=obs[:-1], next_observations=obs[1:], **rest_of_columns())
    return path


VECTOR = Box(-np.inf, np.inf, (2,), np.float64)
MESSAGE = (
    r"lie around .* with a standard deviation of .*, and float32, .*rounds them by up to .*subtract a fixed offset"
)


@pytest.mark.parametrize("name", FAR)
def test_what_float32_cannot_tell_apart_is_refused_where_it_is_normalised(
    name: str, tmp_path: Path, ray_session: None
) -> None:
    path = write_npz(tmp_path / "data.npz", series(*FAR[name]))
    with pytest.raises(ValueError, match=rf"data.npz': observations, dimension 1, {MESSAGE}"):
        config_of(path, VECTOR, normalize_observations=True).build()


@pytest.mark.parametrize("name", NEAR)
def test_what_float32_can_tell_apart_is_normalised_to_a_hundredth(name: str, tmp_path: Path, ray_session: None) -> None:
    x = series(*NEAR[name])
    algo = config_of(write_npz(tmp_path / "data.npz", x), VECTOR, normalize_observations=True).build()
    batch = torch.from_numpy(algo.store.offline_rows(np.arange(150))["obs"])
    z = algo.learner_group._learner._calql_module._normalise(batch).numpy()[:, 1]
    algo.stop()
    np.testing.assert_allclose(z, (x[:-1] - x[:-1].mean()) / x[:-1].std(), atol=0.02)


def test_it_is_warned_of_where_it_is_not_normalised(
    tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    for name, words in (("clock", "dimension 1, lie around 1.7"), ("seconds", None)):
        caplog.clear()
        path = write_npz(tmp_path / f"{name}.npz", series(*(FAR | NEAR)[name]))
        config_of(path, VECTOR).build().stop()
        warned = [r.getMessage() for r in caplog.records if "float32" in r.getMessage()]
        assert len(warned) == (words is not None)
        assert words is None or words in warned[0]


@pytest.mark.parametrize("limit", [1, None], ids=["cached", "in memory"])
@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint32])
def test_parts_of_a_dict_are_named_and_a_cached_table_is_refused_as_well(
    dtype: Any, limit: int | None, tmp_path: Path, ray_session: None
) -> None:
    space = Dict(kind=Discrete(3), z=Dict(clock=Box(0, 2**31, (2,), dtype), speed=Box(-1, 1, (1,))))
    clock = np.stack([np.arange(151), 1_700_000_000 + np.arange(151)], axis=1).astype(dtype)
    parts = {"kind": np.arange(151) % 3, "z/clock": clock, "z/speed": np.zeros((151, 1), np.float32)}
    with h5py.File(tmp_path / "data.h5", "w") as file:
        for part, values in parts.items():
            file[f"observations/{part}"], file[f"next_observations/{part}"] = values[:-1], values[1:]
        for column, values in rest_of_columns().items():
            file[column] = values
    settings = {"normalize_observations": True, "store_memory_limit": limit, "cache_dir": str(tmp_path / "cache")}
    for _ in range(2):
        with pytest.raises(ValueError, match=f"observations 'z/clock', dimension 1, {MESSAGE}"):
            config_of(tmp_path / "data.h5", space, **settings).build()


def test_constants_and_the_noise_of_numbers_about_1_are_no_loss(tmp_path: Path, ray_session: None) -> None:
    rng = np.random.default_rng(0)
    x = np.stack([np.full(151, 1.7e9), 41.3 * (1 + 1e-15 * rng.normal(size=151)), 1 + 1e-8 * rng.normal(size=151)], 1)
    np.savez(tmp_path / "data.npz", observations=x[:-1], next_observations=x[1:], **rest_of_columns())
    space = Box(-np.inf, np.inf, (3,), np.float64)
    config_of(tmp_path / "data.npz", space, normalize_observations=True).build().stop()


def test_a_set_point_that_changes_after_the_data_stays_a_small_number_and_one_warning_names_it(
    tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    space = Dict(level=Box(0, 100, (1,), np.float64), setpoint=Box(0, 100, (1,), np.float64))
    obs = {"level": np.arange(151.0)[:, None] % 50, "setpoint": np.full((151, 1), 45.0)}
    columns = {f"observations/{key}": values[:-1] for key, values in obs.items()}
    columns |= {f"next_observations/{key}": values[1:] for key, values in obs.items()}
    np.savez(tmp_path / "data.npz", **columns, **rest_of_columns())
    algo = config_of(tmp_path / "data.npz", space, normalize_observations=True).build()
    result = algo.train()
    module = algo.learner_group._learner._calql_module
    seen = module._normalise(torch.tensor([[25.0, 46.0], [1000.0, 45.0]])).numpy()
    algo.stop()
    assert seen.round(6)[:, 1].tolist() == [1.0, 0.0]
    assert seen[1, 0] == 10.0
    warned = [r.getMessage() for r in caplog.records if "constant" in r.getMessage()]
    assert len(warned) == 1
    assert "observations 'setpoint'[0] (always 45) are constant" in warned[0]
    assert "observations 'setpoint'[0] (always 45)" in result["offline_data_warnings"]
    assert result["learners"]["default_policy"]["clipped_observations_offline"] == 0.0
    assert "clipped_observations_online" not in result["learners"]["default_policy"]


def test_a_part_in_float32_does_not_hide_one_in_float64(tmp_path: Path, ray_session: None) -> None:
    narrow, wide = tmp_path / "a.npz", tmp_path / "b.npz"
    write_npz(wide, series(*FAR["clock"]))
    obs = np.zeros((151, 2), np.float32)
    np.savez(narrow, observations=obs[:-1], next_observations=obs[1:], **rest_of_columns())
    # The first part spreads the values: all are told apart from it, but not among themselves.
    for inputs in ([str(wide), str(narrow)], [str(wide)]):
        config = config_of(wide, VECTOR, normalize_observations=True).offline_data(input_=inputs)
        if len(inputs) == 1:
            with pytest.raises(ValueError, match=MESSAGE):
                config.build()
        else:
            config.build().stop()


def test_remarks_on_episodes_rewards_and_small_deviations() -> None:
    x = np.stack([np.linspace(-1.0, 1.0, 50), 1.7e9 + np.arange(50) * 0.1], axis=1)
    assert "dimension 1, lie around 1.7e+09 and vary by 1.4" in (remark_on_resolution(x) or "")
    for other in (x.astype(np.float32), x[:, :1], np.full((50, 1), 1.7e9), 1 + 1e-9 * x[:, :1], np.arange(50)[:, None]):
        assert remark_on_resolution(other) is None
    assert "subtract an offset by `reward_bias`" in (remark_on_rewards(1e9, 1e9 + 10) or "")
    for harmless in ((1e9, 1e9), (-1.0, 1.0), (0.0, 0.0), (100.0, 101.0)):
        assert remark_on_rewards(*harmless) is None


def test_constant_observations_are_named_by_key_and_index() -> None:
    space = Dict(setpoint=Box(0, 99, (2,)), at=Box(-1, 1, (2, 2)), kind=Discrete(2), level=Box(0, 1, ()))
    #        at: rounded by float32, 1e-5 that varies, noise of a simulator, varies | kind | level | setpoint
    mean = np.array([1.0, 2e-5, 0.0, 0.0, 0.5, 0.0, 0.3, 45.0, 45.0])
    std = np.array([1e-7, 1e-5, 1e-17, 1.0, 0.5, 0.0, 0.1, 1e-3, 0.0])
    told = remark_on_constants(space, mean, std) or ""
    named = "observations 'at'[0, 0] (always 1), 'at'[1, 0] (always 0), 'kind'[1] (always 0), 'setpoint'[1] (always 45)"
    assert told.startswith(named + " are constant")
    assert remark_on_constants(space, mean, np.ones(9)) is None
    many = remark_on_constants(Box(-1, 1, (20,)), np.zeros(20), np.zeros(20)) or ""
    assert "[7] (always 0) and 12 more are constant" in many


class Clock(gym.Env):  # type: ignore[type-arg]
    """Observes a clock."""

    observation_space, action_space = Box(0, np.inf, (1,), np.float64), ACTIONS

    def __init__(self, config: Any = None) -> None:
        self.t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode."""
        self.t = 0
        return np.array([1.7e9]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """A tenth of a second later."""
        self.t += 1
        return np.array([1.7e9 + self.t * 0.1]), 0.5, False, self.t == 10, {}


def test_an_environment_is_warned_of_once(
    ray_session: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.util.debug._logged", set())
    config = CalQLConfig().environment(Clock).training(num_actions=2, train_batch_size_per_learner=4)
    config.rl_module(model_config={"actor_hiddens": [4], "critic_hiddens": [4]})
    algo = config.fine_tuning(warmup_env_steps=10, updates_per_iteration=1, updates_per_env_step=0.1).build()
    with caplog.at_level(logging.WARNING):
        algo.train()
        algo.train()
    algo.stop()
    assert (
        sum(
            "Observations of the environment, dimension 0, lie around 1.7e+09" in r.getMessage() for r in caplog.records
        )
        == 1
    )


def test_swapped_columns_and_wrong_units_are_warned_of_before_training_also_of_a_cached_table(
    tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    space = Dict(level=Box(0, 2, (1,)), temperature=Box(15, 100, (1,)))
    obs = {"temperature": np.linspace(0.5, 1.5, 151)[:, None], "level": np.linspace(20, 60, 151)[:, None]}
    columns = {f"observations/{key}": values[:-1] for key, values in obs.items()}
    columns |= {f"next_observations/{key}": values[1:] for key, values in obs.items()}
    rest = rest_of_columns() | {"actions": np.linspace(0, 1, 150)[:, None]}
    np.savez(tmp_path / "data.npz", **columns, **rest)
    for limit in (None, 1, 1):
        caplog.clear()
        config = config_of(tmp_path / "data.npz", space, store_memory_limit=limit, cache_dir=str(tmp_path / "cache"))
        config.environment(action_space=Box(0.0, 100.0, (1,)))
        algo = config.build()
        found = algo.offline_data.warnings
        algo.stop()
        assert len(found) == 3
        assert ["'level'[0] and 'temperature'[0] would fit" in found[0], "use 1 %" in found[2]] == [True, True]
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert all(any(finding in message for message in told) for finding in found)
