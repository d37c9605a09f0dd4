"""Bad input is refused with place, rule and remedy, before any gradient update, and leaves nothing behind."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from minari.data_collector import EpisodeBuffer
from pendulum_data import (
    ACTION_SPACE,
    OBSERVATION_SPACE,
    FaultyEnv,
    Rows,
    offline_config,
    small_config,
    two_episodes,
    write,
)

from rllib_calql import CalQL
from rllib_calql.learning.learner import CalQLTorchLearner

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(autouse=True)
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records every update call of a local learner."""
    calls: list[int] = []
    stock = CalQLTorchLearner.update

    def update(self: CalQLTorchLearner, *args: Any, **kwargs: Any) -> dict[str, Any]:
        calls.append(1)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(CalQLTorchLearner, "update", update)
    return calls


def assert_refused(build: Callable[[], CalQL], updates: list[int], message: str, error: Any = ValueError) -> None:
    """`build` raises the error itself, and not one from deep inside that merely mentions it."""
    with pytest.raises(error, match=message):
        build()
    assert updates == []


# --- Offline data -----------------------------------------------------------------------------------------------------


def test_the_data_that_the_other_tests_spoil_are_in_order(tmp_path: Path, updates: list[int]) -> None:
    algo = offline_config(write(tmp_path / "rows.parquet", two_episodes())).build()
    try:
        assert algo.store.num_offline == 7
        assert updates == []
        algo.train()
        assert len(updates) == 1
        assert algo.num_offline_updates == 2
    finally:
        algo.stop()


def changed(rows: Rows, name: str, row: int, value: Any) -> Rows:
    return rows | {name: [value if i == row else old for i, old in enumerate(rows[name])]}


def in_order(rows: Rows, order: list[int]) -> Rows:
    return {name: [column[i] for i in order] for name, column in rows.items()}


def without(rows: Rows, name: str) -> Rows:
    return {other: column for other, column in rows.items() if other != name}


