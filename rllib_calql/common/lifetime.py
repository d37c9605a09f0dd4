"""`Lifetime`: what a run has done since it began, and what follows from that: the phase, and the updates it owes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rllib_calql.common import metrics as keys

_UPDATES_OWED = "updates_owed"


class Lifetime:
    """Lifetime counters, over all processes that a run has gone on in.

    Every env step stored after the warm-up owes `updates_per_env_step` updates, and every online update pays one back.

    Args:
        offline_updates: Updates after which the offline phase is over.
        updates_per_env_step: Online updates for every env step.
        warmup_env_steps: Env steps at the beginning that owe nothing.
    """

    def __init__(self, *, offline_updates: int, updates_per_env_step: float, warmup_env_steps: int) -> None:
        self._offline_updates = offline_updates
        self._updates_per_env_step = updates_per_env_step
        self._warmup_env_steps = warmup_env_steps
        self._num_offline_updates = 0
        self._num_online_updates = 0
        self._num_online_env_steps = 0
        self._num_online_episodes = 0
        self._num_online_env_steps_taken = 0
        self._updates_owed = 0.0

    @property
    def num_offline_updates(self) -> int:
        """Gradient updates of the offline phase so far."""
        return self._num_offline_updates

    @property
    def num_online_updates(self) -> int:
        """Gradient updates of the online phase so far."""
        return self._num_online_updates

    @property
    def num_updates(self) -> int:
        """Gradient updates of both phases so far."""
        return self._num_offline_updates + self._num_online_updates

    @property
    def num_online_env_steps(self) -> int:
        """Env steps stored so far."""
        return self._num_online_env_steps

    @property
    def num_online_episodes(self) -> int:
        """Episodes stored so far."""
        return self._num_online_episodes

    @property
    def num_online_env_steps_taken(self) -> int:
        """Env steps that environments have taken for training so far, whether or not they could be stored."""
        return self._num_online_env_steps_taken

    @property
    def updates_owed(self) -> float:
        """Online updates that stored env steps still ask for."""
        return self._updates_owed

    @property
    def num_env_steps_behind(self) -> float:
        """Env steps stored that updates are still to be made for."""
        return self._updates_owed / self._updates_per_env_step

    @property
    def num_offline_updates_left(self) -> int:
        """Updates until the offline phase is over."""
        return max(0, self._offline_updates - self._num_offline_updates)

    @property
    def phase(self) -> str:
        """The phase of the next training step, "offline" or "online"."""
        return keys.OFFLINE if self.num_offline_updates_left else keys.ONLINE

    @property
    def is_warming_up(self) -> bool:
        """Whether env steps owe no updates yet."""
        return self._num_online_env_steps < self._warmup_env_steps

    # --- What happens ------------------------------------------------------------------------------------------------

    def count_updates(self, num_updates: int, *, online: bool) -> None:
        """Counts updates of a phase that were made."""
        if online:
            self._num_online_updates += num_updates
            self._updates_owed -= num_updates
        else:
            self._num_offline_updates += num_updates

    def count_episode(self, num_env_steps: int) -> None:
        """Counts an episode that was stored."""
        begun = max(self._num_online_env_steps, self._warmup_env_steps)
        self._num_online_env_steps += num_env_steps
        self._num_online_episodes += 1
        self._updates_owed += self._updates_per_env_step * max(0, self._num_online_env_steps - begun)

    def count_env_steps_taken(self, num_env_steps: int) -> None:
        """Counts env steps that environments have taken."""
        self._num_online_env_steps_taken += num_env_steps

    def take_back_updates(self, counters: Mapping[str, int]) -> None:
        """Returns to the updates of earlier `counters`, as lost learners do; those after them are owed again."""
        self._num_offline_updates = counters[keys.NUM_OFFLINE_UPDATES_LIFETIME]
        self._updates_owed += self._num_online_updates - counters[keys.NUM_ONLINE_UPDATES_LIFETIME]
        self._num_online_updates = counters[keys.NUM_ONLINE_UPDATES_LIFETIME]

    def continue_from(self, counters: Mapping[str, int]) -> None:
        """Counts the offline updates of another run, whose networks this one begins with."""
        self._num_offline_updates = counters[keys.NUM_OFFLINE_UPDATES_LIFETIME]

    # --- Results and checkpoints -------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """The counters under their names in results."""
        return {
            keys.NUM_OFFLINE_UPDATES_LIFETIME: self._num_offline_updates,
            keys.NUM_ONLINE_UPDATES_LIFETIME: self._num_online_updates,
            keys.NUM_ONLINE_ENV_STEPS_LIFETIME: self._num_online_env_steps,
            keys.NUM_ONLINE_EPISODES_LIFETIME: self._num_online_episodes,
            keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME: self._num_online_env_steps_taken,
        }

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint: the counters and the debt."""
        return {**self.counters(), _UPDATES_OWED: self._updates_owed}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        self._num_offline_updates = state[keys.NUM_OFFLINE_UPDATES_LIFETIME]
        self._num_online_updates = state[keys.NUM_ONLINE_UPDATES_LIFETIME]
        self._num_online_env_steps = state[keys.NUM_ONLINE_ENV_STEPS_LIFETIME]
        self._num_online_episodes = state[keys.NUM_ONLINE_EPISODES_LIFETIME]
        # Checkpoints of earlier versions know of stored ones alone.
        stored = self._num_online_env_steps
        self._num_online_env_steps_taken = state.get(keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME, stored)
        self._updates_owed = state[_UPDATES_OWED]
