"""Reference values on chains that are worked by hand: from rows of the store, through the updater, to what bounds Q."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from small_learners import make_learner

from rllib_calql.common import metrics as keys
from rllib_calql.common.episode_returns import EpisodeReturns
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.learning import losses
from rllib_calql.learning.divergence import DivergenceWatch
from rllib_calql.learning.learner import FITS_REFERENCE, ONLINE, REFERENCE_QUANTILE
from rllib_calql.learning.skipped_updates import number_of
from rllib_calql.learning.updater import Updater
from rllib_calql.learning.weights import WeightPublisher
from rllib_calql.store.offline_data import as_multi_agent_batch
from rllib_calql.store.offline_table import EpisodeColumns, OfflineTableBuilder
from rllib_calql.store.replay import IS_OFFLINE, TransitionStore
from rllib_calql.store.split import Split

GAMMA, NUM_STATES, MODULE = 0.9, 4, "default_policy"
DATA = {"input_": "rows.parquet", "offline_updates": 100}
QUICK = {"critic_lr": 3e-3, "tau": 0.2, "gamma": GAMMA, "train_batch_size_per_learner": 64, "hiddens": (32,)}

Episode = tuple[Sequence[int], Sequence[float], bool]  # States, the last one included; rewards; whether it terminated.


def one_hot(states: Sequence[int]) -> np.ndarray:
    return np.eye(NUM_STATES, dtype=np.float32)[list(states)]


def store_of(episodes: Sequence[Episode], *, gamma: float = GAMMA, n_step: int = 1) -> TransitionStore:
    store = TransitionStore(obs_dim=NUM_STATES, action_dim=1, online_capacity=1000, seed=0, n_step=n_step, gamma=gamma)
    builder = OfflineTableBuilder(action_dim=1)
    for states, rewards, is_terminated in episodes:
        returns = oracle.returns_to_go(rewards, gamma, terminated=is_terminated, truncated=not is_terminated)
        builder.add(
            EpisodeColumns(
                lengths=np.array([len(rewards)]),
                observations=one_hot(states[:-1]),
                final_observations=one_hot(states[-1:]),
                actions=np.zeros((len(rewards), 1), np.float32),
                rewards=np.asarray(rewards, np.float32),
                returns_to_go=returns.astype(np.float32),
                terminateds=np.array([is_terminated]),
                has_tail=np.array([False]),
            )
        )
    store.offline = builder.build(gamma=gamma)
    return store


class Learners:
    """Stands for RLlib's group of one local learner, and keeps what it got."""

    def __init__(self, **settings: Any) -> None:
        self.is_remote = False
        self._learner = make_learner(obs_dim=NUM_STATES, action_dim=1, **{**QUICK, **DATA, **settings})
        self.calls: list[tuple[dict[str, np.ndarray], dict[str, Any]]] = []

    def update(self, *, batch: Any, timesteps: dict[str, Any], **arguments: Any) -> list[Any]:
        """One call."""
        self.calls.append((dict(batch.policy_batches[MODULE]), timesteps))
        results = self._learner.update(batch=batch, timesteps=timesteps, **arguments)
        self.logged = {name: number_of(value) for name, value in results[MODULE].items()}
        return [results]

    def foreach_learner(self, func: Callable[[Any], Any]) -> list[Any]:
        """Results as RLlib wraps them."""
        value = func(self._learner)
        return [SimpleNamespace(ok=True, get=lambda: value)]

    def values(self) -> np.ndarray:
        """V of all states."""
        with torch.no_grad():
            v: np.ndarray = self._learner._calql_module.reference(torch.eye(NUM_STATES)).numpy()
        return v


def updater_of(learners: Learners, store: TransitionStore) -> Updater:
    return Updater(
        learners._learner.config,
        learners,
        store=store,
        episode_returns=EpisodeReturns(store.offline_episode_returns()),
        lifetime=Lifetime(offline_updates=100, updates_per_env_step=1.0, warmup_env_steps=0),
        divergence=DivergenceWatch(gamma=GAMMA, has_entropy_term=False),
        metrics=MetricsLogger(root=True),
        weights=WeightPublisher(None, has_remote_runners=False),
        on_rebuilt=lambda group: None,
    )


