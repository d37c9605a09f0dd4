"""Converts the logs of the tank to one Parquet file that `rllib_calql` reads.

What each reader does is plain pandas: names and units become those of the environment. The rest is the same for all
logs and is what matters, see `steps_of`:

* a row becomes a step: observation, action, the observation after it, and the reward that this brought;
* the last row of a batch is no step: it is the observation after the last one;
* a batch that ended by the interlock is terminated; one that ended because its time was up is truncated.

    python convert_logs.py           # logs/plant.csv, logs/historian.pkl, logs/scada.h5 -> logs/tank.parquet
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import tank

LOGS = Path(__file__).parent / "logs"
# The keys of the environment's observation, and the columns that each consists of.
OBSERVATION = {
    "level": ["level"],
    "temperature": ["temperature"],
    "outflow": ["outflow"],
    "inlet_temperature": ["inlet_temperature"],
    "setpoint": ["level_setpoint", "temperature_setpoint"],
}
ACTION = ["pump", "heater"]


def read_csv(path: Path) -> pd.DataFrame:
    """Rows of the control system's export: mm become m."""
    raw = pd.read_csv(path, sep=";")
    return pd.DataFrame(
        {
            "batch": "csv-" + raw["Batch"],
            "level": raw["LI101 [mm]"] / 1000.0,
            "level_setpoint": raw["LC101.SP [mm]"] / 1000.0,
            "temperature": raw["TI102 [degC]"],
            "temperature_setpoint": raw["TC102.SP [degC]"],
            "inlet_temperature": raw["TI103 [degC]"],
            "outflow": raw["FI104 [l/min]"],
            "pump": raw["P101.OUT [%]"],
            "heater": raw["H102.OUT [kW]"],
            "tripped": raw["Interlock"] == "TRIP",
        }
    )


def read_pickle(path: Path) -> pd.DataFrame:
    """Rows of the historian's export: W become kW, and a pause in the time index begins a new batch.

    A pickle is a program: read only files that you would run.
    """
    raw = pd.read_pickle(path)
    is_new_batch = raw.index.to_series().diff() > pd.Timedelta(seconds=1.5 * tank.SECONDS_PER_STEP)
    names = {
        "tank1.level_m": "level",
        "tank1.level_sp_m": "level_setpoint",
        "tank1.temp_C": "temperature",
        "tank1.temp_sp_C": "temperature_setpoint",
        "feed.temp_C": "inlet_temperature",
        "tank1.outflow_lpm": "outflow",
        "pump1.speed_pct": "pump",
    }
    rows = raw.rename(columns=names)[list(names.values())]
    rows["heater"] = raw["heater1.power_W"] / 1000.0
    rows["tripped"] = raw["tank1.interlock"] > 0
    rows["batch"] = "historian-" + is_new_batch.cumsum().astype(str)
    return rows


def read_hdf5(path: Path) -> pd.DataFrame:
    """Rows of the data logger's file: every fifth of its samples, since the controller acts every ten seconds."""
    tables = []
    with h5py.File(path) as file:
        for name, group in file.items():
            every = round(tank.SECONDS_PER_STEP / group.attrs["sample_time_s"])
            table = pd.DataFrame(
                {
                    "level": group["level_cm"][::every] / 100.0,
                    "temperature": group["temperature_C"][::every],
                    "inlet_temperature": group["feed_temperature_C"][::every],
                    "outflow": group["outflow_lpm"][::every],
                    "pump": 100.0 * group["pump_0_to_1"][::every],
                    "heater": group["heater_kW"][::every],
                }
            )
            table["level_setpoint"] = group.attrs["level_setpoint_cm"] / 100.0
            table["temperature_setpoint"] = group.attrs["temperature_setpoint_C"]
            table["tripped"] = False
            table.loc[table.index[-1], "tripped"] = bool(group.attrs["interlock_tripped"])
            table["batch"] = f"scada-{name}"
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def steps_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Steps in the columns that `rllib_calql` reads, from the rows of one batch in order of time.

    Args:
        rows: The columns of `OBSERVATION` and `ACTION`, `tripped` and `batch`.
    """
    values = {key: rows[columns].to_numpy(np.float64) for key, columns in OBSERVATION.items()}
    observations = [{key: value[row] for key, value in values.items()} for row in range(len(rows))]
    after = rows.iloc[1:]
    is_last = np.arange(len(after)) == len(after) - 1
    tripped = bool(rows["tripped"].iloc[-1])
    setpoint = after[["level_setpoint", "temperature_setpoint"]].to_numpy()
    return pd.DataFrame(
        {
            "eps_id": rows["batch"].iloc[0],
            "obs": observations[:-1],
            "actions": list(rows[ACTION].iloc[:-1].to_numpy(np.float64)),
            "rewards": tank.reward(after["level"].to_numpy(), after["temperature"].to_numpy(), setpoint),
            "new_obs": observations[1:],
            "terminateds": is_last & tripped,
            "truncateds": is_last & (not tripped),
        }
    )


def main() -> None:
    """Converts the three files."""
    rows = pd.concat([read_csv(LOGS / "plant.csv"), read_pickle(LOGS / "historian.pkl"), read_hdf5(LOGS / "scada.h5")])
    steps = pd.concat([steps_of(batch) for _, batch in rows.groupby("batch", sort=False)], ignore_index=True)
    steps.to_parquet(LOGS / "tank.parquet")
    returns = steps.groupby("eps_id")["rewards"].sum()
    is_after = rows["batch"].duplicated()  # All rows but the first of each batch.
    setpoint = rows[["level_setpoint", "temperature_setpoint"]].to_numpy()
    on_setpoint = tank.is_on_setpoint(rows["level"].to_numpy(), rows["temperature"].to_numpy(), setpoint)[is_after]
    print(f"{LOGS / 'tank.parquet'}: {len(returns)} batches, {len(steps)} steps")
    print(f"the operators: return {returns.mean():.1f}, on the set-point {on_setpoint.mean():.2f} of the time")


if __name__ == "__main__":
    main()
