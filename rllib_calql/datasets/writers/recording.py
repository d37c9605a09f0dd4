"""Records a policy's behaviour as a dataset: what the environment emitted and received, step by step."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
import tree

from rllib_calql.checkpoints.reading import config_of, read_of_one_save
from rllib_calql.datasets.episodes.reader import EpisodeBlock, Nested, check_finite
from rllib_calql.datasets.writers.recorded_values import action_of, one_number
from rllib_calql.datasets.writers.writers import DatasetMetadata, WriteSummary, write_blocks

Policy: TypeAlias = Any
"""An RLlib `Algorithm`, the path of a checkpoint of one, or a callable from observation to action."""

EnvSource: TypeAlias = "str | gym.Env[Any, Any] | Callable[[dict[str, Any]], gym.Env[Any, Any]] | None"

_ENDLESS_STEPS = 1_000_000


def record(
    policy: Policy,
    env: EnvSource,
    episodes: int,
    to: str | os.PathLike[str],
    *,
    seed: int | None = None,
    explore: bool = True,
    env_config: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    reference_scores: tuple[float, float] | None = None,
    overwrite: bool = False,
) -> WriteSummary:
    """Lets a policy act for whole episodes and writes what the environment saw.

    Observations are the environment's own, before any connector flattens or normalises them; actions are those that
    its `step` received, after RLlib unsquashed or clipped them. Episodes are played one after another, so their lengths
    are not biased. RLlib policies act through their connectors, with their states; callbacks of their config don't run.

    Args:
        policy: An RLlib `Algorithm` (single-agent, new API stack), the path of a checkpoint of one, which is a program
            to be trusted as such, or a callable that turns an observation into an action in the environment's units.
            Of an action and None, as Stable-Baselines3's `predict` returns them, the action is taken.
        env: Name registered with Ray Tune or Gymnasium, a callable from `env_config` to an environment, an environment
            (it is not closed), or None for the one of the policy's config.
        episodes: Number of episodes, at least 1.
        to: As in `write_blocks`. With `minari:<dataset id>` the environment's spec is stored if it has one, so that
            Minari can recover the environment.
        seed: Of the environment, the policy's exploration and the action space; at least 0. None: not seeded. The
            global random states are as before afterwards.
        explore: Whether an RLlib policy explores (draws actions) or takes its best action.
        env_config: For a name or a callable. Default: the policy's own with `env=None`, else nothing.
        max_episode_steps: Episodes are cut (truncated) after this many steps, beside the environment's own limit.
        reference_scores: Returns (min, max) that stand for a normalised score of 0 and 1.
        overwrite: Whether what stands at the target is replaced.

    Returns:
        Numbers of episodes and transitions, and what the format has no place for.

    Raises:
        TypeError: If `policy` or `env` is none of the above, the environment emits something else than numbers, or a
            callable returns no action of the environment.
        ValueError: If an argument is out of range, or the policy does not fit the environment.
        RuntimeError: If an episode has not ended after a million steps and `max_episode_steps` is not given.
        OSError: As in `write_blocks`.
    """
    for name, value, least in (("episodes", episodes, 1), ("max_episode_steps", max_episode_steps, 1)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if seed is not None and seed < 0:
        raise ValueError(f"`seed` must be at least 0, got {seed}.")
    config = _policy_config(policy)
    if config is None and not explore:
        raise ValueError("`explore=False` is for RLlib policies; a callable decides itself how it acts.")
    with ExitStack() as stack:
        stack.enter_context(_seeded(seed))
        made = _make_env(env, env_config, config)
        if made is not env:
            stack.callback(made.close)
        if seed is not None:
            made.action_space.seed(seed)
        spec = made.spec
        # Gymnasium writes the spec of RLlib's own wrapper into the environment.
        stack.callback(setattr, made.unwrapped, "spec", made.unwrapped.spec)
        recorder = RecordingEnv(made, seed=seed, max_episode_steps=max_episode_steps)
        if config is None:
            play: Callable[[], None] = _player_of_callable(recorder, policy)
        else:
            play = _player_of_algorithm(recorder, policy, config, explore=explore, seed=seed)
        return write_blocks(
            _blocks(recorder, play, episodes, seed),
            to,
            metadata=DatasetMetadata(
                observation_space=made.observation_space,
                action_space=made.action_space,
                env_spec=spec,
                reference_scores=reference_scores,
                algorithm_name=_name_of(policy, config),
            ),
            overwrite=overwrite,
        )


class RecordingEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps the episode under way, and the last one that ended until `take` fetches it."""

    def __init__(self, env: gym.Env[Any, Any], *, seed: int | None, max_episode_steps: int | None) -> None:
        """Wraps an environment.

        Args:
            env: The environment.
            seed: Given to the first `reset`, None: no seed.
            max_episode_steps: Cuts longer episodes.
        """
        super().__init__(env)
        self._seed = seed
        self._max_episode_steps = max_episode_steps
        self._num_ended = 0
        self._ended: EpisodeBlock | None = None
        self._observations: list[Nested] = []
        self._actions: list[Nested] = []
        self._rewards: list[float] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; one that has not ended is forgotten.

        The seed given here is not used: RLlib's env runner passes its own again before each `sample`, which would make
        all episodes alike.
        """
        obs, info = self.env.reset(seed=self._seed, options=options)
        self._seed = None
        self._observations = [_as_arrays(self.observation_space, obs)]
        self._actions, self._rewards = [], []
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps and keeps everything but the info."""
        self._actions.append(_as_arrays(self.action_space, action))
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._observations.append(_as_arrays(self.observation_space, obs))
        reward = one_number(reward, "reward")
        self._rewards.append(reward)
        num_steps = len(self._rewards)
        terminated = bool(one_number(terminated, "termination flag"))
        truncated = bool(one_number(truncated, "truncation flag")) or num_steps == self._max_episode_steps
        if terminated or truncated:
            self._end(terminated, truncated)
        elif num_steps >= _ENDLESS_STEPS and self._max_episode_steps is None:
            raise RuntimeError(
                f"An episode has not ended after {num_steps:,} steps; bound it with `max_episode_steps`."
            )
        return obs, reward, terminated, truncated, info

    def close(self) -> None:
        """Leaves the environment open, since it belongs to whoever made it."""

    def take(self) -> EpisodeBlock:
        """Hands over the last episode that ended, once."""
        episode, self._ended = self._ended, None
        assert episode is not None
        return episode

    def _end(self, terminated: bool, truncated: bool) -> None:
        observations = _stacked(self._observations)
        id_ = str(self._num_ended)
        self._ended = EpisodeBlock(
            ids=[id_],
            lengths=np.array([len(self._rewards)]),
            observations=tree.map_structure(lambda array: array[:-1], observations),
            final_observations=tree.map_structure(lambda array: array[-1:], observations),
            actions=_stacked(self._actions),
            rewards=np.array(self._rewards, dtype=np.float64),
            terminateds=np.array([terminated]),
            truncateds=np.array([truncated]),
            where=lambda row: f"step {row} of recorded episode {id_}",
        )
        self._num_ended += 1