FINITE = "observations, actions and rewards must be finite: repair the value or drop the episode"
BAD_ROWS: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "nan in obs": (
        lambda rows: changed(rows, "obs", 4, [0.0, float("nan"), 0.0]),
        rf"`obs` holds nan in episode 'second', row 4 of '.*rows\.parquet'; {FINITE}",
    ),
    "infinity in the last observation": (
        lambda rows: changed(rows, "new_obs", 6, [float("inf"), 0.0, 0.0]),
        rf"`new_obs` holds inf in episode 'second', row 6 of '.*rows\.parquet'; {FINITE}",
    ),
    "nan in actions": (
        lambda rows: changed(rows, "actions", 1, [float("nan")]),
        rf"`actions` holds nan in episode 'first', row 1 of '.*rows\.parquet'; {FINITE}",
    ),
    "infinity in rewards": (
        lambda rows: changed(rows, "rewards", 5, -float("inf")),
        rf"`rewards` holds -inf in episode 'second', row 5 of '.*rows\.parquet'; {FINITE}",
    ),
    "action above the bounds": (
        lambda rows: changed(rows, "actions", 5, [2.1]),
        r"episode 'second', row 5 of '.*rows\.parquet': action \[2\.1\d*\] is outside .*units, clip the recorded",
    ),
    "action below the bounds": (
        lambda rows: changed(rows, "actions", 0, [-7.0]),
        r"episode 'first', row 0 of '.*rows\.parquet': action \[-7\.0\] is outside the bounds .*`action_space_of_data`",
    ),
    "two actions instead of one": (
        lambda rows: rows | {"actions": [[0.0, 0.0]] * 7},
        r"episode 'first', row 0 of '.*rows\.parquet': actions have 2 numbers, the environment's have 1; use",
    ),
    "two observations instead of three": (
        lambda rows: rows | {name: [value[:2] for value in rows[name]] for name in ("obs", "new_obs")},
        r"episode 'first', row 0 of '.*rows\.parquet': observations have 2 numbers, the environment's have 3; use",
    ),
    "an episode without an end": (
        lambda rows: changed(rows, "truncateds", 6, False),
        "Episode 'second' ends neither terminated nor truncated .*row 6.*drop it or mark its last step",
    ),
    "an episode with an end in the middle": (
        lambda rows: changed(rows, "terminateds", 4, True),
        "Episode 'second' goes on after its end: `terminateds` is true in row 4 .*set the flag on the last row only",
    ),
    "swapped rows": (
        lambda rows: in_order(rows, [0, 1, 2, 3, 5, 4, 6]),
        "Rows of episode 'second' are out of order or missing: `new_obs` in row 3 .* row 4 .*store the rows",
    ),
    "a lost row": (
        lambda rows: in_order(rows, [0, 2, 3, 4, 5, 6]),
        "Rows of episode 'first' are out of order or missing: `new_obs` in row 0 .* row 1 .*store the rows",
    ),
    "a lost row among numbered ones": (
        lambda rows: in_order(rows | {"t": [0, 1, 2, 0, 1, 2, 3]}, [0, 1, 2, 3, 5, 6]),
        r"Rows of episode 'second' are out of order or missing: after `t` 0 \(row 3 .*must count up by 1",
    ),
    "a column less": (
        lambda rows: without(rows, "rewards"),
        r"rows\.parquet' has no column `rewards`; its columns are .*`eps_id`.*; rename the column, or add it",
    ),
    "no rows": (
        lambda rows: {name: column[:0] for name, column in rows.items()},
        r"`input_` '.*rows\.parquet' is empty: its Parquet files have no rows",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_spoilt_rows_are_refused_at_build(case: str, tmp_path: Path, updates: list[int]) -> None:
    spoil, message = BAD_ROWS[case]
    file = tmp_path / "rows.parquet"
    table = pa.table(two_episodes())
    spoilt = spoil(two_episodes())
    pq.write_table(table.slice(0, 0) if not spoilt["obs"] else pa.table(spoilt), file)
    assert_refused(offline_config(file).build, updates, message)


def test_actions_outside_the_module_s_range_are_refused(tmp_path: Path, updates: list[int]) -> None:
    file = write(tmp_path / "rows.parquet", two_episodes() | {"actions": [[0.0]] * 6 + [[1.5]]})
    config = offline_config(file, action_space_of_data="module")
    assert_refused(config.build, updates, r"episode 'second', row 6 of .*: action \[1\.5\] is outside \[-1, 1\].*clip")


def test_the_bad_one_of_several_files_is_named(tmp_path: Path, updates: list[int]) -> None:
    good = write(tmp_path / "good.parquet", two_episodes())
    bad = write(tmp_path / "bad.parquet", changed(two_episodes(), "rewards", 2, float("nan")))
    assert_refused(offline_config([good, bad]).build, updates, r"`rewards` holds nan .*row 2 of '.*bad\.parquet'")


def test_a_target_longer_than_every_recorded_episode_is_refused(tmp_path: Path, updates: list[int]) -> None:
    config = offline_config(write(tmp_path / "rows.parquet", two_episodes()))
    config.training(n_step=5)
    assert_refused(
        config.build,
        updates,
        r"`n_step` must be at most 4, the steps of the longest episode in .*rows.*; got 5\.",
    )
    config.training(n_step=4)
    algo = config.build()
    try:
        algo.train()
        assert len(updates) == 1
    finally:
        algo.stop()


def test_a_missing_file_is_refused_with_what_resembles_it(tmp_path: Path, updates: list[int]) -> None:
    write(tmp_path / "expert-rows.parquet", two_episodes())
    for path in (tmp_path / "expert-row.parquet", str(tmp_path / "expert-row.parquet")):
        assert_refused(
            offline_config(path).build,
            updates,
            r"`input_` '.*expert-row\.parquet': .*no such file or folder\. Did you mean 'expert-rows\.parquet'\?",
            FileNotFoundError,
        )


def test_an_empty_folder_and_another_format_are_refused(tmp_path: Path, updates: list[int]) -> None:
    (tmp_path / "folder").mkdir()
    assert_refused(offline_config(tmp_path / "folder").build, updates, r"folder' is empty: there is no `\*\.parquet`")
    (tmp_path / "rows.txt").write_text("obs,actions\n1,2\n")
    assert_refused(
        offline_config(tmp_path / "rows.txt").build,
        updates,
        r"rows\.txt' is of no format that can be read; `input_` takes `minari:<dataset id>`, Parquet, HDF5",
    )


# --- Minari -----------------------------------------------------------------------------------------------------------


def create_minari(dataset_id: str, *, obs_size: int = 3, action_bound: float = 2.0, reward: float = 1.0) -> None:
    """A dataset of one episode of four steps."""
    rng = np.random.default_rng(0)
    episode = EpisodeBuffer(
        observations=rng.standard_normal((5, obs_size)).astype(np.float32),
        actions=rng.uniform(-action_bound, action_bound, (4, 1)).astype(np.float32),
        rewards=np.array([1.0, reward, 1.0, 1.0]),
        terminations=np.array([False, False, False, True]),
        truncations=np.zeros(4, dtype=bool),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an author, a permalink, ...
        minari.create_dataset_from_buffers(
            dataset_id,
            [episode],
            observation_space=gym.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32),
            action_space=gym.spaces.Box(-action_bound, action_bound, (1,), np.float32),
        )


@pytest.fixture
def _empty_minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()


@pytest.mark.usefixtures("_empty_minari_root")
def test_a_missing_dataset_id_is_refused_with_close_matches(updates: list[int]) -> None:
    create_minari("mine/pendulum-expert-v0")
    assert_refused(
        offline_config("minari:mine/pendulum-exprt-v0").build,
        updates,
        r"no Minari dataset 'mine/pendulum-exprt-v0' .*Did you mean 'mine/pendulum-expert-v0'.*minari download",
        FileNotFoundError,
    )
    assert_refused(
        offline_config("minari:rllib-calql/pointmaze-umase-play-v0").build,
        updates,
        r"Did you mean 'rllib-calql/pointmaze-umaze-play-v0'",
        FileNotFoundError,
    )


@pytest.mark.usefixtures("_empty_minari_root")
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            {"obs_size": 4},
            r"Dataset 'minari:mine/other-v0' has observation space Box\(-inf, inf, \(4,\), float32\), the environment "
            r"has Box\(.*\(3,\), float32\); use the environment the data come from, or convert the data",
        ),
        (
            {"action_bound": 1.0},
            r"Dataset 'minari:mine/other-v0' has action space Box\(-1\.0, 1\.0, \(1,\), float32\), the environment has "
            r"Box\(-2\.0, 2\.0, \(1,\), float32\); use the environment the data come from, or convert the data",
        ),
        (
            {"reward": np.nan},
            "`rewards` holds nan in episode '0', step 1 of 'minari:mine/other-v0'; .*repair the value",
        ),
    ],
    ids=["observation space", "action bounds", "nan"],
)
def test_a_spoilt_or_foreign_minari_dataset_is_refused(dataset: Any, message: str, updates: list[int]) -> None:
    create_minari("mine/other-v0", **dataset)
    assert_refused(offline_config("minari:mine/other-v0").build, updates, message)


