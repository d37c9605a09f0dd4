"""`LineEnv` under an id, for experiment files: `registered_line:Line-v0`."""

import gymnasium as gym
from tiny import LineEnv

gym.register("Line-v0", LineEnv)
