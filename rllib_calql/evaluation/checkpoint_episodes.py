"""`run_episodes`: whole episodes of a checkpoint's greedy policy in its environment, without learners and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rllib_calql.checkpoints.reading import CheckpointFiles, read_of_one_save
from rllib_calql.collection.callbacks import EpisodeOutcomeCallback
from rllib_calql.collection.env_errors import told
from rllib_calql.collection.success_key import infos_seen_by
from rllib_calql.common import metrics as keys
from rllib_calql.common.success import unseen_key_message
from rllib_calql.environments.resolving import resolve_env
from rllib_calql.environments.sharing import provide


@dataclass(frozen=True)
class EpisodesRun:
    """Episodes that were run.

    Attributes:
        config: The algorithm's.
        returns: Undiscounted return of each episode, in environment rewards.
        success_rate: Mean success of the episodes, None if they do not say.
        warning: That no episode shows the `success_key`, a sentence without its end; None if nothing is wrong.
    """

    config: Any
    returns: Sequence[float]
    success_rate: float | None
    warning: str | None


def run_episodes(checkpoint: str, filesystem: Any, *, num_episodes: int, seed: int | None) -> EpisodesRun:
    """Runs whole episodes with an env runner of its own; learners and data are not needed for that.

    Args:
        checkpoint: Its folder.
        filesystem: PyArrow file system.
        num_episodes: How many.
        seed: Of the environment.

    Raises:
        ValueError: If it has no environment, or cannot be read.
        RuntimeError: If the environment fails.
    """
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    def restored(files: CheckpointFiles) -> tuple[Any, SingleAgentEnvRunner]:
        config = files.config()
        if config.env is None:
            raise ValueError("The checkpoint's config has no environment; it was trained on data alone.")
        config.env_runners(num_env_runners=0, num_envs_per_env_runner=1, explore=False)
        config.reporting(metrics_num_episodes_for_smoothing=num_episodes)
        config.debugging(seed=seed)
        config.callbacks([EpisodeOutcomeCallback])
        provide(config.env)
        resolve_env(config.env)
        with told("Making the environment"):
            runner = SingleAgentEnvRunner(config=config, worker_index=0)
        files.restore_env_runner(runner)
        return config, runner

    config, runner = read_of_one_save(checkpoint, filesystem, restored, discard=lambda made: made[1].stop())
    try:
        with told("An episode"):
            episodes = runner.sample(num_episodes=num_episodes, explore=False)
        metrics = runner.get_metrics()
        seen = infos_seen_by(runner)
    finally:
        runner.stop()
    success = metrics.get(keys.SUCCESS_RATE)
    return EpisodesRun(
        config,
        [float(episode.get_return()) for episode in episodes],
        None if success is None else float(success.peek()),
        unseen_key_message(config.success_key, seen.num_episodes, seen.names) if seen.num_episodes else None,
    )
