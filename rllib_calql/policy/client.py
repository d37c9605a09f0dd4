"""`PolicyClient`: a control loop that acts by the latest policy of a training run and sends its episodes back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from rllib_calql.policy.connection import Connection, RefusedError
from rllib_calql.policy.episode_pieces import EpisodeOfClient
from rllib_calql.policy.policy import Policy
from rllib_calql.policy.spaces import Array
from rllib_calql.policy.wire import parsed_address

logger = logging.getLogger(__name__)


class PolicyClient:
    """A control loop's side of a training run that has `external_port` set. It needs NumPy and `msgpack` alone.

    ```python
    with PolicyClient("127.0.0.1:5555") as client:
        while client.wait():
            obs = robot.reset()
            client.reset(obs)
            terminated = truncated = False
            while not (terminated or truncated):
                action = client.act(obs)
                obs, reward, terminated, truncated = robot.step(action)
                client.step(action, reward, terminated, truncated, obs)
    ```

    `reset`, `act` and `step` never wait for the network: a thread connects, connects again after every interruption,
    sends and receives. Episodes are kept until the run has stored them, and the run stores each of them once. An
    episode is acted by the policy that was the latest at its `reset`.

    Args:
        address: "HOST:PORT" of the run.
        token: What the file in the run's `external_token_file` holds; None if it has none.
        piece_steps: Steps of an episode under way after which they are sent already; None: whole episodes.
        max_unsent_mebibytes: Of ended episodes that wait to be sent; the oldest are dropped beyond it.
        seed: Of the exploration; None for another one each time.

    Raises:
        ImportError: If `msgpack` is missing.
        ValueError: If an argument is none of those allowed.
        TypeError: If `address` or `token` is no text.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        piece_steps: int | None = None,
        max_unsent_mebibytes: float = 256.0,
        seed: int | None = None,
    ) -> None:
        if token is not None and not isinstance(token, str):
            raise TypeError(f"`token` must be a text or None, got {type(token).__name__}.")
        if token is not None and not token.strip():
            raise ValueError("`token` is empty; drop it if the run has none.")
        if piece_steps is not None and (type(piece_steps) is not int or piece_steps < 1):
            raise ValueError(f"`piece_steps` must be None or a positive integer, got {piece_steps!r}.")
        if not isinstance(max_unsent_mebibytes, (int, float)) or not max_unsent_mebibytes > 0:
            raise ValueError(f"`max_unsent_mebibytes` must be positive, got {max_unsent_mebibytes!r}.")
        self._max_unsent_bytes = max_unsent_mebibytes * 2**20
        self._rng = np.random.default_rng(seed)
        self._episode: EpisodeOfClient | None = None
        self._acting: tuple[Policy, bool] | None = None  # Policy of the episode, and whether it is not used.
        self._is_closed = False
        self._connection = Connection(*parsed_address(address), token.strip() if token else None, piece_steps)

    # --- What is known -----------------------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether the run is there."""
        return self._connection.known.is_connected

    @property
    def policy(self) -> Policy | None:
        """The latest policy of the run, for whatever else it is of use; None before the first one is here."""
        return self._connection.known.policy

    @property
    def policy_version(self) -> int:
        """Gradient updates that `policy` has had; -1 before the first one is here."""
        return self._connection.known.version

    @property
    def is_warm_up(self) -> bool:
        """Whether `act` draws actions uniformly, because the run has no policy worth exploring with yet."""
        return self._connection.known.is_random

    @property
    def num_waiting(self) -> int:
        """Ended episodes that are not known to be stored."""
        with self._connection.changed:
            return sum(episode.is_ended for episode in self._connection.outbox.episodes.values())

    @property
    def num_stored(self) -> int:
        """Episodes that the run has stored."""
        return self._connection.outbox.num_stored

    @property
    def num_rejected(self) -> int:
        """Episodes that the run did not take; `rejection` says why it did not take the last of them."""
        return self._connection.outbox.num_rejected

    @property
    def rejection(self) -> str | None:
        """Why the run did not take the last episode that it did not take; None if it took all."""
        return self._connection.outbox.rejection

    @property
    def num_dropped(self) -> int:
        """Episodes that were dropped here, because more were waiting than `max_unsent_mebibytes`."""
        return self._connection.outbox.num_dropped

    # --- The control loop --------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the run wants an episode, has received those before, and its latest policy is here.

        A loop that calls it between episodes keeps the run's pace: it pauses while the run makes the updates that are
        owed, and while the run is not there.

        Args:
            timeout_s: Seconds to wait; None for ever.

        Returns:
            True; False if it takes longer.

        Raises:
            ConnectionError: If the run refuses this client, or is another one than before, with the reason.
            RuntimeError: If the client is closed.
        """

        def is_wanted() -> bool:
            known, outbox = self._connection.known, self._connection.outbox
            is_all_there = all(not e.is_ended or id_ in outbox.received for id_, e in outbox.episodes.items())
            is_latest = known.policy is not None and known.held_id == known.policy_id
            return known.is_connected and known.is_wanted and is_all_there and is_latest

        return self._wait(is_wanted, timeout_s)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Waits until the run has stored all ended episodes. The arguments and errors are those of `wait`.

        Returns:
            True; False if it takes longer.
        """
        return self._wait(lambda: self.num_waiting == 0, timeout_s)

    def reset(self, obs: Any) -> None:
        """Begins an episode. One that is under way ends as one that was cut after its last step.

        Args:
            obs: The first observation, as the run's environment gives it.

        Raises:
            RuntimeError: If the run has not told its spaces and a policy yet; `wait` for it once.
            ConnectionError: If the run has refused this client.
            ValueError: If the observation is not one of the space, or a number of it is NaN or infinite.
        """
        self._check_open()
        known = self._connection.known
        if known.spaces is None or known.run is None or known.policy is None:
            raise RuntimeError("The run has not sent a policy yet; call `wait()` before the first episode.")
        begun = EpisodeOfClient(known.spaces, obs, known.run)
        self._cut()
        self._begin(begun)

    def act(self, obs: Any, *, explore: bool = True) -> Array:
        """The action for an observation, by the policy of the episode under way.

        Args:
            obs: As the run's environment gives it.
            explore: Whether the action is sampled, as training needs it; else it is the greedy one.

        Returns:
            An action in the environment's units and type, shape (A,).

        Raises:
            RuntimeError: If no episode has begun.
            ValueError: If the observation is not one of the space, or a number of it is NaN or infinite.
        """
        if self._acting is None:
            raise RuntimeError("No episode has begun; call `reset` with its first observation.")
        policy, is_random = self._acting
        if is_random and explore:
            return policy.compute_random_action(self._rng)
        return policy.compute_action(obs, explore, self._rng)

    def step(
        self,
        action: Any,
        reward: float,
        terminated: bool,
        truncated: bool,
        obs: Any,
        executed_action: Any = None,
        is_intervention: bool = False,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Notes one step, and hands the episode over if it ends with it.

        Args:
            action: What was asked for, in the environment's units and bounds.
            reward: Of the step.
            terminated: Whether the task ended by itself, in success or failure, so that nothing would follow.
            truncated: Whether the episode was cut, by a time limit or by somebody.
            obs: The observation after the step.
            executed_action: What the system did in place of `action`, if it is known; training learns from it.
            is_intervention: Whether a person chose what was done.
            info: Of the step; its numbers, True and False are sent, for `success_key`. The rest is left out.

        Raises:
            RuntimeError: If no episode has begun.
            ValueError: If a value is of another shape or kind than the run has, or is not finite; nothing is noted.
            TypeError: If a flag is none, or `info` no dict.
        """
        episode = self._episode
        if episode is None:
            raise RuntimeError("No episode has begun; call `reset` with its first observation.")
        connection = self._connection
        with connection.changed:
            episode.add(
                *(action, reward, terminated, truncated, obs),
                executed_action=executed_action,
                is_intervention=is_intervention,
                info=info,
            )
            is_long = not episode.is_ended and episode.num_steps >= connection.known.max_steps > 0
            if is_long:  # The run would cut it there.
                episode.end()
        if episode.is_ended:
            self._episode = None
            self._drop_beyond_limit()
        if is_long and connection.known.spaces is not None:
            self._begin(EpisodeOfClient(connection.known.spaces, obs, episode.run))
        connection.wake()

    def close(self, timeout_s: float = 30.0) -> int:
        """Ends the client. An episode under way ends as one that was cut, and what waits is sent.

        Args:
            timeout_s: Seconds to wait for the run to store it.

        Returns:
            Episodes that are not known to be stored, which is 0 if all is well.
        """
        if self._is_closed:
            return self.num_waiting
        self._cut()
        try:
            self.flush(timeout_s)
        except ConnectionError as err:
            logger.warning("%s", err)
        self._is_closed = True
        self._acting = None
        self._connection.close()
        if self.num_waiting:
            logger.warning("%d episodes are not known to be stored by the run; they are lost here.", self.num_waiting)
        return self.num_waiting

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- Inside ------------------------------------------------------------------------------------------------------

    def _wait(self, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        connection = self._connection
        with connection.changed:
            while True:
                self._check_open()
                if is_over():
                    return True
                left = 1.0 if end is None else end - time.monotonic()
                if left <= 0:
                    return False
                connection.wake()
                connection.changed.wait(min(left, 1.0))

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("The client is closed; make another one.")
        if (refusal := self._connection.known.refusal) is not None:
            raise RefusedError(refusal)

    def _begin(self, episode: EpisodeOfClient) -> None:
        with self._connection.changed:
            policy = self._connection.known.policy
            assert policy is not None
            self._acting = (policy, self._connection.known.is_random)
            self._episode = episode
            self._connection.outbox.episodes[episode.id] = episode

    def _cut(self) -> None:
        episode, self._episode = self._episode, None
        if episode is None:
            return
        with self._connection.changed:
            if episode.num_steps:
                episode.end()
            else:
                self._connection.outbox.episodes.pop(episode.id, None)
        self._drop_beyond_limit()
        self._connection.wake()

    def _drop_beyond_limit(self) -> None:
        with self._connection.changed:
            outbox = self._connection.outbox
            waiting = [episode for episode in outbox.episodes.values() if episode.is_ended]
            excess = sum(episode.num_bytes for episode in waiting) - self._max_unsent_bytes
            for episode in waiting[:-1]:
                if excess <= 0:
                    return
                excess -= episode.num_bytes
                del outbox.episodes[episode.id]
                outbox.num_dropped += 1
                logger.warning("An episode of %d steps is dropped: too many wait to be sent.", episode.num_steps)
