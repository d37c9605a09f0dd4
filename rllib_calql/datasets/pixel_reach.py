"""The task with images under the path by which experiment files name its environment; importing it registers that."""

from rllib_calql.datasets.generated.pixel_reach import PixelReach

__all__ = ["PixelReach"]
