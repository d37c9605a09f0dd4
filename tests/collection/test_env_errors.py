"""What an environment raises is told by type and message, wherever it runs and whatever asks for it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from broken_env import BrokenEnv
from click.testing import CliRunner
from ray.rllib.callbacks.callbacks import RLlibCallback

from rllib_calql import CalQLConfig
from rllib_calql.collection.env_errors import _last_error
from rllib_calql.commands.main import main

pytestmark = pytest.mark.usefixtures("ray_session")

TOLD = {"plain": "ValueError: the gripper is stuck", "odd": "ServoError: servo 7 of arm", "empty": "AssertionError"}


def config_of(env: Any = BrokenEnv, **env_config: str) -> CalQLConfig:
    return (
        CalQLConfig()
        .environment(env, env_config=env_config)
        .training(train_batch_size_per_learner=4, num_actions=2)
        .rl_module(model_config={"actor_hiddens": [8], "critic_hiddens": [8]})
        .fine_tuning(warmup_env_steps=0)
    )


def trained(config: CalQLConfig) -> None:
    """Builds and trains twice."""
    algo = config.build()
    try:
        for _ in range(2):
            algo.train()
    finally:
        algo.stop()


@pytest.mark.parametrize("error", TOLD)
@pytest.mark.parametrize("where", ["reset", "step"])
def test_the_local_runner_tells_what_an_environment_raises(where: str, error: str) -> None:
    with pytest.raises(RuntimeError, match=f"Collecting an episode failed, {TOLD[error]}"):
        trained(config_of(where=where, error=error))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_so_it_does_with_several_sub_environments(mode: str) -> None:
    config = config_of(where="step").env_runners(num_envs_per_env_runner=2, gym_env_vectorize_mode=mode)
    with pytest.raises(RuntimeError, match=f"Collecting an episode failed, {TOLD['plain']}"):
        trained(config)


@pytest.mark.parametrize("where", ["reset", "step"])
def test_so_do_local_evaluations(where: str) -> None:
    broken = {"env_config": {"where": where, "error": "odd"}}
    with pytest.raises(RuntimeError, match=f"Evaluating failed, {TOLD['odd']}"):
        trained(config_of().evaluation(evaluation_interval=1, evaluation_duration=1, evaluation_config=broken))


@pytest.mark.slow
def test_so_do_remote_evaluations_that_never_give_a_result() -> None:
    config = config_of().evaluation(
        evaluation_interval=1,
        evaluation_duration=1,
        evaluation_num_env_runners=1,
        evaluation_config={"env_config": {"where": "step"}},
    )
    with pytest.raises(RuntimeError, match=f"Evaluating failed, {TOLD['plain']}"):
        trained(config)


class BrokenCallback(RLlibCallback):
    """Fails at the end of an episode."""

    def on_episode_end(self, **kwargs: Any) -> None:
        """Fails."""
        raise KeyError("speed")


def test_an_error_of_a_callback_is_told_likewise() -> None:
    with pytest.raises(RuntimeError, match="Collecting an episode failed, KeyError: 'speed'"):
        trained(config_of().callbacks(BrokenCallback))


@pytest.mark.parametrize(
    ("where", "told", "part"),
    [
        ("init", TOLD["plain"], "training"),
        ("spaces", "AttributeError: The environment must specify an obs", "evaluation"),
    ],
)
def test_an_environment_that_remote_runners_cannot_make_is_told(where: str, told: str, part: str) -> None:
    config = config_of(where=where).env_runners(num_env_runners=1)
    if part == "evaluation":
        config = config_of().evaluation(
            evaluation_interval=1, evaluation_num_env_runners=1, evaluation_config={"env_config": {"where": where}}
        )
    with pytest.raises(RuntimeError, match=f"The env runners could not be started, {told}"):
        config.build()


def test_an_id_that_nobody_registered_is_told_with_the_ways_out() -> None:
    with pytest.raises(ValueError, match=r"`env` 'OnlyHere-v0' is not registered.*'MODULE:ID'.*register_env"):
        config_of("OnlyHere-v0").build()


def test_an_id_whose_registration_cannot_be_sent_to_the_runner_is_told_with_the_ways_out() -> None:
    lock = threading.Lock()
    gym.register("OnlyHere-v0", entry_point=lambda: BrokenEnv({"lock": lock}))
    try:
        with pytest.raises(
            RuntimeError,
            match=r"could not be started, .*gymnasium\.error\.NameNotFound: En.* doesn't exist.*`env` 'OnlyHere-v0' "
            r"has to be registered in the processes of the env runners.*'MODULE:OnlyHere-v0'.*class.*"
            r"`ray\.tune\.register_env\('OnlyHere-v0', ",
        ):
            config_of("OnlyHere-v0").env_runners(num_env_runners=1).build()
    finally:
        gym.registry.pop("OnlyHere-v0", None)


@pytest.mark.slow
def test_an_id_with_its_module_works_in_remote_runners() -> None:
    trained(config_of("broken_env:Broken-v0").env_runners(num_env_runners=1))


@pytest.mark.parametrize("where", ["init", "reset", "step"])
def test_rllib_evaluate_tells_it_as_well(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algo = config_of().build()
    algo.save_to_path(tmp_path / "checkpoint")
    algo.stop()
    monkeypatch.setattr(
        BrokenEnv, "_fail", lambda self, now: (_ for _ in ()).throw(ValueError("stuck")) if now == where else None
    )
    result = CliRunner().invoke(main, ["evaluate", str(tmp_path / "checkpoint")])
    assert result.exit_code == 1
    assert "failed, ValueError: stuck" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("died, ray::A.f()\n  File x\n    f()\nValueError: stuck", "ValueError: stuck"),
        ("KeyError: 1\n\nDuring\n\n  File x\nmy.pkg.Odd: two\nlines", "my.pkg.Odd: two\nlines"),
        ("nothing like it", "nothing like it"),
    ],
)
def test_the_last_error_of_a_traceback_is_found(text: str, error: str) -> None:
    assert _last_error(text) == error
