"""What the better prior at the switch, policy or data, speaks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rllib_calql.common import metrics as keys

_SOURCE = "arXiv:2510.01460"
_SENTENCES = {
    "policy": (
        "At the switch the policy ({quantity} {policy:.2f}) is better than the data ({data:.2f}): `warmup_env_steps` "
        "keeps what it can, a low `mixing_ratio` costs little ({source})."
    ),
    "data": (
        "At the switch the data ({quantity} {data:.2f}) are better than the policy ({policy:.2f}): a high "
        "`mixing_ratio` keeps what they show, `warmup_env_steps` adds little ({source})."
    ),
    "both": (
        "At the switch the policy ({quantity} {policy:.2f}) and the data ({data:.2f}) differ by no more than chance: "
        "both are worth keeping, by `warmup_env_steps` and by `mixing_ratio` ({source})."
    ),
}


def advice_of(result: Mapping[str, Any]) -> str | None:
    """A sentence on the regime that a result tells; None if it tells none."""
    told = result.get(keys.FINE_TUNING)
    if not isinstance(told, Mapping) or told.get(keys.REGIME) not in _SENTENCES:
        return None
    policy, data = (told.get(key) for key in (keys.REGIME_POLICY, keys.REGIME_DATA))
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in (policy, data)):
        return None
    sentence: str = _SENTENCES[told[keys.REGIME]]
    return sentence.format(quantity=told.get(keys.REGIME_QUANTITY), policy=policy, data=data, source=_SOURCE)
