"""`Policy`: from a raw observation of the environment to an action in its units."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rllib_calql.policy.spaces import Array, ObservationSpace, refuse_masked
from rllib_calql.policy.step_values import checked_flag

# From checked leaves (B, ...), and whether an action is sampled, to the mean before tanh and, if it is, the log
# standard deviation, each of shape (B, number of free dimensions).
Outputs = Callable[[list[Array], bool], tuple[Array, Array | None]]


class ActionSpace:
    """A flat, bounded Box, to which [-1, 1]^A is mapped as RLlib does it.

    Args:
        description: `{"kind": "Box", "shape": [A], "dtype": "float32", "low": [...], "high": [...]}`.

    Attributes:
        free: Numbers of the dimensions that leave a choice.

    Raises:
        ValueError: If it is of another kind, or its bounds are none.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        if description["kind"] != "Box" or description["dtype"] not in ("float32", "float64"):
            raise ValueError(f"actions of the kind {description['kind']!r}, {description.get('dtype')}, are not known")
        self._low, self._high = (np.array(description[bound], description["dtype"]) for bound in ("low", "high"))
        if not self._low.shape == self._high.shape == tuple(description["shape"]) or self._low.ndim != 1:
            raise ValueError("the bounds of actions do not have their shape")
        if not (np.isfinite(self._low).all() and np.isfinite(self._high).all() and (self._low <= self._high).all()):
            raise ValueError("the bounds of actions are not finite and in order")
        self._span = self._high - self._low
        self.free: npt.NDArray[np.int64] = np.flatnonzero(self._low < self._high)
        self._has_fixed = len(self.free) < len(self._low)

    def checked(self, action: Any, name: str) -> Array:
        """An action of the environment, shape (A,), a copy in the environment's type.

        Args:
            action: What is to be one.
            name: What messages call it.

        Raises:
            ValueError: If its shape is another one, or a number is no action or beyond the bounds by more than a
                rounding.
        """
        refuse_masked(action, f"`{name}`")
        try:
            given = np.asarray(action)
        except (ValueError, TypeError) as err:
            raise ValueError(f"`{name}` must be an array of {self._low.shape} numbers, got {action!r}.") from err
        if given.dtype.kind not in "fiu":  # Texts of numbers would be converted.
            raise ValueError(f"`{name}` must be an array of {self._low.shape} numbers, got {action!r}.")
        with np.errstate(over="ignore"):
            array = given.astype(self._low.dtype)
        if array.shape != self._low.shape:
            raise ValueError(f"`{name}` must have the shape {self._low.shape}, got {array.shape}.")
        if not np.isfinite(array).all():
            raise ValueError(f"`{name}` is {array.tolist()}; all numbers must be finite.")
        slack = 1e-5 * np.maximum(self._span, np.maximum(np.abs(self._low), np.abs(self._high)))
        if not ((array >= self._low - slack) & (array <= self._high + slack)).all():
            raise ValueError(
                f"`{name}` is {array.tolist()}, outside of the bounds {self._low.tolist()} to {self._high.tolist()}; "
                "`action` is what was asked for and `executed_action` what was done instead, both in the environment's "
                "units; clip what was measured beyond the bounds."
            )
        return array

    def from_module(self, actions: Array) -> Array:
        """Environment actions (B, A) of actions in [-1, 1], shape (B, number of free dimensions), in its type."""
        if self._has_fixed:
            whole = np.zeros((len(actions), len(self._low)), np.float32)
            whole[:, self.free] = actions
            actions = whole
        mapped = self._low + (actions + 1.0) * self._span / 2.0
        within: Array = np.minimum(np.maximum(mapped, self._low), self._high)
        return within


