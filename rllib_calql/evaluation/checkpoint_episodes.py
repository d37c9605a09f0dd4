"""`run_episodes`: whole episodes of a checkpoint's greedy policy in its environment, without learners and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym

from rllib_calql.checkpoints.manifest import check_environment
from rllib_calql.checkpoints.reading import CheckpointFiles, read_of_one_save
from rllib_calql.collection.callbacks import EpisodeOutcomeCallback
from rllib_calql.collection.env_errors import told
from rllib_calql.collection.success_key import infos_seen_by
from rllib_calql.common import metrics as keys
from rllib_calql.common.success import unseen_key_message
from rllib_calql.environments.resolving import resolve_env
from rllib_calql.environments.sharing import provide
from rllib_calql.evaluation.video import Recorder, Video


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


@dataclass(frozen=True)
class OtherEnv:
    """An environment in place of the one that a checkpoint was trained in, if it was trained in one.

    Attributes:
        name: As the setting `env`; None for the checkpoint's own.
        config: As the setting `env_config`; of the checkpoint's own environment None leaves what it has.
    """

    name: str | None = None
    config: Mapping[str, Any] | None = None


def run_episodes(
    checkpoint: str,
    filesystem: Any,
    *,
    num_episodes: int,
    seed: int | None,
    env: OtherEnv | None = None,
    video: Video | None = None,
    on_begin: Callable[[], None] = lambda: None,
    on_end: Callable[[float], None] = lambda episode_return: None,
) -> EpisodesRun:
    """Runs whole episodes with an env runner of its own; learners and data are not needed for that.

    Args:
        checkpoint: Its folder.
        filesystem: PyArrow file system.
        num_episodes: How many.
        seed: Of the environment.
        env: The environment to run them in; by default that of the training.
        video: What is recorded of them; the episodes are the same without it.
        on_begin: Called when an episode begins.
        on_end: Called with its return when one has ended.

    Raises:
        ValueError: If it has no environment, if the spaces of `env` are not those of the checkpoint, or if the
            checkpoint cannot be read.
        RuntimeError: If the environment fails, or cannot be recorded.
        ImportError: If a video needs a package that is not installed.
    """
    from ray.rllib.callbacks.callbacks import RLlibCallback
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    class Watch(RLlibCallback):
        def on_episode_start(self, **kwargs: Any) -> None:
            on_begin()

        def on_episode_end(self, *, episode: Any, **kwargs: Any) -> None:
            on_end(float(episode.get_return()))

    def restored(files: CheckpointFiles) -> tuple[Any, SingleAgentEnvRunner]:
        class Runner(SingleAgentEnvRunner):
            """Sees the environment before networks are made for spaces that may not be the checkpoint's."""

            def make_env(self) -> None:
                if recorder is not None:  # The config is the runner's own copy.
                    self.config.env = partial(recorder.make, self.config.env)
                    self.config.gym_env_vectorize_mode = gym.VectorizeMode.SYNC
                    self.config.restart_failed_sub_environments = False  # What was recorded would be lost.
                super().make_env()

            def make_module(self) -> None:
                if env is not None and files.raw_manifest() is not None:  # Other algorithms have no manifest.
                    made = self.env.unwrapped
                    try:
                        check_environment(files.manifest(), made.single_observation_space, made.single_action_space)
                    except ValueError:
                        self.stop()
                        raise
                super().make_module()

        config = files.config()
        _set_env(config, env or OtherEnv())
        config.env_runners(num_env_runners=0, num_envs_per_env_runner=1, explore=False)
        config.reporting(metrics_num_episodes_for_smoothing=num_episodes)
        config.debugging(seed=seed)
        config.callbacks([EpisodeOutcomeCallback, Watch])
        provide(config.env)
        resolve_env(config.env)
        with told("Making the environment"):
            runner = Runner(config=config, worker_index=0)
        files.restore_env_runner(runner)
        return config, runner

    with ExitStack() as stack:
        recorder = Recorder(video.num_episodes) if video is not None else None
        if recorder is not None:
            stack.callback(recorder.close)
        config, runner = read_of_one_save(checkpoint, filesystem, restored, discard=lambda made: made[1].stop())
        try:
            with told("An episode"):
                episodes = runner.sample(num_episodes=num_episodes, explore=False)
            metrics = runner.get_metrics()
            seen = infos_seen_by(runner)
        finally:
            runner.stop()
        if video is not None and recorder is not None:
            recorder.write(video.file)
    success = metrics.get(keys.SUCCESS_RATE)
    return EpisodesRun(
        config,
        [float(episode.get_return()) for episode in episodes],
        None if success is None else float(success.peek()),
        unseen_key_message(config.success_key, seen.num_episodes, seen.names) if seen.num_episodes else None,
    )


def _set_env(config: Any, env: OtherEnv) -> None:
    if env.name is not None:
        config.environment(env.name, env_config=dict(env.config or {}))
        config.observation_space = config.action_space = None  # Those of the data, if it had no environment.
    elif config.env is None:
        raise ValueError(
            "The checkpoint's config has no environment; it was trained on data alone. Name one with `--env`."
        )
    elif env.config is not None:
        config.env_config = dict(env.config)
