"""From blocks of whole episodes to what the store keeps: flat observations, module actions, scaled rewards, returns."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns

from rllib_calql.common.encoding import flat_size, flatten_observations
from rllib_calql.common.references import REFERENCE_VALUES
from rllib_calql.common.returns import possible_returns
from rllib_calql.common.spaces import fixed_dimensions, leaves_of
from rllib_calql.datasets.episodes.columns import EXECUTED_ACTIONS
from rllib_calql.datasets.episodes.reader import EpisodeBlock, EpisodeReader
from rllib_calql.store.offline_table import EpisodeColumns
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.transitions import (
    check_module_actions,
    clipped_actions,
    to_module_actions,
    with_executed,
)

Array = npt.NDArray[Any]
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_REMEDY = "use the environment the data come from, or convert the data."
_ENCODING = 2  # Grows where the same data become other columns than before, or are refused: cached tables go by it.


@dataclass(frozen=True)
class Conversion:
    """How blocks become columns.

    Attributes:
        observation_space: The environment's, before flattening.
        action_space: The environment's.
        connector: Computes returns.
        actions_without_metadata: "environment" or "module": what actions are where the data do not say.
        reference_column: Column of the data that holds the reference value, in units of training rewards; None:
            returns-to-go are computed.
        obs_dtype: Type of observations in batches.
    """

    observation_space: gym.Space[Any]
    action_space: gym.spaces.Box
    connector: AddReturnsToGo
    actions_without_metadata: str
    reference_column: str | None
    obs_dtype: np.dtype[Any]
    _stored: dict[str, np.dtype[Any]] = field(default_factory=dict)  # Type of the first observations.

    @property
    def key_parts(self) -> dict[str, Any]:
        """Everything that the columns depend on beside the data, JSON-safe."""
        action_bounds = [self.action_space.low.tolist(), self.action_space.high.tolist()]
        return {
            "observation_space": str(self.observation_space),
            "observation_bounds": self._bounds_digest(),
            "encoding": _ENCODING,
            "action_bounds": action_bounds,
            "rewards": asdict(self.connector.settings),
            "actions": self.actions_without_metadata,
            "reference": self.reference_column,
            "obs_dtype": str(self.obs_dtype),
        }

    def _bounds_digest(self) -> str:
        """Of the bounds that the report compares observations with: the text of a space leaves out the middle ones."""
        digest = hashlib.blake2b(digest_size=16)
        for _, leaf in leaves_of(self.observation_space):
            if isinstance(leaf, gym.spaces.Box):
                digest.update(leaf.low.tobytes() + leaf.high.tobytes())
        return digest.hexdigest()

    def columns(self, reader: EpisodeReader, block: EpisodeBlock) -> EpisodeColumns:
        """Converts one block.

        Raises:
            ValueError: If observations or actions do not fit the spaces, or the reference column is missing.
        """

        def where(row: int) -> str:
            return f"Dataset {reader.info.name!r}, episode {block.id_of(row)!r}, {block.where(row)}"

        observations = self._observations(block.observations, where(0))
        final_observations = self._observations(block.final_observations, where(0))
        last_rows = np.cumsum(block.lengths) - 1
        _check_range(Columns.OBS, observations, where)
        _check_range(Columns.NEXT_OBS, final_observations, lambda episode: where(int(last_rows[episode])))
        rewards = self.connector.settings.transform(block.rewards)
        self._check_rewards(block.rewards, rewards, where)
        returns, has_tail = self._returns(block, where)
        possible = possible_returns(returns, rewards, block.lengths, block.terminateds, self.connector.settings.gamma)
        if self.reference_column is not None:
            returns, has_tail = self._reference_values(block, where), np.zeros(len(block.lengths), dtype=bool)
            possible = min(possible[0], float(returns.min())), max(possible[1], float(returns.max()))
        return EpisodeColumns(
            lengths=block.lengths,
            observations=observations,
            final_observations=final_observations,
            actions=self._actions(reader, block, where),
            rewards=rewards,
            returns_to_go=returns,
            terminateds=block.terminateds,
            has_tail=has_tail,
            possible_returns=possible,
        )

    def _observations(self, observations: Any, where: str) -> Array:
        space = self.observation_space
        if isinstance(space, (gym.spaces.Box, gym.spaces.MultiBinary)) and isinstance(observations, np.ndarray):
            _check_size(where, "observations", math.prod(observations.shape[1:]), flat_size(space))
        try:
            flat = flatten_observations(space, observations, keep_dtype=True)
        except (ValueError, TypeError, IndexError, KeyError) as err:
            remedy = _REMEDY
            if isinstance(space, gym.spaces.Box) and isinstance(observations, dict):
                names = ", ".join(map(str, observations))
                remedy = (
                    f"join the groups into one array, `numpy.concatenate([{names}], axis=1)`, in the order that the "
                    "environment has, or name the parts: a Dict as the space of the environment, or without one as "
                    "`observation_space`."
                )
            raise ValueError(
                f"{where}: observations do not fit the observation space {space}: {err}; {remedy}"
            ) from err
        if self.obs_dtype.kind in "iu":
            remedy = f"of the observation space {space}; give the environment a space of the type that the data have"
            return _converted(flat, self.obs_dtype, where, remedy)
        # Batches hold float32, so a type of floats that holds these is good enough.
        stored = self._stored.setdefault(Columns.OBS, flat.dtype)
        if stored.kind == "f" and stored.itemsize >= self.obs_dtype.itemsize:
            return flat
        return _converted(flat, stored, where, "that came before; store all inputs in one type")

    def _actions(self, reader: EpisodeReader, block: EpisodeBlock, where: Any) -> Array:
        if not isinstance(block.actions, np.ndarray):
            raise ValueError(f"{where(0)}: actions are nested, those of {self.action_space} are not; flatten them.")
        actions = block.actions.reshape(block.num_rows, -1)
        size = flat_size(self.action_space)
        _check_size(where(0), "actions", actions.shape[1], size)
        if block.actions.ndim > 2 and size > 1:
            raise ValueError(
                f"{where(0)}: actions are rows of shape {block.actions.shape[1:]}, those of {self.action_space} are "
                "flat; store them flat, in the order that the environment has."
            )
        executed = block.extra_model_outputs.get(EXECUTED_ACTIONS[0])
        if executed is None:
            return clipped_actions(self._module_actions(reader, actions, where))
        # What was asked for is of no use where another action was executed, so it may be outside the bounds there.
        is_executed = ~np.isnan(executed).any(axis=1)
        asked_for = np.flatnonzero(~is_executed)
        replaced = np.zeros(actions.shape)
        replaced[asked_for] = self._module_actions(reader, actions[asked_for], lambda row: where(int(asked_for[row])))
        return clipped_actions(with_executed(replaced, executed, is_executed, self.action_space, where))

    def _module_actions(self, reader: EpisodeReader, actions: Array, where: Callable[[int], str]) -> Array:
        """Module actions of what was asked for, both [R, A]."""
        fixed = fixed_dimensions(self.action_space)
        if reader.info.actions == "module":
            # RLlib clips what a policy without bounds proposes only on the way to the environment, after recording.
            return np.where(fixed, 0.0, actions) if fixed.any() else actions
        if self.actions_without_metadata == "module":
            actions = check_module_actions(actions, where)
            return np.where(fixed, 0.0, actions) if fixed.any() else actions
        return to_module_actions(actions, self.action_space, where)

    def _check_rewards(self, recorded: Array, rewards: Array, where: Callable[[int], str]) -> None:
        """Refuses training rewards that float32 cannot hold; both [R]."""
        row = _first_too_large(rewards)
        if row is None:
            return
        if abs(float(recorded[row])) > _FLOAT32_MAX:
            _check_range(Columns.REWARDS, recorded[:, None], where)
        raise ValueError(
            f"{where(row)}: a reward of {recorded[row]:.6g} becomes {rewards[row]:.3g} by {self.connector.settings}, "
            f"but training stores float32, at most {_FLOAT32_MAX:.3g}; lower `reward_scale` or `reward_bias`."
        )

    def _returns(self, block: EpisodeBlock, where: Any) -> tuple[Array, npt.NDArray[np.bool_]]:
        returns, has_tail = self.connector.returns_of_block(block.rewards, block.lengths, block.terminateds)
        row = _first_too_large(returns) if self.reference_column is None else None
        if row is not None:
            raise ValueError(
                f"{where(row)}: the return from there on is more than float32 can hold, {_FLOAT32_MAX:.3g}, by "
                f"{self.connector.settings}; lower `reward_scale`, or repair the rewards of the episode."
            )
        return returns, has_tail

    def _meant(self) -> str:
        close = difflib.get_close_matches(str(self.reference_column), REFERENCE_VALUES, n=1)
        return f" (did you mean {close[0]!r}?)" if close and close[0] != self.reference_column else ""

    def _reference_values(self, block: EpisodeBlock, where: Any) -> Array:
        assert self.reference_column is not None
        if self.reference_column not in block.extra_model_outputs:
            raise ValueError(
                f"{where(0)}: there is no column of numbers `{self.reference_column}`, which holds the reference "
                f"value by `reference_value` or `use_recorded_returns`{self._meant()}; add it, or set "
                f"`reference_value` to one of {', '.join(map(repr, REFERENCE_VALUES))}, which need no column."
            )
        values = np.asarray(block.extra_model_outputs[self.reference_column])
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            raise ValueError(
                f"{where(0)}: `{self.reference_column}` must hold one number per row, got shape {values.shape[1:]}."
            )
        finite = np.isfinite(values)
        if not finite.all():
            row = int(np.argmin(finite))
            raise ValueError(f"{where(row)}: `{self.reference_column}` holds {values[row]}; it must be finite.")
        _check_range(self.reference_column, values[:, None], where)
        return values


def _converted(flat: Array, dtype: np.dtype[Any], where: str, remedy: str) -> Array:
    """Observations in another type; refused if that changes a number."""
    if np.can_cast(flat.dtype, dtype, "safe"):
        return flat.astype(dtype, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        converted = flat.astype(dtype)
    if not np.array_equal(converted, flat):
        raise ValueError(f"{where}: observations are not the {dtype} numbers {remedy}.")
    return converted


def _check_range(column: str, values: Array, where: Callable[[int], str]) -> None:
    """Refuses what float32, the type of batches, cannot hold; values [R, n]."""
    if values.dtype.kind != "f" or values.dtype.itemsize <= 4 or values.size == 0:
        return
    if values.max() <= _FLOAT32_MAX and values.min() >= -_FLOAT32_MAX:
        return
    row, entry = np.argwhere(~(np.abs(values) <= _FLOAT32_MAX))[0].tolist()
    raise ValueError(
        f"{where(row)}: `{column}` holds {values[row, entry]:.3g}, but training stores float32, at most "
        f"{_FLOAT32_MAX:.3g}; repair or scale the value."
    )


def _first_too_large(values: Array) -> int | None:
    """The first of some numbers [R] that is NaN, infinite or beyond float32."""
    if values.size == 0 or (values.max() <= _FLOAT32_MAX and values.min() >= -_FLOAT32_MAX):
        return None
    return int(np.argmax(~(np.abs(values) <= _FLOAT32_MAX)))


def _check_size(where: str, what: str, size: int, expected: int) -> None:
    if size != expected:
        raise ValueError(f"{where}: {what} have {size} numbers, the environment's have {expected}; {_REMEDY}")
