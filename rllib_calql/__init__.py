"""Cal-QL for Ray RLlib: pre-train on logs, then fine-tune online without the collapse at the switch.

Importing the package registers the algorithm name "CalQL" with Ray Tune. It stays light: Ray, RLlib and torch are
loaded when `CalQL` or `CalQLConfig` is first used. `load_policy` and `EpisodeLog` need none of them, NumPy is enough;
`PolicyClient` needs `msgpack` as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rllib_calql.registration import register, register_once_loaded

if TYPE_CHECKING:
    from rllib_calql.algorithm import CalQL
    from rllib_calql.collection.budget import BudgetSpentError
    from rllib_calql.config import CalQLConfig
    from rllib_calql.export.writing import export_policy
    from rllib_calql.policy.client import PolicyClient
    from rllib_calql.policy.episode_log import EpisodeLog
    from rllib_calql.policy.loading import load_policy
    from rllib_calql.policy.policy import Policy

__version__ = "0.1.0"
__all__ = [
    "BudgetSpentError",
    "CalQL",
    "CalQLConfig",
    "EpisodeLog",
    "Policy",
    "PolicyClient",
    "__version__",
    "export_policy",
    "load_policy",
    "register",
]

_MODULES = {
    "BudgetSpentError": "rllib_calql.collection.budget",
    "CalQL": "rllib_calql.algorithm",
    "CalQLConfig": "rllib_calql.config",
    "EpisodeLog": "rllib_calql.policy.episode_log",
    "Policy": "rllib_calql.policy.policy",
    "PolicyClient": "rllib_calql.policy.client",
    "export_policy": "rllib_calql.export.writing",
    "load_policy": "rllib_calql.policy.loading",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings
    from importlib import import_module

    with warnings.catch_warnings():
        # RLlib imports GLFW where it is installed, which warns on machines without a display.
        warnings.filterwarnings("ignore", message=".*DISPLAY environment variable is missing")
        module = import_module(_MODULES[name])
    return getattr(module, name)


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted(__all__)


register_once_loaded()
