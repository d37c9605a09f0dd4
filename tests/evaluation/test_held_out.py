"""Held-out episodes are judged by fixed rows and noise, by the losses of training, and without a trace in it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from learner_checks import MODULE, assert_bit_identical, everything, random_rows, update
from ray import cloudpickle
from ray.rllib.core.columns import Columns
from small_learners import make_learner
from tiny import TINY_NETWORKS, assert_identical, write_line_data

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.evaluation import held_out as judging
from rllib_calql.evaluation.held_out import HeldOut, with_held_out
from rllib_calql.learning.judging import judge_rows
from rllib_calql.learning.learner import CalQLTorchLearner
from rllib_calql.networks.steps import BOOTSTRAP_DISCOUNT, BOOTSTRAP_OBS
from rllib_calql.store.offline_table import EpisodeColumns, OfflineTableBuilder
from rllib_calql.store.replay import IS_OFFLINE, TransitionStore
from rllib_calql.store.split import split_episodes

METRICS = {"td_loss", "gap", "q_data", "calibration_gap", "log_prob", "action_distance"}


def rows_of(num_rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rows = random_rows(num_rows, seed)
    del rows[IS_OFFLINE]
    return rows


def judge(learner: CalQLTorchLearner, rows: dict[str, np.ndarray], **how: Any) -> dict[str, float]:
    return judge_rows(learner, rows, **({"online": False, "seed": 1} | how))


def store_of(num_episodes: int = 10, *, fraction: float = 0.3, **settings: Any) -> TransitionStore:
    """Episodes of one to three steps; the first number of an observation is its row."""
    lengths = 1 + np.arange(num_episodes) % 3
    num_rows = int(lengths.sum())
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(num_rows, 3)).astype(np.float32)
    observations[:, 0] = np.arange(num_rows)
    builder = OfflineTableBuilder(action_dim=2)
    builder.add(
        EpisodeColumns(
            lengths=lengths,
            observations=observations,
            final_observations=np.zeros((num_episodes, 3), np.float32),
            actions=rng.uniform(-0.5, 0.5, (num_rows, 2)).astype(np.float32),
            rewards=rng.normal(size=num_rows).astype(np.float32),
            returns_to_go=rng.normal(size=num_rows).astype(np.float32),
            terminateds=np.ones(num_episodes, bool),
            has_tail=np.zeros(num_episodes, bool),
        )
    )
    store = TransitionStore(obs_dim=3, action_dim=2, online_capacity=10, seed=0, **settings)
    store.offline = builder.build(gamma=0.99)
    store.split = split_episodes(lengths, fraction=fraction, seed=0)
    return store


class Recorded:
    """Stands for a learner and its group: the TD loss is the mean number of the rows, and all that is asked is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        monkeypatch.setattr(judging, "judge_rows", Recorded.judge)

    def judge(self, columns: dict[str, np.ndarray], **how: Any) -> dict[str, float]:
        """Keeps it."""
        self.asked.append({"rows": columns[Columns.OBS][:, 0].astype(int).tolist(), **how})
        return {"td_loss": float(columns[Columns.OBS][:, 0].mean()), "gap": 1.0}

    def __call__(self, func: Callable[[Any], Any]) -> Any:
        """Calls it as `Updater.on_one_learner` does."""
        return func(self)


def held_out_of(store: TransitionStore, learner: Any, *, online: bool = False) -> HeldOut:
    lifetime = Lifetime(offline_updates=5, updates_per_env_step=1.0, warmup_env_steps=0)
    lifetime.count_updates(5, online=False)
    if online:
        lifetime.count_updates(1, online=True)
    on_one = learner if isinstance(learner, Recorded) else lambda func: func(learner)
    return HeldOut(store, lifetime, on_one_learner=on_one)


# What is computed


