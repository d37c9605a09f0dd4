"""Writes logs of the tank as a plant would: three programs of three vendors, each with its own idea of a file.

In your plant these files exist already. Here an operator of varying skill runs the simulated tank by hand and by a
thermostat: a proportional controller on the pump, a heater that is switched on and off, and hands that are not steady.

    python operator_logs.py          # writes logs/plant.csv, logs/historian.pkl and logs/scada.h5
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pandas as pd
import tank

LOGS = Path(__file__).parent / "logs"


class Operator:
    """Runs the pump in proportion to the level's error and switches the heater on and off.

    Args:
        rng: The hands of this operator: each has other habits, and adds noise to what they are.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._gain = rng.uniform(150.0, 500.0)  # % of the pump for each m.
        self._usual_pump = rng.uniform(25.0, 45.0)  # %; without knowing what the valve does.
        self._hysteresis = rng.uniform(0.5, 3.0)  # K.
        self._usual_heater = rng.uniform(1.5, 3.0)  # kW when it is on.
        self._is_heating = False
        self._wander = np.zeros(2)

    def act(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """Pump in % and heater in kW."""
        level_error = obs["setpoint"][0] - obs["level"][0]
        temperature_error = obs["setpoint"][1] - obs["temperature"][0]
        if abs(temperature_error) > self._hysteresis:
            self._is_heating = temperature_error > 0.0
        # Noise that lasts for a minute or so, as of a hand that turns a knob now and then.
        self._wander = 0.85 * self._wander + self._rng.normal(0.0, [6.0, 0.25])
        pump = self._usual_pump + self._gain * level_error + self._wander[0]
        heater = (self._usual_heater if self._is_heating else 0.3) + self._wander[1]
        return np.clip([pump, heater], [0.0, 0.0], [100.0, 3.0])


def batches(num_batches: int, seed: int) -> Iterator[list[dict[str, float]]]:
    """Yields batches of twenty minutes: a row for every ten seconds, and a last one when the batch was over."""
    rng = np.random.default_rng(seed)
    env = gym.make("tank:Tank-v0")
    for _ in range(num_batches):
        operator = Operator(rng)
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        rows, is_over, tripped = [], False, False
        while not is_over:
            pump, heater = operator.act(obs)
            rows.append(_row(obs, pump, heater, tripped))
            obs, _, tripped, is_late, _ = env.step(np.array([pump, heater]))
            is_over = tripped or is_late
        yield [*rows, _row(obs, pump, heater, tripped)]


def _row(obs: dict[str, np.ndarray], pump: float, heater: float, tripped: bool) -> dict[str, float]:
    values = {name: float(obs[name][0]) for name in ("level", "temperature", "outflow", "inlet_temperature")}
    level_setpoint, temperature_setpoint = map(float, obs["setpoint"])
    return {
        **values,
        "level_setpoint": level_setpoint,
        "temperature_setpoint": temperature_setpoint,
        "pump": float(pump),
        "heater": float(heater),
        "tripped": float(tripped),
    }


def write_csv(path: Path, rows_of: list[list[dict[str, float]]]) -> None:
    """The control system's export: tag names, levels in mm, a column that numbers the batches, `;` between them."""
    start = pd.Timestamp("2026-03-02 06:00:00")
    tables = []
    for number, rows in enumerate(rows_of):
        table = pd.DataFrame(rows)
        begin = start + pd.Timedelta(minutes=30 * number)
        tables.append(
            pd.DataFrame(
                {
                    "Timestamp": begin + pd.to_timedelta(tank.SECONDS_PER_STEP * np.arange(len(table)), unit="s"),
                    "Batch": f"B{number + 1:05d}",
                    "LI101 [mm]": 1000.0 * table["level"],
                    "LC101.SP [mm]": 1000.0 * table["level_setpoint"],
                    "TI102 [degC]": table["temperature"],
                    "TC102.SP [degC]": table["temperature_setpoint"],
                    "TI103 [degC]": table["inlet_temperature"],
                    "FI104 [l/min]": table["outflow"],
                    "P101.OUT [%]": table["pump"],
                    "H102.OUT [kW]": table["heater"],
                    "Interlock": np.where(table["tripped"] > 0, "TRIP", "OK"),
                }
            )
        )
    pd.concat(tables).to_csv(path, sep=";", index=False, float_format="%.4f")


def write_pickle(path: Path, rows_of: list[list[dict[str, float]]]) -> None:
    """The historian's export: one long pandas table with a time index, pauses between batches, heater in W."""
    start = pd.Timestamp("2026-04-07 14:00:00")
    tables = []
    for number, rows in enumerate(rows_of):
        table = pd.DataFrame(rows)
        begin = start + pd.Timedelta(minutes=45 * number)
        table.index = begin + pd.to_timedelta(tank.SECONDS_PER_STEP * np.arange(len(table)), unit="s")
        tables.append(table)
    whole = pd.concat(tables)
    whole["heater"] *= 1000.0
    names = {
        "level": "tank1.level_m",
        "level_setpoint": "tank1.level_sp_m",
        "temperature": "tank1.temp_C",
        "temperature_setpoint": "tank1.temp_sp_C",
        "inlet_temperature": "feed.temp_C",
        "outflow": "tank1.outflow_lpm",
        "pump": "pump1.speed_pct",
        "heater": "heater1.power_W",
        "tripped": "tank1.interlock",
    }
    whole.rename(columns=names).to_pickle(path)


def write_hdf5(path: Path, rows_of: list[list[dict[str, float]]]) -> None:
    """The data logger's file: a group for each run, sampled every two seconds, levels in cm, the pump from 0 to 1."""
    samples = round(tank.SECONDS_PER_STEP / 2.0)
    with h5py.File(path, "w") as file:
        for number, rows in enumerate(rows_of):
            table = pd.DataFrame(rows)
            # Between two rows the measurements are drawn as straight lines, and the outputs were held.
            fine = np.arange(samples * (len(table) - 1) + 1) / samples
            group = file.create_group(f"run_{number:04d}")
            group.attrs["sample_time_s"] = 2.0
            group.attrs["interlock_tripped"] = bool(table["tripped"].iloc[-1])
            group.attrs["level_setpoint_cm"] = 100.0 * table["level_setpoint"].iloc[0]
            group.attrs["temperature_setpoint_C"] = table["temperature_setpoint"].iloc[0]
            for name, column, factor in (
                ("level_cm", "level", 100.0),
                ("temperature_C", "temperature", 1.0),
                ("feed_temperature_C", "inlet_temperature", 1.0),
                ("outflow_lpm", "outflow", 1.0),
            ):
                group[name] = factor * np.interp(fine, np.arange(len(table)), table[column])
            held = fine.astype(int)
            group["pump_0_to_1"] = table["pump"].to_numpy()[held] / 100.0
            group["heater_kW"] = table["heater"].to_numpy()[held]


def main(arguments: list[str] | None = None) -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description="Writes logs of the tank as a plant would.")
    parser.add_argument("--batches", type=int, default=300, help="batches of 20 minutes in all files together")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    LOGS.mkdir(exist_ok=True)
    all_batches = list(batches(given.batches, given.seed))
    third = len(all_batches) // 3
    writers: list[tuple[Any, str]] = [
        (write_csv, "plant.csv"),
        (write_pickle, "historian.pkl"),
        (write_hdf5, "scada.h5"),
    ]
    for number, (write, name) in enumerate(writers):
        stop = len(all_batches) if number == 2 else (number + 1) * third
        write(LOGS / name, all_batches[number * third : stop])
        print(f"{LOGS / name}: {stop - number * third} batches")


if __name__ == "__main__":
    main()
