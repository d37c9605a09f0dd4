"""What happens when a part fails: runners, environments, learners, the object store. Every wait is bounded."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from logged_env import logged_config, stored_steps
from tiny import line_config

from rllib_calql import CalQL
from rllib_calql.collection import collector
from rllib_calql.common import metrics as keys
from rllib_calql.learning import recovery as learner_recovery
from rllib_calql.learning import updater as updating

pytestmark = pytest.mark.usefixtures("ray_session")


def _train_until(algo: CalQL, num_episodes: int, seconds: float = 120.0) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while algo.num_online_episodes < num_episodes:
        assert time.monotonic() < deadline
        result: dict[str, Any] = algo.train()
    return result


# --- Environments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_async", [True, False])
@pytest.mark.parametrize(("fault", "cause"), [("raise", "ValueError: the gripper is stuck"), ("hang", "no answer for")])
def test_a_runner_whose_environment_fails_is_started_anew_and_the_cause_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sample_async: bool, fault: str, cause: str
) -> None:
    config = logged_config(tmp_path / "log", num_env_runners=2, fault=fault, num_faults=1)
    algo = config.env_runners(sample_timeout_s=15.0).fine_tuning(sample_async=sample_async).build()
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        _train_until(algo, 10)
        deadline = time.monotonic() + 90.0
        while algo._parts.collection._collector.num_failures == 0 or algo._parts.collection._collector.num_healthy < 2:
            assert time.monotonic() < deadline
            result = algo.train()
    result = algo.train()
    algo.stop()
    assert cause in caplog.text
    assert result[keys.COLLECTION][keys.NUM_ENV_RUNNER_FAILURES_LIFETIME] == 1
    assert len(set(stored_steps(algo))) == algo.num_online_env_steps


def test_an_environment_that_always_fails_ends_the_run_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "_MAX_FAILURES", 2)
    algo = logged_config(tmp_path / "log", num_env_runners=1, fault="raise", num_faults=1000).build()
    begin = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"1 env runners failed 2 times.*ValueError: the gripper is stuck\..*resumed"
    ):
        algo.train()
    algo.stop()
    assert time.monotonic() - begin < 120.0
    assert algo.num_online_episodes == 0


def test_an_episode_with_nan_is_left_out_and_the_others_are_stored(tmp_path: Path) -> None:
    algo = logged_config(tmp_path / "log", num_env_runners=1, fault="nan", num_faults=3).build()
    result = _train_until(algo, 10)
    algo.stop()
    assert result[keys.COLLECTION][keys.NUM_DISCARDED_EPISODES_LIFETIME] == 3
    assert np.isfinite(algo.store.online_column("new_obs")).all()
    assert algo.num_online_env_steps == 5 * algo.num_online_episodes == len(stored_steps(algo))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "num_faults", "counter"),
    [("nan", 3, keys.NUM_DISCARDED_EPISODES_LIFETIME), ("raise", 1, keys.NUM_ENV_RUNNER_FAILURES_LIFETIME)],
)
def test_lifetime_counts_of_faults_go_on_after_a_restore(
    tmp_path: Path, fault: str, num_faults: int, counter: str
) -> None:
    algo = logged_config(tmp_path / "log", num_env_runners=1, fault=fault, num_faults=num_faults).build()
    _train_until(algo, 5)
    path = algo.save_to_path(tmp_path / "checkpoint")
    algo.stop()
    local = CalQL.from_checkpoint(path, config=logged_config(tmp_path / "log", num_env_runners=0))
    path = local.save_to_path(tmp_path / "continued")
    local.stop()
    restored = CalQL.from_checkpoint(path, config=logged_config(tmp_path / "log", num_env_runners=1))
    result = restored.train()  # The faults are over.
    restored.stop()
    assert result[keys.COLLECTION][counter] == num_faults


# --- Learners ---------------------------------------------------------------------------------------------------------


def _learner_ids(algo: CalQL) -> list[int]:
    return [result.get() for result in algo.learner_group.foreach_learner(lambda *_: os.getpid())]


def _weights(algo: CalQL) -> list[np.ndarray]:
    return algo._parts.updater.foreach_learner(
        lambda learner, *_: np.concatenate(
            [np.ravel(value) for value in learner.module.get_state()["default_policy"].values()]
        )
    )


@pytest.fixture
def no_snapshots_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_recovery, "_SECONDS_BETWEEN_SNAPSHOTS", 1e9)


@pytest.mark.usefixtures("no_snapshots_by_time")
@pytest.mark.parametrize(("num_learners", "rank"), [(1, 0), (2, 1)])
def test_a_lost_learner_is_rebuilt_from_the_last_snapshot_and_its_updates_are_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_learners: int, rank: int
) -> None:
    config = line_config(tmp_path, offline_updates=40).learners(num_learners=num_learners, num_cpus_per_learner=0.5)
    algo = config.build()
    algo.train()
    algo._parts.updater.take_snapshot()
    at_snapshot = _weights(algo)
    algo.train()
    assert algo.num_offline_updates == 20
    os.kill(_learner_ids(algo)[rank], signal.SIGKILL)
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        algo.train()
    assert "A learner is lost; all are built anew" in caplog.text
    assert algo.num_offline_updates == 10
    for before, after in zip(at_snapshot, _weights(algo), strict=True):
        np.testing.assert_array_equal(after, before)
    while algo.num_online_episodes < 3:
        result = algo.train()
    first, *others = _weights(algo)
    algo.stop()
    assert algo.num_offline_updates == 40
    assert result[keys.NUM_ONLINE_UPDATES_LIFETIME] == algo.num_online_env_steps
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.usefixtures("no_snapshots_by_time")
def test_a_learner_lost_online_costs_no_update(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=10).learners(num_learners=1, num_cpus_per_learner=0.5).build()
    for _ in range(3):
        algo.train()
    os.kill(_learner_ids(algo)[0], signal.SIGKILL)
    algo.train()
    assert (algo.num_offline_updates, algo.num_online_updates) == (10, 0)  # The snapshot at the switch.
    algo.train()
    algo.stop()
    assert algo.num_online_updates == algo.num_online_env_steps


def test_learners_that_cannot_be_rebuilt_end_the_run_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updating, "_REBUILD_TIMEOUT_S", 3.0)
    algo = line_config(tmp_path, offline_updates=40).learners(num_learners=1, num_cpus_per_learner=1).build()
    algo.train()
    os.kill(_learner_ids(algo)[0], signal.SIGKILL)

    @ray.remote(num_cpus=2)
    class Occupant:
        def ready(self) -> bool:
            return True

    occupant = Occupant.remote()  # type: ignore[attr-defined]
    ray.get(occupant.ready.remote(), timeout=60.0)
    with pytest.raises(RuntimeError, match=r"building the learners anew took over 3 s; are there resources.*resumed"):
        algo.train()
    ray.kill(occupant)
    algo.stop()
    for thread in threading.enumerate():
        if thread.name == "rebuild learners":
            thread.join(60.0)


class _Group:
    """What `LearnerRecovery` uses of RLlib's `LearnerGroup`."""

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self.was_shut_down = threading.Event()

    def shutdown(self) -> None:
        self.was_shut_down.set()


