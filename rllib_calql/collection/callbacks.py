"""Callbacks that run inside env runners."""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from typing import Any

from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.utils.annotations import override
from ray.util import log_once

from rllib_calql.common.metrics import SUCCESS_RATE

_SUCCESS_KEYS = ("success", "is_success")  # Gymnasium-Robotics and PointMaze; Stable-Baselines3's convention.
_UNKNOWN = ("", "unknown", "none", "nan", "<na>", "nat")  # The last two are those of Pandas.

logger = logging.getLogger(__name__)


class EpisodeCutCallback(RLlibCallback):
    """Cuts episodes after `episode_limit_env_steps` steps, without resetting the environment.

    The episode counts as truncated there, and the next one begins with its last observation. So pieces of an episode
    that never ends do not pile up, no step is lost, and the environment notices nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last_observations: dict[int, Any] = {}  # By sub-environment, between the cut and the new episode.

    @override(RLlibCallback)
    def on_episode_step(self, *, episode: Any, env_runner: Any = None, env_index: int = 0, **kwargs: Any) -> None:
        """Marks the episode as truncated once it is long enough."""
        limit = getattr(env_runner.config, "episode_limit_env_steps", None)
        if limit is not None and episode.t >= limit and not episode.is_done:
            episode.is_truncated = True
            self._last_observations[env_index] = episode.get_observations(-1)

    @override(RLlibCallback)
    def on_episode_created(self, *, episode: Any, env_index: int = 0, **kwargs: Any) -> None:
        """Begins the episode after a cut one where that one ended."""
        if env_index in self._last_observations:
            episode.add_env_reset(self._last_observations.pop(env_index), infos={})


class EpisodeOutcomeCallback(RLlibCallback):
    """Logs the share of successful episodes where the environment reports success in its infos."""

    @override(RLlibCallback)
    def on_episode_end(
        self, *, episode: Any, prev_episode_chunks: Any = None, metrics_logger: Any = None, **kwargs: Any
    ) -> None:
        """Logs 1.0 if any step of the whole episode said success, 0.0 if some said no and none yes, else nothing."""
        chunks = [*(prev_episode_chunks or []), episode]
        reports = {
            _outcome(key, info[key])
            for chunk in chunks
            for info in chunk.get_infos()
            for key in _SUCCESS_KEYS
            if isinstance(info, dict) and key in info
        } - {None}
        if reports and metrics_logger is not None:
            metrics_logger.log_value(SUCCESS_RATE, float(True in reports), reduce="mean", window=_window(kwargs))


def _outcome(key: str, reported: Any) -> bool | None:
    """Whether an info says success: truth values, 0 and 1, bare or in an array of one. None where it does not say."""
    value = reported
    if hasattr(value, "item"):  # NumPy's scalars and arrays, PyTorch's tensors.
        with suppress(ValueError, RuntimeError):  # More than one number.
            value = value.item()
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    is_unknown = value is None or (isinstance(value, float) and math.isnan(value)) or str(value).lower() in _UNKNOWN
    if not is_unknown and log_once(f"calql_outcome_{key}"):
        logger.warning(
            "`%s` in an environment's infos is %r, which says neither success nor failure and is left out of "
            "`%s`; report True, False, 1, 0, or NaN where it is not known. Said once.",
            key,
            reported,
            SUCCESS_RATE,
        )
    return None


def _window(kwargs: dict[str, Any]) -> int:
    """Episodes that the mean runs over, as for RLlib's own episode metrics."""
    config = getattr(kwargs.get("env_runner"), "config", None)
    return int(getattr(config, "metrics_num_episodes_for_smoothing", 100))


OWN_CALLBACKS = (EpisodeCutCallback, EpisodeOutcomeCallback)
