"""The PointMaze data sets under the path by which users import them."""

from rllib_calql.datasets.generated.pointmaze import evaluation_env_config

__all__ = ["evaluation_env_config"]
