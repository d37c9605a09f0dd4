"""Both phases through `CalQLConfig` and `algo.train()`, on tiny problems."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.core.columns import Columns
from ray.tune.utils import flatten_dict
from tiny import TINY_NETWORKS, LineEnv, line_config, write_line_data

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.common import metrics as keys
from rllib_calql.common.encoding import flatten_observations
from rllib_calql.evaluation.regime import BOTH, DATA, POLICY, RETURN
from rllib_calql.learning.diagnostics import metric_names
from rllib_calql.stopping import metrics_of
from rllib_calql.store.replay import IS_OFFLINE

pytestmark = pytest.mark.usefixtures("ray_session")


def _record_updates(algo: CalQL, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every super-batch that the learners get from now on, with its mini-batch size."""
    calls: list[dict[str, Any]] = []
    update = algo.learner_group.update

    def recording(**kwargs: Any) -> Any:
        columns = kwargs["batch"].policy_batches["default_policy"]
        calls.append({"columns": {k: np.array(v) for k, v in columns.items()}, **kwargs})
        return update(**kwargs)

    monkeypatch.setattr(algo.learner_group, "update", recording)
    return calls


def test_the_switch_follows_the_lifetime_count_of_offline_updates(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=25, updates_per_iteration=10)
    algo = config.build()
    seen = []
    for _ in range(5):
        result = algo.train()
        seen.append((result[keys.PHASE], result[keys.NUM_OFFLINE_UPDATES_LIFETIME], algo.num_online_updates > 0))
    algo.stop()
    assert seen[:3] == [(keys.OFFLINE, 10, False), (keys.OFFLINE, 20, False), (keys.OFFLINE, 25, False)]
    assert seen[3:] == [(keys.ONLINE, 25, True), (keys.ONLINE, 25, True)]


@pytest.mark.parametrize(("updates_per_env_step", "expected"), [(1, 1.0), (2, 2.0), (0.25, 0.25)])
def test_updates_per_env_step_is_kept_over_the_run(
    tmp_path: Path, updates_per_env_step: float, expected: float
) -> None:
    algo = line_config(tmp_path, offline_updates=2, updates_per_env_step=updates_per_env_step).build()
    for _ in range(7):
        result = algo.train()
    algo.stop()
    env_steps = result[keys.NUM_ONLINE_ENV_STEPS_LIFETIME]
    assert env_steps > 20
    assert result[keys.NUM_ONLINE_UPDATES_LIFETIME] == int(env_steps * expected)


def test_every_online_batch_holds_exactly_the_mixing_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algo = line_config(tmp_path, offline_updates=1, mixing_ratio=0.3, batch_size=16).build()
    algo.train()
    calls = _record_updates(algo, monkeypatch)
    for _ in range(3):
        algo.train()
    algo.stop()
    assert calls
    for call in calls:
        per_batch = call["columns"][IS_OFFLINE].reshape(-1, 16).sum(axis=1)
        assert (per_batch == 5).all()  # round(16 * 0.3)


def test_proportional_mixing_follows_the_amounts_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algo = line_config(tmp_path, offline_updates=1, mixing_ratio="proportional", batch_size=64).build()
    algo.train()
    calls = _record_updates(algo, monkeypatch)
    algo.train()
    share = algo.store.num_offline / (algo.store.num_offline + algo.store.num_online)
    algo.stop()
    assert (calls[-1]["columns"][IS_OFFLINE].reshape(-1, 64).sum(axis=1) == round(64 * share)).all()


def test_offline_batches_hold_the_data_with_scaled_rewards_and_module_actions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = line_config(tmp_path, offline_updates=4, updates_per_iteration=4, batch_size=32)
    config.offline_data(reward_scale=10.0, reward_bias=-5.0)
    algo = config.build()
    calls = _record_updates(algo, monkeypatch)
    algo.train()
    algo.stop()
    columns = calls[0]["columns"]
    moved = columns[Columns.NEXT_OBS][:, 0] - columns[Columns.OBS][:, 0]
    # LineEnv moves by its action, whose bounds are [-2, 2]: module actions are half of that.
    np.testing.assert_allclose(moved, 2.0 * columns[Columns.ACTIONS][:, 0], atol=2e-4)
    np.testing.assert_allclose(
        columns[Columns.REWARDS], 10.0 * LineEnv.reward(columns[Columns.NEXT_OBS]) - 5.0, atol=1e-3
    )


