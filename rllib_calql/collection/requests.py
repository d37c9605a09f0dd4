"""Collection of whole episodes from env runners: what runs inside a runner, and the joining of episode pieces."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
import tree
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer

from rllib_calql.collection.budget import EnvStepMeter, GrantSpentError
from rllib_calql.collection.clients import RunNotes
from rllib_calql.collection.env_errors import described
from rllib_calql.learning.weights import Weights

_WORKER_SEED_STRIDE = 10_007


@dataclass(frozen=True)
class Collected:
    """What one request to an env runner brought.

    Attributes:
        pieces: Episodes, or pieces of them, in NumPy form.
        metrics: The runner's metrics.
        num_env_steps: Env steps made.
        seconds: Time they took.
        granted: Env steps that it might have made.
        taken: Env steps that the environments have taken, also those of which nothing is left.
        receipt: What a runner with clients has to be told once this has been taken; None of others.
        num_clients: Clients that are connected to it.
    """

    pieces: list[SingleAgentEpisode]
    metrics: dict[str, Any]
    num_env_steps: int
    seconds: float
    granted: float = math.inf
    taken: int = 0
    receipt: tuple[str, int] | None = None
    num_clients: int = 0


@dataclass(frozen=True)
class Failure:
    """What went wrong inside an env runner, as text: the exception's class may not be known outside.

    Attributes:
        cause: The text.
        granted: Env steps that the request might have made.
        taken: Env steps that it has made.
    """

    cause: str
    granted: float = math.inf
    taken: int = 0


def collect(
    runner: Any,
    *,
    seed: int,
    num_env_steps: int | None,
    random_actions: bool,
    weights: Weights | None = None,
    generation: int = 0,
    notes: RunNotes | None = None,
    max_env_steps: float = math.inf,
    on_taken: Callable[[int], None] = lambda _: None,
) -> Collected:
    """Runs inside an env runner: samples one episode or a number of steps.

    One whole episode is begun by a seeded reset. By steps, environments are never reset between calls, because RLlib's
    whole-episode mode would throw unfinished episodes of several sub-environments away and so favour short ones; it
    returns pieces that `EpisodeJoiner` joins.

    Args:
        runner: RLlib's `SingleAgentEnvRunner`.
        seed: Seed of this request. The same seed gives the same episode, which makes resumed runs exact.
        num_env_steps: Steps over all sub-environments; None for one whole episode.
        random_actions: Whether actions are drawn uniformly instead of from the policy. RLlib's own option of that name
            would record environment actions where module actions belong.
        weights: Weights to take first unless the runner has them; None keeps the runner's.
        generation: Where it grows, all sub-environments begin anew: their unfinished episodes are of no use after a
            restore.
        notes: For a runner whose environments are clients.
        max_env_steps: Env steps that may be taken at most, over all sub-environments. A whole episode is cut there.
        on_taken: Called with the env steps taken, also if something is raised.

    Returns:
        Episodes or pieces, and the runner's metrics.
    """
    if notes is not None:
        runner.take_notes(notes)
    if weights is not None and getattr(runner, "_calql_weights_version", None) != weights.version:
        # Without a sequence number runners always take the weights, also older ones out of a checkpoint.
        runner.set_state(ray.get(weights.reference))
        runner._calql_weights_version = weights.version
    runner_seed = (seed + _WORKER_SEED_STRIDE * (runner.worker_index or 0)) % 2**31
    runner.module.explores_randomly = random_actions
    is_stale = getattr(runner, "_calql_generation", generation) != generation
    runner._calql_generation = generation
    begin = time.perf_counter()
    meter = EnvStepMeter(runner, max_env_steps, is_whole_episode=num_env_steps is None)
    pieces: list[SingleAgentEpisode] = []
    try:
        with torch.random.fork_rng(devices=[]), meter:
            torch.manual_seed(runner_seed)
            if num_env_steps is None or is_stale or getattr(runner, "_needs_initial_reset", False):
                runner._seed = runner_seed
                runner._needs_initial_reset = True  # RLlib seeds a reset only where this is set.
            if num_env_steps is None:
                pieces = runner.sample(num_episodes=1, explore=True)
            else:
                # RLlib makes up to a step of all other sub-environments more than it is asked for.
                most = max_env_steps - (runner.num_envs - 1)
                pieces = runner.sample(num_timesteps=int(min(num_env_steps, most)), explore=True)
    except GrantSpentError:
        runner._needs_initial_reset = True
    finally:
        runner.module.explores_randomly = False
        on_taken(meter.num_env_steps)
    seconds = time.perf_counter() - begin
    num_made = sum(len(piece) for piece in pieces)
    return Collected(
        pieces,
        runner.get_metrics(),
        num_made,
        seconds,
        max_env_steps,
        meter.num_env_steps,
        receipt=getattr(runner, "receipt", None),
        num_clients=getattr(runner, "num_clients", 0),
    )


def collect_or_tell(
    runner: Any, *, notes: RunNotes | None = None, receipt: tuple[str, int] | None = None, **arguments: Any
) -> Collected | Failure:
    """The same as `collect` for a remote runner: what goes wrong is returned.

    RLlib would end the runner's process, and its cause would be in that process's log alone.

    Args:
        runner: RLlib's `SingleAgentEnvRunner`.
        notes: For a runner whose environments are clients.
        receipt: The last of this runner's.
        **arguments: Of `collect`.
    """
    if notes is not None:
        notes = replace(notes, receipt=receipt)
    taken: list[int] = []
    try:
        return collect(runner, notes=notes, **arguments, on_taken=taken.append)
    except Exception as error:
        return Failure(described(error), arguments.get("max_env_steps", math.inf), sum(taken))


def evaluate_or_tell(runner: Any) -> Failure | None:
    """Runs inside a remote env runner of evaluations that gave nothing: what one episode raises, if it does."""
    try:
        runner.sample(num_episodes=1, explore=False)
    except Exception as error:
        return Failure(described(error))
    return None


class EpisodeJoiner:
    """Joins pieces of one episode by id and hands out episodes once they have ended."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[SingleAgentEpisode]] = {}
        self._runner_of: dict[str, int | None] = {}

    @property
    def num_env_steps(self) -> int:
        """Env steps of unfinished episodes."""
        return sum(len(piece) for pieces in self._pieces.values() for piece in pieces)

    def add(self, pieces: list[SingleAgentEpisode], runner: int | None = None) -> list[SingleAgentEpisode]:
        """Takes new pieces, those of one episode in order of time.

        Args:
            pieces: Pieces.
            runner: Index of the env runner they come from.

        Returns:
            The episodes that are complete now.
        """
        finished = []
        for piece in pieces:
            begun = self._pieces.setdefault(piece.id_, [])
            begun.append(piece)
            self._runner_of[piece.id_] = runner
            if piece.is_done:
                del self._pieces[piece.id_], self._runner_of[piece.id_]
                if begun[0].t_started == 0:  # Otherwise its beginning was lost with a restored run or a dead runner.
                    finished.append(join_pieces(begun))
        return finished

    def cut(self) -> list[SingleAgentEpisode]:
        """Ends all unfinished episodes where they are, as truncated ones, and hands them out."""
        unfinished = [pieces for pieces in self._pieces.values() if pieces[0].t_started == 0]
        self.clear()
        for pieces in unfinished:
            pieces[-1].is_truncated = True
        return [join_pieces(pieces) for pieces in unfinished if sum(map(len, pieces))]

    def forget(self, runner: int) -> int:
        """Forgets the unfinished episodes of an env runner that is lost, and returns their number."""
        lost = [id_ for id_, index in self._runner_of.items() if index == runner]
        for id_ in lost:
            del self._pieces[id_], self._runner_of[id_]
        return len(lost)

    def clear(self) -> None:
        """Forgets all unfinished episodes, whose environments are gone."""
        self._pieces.clear()
        self._runner_of.clear()


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
        infos=[*pieces[0].get_infos(), *(info for piece in pieces[1:] for info in piece.get_infos()[1:])],
        terminated=last.is_terminated,
        truncated=last.is_truncated,
        t_started=0,
        len_lookback_buffer=0,
    )


def _buffer(parts: list[Any]) -> InfiniteLookbackBuffer:
    joined = tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)
    return InfiniteLookbackBuffer(joined, lookback=0)
