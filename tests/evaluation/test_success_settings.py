"""`success_key` and `success_rule`: which info says success, and how an episode's success is made of its steps."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from click.testing import CliRunner
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql import CalQLConfig
from rllib_calql.collection.callbacks import EpisodeOutcomeCallback
from rllib_calql.collection.success_key import SuccessKeyWatch
from rllib_calql.commands.main import main
from rllib_calql.common.metrics import SUCCESS_RATE, SUCCESS_WARNING
from rllib_calql.experiments.experiment import ExperimentError, parse_experiment

NAN = float("nan")
ABSENT = object()
TINY = {"actor_hiddens": [8], "critic_hiddens": [8]}


class SetPointEnv(gym.Env):  # type: ignore[type-arg]
    """Episodes that report what `reports` holds, step by step, below a key that may be nested; other keys beside it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.reports, self.is_nested = config["reports"], config.get("nested", False)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins; the info of a reset says success, which is no step's."""
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), self._info(False)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Reports."""
        self.t += 1
        info = self._info(self.reports[self.t - 1])
        return np.zeros(2, np.float32), 0.5, False, self.t == len(self.reports), info

    def _info(self, report: Any) -> dict[str, Any]:
        own = {} if report is ABSENT else {"on_setpoint": report}
        return {"pump": 1.0, "task": own} if self.is_nested else {"pump": 1.0, **own}


def config_of(reports: list[Any], *, nested: bool = False) -> CalQLConfig:
    config: CalQLConfig = (
        CalQLConfig()
        .environment(SetPointEnv, env_config={"reports": reports, "nested": nested})
        .training(train_batch_size_per_learner=4, num_actions=2)
        .rl_module(model_config=TINY)
        .fine_tuning(warmup_env_steps=1000)
    )
    return config


# --- The rules --------------------------------------------------------------------------------------------------------

RULES = [  # Reports of the steps -> any, last, fraction.
    ([0, 1, 0, 0], (1.0, 0.0, 0.25)),
    ([0, 0, 1, 1], (1.0, 1.0, 0.5)),
    ([False, False], (0.0, 0.0, 0.0)),
    ([np.True_, np.True_], (1.0, 1.0, 1.0)),
    ([1.0, NAN, 0.0, NAN], (1.0, 0.0, 0.5)),
    ([0.0, NAN, 1.0, ABSENT], (1.0, 1.0, 0.5)),
    ([ABSENT, ABSENT, 1, ABSENT], (1.0, 1.0, 1.0)),
    ([NAN, NAN], (None, None, None)),
    ([ABSENT, ABSENT], (None, None, None)),
]


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize(("reports", "expected"), RULES, ids=lambda value: repr(value).replace(repr(ABSENT), "ABSENT"))
@pytest.mark.parametrize(("rule", "column"), [("any", 0), ("last", 1), ("fraction", 2)])
def test_an_episode_s_success_is_made_of_its_steps_by_the_rule(
    rule: str, column: int, reports: list[Any], expected: tuple[float | None, ...], num_chunks: int
) -> None:
    chunks = [SingleAgentEpisode()]
    chunks[0].add_env_reset(0.0, infos={"other": 1})
    for number, report in enumerate(reports):
        info = {} if report is ABSENT else {"on_setpoint": report}
        if 0 < number < num_chunks:  # As RLlib cuts an episode between two calls of `sample`.
            chunks.append(chunks[-1].cut(len_lookback_buffer=1))
        chunks[-1].add_env_step(0.0, 0.0, 0.0, infos=info, truncated=number == len(reports) - 1)
    logged: list[tuple[str, float]] = []
    runner = SimpleNamespace(config=SimpleNamespace(success_key="on_setpoint", success_rule=rule))
    EpisodeOutcomeCallback().on_episode_end(
        episode=chunks[-1],
        prev_episode_chunks=chunks[:-1],
        metrics_logger=SimpleNamespace(log_value=lambda key, value, **_: logged.append((key, value))),
        env_runner=runner,
    )
    assert [value for key, value in logged if key == "success_rate"] == [v for v in [expected[column]] if v is not None]


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize(("key", "nested"), [("on_setpoint", False), ("task/on_setpoint", True)])
def test_env_runners_judge_by_the_key_and_the_rule(key: str, nested: bool, num_envs: int) -> None:
    config = config_of([0.0, 1.0, 0.0, 1.0, 1.0], nested=nested)
    config.env_runners(num_envs_per_env_runner=num_envs)
    config.evaluation(success_key=key, success_rule="fraction")
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    for _ in range(3):  # Episodes of five steps in pieces of four.
        runner.sample(num_timesteps=4 * num_envs, random_actions=True)
    assert runner.get_metrics()[SUCCESS_RATE].peek() == pytest.approx(3 / 5)
    runner.stop()


def test_the_rule_holds_for_the_usual_keys_as_well() -> None:
    class Usual(SetPointEnv):
        def _info(self, report: Any) -> dict[str, Any]:
            return {"is_success": report}

    config = config_of([1, 1, 0]).environment(Usual).evaluation(success_rule="last")
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    runner.sample(num_episodes=1, random_actions=True)
    assert runner.get_metrics()[SUCCESS_RATE].peek() == 0.0
    runner.stop()


# --- A key that nothing shows -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_a_key_that_no_episode_shows_is_told_once_with_the_keys_there_are(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of([1, 1], nested=True).evaluation(success_key="on_setpiont")
    algo = config.evaluation(evaluation_interval=1, evaluation_duration=3).build()
    try:
        with caplog.at_level(logging.WARNING, logger="rllib_calql"):
            results = [algo.train() for _ in range(2)]
    finally:
        algo.stop()
    warnings = [record.getMessage() for record in caplog.records if "success_key" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith("`success_key` is 'on_setpiont', which no info of the first")
    assert "the infos have `pump`, `task/on_setpoint`" in warnings[0]
    assert all("on_setpiont" in result[SUCCESS_WARNING] for result in results)
    assert all(SUCCESS_RATE not in result["evaluation"]["env_runners"] for result in results)


def test_a_key_that_is_shown_without_an_answer_is_no_typo(caplog: pytest.LogCaptureFixture) -> None:
    watch = SuccessKeyWatch("on_setpoint")
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        watch.include([SimpleNamespace(get_infos=lambda: [{}, {"on_setpoint": NAN}, {}])])
        watch.include([SimpleNamespace(get_infos=lambda: [{"pump": 1}])])
    assert (watch.warning, caplog.records) == (None, [])


def test_without_a_key_nothing_is_watched(caplog: pytest.LogCaptureFixture) -> None:
    watch = SuccessKeyWatch(None)
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        watch.include([SimpleNamespace(get_infos=lambda: [{"pump": 1}])])
    assert (watch.warning, caplog.records) == (None, [])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_remote_env_runners_judge_the_same_and_a_checkpoint_is_evaluated_by_its_settings(tmp_path: Path) -> None:
    config = config_of([0, 1, 1, 0]).evaluation(success_key="on_setpoint", success_rule="fraction")
    config.env_runners(num_env_runners=1).fine_tuning(sample_async=False)
    algo = config.evaluation(evaluation_interval=1, evaluation_duration=2, evaluation_num_env_runners=1).build()
    try:
        result = algo.train()
        checkpoint = algo.save_to_path(str(tmp_path / "checkpoint"))
    finally:
        algo.stop()
    assert result["evaluation"]["env_runners"][SUCCESS_RATE] == 0.5
    assert result["env_runners"][SUCCESS_RATE] == 0.5
    shown = CliRunner().invoke(main, ["evaluate", checkpoint, "--episodes", "2"])
    assert "success rate      0.50" in shown.output


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"success_rule": "all"}, r"`success_rule` must be one of \('any', 'last', 'fraction'\), got 'all'"),
        ({"success_key": ""}, r"`success_key` must be None or the name of a key in the environment's infos.* got ''"),
        ({"success_key": " "}, "`success_key` must be None or the name of a key"),
        ({"success_key": 3}, "`success_key` must be None or the name of a key.* got 3"),
        ({"success_key": ["a", "b"]}, "`success_key` must be None or the name of a key"),
        ({"success_key": "_ok"}, "keep no info whose key begins with `_`; rename it"),
        (
            {"evaluation_config": {"success_rule": "last"}},
            r"`success_rule` in `evaluation_config` is 'last'.* set `.evaluation\(success_rule='last'\)`",
        ),
    ],
)
def test_settings_of_success_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of([1]).evaluation(**settings).validate()


def test_an_experiment_file_sets_the_key_and_the_rule() -> None:
    entry = {"run": "CalQL", "env": "Pendulum-v1", "stop": {"num_online_env_steps_lifetime": 10}}
    config = parse_experiment("a", {**entry, "config": {"success_key": "on_setpoint", "success_rule": "last"}}).config
    assert (config.success_key, config.success_rule) == ("on_setpoint", "last")
    with pytest.raises(ExperimentError, match=r"`success_rule` must be one of .* got 'lsat'"):
        parse_experiment("a", {**entry, "config": {"success_rule": "lsat"}})