def test_online_transitions_are_what_the_environment_emitted(tmp_path: Path) -> None:
    LineEnv.log.clear()
    algo = line_config(tmp_path, offline_updates=1).build()
    algo.train()
    LineEnv.log.clear()
    for _ in range(3):
        algo.train()
    store = algo.store
    rows = np.column_stack(
        [
            store.online_column(Columns.OBS),
            2.0 * store.online_column(Columns.ACTIONS),
            store.online_column(Columns.REWARDS),
            store.online_column(Columns.NEXT_OBS),
            store.online_column(Columns.TERMINATEDS),
        ]
    )
    algo.stop()
    emitted = np.array(LineEnv.log, dtype=np.float32)
    assert rows.shape == emitted.shape
    np.testing.assert_allclose(rows, emitted, atol=1e-4)


def test_a_time_out_keeps_its_bootstrap_and_a_terminal_state_does_not(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=1).build()
    for _ in range(8):
        algo.train()
    store = algo.store
    terminateds, next_obs = store.online_column(Columns.TERMINATEDS), store.online_column(Columns.NEXT_OBS)
    returns = store.online_column(Columns.RETURNS_TO_GO)
    rewards = store.online_column(Columns.REWARDS)
    algo.stop()
    np.testing.assert_array_equal(terminateds, np.abs(next_obs[:, 0]) >= LineEnv.GOAL)
    # G_t = r_t + gamma G_{t+1} wherever the next row goes on with the same episode.
    same_episode = np.all(store.online_column(Columns.OBS)[1:] == next_obs[:-1], axis=1) & (terminateds[:-1] == 0)
    assert same_episode.sum() > 10
    np.testing.assert_allclose(
        returns[:-1][same_episode], (rewards[:-1] + 0.99 * returns[1:])[same_episode], rtol=1e-5, atol=1e-4
    )


def test_nothing_is_updated_before_the_warm_up_is_over(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=1)
    config.fine_tuning(warmup_env_steps=25)
    algo = config.build()
    algo.train()
    while algo.num_online_env_steps < 60:
        result = algo.train()
        env_steps = result[keys.NUM_ONLINE_ENV_STEPS_LIFETIME]
        assert result[keys.NUM_ONLINE_UPDATES_LIFETIME] == max(0, env_steps - 25)
    algo.stop()


def test_without_data_it_trains_online_after_a_random_warm_up(tmp_path: Path) -> None:
    LineEnv.log.clear()
    config = CalQLConfig().environment(LineEnv).rl_module(model_config=TINY_NETWORKS).debugging(seed=3)
    config.fine_tuning(warmup_env_steps=300).training(train_batch_size_per_learner=8)
    algo = config.build()
    while algo.num_online_env_steps < 340:
        result = algo.train()
    algo.stop()
    assert result[keys.PHASE] == keys.ONLINE
    assert result[keys.NUM_ONLINE_UPDATES_LIFETIME] == result[keys.NUM_ONLINE_ENV_STEPS_LIFETIME] - 300
    actions = np.array([row[1] for row in LineEnv.log[:300]])
    assert abs(actions.mean()) < 0.25
    assert 1.0 < actions.std() < 1.3  # Uniform over [-2, 2] has 1.155.
    assert result["learners"]["default_policy"][keys.REFERENCE_VALUE_MEAN] < 0


def test_several_environments_per_runner_lose_no_episode_and_favour_none(tmp_path: Path) -> None:
    LineEnv.log.clear()
    config = line_config(tmp_path, offline_updates=1)
    config.env_runners(num_envs_per_env_runner=3)
    algo = config.build()
    algo.train()
    LineEnv.log.clear()
    for _ in range(4):
        algo.train()
    stored = {tuple(np.round(row, 3)) for row in np.column_stack([algo.store.online_column(Columns.OBS)])}
    emitted = [tuple(np.round(np.float32(row[0:1]), 3)) for row in LineEnv.log]
    algo.stop()
    # At most the three episodes that are still under way are missing.
    assert sum(obs not in stored for obs in emitted) <= 3 * LineEnv.TIME_LIMIT
    assert algo.num_online_env_steps >= len(emitted) - 3 * LineEnv.TIME_LIMIT