def test_q_return_likelihood_and_distance_are_those_of_all_rows_whatever_the_blocks() -> None:
    learner, rows = make_learner(), rows_of(600)  # Two blocks and a rest.
    judged = judge(learner, rows)
    module = learner.module[MODULE]
    batch = {name: torch.from_numpy(column) for name, column in rows.items()}
    with torch.no_grad():
        q = module.compute_q_values(batch)["qf_preds"].double().numpy()
        mean, log_std = (part.double().numpy() for part in module.policy(batch[Columns.OBS]))
    assert judged["q_data"] == pytest.approx(q.mean(), abs=1e-6)
    assert judged["calibration_gap"] == pytest.approx((q.mean(axis=0) - rows[Columns.RETURNS_TO_GO]).mean(), abs=1e-6)
    actions = rows[Columns.ACTIONS].astype(np.float64)
    squares = ((np.tanh(mean) - actions) ** 2).sum(axis=1)
    assert judged["action_distance"] == pytest.approx(squares.mean(), rel=1e-5)
    normal = -0.5 * ((np.arctanh(actions) - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = (normal - np.log(1.0 - actions**2)).sum(axis=1)
    assert judged["log_prob"] == pytest.approx(log_prob.mean(), rel=1e-4)


@pytest.mark.parametrize("n_step", [1, 3])
def test_the_td_loss_is_that_of_the_greedy_action_where_the_policy_has_no_noise(n_step: int) -> None:
    learner, rows = make_learner(max_target_backup=False, gamma=0.9, n_step=n_step), rows_of(300)
    if n_step > 1:
        rows[BOOTSTRAP_OBS] = rows_of(300, seed=5)[Columns.OBS]
        rows[BOOTSTRAP_DISCOUNT] = np.full(300, 0.9**n_step, np.float32)
    module = learner.module[MODULE]
    with torch.no_grad():
        module.policy.head.weight[2:] = 0.0  # Of the logarithms of the deviations.
        module.policy.head.bias[2:] = -20.0
        bootstrap = torch.from_numpy(rows.get(BOOTSTRAP_OBS, rows[Columns.NEXT_OBS]))
        following = module.estimate_values(bootstrap).double().numpy()
        batch = {name: torch.from_numpy(column) for name, column in rows.items()}
        q = module.compute_q_values(batch)["qf_preds"].double().numpy()
    target = rows[Columns.REWARDS] + 0.9**n_step * (1.0 - rows[Columns.TERMINATEDS]) * following
    assert judge(learner, rows)["td_loss"] == pytest.approx(((q - target) ** 2).mean(), rel=1e-4)
    alone = judge(learner, rows, td_loss_only=True)
    assert alone == {"td_loss": pytest.approx(((q - target) ** 2).mean(), rel=1e-4)}


def test_the_gap_is_the_logarithm_of_the_number_of_actions_where_q_is_zero() -> None:
    learner = make_learner(num_actions=2, importance_sampling=False, calibrate=False)
    with torch.no_grad():
        for parameter in learner.module[MODULE].critic.parameters():
            parameter.zero_()
    assert judge(learner, rows_of(20))["gap"] == pytest.approx(math.log(3 * 2 + 1))


def test_without_the_conservative_term_there_is_no_gap() -> None:
    learner, rows = make_learner(conservative_online=False), rows_of(20)
    assert set(judge(learner, rows)) == METRICS
    assert set(judge(learner, rows, online=True)) == METRICS - {"gap"}


# No trace in training


@pytest.mark.parametrize("settings", [{}, {"num_critics": 4, "critic_subset": 2, "lagrangian": True, "bc_updates": 2}])
def test_training_goes_on_bit_for_bit_as_if_nothing_had_been_judged(settings: dict[str, Any]) -> None:
    judged, other = make_learner(**settings), make_learner(**settings)
    for call in range(3):
        for learner in (judged, other):
            update(learner, random_rows(16, seed=call), 4, online=call == 2)
        before = torch.get_rng_state()
        judge(judged, rows_of(40), online=call == 1)
        assert torch.equal(torch.get_rng_state(), before)
    assert_bit_identical(everything(judged), everything(other))
    assert torch.equal(judged._generator.get_state(), other._generator.get_state())
    assert update(judged, random_rows(8), 4) == update(other, random_rows(8), 4)


def test_the_same_networks_get_the_same_judgement_whatever_noise_training_has_drawn() -> None:
    learner, rows = make_learner(), rows_of(40)
    first = judge(learner, rows)
    learner._generator.manual_seed(99)
    assert judge(learner, rows) == first
    assert judge(learner, rows, seed=2)["td_loss"] != first["td_loss"]


def test_images_are_judged_as_they_are() -> None:
    networks = {"actor_hiddens": [8], "critic_hiddens": [8], "conv_filters": [[4, 3, 2]], "image_features": 8}
    config = CalQLConfig().rl_module(model_config=networks | {"random_shift": 4}).training(num_actions=2)
    spaces = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8), gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    learner: CalQLTorchLearner = config.build_learner(spaces={MODULE: spaces})
    rng = np.random.default_rng(0)
    rows = rows_of(8) | {name: rng.integers(0, 256, (8, 768), np.uint8) for name in (Columns.OBS, Columns.NEXT_OBS)}
    with torch.no_grad():
        batch = {name: torch.from_numpy(column) for name, column in rows.items()}
        q = learner.module[MODULE].compute_q_values(batch)["qf_preds"]
    assert judge(learner, rows)["q_data"] == pytest.approx(float(q.mean()), rel=1e-5)


# Which rows


def test_both_sides_are_judged_by_their_own_rows_and_the_same_noise_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, learner = store_of(), Recorded(monkeypatch)
    held_out = held_out_of(store, learner)
    first, second = held_out.evaluate(), held_out.evaluate()
    assert first == second == held_out.latest
    assert [asked["rows"] for asked in learner.asked[:2]] == [
        store.held_out_rows().tolist(),
        store.training_rows().tolist(),
    ]
    assert [asked["td_loss_only"] for asked in learner.asked[:2]] == [False, True]
    assert learner.asked[0]["seed"] != learner.asked[1]["seed"]
    assert learner.asked[:2] == learner.asked[2:]
    assert first["td_loss"] == pytest.approx(np.mean(store.held_out_rows()))
    assert first["td_loss_training"] == pytest.approx(np.mean(store.training_rows()))
    assert first["gap"] == 1.0


def test_many_rows_are_drawn_once_and_judged_in_parts_that_count_by_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "MAX_ROWS", 5)
    store, learner = store_of(40, fraction=0.5), Recorded(monkeypatch)
    monkeypatch.setattr(judging, "_MAX_BYTES_PER_CALL", 2 * store.row_nbytes)
    held_out = held_out_of(store, learner)
    first, second = held_out.evaluate(), held_out.evaluate()
    assert first == second
    of_held_out = [asked["rows"] for asked in learner.asked if not asked["td_loss_only"]][:3]
    assert [len(rows) for rows in of_held_out] == [2, 2, 1]
    chosen = [row for rows in of_held_out for row in rows]
    assert len(set(chosen)) == 5
    assert set(chosen) <= set(store.held_out_rows().tolist())
    assert first["td_loss"] == pytest.approx(np.mean(chosen))
    assert len({asked["seed"] for asked in learner.asked[:6]}) == 6
    again = held_out_of(store_of(40, fraction=0.5), Recorded(monkeypatch))
    assert again.evaluate() == first