def test_learners_that_are_built_too_late_are_ended() -> None:
    may_build, late = threading.Event(), _Group()

    def build() -> _Group:
        assert may_build.wait(30.0)
        return late

    recovery = learner_recovery.LearnerRecovery(timeout_s=0.01)
    with pytest.raises(RuntimeError, match="took over"):
        recovery.rebuild(_Group(), build, RuntimeError("lost"))
    assert not late.was_shut_down.is_set()
    may_build.set()
    assert late.was_shut_down.wait(30.0)


# --- Object store -----------------------------------------------------------------------------------------------------


def test_a_full_object_store_slows_training_but_does_not_end_it(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        import numpy as np, ray
        from forked_workers import started_by_forks
        from tiny import line_config
        with started_by_forks():
            ray.init("local", num_cpus=3, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
        pinned = [ray.put(np.ones(2**20)) for _ in range(9)]  # 72 of 80 MiB, all of them in use.
        views = ray.get(pinned)
        config = line_config(Path(sys.argv[1]), offline_updates=100, updates_per_iteration=50, batch_size=256)
        algo = config.learners(num_learners=1).env_runners(num_env_runners=1).build()
        for _ in range(4):
            algo.train()
        assert algo.num_offline_updates == 100 and algo.num_online_episodes > 0
        assert all(view.sum() == 2**20 for view in views)
        algo.stop()
        print("finished")
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environment,
    )
    assert done.stdout.strip().endswith("finished"), done.stderr[-2000:]