def _policy_head(algo: CalQL) -> np.ndarray:
    state = algo.learner_group.get_state(components="learner/rl_module")["learner"]["rl_module"]["default_policy"]
    return np.array(state["policy.head.weight"])


@pytest.mark.parametrize("num_env_runners", [0, 1, 2])
def test_runners_collect_with_the_current_weights(tmp_path: Path, num_env_runners: int) -> None:
    config = line_config(tmp_path, offline_updates=5, updates_per_iteration=5)
    config.env_runners(num_env_runners=num_env_runners).fine_tuning(sample_async=False)
    algo = config.build()
    algo.train()  # The end of the offline phase: already the first episode must see its weights.
    for _ in range(2):
        local = algo.env_runner.module.get_state()["policy.head.weight"]
        collected_with = _policy_head(algo)
        np.testing.assert_array_equal(local, collected_with)
        result = algo.train()
        assert not np.array_equal(_policy_head(algo), collected_with)
        remote = algo.env_runner_group.foreach_env_runner(
            lambda runner: runner.module.get_state()["policy.head.weight"], local_env_runner=False
        )
        assert len(remote) == num_env_runners
        for weights in remote:
            np.testing.assert_array_equal(weights, collected_with)
    algo.stop()
    assert result[keys.NUM_ONLINE_EPISODES_LIFETIME] == 2 * max(1, num_env_runners)


def test_every_result_of_both_phases_holds_what_schedulers_read(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=2).build()
    for _ in range(3):
        result = algo.train()
        assert "episode_return_mean" in result["env_runners"]
        for name in (
            keys.PHASE,
            keys.NUM_OFFLINE_UPDATES_LIFETIME,
            keys.NUM_ONLINE_UPDATES_LIFETIME,
            keys.NUM_ONLINE_ENV_STEPS_LIFETIME,
        ):
            assert name in result
    algo.stop()


