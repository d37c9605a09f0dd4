"""A decision process of a few states, solved exactly, and data that hold its transitions in exact proportions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rllib_calql.common.returns import RewardSettings
from rllib_calql.evaluation.fqe.data import JudgedData
from rllib_calql.store.offline_table import OfflineTable, record_dtype
from rllib_calql.store.split import Split

NUM_STATES, TIMES = 4, 10  # Probabilities are multiples of 1 / TIMES.


@dataclass(frozen=True)
class SolvedMDP:
    """Two actions, -0.5 and 0.5; the state after the last one ends an episode.

    Attributes:
        counts: Of TIMES tries, how many lead from state s by action k to each state, shape (2, S, S + 1).
        rewards: Environment rewards, shape (2, S).
        choices: Which of the actions the policy takes, shape (S,).
        start_states: Of the held-out episodes.
        gamma: Discount.
    """

    counts: np.ndarray
    rewards: np.ndarray
    choices: np.ndarray
    start_states: tuple[int, ...] = (0, 0, 1, 0, 2)
    gamma: float = 0.9
    scaling: RewardSettings = field(default_factory=lambda: RewardSettings(0.9, reward_scale=2.0, reward_bias=-1.0))

    @classmethod
    def drawn(cls, seed: int) -> SolvedMDP:
        """One by chance, in which nothing is more probable than not to end at once."""
        rng = np.random.default_rng(seed)
        odds = rng.dirichlet(np.ones(NUM_STATES + 1), size=(2, NUM_STATES))
        odds[..., -1] *= 0.3
        counts = np.stack([[rng.multinomial(TIMES, p / p.sum()) for p in of_action] for of_action in odds])
        return cls(counts, rng.normal(2.0, 3.0, (2, NUM_STATES)), rng.integers(2, size=NUM_STATES))

    def values(self) -> np.ndarray:
        """V of the policy by linear algebra, (I - gamma P) V = R, in float64."""
        states = np.arange(NUM_STATES)
        transitions = self.counts[self.choices, states, :-1] / TIMES
        return np.linalg.solve(np.eye(NUM_STATES) - self.gamma * transitions, self.rewards[self.choices, states])

    def features(self, observations: np.ndarray) -> np.ndarray:
        """The observations themselves."""
        return observations

    def actions(self, observations: np.ndarray) -> np.ndarray:
        """What the policy does; 0 after the end."""
        chosen = np.where(self.choices[observations.argmax(axis=1)], 0.5, -0.5)
        return np.where(observations.any(axis=1), chosen, 0.0)[:, None].astype(np.float32)

    def data(self, *, held_out_reward: float = 0.0, repeats: int = 4) -> JudgedData:
        """Episodes of one step with all transitions, which are fitted, and held-out ones of two steps.

        Args:
            held_out_reward: Environment reward of the held-out steps, which no fit may see.
            repeats: How often each transition stands in the data.
        """
        observations = np.concatenate([np.eye(NUM_STATES, dtype=np.float32), np.zeros((1, NUM_STATES), np.float32)])
        rows: list[tuple[Any, ...]] = []
        final, ends = [], []
        for k, s, following in np.argwhere(self.counts):
            for _ in range(int(self.counts[k, s, following]) * repeats):
                rows.append((observations[s], [k - 0.5], self._training_reward(self.rewards[k, s]), 0.0))
                final.append(observations[following])
                ends.append(following == NUM_STATES)
        lengths = [1] * len(rows)
        for s in self.start_states:
            # The second state differs from the first one, so that values of all rows would be others.
            second = (s + 2) % NUM_STATES
            reward = self._training_reward(held_out_reward)
            rows += [(observations[state], [0.5], reward, 0.0) for state in (s, second)]
            lengths.append(2)
            final.append(observations[second])
            ends.append(False)
        records = np.zeros(len(rows), record_dtype(observations, 1))
        for row, content in enumerate(rows):
            records[row] = content
        table = OfflineTable(
            records,
            np.array(final),
            lengths=np.array(lengths),
            terminateds=np.array(ends),
            has_tail=np.zeros(len(lengths), bool),
            gamma=self.gamma,
        )
        held_out = np.arange(len(lengths) - len(self.start_states), len(lengths))
        split = Split(np.array(lengths), held_out, fraction=len(held_out) / len(lengths), seed=0)
        return JudgedData(table, split, rewards=self.scaling)

    def _training_reward(self, reward: float) -> float:
        return self.scaling.reward_scale * reward + self.scaling.reward_bias
