"""`ResumableCQL`: what of the algorithm is in a checkpoint, and how a run is resumed from one."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.cql.cql import CQL
from ray.rllib.core import COMPONENT_LEARNER_GROUP
from ray.rllib.utils.annotations import override
from ray.rllib.utils.checkpoints import Checkpointable

from rllib_calql import metrics as keys
from rllib_calql.checkpoint import checked_checkpoint

if TYPE_CHECKING:
    from typing_extensions import Self

    from rllib_calql.config import CalQLConfig
    from rllib_calql.evaluation_history import EvaluationHistory
    from rllib_calql.replay import TransitionStore

_STATE = "calql"


class ResumableCQL(CQL):
    """The part of `CalQL` that concerns checkpoints.

    Attributes:
        config: The frozen config.
        store: Offline and online transitions.
        num_offline_updates: Gradient updates of the offline phase so far.
        num_online_updates: Gradient updates of the online phase so far.
        num_online_env_steps: Env steps stored so far.
        num_online_episodes: Episodes stored so far.
    """

    config: CalQLConfig
    store: TransitionStore
    num_offline_updates: int
    num_online_updates: int
    num_online_env_steps: int
    num_online_episodes: int
    _updates_owed: float
    _history: EvaluationHistory

    def _after_restore(self) -> None:
        """Brings env runners in line with what was restored, and waits for it."""
        raise NotImplementedError

    def _counters_of_phases(self) -> dict[str, int]:
        return {
            keys.NUM_OFFLINE_UPDATES_LIFETIME: self.num_offline_updates,
            keys.NUM_ONLINE_UPDATES_LIFETIME: self.num_online_updates,
            keys.NUM_ONLINE_ENV_STEPS_LIFETIME: self.num_online_env_steps,
            keys.NUM_ONLINE_EPISODES_LIFETIME: self.num_online_episodes,
        }

    @classmethod
    @override(Algorithm)
    def from_checkpoint(cls, path: Any, filesystem: Any = None, **kwargs: Any) -> Self:
        """Builds an algorithm from what `save_to_path` or Tune wrote, and restores its state.

        Args:
            path: Folder (relative ones work as well), URI, or Ray Train `Checkpoint`.
            filesystem: PyArrow filesystem of `path`; by default what the URI says.
            **kwargs: RLlib's own.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If the folder is no checkpoint.
        """
        if filesystem is None and isinstance(path, (str, pathlib.Path)) and "://" not in str(path):
            path = str(checked_checkpoint(pathlib.Path(path)))
        restored: Self = super().from_checkpoint(path, filesystem, **kwargs)
        return restored

    @override(Algorithm)
    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state and ours: counters, debt of updates, online data, random state, evaluations."""
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(_STATE, components, not_components):
            state[_STATE] = {
                **self._counters_of_phases(),
                "updates_owed": self._updates_owed,
                "store": self.store.get_state(),
                "history": self._history.get_state(),
            }
        return state

    @override(Algorithm)
    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` returned.

        Raises:
            ValueError: If the offline data or the online capacity are not those of the checkpoint.
        """
        state = dict(state)
        if self.env_runner_group is None and COMPONENT_LEARNER_GROUP in state:
            self.learner_group.set_state(state.pop(COMPONENT_LEARNER_GROUP))
        own = state.pop(_STATE, None)
        super().set_state(state)
        if own is None:
            return
        self.num_offline_updates = own[keys.NUM_OFFLINE_UPDATES_LIFETIME]
        self.num_online_updates = own[keys.NUM_ONLINE_UPDATES_LIFETIME]
        self.num_online_env_steps = own[keys.NUM_ONLINE_ENV_STEPS_LIFETIME]
        self.num_online_episodes = own[keys.NUM_ONLINE_EPISODES_LIFETIME]
        self._updates_owed = own["updates_owed"]
        self.store.set_state(own["store"])
        self._history.set_state(own["history"])
        self._after_restore()

    @override(Algorithm)
    def restore_from_path(self, path: str | pathlib.Path, *args: Any, **kwargs: Any) -> None:
        """Restores a checkpoint, also without env runners, and waits until runners have the weights."""
        if self.env_runner_group is None:
            Checkpointable.restore_from_path(self, path, *args, **kwargs)
            return
        super().restore_from_path(path, *args, **kwargs)
        self._after_restore()
