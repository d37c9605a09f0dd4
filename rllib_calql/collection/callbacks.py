"""Callbacks that run inside env runners."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.utils.annotations import override
from ray.util import log_once

from rllib_calql.collection.success_key import infos_seen_by
from rllib_calql.common.metrics import SUCCESS_RATE
from rllib_calql.common.success import reports_in, success_of
from rllib_calql.system import activity

_UNKNOWN = ("", "unknown", "none", "nan", "<na>", "nat")  # The last two are those of Pandas.

RETURN_SQUARE_MEAN = "episode_return_square_mean"  # Of env runners; results hold the standard deviation instead.
EPISODES, ENV_STEPS = "episodes", "env steps"  # Units of what a process is doing, see `system.activity`.

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
        """Marks the episode as truncated once it is long enough, or as the last step is made that it was granted."""
        activity.count(ENV_STEPS)
        limit = getattr(env_runner.config, "episode_limit_env_steps", None)
        is_long = limit is not None and episode.t >= limit
        meter = getattr(env_runner, "_calql_meter", None)
        if (is_long or (meter is not None and meter.cuts_episode)) and not episode.is_done:
            episode.is_truncated = True
            self._last_observations[env_index] = episode.get_observations(-1)

    @override(RLlibCallback)
    def on_episode_created(self, *, episode: Any, env_index: int = 0, **kwargs: Any) -> None:
        """Begins the episode after a cut one where that one ended."""
        if env_index in self._last_observations:
            episode.add_env_reset(self._last_observations.pop(env_index), infos={})


class EpisodeOutcomeCallback(RLlibCallback):
    """Logs what RLlib does not: how far episodes succeed, and the squares of their returns, for their spread.

    They succeed where the environment reports success in its infos, see `.evaluation(...)`.
    """

    @override(RLlibCallback)
    def on_episode_end(
        self, *, episode: Any, prev_episode_chunks: Any = None, metrics_logger: Any = None, **kwargs: Any
    ) -> None:
        """Logs the whole episode's squared return, and its success, from 0 to 1, or none where no step says."""
        runner = kwargs.get("env_runner")
        config = getattr(runner, "config", None)
        # The configs of RLlib's own algorithms, which `rllib evaluate` takes as well, have no such settings.
        key, rule = getattr(config, "success_key", None), getattr(config, "success_rule", "any")
        activity.count(EPISODES)
        chunks = [*(prev_episode_chunks or []), episode]
        infos = [info for chunk in chunks for info in chunk.get_infos()]
        if runner is not None and key is not None:
            runner._calql_infos_seen = infos_seen_by(runner).including(key, infos)
        if rule != "any":
            # A chunk begins with the info of the reset, or with the last one of the chunk before: no step of its own.
            infos = [info for chunk in chunks for info in chunk.get_infos()[1:]]
        success = success_of([_outcome_of_step(reports_in(info, key)) for info in infos], rule)
        if metrics_logger is None:
            return
        episode_return = float(sum(chunk.get_return() for chunk in chunks))
        square = episode_return * episode_return  # Infinite, and no error, where it is beyond float64.
        metrics_logger.log_value(RETURN_SQUARE_MEAN, square, reduce="mean", window=_window_of_rllib(config))
        if success is not None:
            metrics_logger.log_value(SUCCESS_RATE, success, reduce="mean", window=_window(config))


def _outcome_of_step(reports: Sequence[tuple[str, Any]]) -> bool | None:
    """Whether a step says success: yes if one of its keys does, no if some do, None if none says."""
    outcomes = {_outcome(key, reported) for key, reported in reports}
    return True if True in outcomes else (False if False in outcomes else None)


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


def _window(config: Any) -> int:
    """Episodes that the mean runs over, as for RLlib's own episode metrics."""
    return int(getattr(config, "metrics_num_episodes_for_smoothing", 100))


def _window_of_rllib(config: Any) -> int:
    """Episodes of one env runner in RLlib's mean return, so that both means are those of the same episodes."""
    return max(1, math.ceil(_window(config) / (getattr(config, "num_env_runners", 0) or 1)))


OWN_CALLBACKS = (EpisodeCutCallback, EpisodeOutcomeCallback)
