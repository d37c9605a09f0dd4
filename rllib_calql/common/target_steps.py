"""`TargetSteps`: how many steps of rewards a target sums before it goes on with a value, and these sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TargetSteps:
    """Steps of a target, and its discount.

    With m = min(n_step, steps left in the episode), the target of a row is
    sum_{k<m} gamma^k r_{t+k} + gamma^m (1 - terminated_{t+m-1}) v(s_{t+m}).

    Attributes:
        n_step: n, at least 1.
        gamma: Discount of one step.
    """

    n_step: int = 1
    gamma: float = 1.0

    def num_rewards(self, steps_left: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Returns m of rows that have so many steps left in their episodes, their own included."""
        num_rewards: npt.NDArray[np.int64] = np.minimum(steps_left, self.n_step, dtype=np.int64)
        return num_rewards

    def sum_rewards(
        self, num_rewards: npt.NDArray[np.int64], reward_at: Callable[[int, tuple[Array, ...]], Array]
    ) -> Array:
        """Discounted sums of the rewards of some rows, in float64.

        Args:
            num_rewards: m of each row.
            reward_at: From k and the places of some of the rows, indices as of `np.nonzero`, the rewards k steps later.
        """
        places = np.nonzero(num_rewards)
        sums: Array = reward_at(0, places).astype(np.float64).reshape(num_rewards.shape)
        for k in range(1, self.n_step):
            places = tuple(index[num_rewards[places] > k] for index in places)
            if len(places[0]) == 0:
                break
            sums[places] += np.float64(self.gamma) ** k * reward_at(k, places)
        return sums

    def bootstrap_discounts(self, num_rewards: npt.NDArray[np.int64]) -> Array:
        """gamma^m, in float64."""
        discounts: Array = np.float64(self.gamma) ** num_rewards
        return discounts