@pytest.mark.parametrize("online", [False, True])
def test_the_losses_are_those_of_the_latest_update_s_phase(monkeypatch: pytest.MonkeyPatch, online: bool) -> None:
    learner = Recorded(monkeypatch)
    held_out_of(store_of(), learner, online=online).evaluate()
    assert {asked["online"] for asked in learner.asked} == {online}


def test_a_learner_in_another_process_judges_the_same() -> None:
    learner, store = make_learner(), store_of()
    held_out = held_out_of(store, learner).evaluate()
    elsewhere = HeldOut(
        store,
        Lifetime(offline_updates=5, updates_per_env_step=1.0, warmup_env_steps=0),
        on_one_learner=lambda func: cloudpickle.loads(cloudpickle.dumps(func))(learner),
    )
    assert elsewhere.evaluate() == held_out


@pytest.mark.parametrize("fit", ["monte_carlo", "td"])
def test_a_learned_reference_value_is_judged_where_it_bounds(fit: str) -> None:
    learner = make_learner(
        input_="rows.parquet", offline_updates=1, reference_value="learned", reference_fit=fit, calibrate_online=False
    )
    rows = rows_of(300)
    judged = judge(learner, rows)
    assert set(judged) == METRICS | {"reference_loss"}
    assert set(judge(learner, rows, online=True)) == METRICS
    if fit == "monte_carlo":
        with torch.no_grad():
            value = learner.module[MODULE].reference(torch.from_numpy(rows[Columns.OBS])).double().numpy()
        assert judged["reference_loss"] == pytest.approx(((value - rows[Columns.RETURNS_TO_GO]) ** 2).mean(), rel=1e-5)


