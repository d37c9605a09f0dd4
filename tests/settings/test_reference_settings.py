"""What bounds Q: what may be set together, and what is refused because it would do nothing."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from rllib_calql import CalQLConfig
from rllib_calql.stopping import why_absent

DATA: dict[str, Any] = {"input_": "rows.parquet", "offline_updates": 10}


def config_of(**settings: Any) -> CalQLConfig:
    config = CalQLConfig().environment("Pendulum-v1")
    for name, value in settings.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


ACCEPTED: list[dict[str, Any]] = [
    {"reference_value": "learned", "reference_updates": 7, "reference_fit": "td", **DATA},
    {"reference_value": "learned", "use_recorded_returns": True, **DATA},
    {"reference_value": "learned", "truncation": "bootstrap", **DATA},
    {"reference_value": "learned", "pretrained": "checkpoint"},
    {"reference_value": "learned", "calibrate_online": False, **DATA},
    {"reference_value": "quantile", "calibration_quantile": 0.9, **DATA},
    {"reference_value": "quantile", "use_recorded_returns": True, **DATA},
    {"reference_value": "quantile"},
    {"calibration_form": "penalty", "calibration_quantile": 0.1},
    {"reference_value": "expert", **DATA},
    *({"reference_value": "expert", "reference_online": word, **DATA} for word in ("returns_to_go", "learned", "none")),
    {"reference_value": "expert", "reference_online": "learned", "reference_updates": 9, **DATA},
    {"bound_uniform_actions": True, "conservative_online": False, **DATA},
    {"reference_value": "expert", "calibrate": False, **DATA},  # Compared with Q in `calibration_gap`.
]

REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value, "calibrate": False, **DATA}, f"`{name}` is {value!r}, but `calibrate` is False")
        for name, value in (
            *(("reference_value", "learned"), ("reference_value", "quantile"), ("bound_uniform_actions", True)),
            *(("calibration_form", "penalty"), ("reference_online", "none"), ("reference_updates", 10)),
            *(("reference_fit", "td"), ("calibration_quantile", 0.4)),
        )
    ),
    ({"reference_updates": 10, **DATA}, "`reference_updates` is 10, but no reference value is learned; set"),
    ({"reference_fit": "td", "reference_value": "quantile", **DATA}, "`reference_fit` is 'td', but no reference"),
    ({"calibration_quantile": 0.3, **DATA}, "`calibration_quantile` is 0.3, but neither"),
    ({"calibration_quantile": 0.3, "reference_value": "learned", **DATA}, "`calibration_quantile` is 0.3, but neither"),
    ({"reference_value": "learned"}, '`reference_value` is "learned", which is fitted to offline data .* set `input_`'),
    (
        {"reference_value": "learnt"},
        'there are none; set `input_` .*may also be "returns_to_go", "learned", "quantile"',
    ),
    (
        {"reference_value": "expert", "reference_online": "learned", "reference_fit": "td", **DATA},
        '`reference_fit` is "td", which looks at rewards and not at the column that `reference_value` names',
    ),
    (
        {"reference_value": "learned", "reference_fit": "td", "use_recorded_returns": True, **DATA},
        '`reference_fit` is "td", which looks at rewards and not at the column that `use_recorded_returns` names',
    ),
    ({"reference_value": "quantile", "truncation": "bootstrap", **DATA}, '"quantile" of returns that stay what they'),
    *(
        (
            {"reference_value": word, "reference_online": "none", **DATA},
            f"`reference_value` '{word}' bounds online rows",
        )
        for word in ("returns_to_go", "learned", "quantile")
    ),
    (
        {"reference_value": "expert", "reference_online": "learned", "calibrate_online": False, **DATA},
        "`reference_online` is 'learned', but `calibrate_online` is False",
    ),
    (
        {"reference_value": "expert", "reference_online": "none", "conservative_online": False, **DATA},
        "`reference_online` is 'none', but `conservative_online` is False",
    ),
    (
        {"reference_value": "learned", "calibrate_online": False, "input_": "rows.parquet", "offline_updates": 0},
        "there is no offline phase, and `calibrate_online` is False, so that nothing is ever bounded",
    ),
    ({"reference_value": "quantile", "conservative_online": False}, "no offline phase, and `conservative_online` is"),
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_settings_that_go_together_arrive_through_their_methods_and_are_accepted(settings: dict[str, Any]) -> None:
    config = CalQLConfig().environment("Pendulum-v1")
    for method in (config.training, config.offline_data, config.fine_tuning):
        names = inspect.signature(method).parameters
        method(**{name: value for name, value in settings.items() if name in names})
    config.validate()
    copied = CalQLConfig.from_state(config.get_state())
    for name, value in settings.items():
        assert str(getattr(config, name)).endswith(str(value))  # Paths have become absolute.
        assert getattr(copied, name) == getattr(config, name)


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**settings).validate()


def test_what_bounds_offline_and_online_rows_follows_from_the_settings() -> None:
    expected = {
        ("returns_to_go", None): (("returns_to_go", "returns_to_go"), None),
        ("learned", None): (("learned", "learned"), None),
        ("quantile", None): (("quantile", "quantile"), None),
        ("expert", None): (("returns_to_go", "returns_to_go"), "expert"),
        ("expert", "learned"): (("returns_to_go", "learned"), "expert"),
        ("expert", "none"): (("returns_to_go", "none"), "expert"),
    }
    for (value, online), (rows, column) in expected.items():
        config = config_of(reference_value=value, reference_online=online, **DATA)
        assert (config.reference_of_rows, config.reference_column) == (rows, column)
    recorded = config_of(reference_value="learned", use_recorded_returns=True, **DATA)
    assert (recorded.reference_column, recorded.reference_of_rows) == ("returns_to_go", ("learned", "learned"))


def test_a_network_that_bounds_nothing_after_the_switch_is_left_alone_there() -> None:
    for settings, online in (({}, True), ({"calibrate_online": False}, False), ({"conservative_online": False}, False)):
        config = config_of(reference_value="learned", **settings, **DATA)
        assert config.uses_reference_network(online=False)
        assert config.uses_reference_network(online=True) == online
    assert not config_of(**DATA).uses_reference_network(online=False)


def test_a_run_cannot_end_at_what_its_reference_value_does_not_report() -> None:
    place = "learners/default_policy/"
    learned = config_of(reference_value="learned", **DATA)
    sac = config_of(reference_value="learned", calibrate_online=False, **DATA)
    plain = config_of(**DATA)
    for name, config, reason in (
        ("reference_loss", learned, None),
        ("reference_gap", plain, "set `reference_value: learned`"),
        ("num_reference_updates_lifetime", plain, "set `reference_value: learned`"),
        ("reference_learning_rate", learned, None),
        ("reference_learning_rate", plain, "set `reference_value: learned`"),
        ("reference_loss", sac, "set `calibrate_online: true`"),
        ("reference_value_mean", plain, None),
        ("bound_rate_cql_q1_rand", plain, "set `bound_uniform_actions: true`"),
        ("calibration_penalty_q2", plain, "set `calibration_form: penalty`"),
        ("calibration_penalty_q2", config_of(calibration_form="penalty", **DATA), None),
    ):
        told = why_absent(f"{place}{name}", config)
        assert (told is None) == (reason is None), name
        assert reason is None or (told is not None and reason in told), name
