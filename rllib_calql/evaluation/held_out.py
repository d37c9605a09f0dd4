"""`HeldOut`: how critics and policy do on the episodes that training never sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rllib_calql.common import metrics as keys
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.evaluation.overfitting import Losses, OverfittingWatch
from rllib_calql.evaluation.user_callbacks import call_back
from rllib_calql.learning.judging import judge_rows
from rllib_calql.store.replay import TransitionStore
from rllib_calql.system import activity

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm

MAX_ROWS = 10_000  # Of each side: a standard error of 1 % of the spread.
_MAX_BYTES_PER_CALL = 32 * 2**20
_HELD_OUT, _TRAINING = 0, 1
_STATE = "held_out"

Rows = npt.NDArray[np.int64]


class HeldOut:
    """Judges by the same rows, with the same noise, at every evaluation.

    Args:
        store: Whose held-out rows; some must be held out.
        lifetime: Tells the phase, and how many updates were made.
        on_one_learner: Calls a function with one learner; all are the same.
        reference_quantile: Tells the quantile of the episodes' returns, where that is the reference value.

    Attributes:
        latest: What `evaluate` gave last; None before.
    """

    def __init__(
        self,
        store: TransitionStore,
        lifetime: Lifetime,
        *,
        on_one_learner: Callable[[Callable[[Any], Any]], Any],
        reference_quantile: Callable[[], float] | None = None,
    ) -> None:
        if store.split is None:
            raise ValueError("The store holds nothing out; set `validation_fraction`.")
        self._store = store
        self._lifetime = lifetime
        self._on_one_learner = on_one_learner
        self._reference_quantile = reference_quantile
        self._seed = store.split.seed
        self._watch = OverfittingWatch()
        self._rows = {
            _HELD_OUT: store.held_out_rows()[self._chosen(_HELD_OUT, store.split.num_held_out_rows)],
            _TRAINING: store.split.rows_of(self._chosen(_TRAINING, store.num_training_rows)),
        }
        self.latest: dict[str, float] | None = None

    @property
    def overfitting(self) -> str | None:
        """What `OverfittingWatch` warned of, or None."""
        return self._watch.warning

    def evaluate(self) -> dict[str, float]:
        """Judges the networks as they are now, by the losses of the latest update's phase.

        Returns:
            By metric key, see METRICS.md.
        """
        activity.say("judging held-out episodes")
        online = self._lifetime.num_online_updates > 0
        judged = self._judge(_HELD_OUT, online=online)
        judged[keys.TD_LOSS_TRAINING] = self._judge(_TRAINING, online=online)[keys.TD_LOSS]
        losses = Losses(self._lifetime.num_updates, judged[keys.TD_LOSS], judged[keys.TD_LOSS_TRAINING])
        self._watch.observe(losses, online=online)
        self.latest = judged
        return dict(judged)

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {_STATE: {"latest": self.latest, "overfitting": self._watch.get_state()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        if (own := state.get(_STATE)) is not None:
            self.latest = own["latest"]
            self._watch.set_state(own["overfitting"])

    def _chosen(self, side: int, num_rows: int) -> Rows:
        """Numbers of all rows of a side, or of as many as are judged; in order, as files are read fastest."""
        if num_rows <= MAX_ROWS:
            return np.arange(num_rows)
        return np.sort(np.random.default_rng((self._seed, side)).choice(num_rows, MAX_ROWS, replace=False))

    def _judge(self, side: int, *, online: bool) -> dict[str, float]:
        """Means over the rows of one side."""
        quantile = None if self._reference_quantile is None else self._reference_quantile()
        sums: dict[str, float] = {}
        for number, rows in enumerate(self._parts(self._rows[side])):
            seed = np.random.SeedSequence((self._seed, side, number)).generate_state(1, np.uint64)
            judge = partial(
                judge_rows,
                columns=self._store.offline_rows(rows),
                online=online,
                seed=int(seed[0] >> np.uint64(1)),
                reference_quantile=quantile,
                td_loss_only=side == _TRAINING,
            )
            for name, mean in self._on_one_learner(judge).items():
                sums[name] = sums.get(name, 0.0) + mean * len(rows)
        return {name: total / len(self._rows[side]) for name, total in sums.items()}

    def _parts(self, rows: Rows) -> Iterator[Rows]:
        rows_per_call = max(1, _MAX_BYTES_PER_CALL // self._store.row_nbytes)
        for start in range(0, len(rows), rows_per_call):
            yield rows[start : start + rows_per_call]


def with_held_out(
    results: dict[str, Any], held_out: HeldOut | None, *, algorithm: Algorithm, training: Future[Any] | None
) -> dict[str, Any]:
    """Adds to an evaluation what held-out episodes say.

    Args:
        results: Of the evaluation by episodes; empty without an environment for it.
        held_out: Judges; None if nothing is held out.
        algorithm: Whose callbacks are told of an evaluation that has no episodes. RLlib tells them of others.
        training: An iteration that goes on at the same time; it is waited for, since the learners are at work.

    Raises:
        RuntimeError: If there is nothing to evaluate by.
    """
    if held_out is None:
        if algorithm.env_runner_group is None:
            raise RuntimeError(
                "Evaluation needs an environment or held-out episodes; set `.environment(...)` or "
                "`.offline_data(validation_fraction=0.1)`."
            )
        return results
    if training is not None:
        wait([training])
    if results:
        return {**results, keys.HELD_OUT: held_out.evaluate()}
    call_back(algorithm, "on_evaluate_start")
    results = {**results, keys.HELD_OUT: held_out.evaluate()}
    call_back(algorithm, "on_evaluate_end", evaluation_metrics=results)
    return results
