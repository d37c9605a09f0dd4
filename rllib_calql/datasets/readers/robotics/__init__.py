"""Readers of what robots and other libraries write: CSV, LeRobot, robomimic, d3rlpy and Stable-Baselines3."""
