"""Asynchronous collection: what is stored, how far updates lag, and that nothing is lost or favoured."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logged_env import logged_actions, logged_config, logged_episodes, stored_actions, stored_steps
from tiny import line_config

from rllib_calql import CalQL
from rllib_calql.common import metrics as keys

pytestmark = pytest.mark.usefixtures("ray_session")


def _process_ids(algo: CalQL) -> list[int]:
    return algo.env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)  # type: ignore[no-any-return]


def _train_until(algo: CalQL, num_episodes: int) -> dict[str, Any]:
    deadline = time.monotonic() + 120.0
    while algo.num_online_episodes < num_episodes:
        assert time.monotonic() < deadline
        result: dict[str, Any] = algo.train()
    return result


def test_where_stop_ends_the_run_all_updates_are_made_that_are_owed(tmp_path: Path) -> None:
    config = logged_config(tmp_path / "log", num_env_runners=1, lengths=[5], step_s=0.002, updates_per_env_step=20)
    config._ends_at_env_steps = 30
    algo = config.build()
    owed = []
    while algo.num_online_env_steps < 30:
        algo.train()
        owed.append(algo.lifetime.updates_owed)
    algo.stop()
    assert max(owed[:-1]) >= 20
    assert (owed[-1], algo.num_online_updates) == (0, 20 * algo.num_online_env_steps)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_store_holds_every_finished_episode_once_and_nothing_else(tmp_path: Path, num_envs: int) -> None:
    algo = logged_config(tmp_path / "log", num_env_runners=2, num_envs=num_envs, lengths=[3, 7], step_s=0.002).build()
    runners = [str(pid) for pid in _process_ids(algo)]
    _train_until(algo, 120)
    stored, actions = Counter(stored_steps(algo)), stored_actions(algo)
    algo.stop()
    logged, logged_action = logged_episodes(tmp_path / "log"), logged_actions(tmp_path / "log")
    assert set(stored.values()) == {1}
    assert sorted(logged) == sorted(runners)
    for step, action in actions.items():
        assert action == pytest.approx(logged_action[step], abs=1e-4)  # Stored actions stay inside (-1, 1).
    for episodes in logged.values():
        is_stored = [all(step in stored for step in episode) for episode in episodes]
        # What ended after the last request that was taken in is missing, for each sub-environment a stretch at the end.
        first_missing = is_stored.index(False) if False in is_stored else len(is_stored)
        assert first_missing > 20
        if num_envs == 1:
            assert not any(is_stored[first_missing:])
        for episode, kept in zip(episodes, is_stored, strict=True):
            assert kept or not any(step in stored for step in episode)
    emitted = {step for episodes in logged.values() for episode in episodes for step in episode}
    assert set(stored) <= emitted
    assert len(stored) == algo.num_online_env_steps


def test_a_killed_runner_costs_its_last_requests_and_comes_back_with_current_weights(tmp_path: Path) -> None:
    algo = logged_config(tmp_path / "log", num_env_runners=2, lengths=[3, 7], step_s=0.002).build()
    _train_until(algo, 30)
    killed, other = _process_ids(algo)
    os.kill(killed, signal.SIGKILL)
    num_stored = algo.num_online_episodes
    result = _train_until(algo, num_stored + 60)
    deadline = time.monotonic() + 60.0
    while algo._parts.collection._collector.num_healthy < 2:
        assert time.monotonic() < deadline
        result = algo.train()
    result = _train_until(algo, algo.num_online_episodes + 60)
    assert result[keys.COLLECTION][keys.NUM_HEALTHY_ENV_RUNNERS] == 2
    assert result[keys.COLLECTION][keys.NUM_ENV_RUNNER_FAILURES_LIFETIME] == 1
    heads = algo.env_runner_group.foreach_env_runner(
        lambda runner: (runner._calql_weights_version, runner.module.get_state()["policy.head.weight"]),
        local_env_runner=False,
    )
    newest = algo._parts.collection._weights.latest.version
    initial = logged_config(tmp_path / "other", num_env_runners=0).build().env_runner.module.get_state()
    for version, head in heads:
        assert newest - version < 100
        assert not np.array_equal(head, initial["policy.head.weight"])
    stored = Counter(stored_steps(algo))
    algo.stop()
    logged = logged_episodes(tmp_path / "log")
    assert len(logged) == 3
    assert set(stored.values()) == {1}
    for pid, episodes in logged.items():
        is_stored = [all(step in stored for step in episode) for episode in episodes]
        first_missing = is_stored.index(False) if False in is_stored else len(is_stored)
        assert not any(is_stored[first_missing:])
        assert first_missing >= 10
        if pid == str(killed):  # Two requests of about half a second, at 2 ms and more a step.
            assert sum(len(episode) for episode in episodes[first_missing:]) <= 2 * 0.6 / 0.002
    assert str(other) in logged


def test_stored_shares_of_long_and_short_episodes_are_the_true_ones(tmp_path: Path) -> None:
    algo = logged_config(tmp_path / "log", num_env_runners=1, num_envs=4, lengths=[2, 40]).build()
    _train_until(algo, 300)
    starts = [step for step in stored_steps(algo) if step[1] == 0.0]
    long_ones = {step[0] for step in stored_steps(algo) if step[1] == 39.0}
    algo.stop()
    share = np.mean([start[0] in long_ones for start in starts])
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(len(starts))
    assert len(starts) == algo.num_online_episodes


@pytest.mark.parametrize("sample_async", [True, False])
def test_an_episode_that_never_ends_is_cut_without_losing_a_step(tmp_path: Path, sample_async: bool) -> None:
    config = logged_config(tmp_path / "log", num_env_runners=1, num_envs=2, lengths=[10**9])
    config.fine_tuning(max_episode_env_steps=16, sample_async=sample_async, updates_per_iteration=5)
    algo = config.build()
    result = _train_until(algo, 12)
    steps = stored_steps(algo)
    assert not algo.store.online_column("terminateds").any()
    next_obs = algo.store.online_column("new_obs")
    algo.stop()
    assert len({step[0] for step in steps}) == 2
    for number in {step[0] for step in steps}:
        times = [step[1] for step in steps if step[0] == number]
        assert times == list(range(len(times)))
        assert len(times) % 16 == 0
    np.testing.assert_array_equal(next_obs[:, 1], [step[1] + 1 for step in steps])
    assert result["env_runners"]["episode_len_mean"] == 16
    assert algo.num_online_env_steps == 16 * algo.num_online_episodes


@pytest.mark.parametrize("updates_per_env_step", [0.5, 4])
def test_updates_keep_their_ratio_within_the_stated_staleness(tmp_path: Path, updates_per_env_step: float) -> None:
    limit = 20
    config = logged_config(tmp_path / "log", num_env_runners=2, updates_per_env_step=updates_per_env_step)
    algo = config.fine_tuning(max_staleness_env_steps=limit).build()
    for _ in range(12):
        result = algo.train()
        behind = result[keys.COLLECTION][keys.NUM_ENV_STEPS_BEHIND]
        done = result[keys.NUM_ONLINE_UPDATES_LIFETIME]
        assert done + behind * updates_per_env_step == pytest.approx(algo.num_online_env_steps * updates_per_env_step)
        assert behind >= 0
        # Beyond the limit there are at most the steps that had been asked for before, and two episodes under way.
        assert behind <= limit + limit + 2 * 5
    algo.stop()


def test_a_runner_collects_while_the_learner_updates(tmp_path: Path) -> None:
    config = logged_config(tmp_path / "log", num_env_runners=1, updates_per_env_step=2, step_s=0.01)
    algo = config.fine_tuning(max_staleness_env_steps=10_000).build()
    _train_until(algo, 4)
    update = algo._parts.updater._make_updates

    def slow_update(num_updates: int, **keywords: Any) -> None:
        before = sum(len(path.read_text().splitlines()) for path in (tmp_path / "log").glob("*.steps"))
        time.sleep(0.4)
        update(num_updates, **keywords)
        after = sum(len(path.read_text().splitlines()) for path in (tmp_path / "log").glob("*.steps"))
        made_meanwhile.append(after - before)

    made_meanwhile: list[int] = []
    algo._parts.updater._make_updates = slow_update  # type: ignore[method-assign]
    result = _train_until(algo, 24)
    algo.stop()
    assert np.median(made_meanwhile) >= 10
    assert result[keys.COLLECTION][keys.LEARNER_BUSY_SHARE] > 0.5


def test_without_async_two_runs_with_remote_runners_are_the_same(tmp_path: Path) -> None:
    stores = []
    for _ in range(2):
        config = line_config(tmp_path, offline_updates=3, updates_per_iteration=3)
        config.env_runners(num_env_runners=2, num_cpus_per_env_runner=0.5).fine_tuning(sample_async=False)
        algo = config.build()
        for _ in range(4):
            algo.train()
        stores.append({name: algo.store.online_column(name).copy() for name in ("obs", "actions", "returns_to_go")})
        algo.stop()
    for name, column in stores[0].items():
        np.testing.assert_array_equal(column, stores[1][name])


def test_results_asked_for_before_a_restore_are_not_stored_after_it(tmp_path: Path) -> None:
    algo = logged_config(tmp_path / "log", num_env_runners=1, lengths=[6], step_s=0.002).build()
    _train_until(algo, 10)
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    at_save = Counter(stored_steps(algo))
    algo.train()
    asked_before = {step for episodes in logged_episodes(tmp_path / "log").values() for e in episodes for step in e}
    algo.restore_from_path(path)
    _train_until(algo, 30)
    stored = Counter(stored_steps(algo))
    algo.stop()
    assert set(stored.values()) == {1}
    assert not (stored - at_save).keys() & asked_before
    assert len(stored) == algo.num_online_env_steps
