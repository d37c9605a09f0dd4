"""What RLlib's settings `offline_evaluation_*` mean here, and their checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rllib_calql.settings.quantities import is_integer

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

FQE, HELD_OUT = "fqe", "held_out"
# Types of RLlib, and what there is in their place.
_OF_RLLIB = {
    "eval_loss": 'losses on data that are not trained on are `"held_out"`',
    "is": 'importance sampling needs the densities of the behaviour and a policy that samples; take `"fqe"`',
    "pdis": 'importance sampling needs the densities of the behaviour and a policy that samples; take `"fqe"`',
}


def check_offline_evaluation(config: CalQLConfig) -> None:
    """Checks how the policy is judged by data while it is trained.

    Raises:
        ValueError: At the first setting that is wrong.
    """
    interval, kind = config.offline_evaluation_interval, config.offline_evaluation_type
    if interval is not None and not is_integer(interval, 1):
        raise ValueError(f"`offline_evaluation_interval` must be None or an integer of at least 1, got {interval!r}.")
    if kind is not None and kind not in (FQE, HELD_OUT):
        instead = _OF_RLLIB.get(kind) if isinstance(kind, str) else None
        raise ValueError(
            f'`offline_evaluation_type` must be None, "{FQE}" or "{HELD_OUT}", got {kind!r}'
            + (f": {instead}." if instead else ".")
        )
    duration = config.offline_evaluation_duration
    if duration is not None and not is_integer(duration, 1):
        raise ValueError(f"`offline_evaluation_duration` must be None or an integer of at least 1, got {duration!r}.")
    if interval is None:
        for name, value in (("type", kind), ("duration", duration)):
            if value is not None:
                raise ValueError(
                    f"`offline_evaluation_{name}` is {value!r}, but `offline_evaluation_interval` is not set; set it "
                    f"to a number of iterations, or drop `offline_evaluation_{name}`."
                )
        return
    if kind is None:
        raise ValueError(
            f"`offline_evaluation_interval` is {interval}, but `offline_evaluation_type` is not set; set it to "
            f'"{FQE}", the value of the policy fitted to the data, or to "{HELD_OUT}", losses on held-out episodes.'
        )
    if duration is not None and kind == HELD_OUT:
        raise ValueError(
            f"`offline_evaluation_duration` is {duration}, the gradient updates of a fit, but "
            f'`offline_evaluation_type` is "{HELD_OUT}", which fits nothing; drop it.'
        )
    if config.in_evaluation:  # RLlib's copy for evaluation has no data.
        return
    if not config.is_offline:
        raise ValueError(
            f"`offline_evaluation_interval` is {interval}, but there are no offline data to judge by; set "
            "`.offline_data(input_=...)` or drop it."
        )
    if kind == HELD_OUT and not config.validation_fraction:
        raise ValueError(
            f'`offline_evaluation_type` is "{HELD_OUT}", but no episode is held out; set '
            "`.offline_data(validation_fraction=0.1)`."
        )