def _blocks(
    recorder: RecordingEnv, play: Callable[[], None], episodes: int, seed: int | None
) -> Iterator[EpisodeBlock]:
    _seed(seed)  # Again: the building of networks draws numbers, more from a checkpoint than from an algorithm.
    for _ in range(episodes):
        play()
        block = recorder.take()
        check_finite(block)
        yield block


def _as_arrays(space: gym.Space[Any], value: Any) -> Nested:
    """Copies what passed through the environment, since it may reuse its arrays.

    A Python number, or a dtype other than the space's, becomes the smallest dtype that holds both exactly; otherwise
    an environment that emits `0` at times and `0.5` at others would change the dtype from episode to episode.
    """
    if isinstance(space, gym.spaces.Dict):
        return {key: _as_arrays(inner, value[key]) for key, inner in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_as_arrays(inner, part) for inner, part in zip(space.spaces, value, strict=True))
    array = np.array(value)
    if array.dtype.kind not in "fiub" or space.dtype is None:
        raise TypeError(f"Only numbers can be recorded, got {array.dtype} for the space {space}; wrap the environment.")
    return array.astype(np.result_type(array.dtype, space.dtype), copy=False)


def _stacked(steps: list[Nested]) -> Nested:
    return tree.map_structure(lambda *arrays: np.stack(arrays), *steps)