@pytest.mark.usefixtures("_empty_minari_root")
def test_the_minari_data_that_the_other_tests_spoil_are_in_order() -> None:
    create_minari("mine/other-v0")
    algo = offline_config("minari:mine/other-v0").build()
    try:
        assert algo.store.num_offline == 4
    finally:
        algo.stop()


# --- Phases and environments ------------------------------------------------------------------------------------------


def test_offline_updates_must_be_set_with_data(tmp_path: Path, updates: list[int]) -> None:
    file = write(tmp_path / "rows.parquet", two_episodes())
    config = small_config().offline_data(input_=file)
    assert_refused(config.build, updates, r"`offline_updates` must be set when `input_` is: `\.fine_tuning\(offline_up")


def test_no_offline_updates_and_no_online_steps_are_refused(tmp_path: Path, updates: list[int]) -> None:
    file = write(tmp_path / "rows.parquet", two_episodes())
    config = offline_config(file, env=None).fine_tuning(offline_updates=0)
    assert_refused(config.build, updates, "`offline_updates` is 0 and there is no environment")


def test_evaluation_without_an_environment_is_refused_at_build(tmp_path: Path, updates: list[int]) -> None:
    file = write(tmp_path / "rows.parquet", two_episodes())
    config = offline_config(file, env=None).evaluation(evaluation_interval=1)
    assert_refused(config.build, updates, "`evaluation_interval` needs an environment or held-out episodes; set")


def test_neither_environment_nor_data_is_refused(updates: list[int]) -> None:
    message = r"neither an environment nor offline data; set `\.environment\(\.\.\.\)` or `input_`"
    assert_refused(small_config(None).build, updates, message)


def test_data_that_state_no_spaces_need_them_in_the_config(tmp_path: Path, updates: list[int]) -> None:
    file = write(tmp_path / "rows.parquet", two_episodes())
    config = offline_config(file, env=None)
    message = r"do not state their {}; set `\.environment\(observation_space=\.\.\., action_space=\.\.\.\)`"
    assert_refused(config.build, updates, message.format("observation_space and action_space"))
    config.environment(observation_space=OBSERVATION_SPACE)
    assert_refused(config.build, updates, message.format("action_space"))