def test_all_diagnostics_are_logged_in_both_phases(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=2, updates_per_iteration=2).training(lagrangian=True)
    config.evaluation(evaluation_interval=1, evaluation_duration=2).offline_data(reward_scale=2.0, reward_bias=-1.0)
    algo = config.build()
    per_critic = [
        keys.TD_LOSS_OF_CRITIC,
        keys.GAP_OF_CRITIC,
        keys.Q_DATA_OF_CRITIC,
        keys.Q_UNIFORM_OF_CRITIC,
        keys.Q_CURRENT_OF_CRITIC,
        keys.Q_NEXT_OF_CRITIC,
        keys.Q_STD_OF_CRITIC,
        keys.BOUND_RATE_CURRENT_OF_CRITIC,
        keys.BOUND_RATE_NEXT_OF_CRITIC,
    ]
    common = [
        keys.QF_LOSS,
        keys.POLICY_LOSS,
        keys.ALPHA_LOSS,
        keys.ALPHA_VALUE,
        keys.ALPHA_PRIME,
        keys.CQL_LOSS,
        keys.LOG_PROB,
        keys.TARGET_Q,
        keys.CALIBRATION_GAP,
        keys.CALIBRATION_GAP_OFFLINE,
    ]
    offline, online = algo.train(), algo.train()
    algo.stop()
    for result in (offline, online):
        learner = result["learners"]["default_policy"]
        for name in common + [template.format(c=c) for template in per_critic for c in (1, 2)]:
            assert np.isfinite(learner[name]), name
    assert np.isfinite(online["learners"]["default_policy"][keys.CALIBRATION_GAP_ONLINE])
    # What `stop` is checked by: every name of ours and of RLlib that the results have, and no other of ours.
    absent = {keys.CLIPPED_OFFLINE, keys.CLIPPED_ONLINE}  # Of normalised observations alone.
    absent |= {keys.REFERENCE_LOSS, keys.REFERENCE_GAP, keys.NUM_REFERENCE_UPDATES_LIFETIME}  # Of learned references.
    optional = (keys.BOUND_RATE_UNIFORM_OF_CRITIC, keys.CALIBRATION_PENALTY_OF_CRITIC)  # Of other calibrations.
    absent |= {template.format(c=c) for template in optional for c in (1, 2)}
    assert metric_names(num_critics=2) - absent <= online["learners"]["default_policy"].keys()
    metrics = metrics_of(config)
    for path, value in flatten_dict({key: value for key, value in online.items() if key != "config"}).items():
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and not re.search("throughput|_parameters|actor_manager|pid", path)
        ):
            assert not metrics.fault_of(path), path
    assert keys.CALIBRATION_GAP_ONLINE not in offline["learners"]["default_policy"]
    assert online[keys.FINE_TUNING][keys.DIP] == min(
        0.0,
        online["evaluation"]["env_runners"]["episode_return_mean"]
        - offline["evaluation"]["env_runners"]["episode_return_mean"],
    )
    assert 0.0 <= online[keys.FINE_TUNING][keys.REGRET] <= 1.0
    # The regime stands in every result from the switch on, in units of the environment.
    at_switch = offline["evaluation"]["env_runners"]
    assert offline[keys.FINE_TUNING] == {key: online[keys.FINE_TUNING][key] for key in offline[keys.FINE_TUNING]}
    assert online[keys.FINE_TUNING][keys.REGIME] in (POLICY, DATA, BOTH)
    assert online[keys.FINE_TUNING][keys.REGIME_QUANTITY] == RETURN
    assert online[keys.FINE_TUNING][keys.REGIME_POLICY] == at_switch["episode_return_mean"]
    assert online[keys.FINE_TUNING][keys.REGIME_DATA] == online[keys.STORE][keys.OFFLINE_RETURN_MEAN]
    for result in (offline, online):  # Half of the difference of two returns is their standard deviation.
        evaluated = result["evaluation"]["env_runners"]
        half = (evaluated["episode_return_max"] - evaluated["episode_return_min"]) / 2
        assert evaluated["num_episodes"] == 2
        assert evaluated[keys.EPISODE_RETURN_STD] == pytest.approx(half)
    assert 0.0 <= online["evaluation"]["env_runners"][keys.SUCCESS_RATE] <= 1.0


def test_env_steps_trained_are_not_counted_more_than_once(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=10, updates_per_iteration=10, batch_size=8).build()
    result = algo.train()
    algo.stop()
    assert result["learners"]["default_policy"]["num_module_steps_trained_lifetime"] == 80
    assert result["learners"]["__all_modules__"]["num_env_steps_trained_lifetime"] == 80


def test_the_online_phase_can_run_as_plain_sac(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=2).fine_tuning(conservative_online=False).build()
    offline, online = algo.train(), algo.train()
    algo.stop()
    assert offline["learners"]["default_policy"][keys.CQL_LOSS] != 0.0
    absent = offline["learners"]["default_policy"].keys() - online["learners"]["default_policy"].keys()
    # Not evaluated, so absent, and neither 0 nor NaN.
    assert {keys.CQL_LOSS, keys.GAP_OF_CRITIC.format(c=1), keys.Q_UNIFORM_OF_CRITIC.format(c=2)} <= absent
    assert keys.QF_LOSS not in absent


def test_offline_training_needs_no_environment(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=6, updates_per_iteration=3)
    config.env = None
    config.environment(
        observation_space=gym.spaces.Box(-10.0, 10.0, (1,), np.float32),
        action_space=gym.spaces.Box(-2.0, 2.0, (1,), np.float32),
    )
    algo = config.build()
    algo.train()
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    algo.train()
    restored = CalQL.from_checkpoint(path)
    restored.train()
    for one, other in zip(_weights(algo), _weights(restored), strict=True):
        np.testing.assert_array_equal(one, other)
    for finished in (algo, restored):
        with pytest.raises(RuntimeError, match="no environment"):
            finished.train()
        with pytest.raises(RuntimeError, match="Evaluation needs an environment"):
            finished.evaluate()
        finished.stop()


def _weights(algo: CalQL) -> list[np.ndarray]:
    state = algo.learner_group.get_state(components="learner/rl_module")["learner"]["rl_module"]["default_policy"]
    return [state[name] for name in sorted(state)]


