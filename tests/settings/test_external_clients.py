"""The settings of clients: what is refused before anything is started, and what evaluations are made with."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from rllib_calql import CalQLConfig
from rllib_calql.collection.external.runner import ExternalEnvRunner, read_token, with_client_runners
from rllib_calql.networks.rl_module import CalQLTorchRLModule
from rllib_calql.sources import check_sources
from rllib_calql.stopping import parse_stop, why_absent

BOX = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)


def config(**settings: Any) -> CalQLConfig:
    made: CalQLConfig = CalQLConfig().environment(observation_space=BOX, action_space=BOX)
    return made.external_clients(**{"external_port": 5555, **settings})


class Watching(RLlibCallback):
    """Of the user."""

    def on_episode_step(self, **kwargs: Any) -> None:
        """Of the user."""


class OwnModule(CalQLTorchRLModule):
    """Of the user."""


REFUSED: dict[str, tuple[Callable[[CalQLConfig], Any], str]] = {
    "port": (lambda c: c.external_clients(external_port=0), "`external_port` must be None or a port from 1 to 65535"),
    "port of a text": (lambda c: c.external_clients(external_port="5555"), "`external_port` must be None or a port"),
    "port of the last runner": (
        lambda c: c.external_clients(external_port=65535).env_runners(num_env_runners=3),
        "a port from 1 to 65533, since 3 env runners listen at as many ports from there on, got 65535",
    ),
    "host": (lambda c: c.external_clients(external_host=""), "`external_host` must be an address"),
    "host without a token": (
        lambda c: c.external_clients(external_host="0.0.0.0"),
        r"`external_host` is '0\.0\.0\.0', which others can reach; set `external_token_file`",
    ),
    "name of a host without a token": (
        lambda c: c.external_clients(external_host="robot.local"),
        r"`external_host` is 'robot\.local', which others can reach",
    ),
    "token": (lambda c: c.external_clients(external_token_file=""), "`external_token_file` must be None or the path"),
    "token of a number": (
        lambda c: c.external_clients(external_token_file=3),
        "`external_token_file` must be None or the path of a file, got 3",
    ),
    "host without a port": (
        lambda c: c.external_clients(external_port=None, external_host="::1"),
        "`external_host` is '::1', but `external_port` is not set",
    ),
    "token without a port": (
        lambda c: c.external_clients(external_port=None, external_token_file="/token"),
        "`external_token_file` is '/token', but `external_port` is not set",
    ),
    "runner without a port": (
        lambda c: c.external_clients(external_port=None).env_runners(env_runner_cls=ExternalEnvRunner),
        r"`env_runner_cls` is ExternalEnvRunner, which listens for clients; set `\.external_clients\(external",
    ),
    "another runner": (
        lambda c: c.env_runners(env_runner_cls=SingleAgentEnvRunner),
        "`env_runner_cls` must be a subclass of `ExternalEnvRunner` where `external_port` is set",
    ),
    "several environments": (
        lambda c: c.env_runners(num_envs_per_env_runner=2),
        "`num_envs_per_env_runner` is set, and so is `external_port`: a client has one environment; connect more",
    ),
    "budget": (
        lambda c: c.fine_tuning(max_online_env_steps=5000).environment("Pendulum-v1"),
        "`max_online_env_steps` is set, and so is `external_port`: env steps are taken by the clients",
    ),
    "processes of environments": (
        lambda c: c.env_runners(gym_env_vectorize_mode="async"),
        "`gym_env_vectorize_mode` is set, and so is `external_port`: clients have the environments",
    ),
    "environments made anew": (
        lambda c: c.fault_tolerance(restart_failed_sub_environments=True),
        "`restart_failed_sub_environments` is set, and so is",
    ),
    "an environment of the local runner": (
        lambda c: c.env_runners(create_env_on_local_worker=True),
        "`create_env_on_local_worker` is set, and so is",
    ),
    "a look back": (
        lambda c: c.env_runners(episode_lookback_horizon=3),
        "`episode_lookback_horizon` is set, and so is `external_port`: episodes of clients come whole",
    ),
    "a connector": (
        lambda c: c.env_runners(env_to_module_connector=lambda *_: []),
        "`env_to_module_connector` is set, and so is `external_port`: clients get the policy as a file",
    ),
    "another connector": (
        lambda c: c.env_runners(module_to_env_connector=lambda *_: []),
        "`module_to_env_connector` is set, and so is",
    ),
    "no connectors": (
        lambda c: c.env_runners(add_default_connectors_to_env_to_module_pipeline=False),
        "`add_default_connectors_to_env_to_module_pipeline` is set, and so is",
    ),
    "a module": (
        lambda c: c.rl_module(rl_module_spec=RLModuleSpec(module_class=OwnModule)),
        "`rl_module_spec` is one of OwnModule, and `external_port` is set",
    ),
    "a callback": (
        lambda c: c.callbacks(on_episode_start=print),
        "The callback `on_episode_start` is set, and so is `external_port`",
    ),
    "a class of callbacks": (lambda c: c.callbacks(Watching), "The callback `on_episode_step` is set, and so is"),
    "no spaces": (
        lambda c: c.environment(observation_space=None, action_space=None),
        "nothing says what clients observe and do: set `observation_space` and `action_space`",
    ),
    "evaluation by clients": (
        lambda c: c.evaluation(evaluation_interval=1),
        "`evaluation_interval` is set, but clients are not evaluated",
    ),
    "clients in evaluation": (
        lambda c: c.evaluation(evaluation_config={"external_port": 1}),
        "`external_port` in `evaluation_config` is 1",
    ),
}


def test_clients_need_spaces_and_a_port_alone() -> None:
    config().validate()
    config(external_host="localhost").validate()
    config(external_host="::1").validate()
    config(external_host="0.0.0.0", external_token_file=Path("token")).validate()
    config().callbacks(on_episode_end=print).env_runners(env_runner_cls=ExternalEnvRunner).validate()
    config().fine_tuning(sample_async=False).env_runners(num_env_runners=2).validate()


def test_the_settings_survive_a_copy() -> None:
    given = {"external_port": 6000, "external_host": "::1", "external_token_file": "/token"}
    for copied in (
        config(**given).copy(copy_frozen=False),
        copy.deepcopy(config(**given)),
        pickle.loads(pickle.dumps(config(**given))),
        CalQLConfig.from_state(config(**given).get_state()),
        CalQLConfig.from_dict(config(**given).to_dict()),
    ):
        assert {name: getattr(copied, name) for name in given} == given
        copied.validate()


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_clients_cannot_follow_is_refused_by_its_name(name: str) -> None:
    change, message = REFUSED[name]
    changed = config()
    change(changed)
    with pytest.raises(ValueError, match=message):
        changed.validate()


def test_a_config_with_clients_is_online_and_evaluates_in_its_environment() -> None:
    assert config().is_online
    assert not CalQLConfig().environment(observation_space=BOX, action_space=BOX).is_online
    made = with_client_runners(config().environment("Pendulum-v1").evaluation(evaluation_interval=1))
    assert made.env_runner_cls is ExternalEnvRunner
    evaluation = made.get_evaluation_config_object()
    assert evaluation.env_runner_cls is None
    assert not evaluation.has_clients
    evaluation.validate()


def test_spaces_are_those_of_the_environment_for_evaluations_unless_they_are_set() -> None:
    of_env = gym.make("Pendulum-v1")
    made = with_client_runners(CalQLConfig().environment("Pendulum-v1").external_clients(external_port=5555))
    assert (made.observation_space, made.action_space) == (of_env.observation_space, of_env.action_space)
    of_env.close()
    assert with_client_runners(config().environment("Pendulum-v1")).observation_space == BOX
    plain = CalQLConfig().environment("Pendulum-v1")
    assert with_client_runners(plain) is plain


def test_observations_that_no_message_can_hold_are_refused() -> None:
    space = gym.spaces.Dict({1.5: BOX, 2.5: BOX})
    changed = config().environment(observation_space=space)
    for check in (changed.validate, lambda: with_client_runners(changed)):
        with pytest.raises(
            ValueError, match=r"`external_port` is set, but clients cannot send such observations: keys of"
        ):
            check()


def test_a_missing_token_is_noticed_before_ray_is_started(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`external_token_file`"):
        check_sources([config(external_token_file=tmp_path / "token")])


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"`external_token_file` '.*' cannot be read .* `python -c .* writes one"),
        (b"short", ValueError, "holds 5 characters, which can be guessed; a token has at least 16"),
        (b"  \n", ValueError, "holds 0 characters"),
        (b"\xff" * 40, ValueError, "cannot be read"),
    ],
)
def test_a_token_file_without_a_good_token_is_refused(
    content: bytes | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        with_client_runners(config(external_token_file=path))


def test_the_path_of_the_token_is_that_of_the_folder_where_it_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config(external_token_file="token").external_token_file == str(tmp_path / "token")
    assert config(external_token_file="~/token").external_token_file == "~/token"


def test_the_config_holds_the_path_of_the_token_alone(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("the token of sixteen letters\n")
    made = with_client_runners(config(external_token_file=tmp_path / "token"))
    assert read_token(made.external_token_file) == "the token of sixteen letters"
    assert "sixteen" not in str(made.to_dict())
    assert read_token(None) is None


def test_a_run_without_clients_has_no_number_of_them_to_end_at() -> None:
    assert why_absent("collection/num_clients", config()) is None
    told = why_absent("collection/num_clients", CalQLConfig().environment("Pendulum-v1"))
    assert told == "episodes do not come from clients; set `external_port`"


def test_an_experiment_with_clients_needs_an_end() -> None:
    with pytest.raises(ValueError, match="has no end, so it may interact with it for ever"):
        parse_stop(None, "clients", config(), [config()])
