"""Collection of whole episodes from env runners: what runs inside a runner, and the joining of episode pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tree
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer

_WORKER_SEED_STRIDE = 10_007


def collect(
    runner: Any, *, seed: int, num_env_steps: int | None, random_actions: bool
) -> tuple[list[SingleAgentEpisode], dict[str, Any]]:
    """Runs inside an env runner: samples one episode, or with several sub-environments a number of steps.

    A runner with one environment collects one whole episode per call, begun by a seeded reset. A runner with several
    never resets them between calls, because RLlib's whole-episode mode would throw unfinished episodes away and so
    favour short ones; it returns pieces that `EpisodeJoiner` joins.

    Args:
        runner: RLlib's `SingleAgentEnvRunner`.
        seed: Seed of this round. The same seed gives the same episode, which makes resumed runs exact.
        num_env_steps: Steps over all sub-environments; None for one whole episode.
        random_actions: Whether actions are drawn uniformly instead of from the policy. RLlib's own option of that name
            would record environment actions where module actions belong.

    Returns:
        Episodes (or pieces) in NumPy form, and the runner's metrics.
    """
    runner_seed = (seed + _WORKER_SEED_STRIDE * (runner.worker_index or 0)) % 2**31
    runner.module.explores_randomly = random_actions
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runner_seed)
        if num_env_steps is None:
            runner._seed = runner_seed
            runner._needs_initial_reset = True  # RLlib seeds a reset only where this is set.
            episodes = runner.sample(num_episodes=1, explore=True)
        else:
            episodes = runner.sample(num_timesteps=num_env_steps, explore=True)
    runner.module.explores_randomly = False
    return episodes, runner.get_metrics()


class EpisodeJoiner:
    """Joins pieces of one episode by id and hands out episodes once they have ended."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[SingleAgentEpisode]] = {}

    def add(self, pieces: list[SingleAgentEpisode]) -> list[SingleAgentEpisode]:
        """Takes new pieces, those of one episode in order of time, and returns the episodes that are complete now."""
        finished = []
        for piece in pieces:
            begun = self._pieces.setdefault(piece.id_, [])
            begun.append(piece)
            if piece.is_done:
                del self._pieces[piece.id_]
                if begun[0].t_started == 0:  # Otherwise its beginning was lost with a restored run or a dead runner.
                    finished.append(join_pieces(begun))
        return finished

    def clear(self) -> None:
        """Forgets unfinished episodes, whose environments are gone."""
        self._pieces.clear()


def join_pieces(pieces: list[SingleAgentEpisode]) -> SingleAgentEpisode:
    """One episode out of its pieces, in order of time.

    RLlib's `concat_episode` insists on equal extra columns, which differ between a random and a policy's piece.
    """
    if len(pieces) == 1:
        return pieces[0]
    observations = [piece.get_observations(slice(0, len(piece))) for piece in pieces]
    observations.append(pieces[-1].get_observations(slice(len(pieces[-1]), len(pieces[-1]) + 1)))
    last = pieces[-1]
    return SingleAgentEpisode(
        last.id_,
        observations=_buffer(observations),
        actions=_buffer([piece.get_actions() for piece in pieces]),
        rewards=_buffer([piece.get_rewards() for piece in pieces]),
        infos=[{} for _ in range(sum(len(piece) for piece in pieces) + 1)],
        terminated=last.is_terminated,
        truncated=last.is_truncated,
        t_started=0,
        len_lookback_buffer=0,
    )


def _buffer(parts: list[Any]) -> InfiniteLookbackBuffer:
    joined = tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)
    return InfiniteLookbackBuffer(joined, lookback=0)