def test_observations_are_normalised_by_the_data_and_runners_know(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=2).offline_data(normalize_observations=True)
    config.env_runners(num_env_runners=1)
    algo = config.build()
    observations = algo.store.offline_column(Columns.OBS).astype(np.float64)
    remote = algo.env_runner_group.foreach_env_runner(lambda runner: runner.module.get_state(), local_env_runner=False)
    algo.stop()
    np.testing.assert_allclose(remote[0]["obs_mean"], observations.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(remote[0]["obs_std"], observations.std(axis=0), rtol=1e-4)


class _DictEnv(gym.Env):  # type: ignore[type-arg]
    """Dict and Tuple observations of several kinds."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.observation_space = gym.spaces.Dict(
            {
                "pair": gym.spaces.Tuple((gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,), np.float32))),
                "arm": gym.spaces.Box(-1.0, 1.0, (2, 2), np.float32),
            }
        )
        self.action_space = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 0.5], np.float32))
        self.seen: list[Any] = []
        self.t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(np.asarray(action, np.float32)), action
        self.t += 1
        return self.observation_space.sample(), -1.0, False, self.t == 5, {}


def test_dict_and_tuple_observations_and_asymmetric_bounds_work_by_themselves() -> None:
    config = CalQLConfig().environment(_DictEnv).rl_module(model_config=TINY_NETWORKS).debugging(seed=0)
    config.fine_tuning(warmup_env_steps=5).training(train_batch_size_per_learner=4)
    algo = config.build()
    for _ in range(3):
        result = algo.train()
    sample = _DictEnv().observation_space.sample()
    assert algo.store.online_column(Columns.OBS).shape == (15, 9)
    batch = {"pair": (np.array([sample["pair"][0]]), sample["pair"][1][None]), "arm": sample["arm"][None]}
    flat = flatten_observations(_DictEnv().observation_space, batch)[0]
    algo.stop()
    one_hot = np.eye(3)[sample["pair"][0]]
    np.testing.assert_allclose(flat, np.concatenate([sample["arm"].ravel(), one_hot, sample["pair"][1]]))
    assert result[keys.NUM_ONLINE_UPDATES_LIFETIME] == 10


def test_bootstrapped_returns_follow_the_learners_value_estimate(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=4, updates_per_iteration=2).offline_data(truncation="bootstrap")
    algo = config.build()
    algo.train()
    algo.train()  # Returns were renewed at its beginning, from the weights that the first iteration left.
    algo.store.refresh_returns(algo._parts.updater._estimate_values)
    obs, next_obs = algo.store.offline_column(Columns.OBS), algo.store.offline_column(Columns.NEXT_OBS)
    returns = algo.store.offline_column(Columns.RETURNS_TO_GO)
    cut = np.flatnonzero((np.abs(next_obs[:-1, 0]) < LineEnv.GOAL) & (next_obs[:-1, 0] != obs[1:, 0]))
    assert len(cut) > 3
    values = algo._parts.updater._estimate_values(next_obs[cut])
    np.testing.assert_allclose(
        returns[cut], algo.store.offline_column(Columns.REWARDS)[cut] + 0.99 * values, rtol=1e-4, atol=1e-4
    )
    algo.stop()


def test_learning_on_the_line_reaches_the_goal(tmp_path: Path) -> None:
    write_line_data(tmp_path / "more.parquet", num_episodes=60, seed=5)
    config = line_config(tmp_path, offline_updates=1_000, updates_per_iteration=500, batch_size=64)
    config.offline_data(input_=tmp_path / "more.parquet")
    config.training(actor_lr=3e-3, critic_lr=3e-3, tau=0.05, min_q_weight=0.5, gamma=0.9, initial_alpha=0.05)
    config.rl_module(model_config={"actor_hiddens": [32, 32], "critic_hiddens": [32, 32]})
    config.evaluation(evaluation_interval=2, evaluation_duration=10)
    algo = config.build()
    algo.train()
    result = algo.train()
    algo.stop()
    assert result["evaluation"]["env_runners"][keys.SUCCESS_RATE] == 1.0
    assert result["evaluation"]["env_runners"]["episode_len_mean"] <= 5.0  # A random walk needs more than 15 steps.
