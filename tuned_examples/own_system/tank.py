"""A heated tank: water flows in through a pump, is heated, and leaves through a valve that others open and close.

The controller is to hold level and temperature at their set-points. It sets the pump and the heater every ten seconds.

States are the level h in m and the temperature T in degC of well-mixed water. With the area A of the tank, the heat
capacity c, the density rho and the flows q in m3/s:

    A dh/dt         = q_in - q_out,                 q_in = pump / 100 * 4e-5,   q_out = valve * sqrt(2 g h)
    rho c A h dT/dt = P + rho c q_in (T_in - T) - U (T - T_room)

The outflow is Torricelli's law for an opening of `valve` m2. Both equations are integrated by the explicit Euler method
in sub-steps of one second. The fastest time constant, the water's stay in a nearly empty tank, is about twenty seconds,
so that a second is well inside the method's range of stability (two time constants).
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

SECONDS_PER_STEP = 10.0
STEPS_PER_EPISODE = 120  # Twenty minutes.

AREA = 0.015  # m2, a diameter of 14 cm.
HEIGHT = 0.60  # m; the tank overflows above.
LOWEST_LEVEL = 0.05  # m; the heater would run dry below.
LARGEST_INFLOW = 4e-5  # m3/s at 100 % of the pump, 2.4 l/min.
LARGEST_HEATING = 3.0  # kW.
VALVE_RANGE = (3e-6, 6.5e-6)  # m2, an opening of about 2 mm by 2 mm.
HEAT_CAPACITY = 4186.0  # J/(kg K), water.
DENSITY = 1000.0  # kg/m3, water.
HEAT_LOSS = 4.0  # W/K through the walls.
ROOM_TEMPERATURE = 20.0  # degC.
GRAVITY = 9.81  # m/s2.

LEVEL_TOLERANCE = 0.02  # m; nearer than this is on the set-point.
TEMPERATURE_TOLERANCE = 1.0  # K; the same.


def reward(level: Any, temperature: Any, setpoint: Any) -> Any:
    """What a step is worth, from 0 to 1: one half for the level, one half for the temperature that it leads to.

    Each half is whole on the set-point and halved at the tolerance. Logs hold no rewards: `convert_logs.py` computes
    them by this function.

    Args:
        level: After the step, m, shape (...).
        temperature: After the step, degC, shape (...).
        setpoint: Level in m and temperature in degC, shape (..., 2).
    """
    setpoint = np.asarray(setpoint)
    level_error = np.abs(level - setpoint[..., 0]) / LEVEL_TOLERANCE
    temperature_error = np.abs(temperature - setpoint[..., 1]) / TEMPERATURE_TOLERANCE
    return 0.5 / (1.0 + level_error) + 0.5 / (1.0 + temperature_error)


def is_on_setpoint(level: Any, temperature: Any, setpoint: Any) -> Any:
    """Whether level and temperature are within their tolerances; arguments as for `reward`."""
    setpoint = np.asarray(setpoint)
    is_level_there = np.abs(level - setpoint[..., 0]) <= LEVEL_TOLERANCE
    return is_level_there & (np.abs(temperature - setpoint[..., 1]) <= TEMPERATURE_TOLERANCE)


class Tank(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """The heated tank as an environment.

    * Actions: pump in % (0 to 100) and heater in kW (0 to 3).
    * Observations: level (m), temperature (degC), outflow (l/min), inlet temperature (degC), and the set-point of level
      (m) and temperature (degC).
    * `info["on_setpoint"]` says whether level and temperature are within their tolerances.
    * An episode is terminated where the tank overflows or runs so low that the interlock trips. The registered
      environment is truncated after twenty minutes.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(self) -> None:
        self.action_space = gym.spaces.Box(np.array([0.0, 0.0], np.float32), np.array([100.0, 3.0], np.float32))
        self.observation_space = gym.spaces.Dict(
            {
                "level": gym.spaces.Box(0.0, HEIGHT + 0.05, (1,), np.float64),
                "temperature": gym.spaces.Box(0.0, 120.0, (1,), np.float64),
                "outflow": gym.spaces.Box(0.0, 10.0, (1,), np.float64),
                "inlet_temperature": gym.spaces.Box(0.0, 40.0, (1,), np.float64),
                "setpoint": gym.spaces.Box(np.array([0.0, 0.0]), np.array([HEIGHT, 100.0]), (2,), np.float64),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begins twenty minutes with a new set-point, somewhere away from it."""
        super().reset(seed=seed)
        rng = self.np_random
        self._setpoint = np.array([rng.uniform(0.25, 0.40), rng.uniform(35.0, 45.0)])
        self._level = rng.uniform(0.15, 0.45)
        self._temperature = rng.uniform(20.0, 40.0)
        self._inlet_temperature = rng.uniform(10.0, 18.0)
        self._valve = rng.uniform(*VALVE_RANGE)
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Runs the plant for ten seconds with the pump and the heater as set."""
        pump, heater = np.clip(np.asarray(action, np.float64), self.action_space.low, self.action_space.high)
        if self.np_random.random() < SECONDS_PER_STEP / 600.0:  # Others turn the valve every ten minutes or so.
            self._valve = self.np_random.uniform(*VALVE_RANGE)
        for _ in range(round(SECONDS_PER_STEP)):
            self._integrate(pump, heater, seconds=1.0)
        terminated = not LOWEST_LEVEL < self._level < HEIGHT
        info = self._info()
        value = float(reward(self._level, self._temperature, self._setpoint))
        return self._observation(), value, terminated, False, info

    def _integrate(self, pump: float, heater: float, *, seconds: float) -> None:
        inflow = pump / 100.0 * LARGEST_INFLOW
        heat = 1000.0 * heater - HEAT_LOSS * (self._temperature - ROOM_TEMPERATURE)
        heat += DENSITY * HEAT_CAPACITY * inflow * (self._inlet_temperature - self._temperature)
        level = max(self._level, 0.01)  # The equation of the temperature has no meaning in an empty tank.
        self._temperature += seconds * heat / (DENSITY * HEAT_CAPACITY * AREA * level)
        self._level = max(0.0, self._level + seconds * (inflow - self._outflow()) / AREA)

    def _outflow(self) -> float:
        """In m3/s."""
        return float(self._valve * np.sqrt(2.0 * GRAVITY * self._level))

    def _observation(self) -> dict[str, np.ndarray]:
        return {
            "level": np.array([self._level]),
            "temperature": np.array([self._temperature]),
            "outflow": np.array([60_000.0 * self._outflow()]),
            "inlet_temperature": np.array([self._inlet_temperature]),
            "setpoint": self._setpoint.copy(),
        }

    def _info(self) -> dict[str, Any]:
        return {"on_setpoint": bool(is_on_setpoint(self._level, self._temperature, self._setpoint))}


gym.register("Tank-v0", entry_point=Tank, max_episode_steps=STEPS_PER_EPISODE)