def fitted(store: TransitionStore, **settings: Any) -> np.ndarray:
    learners = Learners(reference_value="learned", reference_updates=700, **settings)
    updater_of(learners, store)._fit_reference()
    return learners.values()


# --- What is fitted ---------------------------------------------------------------------------------------------------

# 0 -> 1 -> 2 -> end, rewards 1, 2, 3. V(2) = 3, V(1) = 2 + 0.9 * 3 = 4.7, V(0) = 1 + 0.9 * 4.7 = 5.23. What stands
# behind the end is state 0, so that a target that goes on there is seen.
CHAIN: Episode = ([0, 1, 2, 0], [1.0, 2.0, 3.0], True)
# 0 -> 1 -> 0 -> ..., rewards 1 and 0, for ever: V(0) = 1 / (1 - 0.81) = 5.2632, V(1) = 0.9 V(0) = 4.7368.
LOOP = ([0, 1, 0, 1, 0], [1.0, 0.0, 1.0, 0.0], False)


@pytest.mark.parametrize(("fit", "n_step"), [("monte_carlo", 1), ("td", 1), ("td", 2)])
def test_both_fits_reach_the_value_of_a_chain(fit: str, n_step: int) -> None:
    values = fitted(store_of([CHAIN] * 4, n_step=n_step), reference_fit=fit, n_step=n_step)
    assert values[:3] == pytest.approx([5.23, 4.7, 3.0], rel=0.02)


def test_on_cut_episodes_td_is_right_and_monte_carlo_is_the_mean_of_what_was_seen() -> None:
    store = store_of([LOOP] * 4)
    assert fitted(store, reference_fit="td")[:2] == pytest.approx([5.2632, 4.7368], rel=0.02)
    # G of the four steps: 1 + 0.81 = 1.81, 0.9, 1, 0. So the mean at state 0 is 1.405, at state 1 it is 0.45.
    assert fitted(store)[:2] == pytest.approx([1.405, 0.45], rel=0.02)


# 0 -> 1 or 2, equally often; reward 2 at the end of 1, 0 at that of 2. G at 0 is 1.8 or 0, V(0) = 0.9.
FORK: list[Episode] = [([0, 1, 3], [0.0, 2.0], True), ([0, 2, 3], [0.0, 0.0], True)]


def mean_bound(monkeypatch: pytest.MonkeyPatch, learners: Learners, updater: Updater, constant: float) -> float:
    """Mean of max(Q, V) over the policy's actions of an update, of critics that are constant."""
    for critic in (learners._learner._calql_module.critic, learners._learner._calql_module.target_critic):
        for parameter in critic.parameters():
            parameter.data.zero_()
        critic.biases[-1].data.fill_(constant)
    seen: list[torch.Tensor] = []
    calibrate = losses.calibrate

    def kept(q: torch.Tensor, reference_value: torch.Tensor) -> torch.Tensor:
        seen.append(calibrate(q, reference_value))
        return seen[-1]

    monkeypatch.setattr(losses, "calibrate", kept)
    updater.update(1, online=False)
    monkeypatch.undo()
    return float(torch.stack(seen).detach().mean())


def test_on_a_fork_single_returns_bound_too_high_on_average_by_what_is_worked_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Q = 0.5. Returns: at 0 max(0.5, 1.8) or max(0.5, 0), 1.15 on average, learned max(0.5, 0.9) = 0.9. States 1 and 2
    # have one return each, 2 and 0, so both bound by 2 and 0.5. Half of the rows are of state 0: (1.15 - 0.9) / 2.
    bounds = {}
    for value in ("returns_to_go", "learned"):
        settings = {"reference_updates": 500} if value == "learned" else {}
        learners = Learners(reference_value=value, num_actions=2, train_batch_size_per_learner=4096, **settings)
        learners._learner.config.train_batch_size_per_learner = 512
        updater = updater_of(learners, store_of(FORK * 2))
        if value == "learned":
            updater._fit_reference()
        learners._learner.config.train_batch_size_per_learner = 4096
        bounds[value] = mean_bound(monkeypatch, learners, updater, 0.5)
    assert bounds["returns_to_go"] == pytest.approx(0.5 * 1.15 + 0.25 * 2.0 + 0.25 * 0.5, abs=0.04)
    assert bounds["learned"] == pytest.approx(0.5 * 0.9 + 0.25 * 2.0 + 0.25 * 0.5, abs=0.04)
    assert bounds["returns_to_go"] - bounds["learned"] == pytest.approx(0.125, abs=0.02)


