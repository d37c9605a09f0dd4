"""`Updater` with one learner and no algorithm: which batches, how many updates, when weights are published."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError
from ray.rllib.core.columns import Columns
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from small_learners import make_learner

from rllib_calql.common.episode_returns import EpisodeReturns
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.learning import recovery
from rllib_calql.learning.divergence import DivergenceWatch
from rllib_calql.learning.updater import Updater
from rllib_calql.learning.weights import WeightPublisher
from rllib_calql.store.offline_table import EpisodeColumns, OfflineTableBuilder
from rllib_calql.store.replay import IS_OFFLINE, TransitionStore

BATCH_SIZE, NUM_ROWS = 4, 6


class Learners:
    """Stands for RLlib's group of one local learner, and keeps the batches that it got."""

    def __init__(self, **settings: Any) -> None:
        self.is_remote = False
        self._learner = make_learner(train_batch_size_per_learner=BATCH_SIZE, **settings)
        self.batches: list[dict[str, np.ndarray]] = []

    def update(self, *, batch: Any, **arguments: Any) -> list[Any]:
        """One call."""
        self.batches.append(dict(batch.policy_batches["default_policy"]))
        return [self._learner.update(batch=batch, **arguments)]

    def foreach_learner(self, func: Callable[[Any], Any], **which: Any) -> list[Any]:
        """Results as RLlib wraps them."""
        value = func(self._learner)
        return [SimpleNamespace(ok=True, get=lambda: value)]

    def get_state(self, components: str, inference_only: bool) -> dict[str, Any]:
        """Stands for the weights."""
        return {"learner": {"rl_module": {"num_updates": self._learner._num_updates}}}


def store_of() -> TransitionStore:
    """Six offline rows."""
    store = TransitionStore(obs_dim=3, action_dim=2, online_capacity=100, seed=0)
    builder = OfflineTableBuilder(action_dim=2)
    rng = np.random.default_rng(0)
    builder.add(
        EpisodeColumns(
            lengths=np.array([NUM_ROWS]),
            observations=rng.normal(size=(NUM_ROWS, 3)).astype(np.float32),
            final_observations=np.zeros((1, 3), np.float32),
            actions=rng.uniform(-0.5, 0.5, (NUM_ROWS, 2)).astype(np.float32),
            rewards=np.ones(NUM_ROWS, np.float32),
            returns_to_go=np.ones(NUM_ROWS, np.float32),
            terminateds=np.array([True]),
            has_tail=np.array([False]),
        )
    )
    store.offline = builder.build(gamma=0.99)
    return store


def online_rows(num_rows: int) -> dict[str, np.ndarray]:
    return {
        Columns.OBS: np.ones((num_rows, 3), np.float32),
        Columns.NEXT_OBS: np.ones((num_rows, 3), np.float32),
        Columns.ACTIONS: np.zeros((num_rows, 2), np.float32),
        Columns.REWARDS: np.zeros(num_rows, np.float32),
        Columns.TERMINATEDS: np.zeros(num_rows, np.float32),
        Columns.RETURNS_TO_GO: np.zeros(num_rows, np.float32),
    }


