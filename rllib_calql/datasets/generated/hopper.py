"""Medium-level data of Gymnasium's Hopper-v5: RLlib's SAC, stopped half-way and then recorded.

The policy acts with its own exploration noise. Training can be continued after a kill, see `hopper_training`.

Source:
    Fu et al. 2020, D4RL, arXiv:2004.07219, section 5 (a "medium" policy is one that was stopped early).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rllib_calql.datasets.generated.hopper_training import ENV_ID, Training, play, train

# D4RL's score of 100 for Hopper (d4rl/infos.py, REF_MAX_SCORE): the mean return of SAC trained to convergence.
EXPERT_RETURN = 3234.3
_REFERENCE_SEED = 20_230_309  # The reference scores depend on the environment only, not on the data's seed.


def collect(
    *,
    num_steps: int,
    seed: int,
    work_dir: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
    training: Training | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains a policy, then plays whole episodes with it until they hold `num_steps` steps.

    Args:
        num_steps: Least number of steps of all episodes together.
        seed: The same seed gives the same episodes, bit for bit, on one platform.
        work_dir: Folder of the training's checkpoints, made if missing; a training found there is continued. It stays
            until the caller removes it. None: training cannot be continued.
        report: Called with a line about every leg of the training.
        training: Default: `Training()`.

    Yields:
        One episode of T steps, as the fields of a Minari `EpisodeBuffer`: observations (T + 1, 11), environment actions
        (T, 3) in [-1, 1], float64 rewards, terminations, truncations, the `seed` of the reset.

    Raises:
        RuntimeError: If training does not get to a medium return.
    """
    with tempfile.TemporaryDirectory() as fallback:
        policy = train(seed=seed, work_dir=work_dir or Path(fallback), report=report, training=training or Training())
    rng = np.random.default_rng([seed, 0])
    env: Any = gym.make(ENV_ID)
    try:
        while num_steps > 0:
            episode = play(env, policy, seed=int(rng.integers(2**31)))
            yield episode
            num_steps -= len(episode["rewards"])
    finally:
        env.close()


def reference_scores(*, num_episodes: int) -> tuple[float, float]:
    """Mean return of uniform random actions, and D4RL's expert return.

    Args:
        num_episodes: Episodes of random actions.
    """
    env: Any = gym.make(ENV_ID)
    seeds = range(_REFERENCE_SEED, _REFERENCE_SEED + num_episodes)
    returns = [play(env, None, seed=env_seed)["rewards"].sum() for env_seed in seeds]
    env.close()
    return float(np.mean(returns)), EXPERT_RETURN