# --- When it is fitted ------------------------------------------------------------------------------------------------


def test_the_network_is_fitted_once_before_all_updates_on_offline_rows_and_not_anew() -> None:
    learners = Learners(reference_value="learned", reference_updates=300, train_batch_size_per_learner=4)
    store = store_of([CHAIN] * 4)
    updater = updater_of(learners, store)
    rows = {Columns.OBS: one_hot([3]), Columns.NEXT_OBS: one_hot([3]), Columns.ACTIONS: np.zeros((1, 1), np.float32)}
    numbers = dict.fromkeys((Columns.REWARDS, Columns.TERMINATEDS, Columns.RETURNS_TO_GO), np.zeros(1, np.float32))
    store.add_online({**rows, **numbers})
    updater.update(2, online=True)
    of_fit = [len(batch[IS_OFFLINE]) // 4 for batch, timesteps in learners.calls if timesteps[FITS_REFERENCE]]
    assert of_fit == [250, 50]
    assert all(batch[IS_OFFLINE].all() for batch, _ in learners.calls[:2])
    (batch, timesteps) = learners.calls[2]
    assert (timesteps[FITS_REFERENCE], timesteps[ONLINE], batch[IS_OFFLINE].mean()) == (False, True, 0.5)
    updater.begin_anew(None)
    updater.update(1, online=True)
    assert len(learners.calls) == 4
    assert (learners._learner.num_reference_updates, learners._learner._num_updates) == (300, 3)


def test_the_fit_goes_on_where_a_restored_learner_was_in_it() -> None:
    learners = Learners(reference_value="learned", reference_updates=30)
    updater = updater_of(learners, store_of([CHAIN]))
    learners._learner._num_reference_updates = 12
    updater.update(1, online=False)
    assert len(learners.calls[0][0][IS_OFFLINE]) == (30 - 12) * 64


def test_the_fit_goes_on_with_learners_that_took_the_place_of_lost_ones() -> None:
    lost, learners = (Learners(reference_value="learned", reference_updates=30) for _ in range(2))
    updater = updater_of(lost, store_of([CHAIN]))
    updater.update(1, online=False)
    learners._learner._num_reference_updates = 12  # As in the latest snapshot.
    counters = updater._lifetime.counters()
    updater._recovery = SimpleNamespace(  # type: ignore[assignment]
        rebuild=lambda *_: (learners, counters), is_due=lambda: False
    )
    updater._rebuild_learners(RuntimeError("lost"))
    updater.update(1, online=False)
    assert [len(batch[IS_OFFLINE]) // 64 for batch, _ in learners.calls] == [30 - 12, 1]


def test_the_fit_moves_the_target_as_often_as_set_and_counts_for_the_noise_of_further_learners() -> None:
    learners = Learners(reference_value="learned", reference_fit="td", target_update_period=2, reference_updates=2)
    learner, store = learners._learner, store_of([CHAIN])
    columns = store.offline_rows(np.arange(3)) | {IS_OFFLINE: np.ones(3, np.float32)}
    targets, noise = [], []
    learner._learner_index = 1
    for _ in range(3):
        learner._seed_anew()
        noise.append(learner._generator.initial_seed())
        targets.append(learner._calql_module.target_reference.head.weight.clone())
        batch = as_multi_agent_batch({name: column.copy() for name, column in columns.items()})
        learner.update(batch=batch, timesteps={FITS_REFERENCE: True})
    assert torch.equal(targets[0], targets[1])
    assert not torch.equal(targets[1], targets[2])
    assert len(set(noise)) == 3


def test_a_learner_s_state_holds_network_optimiser_and_count_bit_for_bit() -> None:
    store = store_of([CHAIN, LOOP])
    one = Learners(reference_value="learned", reference_fit="td", reference_updates=20, seed=1)
    other = Learners(reference_value="learned", reference_fit="td", reference_updates=20, seed=2)
    updater_of(one, store).update(3, online=False)
    other._learner.set_state(one._learner.get_state())
    columns = store.offline_rows(np.arange(7)) | {IS_OFFLINE: np.ones(7, np.float32)}
    for learners in (one, other):
        batch = as_multi_agent_batch({name: column.copy() for name, column in columns.items()})
        learners._learner.update(batch=batch, timesteps={ONLINE: True})
    assert other._learner.num_reference_updates == 20
    for (name, a), b in zip(
        one._learner._calql_module.state_dict().items(),
        other._learner._calql_module.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b), name
    assert "reference.head.weight" in one._learner._calql_module.state_dict()
    runner_state = one._learner.module.get_state(inference_only=True)[MODULE]
    assert not any("reference" in name for name in runner_state)


def test_other_networks_start_as_they_do_without_a_learned_reference_value() -> None:
    plain, learned = make_learner(), make_learner(reference_value="learned", **DATA)
    of_learned = learned._calql_module.state_dict()
    for name, value in plain._calql_module.state_dict().items():
        assert torch.equal(value, of_learned[name]), name


# --- Held-out episodes, and the quantile ------------------------------------------------------------------------------

# Returns at the first step: 1, 1 + 0.9 * 2 = 2.8, and 100 in the one that is held out.
THREE: list[Episode] = [([0, 3], [1.0], True), ([0, 1, 3], [1.0, 2.0], True), ([2, 3], [100.0], True)]


def with_last_held_out(store: TransitionStore) -> TransitionStore:
    assert store.offline is not None
    store.split = Split(store.offline.lengths, np.array([2]), fraction=0.3, seed=0)
    return store


def test_held_out_rows_reach_neither_the_fit_nor_the_quantile() -> None:
    store = with_last_held_out(store_of(THREE))
    learners = Learners(reference_value="learned", reference_updates=40)
    updater_of(learners, store).update(2, online=False)
    drawn = np.concatenate([batch[Columns.OBS] for batch, _ in learners.calls])
    assert len(drawn) == 42 * 64
    assert set(drawn.argmax(axis=1)) == {0, 1}
    assert store.offline_episode_returns() == pytest.approx([1.0, 2.8])


def test_the_quantile_is_one_of_discounted_returns_of_episodes_and_goes_to_the_learners() -> None:
    store = store_of(THREE)
    learners = Learners(reference_value="quantile", calibration_quantile=0.25)
    updater = updater_of(learners, store)
    updater.update(1, online=False)
    # 1, 2.8, 100 at a quarter: half way from 1 to 2.8. Of rows it would be (1, 2.8, 2, 100) 1.75.
    assert learners.calls[-1][1][REFERENCE_QUANTILE] == pytest.approx(1.9)
    updater._episode_returns.add(-7.0)
    updater.update(1, online=False)
    assert learners.calls[-1][1][REFERENCE_QUANTILE] == pytest.approx(-1.0)  # -7, 1, 2.8, 100: 3 / 4 of the way to 1.
    assert learners.logged[keys.REFERENCE_VALUE_MEAN] == pytest.approx(-1.0)


def test_returns_of_online_episodes_are_in_the_state_and_outlive_their_rows() -> None:
    returns = EpisodeReturns([1.0, 2.0])
    for value in (5.0, 6.0, 7.0):
        returns.add(value)
    restored = EpisodeReturns([1.0, 2.0])
    restored.set_state(returns.get_state())
    assert returns.quantile(0.5) == restored.quantile(0.5) == 5.0
    restored.set_state({})  # Of an earlier version.
    assert restored.quantile(0.5) == 1.5
    with pytest.raises(ValueError, match="no episode yet"):
        EpisodeReturns().quantile(0.5)