class Published(WeightPublisher):
    """Keeps the states that were published."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(local_env_runner=None), has_remote_runners=False)
        self.states: list[Any] = []

    def publish(self, state: Any) -> None:
        """Keeps it."""
        self.states.append(state["rl_module"]["num_updates"])


def updater_of(learners: Any, **changes: Any) -> tuple[Updater, dict[str, Any]]:
    parts: dict[str, Any] = {
        "store": store_of(),
        "episode_returns": EpisodeReturns(),
        "lifetime": Lifetime(offline_updates=8, updates_per_env_step=1.0, warmup_env_steps=0),
        "divergence": DivergenceWatch(gamma=0.99, has_entropy_term=False),
        "metrics": MetricsLogger(root=True),
        "weights": Published(),
        "on_rebuilt": lambda group: None,
    } | changes
    config = learners._learner.config
    return Updater(config, learners, **parts), parts


def test_updates_are_made_and_counted_and_weights_published_once_runners_need_them() -> None:
    learners = Learners()
    updater, parts = updater_of(learners)
    updater.update(5, online=False)
    assert (learners._learner._num_updates, parts["lifetime"].num_offline_updates) == (5, 5)
    assert parts["weights"].states == []  # Nobody collects yet.
    updater.update(3, online=False)
    assert parts["weights"].states == [8]  # The switch.
    parts["store"].add_online(online_rows(2))
    parts["lifetime"].count_episode(2)
    updater.update(2, online=True)
    assert parts["weights"].states == [8, 10]
    assert (parts["lifetime"].num_online_updates, parts["lifetime"].updates_owed) == (2, 0.0)


def test_a_schedule_of_the_mixing_ratio_gives_each_batch_the_exact_share_of_its_env_step() -> None:
    learners = Learners(input_="rows.parquet", offline_updates=8, mixing_ratio=[[0, 1.0], [4, 0.5], [8, 0.0]])
    updater, parts = updater_of(learners)
    for _ in range(4):
        parts["store"].add_online(online_rows(2))
        parts["lifetime"].count_episode(2)
        updater.update(2, online=True)
    # Shares of 0.75, 0.5, 0.25 and 0 after 2, 4, 6 and 8 env steps.
    shares = [batch[IS_OFFLINE].reshape(2, BATCH_SIZE).sum(axis=1).tolist() for batch in learners.batches]
    assert shares == [[3, 3], [2, 2], [1, 1], [0, 0]]


def test_offline_batches_hold_offline_rows_and_online_ones_the_exact_ratio() -> None:
    learners = Learners()
    updater, parts = updater_of(learners)
    updater.update(3, online=False)
    parts["store"].add_online(online_rows(2))
    updater.update(3, online=True)
    offline, online = (batch[IS_OFFLINE].reshape(3, BATCH_SIZE) for batch in learners.batches)
    assert offline.all()
    assert online.sum(axis=1).tolist() == [2, 2, 2]
    assert updater.num_offline_rows(online=True) == 2


def test_many_updates_are_made_in_calls_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rllib_calql.learning.updater._MAX_UPDATES_PER_CALL", 3)
    learners = Learners()
    updater, _ = updater_of(learners)
    updater.update(7, online=False)
    assert [len(batch[Columns.OBS]) // BATCH_SIZE for batch in learners.batches] == [3, 3, 1]


def test_the_speed_counts_from_one_question_to_the_next() -> None:
    updater, _ = updater_of(Learners())
    assert (updater.take_speed(), updater.seconds_per_update) == (None, None)
    updater.update(4, online=False)
    seconds = updater.seconds_timed
    assert updater.seconds_per_update == seconds / 4
    assert updater.take_speed() == 4 / seconds
    assert (updater.take_speed(), updater.seconds_timed) == (None, 0.0)


def test_lost_learners_are_replaced_and_what_they_lost_is_owed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, new = Learners(), Learners()
    replaced: list[Any] = []
    updater, parts = updater_of(lost, on_rebuilt=replaced.append)
    parts["store"].add_online(online_rows(2))
    parts["lifetime"].count_updates(8, online=False)
    parts["lifetime"].count_episode(20)
    snapshots: list[dict[str, int]] = []

    class Recovery:
        """Gives back what was snapped, and the new group."""

        def is_due(self) -> bool:
            return False

        def take_snapshot(self, group: Any, counters: dict[str, int]) -> None:
            snapshots.append(counters)

        def rebuild(self, group: Any, build: Any, error: BaseException) -> Any:
            assert group is lost
            return new, snapshots[-1]

    updater._recovery = Recovery()  # type: ignore[assignment]
    lost.is_remote = True
    updater.take_snapshot()
    monkeypatch.setattr("ray.put", lambda value: value)
    lost.update = lambda **arguments: [
        new._learner.update(
            batch=arguments["batch_refs"][0],
            **{  # type: ignore[method-assign]
                name: value for name, value in arguments.items() if name != "batch_refs"
            },
        )
    ]
    updater.update(3, online=True)
    assert parts["lifetime"].updates_owed == 17.0

    def die(**arguments: Any) -> Any:
        raise RayActorError

    lost.update = die  # type: ignore[method-assign]
    updater.update(2, online=True)
    assert replaced == [new]
    assert (parts["lifetime"].num_online_updates, parts["lifetime"].updates_owed) == (0, 20.0)
    updater.update(2, online=True)
    assert len(new.batches) == 1


def test_an_error_that_is_no_loss_is_raised() -> None:
    learners = Learners()
    updater, _ = updater_of(learners)

    def fail(**arguments: Any) -> Any:
        raise RayActorError

    learners.update = fail  # type: ignore[method-assign]
    with pytest.raises(RayActorError):  # Of a learner in this process, which cannot be lost.
        updater.update(1, online=False)
    assert recovery.is_loss(RayActorError(), learners)


class RemoteLearners:
    """Stands for RLlib's group of two remote learners, of which the first is lost for so many calls."""

    is_remote = True

    def __init__(self, num_losses: int) -> None:
        self.num_losses = num_losses
        self._learner = make_learner(train_batch_size_per_learner=BATCH_SIZE)
        self.asked: list[Any] = []

    def foreach_learner(self, func: Callable[[Any], Any], *, remote_actor_ids: Any, healthy_only: bool) -> list[Any]:
        """The answers of those that are asked."""
        self.asked.append((remote_actor_ids, healthy_only))
        answer: Any = RayActorError()
        if len(self.asked) > self.num_losses:
            (index,) = remote_actor_ids
            try:
                answer = func(f"learner {index}")
            except ValueError as error:
                answer = error
        return [SimpleNamespace(ok=not isinstance(answer, Exception), get=lambda: answer)]


def test_one_of_several_learners_is_asked_and_replaced_first_if_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    learners, rebuilt = RemoteLearners(num_losses=1), []
    updater, _ = updater_of(learners)
    monkeypatch.setattr(updater, "_rebuild_learners", rebuilt.append)
    assert updater.on_one_learner(str.upper) == "LEARNER 0"
    assert learners.asked == [([0], False)] * 2  # Also one that RLlib holds for lost.
    assert len(rebuilt) == 1

    def broken(learner: Any) -> None:
        raise ValueError("a fault of its own")

    with pytest.raises(ValueError, match="a fault of its own"):
        updater.on_one_learner(broken)
    assert len(rebuilt) == 1
