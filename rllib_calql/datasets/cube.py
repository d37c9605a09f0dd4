"""The cube task under the path by which experiment files name its environment; importing it registers that."""

from rllib_calql.datasets.generated.cube import CubeSingle

__all__ = ["CubeSingle"]
