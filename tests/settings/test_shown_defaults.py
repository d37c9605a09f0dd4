"""`help(CalQLConfig.training)` and the like show the settings' defaults."""

from __future__ import annotations

import inspect
import pydoc
from typing import Any

import pytest
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided

from rllib_calql import CalQLConfig
from rllib_calql.experiments.reading.typed_settings import settings_by_method
from rllib_calql.settings.shown_defaults import with_shown_defaults

METHODS = sorted(settings_by_method(CalQLConfig))


def help_on(method: Any) -> str:
    return pydoc.plain(pydoc.render_doc(method))


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_no_placeholder_for_a_default(method: str) -> None:
    for shown in (help_on(getattr(CalQLConfig, method)), help_on(getattr(CalQLConfig(), method))):
        assert "NotProvided" not in shown


def test_help_on_the_class_shows_no_placeholder_either() -> None:
    assert "_NotProvided object" not in help_on(CalQLConfig)


@pytest.mark.parametrize(
    ("method", "texts"),
    [
        ("training", ["min_q_weight: 'float' = 5.0", "critic_lr: 'Any' = 0.0003", "= (-inf, inf)", "= 'fp32'"]),
        ("offline_data", ["truncation: ", "= 'none'", "reward_scale: 'float' = 1.0", "cache_dir: ", "= None"]),
        ("fine_tuning", ["mixing_ratio: ", "= 0.5", "online_capacity: 'int' = 1000000"]),
        ("evaluation", ["success_key: 'str | None' = None", "= 'any'"]),
        ("rl_module", ["'actor_hiddens': [256, 256]"]),
        ("env_runners", ["num_env_runners: Optional[int] = 0", "batch_mode: Optional[str] = 'complete_episodes'"]),
        ("framework", ["framework: Optional[str] = 'torch'"]),
    ],
)
def test_help_shows_the_defaults(method: str, texts: list[str]) -> None:
    signature = help_on(getattr(CalQLConfig, method)).splitlines()[2]
    assert [text for text in texts if text not in signature] == []


@pytest.mark.parametrize("method", ["training", "offline_data", "fine_tuning", "evaluation", "rl_module"])
def test_the_methods_of_ours_say_where_their_defaults_are_told(method: str) -> None:
    assert "rllib_calql/settings/SETTINGS.md" in help_on(getattr(CalQLConfig, method))


def test_a_default_that_changes_in_the_config_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    initialise = CalQLConfig.__init__

    def changed(self: CalQLConfig, algo_class: type | None = None) -> None:
        initialise(self, algo_class)
        self.tau = 0.125

    assert "tau: 'float' = 0.005" in help_on(CalQLConfig.training)
    monkeypatch.setattr(CalQLConfig, "__init__", changed)
    assert "tau: 'float' = 0.125" in help_on(CalQLConfig.training)


def test_a_config_derived_from_ours_can_show_its_own_defaults() -> None:
    @with_shown_defaults
    class Mine(CalQLConfig):
        def __init__(self) -> None:
            super().__init__()
            self.num_critics = 10

    assert "num_critics: 'int' = 10" in help_on(Mine.training)
    assert "num_critics: 'int' = 2" in help_on(CalQLConfig.training)
    assert Mine().training(tau=0.5).tau == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_out_still_stays_as_it_is(method: str) -> None:
    parameters = inspect.signature(getattr(CalQLConfig, method)).parameters.values()
    assert any(parameter.default is NotProvided for parameter in parameters)
    config = CalQLConfig().training(tau=0.25).env_runners(num_env_runners=3)
    before = {name: repr(value) for name, value in vars(config).items()}
    getattr(config, method)()
    assert {name: repr(value) for name, value in vars(config).items()} == before


def test_rllib_s_own_classes_are_left_alone() -> None:
    assert AlgorithmConfig.environment is not CalQLConfig.environment
    assert not hasattr(AlgorithmConfig.environment, "__signature__")
    assert CalQLConfig.environment.__doc__ == AlgorithmConfig.environment.__doc__