def _make_env(env: EnvSource, env_config: dict[str, Any] | None, config: Any) -> gym.Env[Any, Any]:
    from ray.rllib.env.env_context import EnvContext
    from ray.tune.registry import ENV_CREATOR, _global_registry

    if isinstance(env, gym.Env):
        if env_config is not None:
            raise ValueError("`env_config` is for environments made here; `env` is made already, so drop it.")
        return env
    if env is None:
        if config is None or config.env is None:
            raise ValueError(
                "`env=None` stands for the environment of the policy's config, which has none; pass `env`."
            )
        env = config.env
        env_config = dict(config.env_config) if env_config is None else env_config
    settings = dict(env_config or {})
    if isinstance(env, str) and not _global_registry.contains(ENV_CREATOR, env):
        made: Any = gym.make(env, **settings)
    elif isinstance(env, str) or callable(env):
        creator: Any = _global_registry.get(ENV_CREATOR, env) if isinstance(env, str) else env
        made = creator(EnvContext(settings, worker_index=0))
    else:
        raise TypeError(f"`env` must be a name, a callable or a Gymnasium environment, got {type(env).__name__}.")
    if not isinstance(made, gym.Env):
        raise TypeError(f"`env` {env!r} makes a {type(made).__name__}, not a Gymnasium environment.")
    return made


def _policy_config(policy: Policy) -> Any:
    """A copy of the config of an RLlib policy, free to be changed; None for a callable."""
    from ray.rllib.algorithms.algorithm import Algorithm

    if isinstance(policy, Algorithm):
        config = policy.config.copy(copy_frozen=False)
    elif isinstance(policy, (str, os.PathLike)):
        config = config_of(Path(policy))
    elif callable(policy):
        return None
    else:
        raise TypeError(
            "`policy` must be an RLlib `Algorithm`, the path of a checkpoint, or a callable from observation to "
            f"action, got {type(policy).__name__}."
        )
    if config.is_multi_agent or not config.enable_env_runner_and_connector_v2:
        raise ValueError("`policy` must be a single-agent algorithm on RLlib's new API stack; pass a callable instead.")
    return config


def _name_of(policy: Policy, config: Any) -> str:
    if config is not None:
        return str(config.algo_class.__name__)
    return str(getattr(policy, "__name__", type(policy).__name__))


def _player_of_callable(recorder: RecordingEnv, policy: Callable[[Any], Any]) -> Callable[[], None]:
    def play() -> None:
        obs, _ = recorder.reset()
        ended = False
        while not ended:
            obs, _, terminated, truncated, _ = recorder.step(action_of(policy(obs), recorder.action_space))
            ended = terminated or truncated

    return play


def _player_of_algorithm(
    recorder: RecordingEnv, policy: Policy, config: Any, *, explore: bool, seed: int | None
) -> Callable[[], None]:
    """RLlib's own env runner plays, so that connectors, recurrent states and action scaling are as in training."""
    from ray.rllib.callbacks.callbacks import RLlibCallback
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    config.environment(env=lambda _: recorder, env_config={}, disable_env_checking=True)
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=1, explore=explore, gym_env_vectorize_mode="sync")
    config.fault_tolerance(restart_failed_sub_environments=False)
    config.debugging(seed=seed)
    config.callbacks(RLlibCallback)
    for name in [name for name in vars(config) if name.startswith("callbacks_on_")]:
        setattr(config, name, None)
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    try:
        _restore(runner, policy)
    except (RuntimeError, ValueError, KeyError) as err:
        raise ValueError(
            f"The policy does not fit the environment (observation space {recorder.observation_space}, action space "
            f"{recorder.action_space}); name the environment that it was trained in. {err}"
        ) from err

    def play() -> None:
        try:
            runner.sample(num_episodes=1, explore=explore)
        except RuntimeError as err:
            # RLlib wraps what the environment raises in an error without a message.
            if err.args or err.__cause__ is None:
                raise
            raise err.__cause__ from None
        runner.get_metrics()  # Empties the list of episodes that the runner holds for its metrics.

    return play


def _restore(runner: Any, policy: Policy) -> None:
    """Gives an env runner the states of the connectors and the latest weights."""
    if isinstance(policy, (str, os.PathLike)):
        read_of_one_save(policy, None, lambda files: files.restore_env_runner(runner))
    else:
        if policy.env_runner is not None:
            # Copied, since running means go on in place while the recording runs.
            runner.set_state(copy.deepcopy(policy.env_runner.get_state(not_components="rl_module")))
        learners = policy.learner_group.get_state(components="learner/rl_module", inference_only=True)
        # Without a sequence number the weights are taken in any case.
        runner.set_state({"rl_module": learners["learner"]["rl_module"]})


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seeds the global random states that policies and environments may draw from, and restores them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed(seed)
    try:
        yield
    finally:
        if seed is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def _seed(seed: int | None) -> None:
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