def test_without_an_environment_only_the_offline_phase_runs(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", two_episodes())
    config = offline_config(file, env=None)
    config.environment(observation_space=OBSERVATION_SPACE, action_space=ACTION_SPACE)
    algo = config.build()
    try:
        with pytest.raises(RuntimeError, match="Evaluation needs an environment or held-out episodes; set"):
            algo.evaluate()
        result = algo.train()
        assert (result["num_offline_updates_lifetime"], result["done"]) == (2, True)  # Tune ends the trial.
        with pytest.raises(
            RuntimeError,
            match=r"offline phase is over after 2 updates and there is no environment; set `\.environment\(\.\.\.\)` "
            r"to fine-tune, or raise `offline_updates`",
        ):
            algo.train()
        assert algo.num_offline_updates == 2
        assert algo.num_online_updates == 0
    finally:
        algo.stop()


def test_observation_statistics_need_data(updates: list[int]) -> None:
    config = small_config().offline_data(normalize_observations=True)
    assert_refused(config.build, updates, "`normalize_observations` .* from offline data; set `input_` or drop")


@pytest.mark.parametrize("fault", [{"obs": np.nan}, {"obs": np.inf}, {"reward": np.nan}, {"reward": -np.inf}], ids=str)
def test_episodes_with_numbers_that_are_not_finite_are_not_stored_and_ten_in_a_row_stop_training(
    fault: dict[str, float], updates: list[int]
) -> None:
    config = small_config(FaultyEnv).environment(env_config=fault, disable_env_checking=True)
    algo = config.fine_tuning(warmup_env_steps=0).build()
    try:
        for num_discarded in range(1, 10):
            assert algo.train()["collection"]["num_discarded_episodes_lifetime"] == num_discarded
        with pytest.raises(
            ValueError, match=r"Online episode \w+, step \d+: the environment returned .* with NaN or infinity"
        ):
            algo.train()
        assert algo.store.num_online == 0
        assert algo.num_online_updates == 0
        assert updates == []
    finally:
        algo.stop()


BAD_ACTION_SPACES = [
    (gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), "must be bounded, got Box.*; wrap the environment"),
    (gym.spaces.Discrete(3), r"must be a Box\(n,\) of real numbers, got Discrete\(3\); use an algorithm for"),
    (gym.spaces.Box(-1, 1, (2, 2), np.float32), r"must be a Box\(n,\) of real numbers, got Box.*\(2, 2\)"),
    (gym.spaces.Box(0, 9, (1,), np.int64), r"must be a Box\(n,\) of real numbers, got Box.*int64"),
]


@pytest.mark.parametrize(("space", "message"), BAD_ACTION_SPACES, ids=["unbounded", "discrete", "matrix", "integers"])
@pytest.mark.parametrize("has_data", [False, True], ids=["online only", "with data"])
def test_an_environment_whose_actions_cannot_be_mapped_is_refused(
    space: gym.Space[Any], message: str, has_data: bool, tmp_path: Path, updates: list[int]
) -> None:
    file = write(tmp_path / "rows.parquet", two_episodes())
    config = offline_config(file, FaultyEnv) if has_data else small_config(FaultyEnv)
    config.environment(env_config={"action_space": space}, disable_env_checking=True)
    assert_refused(config.build, updates, f"The action space {message}")


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_exist_is_refused(tmp_path: Path, updates: list[int]) -> None:
    for path in (str(tmp_path / "checkpoint_000001"), tmp_path / "checkpoint_000001"):
        assert_refused(
            lambda path=path: CalQL.from_checkpoint(path),
            updates,
            r"no checkpoint at '.*checkpoint_000001': no such folder; give the folder that",
            FileNotFoundError,
        )


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path, updates: list[int]) -> None:
    file = write(tmp_path / "rows.parquet", two_episodes())
    for path in (tmp_path, file):
        assert_refused(
            lambda path=path: CalQL.from_checkpoint(str(path)),
            updates,
            rf"'{path}' is no checkpoint of an algorithm; give the folder that `algo\.save_to_path\(\)`",
        )


def test_the_folder_above_a_checkpoint_is_refused_with_the_checkpoint_s_name(tmp_path: Path) -> None:
    algo = small_config().build()
    try:
        algo.save_to_path(str(tmp_path / "trial" / "checkpoint_000003"))
    finally:
        algo.stop()
    with pytest.raises(ValueError, match=r"trial' is no checkpoint.*Did you mean '.*checkpoint_000003'\?"):
        CalQL.from_checkpoint(str(tmp_path / "trial"))


# --- Nothing is left behind -------------------------------------------------------------------------------------------


def test_refused_data_leave_no_env_runner_behind(tmp_path: Path, updates: list[int]) -> None:
    def free_cpus() -> float:
        return float(ray.available_resources().get("CPU", 0.0))

    gc.collect()
    before = free_cpus()
    assert before >= 1.0
    file = write(tmp_path / "rows.parquet", changed(two_episodes(), "rewards", 2, float("nan")))
    config = offline_config(file).env_runners(num_env_runners=1)
    assert_refused(config.build, updates, "`rewards` holds nan")
    gc.collect()
    deadline = time.monotonic() + 20.0
    while free_cpus() < before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert free_cpus() == before