def test_a_quantile_that_bounds_is_the_one_of_now() -> None:
    learner, rows = make_learner(reference_value="quantile", importance_sampling=False, num_actions=2), rows_of(20)
    with torch.no_grad():
        for parameter in learner.module[MODULE].critic.parameters():
            parameter.zero_()
    # Two uniform actions and the data's have Q = 0, four of the policy are lifted to 3.
    assert judge(learner, rows, reference_quantile=3.0)["gap"] == pytest.approx(math.log(3 + 4 * math.exp(3.0)))


def test_an_iteration_that_goes_on_meanwhile_is_waited_for() -> None:
    trained: list[str] = []
    held_out = SimpleNamespace(evaluate=lambda: {"td_loss": float(len(trained))})
    algorithm: Any = SimpleNamespace(env_runner_group="some")
    with ThreadPoolExecutor() as executor:
        training = executor.submit(lambda: (time.sleep(0.3), trained.append("done")))
        results = with_held_out({"env_runners": {}}, held_out, algorithm=algorithm, training=training)  # type: ignore[arg-type]
    assert results == {"env_runners": {}, "held_out": {"td_loss": 1.0}}


# In a run


def config_of(tmp_path: Path, *, num_episodes: int = 8, **changes: Any) -> CalQLConfig:
    """Without an environment, which needs neither env runners nor Ray."""
    data = tmp_path / "line.parquet"
    if not data.exists():
        write_line_data(data, num_episodes=num_episodes)
    config: CalQLConfig = (
        CalQLConfig()
        .environment(
            observation_space=gym.spaces.Box(-10.0, 10.0, (1,), np.float32),
            action_space=gym.spaces.Box(-2.0, 2.0, (1,), np.float32),
        )
        .offline_data(input_=str(data), validation_fraction=0.25)
        .training(num_actions=2, train_batch_size_per_learner=8)
        .rl_module(model_config=TINY_NETWORKS)
        .fine_tuning(offline_updates=100, updates_per_iteration=5)
        .evaluation(evaluation_interval=2)
        .debugging(seed=0)
    )
    return config.update_from_dict(changes)


def learner_state(algo: CalQL) -> dict[str, Any]:
    state: dict[str, Any] = dict(algo.learner_group.get_state()["learner"])
    for name in ("metrics_logger", "weights_seq_no", "should_module_be_updated"):
        state.pop(name, None)
    return state


