"""Callbacks that run inside env runners."""

from __future__ import annotations

from typing import Any

from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.utils.annotations import override

from rllib_calql.metrics import SUCCESS_RATE

_SUCCESS_KEYS = ("success", "is_success")  # Gymnasium-Robotics and PointMaze; Stable-Baselines3's convention.


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
        """Logs 1.0 if any step of the whole episode reported success, 0.0 if none did, nothing if none said."""
        chunks = [*(prev_episode_chunks or []), episode]
        reports = [
            bool(info[key])
            for chunk in chunks
            for info in chunk.get_infos()
            for key in _SUCCESS_KEYS
            if isinstance(info, dict) and key in info
        ]
        if reports and metrics_logger is not None:
            metrics_logger.log_value(SUCCESS_RATE, float(any(reports)), reduce="mean", window=_window(kwargs))


def _window(kwargs: dict[str, Any]) -> int:
    """Episodes that the mean runs over, as for RLlib's own episode metrics."""
    config = getattr(kwargs.get("env_runner"), "config", None)
    return int(getattr(config, "metrics_num_episodes_for_smoothing", 100))


OWN_CALLBACKS = (EpisodeCutCallback, EpisodeOutcomeCallback)
