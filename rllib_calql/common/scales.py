"""How far numbers of one kind spread, by what float32 can tell apart of them."""

from __future__ import annotations

from typing import Any

ROUNDING = 2.0**-24  # Of float32, relative: half the distance of two neighbouring numbers.
LOSSY = 0.01  # Of a standard deviation: rounding that is more than this is a loss.
LEAST_STD = 1e-12  # Below it, in any unit, is what simulators compute where 0 is meant.


def is_nearly_constant(mean: Any, std: Any) -> Any:
    """Whether columns hold one number, as far as float32 can tell.

    It is so if the rounding of the mean is more than a hundredth of the standard deviation, which is then below 6e-6
    times the mean, or if the standard deviation is below 1e-12. Small units are no reason: numbers of 1e-5 that vary
    are not constant.

    Args:
        mean: NumPy array or tensor in float64.
        std: The same.

    Returns:
        Booleans in the kind and shape of the arguments.
    """
    return (std < LEAST_STD) | (abs(mean) * ROUNDING > LOSSY * std)
