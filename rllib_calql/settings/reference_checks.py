"""The checks of what bounds Q: the reference value, how it is learned, and the form of the calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rllib_calql.common.references import (
    CALIBRATION_FORMS,
    LEARNED,
    PENALTY,
    QUANTILE,
    REFERENCE_FITS,
    REFERENCE_VALUES,
    REFERENCES_ONLINE,
    RETURNS_TO_GO,
    TD,
)
from rllib_calql.settings.quantities import is_real

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

WORDS = ", ".join(f'"{word}"' for word in REFERENCE_VALUES)


def check_reference(config: CalQLConfig) -> None:
    """Checks them; those on data and phases not in a config for evaluation.

    Raises:
        ValueError: At the first setting that is wrong, or that would do nothing.
    """
    _check_choices(config)
    _check_nothing_is_ignored(config, type(config)())
    if not config.in_evaluation:
        _check_data(config)
    _check_online(config)


def _check_choices(config: CalQLConfig) -> None:
    if not isinstance(config.reference_value, str) or not config.reference_value:
        raise ValueError(
            f"`reference_value` must be {WORDS} or the name of a column of the offline data, got "
            f"{config.reference_value!r}."
        )
    _check_one_of("reference_fit", config.reference_fit, REFERENCE_FITS)
    _check_one_of("reference_online", config.reference_online, (None, *REFERENCES_ONLINE))
    _check_one_of("calibration_form", config.calibration_form, CALIBRATION_FORMS)
    level = config.calibration_quantile
    if not (is_real(level) and 0.0 < level < 1.0):
        raise ValueError(f"`calibration_quantile` must be a number in (0, 1), such as 0.5, the median; got {level!r}.")


def _check_one_of(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in allowed):
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")


def _check_nothing_is_ignored(config: CalQLConfig, defaults: CalQLConfig) -> None:
    is_set = {name: getattr(config, name) != getattr(defaults, name) for name in _OF_CALIBRATION}
    is_set["reference_value"] = config.reference_value in (LEARNED, QUANTILE)
    for name in ("reference_value", *_OF_CALIBRATION):
        if is_set[name] and not config.calibrate:
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}, but `calibrate` is False, so that nothing bounds Q; set "
                "`calibrate=True` or drop it."
            )
    for name in ("reference_updates", "reference_fit"):
        if is_set[name] and not config.has_reference_network:
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}, but no reference value is learned; set "
                '`reference_value="learned"` or drop it.'
            )
    if is_set["calibration_quantile"] and not (config.has_reference_quantile or config.calibration_form == PENALTY):
        raise ValueError(
            f"`calibration_quantile` is {config.calibration_quantile!r}, but neither `reference_value` is "
            f'"quantile" nor `calibration_form` "penalty"; set one of them or drop it.'
        )
    if config.reference_fit == TD and (config.names_column or config.use_recorded_returns):
        name = "reference_value" if config.names_column else "use_recorded_returns"
        raise ValueError(
            f'`reference_fit` is "td", which looks at rewards and not at the column that `{name}` names; set '
            '`reference_fit="monte_carlo"` to fit the column, or drop the column.'
        )


_OF_CALIBRATION = (
    *("reference_updates", "reference_fit", "reference_online", "calibration_quantile", "calibration_form"),
    "bound_uniform_actions",
)


def _check_data(config: CalQLConfig) -> None:
    if config.names_column and config.use_recorded_returns:
        raise ValueError(
            f"`use_recorded_returns` is True and `reference_value` is {config.reference_value!r}; use one of them."
        )
    if config.reference_column is not None and not config.is_offline:
        words = f" `reference_value` may also be {WORDS}." if config.names_column else ""
        raise ValueError(
            "`reference_value` and `use_recorded_returns` name columns of offline data, and there are none; set "
            f"`input_` or drop them.{words}"
        )
    if config.has_reference_network and not config.is_offline and config.pretrained is None:
        raise ValueError(
            '`reference_value` is "learned", which is fitted to offline data before the first update, and there are '
            'none; set `input_`, or `reference_value="returns_to_go"`.'
        )
    if config.has_reference_quantile and config.truncation == "bootstrap":
        raise ValueError(
            '`reference_value` is "quantile" of returns that stay what they are, but `truncation="bootstrap"` renews '
            'those of cut episodes; set `truncation` to "none" or "steady", or `reference_value="learned"` with '
            '`reference_fit="td"`, which needs no rule for them.'
        )


def _check_online(config: CalQLConfig) -> None:
    is_bound_online = config.calibrates(online=True) and config.is_conservative(online=True)
    where = "calibrate_online" if config.conservative_online else "conservative_online"
    if config.reference_online is not None:
        if not config.names_column:
            raise ValueError(
                f"`reference_online` is {config.reference_online!r}, but `reference_value` "
                f"{config.reference_value!r} bounds online rows as well; it is for a column of the data, which they "
                "lack. Drop it, or name a column."
            )
        if not is_bound_online:
            raise ValueError(
                f"`reference_online` is {config.reference_online!r}, but `{where}` is False, so that nothing bounds Q "
                "online; drop one of them."
            )
    is_asked = config.reference_value in (LEARNED, QUANTILE)
    if is_asked and not is_bound_online and not (config.is_offline and config.offline_updates != 0):
        raise ValueError(
            f"`reference_value` is {config.reference_value!r}, but there is no offline phase, and `{where}` is False, "
            f'so that nothing is ever bounded; drop it, for "{RETURNS_TO_GO}".'
        )
