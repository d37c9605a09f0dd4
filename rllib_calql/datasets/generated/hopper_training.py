"""A policy for Gymnasium's Hopper-v5, trained by RLlib's SAC until its evaluated return is in a range.

Training goes in legs. Each starts from nothing but the last one's checkpoint, in a run that was killed as in one that
was not, so both give the same policy bit for bit.

The learner, its loss and its networks are RLlib's; the loop around them is our own. RLlib's `SAC` takes batches apart
and puts them together again as one Python episode per transition, which takes as long as five updates.

Ray, torch and MuJoCo are imported on first use, not with this module.

Source:
    Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications, arXiv:1812.05905.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from rllib_calql.system.parsed_json import parsed_json

logger = logging.getLogger(__name__)

ENV_ID = "Hopper-v5"
_MODULE_ID = "default_policy"
_UPDATES_PER_CALL = 4  # RLlib's fixed cost of a call is shared by these.
_GAMMA = 0.99
_TAU = 0.005  # Share of a target network that is replaced, per update.
# RLlib's SAC takes the Huber loss of TD errors with threshold 1, where the paper has the squared error. The error of an
# unforeseen fall is near 100 rewards; its gradient would be cut to a hundredth.
_REWARD_SCALE = 0.1
_ACTION_DIM = 3

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Training:
    """How the policy is trained.

    Attributes:
        min_return: Training stops at the first evaluation with a mean return from this ...
        max_return: ... to this. Returns can leap from 350 to 2,400 in 10,000 steps, and fall again.
        max_env_steps: Training fails if it did not stop by then.
        leg_env_steps: Environment steps between evaluations, which are also the checkpoints; legs end with an episode.
        random_env_steps: Of uniformly random actions at the start, without updates.
        updates_per_env_step: Gradient updates, which take 40 times as long as an environment step. One in eight steps
            got there after 22,000 updates (seed 0) and 7,000 (seed 1); one in every step stayed below 400 for 28,000.
        batch_size: Transitions per update.
        n_step: Rewards summed in a TD target before it bootstraps.
        hidden_units: Width of all layers.
        learning_rate: Of actor, critics and entropy temperature.
        evaluation_episodes: Per evaluation, of the policy with its exploration noise.
    """

    min_return: float = 1_000.0
    max_return: float = 1_800.0
    max_env_steps: int = 400_000
    leg_env_steps: int = 5_000
    random_env_steps: int = 2_000
    updates_per_env_step: float = 0.125
    batch_size: int = 256
    n_step: int = 5
    hidden_units: int = 128
    learning_rate: float = 1e-3
    evaluation_episodes: int = 10


@dataclass(frozen=True)
class Progress:
    """Where a training stands.

    Attributes:
        training: What it was started with.
        seed: Its seed.
        leg: Number of legs done.
        env_steps: Number of environment steps done.
        evaluated_return: Mean return of the last evaluation.
        log_alpha: The entropy temperature, which RLlib's checkpoints leave out.
    """

    training: Training
    seed: int
    leg: int = 0
    env_steps: int = 0
    evaluated_return: float = -np.inf
    log_alpha: float = 0.0


def train(*, seed: int, work_dir: Path, report: Callable[[str], None], training: Training) -> Any:
    """Trains, or goes on with, a policy until its evaluated return is in the range asked for.

    Args:
        seed: The same seed gives the same policy, bit for bit, on one platform, however often the run was killed.
        work_dir: As in `collect`. What another `training` or seed left there is removed.
        report: As in `collect`.
        training: Settings and the range.

    Returns:
        RLlib's module of the policy.

    Raises:
        RuntimeError: If it does not get there.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    progress = _latest_progress(work_dir, training, seed)
    while not training.min_return <= progress.evaluated_return <= training.max_return:
        if progress.env_steps >= training.max_env_steps:
            raise RuntimeError(
                f"SAC with seed {seed} had no return from {training.min_return:,.0f} to {training.max_return:,.0f} "
                f"within {training.max_env_steps:,} environment steps; choose another `seed`."
            )
        with _own_torch(seed=np.random.SeedSequence([seed, progress.leg]).generate_state(1).item()):
            progress = _run_leg(work_dir, progress)
        report(
            f"SAC on {ENV_ID}: return {progress.evaluated_return:,.0f} after {progress.env_steps:,} environment steps "
            f"(stops from {training.min_return:,.0f} to {training.max_return:,.0f})"
        )
    with _own_torch(seed=seed):
        return _restored_learner(work_dir, progress).module[_MODULE_ID]


