"""`LineEnv` with pictures: `drawn_line:DrawnLine`. The brightness of a picture tells the step."""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from tiny import LineEnv

BRIGHTER = 10  # At each step.


class DrawnLine(LineEnv):
    """Takes `render_mode` from its config, as environments that are named by their path have to."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["human", "rgb_array"], "render_fps": 7}

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.render_mode = (config or {}).get("render_mode")

    def render(self) -> Any:
        """A grey picture of 47 x 64, the brighter the later."""
        return np.full((47, 64, 3), BRIGHTER * self.t, np.uint8)


class HumanLine(DrawnLine):
    """Can be shown on a screen alone."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["human"]}


class DeafLine(DrawnLine):
    """Does not take `render_mode` from its config."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()


class SketchedLine(DrawnLine):
    """Pictures are of floats."""

    def render(self) -> Any:
        """Numbers from 0 to 1."""
        return np.zeros((4, 4, 3))


class BrokenLine(DrawnLine):
    """Pictures cannot be made."""

    def render(self) -> Any:
        """Fails."""
        raise OSError("no context")


class OldLine(LineEnv):
    """Declares pictures, and its constructor knows nothing of them."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(self) -> None:
        super().__init__()


gym.register("OldLine-v0", OldLine)
