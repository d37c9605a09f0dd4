"""The tank of `tuned_examples/own_system`: its physics, its logs in three forms, and their conversion."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest

from rllib_calql.datasets.readers.opening import open_input

FOLDER = Path(__file__).parents[2] / "tuned_examples" / "own_system"


@pytest.fixture(autouse=True)
def _in_the_example_s_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def tank() -> ModuleType:
    return importlib.import_module("tank")


def plant(tank: ModuleType, *, level: float, temperature: float, valve: float, inlet: float = 15.0) -> gym.Env:  # type: ignore[type-arg]
    """A tank in a known state whose valve nobody turns."""
    env = tank.Tank()
    env.reset(seed=0)
    env._level, env._temperature, env._valve, env._inlet_temperature = level, temperature, valve, inlet
    env._np_random = type("Nobody", (), {"random": lambda self: 1.0})()
    return env  # type: ignore[no-any-return]


# --- Physics ----------------------------------------------------------------------------------------------------------


def test_an_open_tank_empties_as_torricelli_says(tank: ModuleType) -> None:
    valve, level = 6e-6, 0.4
    env = plant(tank, level=level, temperature=20.0, valve=valve)
    for _ in range(30):
        obs, *_ = env.step(np.zeros(2))
    # The root of the level falls linearly: d sqrt(h) / dt = -valve sqrt(2 g) / (2 A), A = 0.015 m2, for 300 s.
    expected = (math.sqrt(level) - valve * math.sqrt(2 * 9.81) / (2 * 0.015) * 300.0) ** 2
    assert obs["level"][0] == pytest.approx(expected, rel=2e-3)


def test_a_closed_tank_warms_up_by_what_the_heater_gives(tank: ModuleType) -> None:
    env = plant(tank, level=0.3, temperature=20.0, valve=0.0)
    obs, *_ = env.step(np.array([0.0, 3.0]))
    # 30 kJ into 4.5 kg of water of 4.186 kJ/(kg K), from room temperature on: hardly any loss.
    assert obs["temperature"][0] - 20.0 == pytest.approx(30.0 / (4.5 * 4.186), rel=2e-3)


def test_a_closed_tank_cools_down_to_the_room(tank: ModuleType) -> None:
    env = plant(tank, level=0.3, temperature=60.0, valve=0.0)
    for _ in range(100):
        obs, *_ = env.step(np.zeros(2))
    # Exponentially, by 4 W/K out of 4.5 kg, for 1,000 s.
    assert obs["temperature"][0] - 20.0 == pytest.approx(40.0 * math.exp(-4.0 * 1000.0 / (4.5 * 4186.0)), rel=1e-3)


def test_in_balance_nothing_moves(tank: ModuleType) -> None:
    # At 40 % of the pump 1.6e-5 m3/s flow in; a valve of this opening lets the same out at 0.3 m.
    valve = 1.6e-5 / math.sqrt(2 * 9.81 * 0.3)
    heater = (
        1000.0 * 4186.0 * 1.6e-5 * (40.0 - 15.0) + 4.0 * (40.0 - 20.0)
    ) / 1000.0  # kW: the water's heat, the loss.
    env = plant(tank, level=0.3, temperature=40.0, valve=valve)
    for _ in range(50):
        obs, *_ = env.step(np.array([40.0, heater]))
    assert obs["level"][0] == pytest.approx(0.3, abs=1e-9)
    assert obs["temperature"][0] == pytest.approx(40.0, abs=1e-6)
    assert obs["outflow"][0] == pytest.approx(0.96)  # l/min


@pytest.mark.parametrize(("pump", "level"), [(100.0, 0.599), (0.0, 0.0501)])
def test_overflowing_and_running_dry_end_the_episode(tank: ModuleType, pump: float, level: float) -> None:
    env = plant(tank, level=level, temperature=40.0, valve=6e-6)
    assert not env.step(np.array([40.0, 0.0]))[2] or level < 0.1
    terminated = [env.step(np.array([pump, 0.0]))[2] for _ in range(3)]
    assert terminated[-1]


def test_rewards_are_whole_on_the_setpoint_and_halved_at_the_tolerances(tank: ModuleType) -> None:
    setpoint = np.array([0.3, 40.0])
    assert tank.reward(0.3, 40.0, setpoint) == 1.0
    assert tank.reward(0.32, 41.0, setpoint) == pytest.approx(0.5)
    assert tank.reward(0.3, 43.0, setpoint) == pytest.approx(0.5 + 0.5 / 4)
    assert tank.is_on_setpoint(0.319, 39.1, setpoint)
    assert not tank.is_on_setpoint(0.319, 38.9, setpoint)
    assert not tank.is_on_setpoint(0.321, 40.0, setpoint)


def test_the_registered_environment_keeps_gymnasium_s_contract(tank: ModuleType) -> None:
    env = gym.make("tank:Tank-v0")
    obs, info = env.reset(seed=3)
    steps = 0
    while True:
        assert env.observation_space.contains(obs)
        assert info["on_setpoint"] in (True, False)
        obs, _, terminated, truncated, info = env.step(env.action_space.sample() * np.array([0.5, 1.0]))
        steps += 1
        if terminated or truncated:
            break
    assert steps == 120
    assert truncated
    assert not terminated


# --- Logs and their conversion ----------------------------------------------------------------------------------------


def vectors(observations: Any) -> np.ndarray:
    """Keys in the order of the alphabet, one after the other."""
    keys = ("inlet_temperature", "level", "outflow", "setpoint", "temperature")
    return np.array([np.concatenate([one[key] for key in keys]) for one in observations])


def test_the_three_logs_are_converted_to_what_the_plant_did(
    tank: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator_logs, convert_logs = map(importlib.import_module, ("operator_logs", "convert_logs"))
    monkeypatch.setattr(operator_logs, "LOGS", tmp_path)
    monkeypatch.setattr(convert_logs, "LOGS", tmp_path)
    operator_logs.main(["--batches", "6", "--seed", "5"])
    convert_logs.main()
    steps = pd.read_parquet(tmp_path / "tank.parquet")
    truth = list(operator_logs.batches(6, 5))  # By the same seed.
    found = [batch for _, batch in steps.groupby("eps_id", sort=False)]
    assert len(found) == 6
    for batch, rows in zip(found, truth, strict=True):
        row = pd.DataFrame(rows)
        names = ["inlet_temperature", "level", "outflow", "level_setpoint", "temperature_setpoint", "temperature"]
        np.testing.assert_allclose(vectors(batch["obs"]), row[names][:-1], atol=1e-3)  # The CSV keeps four digits.
        np.testing.assert_allclose(vectors(batch["new_obs"]), row[names][1:], atol=1e-3)
        np.testing.assert_allclose(np.stack(batch["actions"]), row[["pump", "heater"]][:-1], atol=1e-3)
        assert list(batch["truncateds"]) == [False] * (len(batch) - 1) + [True]
        assert not batch["terminateds"].any()
    (reader,) = open_input(tmp_path / "tank.parquet")
    assert sum(len(block.rewards) for block in reader.blocks()) == 6 * 120


def test_rewards_in_the_converted_logs_are_those_of_the_environment() -> None:
    operator_logs, convert_logs = map(importlib.import_module, ("operator_logs", "convert_logs"))
    rows = next(operator_logs.batches(1, 9))
    steps = convert_logs.steps_of(pd.DataFrame(rows).assign(batch="a"))
    expected = [
        0.5 / (1 + abs(row["level"] - row["level_setpoint"]) / 0.02)
        + 0.5 / (1 + abs(row["temperature"] - row["temperature_setpoint"]))
        for row in rows[1:]
    ]
    np.testing.assert_allclose(steps["rewards"], expected)


def test_a_batch_that_tripped_is_terminated_and_one_whose_time_was_up_is_truncated(tank: ModuleType) -> None:
    convert_logs = importlib.import_module("convert_logs")
    columns = [name for names in convert_logs.OBSERVATION.values() for name in names]
    row = dict.fromkeys([*columns, *convert_logs.ACTION], 1.0)
    for tripped in (False, True):
        rows = pd.DataFrame([{**row, "batch": "a", "tripped": False}] * 3 + [{**row, "batch": "a", "tripped": tripped}])
        steps = convert_logs.steps_of(rows)
        assert list(steps["terminateds"]) == [False, False, tripped]
        assert list(steps["truncateds"]) == [False, False, not tripped]