def play(env: gym.Env[Any, Any], policy: Any, *, seed: int) -> dict[str, Any]:
    """Plays one episode.

    Args:
        env: The environment.
        policy: RLlib's module, acting with its exploration noise; None acts uniformly at random.
        seed: Of the reset and of the actions.

    Returns:
        The episode as the fields of a Minari `EpisodeBuffer`.
    """
    rng = np.random.default_rng(seed)
    with _own_torch(seed=seed):
        obs, _ = env.reset(seed=seed)
        observations, actions, rewards = [obs], [], []
        terminated = truncated = False
        while not (terminated or truncated):
            actions.append(_act(policy, obs, rng))
            obs, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(obs)
            rewards.append(float(reward))
    is_last = np.arange(len(rewards)) == len(rewards) - 1
    return {
        "observations": np.stack(observations),
        "actions": np.stack(actions),
        "rewards": np.array(rewards),
        "terminations": is_last & terminated,
        "truncations": is_last & (not terminated),
        "seed": seed,
    }


def _act(policy: Any, obs: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """One action in [-1, 1], the bounds of Hopper's actions and of RLlib's policies alike."""
    if policy is None:
        return rng.uniform(-1.0, 1.0, _ACTION_DIM).astype(np.float32)
    import torch

    with torch.no_grad():
        outputs = policy.forward_exploration({"obs": torch.from_numpy(obs.astype(np.float32))[None]})
        distribution = policy.get_exploration_action_dist_cls().from_logits(outputs["action_dist_inputs"])
        action: npt.NDArray[np.float32] = distribution.sample()[0].numpy()
    return action


def _run_leg(work_dir: Path, progress: Progress) -> Progress:
    """Plays and updates from one checkpoint to the next."""
    training = progress.training
    learner = _restored_learner(work_dir, progress)
    policy = learner.module[_MODULE_ID]
    rng = np.random.default_rng([progress.seed, 1, progress.leg])
    replay = _restored_replay(work_dir, progress)
    env: Any = gym.make(ENV_ID)
    env_steps = progress.env_steps
    end = env_steps + training.leg_env_steps
    while env_steps < end:
        is_random = env_steps < training.random_env_steps
        episode = play(env, None if is_random else policy, seed=int(rng.integers(2**31)))
        replay = _extended(replay, transitions(episode, n_step=training.n_step))
        env_steps += len(episode["rewards"])
        if not is_random:
            num_updates = round(len(episode["rewards"]) * training.updates_per_env_step)
            _update(learner, replay, rng, num_updates=num_updates, batch_size=training.batch_size)
    leg = progress.leg + 1
    evaluated_return = _evaluate(env, policy, num_episodes=training.evaluation_episodes, seed=progress.seed, leg=leg)
    env.close()
    done = Progress(
        training=training,
        seed=progress.seed,
        leg=leg,
        env_steps=env_steps,
        evaluated_return=evaluated_return,
        log_alpha=learner.curr_log_alpha[_MODULE_ID].item(),
    )
    _save(work_dir, done, learner, replay)
    return done


def _evaluate(env: gym.Env[Any, Any], policy: Any, *, num_episodes: int, seed: int, leg: int) -> float:
    seeds = np.random.default_rng([seed, 2, leg]).integers(2**31, size=num_episodes).tolist()
    return float(np.mean([play(env, policy, seed=env_seed)["rewards"].sum() for env_seed in seeds]))


def _new_learner(training: Training) -> Any:
    from ray.rllib.algorithms.sac import SACConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    learning_rate = training.learning_rate
    config = (
        SACConfig()
        # The check of all gradients for infinities takes a fifth of an update.
        .framework("torch", torch_skip_nan_gradients=True)
        .learners(num_learners=0, num_gpus_per_learner=0)
        .rl_module(
            model_config=DefaultModelConfig(
                fcnet_hiddens=[training.hidden_units],
                fcnet_activation="relu",
                head_fcnet_hiddens=[training.hidden_units],
                head_fcnet_activation="relu",
                fusionnet_hiddens=[],
            )
        )
        .training(
            actor_lr=learning_rate,
            critic_lr=learning_rate,
            alpha_lr=learning_rate,
            gamma=_GAMMA,
            initial_alpha=_REWARD_SCALE,
            # RLlib moves the targets once per call.
            tau=1.0 - (1.0 - _TAU) ** _UPDATES_PER_CALL,
        )
    )
    env: Any = gym.make(ENV_ID)
    learner = config.build_learner(env=env)
    env.close()
    return learner


def _update(learner: Any, replay: Columns, rng: np.random.Generator, *, num_updates: int, batch_size: int) -> None:
    from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
    from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

    num_rows = batch_size * _UPDATES_PER_CALL
    num_transitions = len(replay["rewards"])
    for _ in range(-(-num_updates // _UPDATES_PER_CALL)):
        rows = rng.integers(num_transitions, size=num_rows)
        batch = SampleBatch({name: column[rows] for name, column in replay.items()})
        learner.update(
            batch=MultiAgentBatch({_MODULE_ID: batch}, env_steps=num_rows),
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: num_transitions},
            minibatch_size=batch_size,
        )


def transitions(episode: dict[str, Any], *, n_step: int) -> Columns:
    """The columns that RLlib's SAC loss takes, one row per step of an episode.

    Args:
        episode: As from `play`.
        n_step: Rewards summed per row; fewer near the end of the episode.
    """
    obs = episode["observations"].astype(np.float32)
    length = len(episode["rewards"])
    start = np.arange(length)
    end = np.minimum(start + n_step, length)
    rewards = np.zeros(length)
    for delay in range(min(n_step, length)):
        rewards[: length - delay] += _GAMMA**delay * episode["rewards"][delay:]
    return {
        "obs": obs[:-1],
        "new_obs": obs[end],
        "actions": episode["actions"],
        "rewards": (_REWARD_SCALE * rewards).astype(np.float32),
        "terminateds": (end == length) & episode["terminations"][-1],
        "n_step": (end - start).astype(np.float32),
        "weights": np.ones(length, np.float32),
    }


def _extended(replay: Columns, new: Columns) -> Columns:
    return {name: np.concatenate([replay[name], column]) for name, column in new.items()} if replay else new


def _checkpoint(work_dir: Path, leg: int) -> Path:
    return work_dir / f"leg-{leg:06d}"


def _latest_progress(work_dir: Path, training: Training, seed: int) -> Progress:
    for path in sorted(work_dir.glob("leg-*"), reverse=True):
        try:
            stored = parsed_json((path / "progress.json").read_bytes())
            if stored["training"] == asdict(training) and stored["seed"] == seed:
                return Progress(**{**stored, "training": training})
        except (OSError, ValueError, KeyError, TypeError) as err:
            logger.warning("'%s' is damaged and is trained anew: %s", path, err)
        shutil.rmtree(path)
    return Progress(training=training, seed=seed, log_alpha=float(np.log(_REWARD_SCALE)))


def _restored_learner(work_dir: Path, progress: Progress) -> Any:
    import torch

    learner = _new_learner(progress.training)
    if progress.leg > 0:
        learner.restore_from_path(_checkpoint(work_dir, progress.leg) / "learner")
    with torch.no_grad():
        learner.curr_log_alpha[_MODULE_ID].fill_(progress.log_alpha)
    return learner


def _restored_replay(work_dir: Path, progress: Progress) -> Columns:
    if progress.leg == 0:
        return {}
    with np.load(_checkpoint(work_dir, progress.leg) / "replay.npz", allow_pickle=False) as stored:
        return dict(stored)


def _save(work_dir: Path, progress: Progress, learner: Any, replay: Columns) -> None:
    """Writes a checkpoint beside its place and moves it there in one rename, then removes the one before."""
    path = _checkpoint(work_dir, progress.leg)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=work_dir, ignore_cleanup_errors=True) as unfinished:
        built = Path(unfinished) / path.name
        built.mkdir()
        learner.save_to_path(built / "learner")
        np.savez(built / "replay.npz", **replay)  # type: ignore[arg-type]  # NumPy's stub takes the names for options.
        (built / "progress.json").write_text(json.dumps(asdict(progress)))
        if not path.exists():  # Another process of the same seed has written the same.
            built.rename(path)
    shutil.rmtree(_checkpoint(work_dir, progress.leg - 1), ignore_errors=True)


@contextmanager
def _own_torch(*, seed: int) -> Iterator[None]:
    """Seeds torch and keeps it to one thread; the caller's random state and threads come back afterwards.

    One thread, since the number of threads changes the order of sums and so the last bits.
    """
    import torch

    num_threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