def test_a_run_without_an_environment_is_evaluated_resumed_and_trained_as_without_evaluations(tmp_path: Path) -> None:
    told: list[str] = []
    config = config_of(tmp_path).callbacks(
        on_evaluate_start=lambda **given: told.append("start"),
        on_evaluate_end=lambda **given: told.append(str(set(given["evaluation_metrics"]))),
    )
    algo = config.build()
    seen: list[np.ndarray] = []
    original = algo.learner_group._learner.update

    def recorded(**arguments: Any) -> Any:
        seen.append(arguments["training_data"].batch.policy_batches[MODULE][Columns.OBS])
        return original(**arguments)

    algo.learner_group._learner.update = recorded
    results = [algo.train() for _ in range(3)]
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    results.append(algo.train())
    # Absent until the first evaluation, repeated until the next.
    assert [set(result.get("evaluation", {})) for result in results] == [set(), *[{"held_out"}] * 3]
    judged = [result["evaluation"]["held_out"] for result in results[1:]]
    assert judged[0] == judged[1] != judged[2]
    assert set(judged[0]) == METRICS | {"td_loss_training"}
    assert algo.evaluate()["held_out"] == judged[2]
    assert told == ["start", "{'held_out'}"] * 3
    observations = algo.store.offline_column(Columns.OBS)[:, 0]
    assert not set(np.concatenate(seen)[:, 0].tolist()) & set(observations[algo.store.held_out_rows()].tolist())
    assert results[0]["store"]["num_held_out_transitions"] == len(algo.store.held_out_rows())
    state = learner_state(algo)
    algo.stop()

    plain = config_of(tmp_path, evaluation_interval=None).build()
    for _ in range(4):
        assert "evaluation" not in plain.train()
    assert_identical(learner_state(plain), state)
    plain.stop()

    restored = CalQL.from_checkpoint(path)
    assert restored.store.held_out_rows().tolist() == algo.store.held_out_rows().tolist()
    assert restored._parts.held_out is not None
    assert restored._parts.held_out.latest == judged[1]  # Results repeat it also before the next evaluation.
    assert restored.train()["evaluation"]["held_out"] == judged[2]
    restored.stop()
    with pytest.raises(ValueError, match=r"made with `validation_fraction=0.25` .* this run has `.*=0.5`"):
        CalQL.from_checkpoint(path, config=config_of(tmp_path, validation_fraction=0.5))


def test_a_run_of_few_episodes_and_many_updates_says_that_it_overfits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    observations, actions, rewards = rng.uniform(-1, 1, (64, 1)), rng.uniform(-2, 2, (64, 1)), rng.normal(size=64)
    columns = {
        "eps_id": [f"episode-{row // 8}" for row in range(64)],
        "obs": observations.tolist(),
        "actions": actions.tolist(),
        "rewards": rewards.tolist(),  # Nothing tells them, so they can only be learned by heart.
        "new_obs": np.roll(observations, -1, axis=0).tolist(),
        "terminateds": [row % 8 == 7 for row in range(64)],
        "truncateds": [False] * 64,
    }
    pq.write_table(pa.table(columns), tmp_path / "line.parquet")
    config = config_of(tmp_path, validation_fraction=0.5, evaluation_interval=1, updates_per_iteration=20)
    config.training(critic_lr=3e-3, gamma=0.5, min_q_weight=0.0, train_batch_size_per_learner=32)
    config.fine_tuning(offline_updates=1_000).rl_module(model_config={"critic_hiddens": [64, 64]})
    algo = config.build()
    for _ in range(50):
        result = algo.train()
        if "overfitting" in result:
            break
    algo.stop()
    assert "The critics overfit: from update" in result["overfitting"]
    assert result["evaluation"]["held_out"]["td_loss"] > result["evaluation"]["held_out"]["td_loss_training"]


def test_without_environment_and_hold_out_there_is_nothing_to_evaluate_by(tmp_path: Path) -> None:
    algo = config_of(tmp_path, validation_fraction=0.0, evaluation_interval=None).build()
    with pytest.raises(RuntimeError, match=r"needs an environment or held-out episodes; set `.environment\(...\)` or"):
        algo.evaluate()
    assert "num_held_out_transitions" not in algo.train()["store"]
    algo.stop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 0.0}, "`evaluation_interval` needs an environment or held-out episodes; set"),
        ({"evaluation_num_env_runners": 1}, "`evaluation_num_env_runners` is set, but there is no environment"),
        ({"evaluation_config": {"env": "Pendulum-v1"}}, "`env` in `evaluation_config` is 'Pendulum-v1', but there is"),
        ({"evaluation_config": {"validation_fraction": 0.5}}, "`validation_fraction` in `evaluation_config` is 0.5"),
    ],
)
def test_evaluations_that_cannot_be_made_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **changes).validate()