class Policy:
    """A trained policy. `rllib_calql.load_policy` makes one of a file.

    Calls share nothing but the generator that is used where none is given, so threads may use one policy.

    Args:
        metadata: Of the file.
        observation_space: That of the metadata.
        action_space: That of the metadata.
        outputs: The network.
        greedy: From checked leaves to greedy actions of the environment, where that is known without `outputs`.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        *,
        observation_space: ObservationSpace,
        action_space: ActionSpace,
        outputs: Outputs,
        greedy: Callable[[list[Array]], Array] | None = None,
    ) -> None:
        self._metadata = metadata
        self._observations = observation_space
        self._actions = action_space
        self._outputs = outputs
        self._greedy = greedy
        self._generator: np.random.Generator | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file says of itself, a copy.

        `observation_space` and `action_space` (structure, shapes, types, bounds); `checkpoint` (fingerprint, updates,
        env steps); `scores` of its evaluations where they are known; `versions` it was made with; `network`.
        """
        return copy.deepcopy(dict(self._metadata))

    def __call__(self, observation: Any, explore: bool = False, rng: np.random.Generator | None = None) -> Array:
        """The action for one observation, see `compute_action`."""
        return self.compute_action(observation, explore, rng)

    def compute_action(self, observation: Any, explore: bool = False, rng: np.random.Generator | None = None) -> Array:
        """The action for one observation.

        Args:
            observation: As the environment gives it: its structure, shapes, types and units.
            explore: Whether the action is sampled, as in training; else it is the greedy one, as in evaluations.
            rng: Source of the sample; by default one of the policy's own. Greedy actions need none.

        Returns:
            An action in the environment's units and type, shape (A,).

        Raises:
            ValueError: If the observation is not one of the space, or a number of it is NaN or infinite.
                Likewise if they are so large that the network overflows.
            TypeError: If `rng` is no generator, or `explore` is neither True nor False.
        """
        leaves = self._observations.checked(observation, is_batch=False)
        action: Array = self._act(leaves, explore, rng)[0]
        return action

    def compute_actions(
        self, observations: Any, explore: bool = False, rng: np.random.Generator | None = None
    ) -> Array:
        """The actions for B observations at once.

        Args:
            observations: In the structure of one observation, every array with a first axis for the B observations.
            explore: As for `compute_action`.
            rng: As for `compute_action`.

        Returns:
            Shape (B, A).

        Raises:
            ValueError: As for `compute_action`, or if parts hold different numbers of observations.
            TypeError: As for `compute_action`.
        """
        return self._act(self._observations.checked(observations, is_batch=True), explore, rng)

    def compute_random_action(self, rng: np.random.Generator | None = None) -> Array:
        """An action drawn uniformly within the bounds, as in a warm-up before there is anything to act by.

        Args:
            rng: As for `compute_action`.

        Returns:
            An action in the environment's units and type, shape (A,).

        Raises:
            TypeError: If `rng` is no generator.
        """
        _check_rng(rng)
        drawn = self._generator_or(rng).uniform(-1.0, 1.0, (1, len(self._actions.free)))
        action: Array = self._actions.from_module(drawn.astype(np.float32))[0]
        return action

    def _generator_or(self, rng: np.random.Generator | None) -> np.random.Generator:
        if rng is None:
            rng = self._generator = self._generator or np.random.default_rng()
        return rng

    def _act(self, leaves: list[Array], explore: bool, rng: np.random.Generator | None) -> Array:
        if explore is not True and explore is not False:
            explore = checked_flag("explore", explore)
        if rng is not None:
            _check_rng(rng)
        actions = self._actions_of(leaves, explore, rng)
        if not math.isfinite(np.vdot(actions, actions)):  # A robot is not to get NaN; bounds are at most 1e12.
            raise ValueError(
                "The network overflows: numbers of the observation are too large for it. Check their units; those of "
                "the data that the policy learned from were smaller."
            )
        return actions

    def _actions_of(self, leaves: list[Array], explore: bool, rng: np.random.Generator | None) -> Array:
        if self._greedy is not None and not explore:
            return self._greedy(leaves)
        mean, log_std = self._outputs(leaves, explore)
        if log_std is None:
            return self._actions.from_module(np.tanh(mean))
        noise = self._generator_or(rng).standard_normal(mean.shape, np.float32)
        return self._actions.from_module(np.tanh(mean + np.exp(log_std) * noise))


def _check_rng(rng: Any) -> None:
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise TypeError(f"`rng` must be a NumPy generator, `numpy.random.default_rng(seed)`, got {type(rng).__name__}.")
